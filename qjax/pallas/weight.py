"""A matrix in `Tiles` as a kernel's body reads it: sub-blocks of ``q + offset``."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang, unpack
from qjax.pallas.operands import DTYPE, Steps


class Columns:
    """The columns of the weight that a program owns.

    Attributes:
      slice: Of the columns.
      inside: Which of them exist, or None where all do.
    """

    def __init__(
        self, language: lang.Lang, words_ref: Any, bits: int, start: Array, width: int
    ):
        self._lang, self._words_ref, self._bits = language, words_ref, bits
        self._recipes = unpack.recipes(bits, DTYPE)
        self._units = pl.ds(start // tiles.SIDE, width // tiles.SIDE)
        self._width = width
        self.slice = pl.ds(start, width)
        units = words_ref.shape[2]
        self.inside = self._units_inside = None
        if units * tiles.SIDE % width:
            self.inside = start + jnp.arange(width) < units * tiles.SIDE
            unit = start // tiles.SIDE + jnp.arange(width // tiles.SIDE)
            self._units_inside = (unit < units)[None, None, :, None]

    def step(self, block: Array, row: int, steps: Steps) -> list[Float[Array, "n k"]]:
        """Reads one step.

        Args:
          block: The block of the storage at which the iteration starts.
          row: Row of the iteration at which the step starts.
          steps: What a step is.

        Returns:
          The operand of every product of the step, ``[columns, rows]``.
        """
        first, within = divmod(row, tiles.rows_of_block(self._bits))
        start = within // tiles.SIDE
        fields = [
            self._sub_block(block + first, steps.blocks, index)
            for index in range(start, start + steps.sub_blocks)
        ]
        return [
            _join(fields[i : i + steps.joined])
            for i in range(0, len(fields), steps.joined)
        ]

    def _sub_block(self, block: Array, count: int, index: int) -> Array:
        """A sub-block of ``count`` blocks, side by side."""
        planes, unit = [], 0
        for positions in tiles.POSITIONS[self._bits]:
            planes.append(self._slots(block, count, unit + index // len(positions)))
            unit += tiles.sub_blocks(self._bits) // len(positions)
        return self._lang.unpack(self._recipes[index], planes)

    def _slots(self, block: Array, count: int, unit: int) -> Array:
        """Units ``[columns, 16 * count]`` in the order of the A operand.

        The compiler merges the loads of sub-blocks that share a unit.
        """
        where = (pl.ds(block, count), pl.ds(unit, 1), self._units, slice(None))
        inside = self._units_inside
        if inside is not None:
            inside = jnp.broadcast_to(
                inside, (count, 1, self._units.size, tiles.SLOTS)
            )
        slots = lang.load(self._words_ref.at[where], inside)
        # block, column unit, n2 n1 n0, k2 k1, k3, n3, k0
        axes = slots.reshape(count, -1, 8, 4, 2, 2, 2)
        return axes.transpose(1, 5, 2, 0, 4, 3, 6).reshape(self._width, -1)


def _join(parts: Sequence[Array]) -> Array:
    """Puts a power of two of operands side by side along k."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [
            jnp.stack(pair, -1).transpose(0, 2, 1).reshape(len(pair[0]), -1)
            for pair in pairs
        ]
    return parts[0]
