"""Training with Flax nnx: shadow gradients of a model, and LoRA beside its layers."""

from qjax.training.nnx.adapters import LoRA, add_lora, merge_lora
from qjax.training.nnx.shadows import Shadowed, with_shadows
from qjax.training.nnx.weights import kernels, load_kernels

__all__ = [
    "LoRA",
    "Shadowed",
    "add_lora",
    "kernels",
    "load_kernels",
    "merge_lora",
    "with_shadows",
]
