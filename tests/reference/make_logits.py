"""Make tiny checkpoints with reference logits from Hugging Face transformers.

Run by hand; the files it writes lie beside it and are kept in the repository, so that
the tests need neither torch nor transformers:

    python tests/reference/make_logits.py

Each folder holds a checkpoint (``config.json`` and bfloat16 safetensors) and
``reference.npz``: ``ids`` [B, T] int32 and ``logits`` [B, T, V] float32, computed with
the same weights in float32. The script prints, for each model, how much the logits
change when one feature is left out, and stops where a feature would go unnoticed.
See README.md.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BitNetForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GptOssForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Mxfp4Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BATCH, LENGTH, VOCAB = 2, 24, 128
WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WEIGHT_STD, BIAS_STD, NORM_STD = 0.12, 0.3, 0.25
# Of the biases in gpt-oss's experts: some are beyond the limit of 7.
GATE_STD = 4.0
MIN_CHANGE = 1e-2
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
EXPERT_MATRICES = ("experts.gate_up_proj", "experts.down_proj")
# Magnitudes of the codes 0 to 7 of a four-bit float; eight more are their negatives.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

Change = Callable[[PreTrainedModel], PreTrainedModel]


def rope(theta: float) -> dict[str, Any]:
    """Plain rotary position embedding."""
    return {"rope_type": "default", "rope_theta": theta}


def llama3_rope(theta: float, original: int) -> dict[str, Any]:
    """Llama 3.1 scaling; ``original`` puts all of its three bands within reach."""
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def yarn_rope(theta: float, original: int, **more: object) -> dict[str, Any]:
    """YaRN scaling; ``original`` puts both ends of its ramp within reach."""
    scaling = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0}
    return {**scaling, "original_max_position_embeddings": original, **more}


def long_rope(**more: object) -> dict[str, Any]:
    """LongRoPE over half the channels of a head of 16."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        **more,
    }


def configured(**settings: object) -> Change:
    """The same weights under other settings; parameters these lack are dropped."""

    def change(model: PreTrainedModel) -> PreTrainedModel:
        config = type(model.config)(**{**model.config.to_dict(), **settings})
        other = type(model)._from_config(config, **EAGER)
        other.load_state_dict(model.state_dict(), strict=False)
        return other.eval()

    return change


def filled(part: str, value: float) -> Change:
    """Every parameter with ``part`` in its name set to one value."""

    def change(model: PreTrainedModel) -> PreTrainedModel:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if part in name:
                    parameter.fill_(value)
        return other

    return change


