"""Clipping, HQQ, budgets, errors: against plain searches and the upstream's codes."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.quantizers import Option, allocate, clip, gram, hqq, output_error
from tests import goldens

RNG = np.random.default_rng(0)
W = RNG.standard_normal((128, 24)).astype(np.float32) ** 3


def matrix_of(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def squares(w, packed, importance=1.0):
    off = np.asarray(qjax.dequantize(packed), np.float64) - w
    return (off**2 * importance).reshape(-1, 32, w.shape[1]).sum(1)


def searched(group, bits, symmetric, importance):
    """The least squared error of one group of one column, over all ranges."""
    top, errors = 2**bits - 1, []
    for i in range(80):
        low = min(group.min() * (1 - i / 100), 0)
        high = max(group.max() * (1 - i / 100), 0)
        if symmetric:
            high = max(high, -low)
            low = -high
        scale = (high - low) / top
        zero = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / scale), 0, top)
        codes = np.clip(np.round(group / scale) + zero, 0, top)
        errors.append(((((codes - zero) * scale - group) ** 2) * importance).sum())
    return min(errors)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("quantizer", [hqq, clip])
def test_small_weights_in_float16(quantizer, bits):
    """Of which the scales are below float16's normal numbers."""
    w = (RNG.standard_normal((128, 24)) * 5e-4).astype(np.float16)
    found = [
        squares(w, quantizer.quantize(jnp.asarray(w, dtype), bits, 32)).sum()
        for dtype in (jnp.float16, jnp.float32)
    ]
    assert found[0] < 1.1 * found[1]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("importance", [None, np.exp(RNG.standard_normal(128))])
def test_clip_finds_the_best_range(symmetric, importance):
    packed = clip.quantize(W, 3, 32, symmetric, importance=importance)
    counts = np.ones(128) if importance is None else importance
    found = squares(W, packed, counts[:, None])
    best = np.array(
        [
            [
                searched(
                    W[g * 32 : g * 32 + 32, j].astype(np.float64),
                    3,
                    symmetric,
                    counts[g * 32 : g * 32 + 32],
                )
                for j in range(24)
            ]
            for g in range(4)
        ]
    )
    np.testing.assert_allclose(found, best, rtol=2e-3)
    rounded = squares(W, qjax.quantize(W, 3, 32, symmetric), counts[:, None])
    assert (found <= rounded * (1 + 1e-5)).all()
    assert found.sum() < 0.95 * rounded.sum()


def test_clip_of_a_stack_is_that_of_its_matrices():
    stack, importance = np.stack([W, -2 * W]), np.stack([np.ones(128), W[:, 0] ** 2])
    found = clip.quantize(stack, 2, None, importance=importance)
    for i in range(2):
        one = clip.quantize(stack[i], 2, None, importance=importance[i])
        chex.assert_trees_all_equal(matrix_of(found, i), one)


def test_clip_without_jit():
    with jax.disable_jit():
        found = clip.quantize(W[:32, :2], 3, 32)
    chex.assert_trees_all_equal(found, clip.quantize(W[:32, :2], 3, 32))


def test_clip_refuses_other_importance(refuses):
    with refuses("importance.shape=(5,) must be (128,)"):
        clip.quantize(W, importance=np.ones(5))


def test_hqq_finds_the_codes_of_the_original():
    name = "hqq_layer__b2_g16_axis1_opt_float16__16x64__s645"
    vectors = goldens.load(name)
    w = vectors["in_w"].astype(np.float32).T
    packed = hqq.quantize(w, 2, 16, scale_dtype=np.float16)
    codes = vectors["out_unpacked"].reshape(w.T.shape).T
    np.testing.assert_array_equal(packed.numpy(), codes)
    np.testing.assert_array_equal(
        packed.scale.T.ravel(), vectors["state_scale"].ravel()
    )
    zero, wanted = packed.zero.T.ravel(), vectors["state_zero"].ravel()
    # The last bit of a float16.
    np.testing.assert_allclose(zero, wanted, rtol=2**-10, atol=2**-13)


def test_hqq_moves_zeros_for_the_better():
    packed = hqq.quantize(W, 3, 32)
    off = np.abs(np.asarray(qjax.dequantize(packed)) - W) ** 0.7
    low, high = (W.reshape(4, 32, 24).min(1), W.reshape(4, 32, 24).max(1))
    scale = (high - low) / 7
    codes = np.round((W.reshape(4, 32, 24) - low[:, None]) / scale[:, None])
    plain = codes * scale[:, None] + low[:, None]
    assert off.mean() < 0.95 * (np.abs(plain - W.reshape(4, 32, 24)) ** 0.7).mean()


def test_hqq_of_equal_weights_is_exact():
    w = np.repeat(np.float32([[0.0, 1.5, -3.0, 1e4]]), 32, axis=0)
    packed = hqq.quantize(w, 4, 32, scale_dtype=np.float16)
    np.testing.assert_array_equal(qjax.dequantize(packed, jnp.float32), w)


