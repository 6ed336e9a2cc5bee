"""`QTensor`: its formula to the last bit, and its life as a pytree."""

import dataclasses
import typing
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import Mesh, PartitionSpec

import qjax
from qjax import tensor
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
    # Integer zeros: the difference is exact, and its product with a scale of 16 bits too,
    # so that all that is left is one rounding.
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
        rng = np.random.default_rng(0)
        # Odd mantissas of full length make long products.
        odd = rng.integers(2 ** (precision - 2), 2 ** (precision - 1), 6) * 2 + 1
        unit = odd * 2.0 ** (1 - precision)  # in [1, 2)
        tiny = [2.0**lowest, 2.0 ** (lowest // 2), 2.0 ** (1 - 3 * precision)]
        pairs = [(s, sign * z) for s in unit for z in tiny for sign in (1, -1)]
        pairs += [(s, -s * c) for s in unit for c in (1, 7.3, 128, 254.9)]
        pairs += [(s, s * c) for s in unit for c in (-0.49, 0.003, 0.5, 1000)]
        if dtype == "float16":  # XLA flushes those of bfloat16, see the test below
            least = 2.0 ** (lowest - precision + 1)
            pairs += [
                (least * a, least * b) for a in (1, 3, 1001) for b in (-501, 0, 7)
            ]
            pairs += [(s, least) for s in unit]
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

    def test_subnormal_bfloat16_is_exact_or_flushed(self):
        # XLA's CPU code takes float32 below 2**-126 for 0, and bfloat16 reaches as low.
        s = np.array([2.0**-130, 2.0**-126, 3 * 2.0**-127]).astype(ml_dtypes.bfloat16)
        z = np.array([2.0**-120, -(2.0**-125), 2.0**-133]).astype(ml_dtypes.bfloat16)
        exact = np.arange(256.0)[:, None] * s.astype(np.float64) + z.astype(np.float64)
        found = self.dequantized("OFFSET", 1, s, z)
        flushed = 255 * 2.0**-130 + 2.0**-133 + 2.0**-127
        chex.assert_trees_all_close(found, exact, rtol=2.0**-8, atol=flushed)


class TestPytree:
    """JAX takes it apart and puts it together again."""

    @pytest.fixture
    def w(self, as_qtensor) -> qjax.QTensor:
        return as_qtensor(sample(k=64, n=48, order=True, input_scale=True))

    @pytest.fixture
    def stack(self) -> qjax.QTensor:
        weights = np.random.default_rng(0).normal(size=(8, 64, 48))
        return qjax.quantize(jnp.asarray(weights, jnp.float32), group_size=32)

    def test_jit(self, w):
        out = jax.jit(lambda w: w)(w)
        assert jax.tree.structure(out) == jax.tree.structure(w)
        chex.assert_trees_all_equal(out, w)
        assert repr(out) == repr(w)

    def test_metadata_is_static(self, w):
        traces = []

        @jax.jit
        def count(w):
            traces.append(w.segments)
            return w.scale

        count(w)
        count(dataclasses.replace(w, scale=w.scale * 2))
        assert len(traces) == 1
        count(dataclasses.replace(w, rounding=2))
        assert len(traces) == 2

    def test_stacks(self, stack):
        assert (stack.batch, stack.shape, stack.ndim) == ((8,), (8, 64, 48), 3)
        one_by_one = [
            qjax.dequantize(jax.tree.map(lambda leaf, i=i: leaf[i], stack))
            for i in range(8)
        ]
        chex.assert_trees_all_equal(qjax.dequantize(stack), jnp.stack(one_by_one))

    def test_stacks_of_stacks(self, stack):
        deep = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), stack)
        assert deep.shape == (2, 4, 64, 48)
        flat = qjax.dequantize(stack).reshape(2, 4, 64, 48)
        chex.assert_trees_all_equal(qjax.dequantize(deep), flat)
        flat = qjax.codes(stack).reshape(2, 4, 64, 48)
        chex.assert_trees_all_equal(qjax.codes(deep), flat)

    def test_vmap(self, stack):
        shapes = []

        def one(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        chex.assert_trees_all_equal(jax.vmap(one)(stack), qjax.dequantize(stack))
        assert set(shapes) == {(64, 48)}

    def test_scan(self, stack):
        def layer(x, w):
            assert w.shape == (64, 48)
            return x, x @ qjax.dequantize(w)

        x = jnp.ones((1, 64))
        _, found = jax.jit(lambda x, ws: jax.lax.scan(layer, x, ws))(x, stack)
        expected = jnp.einsum("mk,lkn->lmn", x, qjax.dequantize(stack))
        assert_close(found, expected, 1e-6)  # the order of 64 additions

    @pytest.mark.parametrize(
        ("spec", "local"),
        [(PartitionSpec(None, "d"), (64, 6)), (PartitionSpec("d", None), (32, 48))],
    )
    def test_shard_map(self, spec, local):
        # Two groups of 32 rows, 6 columns for each of eight devices.
        devices = jax.devices("cpu")[: 8 if local[1] == 6 else 2]
        w = qjax.quantize(jnp.eye(64, 48), group_size=32)
        shapes = []

        @jax.shard_map(mesh=Mesh(devices, ("d",)), in_specs=(spec,), out_specs=spec)
        def weight(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        chex.assert_trees_all_equal(
            np.asarray(weight(w)), np.asarray(qjax.dequantize(w))
        )
        assert set(shapes) == {local}

    def test_pmap(self, stack):
        shapes = []

        def one(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        weights = jax.pmap(one, devices=jax.devices("cpu"))(stack)
        chex.assert_trees_all_equal(
            np.asarray(weights), np.asarray(qjax.dequantize(stack))
        )
        assert set(shapes) == {(64, 48)}

    def test_eval_shape(self, w):
        out = jax.eval_shape(lambda w: w, w)
        assert isinstance(out, qjax.QTensor)
        assert (out.shape, out.dtype, out.bits) == (w.shape, w.dtype, w.bits)
        dense = jax.eval_shape(qjax.dequantize, out)
        assert (dense.shape, dense.dtype) == (w.shape, jnp.float32)

    @pytest.mark.parametrize(
        ("leaf", "text"),
        [
            (lambda _: "a", "QTensor(('a',), scale='a')"),
            (lambda _: None, "QTensor((None,), scale=None)"),
            (lambda _: PartitionSpec("d"), "scale=P"),
            (
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                "QTensor(64x48, 4 bits",
            ),
            (lambda leaf: leaf.shape, "QTensor(((8, 48),), scale=(2, 48))"),
            (lambda leaf: float(leaf.size), "QTensor((384.0,), scale=96.0)"),
            (lambda leaf: leaf.reshape(-1), "QTensor((Array("),
            (np.asarray, "QTensor(64x48, 4 bits"),
            (lambda leaf: leaf[:0], "QTensor("),
        ],
    )
    def test_leaves_that_are_no_arrays(self, leaf, text, w):
        out = jax.tree.map(leaf, w)
        assert isinstance(out, qjax.QTensor)
        assert text in repr(out)

    def test_no_rows_of_several_widths(self, as_qtensor):
        w = as_qtensor(sample(**KINDS["mixed"]))
        assert repr(jax.tree.map(lambda leaf: leaf[:0], w)).startswith("QTensor(")

    def test_leaves_have_names(self, w):
        paths = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(w)
        ]
        names = [".words[0]", ".scale", ".zero", ".order", ".input_scale"]
        assert paths == names

    def test_donation(self):
        w = qjax.quantize(jnp.eye(64, 48), group_size=32)
        expected = 2 * np.asarray(qjax.dequantize(w))

        @jax.jit
        def double(w):
            return dataclasses.replace(w, scale=w.scale * 2)

        doubled = jax.jit(double, donate_argnums=0)(w)
        assert w.words[0].is_deleted()
        assert w.scale.is_deleted()
        chex.assert_trees_all_equal(np.asarray(qjax.dequantize(doubled)), expected)

    def test_orbax_saves_and_restores(self, w, stack, tmp_path):
        state = {"a": w, "layers": stack, "step": jnp.int32(3)}
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            target = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, state))
            device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=device
                ),
                target,
            )
            restored = checkpointer.restore(tmp_path / "state", target)
        assert not [
            file for file in tmp_path.rglob("*") if "pickle" in file.name.lower()
        ]
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal_dtypes(restored, state)
        for name in ("a", "layers"):
            chex.assert_trees_all_equal(
                qjax.dequantize(restored[name]), qjax.dequantize(state[name])
            )


