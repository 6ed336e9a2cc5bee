"""Products of JAX of which one operand is a packed weight."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax import ops, watched
from qjax.layers import contraction, experts
from qjax.layers.tracing.held import Held
from qjax.layers.tracing.views import COLUMN, ROW, Atom, in_order, sizes
from qjax.ragged import ragged_matmul
from qjax.tensor import QTensor

_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def product(
    held: Held, x: Array, dimension_numbers: Any, *, x_first: bool, dtype: Any
) -> Array | None:
    """Multiplies by a packed weight, or by its transpose.

    Args:
      held: The weight.
      x: The other operand.
      dimension_numbers: As `jax.lax.dot_general` takes them.
      x_first: Whether ``x`` is the first operand.
      dtype: Dtype of the result.

    Returns:
      The product; None if it does not sum all rows, or all columns, of the matrix.
    """
    step = 1 if x_first else -1
    (x_sum, w_sum), (x_batch, w_batch) = (pair[::step] for pair in dimension_numbers)
    dims = held.view.dims
    side = held.side_of(held.view.pick(w_sum))
    places = [held.counts(dims[axis]) for axis in w_batch]
    # A batch of one counts no matrices of the stack.
    lone = [i for i, axis in zip(x_batch, w_batch, strict=True) if not dims[axis]]
    if side is None or places.count(None) > len(lone) or x.dtype not in _FLOATS:
        return None
    free = [i for i in range(x.ndim) if i not in (*x_sum, *x_batch)]
    own = {p: i for p, i in zip(places, x_batch, strict=True) if p is not None}
    # [*stack, *free, k], as far as x has matrices of its own.
    head = [*(own[place] for place in sorted(own)), *lone, *free]
    rows = _rows(x, head, x_sum, held.view.pick(w_sum), side)
    # A product narrower than its result would round twice.
    if jnp.finfo(dtype).bits > jnp.finfo(x.dtype).bits:
        rows = rows.astype(dtype)
    if held.origin is not None and side == ROW:
        y = _in_place(rows, held.weight, *held.origin)
    else:
        multiply = ops.matmul if side == ROW else transposed
        y = _over_stack(held, own, multiply)(rows, held.weight)
    factored = _by_rows if side == ROW else _by_columns
    # What is beside the weight is multiplied by as the weight is.
    y = held.add(
        y,
        lambda a, b, rows: _over_stack(held, own, factored)(rows, (a, b)),
        rows,
    )
    kept = [i for i in range(len(dims)) if i not in (*w_sum, *w_batch)]
    atoms = held.view.pick(kept)
    # What the axes of y are, and in what order they are wanted: axes of x, and atoms.
    found: list[int | Atom] = []
    for place, name in enumerate(held.stack):
        found += [own[place]] if place in own else in_order(atoms, name)
    found += [*lone, *free, *in_order(atoms, COLUMN if side == ROW else ROW)]
    tail = [(free, x.shape, free), (atoms, held.view.shape, kept)][::step]
    wanted = [*x_batch, *(label for labels, _, _ in tail for label in labels)]
    shape = [shape[axis] for _, shape, axes in tail for axis in axes]
    y = y.reshape([x.shape[a] if isinstance(a, int) else a.size for a in found])
    y = y.transpose([found.index(label) for label in wanted])
    return y.reshape(*(x.shape[i] for i in x_batch), *shape).astype(dtype)


def ragged_product(
    held: Held, x: Array, group_sizes: Array, dimension_numbers: Any, *, dtype: Any
) -> Array | None:
    """Multiplies runs of rows by a matrix each of a packed stack.

    Args:
      held: The stack.
      x: ``[t, k]``.
      group_sizes: As in `ragged_matmul`.
      dimension_numbers: As `jax.lax.ragged_dot_general` takes them.
      dtype: Dtype of the result.

    Returns:
      ``[t, n]``; None if it is another product than `jax.lax.ragged_dot`'s.
    """
    (summed, w_summed), batch = dimension_numbers.dot_dimension_numbers
    plain = (
        (x.ndim, summed, batch) == (2, (1,), ((), ()))
        and dimension_numbers.lhs_ragged_dimensions == (0,)
        and len(dimension_numbers.rhs_group_dimensions) == 1
    )
    if not plain or x.dtype not in _FLOATS or len(held.stack) != 1:
        return None
    (group,), dims = dimension_numbers.rhs_group_dimensions, held.view.dims
    kept = [i for i in range(len(dims)) if i not in (*w_summed, group)]
    sides = ((w_summed, ROW), (kept, COLUMN))
    for axes, side in sides:
        atoms = held.view.pick(axes)
        if held.side_of(atoms) != side or list(atoms) != in_order(atoms, side):
            return None
    if held.counts(dims[group]) is None:
        return None
    if jnp.finfo(dtype).bits > jnp.finfo(x.dtype).bits:
        x = x.astype(dtype)
    y = ragged_matmul(x, held.weight, group_sizes)
    return held.add(y, experts.factored, x, group_sizes).astype(dtype)


def _rows(
    x: Array,
    head: Sequence[int],
    summed: Sequence[int],
    atoms: Sequence[Atom],
    side: str,
) -> Array:
    """The operand as rows: its summed axes in the order of the matrix, as one."""
    x = x.transpose((*head, *summed))
    shape = x.shape[: len(head)]
    x = x.reshape(*shape, *sizes(atoms))
    order = [len(head) + atoms.index(atom) for atom in in_order(atoms, side)]
    return x.transpose((*range(len(head)), *order)).reshape(
        *shape, math.prod(sizes(atoms))
    )


def _over_stack(
    held: Held, own: Collection[int], one: Callable[[Array, Any], Array]
) -> Callable[[Array, Any], Array]:
    """A product with each matrix of a stack, where x has rows for some axes."""
    for place in reversed(range(len(held.stack))):
        one = jax.vmap(one, in_axes=(0 if place in own else None, 0))
    return one


# The gradient is that of ``w``, which a scan stacks: each step would write one as large
# as the whole stack otherwise.
@jax.custom_vjp
def _in_place(x: Array, w: QTensor, stack: QTensor, index: Array) -> Array:
    """``x @ dequantize(w)`` of a matrix of a stack, which is read there."""
    return ops.matmul(x, watched.bare(stack), index=index)


def _in_place_forward(
    x: Array, _: QTensor, stack: QTensor, index: Array
) -> tuple[Array, tuple[Array, QTensor, Array]]:
    # By matmul itself, whose own rule serves whoever differentiates this once more.
    return ops.matmul(x, watched.bare(stack), index=index), (x, stack, index)


def _in_place_backward(
    residuals: tuple[Array, QTensor, Array], dy: Array
) -> tuple[Array, QTensor, None, None]:
    x, stack, index = residuals
    bare = watched.bare(stack)
    _, pull = jax.vjp(lambda x: ops.matmul(x, bare, index=index), x)
    # The copy is made for those who train scales, and for no others.
    w = jax.tree.map(lambda leaf: leaf[index], stack)
    _, pull_w = jax.vjp(functools.partial(ops.matmul, x), w)
    return pull(dy)[0], pull_w(dy)[0], None, None


_in_place.defvjp(_in_place_forward, _in_place_backward)


def _by_rows(x: Array, factors: tuple[Array, Array | None]) -> Array:
    """The product with ``a @ b``."""
    return contraction.low_rank(x, *factors)


def _by_columns(x: Array, factors: tuple[Array, Array | None]) -> Array:
    """The product with ``(a @ b).T``."""
    a, b = factors
    if b is None:
        return contraction.low_rank(x, a.T, None)
    return contraction.low_rank(x, b.T, a.T)


def transposed(x: Array, w: QTensor) -> Array:
    """Computes ``x @ dequantize(w).T`` without forming the weight.

    Args:
      x: ``[..., n]``.
      w: ``[k, n]``.

    Returns:
      ``[..., k]`` in the dtype of ``x``.
    """
    # Its inputs are no rows of the matrix.
    return _transposed(x, watched.bare(w))


# With y = x W^T and g its cotangent: dx = g W, and dW = g^T x, which is what
# matmul's own rule gives for the product g W with the cotangent x.
@jax.custom_vjp
@jax.jit  # The product with the zeros is never computed.
def _transposed(x: Array, w: QTensor) -> Array:
    zeros = jnp.zeros((*x.shape[:-1], w.k), x.dtype)
    return jax.vjp(lambda rows: ops.matmul(rows, w), zeros)[1](x)[0]


def _transposed_forward(x: Array, w: QTensor) -> tuple[Array, tuple[Array, QTensor]]:
    return _transposed(x, w), (x, w)


def _transposed_backward(
    residuals: tuple[Array, QTensor], dy: Array
) -> tuple[Array, QTensor]:
    x, w = residuals
    dx, pull = jax.vjp(functools.partial(ops.matmul, dy), w)
    return dx, pull(x)[0]


_transposed.defvjp(_transposed_forward, _transposed_backward)
