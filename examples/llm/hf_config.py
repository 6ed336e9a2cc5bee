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
    "gemma3_text",
    "gemma3",
    "bitnet",
)
# Whose chosen experts count for 1 together, whatever their config.json says.
NORMALIZED = ("mixtral", "gpt_oss")
# What a config.json of Gemma 3 may leave out.
GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}


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
    # Gemma's: frequencies of layers with a window, the factors of embeddings and, if it
    # is not head_dim**-0.5, of scores, what is added to the weights of norms.
    local_frequencies: tuple[float, ...] | None = None
    embedding_scale: float = 1.0
    score_scale: float | None = None
    norm_offset: float = 0.0
    activation: str = "silu"  # of the gate: silu, gelu or relu2
    sub_norms: bool = False  # BitNet's, before the last matrix of either part

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a config.json as transformers 4 or 5 writes it.

        Raises:
          ValueError: If the architecture or one of its options is not supported.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type={kind!r} must be one of {MODEL_TYPES}.")
        is_bitnet = kind == "bitnet"
        activation = "relu2" if is_bitnet else "silu"
        if config.get("hidden_act", activation) != activation:
            raise ValueError(
                f"hidden_act={config['hidden_act']!r} must be {activation!r}."
            )
        if kind == "gpt_oss":
            config = {"sliding_window_pattern": 2} | dict(config)
        own = {"activation": activation, "sub_norms": is_bitnet}
        if kind.startswith("gemma3"):
            config = GEMMA3 | dict(config.get("text_config", config))
            own = _of_gemma(config)
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
            top_k=config.get("num_experts_per_tok") or 0,
            normalized=kind in NORMALIZED or config.get("norm_topk_prob", False),
            swiglu=swiglu if kind == "gpt_oss" else None,
            **own,
        )


def _of_gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    """What only Gemma has."""
    for name, wanted in {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }.items():
        if config.get(name) != wanted:
            raise ValueError(f"{name}={config.get(name)!r} must be {wanted!r}.")
    local = config["rope_local_base_freq"]
    if "sliding_attention" in (rope := config.get("rope_parameters") or {}):
        local = rope["sliding_attention"]["rope_theta"]
    frequencies = rope_frequencies({"rope_theta": local}, config["head_dim"])
    return {
        "local_frequencies": tuple(frequencies.tolist()),
        "embedding_scale": config["hidden_size"] ** 0.5,
        "score_scale": config["query_pre_attn_scalar"] ** -0.5,
        "norm_offset": 1.0,
        "activation": "gelu",
    }


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of rotary positions, of layers without a window."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention", rope)


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, ``[head_dim / 2]``."""
    rope = rope_of(config)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    inverse = 1 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return inverse
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type={kind!r} must be default, linear, llama3 or yarn.")
    if not (rope["factor"] or 0) > 0:
        raise ValueError(f"factor={rope['factor']} of rope_type={kind!r} must be > 0.")
    if kind == "linear":
        return inverse / rope["factor"]
    if kind == "yarn":
        return _yarn_frequencies(inverse, theta, rope)
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
    growth = 0.1 * math.log(max(rope["factor"], 1))
    own, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if own and other:
        return (own * growth + 1) / (other * growth + 1)
    return growth + 1


def attention_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How many positions, its own included, each layer attends to; None for all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config.get("use_sliding_window", True):
        window = None
    if kinds := config.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif pattern := config.get("sliding_window_pattern"):  # Gemma, gpt-oss
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    else:
        # Only Qwen has the field; its first layers attend to everything.
        first = config.get("max_window_layers", 0)
        sliding = [i >= first for i in range(layers)]
    return tuple(window if slides else None for slides in sliding)
