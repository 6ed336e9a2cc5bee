"""tinygemm on a CPU: torch's int4 weights as its CPU operator packs them.

Three layouts go under one name and one shape, uint8 ``[N, K / 2]``, by the vector
instructions of the machine that packed. Blocks of 64 rows of torch's ``[N, K]`` weight
(32 without AVX-512) follow each other; in a block, each input has its rows, two codes a
byte,

    bit 7                        bit 0
    | row r + half of the block | row r |     with vector instructions
    | row 2r + 1                | row 2r |    without

and rows short of a whole block are as in the second line. Scales and zeros are those
of `qjax.formats.tinygemm`.

Source: pytorch/pytorch, aten/src/ATen/native/cpu/int4mm_kernel.cpp, commit
00b919af8e7bb50f52ec45fdad09304d4104464a.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, UInt8

from qjax import tensor
from qjax.formats.gptq import Stream
from qjax.tensor import Affine, QTensor, Segment

Capability = Literal["avx512", "avx2", "default"]
# Rows of torch's weight in a block.
_BLOCK = {"avx512": 64, "avx2": 32, "default": 32}


def unpack_layout(
    packed: UInt8[Array, "n half_k"], capability: Capability
) -> UInt8[Array, "n k"]:
    """Unpacks what ``torch._convert_weight_to_int4pack_for_cpu`` made on a machine.

    The layout is that of the machine's vector instructions, not of the file, and shape
    and dtype do not tell which: ask for ``torch.backends.cpu.get_cpu_capability()`` (or
    the ATEN_CPU_CAPABILITY) there. qjax never writes it.

    Args:
      packed: uint8 ``[N, K / 2]``, N a multiple of 16.
      capability: "avx512", "avx2" or "default" (x86 without either).

    Returns:
      uint8 ``[N, K]`` codes, in torch's orientation.

    Raises:
      ValueError: If the capability is unknown, or dtype or shape do not fit.
    """
    if capability not in _BLOCK:
        raise ValueError(
            f"capability={capability!r} must be one of {list(_BLOCK)}: the vector "
            "instructions of the machine that packed the weight."
        )
    if packed.dtype != jnp.uint8 or len(packed.shape) != 2 or packed.shape[0] % 16:
        raise ValueError(
            f"packed is {packed.dtype}{packed.shape}; it must be uint8 [N, K / 2] with "
            "N a multiple of 16."
        )
    return _unpack(packed, capability)


@functools.partial(jax.jit, static_argnums=1)
def _unpack(packed: Array, capability: Capability) -> Array:
    (n, half), block = packed.shape, _BLOCK[capability]
    k, whole = 2 * half, n // block * block
    flat = packed.reshape(-1)
    blocks = flat[: whole * half].reshape(-1, k, block // 2)
    nibbles = [blocks & 15, blocks >> 4]
    if capability == "default":
        codes = jnp.stack(nibbles, axis=-1).reshape(-1, k, block)
    else:  # the low nibbles hold the first half of the block
        codes = jnp.concatenate(nibbles, axis=-1)
    parts = [codes.transpose(0, 2, 1).reshape(whole, k)]
    if whole < n:
        rest = flat[whole * half :].reshape(k, -1)
        pairs = jnp.stack([rest & 15, rest >> 4], axis=-1)
        parts.append(pairs.reshape(k, -1).T)
    return jnp.concatenate(parts)


def from_layout(
    packed: UInt8[Array, "n half_k"],
    scales_and_zeros: BFloat16[Array, "groups n 2"],
    group_size: int,
    capability: Capability,
) -> QTensor:
    """Reads a weight that torch packed for a CPU into the stream of `gptq`.

    Args:
      packed: As in `unpack_layout`.
      scales_and_zeros: bfloat16 ``[K / group_size, N, 2]``.
      group_size: The inputs that share a scale.
      capability: As in `unpack_layout`.

    Returns:
      ``[k, n]`` tensor. Its float32 weight is what the CPU kernels multiply by: they
      round nothing to bfloat16.

    Raises:
      ValueError: As `unpack_layout`; or if scales and zeros do not fit.
    """
    codes = unpack_layout(packed, capability)
    words, scale, zero = _restream(codes, scales_and_zeros)
    return tensor.build(
        (words,),
        scale,
        zero,
        layout=Stream(),
        segments=(Segment(4, group_size),),
        affine=Affine.CENTERED,
    )


@jax.jit
def _restream(codes: Array, parameters: Array) -> tuple[Array, Array, Array]:
    return Stream().pack(codes.T, 4), parameters[..., 0], parameters[..., 1]
