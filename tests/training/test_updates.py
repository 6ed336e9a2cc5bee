"""Steps of integer codes: every layout and map, and what the original rule loses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import tensor, training
from qjax.formats import gptq, mpq
from qjax.tensor import Affine, QTensor, Segment
from qjax.training import shadow
from tests import oracle
from tests.formats.test_properties import CASES

K, N = 64, 16
MIXED = [(6, 32, 32), (3, 32, 16)]
MATRICES = {
    "zero": {},
    "float-zero": {"float_zero": True},
    "offset": {"affine": "OFFSET"},
    "centered": {"affine": "CENTERED"},
    "float-centered": {"affine": "CENTERED", "float_zero": True},
    "codebook": {"affine": "CODEBOOK"},
    "order": {"order": True, "input_scale": True},
    "row-group": {"row_group": True},
    "ragged": {"group_size": 24},
    "shared-columns": {"columns": 4},
    "flat": {"grouping": "FLAT"},
    "strided": {"grouping": "STRIDED"},
    "mixed": {"parts": MIXED, "affine": "OFFSET", "order": True},
    "float16": {"affine": "OFFSET", "dtype": np.float16},
}


def matrix(name: str) -> oracle.Matrix:
    return oracle.random(3, K, N, **MATRICES[name])


def moved(m: oracle.Matrix, steps: np.ndarray) -> np.ndarray:
    """Codes after so many steps up, within their range."""
    tops = np.concatenate([np.full(part.rows, 2**part.bits - 1) for part in m.parts])
    return np.clip(m.codes.astype(int) + steps, 0, tops[:, None])


def difference(m: oracle.Matrix, codes: np.ndarray) -> np.ndarray:
    """What other codes change in the weight, without input scale, inputs' order."""
    bare = dataclasses.replace(m, input_scale=None)
    other = dataclasses.replace(bare, codes=codes.astype(np.uint8))
    return (other.weight - bare.weight).astype(np.float32)


