"""Products on one device: every implementation, and which one is taken."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from qjax import moving, pallas, tensor, xla
from qjax.formats.tiles import Tiles
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
        "xla_float8": xla.float8,
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
# What reads the words of any layout; XLA's other forms read their own.
_ANY_LAYOUT = ("xla_dense", "xla_float8")
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


def _xla_order(op: str, m: Any, w: QTensor) -> tuple[str, ...]:
    """Names of XLA's forms to try, best first; `jax.export` may leave m open."""
    if op == "matmul" and not is_symbolic_dim(m) and m <= _FUSED_ROWS:
        return ("xla_fused", "xla_tiled", "xla_dense")
    if w.k * w.n <= _SMALL:
        return ("xla_dense",)
    if op == "leaf_grad":
        return ("xla_grouped", "xla_tiled", "xla_dense")
    return ("xla_tiled", "xla_dense")


def _gpu_order(op: str, m: Any, w: QTensor) -> tuple[str, ...]:
    """Names of the GPU's implementations to try, best first, likewise."""
    if op == "leaf_grad":
        return ("pallas",)
    if is_symbolic_dim(m):  # A kernel is launched for a number of rows.
        return ("pallas_dense",)
    if m < pallas.dense_rows(op, w):
        return ("pallas", "pallas_dense")
    return ("pallas_dense", "pallas")


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
        return by_device(fused, by_parts, x, w, index)
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
    parts = [_run("matmul_t", choice, dy, part, index) for part in _segments(w)]
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


def _segments(w: QTensor) -> list[QTensor]:
    # One that is alone is not cut, and not decoded: a kernel may read it as it is.
    return tensor.split(w) if len(w.segments) > 1 else [w]


def _parts(x: Array, w: QTensor) -> Iterator[tuple[Array, QTensor]]:
    """Pairs every segment with its columns of x."""
    ends = itertools.accumulate(w.rows)
    for end, rows, part in zip(ends, w.rows, _segments(w), strict=True):
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
        one = _plain(w, index)
        if name not in _ANY_LAYOUT:
            one = moving.in_layout(one, xla.NATIVE)
        return as_chosen(IMPLEMENTATIONS[op][name](*wide, one))

    def on_gpu(*operands: Any) -> Any:
        return _first(op, _gpu_order(op, m, w), operands, **rounded)

    def elsewhere(*operands: Any) -> Any:
        *rows, w, index = operands
        native = moving.in_layout(_plain(w, index), xla.NATIVE)
        wide = [row.astype(jnp.float32) for row in rows]
        return as_chosen(_first(op, _xla_order(op, m, native), (*wide, native)))

    # What the entries of a codebook are worth is summed by XLA, and what comes from any
    # number of rows.
    by_xla = op == "leaf_grad" and (w.codebook is not None or is_symbolic_dim(m))
    if by_xla or not goes_to_kernels(w, choice):
        return elsewhere(*operands)
    return by_device(on_gpu, elsewhere, *operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def by_device(
    on_gpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any
) -> Any:
    """Calls one of two functions that are equal: kernels have no derivative.

    Args:
      on_gpu: Launches them.
      elsewhere: What computes the same anywhere else, and its derivative everywhere.
      *operands: Trees of arrays.

    Returns:
      What they return.
    """
    # The platform is known when the program is lowered, not here.
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=elsewhere)


@by_device.defjvp
def _(
    on_gpu: Callable[..., Any],
    elsewhere: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Any, Any]:
    # Where `product` and its gradient are differentiated once more.
    found = by_device(on_gpu, elsewhere, *primals)
    return found, jax.jvp(elsewhere, primals, tangents)[1]


def _plain(w: QTensor, index: Array | None) -> QTensor:
    """The one matrix, as XLA's forms take it."""
    return tensor.decoded(pallas.one_of(w, index))


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
