"""What can be done with a packed weight that foreign code sees as a dense array.

Each function takes the operands of one of JAX's own operations. It returns the result,
an array or again a packed weight, or None where only the dense weight will do.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode
from jaxtyping import Array

from qjax import ops
from qjax.layers import embedding
from qjax.layers.beside import Beside, Factored, add
from qjax.layers.tracing.views import COLUMN, ROW, Atom, View, in_order, sizes
from qjax.tensor import QTensor


class Origin(NamedTuple):
    """Where a matrix was taken from.

    Attributes:
      stack: ``[count, k, n]``.
      at: Which of its matrices.
    """

    stack: QTensor
    at: Array


@dataclasses.dataclass(frozen=True)
class Held:
    """A packed weight in the place of the dense array that a program has there.

    Attributes:
      weight: ``[*stack, k, n]``.
      stack: What the view's atoms call the axes of the stack, in their order.
      view: The dense array.
      path: Where the weight is in the model, for warnings.
      beside: What is added to whatever is made of the weight.
      origin: Where a weight that is one matrix lies in a stack, or None. Products read
        it there: XLA copies ``weight`` out of the stack only for what else reads it.
      factor: A number in float32 that all of the weight, with what is beside it, is
        multiplied by; or None.
    """

    weight: QTensor
    stack: tuple[int, ...]
    view: View
    path: str
    beside: tuple[Beside, ...] = ()
    origin: Origin | None = None
    factor: Array | None = None

    @property
    def arrays(self) -> Any:
        """The pytree of all that is held: its arrays have the stack's axes first."""
        return self.weight, self.beside

    def holding(self, arrays: Any, origin: Origin | None = None) -> "Held":
        """Holds other arrays, a tree as `arrays` is one, of another origin."""
        weight, beside = arrays
        return dataclasses.replace(self, weight=weight, beside=beside, origin=origin)

    def times(self, factor: Array) -> "Held":
        """The same weight, multiplied by a number."""
        factor = factor.astype(jnp.float32)
        if self.factor is not None:
            factor *= self.factor
        return dataclasses.replace(self, factor=factor)

    def add(self, y: Array, factored: Factored, *inputs: Array) -> Array:
        """Adds what is beside the weight to what it made, as `Beside.add` does.

        What is made of all is multiplied by the factor.
        """
        y = add(self.beside, y, factored, inputs, self.weight)
        if self.factor is None:
            return y
        # A reciprocal, say, that is rounded to 16 bits would be off for all of y.
        return (y.astype(jnp.float32) * self.factor).astype(y.dtype)

    def seen(self, view: View) -> "Held":
        """The same weight in another view."""
        return dataclasses.replace(self, view=view)

    def counts(self, atoms: Sequence[Atom]) -> int | None:
        """The axis of the stack that an axis of the view is, whole, or None."""
        if len(atoms) != 1 or atoms[0].side not in self.stack or atoms[0].stride != 1:
            return None
        axis = self.stack.index(atoms[0].side)
        return axis if self.weight.batch[axis] == atoms[0].size else None

    def side_of(self, atoms: Sequence[Atom]) -> str | None:
        """ROW or COLUMN, if all rows or all columns are what atoms are, or None."""
        for side, size in ((ROW, self.weight.k), (COLUMN, self.weight.n)):
            same = all(atom.side == side for atom in atoms)
            if same and math.prod(sizes(atoms)) == size:
                return side
        return None

    def restack(self, axis: int, index: Array) -> tuple["Held", tuple[int, ...]]:
        """Takes some matrices of the stack, which stay packed.

        Args:
          axis: The axis of the stack.
          index: Which matrices, along new axes of the stack; all exist.

        Returns:
          The weight with its old view, and what the new axes are called.
        """
        take = lambda leaf: jnp.take(leaf, index, axis=axis, mode="clip")  # noqa: E731
        names = tuple(max(self.stack) + 1 + i for i in range(index.ndim))
        stack = (*self.stack[:axis], *names, *self.stack[axis + 1 :])
        held = self.holding(jax.tree.map(take, self.arrays))
        return dataclasses.replace(held, stack=stack), names

    def one(self, axis: int, index: Array) -> "Held":
        """Takes one matrix of the stack, or one of each stack along other axes."""
        held, _ = self.restack(axis, index)
        if len(self.stack) > 1:
            return held
        return dataclasses.replace(held, origin=Origin(self.weight, index))


