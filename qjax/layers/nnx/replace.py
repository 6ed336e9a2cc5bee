"""Quantizes the weights of an nnx model: `Linear` by ours, all others wrapped."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from qjax.layers import contraction, packing
from qjax.layers.nnx import wrapped
from qjax.layers.nnx.linear import Linear
from qjax.layers.nnx.packed import Scale, variables
from qjax.layers.report import Entry, path_name
from qjax.layers.tracing import uses
from qjax.layers.tracing.views import Form
from qjax.rules import Rule
from qjax.tensor import QTensor


class Weight(NamedTuple):
    """A parameter of a model and the modules that hold it.

    Attributes:
      path: Its first path.
      variable: Its Variable.
      holders: The modules that have it as an attribute, their paths, and its name.
    """

    path: str
    variable: nnx.Variable
    holders: tuple[tuple[str, nnx.Module, str], ...]

    @property
    def value(self) -> Any:
        """Its array, which may be abstract."""
        return self.variable.get_raw_value()


def quantize(
    model: nnx.Module,
    rules: Sequence[Rule],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str,
) -> tuple[nnx.Module, list[Entry]]:
    """Quantizes a copy of a model.

    Args:
      model: The model; its arrays may be abstract.
      rules: The rules.
      inputs: What the model is called with, to see what it does with weights that no
        class of Flax holds; or nothing.
      keywords: More of them.
      method: Name of the method that is called.

    Returns:
      The model, and an entry for each of its parameters.
    """
    model = nnx.clone(model)
    weights = list(_weights(model))
    choices = {
        weight.path: packing.choose(rules, weight.path, weight.value)
        for weight in weights
    }
    chosen = [weight for weight in weights if choices[weight.path].spec]
    known: dict[str, Form | str | None] = {w.path: _known(w) for w in chosen}
    unknown = [weight for weight in chosen if known[weight.path] is None]
    if unknown and (inputs or keywords):
        known |= _found(model, unknown, inputs, keywords, method)
    entries, replaced = [], []
    read = _read_by_others(model, inputs, keywords, method)
    with packing.bar(weight.value for weight in chosen) as advance:
        for weight in weights:
            choice, form = choices[weight.path], known.get(weight.path)
            if isinstance(form, str):
                # What is no matrix of a product was not meant by a rule for all.
                choice = choice._replace(asked=False)
            form = _obstacle(weight) or form
            form = form or packing.assumed(weight.path, weight.variable.shape)
            packed, entry = packing.settle(
                weight.path, weight.value, choice, form, _note(weight)
            )
            entries.append(entry)
            if packed is not None and isinstance(form, Form):
                replaced.append((weight, form, packed))
            if choice.spec is not None:
                advance(entry.before)
    for module, path, packed, kinds in _by_holder(replaced):
        if path in read or not _is_plain(module):
            wrapped.wrap(module, path, packed, kinds)
        else:
            _become_ours(module, packed["kernel"])
    return model, entries


def _weights(model: nnx.Module) -> Iterator[Weight]:
    """All parameters but those of quantized layers and adapters."""
    holders: dict[int, list[tuple[str, nnx.Module, str]]] = {}
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                holders.setdefault(id(value), []).append(
                    (path_name(path), module, name)
                )
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam | Scale):
            yield Weight(path_name(path), node, tuple(holders.get(id(node), ())))


def _known(weight: Weight) -> Form | None:
    """The form of a weight of Flax's own modules, or of one that says its equation."""
    shape = tuple(weight.variable.shape)
    for _, module, name in weight.holders:
        if isinstance(module, nnx.Linear) and name == "kernel":
            return Form(shape[-2:], (0,), (1,))
        if isinstance(module, nnx.Embed) and name == "embedding":
            return Form(shape[-2:], (1,), (0,))
        if isinstance(module, nnx.LinearGeneral) and name == "kernel":
            sizes = (module.batch_axis, module.in_features, module.out_features)
            ends = [sum(map(len, sizes[: i + 1])) for i in range(3)]
            rows, columns = range(ends[0], ends[1]), range(ends[1], ends[2])
            return Form(shape[-ends[2] :], tuple(rows), tuple(columns))
        equation = getattr(module, "einsum_str", None)
        if isinstance(equation, str) and (form := _of_equation(equation, shape)):
            return form
    return None


def _of_equation(equation: str, shape: tuple[int, ...]) -> Form | None:
    """The form that an einsum of inputs and a kernel means."""
    term = equation.replace(" ", "").partition("->")[0].partition(",")[2]
    if not term.isalpha() or len(term) > len(shape):
        return None
    shape = shape[-len(term) :]
    try:
        parsed = contraction.parse(equation, shape)
    except (ValueError, NotImplementedError):
        return None
    rows, columns = (
        tuple(parsed.kernel.index(c) for c in side)
        for side in (parsed.summed, parsed.features)
    )
    return Form(shape, rows, columns)


