"""Runs foreign code on packed weights: its jaxpr, with `qjax.matmul` for its products.

The code is traced with its weights as ordinary dense tracers, so that whatever it does
with them works; nothing of JAX or of the code is patched. The program that comes of it
is then run with the packed weights in their place.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from qjax.layers.beside import Beside, apart
from qjax.layers.tracing import held as packed
from qjax.layers.tracing.convolutions import convolve
from qjax.layers.tracing.held import Held, dense_all
from qjax.layers.tracing.products import product, ragged_product
from qjax.layers.tracing.programs import PROGRAMS, Value
from qjax.layers.tracing.shards import resharded
from qjax.layers.tracing.views import Form, follow, is_memory
from qjax.tensor import QTensor


def hold(
    weight: QTensor,
    form: Form,
    dtype: Any,
    path: str,
    beside: tuple[Beside, ...] = (),
) -> Held:
    """Puts a packed weight in the place of a dense one.

    Args:
      weight: ``[*outer, *stack, k, n]``, which may be `Accompanied`.
      form: How the dense weight is flattened.
      dtype: Dtype of the dense weight.
      path: Where it is, for warnings.
      beside: What else is beside it.

    Returns:
      What `call` takes.
    """
    weight, brought = apart(weight)
    view, stack = form.view(weight.batch, dtype), tuple(range(len(weight.batch)))
    return packed.tidy(Held(weight, stack, view, path, (*brought, *beside)))


def call(function: Callable[..., Any], weights: Mapping[str, Held]) -> Any:
    """Calls a function of dense weights on packed ones.

    Args:
      function: Takes the weights as keywords. Everything else it may close over.
      weights: The packed weights.

    Returns:
      What the function returns; leaves that are no arrays as they are.

    Warns:
      UserWarning: Where a weight is made dense, naming its path and the operation.
    """
    others: list[Any] = []

    def arrays(weights: dict[str, Array]) -> list[Array]:
        leaves, tree = jax.tree.flatten(function(**weights))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        rest = [None if a else leaf for a, leaf in zip(is_array, leaves, strict=True)]
        others[:] = [tree, is_array, rest]
        return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a]

    shapes = {
        name: jax.ShapeDtypeStruct(held.view.shape, held.view.dtype)
        for name, held in weights.items()
    }
    closed = jax.make_jaxpr(arrays)(shapes)
    # The leaves of a dictionary are sorted by name, in jaxprs as everywhere.
    given = [weights[name] for name in sorted(weights)]
    results = iter(dense_all(_run(closed.jaxpr, closed.consts, given), "return"))
    tree, is_array, rest = others
    leaves = [
        next(results) if a else leaf for a, leaf in zip(is_array, rest, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _run(
    jaxpr: jex.Jaxpr, consts: Sequence[Any], values: Sequence[Value]
) -> list[Value]:
    """Runs a program; what stays a view of a packed weight is returned as one."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    kept = {*_variables(jaxpr.outvars)}

    def read(variable: Any) -> Value:
        return variable.val if isinstance(variable, jex.Literal) else known[variable]

    for i, eqn in enumerate(jaxpr.eqns):
        with eqn.ctx.manager:
            results = _apply(eqn, [read(variable) for variable in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
        # Without this, an eager caller would hold every intermediate array to the end.
        for variable in {*_variables(eqn.invars)} - kept:
            if last[variable] == i:
                known.pop(variable, None)
    return [read(variable) for variable in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _apply(eqn: jex.JaxprEqn, values: list[Value]) -> Sequence[Value]:
    """Applies one operation, to packed weights where it can."""
    name = eqn.primitive.name
    if any(isinstance(value, Held) for value in values):
        results = _packed(eqn, values)
        if results is not None:
            return results
    arrays = dense_all(values, name)
    results = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
    return [*results] if eqn.primitive.multiple_results else [results]


def _packed(eqn: jex.JaxprEqn, values: list[Value]) -> Sequence[Value] | None:
    """Applies an operation to packed weights, or declines."""
    name = eqn.primitive.name
    if name in PROGRAMS:
        return PROGRAMS[name](eqn, values, _run)
    if name in _WHOLE:
        return _WHOLE[name](eqn, values)
    result = None
    if name in _OPERATIONS:
        result = _OPERATIONS[name](eqn.params, values)
    elif isinstance(one := values[0], Held) and len(values) == 1:
        view = follow(name, eqn.params, one.view)
        result = None if view is None else packed.tidy(one.seen(view))
    return None if result is None else [result]


def _dot_general(params: dict[str, Any], values: list[Value]) -> Array | None:
    a, b = values
    if isinstance(a, Held) == isinstance(b, Held):
        return None
    held, x = (b, a) if isinstance(b, Held) else (a, b)
    assert isinstance(held, Held)
    assert not isinstance(x, Held)
    dtype = params["preferred_element_type"] or x.dtype
    numbers = params["dimension_numbers"]
    y = product(held, jnp.asarray(x), numbers, x_first=x is a, dtype=dtype)
    sharding = params["out_sharding"]
    return y if y is None or sharding is None else jax.sharding.reshard(y, sharding)


def _ragged_dot(params: dict[str, Any], values: list[Value]) -> Array | None:
    x, held, sizes = values[:3]
    others = (params["group_offset"], params.get("out_sharding"))
    if not isinstance(held, Held) or isinstance(x, Held) or others != (None, None):
        return None
    return ragged_product(
        held,
        jnp.asarray(x),
        jnp.asarray(sizes),
        params["ragged_dot_dimension_numbers"],
        dtype=params["preferred_element_type"] or x.dtype,
    )


def _convolution(params: dict[str, Any], values: list[Value]) -> Array | None:
    x, held = values
    if not isinstance(held, Held) or isinstance(x, Held):
        return None
    return convolve(jnp.asarray(x), held, params)


def _scaled(params: dict[str, Any], values: list[Value]) -> Held | None:
    """All of a weight times a number."""
    del params
    a, b = values
    held, factor = (a, b) if isinstance(a, Held) else (b, a)
    if not isinstance(held, Held) or isinstance(factor, Held) or jnp.ndim(factor):
        return None
    return held.times(jnp.asarray(factor))


def _divided(params: dict[str, Any], values: list[Value]) -> Held | None:
    """All of a weight divided by a number."""
    del params
    held, divisor = values
    if not isinstance(held, Held) or isinstance(divisor, Held) or jnp.ndim(divisor):
        return None
    return held.times(1 / jnp.asarray(divisor, jnp.float32))


def _moved(params: dict[str, Any], values: list[Value]) -> Held | None:
    """A weight in another memory, such as one that is kept in that of the host."""
    held, *others = values
    if others or not isinstance(held, Held) or not is_memory(params["devices"]):
        return None
    (to,) = params["devices"]
    return held if to is None else held.holding(jax.device_put(held.arrays, to))


def _gather(params: dict[str, Any], values: list[Value]) -> Value | None:
    held, index = values
    if not isinstance(held, Held) or isinstance(index, Held):
        return None
    return packed.gather(held, jnp.asarray(index), params)


def _slice(params: dict[str, Any], values: list[Value]) -> Value | None:
    (held,) = values
    assert isinstance(held, Held)
    if any(stride != 1 for stride in params["strides"] or ()):
        return None
    starts, limits = params["start_indices"], params["limit_indices"]
    counts = [limit - start for start, limit in zip(starts, limits, strict=True)]
    return packed.cut(held, starts, counts)


def _dynamic_slice(params: dict[str, Any], values: list[Value]) -> Value | None:
    held, *starts = values
    starts = [start for start in starts if not isinstance(start, Held)]
    if not isinstance(held, Held) or len(starts) != len(values) - 1:
        return None
    return packed.cut(held, starts, params["slice_sizes"])


# Operations that have a form for packed operands.
_OPERATIONS: Mapping[str, Callable[..., Value | None]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "mul": _scaled,
    "div": _divided,
    "device_put": _moved,
    "gather": _gather,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


def _split(eqn: jex.JaxprEqn, values: list[Value]) -> list[Value] | None:
    """A weight in several parts, as one of queries, keys and values."""
    (held,), axis = values, eqn.params["axis"]
    start, parts = 0, []
    for count in map(int, eqn.params["sizes"]):
        starts, counts = [0] * len(held.view.shape), list(held.view.shape)
        starts[axis], counts[axis] = start, count
        parts.append(packed.cut(held, starts, counts))
        start += count
    return None if any(part is None for part in parts) else parts


def _barrier(eqn: jex.JaxprEqn, values: list[Value]) -> list[Value]:
    """A barrier for arrays; XLA would copy a matrix out of its stack for it."""
    del eqn
    arrays = [value for value in values if not isinstance(value, Held)]
    rest = iter(jax.lax.optimization_barrier(arrays))
    return [value if isinstance(value, Held) else next(rest) for value in values]


def _stop_gradient(eqn: jex.JaxprEqn, values: list[Value]) -> list[Value]:
    """Freezes a weight, and not what is beside it: that was put there to be trained."""
    del eqn
    (held,) = values
    weight, origin, factor = jax.lax.stop_gradient(
        (held.weight, held.origin, held.factor)
    )
    return [dataclasses.replace(held, weight=weight, origin=origin, factor=factor)]


def _reshard(eqn: jex.JaxprEqn, values: list[Value]) -> list[Value]:
    """A weight that is cut otherwise, or over axes of another type, as its array is."""
    (held,), to = values, eqn.params["dst_sharding"]
    assert isinstance(held, Held)

    def move(array: Array, spec: P) -> Array:
        params = {**eqn.params, "dst_sharding": NamedSharding(to.mesh, spec)}
        return eqn.primitive.bind(array, **params)

    whole = jax.tree.map(lambda array: P(*[None] * array.ndim), held.beside)
    specs = (resharded(held, to.spec, to.mesh), whole)
    return [held.holding(jax.tree.map(move, held.arrays, specs))]


# Operations with several results, or of which a weight comes out as it is.
_WHOLE: Mapping[str, Callable[..., Sequence[Value] | None]] = {
    "reshard": _reshard,
    "split": _split,
    "optimization_barrier": _barrier,
    "stop_gradient": _stop_gradient,
}
