"""AWQ v2 against tensors that optimum-quanto and AutoAWQ wrote, bit for bit."""

import collections
import dataclasses

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
from qjax.formats import awq_v2, gptq
from tests import goldens, oracle
from tests.goldens import load, patterns, same_bits
from tests.samples import random_codes

FILES = goldens.names("awq_v2")
PACKING = [name for name in FILES if name.startswith("awq_quanto_v2")]
QBITS = [name for name in FILES if name.startswith("awq_quanto_qbits")]
FAST = [name for name in FILES if name.startswith("autoawq_gemvfast")]
LAYOUT = awq_v2.Interleaved()


def pack_by_hand(codes: np.ndarray) -> np.ndarray:
    """``[k, n]`` codes, one at a time to the word and field that they belong to."""
    k, n = codes.shape
    words = np.zeros((n // 4, k), np.uint16)
    for i, j in np.ndindex(k, n):
        column = 64 * (i // 64) + 16 * (j % 4) + 8 * (i // 32 % 2) + i % 8
        words[j // 4, column] |= codes[i, j].astype(np.uint16) << (4 * (i // 8 % 4))
    return words


def test_every_golden_file_is_here():
    assert collections.Counter(name.split("__")[0] for name in FILES) == {
        "awq_quanto_v2": 3,
        "awq_quanto_qbits": 6,
        "autoawq_gemvfast": 4,
    }
    assert (len(PACKING), len(QBITS), len(FAST)) == (3, 6, 4)


@pytest.mark.parametrize("name", PACKING)
def test_packs_and_unpacks_as_quanto(name):
    data = load(name)
    packed = awq_v2.pack_v2(jnp.asarray(data["in_q"]))
    assert packed.dtype == jnp.int16
    assert (data["packed"] < 0).any()  # a signed container
    chex.assert_trees_all_equal(np.asarray(packed), data["packed"])
    for words in (data["packed"], data["packed"].view(np.uint16)):
        codes = awq_v2.unpack_v2(jnp.asarray(words))
        assert codes.dtype == jnp.uint8
        chex.assert_trees_all_equal(np.asarray(codes), data["out_unpacked"])


def qbits_of(data: dict) -> dict:
    return {
        "_data": data["packed"],
        "_scale": data["packed_scale"],
        "_shift": data["packed_shift"],
    }


@pytest.mark.parametrize("name", QBITS)
def test_quantos_tensor(name):
    data = load(name)
    qt = awq_v2.from_qbits(qbits_of(data))
    assert (qt.rounding, qt.segments[0].group_size) == (2, 128)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["in_q"].T)
    same_bits(qjax.dequantize(qt), data["out_dequant"].T)
    same_bits(awq_v2.to_qbits(qt), qbits_of(data))


@pytest.mark.parametrize("name", QBITS)
def test_quantos_scales_and_shifts(name):
    data = load(name)
    n = len(data["in_q"])
    assert np.issubdtype(data["in_shift"].dtype, np.integer) == ("int8" in name)
    scale, shift = (data[key].reshape(n, -1).T for key in ("in_scale", "in_shift"))
    same_bits(scale, data["packed_scale"])
    stored = awq_v2.offset(jnp.asarray(scale), jnp.asarray(shift))
    same_bits(stored, data["packed_shift"])
    # Turned back, the integer zero is a float shift, which is subtracted.
    back = -data["packed_shift"].T.reshape(-1, 1)
    same_bits(back, data["out_back_shift"])
    same_bits(data["packed_scale"].T.reshape(-1, 1), data["out_back_scale"])


@pytest.mark.parametrize("name", QBITS)
def test_the_kernels_round_once(name):
    data = load(name)
    twice = awq_v2.from_qbits(qbits_of(data))
    once = qjax.dequantize(dataclasses.replace(twice, rounding=1))
    expected = fused(data["in_q"].T, data["packed_scale"], data["packed_shift"])
    same_bits(once, expected)
    assert (patterns(once) != patterns(qjax.dequantize(twice))).any()


def fused(codes, scale, shift) -> np.ndarray:
    """``codes * scale + shift`` rounded once: float64 holds these sums exactly."""
    repeats, dtype = len(codes) // len(scale), scale.dtype
    scale, shift = (
        np.repeat(p.astype(np.float64), repeats, axis=0) for p in (scale, shift)
    )
    return np.vectorize(lambda v: oracle.nearest(v, dtype))(
        codes * scale + shift
    ).astype(dtype)


def fast_tensors(data: dict) -> dict:
    return {name: data[f"packed_{name}"] for name in ("qweight", "qzeros", "scales")}


@pytest.mark.parametrize("name", FAST)
def test_reads_gemv_fast(name):
    data = load(name)
    qt = awq_v2.from_tensors(fast_tensors(data), data["config"]["group_size"])
    assert (qt.rounding, qt.shape) == (1, data["in_q"].T.shape)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["in_q"].T)
    chex.assert_trees_all_equal(np.asarray(qt.scale), data["in_scales"].T)
    scale, zeros = data["in_scales"].T, data["in_z_gn"].astype(np.uint8)
    stored = awq_v2.offset(jnp.asarray(scale), jnp.asarray(zeros))
    same_bits(stored, qt.zero)
    assert (patterns(qt.zero) == 0x8000).any() == (zeros == 0).any()  # -0
    weight = np.asarray(qjax.dequantize(qt))
    expected = fused(data["in_q"].T, scale, np.asarray(qt.zero))
    same_bits(weight, expected)


@pytest.mark.parametrize("name", FAST)
def test_gemv_fast_is_gemm_but_for_the_rounding_of_the_scaled_zero(name):
    data = load(name)
    qt = awq_v2.from_tensors(fast_tensors(data), data["config"]["group_size"])
    weight, gemm = np.asarray(qjax.dequantize(qt)), data["ref_dequant_kn"]
    zero = np.repeat(np.asarray(qt.zero), data["config"]["group_size"], axis=0)
    half_steps = (np.spacing(np.abs(zero)) / 2).astype(np.float64)
    for w in (weight, gemm):
        half_steps += np.spacing(np.abs(w)) / 2
    difference = np.abs(weight.astype(np.float64) - gemm)
    assert (difference <= half_steps).all()
    assert (difference > 0).any()


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("zeros", ["qzeros", "scaled_zeros"])
def test_writes_gemv_fast(name, zeros):
    data = load(name)
    tensors = fast_tensors(data)
    tensors[zeros] = tensors.pop("qzeros")
    qt = awq_v2.from_tensors(tensors, data["config"]["group_size"])
    for form in (qt, qjax.prepare(qt)):
        same_bits(awq_v2.to_tensors(form, zeros), tensors)


def test_llm_awq_in_bfloat16(as_qtensor):
    m = oracle.random(
        3, 128, 8, group_size=64, affine="OFFSET", dtype=ml_dtypes.bfloat16
    )
    tensors = awq_v2.to_tensors(as_qtensor(m), "scaled_zeros")
    assert tensors["scales"].shape == (16, 8)
    qt = awq_v2.from_tensors(tensors, 64)
    rounded = np.vectorize(lambda v: oracle.nearest(v, ml_dtypes.bfloat16))(m.weight)
    weight = np.asarray(qjax.dequantize(qt)).astype(np.float64)
    chex.assert_trees_all_equal(weight, rounded)


def test_one_group():
    tensors = {
        "qweight": np.zeros((2, 128), np.int16),
        "scales": np.pad(np.ones((1, 8), np.float16), ((0, 7), (0, 0))),
        "qzeros": np.ones((8, 8), np.float16),
    }
    qt = awq_v2.from_tensors(tensors, None)
    assert (qt.segments[0].group_size, qt.scale.shape) == (None, (1, 8))
    assert awq_v2.to_tensors(qt)["scales"].shape == (8, 8)


def test_words_worked_by_hand():
    codes = np.zeros((64, 4), np.uint8)
    codes[[0, 8, 16, 24], 0] = 1, 2, 3, 4
    codes[32, 0], codes[63, 3] = 5, 15
    words = np.asarray(LAYOUT.pack(jnp.asarray(codes)))[0]
    assert {i: hex(words[i]) for i in np.flatnonzero(words)} == {
        **{0: "0x4321", 8: "0x5"},
        63: "0xf000",
    }


@hypothesis.given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@hypothesis.settings(deadline=None, max_examples=6)
def test_round_trip(blocks, fours, seed):
    codes = random_codes(seed, 4, 64 * blocks, 4 * fours)
    words = LAYOUT.pack(jnp.asarray(codes), 4)
    assert words.dtype == jnp.uint16
    chex.assert_trees_all_equal(np.asarray(words), pack_by_hand(codes))
    assert LAYOUT.extents(words.shape, 4) == codes.shape
    chex.assert_trees_all_equal(np.asarray(LAYOUT.unpack(words, 4)), codes)


def test_jit_and_vmap():
    codes = jnp.asarray(random_codes(0, 4, 192, 4)).reshape(3, 64, 4)
    one_by_one = jnp.stack([LAYOUT.pack(q) for q in codes])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(LAYOUT.pack))(codes), one_by_one)
    chex.assert_trees_all_equal(jax.jit(jax.vmap(LAYOUT.unpack))(one_by_one), codes)


