"""Where a scale is applied: to the products of a step, or to the weights before them.

Products are scaled in float32: nothing is lost. The codes enter them as ``q + offset``
(`qjax.pallas.unpack`), and zeros are not subtracted: the accumulator of a step starts
at

    - (sum offset * x) - z * (sum x)

so that it ends at ``sum (q - z) * x``. What is left for a weight is half a LOP3 and its
share of the step's rest. That share grows with the rows of x, and a second accumulator
takes registers. Weights are scaled in float16, each rounded once: one instruction more
for a weight, none for a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.pallas import lang
from qjax.pallas.operands import DTYPE, EXACT_ROWS, TOP, bring_to
from qjax.pallas.weight import Columns, Place
from qjax.tensor import Affine, Nested

# Groups of which the largest scale is sought at once.
_GROUPS = 32


def add_step(
    language: lang.Lang,
    affine: Affine,
    acc: Float[Array, "n m"],
    product: Callable[[Array], Array],
    sums: Sequence[Float[Array, "#n m"]],
    scale_and_zero: Sequence[Array],
) -> Float[Array, "n m"]:
    """Adds the product of a step, less offsets and zeros, scaled.

    Args:
      language: What the body is written in.
      affine: The map of the codes.
      acc: Sum of the steps before.
      product: Adds the product of codes with their offsets to what it takes.
      sums: Of `operands.start`, for this step; none with codes that are no
        counts.
      scale_and_zero: Of every column, as stored.
    """
    # Widened and brought to the threads that need them, scales take registers. Those of
    # the product are all that many rows leave: their scales come after it.
    scale, *zero = scale_and_zero
    after = acc.shape[1] == EXACT_ROWS
    scale = scale if after else _column(scale)
    zero = [_column(z) for z in zero]
    begin, *minus_sum = sums or [jnp.zeros_like(acc)]
    if zero and affine is Affine.ZERO:
        begin = language.fma(zero[0], minus_sum[0], begin)
    summed = product(jnp.broadcast_to(begin, acc.shape))
    acc = language.fma(summed, _column(scale) if after else scale, acc)
    if zero and affine is not Affine.ZERO:
        acc = language.fma(-zero[0], minus_sum[0], acc)
    return acc


def _column(parameter: Array) -> Float[Array, "n 1"]:
    return parameter.astype(jnp.float32)[:, None]


class Span(NamedTuple):
    """The groups of a segment that a program reads: the first, and one past the last.

    ``bits`` is the width of their codes.
    """

    first: Any
    end: Any
    bits: int


class Unit(NamedTuple):
    """Powers of two that bring the weights of a program into range, and back."""

    factor: Float[Array, ""]
    undo: Float[Array, ""]


def unit_of(
    parameters: Sequence[Any],
    affine: Affine,
    columns: Columns,
    spans: Sequence[Span],
) -> Unit | None:
    """Finds what lets float16 hold the weights of a program, whatever their scales.

    Args:
      parameters: References to scale, and zero if there is one.
      affine: The map of the codes.
      columns: The program's.
      spans: Its groups.

    Returns:
      None where scales are float16, and the codes integers: as float16 their products
      are as exact as in any range, and no larger than the weights of a float16 model.
    """
    before = affine is Affine.ZERO  # whether zeros belong to the codes
    floats, of_codes = (parameters[:1], parameters[1:]) if before else (parameters, [])
    integers = all(jnp.issubdtype(ref.dtype, jnp.integer) for ref in of_codes)
    integers &= affine.counts
    if integers and all(ref.dtype == DTYPE for ref in floats):
        return None
    largest, most = jnp.float32(0), 1.0
    if isinstance(floats[0], Nested):
        # Of two levels, steps alone bound the products with integers of eight bits.
        most, spans = 128.0, [_of_runs(span, floats[0].ratio) for span in spans]
        floats = [ref.step for ref in floats]
    for span in spans:
        # Entries of a codebook, and small floats as float16 has them, lie below 2.
        bound = 2.0**span.bits if affine.counts else 2.0
        larger = functools.partial(_larger, floats, columns, span, bound)
        chunks = (span.end - span.first + _GROUPS - 1) // _GROUPS
        largest = lax.fori_loop(0, chunks, larger, largest)
    return Unit(*bring_to(largest * most, TOP))


def _of_runs(span: Span, ratio: int) -> Span:
    """The steps of two levels that groups have."""
    return span._replace(first=span.first // ratio, end=(span.end - 1) // ratio + 1)


def _larger(
    floats: Sequence[Any],
    columns: Columns,
    span: Span,
    bound: float,
    chunk: Array,
    largest: Array,
) -> Array:
    """What a chunk of groups lets weights be at most, if more than ``largest``."""
    start = span.first + chunk * _GROUPS
    inside = (start + jnp.arange(_GROUPS) < span.end)[:, None]
    if columns.inside is not None:
        inside = inside & columns.inside[None]
    inside = jnp.broadcast_to(inside, (_GROUPS, columns.width))
    where = (pl.ds(start, _GROUPS), columns.slice)
    scale, *added = (
        jnp.abs(lang.load(ref.at[where], inside).astype(jnp.float32)) for ref in floats
    )
    return jnp.maximum(largest, sum(added, scale * bound).max())


def weights(
    columns: Columns, affine: Affine, unit: Unit | None, scale_and_zero: Any
) -> Callable[[Place], Float[Array, "n k"]]:
    """Returns what reads a sub-block of a step as weights, in their `Unit`."""
    scale, *zero = scale_and_zero
    if unit is not None:
        scale = scale.astype(jnp.float32) * unit.factor
        if affine is not Affine.ZERO:
            zero = [z.astype(jnp.float32) * unit.factor for z in zero]
    scale = scale.astype(DTYPE)
    return lambda place: columns.scaled(place, zero, scale)