def test_hqq_in_products_stacks_and_models():
    stack = np.stack([W, 3 * W])
    packed = hqq.quantize(stack, 4, 32)
    for i in range(2):
        one = matrix_of(packed, i)
        wanted = hqq.quantize(stack[i], 4, 32)
        np.testing.assert_array_equal(one.numpy(), wanted.numpy())
        # A mean over the group, in the order that XLA takes for a stack.
        chex.assert_trees_all_close(one.zero, wanted.zero, rtol=1e-5)
    layer = nnx.Linear(128, 24, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.asarray(W))
    spec = qjax.Spec(bits=4, group_size=32, quantizer=hqq.quantize)
    x = jnp.asarray(RNG.standard_normal((3, 128)), jnp.float32)
    y = qjax.quantize_model(layer, spec)(x)
    wanted = np.asarray(x, np.float64) @ np.asarray(
        qjax.dequantize(hqq.quantize(W, 4, 32))
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


def test_hqq_refuses_symmetric_codes(refuses):
    with refuses("symmetric=True leaves HQQ no zeros to find"):
        hqq.quantize(W, symmetric=True)


def test_spec_wants_a_function(refuses):
    with refuses("quantizer='hqq' must be a function", TypeError):
        qjax.Spec(quantizer="hqq")


def test_gram_and_error_are_their_definitions():
    x = RNG.standard_normal((5, 7, 128)).astype(np.float32)
    rows = x.reshape(-1, 128).astype(np.float64)
    np.testing.assert_allclose(gram(x), rows.T @ rows, rtol=1e-5, atol=1e-4)
    packed = qjax.quantize(W, 2, 32)
    off = np.asarray(qjax.dequantize(packed), np.float64) - W
    wanted = np.linalg.norm(rows @ off) / np.linalg.norm(rows @ W)
    np.testing.assert_allclose(output_error(W, packed, gram(x)), wanted, rtol=1e-4)
    wanted = np.linalg.norm(off) / np.linalg.norm(W)
    np.testing.assert_allclose(output_error(W, packed), wanted, rtol=1e-5)
    stack = qjax.quantize(np.stack([W, W]), 2, 32)
    found = output_error(np.stack([W, W]), stack, np.stack([gram(x)] * 2))
    assert found.shape == (2,)
    assert (
        output_error(
            np.zeros((32, 8), np.float32),
            qjax.quantize(np.zeros((32, 8), np.float32), 4, 32),
        )
        == 0
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gram(np.ones((3, 4), int)), ValueError, "x must be float [..., k]"),
        (lambda: gram(np.float32(1)), ValueError, "x must be float [..., k]"),
        (lambda: output_error(W, W), TypeError, "packed is ndarray"),
        (
            lambda: output_error(W[:32], qjax.quantize(W, 2, 32)),
            ValueError,
            "packed.shape=(128, 24) must be w.shape=(32, 24)",
        ),
        (
            lambda: output_error(W, qjax.quantize(W, 2, 32), jnp.eye(3)),
            ValueError,
            "gram is float32(3, 3) and must be float(128, 128)",
        ),
    ],
)
def test_errors_refuse(refuses, call, error, message):
    with refuses(message, error):
        call()


def total(options, chosen):
    picked = [options[name][choice] for name, choice in chosen.items()]
    return sum(o.nbytes for o in picked), sum(o.error for o in picked)


def least(options, nbytes):
    """The least error that fits, of all choices."""
    every = itertools.product(*(choices.values() for choices in options.values()))
    return min(
        sum(option.error for option in choice)
        for choice in every
        if sum(option.nbytes for option in choice) <= nbytes
    )


def drawn(seed, *, even):
    """Options of four weights; even ones are of one size, with ever smaller gains."""
    rng = np.random.default_rng(seed)
    sizes = np.full(4, 10) if even else rng.integers(1, 20, 4)
    gains = np.sort(rng.exponential(size=(4, 4)))[:, ::-1]
    errors = gains[:, ::-1].cumsum(1)[:, ::-1] if even else rng.exponential(size=(4, 4))
    widths = (2, 3, 4, 5) if even else (2, 3, 4, 8)
    return {
        f"w{i}": {
            bits: Option(int(size * bits), float(error))
            for bits, error in zip(widths, errors[i], strict=True)
        }
        for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("seed", range(5))
def test_of_even_steps_the_best_are_taken(seed):
    options = drawn(seed, even=True)
    for nbytes in range(80, 201, 10):
        chosen = allocate(options, nbytes=nbytes)
        assert list(chosen) == list(options)
        assert total(options, chosen)[0] <= nbytes
        assert total(options, chosen)[1] == pytest.approx(least(options, nbytes))


@pytest.mark.parametrize("seed", range(5))
def test_of_any_steps_one_is_lost_at_most(seed):
    options = drawn(seed, even=False)
    smallest = sum(choices[2].nbytes for choices in options.values())
    step = max(
        max(o.error for o in choices.values()) - min(o.error for o in choices.values())
        for choices in options.values()
    )
    for nbytes in (smallest, smallest + 7, smallest + 40, smallest + 1000):
        chosen = allocate(options, nbytes=nbytes)
        assert total(options, chosen)[0] <= nbytes
        assert total(options, chosen)[1] <= least(options, nbytes) + step
    assert total(options, chosen)[1] == pytest.approx(least(options, nbytes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": {}}, "options['a'] is empty"),
        ({"a": {2: Option(1, float("nan"))}}, "options['a'][2].error=nan must be"),
        ({"a": {2: Option(9, 1.0)}}, "nbytes=8 must be at least 9"),
    ],
)
def test_allocate_refuses(refuses, options, message):
    with refuses(message):
        allocate(options, nbytes=8)


def test_widths_of_a_model_by_their_errors():
    """The use that `allocate` is for: the same bytes, less error than one width."""
    weights = {f"w{i}": W * (4**i) for i in range(3)}
    packed = {
        name: {bits: qjax.quantize(w, bits, 32) for bits in (2, 3, 4)}
        for name, w in weights.items()
    }
    options = {
        name: {
            bits: Option(one.nbytes, float(squares(weights[name], one).sum()))
            for bits, one in choices.items()
        }
        for name, choices in packed.items()
    }
    even = dict.fromkeys(weights, 3)
    nbytes, error = total(options, even)
    chosen = allocate(options, nbytes=nbytes)
    assert chosen == {"w0": 2, "w1": 3, "w2": 4}
    assert total(options, chosen)[1] < 0.5 * error
