"""The segments of a matrix as kernels walk along them, one after another.

The bounds of several come from a table in memory, so that matrices which mix the same
widths in other proportions share one compiled kernel. Those of a matrix in a stack are
reckoned from its index, of which every block of rows may have one of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.formats import tiles
from qjax.pallas import lang
from qjax.pallas.operands import (
    Config,
    Steps,
    group_rows,
    read_index,
    stack_index,
)
from qjax.tensor import QTensor, group_counts


class Run(NamedTuple):
    """What a kernel is compiled for of one segment.

    Attributes:
      bits: Width of a code.
      group: Rows of a group.
      block_k: Rows of an iteration.
      steps: Of an iteration.
    """

    bits: int
    group: int
    block_k: int
    steps: Steps


class Bounds(NamedTuple):
    """Where a segment lies: numbers, or scalars in the kernel.

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


class Places(NamedTuple):
    """What tells a kernel where its segments lie: arrays, or references to them.

    Attributes:
      table: The bounds of several segments. Those of one are compiled into the kernel.
      index: Which matrix of a stack: one, or one for every block of rows, where -1
        stands for none. None for a matrix that is in no stack.
    """

    table: Any
    index: Any


class Walk(NamedTuple):
    """The segments of a matrix, as a kernel is compiled for them.

    Attributes:
      runs: Of every segment.
      bounds: Of every segment, of the first matrix of a stack.
      strides: From one matrix of a stack to the next.
      by_block: Whether each block of rows has an index of its own.
    """

    runs: tuple[Run, ...]
    bounds: tuple[Bounds, ...]
    strides: tuple[Bounds, ...]
    by_block: bool

    @classmethod
    def of(cls, w: QTensor, config: Config, index: Array | None) -> "Walk":
        """Cuts a matrix in `Tiles`, or those of a stack, into iterations.

        Raises:
          NotImplementedError: As `operands.group_rows`.
        """
        runs, bounds = zip(*_cut(w, config), strict=True)
        groups = w.scale.shape[-2]
        strides = [
            Bounds(0, 0, 0, words.shape[-4], groups, groups) for words in w.words
        ]
        return cls(runs, bounds, tuple(strides), index is not None and index.ndim == 1)

    def places(self, index: Array | None) -> Places:
        """Returns what the kernel takes, to `read` where its segments lie."""
        several = len(self.bounds) > 1
        return Places(
            jnp.array(self.bounds, jnp.int32) if several else None,
            stack_index(index),
        )

    def matrix(self, refs: Places, block: Any = 0) -> Any:
        """Reads, in the kernel's body, which matrix of the stack it is."""
        return read_index(refs.index, block if self.by_block else 0)

    def read(self, refs: Places, block: Any) -> Iterator[Bounds]:
        """Reads, in the kernel's body, the bounds of one segment after another.

        Whoever walks along a segment before the next bounds are read needs no registers
        for them.

        Args:
          refs: References to `places`.
          block: The block of rows.
        """
        matrix = None if refs.index is None else self.matrix(refs, block)
        for i, stride in enumerate(self.strides):
            bounds = self._read_one(refs, i)
            yield bounds if matrix is None else self._moved(matrix, bounds, stride)

    def _read_one(self, refs: Places, i: int) -> Bounds:
        if refs.table is None:
            return self.bounds[i]
        bounds = Bounds(*lang.scalars(refs.table, i, len(Bounds._fields)))
        # Which the compiler has to know, or it loads x an element at a time.
        return bounds._replace(row=lax.div(bounds.row, tiles.STEP) * tiles.STEP)

    def _moved(self, matrix: Array, bounds: Bounds, stride: Bounds) -> Bounds:
        iterations = bounds.iterations
        if self.by_block:
            # A block without a matrix takes no iterations.
            iterations = jnp.where(matrix < 0, 0, jnp.int32(iterations))
            matrix = jnp.maximum(matrix, 0)
        pairs = zip(bounds, stride, strict=True)
        moved = Bounds(*(at + matrix * by if by else at for at, by in pairs))
        return moved._replace(iterations=iterations)


class Load(NamedTuple):
    """What a segment needs beside its products.

    Attributes:
      rows: Loads it for some steps, given an iteration and the rows of it at which they
        start.
      ahead: How many parts of an iteration it is loaded before they need it; at most
        all.
    """

    rows: Callable[[Any, range], Any]
    ahead: int


def iterate(
    begin: Any,
    end: Any,
    parts: Sequence[range],
    loads: Sequence[Load],
    add: Callable[..., Array],
    acc: Array,
) -> Array:
    """Adds the iterations of a segment to an accumulator.

    Args:
      begin: The first.
      end: One past the last.
      parts: The rows of an iteration at which the steps of each part of it start.
      loads: Loads ahead: only those of the products are pipelined by the compiler.
      add: Adds a part to the accumulator, given that, the iteration, the part, and what
        each of ``loads`` has loaded for it.
      acc: The accumulator.
    """

    def one(iteration: Array, carry: Any) -> Any:
        acc, queues = carry
        following = jnp.minimum(iteration + 1, end - 1)
        later = [(i, part) for i in (iteration, following) for part in parts]
        for i, part in enumerate(parts):
            loaded = [load.rows(*later[i + load.ahead]) for load in loads]
            queues = [[*q, new] for q, new in zip(queues, loaded, strict=True)]
            acc = add(acc, iteration, part, *(queue[0] for queue in queues))
            queues = [queue[1:] for queue in queues]
        return acc, queues

    first = [[load.rows(begin, part) for part in parts[: load.ahead]] for load in loads]
    return lax.fori_loop(begin, end, one, (acc, first))[0]


def _cut(w: QTensor, config: Config) -> Iterator[tuple[Run, Bounds]]:
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
