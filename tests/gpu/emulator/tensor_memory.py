"""Tensor memory: every access is checked, and every race is found.

128 lanes of 512 columns of 32 bits, some of which a program allocates. A warp reaches a
quarter of the lanes, and its loads and stores are on their way until it waits for them.
Products of the tensor cores read and write all lanes, until an mbarrier tells of their
end.

`tcgen05.fence`, which the PTX ISA wants between a barrier and what another thread does
here, is not asked for: the compiler writes none, and ptxas makes no instruction of it.
"""

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

LANES, COLUMNS = 128, 512
# Those of a quarter.
QUARTER = 32
# What is remembered of every word beside who has touched it: whether it was written,
# and whether a load or a store of it is on its way.
_WRITTEN, _LOADING, _STORING = 1 << 29, 1 << 30, 1 << 31


class TensorMemory:
    """What some programs have allocated.

    Attributes:
      start: The first column.
    """

    def __init__(
        self,
        data: np.ndarray,
        state: np.ndarray,
        products: tuple[np.ndarray, np.ndarray],
        shapes: dict[int, int],
        progress: Progress,
    ):
        """Takes what is remembered of it.

        Args:
          data: Words, ``[programs, lanes, columns]``.
          state: Of each.
          products: The numbers of the last that read each, and that write it.
          shapes: What the last product into an address was like.
          progress: Of products.
        """
        self._data, self._state, self._shapes = data, state, shapes
        self._reading, self._writing = products
        self.progress = progress
        # Not the first columns: what does without the address is found.
        self.start = COLUMNS - data.shape[2]

    @classmethod
    def of(cls, programs: int, columns: int, progress: Progress) -> "TensorMemory":
        """Allocates for each program."""
        if columns not in (32, 64, 128, 256, 512):
            raise EmulationError(f"{columns} columns of tensor memory")
        shape = programs, LANES, columns
        return cls(
            np.full(shape, GARBAGE * 0x01010101, np.uint32),
            np.zeros(shape, np.uint32),
            (np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)),
            {},
            progress,
        )

    def take(self, programs: np.ndarray, progress: Progress) -> "TensorMemory":
        """Returns that of some of the programs."""
        return TensorMemory(
            self._data[programs],
            self._state[programs],
            (self._reading[programs], self._writing[programs]),
            dict(self._shapes),
            progress,
        )

    def free(self, who: Lanes, start: int, columns: int) -> None:
        """Gives all of it back, on behalf of a warp of each program."""
        if (start, columns) != (self.start, self._data.shape[2]):
            raise EmulationError("other tensor memory is freed than was allocated")
        all_of_it = np.indices((LANES, columns)).reshape(2, 1, -1)
        lanes, at = np.broadcast_to(all_of_it, (2, len(who.warp), LANES * columns))
        self._check_free(who, (who.program[:, None], lanes, at))

    def barrier(self) -> None:
        """All warps have come here: what was written may be read, and so on."""
        self._state &= np.uint32(_WRITTEN | _LOADING | _STORING)

    def loaded(self) -> None:
        """All warps have what they load."""
        self._state &= np.uint32(~_LOADING & 0xFFFFFFFF)

    def stored(self) -> None:
        """What all warps store has come here."""
        self._state &= np.uint32(~_STORING & 0xFFFFFFFF)

    def load(self, who: Lanes, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Reads words ``[warps, n]`` of a quarter that each warp reaches."""
        cells = self._of_quarter(who, lanes, columns)
        self._check_written(who, cells)
        self._check_complete(who, cells)
        mark_readers(self._state, who, cells)
        self._state[cells] |= np.uint32(_LOADING)
        return self._data[cells]

    def store(
        self, who: Lanes, lanes: np.ndarray, columns: np.ndarray, values: np.ndarray
    ) -> None:
        """Writes words ``[warps, n]`` likewise."""
        cells = self._of_quarter(who, lanes, columns)
        self._check_free(who, cells)
        self._data[cells] = values
        state = written_by(who) | np.uint32(_WRITTEN | _STORING)
        self._state[cells] = np.broadcast_to(state, values.shape)

    def operand(self, who: Lanes, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Reads words ``[programs, n]`` for a product, which it is that a warp begins.

        Until the warp knows the end of the product, they must stay.
        """
        cells = self._cells(who, lanes, columns)
        self._check_written(who, cells)
        self._check_complete(who, cells)
        self._reading[cells] = self.progress.begun
        return self._data[cells]

    def accumulate(
        self,
        who: Lanes,
        lanes: np.ndarray,
        columns: np.ndarray,
        product: np.ndarray,
        keep: np.ndarray,
        shape: int,
    ) -> None:
        """Writes the result of a product that a warp begins.

        Args:
          who: The warp of each program.
          lanes: Of the result, ``[programs, n]``.
          columns: Likewise.
          product: The result, of float32.
          keep: For which programs it is added to what is there.
          shape: What it is like; one product waits for another that is like it.
        """
        cells = self._cells(who, lanes, columns)
        first = int(lanes[0, 0] << 16 | columns[0, 0])
        under_way = self.progress.under_way(self._writing[cells], who)
        like = under_way.all() and self._shapes.get(first) == shape
        if not like:
            self._check_complete(who, cells)
        self._check_free(who, cells, ordered=True)
        adding = tuple(index[keep] for index in np.broadcast_arrays(*cells))
        self._check_written(Lanes(who.program[keep], who.warp[keep]), adding)
        product = product.copy()
        product[keep] += self._data[adding].view(np.float32)
        self._data[cells] = product.view(np.uint32)
        self._state[cells] = _WRITTEN
        self._writing[cells] = self.progress.begun
        self._shapes[first] = shape

    def _of_quarter(self, who, lanes, columns):
        if (lanes // QUARTER != who.warp[:, None] % (LANES // QUARTER)).any():
            raise EmulationError("a warp reaches for lanes of another quarter")
        return self._cells(who, lanes, columns)

    def _cells(self, who, lanes, columns):
        """Returns indices ``[rows, n]``."""
        at = columns - self.start
        if at.size and (at.min() < 0 or at.max() >= self._data.shape[2]):
            raise EmulationError(
                f"columns {columns.min()} to {columns.max()} of tensor memory, of "
                f"which {self.start} to {COLUMNS - 1} are allocated"
            )
        return who.program[:, None], lanes, at

    def _check_written(self, who, cells):
        state = self._state[cells]
        if not (state & np.uint32(_WRITTEN)).all():
            raise EmulationError("tensor memory is read before it is written")
        if (state & np.uint32(_STORING)).any():
            raise EmulationError(
                "tensor memory is read that a store is still on its way to"
            )
        if by_others(state, who).any():
            raise EmulationError(
                "tensor memory is read, without a barrier after its writing"
            )

    def _check_complete(self, who, cells):
        if self.progress.under_way(self._writing[cells], who).any():
            raise EmulationError(
                "tensor memory is touched that a product under way writes"
            )

    def _check_free(self, who, cells, *, ordered=False):
        """Checks that words may be overwritten, by ``ordered`` after other products."""
        state = self._state[cells]
        if not ordered:
            self._check_complete(who, cells)
        if (state & np.uint32(_STORING | _LOADING)).any():
            raise EmulationError(
                "tensor memory is overwritten that a load or a store is still on its "
                "way from or to"
            )
        if by_other_readers(state, who).any():
            raise EmulationError(
                "tensor memory is overwritten, with no barrier after a reading"
            )
        if by_others(state, who).any():
            raise EmulationError(
                "tensor memory is written by two warps without a barrier"
            )
        if self.progress.under_way(self._reading[cells], who).any():
            raise EmulationError(
                "tensor memory is overwritten that a product under way reads"
            )
