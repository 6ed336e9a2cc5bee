"""optimum-quanto's generic tensor against what it wrote itself, bit for bit."""

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
from qjax.formats import gptq, quanto
from tests import goldens, oracle
from tests.goldens import load, patterns, same_bits

FILES = goldens.names("quanto")
PACKED = [name for name in FILES if name.startswith("quanto_packed_u8")]
TINYGEMM = [name for name in FILES if name.startswith("quanto_tinygemm")]
QBITS = [n for n in goldens.names("awq_v2") if n.startswith("awq_quanto_qbits")]
DATA, SCALE, SHIFT = quanto.TENSORS[:3]


def config_of(bits: int, k: int) -> quanto.Config:
    return quanto.Config(weights=f"qint{bits}", k=k)


def pack_by_hand(rows: np.ndarray, bits: int) -> np.ndarray:
    """One row at a time to its byte and field."""
    height = -(-len(rows) * bits // 8)
    packed = np.zeros((height, rows.shape[1]), np.uint8)
    for r, row in enumerate(rows):
        packed[r % height] |= row << (bits * (r // height))
    return packed


def test_every_golden_file_is_here():
    assert collections.Counter(name.split("__")[0] for name in FILES) == {
        "quanto_packed_u8": 4,
        "quanto_tinygemm": 2,
        "quanto_linear": 18,
        "quanto_model": 2,
    }
    assert (len(PACKED), len(TINYGEMM), len(QBITS)) == (4, 2, 6)


@pytest.mark.parametrize("name", PACKED)
def test_packs_and_unpacks_as_quanto(name):
    data = load(name)
    bits, codes = data["config"]["bits"], data["in_q"]
    same_bits(quanto.pack_weights(jnp.asarray(codes), bits), data["packed"])
    unpacked = quanto.unpack_weights(jnp.asarray(data["packed"]), bits)
    same_bits(unpacked[: len(codes)], data["out_unpacked"])
    assert not unpacked[len(codes) :].any()  # missing rows are 0
    # Seven rows of [n, k] make eight: as a layout, a column of padding.
    layout = quanto.Slabs(codes.shape[1], None)
    same_bits(layout.pack(jnp.asarray(codes.T), bits), data["packed"])
    unpacked = layout.unpack(jnp.asarray(data["packed"]), bits)
    same_bits(unpacked[:, : len(codes)], codes.T)


def tensors_of(data: dict) -> dict:
    return {
        DATA: data["generic_packed"],
        SCALE: data["in_scale"],
        SHIFT: data["in_shift"],
        **ones(data["in_scale"].dtype),
    }


def ones(dtype) -> dict:
    """What a module has that quantizes no activations."""
    return dict.fromkeys(("input_scale", "output_scale"), np.ones((), dtype))


@pytest.mark.parametrize("name", QBITS)
def test_reads_writes_and_dequantizes(name):
    data = load(name)
    n, k = data["in_q"].shape
    qt = quanto.from_tensors(tensors_of(data), config_of(4, k))
    assert (qt.shape, qt.segments[0].group_size) == ((k, n), 128)
    same_bits(qjax.codes(qt), data["in_q"].T)
    same_bits(qjax.dequantize(qt), data["out_dequant_standard"].T)
    for form in (qt, qjax.prepare(qt)):
        same_bits(quanto.to_tensors(form), tensors_of(data))


@pytest.mark.parametrize("name", TINYGEMM)
def test_tinygemm_scales_and_shifts(name):
    data = load(name)
    n, k = data["in_q"].shape
    scale, shift = (
        jnp.asarray(data[key].reshape(n, -1).T) for key in ("in_scale", "in_shift")
    )
    stored = quanto.pack_scale_shift(scale, shift)
    same_bits(stored, data["packed_scale_shift"])
    back = quanto.unpack_scale_shift(stored)
    same_bits(back[0], scale)
    same_bits(back[1].T.reshape(-1, 1), data["out_back_shift"])
    assert (patterns(back[1]) != patterns(shift)).any()  # lossy

    def weight(shift) -> jax.Array:
        words = quanto.Slabs(k, 128).pack(jnp.asarray(data["in_q"].T), 4)
        tensors = {DATA: words, SCALE: data["in_scale"], SHIFT: shift}
        return qjax.dequantize(quanto.from_tensors(tensors, config_of(4, k)))

    same_bits(weight(data["in_shift"]), data["out_dequant_standard"].T)
    # The tinygemm tensor dequantizes through the shift that it has left.
    same_bits(weight(data["out_back_shift"]), data["out_dequant"].T)


def test_tinygemm_scales_integer_zeros():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.03, (3, 5)).astype(ml_dtypes.bfloat16)
    zero = rng.integers(0, 16, (3, 5)).astype(np.uint8)
    stored = quanto.pack_scale_shift(jnp.asarray(scale), jnp.asarray(zero))
    nearest = np.vectorize(lambda v: oracle.nearest(v, ml_dtypes.bfloat16))
    wide = scale.astype(np.float64)
    middle = nearest(nearest(8 * wide) - nearest(zero * wide))
    same_bits(stored[..., 0], scale)
    same_bits(stored[..., 1], middle.astype(ml_dtypes.bfloat16))


def test_bytes_worked_by_hand():
    rows = np.array([[1], [2], [3], [0], [2]], np.uint8)
    packed = quanto.pack_weights(jnp.asarray(rows), 2)  # slabs of two rows
    assert [hex(byte) for byte in packed[:, 0]] == ["0x2d", "0x2"]
    packed = quanto.pack_weights(jnp.asarray(rows), 4)  # slabs of three
    assert [hex(byte) for byte in packed[:, 0]] == ["0x1", "0x22", "0x3"]


@pytest.mark.parametrize("bits", [2, 4])
@hypothesis.given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3))
@hypothesis.example(8, 2, 4)  # slabs of whole columns, and words within a row
@hypothesis.example(7, 2, 4)
@hypothesis.settings(deadline=None, max_examples=6)
def test_round_trip(bits, n, groups, width):
    k, layout = groups * width, quanto.Slabs(groups * width, width)
    codes = np.random.default_rng(n).integers(0, 2**bits, (k, n)).astype(np.uint8)
    words = layout.pack(jnp.asarray(codes), bits)
    same_bits(words, pack_by_hand(codes.T.reshape(-1, width), bits))
    unpacked = layout.unpack(words, bits)
    assert unpacked.shape == layout.extents(words.shape, bits)
    same_bits(unpacked[:, :n], codes)


