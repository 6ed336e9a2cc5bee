"""What the types of arrays say of the mesh that they lie on.

Where axes of a mesh are explicit, the pieces of an array are a part of its type; inside
`jax.shard_map`, so are the axes that it varies over.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def mesh_of(tree: Any) -> AbstractMesh:
    """Finds the mesh that a program is traced for or, if it says none, that of arrays.

    Args:
      tree: Arrays.

    Returns:
      The mesh; an empty one if there is none.
    """
    traced = jax.sharding.get_abstract_mesh()
    held = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in (traced, *held) if not mesh.empty), traced)


def is_explicit(tree: Any) -> bool:
    """Whether arrays are traced with their pieces.

    Args:
      tree: Arrays. Outside of `jax.set_mesh`, one that lies on a mesh is enough.

    Returns:
      Whether the mesh has explicit axes.
    """
    return AxisType.Explicit in mesh_of(tree).axis_types


def shares(array: Any) -> tuple[int, ...]:
    """Counts the pieces that every axis of an array is cut into.

    Args:
      array: An array. Of a traced one only its type is known, which says nothing of
        automatic axes; one without a place counts as whole.

    Returns:
      One count an axis, 1 where it is whole.

    Example:
      >>> mesh = jax.make_mesh((2, 4), ("data", "model"))
      >>> shares(
      ...     jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P(None, "model")))
      ... )
      (1, 4)
    """
    if isinstance(array, Tracer):
        place = jax.typeof(array).sharding
        held = [entry or () for entry in place.spec]
        every = [entry if isinstance(entry, tuple) else (entry,) for entry in held]
        return tuple(math.prod(place.mesh.shape[a] for a in axes) for axes in every)
    place = getattr(array, "sharding", None)
    if place is None:
        return (1,) * array.ndim
    sizes = zip(array.shape, place.shard_shape(array.shape), strict=True)
    return tuple(-(-size // piece) if piece else 1 for size, piece in sizes)


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager[None]:
    """Has what follows traced for the mesh that arrays lie on, if it is explicit.

    The derivatives of some operations make arrays, which belong on that mesh also where
    no `jax.set_mesh` says so.

    Args:
      tree: Arrays.

    Returns:
      The context.
    """
    mesh = mesh_of(tree)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()


def automatically(
    function: Callable[..., Any],
    *operands: Any,
    specs: Callable[[Any], Any],
) -> Any:
    """Calls a function as on a mesh of automatic axes.

    XLA then finds out where all that it computes lies. Explicit axes would have it said
    wherever it does not follow from types.

    Args:
      function: Pure.
      *operands: Trees of arrays.
      specs: Gives the specs of the results, which it gets as abstract arrays.

    Returns:
      The results, cut by ``specs`` where mesh axes are explicit.
    """
    if not is_explicit(operands):
        return function(*operands)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        cut = specs(jax.eval_shape(function, *shapes))
    with on_mesh_of(operands):
        return jax.sharding.auto_axes(function, out_sharding=cut)(*operands)


def explicitly_like(tree: Any, other: Any) -> Any:
    """Cuts arrays as others are cut, where that is a part of their type.

    Args:
      tree: Arrays.
      other: The same tree of arrays. Those that lie on no mesh count as whole.

    Returns:
      ``tree``, resharded where mesh axes are explicit.
    """

    def cut(leaf: Array, like: Array) -> Array:
        return _explicitly(leaf, jax.typeof(like).sharding.spec)

    return jax.tree.map(cut, tree, other)


def gathered(tree: Any) -> Any:
    """Makes arrays whole along their first axis, where pieces are a part of their type.

    What takes entries of an axis that is cut has no type then.

    Args:
      tree: Arrays.

    Returns:
      ``tree``, resharded where mesh axes are explicit.
    """

    def first_whole(leaf: Array) -> Array:
        first, *rest = jax.typeof(leaf).sharding.spec or [None]
        return _explicitly(leaf, P(None, *rest)) if first else leaf

    return jax.tree.map(first_whole, tree)


def whole(tree: Any) -> Any:
    """Makes arrays whole, where pieces are a part of their type.

    Args:
      tree: Arrays.

    Returns:
      ``tree``, resharded where mesh axes are explicit.
    """
    return jax.tree.map(lambda leaf: _explicitly(leaf, P()), tree)


def _explicitly(leaf: Array, spec: P) -> Array:
    """Cuts an array, if its pieces are a part of its type."""
    mesh = jax.typeof(leaf).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))


def vary_together(*operands: Any) -> tuple[Any, ...]:
    """Inside `jax.shard_map`, lets all leaves vary over the axes that any varies over.

    The transpose of the cast sums the cotangent of a replicated operand over devices.

    Args:
      *operands: Trees of arrays.

    Returns:
      The same trees.
    """
    varying = lambda leaf: jax.typeof(leaf).manual_axis_type.varying  # noqa: E731
    axes = set().union(*map(varying, jax.tree.leaves(operands)))

    def cast(leaf: Array) -> Array:
        missing = tuple(axes - varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, operands)
