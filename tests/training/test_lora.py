"""LoRA beside quantized layers: the twins, what is trained, and what merging keeps."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.layers.linen import Dense, to_variables
from qjax.layers.nnx import Linear
from qjax.training.linen import LoRA as LoRADense
from qjax.training.nnx import LoRA as LoRALinear
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

RANK = 4


def adapters(dtype: str = "float32", k: int = K, n: int = N) -> dict[str, jnp.ndarray]:
    rng = cases.rng(5)
    a = jnp.asarray(rng.normal(size=(k, RANK)), dtype)
    return {"a": a, "b": jnp.asarray(rng.normal(size=(RANK, n)) / 20, dtype)}


def linear(name: str = "4bit", dtype: str = "float32", **options) -> LoRALinear:
    base = Linear.from_qtensor(cases.kernel(name, dtype), cases.bias(dtype), **options)
    layer = LoRALinear(base, RANK, alpha=2 * RANK, rngs=nnx.Rngs(0))
    for leaf, value in adapters().items():
        getattr(layer, leaf)[...] = value
    return layer


def dense(name: str = "4bit", dtype: str = "float32") -> tuple[LoRADense, dict]:
    params = {"kernel": cases.kernel(name, dtype), "bias": cases.bias(dtype)}
    variables = {**to_variables(params), "lora": adapters()}
    return LoRADense(Dense(N), RANK, 2 * RANK), variables


@nnx.jit
def run(layer, x):
    return layer(x)


@pytest.mark.parametrize("name", ["3bit", "mixed", "codebook", "float-zero"])
def test_twins_agree_and_are_base_and_adapters(name):
    x = cases.inputs()
    layer, variables = dense(name)
    found = jax.jit(layer.apply)(variables, x)
    chex.assert_trees_all_equal(found, run(linear(name), x))
    wanted = cases.product(x, cases.kernel(name), cases.bias())
    a, b = (np.asarray(leaf, np.float64) for leaf in adapters().values())
    assert cases.error(found, wanted + 2 * (x @ a @ b)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype):
    x = cases.inputs(dtype)
    layer, variables = dense("4bit", dtype)
    found = jax.jit(layer.apply)(variables, x)
    chex.assert_trees_all_equal(found, run(linear("4bit", dtype), x))
    assert found.dtype == dtype


def test_start_is_the_base():
    base = Linear.from_qtensor(cases.kernel("3bit"), cases.bias())
    layer = LoRALinear(base, RANK, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    x = cases.inputs()
    chex.assert_trees_all_equal(run(layer, x), run(base, x))
    assert layer.a.dtype == jnp.bfloat16
    # Flax's own start: uniform with a variance of 2 / k.
    assert float(jnp.abs(layer.a[...]).max()) <= np.sqrt(6 / K)
    assert float(layer.a[...].astype(jnp.float32).std()) == pytest.approx(
        np.sqrt(2 / K), rel=0.1
    )
    made = jax.jit(LoRADense(Dense(N, group_size=GROUP), RANK).init)(
        jax.random.key(0), x
    )
    assert jax.tree.map(jnp.shape, made["lora"]) == {"a": (K, RANK), "b": (RANK, N)}
    assert not made["lora"]["b"].any()
    assert set(made) == {"lora", "params", "quantized"}


def test_initializers():
    ones = nnx.initializers.ones
    made = LoRADense(Dense(N, group_size=GROUP), RANK, a_init=ones, b_init=ones).init(
        jax.random.key(0), cases.inputs()
    )
    layer = LoRALinear(
        Linear(K, N, group_size=GROUP), RANK, a_init=ones, b_init=ones, rngs=nnx.Rngs(0)
    )
    for found in (made["lora"], {"a": layer.a[...], "b": layer.b[...]}):
        chex.assert_trees_all_equal(found["a"], jnp.ones((K, RANK)))
        chex.assert_trees_all_equal(found["b"], jnp.ones((RANK, N)))


def test_gradients_are_those_of_the_dense_layer():
    x = cases.inputs()
    layer, variables = dense("float-zero")

    def loss(adapters, x):
        return jnp.sin(layer.apply({**variables, "lora": adapters}, x)).sum()

    def wanted(adapters, x):
        kernel = qjax.dequantize(cases.kernel("float-zero"), jnp.float32)
        kernel = kernel + 2 * jnp.matmul(**adapters, precision="highest")
        y = jnp.matmul(x, kernel, precision="highest") + cases.bias()[None]
        return jnp.sin(y).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["lora"], x)
    wanted = jax.grad(wanted, argnums=(0, 1))(adapters(), x)
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert cases.error(one, other) < 1e-4


class Block(nnx.Module):
    """Two layers in a list, one of them met twice."""

    def __init__(self):
        up = Linear.from_qtensor(cases.kernel("mixed"), cases.bias())
        down = Linear.from_kernel(cases.dense(N, K), bits=8, group_size=None)
        self.layers = nnx.List([up, down])
        self.again = up

    def __call__(self, x):
        x = x + self.layers[1](nnx.gelu(self.layers[0](x)))
        return x + self.layers[1](nnx.gelu(self.again(x)))


@pytest.mark.usefixtures("optax_promotion")
def test_only_adapters_are_trained():
    base, x = Block(), cases.inputs()
    before = nnx.clone(base)
    model = training.nnx.add_lora(base, RANK, rngs=nnx.Rngs(1))
    chex.assert_trees_all_equal(run(model, x), run(base, x))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    adapted = sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    )
    # The layer that is met twice has its adapters once.
    assert adapted == 2 * RANK * (K + N)
    moments = nnx.as_pure(nnx.state(optimizer))["opt_state"][0]
    held = [leaf.size for leaf in jax.tree.leaves((moments["mu"], moments["nu"]))]
    assert sum(held) == 2 * adapted

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: ((model(x) - 1) ** 2).mean()  # noqa: E731
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < losses[0]
    # The base, which still is a model of its own, has not moved.
    chex.assert_trees_all_equal(nnx.state(base), nnx.state(before))


def test_where_picks_layers(refuses):
    model, rngs = Block(), nnx.Rngs(0)
    assert list(training.nnx.kernels(model)) == ["again", "layers/1"]
    found = training.nnx.add_lora(model, 2, where=lambda p: p == "again", rngs=rngs)
    assert isinstance(found.again, LoRALinear)
    assert found.layers[0] is found.again
    assert isinstance(found.layers[1], Linear)
    with refuses("where picks none of the packed weights: ['again', 'layers/1']"):
        training.nnx.add_lora(model, 2, where=lambda p: "attn" in p, rngs=rngs)


class TestMerging:
    def test_dense(self):
        x, layer = cases.inputs(), linear("codebook")
        wanted = np.asarray(run(layer, x), np.float64)
        merged = layer.merge()
        found = np.asarray(x, np.float64) @ np.asarray(merged, np.float64)
        assert merged.dtype == jnp.float32
        assert cases.error(found + np.asarray(cases.bias()), wanted) < 1e-5

    @pytest.mark.parametrize("name", ["4bit", "mixed", "codebook"])
    def test_quantized(self, name):
        layer = linear(name)
        target, w = layer.merge(), layer.base.kernel
        merged = layer.merge_quantized()
        assert merged.kernel.segments == w.segments
        assert merged.kernel.layout == w.layout
        chex.assert_trees_all_equal(merged.bias[...], cases.bias())

        def distance(dense):
            return float(((dense - target) ** 2).mean())

        # Better than rounding to nearest with as many bits and groups, or than leaving
        # the adapters out; the mixed one has fewer bits than its first segment.
        bits = min(segment.bits for segment in w.segments)
        by_range = qjax.dequantize(qjax.quantize(target, bits, GROUP))
        found = distance(qjax.dequantize(merged.kernel, jnp.float32))
        if name != "codebook":  # whose numbers are random, and suit no weight
            assert found < 1.25 * distance(by_range)
        assert found < 0.25 * distance(qjax.dequantize(w, jnp.float32))

    def test_adapters_of_zero_leave_the_weight(self):
        base = Linear.from_qtensor(cases.kernel("mixed"))
        merged = LoRALinear(base, RANK, rngs=nnx.Rngs(0)).merge_quantized()
        chex.assert_trees_all_equal(merged.kernel, base.kernel)

    def test_models(self):
        model = training.nnx.add_lora(Block(), RANK, rngs=nnx.Rngs(1))
        merged = training.nnx.merge_lora(model)
        assert type(merged.again) is Linear
        assert merged.layers[0] is merged.again
        # In the model that was merged the adapters stay.
        assert type(model.again) is LoRALinear
        x = cases.inputs()
        chex.assert_trees_all_close(run(merged, x), run(model, x), atol=1e-4)

    def test_stacked(self):
        pair = jnp.stack([cases.dense(), -cases.dense()])
        w = qjax.quantize(pair, 4, GROUP)
        layer = LoRALinear(Linear.from_qtensor(w), RANK, rngs=nnx.Rngs(0))
        assert (layer.a.shape, layer.b.shape) == ((2, K, RANK), (2, RANK, N))
        # Each layer's variance is that of a single one.
        assert float(layer.a[...].std()) == pytest.approx(np.sqrt(2 / K), rel=0.1)
        layer.b[...] = jnp.ones((2, RANK, N)) * 0.01
        chex.assert_shape(layer.merge(), (2, K, N))
        merged = training.lora.merge_quantized(w, layer.a[...], layer.b[...])
        first = jax.tree.map(lambda leaf: leaf[0], w)
        alone = training.lora.merge_quantized(first, layer.a[0], layer.b[0])
        chex.assert_trees_all_equal(
            qjax.codes(merged)[0].astype(int), qjax.codes(alone).astype(int)
        )


def test_scan_over_stacked_layers():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return LoRADense(Dense(K, name="dense"), RANK)(x), None

    pair = jnp.stack([cases.dense(K, K), -cases.dense(K, K)])
    params = {
        "dense": {"kernel": qjax.quantize(pair, 4, GROUP), "bias": jnp.ones((2, K))}
    }
    one = adapters(n=K)
    both = {"dense": jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf / 2]), one)}
    variables = {**to_variables(params), "lora": both}
    axes = dict.fromkeys(("params", "quantized", "lora"), 0)
    scanned = nn.scan(Step, length=2, variable_axes=axes, split_rngs={"params": True})()
    x, single = cases.inputs(), LoRADense(Dense(K), RANK)
    found = jax.jit(scanned.apply)(variables, x, None)[0]
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        layer = {collection: tree["dense"] for collection, tree in layer.items()}
        x = jax.jit(single.apply)(layer, x)
    chex.assert_trees_all_close(found, x, atol=1e-5)


@pytest.mark.on_cpu
def test_the_frozen_weight_is_never_dense_in_a_step():
    """Words, activations and adapters: no array of the weight's size in float."""
    base = Linear(2048, 2048, bits=4, group_size=128)
    layer = LoRALinear(base, 8, rngs=nnx.Rngs(0))
    graph, adapters, rest = nnx.split(layer, nnx.LoRAParam, ...)

    @jax.jit
    def step(adapters, rest, x):
        def loss(adapters):
            return (nnx.merge(graph, adapters, rest)(x) ** 2).mean()

        return jax.grad(loss)(adapters)

    x = jnp.ones((16, 2048))
    memory = step.lower(adapters, rest, x).compile().memory_analysis()
    # 16 MiB dense; the tiles of the products are at most 4 MiB.
    assert memory.temp_size_in_bytes < 6 * 2**20
    assert memory.output_size_in_bytes < 2 * 8 * 2048 * 4 + 1024


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LoRALinear(Linear(64, 8, group_size=32), 0, rngs=nnx.Rngs(0)),
            "rank=0 must be at least 1",
        ),
        (
            lambda: LoRADense(Dense(N, group_size=GROUP), 0).init(
                jax.random.key(0), cases.inputs()
            ),
            "rank=0 must be at least 1",
        ),
        (
            lambda: dense()[0].apply(
                {k: v for k, v in dense()[1].items() if k != "lora"}, cases.inputs()
            ),
            'lora/a is missing; apply needs the collection "lora", or draws it with',
        ),
        (
            lambda: training.lora.merge(
                cases.kernel("4bit"), jnp.ones((N, RANK)), jnp.ones((RANK, N))
            ),
            "a.shape=(40, 4) and b.shape=(4, 40) must be (96, 4) and (4, 40), as w",
        ),
    ],
)
def test_refuses(make, message, refuses):
    with refuses(message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LoRALinear(
                nnx.Linear(64, 8, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(0)
            ),
            "base is flax.nnx.nn.linear.Linear, and must be a quantized layer",
        ),
        (
            lambda: training.lora.merge(
                jnp.ones((64, 8)), jnp.ones((64, 2)), jnp.ones((2, 8))
            ),
            "w is ArrayImpl of shape (64, 8), and must be a QTensor",
        ),
    ],
)
def test_refuses_what_is_dense(make, message, refuses):
    with refuses(message, TypeError):
        make()
