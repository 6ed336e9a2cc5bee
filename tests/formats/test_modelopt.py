"""ModelOpt's matrices against what ModelOpt makes of them."""

import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import compressed_tensors, fp8, modelopt
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("modelopt")
E4M3 = ml_dtypes.float8_e4m3fn
NVFP4 = "modelopt_nvfp4__32x96__s1104"
FP8 = "modelopt_fp8__32x96__s1100"
BLOCKS = "modelopt_fp8_pb_wo__128x384__s1102"
MXFP8 = "modelopt_mxfp8__32x96__s1103"


def tensors_of(name: str) -> dict:
    held = load(name).items()
    return {k.removeprefix("state_"): v for k, v in held if k.startswith("state_")}


def config_of(name: str) -> modelopt.Config:
    config = modelopt.Config.from_json(load(name)["config"]).of("up_proj")
    assert config is not None
    return config


def read(name: str, **changes) -> qjax.QTensor:
    return modelopt.from_tensors(tensors_of(name) | changes, config_of(name))


def arrays(w: qjax.QTensor) -> dict:
    return {name: np.asarray(array) for name, array in modelopt.to_tensors(w).items()}


@pytest.mark.parametrize("layout", [None, Stream(), Tiles()], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_dequantizes_as_modelopt(name, layout):
    expected, w = load(name)["out_dequant"], read(name)
    if layout is not None:
        w = qjax.prepare(w, layout=layout)
        # For a GPU, the number of the matrix stays apart.
        is_apart = isinstance(w.scale, tensor.WithGlobal)
        assert is_apart == ("nvfp4" in name and layout == Tiles())
    found = np.asarray(qjax.dequantize(w))
    assert found.dtype == expected.dtype == jnp.bfloat16
    if tensors_of(name)["weight"].dtype == np.uint8:
        # ModelOpt's table has 0 where the code is that of -0.
        assert np.signbit(found[found == 0]).any()
        found = np.where(found == 0, np.zeros_like(found), found)
    same_bits(found, expected.T)


@pytest.mark.parametrize("name", FILES)
def test_writes_the_same_bytes(name):
    held = tensors_of(name)
    held.pop("input_scale", None)
    same_bits(arrays(read(name)), held)


@pytest.mark.parametrize("name", FILES)
def test_both_files_say_the_same(name):
    said = load(name)["meta"]
    older = modelopt.Config.from_json(said["hf_quant_config"])
    newer = modelopt.Config.from_json(said["config"])
    assert older == newer
    assert newer.algorithm == said["config"]["quant_algo"].upper()
    assert newer.of("lm_head") is None


def test_codes_follow_each_other():
    # Byte i has the codes of inputs 2i, in its low bits, and 2i + 1.
    weight = (np.arange(24) % 16 + 16 * ((np.arange(24) + 1) % 16)).astype(np.uint8)
    held = {
        "weight": weight[None],
        "weight_scale": np.float32([[1, 0.5, -2]]).astype(E4M3),
        "weight_scale_2": np.float32([3]),
    }
    w = modelopt.from_tensors(held, modelopt.Config(algorithm="NVFP4"))
    codes = np.stack([weight & 15, weight >> 4], 1).reshape(-1)
    np.testing.assert_array_equal(w.numpy()[:, 0], codes)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.concatenate([magnitudes, -magnitudes])[codes]
    expected = numbers * np.repeat([3, 1.5, -6], 16)
    np.testing.assert_array_equal(qjax.dequantize(w, jnp.float32)[:, 0], expected)


def test_a_block_alone_has_a_scale_without_axes():
    # So does ModelOpt export whatever is no larger than a block.
    held = {"weight": np.ones((64, 128), E4M3), "weight_scale": np.float32(0.5)}
    w = modelopt.from_tensors(held, modelopt.Config(algorithm="FP8_PB_WO"))
    assert (np.asarray(qjax.dequantize(w)) == 0.5).all()
    same_bits(arrays(w), held)


@pytest.mark.parametrize("layout", [Tiles(), qjax.formats.gptq.Stream()])
def test_products_are_those_of_the_weight(layout):
    w = qjax.prepare(read(NVFP4), layout=layout)
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    dense = load(NVFP4)["out_dequant"].T.astype(np.float64)
    # The weight is not rounded to bfloat16 in a product.
    found = qjax.matmul(jnp.asarray(x), w)
    assert oracle.relative_error(found, x @ dense) < 2**-8
    exact = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
    assert oracle.relative_error(found, x @ exact) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (NVFP4, {"weight": np.ones((32, 48), np.int8)}, "weight.dtype=int8 must be ui"),
        (NVFP4, {"weight": np.ones((32, 44), np.uint8)}, "and groups of 16 inputs"),
        (NVFP4, {"weight": np.ones((0, 48), np.uint8)}, "weight.shape=(0, 48) must ha"),
        (NVFP4, {"weight_scale": np.ones((32, 5), E4M3)}, "must be (32, 6), from weig"),
        (NVFP4, {"weight_scale": np.full((32, 6), np.nan, E4M3)}, "must be finite"),
        (NVFP4, {"weight_scale_2": np.float32(np.inf)}, "weight_scale_2=inf must be"),
        (NVFP4, {"weight_scale_2": np.float32(3e38)}, "and so must scales up to 448"),
        (NVFP4, {"weight_scale_2": np.ones(2, np.float32)}, "(2,) must be () or (1,)"),
        (NVFP4, {"input_scale": np.ones(2, np.float32)}, "input_scale.shape=(2,) must"),
        (NVFP4, {"pre_quant_scale": np.ones(96, np.float16)}, "is no tensor of NVFP4"),
        (MXFP8, {"weight_scale": np.full((32, 3), 255, np.uint8)}, "holds 255"),
        (MXFP8, {"weight_scale": np.ones((32, 3), np.float32)}, "must be uint8 in MX"),
        (MXFP8, {"weight": np.full((32, 96), np.nan, E4M3)}, "weight must be finite"),
        (FP8, {"weight_scale": np.ones((2, 3), np.float32)}, "must be () or (1,) or"),
        (FP8, {"weight_scale": np.float16(1)}, "float16 must be float32 in FP8"),
        (FP8, {"weight_scale_2": np.float32(1)}, "weight_scale_2 is no tensor of FP8"),
        (BLOCKS, {"weight_scale": np.ones((1, 1, 2, 1), np.float32)}, "must be (1, 3)"),
        (BLOCKS, {"weight_scale": np.ones((1, 3, 1, 1), np.float32)}, "must be (1, 3)"),
    ],
)
def test_refuses_tensors(name, changes, message, refuses):
    with refuses(message):
        read(name, **changes)


