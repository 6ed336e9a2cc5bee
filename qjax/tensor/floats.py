"""Small floats as codes: E2M1 of four bits, E4M3 of eight.

A code is the pattern of a float: its sign in the highest bit, then the exponent, then
the mantissa.

    bit 7   6 5 4 3   2 1 0        bit 3   2 1   0
    | sign | e e e e | m m m |     | sign | e e | m |

Exponents of 0 are those of subnormal numbers. There are no infinities; of E4M3 the two
patterns of all ones, 127 and 255, are not numbers.

Source: OCP 8-bit Floating Point Specification (OFP8), version 1.0, for E4M3; OCP
Microscaling Formats (MX) Specification, version 1.0, for E2M1.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8


class SmallFloat(NamedTuple):
    """A float of fewer than 16 bits.

    Attributes:
      mantissa: Bits of its mantissa.
      bias: What is added to its exponents.
      largest: The largest number.
    """

    mantissa: int
    bias: int
    largest: float


# By the width of a code.
SMALL_FLOATS = {4: SmallFloat(1, 1, 6.0), 8: SmallFloat(3, 7, 448.0)}
# Of float16, which has the subnormal numbers of both.
_MANTISSA, _BIAS = 10, 15


def widen(codes: UInt8[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Returns the float32 numbers of patterns of small floats, exactly.

    Args:
      codes: Patterns. Those of E4M3 that are no numbers, which no format lets in, come
        out as 480 and -480.
      bits: Their width, 4 or 8.

    Example:
      >>> widen(jnp.arange(8, dtype=jnp.uint8), 4).tolist()
      [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    kind, wide = SMALL_FLOATS[bits], codes.astype(jnp.uint16)
    sign, size = wide >> (bits - 1), wide & jnp.uint16(2 ** (bits - 1) - 1)
    # The fields where float16 has its own; its exponents are higher by a constant.
    pattern = sign << 15 | size << (_MANTISSA - kind.mantissa)
    number = lax.bitcast_convert_type(pattern, jnp.float16).astype(jnp.float32)
    # No product: a compiler may have the scale, which comes next, take its factor first
    # (jax 0.10 does), and overflow.
    low = lax.bitcast_convert_type(number, jnp.int32)
    raised = jnp.where(size == 0, low, low + ((_BIAS - kind.bias) << 23))
    return lax.bitcast_convert_type(raised, jnp.float32)


def numbers(bits: int) -> np.ndarray:
    """Returns the float32 numbers of all codes, NaN for those that are none.

    Args:
      bits: Width of a code, 4 or 8.
    """
    kind, codes = SMALL_FLOATS[bits], np.arange(2**bits, dtype=np.uint16)
    size = codes & (2 ** (bits - 1) - 1)
    pattern = (size << (_MANTISSA - kind.mantissa)).astype(np.uint16)
    number = pattern.view(np.float16).astype(np.float32) * 2.0 ** (_BIAS - kind.bias)
    number = np.where(number > kind.largest, np.nan, number)
    return np.where(codes >> (bits - 1), -number, number).astype(np.float32)
