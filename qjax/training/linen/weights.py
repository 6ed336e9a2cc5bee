"""The packed weights of a linen model: what is beside them, and their steps."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from qjax.layers import beside, contraction
from qjax.layers.linen import (
    QUANTIZED,
    Dense,
    DenseGeneral,
    Einsum,
    Embed,
    Experts,
    MBWQDense,
)
from qjax.layers.linen.variables import take_floats, unboxed
from qjax.tensor import QTensor, replace_floats
from qjax.training import calls, shadow
from qjax.training.beside import Shadow

# The names on the way to a weight.
Names = tuple[str, ...]

_LAYERS = Dense | DenseGeneral | Einsum | Embed | Experts | MBWQDense


def accompanied(
    apply: Callable[..., Any], collection: str, make: Callable[[Any], beside.Beside]
) -> Callable[..., Any]:
    """Lets a model's ``apply`` take one more collection, of what is beside weights.

    Args:
      apply: The ``apply`` of a module with quantized layers, or of one that
        `qjax.quantize_model` made.
      collection: Its name.
      make: Makes of what it has at the path of a weight what is beside that weight.

    Returns:
      The same function, of variables that may hold the collection. It raises a
      ValueError if that has something at another path.
    """

    def applied(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if collection not in variables:
            return apply(variables, *args, **kwargs)
        weights = packed_weights(variables)
        given = _given(variables[collection], weights, collection)
        # Weights bring it along, whatever transformations of Flax they go through.
        joined = weights | {
            names: beside.accompany(weights[names], make(leaf))
            for names, leaf in given.items()
        }
        rest = {name: tree for name, tree in variables.items() if name != collection}
        rest[QUANTIZED] = traverse_util.unflatten_dict(joined)
        # One for all that is beside the weights.
        is_inner = any(isinstance(w, beside.Accompanied) for w in weights.values())
        adding = contextlib.nullcontext() if is_inner else nn.intercept_methods(_add)
        with adding:
            return apply(rest, *args, **kwargs)

    return applied


def _given(
    tree: Mapping[str, Any], weights: Mapping[Names, QTensor], collection: str
) -> dict[Names, Any]:
    """What a collection has for each weight.

    Raises:
      ValueError: If it has something else.
    """
    flat: dict[Any, Any] = traverse_util.flatten_dict(
        dict(tree), is_leaf=lambda names, _: names in weights
    )
    given = {names: leaf for names, leaf in flat.items() if leaf is not None}
    if unknown := given.keys() - weights.keys():
        raise ValueError(
            f"variables[{collection!r}] has {_paths(sorted(unknown))}, which are no "
            f"packed weights of the model; it has {_paths(weights)}."
        )
    return given


def packed_weights(variables: Mapping[str, Any]) -> dict[Names, QTensor]:
    """The collection "quantized", by the names on the way to each weight."""
    flat: Any = traverse_util.flatten_dict(dict(variables.get(QUANTIZED, {})))
    return {names: unboxed(weight) for names, weight in flat.items()}


def _paths(names: Iterable[Names]) -> list[str]:
    return ["/".join(one) for one in names]


def _add(
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
) -> Any:
    """Adds to what a layer of `layers.linen` gives what is beside its weight.

    Models of `qjax.quantize_model` need none of this: their products add it.
    """
    y, layer = call(*args, **kwargs), context.module
    method, name = context.method_name, name_of_weight(layer)
    is_product = method == "__call__" or (method, name) == ("attend", "embedding")
    if not isinstance(layer, _LAYERS) or not is_product:
        return y
    rest, ones = beside.apart(layer.get_variable(QUANTIZED, name))
    if not ones:
        return y
    weight = replace_floats(rest, layer.get_variable("params", name))
    inputs, product = calls.inputs_of(layer, args, kwargs, method), layer.factored
    is_matrix = isinstance(layer, Dense | MBWQDense)
    if method == "attend":
        product, is_matrix = _product, True
    for one in ones:
        if is_matrix and isinstance(one, Shadow):
            y = shadow.attach(y, jnp.asarray(inputs[0], y.dtype), weight, one.zeros)
        else:
            y = one.add(y, product, inputs, weight)
    return y


def _product(a: Array, b: Array | None, inputs: Array) -> Array:
    return contraction.low_rank(inputs, a, b)


def name_of_weight(layer: nn.Module) -> str:
    """What a layer of `layers.linen` calls its weight."""
    return "embedding" if isinstance(layer, Embed) else "kernel"


def with_kernels(variables: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Puts kernels that took a step back into the variables they came from.

    Args:
      variables: The variables of a model.
      params: What `layers.linen.to_params` made of them, with other kernels of the same
        formats, such as `apply_updates` returns. Unlike `layers.linen.to_variables`,
        this looks at no values, and so works inside `jax.jit`.

    Returns:
      The new variables; collections beside "params" and "quantized" stay as they are.

    Example:
      >>> from qjax.layers.linen import to_params, to_variables
      >>> kernel = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> variables = to_variables({"up": {"kernel": kernel}})
      >>> again = with_kernels(variables, to_params(variables))
      >>> jax.tree.structure(again) == jax.tree.structure(variables)
      True
    """

    def split(floats: Any, rest: Any, new: Any) -> tuple[Any, Any]:
        if isinstance(rest, QTensor):
            made = take_floats(new, floats)
            return nn.meta.replace_boxed((floats, rest), made) if in_boxes else made
        if not isinstance(floats, Mapping):
            return new, None
        pairs = {
            name: split(value, rest.get(name, {}), new[name])
            for name, value in floats.items()
        }
        return (
            {name: pair[0] for name, pair in pairs.items()},
            {name: pairs[name][1] for name in rest},
        )

    kept = jax.tree.leaves(variables[QUANTIZED], is_leaf=nn.meta.is_axis_metadata)
    in_boxes = any(map(nn.meta.is_axis_metadata, kept))
    floats, rest = split(variables["params"], variables[QUANTIZED], params)
    return {**variables, "params": floats, QUANTIZED: rest}
