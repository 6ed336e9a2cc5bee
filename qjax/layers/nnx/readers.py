"""Who reads a weight of a model: its own modules, others by its name, or a state.

Once it is packed, its own modules see a dense array in its place, and so does, by way
of `wrapping`, what reads it as their attribute. In a state (`nnx.state`, `nnx.split`)
are the packed arrays themselves, with which nobody else can do anything.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qjax.layers.nnx import wrapping
from qjax.layers.report import path_name
from qjax.layers.tracing.uses import NAMING, Use

# What a weight is called in the program, once it was read in one of the two ways.
_OWN, _SHOWN = "qjax.own", "qjax.shown"

# Modules of Flax that change all that is in the state of the one that they wrap.
_CHANGING = (nnx.WeightNorm, nnx.SpectralNorm)


def watch(model: nnx.Module, held: Mapping[str, Sequence[str]]) -> None:
    """Makes the modules of a model, in place, say in a program who reads their weights.

    Args:
      model: The model.
      held: Names of the weights that each module has, by its path.
    """
    inside: set[int] = set()
    # Modules of a class stay modules of one class, so that they can still be stacked.
    watched = functools.cache(functools.partial(_watched, inside=inside))
    for path, module in list(nnx.iter_modules(model)):
        if names := held.get(path_name(path)):
            module.__class__ = watched(type(module), tuple(sorted(names)))


def of_state(found: Sequence[Use]) -> str | None:
    """Why a weight cannot be packed, if it is read as part of a state, or None.

    Args:
      found: Its uses in a call of a model of `watch`.
    """
    operations = [
        use.operation
        for use in found
        # Layers may be taken out of a stack of them: packed arrays have its axes, too.
        if not (use.operation == "gather" and use.indexed)
        and use.operation != NAMING
        and not use.names & {_OWN, _SHOWN}
    ]
    if not operations:
        return None
    names = ", ".join(dict.fromkeys(operations))
    return f"it is read in a state ({names}), where it would be packed"


def is_shown(found: Sequence[Use]) -> bool:
    """Whether a weight is read as an attribute of a module by code that is not its own.

    Args:
      found: Its uses in a call of a model of `watch`.
    """
    return any(use.operation == NAMING for use in found if _is_by_others(use))


def is_used_outside(found: Sequence[Use]) -> bool:
    """Whether code that is not of a weight's own module uses it, and not its shape.

    Args:
      found: As in `is_shown`.
    """
    return any(use.operation != NAMING for use in found if _is_by_others(use))


def _is_by_others(use: Use) -> bool:
    return use.names & {_OWN, _SHOWN} == {_SHOWN}


def is_stacked(found: Sequence[Use]) -> bool:
    """Whether code that is not of a weight's own modules takes these out of a stack.

    Args:
      found: Its uses in a call of a model of `watch`.
    """
    return any(
        use.operation == NAMING and _OWN in use.names and use.stack | use.indexed
        for use in found
    )


def changed_by_flax(model: nnx.Module) -> dict[int, str]:
    """Why weights cannot be packed that modules of Flax change before they are used.

    Args:
      model: The model, of which no call is known.

    Returns:
      The reasons, by the identities of the Variables.
    """
    return {
        id(
            node
        ): f"{type(module).__name__} reads it in a state, where it would be packed"
        for _, module in nnx.iter_modules(model)
        if isinstance(module, _CHANGING)
        for _, node in nnx.iter_graph(module.layer_instance)
        if isinstance(node, nnx.Variable)
    }


def _watched(cls: Any, names: tuple[str, ...], inside: set[int]) -> type:
    """A subclass whose modules name their weights for whoever reads them.

    Args:
      cls: The class.
      names: The weights.
      inside: Identities of the modules of which a method of their own is running.
    """

    def run(self: Any, use: Any) -> Any:
        with _own(self, names, inside):
            return use(super(made, self))

    members: dict[str, Any] = {
        name: _through(name, value, run) for name, value in wrapping.public(cls)
    }
    members |= {name: _attribute(name, inside) for name in names}
    made = type(cls)(cls.__name__, (cls,), members, **wrapping.keywords(cls))
    return made


def _through(name: str, value: Any, run: Callable[..., Any]) -> Any:
    """A method or a property that its class runs by ``run``."""
    if isinstance(value, property):
        get = lambda self: run(self, lambda own: getattr(own, name))  # noqa: E731
        return property(get, value.fset, value.fdel)

    @functools.wraps(value)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, lambda own: getattr(own, name)(*args, **kwargs))

    return method


@contextlib.contextmanager
def _own(module: Any, names: tuple[str, ...], inside: set[int]) -> Iterator[None]:
    """Names the weights of a module as its own for as long as its method runs."""
    if id(module) in inside:
        yield
        return
    attributes = vars(module)
    before = {name: attributes[name] for name in names if name in attributes}
    named = {name: _named(value, _OWN) for name, value in before.items()}
    attributes.update(named)
    inside.add(id(module))
    try:
        yield
    finally:
        inside.discard(id(module))
        for name, value in before.items():
            if attributes.get(name) is named[name]:
                attributes[name] = value


def _attribute(name: str, inside: set[int]) -> property:
    """A weight as an attribute, named if no method of its own module reads it."""

    def read(self: Any) -> Any:
        try:
            value = vars(self)[name]
        except KeyError:
            raise AttributeError(name=name, obj=self) from None
        return value if id(self) in inside else _named(value, _SHOWN)

    def write(self: Any, value: Any) -> None:
        vars(self)[name] = value

    def delete(self: Any) -> None:
        del vars(self)[name]

    return property(read, write, delete)


def _named(value: Any, name: str) -> Any:
    """A copy of a Variable whose array has a name in the program."""
    if not isinstance(value, nnx.Variable):
        return value
    return value.replace(checkpoint_name(value.get_raw_value(), name))
