"""GPTQ: codes as a bit stream along k, zeros as a bit stream along n.

The word ``qweight[i, j]`` of four-bit codes holds eight rows of one column,

    bit 31                                                            bit 0
    | q[8i+7, j] | q[8i+6, j] | ...  | q[8i+2, j] | q[8i+1, j] | q[8i, j] |

and any width continues in the next word of the same column as `qjax.bits` says; the
"10 | 1 | 10 | 1 | 10" packing of three bits is exactly that stream. ``qzeros[g, j]``
holds the stored zeros of group ``g`` in the same way along n. Checkpoint format v1
("gptq") stores ``zero - 1``, v2 ("gptq_v2") the zero itself. "gptq_p" cuts 3, 5, 6 and
7 bits into planes of 1, 2 and 4 bits (`Planar`). The weight is ``(q - zero) * scale``,
rounded once to the dtype of the scales.

Source: AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py, commit
9f7d37072917ab3a7545835f23e808294a542153; ModelCloud/GPTQModel,
gptqmodel/nn_modules/qlinear/__init__.py and gptqmodel/utils/planar_packing.py, commit
f4c327a17eb3e24524d5a97a3d682e3696ae6a28.
"""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8, UInt32

from qjax import tensor
from qjax.bits import block, pack_fields, unpack_fields
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_positive,
    check_shapes,
    check_tensors,
    check_words,
    lacks_integer_zeros,
    lacks_own_columns,
    lacks_plain_groups,
)
from qjax.formats.g_idx import in_input_order, read_g_idx
from qjax.formats.gathering import of_whole
from qjax.formats.gptq_config import WIDTHS, Checkpoint, Config
from qjax.tensor import Cut, Digits, Layout, QTensor, Segment

__all__ = ["PLANES", "TENSORS", "Checkpoint", "Config", "Planar", "Stream", "axes"]
__all__ += ["check", "from_tensors", "layout_of", "pack_planes", "to_tensors"]
__all__ += ["unpack_planes"]

# Planes of a width as (bits of the plane, its lowest bit of the code), low plane first.
PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4))}
PLANES |= {7: ((4, 0), (2, 4), (1, 6))}


