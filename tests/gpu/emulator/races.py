"""Who has touched a memory of a program, and who knows: what makes a race.

A memory remembers, until the next barrier, which warp has written and which have read:
what another warp then reads or overwrites is a race, though the emulator itself runs
all threads in step. What tensor cores do by themselves is under way until a warp knows
better.
"""

from collections.abc import Sequence

import numpy as np

from tests.gpu.emulator.memory import Lanes
from tests.gpu.emulator.parser import EmulationError

# What is remembered of every two bytes of shared memory, and of a word of tensor
# memory: a bit for each warp that has read it since the last barrier, and the warp that
# has written it, plus one.
_READERS = (1 << 17) - 1
_WRITER = 17
_WRITERS = 0x3F << _WRITER


def by_others(state: np.ndarray, who: Lanes) -> np.ndarray:
    """Which cells another warp has written since the last barrier."""
    writer = (state & np.uint32(_WRITERS)) >> np.uint32(_WRITER)
    return (writer != 0) & (writer != who.warp[:, None] + 1)


def by_other_readers(state: np.ndarray, who: Lanes) -> np.ndarray:
    """Which cells another warp has read since the last barrier."""
    own = (1 << who.warp[:, None]).astype(np.uint32)
    return state & np.uint32(_READERS) & ~own != 0


def mark_readers(state: np.ndarray, who: Lanes, cells: Sequence[np.ndarray]) -> None:
    """Remembers which warps have read cells, whose indices have a row for each lane."""
    for warp in np.unique(who.warp).tolist():
        of_warp = who.warp == warp
        state[tuple(index[of_warp] for index in cells)] |= np.uint32(1 << warp)


def written_by(who: Lanes) -> np.ndarray:
    """What is remembered of cells that warps have written."""
    return (who.warp[:, None] + 1).astype(np.uint32) << np.uint32(_WRITER)


class Progress:
    """How far tensor cores have come with products that go on by themselves.

    Those between two commits share a number: 1, 2, and so on.

    Attributes:
      begun: The number of products that are begun now.
      thread: Which of a program has begun them; None as long as there are none.
      known: Up to which number a warp knows them to be complete, ``[programs, warps]``.
    """

    def __init__(self, known: np.ndarray, begun: int = 1, thread: int | None = None):
        """Begins with none."""
        self.known, self.begun, self.thread = known, begun, thread

    def take(self, programs: np.ndarray) -> "Progress":
        """Returns that of some of the programs."""
        return Progress(self.known[programs], self.begun, self.thread)

    def begin(self, thread: int) -> None:
        """Begins a product."""
        self._check(thread)
        self.thread = thread

    def commit(self, thread: int) -> int:
        """Returns the number of the products whose end is to be told of."""
        self._check(thread)
        self.begun, self.thread = self.begun + 1, None
        return self.begun - 1

    def _check(self, thread: int) -> None:
        # A commit tells of the products of its own thread.
        if self.thread not in (None, thread):
            raise EmulationError("products of another thread are not committed")

    def under_way(self, products: np.ndarray, who: Lanes) -> np.ndarray:
        """Which of ``products[lanes, n]``, by number, may go on as far as one knows."""
        return products > self.known[who.program, who.warp][:, None]

    def learn(self, who: Lanes, products: np.ndarray) -> None:
        """Lets warps know that ``products[lanes]`` are complete."""
        np.maximum.at(self.known, (who.program, who.warp), products)

    def barrier(self) -> None:
        """What one warp knows all of them know."""
        self.known[:] = self.known.max(axis=1, keepdims=True)
