"""Quantizes the weights of a linen model: its variables, and its ``apply``.

A linen model is a function of its variables, and so all of it is traced: attention,
tied embeddings, stacks of `nn.scan` and modules that nobody here wrote need no case of
their own.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors, traverse_util
from jaxtyping import Array

from qjax.layers import packing, partitions, qarrays, subclasses
from qjax.layers.linen.variables import QUANTIZED, box, in_collections, to_params
from qjax.layers.report import Entry, path_name
from qjax.layers.tracing import interpreter, uses
from qjax.layers.tracing.views import Form
from qjax.rules import Rule
from qjax.tensor import QTensor

# The form of a weight and the dtype of its array, by path.
Forms = tuple[tuple[str, tuple[Form, str]], ...]


def quantize(
    module: nn.Module,
    variables: Mapping[str, Any],
    rules: Sequence[Rule],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str | None,
) -> tuple[nn.Module, dict[str, Any], list[Entry]]:
    """Quantizes the "params" of a model.

    Args:
      module: The model.
      variables: Its variables, which may be abstract.
      rules: The rules.
      inputs: What ``apply`` is called with, beside the variables.
      keywords: More of them.
      method: The method that is called; None for ``__call__``.

    Returns:
      A module of a subclass of the model's class, the variables for its ``apply``, and
      an entry for each parameter.
    """
    given, variables = variables, nn.meta.unbox(variables)
    boxes = _by_path(given["params"])
    flat = _by_path(variables["params"])
    flat = {path: qarrays.unboxed(weight) for path, weight in flat.items()}
    choices = {p: packing.choose(rules, p, weight) for p, weight in flat.items()}
    asked = {path: flat[path] for path in flat if choices[path].spec}
    forms: Mapping[str, Form | str]
    traced = bool(inputs or keywords)
    if traced:
        forms = _found(module, variables, asked, inputs, keywords, method)
    else:
        forms = {path: packing.assumed(path, w.shape) for path, w in asked.items()}
    entries, kinds, replaced = [], {}, {}
    with packing.bar(asked.values()) as advance:
        for path, weight in flat.items():
            choice, form = choices[path], forms.get(path, "")
            if traced and isinstance(form, str):
                choice = choice.without_form()
            packed, entry = packing.settle(
                path, weight, choice, form, _note(boxes[path], form)
            )
            entries.append(entry)
            if packed is not None and isinstance(form, Form):
                replaced[path], kinds[path] = packed, (form, str(weight.dtype))
            if choice.spec is not None:
                advance(entry.before)
    made = in_collections(_replaced(given["params"], replaced))
    for names in traverse_util.flatten_dict(dict(given["params"])):
        path = path_name(names)
        if path in replaced and isinstance(boxes[path], nn.Partitioned):
            box(made, names, functools.partial(_in_boxes, boxes[path], kinds[path][0]))
    rest = {name: tree for name, tree in given.items() if name != "params"}
    quantized = _as(_subclass(type(module), tuple(sorted(kinds.items()))), module)
    return quantized, {**rest, **made}, entries


def _by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dictionaries, by their names joined to paths."""
    flat = traverse_util.flatten_dict(dict(params))
    return {path_name(names): leaf for names, leaf in flat.items()}


def _note(weight: Any, form: Form | str) -> str | None:
    """What a packed weight does not keep."""
    if not isinstance(weight, nn.meta.AxisMetadata) or isinstance(form, str):
        return None
    if not isinstance(weight, nn.Partitioned):
        return f"its box {type(weight).__name__} is not kept"
    return partitions.note(weight.names, _axes(weight, form))


def _axes(weight: nn.Partitioned, form: Form) -> partitions.Axes:
    return form.names(weight.names, weight.value.ndim)


def _in_boxes(weight: nn.Partitioned, form: Form, packed: QTensor) -> QTensor:
    """A packed weight of boxes that name its axes as that of the dense one did."""
    specs = partitions.specs(packed, _axes(weight, form))
    return jax.tree.map(
        lambda array, spec: weight.replace(value=array, names=tuple(spec)),
        packed,
        specs,
    )


