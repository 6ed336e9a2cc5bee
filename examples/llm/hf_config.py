"""What a decoder has to know of its model, read from its config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
)
# Whose chosen experts count for 1 together, whatever their config.json says.
NORMALIZED = ("mixtral", "gpt_oss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The part of config.json that the decoder needs."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float
    frequencies: tuple[float, ...]  # of the rotary embedding, [head_dim / 2]
    windows: tuple[int | None, ...]  # positions that each layer looks back on
    tied: bool  # the output matrix is the embedding
    rotary_scale: float = 1.0  # by which YaRN makes queries and keys longer
    top_k: int = 0  # experts that a token takes, where there are some
    normalized: bool = False  # whether these count for 1 together
    swiglu: tuple[float, float] | None = None  # limit and slope of gpt-oss's experts

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json as transformers 4 or 5 writes it.

        Raises:
          ValueError: If the architecture or one of its options is not supported.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type={kind!r} must be one of {MODEL_TYPES}.")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={config['hidden_act']!r} must be 'silu'.")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        swiglu = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            frequencies=tuple(rope_frequencies(config, head_dim).tolist()),
            windows=attention_windows(config),
            tied=config.get("tie_word_embeddings", False),
            rotary_scale=rope_scale(config),
            top_k=config.get("num_experts_per_tok", 0),
            normalized=kind in NORMALIZED or config.get("norm_topk_prob", False),
            swiglu=swiglu if kind == "gpt_oss" else None,
        )


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of rotary positions."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, ``[head_dim / 2]``."""
    rope = rope_of(config)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    inverse = 1 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / rope["factor"]
    if kind == "yarn":
        return _yarn_frequencies(inverse, theta, rope)
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} must be default, linear, llama3 or yarn.")
    # Long wavelengths are stretched, short ones kept, those between are blended.
    turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * inverse + (1 - keep) * inverse / rope["factor"]


def _yarn_frequencies(
    inverse: np.ndarray, theta: float, rope: Mapping[str, Any]
) -> np.ndarray:
    """YaRN: as for Llama 3, but blended along the channels, not the wavelengths."""
    dim, length = 2 * len(inverse), rope["original_max_position_embeddings"]
    turns = [rope.get("beta_fast") or 32, rope.get("beta_slow") or 1]
    # The channels that turn so often over the length that the model was trained on.
    first, last = (
        dim * math.log(length / (2 * math.pi * count)) / (2 * math.log(theta))
        for count in turns
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    stretch = (np.arange(len(inverse)) - first) / max(last - first, 1e-3)
    stretch = np.clip(stretch, 0, 1)
    return stretch * inverse / rope["factor"] + (1 - stretch) * inverse


def rope_scale(config: Mapping[str, Any]) -> float:
    """The factor of rotated queries and keys: YaRN's, and else 1."""
    rope = rope_of(config)
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    if (scale := rope.get("attention_factor")) is not None:
        return float(scale)
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("mscale and mscale_all_dim of rope_type='yarn' must be 0.")
    return 0.1 * math.log(max(rope["factor"], 1)) + 1


def attention_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How many positions, its own included, each layer attends to; None for all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config.get("use_sliding_window", True):
        window = None
    if kinds := config.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        # Only Qwen has the field; its first layers attend to everything.
        first = config.get("max_window_layers", 0)
        sliding = [i >= first for i in range(layers)]
    return tuple(window if slides else None for slides in sliding)
