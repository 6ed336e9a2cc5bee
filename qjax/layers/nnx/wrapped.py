"""Modules that nobody here wrote, over packed weights.

A module that directly holds a weight becomes an instance of a subclass of its own
class: its weight is packed, and its methods run through `layers.tracing`. All other
state of the module, and its other attributes, stay what they are.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import errors, nnx
from jax.core import Tracer
from jaxtyping import Array

from qjax.layers import subclasses
from qjax.layers.beside import Beside
from qjax.layers.nnx import changes
from qjax.layers.nnx.packed import Packed
from qjax.layers.tracing import interpreter
from qjax.layers.tracing.held import Held, dense
from qjax.layers.tracing.views import Form
from qjax.tensor import QTensor

# What a wrapped module has beside the attributes of its own class.
PACKED, PLACE, BESIDE = "packed", "packed_path", "packed_beside"


class Kind(NamedTuple):
    """What a weight was before it was packed.

    Attributes:
      form: How it is flattened.
      variable: Class of its Variable.
      dtype: Dtype of its array, by name.
    """

    form: Form
    variable: type[nnx.Variable]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module is in its model: for warnings, and no part of what it is.

    Layers that differ in nothing else have equal trees, so that they can be stacked.
    """

    path: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        """The path, or what stands for that of the model itself."""
        return self.path or "the model"


def wrap(
    module: nnx.Module,
    path: str,
    packed: Mapping[str, QTensor],
    kinds: Mapping[str, Kind],
) -> None:
    """Puts packed weights into a module, in place.

    Args:
      module: The module; it becomes an instance of a subclass of its class.
      path: Where it is.
      packed: Its packed weights by attribute: each array of them a Variable.
      kinds: What they were.
    """
    for name in packed:
        delattr(module, name)
    module.__class__ = _subclass(type(module), tuple(sorted(kinds.items())))
    setattr(module, PACKED, nnx.data(dict(packed)))
    setattr(module, PLACE, Place(path))


def packed_weights(module: Any) -> dict[str, QTensor]:
    """The packed weights of a module by name, each array of them a Variable.

    Args:
      module: Any module, of this package, wrapped, or another, which has none.
    """
    if isinstance(module, Packed):
        return {module._weight: module.packed}
    return dict(getattr(module, PACKED)) if hasattr(type(module), "_kinds") else {}


def put(module: Any, name: str, weight: QTensor) -> None:
    """Puts another packed weight in the place of one that a module has.

    Args:
      module: The module, of this package or wrapped.
      name: One of the names in `packed_weights`.
      weight: The weight, each array of it a Variable.
    """
    if isinstance(module, Packed):
        module.packed = nnx.data(weight)
    else:
        getattr(module, PACKED)[name] = weight


def beside(module: Any, name: str) -> tuple[Beside, ...]:
    """What is beside a packed weight of a wrapped module, as `put_beside` left it."""
    return vars(module).get(BESIDE, {}).get(name, ())


def put_beside(module: Any, name: str, one: Beside) -> None:
    """Has something added to all that a wrapped module makes of a packed weight.

    Args:
      module: The module.
      name: One of the names in `packed_weights`.
      one: What is beside that weight, too, from now on: its arrays are Variables, or
        arrays that the module keeps no longer than a step.
    """
    both = {**vars(module).get(BESIDE, {}), name: (*beside(module, name), one)}
    setattr(module, BESIDE, nnx.data(both))


def clear_beside(module: Any, name: str) -> None:
    """Takes away all that is beside a packed weight of a wrapped module."""
    left = {key: ones for key, ones in getattr(module, BESIDE).items() if key != name}
    delattr(module, BESIDE)
    if left:
        setattr(module, BESIDE, nnx.data(left))


def form_of(module: Any, name: str) -> Form:
    """How a packed weight is flattened; of our own layers, one of a stack."""
    if not isinstance(module, Packed):
        return type(module)._kinds[name].form
    k, n = module.packed.shape[-2:]
    is_table = module._weight == "embedding"
    return Form((n, k), (1,), (0,)) if is_table else Form((k, n), (0,), (1,))


@functools.cache
def _subclass(cls: type, kinds: tuple[tuple[str, Kind], ...]) -> type:
    members = {name: _traced(name, value) for name, value in public(cls)}
    members |= {name: _outside(name) for name, _ in kinds}
    members["_kinds"] = dict(kinds)
    return subclasses.subclass(_subclass, cls, kinds, members, **keywords(cls))


def keywords(cls: Any) -> dict[str, Any]:
    """What the definition of a subclass says to Flax, so that it is what the class is.

    A class that is no pytree (``pytree=False``) may have any data in any attribute.
    """
    return {"pytree": cls._pytree__is_pytree}


