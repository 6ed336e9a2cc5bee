"""bitsandbytes: NF4 and FP4 codes of the flattened weight, two a byte.

The torch weight ``[n, k]`` is flattened row by row into ``f[0], f[1], ...``; byte ``i``
holds two codes, the first in the high nibble,

    bit 7               bit 0
    |  f[2i]  |  f[2i + 1]  |

and every ``blocksize`` elements share a scale, their largest magnitude ``absmax``.
Where blocksize does not divide k, blocks cross rows, and the last one may be short. The
weight is ``table[f] * absmax`` in float32, rounded once to the dtype that the weight
had. Double quantization stores absmax itself as codes of an 8-bit table in blocks of
256, ``nested_quant_map[absmax] * nested_absmax[block] + nested_offset``, where the
product and the sum are rounded to float32.

How the codes of a weight are found is in `qjax.formats.bnb_blockwise`; what 8 bits have
is in `qjax.formats.bnb_int8`.

Source: bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py and
bitsandbytes/backends/default/ops.py, release 0.50.2.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Integer, UInt8

from qjax import decode, tensor
from qjax.bits import transpose_codes, whole
from qjax.formats import bnb_int8
from qjax.formats.bnb_blockwise import (
    TABLES,
    QuantType,
    pack_nibbles,
    quantize_blockwise,
    unpack_nibbles,
)
from qjax.formats.bnb_config import BLOCKSIZES, PREFIX, Config, State
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_codes,
    check_finite,
    check_shapes,
    check_tensors,
    check_width,
    check_words,
)
from qjax.formats.gathering import of_whole
from qjax.tensor import Affine, Digits, Encoded, Grouping, Layout, QTensor, Segment

__all__ = ["TABLES", "TENSORS", "Absmax", "Config", "Flat", "Nested", "check"]
__all__ += ["from_tensors", "pack_nibbles", "quantize", "quantize_4bit"]
__all__ += ["to_tensors", "unpack_nibbles"]


@dataclasses.dataclass(frozen=True)
class Flat(Layout):
    """Pairs of codes of the flattened ``[n, k]``: words uint8 ``[ceil(n * k / 2), 1]``.

    Attributes:
      k: Number of inputs; n follows from the words.
    """

    k: int

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "m 1"]:
        """Packs ``[k, n]`` codes; an odd number of them is filled up with a 0."""
        check_width(bits, (4,), "bitsandbytes")
        check_codes(codes)
        if codes.shape[0] != self.k:
            raise ValueError(f"codes.shape={codes.shape} must be [k={self.k}, n].")
        return pack_nibbles(transpose_codes(codes).reshape(-1))[:, None]

    def unpack(self, words: UInt8[Array, "m 1"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[m, 1]`` words."""
        check_words(words, 2, jnp.uint8)
        k, n = self.extents(words.shape, bits)
        return transpose_codes(unpack_nibbles(words[:, 0])[: k * n].reshape(n, k))

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, 2 * m // k)``."""
        check_width(bits, (4,), "bitsandbytes")
        if len(shape) != 2 or shape[1] != 1:
            raise ValueError(f"words.shape={shape} must be [n * k / 2, 1].")
        return self.k, 2 * shape[0] // self.k

    def digits(self, bits: int) -> Digits:
        """Permutes them; the first field of a byte is the upper one."""
        del bits
        return Digits("n", fields="k0", width=8, flip=1)


class Nested(typing.NamedTuple):
    """What turns 8-bit codes of scales into scales.

    Attributes:
      absmax: float32 ``[*batch, blocks]``, the scale of every block of scales.
      table: float32 ``[*batch, 256]``.
      offset: float32 ``[*batch]``, added to all.
    """

    absmax: Array
    table: Array
    offset: Array


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Absmax(Encoded):
    """The scales of a file, and what else its quantization state says.

    Attributes:
      absmax: ``[*batch, groups, n]``, or ``[*batch, groups, 1]`` for flat groups: the
        scales in float32, or their uint8 codes with double quantization.
      nested: What double quantization makes of the codes, or None.
      nested_blocksize: How many codes, in the order of the file, share an entry of
        ``nested.absmax``.
      quant_type: "nf4" or "fp4".
      storage: Name of the dtype as which the file gives the bytes of the weight.
    """

    absmax: Array
    nested: Nested | None = None
    nested_blocksize: int = dataclasses.field(default=256, metadata={"static": True})
    quant_type: QuantType = dataclasses.field(default="nf4", metadata={"static": True})
    storage: str = dataclasses.field(default="uint8", metadata={"static": True})

    def decode(self) -> Array:
        """Returns the scales in float32, ``[*batch, groups, n or 1]``."""
        if self.nested is None:
            return self.absmax
        decode_ = functools.partial(_decode, blocksize=self.nested_blocksize)
        for _ in self.nested.offset.shape:
            decode_ = jax.vmap(decode_)
        return decode_(self.absmax, self.nested)


