"""Device memory: every access is checked.

An array of the launch lies in a range of addresses of its own, so far from the others
that no wrong index reaches them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tests.gpu.emulator.parser import EmulationError

# Bits of an address that say where in an array's range it lies; the array itself
# starts in the middle.
_RANGE = 40
GARBAGE = 0xFF  # NaN, in every float format


def place_of(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parameters in whose ranges addresses of device memory lie, and where."""
    inside = addresses & np.uint64((1 << _RANGE) - 1)
    return addresses >> np.uint64(_RANGE), inside.astype(np.int64)


@dataclasses.dataclass
class Buffer:
    """An array of the launch.

    Attributes:
      start: Its address.
      data: Its bytes.
      written: Which of them the kernel has written; None for an operand.
    """

    start: int
    data: np.ndarray
    written: np.ndarray | None = None


class DeviceMemory:
    """The operands of a launch, and its outputs."""

    def __init__(
        self, operands: Sequence[np.ndarray], outputs: Sequence[int], align: int = 16
    ):
        """Lays them out.

        Args:
          operands: Arrays.
          outputs: Bytes of each output.
          align: Of which their addresses are an odd multiple.
        """
        self.buffers = []
        sized = [np.frombuffer(array.tobytes(), np.uint8) for array in operands]
        for i, data in enumerate(sized):
            self.buffers.append(Buffer(self._start(i, align), data))
        for i, size in enumerate(outputs, len(sized)):
            data = np.full(size, GARBAGE, np.uint8)
            written = np.zeros(size, bool)
            self.buffers.append(Buffer(self._start(i, align), data, written))

    @staticmethod
    def _start(number: int, align: int) -> int:
        return (number << _RANGE) + (1 << (_RANGE - 1)) + align

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Reads ``size`` bytes at each address: ``[addresses, size]``."""
        found = np.empty((len(addresses), size), np.uint8)
        for buffer, here, places in self._places(addresses, size):
            if buffer.written is not None and not buffer.written[places].all():
                raise EmulationError("an output is read before it is written")
            found[here] = buffer.data[places]
        return found

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes ``values[addresses, size]``; two of one place must be the same."""
        for buffer, here, places in self._places(addresses, values.shape[1]):
            if buffer.written is None:
                raise EmulationError("an operand is written to")
            new = values[here]
            known = buffer.written[places] & (buffer.data[places] != new)
            buffer.data[places], buffer.written[places] = new, True
            if known.any() or (buffer.data[places] != new).any():
                raise EmulationError("different values are stored in one place")

    def _places(self, addresses, size):
        """Yields a buffer, which addresses are in it, and ``[addresses, size]``."""
        if (addresses % size).any():
            raise EmulationError(
                f"an address is no multiple of {size}: {addresses[0]:#x}"
            )
        number, _ = place_of(addresses)
        for i in np.unique(number).tolist():
            if i >= len(self.buffers):
                raise EmulationError(f"an address in no array: {addresses.max():#x}")
            buffer, here = self.buffers[i], number == i
            offset = addresses[here].astype(np.int64) - buffer.start
            if offset.min() < 0 or offset.max() > len(buffer.data) - size:
                raise EmulationError(
                    f"bytes {offset.min()} to {offset.max() + size} of parameter {i}, "
                    f"which has {len(buffer.data)}"
                )
            yield buffer, here, offset[:, None] + np.arange(size)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Threads that make an access, one a row: their program, and their warp in it."""

    program: np.ndarray
    warp: np.ndarray
