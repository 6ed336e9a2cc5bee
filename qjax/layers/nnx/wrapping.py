"""Puts packed weights into modules that nobody here wrote.

A module that directly holds a weight becomes an instance of a subclass of its own
class: its weight is packed, and its methods run through `layers.tracing`. All other
state of the module, and its other attributes, stay what they are.

Code of modules above may use a weight as well, and where modules are a stack, it is
theirs that scans it: it runs in the same way, on all weights that it uses so.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from qjax.layers import subclasses
from qjax.layers.nnx import wrapped
from qjax.layers.nnx.calls import call
from qjax.layers.nnx.wrapped import Kind, Place
from qjax.layers.tracing.held import dense
from qjax.tensor import QTensor


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
    setattr(module, wrapped.PACKED, nnx.data(dict(packed)))
    setattr(module, wrapped.PLACE, Place(path))


def wrap_above(model: nnx.Module) -> None:
    """Wraps all modules above those whose weights their code uses, in place."""

    def is_above(module: nnx.Module) -> bool:
        below = map(wrapped.kinds, _modules(module))
        return any(kind.is_used_above for kinds in below for kind in kinds.values())

    for module in _modules(model):
        if not wrapped.is_wrapped(module) and is_above(module):
            module.__class__ = _subclass(type(module), ())


def unwrap_above(model: nnx.Module) -> None:
    """Takes back what `wrap_above` has done, in place."""
    for module in _modules(model):
        if wrapped.is_wrapped(module) and not wrapped.kinds(module):
            module.__class__ = wrapped.original(module)


def _modules(model: nnx.Module) -> list[Any]:
    """A module and all below it."""
    return [module for _, module in nnx.iter_modules(model)]


@functools.cache
def _subclass(cls: type, kinds: tuple[tuple[str, Kind], ...]) -> type:
    # Without weights of its own, it has no properties that read any, and what it has
    # compiled (`nnx.jit`) stays compiled.
    members = {
        name: _traced(name, value)
        for name, value in public(cls)
        if kinds or isinstance(value, types.FunctionType)
    }
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
    def use(bare: Any, /, *args: Any, **keywords: Any) -> Any:
        return getattr(bare, name)(*args, **keywords)

    @functools.wraps(original)
    def method(self: Any, /, *args: Any, **keywords: Any) -> Any:
        return call(self, name, use, *args, **keywords)

    return method


def _getter(name: str) -> Callable[[Any], Any]:
    return lambda self: call(self, name, lambda bare: getattr(bare, name))


def _outside(name: str) -> property:
    """What other modules see that read the weight of this one."""

    def read(self: Any) -> "Outside":
        held = wrapped.held(self)[name]
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