class TestPrinting:
    def test_plain(self):
        w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
        expected = "QTensor(64x64, 4 bits, group 32, Stream(), (q - z) * s, "
        assert repr(w) == expected + "float32 scale, 2.625 KiB)"

    def test_symmetric_columns(self):
        w = qjax.quantize(
            jnp.zeros((32, 8)), 8, None, symmetric=True, scale_dtype=jnp.bfloat16
        )
        expected = "QTensor(32x8, 8 bits, group column, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, bfloat16 scale, 272 B)"
        assert repr(w) == expected

    def test_act_order_in_planes(self, as_qtensor):
        m = sample(bits=3, n=32, row_group=True, order=True)
        w = as_qtensor(m, gptq.Planar())
        expected = "QTensor(64x32, 3 bits, group 32, Planar(), (q - z) * s, order, "
        assert repr(w) == expected + "row_group, float32 scale, 1.562 KiB)"

    def test_mixed(self, as_qtensor):
        w = as_qtensor(sample(**KINDS["mixed"]))
        assert w.bits == 320 / 88
        expected = "QTensor(88x40, 3.636 bits, group 8,16,column, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, float32 scale, 2.5 KiB)"
        assert repr(w) == expected

    def test_large_stacks(self):
        # Views of one element: nothing is allocated.
        w = tensor.QTensor(
            words=(np.broadcast_to(np.uint32(0), (16, 2048, 16384)),),
            scale=np.broadcast_to(np.float16(1), (16, 128, 16384)),
            layout=gptq.Stream(),
            segments=(tensor.Segment(4, 128),),
            affine=tensor.Affine.CENTERED,
        )
        expected = "QTensor(16x16384x16384, 4 bits, group 128, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, float16 scale, 2.062 GiB)"
        assert repr(w) == expected
        one = jax.tree.map(lambda leaf: leaf[0], w)
        assert repr(one).endswith("float16 scale, 132 MiB)")


