"""Fields of 1 to 8 bits in 32-bit words: the little-endian bit stream.

Code ``i`` of a stream of ``b``-bit codes lies in bits ``b*i .. b*i + b - 1`` of one
long bit string, cut into 32-bit words from the least significant bit up. A code that
does not fit into the rest of a word goes on in the low bits of the next. Four bits:

    bit 31                                                  bit 0
    | c7 | c6 | c5 | c4 | c3 | c2 | c1 | c0 |    next word: | c15 | ... | c8 |

Three bits, the first of three words (c10 goes on in bit 0 of the second):

    | c10: 2 low bits | c9 | c8 | ... | c1 | c0 |
"""

import functools
import math
import numbers
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer, UInt8, UInt32

WORD = 32


class Piece(NamedTuple):
    """The part of one code that lies in one word."""

    code: int  # index of the code in its block
    word: int  # index of the word in its block
    left: int  # bits by which the code moves left to its place; negative: right


def whole(value: Any) -> int | None:
    """Returns an integer as Python's own, and None for what is none.

    Those of NumPy are integers as well, but overflow; True is one by inheritance alone.

    Args:
      value: Anything.

    Example:
      >>> whole(np.int8(8)), whole(True), whole(8.0)
      (8, None, None)
    """
    is_one = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_one else None


def width(bits: SupportsIndex) -> int:
    """Returns the width of a code as an integer of Python.

    Args:
      bits: 1 to 8.

    Raises:
      ValueError: If ``bits`` is not an integer from 1 to 8.
    """
    found = whole(bits)
    if found is None or not 1 <= found <= 8:
        raise ValueError(f"bits={bits!r} must be an integer from 1 to 8.")
    return found


def block(bits: SupportsIndex) -> tuple[int, int]:
    """Returns (codes, words) of the shortest whole block of ``bits``-bit codes.

    Args:
      bits: Width of a code, 1 to 8.

    Returns:
      The smallest number of codes that fills whole words, and that number of words.

    Raises:
      ValueError: If ``bits`` is not an integer from 1 to 8.

    Example:
      >>> block(4), block(3), block(6)
      ((8, 1), (32, 3), (16, 3))
    """
    bits = width(bits)
    shared = math.gcd(bits, WORD)
    return WORD // shared, bits // shared


