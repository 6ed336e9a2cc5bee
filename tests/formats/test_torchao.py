"""torchao against what torchao 0.18 chooses, rounds and stores, bit for bit."""

import collections

import chex
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import tensor
from qjax.formats import gptq, tinygemm, torchao, torchao_affine
from qjax.formats.torchao_affine import MappingType, ZeroPointDomain
from tests import goldens
from tests.goldens import load

FILES = goldens.names("torchao")
AFFINE = [name for name in FILES if name.startswith("torchao_affine")]
STORED = [name for name in FILES if name.startswith("torchao_tensors")]
QDATA, SCALE, POINTS = torchao.TENSORS[:3]
INTX = "IntxUnpackedToInt8Tensor"


def rule_of(config: dict) -> dict:
    """What the configuration of a golden file is in the functions' arguments."""
    if "mapping_type" in config:
        mapping = MappingType[config["mapping_type"]]
        return {"mapping": mapping, "low": config["quant_min"], "high": 7}
    name = config["zero_point_domain"]
    domain = ZeroPointDomain[name.removesuffix("_preserve_zero")]
    return {"domain": domain, "preserve_zero": name.endswith("_preserve_zero")}


def codes_rule_of(config: dict) -> dict:
    keep = ("domain", "low", "high")
    return {key: value for key, value in rule_of(config).items() if key in keep}


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {
        "torchao_affine": 18,
        "torchao_tensors": 4,
        "torchao_weights": 28,  # of test_torchao_weights.py
    }


@pytest.mark.parametrize("name", AFFINE)
def test_chooses_torchaos_parameters(name):
    data, config = load(name), load(name)["config"]
    scale, zero = torchao_affine.choose_qparams_affine(
        jnp.asarray(data["in_w"]),
        config["group_size"],
        eps=config["eps"],
        **rule_of(config),
    )
    chex.assert_trees_all_equal(np.asarray(scale), data["out_scale"])
    points = data["out_zero_point"]
    points = points.astype(np.int32) if points.dtype.kind == "i" else points
    chex.assert_trees_all_equal(np.asarray(zero), points)


@pytest.mark.parametrize("name", AFFINE)
def test_quantizes_and_dequantizes_as_torchao(name):
    data, config = load(name), load(name)["config"]
    parameters = [jnp.asarray(data[key]) for key in ("out_scale", "out_zero_point")]
    size, rule = config["group_size"], codes_rule_of(config)
    w = jnp.asarray(data["in_w"])
    codes = torchao_affine.quantize_affine(w, *parameters, size, **rule)
    chex.assert_trees_all_equal(np.asarray(codes), data["out_q"].astype(np.int32))
    weight = torchao_affine.dequantize_affine(codes, *parameters, size, **rule)
    chex.assert_trees_all_equal(np.asarray(weight), data["out_dequant"])


@pytest.mark.parametrize("name", AFFINE)
def test_a_tensor_dequantizes_as_torchao(name):
    data, config = load(name), load(name)["config"]
    low, is_float = rule_of(config).get("low", 0), "FLOAT" in name
    codes = jnp.asarray((data["out_q"].T - low).astype(np.uint8))
    zero = data["out_zero_point"].T
    qt = tensor.build(
        (gptq.Stream().pack(codes, 4),),
        jnp.asarray(data["out_scale"].T),
        jnp.asarray(zero if is_float else (zero - low).astype(np.uint8)),
        layout=gptq.Stream(),
        segments=(tensor.Segment(4, config["group_size"]),),
        affine=tensor.Affine.CENTERED if is_float else tensor.Affine.ZERO,
        rounding=2 if is_float else 1,
    )
    weight = np.asarray(qjax.dequantize(qt)).T
    chex.assert_trees_all_equal(weight, data["out_dequant"])


