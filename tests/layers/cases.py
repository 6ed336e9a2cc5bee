"""Kernels of every kind that a layer must take, small and made once."""

import functools

import jax.numpy as jnp
import numpy as np

import qjax
from qjax import tensor
from qjax.formats.gptq import Planar, Stream
from qjax.tensor import Affine, QTensor, Segment

K, N, GROUP = 96, 40, 32
FLOATS = ("float32", "bfloat16", "float16")

_UNIFORM = {
    f"{bits}bit{'-symmetric' * symmetric}": (bits, symmetric)
    for bits in (2, 3, 4, 8)
    for symmetric in (False, True)
}
KERNELS = (
    *_UNIFORM,
    "act-order",
    "ragged-act-order",
    "mixed",
    "codebook",
    "float-zero",
    "planar",
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def inputs(dtype: str = "float32", rows: int = 5) -> jnp.ndarray:
    return jnp.asarray(rng(1).normal(size=(rows, K)), dtype)


def bias(dtype: str = "float32") -> jnp.ndarray:
    return jnp.asarray(rng(2).normal(size=N), dtype)


def dense(k: int = K, n: int = N) -> jnp.ndarray:
    return jnp.asarray(rng(3).normal(size=(k, n)) / np.sqrt(k), jnp.float32)


@functools.cache
def kernel(name: str, dtype: str = "float32") -> QTensor:
    """A kernel of one of `KERNELS`, not prepared, with scales of a dtype."""
    if name in _UNIFORM:
        bits, symmetric = _UNIFORM[name]
        return qjax.quantize(dense(), bits, GROUP, symmetric, scale_dtype=dtype)
    if name == "planar":
        return qjax.relayout(kernel("3bit", dtype), Planar())
    draw = rng(4)
    groups = K // GROUP
    scale = jnp.asarray(draw.uniform(0.01, 0.02, (groups, N)), dtype)
    zero = jnp.asarray(draw.integers(0, 16, (groups, N)), jnp.uint8)
    row_group = draw.permutation(np.arange(K) // GROUP)
    order = jnp.asarray(draw.permutation(K), jnp.int32)

    def words(rows: int, bits: int) -> jnp.ndarray:
        return Stream().pack(jnp.asarray(draw.integers(0, 2**bits, (rows, N))), bits)

    if name == "mixed":
        widths = (6, 4, 3)
        return tensor.build(
            [words(GROUP, bits) for bits in widths],
            scale,
            layout=Stream(),
            segments=[Segment(bits, GROUP) for bits in widths],
            affine=Affine.CENTERED,
            order=order,
        )
    if name == "ragged-act-order":
        row_group[:3] = 0  # groups of unequal sizes: no order can replace them
    act_order = {"zero": zero, "row_group": jnp.asarray(row_group, jnp.int32)}
    fields = {
        "act-order": act_order,
        "ragged-act-order": act_order,
        "codebook": {
            "affine": Affine.CODEBOOK,
            "codebook": jnp.asarray(np.sort(draw.normal(size=16)), dtype),
            "input_scale": jnp.asarray(draw.uniform(0.5, 2, K), dtype),
        },
        "float-zero": {
            "affine": Affine.OFFSET,
            "zero": jnp.asarray(draw.normal(size=(groups, N)), dtype),
        },
    }[name]
    segments = [Segment(4, GROUP)]
    return tensor.build(
        [words(K, 4)], scale, layout=Stream(), segments=segments, **fields
    )


def product(x: jnp.ndarray, w: QTensor, b: jnp.ndarray | None = None) -> np.ndarray:
    """``x @ w + b`` in float64."""
    y = np.asarray(x, np.float64) @ np.asarray(
        qjax.dequantize(w, jnp.float32), np.float64
    )
    return y if b is None else y + np.asarray(b, np.float64)


def error(y: jnp.ndarray, wanted: np.ndarray) -> float:
    """The largest error, relative to the largest value wanted."""
    return np.abs(np.asarray(y, np.float64) - wanted).max() / np.abs(wanted).max()