def test_codes_out_of_range_do_not_damage_their_neighbours():
    codes = jnp.zeros((64, 4), jnp.int32).at[0, 0].set(0x1F)
    assert int(LAYOUT.pack(codes).sum()) == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: awq_v2.pack_v2(jnp.zeros((4, 96), jnp.uint8)),
            "codes of k=96 and n=4 must have k a multiple of 64 and n of 4",
        ),
        (
            lambda: LAYOUT.pack(jnp.zeros((64, 6), jnp.uint8)),
            "codes of k=64 and n=6 must have",
        ),
        (lambda: awq_v2.pack_v2(jnp.zeros((4, 64))), "codes.dtype=float32 must be an"),
        (
            lambda: awq_v2.unpack_v2(jnp.zeros((1, 64), jnp.int32)),
            "words.dtype=int32 must be int16 or uint16",
        ),
        (
            lambda: LAYOUT.unpack(jnp.zeros((1, 32), jnp.uint16)),
            "words.shape=(1, 32) must be [n / 4, k] with k a multiple of 64",
        ),
        (lambda: LAYOUT.pack(jnp.zeros((64, 4), jnp.uint8), 2), "bits=2 must be 4"),
        (lambda: LAYOUT.unpack(jnp.zeros((1, 64), jnp.uint16), 8), "bits=8 must be 4"),
    ],
)
def test_words_that_do_not_fit_are_refused(call, message, refuses):
    with refuses(message):
        call()


