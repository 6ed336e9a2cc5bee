"""Scales in two levels, which `prepare` keeps where kernels multiply them."""

import dataclasses
from pathlib import Path

import chex
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import checkpoints, decode, ops, sharding, tensor
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from qjax.layers import embedding, linen, nnx
from qjax.training import linen as training
from tests.oracle import relative_error
from tests.samples import BF16, in_tiles, random_matrix, rows

GGUF = Path(__file__).parent / "data" / "llama_gguf_q4_k_m" / "model.gguf"
OFFSET = {"bits": 4, "group_size": 32, "affine": "OFFSET", "scale": "nested"}
CENTERED = {"bits": 6, "group_size": 16, "affine": "CENTERED", "scale": "nested"}
FLOAT = {"bits": 4, "group_size": 16, "affine": "FLOAT", "scale": "over global"}
every = pytest.mark.parametrize(
    "form", [OFFSET, CENTERED, FLOAT], ids=["Q4_K", "Q6_K", "NVFP4"]
)


def sample(form: dict, k: int = 512, n: int = 96, seed: int = 0):
    """A matrix of the oracle, and the same in `Tiles` with `Levels` of scales."""
    matrix = random_matrix(seed, k, n, **form)
    return matrix, in_tiles(matrix)


def float_gradients(w: qjax.QTensor, x: jax.Array) -> dict[str, jax.Array]:
    """Gradients by the floats of the levels, of some function of the product."""

    def loss(floats):
        leaves = {
            name: getattr(w, name).with_floats(array) for name, array in floats.items()
        }
        y = qjax.matmul(x, dataclasses.replace(w, **leaves))
        return (y.astype(jnp.float32) ** 2).sum() / 1024

    names = [name for name in ("scale", "zero") if getattr(w, name) is not None]
    return jax.grad(loss)({name: getattr(w, name).floats for name in names})


@every
def test_prepare_keeps_what_kernels_read(form):
    _, w = sample(form)
    stored = qjax.relayout(w, Stream())
    again = qjax.prepare(stored, layout=Tiles())
    chex.assert_trees_all_equal(again, w)
    # Codes and levels: no float32 a group.
    assert not any(a.dtype == jnp.float32 and a.ndim for a in jax.tree.leaves(again))
    plain = qjax.prepare(stored, layout=Stream())
    assert not isinstance(plain.scale, tensor.Encoded)
    chex.assert_trees_all_equal(qjax.dequantize(again), qjax.dequantize(plain))


def test_what_no_kernel_reads_is_decoded():
    _, w = sample(OFFSET)
    # Scales of two levels beside zeros of one.
    mixed = dataclasses.replace(w, zero=w.zero.decode())
    assert not isinstance(ops.prepare(mixed, layout=Tiles()).scale, tensor.Encoded)


@every
@pytest.mark.parametrize("m", [1, 5, 40])
def test_products(form, m):
    matrix, w = sample(form)
    x = rows(m, 512)
    y = qjax.matmul(jnp.asarray(x), w)
    assert relative_error(y, matrix.matmul(x)) < 1e-5
    y = qjax.matmul(jnp.asarray(x, BF16), w)
    assert relative_error(y, matrix.matmul(x)) < 2**-8


@every
def test_gradients_are_those_through_decoding(form):
    _, w = sample(form)
    x = jnp.asarray(rows(3, 512), BF16)
    # Another layout has its scales decoded before the product, and JAX's own gradient.
    expected = float_gradients(qjax.relayout(w, Stream()), x)
    found = float_gradients(w, x)
    chex.assert_trees_all_close(found, expected, rtol=2e-3)
    dx = jax.grad(lambda x: qjax.matmul(x, w).astype(jnp.float32).sum())(x)
    assert relative_error(dx, np.ones((3, 96)) @ np.asarray(decode.dequantize(w)).T) < (
        2**-8
    )


