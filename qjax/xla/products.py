"""``x @ W``: for few rows, for many, through 8 bits, and through the dense weight."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import decode, tensor
from qjax.tensor import Affine, Grouping, QTensor
from qjax.xla.tiles import (
    NATIVE,
    TILE,
    Grid,
    cut,
    dot,
    largest,
    tile_width,
    whole_blocks,
    zeros,
)

# Codes that one element-wise fusion of `fused` consumes; XLA splits much longer ones.
_FUSED = 32


def dense(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Forms the weight in float32, then multiplies: any layout and grouping."""
    return dot(x, decode.stored_weight(w, jnp.float32))


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
    group, (words,), k, n = whole_blocks(w), w.words, w.k, w.n
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
    count = largest(range(1, 9), run)  # of unrolled terms: the program stays short

    def add_some(j: int | Array, y: Array) -> Array:
        parts = lax.dynamic_slice_in_dim(dots, j * count, count, 0)
        s = lax.dynamic_index_in_dim(scale, j * count // run, 0)
        return y + s * _add(list(parts))

    sums = x.reshape(m, k // group, group).sum(-1)
    # Spread over the columns after the product: of sums with what is broadcast itself,
    # XLA's CPU backend returns memory that nobody wrote (jax 0.12).
    start = jnp.broadcast_to(dot(sums, constant(w)), (m, n))
    return lax.fori_loop(0, k // _FUSED // count, add_some, start)


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


def constant(w: QTensor) -> Array:
    """What the affine map adds for each unit of x, in float32.

    Returns:
      ``[groups, n]``, or ``[groups, 1]`` where all columns have the same.
    """
    scale = w.scale.astype(jnp.float32)
    zero = jnp.float32(0) if w.zero is None else w.zero.astype(jnp.float32)
    constant = -scale * zero if w.affine is Affine.ZERO else zero
    if w.affine is Affine.CENTERED:
        constant -= scale * 2 ** (w.segments[0].bits - 1)
    groups = w.k // (w.segments[0].group_size or w.k)
    return jnp.broadcast_to(constant, (groups, jnp.shape(constant)[-1]))


def tiled(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Batches: dequantizes a tile into the cache, multiplies, goes on to the next.

    Args:
      x: float32 activations.
      w: Codes in a `Stream`, groups of rows of any size, any affine map.

    Returns:
      float32 product.
    """
    grid = Grid.of(w)
    steps = x.reshape(x.shape[0], grid.steps, grid.rows).transpose(1, 0, 2)

    def columns(start: Array | int, width: int) -> Array:
        def step(j: Array, y: Array) -> Array:
            return y + dot(steps[j], grid.tile(w, j, start, width))

        return lax.fori_loop(0, grid.steps, step, zeros((x.shape[0], width), x))

    return grid.over_columns(columns)


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
    group, k, m, bits = whole_blocks(w), w.k, x.shape[0], w.segments[0].bits
    groups, width = k // group, tile_width(w.n, TILE // group)
    by_group = x.reshape(m, groups, group).transpose(1, 0, 2)
    step = jnp.abs(by_group).max(-1, keepdims=True) / 127
    rounded = jnp.round(by_group / jnp.where(step == 0, 1, step))
    # An int8 holds a code of eight bits only around its middle.
    centre = 128 if bits == 8 else 0
    scale = w.scale.astype(jnp.float32)
    codes_scale = jnp.broadcast_to(scale, (groups, w.n))
    sums = (rounded.sum(-1) * step[..., 0]).T
    start = jnp.broadcast_to(dot(sums, constant(w) + centre * scale), (m, w.n))
    rounded = rounded.astype(jnp.int8)

    def columns(first: Array | int, width: int) -> Array:
        def add_group(g: Array, y: Array) -> Array:
            words = cut(w, g * group, group, first, width).words[0]
            q = NATIVE.unpack(words, bits).astype(jnp.int32) - centre
            acc = jnp.dot(
                rounded[g], q.astype(jnp.int8), preferred_element_type=jnp.int32
            )
            s = lax.dynamic_slice(codes_scale, (g, first), (1, width))
            return y + step[g] * s * acc.astype(jnp.float32)

        y = lax.dynamic_slice_in_dim(start, first, width, 1)
        return lax.fori_loop(0, groups, add_group, y)

    return Grid(group, groups, width, w.n).over_columns(columns)


def float8(x: Float[Array, "m k"], w: QTensor) -> Float[Array, "m n"]:
    """Inexact: activations rounded to E4M3 floats per row, and so multiplied.

    What files of FP8 with dynamic activations are made for. On an NVIDIA GPU from sm_89
    on, XLA multiplies such floats as they are, which its tensor cores do at twice the
    rate of 16-bit ones, and forms the weight in a byte each; elsewhere it widens them.
    The error is that of activations of four significant bits, about 3 % of the norm of
    the output. Never chosen unless asked for by name.

    Args:
      x: float32 activations.
      w: E4M3 floats in any layout, with a scale for each column, or one for all.

    Returns:
      float32 product.
    """
    (segment,) = w.segments
    whole = w.grouping is Grouping.ROWS and segment.group_size in (None, w.k)
    if w.affine is not Affine.FLOAT or segment.bits != 8 or not whole:
        raise NotImplementedError(
            f"{w!r} is not of E4M3 floats with a scale for each column, or one for all."
        )
    step = jnp.abs(x).max(-1, keepdims=True) / tensor.SMALL_FLOATS[8].largest
    rounded = (x / jnp.where(step == 0, 1, step)).astype(jnp.float8_e4m3fn)
    weight = lax.bitcast_convert_type(tensor.codes(w), jnp.float8_e4m3fn)
    y = jnp.dot(rounded, weight, preferred_element_type=jnp.float32)
    return y * step * w.scale.astype(jnp.float32)