def test_relayout(as_qtensor, refuses):
    m = oracle.random(0, 128, 12)
    stream = as_qtensor(m)
    moved = qjax.relayout(stream, LAYOUT)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(moved)), m.codes)
    chex.assert_trees_all_equal(qjax.relayout(moved, gptq.Stream()), stream)
    with refuses("codes of k=96 and n=12 must have k a multiple of 64"):
        qjax.relayout(as_qtensor(oracle.random(0, 96, 12)), LAYOUT)


def test_matmul():
    data = load(FAST[1])
    qt = awq_v2.from_tensors(fast_tensors(data), data["config"]["group_size"])
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    y = qjax.matmul(jnp.asarray(x), qjax.prepare(qt))
    weight = np.asarray(qjax.dequantize(qt, jnp.float32), np.float64)
    expected = x.astype(np.float64) @ weight
    error = np.abs(np.asarray(y) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("k", "group_size", "width"),
    [
        *((256, 128, 1), (1152, 128, 2), (128, 64, 2), (64, 32, 4), (1024, 32, 4)),
        *((2048, 32, 8), (4096, 128, 4), (2048, 256, 1), (128, None, 1)),
    ],
)
def test_zeros_width(k, group_size, width):
    assert awq_v2.zeros_width(k, group_size) == width


def test_other_group_sizes_have_no_zeros_width(refuses):
    with refuses("group_size=96 must be 32, 64, or at least 128"):
        awq_v2.zeros_width(96, None)


def small_tensors(**changes) -> dict:
    """k = 128, n = 8, group 64; ``changes`` of None leave a tensor out."""
    tensors = {
        "qweight": np.zeros((2, 128), np.int16),
        "qzeros": np.ones((16, 8), np.float16),
        "scales": np.ones((16, 8), np.float16),
    } | changes
    return {name: array for name, array in tensors.items() if array is not None}


