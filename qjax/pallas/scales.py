"""Scales and zeros as kernels read them: one number a group, or `Levels` of them.

Of `Nested` ones, a program multiplies the numbers of its own groups when it has loaded
them, so that no more is read than a file has: an integer of eight bits a group.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qjax.pallas import lang
from qjax.tensor import Nested, QTensor, WithGlobal


class Iteration:
    """Reads scale and zero of the steps of one iteration, of some columns."""

    def __init__(
        self,
        refs: Sequence[Any],
        columns: Any,
        mask: Array | None,
        group: int,
        block_k: int,
    ):
        """Describes what is read.

        Args:
          refs: References, or `Nested` ones of two.
          columns: A slice.
          mask: Which of them exist, where not all do.
          group: Rows of a group.
          block_k: Rows of an iteration.
        """
        self._refs, self._columns, self._mask = refs, columns, mask
        self._group, self._block_k = group, block_k
        self._loaded: dict[tuple[int, int], Array] = {}

    def read(self, row: int, group: Any) -> list[Array]:
        """Loads those of a step.

        Args:
          row: Row of the iteration at which the step starts.
          group: Its group.
        """
        return [self._read(i, row, group) for i in range(len(self._refs))]

    def _read(self, i: int, row: int, group: Any) -> Array:
        ref = self._refs[i]
        if not isinstance(ref, Nested):
            return self._load(ref, group)
        # Rows between which no run can end share what is loaded for the first of them.
        together = math.gcd(ref.ratio * self._group, self._block_k)
        key = i, row // together
        if key not in self._loaded:
            self._loaded[key] = _widened(ref, self._load(ref.step, group // ref.ratio))
        return self._load(ref.factor, group).astype(jnp.float32) * self._loaded[key]

    def _load(self, ref: Any, row: Any) -> Array:
        return lang.load_row(ref, row, columns=self._columns, mask=self._mask)


def elements(ref: Any, group: Array, column: Array, mask: Array | None) -> Array:
    """Loads scales or zeros at indices that broadcast."""
    if not isinstance(ref, Nested):
        return lang.gather(ref, group, column, mask=mask)
    step = lang.gather(ref.step, group // ref.ratio, column, mask=mask)
    factor = lang.gather(ref.factor, group, column, mask=mask)
    return factor.astype(jnp.float32) * _widened(ref, step)


def whole_of(w: QTensor) -> tuple[WithGlobal | None, QTensor]:
    """Takes the number for a whole matrix off its scales, which then are plain.

    Returns:
      The scales that have it, or None; and the weight without it.
    """
    if not isinstance(w.scale, WithGlobal):
        return None, w
    return w.scale, dataclasses.replace(w, scale=w.scale.local)


def of_whole(scale: WithGlobal | None) -> WithGlobal | None:
    """Returns the numbers alone, as a kernel takes them: ``[count, 1]``."""
    if scale is None:
        return None
    return dataclasses.replace(scale, local=None, whole=scale.whole.reshape(-1, 1))


def finish(acc: Array, ref: WithGlobal | None, matrix: Any) -> Array:
    """Applies, in a kernel's body, the number of a matrix; of none, -1, any will do."""
    if ref is None:
        return acc
    (whole,) = lang.scalars(ref.whole, jnp.maximum(matrix, 0), 1)
    return acc * (1 / whole if ref.divides else whole)


def _widened(ref: Nested, step: Array) -> Array:
    # With an integer of eight bits, float32 holds the product exactly.
    step = step.astype(jnp.float32)
    return -step if ref.negative else step
