"""AWQ against tensors that optimum-quanto and AutoAWQ wrote, bit for bit."""

import collections
import dataclasses
import functools

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
from qjax.formats import awq, awq_v2, gptq
from tests import goldens, oracle
from tests.goldens import load
from tests.samples import random_codes

FILES = goldens.names("awq")
QUANTO = [name for name in FILES if name.startswith("awq_quanto_v1")]
GEMM = [name for name in FILES if name.startswith("autoawq_gemm_")]
GEMV = [name for name in FILES if name.startswith("autoawq_gemv_")]
FIELDS = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def tensors_of(data: dict) -> dict:
    return {name: data[f"packed_{name}"] for name in ("qweight", "qzeros", "scales")}


def config_of(data: dict, **changes) -> awq.Config:
    return awq.Config.from_json(data["config"] | changes)


def codes_of(data: dict) -> np.ndarray:
    """The codes ``[k, n]``."""
    codes = data["out_q_kn"] if "out_q_kn" in data else data["in_q"].T
    return codes.astype(np.uint8)


def zeros_of(data: dict) -> np.ndarray:
    zeros = data["out_z_gn"] if "out_z_gn" in data else data["in_z_gn"]
    return zeros.astype(np.uint8)


def pack_by_hand(codes: np.ndarray, reorder: bool) -> np.ndarray:
    """Code j of eight goes to field ``FIELDS[j]``, or j."""
    fields = FIELDS if reorder else np.arange(8)
    eights = codes.astype(np.int64).reshape(len(codes), -1, 8)
    return (eights << (4 * fields)).sum(-1).astype(np.uint32)


def test_every_golden_file_is_here():
    assert collections.Counter(name.split("__")[0] for name in FILES) == {
        "awq_quanto_v1": 6,
        "autoawq_gemm": 4,
        "autoawq_gemv": 4,
    }
    assert (len(QUANTO), len(GEMM), len(GEMV)) == (6, 4, 4)


@pytest.mark.parametrize("name", QUANTO)
def test_packs_and_unpacks_as_quanto(name):
    data = load(name)
    reorder = data["config"]["reorder"]
    packed = awq.pack(jnp.asarray(data["in_q"]), reorder)
    assert packed.dtype == jnp.int32
    chex.assert_trees_all_equal(np.asarray(packed), data["packed"])
    assert (data["packed"] < 0).any() or data["packed"].size < 8  # signed containers
    for words in (data["packed"], data["packed"].view(np.uint32)):
        codes = awq.unpack(jnp.asarray(words), reorder)
        assert codes.dtype == jnp.uint8
        chex.assert_trees_all_equal(np.asarray(codes), data["out_unpacked"])


def test_words_worked_by_hand():
    codes = jnp.arange(8, 16)[None]
    assert [hex(w) for w in np.asarray(awq.pack(codes)).view(np.uint32)[0]] == [
        "0xfedcba98"
    ]
    words = np.asarray(awq.pack(codes, reorder=True)).view(np.uint32)
    assert [hex(w) for w in words[0]] == ["0xfdb9eca8"]


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("name", GEMM + GEMV)
def test_reads_and_dequantizes(name, silent):
    data = load(name)
    config = config_of(data, version=None) if silent else config_of(data)
    qt = awq.from_tensors(tensors_of(data), config)
    assert qt.layout == (awq.Gemm() if name in GEMM else awq.Gemv())
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), codes_of(data))
    chex.assert_trees_all_equal(np.asarray(qt.zero), zeros_of(data))
    chex.assert_trees_all_equal(np.asarray(qt.scale), data["in_scales"].T)
    weight = qjax.dequantize(qt)
    expected = data["out_dequant_kn" if name in GEMM else "ref_dequant_kn"]
    assert weight.dtype == jnp.float16
    chex.assert_trees_all_equal(
        np.asarray(weight).view(np.uint16), expected.view(np.uint16)
    )


@pytest.mark.parametrize("name", GEMM + GEMV)
def test_writes_the_same_words(name):
    data = load(name)
    qt = awq.from_tensors(tensors_of(data), config_of(data))
    for form in (qt, qjax.prepare(qt)):
        written = awq.to_tensors(form, data["config"]["version"])
        written = {key: np.asarray(value) for key, value in written.items()}
        assert written.keys() == tensors_of(data).keys()
        chex.assert_trees_all_equal(written, tensors_of(data))
        assert written["qweight"].dtype == written["qzeros"].dtype == np.int32


