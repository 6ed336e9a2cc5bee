"""`qjax.quantize_model` of nnx models, most of whose modules are not ours."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.layers.nnx import Quantized, Scale, wrapped
from tests.layers import foreign
from tests.layers.foreign import FLOAT32, GROUP, HEAD, HEADS, MODEL, SPEC, same, x

TOKENS = foreign.tokens(2, 3)
RNGS = nnx.Rngs(0)
WEIGHTS = {
    *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    *("q/w", "o/w", "up/kernel", "embedder/input_embedding"),
    *("experts/up", "experts/down"),
}


@pytest.fixture(scope="module")
def quantized():
    return qjax.quantize_model(foreign.transformer(), SPEC, TOKENS, strict=True)


@pytest.fixture(scope="module")
def expected(quantized):
    model = foreign.dequantized(quantized, foreign.transformer())
    return nnx.jit(lambda model: model(TOKENS))(model)


def quantize(model, *inputs, **options):
    """A model and its report, without a word of what a rule could not replace."""
    reports = []
    model = qjax.quantize_model(model, SPEC, *inputs, report=reports.append, **options)
    return model, reports[0]


@pytest.mark.slow
def test_logits_are_those_of_the_dequantized_model(quantized, expected):
    same(quantized(TOKENS), expected)
    same(nnx.jit(lambda model: model(TOKENS))(quantized), expected)


def test_classes_and_the_model_itself_stay_what_they_are(quantized):
    model = foreign.transformer()
    assert isinstance(quantized, foreign.Transformer)
    assert isinstance(quantized.q, foreign.Einsum)
    assert isinstance(quantized.attention.query, nnx.LinearGeneral)
    assert isinstance(quantized.up, qjax.layers.nnx.Linear)
    assert (quantized.q.features, quantized.q.w.shape) == (HEAD, (MODEL, HEADS, HEAD))
    assert type(model.q) is foreign.Einsum
    assert model.q.w.shape == (MODEL, HEADS, HEAD)


def test_groups_run_over_the_flattened_contraction(quantized):
    packed = {
        path: nnx.as_pure(weight)
        for path, module in nnx.iter_modules(quantized)
        for weight in wrapped.packed_weights(module).values()
    }
    assert packed["o",].shape == (HEADS * HEAD, MODEL)
    assert packed["o",].scale.shape == (HEADS * HEAD // GROUP, MODEL)
    assert packed["attention", "out"].shape == (MODEL, MODEL)
    assert packed["q",].shape == (MODEL, HEADS * HEAD)


def test_a_split_model_is_merged_again(quantized, expected):
    graphdef, floats, rest = nnx.split(quantized, nnx.Param, ...)
    assert {type(leaf) for leaf in jax.tree.leaves(floats, is_leaf=_is_variable)} == {
        nnx.Param,
        Scale,
    }
    same(nnx.merge(graphdef, floats, rest)(TOKENS), expected)


def _is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_scales_have_the_gradients_of_the_dequantized_model(quantized):
    graphdef, scales, rest = nnx.split(quantized, Scale, ...)

    def loss(scales, is_dense):
        model = nnx.merge(graphdef, scales, rest, copy=True)
        if is_dense:
            model = foreign.dequantized(model, foreign.transformer())
        return (model(TOKENS) ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    # Sums over the whole model, back and forth.
    close = functools.partial(same, tolerance=10 * FLOAT32)
    jax.tree.map(close, gradient(scales, False), gradient(scales, True))


def test_without_inputs_what_is_known_is_replaced(expected):
    model, report = quantize(foreign.transformer())
    missed = {"experts/up", "experts/down"}
    assert {entry.path for entry in report.replaced} == WEIGHTS - missed
    assert {entry.path for entry in report.refused} == missed
    assert "pass the inputs of a call" in report.refused[0].reason
    assert model(TOKENS).shape == expected.shape


def test_the_report_tells_of_every_parameter(quantized):
    _, report = quantize(foreign.transformer(), TOKENS)
    assert {entry.path for entry in report.replaced} == WEIGHTS
    parameters = nnx.to_flat_state(nnx.state(foreign.transformer(), nnx.Param))
    assert len(report.entries) == len(parameters)
    reasons = {entry.path: entry.reason for entry in report.kept}
    assert reasons["norm/scale"] == "it has fewer than two axes"
    assert reasons["attention/key/bias"] == "it is named as what is added or scaled by"
    assert not report.refused
    assert report.before == sum(v[...].nbytes for _, v in parameters)
    assert report.after == qjax.memory_report(quantized).nbytes - 2 * 4  # two counters
    text = str(report)
    assert "10 of 17 parameters quantized" in text
    assert "QTensor(64x64, 4 bits, group 32" in text


@pytest.mark.on_cpu
def test_memory_report_counts_packed_bytes(quantized):
    report = qjax.memory_report(quantized)
    entries = {entry.path: entry for entry in report.entries}
    entry = entries["o/w"]
    # 4 bits a code, and for each group a float32 scale and an 8-bit zero.
    assert entry.nbytes == MODEL**2 // 2 + MODEL**2 // GROUP * 5
    assert (entry.dense_nbytes, entry.bits) == (MODEL**2 * 2, 4)
    assert entry.shape == (MODEL, MODEL)
    assert entries["norm/scale"].nbytes == MODEL * 4
    assert report.nbytes == sum(entry.nbytes for entry in report.entries)
    assert "embedder/input_embedding" in str(report)


def test_rules_first_match_wins_on_weights_and_modules():
    rules = [
        ("attention/.*", None),
        (".*/w", qjax.Spec(bits=8, group_size=None)),
        ("up", qjax.Spec(bits=2, group_size=16, symmetric=True)),
        ("up|o", qjax.Spec()),
    ]
    reports = []
    qjax.quantize_model(foreign.transformer(), rules, report=reports.append)
    now = {e.path: (e.weight or "").split(",")[1:3] for e in reports[0].replaced}
    assert now == {
        "q/w": [" 8 bits", " group column"],
        "o/w": [" 8 bits", " group column"],
        "up/kernel": [" 2 bits", " group 16"],
    }
    reasons = {entry.path: entry.reason for entry in reports[0].kept}
    assert reasons["attention/out/kernel"] == "a rule leaves it"
    assert reasons["experts/up"] == "no rule matches"


def test_what_cannot_be_followed_warns_or_is_an_error():
    model = nnx.Linear(40, 8, rngs=RNGS)
    message = "kernel: k=40 is no multiple of group_size=32"
    with pytest.warns(UserWarning, match=message):
        same_model = qjax.quantize_model(model, SPEC)
    assert type(same_model) is nnx.Linear
    with pytest.raises(ValueError, match=message):
        qjax.quantize_model(model, SPEC, strict=True)
    _, report = quantize(nnx.Linear(36, 8, rngs=RNGS))
    assert report.refused[0].reason.startswith("k=36 is no multiple of 8")


def test_parameters_that_are_no_matrices_are_let_be():
    class Convolution(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(32, 32, (3,), rngs=RNGS)
            self.place = nnx.Param(jnp.ones((1, 5, 32)))
            self.adapter = nnx.LoRA(32, 2, 32, rngs=RNGS)
            self.unused = nnx.Param(jnp.ones((3, 32, 32)))

        def __call__(self, x):
            x = self.conv(x) + self.place[...]
            return x + self.adapter(x)

    model = Convolution()
    changed = qjax.quantize_model(model, SPEC, x(1, 5, 32))
    same(changed(x(1, 5, 32)), model(x(1, 5, 32)), 0)
    _, report = quantize(model, x(1, 5, 32))
    assert not report.replaced
    reasons = {entry.path: entry.reason for entry in report.entries}
    assert "conv_general_dilated" in reasons["conv/kernel"]
    assert "add" in reasons["place"]
    assert "not used" in reasons["unused"]


def test_what_a_call_does_not_use_is_as_without_inputs():
    class Other(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(MODEL, MODEL, rngs=RNGS)
            self.other_embed = nnx.Param(x(5, MODEL))
            self.other = nnx.Param(x(MODEL, 5))
            self.place = nnx.Param(x(5, MODEL))

        def __call__(self, x):
            return self.up(x) + self.place[...][None]

    model, report = quantize(Other(), x(1, 5, MODEL))
    assert {entry.path for entry in report.replaced} == {
        *("up/kernel", "other", "other_embed")
    }
    shapes = {name: w.shape for name, w in wrapped.packed_weights(model).items()}
    assert shapes == {"other": (MODEL, 5), "other_embed": (MODEL, 5)}


def test_a_model_that_cannot_be_traced_says_what_to_do():
    class Looks(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) if float(x.sum()) else x

    model = Looks(MODEL, MODEL, rngs=RNGS)
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        quantize(model, x(1, MODEL))
    assert any("leave the inputs out" in note for note in caught.value.__notes__)
    assert len(quantize(model)[1].replaced) == 1


def test_an_abstract_model_is_quantized_and_filled(quantized, expected):
    """At no time is there a dense matrix of float32 beside those of the test itself."""
    abstract = nnx.eval_shape(lambda: foreign.Transformer(nnx.Rngs(0)))
    before = {id(array) for array in jax.live_arrays()}
    model = qjax.quantize_model(abstract, SPEC, TOKENS)
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.size > 1000]
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert qjax.memory_report(model).nbytes == qjax.memory_report(quantized).nbytes
    weights = {
        "/".join((*map(str, path), name)): nnx.as_pure(weight)
        for path, module in nnx.iter_modules(quantized)
        for name, weight in wrapped.packed_weights(module).items()
    }
    plain = nnx.state(foreign.transformer(), nnx.filterlib.Not(nnx.RngState))
    weights |= {
        "/".join(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(plain)
        if "/".join(map(str, path)) not in WEIGHTS
    }
    qjax.layers.nnx.load(model, weights)
    same(model(TOKENS), expected)


def test_load_rounds_dense_weights_as_the_model_was():
    abstract = nnx.eval_shape(
        lambda: foreign.Einsum("BTNH,NHD->BTD", (HEADS, HEAD, MODEL), nnx.Rngs(0))
    )
    model, _ = quantize(abstract)
    weight = x(HEADS, HEAD, MODEL)
    qjax.layers.nnx.load(model, {"w": weight, "calls": jnp.zeros((), jnp.int32)})
    expected = qjax.prepare(qjax.quantize(weight.reshape(-1, MODEL), 4, GROUP))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.as_pure(wrapped.packed_weights(model)["w"]),
        expected,
    )
    qjax.layers.nnx.load(model, {"": qjax.quantize(weight.reshape(-1, MODEL), 3, 16)})
    assert model(x(1, 2, HEADS, HEAD)).shape == (1, 2, MODEL)


def test_load_fills_all_modules_that_share_a_weight_and_our_own_tables():
    first, second = (
        foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), RNGS) for _ in range(2)
    )
    second.w = first.w
    model, _ = quantize(nnx.List([first, second]))
    qjax.layers.nnx.load(model, {"1/w": jnp.eye(MODEL)})
    same(model[0](x(1, 3, MODEL)), x(1, 3, MODEL))
    table = x(foreign.VOCABULARY, MODEL)
    embed = qjax.layers.nnx.Embed(foreign.VOCABULARY, MODEL, group_size=GROUP)
    qjax.layers.nnx.load(embed, {"embedding": table})
    same(embed(TOKENS), qjax.dequantize(qjax.quantize(table.T, 4, GROUP)).T[TOKENS], 0)


def test_load_fills_arrays_that_are_no_variables():
    class Scaled(nnx.Linear):
        def __init__(self):
            super().__init__(MODEL, 8, rngs=nnx.Rngs(0))
            self.factor = nnx.data(jnp.full((8,), 3.0))

        def __call__(self, x):
            return super().__call__(x) * self.factor[None]

    dense = Scaled()
    model, _ = quantize(nnx.eval_shape(Scaled))
    weights = {"kernel": dense.kernel[...], "bias": dense.bias[...]}
    with pytest.raises(ValueError, match="model's parameter is of shape"):
        qjax.layers.nnx.load(model, {**weights, "factor": jnp.ones(3)})
    qjax.layers.nnx.load(model, {**weights, "factor": dense.factor})
    same(model(x(3, MODEL)), quantize(dense)[0](x(3, MODEL)), 0)


def test_load_says_what_does_not_fit():
    model, _ = quantize(nnx.Linear(MODEL, 8, rngs=RNGS))
    with pytest.raises(ValueError, match=r"its shape must be \(64, 8\)"):
        qjax.layers.nnx.load(model, {"kernel": qjax.quantize(x(32, 8), 4, 32)})
    with pytest.raises(ValueError, match=r"parameter is of shape \(8,\)"):
        qjax.layers.nnx.load(model, {"bias": x(9)})
    with pytest.raises(ValueError, match=r"not there; close to it are \['kernel'\]"):
        qjax.layers.nnx.load(model, {"kernels": x(8)})


@pytest.mark.parametrize(
    "shape", [(64, 16, 4), (4, 64, 16), (64, 4, 17), (64, 64)], ids=str
)
def test_load_takes_a_dense_weight_of_its_own_shape_alone(shape):
    """Another one may have as many elements, and would be flattened as well."""
    dense = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
    model, _ = quantize(dense)
    message = f"weights['query/kernel'] has the shape {shape}, and must have (64, 4, 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        qjax.layers.nnx.load(model, {"query/kernel": x(*shape)})


def test_load_of_a_stack_wants_all_axes():
    @nnx.vmap
    def make(key):
        return nnx.LinearGeneral((4, 16), 8, axis=(-2, -1), rngs=nnx.Rngs(key))

    model, _ = quantize(make(jax.random.split(jax.random.key(0), 3)))
    qjax.layers.nnx.load(model, {"kernel": x(3, 4, 16, 8)})
    matrices = x(3, 4, 16, 8).reshape(3, 64, 8)
    expected = qjax.prepare(qjax.quantize(matrices, 4, GROUP))
    chex.assert_trees_all_equal(nnx.as_pure(model.packed["kernel"]), expected)
    with pytest.raises(ValueError, match=r"must have \(3, 4, 16, 8\)"):
        qjax.layers.nnx.load(model, {"kernel": x(4, 16, 8)})


@pytest.mark.parametrize(
    ("path", "weight", "message"),
    [
        ("nowhere", jnp.ones(8), "not there"),
        ("1/kernel", jnp.ones((8, MODEL)), "and must have"),
        # Or where annotations are checked at run time, before that.
        (
            "1/kernel",
            jnp.ones((MODEL, 8), jnp.int32),
            "cannot be rounded as|Type-check",
        ),
        ("1/kernel", qjax.quantize(jnp.ones((32, 8)), 4, 32), "its shape must be"),
        ("2/embedding", qjax.quantize(jnp.ones((32, 8)), 4, 32), "is not packed"),
    ],
)
def test_load_changes_nothing_if_anything_does_not_fit(path, weight, message):
    layers = [nnx.Linear(MODEL, 8, rngs=RNGS) for _ in range(2)]
    rules = [("2", None), (".*", SPEC)]
    model = qjax.quantize_model(nnx.List([*layers, nnx.Embed(32, 8, rngs=RNGS)]), rules)
    before = nnx.as_pure(nnx.clone(nnx.state(model)))
    weights = {"0/kernel": x(MODEL, 8), "0/bias": x(8), path: weight}
    with pytest.raises((ValueError, TypeError), match=message):
        qjax.layers.nnx.load(model, weights)
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), before)


def test_what_the_model_is_not_called_with_is_refused():
    model = nnx.List([nnx.Linear(MODEL, 8, rngs=RNGS)])
    with pytest.raises(ValueError, match="List has no method '__call__'"):
        qjax.quantize_model(model, SPEC, x(3, MODEL))
    with pytest.raises(ValueError, match="method='run': Linear has no method 'run'"):
        qjax.quantize_model(model[0], SPEC, method="run")
    with pytest.raises(TypeError, match="unexpected keyword argument 'groupsize'"):
        qjax.quantize_model(model[0], SPEC, x(3, MODEL), groupsize=32)


def test_adapters_go_beside_what_was_a_plain_linear_layer():
    model, _ = quantize(nnx.List([nnx.Linear(MODEL, 8, rngs=RNGS)]))
    adapted = training.nnx.add_lora(model, rank=2, rngs=nnx.Rngs(0))
    same(adapted[0](x(3, MODEL)), model[0](x(3, MODEL)))


def test_only_flax_models_are_taken():
    with pytest.raises(TypeError, match=r"must be an nnx.Module or an nn.Module"):
        qjax.quantize_model({"w": x(3)}, SPEC)
    with pytest.raises(TypeError, match="variables are for linen"):
        qjax.quantize_model(nnx.Linear(2, 2, rngs=RNGS), SPEC, variables={})


def test_quantized_models_are_not_quantized_again():
    model, _ = quantize(foreign.transformer(), TOKENS)
    again, report = quantize(model)
    assert not report.replaced
    assert type(again.q) is type(model.q)


def test_words_are_never_parameters(quantized):
    for _, variable in nnx.to_flat_state(nnx.state(quantized, nnx.Param)):
        assert jnp.issubdtype(variable.dtype, jnp.floating)
    assert jax.tree.leaves(nnx.state(quantized, Quantized))


class Tied(nnx.Module):
    """Reads weights of modules that are not its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(96, 64, rngs=rngs)
        self.up = nnx.Linear(64, 32, rngs=rngs)
        self.down = nnx.Linear(32, 64, rngs=rngs)
        self.more = nnx.List([nnx.Param(x(64, 64)), nnx.Param(x(64, 64))])

    def __call__(self, tokens, count):
        count[...] += 1
        x = self.embed.embedding[...].at[tokens].get()
        h = self.up(x)
        x = self.down(h) + h @ self.up.kernel[...].T
        for w in self.more:
            x = x @ w
        return x @ self.embed.embedding.T


