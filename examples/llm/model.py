"""A language model over quantized weights: Llama, Qwen, Gemma, Phi, gpt-oss, ...

Read it from top to bottom: the cache, attention, the decoder, and `load`, which turns a
Hugging Face directory or a GGUF file into a model. What it has to know of its model is
in `hf_config`, what else is in a block in `feed_forward`. Weights are whatever the
checkpoint holds, packed matrices as `qjax.QTensor`; activations are ``dtype``, logits
float32.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from feed_forward import feed_forward
from flax import nnx
from gguf_file import completed, is_gguf, read_config, read_tensors
from hf_config import Config, Layer
from jax import Array
from jax.typing import DTypeLike
from tensors import join, stack
from weights import Weights


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    One array ``[b, s, kv_heads, head_dim]`` a layer, so that a step which owns the
    cache writes its position in place. Shorter sequences begin later: all of a batch
    end together.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array  # int32 scalar, the filled part of s
    first: Array  # int32 [b], where sequences begin

    @classmethod
    def empty(cls, config: Config, batch: int, size: int, dtype: DTypeLike) -> "Cache":
        """A cache for ``size`` positions of sequences that begin at the first."""
        shape = (batch, size, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        keys = tuple(jnp.zeros(shape, dtype) for _ in layers)
        values = tuple(jnp.zeros(shape, dtype) for _ in layers)
        return cls(keys, values, jnp.int32(0), jnp.zeros(batch, jnp.int32))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, weights: Weights, name: str, layer: Layer) -> None:
        self.config, self.layer = weights.config, layer
        self.qkv_proj = weights.optional(f"{name}.qkv_proj")
        if self.qkv_proj is None:
            self.q_proj = weights.linear(f"{name}.q_proj")
            self.k_proj = weights.linear(f"{name}.k_proj")
            self.v_proj = weights.linear(f"{name}.v_proj")
        self.o_proj = weights.linear(f"{name}.o_proj")
        # Qwen3 and Gemma
        self.q_norm = weights.optional_norm(f"{name}.q_norm")
        self.k_norm = weights.optional_norm(f"{name}.k_norm")
        self.sinks = weights.parameter(f"{name}.sinks")  # gpt-oss
        self.attn_sub_norm = weights.optional_norm(f"{name}.attn_sub_norm")  # BitNet

    def __call__(
        self, x: Array, keys: Array, values: Array, start: Array, first: Array
    ) -> tuple[Array, Array, Array]:
        """Attends ``x[b, t]`` to the cache and to itself.

        Args:
          x: ``[b, t, hidden]`` inputs, for ``start .. start + t - 1`` of the cache.
          keys: ``[b, s, kv_heads, head_dim]`` cache, filled up to ``start``.
          values: Like ``keys``.
          start: Length of the cache so far.
          first: ``[b]``, where in it sequences begin.

        Returns:
          Output ``[b, t, hidden]`` and the cache with the new positions.
        """
        (b, t, _), c = x.shape, self.config
        if self.qkv_proj is None:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        else:
            ends = c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim
            parts = jnp.split(self.qkv_proj(x), ends, axis=-1)
        q, k, v = (y.reshape(b, t, -1, c.head_dim) for y in parts)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        places = start + jnp.arange(t)
        positions = places - first[:, None]
        if (rope := self.layer.rope) is not None:
            q, k = (rope.turned(y, positions, keys.shape[1]) for y in (q, k))
        keys = jax.lax.dynamic_update_slice(keys, k, (0, start, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))

        q = q.reshape(b, t, c.num_kv_heads, -1, c.head_dim)
        score = jnp.einsum("bthgd,bshd->bhgts", q, keys, precision="highest")
        score = score.astype(jnp.float32) * (c.score_scale or 1 / math.sqrt(c.head_dim))
        score = capped(score, c.score_cap)
        distance = places[:, None] - jnp.arange(keys.shape[1])
        seen = distance >= 0
        if self.layer.window is not None:
            seen &= distance < self.layer.window
        # What stands before a sequence sees itself, as it must see something.
        begun = jnp.arange(keys.shape[1]) >= first[:, None]
        seen = (seen & begun[:, None]) | (distance == 0)
        score = jnp.where(seen[:, None, None], score, -jnp.inf)
        if self.sinks is not None:
            # One more place to look at, of which nothing is seen.
            sinks = self.sinks[...].reshape(c.num_kv_heads, -1, 1, 1)
            sinks = jnp.broadcast_to(sinks, (*score.shape[:-1], 1))
            score = jnp.concatenate([score, sinks.astype(score.dtype)], -1)
        probability = jax.nn.softmax(score)[..., : keys.shape[1]].astype(x.dtype)
        y = jnp.einsum("bhgts,bshd->bthgd", probability, values, precision="highest")
        y = y.reshape(b, t, -1)
        if self.attn_sub_norm is not None:
            y = self.attn_sub_norm(y)
        return self.o_proj(y), keys, values


def capped(x: Array, cap: float | None) -> Array:
    """Keeps numbers smoothly between ``-cap`` and ``cap``, if there is one."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Block(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, weights: Weights, name: str, layer: Layer) -> None:
        self.scale = weights.config.residual_scale
        self.input_layernorm = weights.norm(f"{name}.input_layernorm")
        self.self_attn = Attention(weights, f"{name}.self_attn", layer)
        self.post_attention_layernorm = weights.norm(f"{name}.post_attention_layernorm")
        # Gemma, which has norms after both parts, and means what the names say.
        self.pre_feedforward_layernorm = weights.optional_norm(
            f"{name}.pre_feedforward_layernorm"
        )
        self.post_feedforward_layernorm = weights.optional_norm(
            f"{name}.post_feedforward_layernorm"
        )
        self.mlp = feed_forward(weights, f"{name}.mlp")

    def __call__(
        self, x: Array, keys: Array, values: Array, start: Array, first: Array
    ) -> tuple[Array, Array, Array]:
        attended, keys, values = self.self_attn(
            self.input_layernorm(x), keys, values, start, first
        )
        if self.pre_feedforward_layernorm is None:
            x = x + attended * self.scale
            y = self.mlp(self.post_attention_layernorm(x))
            return x + y * self.scale, keys, values
        x = x + self.post_attention_layernorm(attended)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y), keys, values


