"""Checkpoints of AutoRound against what AutoRound makes of them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

import qjax
from qjax import checkpoints
from qjax.formats import auto_round, gptq
from tests import goldens
from tests.goldens import load, same_bits

FILES = goldens.names("auto_round")
LAYER = "model.layers.0."
# What a module of each file has: the format, and the widths of three matrices.
FOUND = {
    "gptq_4": ("gptq", {4}),
    "gptq_2": ("gptq", {2}),
    "gptq_3": ("gptq", {3}),
    "six": ("gptq", {6}),
    "gptq_mixed": ("gptq", {8, 2}),
    "gptqmodel": ("gptq", {4}),
    "awq": ("awq", {4}),
    "mxfp4": ("compressed-tensors", {4}),
    "mxfp8": ("compressed-tensors", {8}),
    "nvfp4": ("compressed-tensors", {4}),
    "fp8_block": ("fp8", {8}),
    "fp8_static": ("fp8", {8}),
}


def kind_of(name: str) -> str:
    return name.split("__")[1]


def directory(name: str, path, **changes):
    """Writes the tensors and the configuration of a file as a checkpoint."""
    data = load(name)
    tensors = {
        key.removeprefix("state_"): np.asarray(value)
        for key, value in data.items()
        if key.startswith("state_")
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    entry = {k: v for k, v in (data["config"] | changes).items() if v is not None}
    config = {"model_type": "llama", "quantization_config": entry}
    (path / "config.json").write_text(json.dumps(config))
    return path


def wanted(name: str, module: str) -> np.ndarray:
    """AutoRound's weight; it cannot run FP8 of blocks, which is a product."""
    data, full = load(name), f"state_{LAYER}{module}"
    if kind_of(name) != "fp8_block":
        return data[f"out_{module}"]
    codes = np.asarray(data[f"{full}.weight"]).astype(np.float32)
    scale = data[f"{full}.weight_scale_inv"].astype(np.float32)
    scale = scale.repeat(128, 0)[: len(codes)].repeat(128, 1)[:, : codes.shape[1]]
    return (codes * scale).T


def test_every_file_is_told_apart():
    assert {kind_of(name) for name in FILES} == FOUND.keys()


@pytest.mark.parametrize("name", FILES)
def test_reads_what_auto_round_wrote(name, tmp_path):
    path = directory(name, tmp_path / "m")
    weights = checkpoints.load(path, prepare=False)
    packed = {k: w for k, w in weights.items() if isinstance(w, qjax.QTensor)}
    config = auto_round.Config.from_json(load(name)["config"])
    assert (config.format, {w.bits for w in packed.values()}) == FOUND[kind_of(name)]
    assert checkpoints.verify(path) == []
    for key in weights:
        module = key.removeprefix(LAYER).removesuffix(".weight")
        if key not in packed:
            assert kind_of(name) == "gptq_mixed"
            continue
        w, dtype = packed[key], np.float32
        if config.format in ("gptq", "awq"):
            dtype = np.float16  # of its products with scales
        if kind_of(name) == "fp8_static":
            # It rounds the file's float32 scales, and what comes of them.
            dtype = jnp.bfloat16
            w = dataclasses.replace(w, scale=w.scale.astype(dtype))
        found = np.asarray(qjax.dequantize(w, dtype)).astype(np.float32)
        expected = wanted(name, module).astype(np.float32)
        if kind_of(name) == "nvfp4":
            # It multiplies by the one number of a matrix first, and rounds there.
            np.testing.assert_allclose(found, expected, rtol=2e-7)
        else:
            same_bits(found + 0, expected + 0)  # no -0 out of its products with rows


def test_becomes_gptq(tmp_path):
    """Of other widths per layer, with a dense one between; nothing is requantized."""
    (name,) = (name for name in FILES if kind_of(name) == "gptq_mixed")
    path = directory(name, tmp_path / "m")
    checkpoints.convert(path, tmp_path / "v2", format="gptq_v2")
    before = checkpoints.load(path, prepare=False)
    after = checkpoints.load(tmp_path / "v2", prepare=False)
    assert before.keys() == after.keys()
    for key, w in before.items():
        if isinstance(w, qjax.QTensor):
            same_bits(qjax.dequantize(w), qjax.dequantize(after[key]))
            assert gptq.to_tensors(w, "gptq_v2").keys() >= {"qweight", "g_idx"}


