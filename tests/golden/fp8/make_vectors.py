"""Makes the vectors beside this file that no configuration gives blocks.

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 accelerate && python
tests/golden/fp8/make_vectors.py``. A CPU will do.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

FOLDER = Path(__file__).parent
# By the name in the file: the configuration, the shape of the weight and of its scales.
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
FBGEMM["modules_to_not_convert"] = ["lm_head"]
CASES = {
    "fbgemm": (FBGEMM, (32, 96), (32, 1)),
    "default": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        *((256, 384), (2, 3)),
    ),
}


def make(seed: int, name: str) -> None:
    """Random numbers and scales, and what transformers makes of them."""
    config, (n, k), shape = CASES[name]
    rng = np.random.default_rng(seed)
    # The same 32 rows again keep the file small.
    rows = rng.integers(0, 127, (32, k)) | rng.integers(0, 2, (32, k)) << 7
    patterns = np.tile(rows.astype(np.uint8), (n // 32, 1))
    # Such that floats of 16 bits would hold them.
    scale = (rng.integers(8, 164, shape) / 2**13).astype(np.float32)
    weight = torch.from_numpy(patterns).view(torch.float8_e4m3fn)
    found = Fp8Dequantize(None)._dequantize_one(
        weight, torch.from_numpy(scale), output_dtype=torch.bfloat16
    )
    version = importlib.metadata.version("transformers")
    meta = {
        "source": f"transformers {version} (huggingface/transformers, "
        "src/transformers/integrations/finegrained_fp8.py), Fp8Dequantize",
        "config": config,
        "dtypes": {"weight": "float8_e4m3fn", "out_dequant": "bfloat16"},
        "torch": torch.__version__,
    }
    np.savez_compressed(
        FOLDER / f"fp8_{name}__float32__{n}x{k}__s{seed}.npz",
        weight=patterns,
        scale=scale,
        out_dequant=found.view(torch.int16).numpy().view(np.uint16),
        meta=np.asarray(json.dumps(meta)),
    )


if __name__ == "__main__":
    for seed, name in enumerate(CASES, 913):
        make(seed, name)
