"""Stacks that are cut along their experts: each device multiplies by its own."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import blocks, dispatch, ops, pallas, ragged, tensor
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from qjax.layers import linen, nnx
from qjax.watched import watch
from tests import oracle
from tests.oracle import relative_error
from tests.samples import in_tiles, random_matrix
from tests.test_sharding import EXPLICIT, MESH, TOLERANCE, communicated, place

EXPERTS, T, K, N = 8, 37, 128, 64
SIZES = jnp.array([5, 0, 11, 1, 0, 0, 9, 7])  # and four tokens of none
KINDS = {
    "order and input scale": {"order": True, "input_scale": True},
    "act-order": {"row_group": True},
    "mixed": {"parts": [(6, 64, 32), (3, 64, 32)], "affine": "CENTERED"},
    "codebook": {"affine": "CODEBOOK"},
    "float zero and input scale": {"affine": "OFFSET", "input_scale": True},
}
FORMS = {
    "Q4_K": {"bits": 4, "group_size": 32, "affine": "OFFSET", "scale": "nested"},
    "NVFP4": {"bits": 4, "group_size": 16, "affine": "FLOAT", "scale": "over global"},
}


def named(value):
    """What a case is called."""
    names = {MESH: "automatic", EXPLICIT: "explicit"}
    return names[value] if isinstance(value, jax.sharding.Mesh) else str(value)


MESHES = pytest.mark.parametrize("mesh", [MESH, EXPLICIT], ids=named)


@functools.cache
def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stack_of(kind, as_qtensor, layout=None):
    matrices = [oracle.random(i, K, N, **KINDS[kind]) for i in range(EXPERTS)]
    return qjax.stack([as_qtensor(matrix, layout) for matrix in matrices])


@jax.jit
def step(x, w, dy):
    """The products, and the gradients of all that is a float."""
    y, back = jax.vjp(lambda x, w: qjax.ragged_matmul(x, w, SIZES), x, w)
    return y, *back(dy)


def assert_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(a, b)


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if a.dtype != jax.dtypes.float0:
            assert relative_error(a, b) < TOLERANCE


@MESHES
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_device(kind, mesh, as_qtensor):
    """Bit for bit: a token has one summand that is not zero."""
    whole, dy = stack_of(kind, as_qtensor), drawn(T, N, seed=1)
    w = qjax.shard(whole, mesh, P("model"))
    x = place(drawn(T, K), P(), mesh)
    found = step(x, w, dy)
    assert_equal(found, step(drawn(T, K), whole, dy))
    for leaf, gradient in zip(
        jax.tree.leaves(w), jax.tree.leaves(found[2]), strict=True
    ):
        if gradient.dtype != jax.dtypes.float0:
            assert gradient.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@MESHES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scales_in_two_levels(form, mesh):
    """What the kernels read of GGUF's blocks and of NVFP4: all leaves are cut."""
    matrices = [random_matrix(i, 256, N, **form) for i in range(EXPERTS)]
    whole = qjax.stack([in_tiles(matrix) for matrix in matrices])
    assert isinstance(whole.scale, tensor.Levels)
    w = qjax.shard(whole, mesh, P("model"))
    for leaf in jax.tree.leaves(w):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == EXPERTS // 4
    x, dy = drawn(T, 256), drawn(T, N, seed=1)
    (*found, dw), (*wanted, dw_alone) = (
        step(place(x, P(), mesh), w, dy),
        step(x, whole, dy),
    )
    assert_equal(found, wanted)
    # Sums over all of a matrix, in an order that depends on how many there are.
    assert_close(dw, dw_alone)


@pytest.mark.parametrize(
    ("mesh", "kind", "spec", "of_x"),
    [
        (MESH, "order and input scale", P("model", "data"), P()),
        (EXPLICIT, "order and input scale", P("model", "data"), P("data")),
        (MESH, "float zero and input scale", P("model", "data"), P(None, "model")),
        (EXPLICIT, "float zero and input scale", P("model", None, "data"), P("data")),
        (MESH, "codebook", P(("data", "model")), P("data", "model")),
    ],
    ids=named,
)
def test_with_other_cuts(mesh, kind, spec, of_x, as_qtensor):
    whole, dy = stack_of(kind, as_qtensor), drawn(36, N, seed=1)
    x = drawn(36, K)
    w = qjax.shard(whole, mesh, spec)
    assert_close(step(place(x, of_x, mesh), w, dy), step(x, whole, dy))


