"""Grams of the inputs that the weights of a whole model see, and rules made of them.

The model runs as ever, under one `jax.grad`, with weights that are `watched`.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from qjax import progress
from qjax import rules as rules_
from qjax.layers.linen.variables import QUANTIZED, to_params
from qjax.layers.nnx import wrapped
from qjax.layers.nnx.packed import Scale
from qjax.layers.report import path_name
from qjax.layers.tracing import uses
from qjax.quantizers import gptq
from qjax.tensor import QTensor
from qjax.watched import watch

# Takes the grams of a model, its other arrays, the inputs of a call, and keywords.
_Call = Callable[[dict[str, Array], Any, tuple, dict[str, Any]], Any]


class _Model(NamedTuple):
    """A model with watched weights, as a function.

    Attributes:
      grams: Shapes of the grams of its watched weights, by path.
      arrays: All its other arrays.
      call: Calls it.
    """

    grams: dict[str, tuple[int, ...]]
    arrays: Any
    call: _Call


def grams(
    model: Any,
    batches: Iterable[Any],
    *,
    paths: str = ".*",
    variables: Mapping[str, Any] | None = None,
    method: str | None = None,
    **keywords: Any,
) -> dict[str, Float[Array, "*stack k k"]]:
    """Runs a quantized model, and sums ``x.T @ x`` of all inputs x of its weights.

    It is what `calibrated` takes. Each product with a packed weight counts, wherever it
    is: under `jax.jit`, `jax.vmap`, `jax.lax.scan`, `jax.lax.cond`, `jax.checkpoint`,
    in `qjax.ragged_matmul`; in modules of any author. Of a stack (layers, experts),
    each matrix has a gram of its own inputs; of a weight that modules share, the uses
    of all add up, under its first path.

    The grams are a gradient of what the model returns: activations are kept as for a
    step of training, of the watched weights alone, and a model that has a loop of
    unknown length (`jax.lax.while_loop`) is refused by JAX. Products on which no float
    that is returned depends are not counted. Lookups of embeddings and products with
    the transpose of a packed matrix have no inputs of its rows; a weight without any
    other use is left out, as is one whose inputs were all 0.

    Args:
      model: What `qjax.quantize_model` made, for linen the module; it stays as it is.
        The inputs are those of the quantized model: one of 8 bits hands on nearly those
        of the dense one, whatever the widths that follow. Call ``model.eval()`` first
        where there is dropout.
      batches: Inputs to run the model on: arrays, or tuples of the positional inputs of
        a call, or mappings of its keyword inputs. Each new shape compiles the model
        anew.
      paths: A regular expression, as in rules: only the weights whose paths, or those
        of whose modules, it matches whole are watched. A gram of k inputs takes 4 k**2
        bytes, and those of a large model may not fit at once (default: all).
      variables: Variables of a linen module, as `qjax.quantize_model` returned them.
      method: Name of the method that is called (default: ``__call__``).
      **keywords: More inputs of each call; those that a batch has itself go first.

    Returns:
      float32 ``[*stack, k, k]`` by path, the one in the report of
      `qjax.quantize_model`; rows in the order of the matrix that is packed.

    Raises:
      TypeError: If the model is no Flax module, or ``batches`` a single one.
      ValueError: If no packed weight matches, there are no batches, a linen module
        comes without variables, inputs of weights are not finite, or the result would
        be empty.

    Example:
      >>> from flax import nnx
      >>> dense = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> model = qjax.quantize_model(dense, qjax.Spec(bits=8, group_size=32))
      >>> batches = jax.random.normal(jax.random.key(0), (2, 8, 10, 64))
      >>> found = grams(model, list(batches), paths="out|query")
      >>> {path: gram.shape for path, gram in found.items()}
      {'out/kernel': (64, 64), 'query/kernel': (64, 64)}
      >>> rules = calibrated(qjax.Spec(bits=3, group_size=32), found)
      >>> better = qjax.quantize_model(dense, rules)
    """
    watched = _watched(model, variables, _matcher(paths), method)
    if not watched.grams:
        raise ValueError(
            f"model has no packed weight whose path paths={paths!r} matches; "
            "qjax.quantize_model(model, rules, x) packs weights, and its report has "
            "their paths."
        )
    totals = _sums(watched, batches, keywords)
    # A stack may have matrices without inputs, as experts that nothing was sent to.
    found = {path: gram for path, gram in totals.items() if jnp.any(gram)}
    broken = [path for path, gram in found.items() if not jnp.isfinite(gram).all()]
    if broken:
        raise ValueError(
            f"the inputs of {broken[:3]} are not finite, or their squares are not, in "
            f"{len(broken)} of {len(found)} grams; the model, or a batch, is broken."
        )
    if not found:
        raise ValueError(
            f"none of the products with {list(totals)[:3]} counts: they are not in "
            "this call, or no float that it returns depends on them; pass method= of "
            "a method that returns logits, say, or other paths."
        )
    return found


def calibrated(
    rules: rules_.Rules,
    grams: Mapping[str, Float[Array | np.ndarray, "*stack k k"]],
    quantizer: Callable[..., QTensor] = gptq.quantize,
    **options: Any,
) -> list[tuple[str | re.Pattern[str], rules_.Spec | None]]:
    """Makes rules by which a quantizer takes the place of the rounding of others.

    They are for `qjax.quantize_model`, and for `checkpoints.quantize` if the paths are
    those of a checkpoint's modules.

    Args:
      rules: As in `qjax.quantize_model`.
      grams: The gram of each weight, by path, as `grams` returns them, or by the path
        of a checkpoint's module, whose tensor ``rules`` may name, too. Weights without
        one, and those that ``rules`` leave as they are, are treated as ``rules`` say.
      quantizer: Takes a gram: `gptq.quantize` or `awq.quantize`.
      **options: More of what it takes: ``act_order``, say.

    Returns:
      A rule for each gram, with the `qjax.Spec` of the first of ``rules`` that matches
      its path, and then ``rules``.

    Raises:
      TypeError: As `qjax.quantize_model`; or if ``quantizer`` does not take the
        options.
      ValueError: As `qjax.quantize_model`.

    Example:
      >>> grams = {"up/kernel": jnp.eye(64)}
      >>> rules = [("up/.*", qjax.Spec(bits=3, group_size=32))]
      >>> specs = dict(calibrated(rules, grams, act_order=True))
      >>> specs["up/kernel"].bits, specs["up/kernel"].quantizer.keywords["act_order"]
      (3, True)
    """
    given = rules_.read(rules)
    try:
        inspect.signature(quantizer).bind(None, gram=None, **options)
    except TypeError as error:
        raise TypeError(
            f"quantizer={quantizer!r} must take gram= and the options, as "
            f"gptq.quantize and awq.quantize do: {error}."
        ) from None
    exact = []
    for path, gram in grams.items():
        spec = next((rule.spec for rule in given if _is_for(rule, path)), None)
        if spec is not None:
            seeing = functools.partial(quantizer, gram=gram, **options)
            exact.append((re.escape(path), dataclasses.replace(spec, quantizer=seeing)))
    return exact + [(rule.pattern, rule.spec) for rule in given]


def _is_for(rule: rules_.Rule, path: str) -> bool:
    """Whether a rule is for a weight of a model, or for a module of a checkpoint."""
    # A tensor of a checkpoint has no "/" in its name.
    tensor = f"{path.removesuffix('.weight')}.weight"
    return rule.matches(path) or ("/" not in path and rule.matches(tensor, "."))


def _matcher(paths: str) -> Callable[[str], bool]:
    try:
        return rules_.Rule(re.compile(paths), None).matches
    except re.error as error:
        raise ValueError(
            f"paths={paths!r} is no regular expression: {error}."
        ) from error


def _watched(
    model: Any,
    variables: Mapping[str, Any] | None,
    matches: Callable[[str], bool],
    method: str | None,
) -> _Model:
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables are for linen; an nnx model has its own.")
        return _of_nnx(model, matches, method or "__call__")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be an nnx.Module or an nn.Module.")
    if variables is None or "params" not in variables:
        raise ValueError(
            f"variables={variables!r} must hold the 'params' and the {QUANTIZED!r} of "
            "the linen module, as qjax.quantize_model returns them."
        )
    return _of_linen(model, variables, matches, method)


def _sums(
    model: _Model, batches: Iterable[Any], keywords: Mapping[str, Any]
) -> dict[str, Array]:
    """Adds up the grams of all batches."""
    if isinstance(batches, Array | np.ndarray):
        raise TypeError(
            f"batches is an array of shape {batches.shape}, and must be an iterable of "
            "inputs, such as [x]."
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches is one batch, a mapping of {list(batches)[:3]}; pass [batch]."
        )
    call, count = _hashable(model.call), 0
    totals = {
        path: jnp.zeros(shape, jnp.float32) for path, shape in model.grams.items()
    }
    known = len(batches) if isinstance(batches, Sized) else None
    with progress.bar(known, "Collecting grams", unit="batches") as advance:
        for batch in batches:
            inputs, arguments = uses.arrays_of(*_given(batch, keywords))
            totals = _add(call, arguments, totals, model.arrays, inputs)
            # JAX works in the background, where batches would pile up.
            jax.block_until_ready(totals)
            count += 1
            advance(1)
    if not count:
        raise ValueError("batches is empty; pass inputs of the model, such as [x].")
    return {path: totals[path] for path in model.grams}


def _given(batch: Any, keywords: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What the model is called with."""
    if isinstance(batch, Mapping):
        return (), {**keywords, **batch}
    return batch if isinstance(batch, tuple) else (batch,), dict(keywords)


