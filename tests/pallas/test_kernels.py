"""Kernels in interpret mode against the float64 oracle."""

import dataclasses
import functools
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import decode, pallas, tensor
from qjax.formats.tiles import Tiles
from qjax.pallas import configs, operands, products, unpack
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import matvec
from qjax.pallas.operands import Config
from qjax.pallas.rows import prepare
from qjax.pallas.scale_grad import scale_grad
from tests import oracle
from tests.oracle import relative_error
from tests.pairs import pairwise
from tests.samples import (
    BF16,
    CODEBOOK,
    F16,
    F32,
    FLOAT,
    MAPS,
    SCALES,
    in_tiles,
    random_matrix,
    rows,
)

# Whole tiles of the kernels, and ragged ones: of the storage and of the tiles.
SHAPES = {"whole": (512, 128), "ragged": (360, 136), "one unit": (96, 16)}
GROUPS = (16, 32, 128, None, 96)
ROWS = (1, 5, 16, 33, 130)
# Relative to the largest output: float32 sums whose terms stand up to 1024 steps of a
# code above it, so that fewer bits lose more (`qjax.pallas.unpack`). A twentieth of
# what rounding an operand to float16 costs.
TOLERANCE = 5e-5
# float16 rounds the weight, or what is multiplied by it, once: 2**-11.
ROUNDED = 1e-3


def tolerance(config: Config, w: qjax.QTensor) -> float:
    """What `matmul` with this configuration may be off by."""
    # Entries of a codebook are rounded, too.
    rounded = config.scales_weights or w.codebook is not None
    return ROUNDED if rounded else TOLERANCE


def sample(case: dict, seed: int = 0) -> oracle.Matrix:
    k, n = SHAPES[case["shape"]]
    return random_matrix(
        seed,
        k,
        n,
        bits=case["bits"],
        group_size=case["group"],
        scale=case["scale"],
        **(MAPS | CODEBOOK | FLOAT)[case["affine"]],
    )


def label(case: dict) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


AXES = {
    "bits": range(1, 9),
    "affine": list(MAPS | CODEBOOK | FLOAT),
    "group": GROUPS,
    "shape": list(SHAPES),
    "scale": [*SCALES, "nested"],
}
# The unpacking is that of matmul: fewer widths.
OTHER = AXES | {"bits": (3, 4, 8), "group": (16, 128, None)}
# What the ``case`` of a test is made of.
COVERED = {
    "test_matmul": AXES | {"m": ROWS},
    "test_matvec": AXES
    | {
        "group": (16, 128, None, 96),
        "m": (1, 2, 3, 5, 8),
        "x": ("bfloat16", "float16"),
    },
    "test_dequantize_is_bit_exact": OTHER | {"dtype": (None, "float32", "bfloat16")},
    "test_gradients": OTHER,
}


def is_covered(case: dict) -> bool:
    """Whether there are such tensors; of a part of a case, whether there may be."""
    widths = {"codebook": (4,), "float": (4, 8)}
    return case.get("bits", 4) in widths.get(case.get("affine"), range(1, 9))


def pytest_generate_tests(metafunc):
    axes = COVERED.get(metafunc.function.__name__)
    if axes is None:
        return
    if metafunc.config.getoption("--every-case", default=False):
        products = itertools.product(*axes.values())
        cases = [dict(zip(axes, values, strict=True)) for values in products]
        cases = list(filter(is_covered, cases))
    else:
        cases = pairwise(is_covered, **axes)
    metafunc.parametrize("case", cases, ids=label)


def test_the_cover_is_affordable():
    assert len(pairwise(is_covered, **COVERED["test_matmul"])) <= 60


def test_matmul(case):
    matrix, m = sample(case), case["m"]
    x = rows(m, len(matrix.codes))
    w = in_tiles(matrix)
    config = configs.for_matmul(m, w)
    y = matmul(jnp.asarray(x), w, config, interpret=True)
    assert y.dtype == jnp.float32
    assert relative_error(y, matrix.matmul(x)) < tolerance(config, w)


