"""BitNet against what transformers' layers multiply by."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.formats import bitnet, quanto
from tests import goldens
from tests.goldens import load, same_bits
from tests.oracle import relative_error

ONLINE = "bitnet_online__32x96__s1203"
FILES = [name for name in goldens.names("bitnet") if name != ONLINE]
AUTO = "bitnet_autobitlinear__32x96__s1200"
# What a layer that divides may round: the product of two scales, and the quotient.
ROUNDED = {"bfloat16": 2.0**-7, "float32": 2.0**-22}


def stored(name: str) -> tuple[dict, bitnet.Config]:
    data = load(name)
    tensors = {key: data[key] for key in bitnet.TENSORS}
    return tensors, bitnet.Config.from_json(data["config"])


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_multiplies_as_transformers(name, prepare):
    data, (tensors, config) = load(name), stored(name)
    w = bitnet.from_tensors(tensors, config)
    assert w.dtype == data["weight_scale"].dtype
    w = qjax.prepare(w) if prepare else w
    found = np.asarray(qjax.dequantize(w)).astype(np.float32)
    np.testing.assert_array_equal(np.sign(found), data["ternary"].T)
    rtol = ROUNDED[w.dtype.name] if config.divides else 0
    np.testing.assert_allclose(found, data["out_identity"], rtol=rtol)


@pytest.mark.parametrize("name", FILES)
def test_products(name):
    data, w = load(name), qjax.prepare(bitnet.from_tensors(*stored(name)))
    x = np.random.default_rng(0).standard_normal((3, w.k)).astype(np.float32)
    scale = np.asarray(w.scale, np.float64)[0, 0]
    expected = x.astype(np.float64) @ data["ternary"].T * scale
    assert relative_error(qjax.matmul(jnp.asarray(x), w), expected) < 1e-6


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_writes_the_same_bytes(name, prepare):
    tensors, config = stored(name)
    w = bitnet.from_tensors(tensors, config)
    found = bitnet.to_tensors(qjax.prepare(w) if prepare else w)
    same_bits(found["weight"], tensors["weight"])
    if config.divides:
        again = bitnet.from_tensors(found, bitnet.Config(divides=False))
        same_bits(again.scale, w.scale)
    else:
        same_bits(found["weight_scale"], tensors["weight_scale"])


def test_packs_as_quanto_packs_two_bits():
    data = load(AUTO)
    packed = quanto.pack_weights(jnp.asarray(data["ternary"] + 1), 2)
    same_bits(packed, data["weight"])


@pytest.mark.parametrize("name", [ONLINE])
def test_rounds_as_a_layer_in_training(name):
    data = load(name)
    packed = bitnet.quantize(jnp.asarray(data["dense"].T))
    np.testing.assert_array_equal(qjax.codes(packed), data["ternary"].T + 1)
    found = qjax.dequantize(packed)
    np.testing.assert_allclose(found, data["out_identity"], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounds_by_the_mean(dtype):
    w = jax.random.normal(jax.random.key(0), (2, 24, 8), jnp.float32).astype(dtype)
    packed = bitnet.quantize(w)
    wide = np.asarray(w, np.float64)
    scale = np.abs(wide).mean((1, 2), keepdims=True)
    expected = np.clip(np.round(wide / scale), -1, 1)
    found = qjax.dequantize(packed, jnp.float32)
    np.testing.assert_array_equal(np.sign(found), expected)
    np.testing.assert_allclose(found, expected * scale, rtol=1e-6)
    assert packed.dtype == dtype


def test_rounds_zeros_and_what_is_not_finite():
    w = bitnet.quantize(jnp.zeros((8, 4)))
    np.testing.assert_array_equal(qjax.dequantize(w), np.zeros((8, 4)))
    for value in (jnp.nan, jnp.inf):
        w = bitnet.quantize(jnp.ones((8, 4)).at[1, 2].set(value))
        assert np.isnan(w.scale).all()
        assert np.isnan(qjax.dequantize(w)).all()


def test_scale_dtype():
    w = bitnet.quantize(jnp.ones((8, 4)), scale_dtype=jnp.bfloat16)
    assert w.scale.dtype == jnp.bfloat16
    assert bitnet.to_tensors(w)["weight_scale"].shape == (1,)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' must be 'bitnet'"),
        ({"linear_class": "linear"}, "linear_class='linear' must be"),
        (
            {"linear_class": "autobitlinear", "quantization_mode": "online"},
            "quantization_mode='online' stores dense weights",
        ),
        ({"quantization_mode": "off"}, "quantization_mode='off' must be"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'"),
    ],
)
def test_configurations_that_are_none(entry, message, refuses):
    with refuses(message):
        bitnet.Config.from_json(entry)


def test_modules_that_stay_dense():
    config = bitnet.Config.from_json({"modules_to_not_convert": ["lm_head"]})
    assert config.of("lm_head") is None
    assert config.of("model.layers.0.mlp.up_proj") == bitnet.Config()


TENSORS = {
    "weight": np.zeros((8, 96), np.uint8),
    "weight_scale": np.ones(1, ml_dtypes.bfloat16),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": np.zeros((8, 96), np.int8)}, "weight.dtype=int8 must be uint8"),
        ({"weight": np.zeros((0, 96), np.uint8)}, "weight.shape=(0, 96) must be"),
        ({"weight": np.full((8, 96), 0x30, np.uint8)}, "the code 3, which is none"),
        ({"weight_scale": np.ones(2, np.float32)}, "weight_scale.shape=(2,) must be"),
        ({"weight_scale": np.zeros(1, np.float32)}, "weight_scale=0.0 is too small"),
        ({"weight_scale": np.full(1, 1e-39, np.float32)}, "is too small to divide"),
        ({"weight_scale": np.full(1, np.inf, np.float32)}, "weight_scale must be fini"),
        ({"scale": np.ones(1, np.float32)}, "scale is no tensor of BitNet"),
    ],
)
def test_tensors_that_are_wrong(changes, message, refuses):
    with refuses(message):
        bitnet.from_tensors(TENSORS | changes)


def test_a_scale_of_zero_may_multiply():
    tensors = TENSORS | {"weight_scale": np.zeros((), np.float32)}
    w = bitnet.from_tensors(tensors, bitnet.Config(divides=False))
    assert not np.asarray(qjax.dequantize(w)).any()


def test_what_it_cannot_hold(refuses):
    w = bitnet.quantize(jnp.eye(8))
    others = {
        "4 bits": (
            qjax.quantize(jnp.eye(8), bits=4, group_size=None),
            "4 bits are not",
        ),
        "middle": (
            qjax.quantize(jnp.eye(16), bits=2, group_size=None, symmetric=True),
            "not (q - 1)",
        ),
        "columns": (dataclasses.replace(w, scale=jnp.arange(8.0)[None]), "than one sc"),
        "zeros": (
            dataclasses.replace(w, zero=jnp.full((1, 1), 2, jnp.uint8)),
            "it has other zeros than 1",
        ),
        "codes": (
            dataclasses.replace(w, words=(jnp.full((2, 8), 255, jnp.uint8),)),
            "it has codes of 3",
        ),
        "odd": (
            qjax.quantize(jnp.ones((16, 6)), bits=2, group_size=None, symmetric=False),
            "n=6 is not a multiple of 4",
        ),
    }
    for qt, message in others.values():
        with refuses(message):
            bitnet.to_tensors(qt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": jnp.ones((8, 6))}, "n a multiple of 4; got float32(8, 6)"),
        ({"w": jnp.ones((8, 4), jnp.int32)}, "w must be bfloat16, float16 or float32"),
        ({"bits": 4}, "bits=4, group_size=None and symmetric=True must be 2, None"),
        ({"group_size": 128}, "group_size=128"),
        ({"symmetric": False}, "symmetric=False"),
        ({"scale_dtype": jnp.int8}, "scale_dtype"),
    ],
)
def test_arguments_that_are_wrong(arguments, message, refuses):
    with refuses(message):
        bitnet.quantize(**({"w": jnp.ones((8, 4))} | arguments))
