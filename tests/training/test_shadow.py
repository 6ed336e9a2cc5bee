"""`qjax.training.shadow`: the gradient of integers, under every transformation."""

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import mbwq
from qjax.training import shadow
from tests import oracle
from tests.goldens import arrays

GOLDEN = Path(__file__).parents[1] / "golden" / "mbwq"
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
STORED = ("qweight", "scales", "zeros", "q_perm", "q_groups")
M, K, N = 8, 64, 16


@functools.cache
def layer(name: str) -> tuple[qjax.QTensor, dict]:
    data = arrays(GOLDEN / f"{name}.npz")
    tensors = {key: data[key] for key in STORED if key in data}
    tensors["channel_scale"] = data["channel_scale"].reshape(1, 1, -1)
    size = json.loads(str(data["meta"])).get("group_size")
    config = mbwq.Config(group_size=None if "q_groups" in data else size)
    return qjax.prepare(mbwq.from_tensors(tensors, config)), data


@pytest.mark.parametrize("name", FILES)
def test_is_the_privileged_gradient_of_bitorch_engine(name):
    w, data = layer(name)

    @jax.jit
    def pull(x, dy):
        product = functools.partial(shadow.matmul, w=w)
        y, back = jax.vjp(lambda x, s: product(x, shadow=s), x, shadow.zeros(w))
        return y, *back(dy)

    y, dx, dw = pull(jnp.asarray(data["x"]), jnp.asarray(data["grad_y"]))
    chex.assert_trees_all_equal(y, qjax.matmul(jnp.asarray(data["x"]), w))
    # Tolerances of the files' page: float16 results of sums in another order.
    for found, wanted, tolerance in [
        (dw, data["privileged_grad"], 2e-3),
        (dx, data["grad_x"], 1e-3),
    ]:
        exact = wanted.astype(np.float64)
        atol = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(np.asarray(found), exact, rtol=0, atol=atol)
    assert (dw.dtype, dx.dtype) == (jnp.float32, jnp.float16)


