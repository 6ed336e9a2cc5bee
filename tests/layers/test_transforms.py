"""Every layer under every transformation of JAX: the table in the README."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import training
from qjax.layers import linen as by_linen
from qjax.layers import nnx as by_nnx
from qjax.tensor import Affine

README = Path(__file__).parents[2] / "README.md"
K, N, ROWS, F32 = 64, 32, 8, jnp.float32
# One product of 64 terms in float32, in another order of its sums.
TOLERANCE = 2e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A pure function of parameters and inputs, and what is needed to call it.

    Attributes:
      apply: Of parameters and inputs.
      params: Arrays; those of floats have gradients.
      x: Inputs, arrays whose first axis is a batch.
    """

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    x: Any

    @functools.cached_property
    def y(self) -> np.ndarray:
        return np.asarray(self.apply(self.params, self.x))


def draw(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape) / math.sqrt(shape[-2])
    return jnp.asarray(values, jnp.float32)


def kernel(k=K, n=N, **options):
    return qjax.quantize(draw(k, n), group_size=32, **options)


def call(module, x):
    return module.route(*x) if isinstance(x, tuple) else module(x)


def of_nnx(module, x):
    graph, state = nnx.split(module)
    return Layer(lambda state, x: call(nnx.merge(graph, state), x), state, x)


def of_linen(module, params, x, **more):
    def apply(variables, x):
        return module.apply(variables, x, method=call)

    return Layer(apply, by_linen.to_variables(params) | more, x)


def experts():
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[kernel()] * 3)


def offset():
    """What MBWQ has: float16 scales, and zeros that are added."""
    w = kernel(scale_dtype=jnp.float16)
    zero = -w.zero.astype(jnp.float16) * w.scale
    return dataclasses.replace(w, zero=zero, affine=Affine.OFFSET)


def loaded(layer):
    layer.load(offset())
    return layer


def adapted(layer):
    layer = training.nnx.LoRA(layer, 4, rngs=nnx.Rngs(0))
    layer.b[...] = draw(4, N, seed=6)
    return layer


ROW = functools.partial(draw, ROWS, K, seed=1)
HEADS = functools.partial(draw, ROWS, 4, K // 4, seed=1)
ROUTED = (ROW(), jnp.arange(2 * ROWS).reshape(ROWS, 2) % 3, draw(ROWS, 2, seed=4))
IDS = functools.partial(jnp.arange, ROWS)
EINSUM = (K, 4, N // 4), "BD,DNH->BNH"

LAYERS: dict[str, dict[str, Callable[[], Layer]]] = {
    "Linear, Dense": {
        "nnx": lambda: of_nnx(
            by_nnx.Linear.from_qtensor(kernel(), draw(1, N)[0]), ROW()
        ),
        "linen": lambda: of_linen(
            by_linen.Dense(N), {"kernel": kernel(), "bias": draw(1, N)[0]}, ROW()
        ),
    },
    "LinearGeneral, DenseGeneral": {
        "nnx": lambda: of_nnx(
            by_nnx.LinearGeneral.from_qtensor(kernel(), (4, K // 4), N, axis=(-2, -1)),
            HEADS(),
        ),
        "linen": lambda: of_linen(
            by_linen.DenseGeneral(N, axis=(-2, -1), use_bias=False),
            {"kernel": kernel()},
            HEADS(),
        ),
    },
    "Einsum": {
        "nnx": lambda: of_nnx(
            by_nnx.Einsum.from_qtensor(EINSUM[1], EINSUM[0], kernel()), ROW()
        ),
        "linen": lambda: of_linen(
            by_linen.Einsum(*EINSUM, use_bias=False), {"kernel": kernel()}, ROW()
        ),
    },
    "Experts": {
        "nnx": lambda: of_nnx(by_nnx.Experts.from_qtensor(experts()), ROUTED),
        "linen": lambda: of_linen(
            by_linen.Experts(3, N, use_bias=False), {"kernel": experts()}, ROUTED
        ),
    },
    "MBWQLinear, MBWQDense": {
        "nnx": lambda: of_nnx(
            loaded(by_nnx.MBWQLinear(K, N, group_size=32, dtype=F32)), ROW()
        ),
        "linen": lambda: of_linen(
            by_linen.MBWQDense(N, group_size=32, dtype=F32), {"kernel": offset()}, ROW()
        ),
    },
    "GroupQuantLinear, GroupQuantDense": {
        "nnx": lambda: of_nnx(
            by_nnx.GroupQuantLinear.from_dense(draw(K, N), group_size=32), ROW()
        ),
        "linen": lambda: of_linen(
            by_linen.GroupQuantDense(N, use_bias=False),
            {"kernel": qjax.formats.flexgen.quantize(draw(K, N), 32)},
            ROW(),
        ),
    },
    "LoRA": {
        "nnx": lambda: of_nnx(adapted(by_nnx.Linear.from_qtensor(kernel())), ROW()),
        "linen": lambda: of_linen(
            training.linen.LoRA(by_linen.Dense(N, use_bias=False), 4),
            {"kernel": kernel()},
            ROW(),
            lora={"a": draw(K, 4, seed=5), "b": draw(4, N, seed=6)},
        ),
    },
    "Embed": {
        "nnx": lambda: of_nnx(by_nnx.Embed.from_qtensor(kernel()), IDS()),
        "linen": lambda: of_linen(by_linen.Embed(N, K), {"embedding": kernel()}, IDS()),
    },
}


def close(found, expected):
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def loss_of(layer):
    """A loss of what is float: inputs, unless they are ids, and parameters."""
    leaves, tree = jax.tree.flatten((layer.params, layer.x))
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    weights = draw(*layer.y.shape, seed=2)

    def loss(values, apply=layer.apply):
        rest = iter(values)
        filled = [
            next(rest) if is_float else leaf
            for leaf, is_float in zip(leaves, floats, strict=True)
        ]
        params, x = tree.unflatten(filled)
        return (apply(params, x) * weights).sum()

    return loss, [leaf for leaf, f in zip(leaves, floats, strict=True) if f]


@functools.cache
def gradients_of(layer):
    loss, values = loss_of(layer)
    return jax.jit(jax.grad(loss))(values)


def jit(layer, _):
    close(jax.jit(layer.apply)(layer.params, layer.x), layer.y)


def grad(layer, _):
    # Every loss here is linear in each of its values: differences have no error but
    # that of rounding.
    loss, values = loss_of(layer)
    for i, gradient in enumerate(gradients_of(layer)):
        step = draw(1, gradient.size, seed=3).reshape(gradient.shape)
        step = step.astype(gradient.dtype)
        moved = [
            [v + sign * step if j == i else v for j, v in enumerate(values)]
            for sign in (1, -1)
        ]
        difference = (loss(moved[0]) - loss(moved[1])) / 2
        expected = float((gradient * step).sum())
        # A gradient has the dtype of its leaf.
        tolerance = 1e-4 if gradient.dtype == jnp.float32 else 1e-2
        assert abs(float(difference) - expected) <= tolerance * max(1, abs(expected))


def vmap(layer, _):
    mapped = jax.vmap(layer.apply, (None, 0))
    # A row alone, as the layer takes one at least.
    alone = jax.tree.map(lambda x: x[:, None], layer.x)
    close(mapped(layer.params, alone)[:, 0], layer.y)


def scan(layer, _):
    # Over a stack of layers.
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), layer.params)

    def one(carry, params):
        return carry, layer.apply(params, layer.x)

    _, ys = jax.jit(lambda stack: jax.lax.scan(one, 0, stack))(stack)
    close(ys, np.stack([layer.y] * 2))


def pmap(layer, _):
    parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), layer.x)
    run = jax.pmap(layer.apply, in_axes=(None, 0), devices=jax.devices("cpu")[:4])
    close(np.concatenate(run(layer.params, parts)), layer.y)


