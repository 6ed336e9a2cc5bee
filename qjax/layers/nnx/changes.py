"""What code changes of modules while it is traced, and how these get it.

The Variables of a trace cannot be changed in another. So the code uses copies of its
module and of those that it is called with; what is another there in the end leaves the
trace as arrays, and is written back.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

_Node = nnx.Variable | nnx.Pytree

_VALUE = "value"  # the one attribute of a Variable that counts


class Unwritable(Exception):  # noqa: N818
    """A change of the copy that its module cannot have."""


class _Change(NamedTuple):
    """An attribute that is another than it was.

    Attributes:
      owner: The module that has it, or the Variable whose value it is.
      copy: The copy of the owner.
      name: Name of the attribute.
      tree: The tree of its value.
      makers: What makes its leaves out of what left the trace of them.
    """

    owner: Any
    copy: Any
    name: str
    tree: Any
    makers: list[Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Original:
    """What stands for a module or a Variable where a trace ends: a leaf of trees."""

    node: _Node


def is_node(leaf: Any) -> bool:
    """Whether something is a module or a Variable, or of what modules are made."""
    return isinstance(leaf, _Node)


def nodes(tree: Any) -> list[Any]:
    """Lists all modules and Variables that are in some, and these, in a fixed order."""
    return [node for _, node in nnx.iter_graph(tree) if is_node(node)]


def assign(owner: nnx.Module, name: str, value: Any, like: nnx.Module) -> None:
    """Sets an attribute of a module.

    Args:
      owner: The module.
      name: The attribute.
      value: What it becomes.
      like: The module where it was set by code, which may have said that it is data.
    """
    is_data = like._pytree__nodes.get(name, False)
    setattr(owner, name, nnx.data(value) if is_data else value)


class Copy:
    """A copy of modules and Variables for the length of a trace.

    Args:
      graphdef: A tree of them, as `nnx.split` takes it apart.
      state: Its state.
      originals: Its `nodes`, to which the changes are written.

    Attributes:
      tree: The copy.
    """

    def __init__(self, graphdef: Any, state: Any, originals: Sequence[Any]) -> None:
        self.tree: Any = nnx.merge(graphdef, state, copy=True)
        self._pairs = list(zip(nodes(self.tree), originals, strict=True))
        self._before = [_attributes(node) for node, _ in self._pairs]
        self._changes: list[_Change] = []
        self._gone: list[tuple[Any, str]] = []

    def changes(self) -> list[list[Any]]:
        """Finds what was changed, while the trace lasts.

        Returns:
          What leaves the trace of it: arrays, and whatever else attributes hold.

        Raises:
          Unwritable: If an attribute is a new module.
        """
        originals = {id(node): owner for node, owner in self._pairs}
        found = []
        for (node, owner), before in zip(self._pairs, self._before, strict=True):
            now = _attributes(node)
            self._gone += [(owner, name) for name in before if name not in now]
            for name, (leaves, tree) in now.items():
                if name in before and _is_same(before[name], (leaves, tree)):
                    continue
                apart = [_apart(leaf, originals, name) for leaf in leaves]
                makers = [make for _, make in apart]
                self._changes.append(_Change(owner, node, name, tree, makers))
                found.append([value for value, _ in apart])
        return found

    def returned(self, result: Any) -> Any:
        """What leaves the trace of what code returns, for `originals`.

        Raises:
          Unwritable: If there are new modules in it.
        """
        originals = {id(node): _Original(owner) for node, owner in self._pairs}

        def leaving(leaf: Any) -> Any:
            if isinstance(leaf, nnx.Pytree) and id(leaf) not in originals:
                raise Unwritable(f"it returns a new {type(leaf).__name__}")
            return originals.get(id(leaf), leaf)

        return jax.tree.map(leaving, result, is_leaf=is_node)

    def write(self, values: Sequence[Sequence[Any]]) -> None:
        """Gives the module what was changed, after the trace.

        Args:
          values: What `changes` returned, outside of the trace.
        """
        for owner, name in self._gone:
            delattr(owner, name)
        for (owner, copy, name, tree, makers), leaves in zip(
            self._changes, values, strict=True
        ):
            pairs = zip(makers, leaves, strict=True)
            value = tree.unflatten([make(leaf) for make, leaf in pairs])
            if isinstance(owner, nnx.Variable):
                owner.set_raw_value(value)
            elif vars(owner).get(name) is not vars(copy)[name]:
                assign(owner, name, value, copy)
            else:
                _refill(vars(owner)[name], value)


def originals(result: Any) -> Any:
    """Puts modules and Variables where `Copy.returned` left what stands for them."""
    return jax.tree.map(
        lambda leaf: leaf.node if isinstance(leaf, _Original) else leaf, result
    )


def _attributes(node: Any) -> dict[str, tuple[list[Any], Any]]:
    """What is in the attributes of a module, or in a Variable, flat."""
    if isinstance(node, nnx.Variable):
        values = {_VALUE: node.get_raw_value()}
    else:
        # Those of Flax itself say which of the others are data.
        names = [name for name in vars(node) if not name.startswith("_pytree__")]
        values = {name: vars(node)[name] for name in names}
    return {
        name: jax.tree.flatten(value, is_leaf=is_node) for name, value in values.items()
    }


def _is_same(before: tuple[list[Any], Any], now: tuple[list[Any], Any]) -> bool:
    """Whether it is the very same: tracers cannot be compared by value."""
    (old, old_tree), (new, new_tree) = before, now
    return old_tree == new_tree and all(a is b for a, b in zip(old, new, strict=True))


def _apart(
    leaf: Any, originals: dict[int, Any], name: str
) -> tuple[Any, Callable[[Any], Any]]:
    """What leaves the trace of a leaf, and what makes it of that."""
    if id(leaf) in originals:
        return None, lambda _: originals[id(leaf)]
    if isinstance(leaf, nnx.Variable):
        return leaf.get_raw_value(), leaf.replace
    if isinstance(leaf, nnx.Pytree):
        raise Unwritable(f"it makes the attribute {name!r} a new {type(leaf).__name__}")
    return leaf, lambda value: value


def _refill(held: Any, value: Any) -> None:
    """Puts what replaces tracers into a container that module and copy share."""
    if isinstance(held, list):
        held[:] = value
    elif isinstance(held, dict):
        held.clear()
        held.update(value)
