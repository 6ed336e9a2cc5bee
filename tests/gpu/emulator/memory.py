"""Device memory and shared memory: every access is checked.

An array of the launch lies in a range of addresses of its own, so far from the others
that no wrong index reaches them. Shared memory remembers, until the next barrier, which
warp has written and which have read: what another warp then reads or overwrites is a
race, though the emulator itself runs all threads in step.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tests.gpu.emulator.parser import EmulationError

# Bits of an address that say where in an array's range it lies; the array itself
# starts in the middle.
_RANGE = 40
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
GARBAGE = 0xFF  # NaN, in every float format
# Where shared memory starts; wgmma's swizzles count from a multiple of 1024.
SHARED = 1024


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


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy to shared memory that is under way: ``values[lanes, size]``."""

    who: Lanes
    addresses: np.ndarray
    values: np.ndarray

    def take(self, programs: np.ndarray) -> "Copy":
        """Returns that of some of the programs."""
        here = programs[self.who.program]
        number = np.cumsum(programs) - 1
        who = Lanes(number[self.who.program[here]], self.who.warp[here])
        return Copy(who, self.addresses[here], self.values[here])


# What is remembered of every two bytes of shared memory: a bit for each warp that has
# read it since the last barrier, the warp that has written it, plus one, whether the
# tensor cores' own path to it does not see that yet, and whether a copy is under way.
_READERS = (1 << 17) - 1
_WRITER = 17
_WRITERS = 0x3F << _WRITER
_UNFENCED, _UNDER_WAY = 1 << 30, 1 << 31
# In the place of a warp: the tensor cores.
_TENSOR_CORES = 16


class SharedMemory:
    """The shared memory of some programs."""

    def __init__(self, data: np.ndarray, state: np.ndarray):
        self.data, self._state = data, state

    @classmethod
    def of(cls, programs: int, size: int) -> "SharedMemory":
        """Returns ``size`` bytes for each program, full of garbage."""
        size = -(-size // 16) * 16
        return cls(
            np.full((programs, size), GARBAGE, np.uint8),
            np.zeros((programs, size // 2), np.uint32),
        )

    def take(self, programs: np.ndarray) -> "SharedMemory":
        """Returns that of some of the programs."""
        return SharedMemory(self.data[programs], self._state[programs])

    def barrier(self) -> None:
        """All warps have come here: what was written may be read, and so on."""
        self._state &= np.uint32(_UNFENCED | _UNDER_WAY)

    def fence(self) -> None:
        """What was written is seen by the tensor cores' own path."""
        self._state &= np.uint32(~_UNFENCED & 0xFFFFFFFF)

    def load(self, who: Lanes, addresses: np.ndarray, size: int) -> np.ndarray:
        """Reads ``size`` bytes at each address: ``[lanes, size]``."""
        places, cells = self._places(addresses, size)
        program = who.program[:, None]
        state = self._state[program, cells]
        if (state & _UNDER_WAY).any():
            raise EmulationError(
                "shared memory is read that a copy is still on its way to"
            )
        if _by_others(state, who).any():
            raise EmulationError(
                "shared memory is read, without a barrier after its writing"
            )
        for warp in np.unique(who.warp).tolist():
            of_warp = who.warp == warp
            mine = program[of_warp], cells[of_warp]
            self._state[mine] |= np.uint32(1 << warp)
        unit = math.gcd(size, 4)
        units = places[:, ::unit] // unit
        return self.data.view(_UINTS[unit])[program, units].view(np.uint8)

    def load_async(self, program: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Reads 16 bytes at each address on behalf of the tensor cores."""
        who = Lanes(program, np.full(len(program), _TENSOR_CORES))
        _, cells = self._places(addresses, 16)
        if (self._state[program[:, None], cells] & np.uint32(_UNFENCED)).any():
            raise EmulationError(
                "wgmma reads what was written without a proxy fence after it"
            )
        return self.load(who, addresses, 16)

    def store(self, who: Lanes, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes ``values[lanes, size]``; two of one place must be the same."""
        places, cells = self._places(addresses, values.shape[1])
        program = who.program[:, None]
        state = self._check_free(who, cells)
        if (state & _UNDER_WAY).any():
            raise EmulationError(
                "shared memory is written that a copy is still on its way to"
            )
        others = _by_others(state, who)
        others = np.repeat(others, places.shape[1] // cells.shape[1], axis=1)
        # Warps that hold the same element may both write it.
        if (others & (self.data[program, places] != values)).any():
            raise EmulationError(
                "shared memory is written by two warps without a barrier"
            )
        self._write(who, places, cells, values)

    def begin(self, copy: Copy) -> None:
        """Begins a copy: until it arrives, nobody may touch its destination."""
        _, cells = self._places(copy.addresses, copy.values.shape[1])
        state = self._check_free(copy.who, cells)
        if (state & _UNDER_WAY).any() or _by_others(state, copy.who).any():
            raise EmulationError(
                "a copy is begun to where another write may be under way"
            )
        self._state[copy.who.program[:, None], cells] |= np.uint32(_UNDER_WAY)

    def end(self, copy: Copy) -> None:
        """Ends a copy."""
        places, cells = self._places(copy.addresses, copy.values.shape[1])
        self._write(copy.who, places, cells, copy.values)

    def _check_free(self, who, cells):
        state = self._state[who.program[:, None], cells]
        own = (1 << who.warp[:, None]).astype(np.uint32)
        if (state & _READERS & ~own).any():
            raise EmulationError(
                "shared memory is overwritten, with no barrier after a reading"
            )
        return state

    def _write(self, who, places, cells, values):
        program = who.program[:, None]
        self.data[program, places] = values
        if (self.data[program, places] != values).any():
            raise EmulationError(
                "different values are stored in one place of shared memory"
            )
        own = (who.warp[:, None] + 1).astype(np.uint32) << np.uint32(_WRITER)
        own |= np.uint32(_UNFENCED)
        self._state[program, cells] = np.broadcast_to(own, cells.shape)

    def _places(self, addresses, size):
        """Returns bytes ``[lanes, size]``, and the cells that they are in."""
        offset = addresses.astype(np.int64) - SHARED
        if (offset % size).any():
            raise EmulationError(f"a shared address is no multiple of {size}")
        if offset.size and (
            offset.min() < 0 or offset.max() > self.data.shape[1] - size
        ):
            raise EmulationError(
                f"bytes {offset.min()} to {offset.max() + size} of shared memory, "
                f"which has {self.data.shape[1]}"
            )
        places = offset[:, None] + np.arange(size)
        return places, places[:, ::2] // 2


def _by_others(state: np.ndarray, who: Lanes) -> np.ndarray:
    """Which cells another warp has written since the last barrier."""
    writer = (state & np.uint32(_WRITERS)) >> np.uint32(_WRITER)
    return (writer != 0) & (writer != who.warp[:, None] + 1)
