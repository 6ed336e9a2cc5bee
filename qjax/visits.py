"""`visit`: a loop over the blocks of tokens that a device has, with its derivative.

How many blocks hold tokens is only known when the program runs, and JAX has no reverse
mode for a loop of as many steps. That of a loop over blocks is known, though, as they
do not depend on each other: it is a loop over the same blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import pallas
from qjax.blocks import Share
from qjax.meshes import vary_together


# With f of a block, b its cotangents of what comes of it, and e those of the sums of
# its expert, the cotangents of its rows are those that (b, e) has through f, and those
# of the expert the sum of what it has through f of all its blocks. So they come of a
# visit, too, and have derivatives as well.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def visit(
    one: Callable[[Any, Array | None, Any], tuple[Any, Any]],
    stacks: Any,
    rows: Any,
    share: Share,
) -> tuple[Any, Any]:
    """Calls a function of each block of a device; differentiable.

    Args:
      one: Takes the stacks, the index of the block's expert in them, and the block's
        rows; or what one expert has in the stacks, None, and the rows. It returns what
        comes of the block, and float32 summands of what comes of its expert, closes
        over no arrays, and can be differentiated where there is no index.
      stacks: Tree of arrays ``[experts, ...]``.
      rows: Tree of floats ``[blocks, ...]``.
      share: The blocks of the device.

    Returns:
      What came of every block, and zeros for those of other devices, ``[blocks, ...]``;
      and the sums over the blocks of every expert, ``[experts, ...]``.
    """

    def at(b: Array) -> tuple[Any, Any]:
        return one(stacks, share.expert[b], pallas.one_of(rows, b))

    def step(b: Array, made: tuple[Any, Any]) -> tuple[Any, Any]:
        (of_blocks, of_experts), (block, summands) = made, at(b)
        put = lambda leaf, new: leaf.at[b].set(new)  # noqa: E731
        add = lambda leaf, new: leaf.at[share.expert[b]].add(new)  # noqa: E731
        return (
            jax.tree.map(put, of_blocks, block),
            jax.tree.map(add, of_experts, summands),
        )

    experts = len(jax.tree.leaves(stacks)[0])
    shapes = jax.eval_shape(at, jax.ShapeDtypeStruct((), jnp.int32))
    start = tuple(
        jax.tree.map(lambda a, n=n: jnp.zeros((n, *a.shape), a.dtype), tree)
        for n, tree in zip((len(share.expert), experts), shapes, strict=True)
    )
    start, _ = vary_together(start, (stacks, rows))
    return lax.fori_loop(share.begin, share.end, step, start)


def _forward(one: Callable[..., Any], stacks: Any, rows: Any, share: Share) -> tuple:
    return visit(one, stacks, rows, share), (stacks, rows, share)


def _backward(
    one: Callable[..., Any], residuals: tuple[Any, Any, Share], cotangents: Any
) -> tuple[Any, Any, None]:
    stacks, rows, share = residuals
    of_blocks, of_experts = cotangents

    def pulled(stacks: Any, index: Array | None, rows: Any) -> tuple[Any, list[Array]]:
        (held, of_expert), (rows, of_block) = pallas.one_of(stacks, index), rows
        _, pull = jax.vjp(lambda held, rows: one(held, None, rows), held, rows)
        by_held, by_rows = pull((of_block, of_expert))
        floats = [g for g in jax.tree.leaves(by_held) if g.dtype != jax.dtypes.float0]
        return by_rows, [g.astype(jnp.float32) for g in floats]

    by_rows, sums = visit(pulled, (stacks, of_experts), (rows, of_blocks), share)
    left = iter(sums)

    def cotangent(leaf: Array) -> Array | np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return next(left).astype(leaf.dtype)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(cotangent, stacks), by_rows, None


visit.defvjp(_forward, _backward)