def _replaced(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The same dictionaries with other leaves at some paths."""
    # Paths are not taken apart: names have slashes, too, as those of `nn.WeightNorm`.
    flat = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict(
        {names: leaves.get(path_name(names), leaf) for names, leaf in flat.items()}
    )


def _as(cls: Any, module: nn.Module) -> nn.Module:
    """A module of a subclass of another's class, with the same attributes."""
    attributes = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name != "parent"
    }
    return cls(**attributes)


def _found(
    module: nn.Module,
    variables: Mapping[str, Any],
    weights: Mapping[str, Any],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str | None,
) -> dict[str, Form | str]:
    """The forms of weights by what a call of the model does with them."""
    params = _by_path(variables["params"])
    passed, arguments = uses.arrays_of(inputs, keywords)
    others = {
        "params": {path: leaf for path, leaf in params.items() if path not in weights},
        "rest": {name: tree for name, tree in variables.items() if name != "params"},
    }
    shapes = {
        path: jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        for path, weight in weights.items()
    }
    options: dict[str, Any] = {}

    def run(weights: dict[str, Array], others: dict, passed: list) -> Any:
        args, kwargs = arguments(passed)
        merged = _replaced(variables["params"], {**others["params"], **weights})
        given = {"params": merged, **others["rest"]}
        return module.apply(given, *args, method=method, **options, **kwargs)

    while True:
        try:
            found = uses.collect(run, shapes, others, passed)
        except (errors.InvalidRngError, *_OF_IMMUTABLE) as error:
            if (wanted := _wanted(error, options)) is None:
                raise
            options = wanted
        else:
            return {p: packing.seen(p, w.shape, found[p]) for p, w in shapes.items()}


# What a model raises that changes, or starts, a collection that is not mutable.
_OF_IMMUTABLE = (
    errors.ModifyScopeVariableError,
    errors.ScopeCollectionNotFound,
    errors.ScopeVariableNotFoundError,
)


def _wanted(error: Exception, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``apply`` is given, too, so that it does not raise an error; or None.

    What a model draws or writes has no say in what it does with its weights: a caller
    need not pass the keys, nor name the collections.
    """
    if isinstance(error, _OF_IMMUTABLE):
        mutable = nn.DenyList("params")
        return None if "mutable" in options else {**options, "mutable": mutable}
    asked = re.search(r'needs PRNG for "(.*?)"', str(error))
    rngs = options.get("rngs", {})
    if asked is None or asked[1] in rngs:
        return None
    return {**options, "rngs": {**rngs, asked[1]: jax.random.key(0)}}


@functools.cache
def _subclass(cls: type[nn.Module], forms: Forms) -> type[nn.Module]:
    def apply(
        self: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        return _apply(
            functools.partial(cls.apply, self), forms, variables, args, kwargs
        )

    def bind(self: nn.Module, *_: Any, **__: Any) -> nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__}.bind: a quantized model is called by its apply; "
            "pass method= to it for another method than __call__."
        )

    apply.__doc__ = cls.apply.__doc__
    members = {"apply": apply, "bind": bind, "packed_forms": dict(forms)}
    return subclasses.subclass(_subclass, cls, forms, members)


def _apply(
    apply: Any,
    forms: Forms,
    variables: Mapping[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Calls a model's own ``apply`` on packed weights."""
    whole = to_params(variables)
    flat = _by_path(whole)
    rest = {k: v for k, v in variables.items() if k not in ("params", QUANTIZED)}

    def function(**weights: Array) -> Any:
        params = _replaced(whole, weights)
        return apply({"params": params, **rest}, *args, **kwargs)

    held = {
        path: interpreter.hold(weight, form, jnp.dtype(dtype), path)
        for path, (form, dtype) in forms
        if isinstance(weight := flat[path], QTensor)
    }
    return interpreter.call(function, held)
