"""Quantized matmul for JAX: packing formats, kernels and Flax layers."""

from qjax import checkpoints, formats, layers
from qjax.decode import codes, dequantize, relayout
from qjax.ops import matmul, prepare, quantize
from qjax.tensor import QTensor

__all__ = [
    "QTensor",
    "checkpoints",
    "codes",
    "dequantize",
    "formats",
    "layers",
    "matmul",
    "prepare",
    "quantize",
    "relayout",
]
