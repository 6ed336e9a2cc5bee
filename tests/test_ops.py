"""`matmul`, its gradients, `quantize`: against the float64 oracle."""

import dataclasses
import functools
import itertools
import re
import types
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax import dispatch, ops, tensor, xla
from qjax.formats import fp8, gptq, mxfp4
from qjax.formats.tiles import Tiles
from qjax.xla import gradients, products, tiles
from tests import oracle, samples
from tests.oracle import relative_error
from tests.pairs import pairwise

# But "xla_float8", which takes none of the weights here: `TestFloat8`.
XLA_FORMS = ["xla_fused", "xla_tiled", "xla_dense", "xla_int8"]
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32

# Relative to the largest output. float32: sums of up to some thousand products, each
# rounded, in an order that is XLA's own. Activations rounded to int8 are off by up to
# 1/254 of the largest of their group, and many such errors are summed.
TOLERANCE = {"float32": 1e-5, "int8": 2e-2}
# bfloat16 and float16: times the error of the dense product in the same dtype. The
# result is as good as rounded once, where the dense one has rounded weights as well.
TIMES_DENSE = 1.5


def test_pairwise_covers_all_pairs():
    axes = {"a": "xyz", "b": "uv", "c": "123456"}
    cases = pairwise(lambda case: (case.get("a"), case.get("c")) != ("x", "1"), **axes)
    assert len(cases) < 36 / 1.5
    for one, two in itertools.combinations(axes, 2):
        met = {(case[one], case[two]) for case in cases}
        all_pairs = set(itertools.product(axes[one], axes[two]))
        assert met == all_pairs - ({("x", "1")} if (one, two) == ("a", "c") else set())


# Rows, columns, groups: what any form must do, and what only some can.
STRUCTURES = {
    "whole": {"k": 128, "n": 40},
    "n200": {"k": 64, "n": 200, "group_size": 64},
    "column": {"k": 96, "n": 40, "group_size": None},
    "shared": {"k": 128, "n": 40, "columns": 1},
    "order": {"k": 64, "n": 40, "order": True, "input_scale": True},
    # Not whole groups of whole words:
    "group16": {"k": 96, "n": 40, "group_size": 16},
    "short": {"k": 96, "n": 40, "group_size": 64},
    "row_group": {"k": 96, "n": 200, "row_group": True},
    # Groups that span columns:
    "blocks": {"k": 64, "n": 40, "columns": 8},
    "flat": {"k": 64, "n": 40, "grouping": "FLAT", "group_size": 48},
    "strided": {"k": 64, "n": 40, "grouping": "STRIDED"},
}
MAPS = samples.MAPS | samples.CODEBOOK
SCALES = {"float32": F32, "float16": F16, "bfloat16": BF16}
WHOLE, ROWS, ALL = list(STRUCTURES)[:5], list(STRUCTURES)[:8], list(STRUCTURES)
AFFINE = [name for name in MAPS if name != "codebook"]
TAKES = {
    "xla_fused": (WHOLE, AFFINE),
    "xla_tiled": (ROWS, list(MAPS)),
    "xla_dense": (ALL, list(MAPS)),
    "xla_int8": (WHOLE, AFFINE),
}


def takes(case: dict) -> bool:
    if "name" not in case:
        return True
    structures, maps = TAKES[case["name"]]
    return case.get("structure", structures[0]) in structures and (
        case.get("affine", maps[0]) in maps
    )


CASES = [
    tuple(case.values())
    for case in pairwise(
        takes,
        name=list(TAKES),
        bits=range(1, 9),
        m=(1, 3, 5, 16, 130),
        structure=ALL,
        affine=list(MAPS),
        scale=list(SCALES),
    )
]


def sample(structure: str, affine: str = "zero", scale: str = "float32", **changes):
    given = STRUCTURES[structure] | MAPS[affine] | {"dtype": SCALES[scale]}
    return oracle.random(0, **(given | changes))


def activations(m: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(m, k)).astype(F32)


@pytest.fixture
def never_dense(monkeypatch):
    """Small matrices take the dense weight; they too must work without it."""
    monkeypatch.setattr(dispatch, "_SMALL", 0)
    # The programs of the other limit.
    ops._apply.clear_cache()
    yield
    ops._apply.clear_cache()


@pytest.fixture(autouse=True)
def warnings_once_more():
    """Each test sees the warnings that come once."""
    ops._warn_once.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.filterwarnings("ignore:Grouping .* makes matmul form the dense weight")
def test_matches_the_oracle(case, as_qtensor):
    name, bits, m, structure, affine, scale = case
    matrix = sample(structure, affine, scale, bits=bits)
    x = activations(m, len(matrix.codes))
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation=name)
    assert y.dtype == jnp.float32
    tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
    assert relative_error(y, matrix.matmul(x)) < tolerance


MIXED = {
    "exl2": {
        "parts": [(8, 32, 32), (6, 32, 32), (5, 64, 64), (3, 64, 32), (2, 32, None)],
        "affine": "CENTERED",
        "order": True,
    },
    "ragged": {
        "parts": [(4, 40, 16), (2, 48, 32), (1, 32, 32)],
        "affine": "OFFSET",
        "input_scale": True,
    },
    "codebook": {"parts": [(4, 64, 32), (2, 64, 32)], "affine": "CODEBOOK"},
}


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("name", [None, "xla_tiled", "xla_dense"])
def test_mixed_widths(name, kind, m, as_qtensor):
    k = sum(rows for _, rows, _ in MIXED[kind]["parts"])
    matrix = oracle.random(0, k, 40, **MIXED[kind])
    x = activations(m, k)
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation=name)
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("name", ["xla_fused", "xla_int8"])
def test_mixed_widths_of_whole_groups(name, m, as_qtensor):
    matrix = oracle.random(0, 224, 40, **MIXED["exl2"])
    x = activations(m, 224)
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation=name)
    tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
    assert relative_error(y, matrix.matmul(x)) < tolerance


# Runs of 1, 7, 11, 16 and 24 blocks of 32 codes: `xla_fused` adds up to 8 at a time.
@pytest.mark.parametrize("group_size", [32, 224, 352, 512, 768])
def test_groups_of_many_blocks(group_size, as_qtensor):
    matrix = oracle.random(0, 2 * group_size, 40, bits=3, group_size=group_size)
    x = activations(1, 2 * group_size)
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation="xla_fused")
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]


# Several runs of rows and columns, with a rest, also for small matrices.
@pytest.fixture
def small_tiles(monkeypatch):
    for module in (gradients, products, tiles):
        monkeypatch.setattr(module, "TILE", 64 * 64)
    monkeypatch.setattr(tiles, "_TILE_ROWS", 64)


TILED = {
    "groups in a tile": {"group_size": 32},
    "tiles in a group": {"group_size": 192},
    "group of three tiles": {"group_size": 96},
    "shared scales": {"columns": 1, "affine": "OFFSET"},
    "codebook": {"affine": "CODEBOOK"},
    "rows dealt": {"row_group": True},
    "short last group": {"group_size": 128, "float_zero": True},
    "3 bits": {"bits": 3, "affine": "CENTERED", "float_zero": True},
}


@pytest.mark.parametrize("kind", TILED)
def test_many_tiles(kind, small_tiles, as_qtensor):
    matrix = oracle.random(0, 192, 200, **TILED[kind])
    w, x = as_qtensor(matrix), activations(7, 192)
    y = jax.jit(xla.tiled)(jnp.asarray(x), w)
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]
    dy = activations(7, 200, seed=2)
    expected = matrix.gradients(x, dy)
    dx = jax.jit(xla.tiled_t)(jnp.asarray(dy), w)
    assert relative_error(dx, expected.pop("x")) < TOLERANCE["float32"]
    functions = [xla.tiled_grad]
    if kind not in ("codebook", "rows dealt", "short last group"):
        functions.append(xla.grouped_grad)
    for function in functions:
        found = jax.jit(lambda *args, f=function: f(*args))(
            jnp.asarray(x), jnp.asarray(dy), w
        )
        assert found.keys() == expected.keys()
        for name in expected:
            error = relative_error(found[name], expected[name])
            assert error < TOLERANCE["float32"], (function, name)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_leading_axes(rank, as_qtensor):
    matrix = sample("whole")
    x = activations(6, 128).reshape(
        [(6,), (2, 3), (1, 2, 3)][max(rank - 2, 0)] + (128,)
    )
    x = x[0] if rank == 1 else x
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix))
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]


