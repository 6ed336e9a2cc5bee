"""`linen.Experts` and `nnx.Experts`: twins, against float64, routed and sorted."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax.layers import linen
from qjax.layers.experts import combine, dispatch, route
from qjax.layers.linen import to_params, to_variables
from qjax.layers.nnx import Experts, Quantized, Scale
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

EXPERTS, T = 3, 11
SIZES = (4, 0, 5)  # two tokens have no expert
KEY = jax.random.key(0)


def kernel(name: str = "4bit", dtype: str = "float32") -> qjax.QTensor:
    """Experts of their own: every leaf is turned along its last axis."""
    one = qjax.prepare(cases.kernel(name, dtype))
    each = [
        jax.tree.map(lambda a, i=i: jnp.roll(a, i, -1), one) for i in range(EXPERTS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def bias(dtype: str = "float32") -> jnp.ndarray:
    return jnp.stack([cases.bias(dtype) * i for i in range(1, 1 + EXPERTS)])


def dense(w: qjax.QTensor) -> np.ndarray:
    return np.asarray(qjax.dequantize(w, jnp.float32), np.float64)


@nnx.jit
def run(layer, *args):
    return layer(*args)


# test_ragged.py has the rest: the product is the same.
@pytest.mark.parametrize("name", ["3bit", "mixed", "codebook"])
def test_twins_agree_and_match_float64(name):
    w, x, sizes = kernel(name), cases.inputs(rows=T), jnp.array(SIZES)
    made = to_variables({"kernel": w, "bias": bias()})
    found = jax.jit(linen.Experts(EXPERTS, N).apply)(made, x, sizes)
    chex.assert_trees_all_equal(found, run(Experts.from_qtensor(w, bias()), x, sizes))
    wanted, start = np.zeros((T, N)), 0
    for size, one, b in zip(SIZES, dense(w), bias(), strict=True):
        rows = slice(start, start + size)
        wanted[rows] = np.asarray(x[rows], np.float64) @ one + np.asarray(b)
        start += size
    # Summation order only.
    assert cases.error(found, wanted) <= 1e-5
    assert not found[sum(SIZES) :].any()


@pytest.mark.parametrize("param_dtype", cases.FLOATS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_output_dtype_is_that_of_flax(dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    theirs = nnx.Linear(K, N, rngs=nnx.Rngs(0), **options)
    ours = Experts(EXPERTS, K, N, group_size=GROUP, **options)
    layer = linen.Experts(EXPERTS, N, group_size=GROUP, **options)
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
    for x in (*cases.FLOATS, "int32"):
        struct = jax.ShapeDtypeStruct((T, K), x)
        with jax.numpy_dtype_promotion("standard"):
            wanted = jax.eval_shape(theirs, struct)
            assert jax.eval_shape(ours, struct, sizes) == wanted
            init = jax.eval_shape(layer.init_with_output, KEY, struct, sizes)
        assert init[0] == wanted


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing(top_k):
    w, x = kernel(), cases.inputs(rows=T)
    rng = cases.rng(6)
    expert = np.stack([rng.permutation(EXPERTS)[:top_k] for _ in range(T)])
    expert[3] = EXPERTS  # one that there is not
    expert[4, 0] = -1
    weight = rng.uniform(size=(T, top_k)).astype(np.float32)
    wanted = np.zeros((T, N))
    for t, j in np.ndindex(T, top_k):
        if 0 <= (e := expert[t, j]) < EXPERTS:
            row = np.asarray(x[t], np.float64) @ dense(w)[e] + np.asarray(bias()[e])
            wanted[t] += weight[t, j] * row
    layer = Experts.from_qtensor(w, bias())
    routed = x, jnp.asarray(expert), jnp.asarray(weight)
    found = nnx.jit(lambda layer, *routed: layer.route(*routed))(layer, *routed)
    assert cases.error(found, wanted) <= 1e-5
    made = to_variables({"kernel": w, "bias": bias()})
    twin = linen.Experts(EXPERTS, N)
    again = jax.jit(lambda *args: twin.apply(*args, method="route"))(made, *routed)
    chex.assert_trees_all_equal(again, found)


def test_second_derivatives():
    """Of the cosine of a layer that routes, by tokens, weights and biases."""
    w, x, rng = kernel("mixed"), cases.inputs(rows=T), cases.rng(6)
    expert = jnp.asarray(rng.integers(0, EXPERTS, (T, 2)))
    weight = jnp.asarray(rng.uniform(size=(T, 2)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def second(route, *operands):
        def square(*operands):
            loss = lambda *operands: jnp.cos(route(*operands)).sum()  # noqa: E731
            found = jax.grad(loss, (0, 1, 2))(*operands)
            return sum((gradient**2).sum() for gradient in found)

        return jax.grad(square, (0, 1, 2))(*operands)

    def by_nnx(x, weight, bias):
        return Experts.from_qtensor(w, bias).route(x, expert, weight)

    def by_linen(x, weight, bias):
        made = to_variables({"kernel": w, "bias": bias})
        return linen.Experts(EXPERTS, N).apply(made, x, expert, weight, method="route")

    def by_dense(x, weight, bias):
        each = qjax.dequantize(w, jnp.float32)[expert]
        y = jnp.einsum("tk,tjkn->tjn", x, each, precision="highest") + bias[expert]
        return (y * weight[..., None]).sum(1)

    operands = x, weight, bias()
    found, twin, wanted = (
        second(one, *operands) for one in (by_nnx, by_linen, by_dense)
    )
    chex.assert_trees_all_equal(found, twin)
    for one, other in zip(found, wanted, strict=True):
        # Cosines of sums of some tens, and their derivatives.
        assert cases.error(one, np.asarray(other, np.float64)) <= 1e-4


def test_a_block_sorts_once():
    """Gate and up beside each other, one way there and one way back."""
    w, x = kernel("mixed"), cases.inputs(rows=T)
    down = qjax.quantize(jnp.stack([cases.dense(N, K)] * EXPERTS), 8, None)
    layers = [Experts.from_qtensor(one) for one in (w, kernel("3bit"), down)]
    expert = jnp.asarray(cases.rng(7).integers(0, EXPERTS, (T, 2)))
    weight = jnp.asarray(cases.rng(8).uniform(size=(T, 2)), jnp.float32)

    @jax.jit
    def block(x, gate, up, down):
        routed = dispatch(x, expert, EXPERTS)
        sizes = routed.group_sizes
        h = jax.nn.silu(gate(routed.rows, sizes)) * up(routed.rows, sizes)
        return combine(down(h, sizes), routed, weight)

    wanted = np.zeros((T, K))
    for t, j in np.ndindex(T, 2):
        gate, up, back = (dense(one.kernel)[expert[t, j]] for one in layers)
        row = np.asarray(x[t], np.float64)
        h = row @ gate / (1 + np.exp(-(row @ gate))) * (row @ up)
        wanted[t] += float(weight[t, j]) * (h @ back)
    found = nnx.jit(lambda layers, x: block(x, *layers))(layers, x)
    assert cases.error(found, wanted) <= 1e-5


def test_gradients():
    w, x = kernel("float-zero"), cases.inputs(rows=T)
    expert = jnp.asarray(cases.rng(7).integers(0, EXPERTS, (T, 2)))
    weight = jnp.asarray(cases.rng(8).uniform(size=(T, 2)), jnp.float32)
    made = to_variables({"kernel": w, "bias": bias()})

    def found(params, x, weight):
        variables = {**made, "params": params}
        layer = linen.Experts(EXPERTS, N)
        return jnp.sin(layer.apply(variables, x, expert, weight, method="route")).sum()

    def wanted(w, bias, x, weight):
        whole = qjax.dequantize(w, jnp.float32)[expert]
        y = jnp.einsum("tk,tekn->ten", x, whole, precision="highest") + bias[expert]
        return jnp.sin((y * weight[..., None]).sum(1)).sum()

    params, dx, dweight = jax.jit(jax.grad(found, (0, 1, 2)))(made["params"], x, weight)
    gradient = jax.jit(jax.grad(wanted, (0, 1, 2, 3), allow_int=True))
    dw, dbias, dx_wanted, dweight_wanted = gradient(w, bias(), x, weight)
    # Sums in another order, through a sine.
    assert cases.error(params["kernel"]["scale"], dw.scale) < 1e-4
    assert cases.error(params["kernel"]["zero"], dw.zero) < 1e-5
    assert cases.error(params["bias"], dbias) < 1e-5
    assert cases.error(dx, dx_wanted) < 1e-5
    assert cases.error(dweight, dweight_wanted) < 1e-5


@pytest.mark.usefixtures("optax_promotion")
def test_training_holds_nothing_for_words():
    layer = Experts.from_kernel(
        jnp.stack([cases.dense()] * EXPERTS), bias(), group_size=GROUP
    )
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    held = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
    assert all(jnp.issubdtype(a.dtype, jnp.floating) or not a.ndim for a in held)
    before = jax.tree.map(jnp.copy, nnx.state(layer, Quantized))
    x, sizes = cases.inputs(rows=T), jnp.array(SIZES)

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda layer: ((layer(x, sizes) - 1) ** 2).mean()  # noqa: E731
        value, gradient = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, gradient)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    chex.assert_trees_all_equal(nnx.state(layer, Quantized), before)


def test_new_layers():
    init = nn.initializers.lecun_normal(batch_axis=0)
    options = {"bits": 3, "group_size": GROUP, "kernel_init": init}
    made = linen.Experts(EXPERTS, N, **options).init(
        KEY, cases.inputs(rows=T), jnp.array(SIZES)
    )
    found = to_params(made)
    assert (found["kernel"].shape, found["bias"].shape) == ((3, K, N), (3, N))
    layer = Experts(EXPERTS, K, N, **options, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (3, K, N)
    assert layer.bias.shape == (3, N)
    std = float(qjax.dequantize(layer.kernel).std())
    assert std == pytest.approx(K**-0.5, rel=0.1)
    empty = Experts(EXPERTS, K, N, bits=3, group_size=GROUP, use_bias=False)
    assert not run(empty, cases.inputs(rows=T), jnp.array(SIZES)).any()
    empty.load(layer.kernel)
    chex.assert_trees_all_equal(empty.kernel, layer.kernel)
    assert jax.tree.leaves(nnx.state(empty, Scale))[0].shape == (3, K // GROUP, N)


def test_tokens_that_are_cut_over_devices():
    """Explicit axes have a type that comparing all with all would not have."""
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Explicit,))
    x, expert = jnp.ones((4, 8)), jnp.array([[1, 0], [0, 2], [1, 1], [2, 0]])
    wanted = dispatch(x, expert, 3)
    with jax.set_mesh(mesh):
        cut = jax.device_put(expert, jax.P("data"))
        found = jax.jit(dispatch, static_argnums=2)(x, cut, 3)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(wanted))


def test_experts_as_bytes():
    found = dispatch(jnp.ones((2, 1)), jnp.array([[255], [7]], jnp.uint8), 300)
    assert (found.group_sizes > 0).nonzero()[0].tolist() == [7, 255]
    assert found.order.tolist() == [1, 0]


@pytest.mark.parametrize("t", [0, 1, 3, 128, 129])
def test_tokens_are_sorted_and_come_back(t):
    """Few entries, which are compared with each other, and many, which are sorted."""
    rng = np.random.default_rng(t)
    expert = rng.integers(-1, 7, (t, 2))  # Neither -1 nor 6 is one of six.
    x = jnp.arange(1.0, t + 1)[:, None]
    routed = jax.jit(dispatch, static_argnums=2)(x, jnp.asarray(expert), 6)
    flat = np.where((expert >= 0) & (expert < 6), expert, 6).reshape(-1)
    order = np.argsort(flat, stable=True)
    chex.assert_trees_all_equal(
        jax.device_get(tuple(routed)),
        (x[order // 2], np.bincount(flat, minlength=7)[:6].astype(np.int32), order),
    )
    weight = jnp.asarray(rng.integers(1, 9, (t, 2)), jnp.float32)
    back = combine(routed.rows, routed, weight)
    chex.assert_trees_all_equal(back, x * weight.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Experts.from_qtensor(cases.kernel("4bit")),
            "kernel.shape=(96, 40) must be [num_experts, in_features, out_features]",
        ),
        (lambda: Experts.from_qtensor(kernel(), jnp.ones(N)), "must be (3, 40)"),
        (
            lambda: Experts(4, K, N, kernel_init=kernel()),
            "kernel.shape=(3, 96, 40) must be (4, 96, 40)",
        ),
        (
            lambda: linen.Experts(4, N, use_bias=False).apply(
                to_variables({"kernel": kernel()}), cases.inputs(), jnp.ones(4, int)
            ),
            "kernel.shape=(3, 96, 40) must be (4, 96, 40)",
        ),
        (
            lambda: dispatch(jnp.ones((4, 2)), jnp.ones(4, int), 2),
            "expert must be integers [t, top_k] for x.shape=(4, 2)",
        ),
        (
            lambda: dispatch(jnp.ones((4, 2)), jnp.ones((4, 2)), 2),
            "got float32(4, 2)",
        ),
        (
            lambda: dispatch(jnp.ones((4, 2)), jnp.ones((4, 0), int), 2),
            "got int32(4, 0)",
        ),
        (
            lambda: combine(
                jnp.ones((8, 2)),
                dispatch(jnp.ones((4, 2)), jnp.ones((4, 2), int), 2),
                jnp.ones((4, 1)),
            ),
            "weight.shape=(4, 1) must be [t, top_k]",
        ),
        (
            lambda: Experts.from_qtensor(kernel()).route(
                jnp.ones((4, K)), jnp.ones((4, 2), int), jnp.ones((2, 4))
            ),
            "weight.shape=(2, 4) must be that of expert, (4, 2)",
        ),
    ],
)
def test_refuses(make, message, refuses):
    with refuses(message):
        make()


@pytest.mark.parametrize("name", ["x", "expert", "weight"])
def test_refuses_lists(name, refuses):
    given = {"x": np.ones((4, K)), "expert": np.ones((4, 2), int)}
    given |= {"weight": np.ones((4, 2), np.float32)}
    given = {key: jnp.asarray(array) for key, array in given.items()}
    given[name] = given[name].tolist()
    with refuses(f"{name} is list, and must be an array", TypeError):
        route(lambda rows, sizes: rows, 2, *given.values())
