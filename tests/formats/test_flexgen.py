"""FlexGen groups against what optimum-graphcore wrote, bit for bit."""

import collections
import dataclasses
import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import flexgen
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("flexgen")
CODECS = [name for name in FILES if name.startswith("flexgen_codec")]
GROUPS = [name for name in FILES if name.startswith("flexgen_group")]
ULP = 2.0**-24  # the smallest float16


def compressed_of(data: dict) -> tuple:
    return data["packed"], data["packed_scale"], data["packed_bias"]


def words_of(codes):
    """Words of a sequence of codes, element by element, from the specification."""
    words = np.zeros(len(codes) // 4, np.int64)
    for e, code in enumerate(codes):
        words[4 * (e // 16) + e % 4] |= int(code) << 4 * (e // 4 % 4)
    return words.astype(np.uint16)


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {"flexgen_codec": 3, "flexgen_group": 8}


@pytest.mark.parametrize("name", CODECS)
def test_codec(name):
    data = load(name)
    words = flexgen.encode_int4(jnp.asarray(data["in_q"]))
    assert words.dtype == jnp.uint16
    chex.assert_trees_all_equal(np.asarray(words).view(np.int16), data["packed"])
    codes = flexgen.decode_int4(jnp.asarray(data["packed"]))
    chex.assert_trees_all_equal(np.asarray(codes), data["in_q"])
    # The original decodes to float16.
    chex.assert_trees_all_equal(np.asarray(codes, np.float16), data["out_decoded"])


@pytest.mark.parametrize("name", GROUPS)
def test_compresses(name):
    data = load(name)
    found = flexgen.group_quantize_compress(
        jnp.asarray(data["in_w"]), data["config"]["group_size"]
    )
    # In the file of constant groups too: the original's 0/0 came out as codes of 0.
    same_bits(found, compressed_of(data))


@pytest.mark.parametrize("name", GROUPS)
def test_decompresses(name):
    data = load(name)
    weight = flexgen.group_quantize_decompress(*map(jnp.asarray, compressed_of(data)))
    same_bits(weight, data["out_dequant"])


@pytest.mark.parametrize("name", GROUPS)
def test_reads_and_writes(name):
    data = load(name)
    qt = flexgen.from_compressed(*compressed_of(data))
    assert qt.shape == data["in_w"].T.shape
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)).T, data["out_q"])
    same_bits(qjax.dequantize(qt).T, data["out_dequant"])
    prepared = qjax.prepare(qt)
    assert prepared.layout != qt.layout
    for one in (qt, prepared, qjax.relayout(prepared, qt.layout)):
        same_bits(flexgen.to_compressed(one), compressed_of(data))


def test_constant_groups_are_in_a_golden_file():
    data = load("flexgen_group__g16_float16_const__4x64__s530")
    constant = data["packed_scale"][:, :, 0] == 0
    assert constant.any()
    groups = data["in_w"].reshape(4, 4, 16)[constant]
    back = data["out_dequant"].reshape(4, 4, 16)[constant]
    assert (groups == back).all()
    assert not data["out_q"].reshape(4, 4, 16)[constant].any()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 15, 16, 22, 23, 37, 38, 52, 1000])
def test_tiny_ranges(steps):
    # The original divides by zero up to 7 steps, and asserts at 22 and 37.
    w = np.linspace(0, steps, 16).round() * ULP - 3 * ULP
    w = w.astype(np.float16)[None]
    _, scale, _ = compressed = flexgen.group_quantize_compress(jnp.asarray(w), 16)
    step = float(scale[0, 0, 0])
    assert step > 0
    assert steps * ULP <= 15.5 * step  # the largest element has a code
    assert step <= max(ULP, steps / 15 * ULP + ULP)
    back = np.asarray(flexgen.group_quantize_decompress(*compressed))
    error = np.abs(back.astype(np.float64) - w)
    assert error.max() <= 0.5 * step
    assert (steps > 15) or not error.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_huge_ranges(dtype):
    w = np.linspace(-65000, 65000, 32).astype(dtype)[None]
    packed, scale, bias = flexgen.group_quantize_compress(jnp.asarray(w), 32)
    assert np.isfinite(np.asarray(scale)).all()
    back = np.asarray(flexgen.group_quantize_decompress(packed, scale, bias))
    # Half a step, and the rounding of the scale 15 times, and that of the sum.
    assert np.abs(back.astype(np.float64) - w).max() <= 0.51 * 130000 / 15
    qt = flexgen.from_compressed(packed, scale, bias)
    assert np.isfinite(np.asarray(qjax.dequantize(qt, jnp.float32))).all()
    once = qjax.dequantize(dataclasses.replace(qt, rounding=1))
    assert np.abs(np.asarray(once, np.float64).T - w).max() <= 0.51 * 130000 / 15
    # The original's two roundings overflow in float16, where the product does.
    finite = np.isfinite(np.asarray(qjax.dequantize(qt)))
    assert finite.all() == (dtype == np.float32)


