"""What a decoder has to know of its model, read from its config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from rope import Rope

MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3",
    "granite",
    "smollm3",
    "bitnet",
)
# Whose chosen experts count for 1 together, whatever their config.json says.
NORMALIZED = ("mixtral", "gpt_oss")
# What a config.json of Gemma 2 may leave out, and one of Gemma 3.
GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


class Layer(NamedTuple):
    """What is a layer's own in attention.

    Attributes:
      window: Positions that it looks back on, its own included; None for all.
      rope: How queries and keys are turned, if they are.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The part of config.json that the decoder needs."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float
    layers: tuple[Layer, ...]
    tied: bool  # the output matrix is the embedding
    top_k: int = 0  # experts that a token takes, where there are some
    normalized: bool = False  # whether these count for 1 together
    swiglu: tuple[float, float] | None = None  # limit and slope of gpt-oss's experts
    # Gemma's and Granite's: the factors of embeddings, of what a part adds to its
    # inputs, of logits, and, if it is not head_dim**-0.5, of scores.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    score_scale: float | None = None
    # Gemma's: what scores and logits cannot exceed, and what is added to the weights of
    # norms.
    score_cap: float | None = None
    logit_cap: float | None = None
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
        if kind.startswith("gemma"):
            usual = GEMMA2 if kind == "gemma2" else GEMMA3
            config = usual | dict(config.get("text_config", config))
            own = _of_gemma(config)
        if kind == "granite":
            own |= _of_granite(config)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        swiglu = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            layers=layers_of(config, head_dim),
            # Also what SmolLM3 leaves out.
            tied=config.get("tie_word_embeddings", kind == "smollm3"),
            top_k=config.get("num_experts_per_tok") or 0,
            normalized=kind in NORMALIZED or config.get("norm_topk_prob", False),
            swiglu=swiglu if kind == "gpt_oss" else None,
            **own,
        )

    @property
    def num_layers(self) -> int:
        """How many blocks there are."""
        return len(self.layers)


def _of_gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    """What only Gemma has."""
    name, wanted = "hidden_activation", "gelu_pytorch_tanh"
    if config[name] != wanted:
        raise ValueError(f"{name}={config[name]!r} must be {wanted!r}.")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[name] is not None and not config[name] > 0:
            raise ValueError(f"{name}={config[name]} must be above 0, or null.")
    return {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "score_scale": config["query_pre_attn_scalar"] ** -0.5,
        "score_cap": config["attn_logit_softcapping"],
        "logit_cap": config["final_logit_softcapping"],
        "norm_offset": 1.0,
        "activation": "gelu",
    }


def _of_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    """What only Granite has."""
    if not config.get("logits_scaling", 1.0) > 0:
        raise ValueError(f"logits_scaling={config['logits_scaling']} must be above 0.")
    return {
        "embedding_scale": config.get("embedding_multiplier", 1.0),
        "residual_scale": config.get("residual_multiplier", 1.0),
        "logit_scale": 1 / config.get("logits_scaling", 1.0),
        "score_scale": config.get("attention_multiplier", 1.0),
    }


def layers_of(config: Mapping[str, Any], head_dim: int) -> tuple[Layer, ...]:
    """What a config.json says of each layer's attention."""
    rope = local = Rope.from_json(config, head_dim)
    theta = config.get("rope_local_base_freq")  # Gemma 3
    if "sliding_attention" in (known := config.get("rope_parameters") or {}):
        theta = known["sliding_attention"]["rope_theta"]
    if theta is not None:
        local = Rope.from_json({"rope_theta": theta}, head_dim)
    windows = attention_windows(config)
    turned = config.get("no_rope_layers")  # SmolLM3, which means those that have one
    if turned is None:
        every = config.get("no_rope_layer_interval", 0)
        turned = [not every or (i + 1) % every for i in range(len(windows))]
    if len(turned) != len(windows):
        raise ValueError(f"no_rope_layers={turned} must say so of {len(windows)}.")
    return tuple(
        Layer(window, (rope if window is None else local) if turns else None)
        for window, turns in zip(windows, turned, strict=True)
    )


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
