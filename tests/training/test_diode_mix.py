"""`diode_mix` and `apply_updates` against bitorch-engine's optimizer, step by step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import training
from qjax.formats import mbwq, mpq
from qjax.training import shadow
from tests import goldens
from tests.goldens import load

FILES = goldens.names("diode_mix")


def weight(name: str, step: int | None = None) -> qjax.QTensor:
    """The weight after a step, or before the first."""
    data, bits = load(name), load(name)["meta"]["bits"]
    kind, size = data["meta"]["kind"], data["meta"]["group_size"]
    zeros = "qzeros" if kind == "gptq" else "zeros"
    words, z = (
        (data["qweight0"], data[f"{zeros}0"])
        if step is None
        else (data["qweights"][step], data[zeros][step])
    )
    tensors = {"qweight": words, zeros: z, "scales": data["scales"]}
    if kind == "gptq":
        tensors["g_idx"] = data["g_idx"]
        return mpq.from_tensors(tensors, mpq.Config(bits=bits, group_size=size))
    tensors["q_perm"] = data["q_perm"]
    return mbwq.from_tensors(tensors, mbwq.Config(bits=bits, group_size=size))


def optimizer_of(name: str) -> optax.GradientTransformation:
    meta = load(name)["meta"]
    return training.diode_mix(
        meta["lr"],
        *meta["betas"],
        meta["eps"],
        correct_bias=meta["correct_bias"],
        state_dtype=meta["dtype"],
        galore=meta["galore"] and training.GaLore(**meta["galore"]),
    )


def run(name: str):
    """The weight and state after each of the file's steps."""
    optimizer, w = optimizer_of(name), weight(name)
    state = optimizer.init(jax.eval_shape(shadow.zeros, w))

    @jax.jit
    def step(w, state, gradient):
        updates, state = optimizer.update(gradient, state)
        return training.apply_updates(w, updates, move_zeros=state.moves_zeros), state

    for gradient in load(name)["grads"]:
        w, state = step(w, state, jnp.asarray(gradient))
        yield w, state


def test_every_golden_file_is_here():
    assert len(FILES) == 9


@pytest.mark.parametrize("name", FILES)
def test_codes_and_zeros_after_every_step(name):
    meta = load(name)["meta"]
    exact = meta["dtype"] == "float32" and meta["galore"] is None
    last, moved = None, 0
    for i, (w, state) in enumerate(run(name)):
        wanted = weight(name, i)
        assert w.words[0].dtype == wanted.words[0].dtype
        if exact:
            chex.assert_trees_all_equal(w, wanted)
        # Another order of sums may move 0.2 % of the codes by one.
        found, theirs = w.numpy().astype(int), wanted.numpy().astype(int)
        assert np.abs(found - theirs).max() <= 1
        assert (found != theirs).mean() <= 2e-3
        # Of the zeros the file's page says nothing; they are its own here.
        chex.assert_trees_all_equal(w.zero, wanted.zero)
        moved = (found != weight(name).numpy()).mean()
        last = state
    assert moved == pytest.approx(meta["fraction_changed"], abs=2e-3)
    _check_moments(last, load(name))


def _check_moments(state: training.DiodeMixState, data: dict) -> None:
    """The last moments, of float32 and float16 computed in another order."""
    dtype = data["exp_avg_last"].dtype
    tolerance = {"float32": 1e-4, "float16": 2e-3}[dtype.name]
    for moment, wanted in [
        # A singular vector may have the other sign.
        (jnp.abs(state.mu), np.abs(data["exp_avg_last"])),
        (state.nu, data["exp_avg_sq_last"]),
    ]:
        assert (moment.shape, moment.dtype) == (wanted.shape, dtype)
        largest = np.abs(wanted).max().astype(np.float64)
        np.testing.assert_allclose(
            np.asarray(moment, np.float64),
            wanted.astype(np.float64),
            rtol=0,
            atol=tolerance * largest,
        )


def test_codes_in_one_scan():
    name = "train_mbwq4_f32"
    optimizer, w = optimizer_of(name), weight(name)

    def step(carry, gradient):
        w, state = carry
        updates, state = optimizer.update(gradient, state)
        w = training.apply_updates(w, updates, move_zeros=state.moves_zeros)
        return (w, state), None

    carry = (w, optimizer.init(shadow.zeros(w)))
    grads = jnp.asarray(load(name)["grads"])
    (w, _), _ = jax.jit(lambda *a: jax.lax.scan(step, *a))(carry, grads)
    chex.assert_trees_all_equal(w, weight(name, 5))


