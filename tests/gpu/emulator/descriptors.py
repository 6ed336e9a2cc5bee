"""Matrices that tensor cores read from shared memory, where descriptors say they lie.

How a descriptor places a matrix: PTX ISA, sections "Matrix Descriptor Format" of wgmma
and "Shared Memory Descriptor" of tcgen05; and NVIDIA/cutlass,
include/cute/atom/mma_traits_sm90_gmma.hpp, 6433f9917fa6, and mma_traits_sm100.hpp and
include/cute/arch/mma_sm100_desc.hpp, 0d2b201e8c1c. Both are alike but for the version.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tests.gpu.emulator.parser import EmulationError
from tests.gpu.emulator.shared_memory import SharedMemory

WGMMA, TCGEN05 = 0, 1  # versions
# Swizzle mode -> bytes that lie together, and how many bits of an address are flipped.
_SWIZZLES = {0: (16, 0), 2: (128, 3), 4: (64, 2), 6: (32, 1)}


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a descriptor says: bytes, and bits of an address that are flipped."""

    start: int
    leading: int
    stride: int
    span: int
    flipped: int

    @classmethod
    def of(cls, descriptor: int, version: int) -> "Placement":
        """Reads a descriptor."""
        rest = descriptor >> 46 & 0x7FFF
        if rest != version or descriptor >> 61 not in _SWIZZLES:
            raise EmulationError(
                "a descriptor of another version or swizzle, or with a base offset or "
                f"an absolute address: {descriptor:#x}"
            )
        # Units of 16 bytes.
        start, leading, stride = (
            (descriptor >> low & 0x3FFF) << 4 for low in (0, 16, 32)
        )
        return cls(start, leading, stride, *_SWIZZLES[descriptor >> 61])


@functools.cache
def _chunks(placement: Placement, extent: int, transposed: bool) -> np.ndarray:
    """Where an operand lies in shared memory, in chunks of eight elements.

    Args:
      placement: Of the operand.
      extent: Of m or n; k has 16.
      transposed: Whether m or n, and not k, runs along a chunk.

    Returns:
      Addresses, ``[extent, 2]``, or ``[16, extent / 8]`` if transposed.
    """
    p = placement
    if transposed:
        k, i = np.mgrid[:16, : extent // 8]
        if p.flipped:
            together = p.span // 16
            offset = i % together * 16 + i // together * p.leading
            offset += k % 8 * p.span + k // 8 * p.stride
        else:
            offset = i * p.stride + k % 8 * 16 + k // 8 * p.leading
    else:
        i, half = np.mgrid[:extent, :2]
        offset = i % 8 * p.span + i // 8 * p.stride
        offset += half * (16 if p.flipped else p.leading)
    addresses = p.start + offset
    return addresses ^ ((addresses >> 7 & (1 << p.flipped) - 1) << 4)


def load(
    shared: SharedMemory,
    program: np.ndarray,
    placements: Sequence[Placement],
    extent: int,
    dtype: np.dtype,
    *,
    transposed: bool,
    product: int = 0,
) -> np.ndarray:
    """Reads an operand on behalf of the tensor cores.

    Args:
      shared: Where it lies.
      program: Whose shared memory, for each operand.
      placements: Of each operand.
      extent: Of m or n.
      dtype: Of its elements.
      transposed: Whether m or n, and not k, runs along a chunk.
      product: The number of a product that reads until its end is known; 0 for one
        that reads now.

    Returns:
      The operands as float32, ``[operands, extent, 16]``.
    """
    chunks = np.stack([_chunks(p, extent, transposed) for p in placements])
    program = np.repeat(program, chunks[0].size)
    loaded = shared.load_async(program, chunks.ravel(), product)
    elements = loaded.view(dtype).astype(np.float32)
    if transposed:
        return elements.reshape(len(chunks), 16, extent).swapaxes(-1, -2)
    return elements.reshape(len(chunks), extent, 16)