def public(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, and `__call__`, by name."""
    own = cls.__mro__[: cls.__mro__.index(nnx.Module)]
    names = {name: klass for klass in reversed(own) for name in vars(klass)}
    for name, klass in names.items():
        value = vars(klass)[name]
        if name.startswith("_") and name != "__call__":
            continue
        is_method = callable(value) and not isinstance(value, type | staticmethod)
        if is_method or isinstance(value, property):
            yield name, value


def _traced(name: str, value: Any) -> Any:
    """A method or a property that runs with the packed weights."""
    if isinstance(value, property):
        return property(_getter(name), value.fset, value.fdel, value.__doc__)
    return _method(name, value)


def _method(name: str, original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, name, lambda bare: getattr(bare, name)(*args, **kwargs))

    return method


def _getter(name: str) -> Callable[[Any], Any]:
    return lambda self: _call(self, name, lambda bare: getattr(bare, name))


def _call(module: Any, name: str, use: Callable[[Any], Any]) -> Any:
    """Lets code of the module's own class use it, with the packed weights in it."""
    bare, weights = _bare(module), _held(module)
    graphdef, state = nnx.split(bare)
    originals = [module if node is bare else node for node in changes.nodes(bare)]
    copies: list[changes.Copy] = []

    def function(**arrays: Array) -> tuple[Any, list[list[Any]]]:
        copy = changes.Copy(graphdef, state, originals)
        copies.append(copy)
        _give(copy.module, module, arrays)
        result = use(copy.module)
        for weight in arrays:
            delattr(copy.module, weight)
        return result, copy.changes()

    try:
        result, changed = interpreter.call(function, weights)
    except Exception as error:
        if not _is_of_tracing(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"{getattr(module, PLACE)}: {name} is run on dense weights, as it cannot "
            f"be traced: {reason}",
            stacklevel=3,
        )
        return _call_dense(module, use)
    copies[-1].write(changed)
    return result


# What JAX and Flax raise where a tracer is asked for its value, or what is outside of
# the trace is changed; and what a bare TypeError says of shapes and of `format`.
_OF_TRACING = (
    jax.errors.JAXTypeError,
    jax.errors.JAXIndexError,
    errors.TraceContextError,
    changes.Unwritable,
)
_SAID_OF_TRACERS = ("of concrete values", "Tracer.__format__")


def _is_of_tracing(error: Exception) -> bool:
    """Whether an error means that code cannot be traced, and is none of the code."""
    if isinstance(error, AttributeError):
        # Such as the sharding, which arrays have that exist.
        is_traced = isinstance(error.obj, Tracer)
        return is_traced and hasattr(jax.Array, str(error.name))
    if type(error) is TypeError:
        return any(part in str(error) for part in _SAID_OF_TRACERS)
    return isinstance(error, _OF_TRACING)


def _call_dense(module: Any, use: Callable[[Any], Any]) -> Any:
    """Lets code use a module with dense weights, which exist as long as it runs."""
    bare = _bare(module)
    _give(bare, module, {name: dense(held) for name, held in _held(module).items()})
    result = use(bare)
    own = {*type(module)._kinds, "_pytree__nodes"}
    for name, value in vars(bare).items():
        if name not in own and vars(module).get(name) is not value:
            changes.assign(module, name, value, bare)
    for name in vars(module).keys() - vars(bare).keys() - {PACKED, PLACE, BESIDE}:
        delattr(module, name)
    return result


def _bare(module: Any) -> Any:
    """The module as its own class has it, of the same Variables, without weights."""
    (cls,) = type(module).__bases__
    bare = object.__new__(cls)
    left = {PACKED, PLACE, BESIDE}
    vars(bare).update({k: v for k, v in vars(module).items() if k not in left})
    if nodes := vars(module).get("_pytree__nodes"):
        kept = {name: is_node for name, is_node in nodes.items() if name not in left}
        vars(bare)["_pytree__nodes"] = type(nodes)(kept)
    return bare


def _give(bare: Any, module: Any, arrays: Mapping[str, Array]) -> None:
    """Gives a module dense weights."""
    for name, array in arrays.items():
        setattr(bare, name, type(module)._kinds[name].variable(array))


def _held(module: Any) -> dict[str, Held]:
    """The packed weights in the place of the dense ones."""
    path = getattr(module, PLACE).path
    return {
        name: interpreter.hold(
            nnx.as_pure(packed),
            form_of(module, name),
            jax.numpy.dtype(type(module)._kinds[name].dtype),
            "/".join(filter(None, (path, name))),
            nnx.as_pure(beside(module, name)),
        )
        for name, packed in packed_weights(module).items()
    }


def _outside(name: str) -> property:
    """What other modules see that read the weight of this one."""

    def read(self: Any) -> "Outside":
        held = _held(self)[name]
        shape = jax.ShapeDtypeStruct(held.view.shape, held.view.dtype)
        return Outside(shape, held=held)

    def write(self: Any, value: Any) -> None:
        read(self).set_value(value)

    return property(read, write)


class Outside(nnx.Param):
    """A packed weight as other modules see it: dense once they ask for its value."""

    def get_value(self, **index: Any) -> Any:
        """Makes the weight dense, and warns of it."""
        held = self.get_metadata("held")
        warnings.warn(
            f"{held.path} is made dense, as it is read outside of its own module: that "
            "one's methods read it packed, and a rule with None leaves it as it is.",
            stacklevel=3,
        )
        return dense(held)[index.get("index", ...)]

    def set_value(self, value: Any, **_: Any) -> None:
        """Refuses, with a ValueError: the dense weight is not kept."""
        raise ValueError(
            f"{self.get_metadata('held').path} is packed, and not set to "
            f"{type(value).__name__}; qjax.layers.nnx.load replaces it."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, which stays packed."""
        return self.get_raw_value().shape

    def __getattr__(self, name: str) -> Any:
        """What costs nothing of the shape, and all else of the dense array."""
        if name in ("dtype", "ndim", "size") or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(self.get_value(), name)