@pytest.fixture(scope="module")
def problem():
    """A loss of shadow and inputs, its data, and its gradient in float64."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(M, K)), rng.normal(size=(M, N))
    w = qjax.quantize(jnp.asarray(rng.normal(size=(K, N)), jnp.float32), group_size=32)
    dense = np.asarray(qjax.dequantize(w), np.float64)
    gradient = 2 * x.T @ (x @ dense - target)
    x, target = jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.float32)

    def loss(s, x, target):
        return ((shadow.matmul(x, w, s) - target) ** 2).sum()

    return loss, w, x, target, gradient


def close(found, wanted):
    # Sums of at most M * K products in float32.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


class TestTransformations:
    def test_jit(self, problem):
        loss, w, x, target, wanted = problem
        close(jax.jit(jax.grad(loss))(shadow.zeros(w), x, target), wanted)

    def test_vmap(self, problem):
        loss, w, x, target, wanted = problem
        per_row = jax.vmap(jax.grad(loss), (None, 0, 0))
        found = jax.jit(per_row)(shadow.zeros(w), x[:, None], target[:, None])
        assert found.shape == (M, K, N)
        close(found.sum(0), wanted)

    def test_microbatches_add_up(self, problem):
        loss, w, x, target, wanted = problem

        @jax.jit
        @jax.grad
        def scanned(s, x, target):
            # Also under remat, which computes the forward product twice.
            one = jax.checkpoint(loss)
            step = lambda total, batch: (total + one(s, *batch), None)  # noqa: E731
            return jax.lax.scan(step, 0.0, (x, target))[0]

        batches = [a.reshape(4, 2, -1) for a in (x, target)]
        close(scanned(shadow.zeros(w), *batches), wanted)

    def test_stacked_layers(self, problem):
        _, w, x, target, wanted = problem
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)

        @jax.jit
        @jax.grad
        def both(s):
            product = jax.vmap(shadow.matmul, (None, 0, 0))
            return ((product(x, stack, s) - target[None]) ** 2).sum()

        shadows = shadow.zeros(stack)
        assert shadows.shape == (2, K, N)
        close(both(shadows), np.stack([wanted, wanted]))

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, problem, check_vma):
        loss, w, x, target, wanted = problem
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def local(s, x, target):
            gradient = jax.grad(loss)(s, x, target)
            # Where the axes are tracked, the gradient of what all devices share is
            # summed already.
            return gradient if check_vma else jax.lax.psum(gradient, "data")

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
        close(jax.jit(mapped)(shadow.zeros(w), x, target), wanted)

    def test_pmap(self, problem):
        loss, w, x, target, wanted = problem

        def local(s, x, target):
            return jax.lax.psum(jax.grad(loss)(s, x, target), "data")

        mapped = jax.pmap(local, axis_name="data", in_axes=(None, 0, 0))
        found = mapped(shadow.zeros(w), x[:, None], target[:, None])
        assert len(found) == M
        close(found[0], wanted)

    @pytest.mark.usefixtures("optax_promotion")
    def test_multi_steps(self, problem):
        loss, w, x, target, wanted = problem
        optimizer = optax.MultiSteps(optax.sgd(1.0), 4, use_grad_mean=False)
        zeros = shadow.zeros(w)
        state, gradient = optimizer.init(zeros), jax.jit(jax.grad(loss))
        for i in range(0, M, 2):
            g = gradient(zeros, x[i : i + 2], target[i : i + 2])
            updates, state = optimizer.update(g, state)
        close(-updates, wanted)


def test_zeros_made_inside_take_no_memory(problem):
    _, _, x, _, _ = problem
    w = qjax.quantize(jnp.ones((1024, 1024)), group_size=128)
    x = jnp.ones((1, 1024))
    size = 4 * 1024 * 1024

    def temporaries(forward):
        memory = jax.jit(forward).lower(x, w).compile().memory_analysis()
        return memory.temp_size_in_bytes

    with_shadow = temporaries(lambda x, w: shadow.matmul(x, w, shadow.zeros(w)))
    assert with_shadow == temporaries(qjax.matmul) < size


def test_accumulates_in_float32():
    # In bfloat16 a sum of 1024 ones and as many 2**-9 would stay at 1024.
    w = qjax.quantize(jnp.ones((32, 8)), group_size=32)
    rows = jnp.concatenate([jnp.ones((1024, 32)), jnp.full((1024, 32), 2.0**-9)])
    x = rows.astype(jnp.bfloat16)
    loss = lambda s: shadow.matmul(x, w, s).astype(jnp.float32).sum()  # noqa: E731
    assert (jax.grad(loss)(shadow.zeros(w)) == 1026).all()
    half = jax.grad(loss)(shadow.zeros(w, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("made", [{"order": True}, {"input_scale": True}])
def test_rows_are_those_of_the_inputs(made, as_qtensor):
    matrix = oracle.random(1, K, N, **made)
    w = as_qtensor(matrix)
    x = np.random.default_rng(2).normal(size=(M, K)).astype(np.float32)
    scaled = x if matrix.input_scale is None else x * matrix.input_scale
    found = jax.grad(lambda s: shadow.matmul(jnp.asarray(x), w, s).sum())(
        shadow.zeros(w)
    )
    close(found, scaled.T.astype(np.float64) @ np.ones((M, N)))


def test_scaled_inputs_beyond_the_range_of_float16(as_qtensor):
    w = as_qtensor(oracle.random(1, K, N))
    w = dataclasses.replace(w, input_scale=jnp.full(K, 100, jnp.float16))
    x = jnp.full((M, K), 1000, jnp.float16)
    loss = lambda s: shadow.matmul(x, w, s).astype(jnp.float32).sum()  # noqa: E731
    found = jax.grad(loss)(shadow.zeros(w))
    close(found, np.full((K, N), M * 1e5))


def test_all_other_gradients_are_those_of_matmul(as_qtensor):
    matrix = oracle.random(1, K, N, affine="OFFSET", input_scale=True, order=True)
    w, x = as_qtensor(matrix), jnp.ones((M, K))

    def gradients(product):
        loss = lambda x, w: jnp.sin(product(x, w)).sum()  # noqa: E731
        dx, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
        return dx, dw.scale, dw.zero, dw.input_scale

    found = gradients(lambda x, w: shadow.matmul(x, w, shadow.zeros(w)))
    chex.assert_trees_all_equal(found, gradients(qjax.matmul))


def test_what_fits_no_weight_is_refused(problem, refuses):
    _, w, x, _, _ = problem
    with refuses("shadow must be float (64, 16), as w; got float32(16, 64)"):
        shadow.matmul(x, w, jnp.zeros((N, K)))
    with refuses("got int32(64, 16)"):
        shadow.matmul(x, w, jnp.zeros((K, N), jnp.int32))
    with refuses("must end in k=64"):
        shadow.matmul(x[:, 1:], w, shadow.zeros(w))
