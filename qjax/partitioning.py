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

import collections
import dataclasses
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
from qjax.sharding import entry_axes, family_of

P = PartitionSpec
Names = tuple[str | None, ...]
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
    task = _Task.of(jax.tree.leaves(named), jax.tree.leaves(results), units)

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


class _Operand(NamedTuple):
    """An array as the choice of axes sees it."""

    names: Names
    spec: PartitionSpec
    nbytes: int

    @classmethod
    def of(cls, names: Names, array: Any, spec: PartitionSpec) -> "_Operand":
        return cls(names, spec, math.prod(array.shape) * array.dtype.itemsize)

    @property
    def has_rows(self) -> bool:
        return any(name and name.startswith("m") for name in self.names)

    def offers(self) -> list[tuple[str | None, tuple[str, ...]]]:
        """Every name with the mesh axes that the array is cut along there."""
        return list(zip(self.names, map(entry_axes, self.spec), strict=False))


@dataclasses.dataclass(frozen=True)
class _Task:
    """The names of the axes of operands and results, None where they are never cut.

    Attributes:
      operands: Of every operand.
      results: Of every result.
      units: Pieces by name, more than one of each.
    """

    operands: tuple[Names, ...]
    results: tuple[Names, ...]
    units: Mapping[str, int]

    @classmethod
    def of(
        cls,
        operands: Sequence[PartitionSpec],
        results: Sequence[PartitionSpec],
        units: Mapping[str, int],
    ) -> "_Task":
        every = cls(tuple(map(tuple, operands)), tuple(map(tuple, results)), units)
        return every._only(lambda pieces: pieces > 1)

    def on(self, mesh: Mesh | AbstractMesh) -> "_Task":
        """Leaves out the names whose pieces no axis of a mesh shares evenly.

        Shardy would cut words along a part of an axis, and they were gathered again.
        """
        sizes = [size for size in mesh.shape.values() if size > 1]
        return self._only(lambda pieces: any(pieces % size == 0 for size in sizes))

    def _only(self, is_cut: Callable[[int], bool]) -> "_Task":
        pieces = _by_family(self.units)
        cuts = {
            name: n for name, n in self.units.items() if is_cut(pieces[family_of(name)])
        }

        def kept(names: Names) -> Names:
            return tuple(name if name in cuts else None for name in names)

        return _Task(
            tuple(map(kept, self.operands)), tuple(map(kept, self.results)), cuts
        )

    def batched(self, size: int, batched: Sequence[bool]) -> "_Task":
        """Puts one more axis before those of some operands and of all results."""
        name = f"b_{len(self.units)}"
        operands = [
            (name, *names) if is_batched else names
            for names, is_batched in zip(self.operands, batched, strict=True)
        ]
        results = [(name, *names) for names in self.results]
        return _Task(tuple(operands), tuple(results), {**self.units, name: size})

    def choose(
        self, mesh: Mesh | AbstractMesh, operands: Sequence[_Operand]
    ) -> "_Choice":
        """Chooses mesh axes for every name.

        Operands that have rows and those that have none may be cut along the same mesh
        axis. Then the larger side keeps its pieces and the smaller one moves:
        activations in decoding, packed words in training (FSDP).
        """
        pieces = _by_family(self.units)
        axes: dict[str, tuple[str, ...]] = collections.defaultdict(tuple)
        without = [o for o in operands if not o.has_rows]
        having = [o for o in operands if o.has_rows]
        of_weight = [offer for o in without for offer in o.offers()]
        of_inputs = [offer for o in having for offer in o.offers()]
        of_rows = [offer for offer in of_inputs if offer[0] and offer[0][0] == "m"]
        if sum(o.nbytes for o in having) > sum(o.nbytes for o in without):
            order = of_rows + of_weight + of_inputs
        else:
            order = of_weight + of_inputs
        for name, offered in order:
            family = family_of(name)
            if name in self.units and not axes[family]:
                taken = {axis for held in axes.values() for axis in held}
                axes[family] = _fitting(mesh, offered, taken, pieces[family])
        return _Choice(dict(axes))

    def rule(
        self, value_types: Sequence[Any], result_types: Sequence[Any]
    ) -> tuple[str, dict[str, Any]]:
        """The rule by which Shardy carries shardings over the function.

        An axis of whole pieces is one factor; of pieces of several elements it is two,
        of which the second is never cut.
        """
        sizes: dict[str, int] = {}
        whole: list[str] = []
        alone: set[str] = set()

        def axis(name: str | None, size: int) -> str:
            rest = size if name is None else size // self.units[name]
            if name is not None and rest == 1:
                alone.add(name)
                return name
            whole.append(f"w{len(whole)}")
            if name is None:
                return whole[-1]
            sizes[whole[-1]] = rest
            return f"({name} {whole[-1]})"

        def side(all_names: Sequence[Names], types: Sequence[Any]) -> str:
            return ", ".join(
                " ".join(map(axis, names, type_.shape))
                for names, type_ in zip(all_names, types, strict=True)
            )

        left, right = side(self.operands, value_types), side(self.results, result_types)
        # In the order of their first appearance, as Shardy wants them.
        used: dict[str, None] = {}
        for names in (*self.operands, *self.results):
            used |= {name: None for name in names if name is not None}
        kept = {name for names in self.results for name in names}
        sizes |= {name: self.units[name] for name in used if name not in alone}
        options: dict[str, Any] = {"need_replication_factors": tuple(whole)}
        if summed := tuple(name for name in used if name not in kept):
            options["reduction_factors"] = summed
        return f"{left} -> {right}", options | sizes


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The mesh axes that every family of names is cut along."""

    axes: Mapping[str, tuple[str, ...]]

    def spec(self, names: Names) -> PartitionSpec:
        """The spec of an array."""
        return P(*[self.axes.get(family_of(name)) or None for name in names])

    def summed(
        self, functions: _Functions, leaves: Sequence[Array], results: Any
    ) -> tuple:
        """Calls the function of a device, and sums what others have summands of."""
        shared = {axis for axes in self.axes.values() for axis in axes}
        over = [
            tuple(sorted(shared - {a for name in names for a in self._held(name)}))
            for names in results
        ]
        if not any(over):
            return functions.whole(*leaves)
        wanted = jax.eval_shape(functions.whole, *leaves)
        rounded = {axis for axes in over for axis in axes} - self._of_stacks()
        summands = (functions.summand if rounded else functions.whole)(*leaves)
        return tuple(
            (jax.lax.psum(leaf, axes) if axes else leaf).astype(result.dtype)
            for leaf, axes, result in zip(summands, over, wanted, strict=True)
        )

    def _held(self, name: str | None) -> tuple[str, ...]:
        return self.axes.get(family_of(name), ())

    def _of_stacks(self) -> set[str]:
        """Mesh axes along which one device has a summand, and the others zeros."""
        names = [name for name in self.axes if name.startswith("b")]
        return {axis for name in names for axis in self.axes[name]}


def _transformable(
    over: Callable[..., tuple[Array, ...]],
    task: _Task,
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
    task: _Task,
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
        pulling = _Task((*task.operands, *task.results), of_floats, task.units)
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
    task: _Task, functions: _Functions, leaves: Sequence[Array]
) -> tuple[Array, ...]:
    """Where arrays are traced with their pieces."""
    mesh = mesh_of(leaves)
    typed = [
        _Operand.of(names, leaf, jax.typeof(leaf).sharding.spec)
        for names, leaf in zip(task.operands, leaves, strict=True)
    ]
    choice = task.choose(mesh, typed)
    specs = tuple(map(choice.spec, task.operands))
    places = [NamedSharding(mesh, spec) for spec in specs]

    def local(*leaves: Array) -> tuple[Array, ...]:
        return choice.summed(functions, vary_together(*leaves), task.results)

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
    task: _Task, functions: _Functions, leaves: Sequence[Array]
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
    task: _Task, functions: _Functions, context: AbstractMesh
) -> Callable[..., Any]:
    """What XLA calls to learn which pieces a device takes, and what it does."""

    def partition(mesh: Mesh, operands: Any, results: Any) -> tuple:
        del results
        if mesh.empty:
            mesh = _mesh_of_program(context, operands[0])
        placed = [
            _Operand.of(names, array, _spec(array.sharding, mesh, len(names)))
            for names, array in zip(task.operands, operands, strict=True)
        ]
        choice = task.choose(mesh, placed)
        place = lambda names: NamedSharding(mesh, choice.spec(names))  # noqa: E731

        def local(*leaves: Array) -> tuple[Array, ...]:
            return choice.summed(functions, leaves, task.results)

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


def _by_family(units: Mapping[str, int]) -> dict[str, int]:
    """The pieces of a family: as many as all its members have."""
    pieces: dict[str, int] = {}
    for name, count in units.items():
        pieces[family_of(name)] = math.gcd(pieces.get(family_of(name), 0), count)
    return pieces


def _fitting(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], taken: set[str], pieces: int
) -> tuple[str, ...]:
    """The first of ``axes`` that are free and share the pieces evenly."""
    fitting: tuple[str, ...] = ()
    for axis in axes:
        shares = math.prod(mesh.shape[a] for a in (*fitting, axis))
        if axis in taken or pieces % shares:
            break
        fitting = (*fitting, axis)
    return fitting
