"""How a `QTensor` is cut over the devices of a mesh.

A weight is cut along k, along n, or both, by one `PartitionSpec` for the two, and every
leaf follows: words in whole units of their layout, scales and zeros in whole groups,
orders with the rows that they belong to. Of a matrix of mixed widths, each device takes
its share of every segment.

`shard` puts a weight on a mesh and `partition_specs` gives the specs of its leaves, for
`jax.shard_map` and ``in_shardings``. `qjax.matmul` of such a weight stays cut wherever
it is traced (`qjax.partitioning`): packed words move only where the rows of x are cut
along the same mesh axis and are larger. A stack may be cut along its matrices, too.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qjax.bits import block
from qjax.tensor import (
    Encoded,
    Grouping,
    Layout,
    Levels,
    Nested,
    QTensor,
    check_packed,
    group_counts,
    plain,
)

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segmented(Encoded):
    """A scale, zero or order of a mixed matrix, in one array for each segment.

    An even cut of each gives every device its share of every segment, where one of them
    all joined would give it some segments and not others.

    Attributes:
      parts: Arrays, one a segment; in `names`, specs.
      axis: The axis of k: -1 of an order, -2 of a scale or zero.
    """

    parts: tuple[Any, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    def decode(self) -> Array:
        """Joins the segments."""
        return jnp.concatenate(self.parts, axis=self.axis)

    # Not traced: arrays that are cut in different ways do not join.
    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined array."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of every part."""
        return self.parts[0].dtype


def by_segment(w: QTensor) -> QTensor:
    """Cuts scale, zero and order of a mixed matrix into its segments.

    One without an order gets one, so that a device finds the inputs of its rows.

    Args:
      w: A matrix or a stack of them, in any layout.

    Returns:
      The same weight with `Segmented` leaves; of one segment, ``w`` itself.

    Raises:
      ValueError: If ``w`` has a ``row_group``: its groups are those of no segment.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=2, group_size=32)
      >>> by_segment(w) is w
      True
    """
    if len(w.segments) == 1 or isinstance(w.scale, Segmented):
        return w
    if w.row_group is not None:
        raise ValueError(
            "w has a row_group (act-order) and several segments, which cannot be cut "
            "apart; qjax.prepare turns it into an order if its groups are full."
        )

    def cut(leaf: Any, counts: tuple[int, ...], axis: int) -> Segmented | None:
        array = plain(leaf)
        if array is None:
            return None
        ends = list(itertools.accumulate(counts))[:-1]
        return Segmented(tuple(jnp.split(array, ends, axis=axis)), axis)

    order = w.order
    if order is None:
        order = jnp.broadcast_to(jnp.arange(w.k, dtype=jnp.int32), (*w.batch, w.k))
    return dataclasses.replace(
        w,
        scale=cut(w.scale, group_counts(w), -2),
        zero=cut(w.zero, group_counts(w), -2),
        order=cut(order, w.rows, -1),
    )


def cuttable(w: QTensor, spec: PartitionSpec) -> QTensor:
    """Does `by_segment` where a weight is to be cut along k."""
    _check_types(w, spec)
    k_axis = len(w.batch)
    is_cut = len(spec) > k_axis and spec[k_axis] is not None
    return by_segment(w) if is_cut else w


def joined(w: QTensor) -> QTensor:
    """Inverse of `by_segment`.

    Args:
      w: Any weight.

    Returns:
      The same weight; no leaf of it is `Segmented`.
    """
    whole = {
        name: leaf.decode()
        for name in ("scale", "zero", "order")
        if isinstance(leaf := getattr(w, name), Segmented)
    }
    return dataclasses.replace(w, **whole) if whole else w


