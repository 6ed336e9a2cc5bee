"""Makes the vectors beside this file: what ModelOpt exports, and what it makes of that.

Run by hand: ``pip install torch==2.13.0 nvidia-modelopt==0.47.0 requests
huggingface_hub && python tests/golden/modelopt/make_vectors.py``. A CPU will do.
"""

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import get_quant_config
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

FOLDER = Path(__file__).parent
# By the name in the file: ModelOpt's preset, and outputs and inputs.
CASES = {
    "fp8": ("FP8_DEFAULT_CFG", 32, 96),
    "fp8_per_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", 32, 96),
    "fp8_pb_wo": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 128, 384),
    "mxfp8": ("MXFP8_DEFAULT_CFG", 32, 96),
    "nvfp4": ("NVFP4_DEFAULT_CFG", 32, 96),
    "w4a16_nvfp4": ("W4A16_NVFP4_CFG", 32, 96),
}


class Model(torch.nn.Module):
    """One matrix to quantize, and one that every preset leaves dense."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        self.up_proj = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
        self.up_proj.weight.data = weight
        self.lm_head = torch.nn.Linear(n, 4, bias=False, dtype=weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.up_proj(x))


def weight_of(n: int, k: int) -> torch.Tensor:
    """Random rows of several magnitudes; the same 32 again, to keep files small."""
    size = torch.exp2(torch.randint(-6, 3, (32, k // 16))).repeat_interleave(16, 1)
    rows = (torch.randn(32, k) * size).to(torch.bfloat16)
    return rows.repeat(n // 32, 1)


def dequantized(held: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """What ModelOpt's own classes make of the tensors: in float32, rounded once."""
    weight, scale, dtype = held["weight"], held["weight_scale"], torch.float32
    if weight.dtype == torch.uint8:
        found = NVFP4QTensor(shape, dtype, weight).dequantize(
            scale=scale, double_scale=held["weight_scale_2"], block_sizes={-1: 16}
        )
    elif scale.dtype == torch.uint8:
        found = MXFP8QTensor(shape, dtype, weight).dequantize(scale=scale)
    elif scale.dim() == 4:
        found = FP8QTensor(shape, dtype, weight).dequantize(
            scale=scale[:, 0, :, 0], block_sizes={-1: 128, -2: 128}
        )
    else:
        of_rows = scale[:, None] if scale.dim() == 1 else scale
        found = FP8QTensor(shape, dtype, weight).dequantize(scale=of_rows)
    return found.to(torch.bfloat16)


def stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy has it: patterns of what NumPy does not know."""
    patterns = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    array = tensor.contiguous().view(patterns.get(tensor.dtype, tensor.dtype)).numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array


def make(seed: int, name: str) -> None:
    """Quantizes, exports and dequantizes one matrix."""
    preset, n, k = CASES[name]
    torch.manual_seed(seed)
    x = torch.randn(8, k, dtype=torch.bfloat16)
    model: Any = Model(weight_of(n, k))
    config = copy.deepcopy(getattr(mtq, preset))
    model = mtq.quantize(model, config, lambda quantized: quantized(x))
    described = get_quant_config(model)
    _export_quantized_weight(model.up_proj, torch.bfloat16)
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    held = {
        key: tensor.detach()
        for key, tensor in model.up_proj.state_dict().items()
        if key in names
    }
    arrays = {f"state_{key}": tensor for key, tensor in held.items()}
    arrays["out_dequant"] = dequantized(held, torch.Size((n, k)))
    version = importlib.metadata.version("nvidia-modelopt")
    meta = {
        "source": f"nvidia-modelopt {version} (NVIDIA/Model-Optimizer): mtq.{preset}, "
        "torch/export/unified_export_hf.py and torch/quantization/qtensor",
        "config": convert_hf_quant_config_format(described),
        "hf_quant_config": described,
        "dtypes": {
            key: str(tensor.dtype).removeprefix("torch.")
            for key, tensor in arrays.items()
        },
        "torch": torch.__version__,
    }
    np.savez_compressed(
        FOLDER / f"modelopt_{name}__{n}x{k}__s{seed}.npz",
        allow_pickle=False,
        **{key: stored(tensor) for key, tensor in arrays.items()},
        meta=np.asarray(json.dumps(meta)),
    )


if __name__ == "__main__":
    for seed, name in enumerate(CASES, 1100):
        make(seed, name)