def random_steps(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(5).integers(-2, 3, shape)


@pytest.mark.parametrize("name", MATRICES)
def test_every_rule_takes_the_nearest_code(name, as_qtensor):
    m = matrix(name)
    w = as_qtensor(m)
    wanted = moved(m, random_steps(m.codes.shape))
    # A fifth of a step beside a code is nearest to it; a codebook's steps differ.
    step = jnp.asarray(difference(m, wanted))
    off = 0.0 if name == "codebook" else 0.004 * 0.2
    nudge = jnp.asarray(np.random.default_rng(6).uniform(-off, off, step.shape))
    step = jnp.where(step == 0, 0, step + nudge.astype(jnp.float32))
    residual = shadow.zeros(w)

    @jax.jit
    def all_of_them(w, step):
        plain = training.apply_updates(w, step)
        kept, rest = training.apply_with_residual(w, step, residual)
        return plain, kept, rest

    plain, kept, rest = all_of_them(w, step)
    for found in (plain, kept):
        chex.assert_trees_all_equal(found.numpy(), wanted.astype(np.uint8))
        chex.assert_trees_all_equal(
            dataclasses.replace(found, words=()), dataclasses.replace(w, words=())
        )
    # Codes and residual together are the stepped weight, to float32's precision.
    bare = lambda w: qjax.dequantize(  # noqa: E731
        dataclasses.replace(w, input_scale=None), jnp.float32
    )
    total, largest = bare(kept) + rest, float(jnp.abs(bare(w)).max())
    chex.assert_trees_all_close(total, bare(w) + step, atol=4e-7 * largest)


@pytest.mark.parametrize("name", ["zero", "offset"])
def test_requantize_with_64_bits(name, as_qtensor):
    w = as_qtensor(matrix(name))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        again = training.requantize(w, qjax.dequantize(w))
    # What it holds already is not changed.
    chex.assert_trees_all_equal(again, w)
    chex.assert_trees_all_equal_dtypes(again, w)


@pytest.mark.parametrize("bits", [4, 8])
def test_small_floats_take_the_nearest_number(bits, as_qtensor):
    m = oracle.random(3, K, N, bits=bits, affine="FLOAT")
    w, scale = as_qtensor(m), m.spread(m.scale)[0]
    numbers = np.array([oracle.small_float(q, bits) for q in range(2**bits)])
    numbers = numbers[np.abs(numbers) < 480]  # those beyond are none
    target = scale * np.random.default_rng(0).uniform(-7, 7, (K, N))
    step = jnp.asarray(target - m.weight, jnp.float32)
    moved = np.asarray(qjax.dequantize(training.apply_updates(w, step)), np.float64)
    least = np.abs(numbers - (target / scale)[..., None]).min(-1) * scale
    assert (np.abs(moved - target) <= least + 1e-5 * np.abs(m.weight).max()).all()
    # Scales of the new range, and the sum of squares that they leave.
    again = training.requantize(w, jnp.asarray(target, jnp.float32))
    error = np.asarray(qjax.dequantize(again), np.float64) - target
    assert (error**2).sum() <= ((moved - target) ** 2).sum()


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_kept(name):
    case = CASES[name]
    bits = 4 if 4 in case.widths else case.widths[-1]
    k, n = case.shape(bits, 5, 3)
    layout = case.make(k)
    rng = np.random.default_rng(0)
    q = rng.integers(0, 2**bits, (k, n))
    words = layout.pack(jnp.asarray(q), bits)
    rows, columns = layout.extents(words.shape[-layout.rank :], bits)
    w = tensor.build(
        [words],
        jnp.full((1, n), 0.5),
        layout=layout,
        segments=[Segment(bits, None, rows - k)],
        padding=columns - n,
        affine=Affine.CENTERED,
    )
    steps = rng.integers(-2, 3, (k, n))
    update = jnp.asarray(steps * 0.5, jnp.float32)
    found = training.apply_updates(w, update)
    wanted = np.clip(q + steps, 0, 2**bits - 1).astype(np.uint8)
    chex.assert_trees_all_equal(found.numpy(), wanted)
    # What lies in padding stays as it was: the same words as packed anew.
    anew = layout.pack(jnp.asarray(wanted), bits)
    chex.assert_trees_all_equal(found.words, (anew,))
    assert found.layout == layout


def test_padded_columns_keep_what_they_hold():
    q = np.random.default_rng(0).integers(0, 16, (K, N))
    words = gptq.Stream().pack(jnp.asarray(q), 4)
    whole = tensor.build(
        [words],
        jnp.ones((2, N)),
        jnp.zeros((2, N)),
        layout=gptq.Stream(),
        segments=[Segment(4, 32)],
        affine=Affine.OFFSET,
    )
    w = dataclasses.replace(whole, padding=3)
    update = jnp.asarray(random_steps((K, N - 3)), jnp.float32)
    found = training.apply_updates(w, update, move_zeros=True)
    found = training.refit(found, jnp.zeros((K, N - 3))).params
    unpacked = dataclasses.replace(found, padding=0).numpy()
    chex.assert_trees_all_equal(unpacked[:, -3:], q[:, -3:].astype(np.uint8))
    chex.assert_trees_all_equal(found.zero[:, -3:], jnp.zeros((2, 3)))
    chex.assert_trees_all_equal(found.scale[:, -3:], jnp.ones((2, 3)))
    assert (unpacked[:, :-3] != q[:, :-3]).any()


@pytest.mark.parametrize("name", ["float-zero", "float-centered", "mixed"])
def test_float_zeros_follow_their_group(name, as_qtensor):
    m = matrix(name)
    w = as_qtensor(m)
    step = jnp.full((w.k, N), 0.003)
    found = jax.jit(training.apply_updates)(w, step, move_zeros=jnp.bool_(True))
    # All elements moved alike: the zeros take all of it, and no code changes.
    chex.assert_trees_all_equal(found.numpy(), w.numpy())
    change = 0.003 / -m.scale if m.affine == "ZERO" else 0.003
    chex.assert_trees_all_close(found.zero, m.zero + change, atol=1e-6)
    still = jax.jit(training.apply_updates)(w, step, move_zeros=jnp.bool_(False))
    chex.assert_trees_all_equal(still.zero, w.zero)


class TestIntegerZeros:
    """They move as upstream's do; tests/training/test_diode_mix.py has its own."""

    def test_by_hand(self):
        w = qjax.quantize(jnp.ones((32, 8)), bits=4, group_size=32)
        w = dataclasses.replace(w, zero=jnp.full((1, 8), 3, jnp.uint8))
        for step, wanted in [(0.5, 2), (-0.5, 3), (-1.0, 4), (2.5, 16), (0.0, 3)]:
            update = jnp.full((32, 8), step)
            found = training.apply_updates(w, update, move_zeros=True)
            assert (found.zero == wanted).all(), step

    def test_eight_bits_are_declined(self):
        w = qjax.quantize(jnp.ones((32, 8)), bits=8, group_size=32)
        with pytest.raises(NotImplementedError, match="may become 256, which uint8"):
            training.apply_updates(w, jnp.ones((32, 8)), move_zeros=True)
        training.apply_updates(w, jnp.ones((32, 8)))


def test_groups_spread_over_segments_are_declined(as_qtensor):
    m = oracle.random(0, K, 8, parts=MIXED, affine="OFFSET")
    groups = jnp.asarray(np.arange(K) % 3, jnp.int32)
    w = dataclasses.replace(as_qtensor(m), row_group=groups)
    with pytest.raises(NotImplementedError, match="rows of several widths"):
        training.apply_updates(w, jnp.ones((K, 8)), move_zeros=True)
    with pytest.raises(NotImplementedError, match="rows of several widths"):
        training.refit(w, jnp.ones((K, 8)))
    with pytest.raises(NotImplementedError, match="rows of several widths"):
        training.requantize(w, jnp.ones((K, 8)))
    moved = training.apply_updates(w, jnp.ones((K, 8)))
    chex.assert_trees_all_equal(moved.row_group, groups)


def test_encoded_parameters():
    """MPQ's double-quantized ones: kept as they are, unless they change."""
    rng = np.random.default_rng(0)
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (8, 8), dtype=np.int32),
        "qstatistic": rng.integers(0, 256, (2, 1, 8), dtype=np.uint8),
        **dict.fromkeys(
            ("qzeros_zeros", "qscales_zeros"), np.full((2, 1, 1), -1, np.float16)
        ),
        **dict.fromkeys(
            ("qzeros_scales", "qscales_scales"), np.full((2, 1, 1), 0.1, np.float16)
        ),
    }
    w = mpq.from_tensors(tensors, mpq.Config(bits=4, group_size=32))
    update = jnp.full((K, 8), 0.25)
    kept = training.apply_updates(w, update)
    assert type(kept.zero) is type(w.zero)
    assert (kept.numpy() != w.numpy()).any()
    drifted = training.apply_updates(w, update, move_zeros=True)
    chex.assert_trees_all_close(
        drifted.zero, w.zero.decode() + jnp.float16(0.25), atol=2e-3
    )
    fitted = training.refit(w, jnp.zeros((K, 8))).params
    chex.assert_trees_all_close(fitted.scale, w.scale.decode(), atol=2e-3)


