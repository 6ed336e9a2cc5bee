"""`qjax.quantize_model` of linen modules, none of which are ours."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors, traverse_util
from jax.sharding import PartitionSpec as P

import qjax
from qjax.layers.linen import to_params
from tests.layers import foreign
from tests.layers.foreign import FLOAT32, HEAD, HEADS, MODEL, SPEC, same, x

TOKENS = foreign.tokens(2, 3)


class Foreign(nn.Module):
    """Holds a weight of its own, and casts it before an einsum."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        w = self.param("w", init, (MODEL, HEADS, HEAD))
        return jnp.einsum("btd,dnh->btnh", x, jnp.astype(w, x.dtype))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        self.sow("intermediates", "norm", jnp.linalg.norm(x))
        return x + nn.Dense(MODEL)(nn.gelu(nn.Dense(32)(x))), None


class Experts(nn.Module):
    """A layer for each expert, by `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            nn.Dense,
            in_axes=None,
            out_axes=0,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return layers(MODEL)(x).mean(axis=0)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(foreign.VOCABULARY, MODEL)
        x = embed(tokens)
        x = x + nn.DenseGeneral(MODEL, axis=(-2, -1))(Foreign()(x))
        y = nn.Einsum((MODEL, HEADS, HEAD), "btd,dnh->btnh")(x)
        x = x + y.reshape(x.shape)
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(name="layers")(x, None)
        return embed.attend(x + Experts()(x))


WEIGHTS = {
    "Embed_0/embedding": (MODEL, foreign.VOCABULARY),
    "Foreign_0/w": (MODEL, MODEL),
    "DenseGeneral_0/kernel": (MODEL, MODEL),
    "Einsum_0/kernel": (MODEL, MODEL),
    "layers/Dense_0/kernel": (2, 32, MODEL),
    "layers/Dense_1/kernel": (2, MODEL, 32),
    # All experts have the same inputs, and so are one matrix.
    "Experts_0/VmapDense_0/kernel": (MODEL, 3 * MODEL),
} | {
    f"layers/MultiHeadDotProductAttention_0/{name}/kernel": (2, MODEL, MODEL)
    for name in ("query", "key", "value", "out")
}


@functools.cache
def dense() -> dict:
    return {"params": jax.jit(Model().init)(jax.random.key(0), TOKENS)["params"]}


@pytest.fixture(scope="module")
def quantized():
    return qjax.quantize_model(Model(), SPEC, TOKENS, variables=dense(), strict=True)


@pytest.fixture(scope="module")
def dequantized(quantized):
    return {"params": foreign.dequantized_params(*quantized)}


def flat(variables) -> dict:
    params = traverse_util.flatten_dict(to_params(variables), sep="/")
    return {k: w for k, w in params.items() if isinstance(w, qjax.QTensor)}


def test_every_weight_is_packed_with_its_flattened_contraction(quantized):
    assert {path: w.shape for path, w in flat(quantized[1]).items()} == WEIGHTS
    assert isinstance(quantized[0], Model)


def test_logits_are_those_of_the_dequantized_model(quantized, dequantized):
    module, variables = quantized
    expected = jax.jit(Model().apply)(dequantized, TOKENS)
    same(jax.jit(module.apply)(variables, TOKENS), expected)
    same(module.apply(variables, TOKENS), expected)


def test_what_is_sown_comes_out(quantized, dequantized):
    module, variables = quantized
    found, sown = module.apply(variables, TOKENS, mutable=["intermediates"])
    expected, wanted = Model().apply(dequantized, TOKENS, mutable=["intermediates"])
    same(found, expected)
    jax.tree.map(same, sown, wanted)


@pytest.mark.slow
def test_scales_have_the_gradients_of_the_dequantized_model(quantized):
    module, variables = quantized

    def loss(params, is_dense):
        held = {**variables, "params": params}
        if is_dense:
            params = foreign.dequantized_params(module, held)
            return (Model().apply({"params": params}, TOKENS) ** 2).mean()
        return (module.apply(held, TOKENS) ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    found = gradient(variables["params"], False)
    # Sums over the whole model, back and forth.
    close = functools.partial(same, tolerance=10 * FLOAT32)
    jax.tree.map(close, *_nonzero(found, gradient(variables["params"], True)))


def _nonzero(found, expected):
    """Without the biases of keys, which a softmax does not see: noise around zero."""
    for tree in (found, expected):
        del tree["layers"]["MultiHeadDotProductAttention_0"]["key"]["bias"]
    return found, expected


def test_abstract_variables_give_the_same_tree_without_an_array(quantized):
    shapes = jax.eval_shape(Model().init, jax.random.key(0), TOKENS)
    shapes = {"params": shapes["params"]}
    before = {id(array) for array in jax.live_arrays()}
    module, variables = qjax.quantize_model(Model(), SPEC, TOKENS, variables=shapes)
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.size > 1000]
    assert module == quantized[0]
    assert jax.tree.structure(variables) == jax.tree.structure(quantized[1])
    leaves = zip(jax.tree.leaves(variables), jax.tree.leaves(quantized[1]), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in leaves)
    filled = qjax.layers.linen.to_variables(to_params(quantized[1]))
    same(module.apply(filled, TOKENS), quantized[0].apply(quantized[1], TOKENS), 0)


def test_without_inputs_weights_of_two_axes_are_guessed():
    model = nn.Sequential([nn.Dense(32), nn.DenseGeneral((2, 8))])
    variables = model.init(jax.random.key(0), x(3, MODEL))
    reports = []
    module, packed = qjax.quantize_model(
        model, SPEC, variables=variables, report=reports.append
    )
    assert [entry.path for entry in reports[0].replaced] == ["layers_0/kernel"]
    assert [entry.path for entry in reports[0].refused] == ["layers_1/kernel"]
    params = foreign.dequantized_params(module, packed)
    same(
        module.apply(packed, x(3, MODEL)), model.apply({"params": params}, x(3, MODEL))
    )


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize("inputs", [(x(3, MODEL),), ()], ids=["inputs", "none"])
def test_boxes_of_partitioned_weights_are_kept(box, inputs):
    boxed = box(nn.initializers.lecun_normal(), (None, "model"))
    layer = functools.partial(
        nn.Dense, 64, kernel_init=boxed, bias_init=box(nn.initializers.ones, ("model",))
    )
    model = nn.Sequential([layer(), layer()])
    variables = model.init(jax.random.key(0), x(3, MODEL))
    reports = []
    module, packed = qjax.quantize_model(
        model,
        [("layers_0", SPEC), ("layers_1", None)],
        *inputs,
        variables=variables,
        report=reports.append,
    )
    specs = nn.get_partition_spec(packed)["params"]
    assert specs["layers_1"] == {"kernel": P(None, "model"), "bias": P("model")}
    # Of the packed one, each array has its own: tests/layers/test_partitions.py.
    scale = {"scale": P(None, "model")}
    assert specs["layers_0"] == {"kernel": scale, "bias": P("model")}
    (entry,) = reports[0].replaced
    assert entry.reason is None
    paths = {entry.path for entry in qjax.memory_report(packed).entries}
    assert "params/layers_1/kernel" in paths
    params = {"params": foreign.dequantized_params(module, packed)}
    found = jax.jit(module.apply)(packed, x(3, MODEL))
    same(found, model.apply(params, x(3, MODEL)))


class Trains(nn.Module):
    """Writes a collection, and draws from two streams of random numbers."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(MODEL)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def test_a_model_may_write_collections_and_draw():
    streams = ("params", "dropout", "noise")
    rngs = dict(zip(streams, jax.random.split(jax.random.key(0), 3), strict=True))
    variables = Trains().init(rngs, x(3, MODEL))
    module, packed = qjax.quantize_model(
        Trains(), SPEC, x(3, MODEL), variables=variables, strict=True
    )
    assert list(flat(packed)) == ["Dense_0/kernel"]
    options = {"rngs": rngs, "mutable": ["batch_stats"]}
    found, changed = module.apply(packed, x(3, MODEL), **options)
    dense = {**variables, "params": foreign.dequantized_params(module, packed)}
    expected, wanted = Trains().apply(dense, x(3, MODEL), **options)
    same(found, expected)
    jax.tree.map(same, changed, wanted)


