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

Weights of eight bits are in `qjax.formats.quanto_bytes`. What calibration found for
activations, ``input_scale`` and ``output_scale``, is read over: quanto would quantize
them, and qjax multiplies them as they are. ``freeze`` comes before saving.

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
from qjax.formats import quanto_bytes, quanto_config
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_positive,
    check_shapes,
    check_shapes_among,
    check_tensors,
    check_width,
    check_words,
    lacks_narrow_zeros,
    refusal,
)
from qjax.formats.gathering import of_whole
from qjax.formats.quanto_config import FLOAT8, Config
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
DATA, SCALE, SHIFT = quanto_config.DATA, quanto_config.SCALE, "weight._shift"
# What calibration finds, for activations; 1 where they are not quantized.
_OF_ACTIVATIONS = ("input_scale", "output_scale")
_OTHERS = {name: Expected(FLOATS, None, optional=True) for name in _OF_ACTIVATIONS}
_EXPECTED = {
    DATA: Expected((jnp.uint8,), 2),
    SCALE: Expected(FLOATS, 2),
    SHIFT: Expected((jnp.uint8, jnp.int8), 2, like=SCALE),
    **_OTHERS,
}
TENSORS = (DATA, SCALE, SHIFT, quanto_bytes.DATA, "weight", *_OF_ACTIVATIONS)