def test_no_rows(as_qtensor):
    w = as_qtensor(sample("whole"))
    for shape in ((0, 128), (2, 0, 128)):
        y, pull = jax.vjp(qjax.matmul, jnp.zeros(shape), w)
        assert y.shape == (*shape[:-1], 40)
        dx, dw = pull(y)
        assert dx.shape == shape
        assert not dw.scale.any()


# The CPU backend of jax 0.12 multiplies sums by what is broadcast wrongly, if there are
# so many groups.
@pytest.mark.parametrize("name", ["xla_fused", "xla_int8"])
@pytest.mark.parametrize("m", [2, 3])
def test_many_groups_that_columns_share(m, name, as_qtensor):
    matrix = oracle.random(0, 4096, 64, group_size=32, columns=1)
    x = activations(m, 4096)
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation=name)
    tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
    assert relative_error(y, matrix.matmul(x)) < tolerance


@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "m"), [("xla_fused", 1), ("xla_tiled", 16), ("xla_dense", 16)]
)
def test_16_bit_activations(name, m, dtype, scale, as_qtensor):
    matrix = sample("n200", "zero", scale, k=512)
    w, x = as_qtensor(matrix), activations(m, 512).astype(dtype)
    y = qjax.matmul(jnp.asarray(x), w, implementation=name)
    assert y.dtype == dtype
    dense = jnp.dot(jnp.asarray(x), qjax.dequantize(w, dtype))
    expected = matrix.matmul(x.astype(np.float64))
    error = relative_error(dense, expected)
    assert relative_error(y, expected) <= TIMES_DENSE * error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["positive", "outliers"])
@pytest.mark.parametrize(
    ("name", "m"),
    [("xla_fused", 1), ("xla_fused", 3), ("xla_tiled", 16), ("xla_dense", 16)],
)
def test_activations_that_do_not_cancel(name, m, kind, bits, as_qtensor):
    # Zeros are taken out of the sum of x times the codes: much larger than the result.
    matrix = sample("n200", k=1024, bits=bits, group_size=128)
    x = activations(m, 1024)
    if kind == "positive":
        x = np.abs(x)
    else:
        x[:, [7, 300, 301, 900]] *= 100
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation=name)
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]


def test_int8_of_groups_of_zeros(as_qtensor):
    matrix, x = sample("whole"), activations(3, 128)
    x[0] = 0
    x[1, 32:64] = 0
    y = qjax.matmul(jnp.asarray(x), as_qtensor(matrix), implementation="xla_int8")
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE["int8"]
    chex.assert_trees_all_equal(np.asarray(y[0]), np.zeros(40, F32))


class TestFloat8:
    """Activations of eight bits, by name."""

    @staticmethod
    def weight(columns: int | None) -> qjax.QTensor:
        w = np.random.default_rng(0).standard_normal((96, 40)).astype(F32)
        return qjax.prepare(fp8.quantize(jnp.asarray(w), 8, None, columns=columns))

    @pytest.mark.parametrize("columns", [None, 40])
    @pytest.mark.parametrize("layout", [tiles.NATIVE, Tiles()], ids=str)
    def test_is_exact_of_such_floats(self, layout, columns):
        w = qjax.relayout(self.weight(columns), layout)
        patterns = np.random.default_rng(1).integers(0, 126, (5, 96)).astype(np.uint8)
        x = patterns.view(ml_dtypes.float8_e4m3fn).astype(F32)
        x[:, 0] = 448  # the largest of a row
        x *= 2.0 ** np.arange(-2, 3)[:, None]
        y = qjax.matmul(jnp.asarray(x), w, implementation="xla_float8")
        dense = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
        assert relative_error(y, x @ dense) < TOLERANCE["float32"]

    @pytest.mark.parametrize("x64", [False, True])
    def test_rounds_to_four_bits(self, x64):
        w, x = self.weight(None), jnp.asarray(activations(64, 96))
        with jax.enable_x64(x64):
            y = qjax.matmul(x, w, implementation="xla_float8")
        assert y.dtype == jnp.float32
        expected = qjax.matmul(x, w)
        off = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
        # Half a unit in the last of four bits, uniformly distributed, is 0.026.
        assert 0.02 < off < 0.03

    def test_rows_of_zeros_and_what_is_not_finite(self):
        x = activations(4, 96)
        x[0], x[1, 3], x[2, 5] = 0, np.nan, np.inf
        y = qjax.matmul(jnp.asarray(x), self.weight(None), implementation="xla_float8")
        assert not np.asarray(y[0]).any()
        assert np.isnan(y[1:3]).all()
        assert np.isfinite(y[3]).all()

    def test_gradients_are_those_of_the_product(self):
        w, x = self.weight(None), jnp.asarray(activations(5, 96))

        def loss(x, scale, name):
            y = qjax.matmul(x, dataclasses.replace(w, scale=scale), implementation=name)
            return (y * jnp.arange(40.0)[None]).sum()

        found, expected = (
            jax.grad(loss, (0, 1))(x, w.scale, name) for name in ("xla_float8", None)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-6)

    @pytest.mark.parametrize("make", ["blocks", "integers", "four bits"])
    def test_declines(self, make):
        w = jnp.ones((64, 32))
        made = {
            "blocks": lambda: fp8.quantize(w, group_size=32),
            "integers": lambda: qjax.quantize(w, 8, None),
            "four bits": lambda: mxfp4.quantize(w),
        }[make]()
        with pytest.raises(
            NotImplementedError, match="is not of E4M3 floats with a sc"
        ):
            qjax.matmul(
                jnp.ones((2, 64)), qjax.prepare(made), implementation="xla_float8"
            )


@pytest.fixture(scope="module")
def large(as_qtensor):
    """Makes a matrix of 1024 rows once: as tensor, oracle and float64 weight."""

    @functools.cache
    def large(n):
        matrix = oracle.random(0, 1024, n, group_size=128)
        return as_qtensor(matrix), matrix, matrix.weight

    return large


# jaxlib 0.10.2 gets sums over scaled accumulators wrong on CPUs from some 32 thousand
# outputs and up to 16 rows; no smaller matrix shows it.
@pytest.mark.parametrize(
    ("name", "m", "n"),
    [
        *((name, m, 4096) for name in (None, "xla_int8") for m in (9, 12, 16)),
        (None, 3, 11008),
        (None, 4, 11008),
        ("xla_int8", 4, 11008),
        ("xla_fused", 4, 11008),
        ("xla_fused", 9, 4096),
    ],
)
def test_shapes_that_a_compiler_got_wrong(name, m, n, large):
    w, _, weight = large(n)
    x = activations(m, 1024)
    y = qjax.matmul(jnp.asarray(x), w, implementation=name)
    tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
    assert relative_error(y, x @ weight) < tolerance


@pytest.mark.parametrize("m", [9, 16])
def test_gradients_at_shapes_that_a_compiler_got_wrong(m, large):
    w, matrix, _ = large(4096)
    x, dy = activations(m, 1024), activations(m, 4096, seed=2)
    _, pull = jax.vjp(
        lambda x, s: qjax.matmul(x, dataclasses.replace(w, scale=s)),
        jnp.asarray(x),
        w.scale,
    )
    dx, dscale = pull(jnp.asarray(dy))
    expected = matrix.gradients(x, dy)
    assert relative_error(dx, expected["x"]) < TOLERANCE["float32"]
    assert relative_error(dscale, expected["scale"]) < TOLERANCE["float32"]


