"""Gradients of scales and float zeros, reduced per group where the products arise.

With ``c`` a code (less the middle one of `Affine.CENTERED`), a group's own products

    a[m, g, n] = sum over the rows k of g of x[m, k] c[k, n]

are what `qjax.pallas.matmul` accumulates before the scale. The kernel multiplies them
by ``dy[m, n]`` and sums over m in registers; no gradient of the weight exists. What
remains is one small product of ``dy`` with the sums of x over groups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang, unpack
from qjax.pallas.operands import (
    DTYPE,
    Config,
    Steps,
    arrange,
    fit,
    group_rows,
    joined_words,
    one_of,
    parameters,
    read_index,
    stack_index,
    start,
)
from qjax.pallas.weight import Columns, places
from qjax.tensor import Affine, QTensor, decoded


class Operands(NamedTuple):
    """What a launch takes: arrays, or references to them.

    Attributes:
      x: Rows in the order of `operands.arrange`.
      start: What the accumulators start at.
      dy: Padded rows.
      index: Of the matrix in a stack.
      words: Of the one segment.
    """

    x: Any
    start: Any
    dy: Any
    index: Any
    words: Any


def scale_grad(
    x: Float[Array, "m k"],
    dy: Float[Array, "m n"],
    w: QTensor,
    config: Config,
    *,
    index: Array | None = None,
    interpret: bool = False,
) -> dict[str, Array]:
    """Computes the gradients of the float leaves of a matrix in `Tiles`.

    Args:
      x: Activations of any float dtype.
      dy: float32 cotangent of ``x @ W``.
      w: As in `qjax.pallas.matmul.matmul`.
      config: How to cut the launch up.
      index: Which matrix of ``w``, where that is a stack ``[count, k, n]``.
      interpret: Whether to run as jnp, on any device.

    Returns:
      float32 gradients by field name: ``scale``, and ``zero`` where it is float; of one
      matrix.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason.
    """
    if w.codebook is not None:
        raise NotImplementedError("The kernel has no gradient of a codebook.")
    x = x.astype(jnp.float32)
    (group,), groups = group_rows(w), w.scale.shape[-2]
    products = _group_products(x, dy, w, config, index, interpret)
    by_group = jnp.pad(x, ((0, 0), (0, groups * group - w.k)))
    sums = by_group.reshape(len(x), groups, group).sum(-1)
    added = jnp.dot(sums.T, dy, precision=lax.Precision.HIGHEST)
    scale, *zero = (
        p[:, : w.n].astype(jnp.float32) for p in parameters(decoded(one_of(w, index)))
    )
    if not zero:
        gradients = {"scale": products}
    elif w.affine is Affine.ZERO:
        gradients = {"scale": products - zero[0] * added, "zero": -scale * added}
    else:
        gradients = {"scale": products, "zero": added}
    return {
        name: _sum_columns(gradient, getattr(w, name).shape[-1])
        for name, gradient in gradients.items()
        if jnp.issubdtype(getattr(w, name).dtype, jnp.floating)
    }


def _sum_columns(gradient: Float[Array, "g n"], count: int) -> Float[Array, "g c"]:
    """Sums over the columns that share a value; values beyond n get no gradient."""
    groups, n = gradient.shape
    if count > n:
        return jnp.pad(gradient, ((0, 0), (0, count - n)))
    return gradient.reshape(groups, count, -1).sum(-1)


def _group_products(
    x: Array,
    dy: Array,
    w: QTensor,
    config: Config,
    index: Array | None,
    interpret: bool,
) -> Float[Array, "g n"]:
    """The sum over m of ``a[m, g, n] * dy[m, n]``."""
    (segment,), m = w.segments, len(x)
    bits, (group,) = segment.bits, group_rows(w)
    groups = w.scale.shape[-2]
    config = config.fitting(bits, w.k + segment.padding)
    steps = Steps.of(bits, group, config)
    ragged, columns = -m % config.block_m, w.n + w.padding
    rows, unscale = fit(jnp.pad(x, ((0, ragged), (0, segment.padding))))
    cotangent = jnp.pad(dy, ((0, ragged), (0, w.padding))) * unscale
    if w.affine is Affine.FLOAT:
        cotangent *= unpack.unit(bits, DTYPE)
    k = rows.shape[1]
    by_step = lang.launch(
        functools.partial(_body, bits, w.affine, steps, config, k // config.block_k),
        Operands(
            x=arrange(rows, steps),
            start=start(rows, bits, w.affine, steps, zeros=False),
            dy=cotangent,
            index=stack_index(index),
            words=joined_words(w)[0],
        ),
        name=f"scale_grad_{bits}bit_{config.block_m}",
        grid=(
            len(rows) // config.block_m,
            -(-columns // config.block_n),
            config.splits,
        ),
        out=jax.ShapeDtypeStruct(
            (len(rows) // config.block_m, k // steps.rows, columns), jnp.float32
        ),
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    ).sum(0)[:, : w.n]
    count = groups * group // steps.rows
    whole = jnp.pad(by_step[:count], ((0, max(0, count - len(by_step))), (0, 0)))
    return whole.reshape(groups, -1, w.n).sum(1)


def _body(
    bits: int,
    affine: Affine,
    steps: Steps,
    config: Config,
    iterations: int,
    language: lang.Lang,
    refs: Operands,
    out_ref: Any,
) -> None:
    m, n, split = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(m * config.block_m, config.block_m)
    columns = Columns(
        language, refs.words, bits, affine, n * config.block_n, config.block_n
    )
    step_rows = range(0, config.block_k, steps.rows)
    blocks = config.block_k // tiles.rows_of_block(bits)
    first_block = read_index(refs.index) * iterations * blocks
    mask = columns.inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (config.block_m, config.block_n))
    dy = lang.load(refs.dy.at[rows, columns.slice], mask).T

    def total(iteration: Array, i: int, row: int) -> Array:
        begin = lang.load_row(
            refs.start, iteration * len(step_rows) + i, 0, columns=rows
        )
        product = columns.add_product(
            refs.x,
            rows,
            iteration * config.block_k + row,
            places(bits, first_block + iteration * blocks, row, steps),
            steps.joined,
            jnp.broadcast_to(begin[None], dy.shape),
        )
        return (product * dy).sum(1)

    def iterate(iteration: Array, done: Array) -> Array:
        # All steps before the first store, for all the compiler knows one to the words:
        # only then are the loads of steps that share a slot one load.
        totals = [total(iteration, i, row) for i, row in enumerate(step_rows)]
        for i, value in enumerate(totals):
            step = pl.ds(iteration * len(step_rows) + i, 1)
            out = out_ref.at[pl.ds(m, 1), step, columns.slice]
            lang.store(out, value[None, None], columns.inside)
        return done

    begin, end = config.share(split, iterations)
    lax.fori_loop(begin, end, iterate, jnp.int32(0))
