"""Flax nnx's `Linear`, `LinearGeneral`, `Einsum` and `Embed` over quantized weights.

The words of a weight lie in `Quantized` Variables, which are never trained, and its
scales in `Scale`, which are parameters: ``nnx.split(model, nnx.Param, Quantized)``.
"""

from qjax.layers.nnx.einsum import Einsum
from qjax.layers.nnx.embed import Embed
from qjax.layers.nnx.linear import Linear, LinearGeneral
from qjax.layers.nnx.packed import Quantized, Scale

__all__ = ["Einsum", "Embed", "Linear", "LinearGeneral", "Quantized", "Scale"]
