"""How long a call takes on a device where a launch takes as long as the work.

A weight of some megabytes would stay in the L2 cache, and Python needs longer to start
a call than the GPU to do it. So many calls are put into one program, over copies of the
weight that together exceed the cache.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.tensor import QTensor

# Copies of a weight exceed this many bytes together: twice the largest L2 cache of
# today's GPUs (128 MB).
CACHE = 256 * 2**20
# What a program lasts at least, so that the half millisecond of its dispatch does not
# count, reckoned with rates that no GPU up to an H200 exceeds (on a B200 it lasts half
# of that, or a third): bytes and operations a second, and the seconds of the smallest
# call.
_LASTS = 0.02
_BANDWIDTH, _ARITHMETIC, _CALL = 4e12, 6e14, 4e-6


def copies(w: QTensor, nbytes: int = CACHE) -> list[QTensor]:
    """Makes weights like one that together have at least ``nbytes``, at least two.

    Codes are random; scales are positive, so that float16 holds the weight.

    Args:
      w: Its leaves may be structs.
      nbytes: Of all copies together.
    """
    count = copies_beyond(nbytes_of(w), nbytes)
    # The compiler would take what is not an argument for a constant.
    fill = jax.jit(functools.partial(_random, w))
    return [fill(jax.random.key(i)) for i in range(count)]


def copies_beyond(one: int, nbytes: int = CACHE) -> int:
    """How many copies of ``one`` bytes have ``nbytes`` together, at least two."""
    return max(2, -(-nbytes // one))


def nbytes_of(tree: Any) -> int:
    """Bytes of all leaves, which may be structs."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _random(w: QTensor, key: Array) -> QTensor:
    def leaf(struct: Any, key: Array) -> Array:
        if jnp.issubdtype(struct.dtype, jnp.integer):
            unsigned = jnp.dtype(f"uint{8 * struct.dtype.itemsize}")
            return jax.random.bits(key, struct.shape, unsigned).astype(struct.dtype)
        scale = jax.random.uniform(key, struct.shape, minval=0.005, maxval=0.01)
        return scale.astype(struct.dtype)

    leaves, tree = jax.tree.flatten(w)
    filled = map(leaf, leaves, jax.random.split(key, len(leaves)))
    w = jax.tree.unflatten(tree, filled)
    if w.zero is None or not jnp.issubdtype(w.zero.dtype, jnp.integer):
        return w
    codes = 2 ** min(segment.bits for segment in w.segments)
    return dataclasses.replace(w, zero=w.zero & (codes - 1))


def rounds(nbytes: int, operations: int, calls: int) -> int:
    """Reckons how often to repeat some calls for a program that lasts.

    Args:
      nbytes: What a call reads.
      operations: What it computes.
      calls: How many there are.
    """
    call = max(nbytes / _BANDWIDTH, operations / _ARITHMETIC, _CALL)
    return math.ceil(_LASTS / (call * calls))


def chained(op: Callable[..., Any], rounds: int) -> Callable[..., Array]:
    """Makes one program of many calls, each of which waits for the one before.

    Args:
      op: Takes operands and one of the weights.
      rounds: How often it goes through all weights.

    Returns:
      A compiled function of the operands and a sequence of weights. All that it returns
      is a scalar that depends on every call.
    """

    @jax.jit
    def run(operands: Sequence[Array], weights: Sequence[Any]) -> Array:
        def once(_: Array, token: Array) -> Array:
            firsts = []
            for w in weights:
                # The barriers make each call depend on the last, so that none is left
                # out, moved out of the loop, cut down to what is used, or run beside
                # another. They cost nothing.
                token, *given = lax.optimization_barrier((token, *operands, w))
                token, out = lax.optimization_barrier((token, op(*given)))
                first = jax.tree.leaves(out)[0]
                firsts.append(first[(0,) * first.ndim].astype(jnp.float32))
            return token + jnp.stack(firsts).sum()

        return lax.fori_loop(0, rounds, once, jnp.float32(0))

    return run


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Times calls that return arrays, after one that compiles and warms up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds
