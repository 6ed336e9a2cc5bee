"""The dense weight from `Tiles`, bit for bit that of `qjax.decode.stored_weight`.

But for float32 scales with an added zero: their product with a code is inexact, and a
compiler is free to round it, or not, before the sum.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, DTypeLike, Float

from qjax import decode
from qjax.formats import tiles
from qjax.pallas import lang, scales
from qjax.pallas.operands import (
    TOP,
    Config,
    Steps,
    books,
    group_rows,
    joined_words,
    one_of,
    parameters,
    read_book,
    read_index,
    stack_index,
)
from qjax.pallas.weight import Columns, Place, places
from qjax.tensor import Affine, QTensor, decoded


class Operands(NamedTuple):
    """What a launch takes: arrays, or references to them.

    Attributes:
      unit: By which scales are multiplied, ``[1, 1]``, or None.
      index: Of the matrix in a stack.
      books: Codebooks, if there are any.
      words: Of the one segment.
      parameters: Scale, and zero if there is one.
    """

    unit: Any
    index: Any
    books: Any
    words: Any
    parameters: list[Any]


class _Task(NamedTuple):
    """What a kernel is compiled for, beside `Config`."""

    bits: int
    group: int  # rows
    groups: int
    steps: Steps
    affine: Affine
    rounding: int
    exact: jnp.dtype | None
    tables: int  # of a codebook


def dequantize(
    w: QTensor,
    dtype: DTypeLike | None,
    config: Config,
    *,
    index: Array | None = None,
    unit: Array | None = None,
    interpret: bool = False,
) -> Float[Array, "k n"]:
    """Forms the weight of one segment in stored row order.

    Args:
      w: As in `qjax.pallas.matmul.matmul`.
      dtype: As in `qjax.dequantize`.
      config: How to cut the launch up; ``block_m`` and ``splits`` mean nothing here.
      index: Which matrix of ``w``, where that is a stack ``[count, k, n]``.
      unit: By which the weight is multiplied first, for a product. The entries of a
        codebook are then rounded to float16, as `qjax.pallas.matmul.matmul` does.
      interpret: Whether to run as jnp, on any device.

    Returns:
      ``[k, n]``.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason.
    """
    whole, bare = scales.whole_of(w)
    if whole is not None and unit is not None:
        # For a product, in which it may be rounded with the unit.
        w, unit = bare, one_of(whole, index).apply(unit)
    elif whole is not None:
        w = decoded(w)
    (segment,) = w.segments
    bits, (group,) = segment.bits, group_rows(w)
    config = config.fitting(bits, w.k + segment.padding)
    steps = Steps.of(bits, group, config)
    k, n = w.k + segment.padding, w.n + w.padding
    task = _Task(
        bits,
        group,
        w.scale.shape[-2],
        steps,
        w.affine,
        w.rounding,
        exact=w.dtype if dtype is None else None,
        # For a product, float16 entries will do.
        tables=3 if unit is None else 1,
    )
    dense = lang.launch(
        functools.partial(_body, task, config),
        Operands(
            unit=None if unit is None else unit.reshape(1, 1),
            index=stack_index(index),
            books=books(w),
            words=joined_words(w)[0],
            parameters=parameters(w),
        ),
        name=f"dequantize_{bits}bit",
        grid=(k // config.block_k, -(-n // config.block_n)),
        out=jax.ShapeDtypeStruct(
            (
                k // tiles.rows_of_block(bits),
                tiles.sub_blocks(bits),
                tiles.SIDE,
                n,
            ),
            dtype or w.dtype,
        ),
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return dense.reshape(k, n)[: w.k, : w.n]


def _body(
    task: _Task, config: Config, language: lang.Lang, refs: Operands, out_ref: Any
) -> None:
    iteration, n = pl.program_id(0), pl.program_id(1)
    columns = Columns(
        language, refs.words, task.bits, task.affine, n * config.block_n, config.block_n
    )
    matrix, centre = read_index(refs.index), task.affine.centre(task.bits)
    first_block, first_group = matrix * out_ref.shape[0], matrix * task.groups
    book = read_book(
        refs.books, matrix, task.affine, task.bits, exponent=TOP, count=task.tables
    )
    block = iteration * (config.block_k // tiles.rows_of_block(task.bits))
    step_rows = range(0, config.block_k, task.steps.rows)

    def tiles_of(place: Place) -> list[Array]:
        if not book.tables:
            return [columns.operand(place)]
        return [columns.entry(place, table) for table in book.tables]

    # Before the first store, for all the compiler knows one to the words: only then are
    # the loads of sub-blocks that share a slot one load.
    loaded = [
        [tiles_of(p) for p in places(task.bits, first_block + block, row, task.steps)]
        for row in step_rows
    ]
    of_iteration = scales.Iteration(
        refs.parameters, columns.slice, columns.inside, task.group, config.block_k
    )
    for row, operands in zip(step_rows, loaded, strict=True):
        g = (iteration * config.block_k + row) // task.group
        g = first_group + jnp.minimum(g, task.groups - 1)
        scale, *zero = (
            values.astype(jnp.float32)[:, None] for values in of_iteration.read(row, g)
        )
        if refs.unit is not None:
            (unit,) = lang.scalars(refs.unit, 0, 1)
            scale = scale * unit
            if task.affine is not Affine.ZERO:
                zero = [z * unit for z in zero]
        written = places(task.bits, block, row, task.steps)
        for place, parts in zip(written, operands, strict=True):
            first, *rest = (part.astype(jnp.float32) for part in parts)
            if book.undo is None:
                c = first - (columns.offset(place) + centre)
            else:
                c = sum(rest, first) * book.undo
            values = (
                decode.affine_map(
                    c, scale, zero[0], task.affine, task.rounding, task.exact, _convert
                )
                if zero
                else c * scale
            )
            _store(out_ref, place, columns, values.astype(out_ref.dtype))


def _convert(x: Array, dtype: DTypeLike) -> Array:
    # Triton leaves a pair of conversions alone.
    return x.astype(dtype).astype(jnp.float32)


def _store(out_ref: Any, place: Place, columns: Columns, values: Array) -> None:
    """Writes a sub-block ``[columns, blocks * 16]`` as rows of the weight."""
    axes = values.reshape(-1, place.width, tiles.SIDE).transpose(1, 2, 0)
    tile = axes.reshape(place.width, 1, tiles.SIDE, -1)
    lang.store(out_ref.at[(*place.rows, columns.slice)], tile, columns.inside)