ENTRY = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    ("changes", "checkpoint_format"),
    [
        ({}, "gptq"),
        ({"packing_format": "auto_round"}, "gptq_v2"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
        ({"packing_format": "auto_round:gptq", "backend": "auto"}, "gptq"),
        # Before release 0.5:
        ({"backend": "auto_round:exllamav2"}, "gptq_v2"),
        ({"backend": "auto_round:gptq:exllamav2"}, "gptq"),
        ({"backend": "auto_gptq:exllamav2"}, "gptq"),
        ({"backend": "gptqmodel:exllamav2"}, "gptq"),
    ],
)
@pytest.mark.parametrize("method", auto_round.METHODS)
def test_packings_of_integers(method, changes, checkpoint_format):
    config = auto_round.Config.from_json(ENTRY | changes | {"quant_method": method})
    assert config.format == "gptq"
    assert config.of("mlp.up_proj") == gptq.Config(
        bits=4, group_size=32, checkpoint_format=checkpoint_format
    )


def test_which_entry_counts():
    extra = {
        "model.layers.1.mlp.up_proj": {"bits": 8},
        "lm_head": {"bits": 3},
        r".*\.1\..*": {"bits": 16},
        "up_proj.*": {"group_size": -1},
        "mlp$": {},
    }
    config = auto_round.Config.from_json(ENTRY | {"extra_config": extra})
    layer = "model.layers.{}.mlp.{}".format
    assert config.of(layer(1, "up_proj")).bits == 8
    assert config.of(layer(1, "down_proj")) is None
    assert config.of(layer(2, "up_proj")).group_size is None
    assert config.of(layer(2, "down_proj")).group_size == 32
    assert (config.of("lm_head").bits, config.of("text.lm_head").bits) == (3, 3)
    assert config.of("my_lm_head").bits == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' must be one of ('auto-round'"),
        ({"bits": "4"}, "bits='4' must be 2 to 8, or 16 and more for dense"),
        ({"bits": True}, "bits=True must be 2 to 8"),
        ({"bits": 12}, "bits=12 must be 2 to 8"),
        ({"group_size": 0}, "group_size=0 must be positive or -1"),
        ({"group_size": [128, 128]}, "group_size=[128, 128] must be positive or -1"),
        ({"packing_format": 1}, "packing_format=1 must be a string"),
        ({"packing_format": "mlx"}, "packing_format='mlx' is not read; known: 'auto"),
        ({"packing_format": "auto_round:new"}, "'auto_round:new' is not read"),
        ({"data_type": "mx_fp"}, "data_type='mx_fp' must be 'int' in this packing"),
        ({"act_bits": 8}, "act_bits=8 must be 16: with less, scales of weights are"),
        (
            {"packing_format": "auto_round:auto_awq", "bits": 8},
            "bits=8 must be 4, the only width of AWQ files",
        ),
        (
            {"packing_format": "auto_round:llm_compressor", "data_type": "mx_int"},
            "data_type='mx_int' of 4 bits is not read; known: 'mx_fp' of 4 and 8",
        ),
        (
            {"packing_format": "auto_round:llm_compressor", "data_type": "nv_fp"},
            "group_size=32 must be one of (16,)",
        ),
        ({"packing_format": "auto_round:fp8"}, "bits=4 must be 8 in this packing"),
        (
            {"packing_format": "auto_round:fp8", "bits": 8},
            "group_size=32 must be -1, 0 or the two sides of a block",
        ),
        (
            {"packing_format": "auto_round:fp8", "bits": 8, "fmt": "e5m2"},
            "fmt='e5m2' must be one of ('e4m3',)",
        ),
        ({"rotation_config": {"a": 1}}, "changes what the weights are multiplied by"),
        ({"extra_config": []}, None),
        ({"extra_config": ["a"]}, "extra_config=['a'] must map modules to objects"),
        ({"extra_config": {"a": 8}}, "extra_config['a']=8 must be an object"),
        ({"extra_config": {"a": {"bits": 1}}}, "extra_config['a']: bits=1 must be 2"),
        ({"extra_config": {"(": {}}}, "extra_config['(']: '.*(?:()' is no pattern"),
        ({"extra_config": {"(a+)+": {}}}, "extra_config['(a+)+']: '.*(?:(a+)+)' rep"),
    ],
)
def test_configurations(changes, message, refuses):
    if message is None:
        assert auto_round.Config.from_json(ENTRY | changes).of("a").bits == 4
        return
    with refuses(message):
        auto_round.Config.from_json(ENTRY | changes)