def test_stacked_weights_are_stepped_one_by_one():
    name = "train_mbwq4_galore_std"
    optimizer, single = optimizer_of(name), weight(name)
    w = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), single)
    state = optimizer.init(shadow.zeros(w))
    assert state.basis.right.shape == (2, 32, 8)

    @jax.jit
    def step(w, state, gradient):
        updates, state = optimizer.update(gradient, state)
        return training.apply_updates(w, updates, move_zeros=state.moves_zeros), state

    grads = jnp.asarray(load(name)["grads"])
    for gradient in grads[:5]:
        pair = jnp.stack([gradient, jnp.zeros_like(gradient)])
        w, state = step(w, state, pair)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], w) for i in range(2))
    chex.assert_trees_all_equal(first, weight(name, 4))
    chex.assert_trees_all_equal(second, single)


class TestState:
    """Exactly what the rule needs."""

    def test_float_trees(self):
        params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4), "none": None}
        state = training.diode_mix(state_dtype=jnp.bfloat16).init(params)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state)]
        both = [((4,), "bfloat16"), ((8, 4), "bfloat16")]
        assert shapes == [((), "int32"), *both, *both]

    @pytest.mark.parametrize(
        ("proj_type", "shape", "moments", "basis"),
        [
            ("std", (64, 32), (64, 4), [(32, 4)]),
            ("std", (32, 64), (4, 64), [(32, 4)]),
            ("reverse_std", (64, 32), (4, 32), [(64, 4)]),
            ("right", (32, 64), (32, 4), [(64, 4)]),
            ("full", (64, 32), (4, 4), [(64, 4), (32, 4)]),
        ],
    )
    def test_galore(self, proj_type, shape, moments, basis):
        galore = training.GaLore(rank=4, proj_type=proj_type, update_proj_gap=2)
        optimizer = training.diode_mix(1.0, galore=galore)
        gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        params = {"w": jnp.asarray(gradient), "bias": jnp.ones(3)}
        state = optimizer.init(params)
        assert state.mu["w"].shape == state.nu["w"].shape == moments
        assert [leaf.shape for leaf in jax.tree.leaves(state.basis)] == basis
        # The first moment is 1 - b1 = 0.01 of the gradient in the space that keeps the
        # largest singular values.
        updates, state = jax.jit(optimizer.update)(params, state)
        u, s, vh = np.linalg.svd(gradient)
        mu = np.asarray(state.mu["w"]) / 0.01
        kept = np.diag(s[:4])
        wanted = {
            **dict.fromkeys([(64, 4), (32, 4)], u[:, :4] @ kept),
            **dict.fromkeys([(4, 64), (4, 32)], kept @ vh[:4]),
            (4, 4): kept,
        }[moments]
        np.testing.assert_allclose(np.abs(mu), np.abs(wanted), atol=1e-3 * s[0])
        assert updates["w"].shape == shape
        assert updates["bias"].shape == (3,)
        # The basis stays for a second step, and is another at the third.
        held = state.basis
        other = {"w": params["w"][::-1], "bias": params["bias"]}
        _, state = optimizer.update(other, state)
        chex.assert_trees_all_equal(state.basis, held)
        _, state = optimizer.update(other, state)
        assert (jax.tree.leaves(state.basis)[0] != jax.tree.leaves(held)[0]).any()

    @pytest.mark.parametrize("b1", [0.0, 0.99])
    def test_galore_with_64_bits(self, b1):
        optimizer = training.diode_mix(0.1, b1, galore=training.GaLore(rank=2))
        gradient = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), "float32")
        expected = optimizer.update(gradient, optimizer.init(gradient))
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            found = optimizer.update(gradient, optimizer.init(gradient))
        chex.assert_trees_all_equal_dtypes(found, expected)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


