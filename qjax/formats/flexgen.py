"""FlexGen groups: 16 codes dealt over four int16 words, with a scale and a minimum.

The torch weight ``[n, k]`` is flattened row by row; every 16 elements make four words,
of which word ``j`` takes the elements ``j``, ``j + 4``, ``j + 8`` and ``j + 12``:

    bit 15                               bit 0
    | q[j+12] | q[j+8] | q[j+4] | q[j] |

The weight is ``q * s + b``; the product and then the sum are rounded to the dtype of
``s``. A group is a run of ``group_size`` elements of a row, and ``b`` its smallest one.
With group sizes that are no multiple of 16, the words of one group hold codes of the
next: the axes of ``[n, k / group_size, group_size / 4]`` are then nominal.

Source: huggingface/optimum-graphcore, optimum/graphcore/quantization/group_quantize.py,
commit b8cd6e096a11139745d519aedea4a9414395f093.
"""

import dataclasses
import functools
import operator
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8, UInt16

from qjax import decode, tensor
from qjax.bits import transpose_codes
from qjax.formats.checks import (
    check_codes,
    check_finite,
    check_width,
    check_words,
    refusal,
)
from qjax.tensor import Affine, Layout, QTensor, Segment

_TOP = 15  # the largest code


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of 16 codes: words uint16 ``[n, k / group_size, group_size / 4]``.

    Attributes:
      group_size: A multiple of 4 that divides k; n * k must be a multiple of 16.
    """

    group_size: int
    rank: typing.ClassVar[int] = 3

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt16[Array, "n g w"]:
        """Packs ``[k, n]`` codes of four bits."""
        check_width(bits, (4,), "FlexGen")
        check_codes(codes)
        k, n = codes.shape
        if codes.size % 16:
            raise ValueError(
                f"codes.shape={codes.shape} must have k * n a multiple of 16; pad."
            )
        _check_group_size(self.group_size, k, "codes.shape[0]")
        words = encode_int4(transpose_codes(codes).reshape(-1))
        return words.reshape(n, k // self.group_size, -1)

    def unpack(self, words: Integer[Array, "n g w"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[n, k / group_size, group_size / 4]`` words."""
        check_words(words, 3, jnp.int16, jnp.uint16)
        k, n = self.extents(words.shape, bits)
        return transpose_codes(decode_int4(words.reshape(-1)).reshape(n, k))

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(shape[1] * group_size, shape[0])``."""
        check_width(bits, (4,), "FlexGen")
        if len(shape) != 3 or 4 * shape[2] != self.group_size:
            raise ValueError(
                f"words.shape={shape} must be [n, k / {self.group_size}, "
                f"{self.group_size} / 4]."
            )
        return shape[1] * self.group_size, shape[0]


def _check_group_size(group_size: int, k: int, name: str) -> None:
    if group_size < 4 or group_size % 4 or k % group_size:
        raise ValueError(
            f"group_size={group_size} must be a multiple of 4 that divides {name}={k}."
        )


@jax.jit
def encode_int4(codes: Integer[Array, " m"]) -> UInt16[Array, " words"]:
    """Packs a sequence of four-bit codes.

    Args:
      codes: A multiple of 16 of them; higher bits are cut off.

    Returns:
      ``m / 4`` words, the bit patterns of the original's int16.

    Raises:
      ValueError: If ``codes`` are no whole blocks of 16.

    Example:
      >>> [hex(word) for word in encode_int4(jnp.arange(16))]
      ['0xc840', '0xd951', '0xea62', '0xfb73']
    """
    if codes.size % 16:
        raise ValueError(
            f"codes.size={codes.size} must be a multiple of 16; pad the weight."
        )
    blocks = (codes.astype(jnp.uint16) & jnp.uint16(_TOP)).reshape(-1, 4, 4)
    shifted = [blocks[:, i] << 4 * i for i in range(4)]
    return functools.reduce(operator.or_, shifted).reshape(-1)


@jax.jit
def decode_int4(words: Integer[Array, " words"]) -> UInt8[Array, " m"]:
    """Inverse of `encode_int4`.

    Args:
      words: int16 or uint16, a multiple of 4 of them.

    Returns:
      Four codes for every word.

    Raises:
      ValueError: If ``words`` are no whole blocks, or of another dtype.
    """
    if words.dtype not in (jnp.int16, jnp.uint16):
        raise ValueError(f"words.dtype={words.dtype} must be int16 or uint16.")
    if words.size % 4:
        raise ValueError(f"words.size={words.size} must be a multiple of 4.")
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1, 1, 4)
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)[None, :, None]
    return ((blocks >> shifts) & jnp.uint16(_TOP)).astype(jnp.uint8).reshape(-1)


def group_quantize_compress(
    weight: Float[Array, "n k"], group_size: int
) -> tuple[Array, Array, Array]:
    """Quantizes a torch weight to four bits, in groups of a row.

    The original's arithmetic: ``scale = (max - min) / 15`` in float16, and
    ``q = round((w - min) / scale)``. Where that fails, this goes on: a constant group
    has scale 0 and codes 0; a group whose scale underflows takes the smallest scale
    that reaches its maximum; a group whose range, or an element of a float32 weight,
    is beyond float16 is quantized without rounding to it.

    Args:
      weight: float16 or float32 ``[n, k]``, finite.
      group_size: Elements that share a scale, a multiple of 4 that divides k.

    Returns:
      Words int16 ``[n, k / group_size, group_size / 4]``, and scale and smallest
      element of every group, ``[n, k / group_size, 1]`` in the dtype of ``weight``;
      also in float32 they hold float16 values.

    Raises:
      ValueError: If ``weight`` has another dtype or rank, ``group_size`` does not fit,
        or n * k is no multiple of 16.

    Example:
      >>> words, scale, bias = group_quantize_compress(jnp.eye(16), group_size=16)
      >>> words.shape, group_quantize_decompress(words, scale, bias).shape
      ((16, 1, 4), (16, 16))
    """
    if weight.ndim != 2 or weight.dtype not in (jnp.float16, jnp.float32):
        raise ValueError(
            f"weight must be float16 or float32 [n, k]; got {weight.dtype}"
            f"{weight.shape}; cast it."
        )
    _check_group_size(group_size, weight.shape[1], "weight.shape[1]")
    return _compress(weight, group_size)


@functools.partial(jax.jit, static_argnums=1)
def _compress(weight: Array, group_size: int) -> tuple[Array, Array, Array]:
    n, k = weight.shape
    groups = weight.reshape(n, k // group_size, group_size)
    # All float16 arithmetic is done in float32 and rounded: subnormal numbers, which
    # float16 groups of a small range have, are normal there.
    low, high = (
        _round(bound.astype(jnp.float32))
        for bound in (groups.min(2, keepdims=True), groups.max(2, keepdims=True))
    )
    extent = _round(high - low)
    scale = _round(extent / _TOP)
    scale = scale + _step_up(scale, extent)
    distance, half = groups.astype(jnp.float32) - low, weight.dtype == jnp.float16
    distance = _round(distance) if half else distance
    steps = distance / jnp.where(scale > 0, scale, 1)
    codes = jnp.clip(jnp.round(_round(steps) if half else steps), 0, _TOP)
    words = encode_int4(codes.astype(jnp.uint8).reshape(-1)).reshape(
        *groups.shape[:2], -1
    )
    words = jax.lax.bitcast_convert_type(words, jnp.int16)
    return words, scale.astype(weight.dtype), low.astype(weight.dtype)


def _round(x: Array) -> Array:
    """Rounds float32 to float16 values, but leaves what is too large for them."""
    half = decode.rounded(x, jnp.float16)
    return jnp.where(jnp.isfinite(half), half, x)


def _step_up(scale: Array, extent: Array) -> Array:
    """The spacing of float16 where a scale is too small for its group, else 0."""
    # Only scales below the normal range are rounded by that much; their spacing is the
    # smallest float16.
    smallest = jnp.float32(2.0**-24)
    return jnp.where(extent > (_TOP + 0.5) * scale, smallest, 0)


@jax.jit
def group_quantize_decompress(
    packed: Integer[Array, "n g w"],
    scale: Float[Array, "n g 1"],
    bias: Float[Array, "n g 1"],
) -> Float[Array, "n k"]:
    """Inverse of `group_quantize_compress`.

    Args:
      packed: int16 or uint16 ``[n, k / group_size, group_size / 4]``.
      scale: ``[n, k / group_size, 1]`` float16 or float32.
      bias: Like ``scale``.

    Returns:
      ``q * scale + bias``, ``[n, k]``, both operations rounded to the dtype of
      ``scale``. Where that makes a product infinite, only the sum is rounded.

    Raises:
      ValueError: If shapes or dtypes do not fit.
    """
    qt = _qtensor(packed, scale, bias)
    twice = decode.dequantize(qt)
    once = decode.dequantize(dataclasses.replace(qt, rounding=1))
    return jnp.where(jnp.isfinite(twice), twice, once).T


def _qtensor(packed: Array, scale: Array, bias: Array) -> QTensor:
    if packed.dtype not in (jnp.int16, jnp.uint16):
        raise ValueError(f"packed.dtype={packed.dtype} must be int16 or uint16.")
    if packed.ndim != 3:
        raise ValueError(f"packed.shape={packed.shape} must have 3 axes.")
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != (*packed.shape[:2], 1):
            raise ValueError(
                f"{name}.shape={array.shape} must be {(*packed.shape[:2], 1)}, from "
                f"packed.shape={packed.shape}."
            )
        if array.dtype not in (jnp.float16, jnp.float32) or array.dtype != scale.dtype:
            raise ValueError(
                f"{name}.dtype={array.dtype} must be float16 or float32, the same for "
                "scale and bias."
            )
    group_size = 4 * packed.shape[2]
    return tensor.build(
        (jax.lax.bitcast_convert_type(packed, jnp.uint16),),
        scale[:, :, 0].T,
        bias[:, :, 0].T,
        layout=Blocks(group_size),
        segments=(Segment(4, group_size),),
        affine=Affine.OFFSET,
        rounding=2,
    )


def quantize(w: Float[Array, "k n"], group_size: int) -> QTensor:
    """Quantizes a weight as `group_quantize_compress` does its transpose.

    Args:
      w: float16 or float32 ``[k, n]``, used as ``y = x @ w``; finite.
      group_size: Rows that share a scale, a multiple of 4 that divides k.

    Returns:
      ``[k, n]`` tensor in the layout of the original's words.

    Raises:
      ValueError: As `group_quantize_compress`.

    Example:
      >>> quantize(jnp.eye(32), group_size=16)
      QTensor(32x32, 4 bits, group 16, Blocks(group_size=16), q * s + z, ...)
    """
    return _qtensor(*group_quantize_compress(w.T, group_size))


def from_compressed(
    packed: Integer[Array | np.ndarray, "n g w"],
    scale: Float[Array | np.ndarray, "n g 1"],
    bias: Float[Array | np.ndarray, "n g 1"],
) -> QTensor:
    """Reads what `group_quantize_compress`, here or in the original, returns.

    Args:
      packed: int16 or uint16 ``[n, k / group_size, group_size / 4]``, concrete.
      scale: ``[n, k / group_size, 1]`` float16 or float32, concrete.
      bias: Like ``scale``.

    Returns:
      ``[k, n]`` tensor in the layout of the words, with ``rounding=2``. In float16 that
      makes products beyond 65504 infinite (ranges that the original cannot quantize);
      with ``rounding=1`` only the sum is rounded.

    Raises:
      ValueError: If shapes or dtypes do not fit, or a scale or bias is not finite.
    """
    check_finite({"scale": scale, "bias": bias})
    return _qtensor(jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(bias))


def to_compressed(qt: QTensor) -> tuple[Array, Array, Array]:
    """Writes a matrix as `group_quantize_compress` returns it.

    Args:
      qt: A matrix of four bits, ``q * s + z`` with whole groups of rows in input order.

    Returns:
      Words int16 ``[n, k / group_size, group_size / 4]``, scale and bias
      ``[n, k / group_size, 1]``.

    Raises:
      ValueError: If FlexGen cannot hold ``qt``, with the reason.
    """
    size, reason = qt.segments[0].group_size or qt.k, refusal(qt, (4,))
    if qt.affine is not Affine.OFFSET:
        reason = reason or f"{qt.affine.value} is no multiple of the scale plus a bias"
    if qt.scale.dtype not in (jnp.float16, jnp.float32):
        reason = reason or f"{qt.scale.dtype} scales; only float16 and float32 are held"
    if reason:
        raise ValueError(f"FlexGen cannot hold {qt!r}: {reason}.")
    words = decode.relayout(qt, Blocks(size)).words[0]
    scale, bias = tensor.plain(qt.scale), tensor.plain(typing.cast(Array, qt.zero))
    return (
        jax.lax.bitcast_convert_type(words, jnp.int16),
        scale.T[:, :, None],
        bias.T[:, :, None],
    )
