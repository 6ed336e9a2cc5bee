"""Cotangents: ``dy @ W.T``, and the gradients of the float leaves."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import decode
from qjax.bits import block
from qjax.tensor import QTensor
from qjax.xla.products import constant
from qjax.xla.tiles import (
    NATIVE,
    TILE,
    Grid,
    cut,
    dot,
    dot_t,
    largest,
    tile_width,
    whole_blocks,
    zeros,
)


def dense_t(dy: Float[Array, "m n"], w: QTensor) -> Float[Array, "m k"]:
    """``dy @ W.T`` through the dense weight."""
    return dot_t(dy, decode.stored_weight(w, jnp.float32))


def dense_grad(
    x: Float[Array, "m k"], dy: Float[Array, "m n"], w: QTensor
) -> dict[str, Array]:
    """Gradients of the float leaves through the dense gradient of the weight."""
    return _leaf_gradients(w, dot(x.T, dy))


def tiled_t(dy: Float[Array, "m n"], w: QTensor) -> Float[Array, "m k"]:
    """``dy @ W.T``, tile by tile.

    Args:
      dy: float32 cotangent of the product.
      w: As in `tiled`.

    Returns:
      float32 product.
    """
    grid, m = Grid.of(w), dy.shape[0]

    def rows(j: Array) -> Array:
        def column(i: Array, dx: Array) -> Array:
            return dx + part(i * grid.width, grid.width)

        def part(start: Array | int, width: int) -> Array:
            cotangent = lax.dynamic_slice_in_dim(dy, start, width, 1)
            return dot_t(cotangent, grid.tile(w, j, start, width))

        dx = zeros((m, grid.rows), dy)
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
    grid = Grid.of(w, whole_columns=True)

    def columns(start: Array | int, width: int) -> dict[str, Array]:
        part = cut(w, 0, w.k, start, width)
        return _leaf_gradients(
            part, dot(x.T, lax.dynamic_slice_in_dim(dy, start, width, 1))
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
    group, m = whole_blocks(w), x.shape[0]
    groups, bits = w.k // group, w.segments[0].bits
    rows = largest(range(block(bits)[0], group + 1, block(bits)[0]), group)
    grid = Grid(rows, group // rows, tile_width(w.n, TILE // rows), w.n)
    steps = x.reshape(m, groups, grid.steps, rows).transpose(1, 2, 0, 3)

    def columns(start: Array | int, width: int) -> Array:
        cotangent = lax.dynamic_slice_in_dim(dy, start, width, 1)

        def one_group(g: Array) -> Array:
            def step(j: Array, products: Array) -> Array:
                part = cut(w, g * group + j * rows, rows, start, width)
                q = NATIVE.unpack(part.words[0], bits).astype(jnp.float32)
                return products + dot(steps[g, j], q)

            products = lax.fori_loop(0, grid.steps, step, zeros((m, width), x))
            return (products * cotangent).sum(0)

        return lax.map(one_group, jnp.arange(groups))

    leaves = _float_leaves(w)
    _, pull = jax.vjp(
        lambda leaves: jnp.broadcast_to(
            constant(dataclasses.replace(w, **leaves)), (groups, w.n)
        ),
        leaves,
    )
    sums = x.reshape(m, groups, group).sum(-1)
    (gradients,) = pull(dot(sums.T, dy))
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
