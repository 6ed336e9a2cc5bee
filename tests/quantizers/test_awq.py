"""AWQ against a plain search over exponents, and what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import gptq
from qjax.quantizers import awq, clip, gram, output_error

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 24)).astype(np.float32)
X = RNG.standard_normal((256, 64)) * np.exp(RNG.standard_normal(64))
X[:, 5] = 0
GRAM = gram(X.astype(np.float32))


def searched(w, x, symmetric):
    """The least error of x @ w, over all exponents, and the factors that give it."""
    size = np.sqrt((x**2).sum(0))
    size = np.where(size > 0, size, size[size > 0].min())
    found = []
    for i in range(20):
        factor = size ** (i / 20)
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
        (jnp.full((64, 64), jnp.inf), "gram must be finite; it holds NaN or infinity"),
        (1e-6 * GRAM, "w is too large: scale_dtype=float16 cannot hold the scales"),
    ],
)
def test_refusals(refuses, seen, message):
    w, dtype = (1e7 * W, jnp.float16) if "float16" in message else (W, None)
    with refuses(message):
        awq.quantize(w, 4, 32, gram=seen, scale_dtype=dtype)


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def attention(x, weight, matrices):
    """One head a row of 8; in float64, if its operands are."""
    q, k, v, out = matrices
    y = norm(x, weight)
    heads = [(y @ w).reshape(len(x), -1, 8).transpose(1, 0, 2) for w in (q, k, v)]
    score = np.exp(heads[0] @ heads[1].transpose(0, 2, 1) / 8)
    mixed = (score / score.sum(-1, keepdims=True)) @ heads[2]
    return x + mixed.transpose(1, 0, 2).reshape(len(x), -1) @ out


def feed_forward(x, weight, matrices, bias):
    gate, up, down = matrices
    y = norm(x, weight)
    gated = (y @ gate) / (1 + np.exp(-y @ gate)) * (y @ up + bias)
    return x + gated @ down


def wide(arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def test_folding_leaves_the_function_as_it_is():
    """All that a Llama's block allows, in float64 but for the folded arrays."""
    x = np.random.default_rng(1).standard_normal((16, 64))
    made = np.random.default_rng(2).standard_normal((7, 64, 64)).astype(np.float32)
    q, k, v, out, gate, up, down = made / 8
    weight, bias = (np.exp(made[i, 0]) for i in (0, 1))
    factors = np.exp(made[:4, 1])
    before = attention(x, *wide([weight]), wide([q, k, v, out]))
    before = feed_forward(before, *wide([weight]), wide([gate, up, down]), bias)

    (first,), qkv = awq.fold(factors[0], [weight], [q, k, v])
    (v,), (out,) = awq.fold(factors[1], [qkv[2]], [out])
    (second,), (gate, up) = awq.fold(factors[2], [weight], [gate, up])
    (up, bias), (down,) = awq.fold(factors[3], [up, bias], [down])
    after = attention(x, *wide([first]), wide([*qkv[:2], v, out]))
    after = feed_forward(after, *wide([second]), wide([gate, up, down]), *wide([bias]))
    # Seven arrays were rounded to float32, twice at most.
    np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(before).max())


def test_folded_codes_are_those_of_quantize():
    for clipped in (False, True):
        factor = awq.factors([W], 3, 32, gram=GRAM, clip=clipped)
        _, (larger,) = awq.fold(factor, [], [W])
        wanted = awq.quantize(W, 3, 32, gram=GRAM, clip=clipped)
        np.testing.assert_array_equal(1 / factor, wanted.input_scale)
        seen = GRAM.diagonal()
        seen = jnp.where(seen > 0, seen, seen[seen > 0].min())
        importance = seen / factor**2
        if clipped:
            packed = clip.quantize(larger, 3, 32, importance=importance)
        else:
            packed = qjax.quantize(larger, 3, 32)
        differ = np.asarray(qjax.codes(packed)) != np.asarray(qjax.codes(wanted))
        # Squares of roots are off by a bit, and so may be which of two ranges is best.
        assert differ.mean() <= 0.01 * clipped


def test_matrices_of_the_same_inputs_are_one_side_by_side():
    half = W[:, 8:].astype("bfloat16")
    factor = awq.factors([W[:, :8], half], 3, 32, gram=GRAM)
    joined = np.concatenate([W[:, :8], half.astype(np.float32)], 1)
    wanted = awq.quantize(joined, 3, 32, gram=GRAM).input_scale
    np.testing.assert_array_equal(1 / factor, wanted)
    _, pair = awq.fold(factor, [], [W, half])
    assert [one.dtype for one in pair] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize(
    ("weights", "seen", "message"),
    [
        ([], GRAM, "weights must be [k, n], all of one k; got shapes []"),
        ([W, W[:32]], GRAM, "got shapes [(64, 24), (32, 24)]"),
        ([W[None]], GRAM, "got shapes [(1, 64, 24)]"),
        ([W], jnp.eye(32), "gram is float32(32, 32) and must be float(64, 64)"),
        ([W], jnp.full((64, 64), jnp.nan), "gram must be finite"),
        ([np.full_like(W, np.inf)], GRAM, "weights must be finite"),
        ([W], 3e38 * jnp.eye(64), "gram or weights is too large"),
        (W, GRAM, "weights is an array of shape (64, 24), and must be a list"),
    ],
)
def test_no_factors(refuses, weights, seen, message):
    with refuses(message, TypeError if weights is W else ValueError):
        awq.factors(weights, 3, 32, gram=seen)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e8])
def test_the_size_of_inputs_says_nothing(scale):
    """Though some are always 0; if all are, nothing is known."""
    wanted = awq.factors([W], 3, 32, gram=GRAM)
    # A power of other numbers is rounded otherwise.
    found = awq.factors([W], 3, 32, gram=jnp.float32(scale) * GRAM)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(awq.factors([W], 3, 32, gram=0 * GRAM), 1)


@pytest.mark.parametrize(
    ("factor", "before", "after"),
    [
        (np.ones(64), [np.ones(32)], []),
        (np.ones(64), [], [np.ones((32, 64))]),
        (np.ones((2, 64)), [], []),
    ],
)
def test_no_folding(refuses, factor, before, after):
    with refuses(f"factor.shape={factor.shape} must be [k], with before [..., k]"):
        awq.fold(factor, before, after)


def test_one_array_is_no_list(refuses):
    for name in ("before", "after"):
        given = {"before": [], "after": [], name: np.ones((64, 64))}
        with refuses(f"{name} is an array of shape (64, 64), and must be", TypeError):
            awq.fold(np.ones(64), **given)
