"""A matrix in `Tiles` as a kernel reads it: codes above an offset, or weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from qjax.formats import tiles
from qjax.pallas import lang, unpack
from qjax.pallas.affine import AffineMap
from qjax.pallas.operands import DTYPE, Steps
from qjax.tensor import Affine


class Place(NamedTuple):
    """Sixteen rows of each of some blocks: the same sub-block of all of them."""

    blocks: Any  # of the storage: a slice, or the indices of those of every slice of k
    width: int  # how many blocks, in a slice of k
    sub_block: int
    inside: Any = None  # which indices exist, where not all do

    @property
    def rows(self) -> tuple[Any, ...]:
        """Index into an array whose k is cut into (blocks, sub-blocks, 16)."""
        return self.blocks, pl.ds(self.sub_block, 1), slice(None)


def places(bits: int, block: Array, row: int, steps: Steps) -> list[Place]:
    """Returns the sub-blocks of a step.

    Args:
      bits: Width of a code.
      block: The block of the storage at which the iteration starts.
      row: Row of the iteration at which the step starts.
      steps: What a step is.
    """
    first, within = divmod(row, tiles.rows_of_block(bits))
    start = within // tiles.SIDE
    blocks = pl.ds(block + first, steps.blocks)
    sub_blocks = range(start, start + steps.sub_blocks)
    return [Place(blocks, steps.blocks, i) for i in sub_blocks]


class Columns:
    """Some columns of the weight.

    Attributes:
      width: How many.
      slice: Of the columns.
      inside: Which of them exist, or None where all do.
    """

    def __init__(
        self,
        language: lang.Lang,
        words_ref: Any,
        bits: int,
        affine: Affine,
        start: Array,
        width: int,
        table: Sequence[Array] | None = None,
        dtype: jnp.dtype = DTYPE,
        slices: int = 1,
    ):
        """Describes ``width`` columns from ``start``.

        Args:
          language: What the body is written in.
          words_ref: The storage.
          bits: Width of a code.
          affine: The map of the codes.
          start: The first column.
          width: How many, a power of two.
          table: Words of `lookup.words` where codes stand for its entries.
          dtype: Of the operands.
          slices: Runs of k that operands have side by side, slice after slice.
        """
        self._lang, self._words_ref, self._bits = language, words_ref, bits
        floats = affine is Affine.FLOAT
        self._recipes = unpack.recipes(bits, dtype, floats=floats)
        self._affine, self._table = affine, table
        self._slices, self._dtype = slices, dtype
        self._units = pl.ds(start // tiles.SIDE, width // tiles.SIDE)
        self.width, self.slice = width, pl.ds(start, width)
        self.inside = self._units_inside = None
        units = words_ref.shape[2]
        if units * tiles.SIDE % width:
            self.inside = start + jnp.arange(width) < units * tiles.SIDE
            unit = start // tiles.SIDE + jnp.arange(width // tiles.SIDE)
            self._units_inside = unit < units

    def offset(self, place: Place) -> float:
        """What the operand of a sub-block has beyond the codes, or their numbers."""
        return 0.0 if self._table is not None else self._recipes[place.sub_block].offset

    def operand(self, place: Place) -> Float[Array, "n k"]:
        """Reads a sub-block as ``q + offset``, ``[columns, blocks * 16]``."""
        if self._table is not None:
            return self.entry(place, self._table)
        planes, unit = [], 0
        for positions in tiles.POSITIONS[self._bits]:
            planes.append(self._slots(place, unit + place.sub_block // len(positions)))
            unit += tiles.sub_blocks(self._bits) // len(positions)
        return self._lang.unpack(self._recipes[place.sub_block], planes)

    def entry(self, place: Place, table: Sequence[Array]) -> Float[Array, "n k"]:
        """Reads a sub-block of codes in nibbles as entries of a table."""
        slots = self._slots(place, 0)
        return self._lang.look_up(slots, table, place.sub_block, self._dtype)

    def scaled(
        self,
        place: Place,
        zero: Sequence[Num[Array, " n"]],
        scale: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n k"]:
        """Reads a sub-block as weights, each rounded to float16.

        Args:
          place: The sub-block.
          zero: Of every column, or none.
          scale: float16, of every column. None leaves codes less their zeros, which are
            exact but for a float zero.
        """
        column = [z.astype(DTYPE)[:, None] for z in zero]
        before = self._affine is Affine.ZERO
        mapping = AffineMap(
            self.offset(place) + self._affine.centre(self._bits),
            zero=column[0] if column and before else None,
            scale=None if scale is None else scale[:, None],
            added=column[0] if column and not before else None,
            whole=all(jnp.issubdtype(z.dtype, jnp.integer) for z in zero),
        )
        return self._lang.affine(self.operand(place), mapping)

    def add_product(
        self,
        x_ref: Any,
        rows: Any,
        k: Array,
        sub_blocks: Sequence[Place],
        joined: int,
        acc: Float[Array, "n m"],
        read: Callable[[Place], Array] | None = None,
    ) -> Float[Array, "n m"]:
        """Adds the product of a step, offsets included, on tensor cores.

        Args:
          x_ref: Rows of x in the order of `operands.arrange`.
          rows: A slice of them.
          k: Where the step starts in that order.
          sub_blocks: Of the step.
          joined: Sub-blocks that one product takes.
          acc: float32 accumulator.
          read: Reads a sub-block; `operand` unless another is given.
        """
        read = read or self.operand
        for i in range(0, len(sub_blocks), joined):
            operand = join([read(p) for p in sub_blocks[i : i + joined]])
            xs = x_ref[rows, pl.ds(k, operand.shape[1])]
            acc += self._lang.dot(operand, xs.T)
            k += operand.shape[1]
        return acc

    def _slots(self, place: Place, unit: int) -> Array:
        """Units in the order of the A operand.

        The compiler merges the loads of sub-blocks that share a unit.
        """
        units, inside = self._units, self._units_inside
        if isinstance(place.blocks, pl.Slice):
            shape = (place.width, 1, units.size, tiles.SLOTS)
            if inside is not None:
                inside = jnp.broadcast_to(inside[:, None], shape)
            where = (place.blocks, pl.ds(unit, 1), units, slice(None))
            slots = lang.load(self._words_ref.at[where], inside)
        else:
            exists = place.inside
            unit_of_column = units.start + jnp.arange(units.size)
            slots = lang.gather(
                self._words_ref,
                place.blocks[:, None, None],
                jnp.full((1, 1, 1), unit),
                unit_of_column[None, :, None],
                jnp.arange(tiles.SLOTS)[None, None],
                mask=lang.both(
                    None if exists is None else exists[:, None, None],
                    None if inside is None else inside[None, :, None],
                ),
            )
        # slice, block, column unit, n2 n1 n0, k2 k1, k3, n3, k0
        axes = slots.reshape(self._slices, place.width, -1, 8, 4, 2, 2, 2)
        ordered = axes.transpose(0, 2, 6, 3, 1, 5, 4, 7)
        return ordered.reshape(self._slices * self.width, -1)


def join(parts: Sequence[Array]) -> Array:
    """Puts a power of two of operands side by side along k."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [
            jnp.stack(pair, -1).transpose(0, 2, 1).reshape(len(pair[0]), -1)
            for pair in pairs
        ]
    return parts[0]