def test_float16_scales_whose_reciprocal_overflows_make_no_nan():
    # torchao itself multiplies 0 by infinity here and casts NaN to an integer.
    w = jnp.zeros((1, 32), jnp.float16).at[0, 0].set(1e-6)
    scale, zero = torchao_affine.choose_qparams_affine(w, 32, eps=1e-6)
    codes = torchao_affine.quantize_affine(w, scale, zero, 32)
    assert 1 / float(scale[0, 0]) > 65504
    chex.assert_trees_all_equal(np.asarray(codes), np.eye(1, 32, dtype=np.int32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("domain", ZeroPointDomain)
def test_default_eps(domain, dtype):
    scale, _ = torchao_affine.choose_qparams_affine(
        jnp.zeros((1, 8), dtype), 8, domain=domain
    )
    info = jnp.finfo(dtype)
    is_float = domain is ZeroPointDomain.FLOAT
    assert scale[0, 0] == (info.smallest_normal if is_float else info.eps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: torchao_affine.choose_qparams_affine(jnp.zeros((2, 8)), 3),
            "shape=(2, 8) must be [N, K], K a multiple of group_size=3",
        ),
        (
            lambda: torchao_affine.choose_qparams_affine(jnp.zeros((2, 8), int), 4),
            "w.dtype=int32 must be float16, bfloat16 or float32",
        ),
        (
            lambda: torchao_affine.choose_qparams_affine(
                jnp.zeros((2, 8)),
                4,
                mapping=MappingType.SYMMETRIC,
                domain=ZeroPointDomain.FLOAT,
            ),
            "mapping=MappingType.SYMMETRIC must be ASYMMETRIC in domain FLOAT",
        ),
        (
            lambda: torchao_affine.quantize_affine(
                jnp.zeros((2, 8)), jnp.ones((2, 1)), jnp.zeros((2, 2)), 4
            ),
            "scale and zero must have shape (2, 2); found (2, 1)",
        ),
        (
            lambda: torchao_affine.dequantize_affine(
                jnp.zeros((2, 8), jnp.int8), jnp.ones((2, 2)), jnp.zeros((2, 4)), 4
            ),
            "scale and zero must have shape (2, 2); found (2, 4)",
        ),
    ],
)
def test_calls_that_are_refused(call, message, refuses):
    with refuses(message):
        call()


def stored_of(name: str) -> tuple[dict, torchao.Config]:
    data = load(name)
    tensors = {
        key.removeprefix("state_"): array
        for key, array in data.items()
        if key.startswith("state_")
    }
    return tensors, torchao.Config(**data["config"])


@pytest.mark.parametrize("name", STORED)
def test_reads_and_writes_stored_tensors(name):
    tensors, config = stored_of(name)
    qt = torchao.from_tensors(tensors, config)
    assert (qt.shape, qt.layout) == ((64, 24), torchao.Bytes())
    middle = 2 ** (config.bits - 1)
    codes = np.asarray(qjax.codes(qt)).T.astype(np.int16) - middle
    chex.assert_trees_all_equal(codes, tensors[QDATA].astype(np.int16))
    assert (qt.zero is not None) == ("asym" in name)
    # The weight was bfloat16; int8 scales are float32 all the same.
    weight = np.asarray(qjax.dequantize(qt, jnp.bfloat16)).T
    chex.assert_trees_all_equal(weight, load(name)["out_dequant"])
    written = torchao.to_tensors(qt)
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors
    )


def test_zero_points_may_be_left_out():
    tensors, config = stored_of(STORED[-1])
    del tensors[POINTS]
    qt = torchao.from_tensors(tensors, config)
    written = torchao.to_tensors(qt, zero_point=False)
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors
    )


