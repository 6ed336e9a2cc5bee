"""optimum-quanto unpacks and dequantizes what qjax packed."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from optimum.quanto import qint2, qint4
from optimum.quanto.tensor.weights.awq import packed as awq_packed
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor

import qjax
from qjax.formats import awq, awq_v2, quanto
from qjax.tensor import Affine
from tests.peers import arrays

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
    assert not tensors
    arrays.same_weight(theirs.dequantize(), qt)


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
