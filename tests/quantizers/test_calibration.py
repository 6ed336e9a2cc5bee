"""Grams of whole models against those of the same models in NumPy, written out."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.layers.linen import to_params
from qjax.layers.nnx import wrapped
from qjax.quantizers import awq, calibrated, gptq, grams, hqq
from tests.layers import foreign

K, HEADS, HEAD, STACK = 32, 2, 16, 3
SPEC = qjax.Spec(bits=4, group_size=16)
# Sums of float32 in another order, through a few layers.
FLOAT32 = 1e-5


def x(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gram(*inputs):
    rows = [np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in inputs]
    return sum(a.T @ a for a in rows)


def same(found, expected, tolerance=FLOAT32):
    assert found.keys() == expected.keys()
    for path, one in found.items():
        assert one.dtype == jnp.float32
        assert one.shape == np.shape(expected[path]), path
        off = np.abs(np.asarray(one) - expected[path]).max()
        assert off <= tolerance * np.abs(expected[path]).max(), path


def wide(w):
    """The matrices that a packed weight stands for, in float64."""
    return np.asarray(qjax.dequantize(w, jnp.float32), np.float64)


def matrices(model):
    return {
        "/".join(map(str, (*path, name))): wide(nnx.as_pure(weight))
        for path, module in nnx.iter_modules(model)
        for name, weight in wrapped.packed_weights(module).items()
    }


def relu(x):
    return np.maximum(x, 0)


class Two(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(K, 64, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(64, K, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, scale=1.0):
        self.calls[...] += 1
        return self.down(nnx.relu(self.up(x * jnp.asarray(scale, x.dtype))))


@pytest.fixture(scope="module")
def two():
    return qjax.quantize_model(Two(nnx.Rngs(0)), SPEC)


def test_layers_one_after_another_and_batches_of_any_shape(two):
    batches = [x(2, 5, K), x(7, K, seed=1), np.asarray(x(7, K, seed=2))]
    w = matrices(two)
    first = [np.asarray(one, np.float64) for one in batches]
    second = [relu(one @ w["up/kernel"]) for one in first]
    expected = {"down/kernel": gram(*second), "up/kernel": gram(*first)}
    found = grams(two, iter(batches))
    same(found, expected)
    assert two.calls[...] == 0
    assert not hasattr(nnx.as_pure(two.up.packed), "gram")


def test_paths_and_keywords(two):
    batch = x(7, K)
    expected = {"up/kernel": 4 * gram(batch)}
    same(grams(two, [(batch,)], paths="up", scale=2.0), expected)
    same(grams(two, [batch], paths="u.*/kernel", scale=2.0), expected)
    named = [{"x": batch, "scale": jnp.float32(scale)} for scale in (2.0, 1.0)]
    expected["up/kernel"] *= 5 / 4
    same(grams(two, named, paths="up", scale=3.0), expected)


def test_inputs_of_16_bits_are_summed_in_float32():
    model = Two(nnx.Rngs(0))
    model.up.dtype = model.down.dtype = jnp.bfloat16
    model = qjax.quantize_model(model, SPEC)
    batch = x(300, K, dtype=jnp.bfloat16)
    found, w = grams(model, [batch]), matrices(model)
    same({"up/kernel": found["up/kernel"]}, {"up/kernel": gram(batch)})
    hidden = relu(np.asarray(batch, np.float64) @ w["up/kernel"])
    # Each of the summands is rounded to bfloat16, twice.
    same({"down": found["down/kernel"]}, {"down": gram(hidden)}, tolerance=2**-7)


def test_with_x64_they_are_float32_too(two):
    with jax.enable_x64(True):
        found = grams(two, [x(7, K)], paths="up")
    same(found, {"up/kernel": gram(x(7, K))})


def test_attention_has_grams_of_the_flattened_contraction():
    dense = nnx.MultiHeadAttention(
        HEADS, K, decode=False, use_bias=False, rngs=nnx.Rngs(0)
    )
    model = qjax.quantize_model(dense, SPEC)
    batch, w = x(2, 5, K), matrices(model)
    wide_batch = np.asarray(batch, np.float64)
    q, k, v = (
        (wide_batch @ w[f"{name}/kernel"]).reshape(2, 5, HEADS, HEAD)
        for name in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(HEAD))
    scores /= scores.sum(-1, keepdims=True)
    summed = np.einsum("bnqk,bknh->bqnh", scores, v).reshape(2, 5, K)
    expected = {f"{n}/kernel": gram(batch) for n in ("key", "query", "value")}
    same(grams(model, [batch]), expected | {"out/kernel": gram(summed)})


class Foreign(nnx.Module):
    """Modules of others: a fused einsum, a tied table, a shared and a mapped weight."""

    def __init__(self, rngs):
        self.embedder = foreign.Embedder(rngs)
        self.first = foreign.Einsum("BTD,DNH->BTNH", (64, 2, 16), rngs)
        self.second = foreign.Einsum("BTNH,NHD->BTD", (2, 16, 64), rngs)
        self.again = foreign.Einsum("BTD,DNH->BTNH", (64, 2, 16), rngs)
        self.again.w = self.first.w
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (STACK, 64, 16)))

    def __call__(self, tokens):
        x = self.embedder.encode(tokens)
        x = self.second(self.first(x))
        x = self.second(self.again(x))
        y = jax.vmap(lambda w, x: x @ w, in_axes=(0, None))(self.experts[...], x)
        return self.embedder.decode(x), y


@pytest.mark.slow
def test_modules_of_others():
    tokens = foreign.tokens(2, 5)
    reports = []
    model = qjax.quantize_model(
        Foreign(nnx.Rngs(0)), SPEC, tokens, strict=True, report=reports.append
    )
    w = matrices(model)
    table = w["embedder/input_embedding"]
    inputs = [8 * table.T[np.asarray(tokens)]]
    for _ in range(2):
        inputs.append(inputs[-1] @ w["first/w"])
        inputs.append(inputs[-1] @ w["second/w"])
    found = grams(model, [tokens])
    expected = {
        "again/w": gram(inputs[0], inputs[2]),
        "embedder/input_embedding": gram(inputs[4]),
        # All experts have the same inputs, and so are one matrix.
        "experts": gram(inputs[4]),
        "second/w": gram(inputs[1], inputs[3]),
    }
    same(found, expected)
    assert {entry.path for entry in reports[0].replaced} == set(found)


def residual(x, ups, downs):
    """What comes of a stack of residual layers, and the grams of its weights."""
    found = []
    for up, down in zip(ups, downs, strict=True):
        hidden = relu(x @ up)
        found.append((gram(x), gram(hidden)))
        x = x + hidden @ down
    return x, *map(np.stack, zip(*found, strict=True))


class Layers(nnx.Module):
    """A stack of layers, scanned with checkpoints, and experts that tokens choose."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=STACK)
        @nnx.vmap
        def make(rngs):
            return Two(rngs)

        self.layers = make(rngs)
        self.routed = nnx.Param(jax.random.normal(rngs.params(), (STACK, K, 16)))
        self.mapped = nnx.Param(jax.random.normal(rngs.params(), (STACK, K, 16)))

    def __call__(self, x, sizes):
        step = nnx.remat(lambda x, layer: x + layer(x))
        x, _ = nnx.scan(lambda x, layer: (step(x, layer), None))(x, self.layers)
        each = x.reshape(STACK, -1, K)
        mapped = jax.vmap(lambda x, w: x @ w)(each, self.mapped[...])
        return jax.lax.ragged_dot(x, self.routed[...], sizes), mapped