ONE = (tensor.Segment(4, 32),)


def leaves(**changes) -> dict[str, typing.Any]:
    """What `tensor.build` takes: 4 bits, k = 64, n = 16, two groups."""
    given = {
        "words": [jnp.zeros((8, 16), jnp.uint32)],
        "scale": jnp.ones((2, 16)),
        "zero": jnp.zeros((2, 16), jnp.uint8),
        "layout": gptq.Stream(),
        "segments": ONE,
    }
    return given | changes


CODEBOOK = {"affine": tensor.Affine.CODEBOOK, "zero": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": jnp.ones((2, 1))},
        {"scale": jnp.ones((2, 4)), "zero": jnp.zeros((2, 1), jnp.uint8)},
        {"zero": jnp.zeros((2, 16))},
        {"zero": None, "affine": tensor.Affine.CENTERED},
        {**CODEBOOK, "codebook": jnp.zeros(16)},
        {"row_group": jnp.zeros(64, jnp.int32), "order": jnp.zeros(64, jnp.int32)},
        {"input_scale": jnp.ones(64)},
        {
            "words": [jnp.zeros((3, 8, 16), jnp.uint32)],
            "scale": jnp.ones((3, 2, 16)),
            "zero": jnp.zeros((3, 2, 16), jnp.uint8),
            "order": jnp.zeros((3, 64), jnp.int32),
        },
    ],
)
def test_build_accepts(changes):
    w = tensor.build(**leaves(**changes))
    assert w.shape[-2:] == (64, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": []}, "words has 0 arrays for 1 segments; pass one each"),
        ({"segments": ONE * 2}, "words has 1 arrays for 2 segments"),
        (
            {"segments": [tensor.Segment(9, 32)]},
            "bits=9 must be an integer from 1 to 8",
        ),
        (
            {"segments": [tensor.Segment(4, 0)]},
            "Segment(bits=4, group_size=0, padding=0): group_size must be positive",
        ),
        (
            {"words": [jnp.zeros((8, 16))]},
            "words.dtype=float32 must be int32 or uint32",
        ),
        (
            {"segments": [tensor.Segment(3, 32)]},
            "words.shape[0]=8 must be a multiple of 3",
        ),
        (
            {
                "words": [
                    jnp.zeros((4, 16), jnp.uint32),
                    jnp.zeros((4, 8), jnp.uint32),
                ],
                "segments": ONE * 2,
            },
            "n of words=8 must be 16",
        ),
        (
            {
                "words": [
                    jnp.zeros((4, 16), jnp.uint32),
                    jnp.zeros((1, 4, 16), jnp.uint32),
                ],
                "segments": ONE * 2,
            },
            "batch of words=(1,) must be ()",
        ),
        ({"scale": jnp.ones((2, 16), jnp.int32)}, "scale.dtype=int32 must be a float"),
        ({"scale": jnp.ones((3, 16))}, "scale.shape[:-1]=(3,) must be (2,)"),
        ({"scale": jnp.ones((1, 2, 16))}, "scale.shape[:-1]=(1, 2) must be (2,)"),
        ({"scale": jnp.ones((2, 5))}, "scale.shape[-1]=5 must be n=16 or a divisor"),
        ({"zero": jnp.zeros((1, 16), jnp.uint8)}, "zero.shape[:-1]=(1,) must be (2,)"),
        ({"zero": jnp.zeros((2, 3), jnp.uint8)}, "zero.shape[-1]=3 must be n=16"),
        ({"zero": None}, "zero is None, but (q - z) * s needs it"),
        (
            {"zero": None, "affine": tensor.Affine.OFFSET},
            "zero is None, but q * s + z needs it; symmetric codes are Affine.CENTERED",
        ),
        (
            {"affine": tensor.Affine.OFFSET},
            "zero.dtype=uint8 must be a float dtype for q * s + z",
        ),
        ({"affine": tensor.Affine.CENTERED}, "zero.dtype=uint8 must be a float dtype"),
        ({"order": jnp.zeros(63, jnp.int32)}, "order.shape=(63,) must be (64,)"),
        ({"order": jnp.zeros(64, jnp.uint8)}, "order.dtype=uint8 must be int32"),
        ({"row_group": jnp.zeros((1, 64), jnp.int32)}, "row_group.shape=(1, 64) must"),
        ({"row_group": jnp.zeros(64)}, "row_group.dtype=float32 must be int32"),
        ({"input_scale": jnp.ones(16)}, "input_scale.shape=(16,) must be (64,)"),
        (
            {"input_scale": jnp.ones(64, jnp.int32)},
            "input_scale.dtype=int32 must be a float dtype",
        ),
        (CODEBOOK, "codebook and affine=Affine.CODEBOOK must come together"),
        ({"codebook": jnp.zeros(16)}, "codebook and affine=Affine.ZERO must come"),
        (
            {"affine": tensor.Affine.CODEBOOK, "codebook": jnp.zeros(16)},
            "zero must be None with a codebook",
        ),
        ({**CODEBOOK, "codebook": jnp.zeros(8)}, "codebook.shape=(8,) must be (16,)"),
        (
            {**CODEBOOK, "codebook": jnp.zeros(16, jnp.int32)},
            "codebook.dtype=int32 must be a float dtype",
        ),
        ({"rounding": 3}, "rounding=3 must be 1 or 2"),
    ],
)
def test_build_refuses(changes, message, refuses):
    with refuses(message):
        tensor.build(**leaves(**changes))


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
        given = leaves(
            words=[jnp.asarray(oracle.pack(sample().codes, 4))], scale=scale, zero=zero
        )
        plain = {"scale": scale.decode(), "zero": zero.decode()}
        return tensor.build(**given), tensor.build(**(given | plain))

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
        chex.assert_trees_all_equal(qjax.prepare(encoded), plain)

    def test_misfits_are_refused(self, refuses):
        scale = Indices(jnp.zeros((2, 5), jnp.uint8), jnp.ones(2))
        with refuses("scale.shape[-1]=5 must be n=16"):
            tensor.build(**leaves(scale=scale))