def test_matvec(case):
    matrix, m = sample(case), case["m"]
    x, w = rows(m, len(matrix.codes)), in_tiles(matrix)
    x, config = jnp.asarray(x, case["x"]), configs.for_matvec(m, w)
    y = matvec(x, w, config, interpret=True)
    assert y.dtype == jnp.float32
    half_a_step = float(jnp.finfo(x.dtype).eps) / 2
    allowed = TOLERANCE if w.codebook is None else half_a_step
    assert relative_error(y, matrix.matmul(np.asarray(x, F32))) < allowed


@pytest.mark.parametrize(
    "config",
    [
        Config(8, slices=8, splits=3, warps=2),
        Config(16, slices=8, warps=2),
        Config(32, 64, slices=4),
        Config(8, 64, slices=2, splits=2, warps=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 7])
def test_slices_that_do_not_fit(config, m):
    # Slices that are left without rows of the weight, programs without rows of x.
    matrix = oracle.random(0, 360, 136, bits=4, group_size=64, float_zero=True)
    x, w = rows(m, 360), in_tiles(matrix)
    y = matvec(jnp.asarray(x, jnp.bfloat16), w, config, interpret=True)
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE


def test_constants_of_matvec_are_exact():
    # What the tensor cores multiply by the sums of x.
    for dtype, bits in itertools.product((BF16, F16), range(1, 9)):
        for recipe in unpack.recipes(bits, jnp.dtype(dtype)):
            for affine in tensor.Affine:
                constant = recipe.offset + affine.centre(bits)
                assert float(dtype(constant)) == constant


def test_dequantize_is_bit_exact(case):
    w = in_tiles(sample(case))
    dtype = case["dtype"] and jnp.dtype(case["dtype"])
    found = dequantize(w, dtype, configs.for_dequantize(w), interpret=True)
    expected = decode.stored_weight(w, dtype)
    if w.scale.dtype == F32 and case["affine"] in ("offset", "centered_zero"):
        # The product is inexact, and a compiler may or may not round it before it adds
        # the zero.
        chex.assert_trees_all_close(found, expected, rtol=0, atol=_last_place(w))
    else:
        chex.assert_trees_all_equal(found, expected)


def _last_place(w) -> float:
    """A unit in the last place of the largest product of a code and a scale."""
    return float(jnp.abs(tensor.plain(w.scale)).max()) * 2**w.bits * 2.0**-23


def test_gradients(case):
    matrix, m = sample(case), 5
    w, (k, n) = in_tiles(matrix), matrix.codes.shape
    x, dy = rows(m, k), rows(m, n, seed=2)
    expected = matrix.gradients(x, dy)
    config = configs.for_matmul_t(m, w)
    dx = matmul_t(jnp.asarray(dy), w, config, interpret=True)
    assert relative_error(dx, expected.pop("x")) < ROUNDED
    if w.codebook is not None:
        return  # Its entries' gradient is XLA's, and with it that of the scales.
    config = configs.for_scale_grad(m, w)
    found = scale_grad(jnp.asarray(x), jnp.asarray(dy), w, config, interpret=True)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["global", "over global"])
def test_a_number_for_the_whole_matrix(scale):
    case = {"bits": 4, "affine": "float", "group": 16, "shape": "ragged"}
    matrix = sample(case | {"scale": scale})
    w, (k, n) = in_tiles(matrix), matrix.codes.shape
    for m in (1, 130):
        x = rows(m, k)
        for kernel, configure in (
            (matvec, configs.for_matvec),
            (matmul, configs.for_matmul),
        ):
            if m > configs.FEW_ROWS and kernel is matvec:
                continue
            y = kernel(jnp.asarray(x, jnp.bfloat16), w, configure(m, w), interpret=True)
            assert relative_error(y, matrix.matmul(x)) < TOLERANCE
    dy = jnp.asarray(rows(5, n, seed=2))
    dx = matmul_t(dy, w, configs.for_matmul_t(5, w), interpret=True)
    assert relative_error(dx, np.asarray(dy) @ matrix.weight.T) < ROUNDED
    config = configs.for_dequantize(w)
    exact = dequantize(w, F32, config, interpret=True)
    chex.assert_trees_all_equal(exact, decode.stored_weight(w, F32))
    halved = dequantize(w, F32, config, unit=jnp.float32(0.5), interpret=True)
    assert relative_error(halved, matrix.weight / 2) < 1e-6


