"""Codes and weights to the last bit, and from one layout to another."""

import dataclasses
import typing
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import decode, tensor
from qjax.formats import gptq
from tests import oracle

FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# The map in float32 takes a subtraction, a product and a sum, each rounded once; the
# input scale is one more product. Relative to the largest weight.
FLOAT32 = 4 * 2.0**-24

# Every affine map, grouping and optional leaf, on small matrices.
KINDS = {
    "zero": {},
    "float zero": {"float_zero": True},
    "offset": {"affine": "OFFSET"},
    "centered": {"affine": "CENTERED"},
    "centered and zero": {"affine": "CENTERED", "float_zero": True},
    "codebook": {"affine": "CODEBOOK"},
    "floats of 8 bits": {"affine": "FLOAT", "bits": 8},
    "floats of 4 bits": {"affine": "FLOAT", "group_size": 16},
    "one group a column": {"group_size": None},
    "short last group": {"group_size": 48},
    "group larger than k": {"group_size": 128},
    "one column of scales": {"columns": 1},
    "columns share scales": {"columns": 10},
    "flat": {"grouping": "FLAT"},
    "flat groups across columns": {"grouping": "FLAT", "group_size": 48},
    "flat, short last group": {"grouping": "FLAT", "group_size": 100},
    "flat, one group": {"grouping": "FLAT", "group_size": None},
    "strided": {"grouping": "STRIDED"},
    "strided, short": {"grouping": "STRIDED", "group_size": 100, "affine": "OFFSET"},
    "order": {"order": True},
    "input scale": {"input_scale": True},
    "order and input scale": {"order": True, "input_scale": True, "float_zero": True},
    "row_group": {"row_group": True},
    "row_group and order": {"row_group": True, "order": True},
    "mixed": {
        "parts": [(8, 8, 8), (6, 16, 8), (3, 32, 16), (2, 32, None)],
        "affine": "CENTERED",
    },
    "mixed, order": {
        "parts": [(4, 32, 32), (5, 32, 12)],
        "affine": "OFFSET",
        "order": True,
        "input_scale": True,
    },
    "mixed codebook": {"parts": [(4, 32, 32), (2, 32, 32)], "affine": "CODEBOOK"},
}


def sample(seed=0, k=64, n=40, **changes) -> oracle.Matrix:
    k = sum(part[1] for part in changes["parts"]) if "parts" in changes else k
    return oracle.random(seed, k, n, **changes)