class TestStochastic:
    def test_the_mean_is_right(self, as_qtensor):
        for name in ("offset", "codebook"):
            w = as_qtensor(matrix(name))
            bare = qjax.dequantize(w, jnp.float32)
            # Towards 0, so that no code is at its end already.
            step = -0.1 * bare
            many = jax.jit(
                lambda keys, w=w, step=step: jax.vmap(
                    lambda key: qjax.dequantize(
                        training.apply_stochastically(w, step, key), jnp.float32
                    )
                )(keys).mean(0)
            )
            mean = many(jax.random.split(jax.random.key(0), 400)) - bare
            # One draw is off by half a scale at most; the mean of all of 400 * K * N.
            error = float((mean - step).mean())
            assert abs(error) < 5 * 0.5 * 0.03 / np.sqrt(400 * K * N), name
            assert float(jnp.abs(mean - step).max()) < 0.1 * float(jnp.abs(bare).max())

    def test_keys(self, as_qtensor):
        w = as_qtensor(matrix("offset"))
        params, updates = {"a": w, "b": w}, dict.fromkeys("ab", jnp.full((K, N), 0.01))
        one = training.apply_stochastically(params, updates, jax.random.key(0))
        again = training.apply_stochastically(params, updates, jax.random.key(0))
        other = training.apply_stochastically(params, updates, jax.random.key(1))
        chex.assert_trees_all_equal(one, again)
        assert (one["a"].numpy() != one["b"].numpy()).any()
        assert (one["a"].numpy() != other["a"].numpy()).any()

    def test_without_a_step_nothing_is_drawn(self, as_qtensor):
        for name in ("offset", "codebook", "mixed"):
            w = as_qtensor(matrix(name))
            key = jax.random.key(0)
            found = training.apply_stochastically(w, shadow.zeros(w), key)
            chex.assert_trees_all_equal(found, w)