# Widths whose blocks are larger and smaller than a step, k of any number of steps.
@pytest.mark.parametrize(
    ("bits", "k", "group", "block_k", "affine", "sums"),
    [
        (4, 768, 128, 128, "ZERO", 2),
        (3, 512, 64, 256, "CENTERED", 1),
        (4, 512, 32, 256, "OFFSET", 2),
        (8, 256, 32, 128, "ZERO", 2),
        (4, 256, 64, 256, "CODEBOOK", 0),
        (1, 1280, 256, 256, "ZERO", 2),
    ],
)
def test_rows_are_those_of_jnp(bits, k, group, block_k, affine, sums):
    x = jnp.asarray(rows(5, k) * F32(1e6), jnp.bfloat16)
    affine = tensor.Affine[affine]
    steps = operands.Steps.of(bits, group, Config(8, block_k=block_k).fitting(bits, k))
    found = prepare(x, bits, affine, steps, sums=sums, block_m=8, interpret=True)
    fitted, unscale = operands.fit(jnp.pad(x, ((0, 3), (0, 0))))
    chex.assert_trees_all_equal(found.x, operands.arrange(fitted, steps))
    chex.assert_trees_all_equal(found.unscale, unscale)
    if not sums:
        assert found.start is None
        return
    expected = operands.start(fitted, bits, affine, steps, zeros=sums == 2)
    chex.assert_trees_all_close(
        found.start, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max())
    )


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_entries_of_a_codebook_are_rounded_to_the_arithmetic(dtype):
    # Against the same product with the rounded codebook, nothing is lost.
    matrix = oracle.random(0, 256, 48, group_size=64, affine="CODEBOOK")
    largest = np.abs(matrix.codebook).max()
    rounded = (matrix.codebook / 2 ** np.floor(np.log2(largest))).astype(dtype)
    same = dataclasses.replace(matrix, codebook=rounded.astype(F32))
    x, w = rows(5, 256), in_tiles(same)
    y = matvec(jnp.asarray(x, dtype), w, Config(8), interpret=True)
    assert relative_error(y, same.matmul(x)) < 1e-6
    if dtype == F16:
        y = matmul(jnp.asarray(x), w, Config(8), interpret=True)
        assert relative_error(y, same.matmul(x)) < 1e-6


@pytest.fixture(scope="module", params=["offset", "codebook", "float"])
def stack(request):
    maps = MAPS | CODEBOOK | FLOAT
    matrices = [
        oracle.random(i, 384, 80, group_size=64, dtype=F16, **maps[request.param])
        for i in range(3)
    ]
    each = list(map(in_tiles, matrices))
    return matrices, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