def test_weights_that_modules_above_read_stay_packed():
    model, count = Tied(nnx.Rngs(0)), nnx.Variable(jnp.zeros((), jnp.int32))
    changed, report = quantize(model, TOKENS, count)
    assert len(report.replaced) == 5
    assert type(changed.down) is qjax.layers.nnx.Linear
    assert isinstance(changed.up, nnx.Linear)
    found = changed(TOKENS, count)
    assert int(count[...]) == 1
    same(nnx.jit(lambda model, *args: model(*args))(changed, TOKENS, count), found)
    packed = {
        "embed": (wrapped.packed_weights(changed.embed)["embedding"], True),
        "up": (changed.up.packed["kernel"], False),
        "down": (changed.down.packed, False),
    }
    for name, (weight, is_table) in packed.items():
        dense = qjax.dequantize(nnx.as_pure(weight))
        module = getattr(model, name)
        variable = module.embedding if is_table else module.kernel
        variable.set_value(dense.T if is_table else dense)
    for i, weight in wrapped.packed_weights(changed.more).items():
        model.more[int(i)].set_value(qjax.dequantize(nnx.as_pure(weight)))
    same(found, model(TOKENS, count))


def squared(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(jnp.square, params), rest)(x)


def penalized(model, x):
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return model(x) + sum((param**2).sum() for param in params)


