"""`qjax.layers.linen`: variables, transformations, training and saving."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import qjax
from qjax.layers.linen import Dense, to_params, to_variables
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

KEY = jax.random.key(0)
KERNEL_INIT = nn.initializers.lecun_normal()


def variables(name: str = "4bit", dtype: str = "float32") -> dict:
    return to_variables(
        {"kernel": cases.kernel(name, dtype), "bias": cases.bias(dtype)}
    )


class MLP(nn.Module):
    """A model that says nothing of the formats of its weights."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(Dense(N, name="up")(x))
        return nn.RMSNorm(name="norm")(x + Dense(K, use_bias=False, name="down")(h))


def mlp_params(dtype: str = "float32") -> dict:
    return {
        "up": {"kernel": cases.kernel("mixed", dtype), "bias": cases.bias(dtype)},
        "down": {"kernel": qjax.quantize(cases.dense(N, K), 8, None)},
        "norm": {"scale": jnp.ones(K)},
    }


apply = jax.jit(Dense(N).apply)


def test_matches_flax_with_the_dequantized_kernel():
    # test_nnx.py has the other formats and dtypes, test_twins.py that the two agree.
    x, b, kernel = cases.inputs(), cases.bias(), cases.kernel("3bit")
    dense = {"kernel": qjax.dequantize(kernel), "bias": b}
    theirs = jax.jit(nn.Dense(N).apply)({"params": dense}, x)
    assert cases.error(apply(variables("3bit"), x), theirs) <= 1e-5


def test_init_makes_an_empty_kernel():
    made = Dense(N, bits=3, group_size=GROUP).init(KEY, cases.inputs())
    expected = jax.tree.map(jnp.zeros_like, qjax.prepare(cases.kernel("3bit")))
    chex.assert_trees_all_equal(to_params(made)["kernel"], expected)
    chex.assert_trees_all_equal(apply(made, cases.inputs()), jnp.zeros((5, N)))


def test_init_rounds_the_sample_of_flax():
    options = {"kernel_init": KERNEL_INIT, "param_dtype": jnp.float16}
    ours = jax.jit(Dense(N, 2, None, symmetric=True, **options).init)
    theirs = jax.jit(nn.Dense(N, **options).init)(KEY, cases.inputs("float16"))
    expected = qjax.quantize(theirs["params"]["kernel"], 2, None, symmetric=True)
    made = ours(KEY, cases.inputs("float16"))
    chex.assert_trees_all_equal(to_params(made)["kernel"], qjax.prepare(expected))


def test_init_is_abstract_under_eval_shape():
    dense = Dense(N, group_size=GROUP, param_dtype=jnp.bfloat16)
    abstract = jax.eval_shape(dense.init, KEY, jax.ShapeDtypeStruct((1, K), "bfloat16"))
    assert isinstance(abstract["quantized"]["kernel"].words[0], jax.ShapeDtypeStruct)
    assert abstract["params"]["kernel"]["scale"].dtype == jnp.bfloat16


def test_collections():
    made = variables("float-zero")
    assert set(made["params"]["kernel"]) == {"scale", "zero"}
    (words,) = qjax.prepare(cases.kernel("float-zero")).words
    chex.assert_trees_all_equal(jax.tree.leaves(made["quantized"]), [words])
    assert set(variables("4bit")["params"]["kernel"]) == {"scale"}
    assert set(variables("codebook")["params"]["kernel"]) == {
        "scale",
        "codebook",
        "input_scale",
    }


def test_a_model_takes_any_mix_of_formats_and_gives_it_back():
    params = qjax.prepare(mlp_params())
    made = to_variables(params)
    assert set(made["quantized"]) == {"up", "down"}
    x = cases.inputs()
    h = nn.gelu(qjax.matmul(x, params["up"]["kernel"]) + params["up"]["bias"][None])
    y = x + qjax.matmul(h, params["down"]["kernel"])
    expected = y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    found = jax.jit(MLP().apply)(made, x)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    chex.assert_trees_all_equal(to_params(made), params)


def test_to_variables_prepares_once():
    kernel = variables("act-order")["quantized"]["kernel"]
    assert kernel.row_group is None
    assert kernel.order is not None
    planar = variables("planar")["quantized"]["kernel"]
    assert planar.layout == qjax.prepare(cases.kernel("planar")).layout


def test_gradients():
    x, made = cases.inputs(), variables("float-zero")
    kernel = cases.kernel("float-zero")

    def found(params, x):
        return jnp.sin(Dense(N).apply({**made, "params": params}, x)).sum()

    def wanted(kernel, bias, x):
        y = jnp.matmul(x, qjax.dequantize(kernel, jnp.float32), precision="highest")
        return jnp.sin(y + bias[None]).sum()

    params, dx = jax.jit(jax.grad(found, argnums=(0, 1)))(made["params"], x)
    gradient = jax.grad(wanted, argnums=(0, 1, 2), allow_int=True)
    dkernel, dbias, dx_wanted = jax.jit(gradient)(kernel, cases.bias(), x)
    assert cases.error(params["kernel"]["scale"], dkernel.scale) < 1e-4
    assert cases.error(params["kernel"]["zero"], dkernel.zero) < 1e-5
    assert cases.error(params["bias"], dbias) < 1e-5
    assert cases.error(dx, dx_wanted) < 1e-5


