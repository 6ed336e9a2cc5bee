"""Products with a quantized matrix in plain jnp: the forms that XLA compiles well.

Every function takes one matrix of one segment in stored row order (`tensor.split`) and
float32 activations, and accumulates in float32. It raises `NotImplementedError` where
it declines. Only `dense` forms the weight; the others walk over tiles of it that fit
the cache, or, for few rows, never leave the registers.

No form scales accumulators and reduces them over groups in one expression,
``(s[:, None] * a).sum(0)``: jaxlib 0.10.2 gets that wrong on CPUs (jax-ml/jax#39103).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import decode
from qjax.bits import block
from qjax.formats.gptq import Stream
from qjax.tensor import Affine, Grouping, QTensor, Segment

NATIVE = Stream()

# A tile of 2 MiB in float32: the second-level caches of two cores.
_TILE = 512 * 1024
_TILE_ROWS = 256
# jax 0.10 multiplies two rows three times faster than a vector inside a loop.
_SLOW_VECTORS = jax.__version_info__ < (0, 11)
# Codes that one element-wise fusion of `fused` consumes; XLA splits much longer ones.
_FUSED = 32


def dense(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Forms the weight in float32, then multiplies: any layout and grouping."""
    return _dot(x, decode.stored_weight(w, jnp.float32))


def dense_t(dy: Float[Array, "m n"], w: QTensor) -> Float[Array, "m k"]:
    """``dy @ W.T`` through the dense weight."""
    return _dot_t(dy, decode.stored_weight(w, jnp.float32))


def dense_grad(
    x: Float[Array, "m k"], dy: Float[Array, "m n"], w: QTensor
) -> dict[str, Array]:
    """Gradients of the float leaves through the dense gradient of the weight."""
    return _leaf_gradients(w, _dot(x.T, dy))


