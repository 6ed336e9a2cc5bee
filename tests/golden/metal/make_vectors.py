"""Makes the vectors beside this file: what transformers quantizes as "metal".

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 && python
tests/golden/metal/make_vectors.py``. A CPU will do, on which transformers quantizes
nothing itself, but dequantizes.
"""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import MetalConfig
from transformers.integrations.metal_quantization import MetalDequantize, MetalQuantize

FOLDER = Path(__file__).parent
CASES = [
    (2, 32, torch.float16, 6, 96),
    (4, 64, torch.bfloat16, 5, 128),
    (4, 48, torch.float32, 3, 96),
    (8, 32, torch.float16, 4, 64),
]


def stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy has it; of bfloat16 the patterns."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


def make(seed: int, case: tuple[int, int, torch.dtype, int, int]) -> None:
    """Quantizes and dequantizes one matrix by the operations that load a model."""
    torch.manual_seed(seed)
    bits, size, dtype, n, k = case
    powers = torch.exp2(torch.randint(-12, 4, (n, k // 16)).float())
    w = (torch.randn(n, k) * powers.repeat_interleave(16, 1)).to(dtype)
    w[0, :size] = 0
    config = MetalConfig(bits=bits, group_size=size)
    quantizer: Any = types.SimpleNamespace(quantization_config=config)
    tensors = MetalQuantize(quantizer).convert({"weight": [w]})
    held = {key: [tensor] for key, tensor in tensors.items()}
    out = MetalDequantize(quantizer).convert(held, full_layer_name="out_dequant")
    arrays = {f"state_{key}": tensor for key, tensor in tensors.items()} | out
    meta = {
        "source": f"transformers {transformers.__version__}: MetalQuantize and "
        "MetalDequantize of integrations/metal_quantization.py",
        "config": config.to_dict(),
        "dtypes": {k: str(a.dtype).removeprefix("torch.") for k, a in arrays.items()},
        "torch": torch.__version__,
    }
    kind = str(dtype).removeprefix("torch.")
    np.savez_compressed(
        FOLDER / f"metal_b{bits}_g{size}_{kind}__{n}x{k}__s{seed}.npz",
        allow_pickle=False,
        **{key: stored(array) for key, array in arrays.items()},
        meta=np.asarray(json.dumps(meta)),
    )


if __name__ == "__main__":
    for seed, case in enumerate(CASES, 1450):
        make(seed, case)
