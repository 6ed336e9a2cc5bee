"""``x @ W`` of few rows in one launch.

For one row of ``x``, `qjax.pallas.matmul` is three launches: one prepares the row, one
multiplies it, a piece of k for each program, and one adds the pieces. The small ones
take about as long as the product. Here a program adds up its own pieces of k. Tensor
cores multiply 16 columns of the weight by eight rows of ``x`` or more: where there is
but one row, seven are free. So k is cut into *slices*, and each has rows of its own in
both operands,

    A  [slices * columns, k / slices]     and     B  [rows * slices, k / slices],

of whose product the blocks of a slice with itself are summed, at the end. The others
mean nothing; computing them takes no time, while tensor cores wait for the memory.

``x`` is taken as it is, in arithmetic of its own dtype, so that no row has to be looked
at first. What the offsets of the codes add to the products is taken off by tensor cores
too: they multiply ``x`` by rows of constants.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, DTypeLike, Float

from qjax.formats import tiles
from qjax.pallas import lang, scales, scaling, segments
from qjax.pallas.operands import (
    Config,
    books,
    joined_words,
    parameters,
    read_book,
    split_padded,
)
from qjax.pallas.segments import Bounds, Run, Walk
from qjax.pallas.weight import Columns, Place, join
from qjax.tensor import Affine, QTensor

# Of the rows, in the arithmetic of which they are multiplied.
DTYPES = (jnp.float16, jnp.bfloat16)


class Operands(NamedTuple):
    """What a launch takes: arrays, or references to them.

    Attributes:
      x: Rows, padded as the segments are.
      places: Of the segments.
      books: Codebooks, if there are any.
      words: Of every segment.
      parameters: Scale, and zero if there is one.
      whole: What scales are multiplied by in the end, `scales.of_whole`.
    """

    x: Any
    places: Any
    books: Any
    words: list[Any]
    parameters: list[Any]
    whole: Any


def matvec(
    x: Float[Array, "m k"],
    w: QTensor,
    config: Config,
    *,
    index: Array | None = None,
    dtype: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Multiplies few rows by a matrix in `Tiles`, uniform or mixed.

    Args:
      x: bfloat16 or float16, k as ``w.k``. Nothing is rounded but the entries of a
        codebook, to the dtype of x. Where elements exceed 2**100, sums of codes with
        their offsets may overflow: NaN.
      w: As `qjax.pallas.matmul.matmul` takes it.
      config: How to cut the launch up. A program owns ``block_m / slices`` rows and
        ``block_n / slices`` columns of the product.
      index: Which matrix of ``w``, where that is a stack ``[count, k, n]``: one for all
        rows, or one for every ``block_m / slices`` of them, where -1 gives zeros.
      dtype: Of the result.
      interpret: Whether to run as jnp, on any device.

    Returns:
      Product, summed in float32 and rounded once.

    Raises:
      NotImplementedError: If the kernel declines the operands, with the reason.
    """
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"matvec takes 16-bit rows, not x.dtype={x.dtype}.")
    whole, w = scales.whole_of(w)
    walk = Walk.of(w, config, index)
    m, columns = len(x), config.block_n // config.slices
    widths = "_".join(str(run.bits) for run in walk.runs)
    partial = lang.launch(
        functools.partial(_body, walk, w.affine, config),
        Operands(
            x=jnp.concatenate(split_padded(x, w), axis=1),
            places=walk.places(index),
            books=books(w),
            words=joined_words(w),
            parameters=parameters(w),
            whole=scales.of_whole(whole),
        ),
        name=f"matvec_{widths}bit_{config.slices}",
        grid=(
            -(-m * config.slices // config.block_m),
            -(-w.n // columns),
            config.splits,
        ),
        out=jax.ShapeDtypeStruct(
            (config.splits, m, w.n), dtype if config.splits == 1 else jnp.float32
        ),
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return partial[0] if config.splits == 1 else partial.sum(0).astype(dtype)


def _body(
    walk: Walk,
    affine: Affine,
    config: Config,
    language: lang.Lang,
    refs: Operands,
    out_ref: Any,
) -> None:
    _, m, n = out_ref.shape
    slices, split = config.slices, pl.program_id(2)
    height, width = config.block_m // slices, config.block_n // slices
    rows, start = pl.program_id(0) * height, pl.program_id(1) * width
    program = _Program(
        language,
        affine,
        refs,
        slices,
        first=split * slices,
        pieces=config.splits * slices,
        row=rows + jnp.arange(config.block_m) // slices,
        exists=None if m % height == 0 else m,
    )
    dtype = refs.x.dtype
    matrix, bits = walk.matrix(refs.places, pl.program_id(0)), walk.runs[0].bits
    book = read_book(refs.books, matrix, affine, bits, dtype)
    acc = jnp.zeros((config.block_n, config.block_m), jnp.float32)
    bounds = walk.read(refs.places, pl.program_id(0))
    for run, bound, words in zip(walk.runs, bounds, refs.words, strict=True):
        columns = Columns(
            language, words, run.bits, affine, start, width, book.words, dtype, slices
        )
        acc = _Segment(program, run, bound, columns).add_to(acc)
    if book.undo is not None:
        acc *= book.undo
    acc = scales.finish(acc, refs.whole, matrix)
    inside = None
    if m % height or n % width:
        row, column = rows + jnp.arange(height), start + jnp.arange(width)
        inside = (row < m)[:, None] & (column < n)[None]
    where = out_ref.at[split, pl.ds(rows, height), pl.ds(start, width)]
    y = _sum_of_slices(acc, slices).T
    lang.store(where, y.astype(out_ref.dtype), inside)


def _sum_of_slices(acc: Float[Array, "a b"], slices: int) -> Float[Array, "n m"]:
    """Sums the blocks of the product that have the same slice on both sides."""
    a, b = acc.shape
    of_a, of_b = jnp.arange(a) // (a // slices), jnp.arange(b) % slices
    kept = jnp.where(of_a[:, None] == of_b[None], acc, 0)
    of_rows = kept.reshape(a, b // slices, slices).sum(2)
    return of_rows.reshape(slices, a // slices, -1).sum(0)


class _Program(NamedTuple):
    """What all segments share in one program.

    Attributes:
      language: What the body is written in.
      affine: The map of the codes.
      refs: The operands.
      slices: How many a program has.
      first: The first of them, among those of all programs.
      pieces: How many there are in all.
      row: Of x, for every row of the second operand.
      exists: How many rows x has, where there may be fewer.
    """

    language: lang.Lang
    affine: Affine
    refs: Operands
    slices: int
    first: Any
    pieces: int
    row: Array
    exists: int | None


class _Segment(NamedTuple):
    """A segment as a program walks along it, all slices side by side.

    Slices take iterations one after another, all as many but for the last ones.
    """

    program: _Program
    run: Run
    bounds: Bounds
    columns: Columns

    def add_to(self, acc: Float[Array, "a b"]) -> Float[Array, "a b"]:
        """Adds the product of the segment."""

        def add(acc: Array, i: Array, rows: range, loaded: list[list[Array]]) -> Array:
            for row, scale_and_zero in zip(rows, loaded, strict=True):
                acc = self._add_step(acc, i, row, scale_and_zero)
            return acc

        parts = [range(0, self.run.block_k, self.run.steps.rows)]
        loads = [segments.Load(self._load_parameters, ahead=1)]
        return segments.iterate(0, self._count, parts, loads, add, acc)

    @property
    def _count(self) -> Any:
        """Iterations of a slice."""
        return -(-self.bounds.iterations // self.program.pieces)

    @property
    def _even(self) -> bool:
        """Whether the last slices have as many as the others."""
        iterations = self.bounds.iterations
        return isinstance(iterations, int) and iterations % self.program.pieces == 0

    def _iteration(self, slices: Array, i: Any) -> tuple[Array, Array | None]:
        """The ``i``-th iteration of slices of this program, and whether it exists."""
        iteration = (self.program.first + slices) * self._count + i
        return iteration, None if self._even else iteration < self.bounds.iterations

    def _load_parameters(self, i: Any, rows: range) -> list[list[Array]]:
        """Loads scale and zero of steps of the ``i``-th iterations."""
        iteration, inside = self._iteration(jnp.arange(self.program.slices), i)
        of_columns = self.columns.inside
        inside = lang.both(
            None if inside is None else inside[:, None],
            None if of_columns is None else of_columns[None],
        )
        column = self.columns.slice.start + jnp.arange(self.columns.width)
        loaded = []
        for row in rows:
            group = (iteration * self.run.block_k + row) // self.run.group
            # Past the last group there is only padding, where x is zero.
            group = jnp.minimum(self.bounds.group + group, self.bounds.last_group)
            each = [
                scales.elements(ref, group[:, None], column[None], inside).reshape(-1)
                for ref in self.program.refs.parameters
            ]
            loaded.append(each)
        return loaded

    def _add_step(
        self, acc: Float[Array, "a b"], i: Array, row: int, scale_and_zero: list[Array]
    ) -> Float[Array, "a b"]:
        steps = self.run.steps
        sub_block = row % tiles.rows_of_block(self.run.bits) // tiles.SIDE
        end = sub_block + steps.sub_blocks
        products = [
            range(first, first + steps.joined)
            for first in range(sub_block, end, steps.joined)
        ]
        xs = [self._load_x(i, row, product) for product in products]
        blocks, inside = self._blocks(
            jnp.arange(self.program.slices * steps.blocks) // steps.blocks, i, row
        )
        blocks += self.bounds.block + jnp.arange(len(blocks)) % steps.blocks
        place = functools.partial(Place, blocks, steps.blocks, inside=inside)

        def product(acc: Array) -> Array:
            for sub_blocks, x in zip(products, xs, strict=True):
                operand = join([self.columns.operand(place(i)) for i in sub_blocks])
                acc += self.program.language.dot(operand, x.T)
            return acc

        sums = []
        # No offset stands beside codes that are no counts.
        if self.program.affine.counts:
            offsets = [[self.columns.offset(place(i)) for i in p] for p in products]
            sums = self._sums(offsets, xs, len(acc))
        return scaling.add_step(
            self.program.language,
            self.program.affine,
            acc,
            product,
            sums,
            scale_and_zero,
        )

    def _blocks(self, slices: Array, i: Array, row: int) -> tuple[Array, Array | None]:
        """First blocks of a step of slices in their segment, and whether they exist."""
        rows = tiles.rows_of_block(self.run.bits)
        iteration, inside = self._iteration(slices, i)
        return iteration * (self.run.block_k // rows) + row // rows, inside

    def _load_x(
        self, i: Array, row: int, sub_blocks: Sequence[int]
    ) -> Float[Array, "b k"]:
        """Loads what a product takes of x: sub-block, block, row of it."""
        program, blocks = self.program, self.run.steps.blocks
        block, inside = self._blocks(
            jnp.arange(len(program.row)) % program.slices, i, row
        )
        if program.exists is not None:
            inside = lang.both(program.row < program.exists, inside)
        k = jnp.arange(len(sub_blocks) * blocks * tiles.SIDE)[None]
        sixteen = lax.div(k, tiles.SIDE)
        block = block[:, None] + lax.rem(sixteen, blocks)
        sub_block = sub_blocks[0] + lax.div(sixteen, blocks)
        first = self.bounds.row + tiles.rows_of_block(self.run.bits) * block
        return lang.gather(
            program.refs.x,
            program.row[:, None],
            first + tiles.SIDE * sub_block + lax.rem(k, tiles.SIDE),
            mask=None if inside is None else inside[:, None],
        )

    def _sums(
        self, offsets: Sequence[Sequence[float]], xs: Sequence[Array], width: int
    ) -> list[Float[Array, "a b"]]:
        """What a step takes off, as `operands.start` says, for every column alike."""
        # All rows of these products are equal, and each lane of a tensor core's result
        # holds those of its own columns of B: nothing moves between lanes.
        dtype, centre = xs[0].dtype, self.program.affine.centre(self.run.bits)
        totals = [jnp.zeros((tiles.SIDE, len(xs[0])), jnp.float32)]
        totals *= len(self.program.refs.parameters)
        for taken, x in zip(offsets, xs, strict=True):
            at = jnp.arange(x.shape[1]) // (x.shape[1] // len(taken))
            start = jnp.zeros(at.shape, jnp.float32)
            for j, offset in enumerate(taken):
                start = jnp.where(at == j, -(offset + centre), start)
            minus_one = jnp.full(at.shape, -1.0)
            for t, constant in enumerate((start, minus_one)[: len(totals)]):
                rows = jnp.broadcast_to(constant.astype(dtype), (tiles.SIDE, len(at)))
                totals[t] += self.program.language.dot(rows, x.T)
        shape = (width // tiles.SIDE, *totals[0].shape)
        return [jnp.broadcast_to(t, shape).reshape(width, -1) for t in totals]