@dataclasses.dataclass(frozen=True)
class Stream(Layout):
    """One bit stream a column, running down k: words uint32 ``[k * bits / 32, n]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "rows n"]:
        """Packs ``[k, n]`` codes; k must fill whole words."""
        check_codes(codes)
        return pack_fields(codes, bits, axis=0)

    def unpack(self, words: Integer[Array, "rows n"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[k * bits / 32, n]`` words."""
        check_words(words, 2, jnp.int32, jnp.uint32)
        return unpack_fields(words, bits, axis=0)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(rows * 32 / bits, n)``."""
        return shape[0] * 32 // bits, shape[1]

    def cut(self, bits: int) -> Cut:
        """Cuts where a code begins a word, and between any columns."""
        return Cut(k_axis=0, rows=block(bits)[0], n_axis=1, columns=1)

    def digits(self, bits: int) -> Digits | None:
        """Permutes those of codes that fill words evenly."""
        return Digits.of_stream("k", bits)


@dataclasses.dataclass(frozen=True)
class Planar(Layout):
    """The planes of gptq_p: 32 rows make ``bits`` words a column, 1, 2, 4 bits deep.

    Widths 1, 2, 4 and 8 are a single plane, the same words as `Stream`.
    """

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "rows n"]:
        """Packs ``[k, n]`` codes; k must be a multiple of 32."""
        check_codes(codes)
        return pack_planes(codes, bits, axis=0)

    def unpack(self, words: Integer[Array, "rows n"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[k * bits / 32, n]`` words."""
        check_words(words, 2, jnp.int32, jnp.uint32)
        return unpack_planes(words, bits, axis=0)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(rows * 32 / bits, n)``."""
        return shape[0] * 32 // bits, shape[1]

    def cut(self, bits: int) -> Cut:
        """Cuts between blocks of planes, and between any columns."""
        rows = 32 if bits in PLANES else block(bits)[0]
        return Cut(k_axis=0, rows=rows, n_axis=1, columns=1)

    def digits(self, bits: int) -> Digits | None:
        """Permutes those of codes that are a single plane."""
        return Digits.of_stream("k", bits)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack_planes(
    codes: Integer[Array, "a b"], bits: int, axis: int
) -> UInt32[Array, "c d"]:
    """Packs codes plane by plane in blocks of 32 along ``axis`` (0 or 1)."""
    if bits not in PLANES:
        return pack_fields(codes, bits, axis)
    if codes.shape[axis] % 32:
        raise ValueError(
            f"codes.shape[{axis}]={codes.shape[axis]} must be a multiple of 32 for "
            f"planes of {bits}-bit codes; pad codes."
        )
    wide = jnp.moveaxis(codes.astype(jnp.uint32), axis, 0)
    planes = []
    for width, low in PLANES[bits]:
        words = pack_fields((wide >> low) & (2**width - 1), width)
        planes.append(words.reshape(-1, width, *wide.shape[1:]))
    blocks = jnp.concatenate(planes, axis=1)
    return jnp.moveaxis(blocks.reshape(-1, *wide.shape[1:]), 0, axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def unpack_planes(
    words: Integer[Array, "c d"], bits: int, axis: int
) -> UInt8[Array, "a b"]:
    """Inverse of `pack_planes`."""
    if bits not in PLANES:
        return unpack_fields(words, bits, axis)
    if words.shape[axis] % bits:
        raise ValueError(
            f"words.shape[{axis}]={words.shape[axis]} must be a multiple of {bits}, "
            f"the words of 32 planar {bits}-bit codes."
        )
    first = jnp.moveaxis(words, axis, 0)
    blocks = first.reshape(-1, bits, *first.shape[1:])
    parts, row = [], 0
    for width, low in PLANES[bits]:
        plane = blocks[:, row : row + width].reshape(-1, *first.shape[1:])
        parts.append(unpack_fields(plane, width) << low)
        row += width
    return jnp.moveaxis(functools.reduce(operator.or_, parts), 0, axis)


_EXPECTED = {
    "qweight": Expected((jnp.int32,), 2),
    "qzeros": Expected((jnp.int32,), 2),
    "scales": Expected(FLOATS, 2),
    "g_idx": Expected((jnp.int32,), 1, optional=True),
}
TENSORS = tuple(_EXPECTED)
# GPTQModel turns v2 zeros into v1 by one subtraction on the whole word for these.
_WORDWISE = (2, 4, 8)


def layout_of(config: Config) -> Layout:
    """Returns the layout of the ``qweight`` that a configuration describes."""
    planar = config.checkpoint_format == "gptq_p" and config.bits in PLANES
    return Planar() if planar else Stream()


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``qweight`` int32 ``[k * bits / 32, n]``, ``qzeros`` int32
        ``[groups, n * bits / 32]``, ``scales`` float ``[groups, n]``, and ``g_idx``
        int32 ``[k]``, optional where the groups are runs of rows.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    check_choice("checkpoint_format", config.checkpoint_format, WIDTHS)
    if config.group_size is not None:
        check_positive("group_size", config.group_size)
    check_tensors(tensors, _EXPECTED, "GPTQ")
    codes_per_block, words_per_block = block(config.bits)
    if layout_of(config) == Planar():
        codes_per_block, words_per_block = 32, config.bits
    rows, n = tensors["qweight"].shape
    if not rows or not n or rows % words_per_block or n % codes_per_block:
        raise ValueError(
            f"qweight.shape={(rows, n)} must be [k * {config.bits} / 32, n] with k and "
            f"n positive multiples of {codes_per_block}."
        )
    k = rows * 32 // config.bits
    groups = 1 if config.group_size is None else -(-k // config.group_size)
    if config.act_order and groups > 1 and "g_idx" not in tensors:
        raise ValueError(
            "g_idx is missing, and desc_act says that groups are no runs of rows; "
            f"found {sorted(tensors)}."
        )
    shapes = {
        "scales": (groups, n),
        "qzeros": (groups, n * config.bits // 32),
        "g_idx": (k,),
    }
    source = f"qweight.shape={(rows, n)}, bits={config.bits} and "
    check_shapes(tensors, shapes, source + f"group_size={config.group_size}")


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    The same share of each is a matrix by itself.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      "k" or "n" for each axis, "" for one that is not cut, by upstream name.
    """
    del config
    return {name: ("k",) if name == "g_idx" else ("k", "n") for name in tensors}


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout, with uint8 zeros; ``row_group`` holds a
      ``g_idx`` that is not simply ``row // group_size``.

    Raises:
      ValueError: As `check`; or if a scale is not finite or a ``g_idx`` out of range.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
      >>> tensors = to_tensors(w, "gptq_v2")
      >>> config = Config(bits=4, group_size=32, checkpoint_format="gptq_v2")
      >>> from_tensors(tensors, config)
      QTensor(64x64, 4 bits, group 32, Stream(), (q - z) * s, float32 scale, 2.625 KiB)
    """
    check(tensors, config)
    check_finite(tensors, ["scales"])
    groups, size = tensors["scales"].shape[0], config.group_size
    words = jax.lax.bitcast_convert_type(jnp.asarray(tensors["qweight"]), jnp.uint32)
    return tensor.build(
        (words,),
        jnp.asarray(tensors["scales"]),
        _read_zeros(jnp.asarray(tensors["qzeros"]), config),
        layout=layout_of(config),
        segments=(Segment(config.bits, size),),
        row_group=read_g_idx(tensors.get("g_idx"), size, groups),
    )


@of_whole
def to_tensors(qt: QTensor, checkpoint_format: Checkpoint = "gptq") -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows.
      checkpoint_format: "gptq" stores zeros minus one (modulo ``2**bits``, each field
        by itself), "gptq_v2" and "gptq_p" the zeros.

    Returns:
      ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, rows in the inputs' order.

    Raises:
      ValueError: If GPTQ cannot hold ``qt``, with the reason; or it has no such
        ``checkpoint_format``.
    """
    check_choice("checkpoint_format", checkpoint_format, WIDTHS)
    bits = _holdable(qt, checkpoint_format)
    config = Config(bits=bits, checkpoint_format=checkpoint_format)
    scale, (q, g_idx) = tensor.plain(qt.scale), in_input_order(qt)
    words = layout_of(config).pack(q, bits)
    if qt.zero is None:
        zero = jnp.full(scale.shape, 2 ** (bits - 1), jnp.uint8)
    else:
        zero = tensor.plain(qt.zero)
    if checkpoint_format == "gptq":
        zero = (zero - 1) & jnp.uint8(2**bits - 1)
    pack = pack_planes if layout_of(config) == Planar() else pack_fields
    zeros = pack(zero, bits, axis=1)
    return {
        "qweight": jax.lax.bitcast_convert_type(words, jnp.int32),
        "qzeros": jax.lax.bitcast_convert_type(zeros, jnp.int32),
        "scales": scale,
        "g_idx": g_idx,
    }


