"""The products behind `qjax.matmul`: every implementation, and the one gradient."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from qjax import moving, pallas, sharding, tensor, xla
from qjax.formats.tiles import Tiles
from qjax.partitioning import explicitly_like, over_devices
from qjax.sharding import P, Segmented
from qjax.tensor import QTensor

# Every implementation of the three products that `matmul` and its gradient need. One
# raises `NotImplementedError` to decline its operands; other errors are the caller's.
# Those of the GPU take the index of a matrix in a stack, too.
_Table = Mapping[str, Callable[..., Any]]
IMPLEMENTATIONS: Mapping[str, _Table] = {
    # x [m, k], w -> x @ W; those of the GPU in a dtype, rounded once
    "matmul": {
        "pallas": pallas.fused,
        "pallas_bf16": pallas.fused_bf16,
        "pallas_dense": pallas.dense,
        "xla_fused": xla.fused,
        "xla_tiled": xla.tiled,
        "xla_dense": xla.dense,
        "xla_int8": xla.int8,
    },
    # dy [m, n], w -> dy @ W.T
    "matmul_t": {
        "pallas": pallas.fused_t,
        "pallas_dense": pallas.dense_t,
        "xla_tiled": xla.tiled_t,
        "xla_dense": xla.dense_t,
    },
    # x [m, k], dy [m, n], w -> gradients of the float leaves of w, by name
    "leaf_grad": {
        "pallas": pallas.fused_grad,
        "xla_grouped": xla.grouped_grad,
        "xla_tiled": xla.tiled_grad,
        "xla_dense": xla.dense_grad,
    },
}

ON_GPU = ("pallas", "pallas_bf16", "pallas_dense")
# Up to this many rows the products of XLA's forms stay in registers (`xla.fused`).
_FUSED_ROWS = 3
# A weight of at most 4 MiB in float32 is formed: it stays in the cache, and one product
# costs less than a loop over tiles.
_SMALL = 1024 * 1024


class Choice(NamedTuple):
    """What the caller's operands allow.

    Attributes:
      implementation: The one that the caller named, or None.
      kernels: Whether the activations have 16 bits, which the GPU kernels keep exactly.
      dtype: Of the product. float32 is what it is computed in.
    """

    implementation: str | None
    kernels: bool
    dtype: Any = jnp.float32

    @property
    def wide(self) -> "Choice":
        """The same with a product that is not rounded."""
        return self._replace(dtype=jnp.float32)


def _xla_order(op: str, m: int, w: QTensor) -> tuple[str, ...]:
    """Names of XLA's forms to try, best first."""
    if op == "matmul" and not is_symbolic_dim(m) and m <= _FUSED_ROWS:
        return ("xla_fused", "xla_tiled", "xla_dense")
    if w.k * w.n <= _SMALL:
        return ("xla_dense",)
    if op == "leaf_grad":
        return ("xla_grouped", "xla_tiled", "xla_dense")
    return ("xla_tiled", "xla_dense")


def _gpu_order(op: str, m: int, w: QTensor) -> tuple[str, ...]:
    """Names of the GPU's implementations to try, best first."""
    if op == "leaf_grad":
        return ("pallas",)
    if is_symbolic_dim(m):  # A kernel is launched for a number of rows.
        return ("pallas_dense",)
    if m < pallas.dense_rows(op, w):
        return ("pallas", "pallas_dense")
    return ("pallas_dense", "pallas")


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
    leaves = {name: getattr(w, name) for name in float_leaves(w)}
    of_leaves = {name: getattr(of_w, name) for name in leaves}
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
    y = multiply(choice, w, _in_order(x, order, index), index)
    return y.reshape(*x.shape[:-1], w.n)


def _product_t(
    choice: Choice, k: int, w: QTensor, dy: Array, index: Array | None
) -> Array:
    w, order = stored(w)
    dx = multiply_t(choice, w, dy.reshape(-1, dy.shape[-1]), index)
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
    gradients = leaf_gradients(choice, whole, x, dy, index)
    return {name: as_in(w, name, array) for name, array in gradients.items()}


def as_in(w: QTensor, name: str, array: Array) -> Any:
    """Cuts a gradient into segments, where the leaf is."""
    leaf = getattr(w, name)
    if not isinstance(leaf, Segmented):
        return array
    ends = list(itertools.accumulate(p.shape[leaf.axis] for p in leaf.parts))[:-1]
    return Segmented(tuple(jnp.split(array, ends, axis=leaf.axis)), leaf.axis)


def multiply(
    choice: Choice, w: QTensor, x: Float[Array, "m k"], index: Array | None
) -> Float[Array, "m n"]:
    """``x @ W`` of rows in stored order, on one device.

    Args:
      choice: As in `product`.
      w: What `stored` returns.
      x: Rows.
      index: Which matrix of a stack.

    Returns:
      Product in ``choice.dtype``.
    """
    if len(w.segments) == 1:
        return _run("matmul", choice, x, w, index)

    def by_parts(x: Array, w: QTensor, index: Array | None) -> Array:
        products = (
            _run("matmul", choice.wide, xs, part, index) for xs, part in _parts(x, w)
        )
        return functools.reduce(jnp.add, products).astype(choice.dtype)

    # The fused kernel multiplies all segments in one launch.
    if choice.implementation in ("pallas", "pallas_bf16"):
        fused = IMPLEMENTATIONS["matmul"][choice.implementation]
        return fused(x, w, index, dtype=choice.dtype)
    if goes_to_kernels(w, choice) and _gpu_order("matmul", len(x), w)[0] == "pallas":
        fused = functools.partial(pallas.fused, dtype=choice.dtype)
        return jax.lax.platform_dependent(x, w, index, cuda=fused, default=by_parts)
    return by_parts(x, w, index)