def _found(
    model: nnx.Module,
    weights: Sequence[Weight],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str,
) -> dict[str, Form | str]:
    """The forms of weights by what a call of the model does with them."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = {id(weight.variable): weight.path for weight in weights}
    passed, arguments = uses.arrays_of(inputs, keywords)

    def run(arrays: dict[str, Array], others: list, passed: list) -> Any:
        rest = iter(others)
        leaves = [
            (path, _with(node, arrays.get(names.get(id(node), "")), rest))
            for path, node in flat
        ]
        merged = nnx.merge(graphdef, nnx.from_flat_state(leaves))
        args, kwargs = arguments(passed)
        return getattr(merged, method)(*args, **kwargs)

    shapes = {
        weight.path: jax.ShapeDtypeStruct(weight.variable.shape, weight.variable.dtype)
        for weight in weights
    }
    others = [_value_of(node) for _, node in flat if names.get(id(node)) is None]
    return uses.find(run, shapes, others, passed)


def _value_of(leaf: Any) -> Any:
    """The array of a Variable, or what is no Variable itself."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _with(node: Any, array: Array | None, others: Iterator[Any]) -> Any:
    value = next(others) if array is None else array
    return node.replace(value) if isinstance(node, nnx.Variable) else value


def _obstacle(weight: Weight) -> str | None:
    """Why the modules that hold a weight cannot have it packed, or None."""
    if not weight.holders:
        return "no attribute of a module holds it"
    for _, module, _ in weight.holders:
        if wrapped.packed_weights(module) or wrapped.PACKED in vars(module):
            return f"its module has an attribute {wrapped.PACKED!r} already"
    return None


def _note(weight: Weight) -> str | None:
    """What a packed weight does not keep."""
    sharding = weight.variable.get_metadata("out_sharding", None)
    return f"its sharding {sharding} is not kept" if sharding else None


def _by_holder(
    replaced: Sequence[tuple[Weight, Form, QTensor]],
) -> list[tuple[nnx.Module, str, dict[str, QTensor], dict[str, wrapped.Kind]]]:
    """The packed weights of each module; one that modules share, they share packed."""
    modules: dict[int, tuple] = {}
    for weight, form, packed in replaced:
        held = variables(packed)
        dtype = str(weight.variable.dtype)
        kind = wrapped.Kind(form, type(weight.variable), dtype)
        for path, module, name in weight.holders:
            entry = modules.setdefault(id(module), (module, path, {}, {}))
            entry[2][name], entry[3][name] = held, kind
    return list(modules.values())


# What a layer of Flax has that ours does not.
_OPTIONS = ("precision", "dot_general", "promote_dtype", "preferred_element_type")


def _is_plain(module: nnx.Module) -> bool:
    """Whether a module computes what our `Linear` does."""
    defaults = inspect.signature(nnx.Linear.__init__).parameters
    return type(module) is nnx.Linear and all(
        getattr(module, name) is defaults[name].default for name in _OPTIONS
    )


def _become_ours(module: Any, kernel: QTensor) -> None:
    # Adapters are for ours.
    for name in ("kernel", *_OPTIONS):
        delattr(module, name)
    module.__class__ = Linear
    module.implementation, module.packed = None, nnx.data(kernel)


def _read_by_others(
    model: nnx.Module, inputs: tuple, keywords: Mapping[str, Any], method: str
) -> set[str]:
    """Paths of the `nnx.Linear` whose kernel is read by code that is not theirs.

    Such code wants a Variable with the dense weight, as wrapped modules show it.
    """
    found: set[str] = set()
    linears = [m for _, m in nnx.iter_modules(model) if type(m) is nnx.Linear]
    if not linears or not (inputs or keywords):
        return found
    watched = nnx.clone(model)
    for path, module in list(nnx.iter_modules(watched)):
        if type(module) is nnx.Linear:
            module.__class__ = _watching(path_name(path), found)
    graphdef, state = nnx.split(watched)
    arrays, arguments = uses.arrays_of(inputs, keywords)

    def run(state: Any, arrays: list[Array]) -> None:
        args, kwargs = arguments(arrays)
        getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)

    # What cannot be called so says why when it is called.
    with contextlib.suppress(Exception):
        jax.eval_shape(run, state, arrays)
    return found


def _watching(path: str, found: set[str]) -> type[nnx.Linear]:
    """A `nnx.Linear` that notes whether others read its kernel."""
    inside: list[None] = []

    class Watched(nnx.Linear):
        def __call__(self, *args: Any, **kwargs: Any) -> Array:
            inside.append(None)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                inside.pop()

        @property
        def kernel(self) -> nnx.Param:
            if not inside:
                found.add(path)
            return vars(self)["kernel"]

        @kernel.setter
        def kernel(self, value: nnx.Param) -> None:
            vars(self)["kernel"] = value

    return Watched
