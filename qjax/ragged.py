"""`ragged_matmul`: every token by the matrix of its expert.

The tokens of an expert follow each other, and are cut into blocks of ``block_m`` rows:

    tokens          a a a a a b b c c c c
    blocks of 4     [a a a a] [a . . .] [b b . .] [c c c c]

How many blocks there are is only known when the program runs, and a loop visits those
alone; how many there can be, which bounds the memory, follows from the shapes. In a
block all rows have one expert, and so it is a product of `qjax.matmul` with the index
of a matrix, which the GPU kernels read where it lies. On a GPU one launch multiplies
all blocks; the gradients are loops there, too.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int32, Integer

from qjax import dispatch, ops, pallas, product, sharding, watched
from qjax.dispatch import Choice
from qjax.meshes import (
    explicitly_like,
    gathered,
    on_mesh_of,
    shares,
    vary_together,
    whole,
)
from qjax.partitioning import over_devices
from qjax.sharding import P
from qjax.tensor import QTensor, check_array, check_packed
from qjax.watched import Watched

# From the rows that a GPU kernel takes at least to those of its largest tile.
_FEWEST, _MOST = 8, 128
# Experts whose tokens are counted by adding up, for each, those of all before it.
_MOST_SUMMED = 512


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
    differentiable in ``x`` and in the float leaves of ``w``; but only once, as the
    gradients are loops over the blocks that hold tokens, and JAX refuses to
    differentiate those. It reads the matrices of those experts that have tokens, once
    for every block of their tokens.

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
    if shares(w.words[0])[0] > 1:
        _warn_of_gathering(w.shape)


@functools.lru_cache
def _warn_of_gathering(shape: tuple[int, ...]) -> None:
    warnings.warn(
        f"w.shape={shape} is cut along its experts, and so every device gets all of "
        "its words at each call of ragged_matmul; cut along k or n, as by "
        "qjax.shard(w, mesh, P(None, None, 'model')), they stay where they are.",
        stacklevel=4,
    )


def experts_of(
    group_sizes: Integer[Array, " experts"], t: int
) -> tuple[Int32[Array, " t"], Bool[Array, " t"]]:
    """Says which expert each of sorted tokens has.

    Args:
      group_sizes: As in `ragged_matmul`.
      t: Number of tokens.

    Returns:
      The experts, and whether a token has one; where not, its expert is the last.
    """
    ends = _running_sum(group_sizes.astype(jnp.int32))
    tokens = jnp.arange(t, dtype=jnp.int32)
    return _run_of(tokens, ends), tokens < ends[-1]


def _run_of(places: Array, ends: Array) -> Array:
    """The run that each place lies in, of runs that end there; else the last run."""
    # Unrolled, it is one kernel on a GPU, and no loop of several.
    run = jnp.searchsorted(ends, places, side="right", method="scan_unrolled")
    return jnp.minimum(run.astype(jnp.int32), len(ends) - 1)


def _running_sum(counts: Array) -> Array:
    """The cumulative sum; of not very many one kernel on a GPU, which XLA's is not."""
    if len(counts) > _MOST_SUMMED:
        return jnp.cumsum(counts)
    places = jnp.arange(len(counts))
    up_to = places[None] <= places[:, None]
    return jnp.where(up_to, counts[None], 0).sum(1, dtype=counts.dtype)


class _Blocks(NamedTuple):
    """How tokens lie in blocks.

    Attributes:
      expert: Of every block.
      used: Number of blocks that hold tokens; they come first.
      token: Of every row of a block.
      inside: Whether that row holds a token.
      place: Of every token, among the rows of all blocks.
      has_expert: Whether a token is in a block.
    """

    expert: Int32[Array, " blocks"]
    used: Int32[Array, ""]
    token: Int32[Array, "blocks block_m"]
    inside: Bool[Array, "blocks block_m"]
    place: Int32[Array, " t"]
    has_expert: Bool[Array, " t"]


