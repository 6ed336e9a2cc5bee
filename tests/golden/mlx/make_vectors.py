"""Makes the vectors beside this file: what MLX quantizes and dequantizes on a CPU.

Run by hand, with Python 3.13 on Linux: ``pip install "mlx[cpu]==0.32.4"
mlx-lm==0.32.2 && python tests/golden/mlx/make_vectors.py``.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model, save_config, save_model

FOLDER = Path(__file__).parent
FLOATS = ("float16", "bfloat16", "float32")
# Bits, the size of groups, the dtype of the weight, outputs and inputs.
AFFINE = [
    (2, 32, "bfloat16", 6, 96),
    (2, 64, "float16", 5, 128),
    (3, 32, "float16", 6, 96),
    (3, 64, "bfloat16", 5, 128),
    (4, 32, "float32", 6, 96),
    (4, 64, "bfloat16", 7, 128),
    (4, 128, "float16", 5, 256),
    (5, 32, "bfloat16", 6, 96),
    (5, 64, "float32", 5, 128),
    (6, 64, "float16", 5, 128),
    (6, 32, "bfloat16", 6, 96),
    (8, 64, "bfloat16", 5, 128),
    (8, 128, "float32", 3, 128),
]
MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def stored(array: mx.array) -> np.ndarray:
    """An array as NumPy has it; of bfloat16 the patterns."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def save(name: str, arrays: dict[str, mx.array], config: dict[str, Any]) -> None:
    version = importlib.metadata.version("mlx")
    meta = {
        "source": f"mlx {version}, mx.quantize and mx.dequantize, on a CPU",
        "config": config,
        "dtypes": {
            key: str(array.dtype).removeprefix("mlx.core.")
            for key, array in arrays.items()
        },
    }
    np.savez_compressed(
        FOLDER / f"mlx_{name}.npz",
        allow_pickle=False,
        **{key: stored(array) for key, array in arrays.items()},
        meta=np.asarray(json.dumps(meta)),
    )