def _hashable(call: _Call) -> _Call:
    """The call, or one that equals no other where the model cannot be hashed."""
    try:
        hash(call)
    except TypeError:
        return functools.partial(call)
    return call


# Models that differ in nothing but their arrays, as layers of a stack, compile once.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add(
    call: _Call,
    arguments: uses.Arguments,
    totals: dict[str, Array],
    arrays: Any,
    inputs: list,
) -> dict[str, Array]:
    """Adds the grams of one batch."""

    def returned(grams: dict[str, Array]) -> Array:
        return _sum(call(grams, arrays, *arguments(inputs)))

    # No value of a gram is looked at, and so the sums so far do as well as others.
    return jax.tree.map(jnp.add, totals, jax.grad(returned)(totals))


def _sum(outputs: Any) -> Array:
    """A number that depends on all floats of some outputs."""
    return sum(
        (
            jnp.sum(leaf.real.astype(jnp.float32))
            for leaf in jax.tree.leaves(outputs)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        ),
        start=jnp.zeros((), jnp.float32),
    )


def _shape(weight: QTensor) -> tuple[int, ...]:
    """Shape of the gram of a weight."""
    return (*weight.batch, weight.k, weight.k)


class _Gram(Scale):
    """The gram of a watched weight: wherever scales go, as in a scan, it goes, too."""