def test_stacks_that_are_scanned_and_experts():
    batch, sizes = x(12, K), jnp.array([5, 0, 7], jnp.int32)
    model = qjax.quantize_model(Layers(nnx.Rngs(0)), SPEC, batch, sizes, strict=True)
    w = matrices(model)
    stacks = w["layers/up/kernel"], w["layers/down/kernel"]
    now, ups, downs = residual(np.asarray(batch, np.float64), *stacks)
    expected = {
        "layers/down/kernel": downs,
        "layers/up/kernel": ups,
        "mapped": np.stack([gram(one) for one in now.reshape(STACK, -1, K)]),
        "routed": np.stack([gram(now[:5]), np.zeros((K, K)), gram(now[5:])]),
    }
    same(grams(model, [(batch, sizes)]), expected)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.relu(nn.Dense(64, name="up")(x))
        return x + nn.Dense(K, name="down")(hidden), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K, use_bias=False)(x)
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=STACK,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.DenseGeneral((2, 8), name="head")(x)


def test_linen():
    batch = x(2, 5, K)
    dense = jax.jit(Linen().init)(jax.random.key(0), batch)
    module, variables = qjax.quantize_model(
        Linen(), [("head", None), (".*", SPEC)], batch, variables=dense
    )
    params = to_params(variables)
    first = np.asarray(batch, np.float64) @ wide(params["Dense_0"]["kernel"])
    up, down = (wide(params["layers"][name]["kernel"]) for name in ("up", "down"))
    _, ups, downs = residual(first, up, down)
    expected = {
        "Dense_0/kernel": gram(batch),
        "layers/down/kernel": downs,
        "layers/up/kernel": ups,
    }
    same(grams(module, [batch], variables=variables), expected)


def test_layers_of_this_package_in_linen():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return qjax.layers.linen.Dense(16, group_size=16)(x)

    batch = x(5, K)
    variables = Own().init(jax.random.key(0), batch)
    found = grams(Own(), [batch], variables=variables)
    same(found, {"Dense_0/kernel": gram(batch)})


