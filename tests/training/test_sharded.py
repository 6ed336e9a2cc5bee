"""A step of training on eight devices: equal to one device's, and what is moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import training
from qjax.formats.gptq import Stream
from qjax.layers.nnx import Experts, Linear, Scale
from tests.layers.cases import error
from tests.test_sharding import communicated

M, K, N, GROUP = 16, 128, 256, 32
RATE, RANK = 1e-2, 4


class MLP(nnx.Module):
    def __init__(self, up: qjax.QTensor, down: qjax.QTensor):
        self.up, self.down = Linear.from_qtensor(up), Linear.from_qtensor(down)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def weights():
    return {
        "up": qjax.quantize(draw(K, N) / K**0.5, 4, GROUP),
        "down": qjax.quantize(draw(N, K, seed=1) / N**0.5, 4, GROUP),
    }


def loss_of(model, x):
    return ((model(x) - 1) ** 2).mean()


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    devices = jax.devices("cpu")
    axes = (request.param, request.param)
    return jax.make_mesh((2, 4), ("data", "model"), axes, devices=devices)


def train_variables(kind):
    def step(model, x):
        """Loss, and the variables of a kind after a step."""
        wrt = nnx.DiffState(0, kind)
        optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=kind)
        loss, gradient = nnx.value_and_grad(loss_of, argnums=wrt)(model, x)
        optimizer.update(model, gradient)
        return loss, nnx.state(model, kind)

    return step


def train_weights(model, x):
    """Loss, and dense weights of codes and residual after a step of DiodeMix."""
    optimizer = training.diode_mix(RATE)
    kernels = training.nnx.kernels(model)
    zeros = training.shadow.zeros(kernels)

    def loss(shadows):
        return loss_of(training.nnx.with_shadows(model, shadows), x)

    value, gradient = jax.value_and_grad(loss)(zeros)
    updates, _ = optimizer.update(gradient, optimizer.init(zeros))
    stepped, residual = training.apply_with_residual(kernels, updates, zeros)
    return value, (stepped, residual, training.apply_updates(kernels, updates))


METHODS = {
    "lora": train_variables(nnx.LoRAParam),
    "scales": train_variables(Scale),
    "weights": train_weights,
}


def model_of(method, kernels):
    model = MLP(**kernels)
    if method == "lora":
        model = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
        for layer in (model.up, model.down):
            # The gradient of a is zero where b is.
            layer.b[...] = jnp.full(layer.b.shape, 0.1)
    return model


def stepping(method, kernels):
    """A step as a function of arrays, and the arrays of its model."""
    graph, state = nnx.split(model_of(method, kernels))
    return (lambda state, x: METHODS[method](nnx.merge(graph, state), x)), state


# What a device has of half the rows and a quarter of the matrices.
ROWS, COLUMNS = M // 2, N // 4
# What it sums with others, beside the loss and the product of the second matrix: the
# gradients of what is trained; of adapters also x @ a of the second matrix, and the
# cotangent of that of the first.
SUMMED = {
    "lora": RANK * (2 * ROWS + 2 * (K + COLUMNS)),
    "scales": 2 * (K // GROUP) * COLUMNS,
    "weights": 2 * K * COLUMNS,
}


@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.parametrize("method", METHODS)
def test_step_equals_that_of_one_device(method, mesh):
    x = draw(M, K, seed=2)
    step, state = stepping(method, weights())
    wanted = jax.jit(step)(state, x)
    with jax.set_mesh(mesh):
        step, state = stepping(method, cut(mesh, P(None, "model"), P("model", None)))
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = jax.jit(step)(state, placed)
        moved = communicated(step, state, placed)
    assert_close(found, wanted)
    # The types of adapters say that they are whole, and their gradients are gathered.
    if method != "lora" or not mesh.explicit_axes:
        assert moved == {"all-reduce": 4 * (1 + ROWS * K + SUMMED[method])}


def cut(mesh, *specs):
    named = zip(weights().items(), specs, strict=True)
    return {name: qjax.shard(w, mesh, spec) for (name, w), spec in named}


def assert_close(found, wanted):
    """Codes are equal; floats are sums in another order.

    DiodeMix divides a gradient by its size: of the least ones, that order is more. What
    is cut more finely than a GPU's layout can be has another.
    """
    found, wanted = (qjax.prepare(tree, layout=Stream()) for tree in (found, wanted))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        if jnp.issubdtype(a.dtype, jnp.floating):
            assert error(a, b) < 1e-4
        else:
            assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.parametrize("method", METHODS)
def test_fsdp(method, mesh):
    """Rows and weights are cut along one axis: words are gathered, and no rows."""
    x = draw(2048, K, seed=2)
    step, state = stepping(method, weights())
    wanted = jax.jit(step)(state, x)
    with jax.set_mesh(mesh):
        step, state = stepping(method, cut(mesh, P(None, "data"), P(None, "data")))
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        assert_close(jax.jit(step)(state, placed), wanted)
        moved = communicated(step, state, placed)
    first, second = weights().values()
    # For the forward pass, and again for the backward: of the second matrix for the
    # cotangent of its inputs, of the first for the gradient of its scales, which asks
    # for all but them.
    again = second.nbytes
    if method == "scales":
        again += first.nbytes - first.scale.nbytes
    assert moved.pop("all-gather") == first.nbytes + second.nbytes + again
    # The loss, and the gradients of what is trained.
    trained = {
        "lora": 2 * RANK * (K + N),
        "scales": 2 * (K // GROUP) * N,
        "weights": 2 * K * N,
    }
    assert sum(moved.values()) <= 4 * (1 + trained[method])


def merge_lora(w, _):
    a, b = draw(K, RANK) / 10, draw(RANK, N) / 10
    return training.lora.merge(w, a, b), training.lora.merge_quantized(w, a, b)


# Of a weight, and of a step, residual or weight that is cut as it.
ALONE = {
    "updates": training.apply_updates,
    "updates and zeros": functools.partial(training.apply_updates, move_zeros=True),
    "by chance": lambda w, dense: training.apply_stochastically(
        w, dense, jax.random.key(0)
    ),
    "residual": lambda w, dense: training.apply_with_residual(w, dense, dense / 2),
    "refit": training.refit,
    "requantize": training.requantize,
    "merge": merge_lora,
}


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")])
@pytest.mark.parametrize("name", ALONE)
def test_functions_of_weights(name, spec, mesh):
    w, dense = weights()["up"], draw(K, N, seed=3) / 100
    wanted = ALONE[name](w, dense)
    with jax.set_mesh(mesh):
        cut = qjax.shard(w, mesh, spec)
        found = ALONE[name](cut, jax.device_put(dense, NamedSharding(mesh, spec)))
    assert_close(found, wanted)
    for result in jax.tree.leaves(found, is_leaf=lambda a: isinstance(a, qjax.QTensor)):
        if mesh.explicit_axes and isinstance(result, qjax.QTensor):
            assert types(result) == types(cut)


def types(tree):
    return list(map(jax.typeof, jax.tree.leaves(tree)))


@pytest.mark.parametrize("spec", [P(None, "model"), P("model")])
def test_shadow_gradient(spec, mesh):
    w, x = weights()["up"], draw(2, M // 2, K, seed=4)

    def gradient(x, w):
        loss = lambda zeros: (training.shadow.matmul(x, w, zeros) ** 2).mean()  # noqa: E731
        return jax.grad(loss)(training.shadow.zeros(w))

    wanted = gradient(x, w)
    with jax.set_mesh(mesh):
        cut = qjax.shard(w, mesh, spec)
        found = gradient(jax.device_put(x, NamedSharding(mesh, P("data"))), cut)
    assert_close(found, wanted)
    if mesh.explicit_axes:
        assert jax.typeof(found).sharding.spec == P(*spec, *[None] * (2 - len(spec)))


def test_route_of_tokens_that_are_cut(mesh):
    stack = qjax.stack([qjax.quantize(draw(K, N, seed=i), 4, GROUP) for i in range(4)])
    x = draw(M, K, seed=5)
    expert = jnp.arange(2 * M).reshape(M, 2) % 4
    weight = jnp.abs(draw(M, 2, seed=6))
    wanted = Experts.from_qtensor(stack).route(x, expert, weight)
    with jax.set_mesh(mesh):
        cut = qjax.shard(stack, mesh, P(None, None, "model"))
        rows = jax.device_put((x, expert, weight), NamedSharding(mesh, P("data")))
        found = Experts.from_qtensor(cut).route(*rows)
    assert_close(found, wanted)