def bypassed(part: str) -> Change:
    """Every module whose name ends in ``part`` passes its input through."""

    def change(model: PreTrainedModel) -> PreTrainedModel:
        other = copy.deepcopy(model)
        for name, _ in model.named_modules():
            if name.endswith(part):
                other.set_submodule(name, torch.nn.Identity())
        return other

    return change


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to write.

    Attributes:
        model: Model class.
        seed: Seed of the weights and the token ids.
        settings: Config settings besides ``SIZES``.
        checks: Changes that must move the logits by more than ``MIN_CHANGE``.
        shard: Largest size of one safetensors file.
        norm_mean: Mean of the weights of norms.
        mxfp4: Whether experts are stored in four-bit floats.
        version4: Settings to add to ``config.json`` after it is turned into the
            dialect of transformers 4; None keeps it as transformers 5 writes it.
    """

    model: type[PreTrainedModel]
    seed: int
    settings: Mapping[str, Any]
    checks: Mapping[str, Change]
    shard: str = "1GB"
    norm_mean: float = 1.0
    mxfp4: bool = False
    version4: Mapping[str, Any] | None = None


NORMS = {
    "layer norm weights": filled("layernorm.weight", 1.0),
    "final norm weight": filled("model.norm.weight", 1.0),
}
BIASES = {f"{n} bias": filled(f"{n}_proj.bias", 0.0) for n in "qkv"}
MLP_BIASES = {
    f"{n} bias": filled(f"{n}_proj.bias", 0.0) for n in ("gate", "up", "down")
}

GEMMA_ROPE = {
    "sliding_attention": rope(1e4),
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
EXPERTS = {"intermediate_size": 64, "num_experts_per_tok": 2}

CASES = {
    "mistral_window": Case(
        MistralForCausalLM,
        seed=1,
        settings={"sliding_window": WINDOW, "rope_parameters": rope(1e4)},
        checks=NORMS
        | {
            "sliding window": configured(sliding_window=None),
            "window one wider": configured(sliding_window=WINDOW + 1),
            "window one narrower": configured(sliding_window=WINDOW - 1),
        },
    ),
    "mistral_full": Case(
        MistralForCausalLM,
        seed=2,
        settings={"sliding_window": None, "rope_parameters": rope(1e6)},
        checks=NORMS
        | {
            "rope theta (1e4)": configured(rope_parameters=rope(1e4)),
            "a window of 8 put in": configured(sliding_window=WINDOW),
        },
    ),
    "qwen2": Case(
        Qwen2ForCausalLM,
        seed=3,
        settings={"use_sliding_window": False, "rope_parameters": rope(1e6)},
        checks=NORMS
        | BIASES
        | {
            "rope theta (1e4)": configured(rope_parameters=rope(1e4)),
            "a window of 8 put in": configured(
                use_sliding_window=True,
                sliding_window=WINDOW,
                max_window_layers=0,
                layer_types=None,
            ),
        },
        # Qwen2 files of that time name a window and then turn it off.
        version4={
            "use_sliding_window": False,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
        },
    ),
    "qwen2_tied": Case(
        Qwen2ForCausalLM,
        seed=4,
        settings={
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_parameters": rope(1e4),
        },
        checks=NORMS | BIASES,
    ),
    "qwen3": Case(
        Qwen3ForCausalLM,
        seed=5,
        settings={
            "head_dim": 32,
            "rms_norm_eps": 1e-3,
            "rope_parameters": rope(1e6),
        },
        checks=NORMS
        | {
            "q_norm": bypassed("q_norm"),
            "k_norm": bypassed("k_norm"),
            "q_norm weights": filled("q_norm.weight", 1.0),
            "k_norm weights": filled("k_norm.weight", 1.0),
            "rms_norm_eps (1e-6)": configured(rms_norm_eps=1e-6),
            "rope theta (1e4)": configured(rope_parameters=rope(1e4)),
        },
        shard="80KB",
    ),
    "llama3_tied": Case(
        LlamaForCausalLM,
        seed=6,
        settings={
            "tie_word_embeddings": True,
            "rope_parameters": llama3_rope(5e5, 64),
        },
        checks=NORMS
        | {
            "rope scaling": configured(rope_parameters=rope(5e5)),
            "rope theta (1e4)": configured(rope_parameters=llama3_rope(1e4, 64)),
        },
    ),
    "llama3_bias": Case(
        LlamaForCausalLM,
        seed=7,
        settings={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": llama3_rope(1e4, 32),
        },
        checks=NORMS
        | BIASES
        | MLP_BIASES
        | {
            "o bias": filled("o_proj.bias", 0.0),
            "attention_bias": configured(attention_bias=False),
            "mlp_bias": configured(mlp_bias=False),
            "rope scaling": configured(rope_parameters=rope(1e4)),
        },
        version4={},
    ),
    "mixtral": Case(
        MixtralForCausalLM,
        seed=8,
        settings={**EXPERTS, "num_local_experts": 4, "rope_parameters": rope(1e6)},
        checks=NORMS | {"one expert": configured(num_experts_per_tok=1)},
    ),
    "qwen2_moe": Case(
        Qwen2MoeForCausalLM,
        seed=9,
        settings={
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "use_sliding_window": False,
            "rope_parameters": yarn_rope(1e4, 32),
        },
        checks=NORMS
        | BIASES
        | {
            "one expert": configured(num_experts_per_tok=1),
            "norm_topk_prob": configured(norm_topk_prob=True),
            "shared expert": filled("shared_expert.down_proj", 0.0),
            "shared expert's gate": filled("shared_expert_gate", 0.0),
            "rope scaling": configured(rope_parameters=rope(1e4)),
            "scaling of attention": configured(
                rope_parameters=yarn_rope(1e4, 32, attention_factor=1.0)
            ),
        },
    ),
    "qwen3_moe": Case(
        Qwen3MoeForCausalLM,
        seed=10,
        settings={
            **EXPERTS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 32,
            "rope_parameters": rope(1e6),
        },
        checks=NORMS
        | {
            "two experts": configured(num_experts_per_tok=2),
            "norm_topk_prob": configured(norm_topk_prob=False),
            "q_norm": bypassed("q_norm"),
        },
    ),
    "gpt_oss": Case(
        GptOssForCausalLM,
        seed=11,
        settings={
            **EXPERTS,
            "num_local_experts": 4,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "rope_parameters": yarn_rope(1.5e5, 32, truncate=False),
        },
        checks=NORMS
        | BIASES
        | {
            "o bias": filled("o_proj.bias", 0.0),
            "router's bias": filled("router.bias", 0.0),
            "gate and up biases": filled("gate_up_proj_bias", 0.0),
            "down biases": filled("experts.down_proj_bias", 0.0),
            "sinks": filled("sinks", -1e9),
            "one expert": configured(num_experts_per_tok=1),
            "limit of the gate": configured(swiglu_limit=100.0),
            "slope of the gate": configured(swiglu_alpha=1.0),
            "sliding window": configured(layer_types=["full_attention"] * 2),
            "rope scaling": configured(rope_parameters=rope(1.5e5)),
            "ends of the ramp": configured(
                rope_parameters=yarn_rope(1.5e5, 32, truncate=True)
            ),
        },
        mxfp4=True,
    ),
    "gemma3": Case(
        Gemma3ForCausalLM,
        seed=12,
        settings={
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": GEMMA_ROPE,
            "tie_word_embeddings": True,
        },
        checks={
            "layer norm weights": filled("layernorm.weight", 0.0),
            "final norm weight": filled("model.norm.weight", 0.0),
            "q_norm": bypassed("q_norm"),
            "norm after attention": bypassed("post_attention_layernorm"),
            "norm after the MLP": bypassed("post_feedforward_layernorm"),
            "scale of scores": configured(query_pre_attn_scalar=32),
            "activation": configured(hidden_activation="silu"),
            "sliding window": configured(layer_types=["full_attention"] * 2),
            "rotation of the other layer": configured(
                rope_parameters=dict.fromkeys(GEMMA_ROPE, rope(1e4))
            ),
            "rope scaling": configured(
                rope_parameters=GEMMA_ROPE | {"full_attention": rope(1e6)}
            ),
        },
        norm_mean=0.0,
    ),
    "gemma2": Case(
        Gemma2ForCausalLM,
        seed=14,
        settings={
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": rope(1e4),
        },
        checks={
            "layer norm weights": filled("layernorm.weight", 0.0),
            "norm after attention": bypassed("post_attention_layernorm"),
            "norm after the MLP": bypassed("post_feedforward_layernorm"),
            "scale of scores": configured(query_pre_attn_scalar=32),
            "cap of scores": configured(attn_logit_softcapping=None),
            "cap of logits": configured(final_logit_softcapping=None),
            "activation": configured(hidden_activation="silu"),
            "sliding window": configured(layer_types=["full_attention"] * 2),
            "window of the other layer": configured(
                layer_types=["full_attention", "sliding_attention"]
            ),
        },
        norm_mean=0.0,
        version4={"head_dim": 32},
    ),
    "phi3": Case(
        Phi3ForCausalLM,
        seed=15,
        settings={
            "pad_token_id": None,
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 64,
            "rope_parameters": long_rope(),
        },
        checks=NORMS
        | {
            "all channels": configured(rope_parameters=rope(1e4)),
            "factors": configured(rope_parameters=long_rope(short_factor=[1.0] * 4)),
            "length of what is turned": configured(
                rope_parameters=long_rope(attention_factor=1.0)
            ),
            "long factors": configured(original_max_position_embeddings=16),
            "sliding window": configured(sliding_window=None),
        },
    ),
    "phi3_long": Case(
        Phi3ForCausalLM,
        seed=16,
        settings={
            "pad_token_id": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": long_rope(),
        },
        checks=NORMS
        | {
            "short factors": configured(original_max_position_embeddings=64),
            "length of what is turned": configured(
                rope_parameters=long_rope(attention_factor=1.0)
            ),
        },
        # Files of that time say beside the scaling what it starts from.
        version4={
            "rope_scaling": {"type": "longrope"}
            | {name: long_rope()[name] for name in ("short_factor", "long_factor")},
            "partial_rotary_factor": 0.5,
        },
    ),
    "granite": Case(
        GraniteForCausalLM,
        seed=17,
        settings={
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
            "logits_scaling": 2.0,
            "rope_parameters": rope(1e4),
        },
        checks=NORMS
        | {
            "scale of embeddings": configured(embedding_multiplier=1.0),
            "scale of what is added": configured(residual_multiplier=1.0),
            "scale of scores": configured(attention_multiplier=0.25),
            "scale of logits": configured(logits_scaling=1.0),
        },
    ),
    "smollm3": Case(
        SmolLM3ForCausalLM,
        seed=18,
        settings={
            "pad_token_id": None,
            "no_rope_layers": [1, 0],
            "rope_parameters": rope(1e4),
        },
        checks=NORMS
        | {
            "rotation of no layer": configured(no_rope_layers=[0, 0]),
            "rotation of both": configured(no_rope_layers=[1, 1]),
            "rotation of the other": configured(no_rope_layers=[0, 1]),
        },
    ),
    "bitnet": Case(
        BitNetForCausalLM,
        seed=13,
        settings={"tie_word_embeddings": True, "rope_parameters": rope(5e5)},
        checks=NORMS
        | {
            "norm in attention": bypassed("attn_sub_norm"),
            "norm in the MLP": bypassed("ffn_sub_norm"),
            "their weights": filled("sub_norm.weight", 1.0),
            "activation": configured(hidden_act="silu"),
            "rope theta (1e4)": configured(rope_parameters=rope(1e4)),
        },
    ),
}


def build(case: Case, generator: torch.Generator) -> PreTrainedModel:
    """Builds a model in float32 whose every parameter bfloat16 holds exactly."""
    config = case.model.config_class(
        **{"bos_token_id": None, "eos_token_id": None, **SIZES, **case.settings}
    )
    model = case.model._from_config(config, **EAGER).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = case.norm_mean + NORM_STD * noise
            elif name.endswith("gate_up_proj_bias"):
                value = GATE_STD * noise
            elif name.endswith("bias"):
                value = BIAS_STD * noise
            else:
                value = WEIGHT_STD * noise
            parameter.copy_(value.to(torch.bfloat16))
            if case.mxfp4 and name.endswith(EXPERT_MATRICES):
                parameter.copy_(unpacked(*packed(parameter)))
    return model


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds ``weight[e, k, n]`` to MXFP4: blocks ``[e, n, k / 32, 16]`` and scales.

    A scale is the power of two from which the codes reach the largest of its 32 weights
    without being cut off.
    """
    blocks = weight.mT.unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1) / max(FP4)).log2().ceil()
    scaled = blocks / exponent.exp2()[..., None]
    distance = (scaled.abs()[..., None] - torch.tensor(FP4)).abs()
    codes = distance.argmin(-1) + 8 * (scaled < 0)
    pairs = codes[..., ::2] | codes[..., 1::2] << 4
    return pairs.to(torch.uint8), (exponent + 127).to(torch.uint8)


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `packed`, by transformers' own code: ``[e, k, n]``."""
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray:
    """Returns the logits [B, T, V]."""
    return model(input_ids=ids, use_cache=False).logits.numpy()