def shard_map(layer, _):
    mesh = Mesh(jax.devices("cpu")[:4], ("data",))
    run = jax.shard_map(
        layer.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    close(jax.jit(run)(layer.params, layer.x), layer.y)


def sharded(layer, _):
    # Weights by columns, as far as they have some, and the batch.
    mesh = Mesh(np.reshape(jax.devices("cpu"), (2, 4)), ("data", "model"))

    def place(leaf):
        columns = leaf.ndim >= 2 and leaf.shape[-1] % 4 == 0
        axes = [None] * leaf.ndim
        if columns:
            axes[-1] = "model"
        return jax.device_put(leaf, NamedSharding(mesh, P(*axes)))

    params = jax.tree.map(place, layer.params)
    x = jax.device_put(layer.x, NamedSharding(mesh, P("data")))
    close(jax.jit(layer.apply)(params, x), layer.y)


def remat(layer, _):
    loss, values = loss_of(layer)
    again = functools.partial(loss, apply=jax.checkpoint(layer.apply))
    found = jax.jit(jax.grad(again))(values)
    for one, expected in zip(found, gradients_of(layer), strict=True):
        close(one, np.asarray(expected))


def exported(layer, _):
    leaves, tree = jax.tree.flatten(layer.params)
    run = jax.jit(lambda leaves, x: layer.apply(tree.unflatten(leaves), x))
    # For the GPU too, on a machine that need not have one. Of weights in Tiles, JAX
    # would lower kernels for the CPU as well.
    in_tiles = any(leaf.dtype == jnp.uint16 for leaf in leaves)
    platforms = ("cpu",) if in_tiles else ("cpu", "cuda")
    blob = export.export(run, platforms=platforms)(leaves, layer.x).serialize()
    close(export.deserialize(blob).call(leaves, layer.x), layer.y)


def orbax(layer, folder):
    plain = nnx.to_pure_dict if isinstance(layer.params, nnx.State) else (lambda p: p)
    state = jax.tree.leaves(plain(layer.params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        back = checkpointer.restore(folder / "state", abstract)
    params = jax.tree.structure(layer.params).unflatten(back)
    close(layer.apply(params, layer.x), layer.y)


TRANSFORMS = {
    "jit": jit,
    "grad": grad,
    "vmap": vmap,
    "scan": scan,
    "pmap": pmap,
    "shard_map": shard_map,
    "sharded jit": sharded,
    "remat": remat,
    "export": exported,
    "orbax": orbax,
}


@functools.cache
def made(name, kind):
    return LAYERS[name][kind]()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_under(name, kind, transform, tmp_path):
    TRANSFORMS[transform](made(name, kind), tmp_path)


def test_the_table_of_the_readme():
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in README.read_text().splitlines()
        if line.startswith("| ")
    ]
    (head,) = (i for i, row in enumerate(rows) if row[1:] == list(TRANSFORMS))
    table = rows[head + 1 : head + 1 + len(LAYERS)]
    assert [row[0].replace("`", "") for row in table] == list(LAYERS)
    assert all(cell == "yes" for row in table for cell in row[1:])