def test_groups_beyond_the_last_are_refused(refuses):
    with refuses("scales must be 0 beyond the 2 groups that group_size gives"):
        awq_v2.from_tensors(small_tensors(), 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, "qzeros is missing; found ['qweight', 'scales']"),
        (
            {"scaled_zeros": np.ones((16, 8), np.float16)},
            "qzeros is no tensor of AWQ 'gemv_fast'; those are ['qweight', 'scales', ",
        ),
        (
            {"qweight": np.zeros((2, 128), np.int32)},
            "qweight.dtype=int32 must be int16",
        ),
        (
            {"scales": np.ones((16, 8))},
            "scales.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        (
            {"qzeros": np.zeros((16, 8), np.int32)},
            "qzeros.dtype=int32 must be float16, that of scales",
        ),
        ({"qweight": np.zeros(8, np.int16)}, "qweight.shape=(8,) must have 2 axes"),
        (
            {"qweight": np.zeros((2, 96), np.int16)},
            "qweight.shape=(2, 96) must be [n / 4, k] with k a multiple of 64 and of "
            "group_size=64",
        ),
        ({"qweight": np.zeros((0, 64), np.int16)}, "qweight.shape=(0, 64) must be"),
        (
            {"scales": np.ones((2, 8), np.float16)},
            "scales.shape=(2, 8) must be (16, 8), from qweight.shape=(2, 128) and "
            "group_size=64",
        ),
        (
            {"qzeros": np.ones((16, 2), np.float16)},
            "qzeros.shape=(16, 2) must be (16, 8)",
        ),
        (
            {"scales": np.full((16, 8), np.inf, np.float16)},
            "scales must be finite; found NaN or infinity",
        ),
        (
            {"qzeros": np.full((16, 8), np.nan, np.float16)},
            "qzeros must be finite; found NaN or infinity",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    with refuses(message):
        awq_v2.from_tensors(small_tensors(**changes), 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_data": np.zeros((2, 128), np.uint8)},
            "_data.dtype=uint8 must be int16",
        ),
        (
            {"_scale": np.ones((2, 8), np.int8)},
            "_scale.dtype=int8 must be float16 or bfloat16 or float32",
        ),
        (
            {"_shift": np.ones((2, 8), np.uint8)},
            "_shift.dtype=uint8 must be float16, that of _scale, in AWQWeightQBits",
        ),
        (
            {"_shift": np.ones((1, 8), np.float16)},
            "_shift.shape=(1, 8) must be (2, 8), from _scale.shape",
        ),
        (
            {"_group_size": np.ones(1, np.int32)},
            "_group_size is no tensor of AWQWeightQBitsTensor",
        ),
        (
            {name: np.ones((3, 8), np.float16) for name in ("_scale", "_shift")},
            "_scale.shape[0]=3 must divide k=128",
        ),
    ],
)
def test_qbits_that_do_not_fit_are_refused(changes, message, refuses):
    tensors = {
        "_data": np.zeros((2, 128), np.int16),
        "_scale": np.ones((2, 8), np.float16),
        "_shift": np.ones((2, 8), np.float16),
    }
    with refuses(message):
        awq_v2.from_qbits(tensors | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "(q - z) * s, and scaled zeros would be rounded; write AWQ 'gemm'"),
        ({"affine": "CENTERED"}, "scaled zeros would be rounded"),
        ({"affine": "OFFSET", "bits": 2}, "2 bits are not among (4,)"),
        ({"affine": "OFFSET", "group_size": 16}, "group_size=16 must be 32, 64"),
        ({"affine": "OFFSET", "columns": 1}, "columns share scales or zeros"),
    ],
)
def test_to_tensors_refuses(changes, reason, refuses, as_qtensor):
    with refuses(reason):
        awq_v2.to_tensors(as_qtensor(oracle.random(0, 64, 8, **changes)))


def test_other_names_of_zeros_are_refused(refuses):
    qt = awq_v2.from_tensors(fast_tensors(load(FAST[0])), 128)
    with refuses("zeros='zeros' must be one of ('scaled_zeros', 'qzeros')"):
        awq_v2.to_tensors(qt, "zeros")


def test_integer_zeros_are_rounded_only_knowingly(as_qtensor):
    qt = as_qtensor(oracle.random(0, 64, 8, dtype=np.float16))
    rounded = dataclasses.replace(
        qt, zero=awq_v2.offset(qt.scale, qt.zero), affine=tensor.Affine.OFFSET
    )
    back = awq_v2.from_tensors(awq_v2.to_tensors(rounded), 32)
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(rounded))
