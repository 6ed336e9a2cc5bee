"""Flax linen's layers over quantized weights, and some of PyTorch's.

A quantized kernel is two variables of the same name. In the collection "quantized" lies
its `QTensor` without the float leaves: words, orders, integer zeros, and as static
metadata of the tree all that `apply` must know of the format. In "params" lies a
dictionary of the float leaves, which may be trained. So one definition of a model runs
any mix of formats, and loading weights is loading variables, as ever:

    {"params": {"kernel": {"scale": [groups, n], ...}, "bias": [n]},
     "quantized": {"kernel": QTensor(words, ...)}}

`flax.nnx.bridge.ToNNX` makes attributes of variables by their names alone, whatever
their collections, and so loses one of the two of a kernel: models of nnx take the
layers of `layers.nnx`, made of the same `QTensor`, as `to_params` gives it.
"""

from qjax.layers.linen.dense import Dense, DenseGeneral
from qjax.layers.linen.einsum import Einsum
from qjax.layers.linen.embed import Embed
from qjax.layers.linen.experts import Experts
from qjax.layers.linen.group_quant import GroupQuantDense
from qjax.layers.linen.mbwq import MBWQDense
from qjax.layers.linen.variables import QUANTIZED, to_params, to_variables

__all__ = [
    "QUANTIZED",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "Embed",
    "Experts",
    "GroupQuantDense",
    "MBWQDense",
    "to_params",
    "to_variables",
]