def is_dense(tensors: Mapping[str, Any]) -> bool:
    """Whether a module's weight is dense, whatever scales stand beside it.

    Args:
      tensors: Arrays or anything with ``dtype``, by upstream name.
    """
    return "weight" in tensors and tensors["weight"].dtype in FLOATS


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      Of 8 bits "n" and "k" for the axes of each tensor, by upstream name; of others,
      which lie in slabs, nothing.
    """
    if config.bits != 8:
        return {}
    return {name: ("n", "k")[: len(array.shape)] for name, array in tensors.items()}


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one quantized weight, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``:
        ``weight._data._data`` uint8 ``[slab, g]``, ``weight._scale`` float ``[r, 1]``
        and ``weight._shift`` like it or 8-bit integers, with r the rows of the grouped
        weight; of 8 bits ``weight._data`` int8 or float8_e4m3fn ``[n, k]`` and
        ``weight._scale`` float ``[n, 1]``. Optionally ``input_scale`` and
        ``output_scale``, floats ``[]``.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_choice("config.weights", config.weights, quanto_config.WIDTHS)
    if "weight" in tensors and is_dense(tensors):
        raise ValueError(
            f"weight is dense, and should be {config.weights}; quanto's freeze() "
            "quantizes it for good before it is saved."
        )
    scalars = {name: [(), (1,)] for name in _OF_ACTIVATIONS}
    check_shapes_among(tensors, scalars, "quanto")
    if config.bits == 8:
        quanto_bytes.check(tensors, config.weights or "", _OTHERS)
        return
    bits, k = config.bits, config.k
    check_positive("k", k)
    check_tensors(tensors, _EXPECTED, "quanto")
    (height, columns), (rows, _) = tensors[DATA].shape, tensors[SCALE].shape
    fit = columns and k % columns == 0 and rows and rows % (k // columns) == 0
    if not fit or height != -(-rows // (8 // bits)):
        raise ValueError(
            f"{DATA}.shape={(height, columns)} must be [slab, g], g a divisor of "
            f"k={k}, with {8 // bits} slabs for the {rows} rows of {SCALE}, a "
            "multiple of k / g."
        )
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((SCALE, SHIFT), (rows, 1))
    check_shapes(tensors, shapes, f"{rows} rows of the grouped weight")


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one weight that optimum-quanto quantized along axis 0.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them. Those of
        activations are not looked at: quanto would multiply quantized ones.
      config: The module's configuration. Of 2 and 4 bits, ``k`` is the number of
        inputs, columns of the torch weight.

    Returns:
      ``[k, n]`` tensor in the file's layout: ``q * scale + zero`` with ``zero`` the
      negated shift and two roundings, or ``(q - zero) * scale`` with uint8 zeros; of
      8 bits symmetric codes or floats, with a scale for each column.

    Raises:
      ValueError: As `check`; or if a scale or shift is not finite, or an integer zero
        is no code.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=2, group_size=64)
      >>> from_tensors(to_tensors(w), Config(weights="qint2", k=64)).layout
      Slabs(k=64, group_size=64)
    """
    check(tensors, config)
    if config.bits == 8:
        return quanto_bytes.from_tensors(tensors, config.weights or "")
    bits, k = config.bits, config.k or 0
    data, scale, shift = (jnp.asarray(tensors[name]) for name in (DATA, SCALE, SHIFT))
    check_finite({SCALE: scale})
    size = data.shape[1]
    scale, shift = (p.reshape(-1, k // size).T for p in (scale, shift))
    if shift.dtype == scale.dtype:
        check_finite({SHIFT: shift})
        fields = {"zero": -shift, "affine": Affine.OFFSET, "rounding": 2}
    else:
        low, high = int(np.min(shift)), int(np.max(shift))
        if low < 0 or high >= 2**bits:
            raise ValueError(
                f"{SHIFT} from {low} to {high} must lie in 0 to {2**bits - 1}."
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


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one weight under optimum-quanto's names.

    Args:
      qt: Two or four bits, groups of inputs; integer zeros or none, or
        ``q * scale + zero``. Or eight, symmetric or floats, with a scale for each
        column.

    Returns:
      The tensors of `check`; the scales of activations are 1. Shifts of integer zeros
      and symmetric codes are uint8; but of symmetric codes with bfloat16 scales in
      groups of 128, where quanto takes none, the same multiple of each scale.

    Raises:
      ValueError: If quanto's weight cannot hold ``qt``, with the reason.
    """
    segment = qt.segments[0]
    if segment.bits == 8:
        _refuse(qt, quanto_bytes.lacks(qt))
        held = quanto_bytes.to_tensors(qt)
    else:
        _refuse(qt, _lacks(qt))
        scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
        if zero is None and _takes_floats_alone(qt):
            zero = -(2 ** (segment.bits - 1)) * scale
        elif zero is None:
            zero = jnp.full(scale.shape, 2 ** (segment.bits - 1), jnp.uint8)
        shift = zero if zero.dtype == jnp.uint8 else -zero
        layout = Slabs(qt.k, segment.group_size)
        held = {
            DATA: layout.pack(tensor.codes(qt), segment.bits),
            SCALE: scale.T.reshape(-1, 1),
            SHIFT: shift.T.reshape(-1, 1),
        }
    return held | dict.fromkeys(_OF_ACTIVATIONS, jnp.ones((), qt.scale.dtype))


def _refuse(qt: QTensor, reason: str | None) -> None:
    if reason:
        raise ValueError(f"quanto cannot hold {qt!r}: {reason}.")


def _lacks(qt: QTensor) -> str | None:
    """Why a matrix of two or four bits is none of quanto's, if so."""
    symmetric = qt.affine is Affine.CENTERED and qt.zero is None
    integer = qt.zero is not None and qt.zero.dtype == jnp.uint8
    reason = refusal(qt, (*WIDTHS, 8))
    if not (symmetric or integer or qt.affine is Affine.OFFSET):
        reason = reason or f"{qt.affine.value} here has neither integer zeros nor shift"
    return reason or lacks_narrow_zeros(qt)


def _takes_floats_alone(qt: QTensor) -> bool:
    """Whether quanto's loader turns a matrix into its tinygemm tensor, and asserts."""
    sizes = qt.segments[0] == (4, 128, qt.segments[0].padding)
    return sizes and qt.k > 128 and qt.scale.dtype == jnp.bfloat16


def config_of(qt: QTensor) -> Config:
    """Says what the map of modules has of a matrix, which may be abstract."""
    if qt.segments[0].bits < 8:
        return Config(weights=f"qint{qt.segments[0].bits}", k=qt.k)
    return Config(weights=FLOAT8 if qt.affine is Affine.FLOAT else "qint8")


def unloadable(qt: QTensor) -> str | None:
    """Why quanto would not load a matrix, of which it can hold codes and scales."""
    size, own = qt.segments[0].group_size or qt.k, quanto_config.group_size(qt.k)
    if qt.segments[0].bits != 8 and size != own:
        return f"quanto has groups of {own} for k={qt.k}, where it has {size}"
    zero = tensor.plain(qt.zero)
    if zero is not None and zero.dtype == jnp.uint8 and _takes_floats_alone(qt):
        return (
            "beside bfloat16 scales in groups of 128 quanto loads no integer zeros; "
            "symmetric codes, or scales of another dtype, will do"
        )
    return None


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
