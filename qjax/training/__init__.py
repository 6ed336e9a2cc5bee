"""Training of quantized weights: their scales, adapters beside them, or themselves."""

from qjax.training import linen, lora, nnx, shadow
from qjax.training.diode_mix import DiodeMixState, diode_mix
from qjax.training.low_rank import GaLore
from qjax.training.rounding import requantize
from qjax.training.updates import (
    apply_stochastically,
    apply_updates,
    apply_with_residual,
    refit,
)

__all__ = [
    "DiodeMixState",
    "GaLore",
    "apply_stochastically",
    "apply_updates",
    "apply_with_residual",
    "diode_mix",
    "linen",
    "lora",
    "nnx",
    "refit",
    "requantize",
    "shadow",
]