@pytest.mark.parametrize("value", [0.0, -1.5, 65504.0, ULP])
def test_constant_groups(value):
    w = jnp.full((2, 32), value, jnp.float16)
    packed, scale, _ = compressed = flexgen.group_quantize_compress(w, 16)
    assert not np.asarray(scale).any()
    assert not np.asarray(packed).any()
    chex.assert_trees_all_equal(flexgen.group_quantize_decompress(*compressed), w)


def test_float32_elements_below_the_rounded_minimum():
    # 0.1 rounded to float16 lies below 0.1; its double here above. No code wraps.
    w = np.float32(0.10003) + np.arange(16, dtype=np.float32)[None] * np.float32(1e-6)
    compressed = flexgen.group_quantize_compress(jnp.asarray(w), 16)
    back = np.asarray(flexgen.group_quantize_decompress(*compressed))
    assert np.abs(back - w).max() <= 2.0**-14  # one step of float16 at 0.1
    assert float(compressed[2][0, 0, 0]) == np.float16(w.min())


def test_matmul():
    data = load("flexgen_group__g64_float16__8x256__s511")
    qt = qjax.prepare(flexgen.from_compressed(*compressed_of(data)))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
    y = qjax.matmul(jnp.asarray(x), qt)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@hypothesis.given(
    quarter=st.integers(1, 9), groups=st.integers(1, 4), blocks=st.integers(1, 2)
)
@hypothesis.settings(deadline=None, max_examples=8)
def test_round_trips(quarter, groups, blocks):
    size, n = 4 * quarter, 4 * blocks
    codes = np.random.default_rng(size).integers(0, 16, (size * groups, n), np.uint8)
    layout = flexgen.Blocks(size)
    words = layout.pack(jnp.asarray(codes), 4)
    assert words.shape == (n, groups, quarter)
    chex.assert_trees_all_equal(
        np.asarray(words).reshape(-1), words_of(codes.T.reshape(-1))
    )
    assert layout.extents(words.shape, 4) == codes.shape
    chex.assert_trees_all_equal(np.asarray(layout.unpack(words, 4)), codes)


def test_jit_vmap_and_signed_words():
    layout = flexgen.Blocks(8)
    codes = np.random.default_rng(0).integers(0, 16, (2, 16, 4)).astype(np.int32)
    words = jax.jit(jax.vmap(functools.partial(layout.pack, bits=4)))(codes)
    chex.assert_trees_all_equal(words[1], layout.pack(jnp.asarray(codes[1]), 4))
    signed = jax.lax.bitcast_convert_type(words, jnp.int16)
    assert (signed < 0).any()
    unpacked = jax.jit(jax.vmap(functools.partial(layout.unpack, bits=4)))(signed)
    chex.assert_trees_all_equal(np.asarray(unpacked), codes.astype(np.uint8))