@hypothesis.settings(deadline=None, max_examples=5)
@hypothesis.given(
    st.integers(1, 8), st.integers(1, 40), st.integers(1, 9), st.integers(0, 9)
)
def test_layout_round_trip(bits, k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (k, n)).astype(np.uint8)
    layout = torchao.Bytes()
    words = layout.pack(jnp.asarray(codes), bits)
    expected = (codes.T.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    chex.assert_trees_all_equal(np.asarray(words), expected)
    assert layout.extents(words.shape, bits) == (k, n)
    chex.assert_trees_all_equal(np.asarray(layout.unpack(words, bits)), codes)


def test_layout_under_jit_and_vmap():
    layout = torchao.Bytes()
    codes = jnp.arange(3 * 8 * 4, dtype=jnp.uint8).reshape(3, 8, 4) % 8
    words = jax.jit(jax.vmap(lambda q: layout.pack(q, 3)))(codes)
    assert words.shape == (3, 4, 8)
    chex.assert_trees_all_equal(
        jax.jit(jax.vmap(lambda w: layout.unpack(w, 3)))(words), codes
    )


def test_layout_refuses(refuses):
    with refuses("words.dtype=uint8 must be int8"):
        torchao.Bytes().unpack(jnp.zeros((2, 2), jnp.uint8), 8)
    with refuses("bits=9 must be an integer from 1 to 8"):
        torchao.Bytes().pack(jnp.zeros((2, 2), jnp.uint8), 9)


@pytest.mark.parametrize("name", STORED)
def test_relayout_there_and_back(name):
    tensors, config = stored_of(name)
    qt = torchao.from_tensors(tensors, config)
    moved = qjax.relayout(qt, gptq.Stream())
    chex.assert_trees_all_equal(qjax.dequantize(moved), qjax.dequantize(qt))
    chex.assert_trees_all_equal(qjax.relayout(moved, torchao.Bytes()), qt)


@pytest.mark.parametrize("name", STORED)
def test_matmul_of_a_prepared_tensor(name):
    qt = torchao.from_tensors(*stored_of(name))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
    found = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


GOOD = {
    QDATA: np.zeros((4, 64), np.int8),
    SCALE: np.ones((4, 2), np.float32),
    POINTS: np.zeros((4, 2), np.int8),
}


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({QDATA: np.zeros((4, 64), np.uint8)}, {}, "dtype=uint8 must be int8"),
        ({QDATA: np.zeros(4, np.int8)}, {}, "_weight_qdata.shape=(4,) must have 2"),
        ({QDATA: np.zeros((0, 64), np.int8)}, {}, "(0, 64) must be [N, K], not empty"),
        (
            {SCALE: np.ones((4, 2))},
            {},
            "_weight_scale.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        # Zero points that are floats are torchao's too, but no writer makes them.
        (
            {POINTS: np.zeros((4, 2), np.float32)},
            {},
            "_weight_zero_point.dtype=float32 must be int8",
        ),
        ({}, {"bits": 9}, "bits=9 must be an integer from 1 to 8"),
        ({}, {"group_size": 48}, "K must be a multiple of group_size=48"),
        ({}, {"group_size": 64}, "_weight_scale.shape=(4, 2) must be (4, 1), from"),
        ({}, {"group_size": None, "per_tensor": True}, "(4, 2) must be (1, 1), from"),
        ({POINTS: np.zeros((4, 1), np.int8)}, {}, "shape=(4, 1) must be (4, 2), from"),
        (
            {"_weight_act_pre_scale": np.ones(32, np.float32)},
            {},
            "_weight_act_pre_scale.shape=(32,) must be (64,) or (1, 64), from K=64",
        ),
        (
            {"_weight_per_tensor_scale": np.float32(1)},
            {},
            "_weight_per_tensor_scale is no tensor of torchao's Int8Tensor",
        ),
        (
            {SCALE: np.full((4, 2), np.inf, np.float32)},
            {},
            "_weight_scale must be finite; found NaN or infinity",
        ),
        (
            {QDATA: np.full((4, 64), 8, np.int8)},
            {"bits": 4},
            "_weight_qdata from 8 to 8 must lie in -8 to 7, the range of 4 bits",
        ),
        (
            {POINTS: np.full((4, 2), -9, np.int8)},
            {"bits": 4},
            "_weight_zero_point from -9 to -9 must lie in -8 to 7",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, config, message, refuses):
    config = torchao.Config(**{"group_size": 32} | config)
    torchao.from_tensors(GOOD, torchao.Config(group_size=32))
    with refuses(message):
        torchao.from_tensors(GOOD | changes, config)


def test_missing_tensors_are_refused(refuses):
    with refuses("_weight_scale is missing; found ['_weight_qdata']"):
        torchao.check({QDATA: GOOD[QDATA]}, torchao.Config())


def with_order() -> qjax.QTensor:
    qt = qjax.quantize(jnp.ones((64, 8)), group_size=32)
    return tensor.build(
        qt.words,
        qt.scale,
        qt.zero,
        layout=qt.layout,
        segments=qt.segments,
        order=jnp.arange(64, dtype=jnp.int32)[::-1],
    )


def with_leaves(scale=(2, 8), zero=(2, 8), group=32, dtype=jnp.uint8, **fields):
    qt = qjax.quantize(jnp.ones((64, 8)), group_size=32)
    return tensor.build(
        qt.words * len(fields.get("segments", [0])),
        jnp.ones(scale),
        jnp.zeros(zero, dtype),
        layout=qt.layout,
        **{"segments": (tensor.Segment(4, group),)} | fields,
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: qjax.quantize(jnp.ones((2, 64, 8)), group_size=32),
            "it stacks (2,) matrices; write them one by one",
        ),
        (
            lambda: with_leaves(
                (4, 8), (4, 8), segments=(tensor.Segment(4, 32), tensor.Segment(4, 32))
            ),
            "its rows have several widths",
        ),
        (
            lambda: with_leaves(input_scale=jnp.ones(64)),
            "it has an input_scale",
        ),
        (with_order, "its groups are not runs of inputs (act-order)"),
        (lambda: with_leaves(dtype=jnp.float32), "does not have integer zeros"),
        (
            lambda: with_leaves((2, 8), (2, 8), group=48),
            "group_size=48 does not divide k=64",
        ),
        (lambda: with_leaves((2, 8), (2, 1)), "zeros (2, 1) and scales (2, 8) differ"),
        (lambda: with_leaves((2, 1), (2, 1)), "some columns share scales"),
    ],
)
def test_writing_refuses(make, reason, refuses):
    with refuses(reason):
        torchao.to_tensors(make())