@pytest.mark.parametrize("name", GEMM)
def test_gemm_and_gemv_files_turn_into_each_other(name):
    gemm, gemv = load(name), load(name.replace("gemm", "gemv"))
    qt = awq.from_tensors(tensors_of(gemm), config_of(gemm))
    written = awq.to_tensors(qt, "gemv")
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors_of(gemv)
    )
    qt = awq.from_tensors(tensors_of(gemv), config_of(gemv))
    written = awq.to_tensors(qt, "gemm")
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors_of(gemm)
    )


@pytest.mark.parametrize("name", GEMM)
def test_autoawqs_conversion_to_exllama(name):
    data = load(name)
    qt = awq.from_tensors(tensors_of(data), config_of(data))
    written = gptq.to_tensors(qt, "gptq")
    if "exllama_qweight" in data:
        chex.assert_trees_all_equal(
            np.asarray(written["qweight"]), data["exllama_qweight"]
        )
    # AutoAWQ adds up signed fields: below a zero of 0 stands -1, which borrows.
    zeros = zeros_of(data).astype(np.int64).reshape(len(qt.scale), -1, 8) - 1
    theirs = (zeros << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
    chex.assert_trees_all_equal(theirs, data["exllama_qzeros"])
    ours = oracle.pack((zeros.reshape(len(qt.scale), -1) & 15), 4, 1).view(np.int32)
    chex.assert_trees_all_equal(np.asarray(written["qzeros"]), ours)
    assert (ours != theirs).any() == (zeros_of(data) == 0).any()


LAYOUTS = [awq.Gemm(), awq.Gemv()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@hypothesis.given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@hypothesis.settings(deadline=None, max_examples=6)
def test_round_trip(layout, eights, others, seed):
    gemm = layout == awq.Gemm()
    codes = random_codes(
        seed, 4, *((others, 8 * eights) if gemm else (8 * eights, others))
    )
    words = layout.pack(jnp.asarray(codes), 4)
    assert words.dtype == jnp.uint32
    chex.assert_trees_all_equal(
        np.asarray(words), pack_by_hand(codes if gemm else codes.T, gemm)
    )
    assert layout.extents(words.shape, 4) == codes.shape
    chex.assert_trees_all_equal(np.asarray(layout.unpack(words, 4)), codes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_jit_and_vmap(layout):
    codes = jnp.asarray(random_codes(0, 4, 48, 16)).reshape(3, 16, 16)
    pack, unpack = (
        functools.partial(method, bits=4) for method in (layout.pack, layout.unpack)
    )
    one_by_one = jnp.stack([pack(q) for q in codes])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(pack))(codes), one_by_one)
    chex.assert_trees_all_equal(jax.jit(jax.vmap(unpack))(one_by_one), codes)


def test_codes_out_of_range_do_not_damage_their_neighbours():
    codes = jnp.full((1, 8), 0x1F, jnp.int32)
    assert hex(np.asarray(awq.pack(codes)).view(np.uint32)[0, 0]) == "0xffffffff"
    assert int(awq.pack(codes.at[0, 1:].set(0))[0, 0]) == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: awq.pack(jnp.zeros((3, 12), jnp.uint8)),
            "12 codes must be a multiple of 8 to fill whole words",
        ),
        (lambda: awq.pack(jnp.zeros((3, 8))), "codes.dtype=float32 must be an integer"),
        (
            lambda: awq.unpack(jnp.zeros((3, 1), jnp.int16)),
            "words.dtype=int16 must be int32 or uint32",
        ),
        (
            lambda: awq.Gemm().pack(jnp.zeros((8, 8), jnp.uint8), 3),
            "bits=3 must be 4",
        ),
        (
            lambda: awq.Gemv().unpack(jnp.zeros((8, 1), jnp.uint32), 8),
            "bits=8 must be 4",
        ),
        (
            lambda: awq.Gemv().pack(jnp.zeros((12, 8), jnp.uint8), 4),
            "codes.shape[0]=12 must be a multiple of 8",
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_relayout(layout, as_qtensor):
    m = oracle.random(0, 64, 24)
    stream = as_qtensor(m)
    moved = qjax.relayout(stream, layout)
    assert moved.layout == layout
    chex.assert_trees_all_equal(np.asarray(qjax.codes(moved)), m.codes)
    chex.assert_trees_all_equal(qjax.relayout(moved, gptq.Stream()), stream)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stacks_are_moved_one_by_one(layout):
    stack = qjax.quantize(jnp.arange(3.0 * 64 * 8).reshape(3, 64, 8), group_size=32)
    moved = qjax.relayout(stack, layout)
    assert moved.shape == (3, 64, 8)
    chex.assert_trees_all_equal(qjax.codes(moved), qjax.codes(stack))


@pytest.mark.parametrize("name", [GEMM[0], GEMV[0]])
def test_matmul(name):
    data = load(name)
    qt = awq.from_tensors(tensors_of(data), config_of(data))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    y = qjax.matmul(jnp.asarray(x), qjax.prepare(qt))
    weight = np.asarray(qjax.dequantize(qt, jnp.float32), np.float64)
    expected = x.astype(np.float64) @ weight
    error = np.abs(np.asarray(y) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_scales_of_other_dtypes(version, dtype, as_qtensor):
    m = oracle.random(1, 128, 16, group_size=64, dtype=dtype)
    tensors = awq.to_tensors(as_qtensor(m), version)
    qt = awq.from_tensors(tensors, awq.Config(group_size=64, version=version))
    assert qt.dtype == dtype
    rounded = np.vectorize(lambda v: oracle.nearest(v, dtype))(m.weight)
    chex.assert_trees_all_equal(
        np.asarray(qjax.dequantize(qt)).astype(np.float64), rounded
    )


def small_tensors(version: str, **changes) -> dict:
    """k = 128, n = 16, group 64; ``changes`` of None leave a tensor out."""
    shapes = {
        "gemm": ((128, 2), (2, 2), (2, 16)),
        "gemv": ((16, 16), (16, 2), (16, 16)),
    }[version]
    tensors = {
        "qweight": np.zeros(shapes[0], np.int32),
        "qzeros": np.zeros(shapes[1], np.int32),
        "scales": np.ones(shapes[2], np.float16),
    }
    if version == "gemv":
        tensors["scales"][:, 2:] = 0  # padding
    tensors |= changes
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_silent_configs_go_by_shapes(version):
    tensors = small_tensors(version)
    layout = awq.from_tensors(tensors, awq.Config(group_size=64)).layout
    assert layout == {"gemm": awq.Gemm(), "gemv": awq.Gemv()}[version]


def test_one_group():
    tensors = small_tensors("gemm", qzeros=np.zeros((1, 2), np.int32))
    tensors["scales"] = np.ones((1, 16), np.float16)
    qt = awq.from_tensors(tensors, awq.Config(group_size=None))
    assert qt.segments[0].group_size is None
    # One group of 128 inputs is padded to eight.
    written = awq.to_tensors(qt, "gemv")
    assert written["scales"].shape == (16, 8)
    assert awq.from_tensors(written, awq.Config(group_size=None)).layout == awq.Gemv()


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
@pytest.mark.parametrize(
    ("group_size", "message"), [(128, "with larger groups"), (512, "smaller groups")]
)
def test_groups_of_another_size_are_refused(version, group_size, message, refuses):
    """Scales are padded with zeros, which must begin where there are no groups."""
    w = np.random.default_rng(0).standard_normal((1024, 16)).astype(np.float16)
    qt = qjax.quantize(jnp.asarray(w), bits=4, group_size=256)
    if version == "gemv_fast":
        zero = awq_v2.offset(qt.scale, qt.zero)
        qt = dataclasses.replace(qt, zero=zero, affine=tensor.Affine.OFFSET)
    tensors = awq.to_tensors(qt, version)
    awq.from_tensors(tensors, awq.Config(group_size=256, version=version))
    with refuses(message):
        awq.from_tensors(tensors, awq.Config(group_size=group_size, version=version))


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("gemm", {"qweight": None}, "qweight is missing; found ['qzeros', 'scales']"),
        ("gemm", {"scales": None}, "scales is missing; found ['qweight', 'qzeros']"),
        ("gemv", {"qzeros": None}, "qzeros is missing; found ['qweight', 'scales']"),
        (
            "gemm",
            {"scaled_zeros": np.ones((2, 16), np.float16)},
            "scaled_zeros is no tensor of AWQ 'gemm'",
        ),
        (
            "gemm",
            {"qweight": np.zeros((128, 2), np.int16)},
            "qweight.dtype=int16 must be int32 in AWQ 'gemm'",
        ),
        (
            "gemv",
            {"qzeros": np.zeros((16, 16), np.float16)},
            "qzeros.dtype=float16 must be int32 in AWQ 'gemv'",
        ),
        (
            "gemm",
            {"scales": np.ones((2, 16))},
            "scales.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        ("gemm", {"qzeros": np.zeros(2, np.int32)}, "qzeros.shape=(2,) must have 2"),
        (
            "gemm",
            {"qweight": np.zeros((96, 2), np.int32)},
            "qweight.shape=(96, 2) of version 'gemm' has k=96 and n=16, but k must be "
            "a multiple of group_size=64",
        ),
        ("gemm", {"qweight": np.zeros((0, 2), np.int32)}, "has k=0 and n=16"),
        (
            "gemm",
            {"qzeros": np.zeros((2, 16), np.int32)},
            "qzeros.shape=(2, 16) must be (2, 2), from qweight.shape=(128, 2), "
            "group_size=64 and version 'gemm'",
        ),
        (
            "gemm",
            {"scales": np.ones((1, 16), np.float16)},
            "scales.shape=(1, 16) must be (2, 16)",
        ),
        (
            "gemv",
            {"scales": np.ones((16, 2), np.float16)},
            "scales.shape=(16, 2) must be (16, 16)",
        ),
        (
            "gemv",
            {"qzeros": np.zeros((16, 1), np.int32)},
            "qzeros.shape=(16, 1) must be (16, 2)",
        ),
        (
            "gemm",
            {"scales": np.full((2, 16), np.nan, np.float16)},
            "scales must be finite; found NaN or infinity",
        ),
        (
            "gemv",
            {"scales": np.full((16, 16), np.inf, np.float16)},
            "scales must be finite; found NaN or infinity",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(version, changes, message, refuses):
    config = awq.Config(group_size=64, version=version)
    with refuses(message):
        awq.from_tensors(small_tensors(version, **changes), config)


def test_unknown_versions_are_refused(refuses):
    with refuses("version='marlin' must be one of ('gemm', 'gemv', 'gemv_fast')"):
        awq.from_tensors(small_tensors("gemm"), awq.Config(version="marlin"))


def test_gemv_has_few_group_sizes(refuses):
    config = awq.Config(group_size=16, version="gemv")
    with refuses("group_size=16 must be 32, 64, or at least 128"):
        awq.check(small_tensors("gemv"), config)


class TestWriting:
    """What `to_tensors` refuses, and what it makes of other forms."""

    @pytest.mark.parametrize(
        ("changes", "version", "reason"),
        [
            ({"bits": 3}, "gemm", "3 bits are not among (4,)"),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                "gemm",
                "its rows have several widths; EXL2 holds those",
            ),
            ({"grouping": "FLAT"}, "gemm", "it has flat groups"),
            ({"input_scale": True}, "gemv", "it has an input_scale"),
            ({"row_group": True}, "gemm", "its groups are not runs of inputs"),
            ({"order": True}, "gemm", "its groups are not runs of inputs"),
            ({"affine": "OFFSET"}, "gemm", "no integer zeros; 'gemv_fast' holds it"),
            ({"float_zero": True}, "gemm", "no integer zeros; requantize it"),
            ({"affine": "CENTERED", "float_zero": True}, "gemm", "requantize it"),
            ({"affine": "CODEBOOK"}, "gemm", "no integer zeros"),
            ({"columns": 1}, "gemm", "columns share scales or zeros"),
            ({"group_size": 48}, "gemm", "group_size=48 does not divide k=64"),
            ({"group_size": 16}, "gemv", "group_size=16 must be 32, 64, or at least"),
            ({"n": 12}, "gemm", "n=12 is no multiple of 8"),
            ({}, "GEMM", "version='GEMM' must be one of ('gemm', 'gemv', 'gemv_fast')"),
            ({}, "gemv_fast", "scaled zeros would be rounded; write AWQ 'gemm'"),
        ],
    )
    def test_refuses(self, changes, version, reason, refuses, as_qtensor):
        qt = as_qtensor(oracle.random(0, 64, **({"n": 32} | changes)))
        with refuses(reason):
            awq.to_tensors(qt, version)

    def test_refuses_stacks(self, refuses):
        stack = qjax.quantize(jnp.ones((2, 64, 32)), group_size=32)
        with refuses("it stacks (2,) matrices; write them one by one"):
            awq.to_tensors(stack)

    @pytest.mark.parametrize("version", ["gemm", "gemv"])
    def test_symmetric_zeros_are_the_middle_code(self, version):
        qt = qjax.quantize(jnp.eye(64), bits=4, group_size=32, symmetric=True)
        tensors = awq.to_tensors(qt, version)
        back = awq.from_tensors(tensors, awq.Config(group_size=32))
        assert (np.asarray(back.zero) == 8).all()
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    def test_gptq_files_turn_into_awq(self):
        qt = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
        config = gptq.Config(group_size=32, checkpoint_format="gptq_v2")
        from_gptq = gptq.from_tensors(gptq.to_tensors(qt, "gptq_v2"), config)
        back = awq.from_tensors(awq.to_tensors(from_gptq), awq.Config(group_size=32))
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    def test_padding_is_left_out(self):
        m = oracle.random(0, 96, 48)
        qt = tensor.build(
            [jnp.asarray(m.words[0])],
            jnp.asarray(m.scale)[:2, :40],
            jnp.asarray(m.zero)[:2, :40],
            layout=gptq.Stream(),
            segments=[tensor.Segment(4, 32, padding=32)],
            padding=8,
        )
        words = np.asarray(awq.to_tensors(qt)["qweight"]).view(np.uint32)
        chex.assert_trees_all_equal(words, pack_by_hand(m.codes[:64, :40], True))


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        (
            {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
            awq.Config(version="gemm"),
        ),
        (
            {"bits": 4, "group_size": -1, "version": "gemv"},
            awq.Config(group_size=None, version="gemv"),
        ),
        ({"bits": 4, "version": "gemv_fast"}, awq.Config(version="gemv_fast")),
        # Kernels that take gemm files.
        ({"bits": 4, "version": "exllama"}, awq.Config(version="gemm")),
        ({"bits": 4, "version": "ipex"}, awq.Config(version="gemm")),
        # AutoAWQ's quant_config.json.
        (
            {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True},
            awq.Config(group_size=64, version="gemm"),
        ),
        ({"bits": 4}, awq.Config()),
        ({"bits": 4, "version": "gemm", "backend": "llm-awq"}, awq.Config()),
        ({"bits": 4, "modules_to_not_convert": None}, awq.Config()),
        (
            {"bits": 4, "modules_to_not_convert": ["lm_head", "visual"]},
            awq.Config(modules_to_not_convert=("lm_head", "visual")),
        ),
    ],
)
def test_config_from_json(entry, config):
    assert awq.Config.from_json({"quant_method": "awq"} | entry) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "bits=None must be 4, the only width of AWQ files"),
        ({"bits": 3}, "bits=3 must be 4"),
        ({"bits": "4"}, "bits='4' must be 4"),
        ({"bits": 4.0}, "bits=4.0 must be 4"),
        ({"bits": 4, "group_size": 0}, "group_size=0 must be positive or -1"),
        ({"bits": 4, "group_size": None}, "group_size=None must be positive or -1"),
        ({"bits": 4, "group_size": True}, "group_size=True must be positive or -1"),
        ({"bits": 4, "version": "marlin"}, "version='marlin' is no AWQ layout; known:"),
        ({"bits": 4, "version": 2}, "version=2 is no AWQ layout"),
        (
            {"bits": 4, "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert='lm_head' must be a list of strings",
        ),
        (
            {"bits": 4, "modules_to_not_convert": [1]},
            "modules_to_not_convert=[1] must be a list of strings",
        ),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        awq.Config.from_json(entry)


def test_config_of_a_module():
    config = awq.Config(modules_to_not_convert=("lm_head", "visual.", "mlp.gate."))
    for dense in ("lm_head", "visual.blocks.0.attn.qkv", "model.mlp.gate.x"):
        assert config.of(dense) is None
    for quantized in ("model.layers.0.mlp.gate_proj", "model.visual"):
        assert config.of(quantized) is config


def test_gemv_fast_is_read_through_this_door(as_qtensor):
    m = oracle.random(0, 64, 8, affine="OFFSET", dtype=np.float16)
    tensors = awq.to_tensors(as_qtensor(m), "gemv_fast")
    for version in ("gemv_fast", None):
        qt = awq.from_tensors(tensors, awq.Config(group_size=32, version=version))
        assert qt.layout == awq_v2.Interleaved()
        chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), m.codes)
    with pytest.raises(ValueError, match="scales is missing"):
        awq.check({"qweight": tensors["qweight"]}, awq.Config(group_size=32))
