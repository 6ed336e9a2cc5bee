"""Makes the vectors beside this file: what SINQ saves, and the weights it reads back.

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 datasets scipy
termcolor``, ``pip install --no-deps sinq==0.2.0`` and ``python
tests/golden/sinq/make_vectors.py``. A CPU will do.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sinq.patch_model import BaseSINQHFModel
from sinq.sinqlinear import SINQLinear, sinq_base_quant_config

FOLDER = Path(__file__).parent
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LEAF = "model.layers.0.q_proj"

# By the name in the file: bits, group size, method, dtype to compute in, and [n, k].
CASES: dict[str, tuple[float, int, str, torch.dtype, tuple[int, int]]] = {
    "b4_aux": (4, 32, "sinq", BF16, (32, 64)),
    "b4_aux_float16": (4, 16, "sinq", F16, (32, 32)),
    "b4_plain": (4, 32, "sinq_plain", BF16, (24, 64)),
    "b4_plain_float16": (4, 32, "sinq_plain", F16, (24, 64)),
    "b4_plain_float32": (4, 32, "sinq_plain", F32, (24, 64)),
    "b4_hqq": (4, 32, "sinq_hqq", BF16, (24, 64)),
    "b4_awq_aux": (4, 16, "asinq", F16, (32, 64)),
    "b4_rows": (4, 64, "sinq_plain", F16, (24, 64)),
    "b8_aux": (8, 16, "sinq", BF16, (32, 32)),
    "b6_plain": (6, 16, "sinq_plain", F16, (24, 64)),
    "b5_plain": (5, 32, "sinq_plain", BF16, (7, 96)),
    "b3_aux": (3, 16, "sinq", F16, (32, 64)),
    "b3_plain": (3, 16, "sinq_plain", BF16, (24, 64)),
    "b2_aux": (2, 16, "sinq", F16, (32, 48)),
    "b158_plain": (1.58, 16, "sinq_plain", BF16, (24, 48)),
    "b1_plain": (1, 16, "sinq_plain", F16, (24, 64)),
}


def weight_of(n: int, k: int) -> torch.Tensor:
    """Random rows and columns of several magnitudes, short of SINQ's test for tails."""
    rows, columns = torch.rand(n, 1) + 0.5, torch.rand(1, k) + 0.5
    return torch.randn(n, k) * rows * columns


def main() -> None:
    for seed, (name, case) in enumerate(CASES.items(), 600):
        bits, size, method, dtype, (n, k) = case
        torch.manual_seed(seed)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = weight_of(n, k).to(dtype)
        inputs = torch.randn(8, k) if method == "asinq" else None
        layer: Any = SINQLinear(
            linear,
            sinq_base_quant_config(nbits=bits, group_size=size, method=method),
            compute_dtype=dtype,
            device="cpu",
            layer_activations=inputs,
        )
        with tempfile.TemporaryDirectory() as folder:
            BaseSINQHFModel.save_weights_safetensors({LEAF: layer.state_dict()}, folder)
            file = Path(folder, "model.safetensors.index.json.meta.json")
            said = json.loads(file.read_text())
            (state,) = BaseSINQHFModel.load_weights_safetensors(folder).values()
        again: Any = SINQLinear(None, None, compute_dtype=dtype, device="cpu")
        again.load_state_dict(state)
        arrays = {"state_W_q": state["W_q"]} | flat("state_meta", state["meta"])
        # Of 8 bits, it takes its own file for one without packing, and fails.
        arrays["out_dequant"] = (layer if bits == 8 else again).dequantize()
        dtypes = {"out_dequant": str(dtype).removeprefix("torch.")}
        if dtype == BF16:
            arrays["out_dequant"] = arrays["out_dequant"].view(torch.int16)
        meta = {
            "source": f"sinq {version('sinq')} (huawei-csl/SINQ), SINQLinear, "
            "save_weights_safetensors and load_weights_safetensors",
            "dtypes": dtypes if dtype == BF16 else {},
            "sidecar": said[LEAF],
        }
        target = FOLDER / f"sinq_{name}__{n}x{k}__s{seed}.npz"
        stored = {key: tensor.numpy() for key, tensor in arrays.items()}
        np.savez_compressed(target, meta=np.array(json.dumps(meta)), **stored)


def flat(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their names in a file."""
    if isinstance(value, dict):
        parts = [flat(f"{name}.{key}", one) for key, one in value.items()]
        return {key: tensor for part in parts for key, tensor in part.items()}
    return {name: value} if isinstance(value, torch.Tensor) else {}


if __name__ == "__main__":
    main()