def test_writes_gptq_weights():
    qt = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
    tensors = torchao.to_tensors(qt)
    back = torchao.from_tensors(
        {name: np.asarray(array) for name, array in tensors.items()},
        torchao.Config(bits=3, group_size=32),
    )
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))


def int8(granularity: dict, **data) -> dict:
    data = {"granularity": granularity, "group_size": None} | data
    return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": data}


def intx(dtype: str, granularity: dict, **data) -> dict:
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": dtype},
        "granularity": granularity,
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "scale_dtype": None,
        "intx_packing_format": {
            "_type": "IntxPackingFormat",
            "_data": "UNPACKED_TO_INT8",
        },
    } | data
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def int4(size: int = 64, **data) -> dict:
    data = {
        **{"group_size": size, "set_inductor_config": True},
        # A configuration that was given the name keeps it; else it is an enumeration.
        "int4_packing_format": "tile_packed_to_4d",
        "int4_choose_qparams_algorithm": {
            "_type": "Int4ChooseQParamsAlgorithm",
            "_data": "TINYGEMM",
        },
        "int4_tile_packed_ntile": 8,
    } | data
    return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}


def in_header(kind: str = "Int4TilePackedTo4dTensor", **data) -> dict:
    data = {"block_size": [1, 64], "shape": [12, 1000]} | data
    names = ["qdata", "scale_and_zero"]
    return {"_type": kind, "_data": data, "_tensor_data_names": names}


ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
AXIS = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
GROUP = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}


def entry(kind, ignored=None) -> dict:
    return {
        **{"quant_method": "torchao", "quant_type": {"default": kind}},
        **{"modules_to_not_convert": ignored, "untie_embedding_weights": False},
    }


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (int8(ROW), torchao.Config()),
        (int8(TENSOR), torchao.Config(per_tensor=True)),
        (int8(GROUP), torchao.Config(group_size=32)),
        (intx("int4", GROUP), torchao.Config(kind=INTX, bits=4, group_size=32)),
        (intx("int3", AXIS), torchao.Config(kind=INTX, bits=3)),
    ],
)
def test_config_from_json(kind, config):
    read = torchao.Config.from_json(entry(kind))
    assert read == config
    assert read.of("model.layers.0.mlp.up_proj") == config


@pytest.mark.parametrize(
    "packing",
    [
        "tile_packed_to_4d",
        {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
    ],
)
def test_config_of_an_int4_weight_is_in_the_header(packing):
    kind = int4(int4_packing_format=packing)
    config = torchao.Config.from_json(entry(kind)).of("model.layers.0.mlp.up_proj")
    found = config.with_header(in_header())
    names = ("_weight_qdata", "_weight_scale_and_zero")
    assert found == tinygemm.Config(group_size=64, shape=(12, 1000), names=names)
    # Of other weights the configuration says enough.
    assert torchao.Config().with_header(None) == torchao.Config()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "the metadata in the safetensors header, which would tell the shape"),
        (
            in_header("Int4Tensor"),
            "_type='Int4Tensor' in the safetensors header must be 'Int4TilePackedTo4d",
        ),
        (
            in_header(block_size=[1, 32]),
            "block_size=[1, 32] in the safetensors header must be [1, 64]",
        ),
        (in_header(shape=[12]), "shape=[12] must be [N, K]"),
        (
            {"_type": "Int4TilePackedTo4dTensor", "_data": 5},
            "must be an object with '_type' and '_data'",
        ),
    ],
)
def test_header_refuses(header, message, refuses):
    config = torchao.Config.from_json(entry(int4()))
    with refuses(message):
        config.with_header(header)


