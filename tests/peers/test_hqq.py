"""hqq loads a layer that qjax wrote, and dequantizes it."""

import jax.numpy as jnp
import pytest
import torch
from hqq.core.quantize import HQQLinear

import qjax
from qjax.formats import hqq
from tests.peers import arrays

DTYPES = {
    jnp.float32: torch.float32,
    jnp.float16: torch.float16,
    jnp.bfloat16: torch.bfloat16,
}


def load(tensors: dict, dtype: torch.dtype) -> HQQLinear:
    layer = HQQLinear(
        None, quant_config=None, compute_dtype=dtype, device="cpu", initialize=False
    )
    layer.load_state_dict(arrays.state(tensors))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantizes(bits, symmetric, dtype):
    qt = qjax.quantize(arrays.random(bits, 128, 32, dtype), bits, 64, symmetric)
    layer = load(hqq.to_tensors(qt), DTYPES[dtype])
    assert (layer.in_features, layer.out_features) == (128, 32)
    arrays.same_weight(layer.dequantize(), qt)


@pytest.mark.parametrize("bits", [1, 5, 6])
def test_dequantizes_the_other_widths(bits):
    qt = qjax.quantize(arrays.random(bits, 128, 32, jnp.float16), max(bits, 2), 64)
    if bits == 1:
        # Rounding to nearest has no rule for one bit: these are its codes' low bits.
        layout = hqq.Slabs(128, 64)
        codes = qjax.codes(qt) & jnp.uint8(1)
        qt = qjax.tensor.build(
            (layout.pack(codes, 1),),
            qt.scale,
            qt.zero.astype(jnp.float16),
            layout=layout,
            segments=(qjax.tensor.Segment(1, 64),),
        )
    arrays.same_weight(load(hqq.to_tensors(qt), torch.float16).dequantize(), qt)


def test_words_viewed_as_floats():
    qt = qjax.quantize(arrays.random(0, 128, 32, jnp.float16), 4, 64)
    config = hqq.Config(nbits=4, group_size=64, view_as_float=True)
    tensors = hqq.to_tensors(qt, config)
    assert tensors["W_q"].dtype == jnp.float16
    arrays.same_weight(load(tensors, torch.float16).dequantize(), qt)
