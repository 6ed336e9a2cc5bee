"""GGUF: the block types of llama.cpp, as ggml stores them.

The torch weight ``[n, k]`` is cut into blocks of 32 to 256 inputs, each with the bytes
of its codes, which `gguf_planes` draws, and what its scales are made of, as
`gguf_blocks` does. With float16 ``d`` and ``m``, and small integers ``f`` and ``u`` of
a group of 16 or 32 inputs in a block of 256, the weight is, in float32,

    Q4_0  Q5_0  Q8_0    (q - 2**(bits-1)) * d
    Q4_1  Q5_1          q * d + m
    Q3_K  Q6_K          (q - 2**(bits-1)) * (f * d)
    Q2_K  Q4_K  Q5_K    q * (f * d) - u * m
    IQ4_NL              table[q] * d
    IQ4_XS              table[q] * (f * d)
    MXFP4               E2M1[q] * 2**(e - 127)
    NVFP4               E2M1[q] * E4M3[s]

where all products are exact, and only the sum is rounded. ``s`` has no sign. Of NVFP4 a
tensor ``scale`` beside the weight, float32, multiplies the whole matrix, and E2M1's
minus zero stays one, where ggml has 0. Types of one to three bits, in `gguf_grids`, are
read, and not written.

Source: ggml-org/llama.cpp, ggml/src/ggml-common.h, ggml/src/ggml-quants.c and
gguf-py/gguf/quants.py, as in release 0.19.0 of the package gguf; conversion/base.py and
src/llama-model.cpp of llama-cpp-python 0.3.36 (``scale``).
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8

from qjax import decode, tensor
from qjax.formats import modelopt, mxfp4
from qjax.formats.checks import (
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_tensors,
    check_width,
    check_words,
)
from qjax.formats.gathering import of_whole
from qjax.formats.gguf_blocks import (
    FACTORS,
    IQ4,
    MINIMA,
    OTHERS,
    TYPES,
    Type,
    join_blocks,
    split_blocks,
)
from qjax.formats.gguf_grids import GRIDS, Grid
from qjax.formats.gguf_planes import pack_planes, unpack_planes
from qjax.formats.gptq import Stream
from qjax.tensor import (
    Affine,
    Cut,
    Digits,
    Encoded,
    Grouping,
    Layout,
    Nested,
    QTensor,
    Segment,
)

__all__ = [
    "GRIDS",
    "KINDS",
    "OTHERS",
    "TENSORS",
    "TYPES",
    "Config",
    "Planes",
    "axes",
    "check",
    "from_tensors",
    "to_tensors",
]

TENSORS = ("weight", "scale")
# All types that are read; those of `TYPES` are written, too.
KINDS: Mapping[str, Type | Grid] = types.MappingProxyType({**TYPES, **GRIDS})
_EXPECTED = {
    "weight": Expected((jnp.uint8,), None),
    "scale": Expected((jnp.float32,), None, optional=True),
}
# The largest number of E4M3; 127, which ggml reads as 0, is none, and 128 a sign.
_LARGEST = 126
# Bits of the low and the high plane, by the width of a code.
_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
# ggml has integers for them, of which none is -0.0.
_E2M1 = tensor.numbers(4) + np.float32(0)


@dataclasses.dataclass(frozen=True)
class Planes(Layout):
    """Blocks along k, a low and a high plane: words uint8 ``[n, k / block, bytes]``.

    Attributes:
      block: Codes of a block, whose words are the low plane and then the high one.
      run: Bytes of a run of the low plane.
      high_run: Bytes of a run of the high plane; None if there is none.
    """

    block: int
    run: int
    high_run: int | None = None

    rank: typing.ClassVar[int] = 3

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "n b c"]:
        """Packs ``[k, n]`` codes; k must be a multiple of ``block``."""
        self._check(bits)
        check_codes(codes)
        if codes.shape[0] % self.block:
            raise ValueError(
                f"codes.shape[0]={codes.shape[0]} must be a multiple of {self.block}, "
                "the codes of a block; pad codes."
            )
        return pack_planes(codes, self.block, self._planes(bits))

    def unpack(self, words: UInt8[Array, "n b c"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[n, k / block, bytes]`` words."""
        check_words(words, self.rank, jnp.uint8)
        self.extents(words.shape, bits)
        return unpack_planes(words, self.block, self._planes(bits))

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(block * blocks, n)``."""
        self._check(bits)
        size = self.block * bits // 8
        if len(shape) != 3 or shape[2] != size:
            raise ValueError(
                f"words.shape={shape} must be [n, k / {self.block}, {size}]."
            )
        return self.block * shape[1], shape[0]

    def cut(self, bits: int) -> Cut:
        """Cuts between blocks, and between columns."""
        del bits
        return Cut(k_axis=1, rows=self.block, n_axis=0, columns=1)

    def digits(self, bits: int) -> Digits | None:
        """Permutes those of codes that are one plane."""
        is_one = self.high_run is None and len(_WIDTHS.get(bits, ())) == 1
        if not is_one or any(size & size - 1 for size in (self.block, self.run)):
            return None
        low = self.run.bit_length() - 1
        count = (8 // bits).bit_length() - 1
        fields = " ".join(f"k{low + place}" for place in reversed(range(count)))
        return Digits("n", fields=fields, width=8)

    def _planes(self, bits: int) -> tuple[tuple[int, int], ...]:
        """Width and run of each plane."""
        runs = [self.run] if self.high_run is None else [self.run, self.high_run]
        return tuple(zip(_WIDTHS[bits], runs, strict=True))

    def _check(self, bits: int) -> None:
        """Checks that the planes of codes of a width are whole runs."""
        check_width(bits, tuple(_WIDTHS), "GGUF")
        if len(_WIDTHS[bits]) != (1 if self.high_run is None else 2):
            raise ValueError(
                f"bits={bits} in planes of {_WIDTHS[bits]} bits do not fit {self!r}, "
                "which has a high plane if high_run is not None."
            )
        for width, run in self._planes(bits):
            if self.block % (8 // width * run):
                raise ValueError(
                    f"block={self.block} must be whole runs of {8 // width * run} "
                    f"codes: of {run} bytes, each with fields of {width} bits."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a GGUF file says of one of its tensors.

    Attributes:
      type: Name of the type of its blocks, in `KINDS`.
    """

    type: str

    @property
    def checkpoint_format(self) -> str:
        """What `qjax inspect` calls the format."""
        return f"gguf {self.type}"

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Refuses the ``quantization_config`` of a directory; a file has its own types.

        Args:
          entry: The parsed JSON object.

        Raises:
          ValueError: Always.
        """
        raise ValueError(
            f"quant_method={entry.get('quant_method')!r} is that of single files; pass "
            "the path of the .gguf file instead of its directory."
        )


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one matrix, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``: ``weight``, the blocks,
        uint8 ``[*batch, n, k / block, size]``, as they lie in the file; of NVFP4
        optionally ``scale``, a float32 for each matrix, ``[*batch]``, or ``[1]`` of
        one.
      config: The type of the blocks.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_choice("type", config.type, KINDS)
    check_tensors(tensors, _EXPECTED, "GGUF")
    kind, shape = KINDS[config.type], tuple(tensors["weight"].shape)
    if len(shape) < 3 or shape[-1] != kind.size or 0 in shape:
        raise ValueError(
            f"weight.shape={shape} must be [..., n, k / {kind.block}, {kind.size}] of "
            f"{config.type}, not empty."
        )
    if "scale" in tensors:
        found, batch = tuple(tensors["scale"].shape), shape[:-3]
        if config.type != "NVFP4":
            raise ValueError(
                f"scale beside a weight of {config.type} is not read, but of NVFP4."
            )
        if found not in (batch, batch or (1,)):
            raise ValueError(f"scale.shape={found} must be {batch or (1,)}.")


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of the tensors, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: As in `check`.

    Returns:
      "k", "n", or "b0" and so on of a stack for each axis, "" for one that is not cut,
      by upstream name.
    """
    del config
    *batch, _, blocks, _ = tensors["weight"].shape
    stack = tuple(f"b{i}" for i in range(len(batch)))
    # A block is not cut, and what has a size of 1 is taken for what all share.
    k = "k" if blocks > 1 else ""
    runs: dict[str, tuple[str, ...]] = {"weight": (*stack, "n", k, "")}
    if "scale" in tensors:
        runs["scale"] = stack or ("",) * len(tensors["scale"].shape)
    return runs


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix, or a stack of them.

    Args:
      tensors: Concrete arrays, as `check` describes them.
      config: The type of the blocks.

    Returns:
      ``[*batch, k, n]`` tensor in a layout `Planes`; its dtype is float32. Blocks of
      256 have `tensor.Nested` scales and minima, MXFP4 has `mxfp4.E8M0` and NVFP4
      `modelopt.TimesGlobal` scales, others plain float16. Types of `gguf_grids` come in
      a `gptq.Stream`, with `tensor.Nested` scales; Q1_0, Q2_0 and the ternary ones with
      float16, and zeros of 0.5 or 1.

    Raises:
      ValueError: As `check`; or if a scale or a minimum is not finite, or ``d`` of Q1_0
        is too large to be doubled.

    Example:
      >>> blocks = np.zeros((8, 1, 144), np.uint8)
      >>> from_tensors({"weight": blocks}, Config(type="Q4_K"))
      QTensor(256x8, 4 bits, group 32, Planes(block=256, run=32, ...), q * s + z, ...)
    """
    check(tensors, config)
    if config.type in GRIDS:
        return _from_grid(np.asarray(tensors["weight"]), GRIDS[config.type])
    kind = TYPES[config.type]
    parts = split_blocks(np.asarray(tensors["weight"]), kind)
    check_finite(
        {f"weight's {name}": parts[name] for name in parts.keys() & {"d", "m"}}
    )
    words = np.concatenate([parts[p] for p in ("low", "high") if p in parts], axis=-1)
    if kind.bits == 8:
        words = words ^ np.uint8(128)  # Signed codes become those above 0.
    batch = words.shape[:-3]
    if "s" in parts:
        whole = tensors.get("scale", np.ones(batch, np.float32))
        parts["scale"] = np.asarray(whole).reshape(batch)
    return tensor.build(
        (jnp.asarray(words),),
        _scale(parts, kind),
        _zero(parts, kind),
        layout=_layout(kind),
        segments=(Segment(kind.bits, kind.group_size),),
        affine=kind.affine,
        codebook=_codebook(kind, batch),
        weight_dtype="float32",
    )


def _from_grid(blocks: np.ndarray, kind: Grid) -> QTensor:
    parts, layout = kind.read(blocks), Stream()
    check_finite({"weight's d": parts.d})
    scale: Any = _along_k(parts.d)
    zero, codebook = None, None
    if kind.bits == 1:
        # What lies between its two codes, which are twice d apart.
        scale, zero = scale * 2, jnp.full_like(scale, 0.5)
        check_finite({"2 * d of weight": scale})
    elif parts.factors is None:
        zero = jnp.ones_like(scale, jnp.uint8)
    else:
        scale = Nested(factor=_along_k(parts.factors), step=scale)
        codebook = jnp.broadcast_to(jnp.asarray(kind.table), (*blocks.shape[:-3], 16))
    pack = functools.partial(layout.pack, bits=kind.bits)
    words = jnp.vectorize(pack, signature="(k,n)->(r,n)")(_along_k(parts.codes))
    return tensor.build(
        (words,),
        scale,
        zero,
        layout=layout,
        segments=(Segment(kind.bits, kind.group_size),),
        affine=Affine.ZERO if codebook is None else Affine.CODEBOOK,
        codebook=codebook,
        weight_dtype="float32",
    )


def _layout(kind: Type) -> Planes:
    return Planes(kind.block, kind.run, kind.high_run)


def _scale(parts: Mapping[str, np.ndarray], kind: Type) -> Array | Encoded:
    if "e" in parts:
        if (parts["e"] == 255).any():
            raise ValueError("weight's e must be finite; found 255, which is none.")
        return mxfp4.E8M0(exponent=_along_k(parts["e"]))
    if "s" in parts:
        _check_small(parts["s"])
        check_finite({"scale": parts["scale"]})
        return modelopt.TimesGlobal(
            local=_along_k(parts["s"]), whole=jnp.asarray(parts["scale"])
        )
    if kind.is_nested:
        return Nested(factor=_along_k(parts[FACTORS]), step=_along_k(parts["d"]))
    return _along_k(parts["d"])


def _check_small(scales: np.ndarray) -> None:
    """Refuses patterns of E4M3 that are no positive numbers."""
    if scales.max() > _LARGEST:
        raise ValueError(
            f"scales of 8 bits must be at most {_LARGEST}, E4M3's 448; found "
            f"{scales.max()}, which is negative or no number."
        )


def _zero(parts: Mapping[str, np.ndarray], kind: Type) -> Array | Encoded | None:
    if "m" not in parts:
        return None
    step = _along_k(parts["m"])
    if kind.is_nested:
        return Nested(factor=_along_k(parts[MINIMA]), step=step, negative=True)
    return step


def _codebook(kind: Type, batch: tuple[int, ...]) -> Array | None:
    table = _table(kind)
    if table is None:
        return None
    return jnp.broadcast_to(jnp.asarray(table), (*batch, table.size))


def _table(kind: Type) -> np.ndarray | None:
    if kind.affine is not Affine.CODEBOOK:
        return None
    return _E2M1 if "e" in kind.parts else IQ4


def _along_k(part: np.ndarray) -> Array:
    """``[..., n, blocks, count]`` to ``[..., blocks * count, n]``."""
    return jnp.asarray(part.reshape(*part.shape[:-2], -1).swapaxes(-1, -2))


def _by_block(values: Any, blocks: int) -> np.ndarray:
    """Inverse of `_along_k`."""
    turned = np.asarray(values).swapaxes(-1, -2)
    return turned.reshape(*turned.shape[:-1], blocks, -1)


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix, or a stack of them, as GGUF has it.

    Args:
      qt: What `from_tensors` returned, in any layout, or a tensor like it with concrete
        leaves. The type is the one that holds its width, map and scales.

    Returns:
      ``weight`` and, of NVFP4, ``scale``, as `check` describes them.

    Raises:
      ValueError: If no type of `TYPES` can hold ``qt``, with the reason.
    """
    kind = _holding(qt)
    words = np.asarray(decode.relayout(qt, _layout(kind)).words[0])
    if kind.bits == 8:
        words = words ^ np.uint8(128)
    low = kind.parts["low"]
    parts = {"low": words[..., :low], "high": words[..., low:]}
    scale, zero, blocks = qt.scale, qt.zero, words.shape[-2]
    tensors = {}
    if isinstance(scale, mxfp4.E8M0):
        parts["e"] = _by_block(scale.exponent, blocks)
    elif isinstance(scale, modelopt.TimesGlobal):
        parts["s"] = _by_block(scale.local, blocks)
        _check_small(parts["s"])
        tensors["scale"] = jnp.atleast_1d(scale.whole)
    elif isinstance(scale, Nested):
        parts[FACTORS] = _by_block(scale.factor, blocks)
        parts["d"] = _by_block(scale.step, blocks)
    else:
        parts["d"] = _by_block(scale, blocks)
    if isinstance(zero, Nested):
        parts[MINIMA] = _by_block(zero.factor, blocks)
        parts["m"] = _by_block(zero.step, blocks)
    elif zero is not None:
        parts["m"] = _by_block(zero, blocks)
    stored = join_blocks(parts, kind)
    again = split_blocks(stored, kind)
    for name in parts.keys() & {FACTORS, MINIMA}:
        if (again[name] != parts[name]).any():
            raise ValueError(f"GGUF cannot hold {qt!r}: its {name} have too many bits.")
    return {"weight": jnp.asarray(stored), **tensors}


