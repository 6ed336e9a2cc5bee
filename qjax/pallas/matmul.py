"""``x @ W`` on tensor cores, the weight unpacked in registers.

The weight is the A operand and ``x`` the B operand (``W.T @ x.T``), because `Tiles`
stores what a lane feeds to the tensor core as A. A program owns ``block_n`` columns of
the output, ``block_m`` rows and a run of k (split-K, summed afterwards in a fixed
order). The codes enter the product as ``q + offset`` (`qjax.pallas.unpack`), and zeros
are not subtracted from them: the accumulator of a step starts at

    - (sum offset * x) - z * (sum x)

so that it ends at ``sum (q - z) * x``, and the scale of the group is applied to it, in
float32. What is left for a weight is half a LOP3 and its share of the rest.

The segments of a mixed matrix are loops one after another in the same launch. Their
bounds come from a table in memory, so that matrices which mix the same widths in other
proportions share one compiled kernel.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang
from qjax.pallas.operands import (
    Config,
    Steps,
    arrange,
    fit,
    group_rows,
    parameters,
    start,
)
from qjax.pallas.weight import Columns, places
from qjax.tensor import Affine, QTensor, group_counts


class Run(NamedTuple):
    """What the kernel is compiled for of one segment."""

    bits: int
    group: int  # rows
    block_k: int
    steps: Steps


class Bounds(NamedTuple):
    """Where a segment lies: numbers, or scalars read from the table.

    Attributes:
      iterations: How many it takes.
      row: Its first row in the padded x.
      step: Its first step.
      group: Its first group.
      last_group: The last one that has a scale.
    """

    iterations: Any
    row: Any
    step: Any
    group: Any
    last_group: Any


def matmul(
    x: Float[Array, "m k"], w: QTensor, config: Config, *, interpret: bool = False
) -> Float[Array, "m n"]:
    """Multiplies rows by a matrix in `Tiles`, uniform or mixed.

    Args:
      x: float32 rows, k as ``w.k``. Every row is scaled by a power of two and rounded
        to float16, which is exact for bfloat16 and float16 values (`operands.fit`).
      w: Affine codes in stored row order, groups of a multiple of 32 rows or one a
        column.
      config: How to cut the launch up.
      interpret: Whether to run as jnp, on any device.

    Returns:
      float32 product.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason.
    """
    runs, bounds = zip(*_segments(w, config), strict=True)
    m, columns = len(x), w.n + w.padding
    rows, unscale = fit(_pad(x, w, -m % config.block_m))
    cuts = [row for _, row, *_ in bounds[1:]]
    xs = jnp.split(rows, cuts, axis=1)
    starts = [
        start(part, run.bits, w.affine, run.steps, zeros=w.zero is not None)
        for part, run in zip(xs, runs, strict=True)
    ]
    arranged = [arrange(part, run.steps) for part, run in zip(xs, runs, strict=True)]
    uniform = len(runs) == 1
    widths = "_".join(str(run.bits) for run in runs)
    partial = lang.launch(
        functools.partial(
            _body, runs, bounds[0] if uniform else None, w.affine, config
        ),
        jnp.concatenate(arranged, axis=1),
        jnp.concatenate(starts),
        *([] if uniform else [jnp.array(bounds, jnp.int32)]),
        *w.words,
        *parameters(w),
        name=f"matmul_{widths}bit_{config.block_m}",
        grid=(
            len(rows) // config.block_m,
            -(-columns // config.block_n),
            config.splits,
        ),
        out_shape=(config.splits, len(rows), columns),
        out_dtype=jnp.float32,
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return (partial.sum(0) * unscale)[:m, : w.n]


def _segments(w: QTensor, config: Config) -> Iterator[tuple[Run, Bounds]]:
    row = step = group = 0
    groups = zip(group_rows(w), group_counts(w), strict=True)
    for segment, rows, (size, count) in zip(w.segments, w.rows, groups, strict=True):
        padded = rows + segment.padding
        fitting = config.fitting(segment.bits, padded)
        steps, block_k = Steps.of(segment.bits, size, fitting), fitting.block_k
        yield (
            Run(segment.bits, size, block_k, steps),
            Bounds(padded // block_k, row, step, group, group + count - 1),
        )
        row, step, group = row + padded, step + padded // steps.rows, group + count


def _pad(x: Array, w: QTensor, rows: int) -> Array:
    """Pads the rows of x, and the columns as the segments are padded."""
    ends = list(itertools.accumulate(w.rows))
    parts = [
        jnp.pad(part, ((0, rows), (0, segment.padding)))
        for part, segment in zip(
            jnp.split(x, ends[:-1], axis=1), w.segments, strict=True
        )
    ]
    return jnp.concatenate(parts, axis=1)


def _body(
    runs: Sequence[Run],
    uniform: Bounds | None,
    affine: Affine,
    config: Config,
    language: lang.Lang,
    x_ref: Any,
    start_ref: Any,
    *refs: Any,
) -> None:
    *inputs, out_ref = refs
    if uniform is None:
        table_ref, *inputs = inputs
        table = [_read(table_ref, i) for i in range(len(runs))]
    else:
        table = [uniform]
    m, n, split = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(m * config.block_m, config.block_m)
    words_refs, parameter_refs = inputs[: len(runs)], inputs[len(runs) :]
    segments = [
        Columns(language, ref, run.bits, n * config.block_n, config.block_n)
        for run, ref in zip(runs, words_refs, strict=True)
    ]
    program = _Program(language, affine, rows, x_ref, start_ref, parameter_refs)
    acc = jnp.zeros((config.block_n, config.block_m), jnp.float32)
    for run, bounds, columns in zip(runs, table, segments, strict=True):
        begin, end = config.share(split, bounds.iterations)
        acc = program.add_segment(acc, run, bounds, columns, begin, end)
    out = out_ref.at[split, rows, segments[0].slice]
    lang.store(out, acc.T, segments[0].inside)


def _read(table_ref: Any, segment: int) -> Bounds:
    bounds = [
        lang.load_row(table_ref, segment, columns=pl.ds(i, 1)).sum()
        for i in range(len(Bounds._fields))
    ]
    return Bounds(*bounds)


class _Program(NamedTuple):
    """What all segments share in one program."""

    language: lang.Lang
    affine: Affine
    rows: Any  # of x, a slice
    x_ref: Any
    start_ref: Any
    parameter_refs: Sequence[Any]

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

        def load(iteration: Array) -> list[tuple[list[Array], list[Array]]]:
            """Sums of x, and scale and zero, of every step of an iteration."""
            return [
                self._load_step(
                    bounds.step + iteration * len(step_rows) + i,
                    bounds.group + (iteration * run.block_k + row) // run.group,
                    bounds.last_group,
                    columns,
                )
                for i, row in enumerate(step_rows)
            ]

        def iterate(iteration: Array, carry: Any) -> Any:
            acc, loaded = carry
            # One iteration ahead: only the loads of the products are pipelined by the
            # compiler.
            following = load(jnp.minimum(iteration + 1, end - 1))
            for row, (sums, scale_and_zero) in zip(step_rows, loaded, strict=True):
                product = functools.partial(
                    columns.add_product,
                    self.x_ref,
                    self.rows,
                    bounds.row + iteration * run.block_k + row,
                    places(run.bits, iteration * blocks, row, run.steps),
                    run.steps.joined,
                )
                acc = self._add_step(acc, product, sums, scale_and_zero)
            return acc, following

        return lax.fori_loop(begin, end, iterate, (acc, load(begin)))[0]

    def _load_step(
        self, step: Array, group: Array, last_group: Any, columns: Columns
    ) -> tuple[list[Array], list[Array]]:
        # Past the last group there is only padding, where x is zero.
        group = jnp.minimum(group, last_group)
        sums = [
            lang.load_row(self.start_ref, step, i, columns=self.rows)
            for i in range(len(self.parameter_refs))
        ]
        scale_and_zero = [
            lang.load_row(ref, group, columns=columns.slice, mask=columns.inside)
            for ref in self.parameter_refs
        ]
        return sums, scale_and_zero

    def _add_step(
        self,
        acc: Array,
        product: Callable[[Array], Array],
        sums: Sequence[Array],
        scale_and_zero: Sequence[Array],
    ) -> Array:
        """Adds the product of a step, less offsets and zeros, scaled."""
        fma = self.language.fma
        scale, *zero = (p.astype(jnp.float32)[:, None] for p in scale_and_zero)
        begin, *minus_sum = (s[None] for s in sums)
        if zero and self.affine is Affine.ZERO:
            begin = fma(zero[0], minus_sum[0], begin)
        acc = fma(product(jnp.broadcast_to(begin, acc.shape)), scale, acc)
        if zero and self.affine is not Affine.ZERO:
            acc = fma(-zero[0], minus_sum[0], acc)
        return acc
