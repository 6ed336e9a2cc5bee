"""`linen.DenseGeneral` and `nnx.LinearGeneral`: twins, against Flax and float64."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx, serialization

import qjax
from qjax.layers.linen import DenseGeneral, to_params, to_variables
from qjax.layers.nnx import LinearGeneral, Quantized, Scale
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

KEY = jax.random.key(0)
IN, OUT = (8, 12), (5, 8)  # K and N, as heads and their features
HEADS = {"axis": (-2, -1)}


def inputs(dtype: str = "float32") -> jnp.ndarray:
    return cases.inputs(dtype, rows=6).reshape(2, 3, *IN)


def bias(dtype: str = "float32") -> jnp.ndarray:
    return cases.bias(dtype).reshape(OUT)


def layer(name: str = "4bit", dtype: str = "float32", **options) -> LinearGeneral:
    kernel = cases.kernel(name, dtype)
    return LinearGeneral.from_qtensor(kernel, IN, OUT, bias(dtype), **HEADS, **options)


@nnx.jit
def run(module, x):
    return module(x)


# test_twins.py has the rest: the product is the same.
@pytest.mark.parametrize(
    "name",
    ["3bit", "8bit-symmetric", "act-order", "ragged-act-order", "mixed", "codebook"],
)
def test_twins_agree_and_match_float64(name):
    kernel, x = cases.kernel(name), inputs()
    variables = to_variables({"kernel": kernel, "bias": bias()})
    found = jax.jit(DenseGeneral(OUT, **HEADS).apply)(variables, x)
    chex.assert_trees_all_equal(found, run(layer(name), x))
    wanted = cases.product(x.reshape(6, K), kernel, cases.bias())
    assert found.shape == (2, 3, *OUT)
    # Summation order only.
    assert cases.error(found.reshape(6, N), wanted) <= 1e-5


def test_sixteen_bits_are_as_good_as_flax():
    dtype = "bfloat16"
    x, kernel = inputs(dtype), cases.kernel("mixed", dtype)
    ours = layer("mixed", dtype)
    made = to_variables({"kernel": kernel, "bias": bias(dtype)})
    linen = DenseGeneral(OUT, **HEADS, dtype=dtype)
    found = run(ours, x)
    chex.assert_trees_all_equal(jax.jit(linen.apply)(made, x), found)
    theirs = nnx.LinearGeneral(IN, OUT, **HEADS, param_dtype=dtype, rngs=nnx.Rngs(0))
    dense = qjax.dequantize(kernel, jnp.dtype(dtype))
    theirs.kernel[...] = dense.reshape(*IN, *OUT)
    theirs.bias[...] = bias(dtype)
    wanted = cases.product(x.reshape(6, K), kernel, cases.bias(dtype))
    wanted = wanted.reshape(found.shape)
    # Ours rounds no weight, Flax's rounds each.
    assert cases.error(found, wanted) <= 1.5 * cases.error(run(theirs, x), wanted)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 96), -1), ((8, 2, 12), (0, -1)), ((8, 2, 12), (-1, 0)), ((96,), 0)],
    ids=str,
)
def test_axes_are_those_of_flax(shape, axis):
    x, b = jnp.asarray(cases.rng(1).normal(size=shape), jnp.float32), bias()
    kernel = cases.kernel("4bit")
    sizes = tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis)))
    dense = qjax.dequantize(kernel).reshape(*sizes, *OUT)
    theirs = nn.DenseGeneral(OUT, axis=axis).apply(
        {"params": {"kernel": dense, "bias": b}}, x
    )
    made = to_variables({"kernel": kernel, "bias": b})
    found = DenseGeneral(OUT, axis=axis).apply(made, x)
    assert found.shape == theirs.shape
    assert cases.error(found, np.asarray(theirs, np.float64)) <= 1e-5
    ours = LinearGeneral.from_qtensor(kernel, sizes, OUT, b, axis=axis)
    chex.assert_trees_all_equal(ours(x), found)


@pytest.mark.parametrize("param_dtype", cases.FLOATS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_output_dtype_is_that_of_flax(dtype, param_dtype):
    options = {**HEADS, "dtype": dtype, "param_dtype": param_dtype}
    pairs = [
        (
            LinearGeneral(IN, OUT, group_size=GROUP, **options),
            nnx.LinearGeneral(IN, OUT, rngs=nnx.Rngs(0), **options),
        ),
        (
            lambda x: DenseGeneral(OUT, group_size=GROUP, **options).init_with_output(
                KEY, x
            )[0],
            lambda x: nn.DenseGeneral(OUT, **options).init_with_output(KEY, x)[0],
        ),
    ]
    for ours, theirs in pairs:
        for x in (*cases.FLOATS, "int32"):
            struct = jax.ShapeDtypeStruct((2, *IN), x)
            with jax.numpy_dtype_promotion("standard"):
                found = jax.eval_shape(ours, struct)
                wanted = jax.eval_shape(theirs, struct)
            assert found == wanted, x


def test_new_layers_round_the_samples_of_flax():
    options = {
        **HEADS,
        "kernel_init": nnx.initializers.lecun_normal(),
        "bias_init": nnx.initializers.normal(),
    }
    theirs = nnx.LinearGeneral(IN, OUT, rngs=nnx.Rngs(3), **options)
    ours = LinearGeneral(IN, OUT, group_size=GROUP, rngs=nnx.Rngs(3), **options)
    expected = qjax.quantize(theirs.kernel[...].reshape(K, N), 4, GROUP)
    chex.assert_trees_all_equal(ours.kernel, qjax.prepare(expected))
    chex.assert_trees_all_equal(ours.bias[...], theirs.bias[...])
    dense = nn.DenseGeneral(OUT, **options).init(KEY, inputs())["params"]
    made = to_params(DenseGeneral(OUT, group_size=GROUP, **options).init(KEY, inputs()))
    expected = qjax.prepare(qjax.quantize(dense["kernel"].reshape(K, N), 4, GROUP))
    chex.assert_trees_all_equal(made, {"kernel": expected, "bias": dense["bias"]})


def test_groups_run_over_the_flattened_contraction():
    dense = cases.dense().reshape(*IN, N)
    made = LinearGeneral.from_kernel(dense, **HEADS, group_size=GROUP)
    expected = qjax.quantize(dense.reshape(K, N), 4, GROUP)  # 32 rows: 2 2/3 heads
    chex.assert_trees_all_equal(made.kernel, qjax.prepare(expected))
    assert made.kernel.scale.shape == (3, N)
    assert (made.in_features, made.out_features, made.bias) == (IN, (N,), None)


def test_an_empty_layer_forms_no_dense_kernel():
    def make():
        return nnx.state(LinearGeneral(IN, OUT, **HEADS, group_size=GROUP))

    program = jax.make_jaxpr(make)()
    (words,) = qjax.prepare(cases.kernel("4bit")).words
    assert (words.shape, words.dtype) in [(v.shape, v.dtype) for v in program.out_avals]
    assert f"[{K},{N}]" not in str(program)


@pytest.mark.parametrize("name", ["mixed", "codebook"])
def test_gradients(name):
    x, kernel = inputs(), cases.kernel(name)
    made = to_variables({"kernel": kernel, "bias": bias()})

    def wanted(kernel, b, x):
        weight = qjax.dequantize(kernel, jnp.float32)
        y = jnp.matmul(x.reshape(6, K), weight, precision="highest")
        return jnp.sin(y + b.reshape(1, N)).sum()

    def linen(params, x):
        return jnp.sin(DenseGeneral(OUT, **HEADS).apply({**made, "params": params}, x))

    @nnx.jit
    def of_nnx(layer):
        loss = lambda layer: jnp.sin(layer(x)).sum()  # noqa: E731
        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(layer)

    gradient = jax.jit(jax.grad(lambda p, x: linen(p, x).sum(), argnums=(0, 1)))
    params, dx = gradient(made["params"], x)
    oracle = jax.jit(jax.grad(wanted, argnums=(0, 1, 2), allow_int=True))
    dkernel, dbias, dx_wanted = oracle(kernel, bias(), x)
    assert cases.error(dx, dx_wanted) < 1e-5
    assert cases.error(params["bias"], dbias) < 1e-5
    for leaf, value in params["kernel"].items():
        assert cases.error(value, getattr(dkernel, leaf)) < 1e-4, leaf
    state = nnx.as_pure(of_nnx(layer(name)))
    found = {"kernel": dict(state["packed"]), "bias": state["bias"]}
    chex.assert_trees_all_close(found, dict(params), rtol=1e-5, atol=1e-5)


def test_variables_and_state():
    made = to_variables({"kernel": cases.kernel("float-zero"), "bias": bias()})
    assert set(made["params"]["kernel"]) == {"scale", "zero"}
    (words,) = qjax.prepare(cases.kernel("float-zero")).words
    chex.assert_trees_all_equal(jax.tree.leaves(made["quantized"]), [words])
    blank = jax.tree.map(jnp.zeros_like, made)
    restored = serialization.from_bytes(blank, serialization.to_bytes(made))
    chex.assert_trees_all_equal(restored, made)
    _, params, words = nnx.split(layer("mixed"), nnx.Param, Quantized)
    assert set(params) == {"bias", "packed"}
    assert type(params["packed"]["scale"]) is Scale
    assert set(words["packed"]) == {"words", "order"}


def test_load_fills_an_abstract_layer():
    make = lambda: LinearGeneral(IN, OUT, **HEADS, group_size=GROUP)  # noqa: E731
    model = nnx.eval_shape(make)
    model.load(cases.kernel("codebook"), bias())
    chex.assert_trees_all_equal(run(model, inputs()), run(layer("codebook"), inputs()))


def test_vmap_over_stacked_layers():
    kernels = jnp.stack([cases.dense(), -cases.dense()])
    stack = qjax.quantize(kernels, 4, GROUP)
    biases = jnp.stack([bias(), -bias()])
    stacked = LinearGeneral.from_qtensor(stack, IN, OUT, biases, **HEADS)
    x = inputs()
    each = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))(stacked, x)
    single = run(layer("4bit"), x)
    chex.assert_trees_all_close(each[0], single, atol=1e-5)
    axes = {"variable_axes": {"params": 0, "quantized": 0}, "split_rngs": {}}
    mapped = nn.vmap(DenseGeneral, in_axes=None, axis_size=2, **axes)(OUT, **HEADS)
    made = to_variables({"kernel": stack, "bias": biases})
    found = jax.jit(mapped.apply)(made, x)
    chex.assert_trees_all_close(found, each, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LinearGeneral(IN, OUT, **HEADS),
            "in_features=96 must be a multiple of group",
        ),
        (lambda: LinearGeneral(IN, OUT, group_size=GROUP), "one size for each of axis"),
        (
            lambda: LinearGeneral.from_qtensor(cases.kernel("4bit"), OUT, IN, **HEADS),
            r"kernel.shape=\(96, 40\) must be \(40, 96\), .* transposed",
        ),
        (
            lambda: LinearGeneral.from_qtensor(
                cases.kernel("4bit"), IN, OUT, cases.bias(), **HEADS
            ),
            r"bias.shape=\(40,\) must be \(5, 8\)",
        ),
        (
            lambda: layer().load(qjax.quantize(jnp.ones((64, N)), 4, 64)),
            r"kernel.shape=\(64, 40\) must be \(96, 40\)",
        ),
        # The product of the axes would fit.
        (lambda: layer()(jnp.ones((2, 12, 8))), r"must have in_features=\(8, 12\)"),
        (lambda: layer()(jnp.ones(96)), r"axis=\(-2, -1\) must name different axes"),
        (
            lambda: DenseGeneral(OUT, axis=(1, -1)).init(KEY, jnp.ones((2, 96))),
            r"axis=\(1, -1\) must name different axes of inputs.shape=\(2, 96\)",
        ),
        (
            lambda: DenseGeneral(41, **HEADS).apply(
                to_variables({"kernel": cases.kernel("4bit")}), inputs()
            ),
            r"kernel.shape=\(96, 40\) must be \(96, 41\)",
        ),
        (
            lambda: to_variables(
                {"kernel": cases.kernel("4bit"), "bias": jnp.ones((5, 9))}
            ),
            r"bias.shape=\(5, 9\) must be \(40,\)",
        ),
        (
            lambda: LinearGeneral(
                IN, OUT, **HEADS, group_size=GROUP, kernel_init=nnx.initializers.ones
            ),
            "rngs=None",
        ),
    ],
)
def test_invalid_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bias_of_other_axes_is_refused_by_flax():
    made = to_variables({"kernel": cases.kernel("4bit"), "bias": jnp.ones((8, 5))})
    with pytest.raises(errors.ScopeParamShapeError):
        DenseGeneral(OUT, **HEADS).apply(made, inputs())