def test_a_missing_scale_is_named(refuses):
    held = {"weight": tensors_of(FP8)["weight"]}
    with refuses("weight_scale is missing; found ['weight']"):
        modelopt.from_tensors(held, config_of(FP8))


@pytest.mark.parametrize("name", [NVFP4, BLOCKS, MXFP8])
def test_refuses_to_write_what_is_prepared(name, refuses):
    with refuses("do not have the scales of its files"):
        modelopt.to_tensors(qjax.prepare(read(name)))


def test_refuses_to_write(refuses):
    with refuses("ModelOpt cannot hold"):
        modelopt.to_tensors(qjax.quantize(jnp.eye(64), 4, 16))
    with refuses("do not have the scales of its files"):
        modelopt.to_tensors(fp8.quantize(jnp.eye(64), group_size=32))
    # There the number for all divides: the scales would be others.
    with refuses("with float32 scales are neither NVFP4 nor MXFP4 as its own files"):
        compressed_tensors.to_tensors(read(NVFP4))


class TestConfig:
    def test_wildcards(self):
        entry = {"quant_method": "modelopt_fp4", "quant_algo": "nvfp4"}
        entry |= {"ignore": ["lm_head", "model.layers.1.self_attn*", "*.router"]}
        config = modelopt.Config.from_json(entry)
        assert config.of("model.layers.0.mlp.up_proj") == modelopt.Config()
        assert config.of("model.layers.1.self_attn.q_proj") is None
        assert config.of("model.layers.11.self_attn.q_proj") is not None
        assert config.of("model.layers.0.router") is None
        assert config.of("model.lm_head") is not None

    def test_algorithms_of_modules(self):
        layers = {
            "model.layers.0.q_proj": {"quant_algo": "FP8"},
            "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        }
        entry = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        config = modelopt.Config.from_json({"quantization": entry})
        assert config.of("model.layers.0.q_proj") == modelopt.Config(algorithm="FP8")
        expert = config.of("model.layers.0.mlp.experts.3.up_proj")
        assert expert == modelopt.Config(algorithm="NVFP4")
        assert config.of("model.layers.0.k_proj") is None

    def test_wildcards_take_no_time(self):
        config = modelopt.Config(ignored=("*a" * 500 + "b", "[" * 1000))
        start = time.monotonic()
        assert config.of("a" * 2000) is not None
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"quant_method": "fp8"}, "quant_method='fp8' must be one of ('modelopt',"),
            ({}, "quant_algo=None must be one of ('FP8', 'FP8_PER_CHANNEL_PER_TOKEN',"),
            ({"quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' must be one of ('FP8'"),
            ({"quant_algo": ["FP8"]}, "quant_algo=['FP8'] must be one of ('FP8', "),
            ({"quantization": None}, "quantization=None must be an object"),
            (
                {"quantization": {"quant_algo": "NVFP4_AWQ"}},
                "quant_algo='NVFP4_AWQ' m",
            ),
            ({"nvfp4_embed": True}, "nvfp4_embed=True quantizes embeddings"),
            ({"quant_algo": "FP8", "ignore": "x"}, "ignore='x' must be a list of stri"),
            (
                {"quantization": {"quant_algo": "FP8", "exclude_modules": [1]}},
                "exclude_modules=[1] must be a list of strings",
            ),
            (
                {"quant_algo": "MIXED_PRECISION"},
                "quantized_layers=None must be an object",
            ),
            (
                {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "FP8"}},
                "quantized_layers['a']='FP8' must be an object",
            ),
            (
                {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ"}},
                },
                "quantized_layers['a'].quant_algo='W4A16_AWQ' must be one of",
            ),
        ],
    )
    def test_refuses(self, entry, message, refuses):
        with refuses(message):
            modelopt.Config.from_json(entry)
