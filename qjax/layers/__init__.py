"""Flax layers over quantized weights, for linen and for nnx.

| `layers.linen` | `layers.nnx` | weight |
|---|---|---|
| `Dense` | `Linear` | ``[in_features, out_features]`` |
| `DenseGeneral` | `LinearGeneral` | one matrix, both sides flattened |
| `Einsum` | `Einsum` | one matrix, or a stack of them (experts) |
| `Embed` | `Embed` | ``[features, num_embeddings]``; a lookup reads its own rows |

The two of a line agree bit for bit, and with Flax's own on names, dtypes and shapes.
Any `QTensor` fits any of them: uniform, mixed widths, codebooks, act-order.
"""

from qjax.layers import linen, nnx

__all__ = ["linen", "nnx"]
