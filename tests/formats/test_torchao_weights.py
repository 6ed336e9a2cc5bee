"""torchao's weights, described by a file's header, against those that it rebuilds."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import (
    compressed_tensors_floats,
    fp8,
    mxfp4,
    tinygemm,
    torchao,
    torchao_header,
)
from qjax.formats.block_scale import BlockScale
from qjax.formats.tiles import Tiles
from tests.goldens import load, names, same_bits

WEIGHTS = [name for name in names("torchao") if name.startswith("torchao_weights")]
# What a file says of inputs is read over, and not written again.
OF_INPUTS = (
    "act_quant_kwargs",
    "activation_quantization",
    "activation_dtype",
    "kernel_preference",
    "reduce_range",
)


def header_of(name: str) -> dict:
    return json.loads(load(name)["meta"]["header"])


def entry_of(kind: dict) -> dict:
    return {"quant_method": "torchao", "quant_type": {"default": kind}}


@functools.cache
def stored(name: str) -> tuple[dict, torchao.Config]:
    data, header = load(name), header_of(name)
    tensors = {
        key.removeprefix("state_"): array
        for key, array in data.items()
        if key.startswith("state_")
    }
    if (kind := data["meta"].get("quant_type")) is None:
        # Made without a configuration.
        said = torchao.Config(kind=header["_type"], described=False)
    else:
        said = torchao.Config.from_json(entry_of(kind)).of("layer")
    return tensors, said.with_header(header)


def one(kind: str) -> str:
    (name,) = (
        name for name in WEIGHTS if name.startswith(f"torchao_weights__{kind}__")
    )
    return name


@pytest.mark.parametrize("name", WEIGHTS)
def test_dequantizes_as_torchao(name):
    tensors, config = stored(name)
    qt = torchao.from_tensors(tensors, config)
    # torchao multiplies the inputs by the factors, and not the weight.
    base = dataclasses.replace(qt, input_scale=None)
    same_bits(np.asarray(qjax.dequantize(base)).T, load(name)["out_dequant"])
    if factors := tensors.get("_weight_act_pre_scale") is not None:
        same_bits(np.asarray(qt.input_scale), tensors["_weight_act_pre_scale"])
    assert factors == ("awq" in name or "smooth" in name)


@pytest.mark.parametrize(
    "name", [name for name in WEIGHTS if "_plain__" not in name and "small" not in name]
)
def test_writes_what_torchao_stored(name):
    tensors, config = stored(name)
    qt = torchao.from_tensors(tensors, config)
    written = {key: np.asarray(a) for key, a in torchao.to_tensors(qt).items()}
    kept = {key: a for key, a in tensors.items() if "_act_quant" not in key}
    kept.pop("_weight_act_per_tensor_scale", None)
    same_bits(written, {key: np.asarray(array) for key, array in kept.items()})

    texts = torchao.metadata({"layer": qt}, ["layer.bias", "step"])
    assert texts.keys() == {"layer.weight", "layer.bias", "tensor_names"}
    assert json.loads(texts["layer.bias"]) == {"_type": "Tensor"}
    assert set(json.loads(texts["tensor_names"])) == {"layer.weight", "layer.bias"}
    said, wanted = json.loads(texts["layer.weight"]), header_of(name)
    assert sorted(said["_tensor_data_names"]) == sorted(
        key.removeprefix("_weight_") for key in written
    )
    for key in OF_INPUTS:
        said["_data"].pop(key, None), wanted["_data"].pop(key, None)
    if "int8_zeros" in name:  # as another class that holds the same
        assert said["_type"] == "IntxUnpackedToInt8Tensor"
        assert said["_data"].pop("target_dtype")["_data"] == "int8"
        wanted["_type"] = said["_type"]
    assert (said["_type"], said["_data"]) == (wanted["_type"], wanted["_data"])


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "_plain__" in name])
def test_writes_scales_as_tensor_cores_read_them(name):
    tensors, config = stored(name)
    assert not config.swizzled
    qt = torchao.from_tensors(tensors, config)
    again = torchao.config_of(qt)
    assert again.swizzled
    written = {key: np.asarray(a) for key, a in torchao.to_tensors(qt).items()}
    assert written["_weight_scale"].shape != tensors["_weight_scale"].shape
    same_bits(torchao.from_tensors(written, again), qt)


@pytest.mark.parametrize("name", WEIGHTS)
def test_multiplies(name):
    qt = torchao.from_tensors(*stored(name))
    x = np.random.default_rng(0).normal(size=(3, qt.k)).astype(np.float32)
    w = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(np.float64)
    found = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    assert np.abs(found - x @ w).max() <= 1e-5 * (np.abs(x) @ np.abs(w)).max()


@pytest.mark.parametrize("kind", ["float8_group", "plain_int4_awq", "mxfp4", "nvfp4"])
def test_moves_to_the_layout_of_gpus_and_has_a_gradient(kind):
    qt = torchao.from_tensors(*stored(one(kind)))
    moved = qjax.relayout(qt, Tiles())
    same_bits(qjax.dequantize(moved), qjax.dequantize(qt))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, qt.k)), jnp.float32)
    ready = qjax.prepare(qt)
    dx = jax.grad(lambda x: qjax.matmul(x, ready).sum())(x)
    w = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(np.float64)
    wanted = np.broadcast_to(w.sum(1), x.shape)
    assert np.abs(dx - wanted).max() <= 1e-5 * np.abs(w).sum(1).max()


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 9), (300, 3)])
def test_swizzled_scales_of_any_number(shape):
    # As NVIDIA draws them: tiles of 128 rows and 4 columns follow each other.
    n, groups = shape
    exponents = np.random.default_rng(0).integers(1, 200, (groups, n)).astype(np.uint8)
    words = jnp.zeros((n, 16 * groups), jnp.uint8)
    qt = tensor.build(
        (words,),
        mxfp4.E8M0(exponent=jnp.asarray(exponents)),
        layout=compressed_tensors_floats.Nibbles(),
        segments=(tensor.Segment(4, 32),),
        affine=tensor.Affine.FLOAT,
    )
    scale = np.asarray(torchao.to_tensors(qt)["_weight_scale"]).view(np.uint8).ravel()
    tiles = -(-groups // 4)
    for row in range(n):
        for column in range(groups):
            tile = row // 128 * tiles + column // 4
            place = 512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            assert scale[place] == exponents[column, row]
    assert np.count_nonzero(scale) == n * groups


def test_int4_in_tiles_has_factors_too():
    rng = np.random.default_rng(0)
    tensors = {
        "_weight_qdata": rng.integers(-(2**31), 2**31, (1, 8, 32, 4), dtype=np.int32),
        "_weight_scale_and_zero": np.ones((16, 8, 2), ml_dtypes.bfloat16),
        "_weight_act_pre_scale": rng.normal(size=960).astype(ml_dtypes.bfloat16),
    }
    config = tinygemm.Config(group_size=64, shape=(8, 960))
    qt = torchao.from_tensors(tensors, config)
    same_bits(np.asarray(qt.input_scale), tensors["_weight_act_pre_scale"])
    assert torchao.config_of(qt).kind == "Int4TilePackedTo4dTensor"
    written = {key: np.asarray(a) for key, a in torchao.to_tensors(qt).items()}
    again = torchao.from_tensors(written, config)
    same_bits(qjax.dequantize(again), qjax.dequantize(qt))
    assert written.keys() == tensors.keys()


def changed(kind: str, **data) -> tuple[dict, torchao.Config]:
    header = copy.deepcopy(header_of(one(kind)))
    header["_data"] |= data
    said = torchao.Config(kind=header["_type"], described=False)
    return header, said


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (
            "float8_row",
            {"swizzle": 1},
            "Float8Tensor in the safetensors header has ['sw",
        ),
        ("float8_row", {"block_size": []}, "block_size=[] must be outputs and inputs"),
        ("float8_row", {"block_size": [4, 6, 8]}, "stacks of matrices are not read"),
        ("float8_row", {"block_size": [1, True]}, "two positive integers"),
        ("float8_row", {"dtype": None}, "dtype=None must be an object"),
        (
            "float8_row",
            {"dtype": {"_data": "float64"}},
            "dtype='float64' must be one of",
        ),
        ("mxfp8", {"block_size": [1, 32]}, "block_size=[1, 32] must be a positive in"),
        (
            "mxfp8",
            {"elem_dtype": {"_data": "float8_e5m2"}},
            "elem_dtype='float8_e5m2' mu",
        ),
        ("mxfp8", {"elem_dtype": "fp6_e2m3"}, "elem_dtype='fp6_e2m3' must be one of"),
        ("mxfp8", {"orig_dtype": {"_data": "float16"}}, "orig_dtype='float16' must be"),
        ("mxfp8", {"is_swizzled_scales": 2}, "is_swizzled_scales=2 must be one of"),
        ("nvfp4", {"block_size": 32}, "block_size=32 must be one of (16,)"),
        (
            "int4_inputs",
            {"target_dtype": {"_data": "uint4"}},
            "target_dtype='uint4' mus",
        ),
        ("plain_int4", {"shape": "x"}, "shape='x' must be [N, K]"),
    ],
)
def test_headers_that_are_refused(kind, data, message, refuses):
    header, said = changed(kind, **data)
    with refuses(message):
        said.with_header(header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"_type": "Int4PlainInt32Tensor", "_data": {}},
            "Intel's and Ascend's devices pack other words each",
        ),
        (
            {"_type": "Float8Tensor", "_data": {}},
            "_type='Float8Tensor' in the safetensors header must be 'Int8Tensor', from",
        ),
        ({"_type": ["Int8Tensor"]}, "_type=['Int8Tensor'] in the safetensors header"),
        ({"_type": "Int8Tensor"}, "must be an object with '_type' and '_data'"),
    ],
)
def test_classes_that_are_refused(header, message, refuses):
    with refuses(message):
        torchao.Config().with_header(header)


def test_header_and_configuration_must_agree(refuses):
    header = header_of(one("int4_inputs"))
    said = torchao.Config(kind="IntxUnpackedToInt8Tensor", bits=3)
    with refuses(
        "target_dtype='int4' in the safetensors header must be 'int3', from q"
    ):
        said.with_header(header)
    with refuses(
        "block_size=[1, 32] in the safetensors header must be [1, 64], from qu"
    ):
        dataclasses.replace(said, bits=4, group_size=64).with_header(header)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("float8_row", {"qdata": np.zeros((12, 80), np.int8)}, "must be float8_e4m3fn"),
        (
            "float8_row",
            {"scale": np.ones((12, 2), np.float32)},
            "(12, 2) must be (12, 1",
        ),
        (
            "float8_row",
            {"scale": np.full((12, 1), np.inf, np.float32)},
            "_weight_scale must be finite",
        ),
        (
            "float8_row",
            {"qdata": np.full((12, 80), np.nan, ml_dtypes.float8_e4m3fn)},
            "_weight_qdata must be finite; found NaN",
        ),
        (
            "float8_group",
            {"qdata": np.zeros((12, 88), ml_dtypes.float8_e4m3fn)},
            "(12, 88) must be whole blocks of 1 outputs and 16 inputs",
        ),
        (
            "float8_row",
            {"act_pre_scale": np.ones(80, np.float32)},
            "is no tensor of Flo",
        ),
        ("mxfp8", {"scale": np.ones((12, 5), np.uint8)}, "must be float8_e8m0fnu"),
        (
            "mxfp8",
            {"scale": np.ones((12, 5), ml_dtypes.float8_e8m0fnu)},
            "(12, 5) must be (32, 32), from _weight_qdata.shape=(12, 160) and block_si"
            "ze=[1, 32], swizzled",
        ),
        (
            "mxfp8",
            {"scale": np.full((32, 32), 255, np.uint8).view(ml_dtypes.float8_e8m0fnu)},
            "_weight_scale holds 255",
        ),
        ("nvfp4", {"per_tensor_scale": np.float32(np.nan)}, "=nan must be finite"),
        (
            "nvfp4",
            {"per_tensor_scale": np.ones(2, np.float32)},
            "(2,) must be () or (1,)",
        ),
        (
            "plain_int4",
            {"qdata": np.zeros((12, 16), np.int8)},
            "must be half of shape=[1",
        ),
        (
            "plain_int4",
            {"zero_point": np.zeros((2, 12), np.int8)},
            "must be float16 or bf",
        ),
        (
            "plain_int4",
            {"scale": np.ones((12, 2), np.float32)},
            "(12, 2) must be (2, 12)",
        ),
        ("int8_row", {"qdata": np.zeros((12, 20), np.int8)}, "K must be a multiple of"),
        (
            "int8_awq",
            {"act_pre_scale": np.full(40, np.inf, np.float32)},
            "_weight_act_pre_scale must be finite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kind, changes, message, refuses):
    tensors, config = stored(one(kind))
    changes = {f"_weight_{key}": array for key, array in changes.items()}
    if kind == "plain_int4":
        message = message.replace("bf", "bfloat16")
    config = dataclasses.replace(config, names=None)
    with refuses(message):
        torchao.from_tensors(tensors | changes, config)


@pytest.mark.parametrize("name", [n for n in WEIGHTS if "small" not in n])
def test_tensors_that_the_header_lists_are_there(name, refuses):
    tensors, config = stored(name)
    for key in tensors:
        left = {other: array for other, array in tensors.items() if other != key}
        with refuses(
            f"the tensors {sorted(left)} must be {sorted(tensors)}, from the s"
        ):
            torchao.check(left, config)


def test_blocks_of_integers_are_refused(refuses):
    tensors, _ = stored(one("int8_row"))
    with refuses(
        "block_size=[6, 20] must have one output, or all of the tensor, [12, 40"
    ):
        torchao.check(tensors, torchao.Config(block=(6, 20)))


def of_floats(bits=8, group=32, columns=16, scale=None, dtype=None) -> qjax.QTensor:
    layout = fp8.Bytes() if bits == 8 else compressed_tensors_floats.Nibbles()
    return tensor.build(
        (layout.pack(jnp.ones((96, 16), jnp.uint8), bits),),
        jnp.ones((96 // (group or 96), columns)) if scale is None else scale,
        layout=layout,
        segments=(tensor.Segment(bits, group),),
        affine=tensor.Affine.FLOAT,
        weight_dtype=dtype,
    )


POWERS = mxfp4.E8M0(exponent=jnp.full((3, 16), 127, jnp.uint8))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: of_floats(columns=4),
            "Float8Tensor has no blocks of (4, 32), but of (",
        ),
        (
            lambda: of_floats(4),
            "floats of 4 bits in groups of 32 do not have the scales",
        ),
        (lambda: of_floats(4, scale=POWERS, dtype="float16"), "no weights in float16"),
        (
            lambda: of_floats(
                scale=BlockScale.of(jnp.ones((3, 2)), n=16, size=(10, 32))
            ),
            "has no blocks of (10, 32)",
        ),
        (
            lambda: of_floats(
                group=96, scale=BlockScale.of(jnp.ones((1, 1)), n=16, size=(128, 128))
            ),
            "(16, 96) is not whole blocks of (128, 128)",
        ),
        (
            lambda: dataclasses.replace(
                torchao.from_tensors(*stored(one("plain_int4"))),
                zero=jnp.ones((2, 12), jnp.float32),
            ),
            "scales and zeros have other dtypes",
        ),
    ],
)
def test_writing_refuses(make, reason, refuses):
    with refuses(reason):
        torchao.to_tensors(make())


KINDS = {
    "Int8DynamicActivationInt8WeightConfig": "Int8Tensor",
    "Int8StaticActivationInt8WeightConfig": "Int8Tensor",
    "Float8WeightOnlyConfig": "Float8Tensor",
    "Float8DynamicActivationFloat8WeightConfig": "Float8Tensor",
    "MXDynamicActivationMXWeightConfig": "MXTensor",
    "NVFP4WeightOnlyConfig": "NVFP4Tensor",
    "NVFP4DynamicActivationNVFP4WeightConfig": "NVFP4Tensor",
}


@pytest.mark.parametrize("name", KINDS)
def test_configurations_that_leave_the_rest_to_the_header(name, refuses):
    config = torchao.Config.from_json(entry_of({"_type": name, "_data": {}}))
    assert config.kind == KINDS[name]
    with refuses(
        f"which would tell the shape of {KINDS[name]} and of its scales, does"
    ):
        config.with_header(None)


def test_sparse_floats_are_refused(refuses):
    kind = {
        "_type": "Float8DynamicActivationFloat8WeightConfig",
        "_data": {"packing_format": {"_data": "SPARSE_2D_DATA_2D_METADATA"}},
    }
    with refuses("packing_format='sparse_2d_data_2d_metadata' must be 'plain'"):
        torchao.Config.from_json(entry_of(kind))


def test_factors_are_of_one_configuration(refuses):
    awq = load(one("int8_awq"))["meta"]["quant_type"]
    twice = {"_type": "SmoothQuantConfig", "_data": {"base_config": awq}}
    with refuses("quant_type 'AWQConfig' is not supported"):
        torchao.Config.from_json(entry_of(twice))


@pytest.mark.parametrize("name", [n for n in WEIGHTS if "small" not in n])
def test_describes_a_matrix_as_torchao_does(name):
    qt = torchao.from_tensors(*stored(name))
    said = torchao.config_of(qt).described_alike().to_json()
    again = torchao.Config.from_json(entry_of(said)).of("layer")
    text = torchao.metadata({"layer": qt}, [])["layer.weight"]
    found = again.with_header(json.loads(text))
    written = {key: np.asarray(a) for key, a in torchao.to_tensors(qt).items()}
    same_bits(torchao.from_tensors(written, found), qt)


def test_all_attributes_are_read_or_read_over():
    for name in WEIGHTS:
        header = header_of(name)
        known = torchao_header._ATTRIBUTES[header["_type"]]
        assert header["_data"].keys() <= known