@pytest.mark.parametrize(
    "name", ["zero", "float-zero", "row-group", "mixed", "float16"]
)
def test_refit_finds_the_scales_of_a_weight(name, as_qtensor):
    m = matrix(name)
    w = as_qtensor(m)
    free = m.zero is not None and m.zero.dtype.kind == "f"
    dtype = m.scale.dtype
    scale = (m.scale.astype(np.float64) * 1.25).astype(dtype)
    zero = (m.zero.astype(np.float64) * 0.75).astype(dtype) if free else m.zero
    other = dataclasses.replace(m, scale=scale, zero=zero, input_scale=None)
    same = dataclasses.replace(m, input_scale=None)
    residual = jnp.asarray((other.weight - same.weight).astype(np.float32))
    fitted, rest = jax.jit(training.refit)(w, residual)
    tolerance = 2e-3 if dtype == np.float16 else 1e-4
    chex.assert_trees_all_close(np.asarray(fitted.scale), scale, rtol=tolerance)
    if free:
        atol = tolerance * np.abs(zero).max()
        chex.assert_trees_all_close(np.asarray(fitted.zero), zero, atol=atol)
    chex.assert_trees_all_equal(fitted.words, w.words)
    assert float(jnp.abs(rest).max()) < tolerance * np.abs(other.weight).max()
    # Nothing left over, nothing to do.
    again = training.refit(w, shadow.zeros(w)).params
    chex.assert_trees_all_close(again.scale, w.scale, rtol=tolerance)


def test_refit_keeps_a_scale_that_would_not_be_one():
    w = qjax.quantize(jnp.ones((64, 4)), 4, 32, symmetric=True)
    dense = qjax.dequantize(w)
    residual = jnp.concatenate([-3 * dense[:32], dense[32:]])
    fitted, rest = training.refit(w, residual)
    chex.assert_trees_all_equal(fitted.scale[0], w.scale[0])
    chex.assert_trees_all_close(fitted.scale[1], 2 * w.scale[1])
    # A residual is at most a scale.
    chex.assert_trees_all_close(rest[:32], jnp.broadcast_to(-w.scale[:1], (32, 4)))
    chex.assert_trees_all_close(rest[32:], jnp.zeros((32, 4)), atol=1e-6)


