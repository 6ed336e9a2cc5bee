"""Weights that tell of their inputs, under what a program may do with a product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.layers import embedding
from qjax.layers.tracing import products
from qjax.watched import Watched, bare, watch

K, N, ROWS, STACK = 32, 16, 12, 3
# Sums of float32 in another order.
FLOAT32 = 1e-6


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def weight(*stack):
    return qjax.quantize(draw(*stack, K, N), bits=4, group_size=32)


def gram(x):
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return rows.T @ rows


def seen(w, function):
    """What the watched weight says of a function of it."""
    empty = jnp.zeros((*w.batch, w.k, w.k))
    return jax.jit(jax.grad(lambda gram: function(watch(w, gram)).sum()))(empty)


def same(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == jnp.float32
    off = np.abs(np.asarray(found, np.float64) - expected).max()
    assert off <= FLOAT32 * np.abs(expected).max()


def test_a_watched_weight_is_a_qtensor_and_its_values_do_not_count():
    w, x = weight(), draw(ROWS, K)
    watched = watch(w, jnp.full((K, K), jnp.nan))
    assert isinstance(jax.tree.map(lambda leaf: leaf, watched), Watched)
    assert type(bare(watched)) is qjax.QTensor
    assert bare(w) is w
    np.testing.assert_array_equal(qjax.matmul(x, watched), qjax.matmul(x, w))
    np.testing.assert_array_equal(qjax.dequantize(watched), qjax.dequantize(w))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_gradient_is_the_gram_whatever_the_other_factor(dtype):
    x = draw(2, ROWS, K, dtype=dtype)
    # Also where the cotangent of the outputs is nothing but zeros.
    same(seen(weight(), lambda w: 0 * qjax.matmul(x, w)), gram(x))


def test_other_gradients_are_what_they_were():
    w, x = weight(), draw(ROWS, K)

    def loss(x, scale, w):
        return (qjax.matmul(x, dataclasses.replace(w, scale=scale)) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    watched = gradients(x, w.scale, watch(w, jnp.zeros((K, K))))
    jax.tree.map(np.testing.assert_array_equal, watched, gradients(x, w.scale, w))


def test_uses_add_up_and_a_matrix_of_a_stack_has_its_own():
    w, x, y = weight(STACK), draw(ROWS, K), draw(2, ROWS, K)

    def function(w):
        one = qjax.matmul(x, w, index=1) + qjax.matmul(y, w, index=1).sum(0)
        return one + qjax.matmul(y, w, index=jnp.int32(7))[0]  # clamped

    found = seen(w, function)
    same(found, [np.zeros((K, K)), gram(x) + gram(y), gram(y)])


def test_mapped_products():
    w, xs = weight(STACK), draw(STACK, ROWS, K)
    each = np.stack([gram(x) for x in xs])
    same(seen(w, lambda w: jax.vmap(qjax.matmul)(xs, w)), each)
    shared = jax.vmap(qjax.matmul, in_axes=(None, 0))
    same(seen(w, lambda w: shared(xs[0], w)), np.stack([each[0]] * STACK))
    rows = jax.vmap(qjax.matmul, in_axes=(0, None))
    same(seen(weight(), lambda w: rows(xs, w)), each.sum(0))


def test_a_branch_that_is_not_taken_adds_nothing():
    x = draw(ROWS, K)

    def function(w, taken):
        return jax.lax.cond(
            taken, lambda: qjax.matmul(x, w), lambda: jnp.zeros((ROWS, N))
        )

    same(seen(weight(), lambda w: function(w, jnp.array(True))), gram(x))
    assert not seen(weight(), lambda w: function(w, jnp.array(False))).any()


def test_a_model_that_is_itself_a_gradient():
    x = draw(ROWS, K)
    energy = lambda x, w: (qjax.matmul(x, w) ** 2).sum()  # noqa: E731
    same(seen(weight(), lambda w: jax.grad(energy)(x, w)), gram(x))


@pytest.mark.parametrize("sizes", [(5, 0, 7), (3, 0, 2), (9, 9, 9), (0, 0, 0)])
def test_each_expert_sees_its_own_rows(sizes):
    x, ends = draw(ROWS, K), np.minimum(np.cumsum(sizes), ROWS)
    found = seen(
        weight(STACK), lambda w: qjax.ragged_matmul(x, w, jnp.array(sizes, jnp.int32))
    )
    same(found, [gram(x[s:e]) for s, e in zip([0, *ends], ends, strict=False)])


def test_no_experts_without_tokens():
    sizes = jnp.zeros(STACK, jnp.int32)
    found = seen(
        weight(STACK), lambda w: qjax.ragged_matmul(jnp.zeros((0, K)), w, sizes)
    )
    assert not found.any()


def test_what_has_no_rows_of_the_matrix_adds_nothing():
    uses = [
        lambda w: products.transposed(draw(ROWS, N), w),
        lambda w: embedding.lookup(w, jnp.arange(3), None),
        qjax.dequantize,
    ]
    for use in uses:
        assert not seen(weight(), use).any()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    w, x = weight(), draw(2, ROWS, K)
    with jax.set_mesh(mesh):
        cut = qjax.shard(w, mesh, P("model", None))
        rows = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        same(seen(cut, lambda w: qjax.matmul(rows, w)), gram(x))


def test_in_a_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = draw(ROWS, K)
    mapped = jax.shard_map(
        qjax.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    same(seen(weight(), lambda w: mapped(x, w)), gram(x))
