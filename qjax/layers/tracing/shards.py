"""A packed weight where foreign code maps over the shards of the dense one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from qjax import sharding
from qjax.layers import partitions
from qjax.layers.tracing.held import Held, tidy
from qjax.layers.tracing.views import COLUMN, ROW, View, in_order
from qjax.tensor import QTensor

# How many shards each axis of an array is cut into.
Counts = tuple[int, ...]


class Shards(NamedTuple):
    """A weight that devices have pieces of.

    Attributes:
      specs: Of the arrays of the weight.
      piece: The weight as a device sees it, but with the arrays of none.
    """

    specs: QTensor
    piece: Held

    def on_device(self, weight: QTensor) -> Held:
        """The weight as the device sees it that has these arrays."""
        return tidy(self.piece.holding((weight, ())))


def shards(held: Held, spec: P, mesh: Mesh | AbstractMesh) -> Shards | None:
    """Cuts a weight as its dense array is to be cut.

    Args:
      held: The weight.
      spec: Of the dense array, as `jax.shard_map` takes it.
      mesh: The mesh.

    Returns:
      The shards; None if words cannot be cut so, or the weight is not all there is.
    """
    counts = counts_of(spec, mesh, len(held.view.shape))
    view, axes = cut(held.view, counts), _axes(held, spec, counts)
    if axes is None:
        return None
    # The inputs of a device's rows are anywhere, and the code has it given its own.
    is_ordered = "k" in axes and held.weight.order is not None
    is_more = held.beside or held.factor is not None
    if view is None or is_more or is_ordered or len(held.weight.segments) > 1:
        return None
    return Shards(partitions.specs(held.weight, axes), held.seen(view))


def resharded(held: Held, spec: P, mesh: Mesh | AbstractMesh) -> QTensor:
    """How the arrays of a weight are cut where its dense array is to be cut otherwise.

    Args:
      held: The weight.
      spec: Of the dense array.
      mesh: The mesh.

    Returns:
      The specs; of no axis, if words cannot be cut so.
    """
    counts = counts_of(spec, mesh, len(held.view.shape))
    axes = _axes(held, spec, counts) if cut(held.view, counts) else None
    return partitions.specs(held.weight, axes or {})


def _axes(held: Held, spec: P, counts: Counts) -> dict[str, Any] | None:
    """Names the axes of the matrix as a dense array's are; None if units are cut."""
    pieces = sharding.units(held.weight)
    sides = {ROW: "k", COLUMN: "n"} | {s: f"b{i}" for i, s in enumerate(held.stack)}
    axes = {}
    for entry, count, dim in zip(spec, counts, held.view.dims, strict=False):
        if count > 1:
            side = sides[dim[0].side]
            if pieces["k0" if side == "k" else side] % count:
                return None
            axes[side] = entry
    return axes


def counts_of(spec: P, mesh: Mesh | AbstractMesh, rank: int) -> Counts:
    """Counts the shards of every axis of an array."""
    entries = [sharding.entry_axes(entry) for entry in (*spec, *[None] * rank)[:rank]]
    return tuple(math.prod(mesh.shape[axis] for axis in axes) for axes in entries)


def cut(view: View, counts: Sequence[int]) -> View | None:
    """Sees of an array what is in one of its shards.

    Args:
      view: The array.
      counts: How many shards there are along each axis.

    Returns:
      The view of a shard; None if it is no run of rows, or of columns, of the matrix.
    """
    dims: list[Any] = list(view.dims)
    for axis, count in enumerate(counts):
        if count == 1:
            continue
        first, *rest = dims[axis] or (None,)
        if first is None or first.size % count:
            return None
        if in_order(view.atoms, first.side)[0] != first:
            return None
        size = first.size // count
        dims[axis] = (first._replace(size=size), *rest) if size > 1 else tuple(rest)
    return view._replace(dims=tuple(dims))