@MESHES
@pytest.mark.parametrize("spec", [P("model"), P("model", "data", None)], ids=str)
def test_second_derivatives(spec, mesh, as_qtensor):
    whole = stack_of("order and input scale", as_qtensor)
    w, x = qjax.shard(whole, mesh, spec), drawn(T, K)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def second(x, scale, w):
        def loss(x, scale):
            held = dataclasses.replace(w, scale=scale)
            return jnp.sin(qjax.ragged_matmul(x, held, SIZES)).sum()

        found = jax.grad(loss, (0, 1))(x, scale)
        return sum((gradient**2).sum() for gradient in found)

    found = second(place(x, P(), mesh), w.scale, w)
    assert_close(found, second(x, whole.scale, whole))
    assert found[1].sharding.is_equivalent_to(w.scale.sharding, w.scale.ndim)
    # Sums of what belongs to tokens; words and scales stay.
    moved = communicated(second, place(x, P(), mesh), w.scale, w)
    assert set(moved) == {"all-reduce"}


class TestCommunication:
    @MESHES
    def test_one_sum_of_products_and_one_of_cotangents(self, mesh, as_qtensor):
        w = stack_of("order and input scale", as_qtensor)
        w = qjax.shard(w, mesh, P("model"))
        x, dy = place(drawn(T, K), P(), mesh), drawn(T, N, seed=1)
        moved = communicated(qjax.ragged_matmul, x, w, SIZES)
        assert moved == {"all-reduce": 4 * T * N}
        # The gradients of scales are where the scales are.
        moved = communicated(lambda *a: step(*a)[1:], x, w, dy)
        assert moved == {"all-reduce": 4 * T * K}

    def test_with_columns(self, as_qtensor):
        w = stack_of("codebook", as_qtensor)
        w = qjax.shard(w, MESH, P("model", None, "data"))
        moved = communicated(qjax.ragged_matmul, place(drawn(T, K), P()), w, SIZES)
        assert moved == {"all-reduce": 4 * T * N // 2}

    def test_layers_of_a_scan(self, as_qtensor):
        one = stack_of("codebook", as_qtensor)
        layers = qjax.shard(qjax.stack([one] * 3), MESH, P(None, "model"))

        def scanned(x, layers):
            y = lambda x, w: (x, qjax.ragged_matmul(x, w, SIZES))  # noqa: E731
            return jax.lax.scan(y, x, layers)[1]

        x = place(drawn(T, K), P())
        assert communicated(scanned, x, layers) == {"all-reduce": 4 * T * N}
        wanted = qjax.ragged_matmul(drawn(T, K), one, SIZES)
        np.testing.assert_array_equal(jax.jit(scanned)(x, layers)[1], wanted)

    def test_memory(self, as_qtensor):
        w = qjax.shard(stack_of("codebook", as_qtensor), MESH, P("model"))
        x = place(drawn(T, K), P())
        plan = jax.jit(qjax.ragged_matmul).lower(x, w, SIZES).compile()
        found = plan.memory_analysis().argument_size_in_bytes
        assert found == w.nbytes // 4 + x.nbytes + SIZES.nbytes


class TestWork:
    def test_a_device_visits_its_own_blocks(self, as_qtensor, monkeypatch):
        """Explicit axes: what XLA partitions by itself holds no callbacks."""
        visited = collections.Counter()
        each = {
            name: getattr(dispatch, name)
            for name in ("multiply", "multiply_t", "leaf_gradients")
        }

        def counted(name, *operands):
            jax.debug.callback(lambda: visited.update([name]))
            return each[name](*operands)

        for name in each:
            patched = functools.partial(counted, name)
            monkeypatch.setattr(dispatch, name, patched)
        # Nothing is taken that was traced before.
        monkeypatch.setattr(ragged, "_apply", ragged._apply.__wrapped__)

        @jax.jit
        def run(*operands):
            return step.__wrapped__(*operands)

        whole = stack_of("codebook", as_qtensor)
        x, dy = drawn(T, K), drawn(T, N, seed=1)
        jax.block_until_ready(run(x, whole, dy))
        jax.effects_barrier()
        on_one = dict(visited)
        # Eight rows a block.
        held = sum(-(-int(size) // 8) for size in SIZES)
        assert set(on_one.values()) == {held}
        visited.clear()
        w = qjax.shard(whole, EXPLICIT, P(("data", "model")))
        jax.block_until_ready(run(place(x, P(), EXPLICIT), w, dy))
        jax.effects_barrier()
        assert visited == on_one

    def test_one_launch_leaves_out_the_blocks_of_others(self):
        """What a GPU's kernel is told of every block: a matrix that it has, or -1."""
        planned = blocks.plan(SIZES, T)
        experts = [0, 2, 2, 3, 6, 6, 7]
        for first in range(0, EXPERTS, 2):
            numbers = jnp.arange(first, first + 2)
            matrix = blocks.Share.of(planned, numbers).matrix.tolist()
            wanted = [e - first if e in (first, first + 1) else -1 for e in experts]
            assert matrix[: len(wanted)] == wanted
            assert set(matrix[len(wanted) :]) == {-1}


@MESHES
def test_watched_inputs(mesh, as_qtensor):
    whole = stack_of("codebook", as_qtensor)
    w, x = qjax.shard(whole, mesh, P("model")), place(drawn(T, K), P(), mesh)

    @jax.jit
    @jax.grad
    def gram(empty, x, w):
        return qjax.ragged_matmul(x, watch(w, empty), SIZES).sum()

    empty = jnp.zeros((EXPERTS, K, K))
    np.testing.assert_allclose(
        gram(empty, x, w), gram(empty, drawn(T, K), whole), rtol=1e-6
    )


@MESHES
def test_vmap(mesh, as_qtensor):
    whole = stack_of("order and input scale", as_qtensor)
    x, w = drawn(3, T, K), qjax.shard(whole, mesh, P("model"))
    sizes = jnp.stack([SIZES, SIZES[::-1], jnp.zeros_like(SIZES)])
    mapped = jax.jit(jax.vmap(qjax.ragged_matmul, (0, None, 0)))
    found = mapped(place(x, P(), mesh), w, sizes)
    np.testing.assert_array_equal(found, mapped(x, whole, sizes))


@pytest.mark.parametrize("transform", ["shard_map", "pmap"])
def test_a_share_is_a_stack_of_its_own(transform, as_qtensor):
    """Inside, sizes are those of the experts that a device has, from its first."""
    whole, x = stack_of("codebook", as_qtensor), drawn(4, 12, K)
    shares = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (whole, SIZES))
    if transform == "pmap":
        run = jax.pmap(qjax.ragged_matmul, devices=jax.devices("cpu")[:4])
        found = run(x, *shares)
    else:
        specs = P("model"), qjax.partition_specs(whole, MESH, P("model")), P("model")
        run = jax.shard_map(
            qjax.ragged_matmul, mesh=MESH, in_specs=specs, out_specs=P("model")
        )
        found = jax.jit(run)(x.reshape(-1, K), whole, SIZES).reshape(4, 12, N)
    for i in range(4):
        w, sizes = jax.tree.map(lambda a, i=i: a[i], shares)
        np.testing.assert_array_equal(found[i], qjax.ragged_matmul(x[i], w, sizes))


@pytest.mark.parametrize("experts", [2, 6])
def test_experts_that_devices_cannot_share(experts, as_qtensor, refuses):
    """Refused where they are placed; where XLA is left to place them, gathered."""
    each = [as_qtensor(oracle.random(i, K, N)) for i in range(experts)]
    stack, sizes = qjax.stack(each), jnp.array([5, 7, 3, 0, 4, 4][:experts])
    with refuses(f"has {experts} matrices there, which 4 devices cannot share evenly"):
        qjax.shard(stack, MESH, P("model"))

    @jax.jit
    def product(x, w):
        cut = lambda a: jax.lax.with_sharding_constraint(  # noqa: E731
            a, NamedSharding(MESH, P("model"))
        )
        return qjax.ragged_matmul(x, jax.tree.map(cut, w), sizes)

    wanted = qjax.ragged_matmul(drawn(T, K), stack, sizes)
    found = product(place(drawn(T, K), P()), qjax.shard(stack, MESH, P()))
    np.testing.assert_array_equal(found, wanted)


@MESHES
def test_prepared_for_a_gpu(mesh, as_qtensor, monkeypatch):
    """A stack that is cut along its experts is never cut too finely for a kernel."""
    monkeypatch.setattr(ops, "_native_layout", pallas.layout_of)
    whole = stack_of("codebook", as_qtensor)
    moved = qjax.prepare(qjax.shard(whole, mesh, P("model")))
    assert moved.layout == pallas.layout_of(whole)
    for leaf in jax.tree.leaves(moved):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == EXPERTS // 4
    x = drawn(T, K).astype(jnp.bfloat16)
    found = qjax.ragged_matmul(place(x, P(), mesh), moved, SIZES)
    wanted = qjax.ragged_matmul(x, qjax.prepare(whole), SIZES)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("module", "mesh"), [("nnx", EXPLICIT), ("linen", MESH)], ids=named
)
def test_layers(module, mesh, as_qtensor):
    """A mixture whose experts, and their biases, each lie on one device."""
    whole, bias = stack_of("codebook", as_qtensor), drawn(EXPERTS, N, seed=2)
    x, expert = drawn(12, K), jnp.arange(24).reshape(12, 2) % EXPERTS
    weight = jnp.full((12, 2), 0.5)

    def routed(kernel, bias, x):
        if module == "nnx":
            layer = nnx.Experts.from_qtensor(kernel, bias)
            return layer.route(x, expert, weight)
        variables = linen.to_variables({"kernel": kernel, "bias": bias})
        layer = linen.Experts(EXPERTS, N)
        return layer.apply(variables, x, expert, weight, method="route")

    cut = qjax.shard(whole, mesh, P("model")), place(bias, P("model"), mesh)
    x_placed = place(x, P(), mesh)
    np.testing.assert_array_equal(routed(*cut, x_placed), routed(whole, bias, x))
    # Biases are small: where every device has them, one sum is all that moves.
    everywhere = cut[0], place(bias, P(), mesh)
    moved = communicated(lambda x, w, b: routed(w, b, x), x_placed, *everywhere)
    assert moved == {"all-reduce": 4 * expert.size * N}


class TestByIndex:
    """One matrix of a stack that is cut along it."""

    @MESHES
    @pytest.mark.parametrize("kind", ["order and input scale", "mixed"])
    def test_equals_one_device(self, kind, mesh, as_qtensor):
        whole, dy = stack_of(kind, as_qtensor), drawn(T, N, seed=1)
        w, x = qjax.shard(whole, mesh, P("model")), drawn(T, K)

        @jax.jit
        def step(x, w, i):
            y, back = jax.vjp(lambda x, w: qjax.matmul(x, w, index=i), x, w)
            return y, *back(dy)

        found = step(place(x, P(), mesh), w, 5)
        assert_close(found, step(x, whole, 5))
        assert found[2].scale.sharding.is_equivalent_to(w.scale.sharding, 3)

    @pytest.mark.parametrize(
        ("layout", "mesh"), [(Stream(), MESH), (Tiles(), EXPLICIT)], ids=named
    )
    def test_one_sum_is_all_that_moves(self, layout, mesh, as_qtensor):
        w = stack_of("act-order", as_qtensor, layout)
        w = qjax.shard(w, mesh, P("model"))
        x, dy = place(drawn(T, K), P(), mesh), drawn(T, N, seed=1)

        def gradients(x, w, i):
            product = lambda x, w: qjax.matmul(x, w, index=i)  # noqa: E731
            return jax.vjp(product, x, w)[1](dy)

        by_index = lambda x, w, i: qjax.matmul(x, w, index=i)  # noqa: E731
        assert communicated(by_index, x, w, 5) == {"all-reduce": 4 * T * N}
        assert communicated(gradients, x, w, 5) == {"all-reduce": 4 * T * K}

    def test_nothing_of_another_matrix_counts(self, as_qtensor):
        """Also where it holds what is no number."""
        whole = stack_of("codebook", as_qtensor)
        scale = whole.scale.at[jnp.array([0, 1, 3, 4, 6, 7])].set(jnp.nan)
        w = qjax.shard(dataclasses.replace(whole, scale=scale), MESH, P("model"))
        found = qjax.matmul(drawn(T, K), w, index=5)
        wanted = qjax.matmul(drawn(T, K), whole, index=5)
        np.testing.assert_array_equal(found, wanted)