def test_a_model_may_have_a_cache():
    model = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    variables = model.init(jax.random.key(0), x(2, 5, MODEL))
    module, packed = qjax.quantize_model(
        model, SPEC, x(2, 1, MODEL), variables=variables, strict=True
    )
    assert len(flat(packed)) == 4
    dense = {**variables, "params": foreign.dequantized_params(module, packed)}
    found, cache = module.apply(packed, x(2, 1, MODEL), mutable=["cache"])
    expected, wanted = model.apply(dense, x(2, 1, MODEL), mutable=["cache"])
    same(found, expected)
    same(cache["cache"]["cached_key"], wanted["cache"]["cached_key"])


def test_a_model_may_start_a_cache():
    """One that its variables do not have yet."""

    class Caches(nn.Module):
        @nn.compact
        def __call__(self, x):
            keys = nn.Dense(MODEL)(x)
            cache = self.variable("cache", "keys", jnp.zeros, keys.shape)
            cache.value += keys
            return cache.value

    variables = Caches().init(jax.random.key(0), x(2, MODEL))
    params = {"params": variables["params"]}
    module, packed = qjax.quantize_model(
        Caches(), SPEC, x(2, MODEL), variables=params, strict=True
    )
    assert list(flat(packed)) == ["Dense_0/kernel"]
    found, cache = module.apply(packed, x(2, MODEL), mutable=["cache"])
    same(cache["cache"]["keys"], found, 0)


def test_what_a_model_may_not_write_is_its_own_error():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.put_variable("params", "last", x)
            return nn.Dense(8)(x)

    variables = nn.Dense(8).init(jax.random.key(0), x(3, MODEL))
    variables = {"params": {"Dense_0": variables["params"]}}
    with pytest.raises(errors.ModifyScopeVariableError):
        qjax.quantize_model(Writes(), SPEC, x(3, MODEL), variables=variables)


