"""The GPU that programs are compiled for."""

import functools
from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """What a launch has to know of a GPU.

    Attributes:
      multiprocessors: How many there are.
      shared: Bytes of shared memory that a program may take.
      major: The first number of its compute capability.
    """

    multiprocessors: int
    shared: int
    major: int

    @property
    def is_asynchronous(self) -> bool:
        """Whether tensor cores may read shared memory while a program goes on."""
        return 9 <= self.major < 12

    @property
    def has_tensor_memory(self) -> bool:
        """Whether tensor cores have a memory of their own, as those of a B200 have."""
        return self.major in (10, 11)


H100 = Gpu(132, 227 << 10, major=9)
# Shared memory of a program, by compute capability, where JAX does not tell.
_SHARED = {"8.0": 163 << 10, "8.7": 163 << 10, "9.0": 227 << 10}
_SHARED |= dict.fromkeys(("10.0", "10.3", "11.0"), 227 << 10)
# Of GeForce GPUs, and others of their kind.
_LEAST_SHARED = 99 << 10


@functools.cache
def at_hand() -> Gpu:
    """The GPU at hand, or an H100 without one."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return H100
    capability = str(getattr(device, "compute_capability", "9.0"))
    return Gpu(
        getattr(device, "core_count", H100.multiprocessors),
        getattr(
            device,
            "shared_memory_per_block_optin",
            _SHARED.get(capability, _LEAST_SHARED),
        ),
        major=int(capability.partition(".")[0]),
    )
