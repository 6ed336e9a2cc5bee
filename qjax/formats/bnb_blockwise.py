"""bitsandbytes' tables, the rounding of blocks to their entries, and pairs of codes.

Source: bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py and
bitsandbytes/backends/default/ops.py, release 0.50.2.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

QuantType = Literal["nf4", "fp4"]
_NF4_BITS = (
    *(0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F),
    *(0xBDBA7871, 0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A),
    *(0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000),
)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
# Code 8 of FP4 is minus zero, which the original's table gives as zero.
TABLES: Mapping[str, np.ndarray] = {
    "nf4": np.array(_NF4_BITS, np.uint32).view(np.float32),
    "fp4": np.concatenate([_FP4, np.float32(0) - _FP4]),
}


@functools.partial(jax.jit, static_argnames="blocksize")
def quantize_blockwise(
    a: Float[Array, "*shape"], code: Float[Array, " entries"], blocksize: int = 4096
) -> tuple[UInt8[Array, "*shape"], Float[Array, " blocks"]]:
    """Quantizes blocks of a flattened array to the nearest entries of a table.

    Four-bit codes are those of the original on a CPU; with 256 entries its native CPU
    kernel now and then takes the neighbour of the nearest entry.

    Args:
      a: Any float array.
      code: At most 256 entries from -1 to 1, in any order, such as `dynamic_map`.
      blocksize: Elements that share a scale; the last block may be short.

    Returns:
      Codes, and the largest magnitude of every block in float32. A value midway between
      two entries takes the lower one.
    """
    flat = a.astype(jnp.float32).reshape(-1)
    short = flat.size % blocksize
    blocks = jnp.pad(flat, (0, -flat.size % blocksize)).reshape(-1, blocksize)
    absmax = jnp.abs(blocks).max(1)
    # The original multiplies by the reciprocal, but divides the last block if short.
    divisor = jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny)[:, None]
    scaled = blocks * (1 / divisor)
    if short:
        scaled = scaled.at[-1].set(blocks[-1] / divisor[-1])
    order = jnp.argsort(code)
    entries = code[order]
    middles = (entries[:-1] + entries[1:]) / 2
    # A table's two zeros count as one entry, the first.
    rank = jnp.searchsorted(middles, jnp.clip(scaled, -1, 1), side="left")
    codes = order.astype(jnp.uint8)[rank]
    return codes.reshape(-1)[: flat.size].reshape(a.shape), absmax


@functools.partial(jax.jit, static_argnames="blocksize")
def dequantize_blockwise(
    codes: UInt8[Array, "*shape"],
    absmax: Float[Array, " blocks"],
    code: Float[Array, " entries"],
    blocksize: int = 4096,
) -> Float[Array, "*shape"]:
    """Inverse of `quantize_blockwise`: ``code[codes] * absmax`` in float32.

    Args:
      codes: uint8 codes of any shape.
      absmax: Scale of every block of the flattened codes.
      code: The table.
      blocksize: Elements that share a scale.

    Returns:
      float32 values in the shape of ``codes``.
    """
    scale = jnp.repeat(absmax, blocksize)[: codes.size].reshape(codes.shape)
    return code[codes] * scale


def dynamic_map() -> np.ndarray:
    """The signed 8-bit table of the original, for `quantize_blockwise`.

    Besides 0 and 1 it has, for each of seven decades, ``2**i`` magnitudes evenly spaced
    in a tenth to one of ``10**(i - 6)``, with both signs.

    Returns:
      float32 ``[256]``, ascending.

    Example:
      >>> dynamic_map()[[0, 127, 255]].tolist()
      [-0.992968738079071, 0.0, 1.0]
    """
    entries = [np.array([0, 1], np.float32)]
    for decade in range(7):
        # Edges lie whole steps from the nearer end, each rounded to float32 once.
        steps, start = 2**decade, np.float64(np.float32(0.1))
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
        i = np.arange(steps + 1)
        upper = 1 - step * (steps - i)
        edges = np.where(2 * i < steps, start + step * i, upper).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        middles *= np.float32(10.0 ** (decade - 6))
        entries += [middles, -middles]
    return np.sort(np.concatenate(entries))


@jax.jit
def pack_nibbles(codes: Integer[Array, " m"]) -> UInt8[Array, " words"]:
    """Packs four-bit codes, the first of a pair in the high nibble.

    Args:
      codes: Any number of codes; higher bits are cut off.

    Returns:
      ``ceil(m / 2)`` bytes; an odd number of codes is filled up with a 0.

    Example:
      >>> pack_nibbles(jnp.array([1, 2, 3])).tolist() == [0x12, 0x30]
      True
    """
    even = jnp.pad(codes, (0, codes.size % 2)).astype(jnp.uint8) & jnp.uint8(15)
    return (even[::2] << 4) | even[1::2]


@jax.jit
def unpack_nibbles(words: UInt8[Array, " m"]) -> UInt8[Array, " codes"]:
    """Unpacks the two codes of every byte.

    Args:
      words: Bytes.

    Returns:
      ``2 * m`` codes.

    Raises:
      ValueError: If ``words`` are no bytes.
    """
    if words.dtype != jnp.uint8:
        raise ValueError(f"words.dtype={words.dtype} must be uint8.")
    return jnp.stack([words >> 4, words & jnp.uint8(15)], axis=1).reshape(-1)