def to_version4(path: pathlib.Path, more: Mapping[str, Any]) -> None:
    """Rewrites ``config.json`` as transformers 4 wrote it.

    There ``rope_theta`` and ``torch_dtype`` stand at the top level, scaling is
    ``rope_scaling``, and derived settings (``head_dim``, ``layer_types``) are missing.
    """
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    for name in ("head_dim", "layer_types", "transformers_version"):
        config.pop(name, None)
    config.update(more)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save(model: PreTrainedModel, case: Case, folder: pathlib.Path) -> None:
    """Writes the checkpoint in bfloat16."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.save_pretrained(folder, max_shard_size=case.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.mxfp4:
        to_mxfp4(folder)
    if case.version4 is not None:
        to_version4(folder / "config.json", case.version4)


def to_mxfp4(folder: pathlib.Path) -> None:
    """Stores experts as openai's own checkpoints have them."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERT_MATRICES)]:
        blocks, scales = packed(tensors.pop(name).float())
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": MXFP4}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(name: str, case: Case, folder: pathlib.Path) -> None:
    """Writes one model with its reference and checks both.

    Raises:
        RuntimeError: If a feature does not show in the logits, or the written
            checkpoint does not give the same logits.
    """
    generator = torch.Generator().manual_seed(case.seed)
    model = build(case, generator)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    logits = logits_of(model, ids)
    print(f"{name}: logits std {logits.std():.3f}")
    for feature, change in case.checks.items():
        moved = np.abs(logits_of(change(model), ids) - logits).max()
        print(f"  {feature}: {moved:.3f}")
        if not moved > MIN_CHANGE:
            raise RuntimeError(f"{name}: {feature} does not show in the logits")

    save(model, case, folder)
    how = {"quantization_config": Mxfp4Config(dequantize=True)} if case.mxfp4 else {}
    read = case.model.from_pretrained(folder, dtype=torch.float32, **EAGER, **how)
    if not np.array_equal(logits_of(read.eval(), ids), logits):
        raise RuntimeError(f"{name}: the written checkpoint gives other logits")
    np.savez_compressed(
        folder / "reference.npz", ids=ids.numpy().astype(np.int32), logits=logits
    )


def main() -> None:
    """Writes every model."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name, case in CASES.items():
        make(name, case, pathlib.Path(__file__).parent / name)


if __name__ == "__main__":
    main()