class Decoder(nnx.Module):
    """Token ids in, logits out."""

    def __init__(self, weights: Weights) -> None:
        self.config = config = weights.config
        self.dtype = weights.dtype
        self.embed_tokens = weights.table("model.embed_tokens")
        self.layers = nnx.List(
            Block(weights, f"model.layers.{i}", layer)
            for i, layer in enumerate(config.layers)
        )
        self.norm = weights.norm("model.norm")
        self.lm_head = None if config.tied else weights.linear("lm_head")

    def __call__(self, ids: Array) -> Array:
        """Computes float32 logits ``[b, t, vocab]`` of sequences ``ids[b, t]``."""
        cache = Cache.empty(self.config, *ids.shape, self.dtype)
        return self.logits(self.forward(ids, cache)[0])

    def forward(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """Runs ``ids[b, t]`` after what the cache holds: last hidden states, cache."""
        x = self.embed(ids)
        keys, values = list(cache.keys), list(cache.values)
        place = cache.length, cache.first
        for i, layer in enumerate(self.layers):
            x, keys[i], values[i] = layer(x, keys[i], values[i], *place)
        length = cache.length + ids.shape[1]
        return self.norm(x), Cache(tuple(keys), tuple(values), length, cache.first)

    def embed(self, ids: Array) -> Array:
        """Looks up the first hidden states."""
        if isinstance(self.embed_tokens, nnx.Param):
            x = jnp.take(self.embed_tokens[...], ids, axis=0).astype(self.dtype)
        else:
            x = self.embed_tokens(ids)
        return x * self.config.embedding_scale

    def logits(self, hidden: Array) -> Array:
        """Scores of the next token, in float32."""
        scores = self.scores(hidden).astype(jnp.float32) * self.config.logit_scale
        return capped(scores, self.config.logit_cap)

    def scores(self, hidden: Array) -> Array:
        """The product with the output matrix."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        if not isinstance(self.embed_tokens, nnx.Param):
            return self.embed_tokens.attend(hidden)
        embedding = self.embed_tokens[...].astype(self.dtype)
        return jnp.einsum("...k,nk->...n", hidden, embedding, precision="highest")


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    *,
    joined: bool = False,
) -> Decoder:
    """Loads a model from a Hugging Face directory or a GGUF file.

    Args:
      path: Directory with config.json and safetensors, quantized or not; or the file.
      dtype: Dtype of the activations. None takes float32, but on a GPU bfloat16, as
        its kernels multiply 16-bit numbers.
      sharding: Where each weight goes, as in `qjax.checkpoints.load`, and stacks of
        what it does not cut.
      joined: Whether to `join` what it can, where nothing is cut over devices.

    Returns:
      The model; ``model(ids[b, t])`` gives logits ``[b, t, vocab]`` in float32. Of a
      mixture, the matrices of all experts are one `stack`. Layers have the checkpoint's
      names, but for what is joined or stacked.

    Raises:
      ValueError: If the architecture is not supported, or tensors are missing or left
        over.
    """
    try:
        config = Config.from_json(read_config(path))
    except KeyError as error:
        raise ValueError(f"{path}: config.json lacks {error}.") from None
    tensors = read_tensors(path, sharding)
    if is_gguf(path):
        config = completed(config, tensors)
    stack(tensors, sharding)
    if joined and sharding is None:
        join(tensors)
    if dtype is None:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    weights = Weights(tensors, config, dtype)
    if config.tied:
        weights.tensors.pop("lm_head.weight", None)
    model = Decoder(weights)
    if weights.tensors:
        raise ValueError(
            f"{path}: the model has no place for {sorted(weights.tensors)}."
        )
    return model