class TestStacks:
    """Matrices of a stack by index, read where they lie."""

    @pytest.mark.slow
    def test_every_kernel(self, stack):
        matrices, stacked = stack
        x, dy = rows(5, 384), rows(5, 80, seed=2)
        config = Config(16, 32, 128, splits=2)
        of_one = {"w": stacked, "index": jnp.int32(2), "interpret": True}
        expected = matrices[2].gradients(x, dy)
        y = matmul(jnp.asarray(x), config=config, **of_one)
        assert relative_error(y, matrices[2].matmul(x)) < tolerance(config, stacked)
        dx = matmul_t(jnp.asarray(dy), config=config, **of_one)
        assert relative_error(dx, expected.pop("x")) < ROUNDED
        found = dequantize(dtype=None, config=Config(8), **of_one)
        one = jax.tree.map(lambda leaf: leaf[2], stacked)
        chex.assert_trees_all_equal(found, decode.stored_weight(one))
        if stacked.codebook is None:
            operands = map(jnp.asarray, (x, dy))
            gradients = scale_grad(*operands, config=Config(8), **of_one)
            for name, gradient in gradients.items():
                assert relative_error(gradient, expected[name]) < TOLERANCE, name

    def test_a_matrix_for_every_block(self, stack):
        matrices, stacked = stack
        x, index = rows(30, 384), [2, 0, -1, 1]  # the last block has six rows
        config = Config(8, 32, 128, splits=2)
        y = matmul(
            jnp.asarray(x), stacked, config, index=jnp.array(index), interpret=True
        )
        for i, e in enumerate(index):
            block = slice(8 * i, 8 * i + 8)
            if e < 0:
                assert not y[block].any()
            else:
                alone = matrices[e].matmul(x[block])
                assert relative_error(y[block], alone) < tolerance(config, stacked)

    # `matvec` and `matmul`, which has one arithmetic for both.
    @pytest.mark.parametrize(
        ("m", "dtype"), [(3, F32), (3, BF16), (8, BF16), (32, BF16), (128, F32)]
    )
    def test_blocks(self, m, dtype, stack, monkeypatch):
        matrices, stacked = stack
        for kernel in (matmul, matvec):
            interpreted = functools.partial(kernel, interpret=True)
            monkeypatch.setattr(products, kernel.__name__, interpreted)
        x = rows(3 * m, 384).reshape(3, m, 384)
        y = products.fused_blocks(jnp.asarray(x, dtype), stacked, jnp.array([1, -1, 2]))
        assert not y[1].any()
        allowed = tolerance(configs.for_blocks("matmul", 3, m, stacked), stacked)
        if stacked.codebook is not None and products.takes_few_rows(m, dtype):
            allowed = float(jnp.finfo(dtype).eps) / 2
        for i, e in ((0, 1), (2, 2)):
            alone = matrices[e].matmul(x[i])
            assert relative_error(y[i], alone) < allowed

    @pytest.mark.slow
    def test_mixed_widths(self):
        parts = MIXES["exl2"]
        matrices = [
            oracle.random(i, 416, 40, parts=parts, dtype=F16, affine="CENTERED")
            for i in range(2)
        ]
        each = list(map(in_tiles, matrices))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        x = rows(5, 416)
        y = matmul(
            jnp.asarray(x), stacked, Config(8), index=jnp.int32(1), interpret=True
        )
        assert relative_error(y, matrices[1].matmul(x)) < TOLERANCE
        x = rows(16, 416)
        index = jnp.array([1, 0])
        y = matmul(jnp.asarray(x), stacked, Config(8), index=index, interpret=True)
        expected = [matrices[1].matmul(x[:8]), matrices[0].matmul(x[8:])]
        assert relative_error(y, np.concatenate(expected)) < TOLERANCE


MIXES = {
    "exl2": [(5, 96, 32), (4, 256, 128), (3, 64, 64)],
    "one width twice": [(4, 128, 128), (4, 96, 32)],
}


@pytest.mark.parametrize(
    ("mix", "affine"), [("exl2", "centered"), ("one width twice", "offset")]
)
def test_mixed_widths_in_one_launch(mix, affine):
    parts = MIXES[mix]
    matrix = oracle.random(
        0, sum(k for _, k, _ in parts), 40, parts=parts, dtype=F16, **MAPS[affine]
    )
    w, x = in_tiles(matrix), rows(5, len(matrix.codes))
    y = matmul(jnp.asarray(x), w, Config(8, splits=2), interpret=True)
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE


class TestConfigs:
    @pytest.mark.parametrize(
        ("block_m", "block_k", "splits"), [(8, 128, 3), (16, 256, 1), (64, 128, 2)]
    )
    def test_matmul_is_the_same_however_it_is_cut(self, block_m, block_k, splits):
        matrix = oracle.random(3, 640, 48, group_size=128, dtype=F16)
        x, w = rows(9, 640), in_tiles(matrix)
        config = Config(block_m, 32, block_k, splits, warps=2)
        y = matmul(jnp.asarray(x), w, config, interpret=True)
        assert relative_error(y, matrix.matmul(x)) < tolerance(config, w)

    def test_the_heuristic_fills_the_gpu_and_keeps_a_pipeline(self):
        w = jax.eval_shape(lambda: in_tiles(oracle.random(0, 512, 128, dtype=F16)))
        wide = qjax.quantize(jnp.zeros((8192, 8192), jnp.float16))
        for m in (1, 8, 16, 32, 64, 100):
            config = configs.heuristic("matmul", m, wide)
            assert config.block_m >= m
            # Of 132 multiprocessors, each with as many warps as have the registers.
            programs, most = 64 * config.splits, 8 if m in (32, 64) else 16
            assert 132 * 0.6 * most <= programs * config.warps <= 132 * most
            # What splits write and read again is at most twice the codes.
            assert 2 * 4 * config.splits * m <= 2 * 8192 * 4 / 8
            assert configs.heuristic("matmul", m, w).splits == 1

    def test_bfloat16_arithmetic_rounds_no_weight(self):
        wide = qjax.quantize(jnp.zeros((8192, 8192), jnp.float16))
        for m in (1, 32, 33, 200):
            assert not configs.for_exact(m, wide).scales_weights
        assert configs.for_exact(8, wide) == configs.for_matmul(8, wide)