def test_a_quantized_model_is_not_bound(quantized):
    module, variables = quantized
    with pytest.raises(NotImplementedError, match="is called by its apply; pass"):
        module.bind(variables)


@pytest.mark.parametrize(
    ("model", "pattern", "inputs"),
    [
        (nn.WeightNorm(nn.Dense(8)), "layer_instance/kernel", x(3, MODEL)),
        (nn.Conv(8, (3,)), "kernel", x(1, 5, MODEL)),
    ],
)
def test_a_weight_that_a_rule_names_is_no_matrix(model, pattern, inputs):
    variables = model.init(jax.random.key(0), inputs)
    quantize = functools.partial(qjax.quantize_model, model, variables=variables)
    message = "1 weights that rules match stay dense"
    with pytest.raises(ValueError, match=message):
        quantize([(pattern, SPEC)], inputs, strict=True)
    with pytest.warns(UserWarning, match=message):
        quantize([(pattern, SPEC)], inputs)
    quantize([(".*", SPEC)], inputs, strict=True)


def test_unrecognized_uses_warn_with_the_path():
    class Absolute(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (MODEL, 8))
            return x @ jnp.abs(w)

    model = nn.Sequential([Absolute()])
    variables = model.init(jax.random.key(0), x(3, MODEL))
    module, packed = qjax.quantize_model(model, SPEC, variables=variables)
    with pytest.warns(UserWarning, match="^layers_0/w is made dense for 'abs'"):
        found = module.apply(packed, x(3, MODEL))
    params = foreign.dequantized_params(module, packed)
    same(found, model.apply({"params": params}, x(3, MODEL)))


class Normalized(nn.Module):
    """Has a parameter whose name has slashes: "Dense_0/kernel/scale"."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(MODEL))(x)
        return nn.Dense(32, name="out")(x)


@pytest.mark.parametrize("inputs", [(x(3, MODEL),), ()], ids=["inputs", "none"])
def test_names_may_have_slashes(inputs):
    model, rules = Normalized(), [("out/.*", SPEC)]
    variables = model.init(jax.random.key(0), x(3, MODEL))
    module, packed = qjax.quantize_model(model, rules, *inputs, variables=variables)
    assert list(flat(packed)) == ["out/kernel"]
    params = foreign.dequantized_params(module, packed)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, variables["params"]
    )
    found = module.apply(packed, x(3, MODEL))
    same(found, model.apply({"params": params}, x(3, MODEL)))
    grams = qjax.quantizers.grams(module, [x(3, MODEL)], variables=packed)
    assert {path: gram.shape for path, gram in grams.items()} == {
        "out/kernel": (MODEL, MODEL)
    }


def test_other_methods_and_collections_are_kept():
    model = nn.Embed(foreign.VOCABULARY, MODEL)
    variables = model.init(jax.random.key(0), TOKENS) | {"stats": {"mean": x(3)}}
    module, packed = qjax.quantize_model(
        model, SPEC, x(3, MODEL), variables=variables, method="attend"
    )
    assert packed["stats"] is not None
    params = {"params": foreign.dequantized_params(module, packed)}
    for method, inputs in (("attend", x(3, MODEL)), ("__call__", TOKENS)):
        found = module.apply(packed, inputs, method=method)
        same(found, model.apply(params, inputs, method=method))


def test_what_the_model_is_not_called_with_is_refused():
    with pytest.raises(TypeError, match=r"those of Model.__call__: .*'groupsize'"):
        qjax.quantize_model(Model(), SPEC, TOKENS, variables=dense(), groupsize=32)
    with pytest.raises(ValueError, match="Model has no method 'run'"):
        qjax.quantize_model(Model(), SPEC, TOKENS, variables=dense(), method="run")


def test_variables_must_come_with_the_module():
    with pytest.raises(ValueError, match="must hold the 'params' of the linen module"):
        qjax.quantize_model(nn.Dense(8), SPEC)
    variables = {"params": {"kernel": x(36, 8), "bias": x(8)}}
    with pytest.raises(ValueError, match="1 weights that rules match stay dense"):
        qjax.quantize_model(nn.Dense(8), SPEC, variables=variables, strict=True)


def test_memory_report_joins_scales_and_words(quantized):
    report = qjax.memory_report(quantized[1])
    entries = {entry.path: entry for entry in report.entries}
    assert entries["params/Foreign_0/w"].bits == 4
    assert report.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized[1]))


@pytest.mark.parametrize("inputs", [(), (x(3, MODEL),)])
def test_a_kernel_and_a_bias_need_not_be_those_of_a_dense_layer(inputs):
    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            kernel = self.param("kernel", init, (32, MODEL))
            bias = self.param("bias", nn.initializers.normal(), (32,))
            return x @ kernel.T + bias[None]

    variables = Transposed().init(jax.random.key(0), x(3, MODEL))
    module, packed = qjax.quantize_model(
        Transposed(), SPEC, *inputs, variables=variables, strict=True
    )
    dense = {"params": foreign.dequantized_params(module, packed)}
    same(module.apply(packed, x(3, MODEL)), Transposed().apply(dense, x(3, MODEL)))
