"""Weights that are cut over devices while they are read.

A process reads the pieces of its own devices. Dense tensors are read by ranges of every
axis. So are quantized matrices whose format says what runs along the axes of its
tensors (``axes``), unless act-order has spread the groups over all rows: those are read
by columns. A stack in one tensor, as of experts, is read likewise, also by its
matrices. Of what cannot be read in pieces, all is read, a matrix at a time, and the
pieces of other devices are dropped.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from qjax import ops, sharding, xla
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import Stored
from qjax.sharding import P, entry_axes
from qjax.tensor import Layout, QTensor

# Of pieces along "b0" and other axes of a stack, "k" and "n".
Counts = Mapping[str, int]
# A sharding, the weight or one with abstract leaves, and whether it is read in pieces.
_Outlined = tuple[NamedSharding, QTensor, bool]


def read(
    name: str,
    part: Matrix | Stored,
    wanted: NamedSharding | Sequence[NamedSharding],
    prepare: bool,
) -> QTensor | Array:
    """Reads one weight to where it belongs.

    Args:
      name: Its name.
      part: Its tensors.
      wanted: Where it goes, as ``sharding`` of `checkpoints.load` says.
      prepare: As in `checkpoints.load`.

    Returns:
      The weight on its devices.

    Raises:
      ValueError: If there are no shardings, or none of them cuts it evenly, with its
        name.
    """
    shardings = _shardings(name, wanted)
    if isinstance(part, Stored):
        return _array(name, part, shardings)
    return _matrix(name, part, shardings, prepare)


def _shardings(name: str, wanted: Any) -> list[NamedSharding]:
    """One sharding or several; the caller's function may have returned anything."""
    given = [wanted] if isinstance(wanted, NamedSharding) else wanted
    is_some = isinstance(given, Sequence) and len(given) > 0
    if not is_some or not all(isinstance(one, NamedSharding) for one in given):
        raise ValueError(
            f"sharding({name!r}) returned {wanted!r}, and must return a NamedSharding, "
            "or a list of some: NamedSharding(mesh, PartitionSpec()) keeps a weight "
            "whole."
        )
    return list(given)


def _array(name: str, stored: Stored, shardings: Sequence[NamedSharding]) -> Array:
    def fits(where: NamedSharding) -> NamedSharding:
        if len(where.spec) > len(stored.shape):
            raise ValueError(f"spec={where.spec} has more axes than {stored.shape}.")
        where.shard_shape(stored.shape)  # refuses uneven shares
        return where

    # Devices that hold the same share one reading.
    held: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        if str(index) not in held:
            held[str(index)] = stored.piece(index).narrowed()
        return held[str(index)]

    where = _first(name, fits, shardings)
    dtype = jax.dtypes.canonicalize_dtype(stored.dtype)
    return jax.make_array_from_callback(stored.shape, where, part, dtype=dtype)


def _matrix(
    name: str, matrix: Matrix, shardings: Sequence[NamedSharding], prepare: bool
) -> QTensor:
    batch, read = matrix.stacked, functools.cache(matrix.read)

    def prepared(w: QTensor, layout: Layout | None) -> QTensor:
        return ops.prepare(w, layout=layout) if prepare else w

    # The same for every sharding.
    whole_in = functools.cache(lambda layout: prepared(read(), layout))

    def outlined(layout: Layout | None) -> Iterator[_Outlined]:
        for where in shardings:
            counts = _counts(where, batch)
            outline = _outline(matrix, counts, lambda w: prepared(w, layout))
            whole = whole_in(layout) if outline is None else outline
            yield where, whole, outline is not None

    def fits(one: _Outlined) -> tuple[NamedSharding, QTensor, QTensor, bool]:
        where, whole, in_pieces = one
        w = sharding.cuttable(whole, where.spec)
        specs = sharding.partition_specs(w, where.mesh, where.spec)
        return where, w, specs, in_pieces

    try:
        found = _first(name, fits, outlined(None))
    except _UnevenError:
        if not prepare:
            raise
        # As `ops.prepare` does with what is cut more finely than words for the GPU.
        found = _first(name, fits, outlined(xla.NATIVE))
    where, w, specs, in_pieces = found
    cut = _counts(where, batch)
    counts = _readable(matrix, w, cut) if in_pieces else dict.fromkeys(cut, 1)
    pieces: list[tuple[Counts, QTensor]] = []
    for at in _owned(where, batch, counts):
        part = matrix.piece(at, counts) if in_pieces else None
        piece = w if part is None else prepared(part.read(), w.layout)
        pieces.append((at, jax.tree.map(np.asarray, piece)))

    def place(axes: P, leaf: Any, spec: P, *held: np.ndarray) -> Array:
        by_piece = [(at, array) for (at, _), array in zip(pieces, held, strict=True)]
        return _placed(leaf, axes, NamedSharding(where.mesh, spec), counts, by_piece)

    return jax.tree.map(
        place, sharding.names(w), w, specs, *[piece for _, piece in pieces]
    )


