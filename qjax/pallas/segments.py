"""The segments of a matrix as kernels walk along them, one after another.

Their bounds come from a table in memory, so that matrices which mix the same widths in
other proportions share one compiled kernel. So do the bounds of a matrix in a stack, of
which every block of rows may have one of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from qjax.pallas import lang
from qjax.pallas.operands import Config, Steps, group_rows
from qjax.tensor import QTensor, group_counts


class Run(NamedTuple):
    """What a kernel is compiled for of one segment."""

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
      block: Its first block in the storage.
      group: Its first group.
      last_group: The last one that has a scale.
    """

    iterations: Any
    row: Any
    step: Any
    block: Any
    group: Any
    last_group: Any


def cut(w: QTensor, config: Config) -> Iterator[tuple[Run, Bounds]]:
    """Yields every segment of a matrix in `Tiles`, its iterations fitting.

    Raises:
      NotImplementedError: As `operands.group_rows`.
    """
    row = step = group = 0
    groups = zip(group_rows(w), group_counts(w), strict=True)
    for segment, held, (size, count) in zip(w.segments, w.rows, groups, strict=True):
        padded = held + segment.padding
        fitting = config.fitting(segment.bits, padded)
        steps, block_k = Steps.of(segment.bits, size, fitting), fitting.block_k
        yield (
            Run(segment.bits, size, block_k, steps),
            Bounds(padded // block_k, row, step, 0, group, group + count - 1),
        )
        row, step, group = row + padded, step + padded // steps.rows, group + count


def placed(bounds: Sequence[Bounds], w: QTensor, index: Array | None) -> Array | None:
    """Makes the table, if the kernel is not compiled for the bounds.

    Args:
      bounds: Of every segment.
      w: The matrix, or a stack.
      index: Which matrix of a stack: one, or one for every block of rows.

    Returns:
      A row for every segment, of every block of rows; None for a single segment of a
      matrix that is in no stack.
    """
    if len(bounds) == 1 and index is None:
        return None
    table = jnp.array(bounds, jnp.int32)
    if index is None:
        return table
    groups = w.scale.shape[-2]
    strides = [Bounds(0, 0, 0, words.shape[-4], groups, groups) for words in w.words]
    step = jnp.array(strides, jnp.int32)
    if not index.ndim:
        return table + index * step
    table = table[None] + index[:, None, None] * step[None]
    # A block without a matrix takes no iterations.
    table = jnp.where((index < 0)[:, None, None], 0, table)
    return table.reshape(-1, len(Bounds._fields))


def read(table_ref: Any, compiled_for: Sequence[Bounds], block: Any) -> list[Bounds]:
    """Reads, in a kernel's body, what `placed` has returned.

    Args:
      table_ref: Reference to it, or None.
      compiled_for: The bounds of every segment, as `cut` gives them.
      block: The block of rows, where each has a matrix of its own, and else 0.
    """
    if table_ref is None:
        return list(compiled_for)
    count, first = len(Bounds._fields), block * len(compiled_for)
    rows = range(len(compiled_for))
    return [Bounds(*lang.scalars(table_ref, first + i, count)) for i in rows]