def dense(held: Held) -> Array:
    """Computes the dense array."""
    view, weight = held.view, held.weight
    dtype = None if view.dtype == weight.dtype else view.dtype
    packed = held.add(ops.dequantize(weight, dtype), _product)
    sides = (*held.stack, ROW, COLUMN)
    atoms = [atom for side in sides for atom in in_order(view.atoms, side)]
    order = [atoms.index(atom) for atom in view.atoms]
    return packed.reshape(sizes(atoms)).transpose(order).reshape(view.shape)


def dense_all(values: Sequence[Any], operation: str) -> list[Any]:
    """Makes all packed weights among some values dense, and warns of each.

    Args:
      values: What an operation takes, or a program returns.
      operation: Name of the operation.

    Returns:
      The values; those that are no packed weights as they are.
    """
    return [
        _dense_for(operation, value) if isinstance(value, Held) else value
        for value in values
    ]


def _dense_for(operation: str, held: Held) -> Array:
    warnings.warn(
        f"{held.path} is made dense for {operation!r}, which has no form for a packed "
        f"weight: {held.weight!r}.",
        stacklevel=3,
    )
    return dense(held)


def _product(
    a: Array,  # [*stack, k, rank]
    b: Array | None,  # [*stack, rank, n]
) -> Array:
    return a if b is None else jnp.matmul(a, b, precision="highest")


def gather(held: Held, index: Array, params: dict[str, Any]) -> Array | Held | None:
    """Computes a `jax.lax.gather` of whole slices along one axis.

    Columns are dequantized, as rows of a table of embeddings, and no others; matrices
    of a stack stay packed. Where an index is out of range, the slice is what ``params``
    say: that of the nearest index, or a number.
    """
    numbers, view = params["dimension_numbers"], held.view
    axes = numbers.start_index_map
    whole = [n if i not in axes else 1 for i, n in enumerate(view.shape)]
    if (
        len(axes) != 1
        or numbers.collapsed_slice_dims != axes
        or numbers.operand_batching_dims
        or list(params["slice_sizes"]) != whole
    ):
        return None
    (axis,) = axes
    index, exists = _in_range(index[..., 0], view.shape[axis])
    fill = None
    if params["mode"] == GatherScatterMode.FILL_OR_DROP:
        fill = exists, params["fill_value"]
    rank = index.ndim + len(view.dims) - 1
    others = [i for i in range(rank) if i not in numbers.offset_dims]
    if (place := held.counts(view.dims[axis])) is not None:
        where = others, numbers.offset_dims
        return _of_stack(held, place, index, axis, where, fill)
    rows = lookup(held, axis, index)
    if rows is None:
        return None
    if fill is not None:
        rows = _filled(rows, 0, *fill)
    parts = dict(zip((*others, *numbers.offset_dims), range(rank), strict=True))
    return rows.transpose([parts[i] for i in range(rank)])


def _in_range(index: Array, size: int) -> tuple[Array, Array]:
    """Returns the nearest indices that exist, and whether they are the same."""
    # Narrow integers may not hold the size.
    last = min(size - 1, jnp.iinfo(index.dtype).max)
    nearest = jnp.clip(index, 0, last)
    return nearest.astype(jnp.int32), nearest == index


def _filled(array: Array, axis: int, exists: Array, value: float | int) -> Array:
    """Fills the slices that do not exist, from an axis on."""
    exists = jnp.expand_dims(exists, range(exists.ndim, array.ndim - axis))
    return jnp.where(exists, array, jnp.asarray(value, array.dtype))