def prepared(x, w):
    """`matmul`, which scales rows into the range of float16."""
    return matmul(jnp.asarray(x), w, Config(8), interpret=True)


def sliced(x, w):
    """`matvec`, whose arithmetic has the range of bfloat16."""
    config = Config(16, slices=4, warps=2)
    return matvec(jnp.asarray(x, jnp.bfloat16), w, config, interpret=True)


both_kernels = pytest.mark.parametrize("product", [prepared, sliced])


class TestRange:
    """float16 has a narrow exponent: powers of two keep rows and scales inside."""

    @both_kernels
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1e9, 1e30])
    def test_rows_of_any_magnitude(self, magnitude, product):
        matrix = oracle.random(0, 512, 32, dtype=F16)
        x = (rows(3, 512) * np.float32(magnitude)).astype(BF16).astype(F32)
        y = product(x, in_tiles(matrix))
        assert relative_error(y, matrix.matmul(x)) < TOLERANCE

    @both_kernels
    def test_outliers(self, product):
        # One feature a thousand times the others, as in the residuals of real models.
        matrix = oracle.random(0, 512, 64, group_size=128, dtype=F16)
        x = rows(4, 512)
        x[:, 7] *= 1024
        assert (
            relative_error(product(x, in_tiles(matrix)), matrix.matmul(x)) < TOLERANCE
        )

    def test_what_vanishes_is_2_to_minus_39_of_the_largest(self):
        x = np.array([[2.0**60, 2.0**21, -(2.0**60)]], F32)
        fitted, undo = operands.fit(jnp.asarray(x))
        back = np.asarray(fitted, np.float64) * np.asarray(undo, np.float64)
        assert np.abs(back - x).max() <= 2.0**60 * 2.0**-39

    @both_kernels
    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
    def test_infinities_and_nan_stay_in_their_rows(self, value, product):
        matrix = oracle.random(0, 512, 32, dtype=F16)
        x = rows(3, 512)
        x[1, 5] = value
        y = np.asarray(product(x, in_tiles(matrix)))
        assert not np.isfinite(y[1]).any()
        assert relative_error(y[[0, 2]], matrix.matmul(x[[0, 2]])) < TOLERANCE

    @both_kernels
    def test_a_row_of_zeros(self, product):
        w = in_tiles(oracle.random(0, 128, 32, dtype=F16))
        y = product(jnp.zeros((2, 128)), w)
        chex.assert_trees_all_equal(y, jnp.zeros((2, 32)))

    # Scales on both sides of float16's range, in columns and groups side by side.
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e4, 1e30])
    @pytest.mark.parametrize("affine", ["zero", "offset", "codebook"])
    @pytest.mark.parametrize("dtype", [BF16, F32])
    def test_weights_of_any_magnitude(self, magnitude, affine, dtype):
        matrix = oracle.random(
            0, 256, 48, group_size=32, dtype=F32, **(MAPS | CODEBOOK)[affine]
        )
        spread = 2.0 ** np.random.default_rng(1).integers(-8, 1, matrix.scale.shape)
        leaves = {
            name: (getattr(matrix, name) * spread * magnitude).astype(dtype)
            for name in ("scale", "zero")
            if name == "scale" or affine == "offset"
        }
        matrix = dataclasses.replace(matrix, **leaves)
        x = rows(33, 256)
        config = Config(64, 32, 64, splits=2)
        y = matmul(jnp.asarray(x), in_tiles(matrix), config, interpret=True)
        assert relative_error(y, matrix.matmul(x)) < ROUNDED

    @pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e4, 1e30])
    def test_scales_of_any_magnitude_in_the_backward(self, scale):
        matrix = oracle.random(0, 128, 32, dtype=F32)
        matrix = dataclasses.replace(matrix, scale=matrix.scale * F32(scale))
        dy = rows(3, 32)
        w = in_tiles(matrix)
        dx = matmul_t(jnp.asarray(dy), w, Config(16, 64), interpret=True)
        assert relative_error(dx, dy.astype(np.float64) @ matrix.weight.T) < ROUNDED

    @pytest.mark.parametrize("ratio", [1.0, 1e5, 1e9])
    def test_added_zeros_of_any_magnitude_in_the_dense_weight(self, ratio, monkeypatch):
        interpreted = functools.partial(dequantize, interpret=True)
        monkeypatch.setattr(products, "dequantize", interpreted)
        matrix = oracle.random(0, 128, 32, dtype=F32, **MAPS["offset"])
        matrix = dataclasses.replace(matrix, zero=matrix.zero * F32(ratio))
        w, x, dy = in_tiles(matrix), rows(9, 128), rows(9, 32, seed=2)
        y = products.dense(jnp.asarray(x), w)
        assert relative_error(y, matrix.matmul(x)) < ROUNDED
        dx = products.dense_t(jnp.asarray(dy), w)
        assert relative_error(dx, matrix.gradients(x, dy)["x"]) < ROUNDED