def pieces(bits: SupportsIndex) -> Iterator[Piece]:
    """Yields where every code of a block lies, two pieces for one that straddles.

    Args:
      bits: Width of a code, 1 to 8.

    Yields:
      ``Piece(code, word, left)`` in the order of the codes.
    """
    bits = width(bits)
    for code in range(block(bits)[0]):
        word, shift = divmod(code * bits, WORD)
        yield Piece(code, word, shift)
        if shift + bits > WORD:
            yield Piece(code, word + 1, shift - WORD)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack_fields(
    codes: Integer[Array, "..."], bits: SupportsIndex, axis: int = 0
) -> UInt32[Array, "..."]:
    """Packs codes into a little-endian bit stream of 32-bit words along one axis.

    Args:
      codes: Integers from 0 to ``2**bits - 1``, any integer dtype. Higher bits are cut
        off, so that a code out of range cannot damage its neighbours.
      bits: Width of a code, 1 to 8.
      axis: The axis along which the stream runs.

    Returns:
      uint32 words; the length of ``axis`` is multiplied by ``bits / 32``.

    Raises:
      ValueError: If ``bits`` is not 1 to 8, ``codes`` are not integers, or the length
        of ``axis`` does not fill whole words.

    Example:
      >>> hex(pack_fields(jnp.arange(8), 4)[0])
      '0x76543210'
    """
    bits = width(bits)
    per_block, words = block(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    length = codes.shape[axis]
    if length % per_block:
        raise ValueError(
            f"codes.shape[{axis}]={length} must be a multiple of {per_block}, the "
            f"number of {bits}-bit codes that fills whole 32-bit words; pad codes."
        )
    masked = codes.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    fields = _split(masked, per_block, axis)
    parts: list[list[Array]] = [[] for _ in range(words)]
    for code, word, left in pieces(bits):
        parts[word].append(_shift(fields[code], left))
    return _merge([functools.reduce(operator.or_, part) for part in parts], axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def unpack_fields(
    words: Integer[Array, "..."], bits: SupportsIndex, axis: int = 0
) -> UInt8[Array, "..."]:
    """Unpacks the codes of a little-endian bit stream of 32-bit words along one axis.

    Args:
      words: int32 or uint32; a signed container is read as the bit pattern it holds.
      bits: Width of a code, 1 to 8.
      axis: The axis along which the stream runs.

    Returns:
      uint8 codes; the length of ``axis`` is multiplied by ``32 / bits``.

    Raises:
      ValueError: If ``bits`` is not 1 to 8, ``words`` are not 32-bit integers, or the
        length of ``axis`` is not whole blocks.

    Example:
      >>> unpack_fields(jnp.array([0x76543210]), 4)
      Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    bits = width(bits)
    per_block, per_block_words = block(bits)
    if words.dtype not in (jnp.int32, jnp.uint32):
        raise ValueError(f"words.dtype={words.dtype} must be int32 or uint32.")
    length = words.shape[axis]
    if length % per_block_words:
        raise ValueError(
            f"words.shape[{axis}]={length} must be a multiple of {per_block_words}, "
            f"the words of a block of {per_block} {bits}-bit codes."
        )
    axis %= words.ndim
    shape = (*words.shape[:axis], -1, per_block_words, *words.shape[axis + 1 :])
    blocks = lax.bitcast_convert_type(words, jnp.uint32).reshape(shape)
    word, shift = np.divmod(np.arange(per_block) * bits, WORD)
    column = [per_block if i == axis + 1 else 1 for i in range(blocks.ndim)]

    def taken(index: np.ndarray) -> Array:
        # One word a block needs no gather: its codes are a broadcast.
        return blocks if per_block_words == 1 else jnp.take(blocks, index, axis + 1)

    # All codes in one element-wise expression, which XLA keeps in one fusion; a stack
    # of slices, one a code, would go through memory.
    fields = taken(word) >> shift.reshape(column).astype(np.uint32)
    straddles = shift + bits > WORD
    if straddles.any():
        left = np.where(straddles, WORD - shift, 0).reshape(column).astype(np.uint32)
        keep = np.where(straddles, 2**bits - 1, 0).reshape(column).astype(np.uint32)
        high = taken(np.minimum(word + 1, per_block_words - 1))
        fields = fields | ((high << left) & keep)
    fields = (fields & jnp.uint32(2**bits - 1)).astype(jnp.uint8)
    return fields.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


@functools.partial(jax.jit, static_argnames="axes")
def transpose(words: Array, axes: tuple[int, ...]) -> Array:
    """Transposes words of packed codes, in a loop of its own.

    A transposition takes its time by the element, not by the byte; so layouts that run
    the other way transpose words full of codes, not the codes. XLA alone would put
    packing and transposition into one loop, which walks down a column of memory for
    every code. (JAX 0.10 does so on the CPU all the same.)

    Args:
      words: Any array.
      axes: The axes of ``words`` in the order of the result.

    Returns:
      ``words.transpose(axes)``.

    Example:
      >>> transpose(jnp.arange(6).reshape(2, 3), (1, 0))[2]
      Array([2, 5], dtype=int32)
    """
    moved = lax.optimization_barrier(words).transpose(axes)
    # Flat: the same memory under another order of axes would do for any other shape.
    return lax.optimization_barrier(moved.reshape(-1)).reshape(moved.shape)


@jax.jit
def transpose_codes(codes: Integer[Array, "a b"]) -> UInt8[Array, "b a"]:
    """Transposes a matrix of codes as words of four, where they fill whole words.

    Args:
      codes: ``[a, b]`` integers from 0 to 255; higher bits are cut off.

    Returns:
      ``codes.T`` as uint8.

    Example:
      >>> transpose_codes(jnp.arange(8, dtype=jnp.uint8).reshape(4, 2))[1]
      Array([1, 3, 5, 7], dtype=uint8)
    """
    if codes.shape[0] % 4:
        return codes.T.astype(jnp.uint8)
    words = transpose(pack_fields(codes, 8, axis=0), (1, 0))
    return unpack_fields(words, 8, axis=1)


def _shift(value: Array, left: int) -> Array:
    """Logical shift of uint32 by a static distance, left or (negative) right."""
    return value << jnp.uint32(left) if left >= 0 else value >> jnp.uint32(-left)


def _split(x: Array, period: int, axis: int) -> list[Array]:
    """Cuts ``axis`` into blocks of ``period`` and returns the period's slices."""
    axis %= x.ndim
    shape = (*x.shape[:axis], x.shape[axis] // period, period, *x.shape[axis + 1 :])
    blocks = x.reshape(shape)
    return [
        lax.index_in_dim(blocks, i, axis + 1, keepdims=False) for i in range(period)
    ]


def _merge(slices: list[Array], axis: int) -> Array:
    """Inverse of `_split`."""
    axis %= slices[0].ndim
    blocks = jnp.stack(slices, axis + 1)
    shape = blocks.shape
    merged = shape[axis] * shape[axis + 1]
    return blocks.reshape((*shape[:axis], merged, *shape[axis + 2 :]))
