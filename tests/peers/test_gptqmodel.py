"""GPTQModel dequantizes what qjax wrote for GPTQ, and AutoAWQ's layout."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

import qjax
from qjax import checkpoints
from qjax.formats import awq, gptq
from tests.peers import arrays

ROOT = Path(__file__).parents[2]
SOURCES = {
    "act-order": ROOT / "examples/llm/checkpoint",
    "three bits": ROOT / "tests/data/llama_gptq3_g64",
    "from AWQ": ROOT / "tests/data/llama_awq4_g128",
}


def dequantized(tensors: dict, qt: qjax.QTensor, checkpoint_format: str):
    """Their weight ``[n, k]``."""
    (segment,) = qt.segments
    layer = TorchLinear(
        bits=segment.bits,
        group_size=segment.group_size or -1,
        sym=False,
        desc_act=qt.row_group is not None or qt.order is not None,
        in_features=qt.k,
        out_features=qt.n,
        format=FORMAT(checkpoint_format),
    )
    layer.load_state_dict(arrays.state(tensors))
    if checkpoint_format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, segment.bits, torch.int32)
    layer.optimized = True  # or it would be compiled
    layer.post_init()
    layer.eval()
    return layer.dequantize_weight().T


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("checkpoint_format", "bits"),
    [
        *(("gptq", bits) for bits in (2, 3, 4, 8)),
        *(("gptq_v2", bits) for bits in (2, 3, 4, 8)),
        *(("gptq_p", bits) for bits in range(2, 9)),
    ],
)
def test_dequantizes(checkpoint_format, bits, symmetric, group_size):
    w = arrays.random(bits, 128, 64)
    qt = qjax.quantize(w, bits, group_size, symmetric, scale_dtype=jnp.float16)
    tensors = gptq.to_tensors(qt, checkpoint_format)
    arrays.same_weight(dequantized(tensors, qt, checkpoint_format), qt)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("source", SOURCES)
def test_dequantizes_a_directory(source, checkpoint_format, tmp_path):
    checkpoints.convert(SOURCES[source], tmp_path / "new", format=checkpoint_format)
    weights = checkpoints.load(tmp_path / "new", prepare=False)
    matrices = [w for w in weights.values() if isinstance(w, qjax.QTensor)]
    assert matrices
    for qt in matrices:
        tensors = gptq.to_tensors(qt, checkpoint_format)
        arrays.same_weight(dequantized(tensors, qt, checkpoint_format), qt)


def test_awq():
    qt = qjax.quantize(arrays.random(0, 128, 64, jnp.float16), 4, 64)
    layer = AwqTorchLinear(
        bits=4,
        group_size=64,
        sym=False,
        desc_act=False,
        in_features=128,
        out_features=64,
        register_buffers=True,
    )
    layer.load_state_dict(arrays.state(awq.to_tensors(qt)))
    layer.post_init()
    eye = torch.eye(128, dtype=torch.float16)
    with torch.no_grad():
        weight = layer(eye)
    np.testing.assert_array_equal(weight.numpy(), np.asarray(qjax.dequantize(qt)))