class TestOptax:
    """It is a transformation as any other."""

    def test_float_parameters_take_the_same_steps(self):
        # Adam's own step has eps inside the correction; with none they are the same.
        rng = np.random.default_rng(0)
        ours = training.diode_mix(0.1, 0.9, 0.99, 0.0)
        theirs = optax.adam(0.1, 0.9, 0.99, 0.0)
        p = q = {"w": jnp.ones((4, 3))}
        state, their_state = ours.init(p), theirs.init(q)
        for _ in range(4):
            g = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
            updates, state = ours.update(g, state)
            p = training.apply_updates(p, updates)
            with jax.numpy_dtype_promotion("standard"):
                updates, their_state = theirs.update(g, their_state)
            q = optax.apply_updates(q, updates)
        chex.assert_trees_all_close(p, q, rtol=1e-5)

    def test_schedule(self):
        optimizer = training.diode_mix(lambda count: 0.5**count, 0.0, 0.0, 0.0)
        g = jnp.full((2, 2), 3.0)
        state, sizes = optimizer.init(g), []
        for _ in range(3):
            updates, state = optimizer.update(g, state)
            sizes.append(float(updates[0, 0]))
        np.testing.assert_allclose(sizes, [-1, -0.5, -0.25], rtol=1e-6)

    @pytest.mark.usefixtures("optax_promotion")
    def test_multi_steps_give_the_codes_of_the_mean(self):
        name = "train_mbwq4_f32"
        optimizer = optax.MultiSteps(optimizer_of(name), 2)
        w = weight(name)
        state = optimizer.init(shadow.zeros(w))

        @jax.jit
        def step(w, state, gradient):
            updates, state = optimizer.update(gradient, state)
            moves = state.inner_opt_state.moves_zeros
            return training.apply_updates(w, updates, move_zeros=moves), state

        # Halves that float16 holds exactly: their mean is the gradient itself.
        for i, gradient in enumerate(load(name)["grads"].astype(np.float32)):
            half, other = gradient * 0.5, gradient * 1.5
            before = w
            w, state = step(w, state, jnp.asarray(half))
            chex.assert_trees_all_equal(w, before)
            w, state = step(w, state, jnp.asarray(other))
            chex.assert_trees_all_equal(w, weight(name, i))

    def test_masked(self):
        w = weight("train_mbwq4_f32")
        params = {"a": w, "b": w, "c": jnp.ones(3)}
        gradient = {"a": jnp.ones(w.shape), "b": jnp.ones(w.shape), "c": jnp.ones(3)}
        mask = {"a": True, "b": False, "c": True}
        optimizer = optax.chain(
            optax.masked(training.diode_mix(0.1), mask),
            optax.masked(
                optax.set_to_zero(), {name: not m for name, m in mask.items()}
            ),
        )
        state = optimizer.init(gradient)
        sizes = [leaf.size for leaf in jax.tree.leaves(state)]
        assert sum(sizes) == 2 * (w.k * w.n + 3) + 1
        updates, _ = optimizer.update(gradient, state)
        stepped = training.apply_updates(params, updates)
        chex.assert_trees_all_equal(stepped["b"], w)
        assert (stepped["a"].numpy() != w.numpy()).any()
        assert (stepped["c"] < 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training.diode_mix(-1.0), "learning_rate=-1.0 must not be negative"),
        (lambda: training.diode_mix(b1=1.0), "b1=1.0 must be at least 0 and less"),
        (lambda: training.diode_mix(b2=-0.1), "b2=-0.1 must be at least 0 and less"),
        (lambda: training.diode_mix(eps=-1e-8), "eps=-1e-08 must not be negative"),
        (
            lambda: training.diode_mix(state_dtype=jnp.int8),
            "state_dtype=int8 must be a float dtype",
        ),
        (
            lambda: training.diode_mix().init(weight("train_mbwq4_f32")),
            "params has a leaf of dtype uint32; diode_mix takes float arrays",
        ),
        (lambda: training.GaLore(rank=0), "rank=0 must be at least 1"),
        (
            lambda: training.GaLore(rank=1, update_proj_gap=0),
            "update_proj_gap=0 must be at least 1",
        ),
        (
            lambda: training.GaLore(rank=1, proj_type="both"),
            "proj_type='both' must be one of",
        ),
        (
            lambda: training.diode_mix(galore=training.GaLore(rank=8)).init(
                jnp.ones((64, 8))
            ),
            "rank=8 must be less than both of k=64 and n=8",
        ),
    ],
)
def test_refuses(make, message, refuses):
    with refuses(message):
        make()