class TestBfloat16:
    """Operands in bfloat16, on request: of any range, and not scaled."""

    run = staticmethod(
        functools.partial(
            matmul, config=Config(8), dtype=jnp.dtype(jnp.bfloat16), interpret=True
        )
    )

    @pytest.mark.parametrize(
        ("bits", "affine"), [(4, "ZERO"), (7, "OFFSET"), (3, "CENTERED"), (8, "ZERO")]
    )
    def test_product(self, bits, affine):
        matrix = oracle.random(
            0, 256, 48, bits=bits, group_size=64, dtype=F16, affine=affine
        )
        x = rows(3, 256)
        y = self.run(jnp.asarray(x), in_tiles(matrix))
        # The offset of a code is an eighth of that in float16.
        assert relative_error(y, matrix.matmul(x)) < TOLERANCE

    def test_elements_of_any_range(self):
        # float16 would lose the second: the first has a code of 0 in all columns.
        matrix = oracle.random(0, 128, 32, dtype=F16)
        codes = matrix.codes.copy()
        codes[7], matrix.zero[:] = 0, 0
        matrix = dataclasses.replace(matrix, codes=codes)
        x = np.zeros((1, 128), F32)
        x[0, 7], x[0, 40] = 1, 2.0**-60
        y = self.run(jnp.asarray(x), in_tiles(matrix))
        assert relative_error(y, matrix.matmul(x)) < 2.0**-7

    def test_what_is_declined(self):
        four = in_tiles(oracle.random(0, 128, 32, dtype=F16))
        with pytest.raises(NotImplementedError, match="64 rows round weights to float"):
            self.run(jnp.ones((1, 128)), four, config=Config(64))

    def test_entries_are_rounded_too(self):
        matrix, x = oracle.random(0, 256, 32, affine="CODEBOOK"), rows(3, 256)
        y = self.run(jnp.asarray(x), in_tiles(matrix))
        assert relative_error(y, matrix.matmul(x)) < 2.0**-8


