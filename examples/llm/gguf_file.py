"""What a GGUF file says in the terms of a Hugging Face directory.

The metadata become a config.json, and tensors get the names that `model.Decoder` asks
for. llama.cpp's converter also moves the rows of two matrices of Llama: channels that
rotate together are neighbours there, and here half a head apart.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf_config import Layer
from jax import Array
from jax.sharding import Sharding

import qjax

# The ``model_type`` of an architecture; Mistral shares Llama's, and Mixtral does, too.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "granite": "granite",
    "smollm3": "smollm3",
}
# Of so many layers all but the last look back on a window only.
PATTERNS = {"gpt-oss": 2, "gemma2": 2, "gemma3": 6}
# What llama.cpp knows the largest models by, whose scores have another scale.
LARGEST = {"gemma2": 46, "gemma3": 62}
# Those whose rows were moved.
MOVED = ("llama", "mixtral", "granite", "smollm3")
# Keys that a model cannot do without; all but the last are numbers of something.
NEEDED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Gemma has this name for another norm than all others, and Phi for two matrices.
GEMMA = {"ffn_norm": "pre_feedforward_layernorm"}
PHI = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
OWN = {"gemma2": GEMMA, "gemma3_text": GEMMA, "phi3": PHI}
# Keys that only some architectures may have, and what a config.json calls them.
KEYS = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
}
# What divides Phi's frequencies, by the names of a config.json.
FACTORS = {
    f"{length}_factor": f"rope_factors_{length}.weight" for length in ("short", "long")
}


def is_gguf(path: Path) -> bool:
    """Whether a model is one file, not a directory."""
    return Path(path).suffix == ".gguf"


def read_config(path: Path) -> Mapping[str, Any]:
    """Reads config.json of a directory, or says the same of a GGUF file.

    Raises:
      ValueError: If the model of the file is none that the decoder can run.
    """
    if not is_gguf(path):
        return qjax.checkpoints.read_config(path)
    try:
        config = config_of(qjax.checkpoints.read_metadata(path))
    except KeyError as error:
        raise ValueError(f"{path}: the metadata lack {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config["model_type"] == "phi3":
        tensors = qjax.checkpoints.lazy(path)
        for ours, theirs in FACTORS.items():
            if theirs in tensors:
                config["rope_parameters"][ours] = tensors[theirs].tolist()
    return config


def config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model with these metadata."""
    kind = metadata["general.architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={kind!r} must be one of {[*ARCHITECTURES]}."
        )
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }
    missing = [f"{kind}.{key}" for key in NEEDED if key not in own]
    if missing:
        raise ValueError(f"the metadata lack {', '.join(missing)}.")
    hidden, heads = own["embedding_length"], own["attention.head_count"]
    kv_heads = own.get("attention.head_count_kv", heads)
    pattern, experts = PATTERNS.get(kind, 1), own.get("expert_used_count", 0)
    window = own["attention.sliding_window"] if pattern > 1 else 0
    if kind == "phi3":  # In all layers, if there is one.
        window = own.get("attention.sliding_window", 0)
    counts = {key: own[key] for key in NEEDED[:-1]}
    counts["attention.head_count_kv"] = kv_heads
    if experts:
        counts["expert_used_count"] = experts
    if pattern > 1 or window:
        counts["attention.sliding_window"] = window
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(
                f"{kind}.{name}={count!r} must be one number, for all layers."
            )
    head_dim = own.get("attention.key_length", hidden // heads)
    model_type = ARCHITECTURES[kind]
    if model_type == "llama" and experts:
        model_type = "mixtral"
    is_largest = own["block_count"] == LARGEST.get(kind)
    scale = hidden // heads if is_largest else head_dim
    turned = own.get("rope.dimension_count", head_dim) if kind == "phi3" else head_dim
    # What the decoder does not do, and the values at which that makes no difference.
    wanted = {
        "attention.value_length": [head_dim],
        "rope.dimension_count": [turned],
        "attention.sliding_window": [window],
        "attention.sliding_window_pattern": [pattern],
        "final_logit_softcapping": [0],
        "attn_logit_softcapping": [0],
        "expert_weights_scale": [0, 1],
        # A softmax of all, or of those that are chosen.
        "expert_gating_func": [3, 0] if kind == "gpt-oss" else [1, 0],
        "expert_group_count": [0, 1],
        "attention.causal": [True],
        "attention.clamp_kqv": [0],
        "attention.scale": [0, float(np.float32(scale**-0.5))],
        "embedding_scale": [1, 0],
        "residual_scale": [1, 0],
        "logit_scale": [1, 0],
    }
    known = KEYS.get(kind, {})
    check_supported(
        own, kind, {key: values for key, values in wanted.items() if key not in known}
    )
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    stops = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    last = "sliding_attention" if kind == "phi3" and window else "full_attention"
    kinds = ["sliding_attention"] * (pattern - 1) + [last]
    return only_of(own, kind, scale) | {
        "model_type": model_type,
        "vocab_size": own.get("vocab_size", len(tokens)),
        "hidden_size": hidden,
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "rope_parameters": rope_of(own, kind),
        "eos_token_id": [stop for stop in stops if stop is not None],
        "num_experts_per_tok": experts,
        "norm_topk_prob": own.get("expert_weights_norm", model_type == "qwen3_moe"),
        "sliding_window": window or None,
        "layer_types": [kinds[i % pattern] for i in range(own["block_count"])],
        "query_pre_attn_scalar": scale,
        "partial_rotary_factor": turned / head_dim,
    }


def only_of(own: Mapping[str, Any], kind: str, scale: int) -> dict[str, Any]:
    """What a config.json of that architecture has and others have not.

    Args:
      own: The metadata of the architecture, without its name.
      kind: Its name.
      scale: Whose inverse root multiplies scores where nothing else is said.
    """
    found = {name: own[key] for key, name in KEYS.get(kind, {}).items() if own.get(key)}
    if kind == "granite":
        found.setdefault("attention_multiplier", scale**-0.5)
    if kind == "gemma3":
        found["rope_local_base_freq"] = own.get("rope.freq_base_swa", 10000.0)
    if kind == "smollm3":
        found["no_rope_layer_interval"] = 4  # llama.cpp says no more.
    return found


def check_supported(
    own: Mapping[str, Any], kind: str, wanted: Mapping[str, list[Any]]
) -> None:
    """Raises a ValueError where metadata are not among those that are wanted.

    The first of each is what a file means that does not say.
    """
    for key, values in wanted.items():
        if own.get(key, values[0]) not in values:
            raise ValueError(
                f"{kind}.{key}={own[key]} is not supported, but {values[0]}."
            )


def rope_of(own: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The ``rope_parameters`` of a config.json, of the metadata of an architecture."""
    # As llama.cpp has it, where older files name no type.
    scaling = own.get("rope.scaling.type", "linear")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    length = own.get("rope.scaling.original_context_length", own["context_length"])
    if kind == "phi3":
        rope["attention_factor"] = own.get("rope.scaling.attn_factor", 1.0)
        rope["original_max_position_embeddings"] = length
    if scaling == "none" or (scaling == "linear" and not factor):
        return rope
    rope |= {"rope_type": scaling, "factor": factor}
    if scaling == "linear":
        return rope
    if scaling != "yarn":
        raise ValueError(f"{kind}.rope.scaling.type={scaling!r} is not supported.")
    wanted = {
        "rope.scaling.attn_factor": [1],
        "rope.scaling.yarn_attn_factor": [1],
        "rope.scaling.yarn_ext_factor": [1],
        "rope.scaling.yarn_log_multiplier": [0],
    }
    check_supported(own, kind, wanted)
    return rope | {
        "original_max_position_embeddings": length,
        "beta_fast": own.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": own.get("rope.scaling.yarn_beta_slow"),
        # llama.cpp always does; gpt-oss was trained without.
        "truncate": kind != "gpt-oss",
    }


def read_tensors(path: Path, sharding: Any = None) -> dict[str, Any]:
    """Reads the weights of a directory, or those of a GGUF file as it has them.

    Args:
      path: Either.
      sharding: As in `qjax.checkpoints.load`, by the names of a directory.

    Returns:
      Matrices and arrays by the names of a directory. "rope_freqs.weight", by which
      Llama 3 divides its frequencies, and whatever else has no name there, keep theirs.
    """
    if not is_gguf(path):
        return qjax.checkpoints.load(path, sharding=sharding)
    config = read_config(path)
    moved = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    kind = config["model_type"]
    where = None if sharding is None else lambda name: sharding(renamed(name, kind))
    tensors = {}
    for name, weight in qjax.checkpoints.lazy(path, sharding=where).items():
        if kind == "phi3" and name in FACTORS.values():
            continue  # `read_config` has them.
        new = renamed(name, kind)
        tensors[new] = weight
        if new.endswith("shared_expert_gate.weight"):
            tensors[new] = weight.reshape(1, -1)  # llama.cpp has a vector.
        for part, heads in moved.items():
            if part in new and kind in MOVED:
                tensors[new] = columns_back(weight, heads)
    return tensors


def renamed(name: str, kind: str) -> str:
    """The name that a directory of that ``model_type`` has for a tensor of a file."""
    names = NAMES | OWN.get(kind, {})
    # Files of 2023 have a matrix for each expert.
    pattern = r"(?:blk\.(\d+)\.)?(\w+?)(?:\.(\d+))?((?:\.weight|\.bias)?)"
    match = re.fullmatch(pattern, name)
    if match is None or match[2] not in names:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    # No matrices, and no norms.
    suffix = "" if match[2] == "attn_sinks" else match[4]
    new = names[match[2]]
    if match[3] is not None:
        new = new.replace("mlp.", f"mlp.experts.{match[3]}.")
    return f"{layer}{new}{suffix}"


def columns_back(weight: Any, heads: int) -> Any:
    """Moves the outputs of a matrix, or a bias, back to where Llama has them.

    Args:
      weight: A `qjax.QTensor` ``[k, n]``, whose columns are the outputs, or an array
        ``[n, ...]``.
      heads: Number of heads, each of which is moved within itself.

    Returns:
      The same with the evens of each head before its odds; packed columns are moved,
      and not unpacked.
    """
    packed = isinstance(weight, qjax.QTensor)
    n = weight.n if packed else weight.shape[0]
    index = np.arange(n).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if not packed:
        return _taken(weight, index, 0)
    w = qjax.relayout(weight, qjax.formats.gptq.Stream())
    # All that has columns, in two levels too; NVFP4's number for the whole has none.
    words, scale, zero = jax.tree.map(
        lambda leaf: _taken(leaf, index, -1) if leaf.ndim else leaf,
        (w.words, w.scale, w.zero),
    )
    return qjax.prepare(dataclasses.replace(w, words=words, scale=scale, zero=zero))


def _taken(array: Array, index: np.ndarray, axis: int) -> Array:
    """Gathers along an axis, and leaves the result where the array is."""
    return _taking(axis, array.sharding)(array, index)


@functools.cache
def _taking(axis: int, where: Sharding) -> Callable[[Array, np.ndarray], Array]:
    return jax.jit(functools.partial(jnp.take, axis=axis), out_shardings=where)


def completed(config: Any, tensors: dict[str, Any]) -> Any:
    """A `model.Config` with what only the tensors of a file say.

    Args:
      config: What the metadata say.
      tensors: As `read_tensors` gives them; "rope_freqs.weight" is taken out.
    """
    factors = np.asarray(tensors.pop("rope_freqs.weight", 1.0), np.float64)

    def divided(layer: Layer) -> Layer:
        if layer.rope is None:
            return layer
        frequencies = tuple((np.array(layer.rope.frequencies) / factors).tolist())
        return layer._replace(rope=layer.rope._replace(frequencies=frequencies))

    return dataclasses.replace(
        config,
        layers=tuple(map(divided, config.layers)),
        tied=tensors.keys().isdisjoint(("lm_head", "lm_head.weight")),
        norm_offset=0.0,  # llama.cpp's converter adds it to the weights.
    )