class TestGradients:
    KINDS = (
        *((structure, "zero") for structure in STRUCTURES),
        ("whole", "float_zero"),
        ("order", "float_zero"),
        ("row_group", "offset"),
        ("shared", "offset"),
        ("n200", "centered"),
        ("short", "centered_zero"),
        ("column", "codebook"),
        ("order", "codebook"),
        ("flat", "offset"),
    )

    @pytest.fixture(params=["dense", "native"])
    def backward(self, request):
        if request.param == "native":
            request.getfixturevalue("never_dense")

    def by_jax(self, matrix, w, x, dy, transform=lambda f: f):
        """Gradients of x and all float leaves, and float0 for the others."""

        def loss(x, w):
            return (qjax.matmul(x, w) * jnp.asarray(dy)).sum()

        dx, dw = transform(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, w)
        found = {
            name: getattr(dw, name)
            for name in ("scale", "zero", "codebook", "input_scale")
            if getattr(w, name) is not None
            and jnp.issubdtype(getattr(w, name).dtype, jnp.floating)
        }
        for leaf, gradient in zip(jax.tree.leaves(w), jax.tree.leaves(dw), strict=True):
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                assert gradient.dtype == jax.dtypes.float0
                assert gradient.shape == leaf.shape
            else:
                assert gradient.dtype == leaf.dtype
        return found | {"x": dx}

    def check(self, found, expected, tolerance=TOLERANCE["float32"]):
        assert found.keys() == expected.keys()
        for name in expected:
            error = relative_error(found[name], expected[name])
            assert error < tolerance, name

    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    @pytest.mark.filterwarnings("ignore:Grouping .* makes matmul form the dense weight")
    def test_match_the_oracle(self, kind, backward, as_qtensor):
        matrix = sample(*kind)
        k, n = matrix.codes.shape
        x, dy = activations(5, k), activations(5, n, seed=2)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy, jax.jit)
        self.check(found, matrix.gradients(x, dy))

    @pytest.mark.parametrize("kind", MIXED)
    def test_mixed_widths(self, kind, backward, as_qtensor):
        k = sum(rows for _, rows, _ in MIXED[kind]["parts"])
        matrix = oracle.random(0, k, 40, **MIXED[kind])
        x, dy = activations(5, k), activations(5, 40, seed=2)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy, jax.jit)
        self.check(found, matrix.gradients(x, dy))

    def test_mixed_widths_of_shared_groups(self, backward, as_qtensor):
        # Rows of both segments belong to both groups: their gradients add up.
        matrix = oracle.random(
            0,
            128,
            40,
            parts=[(4, 64, 64), (2, 64, 64)],
            affine="OFFSET",
            row_group=True,
        )
        assert set(matrix.row_group[:64]) == set(matrix.row_group[64:]) == {0, 1}
        x, dy = activations(5, 128), activations(5, 40, seed=2)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy, jax.jit)
        self.check(found, matrix.gradients(x, dy))

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_every_width(self, bits, never_dense, as_qtensor):
        matrix = sample("whole", "float_zero", bits=bits)
        x, dy = activations(3, 128), activations(3, 40, seed=2)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy, jax.jit)
        self.check(found, matrix.gradients(x, dy))

    @pytest.mark.parametrize("affine", MAPS)
    def test_the_oracles_own_gradients_are_differences(self, affine):
        matrix = sample("order", affine, k=32, n=8, group_size=16)
        x, dy = activations(2, 32), activations(2, 8, seed=2)
        rng = np.random.default_rng(3)
        expected = matrix.gradients(x, dy)
        for name, gradient in expected.items():
            direction = rng.normal(size=gradient.shape)
            value = x if name == "x" else getattr(matrix, name)

            def loss(step, name=name, value=value, direction=direction):
                moved = np.asarray(value, np.float64) + step * direction
                if name == "x":
                    return (matrix.matmul(moved) * dy).sum()
                return (
                    dataclasses.replace(matrix, **{name: moved}).matmul(x) * dy
                ).sum()

            # The product is linear in each leaf: a difference is a derivative.
            difference = (loss(0.5) - loss(-0.5)) / 1.0
            np.testing.assert_allclose(
                (gradient * direction).sum(), difference, rtol=1e-10
            )

    @pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
    def test_16_bits(self, dtype, backward, as_qtensor):
        scale = "float16" if dtype == F16 else "bfloat16"
        matrix = sample("whole", "offset", scale)
        x, dy = activations(5, 128).astype(dtype), activations(5, 40, 2).astype(dtype)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy, jax.jit)
        # The loss rounds nothing but y and dy, and each gradient once to its dtype.
        self.check(
            found,
            matrix.gradients(x.astype(np.float64), dy.astype(np.float64)),
            tolerance=2.0**-11 if dtype == F16 else 2.0**-8,
        )

    def test_without_jit(self, as_qtensor):
        matrix = sample("order", "float_zero")
        x, dy = activations(5, 64), activations(5, 40, seed=2)
        found = self.by_jax(matrix, as_qtensor(matrix), jnp.asarray(x), dy)
        self.check(found, matrix.gradients(x, dy))

    def test_named_implementations_have_the_exact_gradient(self, as_qtensor):
        matrix = sample("whole")
        w, x, dy = as_qtensor(matrix), activations(5, 128), activations(5, 40, seed=2)

        def loss(x, name):
            return (qjax.matmul(x, w, implementation=name) * jnp.asarray(dy)).sum()

        for name in XLA_FORMS:
            dx = jax.grad(loss)(jnp.asarray(x), name)
            error = relative_error(dx, matrix.gradients(x, dy)["x"])
            assert error < TOLERANCE["float32"], name

    def test_remat(self, as_qtensor):
        matrix = sample("whole", "float_zero")
        w, x = as_qtensor(matrix), jnp.asarray(activations(5, 128))

        def loss(x, w):
            return (jnp.tanh(qjax.matmul(x, w)) ** 2).sum()

        plain = jax.jit(jax.grad(loss))(x, w)
        chex.assert_trees_all_close(
            jax.jit(jax.grad(jax.checkpoint(loss)))(x, w), plain, rtol=1e-6
        )

    @pytest.mark.parametrize("layout", [xla.NATIVE, Tiles()], ids=str)
    @pytest.mark.parametrize("widths", ["uniform", "mixed"])
    def test_second_derivatives(self, widths, layout, as_qtensor):
        """Also where a GPU's kernels, which have none, multiply 16-bit floats."""
        if widths == "mixed":
            parts = [(4, 64, 32), (3, 64, 64)]
            matrix = oracle.random(0, 128, 40, parts=parts, affine="OFFSET")
        else:
            matrix = sample("whole", "float_zero")
        w, x = as_qtensor(matrix, layout), activations(3, 128).astype(BF16)
        in_kernels = dispatch.goes_to_kernels(w, dispatch.Choice(None, kernels=True))
        assert in_kernels == (layout == Tiles())

        def square(x, scale):
            def loss(x):
                y = qjax.matmul(x, dataclasses.replace(w, scale=scale))
                return (y.astype(jnp.float32) ** 2).sum() / 2

            return (jax.grad(loss)(x).astype(jnp.float32) ** 2).sum() / 2

        found = jax.jit(jax.grad(square, (0, 1)))(jnp.asarray(x), w.scale)
        # y = x W, g = y W^T, and of |g|^2 / 2: dy = g W, dx = dy W^T,
        # dW = x^T dy + g^T y.
        x, weight = x.astype(np.float64), matrix.weight
        y = x @ weight
        g = y @ weight.T
        dy = g @ weight
        by_x, by_g = matrix.gradients(x, dy), matrix.gradients(g, y)
        # y, g and dx are rounded to bfloat16, one after another.
        assert relative_error(found[0], dy @ weight.T) < 3 * 2.0**-8
        assert relative_error(found[1], by_x["scale"] + by_g["scale"]) < 3 * 2.0**-8

    def test_gradients_flow_into_encoded_scales(self, as_qtensor):
        # An encoding is decoded outside of the product: its floats have gradients.
        matrix = sample("whole")
        w, x, dy = as_qtensor(matrix), activations(5, 128), activations(5, 40, seed=2)

        def loss(step):
            encoded = Doubled(step)
            y = qjax.matmul(jnp.asarray(x), dataclasses.replace(w, scale=encoded))
            return (y * jnp.asarray(dy)).sum()

        found = jax.grad(loss)(w.scale / 2)
        expected = 2 * matrix.gradients(x, dy)["scale"]
        assert relative_error(found, expected) < TOLERANCE["float32"]

    def test_experts_under_vmap(self, backward, as_qtensor):
        matrices = [sample("whole", "float_zero", k=64) for _ in range(3)]
        matrices = [
            dataclasses.replace(m, codes=np.roll(m.codes, i, 0))
            for i, m in enumerate(matrices)
        ]
        tensors = [as_qtensor(m) for m in matrices]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
        x, dy = activations(6, 64).reshape(3, 2, 64), activations(6, 40, 2)
        dy = dy.reshape(3, 2, 40)

        @jax.jit
        def gradients(x, scale, zero):
            def loss(x, scale, zero):
                w = dataclasses.replace(stack, scale=scale, zero=zero)
                return (jax.vmap(qjax.matmul)(x, w) * jnp.asarray(dy)).sum()

            return jax.grad(loss, (0, 1, 2))(x, scale, zero)

        found = gradients(jnp.asarray(x), stack.scale, stack.zero)
        for i, m in enumerate(matrices):
            expected = m.gradients(x[i], dy[i])
            one = dict(
                zip(("x", "scale", "zero"), (leaf[i] for leaf in found), strict=True)
            )
            self.check(one, expected)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled(tensor.Encoded):
    half: jax.Array

    def decode(self):
        return self.half * 2