class Regression:
    """``y = x @ W`` where the right W is some codes away, and how low rules get."""

    def __init__(self, w: QTensor, target: jnp.ndarray, rate: float):
        self.start, self.optimizer = w, training.diode_mix(rate, 0.9, 0.99)
        x = np.random.default_rng(8).normal(size=(256, w.k)).astype(np.float32)
        self.x, self.y = jnp.asarray(x), jnp.asarray(x) @ target

    def loss(self, s, w):
        return ((shadow.matmul(self.x, w, s) - self.y) ** 2).mean()

    def train(self, apply, steps: int = 120) -> tuple[QTensor, float]:
        """The weight and its loss after some steps of a rule ``(w, updates, i)``."""
        zeros = shadow.zeros(self.start)

        @jax.jit
        def run(w):
            def step(carry, i):
                w, kept, state = carry
                gradient = jax.grad(self.loss)(zeros, w)
                updates, state = self.optimizer.update(gradient, state)
                w, kept = apply(w, updates, kept, i)
                return (w, kept, state), None

            carry = (w, zeros, self.optimizer.init(zeros))
            (w, _, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
            return w, self.loss(zeros, w)

        w, loss = run(self.start)
        return w, float(loss)

    @property
    def first(self) -> float:
        return float(self.loss(shadow.zeros(self.start), self.start))


def nearest(w, updates, kept, i):
    return training.apply_updates(w, updates), kept


def by_chance(w, updates, kept, i):
    key = jax.random.fold_in(jax.random.key(0), i)
    return training.apply_stochastically(w, updates, key), kept


def fed_back(w, updates, kept, i):
    return training.apply_with_residual(w, updates, kept)


def fed_back_and_refitted(w, updates, kept, i):
    return training.refit(*training.apply_with_residual(w, updates, kept))


def regression(name: str, as_qtensor) -> Regression:
    """Of which each step is a twentieth of a scale."""
    m = matrix(name)
    if name == "codebook":
        # None of whose entries are so near each other that a small step is enough.
        m = dataclasses.replace(m, codebook=3 * np.sinh(np.linspace(-2, 2, 16)))
        m = dataclasses.replace(m, codebook=m.codebook.astype(np.float32))
    codes = moved(m, random_steps(m.codes.shape))
    target = dataclasses.replace(m, codes=codes.astype(np.uint8)).weight
    return Regression(as_qtensor(m), jnp.asarray(target, jnp.float32), 0.001)


@pytest.mark.parametrize("name", ["codebook", "mixed"])
class TestSmallSteps:
    """Where the original rule does not move at all."""

    def test_are_lost_by_the_original_rule(self, name, as_qtensor):
        problem = regression(name, as_qtensor)
        w, loss = problem.train(nearest)
        chex.assert_trees_all_equal(w, problem.start)
        assert loss == problem.first

    def test_add_up_in_the_residual(self, name, as_qtensor):
        problem = regression(name, as_qtensor)
        _, loss = problem.train(fed_back)
        assert loss < 0.05 * problem.first

    def test_move_codes_by_chance(self, name, as_qtensor):
        problem = regression(name, as_qtensor)
        _, loss = problem.train(by_chance)
        assert loss < 0.5 * problem.first


@pytest.mark.parametrize("name", ["centered", "mixed"])
def test_refitted_scales_get_where_codes_alone_do_not(name, as_qtensor):
    m = matrix(name)
    # Twice as large: most of the target lies beyond the range of the codes.
    target = jnp.asarray(2 * m.weight, jnp.float32)
    problem = Regression(as_qtensor(m), target, 0.01)
    _, codes_alone = problem.train(fed_back)
    _, refitted = problem.train(fed_back_and_refitted)
    assert refitted < 0.25 * codes_alone < 0.25 * problem.first


def test_residual_of_sixteen_bits(as_qtensor):
    problem = regression("offset", as_qtensor)
    w, updates = problem.start, jnp.full((K, N), 0.002)
    residual = shadow.zeros(w, jnp.bfloat16)
    for _ in range(12):
        w, residual = training.apply_with_residual(w, updates, residual)
    assert residual.dtype == jnp.bfloat16
    assert (w.numpy().astype(int) - problem.start.numpy() >= 0).all()
    assert (w.numpy() != problem.start.numpy()).mean() > 0.5


def test_trees():
    w = qjax.quantize(jnp.ones((32, 8)), group_size=32)
    params = {"up": {"kernel": w, "bias": jnp.ones(8)}, "down": w, "rest": jnp.ones(2)}
    updates = {
        "up": {"kernel": jnp.full((32, 8), -1.0), "bias": jnp.ones(8)},
        "down": None,
        "rest": optax.MaskedNode(),
    }
    residual = shadow.zeros(params)
    plain = training.apply_updates(params, updates)
    by_draw = training.apply_stochastically(params, updates, jax.random.key(0))
    kept, rest = training.apply_with_residual(params, updates, residual)
    for found in (plain, by_draw, kept):
        assert (found["up"]["kernel"].numpy() == 0).all()
        chex.assert_trees_all_equal(found["up"]["bias"], jnp.full(8, 2.0))
        assert found["down"] is w
        assert found["rest"] is params["rest"]
    assert rest["up"]["bias"] is None
    chex.assert_trees_all_equal(rest["down"], residual["down"])
    fitted, after = training.refit(kept, rest)
    assert jax.tree.structure(fitted) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(rest)


@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_other_arrays_are_stepped_as_optax_does(promotion):
    rng = np.random.default_rng(0)
    param = jnp.asarray(rng.normal(size=1000), jnp.bfloat16)
    update = jnp.asarray(rng.normal(size=1000), jnp.float32)
    wanted = optax.apply_updates(param, update)
    with jax.numpy_dtype_promotion(promotion):
        found = training.apply_updates({"norm": param}, {"norm": update})
    assert found["norm"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found["norm"], wanted)


def test_shapes_that_do_not_fit_are_refused(refuses):
    w = qjax.quantize(jnp.ones((32, 8)), group_size=32)
    with refuses("must be float (32, 8); got ArrayImpl of shape (8, 32)"):
        training.apply_updates(w, jnp.ones((8, 32)))
    with refuses("must be float (32, 8); got ArrayImpl of shape (32, 8) and int32"):
        training.apply_updates(w, jnp.ones((32, 8), jnp.int32))
    with refuses("must be float (32, 8)"):
        training.apply_with_residual(w, jnp.ones((32, 8)), jnp.ones((32, 1)))
    with refuses("must be float (32, 8)"):
        training.refit(w, jnp.ones((2, 32, 8)))


def test_gradients_of_scales_are_no_steps_of_codes(refuses):
    params = {"w": qjax.quantize(jnp.ones((32, 8)), group_size=32)}
    loss = lambda params: qjax.matmul(jnp.ones((2, 32)), params["w"]).sum()  # noqa: E731
    gradient = jax.grad(loss, allow_int=True)(params)
    message = "must be float (32, 8); got a QTensor, such as the gradient of its scales"
    for apply in (training.apply_updates, jax.jit(training.apply_updates)):
        with refuses(message):
            apply(params, gradient)
    with refuses(message):
        training.apply_with_residual(params, shadow.zeros(params), gradient)


@pytest.mark.parametrize("name", MATRICES)
def test_requantize_leaves_what_is_held(name, as_qtensor):
    w = as_qtensor(matrix(name))
    held = qjax.dequantize(w, jnp.float32)
    chex.assert_trees_all_equal(training.requantize(w, held), w)
    # An element that its group cannot hold moves that group alone.
    moved = training.requantize(w, held.at[5, 3].add(0.5))
    is_other = np.asarray(moved.scale) != np.asarray(w.scale)
    assert 0 < is_other.sum() <= 1


@pytest.mark.parametrize("name", ["float-centered", "flat", "order"])
def test_requantize(name, as_qtensor):
    m = matrix(name)
    w = as_qtensor(m)
    held = qjax.dequantize(w, jnp.float32)
    # Three times as large and beside 0: only scales and zeros can follow.
    found = training.requantize(w, 3 * held + 0.2)
    error = qjax.dequantize(found, jnp.float32) - 3 * held - 0.2
    step = 3 * 0.03 * (1 if m.input_scale is None else m.input_scale.max())
    assert float(jnp.abs(error).max()) < step
    assert dataclasses.replace(found, words=()).segments == w.segments


def test_requantize_refuses_another_shape_and_dense_weights(refuses):
    w = qjax.quantize(jnp.ones((32, 8)), group_size=32)
    with refuses("target.shape=(8, 32) must be (32, 8), that of w"):
        training.requantize(w, jnp.ones((8, 32)))
    with refuses("w is ArrayImpl of shape (32, 8), and must be a QTensor", TypeError):
        training.requantize(jnp.ones((32, 8)), jnp.ones((32, 8)))