def names(w: QTensor) -> QTensor:
    """Names the axes of every leaf, in place of mesh axes in a `PartitionSpec`.

    Args:
      w: A weight; its leaves may be abstract.

    Returns:
      A `QTensor` whose leaves are specs of "k0", "k1", ... (the rows of that segment),
      "n", "b0", ... (batch axes) and None where an axis is not cut.
    """
    batch = tuple(f"b{i}" for i in range(len(w.batch)))
    single = len(w.segments) == 1
    one_k = "k0" if single else None

    def words(i: int) -> PartitionSpec:
        return P(*batch, *words_names(w.layout, w.segments[i].bits, i))

    def parameter(leaf: Any) -> Any:
        if leaf is None:
            return None
        columns = "n" if 1 < leaf.shape[-1] <= w.n else None
        if isinstance(leaf, Segmented):
            counts = group_counts(w)
            rows = [f"k{i}" if counts[i] > 1 else None for i in range(len(counts))]
            return Segmented(tuple(P(*batch, row, columns) for row in rows), leaf.axis)
        if isinstance(leaf, Encoded) and not isinstance(leaf, Levels):
            return jax.tree.map(lambda array: P(*[None] * array.ndim), leaf)
        grouped = single and w.row_group is None and group_counts(w)[0] > 1

        def of_array(array: Any) -> PartitionSpec:
            if array.ndim == len(batch):  # one number for a matrix
                return P(*batch)
            several = grouped and (leaf is array or array.shape[-2] > 1)
            return P(*batch, "k0" if several else None, columns)

        return jax.tree.map(of_array, leaf)

    def vector(leaf: Any, name: str | None) -> Any:
        if isinstance(leaf, Segmented):
            parts = range(len(leaf.parts))
            return Segmented(tuple(P(*batch, f"k{i}") for i in parts), leaf.axis)
        return None if leaf is None else P(*batch, name)

    return dataclasses.replace(
        w,
        words=tuple(words(i) for i in range(len(w.words))),
        scale=parameter(w.scale),
        zero=parameter(w.zero),
        order=vector(w.order, one_k),
        row_group=vector(w.row_group, one_k),
        codebook=vector(w.codebook, None),
        # In the order of the inputs, which is that of the rows only without an order.
        input_scale=vector(w.input_scale, one_k if w.order is None else None),
    )


def family_of(name: str | None) -> str:
    """The family of one of `names`, all of which are cut along the same mesh axes."""
    if name is None:
        return ""
    return "k" if name.startswith("k") else name


def cut_as(w: QTensor, named: Any) -> Any:
    """Gives the mesh axes of names, where those of a weight are a part of its type.

    Args:
      w: The weight.
      named: A tree of specs of the names of `names`.

    Returns:
      The same tree of specs of mesh axes.
    """
    axes = {
        name: entry
        for leaf, spec in zip(
            jax.tree.leaves(w), jax.tree.leaves(names(w)), strict=True
        )
        for name, entry in zip(spec, jax.typeof(leaf).sharding.spec, strict=True)
        if name is not None and entry is not None
    }
    return jax.tree.map(lambda spec: P(*map(axes.get, spec)), named)


def dense_names(w: QTensor) -> PartitionSpec:
    """Names the axes of the dense weight ``[*batch, k, n]``, as `names` does."""
    batch = [f"b{i}" for i in range(len(w.batch))]
    return P(*batch, "k0" if len(w.segments) == 1 else None, "n")


def words_names(layout: Layout, bits: int, segment: int = 0) -> PartitionSpec:
    """Names the axes of the words of one segment of one matrix, as `names` does."""
    axes: list[str | None] = [None] * layout.rank
    if (cut := layout.cut(bits)) is not None:
        axes[cut.k_axis], axes[cut.n_axis] = f"k{segment}", "n"
    return P(*axes)


def words_units(
    layouts: Sequence[Layout],
    bits: int,
    shape: tuple[int, int],
    held: tuple[int, int],
) -> dict[str, int]:
    """Counts the pieces of words that are whole in several layouts.

    Args:
      layouts: The layouts.
      bits: Width of a code.
      shape: Rows and columns of the matrix.
      held: The same with the padding that the words have.

    Returns:
      Counts of "k0" and "n", as `units` does for a weight.
    """
    cuts = [layout.cut(bits) for layout in layouts]
    counts = {"k0": 1, "n": 1}
    if None not in cuts and shape == held:
        counts["k0"] = _pieces(shape[0], *[cut.rows for cut in cuts if cut])
        counts["n"] = _pieces(shape[1], *[cut.columns for cut in cuts if cut])
    return counts


