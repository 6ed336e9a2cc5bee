"""torchao's layout of integers: a signed byte a code, whatever the width.

    bit 7                bit 0
    | q - 2^(bits-1), int8 |

Source: pytorch/ao, torchao/quantization/quantize_/workflows/int8/int8_tensor.py and
workflows/intx/intx_unpacked_to_int8_tensor.py, release 0.18.0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Integer, Shaped, UInt8

from qjax import tensor
from qjax.bits import block, transpose_codes
from qjax.formats.checks import check_codes, check_words


@dataclasses.dataclass(frozen=True)
class Bytes(tensor.Layout):
    """One signed byte a code, in torch's orientation: words int8 ``[n, k]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Int8[Array, "n k"]:
        """Packs ``[k, n]`` codes of 1 to 8 bits."""
        block(bits)  # refuses other widths
        check_codes(codes)
        return signed(codes, bits)

    def unpack(self, words: Shaped[Array, "n k"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks int8 bytes; a byte out of the range of ``bits`` wraps around."""
        block(bits)  # refuses other widths
        check_words(words, 2, jnp.int8)
        return _unsigned(words, bits)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, n)``."""
        del bits
        return shape[1], shape[0]


@functools.partial(jax.jit, static_argnums=1)
def signed(codes: Array, bits: int) -> Array:
    """Codes ``[k, n]``, cut to ``bits``, as int8 values around 0, ``[n, k]``."""
    fields = transpose_codes(codes) & jnp.uint8(2**bits - 1)
    return lax.bitcast_convert_type(fields - jnp.uint8(2 ** (bits - 1)), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _unsigned(words: Array, bits: int) -> Array:
    """Inverse of `signed`."""
    fields = lax.bitcast_convert_type(words, jnp.uint8) + jnp.uint8(2 ** (bits - 1))
    return transpose_codes(fields & jnp.uint8(2**bits - 1))