def multiply_t(
    choice: Choice, w: QTensor, dy: Float[Array, "m n"], index: Array | None
) -> Float[Array, "m k"]:
    """The cotangent of the rows that `multiply` took.

    Args:
      choice: As in `product`.
      w: As in `multiply`.
      dy: Cotangent of the product.
      index: As in `multiply`.

    Returns:
      float32 cotangent.
    """
    choice = choice._replace(implementation=None)  # Named for the forward product.
    parts = [_run("matmul_t", choice, dy, part, index) for part in tensor.split(w)]
    return jnp.concatenate(parts, axis=1)


def leaf_gradients(
    choice: Choice,
    w: QTensor,
    x: Float[Array, "m k"],
    dy: Float[Array, "m n"],
    index: Array | None,
) -> dict[str, Array]:
    """The cotangents of the float leaves of the one matrix that `multiply` took.

    Args:
      choice: As in `product`.
      w: As in `multiply`.
      x: As in `multiply`.
      dy: Cotangent of the product.
      index: As in `multiply`.

    Returns:
      float32 ``scale``, and ``zero`` and ``codebook`` where they are float.
    """
    choice = choice._replace(implementation=None)
    gradients = [
        _run("leaf_grad", choice, xs, dy, part, index) for xs, part in _parts(x, w)
    ]
    return {
        name: functools.reduce(jnp.add, group)
        if name == "codebook" or w.row_group is not None
        else jnp.concatenate(group)
        for name in gradients[0]
        for group in [[gradient[name] for gradient in gradients]]
    }


def cotangent(w: QTensor, gradients: Mapping[str, Any]) -> QTensor:
    """Returns a cotangent of a weight: float0 for all leaves that are not given."""
    dw = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), w)
    return dataclasses.replace(dw, **gradients)


def float_leaves(w: QTensor) -> list[str]:
    """Names of the leaves of ``w`` that the products have gradients for."""
    return [
        name
        for name in ("scale", "zero", "codebook")
        if (leaf := getattr(w, name)) is not None
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def _parts(x: Array, w: QTensor) -> Iterator[tuple[Array, QTensor]]:
    """Pairs every segment with its columns of x."""
    ends = itertools.accumulate(w.rows)
    for end, rows, part in zip(ends, w.rows, tensor.split(w), strict=True):
        yield x[:, end - rows : end], part


def _run(op: str, choice: Choice, *operands: Any) -> Any:
    """Runs the named implementation, or the first that does not decline.

    The operands are rows, the weight, and the index of one in a stack, or None.
    """
    *rows, w, index = operands
    name, m = choice.implementation, rows[0].shape[0]
    # Other results than products stay as they are.
    rounded = {"dtype": choice.dtype} if op == "matmul" else {}

    def as_chosen(found: Any) -> Any:
        return found.astype(choice.dtype) if op == "matmul" else found

    if name in ON_GPU:
        return IMPLEMENTATIONS[op][name](*operands, **rounded)
    if name is not None:
        wide = [row.astype(jnp.float32) for row in rows]
        found = IMPLEMENTATIONS[op][name](*wide, pallas.one_of(w, index))
        return as_chosen(found)

    def on_gpu(*operands: Any) -> Any:
        return _first(op, _gpu_order(op, m, w), operands, **rounded)

    def elsewhere(*operands: Any) -> Any:
        *rows, w, index = operands
        native = moving.in_layout(pallas.one_of(w, index), xla.NATIVE)
        wide = [row.astype(jnp.float32) for row in rows]
        return as_chosen(_first(op, _xla_order(op, m, native), (*wide, native)))

    # What the entries of a codebook are worth is summed by XLA, and what comes from any
    # number of rows.
    by_xla = op == "leaf_grad" and (w.codebook is not None or is_symbolic_dim(m))
    if by_xla or not goes_to_kernels(w, choice):
        return elsewhere(*operands)
    # The platform is known when the program is lowered, not here.
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=elsewhere)


def _first(
    op: str, names: tuple[str, ...], operands: tuple[Any, ...], **rounded: Any
) -> Any:
    reasons = []
    for name in names:
        try:
            return IMPLEMENTATIONS[op][name](*operands, **rounded)
        except NotImplementedError as error:
            reasons.append(error)
    raise ExceptionGroup(f"no implementation of {op} takes {operands[-1]!r}", reasons)


def goes_to_kernels(w: QTensor, choice: Choice) -> bool:
    """Whether a kernel takes the product where there is a GPU."""
    named = choice.implementation is not None
    if w.layout != pallas.layout_of(w) or not choice.kernels or named:
        return False
    return kernels_read(w)


def kernels_read(w: QTensor) -> bool:
    """Whether the GPU kernels would take the weight, in the layout that they read."""
    try:
        pallas.check(w)
    except NotImplementedError:
        return False
    return True


def native(w: QTensor, index: Array | None) -> tuple[QTensor, Array | None]:
    """Takes the one matrix of a stack, unless the kernels read it where it lies.

    Args:
      w: ``[k, n]``, or with ``index`` a stack.
      index: Which matrix, or None.

    Returns:
      The stack and the index as they are, or the matrix in XLA's layout and None.
    """
    if isinstance(w.layout, Tiles):
        return w, index
    return moving.in_layout(pallas.one_of(w, index), xla.NATIVE), None