def lookup(held: Held, axis: int, index: Array) -> Array | None:
    """Dequantizes columns; returns ``[*index, *other axes]``."""
    view, weight = held.view, held.weight
    rest = view.pick(i for i in range(len(view.dims)) if i != axis)
    is_table = (
        held.side_of(view.dims[axis]) == COLUMN
        and list(view.dims[axis]) == in_order(view.dims[axis], COLUMN)
        and all(atom.side == ROW for atom in rest)
    )
    if not is_table or weight.batch:
        return None
    dtype = None if view.dtype == weight.dtype else view.dtype
    try:
        rows = embedding.lookup(weight, index, dtype)
    except NotImplementedError:
        return None
    rows = held.add(rows, embedding.factored, index)
    ordered = in_order(rest, ROW)
    rows = rows.reshape(*index.shape, *sizes(ordered))
    order = [index.ndim + ordered.index(atom) for atom in rest]
    rows = rows.transpose((*range(index.ndim), *order))
    shape = (n for i, n in enumerate(view.shape) if i != axis)
    return rows.reshape(*index.shape, *shape)


def _of_stack(
    held: Held,
    place: int,
    index: Array,
    axis: int,
    where: tuple[Sequence[int], Sequence[int]],
    fill: tuple[Array, float | int] | None,
) -> Held | None:
    """Matrices of a stack, by an array of indices."""
    if fill is None and not index.ndim:
        taken, names = held.one(place, index), ()
    else:
        taken, names = held.restack(place, index)
    if fill is not None:
        # Scales of NaN or 0 make all of a matrix so; no other number has such a scale.
        if fill[1] != 0 and not np.isnan(fill[1]):
            return None
        exists, value = fill
        weight = _with_scales(
            taken.weight, lambda leaf: _filled(leaf, place, exists, value)
        )
        # What is not there has no gradient, and no adapters.
        beside = jax.tree.map(
            lambda leaf: _filled(leaf, place, exists, 0), taken.beside
        )
        taken = taken.holding((weight, beside))
    new = [_axis(name, size) for name, size in zip(names, index.shape, strict=True)]
    rest = [dim for i, dim in enumerate(held.view.dims) if i != axis]
    placed = dict(zip((*where[0], *where[1]), (*new, *rest), strict=True))
    dims = tuple(placed[i] for i in range(len(placed)))
    return tidy(taken.seen(held.view._replace(dims=dims)))


def _with_scales(w: QTensor, change: Callable[[Array], Array]) -> QTensor:
    """A weight with other scales, and float zeros."""
    w = ops.decoded(w)
    new = {"scale": w.scale}
    if w.zero is not None and jnp.issubdtype(w.zero.dtype, jnp.floating):
        new["zero"] = w.zero
    return dataclasses.replace(w, **jax.tree.map(change, new))


def _axis(name: int, size: int) -> tuple[Atom, ...]:
    """An axis of a view that is a whole axis of the stack."""
    return (Atom(name, 1, size),) if size > 1 else ()


def cut(
    held: Held, starts: Sequence[Any], counts: Sequence[int]
) -> Array | Held | None:
    """Computes a `jax.lax.slice` or a `jax.lax.dynamic_slice`.

    Args:
      held: The weight.
      starts: Where each axis starts; arrays are clamped, as JAX does.
      counts: How much of each axis is taken.

    Returns:
      The part, packed; one row of a table of embeddings is dequantized.
    """
    part: Array | Held | None = held
    for axis, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if isinstance(part, Held) and count != part.view.shape[axis]:
            part = _cut(part, axis, start, count)
        elif not isinstance(part, Held) and part is not None:
            part = jax.lax.dynamic_slice_in_dim(part, start, count, axis)
    return part