class TestTransformations:
    @pytest.fixture
    def matrix(self) -> oracle.Matrix:
        return oracle.random(0, 256, 48, affine="OFFSET", group_size=32)

    def test_vmap_over_experts(self):
        matrices = [oracle.random(seed, 64, 40) for seed in range(3)]
        weights = qjax.quantize(
            jnp.asarray(np.stack([m.weight for m in matrices]), F32), group_size=32
        )
        x = activations(6, 64).reshape(3, 2, 64)
        found = jax.jit(jax.vmap(qjax.matmul))(jnp.asarray(x), weights)
        dense = np.asarray(qjax.dequantize(weights), np.float64)
        assert relative_error(found, x @ dense) < TOLERANCE["float32"]
        shared = jax.vmap(qjax.matmul, (None, 0))(jnp.asarray(x[0]), weights)
        assert relative_error(shared, x[0] @ dense) < TOLERANCE["float32"]

    def test_scan_over_layers(self):
        layers = [oracle.random(seed, 64, 64) for seed in range(3)]
        stack = qjax.quantize(
            jnp.asarray(np.stack([m.weight for m in layers]), F32), group_size=32
        )
        x = activations(2, 64)

        @jax.jit
        def run(x, stack):
            return jax.lax.scan(lambda x, w: (qjax.matmul(x, w), None), x, stack)[0]

        expected = x.astype(np.float64)
        for dense in np.asarray(qjax.dequantize(stack), np.float64):
            expected = expected @ dense
        found = run(jnp.asarray(x), stack)
        assert (
            relative_error(found, expected) < 3 * TOLERANCE["float32"]
        )  # three layers

    @pytest.mark.parametrize("layout", [xla.NATIVE, Tiles()], ids=str)
    def test_by_index(self, layout, as_qtensor):
        each = [
            oracle.random(i, 128, 48, group_size=32, order=True, input_scale=True)
            for i in range(3)
        ]
        stack = jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(as_qtensor(matrix, layout) for matrix in each),
        )
        x = activations(4, 128)
        run = jax.jit(lambda x, w, i: qjax.matmul(x, w, index=i))
        for i, matrix in enumerate(each):
            found = run(jnp.asarray(x), stack, i)
            assert relative_error(found, matrix.matmul(x)) < TOLERANCE["float32"]
        # Traced, it is clamped, as all of JAX's dynamic indices are.
        last = qjax.matmul(jnp.asarray(x), stack, index=2)
        chex.assert_trees_all_equal(run(jnp.asarray(x), stack, 7), last)

    @pytest.mark.parametrize("name", [*XLA_FORMS, "xla_float8"])
    @pytest.mark.parametrize("index", [None, 1])
    def test_named_forms_of_tiles(self, name, index):
        """k is no whole step of Tiles, and so its words are padded."""
        dense = jax.random.normal(jax.random.key(0), (2, 192, 48), jnp.bfloat16)
        dense = dense if index is not None else dense[0]
        if name == "xla_float8":
            w = qjax.prepare(fp8.quantize(dense, group_size=None))
        else:
            w = qjax.quantize(dense, bits=4, group_size=32)
        tiles = qjax.prepare(w, layout=Tiles())
        assert isinstance(tiles.layout, Tiles)
        x = jnp.asarray(activations(2, 192))
        run = functools.partial(qjax.matmul, x, index=index, implementation=name)
        chex.assert_trees_all_equal(run(tiles), run(w))

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
    def test_by_an_index_that_cannot_hold_the_count(self, dtype):
        """Of 300 matrices, which are all 0, all 1, ... of them."""
        dense = jnp.ones((300, 32, 4)) * jnp.arange(300.0)[:, None, None]
        stack, x = qjax.quantize(dense, group_size=None), jnp.ones((1, 32))
        for at in (0, 100):
            index = jnp.asarray(at, dtype)
            np.testing.assert_allclose(qjax.matmul(x, stack, index=index), 32 * at)
        seen = jax.lax.map(lambda i: qjax.matmul(x, stack, index=i), index[None])
        np.testing.assert_allclose(seen, 3200)

    def test_gradients_by_index(self, as_qtensor):
        each = [oracle.random(i, 64, 40, float_zero=True) for i in range(3)]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(as_qtensor, each))
        x, dy = activations(4, 64), activations(4, 40)

        def loss(x, scale, zero):
            w = dataclasses.replace(stack, scale=scale, zero=zero)
            return (qjax.matmul(x, w, index=1) * dy).sum()

        found = jax.grad(loss, (0, 1, 2))(jnp.asarray(x), stack.scale, stack.zero)
        expected = each[1].gradients(x, dy)
        assert relative_error(found[0], expected["x"]) < TOLERANCE["float32"]
        for gradient, name in zip(found[1:], ("scale", "zero"), strict=True):
            assert relative_error(gradient[1], expected[name]) < TOLERANCE["float32"]
            assert not gradient[jnp.array([0, 2])].any()

    # The specs of x and of all leaves of w, of y, and what the shards of y need.
    SHARDED = types.MappingProxyType(
        {
            "columns": (P(), P(None, "d"), P(None, "d"), False),
            "rows": (P(None, "d"), P("d", None), P(), True),
            "batch": (P("d", None), P(), P("d", None), False),
            "all": (P(), P(), P(), False),
        }
    )

    @pytest.mark.parametrize("m", [8, 24])
    @pytest.mark.parametrize("kind", SHARDED)
    def test_shard_map(self, kind, m, matrix, as_qtensor):
        self.check_shards(kind, m, matrix, as_qtensor(matrix))

    @pytest.mark.usefixtures("never_dense")
    @pytest.mark.parametrize("kind", SHARDED)
    def test_shard_map_of_large_shards(self, kind, matrix, as_qtensor):
        # Without the dense weight: loops whose carries vary over devices.
        self.check_shards(kind, 32, matrix, as_qtensor(matrix))

    def check_shards(self, kind, m, matrix, w):
        x_spec, w_spec, y_spec, partial = self.SHARDED[kind]
        x, dy = activations(m, 256), activations(m, 48, seed=2)
        mesh = Mesh(jax.devices("cpu"), ("d",))

        @jax.shard_map(mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec)
        def product(x, w):
            y = qjax.matmul(x, w)
            return jax.lax.psum(y, "d") if partial else y

        def loss(x, scale, zero):
            y = product(x, dataclasses.replace(w, scale=scale, zero=zero))
            return (y * jnp.asarray(dy)).sum(), y

        step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        gradients, y = step(jnp.asarray(x), w.scale, w.zero)
        assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]
        expected = matrix.gradients(x, dy)
        for name, found in zip(("x", "scale", "zero"), gradients, strict=True):
            assert relative_error(found, expected[name]) < TOLERANCE["float32"], name

    def test_pmap(self, matrix, as_qtensor):
        w, x, dy = as_qtensor(matrix), activations(16, 256), activations(16, 48, seed=2)
        devices = jax.devices("cpu")
        by_device = jnp.asarray(x.reshape(8, 2, 256)), jnp.asarray(dy.reshape(8, 2, 48))

        def step(x, dy, w):
            def loss(x, scale):
                y = qjax.matmul(x, dataclasses.replace(w, scale=scale))
                return (y * dy).sum(), y

            (dx, dscale), y = jax.grad(loss, (0, 1), has_aux=True)(x, w.scale)
            return y, dx, jax.lax.psum(dscale, "d")

        y, dx, dscale = jax.pmap(
            step, axis_name="d", in_axes=(0, 0, None), devices=devices
        )(*by_device, w)
        expected = matrix.gradients(x, dy)
        pairs = {
            "y": (y.reshape(16, 48), matrix.matmul(x)),
            "x": (dx.reshape(16, 256), expected["x"]),
            "scale": (dscale[0], expected["scale"]),
        }
        for name, (found, wanted) in pairs.items():
            assert relative_error(found, wanted) < TOLERANCE["float32"], name

    def test_pmap_of_columns(self, matrix, as_qtensor):
        # Each device holds six columns: local leaves under the same metadata.
        columns = jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[0], 8, 6).transpose(1, 0, 2),
            as_qtensor(matrix),
        )
        x = activations(2, 256)
        y = jax.pmap(qjax.matmul, in_axes=(None, 0), devices=jax.devices("cpu"))(
            jnp.asarray(x), columns
        )
        found = np.asarray(y).transpose(1, 0, 2).reshape(2, 48)
        assert relative_error(found, matrix.matmul(x)) < TOLERANCE["float32"]

    @pytest.mark.parametrize("name", [None, *XLA_FORMS])
    def test_64_bit_mode(self, name, as_qtensor):
        matrix = sample("order")
        w, x = as_qtensor(matrix), activations(5, 64)
        with jax.enable_x64(True):
            y = qjax.matmul(jnp.asarray(x), w, implementation=name)
            assert y.dtype == jnp.float32
            grad = jax.grad(lambda x: qjax.matmul(x, w, implementation=name).sum())
            assert grad(jnp.asarray(x)).dtype == jnp.float32
        tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
        assert relative_error(y, matrix.matmul(x)) < tolerance

    @pytest.mark.parametrize("layout", [xla.NATIVE, Tiles()], ids=str)
    def test_export_of_any_number_of_rows(self, layout, matrix, as_qtensor):
        w, (b,) = as_qtensor(matrix, layout), jax.export.symbolic_shape("b")
        step = jax.jit(jax.value_and_grad(lambda x: (qjax.matmul(x, w) ** 2).sum()))
        abstract = jax.ShapeDtypeStruct((b, 3, 256), jnp.float32)
        exported = jax.export.export(step, platforms=("cpu",))(abstract)
        for m in (1, 8):
            x = activations(m * 3, 256)
            loss, dx = exported.call(jnp.asarray(x.reshape(m, 3, 256)))
            y = matrix.matmul(x)
            assert relative_error(loss, (y**2).sum()) < TOLERANCE["float32"]
            expected = matrix.gradients(x, 2 * y)["x"].reshape(dx.shape)
            assert relative_error(dx, expected) < TOLERANCE["float32"]

    def test_disable_jit(self, matrix, as_qtensor):
        w, x = as_qtensor(matrix), activations(2, 256)
        with jax.disable_jit():
            y, dense = qjax.matmul(jnp.asarray(x), w), qjax.dequantize(w)
            moved = qjax.relayout(w, gptq.Planar())
        assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]
        assert relative_error(dense, matrix.weight) < TOLERANCE["float32"]
        chex.assert_trees_all_equal(moved, qjax.relayout(w, gptq.Planar()))

    def test_eval_shape(self, matrix, as_qtensor):
        w = as_qtensor(matrix)
        x = jax.ShapeDtypeStruct((2, 3, 256), jnp.bfloat16)
        y = jax.eval_shape(qjax.matmul, x, w)
        assert (y.shape, y.dtype) == ((2, 3, 48), jnp.bfloat16)


