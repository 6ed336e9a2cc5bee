"""tinygemm against what PyTorch's own kernels pack and dequantize, bit for bit."""

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
from qjax.formats import gptq, tinygemm, tinygemm_cpu
from tests import goldens
from tests.goldens import load

FILES = goldens.names("tinygemm")
CPU = [name for name in FILES if name.startswith("tinygemm_cpu")]
TILED = [name for name in FILES if name.startswith("tinygemm_tc__")]
PADDED = "tinygemm_tc_npad__i4__12x64__s450"
QDATA, PARAMETERS = tinygemm.TENSORS


def config_of(data: dict) -> tinygemm.Config:
    config = data["config"]
    return tinygemm.Config(
        group_size=config["group_size"], inner_k_tiles=config["inner_k_tiles"]
    )


def tensors_of(data: dict) -> dict:
    return {QDATA: data["packed"], PARAMETERS: data["packed_scales_and_zeros"]}


def pack(codes: np.ndarray, tiles: int) -> np.ndarray:
    """Codes [N, K] to words, an element at a time, from the specification."""
    n, k = codes.shape
    words = np.zeros((-(-n // 8), k // (16 * tiles), 32, tiles // 2), np.uint32)
    for row, column in np.ndindex(n, k):
        t, c = divmod(column % (16 * tiles), 16)
        at = (row // 8, column // (16 * tiles), 4 * (row % 8) + c % 8 // 2, t // 2)
        shift = 4 * (2 * (t % 2) + c // 8) + 16 * (c % 2)
        words[at] |= np.uint32(int(codes[row, column]) << shift)
    return words


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {"tinygemm_tc": 12, "tinygemm_tc_npad": 1, "tinygemm_cpu": 9}
    assert len(CPU + TILED) == 21


@pytest.mark.parametrize("name", TILED)
def test_reads_and_dequantizes(name):
    data = load(name)
    qt = tinygemm.from_tensors(tensors_of(data), config_of(data))
    assert qt.shape == data["in_q"].shape[::-1]
    assert qt.layout == tinygemm.TensorCoreTiled(data["config"]["inner_k_tiles"])
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["in_q"].T)
    chex.assert_trees_all_equal(np.asarray(qt.scale), data["in_scales"].T)
    chex.assert_trees_all_equal(np.asarray(qt.zero), data["in_zeros"].T)
    weight = np.asarray(qjax.dequantize(qt)).T
    chex.assert_trees_all_equal(
        weight.view(np.uint16), data["out_dequant_fused"].view(np.uint16)
    )
    written = tinygemm.to_tensors(qt, data["config"]["inner_k_tiles"])
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors_of(data)
    )


@pytest.mark.parametrize("name", TILED)
def test_unpack_of_pack_is_the_identity(name):
    data, tiles = load(name), load(name)["config"]["inner_k_tiles"]
    for given in (data["in_q_u8"], data["in_q"].astype(np.int32)):
        packed = tinygemm.convert_weight_to_int4pack(jnp.asarray(given), tiles)
        chex.assert_trees_all_equal(np.asarray(packed), data["packed"])
    codes = tinygemm.unpack_tensor_core_tiled_layout(packed, tiles)
    assert codes.dtype == jnp.int32
    chex.assert_trees_all_equal(np.asarray(codes), data["in_q"].astype(np.int32))
    chex.assert_trees_all_equal(data["out_unpacked"], data["in_q"])


@pytest.mark.parametrize("name", TILED)
def test_dequantize_has_both_roundings(name):
    data, config = load(name), load(name)["config"]
    one, two = (
        tinygemm.dequantize_tensor_core_tiled_layout(
            jnp.asarray(data["packed"]),
            jnp.asarray(data["packed_scales_and_zeros"]),
            config["group_size"],
            config["inner_k_tiles"],
            **rounding,
        )
        for rounding in ({}, {"rounding": 2})
    )
    chex.assert_trees_all_equal(np.asarray(one), data["out_dequant_fused"])
    expected = data["out_dequant_torchao_two_roundings"]
    chex.assert_trees_all_equal(np.asarray(two), expected)
    assert (np.asarray(one) != np.asarray(two)).any()


@pytest.mark.parametrize(
    "name", [name for name in TILED if "_g32_" in name or "8x256" in name]
)
def test_dequantize_is_the_product_with_an_identity(name):
    data = load(name)
    qt = tinygemm.from_tensors(tensors_of(data), config_of(data))
    product = np.asarray(
        qjax.matmul(jnp.eye(qt.k, dtype=jnp.bfloat16), qjax.prepare(qt))
    )
    # matmul takes the float32 weight; rounding that is a second rounding, which only
    # shows where the zero is tiny against the product.
    wide = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(ml_dtypes.bfloat16)
    chex.assert_trees_all_equal(product, wide)
    differ = product != data["out_dequant_fused"].T
    assert differ.any() == ("_adv" in name)
    assert differ.mean() < 0.03


@pytest.mark.parametrize("name", TILED)
def test_joins_scales_and_zeros(name):
    data = load(name)
    joined = tinygemm.pack_scales_and_zeros(
        jnp.asarray(data["in_scales"]), jnp.asarray(data["in_zeros"])
    )
    chex.assert_trees_all_equal(np.asarray(joined), data["packed_scales_and_zeros"])


def test_missing_rows_are_packed_as_zeros():
    data = load(PADDED)
    packed = tinygemm.convert_weight_to_int4pack(jnp.asarray(data["in_q_u8"]), 4)
    chex.assert_trees_all_equal(np.asarray(packed), data["packed"])
    codes = np.asarray(tinygemm.unpack_tensor_core_tiled_layout(packed, 4))
    assert codes.shape == (16, 64)
    chex.assert_trees_all_equal(codes[:12], data["in_q"].astype(np.int32))
    assert not codes[12:].any()


@pytest.mark.parametrize("name", CPU)
def test_cpu_layouts_are_read(name):
    data, config = load(name), load(name)["config"]
    packed, capability = jnp.asarray(data["packed"]), config["cpu_capability"]
    codes = tinygemm_cpu.unpack_layout(packed, capability)
    chex.assert_trees_all_equal(np.asarray(codes), data["in_q"])
    parameters = jnp.asarray(data["in_scales_and_zeros"])
    size = config["group_size"]
    qt = tinygemm_cpu.from_layout(packed, parameters, size, capability)
    assert qt.layout == gptq.Stream()
    wide = np.asarray(qjax.dequantize(qt, jnp.float32)).T
    chex.assert_trees_all_equal(wide, data["out_dequant_f32"])
    narrow = np.asarray(qjax.dequantize(qt, jnp.bfloat16)).T
    chex.assert_trees_all_equal(narrow, data["out_dequant"])


def test_cpu_layouts_are_told_apart_by_the_capability_alone():
    packed = {
        name.split("_")[3]: load(name)["packed"] for name in CPU if "64x64" in name
    }
    assert len({array.tobytes() for array in packed.values()}) == 3
    wrong = tinygemm_cpu.unpack_layout(jnp.asarray(packed["avx2"]), "avx512")
    assert (
        np.asarray(wrong) != load("tinygemm_cpu__avx2_g32__64x64__s480")["in_q"]
    ).any()


@hypothesis.settings(deadline=None, max_examples=5)
@hypothesis.given(
    st.sampled_from((2, 4, 8)), st.integers(1, 3), st.integers(1, 20), st.integers(0, 9)
)
def test_layout_against_the_specification(tiles, blocks, n, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (16 * tiles * blocks, n)).astype(np.uint8)
    layout = tinygemm.TensorCoreTiled(tiles)
    words = layout.pack(jnp.asarray(codes), 4)
    chex.assert_trees_all_equal(np.asarray(words), pack(codes.T, tiles))
    assert layout.extents(words.shape, 4) == (len(codes), -(-n // 8) * 8)
    for container in (words, jax.lax.bitcast_convert_type(words, jnp.int32)):
        unpacked = np.asarray(layout.unpack(container, 4))
        chex.assert_trees_all_equal(unpacked[:, :n], codes)
        assert not unpacked[:, n:].any()


def test_layout_under_jit_and_vmap():
    layout = tinygemm.TensorCoreTiled(2)
    codes = jnp.arange(3 * 64 * 16, dtype=jnp.uint8).reshape(3, 64, 16) % 16
    words = jax.jit(jax.vmap(lambda q: layout.pack(q, 4)))(codes)
    one = jnp.stack([layout.pack(q, 4) for q in codes])
    chex.assert_trees_all_equal(words, one)
    back = jax.jit(jax.vmap(lambda w: layout.unpack(w, 4)))(words)
    chex.assert_trees_all_equal(back, codes)


def test_codes_out_of_range_are_cut():
    codes = jnp.full((32, 8), 0xF3, jnp.uint8)
    words = tinygemm.TensorCoreTiled(2).pack(codes, 4)
    assert (np.asarray(words) == 0x33333333).all()


def quantized(k=64, n=16, group=32, **changes) -> qjax.QTensor:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (k, n)).astype(np.uint8))
    scale = jnp.asarray(rng.uniform(0.01, 0.03, (k // group, n)), jnp.bfloat16)
    zero = jnp.asarray(rng.normal(0, 0.1, (k // group, n)), jnp.bfloat16)
    fields = {
        "scale": scale,
        "zero": zero,
        "layout": gptq.Stream(),
        "segments": (tensor.Segment(4, group),),
        "affine": tensor.Affine.CENTERED,
    } | changes
    return tensor.build((gptq.Stream().pack(codes, 4),), **fields)


@pytest.mark.parametrize("n", [16, 12])
def test_relayout_there_and_back(n):
    qt = quantized(n=n)
    moved = qjax.relayout(qt, tinygemm.TensorCoreTiled(4))
    assert (moved.shape, moved.padding) == (qt.shape, -n % 8)
    chex.assert_trees_all_equal(qjax.dequantize(moved), qjax.dequantize(qt))
    chex.assert_trees_all_equal(qjax.relayout(moved, gptq.Stream()), qt)


def test_matmul_of_a_prepared_tensor():
    data = load("tinygemm_tc__i2_g64_real__40x256__s409")
    qt = tinygemm.from_tensors(tensors_of(data), config_of(data))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
    found = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("pad_k", [False, True])
@pytest.mark.parametrize("n", [16, 12])
def test_padding_is_written_and_read(n, pad_k):
    qt = quantized(k=128, n=n)
    tensors = tinygemm.to_tensors(qt, pad_k=pad_k)
    assert tensors[QDATA].shape == (2, 8 if pad_k else 1, 32, 4)
    config = tinygemm.Config.from_json({"block_size": [1, 32], "shape": [n, 128]})
    back = tinygemm.from_tensors(tensors, config)
    assert back.shape == (128, n)
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))
    chex.assert_trees_all_equal(tinygemm.to_tensors(back, pad_k=pad_k), tensors)
    whole = tinygemm.from_tensors(tensors, tinygemm.Config(group_size=32))
    weight = np.asarray(qjax.dequantize(whole))
    assert whole.shape == (1024 if pad_k else 128, 16)
    assert not weight[128:].any()
    assert not weight[:, n:].any()


def test_symmetric_codes_get_zeros_of_0():
    qt = quantized(zero=None)
    tensors = tinygemm.to_tensors(qt, 2)
    assert not np.asarray(tensors[PARAMETERS])[..., 1].any()
    back = tinygemm.from_tensors(
        tensors, tinygemm.Config(group_size=32, inner_k_tiles=2)
    )
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: qjax.quantize(jnp.ones((2, 128, 16)), group_size=32),
            "it stacks (2,) matrices; write them one by one",
        ),
        (
            lambda: qjax.quantize(jnp.ones((128, 16)), 3, group_size=32),
            "3 bits are not among (4,)",
        ),
        (
            lambda: quantized(input_scale=jnp.ones(64)),
            "it has an input_scale",
        ),
        (
            lambda: quantized(order=jnp.arange(64, dtype=jnp.int32)),
            "its groups are not runs of inputs (act-order)",
        ),
        (
            lambda: qjax.quantize(jnp.ones((128, 16)), group_size=32),
            "(q - z) * s is not (q - 8) * s + z in bfloat16",
        ),
        (lambda: quantized(group=16), "group size 16 is not one of (32, 64, 128, 256)"),
        (
            lambda: qjax.quantize(jnp.ones((64, 16)), group_size=32, symmetric=True),
            "scales and zeros must be bfloat16; casting them would lose bits",
        ),
        (
            lambda: quantized(scale=jnp.ones((2, 1), jnp.bfloat16), zero=None),
            "columns share scales or zeros",
        ),
        (quantized, "k=64 is not a multiple of 128; pass pad_k=True"),
    ],
)
def test_writing_refuses(make, reason, refuses):
    with refuses(reason):
        tinygemm.to_tensors(make())


GOOD = {
    QDATA: np.zeros((2, 1, 32, 4), np.int32),
    PARAMETERS: np.ones((4, 16, 2), ml_dtypes.bfloat16),
}


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({QDATA: np.zeros((2, 1, 32, 4), np.int64)}, {}, "dtype=int64 must be int32"),
        ({QDATA: np.zeros((2, 32, 4), np.int32)}, {}, "(2, 32, 4) must have 4 axes"),
        ({QDATA: np.zeros((0, 1, 32, 4), np.int32)}, {}, "must not be empty"),
        (
            {QDATA: np.zeros((2, 1, 32, 2), np.int32)},
            {},
            "must be [n / 8, k / 128, 32, 4] for 8 inner k tiles",
        ),
        ({}, {"inner_k_tiles": 3}, "inner_k_tiles=3 must be one of (2, 4, 8)"),
        ({}, {"group_size": 16}, "group_size=16 must be one of (32, 64, 128, 256)"),
        ({}, {"group_size": 64}, "shape=(4, 16, 2) must be (2, 16, 2)"),
        (
            {PARAMETERS: np.ones((4, 16, 2), np.float16)},
            {},
            "_weight_scale_and_zero.dtype=float16 must be bfloat16",
        ),
        ({"_weight_act_pre_scale": np.ones(128)}, {}, "is no tensor of tinygemm"),
        ({}, {"shape": (8, 128)}, "shape=(8, 128) does not fit the padded (16, 128)"),
        (
            {PARAMETERS: np.full((4, 16, 2), np.nan, ml_dtypes.bfloat16)},
            {},
            "must be finite; found NaN or infinity",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, config, message, refuses):
    with refuses(message):
        tinygemm.from_tensors(
            GOOD | changes, tinygemm.Config(**{"group_size": 32} | config)
        )


def test_missing_tensors_are_refused(refuses):
    with refuses("_weight_qdata is missing; found ['_weight_scale_and_zero']"):
        tinygemm.check({PARAMETERS: GOOD[PARAMETERS]}, tinygemm.Config(group_size=32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tinygemm.TensorCoreTiled(8).pack(jnp.zeros((64, 8), jnp.uint8), 4),
            "codes.shape[0]=64 must be a positive multiple of 128",
        ),
        (
            lambda: tinygemm.TensorCoreTiled(2).pack(jnp.zeros((64, 8), jnp.uint8), 3),
            "bits=3 must be 4",
        ),
        (
            lambda: tinygemm.unpack_tensor_core_tiled_layout(
                jnp.zeros((1, 1, 32, 1), jnp.uint8), 2
            ),
            "words.dtype=uint8 must be int32 or uint32",
        ),
        (
            lambda: tinygemm.convert_weight_to_int4pack(
                jnp.zeros((8, 32), jnp.int8), 2
            ),
            "weight.dtype=int8 must be uint8 (two codes) or int32 (one)",
        ),
        (
            lambda: tinygemm_cpu.unpack_layout(jnp.zeros((16, 8), jnp.uint8), "neon"),
            "capability='neon' must be one of ['avx512', 'avx2', 'default']",
        ),
        (
            lambda: tinygemm_cpu.unpack_layout(jnp.zeros((8, 8), jnp.uint8), "avx2"),
            "must be uint8 [N, K / 2] with N a multiple of 16",
        ),
        (
            lambda: tinygemm.to_tensors(quantized(), 0),
            "inner_k_tiles=0 must be one of (2, 4, 8)",
        ),
    ],
)
def test_calls_that_are_refused(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "block_size=None must be [1, one of (32, 64, 128, 256)]"),
        ({"block_size": [2, 32], "shape": [8, 8]}, "block_size=[2, 32] must be"),
        ({"block_size": [1, 48], "shape": [8, 8]}, "block_size=[1, 48] must be"),
        ({"block_size": [1, 32]}, "shape=None must be [N, K]"),
        ({"block_size": [1, 32], "shape": [0, 8]}, "shape=[0, 8] must be [N, K]"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        tinygemm.Config.from_json(entry)


def test_config_is_of_one_weight():
    config = tinygemm.Config.from_json({"block_size": [1, 128], "shape": [12, 200]})
    assert config == tinygemm.Config(group_size=128, shape=(12, 200))
    assert config.of("model.layers.0.mlp.up_proj") is config