def _cut(held: Held, axis: int, first: int | Array, count: int) -> Array | Held | None:
    """A part of one axis."""
    dims, most = held.view.dims, held.view.shape[axis] - count
    dim = dims[axis]
    start = jnp.clip(jnp.asarray(first), 0, most).astype(jnp.int32)
    steps = start + jnp.arange(count, dtype=jnp.int32)
    if (place := held.counts(dim)) is not None:
        if count == 1:
            return held.one(place, start).seen(_emptied(held.view, axis))
        taken, (name,) = held.restack(place, steps)
        dims = [_axis(name, count) if i == axis else d for i, d in enumerate(dims)]
        return tidy(taken.seen(held.view._replace(dims=tuple(dims))))
    if count == 1 and (rows := lookup(held, axis, steps)) is not None:
        return jnp.moveaxis(rows, 0, axis)
    if len(dim) != 1 or dim[0].side != COLUMN or not isinstance(first, int):
        return None
    return _columns(held, dim[0], first, count)


def _emptied(view: View, axis: int) -> View:
    """A view of which one axis has only one element."""
    dims = (() if i == axis else dim for i, dim in enumerate(view.dims))
    return view._replace(dims=tuple(dims))


def _columns(held: Held, atom: Atom, start: int, count: int) -> Held | None:
    """Some columns of every matrix, which stay packed."""
    weight = held.weight
    place = np.arange(weight.n) // atom.stride % atom.size
    index = np.flatnonzero((place >= start) & (place < start + count))

    def narrow(old: Atom) -> tuple[Atom, ...]:
        if old == atom:
            return (old._replace(size=count),) if count > 1 else ()
        further = old.side == COLUMN and old.stride > atom.stride
        stride = old.stride // atom.size * count if further else old.stride
        return (old._replace(stride=stride),)

    take = functools.partial(embedding.columns, index=jnp.asarray(index, jnp.int32))
    for _ in weight.batch:
        take = jax.vmap(take)
    try:
        taken = take(weight)
    except NotImplementedError:
        return None
    beside = tuple(one.columns(jnp.asarray(index, jnp.int32)) for one in held.beside)
    dims = tuple(tuple(a for b in dim for a in narrow(b)) for dim in held.view.dims)
    return held.holding((taken, beside)).seen(held.view._replace(dims=dims))


def tidy(held: Held) -> Held:
    """Drops axes of the stack of size 1 that are no axis of the view any more."""
    names = {atom.side for atom in held.view.atoms}
    for axis, name in reversed(list(enumerate(held.stack))):
        if name not in names:
            assert held.weight.batch[axis] == 1
            held, _ = held.restack(axis, jnp.zeros((), jnp.int32))
    return held


class Steps(NamedTuple):
    """A weight whose first axis a scan goes over.

    Attributes:
      held: The weight as each step sees it, but with the arrays of no step.
      arrays: The arrays to scan.
      stack: What products read in place of the arrays, if each step has one matrix.
    """

    held: Held
    arrays: Any
    stack: QTensor | None

    def step(self, arrays: Any, index: Array) -> Held:
        """The weight as the step of that index sees it, whose arrays these are."""
        origin = None if self.stack is None else Origin(self.stack, index)
        return tidy(self.held.holding(arrays, origin))


def steps(held: Held) -> Steps | None:
    """Readies a weight for a `jax.lax.scan` over its first axis.

    Returns:
      The steps; None if the first axis is not one of the stack.
    """
    dims, stack = held.view.dims, held.stack
    place = held.counts(dims[0])
    if place is None and dims[0]:
        return None
    if place is None:
        leaves = jax.tree.map(lambda leaf: leaf[None], held.arrays)
    else:
        leaves = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, place, 0), held.arrays)
        stack = (*stack[:place], *stack[place + 1 :])
    view = held.view._replace(dims=dims[1:])
    single = place is not None and not stack
    return Steps(
        dataclasses.replace(held, stack=stack, view=view),
        leaves,
        held.weight if single else None,
    )
