"""`product`: ``x @ W`` and the one gradient of it, each device on its pieces."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Int32

from qjax import dispatch, pallas, sharding, tensor
from qjax.dispatch import Choice
from qjax.meshes import explicitly_like
from qjax.partitioning import over_devices
from qjax.sharding import P, Segmented
from qjax.tensor import Levels, QTensor

_Tree = TypeVar("_Tree")


# With W[k, n] = f(q[k, n], s, z) and g the cotangent of y = x W:
#   dx = g W^T,   dW = x^T g,   ds = sum over its group of dW * df/ds, and so for z.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: Array, w: QTensor, index: Array | None, choice: Choice) -> Array:
    """``x @ W``, differentiable, each device on its pieces.

    Args:
      x: ``[..., k]``.
      w: A matrix, or with ``index`` a stack, without an input scale.
      index: Which matrix of a stack.
      choice: What the caller's operands allow.

    Returns:
      ``[..., n]``.
    """
    named, units = _names(x, w, index)
    count = math.prod(w.batch)
    return over_devices(
        functools.partial(_product, choice, count),
        (w, x, _Place.of(index, count)),
        named,
        _of_result(x),
        units,
        summand=functools.partial(_product, choice.wide, count),
    )


def _forward(x: Array, w: QTensor, index: Array | None, choice: Choice) -> tuple:
    return product(x, w, index, choice), (x, w, index)


def _backward(
    choice: Choice, residuals: tuple[Array, QTensor, Array | None], dy: Array
) -> tuple[Array, QTensor, np.ndarray | None]:
    x, w, index = residuals
    # Where many rows have the weight formed, it is formed again: XLA would keep that of
    # the forward pass, and of every layer of a model.
    w, dy = jax.lax.optimization_barrier((w, dy.astype(jnp.float32)))
    (of_w, of_x, of_place), units = _names(x, w, index)
    of_dy = _of_result(x)
    count = math.prod(w.batch)
    place = _Place.of(index, count)
    names = float_leaves(w)
    dx = over_devices(
        functools.partial(_product_t, choice, count, x.shape[-1]),
        (w, dy, place),
        (of_w, of_dy, of_place),
        of_x,
        units,
        reverse=True,
    )
    gradients = over_devices(
        functools.partial(_leaf_gradients, choice, count),
        (w, x, dy, place),
        (of_w, of_x, of_dy, of_place),
        float_arrays(of_w, names),
        units,
        reverse=True,
    )
    leaves = float_arrays(w, names)
    dx, gradients = explicitly_like((dx, gradients), (x, leaves))
    cast = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, leaves)
    of_index = None if index is None else np.zeros((), jax.dtypes.float0)
    return dx.astype(x.dtype), cotangent(w, cast), of_index


product.defvjp(_forward, _backward)


class _Place(NamedTuple):
    """Which matrix of a stack is multiplied.

    Attributes:
      number: Its number in the whole stack.
      numbers: Those of the matrices that a device holds.
    """

    number: Int32[Array, ""]
    numbers: Int32[Array, " held"]

    @classmethod
    def of(cls, index: Array | None, count: int) -> "_Place | None":
        """The place in a stack of ``count`` that is whole."""
        return None if index is None else cls(index, numbers(count))


def numbers(count: int) -> Int32[Array, " count"]:
    """The numbers of the matrices of a stack."""
    # No operation but a constant: JAX would move that out of a scan, and in the
    # derivative of a derivative take one operand for another.
    return jnp.asarray(np.arange(count, dtype=np.int32))


def _names(
    x: Array, w: QTensor, index: Array | None
) -> tuple[tuple[Any, Any, Any], dict[str, int]]:
    """What `over_devices` must know of the operands ``(w, x, place)``."""
    rows = {f"m{i}": size for i, size in enumerate(x.shape[:-1])}
    # What `jax.export` leaves open is not cut.
    known = {name: size for name, size in rows.items() if not is_symbolic_dim(size)}
    of_x = P(*_of_result(x)[:-1], inputs_of(w))
    of_place = None if index is None else (P(), P("b0"))
    return (sharding.names(w), of_x, of_place), sharding.units(w) | known


def _of_result(x: Array) -> P:
    """Names of the axes of ``x @ W``."""
    return P(*[f"m{i}" for i in range(x.ndim - 1)], "n")


def inputs_of(w: QTensor) -> str | None:
    """What `over_devices` must call the axis of the inputs of a weight."""
    # Where rows have an order, those of a device belong to inputs anywhere.
    return "k0" if w.order is None and len(w.segments) == 1 else None


def stored(w: QTensor) -> tuple[QTensor, Array | None]:
    """Takes the order of the rows off a weight, and joins its segments on a device.

    Args:
      w: A matrix, or a stack, without an input scale.

    Returns:
      What `multiply` takes, and the order.
    """
    w = sharding.joined(w)
    # A device may hold less of a column than the one group that spans it.
    segments = tuple(
        segment._replace(group_size=None) if groups == 1 else segment
        for segment, groups in zip(w.segments, tensor.group_counts(w), strict=True)
    )
    return dataclasses.replace(w, order=None, segments=segments), w.order


def _in_order(x: Array, order: Array | None) -> Array:
    """Makes rows of inputs, in the order in which the weight is stored."""
    x = x.reshape(-1, x.shape[-1])
    return x if order is None else jnp.take(x, order, axis=1, unique_indices=True)


class _Matrix(NamedTuple):
    """What a device multiplies by.

    Attributes:
      w: A matrix, or with ``at`` a stack.
      order: That of its rows.
      at: Which of the stack.
      entry: Which it is of the stack that the device was given.
      is_asked: Whether it is the one that is asked for. Where another device holds that
        one, it is any: to multiply by it takes no longer than to wait for that device.
        None where each device holds all of the stack.
    """

    w: QTensor
    order: Array | None
    at: Array | None = None
    entry: Array | None = None
    is_asked: Array | None = None

    @classmethod
    def of(cls, w: QTensor, place: _Place | None, count: int) -> "_Matrix":
        """The matrix of a device that has ``w``, of a stack of ``count``."""
        w, order = stored(w)
        if place is None:
            return cls(w, order)
        entry, is_asked = place.number, None
        if (held := len(place.numbers)) < count:
            wanted = place.number - place.numbers[0]
            entry = jnp.clip(wanted, 0, held - 1)
            is_asked = entry == wanted
        one, at = dispatch.native(w, entry)
        return cls(one, pallas.one_of(order, entry), at, entry, is_asked)

    def only(self, tree: _Tree) -> _Tree:
        """What comes of the matrix that is asked for; of any other, zeros."""
        if (is_asked := self.is_asked) is None:
            return tree
        return jax.tree.map(lambda leaf: jnp.where(is_asked, leaf, 0), tree)


def _product(
    choice: Choice, count: int, w: QTensor, x: Array, place: _Place | None
) -> Array:
    matrix = _Matrix.of(w, place, count)
    rows = _in_order(x, matrix.order)
    y = matrix.only(dispatch.multiply(choice, matrix.w, rows, matrix.at))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product_t(
    choice: Choice, count: int, k: int, w: QTensor, dy: Array, place: _Place | None
) -> Array:
    matrix = _Matrix.of(w, place, count)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = matrix.only(dispatch.multiply_t(choice, matrix.w, rows, matrix.at))
    if matrix.order is None:
        return dx.reshape(*dy.shape[:-1], dx.shape[-1])
    # Of a device's own rows; the others' inputs get nothing here.
    empty = jnp.zeros_like(dx, shape=(len(dx), k))
    spread = empty.at[:, matrix.order].set(dx, unique_indices=True)
    return spread.reshape(*dy.shape[:-1], k)


def _leaf_gradients(
    choice: Choice,
    count: int,
    w: QTensor,
    x: Array,
    dy: Array,
    place: _Place | None,
) -> dict[str, Any]:
    matrix = _Matrix.of(w, place, count)
    x, dy = _in_order(x, matrix.order), dy.reshape(-1, dy.shape[-1])
    gradients = dispatch.leaf_gradients(choice, matrix.w, x, dy, matrix.at)
    one = pallas.one_of(w, matrix.entry)
    gradients = {name: as_in(one, name, array) for name, array in gradients.items()}
    if matrix.entry is None:
        return gradients

    def spread(leaf: Array) -> Array:
        return jnp.zeros((*w.batch, *leaf.shape), leaf.dtype).at[matrix.entry].set(leaf)

    return jax.tree.map(spread, matrix.only(gradients))


def as_in(w: QTensor, name: str, array: Array) -> Any:
    """Takes a gradient of a plain leaf to that of the float arrays of the leaf."""
    leaf = getattr(w, name)
    if isinstance(leaf, Levels):
        return leaf.gradient(array)
    if not isinstance(leaf, Segmented):
        return array
    ends = list(itertools.accumulate(p.shape[leaf.axis] for p in leaf.parts))[:-1]
    return Segmented(tuple(jnp.split(array, ends, axis=leaf.axis)), leaf.axis)


def cotangent(w: QTensor, gradients: Mapping[str, Any]) -> QTensor:
    """Returns a cotangent of a weight: float0 for all leaves that are not given."""
    dw = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), w)
    return tensor.replace_floats(dw, gradients)


def float_leaves(w: QTensor) -> list[str]:
    """Names of the leaves of ``w`` that the products have gradients for."""
    return [
        name
        for name in ("scale", "zero", "codebook")
        if (leaf := getattr(w, name)) is not None
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def float_arrays(w: Any, names: Iterable[str]) -> dict[str, Any]:
    """What gradients of these leaves are of: the leaf, or its floats."""
    return {name: tensor.floats_of(getattr(w, name)) for name in names}