class Reads(nnx.Module):
    """Does something with the state of a module."""

    def __init__(self, read, module):
        self.read, self.module = read, module

    def __call__(self, x):
        return self.read(self.module, x)


def linear():
    return nnx.Linear(MODEL, MODEL, rngs=nnx.Rngs(0))


def einsum():
    return nnx.Einsum("bd,df->bf", (MODEL, MODEL), rngs=nnx.Rngs(0))


def normalized():
    three = nnx.initializers.constant(3.0)
    return nnx.WeightNorm(linear(), scale_init=three, rngs=nnx.Rngs(0))


def spectral():
    return nnx.SpectralNorm(linear(), update_stats=False, rngs=nnx.Rngs(0))


READERS = {
    "squared": (lambda: Reads(squared, linear()), "(square)"),
    "squared-einsum": (lambda: Reads(squared, einsum()), "(square)"),
    "squared-own": (lambda: Reads(squared, Projection()), "(square)"),
    "penalized": (lambda: Reads(penalized, linear()), "(integer_pow)"),
    "normalized": (normalized, "(mul)"),
    "spectral": (spectral, "(dot_general)"),
}


class Projection(nnx.Module):
    """A weight of its own, and a state of its own that it reads."""

    def __init__(self):
        self.w = nnx.Param(x(MODEL, MODEL))

    def __call__(self, x):
        return x @ nnx.state(self)["w"][...]


