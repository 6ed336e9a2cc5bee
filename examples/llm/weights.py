"""What the tensors of a checkpoint become: matrices, norms, tables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import qjax


class Dense(nnx.Module):
    """A matrix that the checkpoint left dense, ``[n, k]`` as Hugging Face stores it."""

    def __init__(self, weight: Array, bias: Array | None, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype, self.out_features = dtype, len(weight)

    def __call__(self, x: Array) -> Array:
        weight = self.weight[...].astype(self.dtype)
        y = jnp.einsum("...k,nk->...n", x, weight, precision="highest")
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class DenseExperts(nnx.Module):
    """The matrices of experts that the checkpoint left dense, ``[experts, n, k]``.

    On a CPU, XLA multiplies every token by all of them.
    """

    def __init__(self, weight: Array, bias: Array | None, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype, self.num_experts = dtype, len(weight)

    def __call__(self, x: Array, sizes: Array) -> Array:
        """Multiplies tokens that are sorted by expert; each has ``sizes`` of them."""
        weight = self.weight[...].astype(self.dtype).mT
        y = jax.lax.ragged_dot(x, weight, sizes, precision="highest")
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(x))


class Norm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, weight: Array, eps: float, offset: float = 0.0) -> None:
        self.weight = nnx.Param(weight)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (wide * scale * weight).astype(x.dtype)


class Weights:
    """Named tensors of a checkpoint, each to be taken once."""

    def __init__(self, tensors: dict[str, Any], config: Any, dtype: DTypeLike):
        self.tensors, self.config, self.dtype = tensors, config, dtype

    def take(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"the checkpoint has no tensor {name!r}.")
        return self.tensors.pop(name)

    def has(self, name: str) -> bool:
        """Whether there is a matrix ``name``, quantized or not."""
        return not self.tensors.keys().isdisjoint((name, f"{name}.weight"))

    def linear(self, name: str) -> nnx.Module:
        """The linear layer ``name``, quantized or not, with its bias if it has one.

        That of a `stack` is one of experts.
        """
        bias = self.tensors.pop(f"{name}.bias", None)
        packed = name in self.tensors
        matrix = self.take(name if packed else f"{name}.weight")
        if packed:
            layers = qjax.layers.nnx
            kind = layers.Linear if matrix.ndim == 2 else layers.Experts
            return kind.from_qtensor(matrix, bias, dtype=self.dtype)
        kind = Dense if matrix.ndim == 2 else DenseExperts
        return kind(matrix, bias, self.dtype)

    def optional(self, name: str) -> nnx.Module | None:
        """The linear layer ``name``, if the model has it, or `join` has made it."""
        return self.linear(name) if self.has(name) else None

    def parameter(self, name: str) -> nnx.Param | None:
        """The array ``name``, if there is one."""
        return nnx.Param(self.take(name)) if name in self.tensors else None

    def table(self, name: str) -> nnx.Module | nnx.Param:
        """The table of embeddings ``name``: packed, or ``[vocab, hidden]``."""
        if name in self.tensors:
            table = self.take(name)
            return qjax.layers.nnx.Embed.from_qtensor(table, dtype=self.dtype)
        return nnx.Param(self.take(f"{name}.weight"))

    def norm(self, name: str) -> Norm:
        config = self.config
        return Norm(self.take(f"{name}.weight"), config.norm_eps, config.norm_offset)

    def optional_norm(self, name: str) -> Norm | None:
        """The norm ``name``, if the model has it."""
        return self.norm(name) if f"{name}.weight" in self.tensors else None
