"""MXFP4: four-bit floats, two a byte, with a power of two for every 32 of them.

A code is the pattern of an E2M1 float, as `qjax.tensor.floats` draws it: 0, 0.5, 1,
1.5, 2, 3, 4, 6 and their negatives.

The torch weight ``[n, k]`` is cut into blocks of 32 inputs. ``blocks[j, g, i]`` is byte
``i`` of the 16 of a block, the first of two codes in the low nibble,

    bit 7                             bit 0
    | q[32g + 2i + 1, j] | q[32g + 2i, j] |

and ``scales[j, g]`` is an E8M0 number, the exponent of a power of two: ``2**(e - 127)``
for 0 to 254, not a number for 255. The weight ``code * 2**(e - 127)`` is exact in
bfloat16 where it is not beyond its range. gpt-oss stores all experts of a layer in one
tensor, with a leading axis.

Source: openai/gpt-oss, gpt_oss/torch/weights.py and README.md, commit
7b583341fe16729127f6d5b94a7b09ccae97e1a1; huggingface/transformers,
src/transformers/integrations/mxfp4.py, release 5.23.0; the numbers: OCP Microscaling
Formats (MX) Specification, version 1.0.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Integer, UInt8

from qjax import decode, tensor
from qjax.bits import transpose_codes
from qjax.formats.checks import (
    Expected,
    check_codes,
    check_method,
    check_shapes,
    check_tensors,
    check_weight,
    check_width,
    check_words,
)
from qjax.formats.gathering import of_whole
from qjax.formats.patterns import ends_any, left_dense
from qjax.tensor import Affine, Cut, Digits, Encoded, Grouping, Layout, QTensor, Segment

BLOCK = 32
# Exponent of the largest power of two among the codes, 4.
_LARGEST_EXPONENT = 2
_NAN = 255


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of 16 bytes along k: words uint8 ``[n, k / 32, 16]``."""

    rank: typing.ClassVar[int] = 3

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "n g 16"]:
        """Packs ``[k, n]`` codes; k must be a multiple of 32."""
        check_width(bits, (4,), "MXFP4")
        check_codes(codes)
        if codes.shape[0] % BLOCK:
            raise ValueError(
                f"codes.shape[0]={codes.shape[0]} must be a multiple of {BLOCK}, the "
                "codes of a block; pad codes."
            )
        return _pack(codes)

    def unpack(self, words: UInt8[Array, "n g 16"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[n, k / 32, 16]`` words."""
        check_words(words, self.rank, jnp.uint8)
        self.extents(words.shape, bits)
        return unpack_pairs(words)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(32 * groups, n)``."""
        check_width(bits, (4,), "MXFP4")
        if len(shape) != 3 or shape[2] != BLOCK // 2:
            raise ValueError(f"words.shape={shape} must be [n, k / {BLOCK}, 16].")
        return BLOCK * shape[1], shape[0]

    def cut(self, bits: int) -> Cut:
        """Cuts between blocks, and between columns."""
        del bits
        return Cut(k_axis=1, rows=BLOCK, n_axis=0, columns=1)

    def digits(self, bits: int) -> Digits:
        """Permutes them: blocks follow each other."""
        del bits
        return Digits("n", fields="k0", width=8)


@jax.jit
def pack_pairs(codes: Integer[Array, "k n"]) -> UInt8[Array, "n bytes"]:
    """Packs codes of 4 bits along k, two a byte, the first in the low nibble."""
    fields = transpose_codes(codes).reshape(codes.shape[1], -1, 2) & jnp.uint8(15)
    return fields[..., 0] | (fields[..., 1] << 4)


@jax.jit
def unpack_pairs(words: UInt8[Array, "n ..."]) -> UInt8[Array, "k n"]:
    """Inverse of `pack_pairs`, of bytes on any number of axes."""
    fields = jnp.stack([words & jnp.uint8(15), words >> 4], axis=-1)
    return transpose_codes(fields.reshape(words.shape[0], -1))


def _pack(codes: Array) -> Array:
    return pack_pairs(codes).reshape(codes.shape[1], -1, BLOCK // 2)


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class E8M0(Encoded):
    """Powers of two, kept as the exponents that a file has.

    Attributes:
      exponent: uint8 ``[*batch, groups, n]``: 127 for 1, 255 for NaN.

    Example:
      >>> E8M0(exponent=jnp.array([[0, 127, 254]], jnp.uint8)).decode()
      Array([[5.87747e-39, 1, 1.70141e+38]], dtype=bfloat16)
    """

    exponent: Array

    def decode(self) -> BFloat16[Array, "*batch groups n"]:
        """Returns the scales in bfloat16, which holds all of them."""
        return _decode(self.exponent)


@jax.jit
def _decode(exponent: Array) -> Array:
    # bfloat16 has the same eight bits of exponent. Patterns, as arithmetic would flush
    # 2**-127: it is subnormal, the highest bit of the mantissa.
    pattern = exponent.astype(jnp.uint16) << 7
    pattern = jnp.where(exponent == 0, jnp.uint16(1 << 6), pattern)
    pattern = jnp.where(exponent == _NAN, jnp.uint16(0x7FC0), pattern)
    return lax.bitcast_convert_type(pattern, jnp.bfloat16)


# Stacks have any number of leading axes.
_EXPECTED = {
    "blocks": Expected((jnp.uint8,), None),
    "scales": Expected((jnp.uint8,), None),
}
TENSORS = tuple(_EXPECTED)
# What joins these to a path: transformers' names have "_", openai's own a dot.
JOINTS = "._"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an MXFP4 ``quantization_config`` says.

    Attributes:
      ignored: Patterns of paths that stay dense.
    """

    ignored: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value.
        """
        check_method(entry, "mxfp4")
        return cls(ignored=left_dense(entry))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        A pattern ends at a dot or at the end of the path, or is the path's end, as
        transformers has it; it may speak of the matrix or of the experts it belongs to.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.experts.down_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        paths = (module, module.rpartition(".")[0])
        left = any(ends_any(self.ignored, path) for path in paths)
        return None if left else self


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one matrix or stack, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``blocks`` uint8 ``[*batch, n, k / 32, 16]`` and ``scales`` uint8
        ``[*batch, n, k / 32]``.
      config: The configuration; it changes nothing.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    del config
    check_tensors(tensors, _EXPECTED, "MXFP4")
    blocks = tuple(tensors["blocks"].shape)
    if len(blocks) < 3 or blocks[-1] != BLOCK // 2 or 0 in blocks:
        raise ValueError(
            f"blocks.shape={blocks} must be [..., n, k / {BLOCK}, 16], not empty."
        )
    check_shapes(tensors, {"scales": blocks[:-1]}, f"blocks.shape={blocks}")


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The configuration; it changes nothing.

    Returns:
      "n" and "k", "b0" and so on for the axes of a stack, and "" within a block.
    """
    del config
    *batch, _, blocks, _ = tensors["blocks"].shape
    # A block is not cut, and what has a size of 1 is taken for what all share.
    runs = (*[f"b{i}" for i in range(len(batch))], "n", "k" if blocks > 1 else "")
    return {"blocks": (*runs, ""), "scales": runs}


def from_tensors(tensors: Mapping[str, Any], config: Config | None = None) -> QTensor:
    """Reads one quantized matrix, or a stack of them.

    Weights whose magnitude is below 2**-126 are subnormal in bfloat16 and float32.
    `qjax.dequantize` gives them exactly; products on a CPU take them for 0.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The matrix's configuration.

    Returns:
      ``[*batch, k, n]`` tensor in the layout `Blocks` with `E8M0` scales; its dtype is
      bfloat16.

    Raises:
      ValueError: As `check`; or if a scale is 255, which is not a number.

    Example:
      >>> tensors = {
      ...     "blocks": np.zeros((8, 3, 16), np.uint8),
      ...     "scales": np.full((8, 3), 127, np.uint8),
      ... }
      >>> from_tensors(tensors)
      QTensor(96x8, 4 bits, group 32, Blocks(), float(q) * s, bfloat16 scale, 408 B)
    """
    check(tensors, config or Config())
    blocks, scales = (np.asarray(tensors[name]) for name in TENSORS)
    if (scales == _NAN).any():
        count = np.count_nonzero(scales == _NAN)
        raise ValueError(f"scales holds {count} times {_NAN}, which is not a number.")
    return _build(jnp.asarray(blocks), jnp.asarray(scales.swapaxes(-1, -2)))


def _build(words: Array, exponent: Array) -> QTensor:
    return tensor.build(
        (words,),
        E8M0(exponent=exponent),
        layout=Blocks(),
        segments=(Segment(4, BLOCK),),
        affine=Affine.FLOAT,
    )


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix, or a stack of them, under the upstream's names.

    Args:
      qt: A tensor of E2M1 codes with concrete leaves, prepared or not.

    Returns:
      ``blocks`` and ``scales`` as `check` describes them.

    Raises:
      ValueError: If MXFP4 cannot hold ``qt``, with the reason.
    """
    exponent = _holdable(qt)
    return {
        "blocks": decode.relayout(qt, Blocks()).words[0],
        "scales": exponent.swapaxes(-1, -2),
    }


def _holdable(qt: QTensor) -> Array:
    """Returns the exponents of the scales, or says why MXFP4 cannot hold the tensor."""
    exponent = None
    if len(qt.segments) != 1 or qt.segments[0].bits != 4:
        reason = "its codes have other widths than 4"
    elif any(v is not None for v in (qt.order, qt.row_group, qt.input_scale)):
        reason = "it has an order of rows or an input scale; GPTQ holds an order"
    elif qt.affine is not Affine.FLOAT:
        reason = "its codes are not E2M1 floats; quantize makes them"
    elif qt.grouping is not Grouping.ROWS or qt.segments[0].group_size != BLOCK:
        reason = f"its scales are not for blocks of {BLOCK} inputs"
    elif qt.k % BLOCK or qt.scale.shape[-1] != qt.n:
        reason = f"k={qt.k} is not whole blocks, or columns share scales"
    else:
        exponent = _exponents(qt.scale)
        reason = None if exponent is not None else "its scales are no powers of two"
    if exponent is None:
        raise ValueError(f"MXFP4 cannot hold {qt!r}: {reason}.")
    return exponent


def _exponents(scale: Any) -> Array | None:
    """The exponents of scales, or None if E8M0 cannot hold all of them."""
    if isinstance(scale, E8M0):
        return scale.exponent
    # NumPy keeps subnormal numbers. A power of two has the mantissa 0.5.
    plain = np.asarray(tensor.plain(scale)).astype(np.float64)
    mantissa, exponent = np.frexp(plain)
    biased = exponent + 126
    if (mantissa != 0.5).any() or biased.min() < 0 or biased.max() >= _NAN:
        return None
    return jnp.asarray(biased, jnp.uint8)


def quantize(w: Float[Array, "*batch k n"]) -> QTensor:
    """Quantizes a weight as the MX specification, version 1.0, says in section 6.3.

    The scale of a block is the largest power of two in its largest magnitude, divided
    by 4, the largest power of two among the codes. A weight over its scale is rounded
    to the nearest code, to the one with an even mantissa if midway; what lies beyond 6
    becomes 6. A block that holds NaN or infinity has the scale NaN.

    Args:
      w: ``[*batch, k, n]`` bfloat16, float16 or float32 weight (``y = x @ w``), k a
        multiple of 32. Magnitudes below 2**-126 count as 0.

    Returns:
      The tensor that a file would hold.

    Raises:
      TypeError: If ``w`` is a list, say, and no array.
      ValueError: If ``w`` is not as described.

    Example:
      >>> import qjax
      >>> w = quantize(jnp.arange(32.0)[:, None] / 4)
      >>> qjax.dequantize(w)[::4, 0]
      Array([0, 1, 2, 3, 4, 4, 6, 6], dtype=bfloat16)
    """
    check_weight(w)
    if w.shape[-2] % BLOCK:
        raise ValueError(
            f"w.shape[-2]={w.shape[-2]} must be a multiple of {BLOCK}; pad w with zero "
            "rows."
        )
    quantize_ = _quantize
    for _ in w.shape[:-2]:
        quantize_ = jax.vmap(quantize_)
    return _build(*quantize_(w))


@jax.jit
def _quantize(w: Array) -> tuple[Array, Array]:
    blocks = w.astype(jnp.float32).reshape(-1, BLOCK, w.shape[1])
    largest = lax.bitcast_convert_type(jnp.abs(blocks).max(1), jnp.int32) >> 23
    exponent = jnp.maximum(largest - _LARGEST_EXPONENT, 0)
    inverse = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    magnitude = jnp.abs(blocks) * inverse[:, None]
    # Codes are 0.5 apart up to 2, 1 up to 4, then 2: so many steps from 0 to a number,
    # and two codes more for each octave below it.
    octave = (magnitude >= 2).astype(jnp.int32) + (magnitude >= 4).astype(jnp.int32)
    step = lax.bitcast_convert_type((126 + octave) << 23, jnp.float32)
    codes = jnp.round(magnitude / step).astype(jnp.int32) + 2 * octave
    codes = jnp.minimum(codes, 7) | (jnp.signbit(blocks).astype(jnp.int32) << 3)
    exponent = jnp.where(largest == _NAN, _NAN, exponent)
    return _pack(codes.reshape(w.shape)), exponent.astype(jnp.uint8)
