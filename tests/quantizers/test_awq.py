"""AWQ against a plain search over exponents, and what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import gptq
from qjax.quantizers import awq, gram, output_error

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 24)).astype(np.float32)
X = RNG.standard_normal((256, 64)) * np.exp(RNG.standard_normal(64))
X[:, 5] = 0
GRAM = gram(X.astype(np.float32))


def searched(w, x, symmetric):
    """The least error of x @ w, over all exponents, and the factors that give it."""
    size = np.sqrt((x**2).sum(0))
    found = []
    for i in range(20):
        factor = np.where(size > 0, np.where(size > 0, size, 1) ** (i / 20), 1)
        factor /= np.sqrt(factor.max() * factor.min())
        scaled = (w * factor[:, None]).astype(np.float32)
        packed = qjax.quantize(scaled, 3, 32, symmetric)
        off = np.asarray(qjax.dequantize(packed)) / factor[:, None] - w
        found.append((np.linalg.norm(x @ off) / np.linalg.norm(x @ w), factor))
    return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_best_exponent_is_found(symmetric):
    packed = awq.quantize(W, 3, 32, symmetric, gram=GRAM)
    error, factor = searched(W, X, symmetric)
    found = output_error(W, packed, GRAM)
    if symmetric:
        # The largest weight of a group lies between two codes: rounding decides, and
        # with it which of two good exponents is the better.
        assert found < 1.03 * error
    else:
        np.testing.assert_allclose(packed.input_scale, 1 / factor, rtol=1e-5)
        np.testing.assert_allclose(found, error, rtol=1e-3)
    rounded = qjax.quantize(W, 3, 32, symmetric)
    assert error < 0.9 * output_error(W, rounded, GRAM)
    x = X.astype(np.float32)
    wanted = x.astype(np.float64) @ np.asarray(qjax.dequantize(packed, jnp.float32))
    found = qjax.matmul(jnp.asarray(x), packed)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_clip_helps_and_a_stack_is_its_matrices():
    stack, grams = np.stack([W, W[::-1]]), np.stack([GRAM, GRAM])
    plain = awq.quantize(stack, 2, 32, gram=grams)
    clipped = awq.quantize(stack, 2, 32, gram=grams, clip=True)
    better = output_error(stack, clipped, grams) < 0.9 * output_error(
        stack, plain, grams
    )
    assert better.all()
    one = awq.quantize(stack[1], 2, 32, gram=GRAM)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], plain), one)


def test_files_have_no_place_for_the_factors():
    packed = awq.quantize(W, 4, 32, gram=GRAM, scale_dtype=jnp.float16)
    with pytest.raises(ValueError, match="input"):
        gptq.to_tensors(packed, "gptq_v2")


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (jnp.eye(32), "gram is float32(32, 32) and must be float(64, 64)"),
        (jnp.full((64, 64), jnp.inf), "gram must be finite"),
    ],
)
def test_refusals(refuses, seen, message):
    with refuses(message):
        awq.quantize(W, 4, 32, gram=seen)