class TestPrepare:
    def test_moves_to_the_native_layout(self, as_qtensor):
        m = sample(bits=3)
        planes = as_qtensor(m, gptq.Planar())
        tree = {"a": [planes, None], "b": jnp.ones(3), "c": "text"}
        prepared = qjax.prepare(tree)
        chex.assert_trees_all_equal(prepared["a"][0], as_qtensor(m))
        assert prepared["a"][1] is None
        assert prepared["b"] is tree["b"]
        assert prepared["c"] == "text"

    @pytest.mark.parametrize("order", [False, True])
    def test_full_groups_become_an_order(self, order, as_qtensor):
        m = sample(k=128, row_group=True, order=order, input_scale=True)
        w = as_qtensor(m)
        prepared = qjax.prepare(w)
        assert prepared.row_group is None
        assert prepared.segments == (tensor.Segment(4, 32),)
        groups = m.row_group[np.argsort(m.rows)][np.asarray(prepared.order)]
        chex.assert_trees_all_equal(
            groups, np.repeat(np.arange(4), 32).astype(np.int32)
        )
        chex.assert_trees_all_equal(qjax.dequantize(prepared), qjax.dequantize(w))
        chex.assert_trees_all_equal(prepared.scale, w.scale)

    def test_group_size_follows_the_values(self, as_qtensor):
        # 64 rows a group, whatever the segment says.
        m = sample(k=128, group_size=64, row_group=True)
        w = dataclasses.replace(as_qtensor(m), segments=(tensor.Segment(4, 32),))
        assert qjax.prepare(w).segments == (tensor.Segment(4, 64),)
        chex.assert_trees_all_equal(
            qjax.dequantize(qjax.prepare(w)), qjax.dequantize(w)
        )

    @pytest.mark.parametrize(
        "groups",
        [
            np.repeat([0, 1], [40, 24]),  # uneven
            np.zeros(64, int),  # the second is empty
            np.arange(64) % 2,  # full: becomes an order
        ],
    )
    def test_uneven_groups_stay(self, groups, as_qtensor):
        w = as_qtensor(dataclasses.replace(sample(), row_group=groups.astype(np.int32)))
        prepared = qjax.prepare(w)
        full = (np.bincount(groups, minlength=2) == 32).all()
        assert (prepared.row_group is None) == full
        chex.assert_trees_all_equal(qjax.dequantize(prepared), qjax.dequantize(w))

    def test_groups_that_fill_no_words_stay(self, as_qtensor):
        w = as_qtensor(sample(bits=3, group_size=16, row_group=True))
        chex.assert_trees_all_equal(qjax.prepare(w), w)

    def test_stacks_keep_their_row_group(self, as_qtensor):
        w = as_qtensor(sample(row_group=True))
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
        chex.assert_trees_all_equal(qjax.prepare(stack), stack)

    def test_what_no_native_layout_holds_stays(self, as_qtensor):
        m = sample(k=44, bits=8, group_size=11)
        codes = m.codes & 15  # 44 rows of 4 bits fill no whole words
        w = tensor.build(
            [Tiles16().pack(jnp.asarray(codes), 4)],
            jnp.asarray(m.scale),
            jnp.asarray(m.zero),
            layout=Tiles16(),
            segments=[tensor.Segment(4, 11, padding=4)],
            padding=8,
        )
        assert w.shape == (44, 40)
        prepared = qjax.prepare(w)
        assert prepared.layout == Tiles16()
        chex.assert_trees_all_equal(prepared, w)
