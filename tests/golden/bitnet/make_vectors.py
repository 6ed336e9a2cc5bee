"""Makes the vectors beside this file: what transformers' BitNet layers multiply by.

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 accelerate && python
tests/golden/bitnet/make_vectors.py``. A CPU will do.
"""

import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np

# Two functions are compiled where it is not forbidden, which needs a C++ compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from transformers import BitNetQuantConfig
from transformers.integrations import bitnet

FOLDER = Path(__file__).parent
# By the name in the file: what the configuration says, the scale and its dtype.
AUTO = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
CASES = {
    "autobitlinear": (AUTO, 1.2265625, torch.bfloat16),
    "bitlinear": ({}, 2.40625, torch.bfloat16),
    "bitlinear_f32": ({"modules_to_not_convert": ["lm_head"]}, 41.7, torch.float32),
}


def make(seed: int, name: str, n: int = 32, k: int = 96) -> None:
    """Random ternary weights, and what a layer makes of the unit vectors."""
    fields, scale, dtype = CASES[name]
    config = BitNetQuantConfig(**fields)
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.integers(-1, 2, (n, k)))
    packed = bitnet.pack_weights(weight.clone())
    scale = torch.tensor([scale], dtype=dtype)
    if config.linear_class == "autobitlinear":
        layer = bitnet.AutoBitLinear(k, n, bias=False, dtype=dtype)
        layer.weight.data = bitnet.unpack_weights(packed, dtype=dtype)
        layer.weight_scale.data = scale
    else:
        layer = bitnet.BitLinear(k, n, bias=False, dtype=dtype)
        layer.weight, layer.weight_scale = packed, scale
    with torch.no_grad():
        found = layer(torch.eye(k, dtype=dtype)).float().numpy()
    kind = str(dtype).removeprefix("torch.")
    arrays = {
        "weight": packed,
        # NumPy has no bfloat16.
        "weight_scale": (scale if kind == "float32" else scale.view(torch.uint16)),
        "ternary": weight.numpy().astype(np.int8),
        "out_identity": found,
    }
    entry = config.to_dict() | {"quant_method": "bitnet"}
    save(name, seed, arrays, {"config": entry, "dtypes": {"weight_scale": kind}})


def make_online(seed: int, n: int = 32, k: int = 96) -> None:
    """A dense weight, and what a layer in training makes of the unit vectors."""
    layer = bitnet.AutoBitLinear(k, n, bias=False, online_quant=True)
    rng = np.random.default_rng(seed)
    layer.weight.data = torch.from_numpy(rng.standard_normal((n, k), np.float32))
    with torch.no_grad():
        found = layer(torch.eye(k)).numpy()
    arrays = {
        "dense": layer.weight.detach().numpy(),
        "ternary": np.sign(found.T).astype(np.int8),
        "out_identity": found,
    }
    save("online", seed, arrays, {})


def save(name: str, seed: int, arrays: dict, meta: dict) -> None:
    """One file, which says where it is from."""
    version = importlib.metadata.version("transformers")
    meta |= {
        "source": f"transformers {version} (huggingface/transformers, "
        "src/transformers/integrations/bitnet.py), pack_weights and the layers",
        "torch": torch.__version__,
    }
    shape = "x".join(map(str, arrays["ternary"].shape))
    file = FOLDER / f"bitnet_{name}__{shape}__s{seed}.npz"
    np.savez_compressed(file, **arrays, meta=np.asarray(json.dumps(meta)))


if __name__ == "__main__":
    for seed, name in enumerate(CASES, 1200):
        make(seed, name)
    make_online(1203)