def related(rows, seed):
    """Inputs that have to do with each other, as those of real layers."""
    mix = np.random.default_rng(7).normal(size=(K, K)) * np.linspace(2, 0.1, K)
    return x(rows, K, seed=seed) @ jnp.asarray(mix, jnp.float32)


def test_a_model_of_few_bits_is_nearer_to_the_dense_one():
    dense = Two(nnx.Rngs(0))
    rules = qjax.Spec(bits=2, group_size=16)
    batches = [related(128, seed) for seed in range(3)]
    rounded = qjax.quantize_model(dense, rules)
    found = grams(rounded, batches)
    better = qjax.quantize_model(dense, calibrated(rules, found, act_order=True))
    assert better.up.kernel.order.shape == (K,)
    held_out = related(128, seed=9)
    errors = [
        float(jnp.linalg.norm(model(held_out) - dense(held_out)))
        for model in (better, rounded)
    ]
    assert errors[0] < 0.75 * errors[1]


def test_rules_go_to_weights_that_have_grams():
    eye = jnp.eye(K)
    spec, other = qjax.Spec(bits=3, group_size=16), qjax.Spec(bits=8)
    given = [("a.b", spec), ("c", None), ("d/.*", other)]
    found = calibrated(
        given, {"a.b/w": eye, "c/w": eye, "d/w": eye, "e/w": eye}, clip=True, damp=0.1
    )
    assert [pattern for pattern, _ in found[:2]] == [re.escape("a.b/w"), "d/w"]
    assert [rule.pattern for rule, _ in found[2:]] == ["a.b", "c", "d/.*"]
    assert [one for _, one in found[2:]] == [spec, None, other]
    (_, first), (_, second) = found[:2]
    assert (first.bits, first.group_size, second.bits) == (3, 16, 8)
    assert first.quantizer.func is gptq.quantize
    assert first.quantizer.keywords == {"gram": eye, "clip": True, "damp": 0.1}
    (_, first), *_ = calibrated(given, {"a.b/w": eye}, awq.quantize)
    assert first.quantizer.func is awq.quantize
    with pytest.raises(TypeError, match="unexpected keyword argument 'order'"):
        calibrated(given, {"a.b/w": eye}, order=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gram'"):
        calibrated(given, {"a.b/w": eye}, hqq.quantize)


def test_rules_may_name_the_tensors_of_a_checkpoint():
    """For paths of models, these patterns mean what `quantize_model` makes of them."""
    eye, tensors = jnp.eye(K), r".*up_proj\.weight"
    three, eight = (qjax.Spec(bits=bits, group_size=16) for bits in (3, 8))
    module = "model.layers.0.mlp.up_proj"
    for rule, path, bits in (
        (tensors, module, 8),
        (tensors, f"{module}.weight", 8),
        (r".*\.up_proj", module, 8),
        (r".*\.up_proj", f"{module}.weight", 8),
        (r".*\.mlp", module, 3),
        (tensors, "layers/up_proj", 3),
        (tensors, "up_proj.weight/kernel", 8),
        (r".*\.weight", "a.b/kernel", 3),
    ):
        (pattern, spec), *_ = calibrated([(rule, eight), (".*", three)], {path: eye})
        assert re.fullmatch(pattern, path)
        assert spec.bits == bits, (rule, path)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "batches is empty"),
        (x(3, K), {}, TypeError, "batches is an array of shape (3, 32)"),
        (
            {"x": x(3, K)},
            {},
            TypeError,
            "batches is one batch, a mapping of ['x']; pass",
        ),
        ([x(3, K)], {"paths": "left"}, ValueError, "whose path paths='left' matches"),
        ([x(3, K)], {"paths": "("}, ValueError, "is no regular expression"),
        ([x(3, K)], {"variables": {}}, TypeError, "variables are for linen"),
    ],
)
def test_refusals(two, batches, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        grams(two, batches, **options)


class Unhashable(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(K, K, rngs=rngs)
        self.settings = nnx.static({"scale": 2.0})

    def __call__(self, x):
        return self.up(x) * self.settings["scale"]


def test_models_that_cannot_be_hashed():
    inputs = x(3, K)
    model = qjax.quantize_model(Unhashable(nnx.Rngs(0)), SPEC)
    same(grams(model, [inputs, inputs]), {"up/kernel": gram(inputs, inputs)})


def test_refusals_of_models():
    with pytest.raises(ValueError, match=r"qjax\.quantize_model\(.* packs"):
        grams(Two(nnx.Rngs(0)), [x(3, K)])
    with pytest.raises(ValueError, match="variables=None must hold the 'params'"):
        grams(Linen(), [x(3, K)])
    with pytest.raises(TypeError, match=r"must be an nnx.Module or an nn.Module"):
        grams("model", [x(3, K)])
    embed = qjax.layers.nnx.Embed(64, K, group_size=16)
    with pytest.raises(ValueError, match=r"none of the products .* counts"):
        grams(embed, [jnp.arange(3)])