def test_reads_int4_weights_as_tinygemm():
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (2, 8, 32, 4), dtype=np.int32)
    tensors = {
        QDATA: words,
        "_weight_scale_and_zero": np.ones((16, 16, 2), ml_dtypes.bfloat16),
    }
    config = torchao.Config.from_json(entry(int4())).with_header(in_header())
    qt = torchao.from_tensors(tensors, config)
    assert qt.shape == (1000, 12)
    chex.assert_trees_all_equal(qt, tinygemm.from_tensors(tensors, config))


def test_config_leaves_modules_dense():
    config = torchao.Config.from_json(entry(int8(ROW), ["lm_head", "layers.1", "gate"]))
    for module in ("lm_head", "model.lm_head", "layers.1.mlp.up", "model.mlp.gate"):
        assert config.of(module) is None, module
    for module in ("layers.11.mlp.up", "model.layers.1.mlp.up", "gate_proj"):
        assert config.of(module) == torchao.Config(), module


@pytest.mark.parametrize("table", ["fqn_to_config", "module_fqn_to_config"])
def test_config_by_module(table):
    kind = {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {
            table: {
                "re:.*q_proj": intx("int4", GROUP),
                "re:.*k_proj.weight": intx("int5", AXIS),
                "a.q_proj": None,
                "b.q_proj.weight": int8(TENSOR),
                "_default": int8(ROW),
            }
        },
    }
    config = torchao.Config.from_json(entry(kind, ["d.q_proj"]))
    assert config.of("c.q_proj") == torchao.Config(kind=INTX, bits=4, group_size=32)
    assert config.of("c.k_proj") == torchao.Config(kind=INTX, bits=5)
    assert config.of("a.q_proj") is None
    assert config.of("b.q_proj") == torchao.Config(per_tensor=True)
    assert config.of("c.q_proj.x") == torchao.Config()
    assert config.of("d.q_proj") is None
    del kind["_data"][table]["_default"]
    assert torchao.Config.from_json(entry(kind)).of("c.up_proj") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "quant_type=None must be an object with 'default'"),
        (
            {"quant_type": "int8_weight_only"},
            "quant_type='int8_weight_only' must be an object",
        ),
        (
            entry(int8(ROW), "lm_head"),
            "modules_to_not_convert='lm_head' must be a list",
        ),
        (entry(int8(ROW), ["("]), "modules_to_not_convert: '(' is no pattern"),
        (entry({"_type": "Int8WeightOnlyConfig"}), "must be an object with '_type'"),
        (
            entry({"_type": "Int4WeightOnlyConfig", "_data": {}}),
            "int4_packing_format=None must be 'plain' or 'tile_packed_to_4d'",
        ),
        (
            entry(int4(int4_packing_format={"_type": "P", "_data": "PLAIN_INT32"})),
            "int4_packing_format='plain_int32' must be 'plain' or 'tile_packed_to_4d'",
        ),
        (entry(int4(int4_tile_packed_ntile=16)), "ntile=16 must be 8: AMD GPUs, which"),
        (entry(int4(48)), "group_size=48 must be one of (32, 64, 128, 256), for int4"),
        (entry(int8(ROW), ["(a+)+b"]), "'(a+)+b' repeats a group"),
        (
            entry({"_type": "UIntXWeightOnlyConfig", "_data": {}}),
            "quant_type 'UIntXWeightOnlyConfig' is not supported; known: ['Int8",
        ),
        (entry(int8(ROW, group_size=32)), "group_size=32 is of version 1"),
        (entry(int8({"_type": "PerBlock", "_data": {}})), "must be PerRow, PerAxis(0)"),
        (
            entry(intx("int4", {"_type": "PerAxis", "_data": {"axis": 1}})),
            "must be PerRow, PerAxis(0), PerGroup or PerTensor",
        ),
        (
            entry(int8({"_type": "PerGroup", "_data": {"group_size": 0}})),
            "group_size=0 must be a positive integer",
        ),
        (entry(intx("uint4", GROUP)), "must be torch.int1 to int8"),
        (
            entry(intx("int4", GROUP, intx_packing_format="opaque")),
            "intx_packing_format='opaque' must be 'unpacked_to_int8'",
        ),
        (
            entry({"_type": "FqnToConfig", "_data": {"fqn_to_config": {}}}),
            "must map modules to objects",
        ),
        (
            entry({"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:(": None}}}),
            "fqn_to_config: '(' is no pattern",
        ),
    ],
)
def test_config_refuses(given, message, refuses):
    with refuses(message):
        torchao.Config.from_json(given)
