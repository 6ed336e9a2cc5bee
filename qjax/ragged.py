"""`ragged_matmul`: every token by the matrix of its expert.

In a block of tokens (`qjax.blocks`) all have one expert, and so it is a product of
`qjax.matmul` with the index of a matrix, which the GPU kernels read where it lies. On a
GPU one launch multiplies all blocks; elsewhere, and in the gradients, a loop visits
those that hold tokens.

A stack may be cut over devices along its experts. A device then visits the blocks of
those that it holds, and gives zeros for all other tokens; the sum over the devices is
what one device would give.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Integer

from qjax import dispatch, ops, pallas, product, sharding, watched
from qjax.blocks import Blocks, Share, plan
from qjax.dispatch import Choice
from qjax.meshes import (
    explicitly_like,
    gathered,
    on_mesh_of,
    vary_together,
    whole,
)
from qjax.partitioning import over_devices
from qjax.sharding import P
from qjax.tensor import QTensor, check_array, check_packed
from qjax.visits import visit
from qjax.watched import Watched


def ragged_matmul(
    x: Float[Array, "t k"],
    w: QTensor,
    group_sizes: Integer[Array, " experts"],
    *,
    implementation: str | None = None,
) -> Float[Array, "t n"]:
    """Multiplies runs of rows by a matrix each: `jax.lax.ragged_dot` of a `QTensor`.

    Row ``i`` of the result is ``x[i] @ dequantize(w[e])``, where expert ``e`` is the
    one whose run has row ``i``. As `qjax.matmul`, it forms no dense weight and is
    differentiable in ``x`` and in the float leaves of ``w``, by `jax.grad` and
    `jax.jacrev`, also of one another. It reads the matrices of those experts that have
    tokens, once for every block of their tokens. Of a stack that is cut over devices
    along its experts (`qjax.shard`), each device multiplies the tokens of its own;
    inside `jax.shard_map` a share of one is a stack like any other, and its sizes are
    those of the experts in it.

    Args:
      x: Tokens sorted by expert, ``[t, k]`` bfloat16, float16 or float32.
      w: ``[experts, k, n]`` quantized weights.
      group_sizes: How many tokens each expert has. What their sum exceeds t by is cut
        off.
      implementation: As in `qjax.matmul`.

    Returns:
      ``[t, n]`` in the dtype of ``x``; rows beyond the sum of ``group_sizes`` are zero.

    Raises:
      TypeError: If ``w`` is no `QTensor`, or ``group_sizes`` no array.
      ValueError: If shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: If the named implementation declines these operands, or t is
        left open for `jax.export`.

    Example:
      >>> w = qjax.quantize(jnp.ones((3, 64, 8)), bits=4, group_size=32)
      >>> y = ragged_matmul(jnp.ones((5, 64)), w, jnp.array([2, 0, 2]))
      >>> y[:, 0].tolist()
      [64.0, 64.0, 64.0, 64.0, 0.0]
    """
    _check(x, w, group_sizes)
    ops.check(x, w, 0, implementation)
    if isinstance(w, Watched):
        x, w = _seen(x, w.gram, group_sizes), watched.bare(w)
    return _apply(x, w, group_sizes, implementation)


def _check(x: Array, w: QTensor, group_sizes: Array) -> None:
    check_packed(w)
    check_array(group_sizes, "group_sizes")
    if len(w.batch) != 1 or w.batch == (0,):
        raise ValueError(f"w.shape={w.shape} must be [experts, k, n].")
    if x.ndim != 2:
        raise ValueError(f"x.shape={x.shape} must be [t, k]; reshape x.")
    if is_symbolic_dim(x.shape[0]):
        raise NotImplementedError(
            f"x.shape={x.shape} leaves the number of tokens open, and blocks are laid "
            "out for a number; export one."
        )
    integer = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    if group_sizes.shape != w.batch or not integer:
        raise ValueError(
            f"group_sizes must be integers {w.batch}, as w.shape={w.shape}; got "
            f"{group_sizes.dtype}{group_sizes.shape}."
        )


@functools.partial(jax.jit, static_argnums=3)
def _apply(
    x: Array, w: QTensor, group_sizes: Array, implementation: str | None
) -> Array:
    if not len(x):
        return jnp.zeros((0, w.n), x.dtype)
    with on_mesh_of((x, w)):
        blocks = plan(gathered(group_sizes), len(x))
        choice = Choice(implementation, kernels=x.dtype != jnp.float32, dtype=x.dtype)
        return _products(*vary_together(x, ops.readable(w), blocks), choice)


@jax.custom_vjp
def _seen(x: Array, gram: Array, group_sizes: Array) -> Array:
    """``x``; the cotangents of ``gram`` are those of the tokens of each expert."""
    return x


def _seen_forward(x: Array, gram: Array, group_sizes: Array) -> tuple:
    return _seen(x, gram, group_sizes), (x, group_sizes)


def _seen_backward(residuals: tuple[Array, Array], dx: Array) -> tuple:
    x, group_sizes = whole(residuals)
    gram = jnp.zeros((len(group_sizes), x.shape[1], x.shape[1]), jnp.float32)
    if len(x):
        blocks = plan(group_sizes, len(x))
        rows = blocks.rows(x)

        def add(b: Array, gram: Array) -> Array:
            return gram.at[blocks.expert[b]].add(watched.outer(rows[b]))

        gram = lax.fori_loop(0, blocks.after[-1], add, gram)
    return dx, gram, np.zeros(group_sizes.shape, jax.dtypes.float0)


_seen.defvjp(_seen_forward, _seen_backward)


# A block's product is y = x W of its expert, and with g its cotangent
#   dx = g W^T,   dW = sum over the expert's blocks of x^T g.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products(
    x: Float[Array, "t k"], w: QTensor, blocks: Blocks, choice: Choice
) -> Float[Array, "t n"]:
    """Multiplies each token in a block by its expert; the others give zeros."""
    operands, named = _operands(w, x, blocks)
    return over_devices(
        functools.partial(_forward, choice),
        operands,
        named,
        P(None, "n"),
        sharding.units(w),
        summand=functools.partial(_forward, choice.wide),
    )


def _operands(w: QTensor, x: Array, blocks: Blocks) -> tuple[tuple, tuple]:
    """What a device takes, and what `over_devices` must know of it.

    All tokens and blocks, and the numbers of the experts that it holds.
    """
    numbers = product.numbers(w.batch[0])
    of_blocks = jax.tree.map(lambda array: P(*[None] * array.ndim), blocks)
    of_x = P(None, product.inputs_of(w))
    return (w, x, blocks, numbers), (sharding.names(w), of_x, of_blocks, P("b0"))


def _inputs(
    rows: Array, input_scale: Array | None, order: Array | None, expert: Array
) -> Array:
    """What a product takes of blocks: scaled, in the order of their experts' rows."""
    if input_scale is not None:
        scale = input_scale.astype(jnp.float32)[expert]
        rows = rows.astype(jnp.float32) * scale[:, None]
    if order is None:
        return rows
    return jnp.take_along_axis(rows, order[expert][:, None], axis=2)