def _holding(qt: QTensor) -> Type:
    """Returns the type that holds a tensor, or says why none does."""
    kinds = [kind for kind in TYPES.values() if _is_of(qt, kind)]
    if len(qt.segments) != 1 or qt.grouping is not Grouping.ROWS:
        reason = "its rows have several widths, or its groups are no runs of rows"
    elif any(v is not None for v in (qt.order, qt.row_group, qt.input_scale)):
        reason = "it has an order of rows or an input scale; GPTQ holds an order"
    elif not kinds:
        reason = (
            "no type has its width, map, group size and scales: float16, or, in blocks "
            "of 256, what qjax.prepare decodes; write the tensor before that"
        )
    elif qt.k % kinds[0].block or not _has_own_columns(qt):
        reason = f"k={qt.k} is not whole blocks, or columns share scales"
    else:
        return kinds[0]
    raise ValueError(f"GGUF cannot hold {qt!r}: {reason}.")


def _is_of(qt: QTensor, kind: Type) -> bool:
    """Whether width, map, group size and scales of a tensor are those of a type."""
    (bits, group_size, _), *_ = qt.segments
    if (bits, group_size, qt.affine) != (kind.bits, kind.group_size, kind.affine):
        return False
    table = _table(kind)
    if table is not None and (np.asarray(qt.codebook) != table).any():
        return False
    if (qt.zero is None) == ("m" in kind.parts):
        return False
    parameters = [qt.scale] if qt.zero is None else [qt.scale, qt.zero]
    return all(_is_like(p, kind, p is qt.zero) for p in parameters)


def _is_like(parameter: Any, kind: Type, negative: bool) -> bool:
    """Whether a scale or zero has the encoding of a type, or none and is float16."""
    encodings = {"e": mxfp4.E8M0, "s": modelopt.TimesGlobal, "scales": Nested}
    encoding = next((encodings[p] for p in kind.parts if p in encodings), None)
    if encoding is None:
        return not isinstance(parameter, Encoded) and parameter.dtype == jnp.float16
    if not isinstance(parameter, Nested):
        return isinstance(parameter, encoding)
    groups, blocks = (leaf.shape[-2] for leaf in (parameter.factor, parameter.step))
    whole = groups * kind.group_size == blocks * kind.block
    return encoding is Nested and whole and parameter.negative == negative


def _has_own_columns(qt: QTensor) -> bool:
    return all(p.shape[-1] == qt.n for p in (qt.scale, qt.zero) if p is not None)
