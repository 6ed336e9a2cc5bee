"""bitsandbytes reads the quantization state that qjax wrote, and dequantizes."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules

import qjax
from qjax import checkpoints
from qjax.formats import bnb
from tests.peers import arrays

NESTED = Path(__file__).parents[1] / "data" / "llama_nf4_dq"


def dequantized(tensors: dict) -> torch.Tensor:
    tensors = arrays.state(tensors)
    weight = tensors.pop("weight")
    state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
    return functional.dequantize_4bit(weight, state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantizes(quant_type, blocksize, dtype):
    w = arrays.random(0, 128, 48, dtype)
    qt = bnb.quantize_4bit(w, quant_type, blocksize)
    arrays.same_weight(dequantized(bnb.to_tensors(qt)), qt)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_stored_as_floats(storage):
    qt = bnb.quantize_4bit(arrays.random(1, 64, 32, jnp.bfloat16))
    arrays.same_weight(dequantized(bnb.to_tensors(qt, storage=storage)), qt)


def test_double_quantization():
    weights = checkpoints.load(NESTED, prepare=False)
    matrices = [w for w in weights.values() if isinstance(w, qjax.QTensor)]
    assert matrices
    for qt in matrices:
        assert qt.scale.nested is not None
        arrays.same_weight(dequantized(bnb.to_tensors(qt)), qt)


def test_quantizes_to_the_same_tensors():
    w = arrays.random(2, 96, 40)
    ours = bnb.to_tensors(bnb.quantize_4bit(w, "nf4", 64))
    packed, theirs = functional.quantize_4bit(
        arrays.to_torch(w.T), blocksize=64, quant_type="nf4"
    )
    np.testing.assert_array_equal(np.asarray(ours["weight"]), packed.numpy())
    for name, tensor in theirs.as_dict(packed=True).items():
        found = np.asarray(ours[f"weight.{name}"])
        if "quant_state" in name:
            read = [json.loads(bytes(blob).decode()) for blob in (found, tensor)]
            assert read[0] == read[1]
        else:
            np.testing.assert_array_equal(found, tensor.numpy())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_llm_int8(dtype):
    w = arrays.random(3, 80, 24, dtype)
    qt = bnb.quantize(w, bits=8)
    tensors = arrays.state(bnb.to_tensors(qt))
    layer = modules.Linear8bitLt(80, 24, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": arrays.to_torch(w.T)})
    layer = layer.to("cpu")
    for name, theirs in layer.state_dict().items():
        np.testing.assert_array_equal(tensors[name].numpy(), theirs.numpy())
    layer.load_state_dict(tensors)
    dense = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    arrays.same_weight(dense, qt)
