"""How a matrix is cut into tiles that fit the cache."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax import decode
from qjax.bits import block
from qjax.formats.gptq import Stream
from qjax.tensor import Grouping, QTensor, Segment

# The layout that these forms read without conversion.
NATIVE = Stream()
# A tile of 2 MiB in float32: the second-level caches of two cores.
TILE = 512 * 1024
_TILE_ROWS = 256
# jax 0.10 multiplies two rows three times faster than a vector inside a loop.
_SLOW_VECTORS = jax.__version_info__ < (0, 11)


class Grid(NamedTuple):
    """How a matrix is cut into tiles: ``steps`` runs of rows, runs of columns."""

    rows: int
    steps: int
    width: int
    n: int

    @classmethod
    def of(cls, w: QTensor, *, whole_columns: bool = False) -> "Grid":
        """Chooses the tiles of a matrix; declines what does not cut into tiles."""
        if w.layout != NATIVE:
            raise NotImplementedError(f"{w.layout!r} does not cut into tiles.")
        if _is_padded(w):
            raise NotImplementedError(f"{w!r} has padding in its words.")
        if w.grouping is not Grouping.ROWS or not _columns(w) <= {1, w.n}:
            raise NotImplementedError(f"{w!r} has groups over several columns.")
        rows = w.k if whole_columns else _tile_rows(w)
        return cls(rows, w.k // rows, tile_width(w.n, TILE // rows), w.n)

    def tile(self, w: QTensor, j: Array, start: Array | int, width: int) -> Array:
        """The weight of run ``j`` of rows and ``width`` columns from ``start``."""
        part = cut(w, j * self.rows, self.rows, start, width)
        return decode.stored_weight(part, jnp.float32)

    def over_columns(self, columns: Callable[[Array | int, int], Array]) -> Array:
        """Joins ``columns(start, width) -> [m, width]`` over all n."""
        full, rest = divmod(self.n, self.width)
        runs = lax.map(lambda i: columns(i * self.width, self.width), jnp.arange(full))
        y = runs.transpose(1, 0, 2).reshape(runs.shape[1], full * self.width)
        if rest:
            y = jnp.concatenate([y, columns(self.n - rest, rest)], axis=1)
        return y


def tile_width(n: int, limit: int) -> int:
    """Columns of a tile: n cut evenly into multiples of 64, at most ``limit``."""
    limit = max(64, limit)
    return n if n <= limit else -(-n // (-(-n // limit)) // 64) * 64


def _whole_groups(w: QTensor) -> bool:
    k = w.k
    return (
        w.grouping is Grouping.ROWS
        and w.row_group is None
        and k % (w.segments[0].group_size or k) == 0
        and _columns(w) <= {1, w.n}
    )


def _columns(w: QTensor) -> set[int]:
    """How many columns the scales and the zeros have."""
    return {p.shape[-1] for p in (w.scale, w.zero) if p is not None}


def _is_padded(w: QTensor) -> bool:
    return bool(w.padding or w.segments[0].padding)


def whole_blocks(w: QTensor) -> int:
    """Rows of a group, which are whole blocks of affine codes; declines others."""
    (segment,) = w.segments
    group = segment.group_size or w.k
    if w.layout != NATIVE or not w.affine.counts or not _whole_groups(w):
        raise NotImplementedError(f"{w!r} is not affine in whole groups of a Stream.")
    if _is_padded(w):
        raise NotImplementedError(f"{w!r} has padding in its words.")
    if group % block(segment.bits)[0]:
        raise NotImplementedError(
            f"group_size={group} is not whole blocks of {segment.bits}-bit codes."
        )
    return group


def largest(sizes: range, whole: int) -> int:
    """The largest of ``sizes`` that divides ``whole`` and fits a tile, or the least."""
    fitting = [size for size in sizes if whole % size == 0]
    return max((size for size in fitting if size <= _TILE_ROWS), default=min(fitting))


def _tile_rows(w: QTensor) -> int:
    """Rows of a tile: whole blocks of codes, and whole groups or a part of one."""
    (segment,), k = w.segments, w.k
    codes, group = block(segment.bits)[0], segment.group_size or k
    if not _whole_groups(w):
        return k
    if group % codes == 0 and group > _TILE_ROWS:
        return largest(range(codes, group + 1, codes), group)
    whole = math.lcm(codes, group)
    return largest(range(whole, k + 1, whole), k)


def cut(
    w: QTensor, row: Array | int, rows: int, column: Array | int, columns: int
) -> QTensor:
    """A tile as a tensor of its own; all rows unless groups are whole or one is cut."""
    (words,), (segment,) = w.words, w.segments
    height = rows * segment.bits // 32
    first = row * segment.bits // 32
    words = lax.dynamic_slice(words, (first, column), (height, columns))
    groups, group_size, first_group = w.scale.shape[0], segment.group_size, 0
    if rows < w.k:
        size = group_size or w.k
        groups, first_group = max(1, rows // size), row // size
        group_size = min(rows, size)

    def part(parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        shared = parameter.shape[-1] == 1
        start, width = (0, 1) if shared else (column, columns)
        return lax.dynamic_slice(parameter, (first_group, start), (groups, width))

    return dataclasses.replace(
        w,
        words=(words,),
        scale=part(w.scale),
        zero=part(w.zero),
        segments=(Segment(segment.bits, group_size),),
        padding=0,
    )


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros to start a sum with; inside `jax.shard_map` they vary as ``like`` does."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, jnp.float32)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def dot(a: Array, b: Array) -> Array:
    """``a @ b`` in float32."""
    if a.shape[0] == 1 and _SLOW_VECTORS:
        return dot(jnp.pad(a, ((0, 1), (0, 0))), b)[:1]
    return jnp.dot(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def dot_t(a: Array, b: Array) -> Array:
    """``a @ b.T`` without a transpose."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