def assert_close(found, expected, tolerance=FLOAT32):
    """Relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    found = np.asarray(found).astype(np.float64)
    chex.assert_trees_all_close(
        found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_formula(kind, as_qtensor):
    m = sample(**KINDS[kind])
    w = as_qtensor(m)
    assert w.shape == m.codes.shape
    chex.assert_trees_all_equal(np.asarray(qjax.codes(w)), m.codes)
    weight = qjax.dequantize(w)
    assert weight.dtype == jnp.float32
    assert_close(weight, m.weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("affine", ["ZERO", "CENTERED", "CODEBOOK"])
def test_every_width(bits, affine, as_qtensor):
    m = sample(bits=bits, affine=affine, n=8)
    assert_close(qjax.dequantize(as_qtensor(m)), m.weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", [None, *FLOATS])
def test_dtypes_of_dequantize(dtype, target, as_qtensor):
    w = as_qtensor(sample(dtype=FLOATS[dtype], order=True))
    assert w.dtype == dtype
    wide, narrow = qjax.dequantize(w, jnp.float32), qjax.dequantize(w, target)
    assert narrow.dtype == (target or dtype)
    # With integer zeros the difference is exact, and so is its product with a scale of
    # 16 bits: all that is left is one rounding.
    chex.assert_trees_all_equal(narrow, wide.astype(narrow.dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_rounded_to_once(dtype, as_qtensor):
    # In the scale's own dtype the weight is rounded before the input scale; in another
    # one only after it.
    m = sample(dtype=FLOATS[dtype], input_scale=True)
    w = as_qtensor(m)
    other = jnp.bfloat16 if dtype == "float16" else jnp.float16
    wide = qjax.dequantize(w, jnp.float32)
    assert_close(wide, m.weight)
    chex.assert_trees_all_equal(qjax.dequantize(w, other), wide.astype(other))


class TestRounding:
    """In 16 bits: the exact value rounded once, or as often as the upstream does.

    All 256 codes meet scales and zeros chosen to be hard: products that end in a tie,
    zeros that are tiny against them, that cancel them, that are subnormal.
    """

    def scales_and_zeros(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        precision, lowest = oracle.FLOATS[dtype]
        # Odd mantissas of full length make long products. Below 4/3 of a power of two,
        # three times one has one bit more than fits, and lies on a tie.
        full = 2**precision
        odd = np.array([full // 2 + full // 8 + 1, full * 13 // 16 + 1, full - 1])
        unit = odd / (full // 2)  # in [1, 2)
        tiny = [2.0**lowest, 2.0 ** (lowest // 2), 2.0 ** (1 - 3 * precision)]
        pairs = [(s, sign * z) for s in unit for z in tiny for sign in (1, -1)]
        pairs += [(s, -s * c) for s in unit for c in (1, 7.3, 128, 254.9)]
        pairs += [(s, s * c) for s in unit for c in (-0.49, 0.003, 0.5, 1000)]
        if dtype == "float16":  # XLA flushes those of bfloat16, see the test below
            least = 2.0 ** (lowest - precision + 1)
            pairs += [
                (least * a, least * b) for a in (1, 3, 1001) for b in (-501, 0, 7)
            ]
            pairs += [(s, sign * least) for s in unit for sign in (1, -1)]
        pairs = np.array(pairs).astype(FLOATS[dtype])
        return pairs[:, 0], pairs[:, 1]

    def dequantized(self, affine: str, rounding: int, s, z) -> np.ndarray:
        codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], s.size, axis=1)
        w = tensor.build(
            [jnp.asarray(oracle.pack(codes, 8))],
            jnp.asarray(s)[None],
            jnp.asarray(z)[None],
            layout=gptq.Stream(),
            segments=[tensor.Segment(8, None)],
            affine=tensor.Affine[affine],
            rounding=rounding,
        )
        return np.asarray(qjax.dequantize(w)).astype(np.float64)

    @pytest.mark.parametrize("rounding", [1, 2])
    @pytest.mark.parametrize("affine", ["OFFSET", "CENTERED"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_sum_of_product_and_zero(self, dtype, affine, rounding):
        s, z = self.scales_and_zeros(dtype)
        centre = 128 if affine == "CENTERED" else 0
        expected = np.zeros((256, s.size))
        for (q, j), _ in np.ndenumerate(expected):
            product = (q - centre) * Fraction(float(s[j]))
            if rounding == 2:
                product = Fraction(oracle.nearest(product, dtype))
            expected[q, j] = oracle.nearest(product + Fraction(float(z[j])), dtype)
        found = self.dequantized(affine, rounding, s, z)
        chex.assert_trees_all_equal(found, expected)
        # The cases are hard: the other rounding, and float32 rounded once more, fail.
        assert (self.dequantized(affine, 3 - rounding, s, z) != expected).any()
        c, wide = np.arange(256.0)[:, None] - centre, s.astype(np.float64)
        through_float32 = (c * wide + z.astype(np.float64)).astype(np.float32)
        assert (through_float32.astype(s.dtype).astype(np.float64) != expected).any()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_difference_times_scale(self, dtype):
        s, _ = self.scales_and_zeros(dtype)
        z = np.linspace(0, 255, s.size).astype(np.uint8)
        expected = np.zeros((256, s.size))
        for (q, j), _ in np.ndenumerate(expected):
            exact = (q - int(z[j])) * Fraction(float(s[j]))
            expected[q, j] = oracle.nearest(exact, dtype)
        for rounding in (1, 2):  # the difference of integers is exact
            found = self.dequantized("ZERO", rounding, s, z)
            chex.assert_trees_all_equal(found, expected)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_difference_from_a_float_zero_rounds_twice(self, dtype):
        s, z = self.scales_and_zeros(dtype)
        expected = np.zeros((256, s.size))
        for (q, j), _ in np.ndenumerate(expected):
            difference = oracle.nearest(q - Fraction(float(z[j])), dtype)
            exact = Fraction(difference) * Fraction(float(s[j]))
            expected[q, j] = oracle.nearest(exact, dtype)
        found = self.dequantized("ZERO", 2, s, z)
        chex.assert_trees_all_equal(found, expected)
        assert (self.dequantized("ZERO", 1, s, z) != expected).any()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_codebook(self, dtype):
        s, _ = self.scales_and_zeros(dtype)
        entries = np.random.default_rng(1).normal(size=256).astype(FLOATS[dtype])
        codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], s.size, axis=1)
        w = tensor.build(
            [jnp.asarray(oracle.pack(codes, 8))],
            jnp.asarray(s)[None],
            layout=gptq.Stream(),
            segments=[tensor.Segment(8, None)],
            affine=tensor.Affine.CODEBOOK,
            codebook=jnp.asarray(entries),
        )
        expected = np.zeros((256, s.size))
        for (q, j), _ in np.ndenumerate(expected):
            exact = Fraction(float(entries[q])) * Fraction(float(s[j]))
            expected[q, j] = oracle.nearest(exact, dtype)
        found = np.asarray(qjax.dequantize(w)).astype(np.float64)
        chex.assert_trees_all_equal(found, expected)

    @pytest.mark.parametrize("affine", ["OFFSET", "CENTERED"])
    def test_float32_of_16_bits_is_rounded_once(self, affine, as_qtensor):
        m = sample(bits=8, dtype=np.float16, affine=affine, float_zero=True)
        # The weight is exact in float64, product and sum.
        chex.assert_trees_all_equal(
            np.asarray(qjax.dequantize(as_qtensor(m), jnp.float32)),
            m.weight.astype(np.float32),
        )

    def test_float32_scales(self, as_qtensor):
        m = sample(bits=8)
        chex.assert_trees_all_equal(  # exact in float64, rounded once
            np.asarray(qjax.dequantize(as_qtensor(m))), m.weight.astype(np.float32)
        )

    @pytest.mark.parametrize("affine", ["OFFSET", "CENTERED"])
    def test_two_roundings_in_float32(self, affine):
        rng = np.random.default_rng(0)
        s, z = rng.normal(size=(2, 40)).astype(np.float32)
        c = np.arange(256, dtype=np.float32)[:, None]
        c -= 128 if affine == "CENTERED" else 0
        found = self.dequantized(affine, 2, s, z)
        chex.assert_trees_all_equal(found, (c * s + z).astype(np.float64))
        # One operation for the product and the sum would differ.
        fused = (c.astype(np.float64) * s + z).astype(np.float32)
        assert (fused != found).any()

    def test_rounded_keeps_every_number(self):
        x = jnp.float32([0.0, -0.0, 1 / 3, -65520, jnp.inf, -jnp.inf, jnp.nan, 1e-8])
        for dtype in FLOATS.values():
            wanted = x.astype(dtype).astype(jnp.float32)
            chex.assert_trees_all_equal(decode.rounded(x, dtype), wanted)
            found = jax.jit(decode.rounded, static_argnums=1)(x, np.dtype(dtype))
            chex.assert_trees_all_equal(found, wanted)
        assert jnp.signbit(decode.rounded(x, jnp.float16)[1])

    def test_subnormal_bfloat16_is_exact_or_flushed(self):
        # XLA's CPU code takes float32 below 2**-126 for 0, and bfloat16 reaches as low.
        s = np.array([2.0**-130, 2.0**-126, 3 * 2.0**-127]).astype(ml_dtypes.bfloat16)
        z = np.array([2.0**-120, -(2.0**-125), 2.0**-133]).astype(ml_dtypes.bfloat16)
        exact = np.arange(256.0)[:, None] * s.astype(np.float64) + z.astype(np.float64)
        found = self.dequantized("OFFSET", 1, s, z)
        flushed = 255 * 2.0**-130 + 2.0**-133 + 2.0**-127
        chex.assert_trees_all_close(found, exact, rtol=2.0**-8, atol=flushed)


@dataclasses.dataclass(frozen=True)
class Tiles16(tensor.Layout):
    """A layout that pads: one byte a code, tiles of 16 x 16, for these tests."""

    rank: typing.ClassVar[int] = 3

    def pack(self, codes, bits):
        if bits == 1:
            raise ValueError("tiles do not hold 1 bit.")
        k, n = codes.shape
        padded = jnp.pad(codes, ((0, -k % 16), (0, -n % 16)), constant_values=99)
        tiles = padded.reshape(-(-k // 16), 16, -(-n // 16), 16)
        return tiles.transpose(0, 2, 1, 3).reshape(-(-k // 16), -(-n // 16), 256)

    def unpack(self, words, bits):
        tiles = words.reshape(*words.shape[:2], 16, 16).transpose(0, 2, 1, 3)
        return tiles.reshape(words.shape[0] * 16, words.shape[1] * 16)

    def extents(self, shape, bits):
        return shape[0] * 16, shape[1] * 16


class TestRelayout:
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_stream_to_planes_and_back(self, bits, as_qtensor):
        m = sample(bits=bits, n=16)
        stream = as_qtensor(m)
        planes = qjax.relayout(stream, gptq.Planar())
        assert planes.layout == gptq.Planar()
        chex.assert_trees_all_equal(
            np.asarray(planes.words[0]), oracle.pack_planes(m.codes, bits)
        )
        chex.assert_trees_all_equal(planes.scale, stream.scale)
        back = qjax.relayout(planes, gptq.Stream())
        chex.assert_trees_all_equal(back, stream)
        assert back.segments == stream.segments

    def test_same_layout_is_the_same_tensor(self, as_qtensor):
        w = as_qtensor(sample())
        assert qjax.relayout(w, gptq.Stream()) is w

    def test_stacks(self):
        weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64, 16)))
        stack = qjax.quantize(weights.astype(jnp.float32), bits=3, group_size=32)
        planes = qjax.relayout(stack, gptq.Planar())
        assert planes.shape == stack.shape
        chex.assert_trees_all_equal(qjax.codes(planes), qjax.codes(stack))
        chex.assert_trees_all_equal(qjax.relayout(planes, gptq.Stream()), stack)

    def test_all_leaves_move_along(self, as_qtensor):
        m = sample(**KINDS["mixed, order"])
        w = as_qtensor(m)
        planes = qjax.relayout(w, gptq.Planar())
        assert planes.segments == w.segments
        chex.assert_trees_all_equal(qjax.codes(planes), qjax.codes(w))
        chex.assert_trees_all_equal(qjax.dequantize(planes), qjax.dequantize(w))

    @pytest.mark.parametrize("kind", ["zero", "mixed", "row_group and order"])
    def test_padding_layout(self, kind, as_qtensor):
        m = sample(**KINDS[kind])
        w = as_qtensor(m)
        tiles = qjax.relayout(w, Tiles16())
        assert tiles.shape == w.shape
        assert (tiles.rows, tiles.padding) == (w.rows, 8)
        chex.assert_trees_all_equal(np.asarray(qjax.codes(tiles)), m.codes)
        chex.assert_trees_all_equal(qjax.dequantize(tiles), qjax.dequantize(w))
        assert repr(tiles).startswith("QTensor(")
        chex.assert_trees_all_equal(qjax.relayout(tiles, gptq.Stream()), w)

    def test_stacks_in_a_padding_layout(self):
        stack = qjax.quantize(jnp.ones((3, 40, 24)), bits=4, group_size=8)
        tiles = qjax.relayout(stack, Tiles16())
        assert (tiles.shape, tiles.rows) == ((3, 40, 24), (40,))
        chex.assert_trees_all_equal(qjax.codes(tiles), qjax.codes(stack))
        chex.assert_trees_all_equal(qjax.relayout(tiles, gptq.Stream()), stack)

    def test_refuses_with_the_layouts_reason(self, as_qtensor, refuses):
        w = as_qtensor(sample(k=48, bits=6, group_size=16))
        with refuses("codes.shape[0]=48 must be a multiple of 32 for planes of 6-bit"):
            qjax.relayout(w, gptq.Planar())
        with refuses("tiles do not hold 1 bit"):
            qjax.relayout(as_qtensor(sample(bits=1)), Tiles16())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Indices(tensor.Encoded):
    """Scales as a file might hold them: bytes, and a step for each group."""

    index: jax.Array
    step: jax.Array

    def decode(self):
        return self.index.astype(self.step.dtype) * self.step[..., None]


class TestEncoded:
    @pytest.fixture
    def pair(self) -> tuple[qjax.QTensor, qjax.QTensor]:
        """The same tensor with its scale encoded, and plain."""
        rng = np.random.default_rng(0)
        index = jnp.asarray(rng.integers(1, 200, (2, 40)), jnp.uint8)
        scale = Indices(index, jnp.asarray([2.0**-12, 2.0**-11], jnp.float16))
        zero = Indices(index, jnp.asarray([0.0625, 0.125], jnp.float16))
        words = [jnp.asarray(oracle.pack(sample().codes, 4))]
        given = {"layout": gptq.Stream(), "segments": [tensor.Segment(4, 32)]}
        return (
            tensor.build(words, scale, zero, **given),
            tensor.build(words, scale.decode(), zero.decode(), **given),
        )

    def test_means_what_it_decodes_to(self, pair):
        encoded, plain = pair
        assert (encoded.dtype, encoded.scale.shape) == (jnp.float16, (2, 40))
        assert encoded.nbytes == 8 * 40 * 4 + 2 * (80 + 4)
        assert "float16 scale" in repr(encoded)
        chex.assert_trees_all_equal(qjax.dequantize(encoded), qjax.dequantize(plain))

    def test_stays_encoded_in_another_layout(self, pair):
        encoded, _ = pair
        moved = qjax.relayout(encoded, gptq.Planar())
        chex.assert_trees_all_equal(moved.scale, encoded.scale)

    def test_stacks(self, pair):
        encoded, plain = pair
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), encoded)
        weight = qjax.dequantize(plain)
        chex.assert_trees_all_equal(qjax.dequantize(stack), jnp.stack([weight, weight]))

    def test_prepare_decodes(self, pair):
        encoded, plain = pair
        chex.assert_trees_all_equal(qjax.prepare(encoded), qjax.prepare(plain))

    def test_misfits_are_refused(self, pair, refuses):
        _, plain = pair
        scale = Indices(jnp.zeros((2, 3), jnp.uint8), jnp.ones(2))
        with refuses("scale.shape[-1]=3 must be n=40"):
            tensor.build(
                plain.words, scale, layout=plain.layout, segments=plain.segments
            )
