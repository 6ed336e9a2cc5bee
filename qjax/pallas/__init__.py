"""Products with a quantized matrix as GPU kernels: Pallas, lowered through Triton.

Every function takes one matrix of one segment in `qjax.formats.tiles.Tiles` and float32
rows, and raises `NotImplementedError` where it declines. The products run in float16 on
tensor cores and are accumulated in float32; rows are scaled by powers of two first, so
that activations that were bfloat16 or float16 lose nothing.
"""

from qjax.pallas.operands import check
from qjax.pallas.products import dense, dense_t, fused, fused_grad, fused_t

__all__ = ["check", "dense", "dense_t", "fused", "fused_grad", "fused_t"]
