"""What a training step over packed weights needs beside them, by XLA's own plan."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.layers.nnx import Linear, Scale

K, N, ROWS, RANK = 2048, 2048, 16, 8
DENSE = 4 * K * N  # bytes of one weight in float32


def plan(wrt, add):
    """The memory of a step of Adam over two frozen layers; nothing is allocated."""

    def start():
        w = qjax.quantize(jnp.zeros((K, N)), 4, 128)
        model = add(nnx.List([Linear.from_qtensor(w), Linear.from_qtensor(w)]))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=wrt)

    graph, state = nnx.split(nnx.eval_shape(start))

    def step(state, x):
        model, optimizer = nnx.merge(graph, state)

        def loss(model):
            y = jax.nn.gelu(model[0](x))
            return (model[1](y) ** 2).mean()

        gradient = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)
        return nnx.state((model, optimizer), nnx.Any(wrt, nnx.OptState))

    x = jax.ShapeDtypeStruct((ROWS, K), jnp.float32)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    compiled = jax.jit(step).lower(state, x).compile()
    return sum(sizes), compiled.memory_analysis()


def traced(_):
    """The same model of layers that run on traced code of Flax."""
    layers = [
        nnx.LinearGeneral(K, N, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2)
    ]
    return qjax.quantize_model(nnx.List(layers), qjax.Spec(bits=4, group_size=128))


@pytest.mark.on_cpu
@pytest.mark.parametrize("method", ["lora", "lora-traced", "scales"])
def test_no_dense_weight(method, optax_promotion):
    if method.startswith("lora"):
        others = traced if method == "lora-traced" else lambda model: model

        def add(model):
            return training.nnx.add_lora(others(model), RANK, rngs=nnx.Rngs(0))

        held, found = plan(nnx.LoRAParam, add)
        trained = 2 * RANK * (K + N) * 4
    else:
        held, found = plan(Scale, lambda model: model)
        trained = 2 * K // 128 * N * 4
    # Packed weights, what is trained, and two moments of it.
    packed = 2 * (K * N // 2 + K // 128 * N * (4 + 1))
    frozen = packed - (trained if method == "scales" else 0)
    assert abs(held - frozen - 3 * trained) < 1024
    # Tiles of 2 MiB, rows and gradients: far from one dense weight of the two.
    assert found.temp_size_in_bytes < DENSE / 2
