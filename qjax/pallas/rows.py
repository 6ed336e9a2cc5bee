"""Rows of x as `qjax.pallas.matmul` takes them, in one launch.

XLA makes five kernels of the same work: the largest element of a row, its scaling, its
order, and two sums of every step. With one row, each of them costs as much as the
product.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang, unpack
from qjax.pallas.operands import DTYPE, TOP, Steps, bring_to
from qjax.tensor import Affine

# Elements of a row that one program holds in registers.
_LARGEST = 32768
_PER_THREAD = 32


class Rows(NamedTuple):
    """Rows as the products take them.

    Attributes:
      x: 16-bit floats ``[m, k]`` in the order of `operands.arrange`.
      unscale: float32 ``[m, 1]``: undoes the scaling of the rows.
      start: float32 ``[steps, sums, m]``, as `operands.start` has it; None without
        sums.
    """

    x: Any
    unscale: Any
    start: Any


class _Task(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
      rows: Rows that exist; those beyond are zero.
      steps: Of k, at most ``2**n``.
      width: The power of two that holds them.
      sums: Sums of a step: with offsets, and without.
    """

    rows: int
    steps: int
    width: int
    sums: int


def fits(k: int) -> bool:
    """Returns whether the kernel takes rows of ``k`` elements."""
    return k <= _LARGEST


def prepare(
    x: Float[Array, "m k"],
    bits: int,
    affine: Affine,
    steps: Steps,
    *,
    sums: int,
    block_m: int,
    dtype: jnp.dtype = DTYPE,
    interpret: bool = False,
) -> Rows:
    """Scales, rounds, orders and sums rows.

    Args:
      x: Rows of any float dtype, k whole blocks of the storage; `fits` must hold.
      bits: Width of a code.
      affine: The map of the codes.
      steps: What a step is.
      sums: 0, 1 or 2: none, that of `operands.start` without zeros, or with them.
      block_m: The result has a multiple of so many rows; those added are zero.
      dtype: What the rows become, as in `operands.fit`.
      interpret: Whether to run as jnp, on any device.

    Returns:
      The rows; equal to `operands.fit`, `operands.arrange` and `operands.start` one
      after another, but for the order in which sums are taken.
    """
    m, k = x.shape
    padded, count = m + -m % block_m, k // steps.rows
    width = 1 << (count - 1).bit_length()
    in_steps = (m, count, steps.blocks, steps.sub_blocks, tiles.SIDE)
    ordered = (padded, count, steps.sub_blocks, steps.blocks, tiles.SIDE)
    # A constant of the program: XLA would launch a kernel to repeat it.
    offsets = np.array([r.offset for r in unpack.recipes(bits, dtype)], np.float32)
    offsets = (offsets + affine.centre(bits)).reshape(-1, steps.sub_blocks)
    offsets = np.tile(offsets, (count // len(offsets) + 1, 1))[:count]
    struct = jax.ShapeDtypeStruct
    starts = [struct((count, sums, padded), jnp.float32)] if sums else []
    warps = width * steps.rows // (32 * _PER_THREAD)
    ordered_x, unscale, *start = lang.launch(
        functools.partial(_body, _Task(m, count, width, sums)),
        x.reshape(in_steps),
        jnp.asarray(offsets) if sums else None,
        name=f"rows_{bits}bit",
        grid=(padded, 1),
        out=[struct(ordered, dtype), struct((padded, 1), jnp.float32), *starts],
        warps=min(16, max(1, warps)),
        stages=1,
        interpret=interpret,
    )
    return Rows(ordered_x.reshape(padded, k), unscale, start[0] if sums else None)


def _body(
    task: _Task, language: lang.Lang, x_ref: Any, offsets_ref: Any, *out_refs: Any
) -> None:
    del language
    out = Rows(*out_refs, *[None] * (3 - len(out_refs)))
    row = pl.program_id(0)
    _, _, blocks, sub_blocks, side = x_ref.shape
    shape = (1, task.width, blocks, sub_blocks, side)
    step = jnp.arange(task.width)
    inside = (step < task.steps) & (row < task.rows)
    # A power of two of steps; those beyond the last are zero.
    mask = jnp.broadcast_to(inside[None, :, None, None, None], shape)
    # Where it starts is not static: JAX refuses static slices that end outside.
    every = pl.ds(pl.program_id(1), task.width)
    where = (pl.ds(jnp.minimum(row, task.rows - 1), 1), every)
    x = lang.load(x_ref.at[(*where, *[slice(None)] * 3)], mask).astype(jnp.float32)
    if out.x.dtype == DTYPE:
        factor, inverse = bring_to(jnp.abs(x).max(), TOP)
        x = x * factor
    else:
        inverse = 1.0
    x = x.astype(out.x.dtype)
    exists = step < task.steps
    ordered = x.transpose(0, 1, 3, 2, 4)
    stored = jnp.broadcast_to(exists[None, :, None, None, None], ordered.shape)
    here = (pl.ds(row, 1), every)
    lang.store(out.x.at[(*here, *[slice(None)] * 3)], ordered, stored)
    one = jnp.full((1, 1), 1.0, jnp.float32) * inverse
    lang.store(out.unscale.at[pl.ds(row, 1), pl.ds(0, 1)], one)
    if not task.sums:
        return
    x = x.astype(jnp.float32)
    rows = jnp.broadcast_to(exists[:, None], (task.width, sub_blocks))
    offsets = lang.load(offsets_ref.at[every, slice(None)], rows)
    terms = (x * offsets[None, :, None, :, None], x)[: task.sums]
    for i, term in enumerate(terms):
        total = -term.reshape(task.width, -1).sum(1)
        where = out.start.at[every, pl.ds(i, 1), pl.ds(row, 1)]
        lang.store(where, total[:, None, None], exists[:, None, None])