def _plan(group_sizes: Array, t: int) -> _Blocks:
    experts = len(group_sizes)
    block_m = _block_rows(t, experts)
    # Most blocks there are where as many experts as can be have one token, and all
    # others are in whole blocks.
    least = min(t, experts)
    blocks = jnp.arange(least + (t - least) // block_m, dtype=jnp.int32)
    ends = jnp.minimum(_running_sum(group_sizes.astype(jnp.int32)), t)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    held = -(-(ends - starts) // block_m)
    after = _running_sum(held)
    expert = _run_of(blocks, after)
    first = starts[expert] + (blocks - (after - held)[expert]) * block_m
    token = first[:, None] + jnp.arange(block_m, dtype=jnp.int32)[None]
    own, has_expert = experts_of(group_sizes, t)
    place = (after - held)[own] * block_m + jnp.arange(t, dtype=jnp.int32) - starts[own]
    return _Blocks(
        expert=expert,
        used=after[-1],
        token=jnp.minimum(token, t - 1),
        inside=token < ends[expert][:, None],
        place=place,
        has_expert=has_expert,
    )


def _block_rows(t: int, experts: int) -> int:
    """The power of two that the tokens of an expert fill on average."""
    mean = -(-t // experts)
    return min(t, max(_FEWEST, min(_MOST, 1 << (mean - 1).bit_length())))


@functools.partial(jax.jit, static_argnums=3)
def _apply(
    x: Array, w: QTensor, group_sizes: Array, implementation: str | None
) -> Array:
    t = len(x)
    if not t:
        return jnp.zeros((0, w.n), x.dtype)
    with on_mesh_of((x, w)):
        # A block has tokens of any device.
        x, group_sizes = gathered((x, group_sizes))
        blocks = _plan(group_sizes, t)
        rows = _rows(blocks, x)
        if w.input_scale is not None:
            scale = gathered(w.input_scale).astype(jnp.float32)[blocks.expert]
            rows = rows.astype(jnp.float32) * scale[:, None]
        choice = Choice(implementation, kernels=x.dtype != jnp.float32, dtype=x.dtype)
        bare = dataclasses.replace(ops.readable(w), input_scale=None)
        operands = vary_together(rows, bare, blocks.expert, blocks.used)
        y = _products(*operands, choice).reshape(-1, w.n)
        return jnp.where(blocks.has_expert[:, None], y[blocks.place], 0)


def _rows(blocks: _Blocks, x: Array) -> Array:
    """The tokens of every block, and zeros in the rows that hold none."""
    return jnp.where(blocks.inside[..., None], x[blocks.token], 0)


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
        blocks = _plan(group_sizes, len(x))
        rows = _rows(blocks, x)

        def add(b: Array, gram: Array) -> Array:
            return gram.at[blocks.expert[b]].add(watched.outer(rows[b]))

        gram = lax.fori_loop(0, blocks.used, add, gram)
    return dx, gram, np.zeros(group_sizes.shape, jax.dtypes.float0)


_seen.defvjp(_seen_forward, _seen_backward)


# A block's product is y = x W of its expert, and with g its cotangent
#   dx = g W^T,   dW = sum over the expert's blocks of x^T g.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _products(
    rows: Float[Array, "blocks block_m k"],
    w: QTensor,
    expert: Int32[Array, " blocks"],
    used: Int32[Array, ""],
    choice: Choice,
) -> Float[Array, "blocks block_m n"]:
    """Multiplies each block that holds tokens by its expert; the others give zeros."""
    return over_devices(
        functools.partial(_forward, choice),
        (w, rows, expert, used),
        _names(w),
        P(None, None, "n"),
        product.units_of(w),
        summand=functools.partial(_forward, choice.wide),
    )


def _names(w: QTensor) -> tuple[Any, ...]:
    """What `over_devices` must know of the operands ``(w, rows, expert, used)``."""
    of_rows = P(None, None, product.inputs_of(w))
    return sharding.names(w), of_rows, P(None), P()


def _in_order(rows: Array, order: Array | None, expert: Array) -> Array:
    """Puts the inputs of every block into the order of its expert's rows."""
    if order is None:
        return rows
    return jnp.take_along_axis(rows, order[expert][:, None], axis=2)


def _forward(
    choice: Choice, w: QTensor, rows: Array, expert: Array, used: Array
) -> Array:
    def one_by_one(rows: Array, w: QTensor, expert: Array, used: Array) -> Array:
        def one(b: Array) -> Array:
            matrix, index = dispatch.native(w, expert[b])
            return dispatch.multiply(choice, matrix, rows[b], index)

        return _each(one, rows, used)

    def in_one_launch(rows: Array, w: QTensor, expert: Array, used: Array) -> Array:
        index = jnp.where(jnp.arange(len(expert)) < used, expert, -1)
        return pallas.fused_blocks(rows, w, index, choice.dtype)

    w, order = product.stored(w)
    operands = _in_order(rows, order, expert), w, expert, used
    if dispatch.goes_to_kernels(w, choice):
        # The platform is known when the program is lowered, not here.
        return lax.platform_dependent(*operands, cuda=in_one_launch, default=one_by_one)
    return one_by_one(*operands)


def _backward(
    choice: Choice, w: QTensor, rows: Array, expert: Array, used: Array, dy: Array
) -> Array:
    w, order = product.stored(w)

    def one(b: Array) -> Array:
        return dispatch.multiply_t(choice, *_of_block(w, dy, expert, b))

    back = jax.linear_transpose(lambda rows: _in_order(rows, order, expert), rows)
    (dx,) = back(_each(one, dy, used).astype(rows.dtype))
    return dx


def _leaf_gradients(
    choice: Choice, w: QTensor, rows: Array, expert: Array, used: Array, dy: Array
) -> dict[str, Any]:
    bare, order = product.stored(w)
    xs = _in_order(rows, order, expert)

    def leaves(b: Array) -> dict[str, Array]:
        matrix, cotangent, index = _of_block(bare, dy, expert, b)
        return dispatch.leaf_gradients(choice, matrix, xs[b], cotangent, index)

    def add(b: Array, total: dict[str, Array]) -> dict[str, Array]:
        return {
            name: total[name].at[expert[b]].add(gradient)
            for name, gradient in leaves(b).items()
        }

    abstract = jax.eval_shape(leaves, jax.ShapeDtypeStruct((), jnp.int32))
    start = {
        name: jnp.zeros((*bare.batch, *like.shape), jnp.float32)
        for name, like in abstract.items()
    }
    start, _ = vary_together(start, rows)
    total = lax.fori_loop(0, used, add, start)
    return {name: product.as_in(w, name, array) for name, array in total.items()}


def _of_block(
    w: QTensor, dy: Array, expert: Array, b: Array
) -> tuple[QTensor, Array, Array | None]:
    """The matrix of a block, its cotangent, and where the matrix is a stack's."""
    matrix, index = dispatch.native(w, expert[b])
    return matrix, dy[b], index


def _each(one: Callable[[Array], Array], rows: Array, used: Array) -> Array:
    """Stacks ``one(b)`` of the first ``used`` blocks, and zeros for the others."""
    like = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
    out = jnp.zeros((len(rows), *like.shape), like.dtype)
    out, _ = vary_together(out, rows)
    return lax.fori_loop(0, used, lambda b, out: out.at[b].set(one(b)), out)


def _products_forward(
    rows: Array, w: QTensor, expert: Array, used: Array, choice: Choice
) -> tuple:
    return _products(rows, w, expert, used, choice), (rows, w, expert, used)


def _products_backward(choice: Choice, residuals: tuple, dy: Array) -> tuple:
    rows, w, expert, used = residuals
    operands = w, rows, expert, used, dy.astype(jnp.float32)
    of_operands = (*_names(w), P(None, None, "n"))
    dx = over_devices(
        functools.partial(_backward, choice),
        operands,
        of_operands,
        of_operands[1],
        product.units_of(w),
    )
    names = product.float_leaves(w)
    # In a loop of its own, which is left out where nobody asks for these.
    gradients = over_devices(
        functools.partial(_leaf_gradients, choice),
        operands,
        of_operands,
        product.float_arrays(of_operands[0], names),
        product.units_of(w),
    )
    leaves = product.float_arrays(w, names)
    dx, gradients = explicitly_like((dx, gradients), (rows, leaves))
    cast = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, leaves)
    integers = (np.zeros(a.shape, jax.dtypes.float0) for a in (expert, used))
    return dx, product.cotangent(w, cast), *integers


_products.defvjp(_products_forward, _products_backward)