def fused(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Decode: unpack, convert, multiply and add 32 codes in one fusion, without a dot.

    With ``s`` the scale and ``c`` the constant of a group, the affine maps are one,

        y = sum_g s[g] * (sum_k x[k] q[k])  +  sum_g c[g] * (sum_k x[k])

    so codes are multiplied as they are, and the zeros cost one product with the sums of
    ``x`` over the groups. A code that does not end at bit 31 is masked where it lies;
    the power of two that this leaves in it is taken out of ``x``.

    Args:
      x: float32 activations. All rows are unrolled: meant for m up to 3.
      w: Affine codes in a `Stream`, whole groups of a multiple of 32 rows.

    Returns:
      float32 product.
    """
    group, (words,), k, n = _whole_blocks(w), w.words, w.k, w.n
    if group % _FUSED:
        raise NotImplementedError(f"group_size={group} is not a multiple of {_FUSED}.")
    bits = w.segments[0].bits
    scale = jnp.broadcast_to(w.scale.astype(jnp.float32), (k // group, n))
    fields = _Field.of_block(bits)
    unscale = [2.0**-field.shift if field.in_place else 1.0 for field in fields]
    factors = jnp.array(unscale, jnp.float32)[None, None]
    m = x.shape[0]
    blocks = x.reshape(m, k // _FUSED, _FUSED).transpose(1, 0, 2) * factors
    per_block = words.reshape(k // _FUSED, bits, n)
    terms = [
        blocks[:, :, i, None] * field.read(per_block, bits)[:, None]
        for i, field in enumerate(fields)
    ]
    # Without the barrier XLA merges what follows into the fusion, and then splits it.
    dots = lax.optimization_barrier(_add(terms))
    run = group // _FUSED

    def add_group(g: Array, y: Array) -> Array:
        parts = lax.dynamic_slice_in_dim(dots, g * run, run, 0)
        return y + lax.dynamic_index_in_dim(scale, g, 0) * _add(list(parts))

    sums = x.reshape(m, k // group, group).sum(-1)
    return lax.fori_loop(0, k // group, add_group, _dot(sums, _constant(w)))


class _Field(NamedTuple):
    """Where one of the 32 codes of a block lies in the block's words."""

    word: int
    shift: int
    in_place: bool  # masked where it lies, it is an int32 above zero
    straddles: bool

    @classmethod
    def of_block(cls, bits: int) -> list["_Field"]:
        places = [divmod(i * bits, 32) for i in range(_FUSED)]
        return [
            cls(word, shift, shift + bits < 32, shift + bits > 32)
            for word, shift in places
        ]

    def read(self, words: Array, bits: int) -> Array:
        """The code as float32, times 2**shift where it is read in place."""
        mask = 2**bits - 1
        if self.in_place:
            q = words[:, self.word] & jnp.uint32(mask << self.shift)
        else:
            q = words[:, self.word] >> jnp.uint32(self.shift)
        if self.straddles:
            high = words[:, self.word + 1] << jnp.uint32(32 - self.shift)
            q = (q | high) & jnp.uint32(mask)
        # int32 converts to float32 in one instruction where uint32 takes several.
        return lax.bitcast_convert_type(q, jnp.int32).astype(jnp.float32)


def _add(terms: list[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _constant(w: QTensor) -> Array:
    """What the affine map adds for each unit of x, ``[groups, n]`` in float32."""
    scale = w.scale.astype(jnp.float32)
    zero = jnp.float32(0) if w.zero is None else w.zero.astype(jnp.float32)
    constant = -scale * zero if w.affine is Affine.ZERO else zero
    if w.affine is Affine.CENTERED:
        constant -= scale * 2 ** (w.segments[0].bits - 1)
    groups = w.k // (w.segments[0].group_size or w.k)
    return jnp.broadcast_to(constant, (groups, w.n))


def tiled(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Batches: dequantizes a tile into the cache, multiplies, goes on to the next.

    Args:
      x: float32 activations.
      w: Codes in a `Stream`, groups of rows of any size, any affine map.

    Returns:
      float32 product.
    """
    grid = _Grid.of(w)
    steps = x.reshape(x.shape[0], grid.steps, grid.rows).transpose(1, 0, 2)

    def columns(start: Array | int, width: int) -> Array:
        def step(j: Array, y: Array) -> Array:
            return y + _dot(steps[j], grid.tile(w, j, start, width))

        return lax.fori_loop(0, grid.steps, step, _zeros((x.shape[0], width), x))

    return grid.over_columns(columns)


def tiled_t(dy: Float[Array, "m n"], w: QTensor) -> Float[Array, "m k"]:
    """``dy @ W.T``, tile by tile.

    Args:
      dy: float32 cotangent of the product.
      w: As in `tiled`.

    Returns:
      float32 product.
    """
    grid, m = _Grid.of(w), dy.shape[0]

    def rows(j: Array) -> Array:
        def column(i: Array, dx: Array) -> Array:
            return dx + part(i * grid.width, grid.width)

        def part(start: Array | int, width: int) -> Array:
            cotangent = lax.dynamic_slice_in_dim(dy, start, width, 1)
            return _dot_t(cotangent, grid.tile(w, j, start, width))

        dx = _zeros((m, grid.rows), dy)
        dx = lax.fori_loop(0, w.n // grid.width, column, dx)
        if rest := w.n % grid.width:
            dx += part(w.n - rest, rest)
        return dx

    return lax.map(rows, jnp.arange(grid.steps)).transpose(1, 0, 2).reshape(m, w.k)


def tiled_grad(
    x: Float[Array, "m k"], dy: Float[Array, "m n"], w: QTensor
) -> dict[str, Array]:
    """Gradients of the float leaves of ``w``, a run of columns at a time.

    The weight's own gradient ``x.T @ dy`` exists for one run only.

    Args:
      x: float32 activations.
      dy: float32 cotangent of the product.
      w: As in `tiled`.

    Returns:
      float32 gradients by field name: ``scale``, and ``zero`` and ``codebook`` where
      they are float.
    """
    grid = _Grid.of(w, whole_columns=True)

    def columns(start: Array | int, width: int) -> dict[str, Array]:
        part = _cut(w, 0, w.k, start, width)
        return _leaf_gradients(
            part, _dot(x.T, lax.dynamic_slice_in_dim(dy, start, width, 1))
        )

    full, rest = divmod(w.n, grid.width)
    runs = lax.map(lambda i: columns(i * grid.width, grid.width), jnp.arange(full))
    last = columns(w.n - rest, rest) if rest else None
    gradients = {}
    for name, run in runs.items():
        shared = name == "codebook" or getattr(w, name).shape[-1] == 1
        if shared:
            total = run.sum(0)
            gradients[name] = total if last is None else total + last[name]
        else:
            joined = run.transpose(1, 0, 2).reshape(run.shape[1], -1)
            pieces = [joined] if last is None else [joined, last[name]]
            gradients[name] = jnp.concatenate(pieces, axis=1)
    return gradients


def grouped_grad(
    x: Float[Array, "m k"], dy: Float[Array, "m n"], w: QTensor
) -> dict[str, Array]:
    """Gradients of scale and float zero from the products of each group.

    With ``a[g] = x_g @ q_g``, the product of group ``g`` with its bare codes, and
    ``t[g] = (sum of x over g).T @ dy``, the constant term's own gradient,

        dscale[g] = sum over rows of (a[g] * dy)  +  t[g] * dc/ds,    dzero = t * dc/dz

    so no gradient of the weight exists anywhere.

    Args:
      x: float32 activations.
      dy: float32 cotangent of the product.
      w: Affine codes in a `Stream`, whole groups of whole blocks of codes.

    Returns:
      float32 gradients by field name.
    """
    group, m = _whole_blocks(w), x.shape[0]
    groups, bits = w.k // group, w.segments[0].bits
    rows = _largest(range(block(bits)[0], group + 1, block(bits)[0]), group)
    grid = _Grid(rows, group // rows, _width(w.n, _TILE // rows), w.n)
    steps = x.reshape(m, groups, grid.steps, rows).transpose(1, 2, 0, 3)

    def columns(start: Array | int, width: int) -> Array:
        cotangent = lax.dynamic_slice_in_dim(dy, start, width, 1)

        def one_group(g: Array) -> Array:
            def step(j: Array, products: Array) -> Array:
                part = _cut(w, g * group + j * rows, rows, start, width)
                q = NATIVE.unpack(part.words[0], bits).astype(jnp.float32)
                return products + _dot(steps[g, j], q)

            products = lax.fori_loop(0, grid.steps, step, _zeros((m, width), x))
            return (products * cotangent).sum(0)

        return lax.map(one_group, jnp.arange(groups))

    leaves = _float_leaves(w)
    _, pull = jax.vjp(
        lambda leaves: _constant(dataclasses.replace(w, **leaves)), leaves
    )
    sums = x.reshape(m, groups, group).sum(-1)
    (gradients,) = pull(_dot(sums.T, dy))
    scale = grid.over_columns(columns)
    if w.scale.shape[-1] == 1:
        scale = scale.sum(1, keepdims=True)
    return gradients | {"scale": gradients["scale"] + scale}


def _leaf_gradients(w: QTensor, dw: Float[Array, "k n"]) -> dict[str, Array]:
    """Pulls the gradient of the weight back to scale, float zero and codebook."""

    def weight(leaves: dict[str, Array]) -> Array:
        return decode.stored_weight(dataclasses.replace(w, **leaves), jnp.float32)

    return jax.vjp(weight, _float_leaves(w))[1](dw)[0]


def _float_leaves(w: QTensor) -> dict[str, Array]:
    """Scale, zero and codebook where they are float, widened to float32."""
    return {
        name: leaf.astype(jnp.float32)
        for name in ("scale", "zero", "codebook")
        if (leaf := getattr(w, name)) is not None
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def int8(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Inexact: activations rounded to int8 per row and group, int32 accumulation.

    Twice as fast as float32 or more where the CPU has int8 dot instructions; the error
    is that of 8-bit activations, about 0.7 % of the largest output. Never chosen unless
    asked for by name.

    Args:
      x: float32 activations.
      w: Affine codes in a `Stream`, whole groups of whole blocks of codes.

    Returns:
      float32 product.
    """
    group, k, m, bits = _whole_blocks(w), w.k, x.shape[0], w.segments[0].bits
    groups, width = k // group, _width(w.n, _TILE // group)
    by_group = x.reshape(m, groups, group).transpose(1, 0, 2)
    step = jnp.abs(by_group).max(-1, keepdims=True) / 127
    rounded = jnp.round(by_group / jnp.where(step == 0, 1, step))
    # An int8 holds a code of eight bits only around its middle.
    centre = 128 if bits == 8 else 0
    codes_scale = jnp.broadcast_to(w.scale.astype(jnp.float32), (groups, w.n))
    constant = _constant(w) + centre * codes_scale
    start = _dot((rounded.sum(-1) * step[..., 0]).T, constant)
    rounded = rounded.astype(jnp.int8)

    def columns(first: Array | int, width: int) -> Array:
        def add_group(g: Array, y: Array) -> Array:
            words = _cut(w, g * group, group, first, width).words[0]
            q = NATIVE.unpack(words, bits).astype(jnp.int32) - centre
            acc = jnp.dot(
                rounded[g], q.astype(jnp.int8), preferred_element_type=jnp.int32
            )
            s = lax.dynamic_slice(codes_scale, (g, first), (1, width))
            return y + step[g] * s * acc.astype(jnp.float32)

        y = lax.dynamic_slice_in_dim(start, first, width, 1)
        return lax.fori_loop(0, groups, add_group, y)

    return _Grid(group, groups, width, w.n).over_columns(columns)


class _Grid(NamedTuple):
    """How a matrix is cut into tiles: ``steps`` runs of rows, runs of columns."""

    rows: int
    steps: int
    width: int
    n: int

    @classmethod
    def of(cls, w: QTensor, *, whole_columns: bool = False) -> "_Grid":
        if w.layout != NATIVE:
            raise NotImplementedError(f"{w.layout!r} does not cut into tiles.")
        if _is_padded(w):
            raise NotImplementedError(f"{w!r} has padding in its words.")
        if w.grouping is not Grouping.ROWS or not _columns(w) <= {1, w.n}:
            raise NotImplementedError(f"{w!r} has groups over several columns.")
        rows = w.k if whole_columns else _tile_rows(w)
        return cls(rows, w.k // rows, _width(w.n, _TILE // rows), w.n)

    def tile(self, w: QTensor, j: Array, start: Array | int, width: int) -> Array:
        """The weight of run ``j`` of rows and ``width`` columns from ``start``."""
        part = _cut(w, j * self.rows, self.rows, start, width)
        return decode.stored_weight(part, jnp.float32)

    def over_columns(self, columns: Callable[[Array | int, int], Array]) -> Array:
        """Joins ``columns(start, width) -> [m, width]`` over all n."""
        full, rest = divmod(self.n, self.width)
        runs = lax.map(lambda i: columns(i * self.width, self.width), jnp.arange(full))
        y = runs.transpose(1, 0, 2).reshape(runs.shape[1], full * self.width)
        if rest:
            y = jnp.concatenate([y, columns(self.n - rest, rest)], axis=1)
        return y


def _width(n: int, limit: int) -> int:
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


def _whole_blocks(w: QTensor) -> int:
    """Rows of a group, which are whole blocks of affine codes; declines others."""
    (segment,) = w.segments
    group = segment.group_size or w.k
    if w.layout != NATIVE or w.affine is Affine.CODEBOOK or not _whole_groups(w):
        raise NotImplementedError(f"{w!r} is not affine in whole groups of a Stream.")
    if _is_padded(w):
        raise NotImplementedError(f"{w!r} has padding in its words.")
    if group % block(segment.bits)[0]:
        raise NotImplementedError(
            f"group_size={group} is not whole blocks of {segment.bits}-bit codes."
        )
    return group


def _largest(sizes: range, whole: int) -> int:
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
        return _largest(range(codes, group + 1, codes), group)
    whole = math.lcm(codes, group)
    return _largest(range(whole, k + 1, whole), k)


def _cut(
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

    def cut(parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        shared = parameter.shape[-1] == 1
        start, width = (0, 1) if shared else (column, columns)
        return lax.dynamic_slice(parameter, (first_group, start), (groups, width))

    return dataclasses.replace(
        w,
        words=(words,),
        scale=cut(w.scale),
        zero=cut(w.zero),
        segments=(Segment(segment.bits, group_size),),
        padding=0,
    )


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros to start a sum with; inside `jax.shard_map` they vary as ``like`` does."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, jnp.float32)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _dot(a: Array, b: Array) -> Array:
    if a.shape[0] == 1 and _SLOW_VECTORS:
        return _dot(jnp.pad(a, ((0, 1), (0, 0))), b)[:1]
    return jnp.dot(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _dot_t(a: Array, b: Array) -> Array:
    """``a @ b.T`` without a transpose."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
