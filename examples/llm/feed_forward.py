"""The part of a block that takes each token for itself: one layer, or many experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from weights import Weights

from qjax.layers.experts import combine, dispatch


class Gated(nnx.Module):
    """Three matrices, of which the first two may be joined."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.gate_up_proj = weights.optional(f"{name}.gate_up_proj")
        # gpt-oss has the columns of both in turns.
        self.gate_up_pairs = weights.optional(f"{name}.gate_up_pairs")
        if self.gate_up_proj is None and self.gate_up_pairs is None:
            self.gate_proj = weights.linear(f"{name}.gate_proj")
            self.up_proj = weights.linear(f"{name}.up_proj")
        self.down_proj = weights.linear(f"{name}.down_proj")

    def gate_and_up(self, *inputs: Array) -> tuple[Array, Array]:
        """What the first two make of the inputs of a layer."""
        if self.gate_up_pairs is not None:
            pairs = self.gate_up_pairs(*inputs)
            return pairs[..., ::2], pairs[..., 1::2]
        if self.gate_up_proj is not None:
            gate, up = jnp.split(self.gate_up_proj(*inputs), 2, axis=-1)
            return gate, up
        return self.gate_proj(*inputs), self.up_proj(*inputs)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
}


class MLP(Gated):
    """The gated feed-forward layer."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__(weights, name)
        self.activation = ACTIVATIONS[weights.config.activation]
        self.ffn_sub_norm = weights.optional_norm(f"{name}.ffn_sub_norm")  # BitNet

    def __call__(self, x: Array) -> Array:
        gate, up = self.gate_and_up(x)
        y = self.activation(gate) * up
        return self.down_proj(y if self.ffn_sub_norm is None else self.ffn_sub_norm(y))


class Experts(Gated):
    """The gated layers of all experts: each matrix has a leading axis of experts."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__(weights, name)
        self.swiglu = weights.config.swiglu
        self.count = self.down_proj.num_experts
        first = self.gate_up_pairs or self.gate_up_proj
        for layer in (self.gate_proj, self.up_proj) if first is None else (first,):
            if layer.num_experts != self.count:
                raise ValueError(
                    f"{name} has {layer.num_experts} experts at first, but "
                    f"{self.count} of down_proj."
                )

    def __call__(self, x: Array, sizes: Array) -> Array:
        """Applies each to its own: ``sizes`` of the tokens, which are sorted."""
        gate, up = self.gate_and_up(x, sizes)
        if self.swiglu is None:
            return self.down_proj(jax.nn.silu(gate) * up, sizes)
        limit, slope = self.swiglu
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return self.down_proj(gate * jax.nn.sigmoid(slope * gate) * (up + 1), sizes)


class Mixture(nnx.Module):
    """Experts, of which a token takes a few, and maybe one layer that all take."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.config = weights.config
        self.gate = weights.linear(f"{name}.gate")
        self.experts = Experts(weights, f"{name}.experts")
        count, routed = self.experts.count, self.gate.out_features
        if count != routed:
            raise ValueError(f"{name} has {count} experts, but routes to {routed}.")
        if not 1 <= self.config.top_k <= count:
            raise ValueError(
                f"num_experts_per_tok={self.config.top_k} must lie in [1, {count}], "
                f"the experts of {name}."
            )
        shared = f"{name}.shared_expert"  # Qwen2
        self.shared_expert_gate = weights.optional(f"{shared}_gate")
        self.shared_expert = (
            None if self.shared_expert_gate is None else MLP(weights, shared)
        )

    def __call__(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        expert, weight = self.chosen(rows)
        routed = dispatch(rows, expert, self.experts.count)
        y = self.experts(routed.rows, routed.group_sizes)
        y = combine(y, routed, weight)
        if self.shared_expert is not None:
            share = jax.nn.sigmoid(self.shared_expert_gate(rows))
            y += share * self.shared_expert(rows)
        return y.reshape(x.shape)

    def chosen(self, rows: Array) -> tuple[Array, Array]:
        """The experts ``[t, top_k]`` of tokens, and what each of them counts."""
        score = self.gate(rows).astype(jnp.float32)
        weight, expert = jax.lax.top_k(jax.nn.softmax(score), self.config.top_k)
        if self.config.normalized:
            weight /= weight.sum(-1, keepdims=True)
        return expert, weight


def feed_forward(weights: Weights, name: str) -> MLP | Mixture:
    """What a checkpoint has under a name: only some layers may be mixtures."""
    is_mixture = weights.has(f"{name}.gate")
    return Mixture(weights, name) if is_mixture else MLP(weights, name)