@pytest.mark.usefixtures("optax_promotion")
def test_training_holds_nothing_for_words_and_leaves_them_alone():
    made, x = to_variables(mlp_params()), cases.inputs()
    state = TrainState.create(
        apply_fn=MLP().apply, params=made["params"], tx=optax.adam(1e-2)
    )
    chex.assert_trees_all_equal_shapes(state.opt_state[0].mu, made["params"])

    @jax.jit
    def step(state, quantized):
        def loss(params):
            y = state.apply_fn({"params": params, "quantized": quantized}, x)
            return ((y - 1) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for _ in range(3):
        state, value = step(state, made["quantized"])
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]
    changed = jax.tree.map(lambda a, b: (a != b).any(), state.params, made["params"])
    chex.assert_trees_all_equal(changed, jax.tree.map(lambda _: True, changed))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Dense(K, name="dense")(x), None


def test_scan_and_vmap_over_stacked_layers():
    pair = jnp.stack([cases.dense(K, K), -cases.dense(K, K)])
    kernels = qjax.quantize(pair, 4, GROUP)
    biases = jnp.stack([jnp.zeros(K), jnp.ones(K)])
    stacked = to_variables({"dense": {"kernel": kernels, "bias": biases}})
    under = {collection: v["dense"] for collection, v in stacked.items()}
    single = [jax.tree.map(lambda leaf, i=i: leaf[i], under) for i in range(2)]
    x, run = cases.inputs(), jax.jit(Dense(K).apply)
    axes = {
        "variable_axes": {"params": 0, "quantized": 0},
        "split_rngs": {"params": True},
    }
    scanned = nn.scan(Step, length=2, **axes)()
    expected = run(single[1], run(single[0], x))
    found = jax.jit(scanned.apply)(stacked, x, None)[0]
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    mapped = nn.vmap(Dense, in_axes=None, axis_size=2, **axes)(K)
    expected = jnp.stack([run(v, x) for v in single])
    chex.assert_trees_all_close(jax.jit(mapped.apply)(under, x), expected, atol=1e-5)
    grown = nn.vmap(Dense, in_axes=None, axis_size=2, **axes)(K, group_size=GROUP)
    abstract = jax.eval_shape(grown.init, KEY, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, under)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_transformations(lift):
    x, made = cases.inputs(), variables("mixed")
    found = jax.jit(lift(Dense)(N).apply)(made, x)
    chex.assert_trees_all_equal(found, apply(made, x))


def test_bytes_round_trip():
    made = to_variables(mlp_params("float16"))
    blank = jax.tree.map(jnp.zeros_like, made)
    restored = serialization.from_bytes(blank, serialization.to_bytes(made))
    chex.assert_trees_all_equal(restored, made)


def test_tabulate_counts_both_collections():
    table = Dense(N, group_size=GROUP).tabulate(KEY, cases.inputs())
    assert "quantized" in table
    assert "params" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "in_features=96 must be a multiple of group_size=128"),
        ({"bits": 5, "group_size": 7}, "multiple of group_size=7"),
        ({"bits": 0}, "bits=0"),
        ({"param_dtype": jnp.int32, "group_size": GROUP}, "param_dtype=int32"),
        (
            {"kernel_init": lambda key, shape, dtype: None, "group_size": GROUP},
            "kernel_init gave NoneType",
        ),
        (
            {
                "kernel_init": nn.with_partitioning(KERNEL_INIT, (None, "model")),
                "group_size": GROUP,
            },
            r"kernel_init gave Partitioned .* array in a box",
        ),
    ],
)
def test_invalid_attributes(options, message):
    with pytest.raises(ValueError, match=message):
        Dense(N, **options).init(KEY, cases.inputs())


def test_invalid_variables():
    made, x = variables(), cases.inputs()
    with pytest.raises(ValueError, match="quantized/kernel is missing"):
        Dense(N).apply({"params": made["params"]}, x)
    with pytest.raises(ValueError, match="params/kernel is missing"):
        Dense(N).apply({"quantized": made["quantized"]}, x)
    with pytest.raises(TypeError, match=r"params/kernel is .*qjax.quantize makes one"):
        Dense(N).apply(to_variables({"kernel": cases.dense()}), x)
    with pytest.raises(TypeError, match=r"quantized/kernel is .*qjax.quantize makes"):
        Dense(N).apply(made | {"quantized": {"kernel": cases.dense()}}, x)
    with pytest.raises(ValueError, match="mutable has no 'quantized'"):
        Dense(N, group_size=GROUP).init(KEY, x, mutable=["params"])
    nested = to_variables({"down": mlp_params()["down"]})
    with pytest.raises(ValueError, match="params/up/kernel is missing"):
        MLP().apply(nested, x)
    with pytest.raises(ValueError, match=r"kernel.shape=\(96, 40\) must be \(96, 41\)"):
        Dense(41).apply(made, x)
    with pytest.raises(ValueError, match=r"must be \(64, 40\)"):
        Dense(N).apply(made, x[:, :64])
    with pytest.raises(ValueError, match=r"bias.shape=\(96,\) must be \(40,\)"):
        to_variables({"up": {"kernel": cases.kernel("4bit"), "bias": jnp.zeros(K)}})


def test_the_bridge_to_nnx_loses_one_of_two_collections():
    layer = nnx.bridge.ToNNX(Dense(N, group_size=GROUP), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ToNNX loses them: use layers"):
        layer.lazy_init(cases.inputs())(cases.inputs())