def test_compress_in_jit():
    data = load("flexgen_group__g16_float16__4x64__s510")
    compress = jax.jit(flexgen.group_quantize_compress, static_argnums=1)
    found = compress(jnp.asarray(data["in_w"]), 16)
    same_bits(found, compressed_of(data))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: flexgen.encode_int4(jnp.zeros(24, jnp.uint8)),
            "codes.size=24 must be a multiple of 16",
        ),
        (
            lambda: flexgen.decode_int4(jnp.zeros(6, jnp.int16)),
            "words.size=6 must be a multiple of 4",
        ),
        (
            lambda: flexgen.decode_int4(jnp.zeros(4, jnp.int32)),
            "words.dtype=int32 must be int16 or uint16",
        ),
        (
            lambda: flexgen.Blocks(8).pack(jnp.zeros((8, 2), jnp.uint8), 3),
            "bits=3 must be 4",
        ),
        (
            lambda: flexgen.Blocks(8).pack(jnp.zeros((12, 4), jnp.uint8), 4),
            "group_size=8 must be a multiple of 4 that divides codes.shape[0]=12",
        ),
        (
            lambda: flexgen.Blocks(8).unpack(jnp.zeros((2, 2, 4), jnp.uint16), 4),
            "words.shape=(2, 2, 4) must be [n, k / 8, 8 / 4]",
        ),
        (
            lambda: flexgen.group_quantize_compress(
                jnp.zeros((4, 64), jnp.bfloat16), 16
            ),
            "weight must be float16 or float32 [n, k]; got bfloat16(4, 64); cast it",
        ),
        (
            lambda: flexgen.group_quantize_compress(jnp.zeros(64), 16),
            "weight must be float16 or float32 [n, k]; got float32(64,)",
        ),
        (
            lambda: flexgen.group_quantize_compress(jnp.zeros((4, 64)), 6),
            "group_size=6 must be a multiple of 4",
        ),
        (
            lambda: flexgen.group_quantize_compress(jnp.zeros((4, 64)), 0),
            "group_size=0 must be a multiple of 4",
        ),
        (
            lambda: flexgen.group_quantize_compress(jnp.zeros((1, 8)), 8),
            "codes.size=8 must be a multiple of 16; pad the weight",
        ),
    ],
)
def test_refuses(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": np.zeros((4, 4, 4), np.int32)}, "packed.dtype=int32 must be int16"),
        (
            {"packed": np.zeros((4, 16), np.int16)},
            "packed.shape=(4, 16) must have 3 axes",
        ),
        (
            {"scale": np.zeros((4, 4), np.float16)},
            "scale.shape=(4, 4) must be (4, 4, 1), from packed.shape=(4, 4, 4)",
        ),
        ({"bias": np.zeros((4, 1, 1), np.float16)}, "bias.shape=(4, 1, 1) must be"),
        ({"scale": np.zeros((4, 4, 1))}, "scale.dtype=float64 must be float16"),
        (
            {"bias": np.zeros((4, 4, 1), np.float32)},
            "bias.dtype=float32 must be float16 or float32, the same for scale and",
        ),
        (
            {"scale": np.full((4, 4, 1), np.inf, np.float16)},
            "scale must be finite; found NaN or infinity",
        ),
        ({"bias": np.full((4, 4, 1), np.nan, np.float16)}, "bias must be finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message, refuses):
    arrays = {
        "packed": np.zeros((4, 4, 4), np.int16),
        "scale": np.ones((4, 4, 1), np.float16),
        "bias": np.ones((4, 4, 1), np.float16),
    }
    with jax.enable_x64(True), refuses(message):
        flexgen.from_compressed(**arrays | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"order": True}, "its groups are not runs of inputs (act-order); GPTQ holds"),
        ({"row_group": True}, "its groups are not runs of inputs (act-order)"),
        ({"input_scale": True}, "it has an input_scale"),
        ({"affine": "ZERO"}, "(q - z) * s is no multiple of the scale plus a bias"),
        ({"columns": 1}, "columns share scales or zeros"),
        ({"grouping": "FLAT"}, "it has flat groups"),
        ({"bits": 3}, "3 bits are not among (4,); compressed-tensors holds 1 to 8"),
        ({"parts": [(4, 32, 32), (2, 32, 32)]}, "its rows have several widths; EXL2"),
        ({"group_size": 48}, "group_size=48 does not divide k=64; GPTQ holds a short"),
        ({"dtype": jnp.bfloat16}, "bfloat16 scales; only float16 and float32 are held"),
    ],
)
def test_writing_refuses(changes, reason, refuses, as_qtensor):
    matrix = oracle.random(0, 64, 32, **{"affine": "OFFSET"} | changes)
    with refuses(reason):
        flexgen.to_compressed(as_qtensor(matrix))


def test_writing_refuses_stacks(refuses):
    data = load("flexgen_group__g16_float16__4x64__s510")
    qt = flexgen.from_compressed(*compressed_of(data))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), qt)
    assert stack.shape == (2, 64, 4)
    chex.assert_trees_all_equal(qjax.dequantize(stack)[1], qjax.dequantize(qt))
    with refuses("it stacks (2,) matrices; write them one by one"):
        flexgen.to_compressed(stack)