def test_jit_and_vmap():
    layout = quanto.Slabs(16, 8)
    codes = np.random.default_rng(0).integers(0, 4, (3, 16, 4)).astype(np.uint8)
    pack, unpack = (
        functools.partial(method, bits=2) for method in (layout.pack, layout.unpack)
    )
    one_by_one = jnp.stack([pack(jnp.asarray(q)) for q in codes])
    chex.assert_trees_all_equal(jax.jit(jax.vmap(pack))(codes), one_by_one)
    same_bits(jax.jit(jax.vmap(unpack))(one_by_one), codes)


def test_codes_out_of_range_do_not_damage_their_neighbours():
    rows = jnp.array([[0x1F], [0]])
    assert int(quanto.pack_weights(rows, 4)[0, 0]) == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quanto.pack_weights(jnp.zeros((3, 8), jnp.uint8), 3),
            "bits=3 must be 2 or 4",
        ),
        (
            lambda: quanto.pack_weights(jnp.zeros((3, 8)), 4),
            "intweights.dtype=float32 must be an integer dtype",
        ),
        (
            lambda: quanto.unpack_weights(jnp.zeros((3, 8), jnp.int8), 4),
            "packed.dtype=int8 must be uint8",
        ),
        (lambda: quanto.unpack_weights(jnp.zeros((3, 8), jnp.uint8), 8), "bits=8 must"),
        (
            lambda: quanto.Slabs(16, 8).pack(jnp.zeros((8, 2), jnp.uint8), 4),
            "codes.shape[0]=8 must be k=16, a multiple of group_size=8",
        ),
        (
            lambda: quanto.Slabs(12, 8).pack(jnp.zeros((12, 2), jnp.uint8), 4),
            "codes.shape[0]=12 must be k=12, a multiple of group_size=8",
        ),
        (
            lambda: quanto.Slabs(16, 8).pack(jnp.zeros((16, 4)), 4),
            "codes.dtype=float32 must be an integer dtype",
        ),
        (
            lambda: quanto.Slabs(16, 8).unpack(jnp.zeros((4, 8), jnp.int8), 4),
            "words.dtype=int8 must be uint8",
        ),
        (
            lambda: quanto.Slabs(16, 8).unpack(jnp.zeros((2, 4), jnp.uint8), 4),
            "words.shape=(2, 4) must be [slab, 8], and k=16 a multiple of that",
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n", [8, 5])
@pytest.mark.parametrize("group_size", [32, None])
def test_relayout(bits, n, group_size, as_qtensor):
    m = oracle.random(0, 96, n, bits=bits, group_size=group_size)
    stream, layout = as_qtensor(m), quanto.Slabs(96, group_size)
    moved = qjax.relayout(stream, layout)
    rows = m.codes.T.reshape(-1, group_size or 96)
    same_bits(moved.words[0], pack_by_hand(rows, bits))
    assert moved.shape == (96, n)
    same_bits(qjax.codes(moved), m.codes)
    back = qjax.relayout(moved, gptq.Stream())
    chex.assert_trees_all_equal(back, stream)


@pytest.mark.parametrize("affine", ["ZERO", "OFFSET"])
@pytest.mark.parametrize("bits", [2, 4])
def test_padded_rows(bits, affine, as_qtensor):
    m = oracle.random(1, 96, 5, bits=bits, affine=affine, dtype=np.float16)
    qt = as_qtensor(m)
    tensors = quanto.to_tensors(qt)
    assert tensors[DATA].shape == (8 if bits == 4 else 4, 32)
    back = quanto.from_tensors(tensors, config_of(bits, 96))
    assert back.shape == (96, 5)
    same_bits(qjax.codes(back), m.codes)
    twice = dataclasses.replace(qt, rounding=2 if affine == "OFFSET" else 1)
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(twice))


