"""``x @ W`` on tensor cores, the weight unpacked in registers.

The weight is the A operand and ``x`` the B operand (``W.T @ x.T``), because `Tiles`
stores what a lane feeds to the tensor core as A. A program owns ``block_n`` columns of
the output, ``block_m`` rows and a run of k (split-K, summed afterwards in a fixed
order). With few rows it scales products, with many the weights before them
(`qjax.pallas.scaling`).

The segments of a mixed matrix are loops one after another in the same launch
(`qjax.pallas.segments`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang, rows, scales, scaling, segments
from qjax.pallas.operands import (
    DTYPE,
    EXACT_ROWS,
    Config,
    arrange,
    books,
    fit,
    joined_words,
    parameters,
    read_book,
    split_padded,
    start,
)
from qjax.pallas.rows import Rows
from qjax.pallas.segments import Bounds, Run, Walk
from qjax.pallas.weight import Columns, places
from qjax.tensor import Affine, QTensor

# Steps of an iteration whose scales a thread can hold at once.
_STEPS = 8


class Operands(NamedTuple):
    """What a launch takes: arrays, or references to them.

    Attributes:
      x: Rows in the order of `operands.arrange`.
      start: What the accumulators start at; None with codes that are no counts, or
        scaled weights.
      places: Of the segments.
      books: Codebooks, if there are any.
      words: Of every segment.
      parameters: Scale, and zero if there is one.
      whole: What scales are multiplied by in the end, `scales.of_whole`.
    """

    x: Any
    start: Any
    places: Any
    books: Any
    words: list[Any]
    parameters: list[Any]
    whole: Any


def matmul(
    x: Float[Array, "m k"],
    w: QTensor,
    config: Config,
    *,
    dtype: jnp.dtype = DTYPE,
    index: Array | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Multiplies rows by a matrix in `Tiles`, uniform or mixed.

    Args:
      x: Rows of any float dtype, k as ``w.k``. Every row is scaled by a power of two
        and rounded to float16, which is exact for bfloat16 and float16 values
        (`operands.fit`).
      w: Codes in stored row order, groups of a multiple of 16 rows or one a column.
        The entries of a codebook are rounded to ``dtype``.
      config: How to cut the launch up.
      dtype: Of the tensor cores' operands: float16, or bfloat16, which is exact for
        bfloat16 ``x`` of any range.
      index: Which matrix of ``w``, where that is a stack ``[count, k, n]``: one for all
        rows, or one for every ``config.block_m`` of them, where -1 gives zeros.
      interpret: Whether to run as jnp, on any device.

    Returns:
      float32 product.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason, or bfloat16
        arithmetic with a ``config`` that scales weights.
    """
    whole, w = scales.whole_of(w)
    walk = Walk.of(w, config, index)
    if config.scales_weights and dtype != DTYPE:
        raise NotImplementedError(
            f"Programs of {config.block_m} rows round weights to float16, not {dtype}."
        )
    m, columns = len(x), w.n + w.padding
    prepared = _prepare(x, w, walk.runs, config, dtype, interpret)
    widths = "_".join(str(run.bits) for run in walk.runs)
    partial = lang.launch(
        functools.partial(_body, walk, w.affine, config, dtype),
        Operands(
            x=prepared.x,
            start=prepared.start,
            places=walk.places(index),
            books=books(w),
            words=joined_words(w),
            parameters=parameters(w),
            whole=scales.of_whole(whole),
        ),
        name=f"matmul_{widths}bit_{config.block_m}",
        grid=(
            len(prepared.x) // config.block_m,
            -(-columns // config.block_n),
            config.splits,
        ),
        out=jax.ShapeDtypeStruct((config.splits, m, columns), jnp.float32),
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return (partial.sum(0) * prepared.unscale[:m])[:, : w.n]


def _prepare(
    x: Array,
    w: QTensor,
    runs: Sequence[Run],
    config: Config,
    dtype: jnp.dtype,
    interpret: bool,
) -> Rows:
    """Pads, scales, orders and sums rows: in one launch where all of k is alike."""
    # No offset stands beside codes that are no counts, or beside weights.
    none = not w.affine.counts or config.scales_weights
    sums = 0 if none else 1 if w.zero is None else 2
    k = w.k + sum(segment.padding for segment in w.segments)
    if len(runs) == 1 and rows.fits(k):
        (run,), (padded,) = runs, split_padded(x, w)
        return rows.prepare(
            padded,
            run.bits,
            w.affine,
            run.steps,
            sums=sums,
            block_m=config.block_m,
            dtype=dtype,
            interpret=interpret,
        )
    x = jnp.pad(x, ((0, -len(x) % config.block_m), (0, 0)))
    fitted, unscale = fit(x, dtype)
    parts = list(zip(split_padded(fitted, w), runs, strict=True))
    arranged = [arrange(part, run.steps) for part, run in parts]
    starts = [
        start(part, run.bits, w.affine, run.steps, zeros=sums == 2)
        for part, run in parts
    ]
    return Rows(
        jnp.concatenate(arranged, axis=1),
        unscale,
        jnp.concatenate(starts) if sums else None,
    )


def _body(
    walk: Walk,
    affine: Affine,
    config: Config,
    dtype: jnp.dtype,
    language: lang.Lang,
    refs: Operands,
    out_ref: Any,
) -> None:
    m, n, split = (pl.program_id(axis) for axis in range(3))
    x_rows = pl.ds(m * config.block_m, config.block_m)
    start = n * config.block_n
    matrix, bits = walk.matrix(refs.places, m), walk.runs[0].bits
    book = read_book(refs.books, matrix, affine, bits, dtype)
    columns = [
        Columns(
            language, ref, run.bits, affine, start, config.block_n, book.words, dtype
        )
        for run, ref in zip(walk.runs, refs.words, strict=True)
    ]
    unit = None
    if config.scales_weights:
        spans = [
            _span(run, bounds, config.share(split, bounds.iterations))
            for run, bounds in zip(walk.runs, walk.read(refs.places, m), strict=True)
        ]
        unit = scaling.unit_of(refs.parameters, affine, columns[0], spans)
    program = _Program(language, affine, x_rows, refs, config.scales_weights, unit)
    acc = jnp.zeros((config.block_n, config.block_m), jnp.float32)
    bounds_of_each = walk.read(refs.places, m)
    for run, of_run, bounds in zip(walk.runs, columns, bounds_of_each, strict=True):
        share = config.share(split, bounds.iterations)
        acc = program.add_segment(acc, run, bounds, of_run, *share)
    if unit is not None:
        acc *= unit.undo
    if book.undo is not None:
        acc *= book.undo
    acc = scales.finish(acc, refs.whole, matrix)
    inside = columns[0].inside
    inside = None if inside is None else inside[None]
    if out_ref.shape[1] % config.block_m:
        # What splits write has to be read again: only rows that exist.
        row = m * config.block_m + jnp.arange(config.block_m)[:, None]
        inside = lang.both(row < out_ref.shape[1], inside)
    lang.store(out_ref.at[split, x_rows, columns[0].slice], acc.T, inside)


def _span(run: Run, bounds: Bounds, share: tuple[Any, Any]) -> scaling.Span:
    begin, end = (iteration * run.block_k for iteration in share)
    end = bounds.group + (end + run.group - 1) // run.group
    return scaling.Span(
        bounds.group + begin // run.group,
        jnp.minimum(end, bounds.last_group + 1),
        run.bits,
    )


class _Program(NamedTuple):
    """What all segments share in one program."""

    language: lang.Lang
    affine: Affine
    rows: Any  # of x, a slice
    refs: Operands
    scales_weights: bool
    unit: scaling.Unit | None

    def add_segment(
        self,
        acc: Array,
        run: Run,
        bounds: Bounds,
        columns: Columns,
        begin: Array,
        end: Array,
    ) -> Array:
        """Adds the iterations of a segment from ``begin`` up to ``end``."""
        step_rows = range(0, run.block_k, run.steps.rows)
        blocks = run.block_k // tiles.rows_of_block(run.bits)

        def load_sums(iteration: Array, rows: range) -> list[list[Array]]:
            first = bounds.step + iteration * len(step_rows)
            return [self._load_sums(first + row // run.steps.rows) for row in rows]

        def load_parameters(iteration: Array, rows: range) -> list[list[Array]]:
            of_iteration = scales.Iteration(
                self.refs.parameters,
                columns.slice,
                columns.inside,
                run.group,
                run.block_k,
            )
            groups = [
                bounds.group + (iteration * run.block_k + row) // run.group
                for row in rows
            ]
            # Past the last group there is only padding, where x is zero.
            return [
                of_iteration.read(row, jnp.minimum(group, bounds.last_group))
                for row, group in zip(rows, groups, strict=True)
            ]

        def add(
            acc: Array, iteration: Array, rows: range, sums: Any, parameters: Any
        ) -> Array:
            for row, *loaded in zip(rows, sums, parameters, strict=True):
                product = functools.partial(
                    columns.add_product,
                    self.refs.x,
                    self.rows,
                    bounds.row + iteration * run.block_k + row,
                    places(run.bits, bounds.block + iteration * blocks, row, run.steps),
                    run.steps.joined,
                )
                acc = self._add_step(acc, product, columns, *loaded)
            return acc

        parts = [step_rows]
        if self.rows.size == EXACT_ROWS or len(step_rows) > _STEPS:
            # A step after the other: a thread has no registers to hold twice what a
            # whole iteration needs, nor once the sums of x. Those are in a cache.
            parts = [step_rows[i : i + 1] for i in range(len(step_rows))]
        loads = [
            segments.Load(load_sums, 1),
            segments.Load(load_parameters, len(parts)),
        ]
        return segments.iterate(begin, end, parts, loads, add, acc)

    def _add_step(
        self,
        acc: Array,
        product: Callable[..., Array],
        columns: Columns,
        sums: list[Array],
        scale_and_zero: list[Array],
    ) -> Array:
        if self.scales_weights:
            read = scaling.weights(columns, self.affine, self.unit, scale_and_zero)
            return product(acc, read)
        return scaling.add_step(
            self.language, self.affine, acc, product, sums, scale_and_zero
        )

    def _load_sums(self, step: Array) -> list[Array]:
        # No offset stands beside codes that are no counts.
        count = 0 if self.refs.start is None else len(self.refs.parameters)
        return [
            lang.load_row(self.refs.start, step, i, columns=self.rows)[None]
            for i in range(count)
        ]
