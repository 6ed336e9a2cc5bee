"""Quantized matmul for JAX: packing formats, kernels and Flax layers."""

from qjax import checkpoints, formats, layers, quantizers, sharding, tensor, training
from qjax.formats import exporting as _  # noqa: F401  (registers)
from qjax.formats.flattening import flatten, unflatten
from qjax.layers.memory import memory_report
from qjax.layers.replace import quantize_model
from qjax.ops import dequantize, matmul, prepare, relayout
from qjax.ragged import ragged_matmul
from qjax.rtn import quantize
from qjax.rules import Spec
from qjax.sharding import partition_specs, shard
from qjax.tensor import QTensor, codes, concatenate, stack

__version__ = "0.1.0"
__all__ = [
    "QTensor",
    "Spec",
    "checkpoints",
    "codes",
    "concatenate",
    "dequantize",
    "flatten",
    "formats",
    "layers",
    "matmul",
    "memory_report",
    "partition_specs",
    "prepare",
    "quantize",
    "quantize_model",
    "quantizers",
    "ragged_matmul",
    "relayout",
    "shard",
    "sharding",
    "stack",
    "tensor",
    "training",
    "unflatten",
]
