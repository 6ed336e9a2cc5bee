"""Make MLX checkpoints of some of the tiny models beside this file, and their logits.

Run by hand, with Python 3.13 on Linux: ``pip install "mlx[cpu]==0.32.4"
mlx-lm==0.32.2 && python tests/reference/make_mlx.py``. The script stops where mlx-lm's
logits of the dense weights are not those of transformers, or where quantizing changes
none of them. See README.md.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

FOLDER = Path(__file__).parent
# Float32 against float32.
CLOSE, LEAST_CHANGE = 1e-4, 1e-2


def mixed(path: str, _: Any) -> bool | dict[str, Any]:
    """More bits for some, and small floats."""
    if "down_proj" in path:
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    if "up_proj" in path:
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    if "v_proj" in path:
        return {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    return "layers.1.self_attn.o_proj" not in path


def described(source: str) -> dict[str, Any]:
    """A config.json as mlx-lm 0.32 knows it: rotary positions as transformers 4 did."""
    config = json.loads((FOLDER / source / "config.json").read_text())
    # It rounds the ends of YaRN's ramp whatever this says.
    rope = {k: v for k, v in config.pop("rope_parameters").items() if k != "truncate"}
    config["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    return config


def logits_of(path: Path, ids: mx.array, **changes: Any) -> np.ndarray:
    """Logits in float32, with the weights that are there."""
    model, _ = load_model(path, model_config=changes)
    model.set_dtype(mx.float32)
    return np.array(model(ids))


def make(source: str, predicate: Any = None, close: float = CLOSE) -> None:
    """Quantizes a model as mlx-lm does, and saves it with its logits."""
    reference = np.load(FOLDER / source / "reference.npz")
    ids, said = mx.array(reference["ids"]), described(source)
    path, target = FOLDER / source, FOLDER / f"mlx_{source}"
    error = np.abs(logits_of(path, ids, **said) - reference["logits"]).max()
    model, config = load_model(path, model_config=said)
    model, config = quantize_model(model, config, 32, 4, quant_predicate=predicate)
    save_model(target, model)
    (target / "model.safetensors.index.json").unlink()
    del config["rope_parameters"]
    save_config(config, target / "config.json")
    logits = logits_of(target, ids)
    change = np.abs(logits - reference["logits"]).max()
    print(f"{source}: {error:.1e} from transformers', quantized {change:.2f}")
    if error > close or change < LEAST_CHANGE:
        raise SystemExit(f"{source}: mlx-lm's logits are not what they should be.")
    np.savez_compressed(target / "reference.npz", ids=reference["ids"], logits=logits)


if __name__ == "__main__":
    make("llama3_tied", mixed)
    make("qwen3_moe")
    # By the rounded ends of which README.md says.
    make("gpt_oss", close=1.62)
