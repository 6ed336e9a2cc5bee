"""What accesses to memory cost, counted: sectors, and passes over the banks.

Device memory is read in sectors of 32 bytes, of which a warp may want all or one. A
shared memory of 32 banks gives a warp one word of each bank at a time: what else lies
in the same bank has to wait. Accesses of 8 and 16 bytes a thread are made by halves and
quarters of a warp.
"""

import collections
import dataclasses

import numpy as np

from tests.gpu.emulator.memory import Lanes, place_of

SECTOR, BANKS, WORD = 32, 32, 4
# Of a program, at most; and bits of an offset within an array.
_WARPS, _OFFSET = 32, 40


@dataclasses.dataclass
class Count:
    """Sectors, or passes: those that were needed, and the fewest for as many bytes."""

    taken: int = 0
    least: int = 0

    def __add__(self, other: "Count") -> "Count":
        """Returns both together."""
        return Count(self.taken + other.taken, self.least + other.least)


class Traffic:
    """The accesses of a launch.

    Attributes:
      device: Sectors that were loaded, by the number of the parameter.
      shared: Passes, by opcode.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self.device: dict[int, Count] = collections.defaultdict(Count)
        self.shared: dict[str, Count] = collections.defaultdict(Count)

    def load(self, who: Lanes, addresses: np.ndarray, size: int) -> None:
        """Counts a load from device memory, of each thread ``size`` bytes."""
        warp = who.program * _WARPS + who.warp
        number, offset = place_of(addresses)
        for parameter in np.unique(number).tolist():
            here = number == parameter
            # What threads of a warp want alike is loaded once.
            accesses = np.unique(warp[here] << _OFFSET | offset[here] // size)
            _, wanted = np.unique(accesses >> _OFFSET, return_counts=True)
            least = np.ceil(wanted * size / SECTOR).sum()
            sectors = np.unique(accesses // (SECTOR // size))
            self.device[parameter] += Count(len(sectors), int(least))

    def share(self, opcode: str, who: Lanes, addresses: np.ndarray, size: int) -> None:
        """Counts an access to shared memory, likewise; lanes in their order."""
        if not len(addresses):
            return
        at_once = max(1, size // WORD)  # words of a thread
        warp = who.program * _WARPS + who.warp
        rank = np.arange(len(warp)) - np.searchsorted(warp, warp)
        phase = warp * at_once + rank * at_once // BANKS
        word = addresses.astype(np.int64)[:, None] // WORD + np.arange(at_once)
        words = np.unique(phase[:, None] << _OFFSET | word)
        banks, each = np.unique(
            (words >> _OFFSET) * BANKS + words % BANKS, return_counts=True
        )
        phases = banks // BANKS
        first = np.flatnonzero(np.diff(phases, prepend=-1))
        least = np.ceil(np.add.reduceat(each, first) / BANKS).sum()
        self.shared[opcode] += Count(
            int(np.maximum.reduceat(each, first).sum()), int(least)
        )