def test_symmetric_zeros_are_the_middle_code():
    qt = qjax.quantize(jnp.eye(64), bits=2, group_size=32, symmetric=True)
    tensors = quanto.to_tensors(qt)
    assert (np.asarray(tensors[SHIFT]) == 2).all()
    back = quanto.from_tensors(tensors, config_of(2, 64))
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))


def test_matmul():
    data = load(QBITS[1])
    qt = quanto.from_tensors(tensors_of(data), config_of(4, data["in_q"].shape[1]))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    y = qjax.matmul(jnp.asarray(x), qjax.prepare(qt))
    weight = np.asarray(qjax.dequantize(qt, jnp.float32), np.float64)
    expected = x.astype(np.float64) @ weight
    error = np.abs(np.asarray(y) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def small_tensors(**changes) -> dict:
    """4 bits, k = 64, n = 3, group 32; ``changes`` of None leave a tensor out."""
    tensors = {
        DATA: np.zeros((3, 32), np.uint8),
        SCALE: np.ones((6, 1), np.float16),
        SHIFT: np.ones((6, 1), np.uint8),
    } | {f"weight.{name}": array for name, array in changes.items()}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize(
    "shift", [np.ones((6, 1), dtype) for dtype in (np.uint8, np.int8, np.float16)]
)
def test_check_accepts(shift):
    qt = quanto.from_tensors(small_tensors(_shift=shift), config_of(4, 64))
    integer = shift.dtype != np.float16
    assert qt.affine is (tensor.Affine.ZERO if integer else tensor.Affine.OFFSET)
    assert qt.zero.dtype == (jnp.uint8 if integer else jnp.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_shift": None}, "weight._shift is missing; found ['weight._data._data'"),
        ({"_zero": np.zeros((6, 1))}, "weight._zero is no tensor of quanto"),
        (
            {"_scale": np.ones(6, np.float16)},
            "weight._scale.shape=(6,) must have 2 axes",
        ),
        (
            {"_data._data": np.zeros((3, 32), np.int8)},
            "weight._data._data.dtype=int8 must be uint8",
        ),
        (
            {"_scale": np.ones((6, 1))},
            "weight._scale.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        (
            {"_shift": np.ones((6, 1), np.float32)},
            "weight._shift.dtype=float32 must be uint8 or int8 or float16, that",
        ),
        (
            {"_data._data": np.zeros((3, 48), np.uint8)},
            "weight._data._data.shape=(3, 48) must be [slab, g], g a divisor of k=64, "
            "with 2 slabs for the 6 rows of weight._scale, a multiple of k / g",
        ),
        (
            {"_data._data": np.zeros((4, 32), np.uint8)},
            "weight._data._data.shape=(4, 32) must be [slab, g]",
        ),
        (
            {
                "_scale": np.ones((5, 1), np.float16),
                "_shift": np.ones((5, 1), np.float16),
            },
            "2 slabs for the 5 rows of weight._scale",
        ),
        (
            {"_shift": np.ones((3, 1), np.uint8)},
            "weight._shift.shape=(3, 1) must be (6, 1)",
        ),
        (
            {"_scale": np.ones((6, 2), np.float16)},
            "weight._scale.shape=(6, 2) must be (6, 1)",
        ),
        (
            {"_scale": np.full((6, 1), np.nan, np.float16)},
            "weight._scale must be finite",
        ),
        (
            {"_shift": np.full((6, 1), np.inf, np.float16)},
            "weight._shift must be finite",
        ),
        (
            {"_shift": np.full((6, 1), 16, np.uint8)},
            "weight._shift from 16 to 16 must lie in 0 to 15",
        ),
        (
            {"_shift": np.full((6, 1), -1, np.int8)},
            "weight._shift from -1 to -1 must lie in 0 to 15",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    with refuses(message):
        quanto.from_tensors(small_tensors(**changes), config_of(4, 64))


def test_check_refuses_other_widths(refuses):
    with refuses("config.weights='qint3' must be one of ('qint2', 'qint4', 'qint8'"):
        quanto.check(small_tensors(), config_of(3, 64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 3}, "3 bits are not among (2, 4, 8)"),
        ({"bits": 8}, "(q - z) * s is not symmetric, as its 8 bits are"),
        ({"float_zero": True}, "has neither integer zeros nor shift"),
        ({"affine": "CODEBOOK"}, "has neither integer zeros nor shift"),
        ({"affine": "CENTERED", "float_zero": True}, "has neither integer zeros nor"),
        ({"grouping": "STRIDED"}, "it has strided groups"),
        ({"row_group": True}, "its groups are not runs of inputs"),
        ({"group_size": 48}, "group_size=48 does not divide k=64"),
        ({"columns": 1}, "columns share scales or zeros"),
    ],
)
def test_to_tensors_refuses(changes, reason, refuses, as_qtensor):
    with refuses(reason):
        quanto.to_tensors(as_qtensor(oracle.random(0, 64, 8, **changes)))