@every
def test_stacks(form):
    pairs = [sample(form, seed=seed) for seed in range(3)]
    stacked = tensor.stack([w for _, w in pairs])
    x = jnp.asarray(rows(4, 512), BF16)
    for i, (_, w) in enumerate(pairs):
        expected = qjax.matmul(x, w)
        found = qjax.matmul(x, stacked, index=i)
        chex.assert_trees_all_close(found, expected, rtol=1e-2)
    y = jax.vmap(qjax.matmul, (None, 0))(x, stacked)
    chex.assert_trees_all_close(y[2], expected, rtol=1e-2)

    def loss(floats):
        w = dataclasses.replace(stacked, scale=stacked.scale.with_floats(floats))
        return (qjax.matmul(x, w, index=2).astype(jnp.float32) ** 2).sum() / 1024

    gradient = jax.grad(loss)(stacked.scale.floats)
    of_one = float_gradients(pairs[2][1], x)["scale"]
    for name, array in gradient.items():
        assert not array[:2].any()
        chex.assert_trees_all_close(array[2], of_one[name], rtol=2e-3, atol=1e-6)


@every
def test_experts(form):
    pairs = [sample(form, seed=seed) for seed in range(2)]
    stacked = tensor.stack([w for _, w in pairs])
    x, sizes = jnp.asarray(rows(6, 512), BF16), jnp.array([2, 4])

    def loss(x, floats):
        w = dataclasses.replace(stacked, scale=stacked.scale.with_floats(floats))
        y = qjax.ragged_matmul(x, w, sizes).astype(jnp.float32)
        return (y**2).sum() / 1024, y

    found, y = jax.grad(loss, argnums=1, has_aux=True)(x, stacked.scale.floats)
    for i, part in enumerate((slice(0, 2), slice(2, 6))):
        matrix, w = pairs[i]
        expected = matrix.matmul(np.asarray(x[part], np.float32))
        assert relative_error(y[part], expected) < 2**-8
        of_one = float_gradients(w, x[part])["scale"]
        mine = jax.tree.map(lambda array, i=i: array[i], found)
        chex.assert_trees_all_close(mine, of_one, rtol=2e-3, atol=1e-6)


@every
def test_joined(form):
    parts = [sample(form, n=n, seed=n) for n in (32, 64)]
    w = tensor.concatenate([w for _, w in parts])
    assert isinstance(w.scale, tensor.Levels)
    x = rows(2, 512)
    expected = np.concatenate([matrix.matmul(x) for matrix, _ in parts], 1)
    assert relative_error(qjax.matmul(jnp.asarray(x), w), expected) < 1e-5
    # Of other runs, or another number for the whole, they are decoded.
    first, last = (w for _, w in parts)
    floats = last.scale.floats
    if "step" in floats:
        changed = {"step": jnp.repeat(floats["step"], 2, axis=0)}
    else:
        changed = {"whole": 2 * floats["whole"]}
    other = dataclasses.replace(last, scale=last.scale.with_floats(changed))
    assert not isinstance(tensor.concatenate([first, other]).scale, tensor.Encoded)


@every
@pytest.mark.parametrize("spec", [P("model"), P(None, "model"), P("data", "model")])
def test_devices_multiply_their_own(form, spec):
    matrix, w = sample(form, k=1024)
    axis = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "model"), (axis, axis))
    placed = sharding.shard(w, mesh, spec)
    shares = [1 if s is None else 2 for s in (*spec, None)[:2]]
    for array in jax.tree.leaves(placed.scale):
        pieces = array.sharding.shard_shape(array.shape)
        assert pieces == tuple(
            a // b for a, b in zip(array.shape, shares[: array.ndim], strict=True)
        )
    x = rows(4, 1024)
    y = jax.jit(qjax.matmul)(jnp.asarray(x), placed)
    assert relative_error(y, matrix.matmul(x)) < 1e-5
    of_steps = jax.jit(float_gradients)(placed, jnp.asarray(x))
    chex.assert_trees_all_close(
        of_steps, float_gradients(w, jnp.asarray(x)), rtol=1e-3, atol=1e-2
    )


def test_runs_are_not_cut():
    _, w = sample(OFFSET, k=512)  # 4 runs of 128 rows
    mesh = jax.make_mesh((8,), ("model",))
    with pytest.raises(ValueError, match="has 4 pieces of 128 rows in Tiles"):
        sharding.shard(w, mesh, P("model"))