def units(w: QTensor) -> dict[str, int]:
    """Counts into how many equal pieces every axis of `names` may be cut.

    Args:
      w: A weight; its leaves may be abstract.

    Returns:
      Counts by name. 1 says that an axis cannot be cut: there is padding, a ragged
      group, an encoding, or groups that are no runs of rows.
    """
    counts = {f"b{i}": size for i, size in enumerate(w.batch)}
    sizes = _sizes(w)
    parameters = [leaf for leaf in (w.scale, w.zero) if leaf is not None]
    encoded = [
        isinstance(p, Encoded) and not isinstance(p, Segmented | Levels)
        for p in parameters
    ]
    whole = w.grouping is not Grouping.ROWS or any(encoded) or not sizes
    segmented = len(w.segments) == 1 or isinstance(w.scale, Segmented)
    for i, segment in enumerate(w.segments):
        if whole or not segmented or segment.padding:
            counts[f"k{i}"] = 1
        else:
            counts[f"k{i}"] = _pieces(w.rows[i], *sizes[f"k{i}"])
    if whole or w.padding or max(p.shape[-1] for p in parameters) > w.n:
        counts["n"] = 1
    else:
        counts["n"] = _pieces(w.n, *sizes["n"])
    return counts


def _sizes(w: QTensor) -> dict[str, list[int]]:
    """Says of what a piece along each axis of a matrix holds whole ones.

    Args:
      w: A weight.

    Returns:
      Rows of words, then of groups, by the names of segments, and columns of the words
      of all, then of those that share a scale; of a layout that is never cut, nothing.
    """
    cuts = [w.layout.cut(segment.bits) for segment in w.segments]
    if None in cuts:
        return {}
    parameters = [leaf for leaf in (w.scale, w.zero) if leaf is not None]
    nested = [p for p in parameters if isinstance(p, Nested)]
    # Groups that share a step; one for all of a column is not cut.
    together = math.lcm(*[p.ratio for p in nested if p.step.shape[-2] > 1])
    sizes: dict[str, list[int]] = {"n": []}
    for i, (cut, segment) in enumerate(zip(cuts, w.segments, strict=True)):
        assert cut is not None
        several = group_counts(w)[i] > 1 and w.row_group is None
        group = (segment.group_size or 1) * together if several else 1
        sizes[f"k{i}"] = [cut.rows, group]
        sizes["n"].append(cut.columns)
    columns = [p.shape[-1] for p in parameters]
    sizes["n"] += [w.n // c for c in columns if 1 < c <= w.n]
    return sizes


def _pieces(size: int, *sizes: int) -> int:
    """Counts the pieces of whole units of all ``sizes``: 1 if they leave a rest."""
    unit = math.lcm(*sizes)
    return 1 if size % unit else size // unit


def partition_specs(w: QTensor, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Any:
    """Gives the specs of a weight's leaves.

    Args:
      w: The weight; its leaves may be abstract.
      mesh: The mesh, for the sizes of its axes.
      spec: Mesh axes of ``(*batch, k, n)``; what is left out at the end is not cut.
        ``P(None, "model")`` cuts a matrix by columns, so that products need no
        communication, and ``P("model", None)`` by rows, so that they need one sum.

    Returns:
      A `QTensor` of `PartitionSpec`s, for ``in_specs`` of `jax.shard_map`; the same
      tree as ``w``.

    Raises:
      TypeError: If ``w`` is no `QTensor`, ``mesh`` no mesh, or ``spec`` no
        `PartitionSpec`.
      ValueError: If ``spec`` has too many axes, the mesh has not the axes, or they
        cannot share the weight evenly.

    Example:
      >>> w = qjax.quantize(jnp.ones((256, 64)), bits=3, group_size=64)
      >>> mesh = jax.make_mesh((2,), ("model",))
      >>> qjax.partition_specs(w, mesh, P("model")).scale == P("model", None)
      True
    """
    _check_types(w, spec)
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh={mesh!r} must be a Mesh, as jax.make_mesh makes one.")
    if len(spec) > w.ndim:
        raise ValueError(f"spec={spec} has more axes than w.shape={w.shape}.")
    axes = dict(enumerate(spec))
    count = len(w.batch)
    chosen = {f"b{i}": axes.get(i) for i in range(count)} | {"n": axes.get(count + 1)}
    chosen |= {f"k{i}": axes.get(count) for i in range(len(w.segments))}
    pieces = units(w)
    for name, entry in chosen.items():
        shares = math.prod(_size(mesh, axis) for axis in entry_axes(entry))
        if pieces[name] % shares:
            raise ValueError(_uneven(w, spec, name, pieces[name], shares))

    def one(named: PartitionSpec) -> PartitionSpec:
        return P(*[None if name is None else chosen[name] for name in named])

    return jax.tree.map(one, names(w))


def _check_types(w: Any, spec: Any) -> None:
    check_packed(w)
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"spec={spec!r} must be a PartitionSpec, as P(None, 'model').")


def _uneven(
    w: QTensor, spec: PartitionSpec, name: str, pieces: int, shares: int
) -> str:
    if name.startswith("b"):
        return (
            f"spec={spec}: the stack {w!r} has {pieces} matrices there, which {shares} "
            "devices cannot share evenly; choose another axis, or leave it whole."
        )
    what, mixed = name[:1], len(w.segments) > 1
    size, unit = w.n, "columns"
    if name.startswith("k"):
        size, unit = w.rows[int(name[1:])], "rows"
        if mixed:
            what = f"the {w.segments[int(name[1:])].bits}-bit rows"
    sizes = _sizes(w)
    finer = _finer(w, sizes, name, size, shares)
    advice = finer or "choose another axis, or leave it whole"
    if name.startswith("k") and mixed and not isinstance(w.scale, Segmented):
        advice = "qjax.shard, or qjax.sharding.by_segment, lets mixed widths be cut"
    elif isinstance(w.scale, Encoded) and not isinstance(w.scale, Segmented | Levels):
        advice = "qjax.prepare decodes its scales"
    elif not sizes:
        advice = f"{w.layout!r} is never cut, but what qjax.prepare makes of it is"
    least = math.lcm(*sizes.get(name, []))
    of_size = f"of {least} {unit} in {w.layout!r}, each of whole groups and words"
    if size == pieces * least:
        held = f"{pieces} piece{'s' if pieces > 1 else ''} {of_size}"
        why = f"has {held}, which {shares} devices cannot share evenly"
    elif size % least:
        why = f"is not cut, as {size} {unit} are no whole pieces {of_size}"
    else:
        why = "is not cut, as no piece of it has whole groups and words"
    return f"spec={spec}: {what} of {w!r} {why}; {advice}."


def _finer(
    w: QTensor, sizes: dict[str, list[int]], name: str, size: int, shares: int
) -> str | None:
    """Says of the layout whose pieces can be shared, if the words alone forbid it."""
    columns = [p.shape[-1] for p in (w.scale, w.zero) if p is not None]
    if not sizes or w.grouping is not Grouping.ROWS or max(columns) > w.n:
        return None
    if name == "n":
        least, unit = math.lcm(*sizes[name][len(w.segments) :]), "columns"
    else:
        bits = w.segments[int(name[1:])].bits
        least, unit = math.lcm(block(bits)[0], *sizes[name][1:]), "rows"
    if size % (least * shares):
        return None
    unit = unit if least > 1 else unit[:-1]
    made = "qjax.prepare(w, layout=qjax.formats.gptq.Stream())"
    return f"{made} can be cut into pieces of {least} {unit}"


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    if axis not in mesh.shape:
        raise ValueError(f"The mesh has axes {tuple(mesh.shape)}, and no {axis!r}.")
    return mesh.shape[axis]


def entry_axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def shard(w: QTensor, mesh: Mesh, spec: PartitionSpec) -> QTensor:
    """Puts a weight on a mesh, cut along k or n, or both.

    `qjax.matmul` and its gradient then read, on each device, the words that lie there.
    A stack may be cut along its matrices, too: of `qjax.ragged_matmul`, each device
    multiplies the tokens of the experts that it holds, and of `qjax.matmul` by index,
    the one that holds the matrix gives the product. A sum brings it to all devices.

    Args:
      w: The weight, as `qjax.prepare` leaves it. A mixed matrix that is cut along k
        gets `Segmented` leaves.
      mesh: Devices with named axes, automatic or explicit.
      spec: As in `partition_specs`. An empty one lets every device hold all of ``w``.

    Returns:
      The same weight, its leaves placed.

    Raises:
      TypeError, ValueError: As `partition_specs`.

    Example:
      >>> w = qjax.quantize(jnp.ones((256, 64)), bits=4, group_size=64)
      >>> mesh = jax.make_mesh((4,), ("model",))
      >>> w = shard(w, mesh, P(None, "model"))
      >>> [array.data.shape for array in w.words[0].addressable_shards]
      [(32, 16), (32, 16), (32, 16), (32, 16)]
    """
    w = cuttable(w, spec)
    placed = jax.tree.map(
        lambda leaf_spec: NamedSharding(mesh, leaf_spec), partition_specs(w, mesh, spec)
    )
    return jax.device_put(w, placed)
