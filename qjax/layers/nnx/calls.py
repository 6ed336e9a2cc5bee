"""Runs the code of wrapped modules on their packed weights.

A call runs the code of the module's own class on a copy of the module, traced, with
its packed weights in the place of dense ones. So are those below it that its code uses
itself, or takes out of stacks: Flax would cut a layer out, where a product reads it
where it lies.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import errors, nnx
from jax.core import Tracer
from jaxtyping import Array

from qjax.layers.nnx import changes, wrapped
from qjax.layers.tracing import interpreter
from qjax.layers.tracing.held import dense


def call(
    module: Any, name: str, use: Callable[..., Any], /, *args: Any, **keywords: Any
) -> Any:
    """Lets code of a wrapped module's own class use it.

    Args:
      module: The module.
      name: Of the method or property, for warnings.
      use: Takes the module as its own class has it, and the other arguments.
      *args: The other arguments; the code may change modules among them.
      **keywords: More of them.

    Returns:
      What ``use`` returns.

    Warns:
      UserWarning: If the code cannot be traced, and runs on dense weights.
    """
    try:
        result, write = _traced(module, use, args, keywords)
    except Exception as error:
        if not _is_of_tracing(error):
            raise
        if not wrapped.kinds(module):
            # What is below stays packed; a layer of it is copied out of its stack.
            return use(super(wrapped.made(module), module), *args, **keywords)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"{getattr(module, wrapped.PLACE)}: {name} is run on dense weights, as it "
            f"cannot be traced: {reason}",
            stacklevel=3,
        )
        return _call_dense(module, use, args, keywords)
    write()
    return changes.originals(result)


def _traced(
    module: Any, use: Callable[..., Any], args: tuple, keywords: dict[str, Any]
) -> tuple[Any, Callable[[], None]]:
    """What code returns, for `changes.originals`, and what writes what it changed."""
    inputs, tree = jax.tree.flatten((args, keywords), is_leaf=changes.is_node)
    whole = (module, [*filter(changes.is_node, inputs)])
    graphdef, state = nnx.split(whole)
    owners = changes.nodes(whole)
    weights = {
        f"{i}/{name}": held
        for i, one in enumerate(_to_open(module))
        for name, held in wrapped.held(one).items()
    }
    copies: list[changes.Copy] = []

    def function(**arrays: Array) -> tuple[Any, list[list[Any]]]:
        copy = changes.Copy(graphdef, state, owners)
        copies.append(copy)
        bare, nodes = copy.tree
        rest = iter(nodes)
        copied = [next(rest) if changes.is_node(leaf) else leaf for leaf in inputs]
        args, keywords = jax.tree.unflatten(tree, copied)
        with contextlib.ExitStack() as opened:
            for i, one in enumerate(_to_open(bare)):
                given = {name: arrays[f"{i}/{name}"] for name in wrapped.kinds(one)}
                opened.enter_context(_open(one, given))
            result = use(bare, *args, **keywords)
        return copy.returned(result), copy.changes()

    result, changed = interpreter.call(function, weights)
    return result, functools.partial(copies[-1].write, changed)


def _to_open(module: Any) -> list[Any]:
    """The module, those below it whose weights it uses, and what is in between."""
    return [
        one
        for _, one in nnx.iter_modules(module)
        if wrapped.is_wrapped(one)
        and (one is module or all(k.is_used_above for k in wrapped.kinds(one).values()))
    ]


@contextlib.contextmanager
def _open(module: Any, arrays: Mapping[str, Array]) -> Iterator[None]:
    """Makes a module one of its own class, with dense weights, for some time."""
    made, attributes = type(module), vars(module)
    kept = {name: attributes[name] for name in wrapped.ATTRIBUTES if name in attributes}
    for name in kept:
        delattr(module, name)
    kinds, module.__class__ = wrapped.kinds(module), wrapped.original(module)
    _give(module, kinds, arrays)
    yield
    for name in arrays:
        delattr(module, name)
    module.__class__ = made
    for name, value in kept.items():
        setattr(module, name, value if name == wrapped.PLACE else nnx.data(value))


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


def _call_dense(
    module: Any, use: Callable[..., Any], args: tuple, keywords: dict[str, Any]
) -> Any:
    """Lets code use a module with dense weights, which exist as long as it runs."""
    bare = _bare(module)
    kinds, held = wrapped.kinds(module), wrapped.held(module)
    _give(bare, kinds, {name: dense(one) for name, one in held.items()})
    result = use(bare, *args, **keywords)
    own = {*kinds, "_pytree__nodes"}
    for name, value in vars(bare).items():
        if name not in own and vars(module).get(name) is not value:
            changes.assign(module, name, value, bare)
    for name in vars(module).keys() - vars(bare).keys() - set(wrapped.ATTRIBUTES):
        delattr(module, name)
    return result


def _bare(module: Any) -> Any:
    """The module as its own class has it, of the same Variables, without weights."""
    bare = object.__new__(wrapped.original(module))
    left = set(wrapped.ATTRIBUTES)
    vars(bare).update({k: v for k, v in vars(module).items() if k not in left})
    if nodes := vars(module).get("_pytree__nodes"):
        kept = {name: is_node for name, is_node in nodes.items() if name not in left}
        vars(bare)["_pytree__nodes"] = type(nodes)(kept)
    return bare


def _give(
    bare: Any, kinds: Mapping[str, wrapped.Kind], arrays: Mapping[str, Array]
) -> None:
    """Gives a module dense weights."""
    for name, array in arrays.items():
        setattr(bare, name, kinds[name].variable(array))
