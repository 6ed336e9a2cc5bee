"""What the tensors of a checkpoint become: matrices, norms, several matrices in one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import qjax

# Matrices of the same inputs, by the name that they have as one.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Dense(nnx.Module):
    """A matrix that the checkpoint left dense, ``[n, k]`` as Hugging Face stores it."""

    def __init__(self, weight: Array, bias: Array | None, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        weight = self.weight[...].astype(self.dtype)
        y = jnp.einsum("...k,nk->...n", x, weight, precision="highest")
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, weight: Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (wide * scale * weight).astype(x.dtype)


class Weights:
    """Named tensors of a checkpoint, each to be taken once."""

    def __init__(self, tensors: dict[str, Any], config: Any, dtype: DTypeLike):
        self.tensors, self.config, self.dtype = tensors, config, dtype

    def take(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"the checkpoint has no tensor {name!r}.")
        return self.tensors.pop(name)

    def linear(self, name: str) -> nnx.Module:
        """The linear layer ``name``, quantized or not, with its bias if it has one."""
        bias = self.tensors.pop(f"{name}.bias", None)
        if name in self.tensors:
            kernel = self.take(name)
            return qjax.layers.nnx.Linear.from_qtensor(kernel, bias, dtype=self.dtype)
        return Dense(self.take(f"{name}.weight"), bias, self.dtype)

    def joined(self, name: str) -> nnx.Module | None:
        """The layer that `join` has made of several, if it has."""
        is_there = not self.tensors.keys().isdisjoint((name, f"{name}.weight"))
        return self.linear(name) if is_there else None

    def table(self, name: str) -> nnx.Module | nnx.Param:
        """The table of embeddings ``name``: packed, or ``[vocab, hidden]``."""
        if name in self.tensors:
            table = self.take(name)
            return qjax.layers.nnx.Embed.from_qtensor(table, dtype=self.dtype)
        return nnx.Param(self.take(f"{name}.weight"))

    def norm(self, name: str) -> Norm:
        return Norm(self.take(f"{name}.weight"), self.config.norm_eps)


def join(tensors: dict[str, Any]) -> None:
    """Joins matrices of the same inputs, so that a layer has fewer, larger products.

    Packed ones that differ in their widths, groups or the order of their rows stay
    apart. What is cut over devices should: joined, its parts would lie elsewhere.

    Args:
      tensors: A checkpoint's, which this changes.
    """
    for whole, parts in JOINED.items():
        ends = parts[0], f"{parts[0]}.weight"
        for first in [name for name in tensors if name.endswith(ends)]:
            names = [first.replace(parts[0], part) for part in parts]
            weights = [tensors.get(name) for name in names]
            biases = [f"{name.removesuffix('.weight')}.bias" for name in names]
            has_bias = {bias in tensors for bias in biases}
            if any(w is None for w in weights) or len(has_bias) > 1:
                continue
            try:
                joined = (
                    qjax.concatenate(weights)
                    if isinstance(weights[0], qjax.QTensor)
                    else jnp.concatenate(weights)
                )
            except ValueError:  # They are not alike.
                continue
            tensors[first.replace(parts[0], whole)] = joined
            if has_bias == {True}:
                pieces = [tensors.pop(bias) for bias in biases]
                tensors[biases[0].replace(parts[0], whole)] = jnp.concatenate(pieces)
            for name in names:
                del tensors[name]
