"""Quantizes the weights of an nnx model: `Linear` by ours, all others wrapped."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from qjax.layers import contraction, packing, partitions
from qjax.layers.nnx import readers, wrapped, wrapping
from qjax.layers.nnx.linear import Linear
from qjax.layers.nnx.packed import SHARDING, Cut, Scale, variables, with_names
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


class Finding(NamedTuple):
    """What is found out of a weight.

    Attributes:
      form: How it is flattened, or why there is no way.
      obstacle: Why it cannot be packed nevertheless, or None.
      is_shown: Whether other code than its module's wants to have it as an attribute.
      is_used_above: Whether other code than its module's uses it, or takes it out of a
        stack.
    """

    form: Form | str
    obstacle: str | None = None
    is_shown: bool = False
    is_used_above: bool = False


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
      inputs: What the model is called with, to see what it does with its weights, and
        who reads them; or nothing.
      keywords: More of them.
      method: Name of the method that is called.

    Returns:
      The model, and an entry for each of its parameters.
    """
    model = nnx.clone(model)
    wrapping.unwrap_above(model)
    weights = list(_weights(model))
    choices = {
        weight.path: packing.choose(rules, weight.path, weight.value)
        for weight in weights
    }
    chosen = [weight for weight in weights if choices[weight.path].spec]
    traced = bool(inputs or keywords)
    if traced:
        findings = _found(model, chosen, inputs, keywords, method)
    else:
        findings = _assumed(model, chosen)
    entries, replaced = [], []
    with packing.bar(weight.value for weight in chosen) as advance:
        for weight in weights:
            choice = choices[weight.path]
            finding = findings.get(weight.path, Finding(""))
            if traced and isinstance(finding.form, str):
                choice = choice.without_form()
            form = _obstacle(weight) or finding.obstacle or finding.form
            packed, entry = packing.settle(
                weight.path, weight.value, choice, form, _note(weight, form)
            )
            entries.append(entry)
            if packed is not None and isinstance(form, Form):
                replaced.append((weight, finding, packed))
            if choice.spec is not None:
                advance(entry.before)
    foreign = {
        id(module)
        for weight in chosen
        if findings[weight.path].is_shown or findings[weight.path].is_used_above
        for _, module, _ in weight.holders
    }
    for module, path, packed, kinds in _by_holder(replaced):
        if id(module) in foreign or not _is_plain(module):
            wrapping.wrap(module, path, packed, kinds)
        else:
            _become_ours(module, packed["kernel"])
    wrapping.wrap_above(model)
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


def _assumed(model: nnx.Module, weights: Sequence[Weight]) -> dict[str, Finding]:
    """What is to be thought of weights while no call of the model is known."""
    changed = readers.changed_by_flax(model)

    def find(weight: Weight) -> Finding:
        shape = weight.variable.shape
        form = _known(weight) or packing.assumed(weight.path, shape)
        is_stacked = isinstance(form, Form) and len(shape) > len(form.shape)
        return Finding(
            form,
            changed.get(id(weight.variable)),
            is_used_above=is_stacked and _is_below(weight),
        )

    return {weight.path: find(weight) for weight in weights}


def _found(
    model: nnx.Module,
    weights: Sequence[Weight],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str,
) -> dict[str, Finding]:
    """What a call of the model does with weights."""
    found = _uses(model, weights, inputs, keywords, method)

    def find(weight: Weight) -> Finding:
        seen = found[weight.path]
        is_stacked = readers.is_stacked(seen)
        form = packing.seen(weight.path, weight.variable.shape, seen)
        # What is known of a layer are its last axes; a stack may have any other.
        if not (is_stacked and isinstance(form, Form)):
            form = _known(weight) or form
        return Finding(
            form,
            readers.of_state(seen),
            readers.is_shown(seen),
            (is_stacked or readers.is_used_outside(seen)) and _is_below(weight),
        )

    return {weight.path: find(weight) for weight in weights}


def _is_below(weight: Weight) -> bool:
    """Whether modules above all that hold a weight could have code that uses these."""
    return all(path for path, _, _ in weight.holders)


def _uses(
    model: nnx.Module,
    weights: Sequence[Weight],
    inputs: tuple,
    keywords: Mapping[str, Any],
    method: str,
) -> dict[str, list[uses.Use]]:
    """The uses of weights in a call of the model, with the names of `readers.watch`."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    paths = {id(weight.variable): weight.path for weight in weights}
    held: dict[str, list[str]] = {}
    for weight in weights:
        for path, _, name in () if _obstacle(weight) else weight.holders:
            held.setdefault(path, []).append(name)
    others = [_value_of(node) for _, node in flat if id(node) not in paths]
    passed, arguments = uses.arrays_of((others, *inputs), keywords)

    def run(arrays: dict[str, Array], passed: list) -> Any:
        (others, *args), kwargs = arguments(passed)
        rest = iter(others)
        leaves = [
            (path, _with(node, arrays.get(paths.get(id(node), "")), rest))
            for path, node in flat
        ]
        merged = nnx.merge(graphdef, nnx.from_flat_state(leaves))
        readers.watch(merged, held)
        return getattr(merged, method)(*args, **kwargs)

    shapes = {
        weight.path: jax.ShapeDtypeStruct(weight.variable.shape, weight.variable.dtype)
        for weight in weights
    }
    return uses.collect(run, shapes, passed)


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


def _cut(weight: Weight, form: Form) -> Cut:
    """What a weight says of how it is cut, of the matrix that it becomes."""
    variable = weight.variable
    names = variable.get_metadata(SHARDING, None) or ()
    axes = form.names(names, len(variable.shape))
    return Cut(axes, with_names(variable))


def _note(weight: Weight, form: Form | str) -> str | None:
    """What a packed weight does not keep."""
    names = weight.variable.get_metadata(SHARDING, None)
    if not names or isinstance(form, str):
        return None
    return partitions.note(names, _cut(weight, form).axes)


def _by_holder(
    replaced: Sequence[tuple[Weight, Finding, QTensor]],
) -> list[tuple[nnx.Module, str, dict[str, QTensor], dict[str, wrapped.Kind]]]:
    """The packed weights of each module; one that modules share, they share packed."""
    modules: dict[int, tuple] = {}
    for weight, finding, packed in replaced:
        form, variable = finding.form, weight.variable
        assert isinstance(form, Form)
        held = variables(packed, _cut(weight, form))
        dtype = str(variable.dtype)
        kind = wrapped.Kind(form, type(variable), dtype, finding.is_used_above)
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
