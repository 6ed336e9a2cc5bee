"""How a packed weight says that it is cut over devices.

A parameter of Flax may name its axes, after those of a mesh or of rules, for
`nnx.get_partition_spec` and `nn.get_partition_spec` to tell. The arrays of the packed
weight have other axes, which take the names of those that they came from.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from qjax import sharding
from qjax.tensor import QTensor

# Names by axis of the matrix: "k", "n", and "b0", ... of a stack.
Axes = Mapping[str, Any]


def note(names: Sequence[Any], kept: Axes) -> str | None:
    """Says which names of a dense weight its packed one does not have, if any."""
    lost = [name for name in names if name is not None and name not in kept.values()]
    if not lost:
        return None
    return f"of its sharding {tuple(names)}, {lost} is not kept"


def specs(packed: QTensor, axes: Axes) -> QTensor:
    """Names the axes of every array of a packed weight.

    Args:
      packed: The weight; its arrays may be abstract.
      axes: Names by axis of the matrix, as `Form.names` gives them.

    Returns:
      A `QTensor` of a `PartitionSpec` an array, each of all of its axes.
    """

    def of_leaf(spec: P) -> P:
        return P(*(axes.get(sharding.family_of(name)) for name in spec))

    return jax.tree.map(of_leaf, sharding.names(packed))


def axes_in(packed: QTensor, named: Sequence[Iterable[Any]]) -> dict[str, Any]:
    """Inverse of `specs`.

    Args:
      packed: The weight.
      named: Names of the axes of its arrays, in the order of `jax.tree.leaves`; empty
        of an array that says nothing.

    Returns:
      The names that there are.
    """
    known = jax.tree.leaves(sharding.names(packed))
    return {
        sharding.family_of(side): name
        for spec, names in zip(known, named, strict=True)
        for side, name in zip(spec, names, strict=False)
        if side is not None and name is not None
    }
