"""GGUF's codes: the low and the high plane of a block.

A code has a low plane of two, four or eight bits and, if it is wider than that, a
high plane of the rest. The bytes of a plane are cut into runs. A byte holds a field of
``w`` bits for each of ``8 / w`` codes that lie a run apart: of run ``c`` with ``r``
bytes, byte ``i`` with four fields is

    bit 7                                                                      bit 0
    | q[4cr + 3r + i] | q[4cr + 2r + i] | q[4cr + r + i] | q[4cr + i] |

Source: ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml/src/ggml-quants.c, as in
release 0.19.0 of the package gguf.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

from qjax.bits import transpose_codes


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_planes(
    codes: Integer[Array, "k n"], block: int, planes: Sequence[tuple[int, int]]
) -> UInt8[Array, "n blocks bytes"]:
    """Packs the planes of blocks, one after another.

    Args:
      codes: ``[k, n]``, k a multiple of ``block``.
      block: Codes of a block.
      planes: Bits of a field and bytes of a run of each plane, the lowest bits first.

    Returns:
      The bytes of each block.
    """
    fields = transpose_codes(codes).reshape(codes.shape[1], -1, block)
    parts, shift = [], 0
    for width, run in planes:
        part = fields >> jnp.uint8(shift) & jnp.uint8(2**width - 1)
        parts.append(_join_plane(part, width, run))
        shift += width
    return jnp.concatenate(parts, axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def unpack_planes(
    words: UInt8[Array, "n blocks bytes"], block: int, planes: Sequence[tuple[int, int]]
) -> UInt8[Array, "k n"]:
    """Inverse of `pack_planes`."""
    codes, shift, begin = jnp.uint8(0), 0, 0
    for width, run in planes:
        end = begin + block * width // 8
        codes |= _split_plane(words[..., begin:end], width, run) << jnp.uint8(shift)
        begin, shift = end, shift + width
    return transpose_codes(codes.reshape(words.shape[0], -1))


def _join_plane(fields: Array, width: int, run: int) -> Array:
    """Packs one plane: fields ``[n, blocks, block]`` into bytes."""
    apart = fields.reshape(*fields.shape[:2], -1, 8 // width, run)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[None, None, None, :, None]
    return (apart << shifts).sum(-2, dtype=jnp.uint8).reshape(*fields.shape[:2], -1)


def _split_plane(words: Array, width: int, run: int) -> Array:
    """Inverse of `_join_plane`."""
    apart = words.reshape(*words.shape[:2], -1, 1, run)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[None, None, None, :, None]
    fields = apart >> shifts & jnp.uint8(2**width - 1)
    return fields.reshape(*words.shape[:2], -1)
