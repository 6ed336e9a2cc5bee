"""optimum-quanto unpacks and dequantizes what qjax packed."""

import dataclasses
import inspect
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from optimum.quanto import (
    QuantizedModelForCausalLM,
    qint2,
    qint4,
    quantization_map,
)
from optimum.quanto.tensor.weights.awq import packed as awq_packed
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from transformers import AutoModelForCausalLM

import qjax
from qjax import checkpoints
from qjax.formats import awq, awq_v2, fp8, quanto
from qjax.formats.quanto_config import WIDTHS
from qjax.tensor import Affine
from tests.peers import arrays

DENSE = Path(__file__).parents[1] / "data" / "llama_bf16"
RNG = np.random.default_rng(0)


def offset(qt: qjax.QTensor) -> qjax.QTensor:
    """The same codes with a float that is added, as quanto and AWQ v2 have it."""
    zero = -(qt.zero.astype(qt.scale.dtype) * qt.scale)
    return dataclasses.replace(qt, zero=zero, affine=Affine.OFFSET, rounding=2)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [8, 13])
def test_unpacks_bytes(rows, bits):
    codes = RNG.integers(0, 2**bits, (rows, 32)).astype(np.uint8)
    packed = arrays.to_torch(quanto.pack_weights(jnp.asarray(codes), bits))
    unpacked = torch.ops.quanto.unpack(packed, bits)
    np.testing.assert_array_equal(unpacked[:rows].numpy(), codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("float_shift", [False, True])
@pytest.mark.parametrize("qtype", [qint2, qint4], ids=str)
def test_loads_a_weight(qtype, float_shift, dtype):
    qt = qjax.quantize(arrays.random(1, 128, 24, dtype), qtype.bits, 32)
    qt = offset(qt) if float_shift else qt
    tensors = arrays.state(quanto.to_tensors(qt))
    missing: list[str] = []
    theirs = WeightQBitsTensor.load_from_state_dict(
        tensors,
        "weight.",
        qtype=qtype,
        axis=0,
        group_size=32,
        size=torch.Size([24, 128]),
        stride=(128, 1),
        missing_keys=missing,
    )
    assert not missing
    assert tensors.keys() == {"input_scale", "output_scale"}
    arrays.same_weight(theirs.dequantize(), qt)


@pytest.mark.parametrize("kind", ["qint2", "qint4", "qint8", "qfloat8_e4m3fn"])
def test_loads_a_directory(tmp_path, kind):
    bits = WIDTHS[kind]
    options = {"group_size": 128 if bits < 8 else None, "symmetric": bits != 2}
    if kind == "qfloat8_e4m3fn":
        options |= {"quantizer": fp8.quantize, "scale_dtype": jnp.bfloat16}
    spec = qjax.Spec(bits=bits, **options)
    checkpoints.quantize(DENSE, tmp_path / "x", format="quanto", rules=spec)
    weights = checkpoints.load(tmp_path / "x", prepare=False)
    model = QuantizedModelForCausalLM.from_pretrained(tmp_path / "x")
    found = quantization_map(model._wrapped)
    matrices = {n: w for n, w in weights.items() if isinstance(w, qjax.QTensor)}
    assert found.keys() == matrices.keys()
    for name, qt in matrices.items():
        assert found[name] == {"weights": kind, "activations": "none"}
        weight = model._wrapped.get_submodule(name).weight
        if hasattr(weight, "_scale_shift"):
            # Of tinygemm, as it would be saved.
            weight = weight.weight_qbits_tensor()
        arrays.same_weight(weight.dequantize(), qt)


def test_reads_what_it_saves(tmp_path):
    """Sizes of a model are all that says how many inputs there are."""
    dense = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float16)
    model = QuantizedModelForCausalLM.quantize(dense, weights=qint4, exclude="lm_head")
    model.save_pretrained(tmp_path)
    assert checkpoints.verify(tmp_path) == []
    weights = checkpoints.load(tmp_path, prepare=False)
    for name in quantization_map(model._wrapped):
        weight = model._wrapped.get_submodule(name).weight
        arrays.same_weight(weight.dequantize(), weights[name])


@pytest.mark.parametrize("reorder", [False, True])
def test_unpacks_awq(reorder):
    codes = RNG.integers(0, 16, (16, 64)).astype(np.uint8)
    packed = arrays.to_torch(awq.pack(jnp.asarray(codes), reorder))
    unpacked = awq_packed.unpack(packed, reorder)
    np.testing.assert_array_equal(unpacked.numpy(), codes)


def test_unpacks_awq_gemm_tensors():
    qt = qjax.quantize(arrays.random(2, 128, 64, jnp.float16), 4, 64)
    tensors = arrays.state(awq.to_tensors(qt))
    codes = awq_packed.unpack(tensors["qweight"], reorder=True)
    np.testing.assert_array_equal(codes.numpy(), np.asarray(qjax.codes(qt)))
    zeros = awq_packed.unpack(tensors["qzeros"], reorder=True)
    np.testing.assert_array_equal(zeros.numpy(), np.asarray(qt.zero))


def test_unpacks_awq_of_the_second_generation():
    qt = offset(qjax.quantize(arrays.random(3, 256, 32, jnp.float16), 4, 128))
    data = arrays.to_torch(awq_v2.to_qbits(qt)["_data"])
    # The function computes on a CPU, but asserts that its argument is elsewhere.
    source = inspect.getsource(awq_packed.unpack_v2)
    names = dict(vars(awq_packed))
    exec(compile(source, "unpack_v2", "exec", optimize=1), names)
    codes = names["unpack_v2"](data)
    np.testing.assert_array_equal(codes.numpy().T, np.asarray(qjax.codes(qt)))