def weight_of(seed: int, n: int, k: int, dtype: str) -> mx.array:
    """Random rows of several magnitudes, and groups that are borderline cases."""
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.integers(-12, 4, (n, k // 32))).repeat(32, 1)
    w = (rng.standard_normal((n, k)) * size).astype(np.float32)
    w[0, :32] = 0
    w[0, 32:64] = 0.375  # all alike
    w[0, 64:96] = -np.abs(w[0, 64:96]) - 1  # far from 0
    w[1, :32] = np.abs(w[1, :32]) + 2
    w[1, 32:64] *= 2.0**-20  # where ranges are less than the least scale
    w[1, 64:96] = np.where(np.arange(32) % 2, 0.5, -0.5)  # as far on both sides
    w[2, :32] = np.where(np.arange(32) == 5, -1e-9, 3e-7)
    return mx.array(w).astype(getattr(mx, dtype))


def state(arrays: tuple[mx.array, ...] | list[mx.array]) -> dict[str, mx.array]:
    names = ("weight", "scales", "biases")
    return {f"state_{k}": a for k, a in zip(names, arrays, strict=False)}


def make_affine(seed: int, case: tuple[int, int, str, int, int]) -> None:
    bits, size, dtype, n, k = case
    w = weight_of(seed, n, k, dtype)
    arrays = state(mx.quantize(w, size, bits))
    found = mx.dequantize(*arrays.values(), size, bits)
    config = {"group_size": size, "bits": bits, "mode": "affine"}
    name = f"affine__b{bits}_g{size}_{dtype}__{n}x{k}__s{seed}"
    save(name, {"w": w} | arrays | {"out_dequant": found}, config)


def make_ties(seed: int) -> None:
    """Rows whose codes differ where a division becomes a product with an inverse."""
    rng = np.random.default_rng(seed)
    n, k, bits, top = 6, 64, 4, np.float32(15)
    rows = mx.array(rng.standard_normal((2**15, k), np.float32)).astype(mx.bfloat16)
    wide = np.array(rows.astype(mx.float32))
    low, high = wide.min(1, keepdims=True), wide.max(1, keepdims=True)
    step = np.where(np.abs(low) > np.abs(high), high - low, low - high) / top
    edge = np.where(step > 0, low, high)
    scale = edge / np.rint(edge / step)
    exact = np.rint((wide - edge) / scale)
    by_inverse = np.rint((wide - edge) * (1 / scale))
    chosen = np.flatnonzero((exact != by_inverse).any(1))[:n]
    w = rows[mx.array(chosen)]
    arrays = state(mx.quantize(w, k, bits))
    found = mx.dequantize(*arrays.values(), k, bits)
    config = {"group_size": k, "bits": bits, "mode": "affine"}
    name = f"ties__b{bits}_g{k}_bfloat16__{n}x{k}__s{seed}"
    save(name, {"w": w} | arrays | {"out_dequant": found}, config)


def make_random(seed: int, bits: int, dtype: str) -> None:
    """Any codes, and scales and biases of any size that both are finite with."""
    rng = np.random.default_rng(seed)
    n, k, size = 6, 128, 32
    words = rng.integers(0, 2**32, (n, k * bits // 32), dtype=np.uint32)
    low, high = (-24, 7) if dtype == "float16" else (-126, 110)
    exponents = rng.integers(low, high, (2, n, k // size))
    exponents[1] = np.where(rng.random((n, k // size)) < 0.7, exponents[0], high)
    values = rng.uniform(-2, 2, exponents.shape) * np.exp2(exponents.astype(float))
    scales, biases = (mx.array(v.astype(np.float32)) for v in values)
    kind = getattr(mx, dtype)
    arrays = state([mx.array(words), scales.astype(kind), biases.astype(kind)])
    found = mx.dequantize(*arrays.values(), size, bits)
    config = {"group_size": size, "bits": bits}
    name = f"random__b{bits}_g{size}_{dtype}__{n}x{k}__s{seed}"
    save(name, arrays | {"out_dequant": found}, config)


def make_floats(seed: int, mode: str) -> None:
    size, bits = MODES[mode]
    n, k = 6, 96
    arrays = state(mx.quantize(weight_of(seed, n, k, "bfloat16"), mode=mode))
    # Any codes and scales are sound, but for those that are no numbers.
    rng = np.random.default_rng(seed)
    words, scales = (np.array(array) for array in arrays.values())
    scales[3] = rng.integers(0, 127, scales.shape[1:])
    scales[4, :2] = 0, 1
    words[3:] = rng.integers(0, 2**32, words[3:].shape, dtype=np.uint32)
    if mode == "mxfp8":
        patterns = words.view(np.uint8)
        patterns[(patterns & 127) == 127] = 0
    else:
        scales[5] = 200 if mode == "mxfp4" else 126
    arrays = state([mx.array(words), mx.array(scales)])
    found = mx.dequantize(*arrays.values(), mode=mode)
    config = {"group_size": size, "bits": bits, "mode": mode}
    name = f"{mode}__{n}x{k}__s{seed}"
    save(name, arrays | {"out_dequant": found}, config)


class Model(nn.Module):
    """Embeddings, matrices with and without biases, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 64)
        self.up_proj = nn.Linear(64, 16)
        self.down_proj = nn.Linear(96, 8, bias=False)
        self.gate = nn.Linear(64, 3, bias=False)
        self.left = nn.Linear(64, 8, bias=False)
        self.odd = nn.Linear(40, 8, bias=False)
        self.experts = SwitchLinear(64, 8, 3, bias=True)
        self.few = nn.Linear(64, 8, bias=False)
        self.norm = nn.RMSNorm(64)

    @property
    def quant_predicate(self) -> Any:
        said = {
            "gate": {"group_size": 64, "bits": 8},
            "up_proj": {"group_size": 32, "bits": 6, "mode": "affine"},
            "few": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
            "left": False,
        }
        return lambda path, _: said.get(path, True)


def make_model(seed: int) -> None:
    """A directory: matrices that differ, two that stay dense, a stack, embeddings."""
    mx.random.seed(seed)
    model = Model()
    model.set_dtype(mx.bfloat16)
    config: dict[str, Any] = {"model_type": "few"}
    model, config = quantize_model(model, config, 32, 4)
    arrays = {}
    for path, module in model.named_modules():
        if not hasattr(module, "scales"):
            continue
        found = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            mode=module.mode,
        )
        arrays[f"out_{path}"] = found
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        save_config(config, Path(folder, "config.json"))
        said = json.loads(Path(folder, "config.json").read_text())
        tensors: Any = mx.load(f"{folder}/model.safetensors")
        arrays |= {f"state_{key}": tensor for key, tensor in tensors.items()}
        save(f"model__9__s{seed}", arrays, said)


if __name__ == "__main__":
    for seed, case in enumerate(AFFINE, 1400):
        make_affine(seed, case)
    make_ties(1419)
    for seed, (bits, dtype) in enumerate(
        [(2, "float32"), (4, "float16"), (5, "float16"), (8, "bfloat16")], 1420
    ):
        make_random(seed, bits, dtype)
    for seed, mode in enumerate(MODES, 1430):
        make_floats(seed, mode)
    make_model(1440)
