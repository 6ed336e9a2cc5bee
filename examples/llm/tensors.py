"""A checkpoint's tensors before the decoder takes them: renamed, stacked, joined."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

import qjax

# Matrices of the same inputs, by the name that they have as one.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# What Gemma, where it sees, and Mixtral call what Qwen has other names for; gpt-oss has
# names that mean something else in files of transformers 5.
RENAMED = {
    r"^(model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"\.block_sparse_moe\.": ".mlp.",
    r"\.switch_mlp\.": ".experts.",  # MLX, which stacks them
    r"(\.experts\.\d+)\.w1\b": r"\1.gate_proj",
    r"(\.experts\.\d+)\.w2\b": r"\1.down_proj",
    r"(\.experts\.\d+)\.w3\b": r"\1.up_proj",
}
GPT_OSS = {
    r"\.mlp\.router\b": ".mlp.gate",
    r"\.experts\.gate_up_proj": ".experts.gate_up_pairs",
    r"(\.experts\.\w+)_bias$": r"\1.bias",
}
# What a model of text has no place for; rotary frequencies it computes itself.
SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|rotary_emb)\..*")
# One of the matrices of experts, or its bias.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..+)")


def stack(tensors: dict[str, Any], sharding: Any = None) -> dict[str, list[str]]:
    """Makes one stack of the matrices of all experts of a layer, as their product does.

    Names that other models have for the same become those of Qwen, and what a model of
    text has no place for is left out.

    Args:
      tensors: A checkpoint's, which this changes.
      sharding: As in `qjax.checkpoints.load`, where the tensors were read by it. A
        stack of what all devices hold goes where it says of the name of the stack.

    Returns:
      What each of the tensors was before: names of the checkpoint, one for each matrix.

    Raises:
      ValueError: If an expert is missing, the matrices are not alike, or the devices
        cannot share the stack.
    """
    origins = _rename(tensors)
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
        if sharding is not None:
            tensors[whole] = _placed(whole, tensors[whole], sharding(whole))
    return origins


def _placed(
    name: str, weight: Any, wanted: NamedSharding | Sequence[NamedSharding]
) -> Any:
    """Puts a stack where it would have been read to, if nothing of it is cut yet."""
    if not all(one.sharding.is_fully_replicated for one in jax.tree.leaves(weight)):
        return weight
    packed = isinstance(weight, qjax.QTensor)
    faults: list[str] = []
    # In words that are cut more finely, if those of this device cannot be.
    for layout in (None, qjax.formats.gptq.Stream()) if packed else (None,):
        if layout is not None:
            weight, faults = qjax.prepare(weight, layout=layout), []
        for where in [wanted] if isinstance(wanted, NamedSharding) else wanted:
            try:
                if packed:
                    return qjax.shard(weight, where.mesh, where.spec)
                return jax.device_put(weight, where)
            except ValueError as fault:
                faults.append(str(fault))
    raise ValueError(f"{name}: {' '.join(faults)}")


def _rename(tensors: dict[str, Any]) -> dict[str, list[str]]:
    is_gpt_oss = any(".mlp.router." in name for name in tensors)
    patterns = RENAMED | (GPT_OSS if is_gpt_oss else {})
    origins = {}
    for name in list(tensors):
        tensor, new = tensors.pop(name), name
        if SEEING.fullmatch(name):
            continue
        for pattern, replacement in patterns.items():
            new = re.sub(pattern, replacement, new)
        if re.fullmatch(r".*\.experts\.\w+", new) and isinstance(tensor, Array):
            # Stacks that are called no weights; gpt-oss has [experts, k, n].
            tensor, new = tensor.mT if is_gpt_oss else tensor, f"{new}.weight"
        tensors[new] = tensor
        origins[new] = [name]
    return origins


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
