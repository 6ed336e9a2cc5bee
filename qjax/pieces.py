"""Which pieces of operands and results each device takes, by the names of their axes.

`partitioning` calls functions on them.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from qjax.sharding import P, entry_axes, family_of

Names = tuple[str | None, ...]


class Operand(NamedTuple):
    """An array as the choice of axes sees it."""

    names: Names
    spec: PartitionSpec
    nbytes: int

    @classmethod
    def of(cls, names: Names, array: Any, spec: PartitionSpec) -> "Operand":
        """An array, or its shape, that is cut by a spec."""
        return cls(names, spec, math.prod(array.shape) * array.dtype.itemsize)

    @property
    def has_rows(self) -> bool:
        """Whether it has rows of activations."""
        return any(name and name.startswith("m") for name in self.names)

    def offers(self) -> list[tuple[str | None, tuple[str, ...]]]:
        """Every name with the mesh axes that the array is cut along there."""
        return list(zip(self.names, map(entry_axes, self.spec), strict=False))


@dataclasses.dataclass(frozen=True)
class Task:
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
    ) -> "Task":
        """A task of names in specs, without those of a single piece."""
        every = cls(tuple(map(tuple, operands)), tuple(map(tuple, results)), units)
        return every._only(lambda pieces: pieces > 1)

    def on(self, mesh: Mesh | AbstractMesh) -> "Task":
        """Leaves out the names whose pieces no axis of a mesh shares evenly.

        Shardy would cut words along a part of an axis, and they were gathered again.
        """
        sizes = [size for size in mesh.shape.values() if size > 1]
        return self._only(lambda pieces: any(pieces % size == 0 for size in sizes))

    def _only(self, is_cut: Callable[[int], bool]) -> "Task":
        pieces = _by_family(self.units)
        cuts = {
            name: n for name, n in self.units.items() if is_cut(pieces[family_of(name)])
        }

        def kept(names: Names) -> Names:
            return tuple(name if name in cuts else None for name in names)

        return Task(
            tuple(map(kept, self.operands)), tuple(map(kept, self.results)), cuts
        )

    def batched(self, size: int, batched: Sequence[bool]) -> "Task":
        """Puts one more axis before those of some operands and of all results."""
        name = f"b_{len(self.units)}"
        operands = [
            (name, *names) if is_batched else names
            for names, is_batched in zip(self.operands, batched, strict=True)
        ]
        results = [(name, *names) for names in self.results]
        return Task(tuple(operands), tuple(results), {**self.units, name: size})

    def choose(
        self, mesh: Mesh | AbstractMesh, operands: Sequence[Operand]
    ) -> "Choice":
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
        return Choice(dict(axes))

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
class Choice:
    """The mesh axes that every family of names is cut along."""

    axes: Mapping[str, tuple[str, ...]]

    def spec(self, names: Names) -> PartitionSpec:
        """The spec of an array."""
        return P(*[self.axes.get(family_of(name)) or None for name in names])

    def summands(self, results: Sequence[Names]) -> list[tuple[str, ...]]:
        """Mesh axes along which devices have summands of each result."""
        shared = {axis for axes in self.axes.values() for axis in axes}
        return [
            tuple(sorted(shared - {a for name in names for a in self._held(name)}))
            for names in results
        ]

    @property
    def of_stacks(self) -> set[str]:
        """Mesh axes along which one device has a summand, and the others zeros."""
        names = [name for name in self.axes if name.startswith("b")]
        return {axis for name in names for axis in self.axes[name]}

    def _held(self, name: str | None) -> tuple[str, ...]:
        return self.axes.get(family_of(name), ())


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
