"""`product`: ``x @ W`` and the one gradient of it, each device on its pieces."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array

from qjax import dispatch, pallas, sharding, tensor
from qjax.dispatch import Choice
from qjax.meshes import explicitly_like
from qjax.partitioning import over_devices
from qjax.sharding import P, Segmented
from qjax.tensor import Levels, QTensor


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
    return over_devices(
        functools.partial(_product, choice),
        (w, x, index),
        named,
        _of_result(x),
        units,
        summand=functools.partial(_product, choice.wide),
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
    (of_w, of_x, of_index), units = _names(x, w, index)
    of_dy = _of_result(x)
    names = float_leaves(w)
    leaves, of_leaves = float_arrays(w, names), float_arrays(of_w, names)
    if index is not None:  # The gradients are those of one matrix.
        of_leaves = jax.tree.map(lambda spec: P(*spec[1:]), of_leaves)
    dx = over_devices(
        functools.partial(_product_t, choice, x.shape[-1]),
        (w, dy, index),
        (of_w, of_dy, of_index),
        of_x,
        units,
    )
    gradients = over_devices(
        functools.partial(_leaf_gradients, choice),
        (w, x, dy, index),
        (of_w, of_x, of_dy, of_index),
        of_leaves,
        units,
    )
    like = x, pallas.one_of(leaves, index)
    dx, gradients = explicitly_like((dx, gradients), like)
    dx = dx.astype(x.dtype)
    cast = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, leaves)
    if index is None:
        return dx, cotangent(w, cast), None
    spread = jax.tree.map(
        lambda leaf, gradient: jnp.zeros_like(leaf).at[index].set(gradient),
        leaves,
        cast,
    )
    return dx, cotangent(w, spread), np.zeros((), jax.dtypes.float0)


product.defvjp(_forward, _backward)


def _names(
    x: Array, w: QTensor, index: Array | None
) -> tuple[tuple[Any, Any, Any], dict[str, int]]:
    """What `over_devices` must know of the operands ``(w, x, index)``."""
    rows = {f"m{i}": size for i, size in enumerate(x.shape[:-1])}
    # What `jax.export` leaves open is not cut.
    known = {name: size for name, size in rows.items() if not is_symbolic_dim(size)}
    units = units_of(w) | known
    of_x = P(*_of_result(x)[:-1], inputs_of(w))
    return (sharding.names(w), of_x, None if index is None else P()), units


def _of_result(x: Array) -> P:
    """Names of the axes of ``x @ W``."""
    return P(*[f"m{i}" for i in range(x.ndim - 1)], "n")


def units_of(w: QTensor) -> dict[str, int]:
    """The `sharding.units` of a weight of which one matrix is read at a time."""
    # A stack is one operand: it is cut within matrices.
    return sharding.units(w) | {f"b{i}": 1 for i in range(len(w.batch))}


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


def _in_order(x: Array, order: Array | None, index: Array | None) -> Array:
    """Makes rows of inputs, in the order in which the weight is stored."""
    x, order = x.reshape(-1, x.shape[-1]), pallas.one_of(order, index)
    return x if order is None else jnp.take(x, order, axis=1, unique_indices=True)


def _product(choice: Choice, w: QTensor, x: Array, index: Array | None) -> Array:
    w, order = stored(w)
    y = dispatch.multiply(choice, w, _in_order(x, order, index), index)
    return y.reshape(*x.shape[:-1], w.n)


def _product_t(
    choice: Choice, k: int, w: QTensor, dy: Array, index: Array | None
) -> Array:
    w, order = stored(w)
    dx = dispatch.multiply_t(choice, w, dy.reshape(-1, dy.shape[-1]), index)
    if order is None:
        return dx.reshape(*dy.shape[:-1], dx.shape[-1])
    # Of a device's own rows; the others' inputs get nothing here.
    empty = jnp.zeros_like(dx, shape=(len(dx), k))
    spread = empty.at[:, pallas.one_of(order, index)].set(dx, unique_indices=True)
    return spread.reshape(*dy.shape[:-1], k)


def _leaf_gradients(
    choice: Choice, w: QTensor, x: Array, dy: Array, index: Array | None
) -> dict[str, Any]:
    whole, order = stored(w)
    x, dy = _in_order(x, order, index), dy.reshape(-1, dy.shape[-1])
    gradients = dispatch.leaf_gradients(choice, whole, x, dy, index)
    one = pallas.one_of(w, index)
    return {name: as_in(one, name, array) for name, array in gradients.items()}


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
