"""Flax nnx's layers over quantized weights, and some of PyTorch's.

The words of a weight lie in `Quantized` Variables, which are never trained, and its
scales in `Scale`, which are parameters: ``nnx.split(model, nnx.Param, Quantized)``.
`load` fills a model that `qjax.quantize_model` made of others.
"""

from qjax.layers.nnx.einsum import Einsum
from qjax.layers.nnx.embed import Embed
from qjax.layers.nnx.experts import Experts
from qjax.layers.nnx.group_quant import GroupQuantLinear
from qjax.layers.nnx.linear import Linear
from qjax.layers.nnx.linear_general import LinearGeneral
from qjax.layers.nnx.loading import load
from qjax.layers.nnx.mbwq import MBWQLinear
from qjax.layers.nnx.packed import Quantized, Scale

__all__ = [
    "Einsum",
    "Embed",
    "Experts",
    "GroupQuantLinear",
    "Linear",
    "LinearGeneral",
    "MBWQLinear",
    "Quantized",
    "Scale",
    "load",
]
