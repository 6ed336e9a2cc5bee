"""The JAX libraries that `gpu_matmul.py` times, by name."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_ours import OURS
from gpu_weights import GROUP, Codes, Weight, Weights, bind


def dense_weights(k: int, n: int) -> Weights:
    """What XLA makes of a bfloat16 product."""
    import jax.numpy as jnp

    def make() -> Weight:
        codes = Codes.random(k, n, 4)
        return bind(jnp.dot, dense_of(codes), 16, codes)

    return {"dense bf16, XLA": make}


def dense_of(codes: Codes) -> Any:
    """The bfloat16 weight, formed on the device."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def form(q: Any, scale: Any, zero: Any) -> Any:
        groups = q.astype(jnp.float32).reshape(len(scale), GROUP, -1)
        centred = groups - zero[:, None].astype(jnp.float32)
        dense = centred * scale[:, None].astype(jnp.float32)
        return dense.reshape(q.shape).astype(jnp.bfloat16)

    return form(*map(jnp.asarray, codes))


def _qarray(codes: Codes) -> Any:
    import jax.numpy as jnp
    import qwix

    signed = codes.q.astype(np.int8) - np.int8(8)
    # An array made here: a constant of two to a byte cannot be moved.
    value = jnp.asarray(signed).astype(jnp.int4)
    return qwix.QArray(qvalue=value, scale=jnp.asarray(codes.scale, jnp.bfloat16))


def qwix_weights(k: int, n: int) -> Weights:
    """qwix dequantizes, then multiplies; XLA may fuse that, or not."""
    import qwix

    def make() -> Weight:
        codes = Codes.random(k, n, 4, symmetric=True)
        dims = (((1,), (0,)), ((), ()))
        op = lambda x, w: qwix.dot_general(x, w, dims)  # noqa: E731
        return bind(op, _qarray(codes), 4, codes)

    return {"qwix, int4": make}


def tokamax_weights(k: int, n: int) -> Weights:
    """A ragged product of one group; its GPU kernel, and no fallback from it."""
    import jax
    import jax.numpy as jnp
    import tokamax

    on_gpu = jax.default_backend() == "gpu"
    implementation = "mosaic" if on_gpu else "xla"

    def make(*, transposed: bool) -> Weight:
        codes = Codes.random(k, n, 4, symmetric=True)
        axes = (1, 0) if transposed else (0, 1)
        weight = jax.tree.map(lambda a: a.transpose(axes)[None], _qarray(codes))

        def op(x: Any, w: Any) -> Any:
            w = w.swapaxes(1, 2) if transposed else w
            sizes = jnp.full(1, len(x), jnp.int32)
            return tokamax.ragged_dot(x, w, sizes, implementation=implementation)

        return bind(op, weight, 4, codes)

    name = f"tokamax {implementation}, int4"
    return {
        f"{name} [k, n]": functools.partial(make, transposed=False),
        f"{name} [n, k]": functools.partial(make, transposed=True),
    }


# Each in a process of its own, so that a fault of one kernel ends no other's.
LIBRARIES: dict[str, Callable[[int, int], Weights]] = {
    "dense": dense_weights,
    **OURS,
    "qwix": qwix_weights,
    "tokamax": tokamax_weights,
}
