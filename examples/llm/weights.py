"""What the tensors of a checkpoint become: matrices, norms, several matrices in one."""

import re
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
# Other names of what the decoder has under one: those of Mixtral, of gpt-oss, and of
# Gemma where it sees.
RENAMED = {
    r"^(model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"\.block_sparse_moe\.": ".mlp.",
    r"(\.experts\.\d+)\.w1\b": r"\1.gate_proj",
    r"(\.experts\.\d+)\.w2\b": r"\1.down_proj",
    r"(\.experts\.\d+)\.w3\b": r"\1.up_proj",
    r"\.mlp\.router\.": ".mlp.gate.",
    r"\.experts\.gate_up_proj": ".experts.gate_up_pairs",
    r"(\.experts\.\w+)_bias$": r"\1.bias",
}
# What a model of text has no place for.
SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
# One of the matrices of experts, or its bias.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..+)")


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


class DenseExperts(nnx.Module):
    """The matrices of experts that the checkpoint left dense, ``[experts, n, k]``."""

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
                    else jnp.concatenate(weights, axis=-2)
                )
            except ValueError:  # They are not alike.
                continue
            tensors[first.replace(parts[0], whole)] = joined
            if has_bias == {True}:
                pieces = [tensors.pop(bias) for bias in biases]
                name = biases[0].replace(parts[0], whole)
                tensors[name] = jnp.concatenate(pieces, -1)
            for name in names:
                del tensors[name]


def stack(tensors: dict[str, Any]) -> dict[str, list[str]]:
    """Makes one stack of the matrices of all experts of a layer, as their product does.

    Names that other models have for the same become those of Qwen.

    Args:
      tensors: A checkpoint's, which this changes.

    Returns:
      What each of the tensors was before: names of the checkpoint, one for each matrix.

    Raises:
      ValueError: If an expert is missing, or the matrices are not alike.
    """
    for name in [name for name in tensors if SEEING.fullmatch(name)]:
        del tensors[name]
    origins = {}
    for name in list(tensors):
        new = name
        for pattern, replacement in RENAMED.items():
            new = re.sub(pattern, replacement, new)
        tensors[new] = tensors.pop(name)
        if re.fullmatch(r".*\.experts\.\w+", new) and isinstance(tensors[new], Array):
            # gpt-oss has dense ones as [experts, k, n], and calls them no weights.
            tensors[f"{new}.weight"] = tensors.pop(new).mT
            new = f"{new}.weight"
        origins[new] = [name]
    experts: dict[str, dict[int, str]] = {}
    for name in tensors:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = name
    for whole, names in experts.items():
        if missing := set(range(len(names))) - names.keys():
            raise ValueError(f"{whole}: the experts {sorted(missing)} are missing.")
        members = [names[i] for i in range(len(names))]
        origins[whole] = [origin for one in members for origin in origins.pop(one)]
        parts = [tensors.pop(one) for one in members]
        packed = isinstance(parts[0], qjax.QTensor)
        try:
            tensors[whole] = (qjax.stack if packed else jnp.stack)(parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{whole}: its experts are not alike: {error}") from None
    return origins