def _stored(w: QTensor) -> tuple[QTensor, Array | None]:
    return product.stored(dataclasses.replace(w, input_scale=None))


def _forward(
    choice: Choice, w: QTensor, x: Array, blocks: Blocks, numbers: Array
) -> Array:
    def one(w: QTensor, index: Array | None, rows: Array) -> tuple[Array, None]:
        matrix, index = dispatch.native(w, index)
        return dispatch.multiply(choice, matrix, rows, index), None

    def one_by_one(rows: Array, w: QTensor, share: Share) -> Array:
        return visit(one, w, rows, share)[0]

    def in_one_launch(rows: Array, w: QTensor, share: Share) -> Array:
        return pallas.fused_blocks(rows, w, share.matrix, choice.dtype)

    share, (bare, order) = Share.of(blocks, numbers), _stored(w)
    rows = _inputs(blocks.rows(x), w.input_scale, order, share.expert)
    operands = rows, bare, share
    if dispatch.goes_to_kernels(bare, choice):
        # The platform is known when the program is lowered, not here.
        y = lax.platform_dependent(*operands, cuda=in_one_launch, default=one_by_one)
    else:
        y = one_by_one(*operands)
    return blocks.tokens(y)


def _backward(
    choice: Choice, w: QTensor, x: Array, blocks: Blocks, numbers: Array, dy: Array
) -> tuple[Array, Array | None]:
    """The cotangents of tokens and input scale."""
    share, (bare, order) = Share.of(blocks, numbers), _stored(w)

    def one(w: QTensor, index: Array | None, dy: Array) -> tuple[Array, None]:
        matrix, index = dispatch.native(w, index)
        return dispatch.multiply_t(choice, matrix, dy, index), None

    def inputs(rows: Array, input_scale: Array | None) -> Array:
        return _inputs(rows, input_scale, order, share.expert)

    rows = blocks.rows(x).astype(jnp.float32)
    _, back = jax.vjp(inputs, rows, w.input_scale)
    of_rows, of_scale = back(visit(one, bare, blocks.rows(dy), share)[0])
    return blocks.tokens(of_rows).astype(choice.dtype), of_scale


def _leaf_gradients(
    choice: Choice, w: QTensor, x: Array, blocks: Blocks, numbers: Array, dy: Array
) -> dict[str, Any]:
    share, (bare, order) = Share.of(blocks, numbers), _stored(w)

    def one(
        w: QTensor, index: Array | None, rows: tuple[Array, Array]
    ) -> tuple[None, dict[str, Array]]:
        matrix, index = dispatch.native(w, index)
        return None, dispatch.leaf_gradients(choice, matrix, *rows, index)

    rows = _inputs(blocks.rows(x), w.input_scale, order, share.expert)
    _, total = visit(one, bare, (rows, blocks.rows(dy)), share)
    return {name: product.as_in(w, name, array) for name, array in total.items()}


def _products_forward(x: Array, w: QTensor, blocks: Blocks, choice: Choice) -> tuple:
    return _products(x, w, blocks, choice), (x, w, blocks)


def _products_backward(choice: Choice, residuals: tuple, dy: Array) -> tuple:
    x, w, blocks = residuals
    operands, named = _operands(w, x, blocks)
    operands, named = (*operands, dy.astype(jnp.float32)), (*named, P(None, "n"))
    of_w, of_x, *_ = named
    units = sharding.units(w)
    over = functools.partial(
        over_devices, operands=operands, named=named, units=units, reverse=True
    )
    dx = over(
        lambda *operands: _backward(choice, *operands)[0],
        results=of_x,
        summand=lambda *operands: _backward(choice.wide, *operands)[0],
    )
    # Each in a loop of its own, which is left out where nobody asks for these.
    names = product.float_leaves(w)
    gradients = over(
        functools.partial(_leaf_gradients, choice),
        results=product.float_arrays(of_w, names),
    )
    if w.input_scale is not None:
        names.append("input_scale")
        gradients["input_scale"] = over(
            lambda *operands: _backward(choice, *operands)[1],
            results=of_w.input_scale,
        )
    leaves = product.float_arrays(w, names)
    dx, gradients = explicitly_like((dx, gradients), (x, leaves))
    cast = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, leaves)
    integers = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), blocks)
    return dx, product.cotangent(w, cast), integers


_products.defvjp(_products_forward, _products_backward)
