"""Functions that are cut over devices along named axes, not by looking into them.

XLA's partitioner takes a program apart operation by operation. It knows nothing of a
Pallas kernel, and of a loop over tiles too little: both would have all words gathered.
`over_devices` says of a whole function which axes of operands and results are the same,
and how many pieces they have; each device then calls the function on its pieces. What
has a summand on every device is summed.

Where the axes of the mesh are automatic, XLA asks for the pieces when it compiles, by
`custom_partitioning`. Where they are explicit, arrays are traced with their pieces, and
`jax.shard_map` does the same at once, on the mesh of `jax.set_mesh` or, outside of it,
on the one that is a part of the arrays' types.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from qjax.meshes import is_explicit, mesh_of, vary_together
from qjax.pieces import Choice, Names, Operand, Task
from qjax.sharding import P

Flat = Callable[..., tuple[Array, ...]]


def over_devices(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    named: tuple[Any, ...],
    results: Any,
    units: Mapping[str, int],
    *,
    summand: Callable[..., Any] | None = None,
    reverse: bool = False,
) -> Any:
    """Calls a function, each device on its own pieces of the operands.

    Inside `jax.shard_map` and on one device, it is a call and nothing else. A vmapped
    call has one more axis, which is cut like any other.

    Args:
      function: Pure. Of pieces of the operands it computes the same pieces of the
        results or, along axes that a result does not have, a summand of it.
      operands: Trees of arrays.
      named: The same trees with a `PartitionSpec` of names in the place of each array,
        None for an axis that is never cut. Names that begin with "m" are rows, which
        only some operands have. Those that begin with "k" are cut alike. Those that
        begin with "b" are of stacks: what a result holds of one entry of a stack, as
        the product of a token with its expert, is zero in the summands of devices that
        do not have it.
      results: What ``function`` returns, likewise.
      units: Into how many pieces an axis may be cut, by name.
      summand: Called instead where devices have summands of a result: the same in a
        wider dtype. The sum is rounded to what ``function`` returns. Where all but one
        are zero, as of stacks, no sum is rounded, and ``function`` is called.
      reverse: Whether the derivative is one in reverse mode alone. It is cut over
        devices as the function is; else XLA partitions it, where axes are automatic.

    Returns:
      What ``function`` returns.
    """
    # Inside shard_map, operands already are what a device holds; without jit, XLA never
    # asks.
    if jax.sharding.get_abstract_mesh().manual_axes or jax.config.jax_disable_jit:
        return function(*operands)
    leaves, tree = jax.tree.flatten(operands)
    task = Task.of(jax.tree.leaves(named), jax.tree.leaves(results), units)

    def flattened(function: Callable[..., Any]) -> Flat:
        return lambda *leaves: tuple(jax.tree.leaves(function(*tree.unflatten(leaves))))

    functions = _Functions(flattened(function), flattened(summand or function), reverse)
    over = _over_shards if is_explicit(leaves) else _over_pieces
    out = _transformable(over, task, functions, leaves)
    return jax.tree.structure(results).unflatten(out)


class _Functions(NamedTuple):
    """What a device calls, of leaves: for a result, or for a summand of it."""

    whole: Flat
    summand: Flat
    reverse: bool

    def map(self, transform: Callable[[Flat], Flat]) -> "_Functions":
        return _Functions(transform(self.whole), transform(self.summand), self.reverse)


def _summed(
    choice: Choice,
    functions: _Functions,
    leaves: Sequence[Array],
    results: Sequence[Names],
) -> tuple[Array, ...]:
    """Calls the function of a device, and sums what others have summands of."""
    over = choice.summands(results)
    if not any(over):
        return functions.whole(*leaves)
    wanted = jax.eval_shape(functions.whole, *leaves)
    rounded = {axis for axes in over for axis in axes} - choice.of_stacks
    summands = (functions.summand if rounded else functions.whole)(*leaves)
    return tuple(
        (jax.lax.psum(leaf, axes) if axes else leaf).astype(result.dtype)
        for leaf, axes, result in zip(summands, over, wanted, strict=True)
    )


def _transformable(
    over: Callable[..., tuple[Array, ...]],
    task: Task,
    functions: _Functions,
    leaves: Sequence[Array],
) -> tuple[Array, ...]:
    """Calls one of the two below, under every transformation of JAX."""

    @custom_vmap
    def mapped(*leaves: Array) -> tuple[Array, ...]:
        return over(task, functions, leaves)

    @mapped.def_vmap
    def _(size: int, batched: list[bool], *leaves: Array) -> tuple:
        axes = [0 if b else None for b in batched]
        of_batch = functions.map(lambda flat: jax.vmap(flat, axes))
        out = _transformable(over, task.batched(size, batched), of_batch, leaves)
        return out, (True,) * len(out)

    # A partitioned function has no derivative of its own, but that of one that is
    # mapped over shards is mapped, too.
    def formula(*leaves: Array) -> tuple[Array, ...]:
        is_mapped = over is _over_shards
        return over(task, functions, leaves) if is_mapped else functions.whole(*leaves)

    if functions.reverse:
        return _with_reverse(mapped, over, task, functions)(*leaves)
    pushed = jax.custom_jvp(mapped)
    pushed.defjvp(lambda primals, tangents: jax.jvp(formula, primals, tangents))
    return pushed(*leaves)


def _with_reverse(
    mapped: Callable[..., tuple[Array, ...]],
    over: Callable[..., tuple[Array, ...]],
    task: Task,
    functions: _Functions,
) -> Callable[..., tuple[Array, ...]]:
    """Gives a function its derivative, which is one over devices, too.

    Of pieces of operands and of the cotangents of results it computes the cotangents of
    the same pieces of the operands; where devices have the same piece, each has a
    summand.
    """
    differentiable = jax.custom_vjp(mapped)

    def forward(*leaves: Array) -> tuple[Any, ...]:
        return differentiable(*leaves), leaves

    def backward(leaves: Sequence[Array], cotangents: Sequence[Array]) -> tuple:
        is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def pulled(flat: Flat) -> Flat:
            def pull(*arrays: Array) -> tuple[Array, ...]:
                operands, given = arrays[: len(leaves)], arrays[len(leaves) :]
                out, back = jax.vjp(flat, *operands)
                cast = tuple(g.astype(y.dtype) for g, y in zip(given, out, strict=True))
                return tuple(itertools.compress(back(cast), is_float))

            return pull

        of_floats = tuple(itertools.compress(task.operands, is_float))
        pulling = Task((*task.operands, *task.results), of_floats, task.units)
        found = _transformable(
            over, pulling, functions.map(pulled), (*leaves, *cotangents)
        )
        left = iter(found)
        return tuple(
            next(left) if has else np.zeros(leaf.shape, jax.dtypes.float0)
            for leaf, has in zip(leaves, is_float, strict=True)
        )

    differentiable.defvjp(forward, backward)
    return differentiable


def _over_shards(
    task: Task, functions: _Functions, leaves: Sequence[Array]
) -> tuple[Array, ...]:
    """Where arrays are traced with their pieces."""
    mesh = mesh_of(leaves)
    typed = [
        Operand.of(names, leaf, jax.typeof(leaf).sharding.spec)
        for names, leaf in zip(task.operands, leaves, strict=True)
    ]
    choice = task.choose(mesh, typed)
    specs = tuple(map(choice.spec, task.operands))
    places = [NamedSharding(mesh, spec) for spec in specs]

    def local(*leaves: Array) -> tuple[Array, ...]:
        return _summed(choice, functions, vary_together(*leaves), task.results)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=tuple(map(choice.spec, task.results)),
        # Empty, it is all but those that jax.vmap maps over, which only JAX knows.
        axis_names=set(mesh.explicit_axes) if mesh.auto_axes else set(),
    )
    return mapped(*map(jax.sharding.reshard, leaves, places))


def _over_pieces(
    task: Task, functions: _Functions, leaves: Sequence[Array]
) -> tuple[Array, ...]:
    """Where XLA finds out about the pieces."""
    context = mesh_of(leaves)
    # What the function closes over stays a matter of the inner jit.
    partitioned = custom_partitioning(jax.jit(functions.whole))
    partitioned.def_partition(
        _partition(task, functions, context),
        sharding_rule=lambda mesh, *types: task.on(
            context if mesh.empty else mesh
        ).rule(*types),
        # Which fails where an array is cut along a part of a mesh axis.
        decode_shardings=False,
    )
    return tuple(partitioned(*leaves))


def _partition(
    task: Task, functions: _Functions, context: AbstractMesh
) -> Callable[..., Any]:
    """What XLA calls to learn which pieces a device takes, and what it does."""

    def partition(mesh: Mesh, operands: Any, results: Any) -> tuple:
        del results
        if mesh.empty:
            mesh = _mesh_of_program(context, operands[0])
        placed = [
            Operand.of(names, array, _spec(array.sharding, mesh, len(names)))
            for names, array in zip(task.operands, operands, strict=True)
        ]
        choice = task.choose(mesh, placed)
        place = lambda names: NamedSharding(mesh, choice.spec(names))  # noqa: E731

        def local(*leaves: Array) -> tuple[Array, ...]:
            return _summed(choice, functions, leaves, task.results)

        return (
            mesh,
            local,
            tuple(map(place, task.results)),
            tuple(map(place, task.operands)),
        )

    return partition


def _mesh_of_program(context: AbstractMesh, operand: jax.ShapeDtypeStruct) -> Mesh:
    """The mesh where JAX tells of none, as no argument of the program lies on one.

    Args:
      context: The mesh that the program was traced for, which may be empty.
      operand: Any: its devices have the order of that mesh.
    """
    cuts = _cuts(operand.sharding, operand.sharding.num_devices, operand.ndim)
    devices = np.array(list(cuts), object)
    if context.empty or context.size != devices.size:
        return Mesh(devices, ("devices",))
    return Mesh(devices.reshape(context.axis_sizes), context.axis_names)


def _cuts(sharding: Sharding, devices: int, rank: int) -> Mapping[Any, Any]:
    """What each device has of an array, if its shape can be cut in any way."""
    return sharding.devices_indices_map((devices,) * rank)


def _spec(sharding: Sharding, mesh: Mesh, rank: int) -> PartitionSpec:
    """Finds the mesh axes that an array is cut along, from where its pieces begin.

    Args:
      sharding: What XLA has decided on. It may cut along a part of a mesh axis, as one
        of four devices where there are two pieces, which no spec can say.
      mesh: The mesh.
      rank: Axes of the array.

    Returns:
      The spec; an axis of the array that is cut along a part counts as whole.
    """
    cuts = _cuts(sharding, mesh.size, rank)
    first = [[axis.start or 0 for axis in cuts[device]] for device in mesh.devices.flat]
    begins = np.array(first, int).reshape(*mesh.devices.shape, rank)

    def entry(begin: np.ndarray) -> tuple[str, ...]:
        reach = {
            name: int(np.ptp(begin, axis).max())
            for axis, name in enumerate(mesh.axis_names)
        }
        outer_first = sorted(reach, key=reach.__getitem__, reverse=True)
        axes = [name for name in outer_first if reach[name]]
        shares = math.prod(mesh.shape[name] for name in axes)
        return tuple(axes) if shares == len(np.unique(begin)) else ()

    return P(*[entry(begins[..., i]) for i in range(rank)])
