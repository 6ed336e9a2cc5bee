"""PyTorch's packages run and read what qjax quantized."""

import subprocess
import sys
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
from qjax.formats import bitnet, bnb, fp8, mlx
from qjax.formats import gptq as format_
from qjax.quantizers import gptq, gram, hqq
from tests.peers import arrays
from tests.peers.test_gptqmodel import dequantized

DENSE = Path(__file__).parents[1] / "data" / "llama_bf16"
EXAMPLE = Path(__file__).parents[2] / "examples" / "llm" / "quantize.py"


def logits_of(
    directory: Path, dtype: torch.dtype = torch.float32, *, train: bool = False
) -> np.ndarray:
    ids = np.load(DENSE / "reference.npz")["prompt_ids"].astype(np.int64)
    entry = checkpoints.read_config(directory).get("quantization_config") or {}
    method = entry.get("quant_method")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        # Those of "metal" would be sent to an Apple GPU.
        directory,
        dtype=dtype,
        device_map="cpu" if method == "metal" else None,
    )
    if method in ("fp8", "metal", "bitsandbytes"):
        # On a CPU the first two are dequantized, each weight to the dtype of its scale;
        # beside bitsandbytes' matrices all is as the file has it, and a method would
        # refuse.
        model = torch.nn.Module.float(model)
    model.train(train)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def expected_of(directory: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits of the dense model with the weights that qjax reads."""
    weights = checkpoints.load(directory, prepare=False)
    dense = {
        f"{name}.weight" if isinstance(w, qjax.QTensor) else name: w
        for name, w in weights.items()
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(DENSE, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            w = dense[name]
            if isinstance(w, qjax.QTensor):
                w = qjax.dequantize(w).astype(jnp.float32).T
            parameter.copy_(arrays.to_torch(w).float())
        ids = np.load(DENSE / "reference.npz")["prompt_ids"].astype(np.int64)
        return model(torch.from_numpy(ids)).logits.float().numpy()


def awq_by_the_example(target: Path) -> None:
    """A directory with AWQ's factors in its norms."""
    np.save(target.with_suffix(".npy"), np.load(DENSE / "reference.npz")["eval_ids"])
    command = [sys.executable, EXAMPLE, DENSE, target, "--method", "awq"]
    command += ["--text", target.with_suffix(".npy"), "--context", "64"]
    subprocess.run(list(map(str, command)), check=True)


def compressed(target: Path) -> None:
    spec = qjax.Spec(symmetric=True)
    checkpoints.quantize(DENSE, target, format="compressed-tensors", rules=spec)


def floats(target: Path) -> None:
    spec = qjax.Spec(bits=8, symmetric=True, quantizer=fp8.quantize)
    checkpoints.quantize(DENSE, target, format="fp8", rules=spec)


def compressed_floats(target: Path) -> None:
    spec = qjax.Spec(bits=8, group_size=None, symmetric=True, quantizer=fp8.quantize)
    checkpoints.quantize(DENSE, target, format="compressed-tensors", rules=spec)


def metal(target: Path) -> None:
    spec = qjax.Spec(group_size=64, quantizer=mlx.quantize)
    checkpoints.quantize(DENSE, target, format="metal", rules=spec)


WRITERS = [compressed, awq_by_the_example, floats, compressed_floats, metal]


@pytest.mark.parametrize("write", WRITERS)
def test_transformers_runs_a_directory(tmp_path, write):
    write(tmp_path / "packed")
    expected = expected_of(tmp_path / "packed")
    found = logits_of(tmp_path / "packed")
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()
    # A model that was loaded dense after all would be off by as much as codes are.
    off = 1e-2 if "floats" in write.__name__ else 2e-2
    assert np.abs(found - logits_of(DENSE)).max() > off * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_runs_bitsandbytes(tmp_path, bits):
    spec = qjax.Spec(bits=bits, group_size=64, symmetric=True, quantizer=bnb.quantize)
    target = tmp_path / "packed"
    checkpoints.quantize(DENSE, target, format="bitsandbytes", rules=spec)
    expected = expected_of(target)
    # LLM.int8() leaves activations alone in training, and there is no dropout; those
    # of NF4 are in bfloat16.
    found, close = logits_of(target, train=True), 5e-3 if bits == 4 else 1e-4
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()
    off = 2e-2 if bits == 4 else 2e-3
    assert np.abs(found - logits_of(DENSE)).max() > off * np.abs(expected).max()
    # Activations of eight bits cost more than weights do.
    rounded = np.abs(logits_of(target) - expected).max()
    assert rounded <= (2e-2 if bits == 8 else close) * np.abs(expected).max()


INTEGERS = [
    (".*down_proj", qjax.Spec(bits=8, group_size=64, symmetric=True)),
    (".*q_proj", qjax.Spec(bits=3, group_size=64)),
    (".*", qjax.Spec(bits=4, group_size=32, symmetric=True)),
]
FLOATS = [
    (".*down_proj", qjax.Spec(bits=8, symmetric=True, quantizer=fp8.quantize)),
    (
        ".*",
        qjax.Spec(bits=8, group_size=None, symmetric=True, quantizer=fp8.quantize),
    ),
]


@pytest.mark.parametrize("rules", [INTEGERS, FLOATS], ids=["integers", "floats"])
def test_transformers_runs_what_torchao_holds(tmp_path, rules):
    """In bfloat16, as the header says that the weights were."""
    checkpoints.quantize(
        DENSE, tmp_path / "x", format="torchao", rules=rules, shard_bytes=1_000_000
    )
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    found = logits_of(tmp_path / "x", torch.bfloat16)
    # It multiplies by the weights that qjax reads, and those of others were off.
    np.testing.assert_array_equal(found, expected_of(tmp_path / "x", torch.bfloat16))
    assert (found != logits_of(DENSE, torch.bfloat16)).any()


def test_transformers_runs_ternary_weights(tmp_path, monkeypatch):
    # One function would be compiled, by a compiler that need not be there.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    spec = qjax.Spec(bits=2, group_size=None, symmetric=True, quantizer=bitnet.quantize)
    checkpoints.quantize(DENSE, tmp_path / "packed", format="bitnet", rules=spec)
    expected = expected_of(tmp_path / "packed")
    # Its layers are of the dtype of the scales, with activations of eight bits.
    found = logits_of(tmp_path / "packed", torch.bfloat16)
    assert np.abs(found - expected).max() <= 3e-2 * np.abs(expected).max()
    assert np.abs(found - logits_of(DENSE)).max() > 0.2 * np.abs(expected).max()


def test_hqq_reads_a_directory(tmp_path):
    """transformers 5 reads no HQQ directory, not even those of transformers 4."""
    spec = qjax.Spec(group_size=64, scale_dtype=jnp.float16, quantizer=hqq.quantize)
    checkpoints.quantize(DENSE, tmp_path / "new", format="hqq", rules=spec)
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