class TestDispatch:
    @pytest.fixture
    def interpreted(self, monkeypatch):
        """Puts the kernels, interpreted, in the place of the ones for a GPU."""
        for name in ("matvec", "matmul", "matmul_t", "scale_grad", "dequantize"):
            kernel = functools.partial(getattr(products, name), interpret=True)
            monkeypatch.setattr(products, name, kernel)

    @pytest.mark.parametrize("name", ["pallas", "pallas_bf16", "pallas_dense"])
    def test_named_implementations(self, name, interpreted):
        matrix = oracle.random(
            5, 160, 40, group_size=32, dtype=F16, order=True, input_scale=True
        )
        w, x = in_tiles(matrix), rows(3, 160)
        y = qjax.matmul(jnp.asarray(x, jnp.bfloat16), w, implementation=name)
        assert y.dtype == jnp.bfloat16
        tolerance = 2.0**-7 if name == "pallas_dense" else 2.0**-8
        assert relative_error(y, matrix.matmul(x)) < tolerance

    def test_a_mixed_matrix_is_one_launch(self):
        parts = MIXES["exl2"]
        matrix = oracle.random(0, 416, 40, parts=parts, dtype=F16, affine="CENTERED")
        x = jax.ShapeDtypeStruct((4, 416), jnp.bfloat16)
        matmul_on_gpu = jax.jit(functools.partial(qjax.matmul, implementation="pallas"))
        jaxpr = matmul_on_gpu.trace(x, in_tiles(matrix)).jaxpr
        assert str(jaxpr).count("pallas_call[") == 1

    @pytest.mark.cpu
    @pytest.mark.on_cpu
    def test_elsewhere_the_product_is_that_of_xla(self):
        matrix = oracle.random(0, 128, 40, dtype=F16)
        w, x = in_tiles(matrix), jnp.asarray(rows(3, 128), jnp.bfloat16)
        stream = qjax.prepare(w)
        assert stream.layout == qjax.formats.gptq.Stream()

        def loss(x, w):
            return (qjax.matmul(x, w).astype(jnp.float32) ** 2).sum()

        chex.assert_trees_all_equal(qjax.matmul(x, w), qjax.matmul(x, stream))
        chex.assert_trees_all_equal(jax.grad(loss)(x, w), jax.grad(loss)(x, stream))

    def test_prepare_moves_to_the_layout_asked_for(self):
        matrix = oracle.random(0, 128, 40, dtype=F16)
        w = in_tiles(matrix)
        there = qjax.prepare(qjax.prepare(w), layout=Tiles())
        chex.assert_trees_all_equal(there, w)

    @pytest.mark.parametrize("name", ["pallas", "pallas_dense"])
    def test_float32_activations_are_declined(self, name):
        w = in_tiles(oracle.random(0, 128, 40, dtype=F16))
        with pytest.raises(NotImplementedError, match="float32 x; cast x to bfloat16"):
            qjax.matmul(jnp.ones((1, 128)), w, implementation=name)

    @pytest.mark.cpu
    def test_a_named_kernel_never_falls_back(self):
        w = in_tiles(oracle.random(0, 128, 40, dtype=F16))
        x = jnp.ones((1, 128), jnp.bfloat16)
        with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
            qjax.matmul(x, w, implementation="pallas")

    @pytest.mark.parametrize(
        ("structure", "message"),
        [
            ({"group_size": 24}, "group_size=24 is not a multiple of 16"),
            ({"row_group": True}, "qjax.prepare turns one whose groups are full"),
            ({"grouping": "FLAT"}, "not flat groups"),
            ({"affine": "CODEBOOK", "bits": 2}, r"codebook.shape=\(4,\)"),
        ],
    )
    def test_what_the_kernels_decline(self, structure, message):
        matrix = oracle.random(0, 128, 40, dtype=F16, **structure)
        (part,) = matrix.parts
        w = tensor.build(
            words=(jnp.asarray(matrix.words[0]),),
            layout=qjax.formats.gptq.Stream(),
            segments=(tensor.Segment(part.bits, part.group_size),),
            affine=tensor.Affine[matrix.affine],
            grouping=tensor.Grouping[matrix.grouping],
            **{
                name: None if leaf is None else jnp.asarray(leaf)
                for name in ("scale", "zero", "row_group", "codebook")
                for leaf in [getattr(matrix, name)]
            },
        )
        with pytest.raises(NotImplementedError, match=message):
            pallas.check(w)
        x = jnp.ones((2, 128), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=message):
            pallas.fused(x.astype(jnp.float32), w)
        # Not named, XLA takes it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grouping 'flat'")
            y = qjax.matmul(x, decode.relayout(w, Tiles()))
        chex.assert_trees_all_equal(y, qjax.matmul(x, w))
