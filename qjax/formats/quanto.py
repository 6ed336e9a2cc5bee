"""optimum-quanto: two- and four-bit codes in bytes, one slab of rows a field.

quanto groups the torch weight ``[n, k]`` as ``[n * k / g, g]``, one group a row, and
cuts these rows into 8 / bits slabs of ``d = ceil(rows / (8 / bits))``. A byte holds one
code of each slab, the first in the low bits. Four and two bits, with ``c[r, j]`` the
code in row ``r`` of the grouped weight:

    bit 7                  bit 0      bit 7                                       bit 0
    | c[i + d, j] | c[i, j] |         | c[i+3d, j] | c[i+2d, j] | c[i+d, j] | c[i, j] |

Rows past the last are 0. (HQQ has the first slab in the high bits.) The weight is
``scale * q - shift`` with two roundings where the shift is a float, and
``(q - shift) * scale`` with one where it is an integer zero.

optimum-quanto's tinygemm tensor keeps ``[groups, n, 2]`` of scale and the value of code
8, `pack_scale_shift`; its codes lie as PyTorch's tinygemm has them.

Source: huggingface/optimum-quanto, optimum/quanto/tensor/packed.py and, below
optimum/quanto/tensor/weights, qbits.py and tinygemm/qbits.py, commit
e33f8202e6c755256b7448789a5ed765c45d5105 (release 0.2.7 packs alike).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, UInt8

from qjax import tensor
from qjax.bits import transpose, transpose_codes, unpack_fields
from qjax.decode import rounded
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_codes,
    check_finite,
    check_positive,
    check_shapes,
    check_tensors,
    check_width,
    check_words,
    lacks_narrow_zeros,
    refusal,
)
from qjax.tensor import Affine, Layout, QTensor, Segment

WIDTHS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Slabs(Layout):
    """Slabs of the grouped weight: bytes ``[ceil(n * k / g / (8 / bits)), g]``.

    Attributes:
      k: Number of inputs, which the bytes do not tell.
      group_size: Length g of a row of the grouped weight, a divisor of k; None for k.
    """

    k: int
    group_size: int | None

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "d g"]:
        """Packs ``[k, n]`` codes, any n."""
        check_codes(codes)
        if codes.shape[0] != self.k or self.k % self._columns:
            raise ValueError(
                f"codes.shape[0]={codes.shape[0]} must be k={self.k}, a multiple of "
                f"group_size={self.group_size}."
            )
        check_width(bits, WIDTHS, "quanto")
        if self.k % 4 == 0 and codes.shape[1] % (8 // bits) == 0:
            return _pack_columns(codes, bits).reshape(-1, self._columns)
        # A slab begins within a column, or a word within a row.
        return pack_weights(transpose_codes(codes).reshape(-1, self._columns), bits)

    def unpack(self, words: UInt8[Array, "d g"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks bytes; rows that pad a slab may make columns of zeros at the end."""
        check_words(words, 2, jnp.uint8)
        k, n = self.extents(words.shape, bits)
        if words.shape[1] != self._columns or k % self._columns:
            raise ValueError(
                f"words.shape={words.shape} must be [slab, {self._columns}], and k={k} "
                "a multiple of that."
            )
        if k % 4 == 0 and words.size % k == 0:
            return _unpack_columns(words.reshape(-1, k), bits)
        rows = unpack_weights(words, bits)[: n * k // self._columns]
        return transpose_codes(rows.reshape(n, k))

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns k and the n that the rows of all slabs make, whole columns."""
        check_width(bits, WIDTHS, "quanto")
        return self.k, shape[0] * (8 // bits) * shape[1] // self.k

    @property
    def _columns(self) -> int:
        return self.group_size or self.k


@functools.partial(jax.jit, static_argnames="bits")
def _pack_columns(codes: Array, bits: int) -> Array:
    """Packs slabs of whole columns, k a multiple of 4: bytes ``[n * bits / 8, k]``."""
    k, n = codes.shape
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    slabs = 8 // bits
    fields = (codes & jnp.array(2**bits - 1, codes.dtype)).astype(jnp.uint32)
    fields = fields.reshape(k // 4, 4, slabs, n // slabs)
    # Four bytes move together. The fields do not overlap: their sum is all four.
    words = (fields << _word_shifts(bits)).sum((1, 2), dtype=jnp.uint32)
    return unpack_fields(transpose(words, (1, 0)), 8, axis=1)


@functools.partial(jax.jit, static_argnames="bits")
def _unpack_columns(packed: UInt8[Array, "d k"], bits: int) -> UInt8[Array, "k n"]:
    """Inverse of `_pack_columns`."""
    height, k = packed.shape
    if packed.dtype != jnp.uint8:
        raise ValueError(f"words.dtype={packed.dtype} must be uint8.")
    words = lax.bitcast_convert_type(packed.reshape(height, k // 4, 4), jnp.uint32)
    words = transpose(words, (1, 0)).reshape(k // 4, 1, 1, height)
    fields = (words >> _word_shifts(bits)) & jnp.uint32(2**bits - 1)
    return fields.astype(jnp.uint8).reshape(k, 8 // bits * height)


def _word_shifts(bits: int) -> Array:
    """Where the codes of four bytes lie, ``[1, 4, 8 / bits, 1]``."""
    shape = (1, 4, 8 // bits, 1)
    byte, slab = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 2))
    return 8 * byte + bits * slab


def _shifts(bits: int) -> Array:
    """The place of each slab in a byte, ``[8 / bits, 1, 1]``."""
    return bits * lax.broadcasted_iota(jnp.uint8, (8 // bits, 1, 1), 0)


@functools.partial(jax.jit, static_argnames="bits")
def pack_weights(intweights: Integer[Array, "r c"], bits: int) -> UInt8[Array, "d c"]:
    """Packs the rows of a matrix in slabs as optimum-quanto's ``pack_weights``.

    Args:
      intweights: ``[r, c]`` codes from 0 to ``2**bits - 1``; higher bits are cut off.
      bits: 2 or 4.

    Returns:
      Bytes ``[ceil(r / (8 / bits)), c]``. They do not tell r.

    Raises:
      ValueError: If ``bits`` is not 2 or 4, or ``intweights`` are not integers.

    Example:
      >>> [hex(byte) for byte in pack_weights(jnp.arange(1, 4)[:, None], 4)[:, 0]]
      ['0x31', '0x2']
    """
    check_width(bits, WIDTHS, "quanto")
    if not jnp.issubdtype(intweights.dtype, jnp.integer):
        raise ValueError(
            f"intweights.dtype={intweights.dtype} must be an integer dtype."
        )
    rows, columns = intweights.shape
    slabs = 8 // bits
    height = -(-rows // slabs)
    mask = jnp.array(2**bits - 1, intweights.dtype)
    codes = (intweights & mask).astype(jnp.uint8)
    codes = jnp.pad(codes, ((0, slabs * height - rows), (0, 0)))
    fields = codes.reshape(slabs, height, columns) << _shifts(bits)
    # The fields do not overlap: their sum is the byte.
    return fields.sum(0, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnames="bits")
def unpack_weights(packed: UInt8[Array, "d c"], bits: int) -> UInt8[Array, "r c"]:
    """Unpacks slabs as optimum-quanto's ``unpack``, the rows of padding included.

    Args:
      packed: Bytes ``[d, c]``.
      bits: 2 or 4.

    Returns:
      uint8 codes ``[d * 8 / bits, c]``.

    Raises:
      ValueError: If ``bits`` is not 2 or 4, or ``packed`` is not uint8.
    """
    check_width(bits, WIDTHS, "quanto")
    if packed.dtype != jnp.uint8:
        raise ValueError(f"packed.dtype={packed.dtype} must be uint8.")
    fields = (packed[None] >> _shifts(bits)) & jnp.uint8(2**bits - 1)
    return fields.reshape(-1, packed.shape[1])


# Below a module's path; the codes are a tensor within a tensor.
_EXPECTED = {
    "weight._data._data": Expected((jnp.uint8,), 2),
    "weight._scale": Expected(FLOATS, 2),
    "weight._shift": Expected((jnp.uint8, jnp.int8), 2, like="weight._scale"),
}
TENSORS = tuple(_EXPECTED)


def check(tensors: Mapping[str, Any], *, bits: int, k: int) -> None:
    """Checks names, dtypes and shapes of one quantized weight, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``:
        ``weight._data._data`` uint8 ``[slab, g]``, ``weight._scale`` float ``[r, 1]``
        and ``weight._shift`` like it or 8-bit integers, with r the rows of the grouped
        weight.
      bits: 2 (qint2) or 4 (qint4), which quanto's map of modules says.
      k: Number of inputs, which only the model says.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_width(bits, WIDTHS, "quanto")
    check_positive("k", k)
    check_tensors(tensors, _EXPECTED, "quanto")
    data, scale, _ = (tensors[name] for name in TENSORS)
    (height, columns), (rows, _) = data.shape, scale.shape
    fit = columns and k % columns == 0 and rows and rows % (k // columns) == 0
    if not fit or height != -(-rows // (8 // bits)):
        raise ValueError(
            f"{TENSORS[0]}.shape={(height, columns)} must be [slab, g], g a divisor of "
            f"k={k}, with {8 // bits} slabs for the {rows} rows of {TENSORS[1]}, a "
            "multiple of k / g."
        )
    shapes = dict.fromkeys(TENSORS[1:], (rows, 1))
    check_shapes(tensors, shapes, f"{rows} rows of the grouped weight")


def from_tensors(tensors: Mapping[str, Any], *, bits: int, k: int) -> QTensor:
    """Reads one weight that optimum-quanto quantized along axis 0.

    There is no ``Config``: neither the file nor quanto's map of modules says k.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      bits: 2 or 4.
      k: Number of inputs, columns of the torch weight.

    Returns:
      ``[k, n]`` tensor in the file's layout: ``q * scale + zero`` with ``zero`` the
      negated shift and two roundings, or ``(q - zero) * scale`` with uint8 zeros.

    Raises:
      ValueError: As `check`; or if a scale or shift is not finite, or an integer zero
        is no code.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=2, group_size=32)
      >>> from_tensors(to_tensors(w), bits=2, k=64).layout
      Slabs(k=64, group_size=32)
    """
    check(tensors, bits=bits, k=k)
    data, scale, shift = (jnp.asarray(tensors[name]) for name in TENSORS)
    check_finite({TENSORS[1]: scale})
    size = data.shape[1]
    scale, shift = (p.reshape(-1, k // size).T for p in (scale, shift))
    if shift.dtype == scale.dtype:
        check_finite({TENSORS[2]: shift})
        fields = {"zero": -shift, "affine": Affine.OFFSET, "rounding": 2}
    else:
        low, high = int(np.min(shift)), int(np.max(shift))
        if low < 0 or high >= 2**bits:
            raise ValueError(
                f"{TENSORS[2]} from {low} to {high} must lie in 0 to {2**bits - 1}."
            )
        fields = {"zero": shift.astype(jnp.uint8)}
    layout = Slabs(k, size)
    return tensor.build(
        (data,),
        scale,
        layout=layout,
        segments=(Segment(bits, size),),
        padding=layout.extents(data.shape, bits)[1] - scale.shape[1],
        **fields,
    )


def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one weight under optimum-quanto's names.

    Args:
      qt: Two or four bits, groups of inputs; integer zeros or none, or
        ``q * scale + zero``.

    Returns:
      The tensors of `check`, integer shifts as uint8.

    Raises:
      ValueError: If quanto's weight cannot hold ``qt``, with the reason.
    """
    reason, (segment, *_) = refusal(qt, WIDTHS), qt.segments
    symmetric = qt.affine is Affine.CENTERED and qt.zero is None
    integer = qt.zero is not None and qt.zero.dtype == jnp.uint8
    if not (symmetric or integer or qt.affine is Affine.OFFSET):
        reason = reason or f"{qt.affine.value} here has neither integer zeros nor shift"
    reason = reason or lacks_narrow_zeros(qt)
    if reason:
        raise ValueError(f"quanto cannot hold {qt!r}: {reason}.")
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    if zero is None:
        zero = jnp.full(scale.shape, 2 ** (segment.bits - 1), jnp.uint8)
    shift = zero if zero.dtype == jnp.uint8 else -zero
    words = Slabs(qt.k, segment.group_size).pack(tensor.codes(qt), segment.bits)
    return dict(
        zip(
            TENSORS,
            (words, scale.T.reshape(-1, 1), shift.T.reshape(-1, 1)),
            strict=True,
        )
    )


@jax.jit
def pack_scale_shift(
    scale: Float[Array, "groups n"], shift: Array
) -> Float[Array, "groups n 2"]:
    """The ``_scale_shift`` of optimum-quanto's tinygemm tensor.

    Args:
      scale: Scales, bfloat16 where PyTorch's kernels are to take them.
      shift: quanto's shift like ``scale`` (it is subtracted), or integer zeros.

    Returns:
      ``[groups, n, 2]`` of the scale and ``8 * scale - shift``, the value of code 8,
      every step rounded. Lossy: `unpack_scale_shift` need not give the shift back.
    """
    if not jnp.issubdtype(shift.dtype, jnp.floating):
        shift = rounded(_wide(scale) * _wide(shift), scale.dtype)
    middle = rounded(8 * _wide(scale), scale.dtype) - _wide(shift)
    return jnp.stack([scale, middle.astype(scale.dtype)], axis=-1)


@jax.jit
def unpack_scale_shift(
    scale_shift: Float[Array, "groups n 2"],
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n"]]:
    """Scales and shifts of quanto's tinygemm tensor, as quanto converts it back.

    Args:
      scale_shift: ``[groups, n, 2]``.

    Returns:
      The scale, and ``8 * scale - value of code 8``, rounded.
    """
    scale, middle = scale_shift[..., 0], scale_shift[..., 1]
    shift = rounded(8 * _wide(scale), scale.dtype) - _wide(middle)
    return scale, shift.astype(scale.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
