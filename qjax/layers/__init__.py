"""Flax layers over quantized weights, for linen and for nnx.

| `layers.linen` | `layers.nnx` | weight |
|---|---|---|
| `Dense` | `Linear` | ``[in_features, out_features]`` |
| `DenseGeneral` | `LinearGeneral` | one matrix, both sides flattened |
| `Einsum` | `Einsum` | one matrix, or a stack of them (experts) |
| `Embed` | `Embed` | ``[features, num_embeddings]``; a lookup reads its own rows |
| `Experts` | `Experts` | ``[num_experts, in, out]``; every token takes its own |
| `MBWQDense` | `MBWQLinear` | bitorch-engine's layer, and its state |
| `GroupQuantDense` | `GroupQuantLinear` | optimum-graphcore's, out of a dense kernel |

The two of a line agree bit for bit, and with Flax's own on names, dtypes and shapes.
Any `QTensor` fits any of them: uniform, mixed widths, codebooks, act-order.

`qjax.quantize_model` puts packed weights into a model of other modules.
"""

from qjax.layers import experts, linen, nnx
from qjax.layers.memory import memory_report
from qjax.layers.replace import quantize_model
from qjax.layers.report import Report
from qjax.rules import Spec

__all__ = [
    "Report",
    "Spec",
    "experts",
    "linen",
    "memory_report",
    "nnx",
    "quantize_model",
]
