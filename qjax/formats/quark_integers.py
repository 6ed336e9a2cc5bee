"""Quark's integers: from the words of a file to codes and layouts, and back.

Source: as `quark`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer, UInt8, UInt32

from qjax.bits import transpose_codes
from qjax.formats import awq, fp8
from qjax.formats.gptq import Stream
from qjax.formats.quark_config import Scheme
from qjax.tensor import Layout

# Which code of a word in AWQ's order each of its fields holds.
_ORDER, _FIELDS = (0, 2, 4, 6, 1, 3, 5, 7), tuple(range(8))


def words_of(
    weight: np.ndarray, scheme: Scheme, n: int, *, reorder: bool
) -> tuple[Array, Layout]:
    """Brings the codes of a weight into a layout.

    Args:
      weight: As a file has it.
      scheme: How it is quantized.
      n: How many outputs there are, which codes of two bits are cut to.
      reorder: Whether eight codes of four bits are in AWQ's order.

    Returns:
      Words of codes that begin at 0, and their layout.

    Raises:
      ValueError: As `codes_of`.
    """
    if scheme.stored.bits == 8:
        # Two's complement, from -128 on, counts from 0 on where its sign is flipped.
        signs = np.uint8(128 if scheme.is_signed else 0)
        words = jnp.asarray(weight.view(np.uint8)) ^ signs
        return words.T if scheme.is_turned else words, fp8.Bytes()
    if scheme.stored.bits == 2:
        codes = codes_of("weight", weight, scheme, reorder=reorder)
        codes = codes[:, :n] if scheme.is_turned else codes.T
        return Stream().pack(jnp.asarray(codes), 2), Stream()
    # Outputs lie in AWQ's order there, inputs in their own.
    layout = awq.Gemm() if scheme.is_turned else awq.Gemv()
    words = jnp.asarray(weight.view(np.uint32))
    if scheme.is_turned and not reorder:
        words = _moved(words, _ORDER, _FIELDS)
    elif reorder and not scheme.is_turned:
        words = _moved(words, _FIELDS, _ORDER)
    return words ^ jnp.uint32(0x88888888) if scheme.is_signed else words, layout


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moved(
    words: UInt32[Array, "rows words"], sources: Sequence[int], targets: Sequence[int]
) -> UInt32[Array, "rows words"]:
    """Moves the eight fields of each word to other places in it."""
    moved = jnp.zeros_like(words)
    for source, target in zip(sources, targets, strict=True):
        moved |= ((words >> (4 * source)) & jnp.uint32(15)) << (4 * target)
    return moved


def codes_of(
    name: str, packed: np.ndarray, scheme: Scheme, *, reorder: bool
) -> UInt8[np.ndarray, "..."]:
    """Unpacks integers along the last axis.

    Args:
      name: What they are called, for the message.
      packed: As a file has them; a number alone is not packed.
      scheme: How the weight is quantized.
      reorder: As in `words_of`.

    Returns:
      Codes that begin at 0, with at least one axis.

    Raises:
      ValueError: If one is of more bits than its type.
    """
    bits, codes = scheme.stored.bits, np.atleast_1d(packed)
    if bits == 4 and packed.ndim:
        rows = jnp.asarray(packed.reshape(-1, packed.shape[-1]))
        codes = np.asarray(awq.unpack(rows, reorder))
    elif scheme.dtype == "uint2":
        fields = packed[..., None] >> np.array([6, 4, 2, 0], np.uint8) & np.uint8(3)
        codes = fields.reshape(*packed.shape[:-1], -1)
    half, least, most = 2 ** (bits - 1), codes.min(), codes.max()
    if least < -half or most >= 2**bits:
        raise ValueError(
            f"{name} from {least} to {most} must lie in the range of {scheme.dtype}."
        )
    patterns = codes.astype(np.uint8) & np.uint8(2**bits - 1)
    return patterns ^ np.uint8(half) if scheme.is_signed else patterns


def stored(
    codes: Integer[Array, "rows columns"], scheme: Scheme
) -> Integer[Array, "..."]:
    """Packs codes of four or eight bits as files have them.

    Args:
      codes: ``[k, n]`` or ``[groups, n]`` codes that begin at 0.
      scheme: How the weight is quantized: of four bits in groups.
    """
    bits = scheme.stored.bits
    signs = jnp.uint8(2 ** (bits - 1) if scheme.is_signed else 0)
    patterns = codes.astype(jnp.uint8) ^ signs
    if bits == 4:
        return awq.pack(patterns, reorder=True)
    patterns = patterns if scheme.is_turned else transpose_codes(patterns)
    return lax.bitcast_convert_type(patterns, scheme.stored.dtype)
