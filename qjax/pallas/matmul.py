"""``x @ W`` on tensor cores, the weight unpacked in registers.

The weight is the A operand and ``x`` the B operand (``W.T @ x.T``), because `Tiles`
stores what a lane feeds to the tensor core as A. A program owns ``block_n`` columns of
the output, ``block_m`` rows and a run of k (split-K, summed afterwards in a fixed
order). The codes enter the product as ``q + offset`` (`qjax.pallas.unpack`), and zeros
are not subtracted from them: the accumulator of a step starts at

    - (sum offset * x) - z * (sum x)

so that it ends at ``sum (q - z) * x``, and the scale of the group is applied to it, in
float32. What is left for a weight is half a LOP3 and its share of the rest.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

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
from qjax.pallas.weight import Columns
from qjax.tensor import Affine, QTensor


def matmul(
    x: Float[Array, "m k"], w: QTensor, config: Config, *, interpret: bool = False
) -> Float[Array, "m n"]:
    """Multiplies rows by a matrix of one segment in `Tiles`.

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
    if w.affine is Affine.CODEBOOK:
        raise NotImplementedError("The kernel multiplies affine codes, no codebook.")
    (segment,), m = w.segments, x.shape[0]
    bits, group = segment.bits, group_rows(w)
    block_k = max(config.block_k, tiles.rows_of_block(bits))
    config = dataclasses.replace(config, block_k=block_k)
    steps = Steps.of(bits, group, config)
    padding = ((0, -m % config.block_m), (0, segment.padding))
    rows, unscale = fit(jnp.pad(x, padding))
    columns = w.n + w.padding
    grid = (len(rows) // config.block_m, -(-columns // config.block_n), config.splits)
    partial = lang.launch(
        functools.partial(_body, bits, group, w.affine, steps, config),
        arrange(rows, steps),
        start(rows, bits, w.affine, steps),
        w.words[0],
        *parameters(w),
        name=f"matmul_{bits}bit_{config.block_m}",
        grid=grid,
        out_shape=(config.splits, len(rows), columns),
        out_dtype=jnp.float32,
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return (partial.sum(0) * unscale)[:m, : w.n]


def _body(
    bits: int,
    group: int,
    affine: Affine,
    steps: Steps,
    config: Config,
    language: lang.Lang,
    x_ref: Any,
    start_ref: Any,
    words_ref: Any,
    *refs: Any,
) -> None:
    *parameter_refs, out_ref = refs
    m, n, split = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(m * config.block_m, config.block_m)
    columns = Columns(language, words_ref, bits, n * config.block_n, config.block_n)
    step_rows = range(0, config.block_k, steps.rows)
    blocks = config.block_k // tiles.rows_of_block(bits)
    iterations = words_ref.shape[0] // blocks
    last_group = parameter_refs[0].shape[0] - 1

    def load(iteration: Array) -> list[tuple[list[Array], list[Array]]]:
        """Sums of x, and scale and zero, of every step of an iteration."""
        loaded = []
        for i, row in enumerate(step_rows):
            step = iteration * len(step_rows) + i
            # Past the last group there is only padding, where x is zero.
            g = jnp.minimum((iteration * config.block_k + row) // group, last_group)
            sums = [
                lang.load_row(start_ref, step, i, columns=rows)
                for i in range(len(parameter_refs))
            ]
            parameters = [
                lang.load_row(ref, g, columns=columns.slice, mask=columns.inside)
                for ref in parameter_refs
            ]
            loaded.append((sums, parameters))
        return loaded

    def iterate(iteration: Array, carry: Any) -> Any:
        acc, loaded = carry
        # One iteration ahead: the compiler pipelines only the loads of the products.
        following = load(jnp.minimum(iteration + 1, end - 1))
        for row, (sums, scale_and_zero) in zip(step_rows, loaded, strict=True):

            def product(part: Array, row: int = row) -> Array:
                k = iteration * config.block_k + row
                for operand in columns.step(iteration * blocks, row, steps):
                    width = operand.shape[1]
                    part += language.dot(operand, x_ref[rows, pl.ds(k, width)].T)
                    k += width
                return part

            acc = _add_step(language, acc, product, affine, sums, scale_and_zero)
        return acc, following

    begin = split * iterations // config.splits
    end = (split + 1) * iterations // config.splits
    acc = jnp.zeros((config.block_n, config.block_m), jnp.float32)
    acc, _ = lax.fori_loop(begin, end, iterate, (acc, load(begin)))
    mask = None
    if columns.inside is not None:
        mask = jnp.broadcast_to(columns.inside[None], acc.T.shape)
    lang.store(out_ref.at[split, rows, columns.slice], acc.T, mask)


def _add_step(
    language: lang.Lang,
    acc: Array,
    product: Callable[[Array], Array],
    affine: Affine,
    sums: Sequence[Array],
    parameters: Sequence[Array],
) -> Array:
    """Adds a step to the accumulator: its product, less offsets and zeros, scaled."""
    scale, *zero = (p.astype(jnp.float32)[:, None] for p in parameters)
    begin, *minus_sum = (s[None] for s in sums)
    if zero and affine is Affine.ZERO:
        begin = language.fma(zero[0], minus_sum[0], begin)
    acc = language.fma(product(jnp.broadcast_to(begin, acc.shape)), scale, acc)
    if zero and affine is not Affine.ZERO:
        acc = language.fma(-zero[0], minus_sum[0], acc)
    return acc
