"""Shared memory: every access is checked, and every race is found."""

import dataclasses
import math

import numpy as np

from tests.gpu.emulator.memory import GARBAGE, Lanes
from tests.gpu.emulator.parser import EmulationError
from tests.gpu.emulator.races import (
    Progress,
    by_other_readers,
    by_others,
    mark_readers,
    written_by,
)

# Where shared memory starts; swizzles count from a multiple of 1024.
SHARED = 1024
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# What is remembered of every two bytes beside who has touched them: whether the tensor
# cores' own path to them does not see yet what was written, and whether a copy is under
# way.
_UNFENCED, _UNDER_WAY = 1 << 30, 1 << 31
# In the place of a warp: the tensor cores.
_TENSOR_CORES = 16


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


class SharedMemory:
    """The shared memory of some programs.

    Attributes:
      data: Bytes, ``[programs, size]``.
      progress: Of products that read it.
    """

    def __init__(
        self,
        data: np.ndarray,
        state: np.ndarray,
        products: np.ndarray,
        progress: Progress,
    ):
        """Takes what is remembered of it; products that read it, by number."""
        self.data, self._state, self._products = data, state, products
        self.progress = progress

    @classmethod
    def of(cls, programs: int, warps: int, size: int) -> "SharedMemory":
        """Returns ``size`` bytes for each program, full of garbage."""
        size = -(-size // 16) * 16
        return cls(
            np.full((programs, size), GARBAGE, np.uint8),
            np.zeros((programs, size // 2), np.uint32),
            np.zeros((programs, size // 2), np.uint16),
            Progress(np.zeros((programs, warps), np.uint16)),
        )

    def take(self, programs: np.ndarray) -> "SharedMemory":
        """Returns that of some of the programs."""
        return SharedMemory(
            self.data[programs],
            self._state[programs],
            self._products[programs],
            self.progress.take(programs),
        )

    def barrier(self) -> None:
        """All warps have come here: what was written may be read, and so on."""
        self._state &= np.uint32(_UNFENCED | _UNDER_WAY)
        self.progress.barrier()

    def fence(self) -> None:
        """What was written is seen by the tensor cores' own path."""
        self._state &= np.uint32(~_UNFENCED & 0xFFFFFFFF)

    def load(self, who: Lanes, addresses: np.ndarray, size: int) -> np.ndarray:
        """Reads ``size`` bytes at each address: ``[lanes, size]``."""
        places, cells = self._places(addresses, size)
        self._check_written(who, cells)
        mark_readers(self._state, who, (who.program[:, None], cells))
        return self._gathered(who, places)

    def load_async(
        self, program: np.ndarray, addresses: np.ndarray, product: int = 0
    ) -> np.ndarray:
        """Reads 16 bytes at each address on behalf of the tensor cores.

        Args:
          program: Whose memory, for each address.
          addresses: Of the bytes.
          product: The number of a product that reads them until its end is known; 0
            for one that reads them now.
        """
        who = Lanes(program, np.full(len(program), _TENSOR_CORES))
        places, cells = self._places(addresses, 16)
        state = self._check_written(who, cells)
        if (state & np.uint32(_UNFENCED)).any():
            raise EmulationError(
                "tensor cores read what was written without a proxy fence after it"
            )
        if product:
            self._products[program[:, None], cells] = product
        else:
            mark_readers(self._state, who, (who.program[:, None], cells))
        return self._gathered(who, places)

    def store(self, who: Lanes, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes ``values[lanes, size]``; two of one place must be the same."""
        places, cells = self._places(addresses, values.shape[1])
        program = who.program[:, None]
        state = self._check_free(who, cells)
        if (state & _UNDER_WAY).any():
            raise EmulationError(
                "shared memory is written that a copy is still on its way to"
            )
        others = by_others(state, who)
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
        if (state & _UNDER_WAY).any() or by_others(state, copy.who).any():
            raise EmulationError(
                "a copy is begun to where another write may be under way"
            )
        self._state[copy.who.program[:, None], cells] |= np.uint32(_UNDER_WAY)

    def end(self, copy: Copy) -> None:
        """Ends a copy."""
        places, cells = self._places(copy.addresses, copy.values.shape[1])
        self._write(copy.who, places, cells, copy.values)

    def touch(self, who: Lanes, addresses: np.ndarray, size: int) -> None:
        """Checks that ``size`` bytes at each address may be overwritten."""
        self._check_free(who, self._places(addresses, size)[1])

    def replace(
        self, program: np.ndarray, addresses: np.ndarray, values: np.ndarray
    ) -> None:
        """Writes ``values[addresses, size]`` on behalf of no thread: an mbarrier."""
        places, _ = self._places(addresses, values.shape[1])
        self.data[program[:, None], places] = values

    def _check_written(self, who, cells):
        state = self._state[who.program[:, None], cells]
        if (state & _UNDER_WAY).any():
            raise EmulationError(
                "shared memory is read that a copy is still on its way to"
            )
        if by_others(state, who).any():
            raise EmulationError(
                "shared memory is read, without a barrier after its writing"
            )
        return state

    def _check_free(self, who, cells):
        state = self._state[who.program[:, None], cells]
        if by_other_readers(state, who).any():
            raise EmulationError(
                "shared memory is overwritten, with no barrier after a reading"
            )
        products = self._products[who.program[:, None], cells]
        if self.progress.under_way(products, who).any():
            raise EmulationError(
                "shared memory is overwritten that a product under way reads"
            )
        return state

    def _gathered(self, who, places):
        unit = math.gcd(places.shape[1], 4)
        units = places[:, ::unit] // unit
        words = self.data.view(_UINTS[unit])[who.program[:, None], units]
        return words.view(np.uint8)

    def _write(self, who, places, cells, values):
        program = who.program[:, None]
        self.data[program, places] = values
        if (self.data[program, places] != values).any():
            raise EmulationError(
                "different values are stored in one place of shared memory"
            )
        own = written_by(who) | np.uint32(_UNFENCED)
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
