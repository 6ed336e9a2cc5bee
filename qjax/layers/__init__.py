"""Flax layers over quantized weights: `linen.Dense` and `nnx.Linear`."""

from qjax.layers import linen, nnx

__all__ = ["linen", "nnx"]
