"""Products with a quantized matrix in plain jnp: the forms that XLA compiles well.

Every function takes one matrix of one segment in stored row order (`tensor.split`) and
float32 activations, and accumulates in float32. It raises `NotImplementedError` where
it declines. Only `dense` forms the weight, and `float8` in a byte each; the others walk
over tiles of it that fit the cache, or, for few rows, never leave the registers.

No form scales accumulators and reduces them over groups in one expression,
``(s[:, None] * a).sum(0)``: jaxlib 0.10.2 gets that wrong on CPUs (jax-ml/jax#39103).
"""

from qjax.xla.gradients import dense_grad, dense_t, grouped_grad, tiled_grad, tiled_t
from qjax.xla.products import dense, float8, fused, int8, tiled
from qjax.xla.tiles import NATIVE

__all__ = [
    "NATIVE",
    "dense",
    "dense_grad",
    "dense_t",
    "float8",
    "fused",
    "grouped_grad",
    "int8",
    "tiled",
    "tiled_grad",
    "tiled_t",
]