def test_one_run_serves_pieces_of_it():
    matrix, w = sample(OFFSET | {"group_size": 64}, k=256)
    assert w.scale.step.shape[0] == 1
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    placed = sharding.shard(w, mesh, P("model"))
    assert placed.scale.step.sharding.is_fully_replicated
    x = rows(2, 256)
    y = jax.jit(qjax.matmul)(jnp.asarray(x), placed)
    assert relative_error(y, matrix.matmul(x)) < 1e-5
    of_steps = jax.jit(float_gradients)(placed, jnp.asarray(x))
    expected = float_gradients(w, jnp.asarray(x))
    chex.assert_trees_all_close(of_steps, expected, rtol=1e-3, atol=1e-2)


@every
def test_on_explicit_axes(form):
    matrix, w = sample(form, k=1024)
    mesh = jax.make_mesh((2,), ("model",))
    x = rows(4, 1024)
    with jax.set_mesh(mesh):
        placed = sharding.shard(w, mesh, P("model"))
        here = jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(None, "model")))
        y = jax.jit(qjax.matmul)(here, placed)
        of_steps = jax.jit(float_gradients)(placed, here)
    assert relative_error(y, matrix.matmul(x)) < 1e-5
    expected = float_gradients(w, jnp.asarray(x))
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, of_steps), expected, rtol=1e-3, atol=1e-2
    )


@every
def test_rows_of_a_table(form):
    _, w = sample(form)
    index = jnp.array([3, 90, 0])
    found = embedding.lookup(w, index, None)
    chex.assert_trees_all_equal(found, decode.dequantize(w).T[index])


@every
@pytest.mark.usefixtures("as_on_gpu")
class TestLayers:
    """One array of the scales is a parameter, and no integers are."""

    def test_nnx(self, form):
        _, w = sample(form)
        layer = nnx.Linear.from_qtensor(w, dtype=jnp.bfloat16)
        x = jnp.asarray(rows(3, 512), BF16)
        chex.assert_trees_all_equal(layer(x), qjax.matmul(x, w))

        def loss(layer):
            return (layer(x).astype(jnp.float32) ** 2).sum() / 1024

        found = flax.nnx.to_pure_dict(flax.nnx.grad(loss)(layer))["packed"]
        expected = float_gradients(w, x)
        chex.assert_trees_all_close(found, expected, rtol=2e-3, atol=1e-6)

    def test_linen(self, form):
        _, w = sample(form)
        variables = linen.to_variables({"kernel": w})
        chex.assert_trees_all_equal(linen.to_params(variables)["kernel"], w)
        layer = linen.Dense(96, use_bias=False, dtype=jnp.bfloat16)
        x = jnp.asarray(rows(3, 512), BF16)
        chex.assert_trees_all_equal(layer.apply(variables, x), qjax.matmul(x, w))

        def loss(params):
            y = layer.apply({**variables, "params": params}, x)
            return (y.astype(jnp.float32) ** 2).sum() / 1024

        found = jax.grad(loss)(variables["params"])["kernel"]["scale"]
        chex.assert_trees_all_close(found, float_gradients(w, x)["scale"], rtol=2e-3)
        stored = serialization.to_bytes(variables)
        empty = jax.tree.map(jnp.zeros_like, variables)
        again = serialization.from_bytes(empty, stored)
        chex.assert_trees_all_equal(again, variables)
        stepped = training.with_kernels(variables, linen.to_params(variables))
        chex.assert_trees_all_equal(stepped, variables)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("spec", [P(None, "model"), P("model")], ids=str)
@pytest.mark.parametrize("name", ["output", "blk.0.ffn_gate"])
def test_pieces_of_a_file(name, spec):
    mesh = jax.make_mesh((2,), ("model",))

    def place(found):
        return NamedSharding(mesh, spec if found == name else P())

    w = checkpoints.lazy(GGUF, sharding=place)[name]
    assert isinstance(w.scale, tensor.Nested)
    # Of 256 inputs, which are one run, devices share the steps.
    assert w.scale.step.is_fully_replicated == (spec == P("model"))
    assert not w.scale.factor.is_fully_replicated
    whole = checkpoints.lazy(GGUF, prepare=False)[name]
    chex.assert_trees_all_equal(qjax.dequantize(w), qjax.dequantize(whole))
