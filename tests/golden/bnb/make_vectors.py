"""Makes the files `bnb_int8__*`: what LLM.int8() saves, and what it makes of that.

Run by hand: ``pip install torch==2.13.0 bitsandbytes==0.50.2 && python
tests/golden/bnb/make_vectors.py``. A CPU will do. The other files beside this one are
older than it.
"""

import importlib.metadata
import json
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

FOLDER = Path(__file__).parent
THRESHOLD = 6.0


def layer_of(weight: torch.Tensor) -> bitsandbytes.nn.Linear8bitLt:
    """A layer that was quantized on its way to the device, as all are."""
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(
        k, n, bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def as_saved(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def arrays_of(layer: bitsandbytes.nn.Linear8bitLt, seed: int) -> dict[str, np.ndarray]:
    state = {name: as_saved(value) for name, value in layer.state_dict().items()}
    k = layer.in_features
    dense = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    # Activations with one outlier, whose column is multiplied in 16 bits.
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(seed))
    x[1, k // 2] = 20
    x = x.to(torch.float16)
    with torch.no_grad():
        # In training, a CPU multiplies by the weight itself.
        identity = layer.train()(torch.eye(k)).T
        y = layer.eval()(x)
    return {f"state_{name}": value for name, value in state.items()} | {
        "out_dequant": as_saved(dense),
        "out_identity": as_saved(identity),
        "in_x": as_saved(x),
        "out_y": as_saved(y),
    }


def write(
    name: str, n: int, k: int, seed: int, made: dict, calls: str, dtype: torch.dtype
) -> None:
    meta = {
        "format": "bnb_int8",
        "configuration": name,
        "n": n,
        "k": k,
        "seed": seed,
        "source": f"bitsandbytes {importlib.metadata.version('bitsandbytes')}",
        "calls": calls,
        "weight_dtype": str(dtype).removeprefix("torch."),
        "threshold": THRESHOLD,
    }
    file = FOLDER / f"bnb_int8__{name}__{n}x{k}__s{seed}.npz"
    np.savez_compressed(file, meta=np.array(json.dumps(meta)), **made)


def weights(name: str, n: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if "scales" in name:
        # From the smallest of float16 to the largest.
        w *= 2.0 ** torch.linspace(-22, 13, n)[:, None]
    return w.to(dtype)


LAYERS = [
    ("float16", 16, 64, 720, torch.float16),
    ("bfloat16", 8, 96, 721, torch.bfloat16),
    ("float32", 7, 50, 722, torch.float32),
    ("float32_scales", 24, 32, 723, torch.float32),
    ("float16_one_row", 1, 33, 724, torch.float16),
]
for name, n, k, seed, dtype in LAYERS:
    w = weights(name, n, k, seed, dtype)
    made = {"in_w": as_saved(w.float())} | arrays_of(layer_of(w), seed)
    calls = "Linear8bitLt, int8_vectorwise_dequant"
    write(name, n, k, seed, made, calls, dtype)

# Any bytes and any scales, which need not come from float16.
n, k, seed = 12, 256, 725
rng = np.random.default_rng(seed)
held = {
    "weight": np.stack([rng.permutation(np.arange(-128, 128)) for _ in range(n)]),
    "SCB": np.exp(rng.uniform(-60, 60, n)),
}
held = {"weight": held["weight"].astype(np.int8), "SCB": np.float32(held["SCB"])}
weight, scale = map(torch.from_numpy, held.values())
made = {f"state_{key}": value for key, value in held.items()}
made["out_dequant"] = as_saved(functional.int8_vectorwise_dequant(weight, scale))
write("any", n, k, seed, made, "int8_vectorwise_dequant", torch.float32)