@pytest.mark.parametrize("name", READERS)
def test_a_weight_that_others_read_in_a_state_stays_dense(name):
    make, operations = READERS[name]
    model, report = quantize(make(), x(3, MODEL))
    assert not report.replaced
    (reason,) = [entry.reason for entry in report.entries if len(entry.shape) > 1]
    assert reason == f"it is read in a state {operations}, where it would be packed"
    same(model(x(3, MODEL)), make()(x(3, MODEL)), 0)


@pytest.mark.parametrize("make", [normalized, spectral])
def test_without_inputs_weights_that_flax_changes_stay_dense(make):
    model, report = quantize(make())
    (refused,) = report.refused
    assert refused.path == "layer_instance/kernel"
    assert "Norm reads it in a state, where it would be packed" in refused.reason
    same(model(x(3, MODEL)), make()(x(3, MODEL)), 0)


def test_a_module_may_read_its_own_state():
    model, report = quantize(Projection(), x(3, MODEL))
    assert [entry.path for entry in report.replaced] == ["w"]
    same(model(x(3, MODEL)), foreign.dequantized(model, Projection())(x(3, MODEL)))


def last_of_a_stack(stack, x):
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[-1], state))(x)


def test_a_layer_may_be_taken_out_of_the_state_of_a_stack():
    @nnx.vmap
    def make(key):
        return nnx.Linear(MODEL, MODEL, rngs=nnx.Rngs(key))

    stack = Reads(last_of_a_stack, make(jax.random.split(jax.random.key(0), 3)))
    model, report = quantize(stack, x(3, MODEL))
    assert [entry.path for entry in report.replaced] == ["module/kernel"]
    same(model(x(3, MODEL)), foreign.dequantized(model, stack)(x(3, MODEL)))


class Absolute(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(x(MODEL, MODEL))

    def __call__(self, x):
        return x @ jnp.abs(self.w[...])


@pytest.mark.parametrize(
    ("model", "pattern", "inputs"),
    [
        (Absolute(), "w", x(3, MODEL)),
        (nnx.Conv(MODEL, 8, (3,), rngs=RNGS), "kernel", x(1, 5, MODEL)),
    ],
)
def test_a_weight_that_a_rule_names_is_no_matrix(model, pattern, inputs):
    message = "1 weights that rules match stay dense"
    rules = [(pattern, SPEC)]
    with pytest.raises(ValueError, match=message):
        qjax.quantize_model(model, rules, inputs, strict=True)
    with pytest.warns(UserWarning, match=message):
        qjax.quantize_model(model, rules, inputs)
    qjax.quantize_model(model, [(".*", SPEC)], inputs, strict=True)