class _NnxCall(NamedTuple):
    """A call of an nnx model, equal for models that differ in their arrays alone.

    Attributes:
      graphdef: The model.
      places: Where in its state each gram is, and the path of its weight.
      method: Name of the method.
    """

    graphdef: Any
    places: tuple[tuple[tuple, str], ...]
    method: str

    def __call__(
        self, grams: dict[str, Array], rest: Any, args: tuple, keywords: dict
    ) -> Any:
        state = [(place, _Gram(grams[path])) for place, path in self.places]
        merged = nnx.merge(self.graphdef, nnx.from_flat_state(state), rest, copy=True)
        return getattr(merged, self.method)(*args, **keywords)


def _of_nnx(model: nnx.Module, matches: Callable[[str], bool], method: str) -> _Model:
    model = nnx.clone(model)
    shapes, names = {}, {}
    for path, weight, holders in _packed(model):
        if matches(path):
            shapes[path] = _shape(nnx.as_pure(weight))
            gram = _Gram(jax.ShapeDtypeStruct(shapes[path], jnp.float32))
            names[id(gram)] = path
            for module, name in holders:
                wrapped.put(module, name, watch(weight, gram))
    graphdef, grams, rest = nnx.split(model, _Gram, ...)
    flat = nnx.to_flat_state(grams)
    places = tuple((place, names[id(node)]) for place, node in flat)
    return _Model(shapes, rest, _NnxCall(graphdef, places, method))


def _packed(
    model: nnx.Module,
) -> Iterator[tuple[str, QTensor, list[tuple[nnx.Module, str]]]]:
    """The packed weights by their first path, and the modules that share each."""
    found: dict[int, tuple[list, QTensor, list]] = {}
    for path, module in nnx.iter_modules(model):
        for name, weight in wrapped.packed_weights(module).items():
            empty = ([], weight, [])
            places, _, holders = found.setdefault(id(weight.words[0]), empty)
            places.append((*path, name))
            holders.append((module, name))
    for places, weight, holders in found.values():
        # The first in the order of names, in which Flax goes through a model.
        yield path_name(min(places, key=_in_order)), weight, holders


def _in_order(place: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(isinstance(key, str), key) for key in place]


class _LinenCall(NamedTuple):
    """A call of a linen module, equal for equal modules.

    Attributes:
      module: The module.
      method: Name of the method, None for ``__call__``.
    """

    module: nn.Module
    method: str | None

    def __call__(
        self, grams: dict[str, Array], variables: Any, args: tuple, keywords: dict
    ) -> Any:
        flat: dict[Any, Any] = traverse_util.flatten_dict(variables)
        watched = dict(flat)
        for (collection, *names), leaf in flat.items():
            path = path_name(names)
            if collection == QUANTIZED and path in grams:
                watched[collection, *names] = watch(leaf, None)
                # Beside the scales, where `to_params` and the layers find it.
                watched["params", *names, "gram"] = grams[path]
        whole = traverse_util.unflatten_dict(watched)
        return self.module.apply(whole, *args, method=self.method, **keywords)


def _of_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    matches: Callable[[str], bool],
    method: str | None,
) -> _Model:
    variables = nn.meta.unbox(variables)
    params = traverse_util.flatten_dict(to_params(variables))
    shapes = {
        path: _shape(weight)
        for names, weight in params.items()
        if isinstance(weight, QTensor) and matches(path := path_name(names))
    }
    return _Model(shapes, variables, _LinenCall(module, method))