def _outline(
    matrix: Matrix, counts: Counts, prepared: Callable[[QTensor], QTensor]
) -> QTensor | None:
    """The matrix with abstract leaves, or None if it is not to be read in pieces.

    What preparing does to the tree may depend on the values of ``g_idx``, but on none
    that lie along n: it is done to zeros, of as few columns as are asked for, and as
    few matrices of a stack.
    """
    first, grid = dict.fromkeys(counts, 0), {**counts, "k": 1}
    if set(counts.values()) == {1}:
        return None

    def blank() -> QTensor | None:
        part = matrix.piece(first, grid)
        return None if part is None else prepared(part.blank())

    w = blank()
    if w is not None and w.padding and grid["n"] > 1:
        # The words of a piece are no piece of the words.
        grid["n"] = 1
        w = blank()
    if w is None:
        return None
    names = sharding.names(w)
    stacks = {axis for axis, count in grid.items() if axis[0] == "b" and count > 1}
    if any(stacks - set(axes) for axes in jax.tree.leaves(names)):
        return None  # What is encoded is not cut, and a piece has not all of it.

    def wide(axes: P, leaf: Array) -> jax.ShapeDtypeStruct:
        shape = tuple(
            size * grid.get(axis, 1)
            for size, axis in zip(leaf.shape, axes, strict=True)
        )
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(wide, names, w)


def _counts(where: NamedSharding, batch: int) -> Counts:
    """Into how many pieces a sharding cuts a matrix, or a stack and each of it."""
    axes = [*[f"b{i}" for i in range(batch)], "k", "n"]
    entries = itertools.zip_longest(axes, where.spec[: len(axes)])
    return {
        axis: math.prod(where.mesh.shape[name] for name in entry_axes(entry))
        for axis, entry in entries
    }


def _readable(matrix: Matrix, w: QTensor, counts: Counts) -> Counts:
    """The pieces in which a matrix is read: those of ``counts``, or larger ones."""
    in_order = w.order is None and w.row_group is None
    tried = [[count, 1] for count in counts.values()]
    if not in_order:
        tried[list(counts).index("k")] = [1]
    grids = [dict(zip(counts, grid, strict=True)) for grid in itertools.product(*tried)]
    first = dict.fromkeys(counts, 0)
    return next(one for one in grids if matrix.piece(first, one) is not None)


def _owned(where: NamedSharding, batch: int, counts: Counts) -> list[Counts]:
    """The pieces that devices of this process have a part of."""
    cut = _counts(where, batch)
    entries = NamedSharding(where.mesh, P(*where.spec[: len(cut)]))
    owned = {
        tuple(
            (part.start or 0) * counts[axis] // cut[axis]
            for axis, part in zip(cut, index, strict=True)
        )
        for index in entries.addressable_devices_indices_map(
            tuple(cut.values())
        ).values()
        if index is not None
    }
    return [dict(zip(cut, piece, strict=True)) for piece in sorted(owned)]


def _placed(
    leaf: Any,
    axes: P,
    where: NamedSharding,
    counts: Counts,
    pieces: Sequence[tuple[Counts, np.ndarray]],
) -> Array:
    """Puts a leaf together of the parts that pieces of the matrix have of it."""

    def part(index: Any) -> np.ndarray:
        at, local = {}, []
        for size, axis, bounds in zip(leaf.shape, axes, index, strict=True):
            along = sharding.family_of(axis)
            share = size // counts.get(along, 1)
            start, stop, _ = bounds.indices(size)
            if along in counts:
                at[along] = start // share
            first = at.get(along, 0) * share
            local.append(slice(start - first, stop - first))
        # What has no such axis is the same in every piece.
        held = next(array for place, array in pieces if at.items() <= place.items())
        return held[tuple(local)]

    return jax.make_array_from_callback(leaf.shape, where, part, dtype=leaf.dtype)


class _UnevenError(ValueError):
    """No sharding cuts a weight evenly."""


def _first(name: str, fits: Callable[[Any], Any], candidates: Iterable[Any]) -> Any:
    """What the first candidate gives that is not refused."""
    faults = []
    for one in candidates:
        try:
            return fits(one)
        except ValueError as fault:
            faults.append(str(fault))
    raise _UnevenError(f"{name}: {' '.join(faults)}")
