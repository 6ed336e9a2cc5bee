"""Training with Flax linen: shadow gradients of a model, and LoRA beside its layers.

Two more collections of variables, with the paths of the weights or of the layers that
they belong to:

    {"params": ..., "quantized": ...,
     "shadow": {"kernel": zeros [k, n]},
     "lora": {"a": [k, rank], "b": [rank, n]}}

`jax.grad` over one of them trains that one, and all else is frozen. A `LoRA` reads the
adapters of its layer; `adapted` reads those of any weights, each under its own name
(``{"kernel": {"a": ..., "b": ...}}``), as `add_lora` makes them.
"""

from qjax.training.linen.adapters import LORA, LoRA, adapted, add_lora, merge_lora
from qjax.training.linen.shadows import SHADOW, shadowed
from qjax.training.linen.weights import with_kernels

__all__ = [
    "LORA",
    "SHADOW",
    "LoRA",
    "adapted",
    "add_lora",
    "merge_lora",
    "shadowed",
    "with_kernels",
]