def _holdable(qt: QTensor, checkpoint_format: Checkpoint) -> int:
    """Returns the width of the codes, or says why GPTQ cannot hold the tensor."""
    bits = qt.segments[0].bits
    reason = (
        lacks_plain_groups(qt, WIDTHS[checkpoint_format])
        or lacks_integer_zeros(qt)
        or lacks_own_columns(qt)
    )
    if reason is None and qt.n % block(bits)[0]:
        reason = f"n={qt.n} does not fill whole words of zeros; pad its columns"
    if reason:
        raise ValueError(f"GPTQ ({checkpoint_format}) cannot hold {qt!r}: {reason}.")
    return bits


def _read_zeros(qzeros: Array, config: Config) -> UInt8[Array, "groups n"]:
    bits, mask = config.bits, jnp.uint8(2**config.bits - 1)
    unpack = unpack_planes if layout_of(config) == Planar() else unpack_fields
    if config.checkpoint_format != "gptq":
        return unpack(qzeros, bits, axis=1)
    if config.wordwise_zeros and bits in _WORDWISE:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = jax.lax.bitcast_convert_type(qzeros, jnp.uint32) + jnp.uint32(ones)
        return unpack(words, bits, axis=1)
    stored = unpack(qzeros, bits, axis=1)
    # GPTQModel itself reads its zeros of other widths field by field, as done here.
    if not config.wordwise_zeros and (stored == mask).any():
        warnings.warn(
            "qzeros of GPTQ v1 hold fields of all ones, read as zeros of 0; decoders "
            "disagree on them (AutoGPTQ may mean 2**bits, and GPTQModel files written "
            "with sym=False need wordwise_zeros=True).",
            stacklevel=3,
        )
    return (stored + 1) & mask
