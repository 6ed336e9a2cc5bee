"""PyTorch's packages run and read what qjax quantized."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file

import qjax
from qjax import checkpoints
from qjax.formats import gptq as format_
from qjax.quantizers import gptq, gram, hqq
from tests.peers import arrays
from tests.peers.test_gptqmodel import dequantized

DENSE = Path(__file__).parents[1] / "data" / "llama_bf16"


def logits_of(directory: Path) -> np.ndarray:
    ids = np.load(DENSE / "reference.npz")["prompt_ids"].astype(np.int64)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_transformers_runs_a_directory(tmp_path):
    rounding = functools.partial(qjax.quantize, symmetric=True)
    options = {"format": "compressed-tensors", "quantizer": rounding}
    checkpoints.quantize(DENSE, tmp_path / "packed", **options)
    weights = checkpoints.load(tmp_path / "packed", prepare=False)
    dense = {
        f"{name}.weight" if isinstance(w, qjax.QTensor) else name: w
        for name, w in weights.items()
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        DENSE, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            w = dense[name]
            if isinstance(w, qjax.QTensor):
                w = qjax.dequantize(w).astype(jnp.float32).T
            parameter.copy_(arrays.to_torch(w).float())
        ids = np.load(DENSE / "reference.npz")["prompt_ids"].astype(np.int64)
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = logits_of(tmp_path / "packed")
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    # A model that was loaded dense after all would be off by as much as codes are.
    assert np.abs(found - logits_of(DENSE)).max() > 2e-2 * np.abs(expected).max()


def test_hqq_reads_a_directory(tmp_path):
    """transformers 5 reads no HQQ directory, not even those of transformers 4."""
    quantizer = functools.partial(hqq.quantize, scale_dtype=jnp.float16)
    checkpoints.quantize(DENSE, tmp_path / "new", format="hqq", quantizer=quantizer)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    weights = checkpoints.load(tmp_path / "new", prepare=False)
    matrices = {n: w for n, w in weights.items() if isinstance(w, qjax.QTensor)}
    assert len(matrices) == 21
    for name, qt in matrices.items():
        layer = HQQLinear(
            None,
            quant_config=None,
            compute_dtype=torch.float16,
            device="cpu",
            initialize=False,
        )
        inner = f"{name}."
        layer.load_state_dict(
            {k.removeprefix(inner): t for k, t in stored.items() if inner in k}
        )
        arrays.same_weight(layer.dequantize(), qt)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptqmodel_dequantizes_gptq(act_order):
    x, w = arrays.random(0, 256, 128), arrays.random(1, 128, 64)
    qt = gptq.quantize(
        w,
        3,
        32,
        gram=gram(x * jnp.exp(x[:1])),
        act_order=act_order,
        scale_dtype=jnp.float16,
    )
    assert (qt.order is not None) == act_order
    tensors = format_.to_tensors(qt, "gptq_v2")
    arrays.same_weight(dequantized(tensors, qt, "gptq_v2"), qt)