@functools.partial(jax.jit, static_argnames="blocksize")
def _decode(codes: Array, nested: Nested, blocksize: int) -> Array:
    flat = codes.T.reshape(-1)
    product = nested.table[flat] * jnp.repeat(nested.absmax, blocksize)[: flat.size]
    scales = decode.rounded(product, jnp.float32) + nested.offset
    return scales.reshape(codes.shape[::-1]).T


_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
TENSORS = ("weight", "weight.absmax", "weight.quant_map", *_NESTED)
TENSORS += tuple(PREFIX + name for name in TABLES) + bnb_int8.TENSORS[1:]


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` ``[m, 1]`` uint8, or the same bytes as float16, bfloat16 or float32;
        ``weight.absmax`` ``[blocks]`` float32, or uint8 together with
        ``weight.nested_absmax`` float32 and ``weight.nested_quant_map`` float32
        ``[256]``; ``weight.quant_map`` float32 ``[16]``; and
        ``weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON as uint8. Of 8 bits
        those of `bnb_int8.check`.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    if config.load_in_8bit:
        bnb_int8.check(tensors)
        return
    nested = any(name in tensors for name in _NESTED)
    expected = {
        "weight": Expected((jnp.uint8, *FLOATS), 2),
        "weight.absmax": Expected((jnp.uint8 if nested else jnp.float32,), 1),
        "weight.quant_map": Expected((jnp.float32,), 1),
        PREFIX + config.quant_type: Expected((jnp.uint8,), 1),
    }
    if nested:
        expected |= dict.fromkeys(_NESTED, Expected((jnp.float32,), 1))
    check_tensors(tensors, expected, f"bitsandbytes' {config.quant_type}")
    rows, shapes = tensors["weight"].shape[0], {_NESTED[1]: (256,)}
    shapes |= {"weight": (rows, 1), "weight.quant_map": (16,)}
    check_shapes(tensors, shapes, "codes in a column and tables of 4 and 8 bits")


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      Of 8 bits "n" and "k" for the axes of each tensor, by upstream name; of 4, whose
      blocks may cross rows, nothing.
    """
    named = {"weight": ("n", "k"), "SCB": ("n",), "weight_format": ()}
    return {name: named[name] for name in tensors} if config.load_in_8bit else {}


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout, of the original weight's dtype. Its scale
      is an `Absmax`. Where blocksize divides k, the grouping is
      `Grouping.ROWS`, which is multiplied without forming the weight; else FLAT. Of 8
      bits that of `bnb_int8.from_tensors`.

    Raises:
      ValueError: As `check`; or if the quantization state is not sound, extents do not
        fit, or a scale or table is not finite.
    """
    if config.load_in_8bit:
        return bnb_int8.from_tensors(tensors)
    check(tensors, config)
    held = {name: np.asarray(array) for name, array in tensors.items()}
    blob = held.pop(PREFIX + config.quant_type)
    state = State.parse(blob, config.quant_type, nested=_NESTED[0] in held)
    _check_sizes(held, state)
    check_finite(held, [name for name in held if name != "weight"])
    (n, k), layout = state.shape, Flat(state.shape[1])
    weight, absmax = held["weight"], held["weight.absmax"]
    rows, nested = k % state.blocksize == 0, None
    if state.nested_blocksize is not None:
        scales, table = (jnp.asarray(held[name]) for name in _NESTED)
        nested = Nested(scales, table, jnp.float32(state.nested_offset))
    scale = Absmax(
        absmax=jnp.asarray(absmax.reshape(n, -1).T if rows else absmax[:, None]),
        nested=nested,
        nested_blocksize=state.nested_blocksize or 256,
        quant_type=state.quant_type,
        storage=weight.dtype.name,
    )
    words = np.ascontiguousarray(weight).view(np.uint8).reshape(-1, 1)
    return _build(words, scale, held["weight.quant_map"], layout, state)


def _check_sizes(held: Mapping[str, np.ndarray], state: State) -> None:
    """Checks the sizes that only the quantization state tells."""
    elements = math.prod(state.shape)
    blocks = -(-elements // state.blocksize)
    sizes = {"weight": -(-elements // 2), "weight.absmax": blocks}
    if state.nested_blocksize is not None:
        sizes[_NESTED[0]] = -(-blocks // state.nested_blocksize)
    for name, wanted in sizes.items():
        unit = "bytes" if name == "weight" else "elements"
        found = held[name].nbytes if name == "weight" else held[name].size
        if found != wanted:
            raise ValueError(
                f"{name} has {found} {unit} and must have {wanted}, from "
                f"shape={state.shape} and blocksize={state.blocksize}."
            )


def _build(
    words: Any, scale: Absmax, table: Any, layout: Flat, state: State
) -> QTensor:
    words, (n, k) = jnp.asarray(words), state.shape
    return tensor.build(
        (words,),
        scale,
        layout=layout,
        segments=(Segment(4, state.blocksize),),
        affine=Affine.CODEBOOK,
        grouping=Grouping.FLAT if k % state.blocksize else Grouping.ROWS,
        codebook=jnp.asarray(table),
        padding=layout.extents(words.shape, 4)[1] - n,
        weight_dtype=state.dtype,
    )


@of_whole
def to_tensors(
    qt: QTensor, dtype: DTypeLike | None = None, storage: DTypeLike | None = None
) -> dict[str, Array | np.ndarray]:
    """Writes one quantized matrix under the upstream's names.

    Scales that are still encoded as in a file are written as they were; others, such as
    those of a prepared tensor, without double quantization.

    Args:
      qt: A matrix of NF4 or FP4 codes in input order, its groups runs of k or of the
        flattened weight; or of 8-bit codes that `bnb_int8.to_tensors` takes.
      dtype: The dtype that the weight had, to be named in the file; None takes that of
        ``qt``. Files of 8 bits name none.
      storage: The dtype as which the bytes of ``weight`` are given; None takes that of
        the file, or uint8. Those of 8 bits are int8.

    Returns:
      ``weight``, ``weight.absmax``, ``weight.quant_map``, the quantization state, and
      with double quantization the two nested tensors; of 8 bits ``weight``, ``SCB`` and
      ``weight_format``.

    Raises:
      ValueError: If bitsandbytes cannot hold ``qt``, with the reason.
    """
    if is_int8(qt):
        return {**bnb_int8.to_tensors(qt)}
    size = _holdable(qt)
    qt = encoded(qt)
    scale, codebook, layout = typing.cast(Absmax, qt.scale), qt.codebook, Flat(qt.k)
    assert codebook is not None
    words = decode.relayout(qt, layout).words[0].reshape(-1)
    if qt.layout != layout and qt.k * qt.n % 2:
        words = words.at[-1].add(jnp.abs(codebook).argmin().astype(jnp.uint8))
    stored = jnp.dtype(storage or scale.storage)
    if words.size % stored.itemsize:
        raise ValueError(
            f"storage={stored}: {words.size} bytes are not whole numbers; write uint8."
        )
    weight_dtype = jnp.dtype(dtype or qt.dtype).name
    state = State(scale.quant_type, size, weight_dtype, [qt.n, qt.k])
    tensors: dict[str, Array | np.ndarray] = {
        "weight": words.view(stored)[:, None],
        "weight.absmax": scale.absmax.T.reshape(-1),
        "weight.quant_map": codebook.astype(jnp.float32),
    }
    if scale.nested is not None:
        offset = float(scale.nested.offset)
        state = State(*state[:4], scale.nested_blocksize, "float32", offset)
        tensors |= zip(_NESTED, scale.nested[:2], strict=True)
    tensors[PREFIX + scale.quant_type] = state.to_blob()
    return tensors


def is_int8(qt: QTensor) -> bool:
    """Whether `to_tensors` would write a matrix as one of LLM.int8()."""
    return qt.affine.counts and qt.segments[0].bits == 8


def encoded(qt: QTensor) -> QTensor:
    """Gives a matrix of 4 bits the scales of a file, if it was prepared.

    Raises:
      ValueError: If its table is none of bitsandbytes.
    """
    if isinstance(qt.scale, Absmax) or qt.affine is not Affine.CODEBOOK:
        return qt
    codebook = np.asarray(qt.codebook, np.float32)
    for name, table in TABLES.items():
        if np.array_equal(table, codebook):
            absmax = tensor.plain(qt.scale).astype(jnp.float32)
            scale = Absmax(absmax=absmax, quant_type=typing.cast(QuantType, name))
            return dataclasses.replace(qt, scale=scale, weight_dtype=qt.dtype.name)
    raise ValueError(
        f"bitsandbytes cannot hold {qt!r}: its codebook is neither NF4 nor FP4."
    )


def _holdable(qt: QTensor) -> int:
    """Returns the block size, or says why bitsandbytes cannot hold the tensor."""
    size, reason = qt.segments[0].group_size or qt.k, None
    rows = qt.grouping is Grouping.ROWS
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif len(qt.segments) != 1 or qt.segments[0].bits != 4:
        reason = "its codes have other widths than 4"
    elif any(v is not None for v in (qt.order, qt.row_group, qt.input_scale)):
        reason = "it has an order of rows or an input scale; GPTQ holds an order"
    elif qt.affine is not Affine.CODEBOOK:
        reason = f"{qt.affine.value} is no table; quantize_4bit makes one"
    elif qt.grouping is Grouping.STRIDED:
        reason = "its groups are strided; HQQ holds those"
    elif rows and (qt.k % size or qt.scale.shape[-1] != qt.n):
        reason = f"blocks of {size} cross columns, or columns share scales"
    elif size not in BLOCKSIZES:
        reason = f"a group size of {size} is not among {BLOCKSIZES}"
    elif qt.dtype not in FLOATS:
        reason = f"{qt.dtype} scales"
    if reason:
        raise ValueError(f"bitsandbytes cannot hold {qt!r}: {reason}.")
    return size


def quantize_4bit(
    w: Float[Array, "k n"], quant_type: QuantType = "nf4", blocksize: int = 64
) -> QTensor:
    """Quantizes a weight to the nearest entries of the NF4 or FP4 table.

    A value midway between two entries takes the lower one, as on the original's CPU.

    Args:
      w: ``[k, n]`` weight (``y = x @ w``), float16, bfloat16 or float32. Blocks run
        over its transpose, flattened.
      quant_type: "nf4" or "fp4".
      blocksize: Elements that share a scale, a power of two from 32 to 4096.

    Returns:
      The tensor that a file without double quantization would hold.

    Raises:
      ValueError: If an argument is not as described.

    Example:
      >>> quantize_4bit(jnp.eye(64), blocksize=32)
      QTensor(64x64, 4 bits, group 32, Flat(k=64), codebook[q] * s, float32 scale, ...)
    """
    if w.ndim != 2 or w.dtype not in FLOATS or not w.size:
        raise ValueError(
            "w must be float16, bfloat16 or float32 [k, n], not empty; got "
            f"{w.dtype}{w.shape}."
        )
    if quant_type not in TABLES:
        raise ValueError(f"quant_type={quant_type!r} must be one of {list(TABLES)}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize={blocksize} must be one of {BLOCKSIZES}.")
    (k, n), table = w.shape, jnp.asarray(TABLES[quant_type])
    codes, absmax = quantize_blockwise(w.T, table, blocksize)
    absmax = absmax[:, None] if k % blocksize else absmax.reshape(n, -1).T
    layout = Flat(k)
    words = layout.pack(codes.T, 4)
    if k * n % 2:  # filled up with the code of zero
        words = words.at[-1].add(jnp.abs(table).argmin().astype(jnp.uint8))
    state = State(quant_type, blocksize, w.dtype.name, [n, k])
    scale = Absmax(absmax=absmax, quant_type=quant_type)
    return _build(words, scale, table, layout, state)


def quantize(
    w: Float[Array, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 64,
    symmetric: bool = True,
    *,
    scale_dtype: DTypeLike | None = None,
) -> QTensor:
    """Quantizes a weight to NF4 or to LLM.int8(), called as `qjax.quantize` is.

    Args:
      w: As `quantize_4bit`, and of 8 bits as `bnb_int8.quantize` takes it.
      bits: 4 for NF4, 8 for LLM.int8().
      group_size: Elements that share a scale, as ``blocksize`` of `quantize_4bit`; of 8
        bits, which have one scale an output, it is not looked at.
      symmetric: True; neither has zeros.
      scale_dtype: None or float32.

    Returns:
      The tensor that a file would hold.

    Raises:
      ValueError: If an argument is not as described.

    Example:
      >>> quantize(jnp.eye(64)).bits, quantize(jnp.eye(64), bits=8).bits
      (4, 8)
    """
    if not symmetric:
        raise ValueError("symmetric=False: bitsandbytes has no zeros.")
    if scale_dtype is not None and jnp.dtype(scale_dtype) != jnp.float32:
        raise ValueError(f"scale_dtype={scale_dtype!r} must be None or float32.")
    if (width := whole(bits)) == 8:
        return bnb_int8.quantize(w)
    if width != 4:
        raise ValueError(f"bits={bits!r} must be 4 (NF4) or 8 (LLM.int8()).")
    size = whole(group_size)
    if size is None:
        raise ValueError(f"blocksize={group_size!r} must be one of {BLOCKSIZES}.")
    return quantize_4bit(w, blocksize=size)