class TestDispatch:
    @pytest.mark.parametrize(
        ("shape", "dtype", "name", "message"),
        [
            (
                (2, 127),
                "float32",
                None,
                "x.shape=(2, 127) must end in k=128, as w.shape",
            ),
            ((), "float32", None, "x.shape=() must end in k=128"),
            ((2, 128), "int32", None, "x.dtype=int32 must be bfloat16, float16 or"),
            ((2, 128), "bool", None, "x.dtype=bool must be bfloat16, float16 or"),
            (
                (2, 128),
                "float32",
                "triton",
                "implementation='triton' must be one of ['pallas', 'pallas_bf16', "
                "'pallas_dense', 'xla_fused', 'xla_tiled', 'xla_dense', 'xla_int8', "
                "'xla_float8']",
            ),
        ],
    )
    def test_refuses(self, shape, dtype, name, message, as_qtensor, refuses):
        w = as_qtensor(sample("whole"))
        with refuses(message):
            qjax.matmul(jnp.zeros(shape, dtype), w, implementation=name)

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (lambda dense: qjax.matmul(jnp.ones((2, 64)), dense), "w"),
            (lambda dense: qjax.ragged_matmul(dense, dense, jnp.ones(1, int)), "w"),
            (qjax.dequantize, "qt"),
            (qjax.codes, "qt"),
            (lambda dense: qjax.relayout(dense, Tiles()), "qt"),
            (qjax.flatten, "qt"),
            (lambda dense: qjax.concatenate([dense]), "weights[0]"),
            (lambda dense: qjax.shard(dense, jax.make_mesh((1,), "d"), P("d")), "w"),
            (lambda dense: qjax.partition_specs(dense, None, P()), "w"),
        ],
    )
    def test_refuses_dense_weights(self, call, name, refuses):
        message = f"{name} is ArrayImpl of shape (64, 8), and must be a QTensor"
        with refuses(message, TypeError):
            call(jnp.ones((64, 8)))

    def test_refuses_names_of_layouts_and_axes(self, as_qtensor, refuses):
        w = as_qtensor(sample("whole"))
        with refuses("layout='awq' must be a Layout", TypeError):
            qjax.relayout(w, "awq")
        with refuses("layout='awq' must be a Layout", TypeError):
            qjax.prepare(w, layout="awq")
        with refuses("spec='d' must be a PartitionSpec", TypeError):
            qjax.shard(w, jax.make_mesh((1,), "d"), "d")
        with refuses("mesh=None must be a Mesh", TypeError):
            qjax.shard(w, None, P("d"))

    @pytest.mark.parametrize("dtype", [jnp.int8, bool, "complex64"])
    def test_refuses_weights_that_are_no_floats(self, dtype, as_qtensor, refuses):
        with refuses("must be a float dtype; qjax.codes gives the codes"):
            qjax.dequantize(as_qtensor(sample("whole")), dtype)

    def test_refuses_lists(self, as_qtensor, refuses):
        with refuses("x is list, and must be an array; jnp.asarray", TypeError):
            qjax.matmul([[1.0] * 64], as_qtensor(sample("whole")))

    def test_refuses_stacks(self, refuses):
        stack = qjax.quantize(jnp.ones((3, 64, 8)), group_size=32)
        message = (
            "w.shape=(3, 64, 8) is a stack; pass index=, or map over it: "
            "jax.vmap(qjax.matmul)(x, w)"
        )
        with refuses(message):
            qjax.matmul(jnp.ones((3, 2, 64)), stack)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (3, "index=3 must lie in [0, 3)"),
            (-1, "index=-1 must lie in [0, 3)"),
            (1.0, "index=1.0 must be one integer"),
            ([0, 1], "index=[0, 1] must be one integer"),
        ],
    )
    def test_refuses_an_index(self, index, message, refuses):
        stack = qjax.quantize(jnp.ones((3, 64, 8)), group_size=32)
        with refuses(message):
            qjax.matmul(jnp.ones((2, 64)), stack, index=index)

    def test_refuses_an_index_of_one_matrix(self, refuses):
        w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
        with refuses("index=0 is of a stack [count, k, n]; w.shape=(64, 8)"):
            qjax.matmul(jnp.ones((2, 64)), w, index=0)

    @pytest.mark.parametrize(
        ("name", "structure", "affine", "bits", "reason"),
        [
            ("xla_fused", "whole", "codebook", 4, "is not affine in whole groups"),
            ("xla_fused", "short", "zero", 4, "is not affine in whole groups"),
            ("xla_fused", "row_group", "zero", 4, "is not affine in whole groups"),
            ("xla_fused", "blocks", "zero", 4, "is not affine in whole groups"),
            ("xla_fused", "flat", "zero", 4, "is not affine in whole groups"),
            (
                "xla_fused",
                "group16",
                "zero",
                4,
                "group_size=16 is not a multiple of 32",
            ),
            (
                "xla_fused",
                "group16",
                "zero",
                3,
                "group_size=16 is not whole blocks of 3",
            ),
            (
                "xla_int8",
                "group16",
                "zero",
                3,
                "group_size=16 is not whole blocks of 3",
            ),
            ("xla_int8", "whole", "codebook", 4, "is not affine in whole groups"),
            ("xla_tiled", "blocks", "zero", 4, "has groups over several columns"),
            ("xla_tiled", "strided", "zero", 4, "has groups over several columns"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Grouping .* makes matmul form the dense weight")
    def test_a_name_never_falls_back(
        self, name, structure, affine, bits, reason, as_qtensor
    ):
        w = as_qtensor(sample(structure, affine, bits=bits))
        x = jnp.asarray(activations(2, w.k))
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            qjax.matmul(x, w, implementation=name)
        y = qjax.matmul(x, w)  # without a name another one takes it
        assert y.shape == (2, w.n)

    @pytest.mark.parametrize("name", ["xla_fused", "xla_tiled", "xla_int8"])
    @pytest.mark.parametrize(
        ("segment", "columns"), [((4, 32, 32), 40), ((4, 18, 28), 40), ((4, 32, 0), 32)]
    )
    def test_padded_words_are_declined(self, name, segment, columns):
        matrix = oracle.random(0, 96 if segment[2] == 32 else 64, 40)
        segment = tensor.Segment(*segment)
        k = len(matrix.codes) - segment.padding
        groups = -(-k // segment.group_size)
        scale = np.resize(matrix.scale, (groups, columns))
        zero = np.resize(matrix.zero, (groups, columns))
        w = tensor.build(
            [jnp.asarray(matrix.words[0])],
            jnp.asarray(scale),
            jnp.asarray(zero),
            layout=gptq.Stream(),
            segments=[segment],
            padding=40 - columns,
        )
        held = dataclasses.replace(
            matrix,
            codes=matrix.codes[:k, :columns],
            parts=(oracle.Part(4, k, segment.group_size),),
            scale=scale,
            zero=zero,
        )
        x = activations(2, k)
        with pytest.raises(NotImplementedError, match="has padding in its words"):
            qjax.matmul(jnp.asarray(x), w, implementation=name)
        found = qjax.matmul(jnp.asarray(x), w)
        assert relative_error(found, held.matmul(x)) < TOLERANCE["float32"]
        dx = jax.grad(lambda x: qjax.matmul(x, w).sum())(jnp.asarray(x))
        expected = held.gradients(x, np.ones((2, columns)))["x"]
        assert relative_error(dx, expected) < TOLERANCE["float32"]

    @pytest.mark.parametrize("columns", [1, 8])
    def test_zeros_with_columns_of_their_own(self, columns, as_qtensor):
        matrix = sample("whole")
        matrix = dataclasses.replace(matrix, zero=matrix.zero[:, :columns])
        x, dy = activations(2, 128), activations(2, 40, seed=2)
        w = as_qtensor(matrix)
        found = qjax.matmul(jnp.asarray(x), w)
        assert relative_error(found, matrix.matmul(x)) < TOLERANCE["float32"]
        if columns == 8:
            with pytest.raises(NotImplementedError, match="whole groups"):
                qjax.matmul(jnp.asarray(x), w, implementation="xla_fused")
            with pytest.raises(NotImplementedError, match="whole groups"):
                xla.grouped_grad(jnp.asarray(x), jnp.asarray(dy), w)

    @pytest.mark.parametrize("name", ["xla_fused", "xla_tiled", "xla_int8"])
    def test_foreign_layouts_are_moved_and_warned_of_once(self, name, as_qtensor):
        matrix = sample("whole", bits=3)
        planes = as_qtensor(matrix, gptq.Planar())
        x = activations(2, 128)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = qjax.matmul(jnp.asarray(x), planes, implementation=name)
            qjax.matmul(jnp.asarray(x), planes, implementation=name)
        messages = [str(warning.message) for warning in caught]
        assert messages == [
            "Planar() is moved to Stream() at every call of matmul; `qjax.prepare` "
            "does it once."
        ]
        # It points at the caller, but where each function is in one that checks types.
        if not hasattr(qjax.matmul, "__wrapped__"):
            assert Path(caught[0].filename).name == Path(__file__).name
        tolerance = TOLERANCE["int8" if name == "xla_int8" else "float32"]
        assert relative_error(y, matrix.matmul(x)) < tolerance

    def test_what_no_kernel_of_a_gpu_multiplies_is_warned_of(self, as_on_gpu):
        w, x = qjax.quantize(jnp.eye(128, 16), 4, 64), jnp.ones((1, 128), jnp.bfloat16)
        with pytest.warns(
            UserWarning, match=r"Stream\(\) is multiplied by XLA on this G"
        ):
            qjax.matmul(x, w)
        tiled = qjax.prepare(w, layout=Tiles())
        qjax.matmul(x, tiled)
        with pytest.warns(
            UserWarning, match="float32 x is multiplied by XLA on this GP"
        ):
            qjax.matmul(x.astype(jnp.float32), tiled)

    @pytest.mark.on_cpu
    def test_what_fills_no_words_is_warned_of(self):
        w = qjax.formats.bnb.quantize(jnp.eye(33, 4), bits=8)
        prepared = qjax.prepare(w)
        assert prepared.layout == w.layout
        with pytest.warns(UserWarning, match=r"Bytes\(\) of k=33 and 8 bits fills no"):
            qjax.matmul(jnp.ones((1, 33)), prepared)

    @pytest.mark.parametrize("structure", ["flat", "strided"])
    def test_foreign_groupings_are_warned_of_once(self, structure, as_qtensor):
        matrix = sample(structure)
        w, x = as_qtensor(matrix), activations(2, 64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = qjax.matmul(jnp.asarray(x), w)
            qjax.matmul(jnp.asarray(x), w)
        messages = [str(warning.message) for warning in caught]
        assert messages == [
            f"Grouping {structure!r} makes matmul form the dense weight."
        ]
        assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"]

    def test_a_layout_that_does_not_move_takes_the_dense_weight(self):
        matrix = oracle.random(0, 40, 16, bits=8, group_size=20)
        w = tensor.build(
            [jnp.asarray(matrix.codes[::-1] & 7)],
            jnp.asarray(matrix.scale),
            jnp.asarray(matrix.zero),
            layout=Reversed(),
            segments=[tensor.Segment(3, 20)],  # 40 rows of 3 bits fill no whole words
        )
        held = dataclasses.replace(matrix, codes=matrix.codes & 7)
        x = activations(2, 40)
        with pytest.warns(
            UserWarning, match=r"Reversed\(\) of k=40 and 3 bits fills no"
        ):
            y = qjax.matmul(jnp.asarray(x), w)
        assert relative_error(y, held.matmul(x)) < TOLERANCE["float32"]
        for name in ("xla_fused", "xla_tiled", "xla_int8"):
            with pytest.raises(NotImplementedError):
                qjax.matmul(jnp.asarray(x), w, implementation=name)

    def test_prepared_tensors_do_not_warn(self, as_qtensor):
        planes = as_qtensor(sample("whole", bits=3), gptq.Planar())
        w = qjax.prepare(planes)
        assert qjax.matmul(jnp.ones((2, 128)), w).shape == (2, 40)

    def test_act_order_gives_the_same_product_prepared(self, as_qtensor):
        matrix = sample("row_group", "float_zero")
        prepared = qjax.prepare(as_qtensor(matrix))
        assert prepared.row_group is None
        for m in (1, 5):
            x = activations(m, 96)
            for name in (None, "xla_fused", "xla_tiled", "xla_dense"):
                y = qjax.matmul(jnp.asarray(x), prepared, implementation=name)
                assert relative_error(y, matrix.matmul(x)) < TOLERANCE["float32"], name

    def test_when_all_decline_every_reason_is_told(self, monkeypatch, as_qtensor):
        def decline(*operands):
            raise NotImplementedError("not today")

        names = dict.fromkeys(dispatch.IMPLEMENTATIONS["matmul"], decline)
        monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {"matmul": names})
        ops._apply.clear_cache()
        w = as_qtensor(sample("whole", k=160))
        with pytest.raises(
            ExceptionGroup, match="no implementation of matmul"
        ) as caught:
            qjax.matmul(jnp.ones((1, 160)), w)
        assert [str(reason) for reason in caught.value.exceptions] == ["not today"] * 3


@dataclasses.dataclass(frozen=True)
class Reversed(tensor.Layout):
    """One byte a code, the last row first."""

    def pack(self, codes, bits):
        return codes[::-1]

    def unpack(self, words, bits):
        return words[::-1]

    def extents(self, shape, bits):
        return shape


class TestMemory:
    """4096 x 4096: in float32 the weight has 64 MiB, in bfloat16 32 MiB."""

    SIZE, MIB = 4096, 2**20
    # What the tiles and the decoded words of a few rows need, whatever the width.
    FIXED = 8 * MIB

    def abstract(self, bits, dtype, m, *, order=False):
        w = jax.eval_shape(
            lambda w: qjax.quantize(w, bits),
            jax.ShapeDtypeStruct((self.SIZE, self.SIZE), dtype),
        )
        if order:  # act-order as `prepare` leaves it
            indices = jax.ShapeDtypeStruct((self.SIZE,), jnp.int32)
            w = dataclasses.replace(w, order=indices)
        return jax.ShapeDtypeStruct((m, self.SIZE), dtype), w

    def temporaries(self, function, *operands) -> int:
        compiled = jax.jit(function).lower(*operands).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def gradients(self, x, scale, w):
        def loss(x, scale):
            y = qjax.matmul(x, dataclasses.replace(w, scale=scale))
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1))(x, scale)

    CASES = (
        *(
            (4, dtype, m, False)
            for dtype in ("float32", "bfloat16")
            for m in (1, 16, 512)
        ),
        (3, "float32", 1, False),
        (3, "float32", 16, False),
        (4, "bfloat16", 16, True),
    )

    @pytest.mark.parametrize(("bits", "dtype", "m", "order"), CASES)
    def test_forward_forms_no_weight(self, bits, dtype, m, order):
        x, w = self.abstract(bits, dtype, m, order=order)
        # In float32: x in steps, y in runs of columns, and y.
        activations = 3 * 4 * m * self.SIZE
        assert self.temporaries(qjax.matmul, x, w) < activations + self.FIXED

    @pytest.mark.parametrize(("bits", "dtype", "m", "order"), CASES)
    def test_backward_forms_no_weight(self, bits, dtype, m, order):
        x, w = self.abstract(bits, dtype, m, order=order)
        # y, dy and dx besides, and dy in the dtype of x.
        activations = 5 * 4 * m * self.SIZE
        assert (
            self.temporaries(self.gradients, x, w.scale, w) < activations + self.FIXED
        )

    def test_the_dense_weight_is_seen(self):
        # The measure works: the form that makes the weight has it all.
        x, w = self.abstract(4, "float32", 16)
        dense = self.temporaries(
            lambda x, w: qjax.matmul(x, w, implementation="xla_dense"), x, w
        )
        assert dense >= 4 * self.SIZE**2


class TestQuantize:
    # Frobenius error over that of the weight, for one normal matrix in groups of 64.
    ERRORS = types.MappingProxyType(
        {
            False: (0.45985, 0.19615, 0.09121, 0.04427, 0.02182, 0.01080, 0.00538),
            True: (0.51358, 0.22108, 0.10316, 0.05009, 0.02452, 0.01220, 0.00607),
        }
    )

    @staticmethod
    def normal(*shape) -> np.ndarray:
        return np.random.default_rng(0).normal(size=shape).astype(F32)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_ranges_wider_than_the_largest_number(self, symmetric):
        w = np.full((64, 2), 3e38, F32)
        w[::2, 1] *= -1
        q = qjax.quantize(jnp.asarray(w), 4, 32, symmetric)
        np.testing.assert_allclose(qjax.dequantize(q), w, rtol=0.07)

    def test_refuses_what_has_no_values(self, refuses):
        with refuses("w is abstract, a shape without values", TypeError):
            qjax.quantize(jax.ShapeDtypeStruct((64, 8), jnp.float32))

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_accuracy(self, symmetric, bits):
        w = self.normal(256, 128)
        q = qjax.quantize(jnp.asarray(w), bits, 64, symmetric)
        assert (q.shape, q.bits, q.layout) == (w.shape, bits, gptq.Stream())
        error = np.asarray(qjax.dequantize(q), np.float64) - w
        relative = np.linalg.norm(error) / np.linalg.norm(w)
        # The same on every machine but for codes on a tie, one in some thousand.
        assert relative == pytest.approx(self.ERRORS[symmetric][bits - 2], rel=1e-3)
        # A code away from an end of the range is the nearest one.
        step = np.repeat(np.asarray(q.scale, np.float64), 64, axis=0)
        codes = np.asarray(qjax.codes(q))
        inner = (codes > 0) & (codes < 2**bits - 1)
        assert (np.abs(error)[inner] <= 0.5001 * step[inner]).all()
        # Rounding the zero shifts the range by half a step: the ends are off by one.
        assert (np.abs(error) <= 1.0001 * step).all()

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_the_rule(self, symmetric):
        w = self.normal(64, 40)
        q = qjax.quantize(jnp.asarray(w), 4, 32, symmetric)
        groups = w.reshape(2, 32, 40)
        if symmetric:
            scale = 2 * np.abs(groups).max(1) / F32(15)
            zero = np.full((2, 40), 8)
            assert q.zero is None
            assert q.affine is tensor.Affine.CENTERED
        else:
            low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
            scale = (high - low) / F32(15)
            zero = np.round(-low / scale)
            chex.assert_trees_all_equal(np.asarray(q.zero), zero.astype(np.uint8))
        # XLA may divide by multiplying: one unit in the last place.
        chex.assert_trees_all_close(np.asarray(q.scale), scale, rtol=2.0**-23)
        steps = groups / scale[:, None]
        codes = np.clip(np.round(steps) + zero[:, None], 0, 15).reshape(64, 40)
        # The largest of a symmetric group lies on a tie, at 7.5 steps.
        tie = np.isclose(np.abs(steps % 1), 0.5, atol=1e-4).reshape(64, 40)
        found = np.asarray(qjax.codes(q)).astype(F32)
        chex.assert_trees_all_equal(found[~tie], codes[~tie])
        chex.assert_trees_all_close(found[tie], codes[tie], atol=1)
        assert tie.mean() < 0.05

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 1e-30])
    def test_constant_groups(self, value, symmetric):
        w = jnp.full((64, 8), value)
        q = qjax.quantize(w, 4, 32, symmetric)
        weight = np.asarray(qjax.dequantize(q))
        assert np.isfinite(weight).all()
        # Symmetric codes end half a step below the largest value: 1/15 of it.
        tolerance = 1 / 15 if symmetric else 1e-6
        np.testing.assert_allclose(weight, value, rtol=tolerance)

    def test_zero_stays_zero(self):
        w = self.normal(64, 40)
        w[::3] = 0
        for symmetric in (False, True):
            weight = qjax.dequantize(qjax.quantize(jnp.asarray(w), 3, 32, symmetric))
            assert not np.asarray(weight)[::3].any()

    def test_groups_too_small_for_the_dtype(self):
        w = jnp.full((64, 8), 1e-6).at[:32].set(1)
        q = qjax.quantize(w, 4, 32, scale_dtype=jnp.float16)
        assert float(q.scale[1, 0]) == 2.0**-20  # which has five bits
        assert np.isfinite(np.asarray(qjax.dequantize(q))).all()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_small_weights_in_float16(self, bits):
        """Scales below float16's normal numbers have fewer bits, and are scales."""
        w = self.normal(256, 32) * 5e-4
        half, whole = (
            np.linalg.norm(qjax.dequantize(qjax.quantize(x, bits, 64), F32) - w)
            for x in (jnp.asarray(w, jnp.float16), jnp.asarray(w, F32))
        )
        assert half < 1.1 * whole
        zeros = qjax.quantize(jnp.zeros((64, 8), jnp.float16), bits, 32)
        assert not np.asarray(qjax.dequantize(zeros)).any()

    @pytest.mark.parametrize("scale_dtype", [None, "float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_dtypes(self, dtype, scale_dtype):
        w = jnp.asarray(self.normal(64, 40)).astype(dtype)
        q = qjax.quantize(w, 8, 32, scale_dtype=scale_dtype)
        assert q.dtype == (scale_dtype or dtype)
        assert q.zero.dtype == jnp.uint8
        # Codes are rounded against the scale as it is stored: half a step, whatever its
        # dtype. The ends of the range are off by one, and by what 255 steps of a scale
        # that was rounded down are too short.
        error = np.asarray(qjax.dequantize(q, jnp.float32) - w.astype(jnp.float32))
        step = np.repeat(np.asarray(q.scale).astype(F32), 32, axis=0)
        ends = 1 + 255 * float(jnp.finfo(q.dtype).eps) / 2
        assert (np.abs(error) <= 1.0001 * ends * step).all()
        assert (np.abs(error) <= 0.5001 * step).mean() > 0.97

    def test_stacks(self):
        w = self.normal(6, 64, 40).reshape(2, 3, 64, 40)
        stack = qjax.quantize(jnp.asarray(w), 3, 32)
        assert stack.shape == (2, 3, 64, 40)
        for i, j in np.ndindex(2, 3):
            one = qjax.quantize(jnp.asarray(w[i, j]), 3, 32)
            chex.assert_trees_all_equal(
                jax.tree.map(lambda leaf, at=(i, j): leaf[at], stack), one
            )

    def test_columns(self):
        q = qjax.quantize(jnp.asarray(self.normal(96, 8)), 4, None)
        assert (q.scale.shape, q.segments) == ((1, 8), (tensor.Segment(4, None),))

    def test_float64_of_numpy(self, refuses):
        w = self.normal(64, 40).astype(np.float64)
        assert qjax.quantize(w, 4, 32).dtype == jnp.float32
        with jax.enable_x64(True), refuses("scale_dtype=float64, that of w, must be"):
            qjax.quantize(w, 4, 32)

    def test_under_jit_and_eval_shape(self):
        w = jnp.asarray(self.normal(64, 40))

        def quantize(w):
            return qjax.quantize(w, 4, 32)

        chex.assert_trees_all_equal(jax.jit(quantize)(w), quantize(w))
        abstract = jax.eval_shape(quantize, w)
        assert (abstract.shape, abstract.dtype) == ((64, 40), jnp.float32)
        assert abstract.words[0].shape == (8, 40)

    @pytest.mark.parametrize(
        ("shape", "dtype", "arguments", "message"),
        [
            (
                (64,),
                "float32",
                {},
                "w must be float [..., k, n] without an extent of 0; got float32(64,)",
            ),
            (
                (64, 8),
                "int32",
                {},
                "w must be float [..., k, n] without an extent of 0; got int32(64, 8)",
            ),
            ((128, 8), "float32", {"bits": 0}, "bits=0 must be an integer from 2 to 8"),
            ((128, 8), "float32", {"bits": 9}, "bits=9 must be an integer from 2 to 8"),
            ((128, 8), "float32", {"bits": 1}, "bits=1 must be an integer from 2 to 8"),
            (
                (36, 8),
                "float32",
                {"group_size": None},
                "w.shape[-2]=36 must be a multiple of 8, so that 4-bit codes fill",
            ),
            (
                (64, 0),
                "float32",
                {},
                "without an extent of 0; got float32(64, 0)",
            ),
            (
                (48, 8),
                "float32",
                {"bits": 3},
                "w.shape[-2]=48 must be a multiple of 32",
            ),
            (
                (64, 8),
                "float32",
                {},
                "w.shape[-2]=64 must be a multiple of group_size=128; choose one that",
            ),
            (
                (64, 8),
                "float32",
                {"group_size": 0},
                "group_size=0 must be a positive integer or None",
            ),
            (
                (64, 8),
                "float32",
                {"group_size": 32.0},
                "group_size=32.0 must be a positive integer or None",
            ),
            (
                (64, 8),
                "float32",
                {"group_size": True},
                "group_size=True must be a positive integer or None",
            ),
            (
                (64, 8),
                "float32",
                {"bits": True},
                "bits=True must be an integer from 2 to 8",
            ),
            (
                (64, 8),
                "float32",
                {"group_size": 32, "scale_dtype": "int8"},
                "scale_dtype=int8 must be bfloat16, float16 or float32",
            ),
        ],
    )
    def test_refuses(self, shape, dtype, arguments, message, refuses):
        with refuses(message):
            qjax.quantize(jnp.zeros(shape, dtype), **arguments)

    def test_refuses_lists(self, refuses):
        with refuses("w is list, and must be an array", TypeError):
            qjax.quantize([[1.0] * 8] * 64, group_size=32)

    def test_integers_of_numpy_are_integers(self):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
        found = qjax.quantize(w, bits=np.int8(8), group_size=np.int64(32))
        chex.assert_trees_all_equal(found, qjax.quantize(w, bits=8, group_size=32))
        assert repr(found.segments) == repr((tensor.Segment(8, 32),))


class TestPrepare:
    @pytest.mark.on_cpu
    def test_moves_to_the_native_layout(self, as_qtensor):
        m = oracle.random(0, 64, 40, bits=3)
        planes = as_qtensor(m, gptq.Planar())
        tree = {"a": [planes, None], "b": jnp.ones(3), "c": "text"}
        prepared = qjax.prepare(tree)
        chex.assert_trees_all_equal(prepared["a"][0], as_qtensor(m))
        assert prepared["a"][1] is None
        assert prepared["b"] is tree["b"]
        assert prepared["c"] == "text"

    @pytest.mark.parametrize("order", [False, True])
    def test_full_groups_become_an_order(self, order, as_qtensor):
        m = oracle.random(0, 128, 40, row_group=True, order=order, input_scale=True)
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
        m = oracle.random(0, 128, 40, group_size=64, row_group=True)
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
        matrix = oracle.random(0, 64, 40)
        w = as_qtensor(dataclasses.replace(matrix, row_group=groups.astype(np.int32)))
        prepared = qjax.prepare(w)
        full = (np.bincount(groups, minlength=2) == 32).all()
        assert (prepared.row_group is None) == full
        chex.assert_trees_all_equal(qjax.dequantize(prepared), qjax.dequantize(w))

    def test_groups_that_fill_no_words_stay(self, as_qtensor):
        w = as_qtensor(oracle.random(0, 64, 40, bits=3, group_size=16, row_group=True))
        chex.assert_trees_all_equal(qjax.prepare(w), w)

    def test_stacks_keep_their_row_group(self, as_qtensor):
        w = as_qtensor(oracle.random(0, 64, 40, row_group=True))
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
        chex.assert_trees_all_equal(qjax.prepare(stack), stack)

    def test_what_no_native_layout_holds_stays(self, as_qtensor):
        m = oracle.random(0, 44, 40, bits=8, group_size=11)
        w = tensor.build(
            [jnp.asarray(m.codes[::-1] & 15)],
            jnp.asarray(m.scale),
            jnp.asarray(m.zero),
            layout=Reversed(),
            segments=[tensor.Segment(4, 11)],  # 44 rows of 4 bits fill no whole words
        )
        prepared = qjax.prepare(w)
        assert prepared.layout == Reversed()
        chex.assert_trees_all_equal(prepared, w)
