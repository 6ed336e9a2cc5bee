"""torchao rebuilds its tensors from what qjax wrote, and dequantizes them.

The tensor-core tiles of tinygemm have operators on CUDA only; on a CPU, torch packs
another layout, which qjax reads and never writes.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torchao.prototype.mx_formats.mx_tensor import to_dtype
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import qjax
from qjax import checkpoints
from qjax.formats import fp8, mxfp4, tinygemm_cpu, torchao
from tests import goldens
from tests.peers import arrays

STORED = Path(__file__).parents[1] / "data" / "llama1L_torchao_int8"
INTX = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}


def rebuilt(qt: qjax.QTensor, metadata: dict[str, str], **changes) -> torch.Tensor:
    """Their tensor out of ours, and the metadata that torchao wrote for such a one."""
    written = arrays.state(torchao.to_tensors(qt, **changes))
    tensors = {f"layer.{name}": tensor for name, tensor in written.items()}
    found, left = unflatten_tensor_state_dict(tensors, metadata)
    assert not left
    return found["layer.weight"]


def metadata_of(config, k: int, n: int, dtype: torch.dtype) -> dict[str, str]:
    """What torchao writes into the header for a weight of this shape."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(k, n, bias=False)}).to(dtype)
    quantize_(model, config)
    return flatten_tensor_state_dict(model.state_dict())[1]


def test_int8_of_a_directory():
    weights = checkpoints.load(STORED, prepare=False)
    with safe_open(STORED / "model.safetensors", "np") as file:
        header = file.metadata()
    matrices = {k: w for k, w in weights.items() if isinstance(w, qjax.QTensor)}
    assert matrices
    for name, qt in matrices.items():
        metadata = {
            "tensor_names": json.dumps(["layer.weight"]),
            "layer.weight": header[f"{name}.weight"],
        }
        arrays.same_weight(rebuilt(qt, metadata).dequantize(), qt)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_from_elsewhere(dtype):
    w = arrays.random(0, 64, 24, jnp.dtype(dtype))
    qt = qjax.quantize(w, 8, None, symmetric=True)
    config = Int8WeightOnlyConfig(version=2)
    metadata = metadata_of(config, 64, 24, getattr(torch, dtype))
    arrays.same_weight(rebuilt(qt, metadata).dequantize(), qt)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_intx(bits, group_size, symmetric):
    qt = qjax.quantize(
        arrays.random(bits, 64, 24, jnp.bfloat16), bits, group_size, symmetric
    )
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    config = IntxWeightOnlyConfig(weight_dtype=INTX[bits], granularity=granularity)
    metadata = metadata_of(config, 64, 24, torch.bfloat16)
    arrays.same_weight(rebuilt(qt, metadata).dequantize(), qt)


def as_read(qt: qjax.QTensor) -> torch.Tensor:
    """Their tensor, with the header that qjax writes."""
    return rebuilt(qt, torchao.metadata({"layer": qt}, []))


OF_HEADERS = {
    "int8": lambda w: qjax.quantize(w, 8, None, symmetric=True),
    "int8 in groups": lambda w: qjax.quantize(w, 8, 64, symmetric=True),
    "int8 with zeros": lambda w: qjax.quantize(w, 8, 64),
    "int3": lambda w: qjax.quantize(w, 3, 64),
    "float8": lambda w: fp8.quantize(w, group_size=None),
    "float8 in groups": lambda w: fp8.quantize(w, group_size=32, columns=1),
    "float8 in blocks": fp8.quantize,
    "float8 of one scale": lambda w: fp8.quantize(w, group_size=None, columns=128),
    "mxfp4": mxfp4.quantize,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OF_HEADERS)
def test_headers(name, dtype):
    qt = OF_HEADERS[name](arrays.random(3, 256, 128, dtype))
    theirs = as_read(qt)
    assert theirs.shape == (128, 256)
    arrays.same_weight(theirs.dequantize(), qt)


@pytest.mark.parametrize(
    "name", ["mxfp8", "mxfp4", "nvfp4", "float8_block", "int8_awq", "plain_int4_awq"]
)
def test_what_torchao_made_is_written_again(name):
    (file,) = (n for n in goldens.names("torchao") if f"weights__{name}__" in n)
    data = goldens.load(file)
    tensors = {
        k.removeprefix("state_"): v for k, v in data.items() if k[:6] == "state_"
    }
    config = torchao.Config.from_json(
        {"quant_type": {"default": data["meta"].get("quant_type", BLOCKS)}}
    ).of("layer")
    qt = torchao.from_tensors(
        tensors, config.with_header(json.loads(data["meta"]["header"]))
    )
    theirs = as_read(qt)
    if factors := qt.input_scale is not None:
        found = arrays.to_numpy(theirs.act_pre_scale)
        np.testing.assert_array_equal(found, np.asarray(qt.input_scale))
    assert factors == ("awq" in name)
    if "int4" in name:  # which has no dequantize
        for key in ("qdata", "scale", "zero_point"):
            found = arrays.to_numpy(getattr(theirs, key))
            np.testing.assert_array_equal(found, tensors[f"_weight_{key}"])
        return
    arrays.same_weight(theirs.dequantize(), dataclasses.replace(qt, input_scale=None))


BLOCKS = {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {}}


def test_tinygemm_of_this_cpu():
    """The other way round: qjax reads what torch packs on this very machine."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 128)).astype(np.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.from_numpy(codes), 1
    )
    capability = torch.backends.cpu.get_cpu_capability().lower().replace("_", "")
    ours = tinygemm_cpu.unpack_layout(jnp.asarray(packed.numpy()), capability)
    np.testing.assert_array_equal(np.asarray(ours), codes)


def test_mxfp4():
    qt = mxfp4.quantize(arrays.random(1, 128, 24, jnp.bfloat16))
    tensors = arrays.state(mxfp4.to_tensors(qt))
    weight = to_dtype(
        tensors["blocks"].reshape(24, 64),
        tensors["scales"].view(torch.float8_e8m0fnu),
        torch.float4_e2m1fn_x2,
        32,
        torch.bfloat16,
    )
    arrays.same_weight(weight, qt)
