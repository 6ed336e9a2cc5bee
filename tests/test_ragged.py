"""`qjax.ragged_matmul` against float64, expert by expert."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax import blocks, dispatch, ragged
from qjax.formats.tiles import Tiles
from tests import oracle
from tests.layers import cases

EXPERTS, K, N = 4, 64, 40
# Relative to the largest value: summation order in float32.
TOLERANCE = 1e-5
# Tokens, and those of each expert.
SIZES = {
    "ragged": (37, (5, 17, 1, 14)),
    "empty experts": (37, (0, 30, 0, 7)),
    "one expert": (37, (0, 0, 37, 0)),
    "tokens without an expert": (37, (3, 0, 9, 2)),
    "no tokens of any": (5, (0, 0, 0, 0)),
    "whole blocks": (64, (16, 16, 16, 16)),
    "decode": (2, (0, 1, 0, 1)),
    "one token": (1, (0, 0, 0, 1)),
    "more than there are": (8, (2, 3, 9, 4)),
}
KINDS = {
    "uniform": {},
    "order and input scale": {"order": True, "input_scale": True},
    "act-order": {"row_group": True},
    "mixed": {"parts": [(6, 32, 32), (3, 32, 16)], "affine": "CENTERED"},
    "codebook": {"affine": "CODEBOOK"},
    "float zero": {"affine": "OFFSET"},
}


@functools.cache
def matrices(kind: str) -> list[oracle.Matrix]:
    return [oracle.random(i, K, N, **KINDS[kind]) for i in range(EXPERTS)]


def stack(kind: str, as_qtensor, layout=None) -> qjax.QTensor:
    each = [as_qtensor(matrix, layout) for matrix in matrices(kind)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def tokens(t: int, seed: int = 0, width: int = K) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(t, width)).astype(np.float32)


def runs(t: int, sizes: tuple[int, ...]) -> list[slice]:
    ends = np.minimum(np.cumsum(sizes), t)
    return [slice(*bounds) for bounds in zip([0, *ends], ends, strict=False)]


def product(kind: str, x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    y = np.zeros((len(x), N))
    for run, matrix in zip(runs(len(x), sizes), matrices(kind), strict=True):
        y[run] = matrix.matmul(x[run])
    return y


def close(found, expected, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error <= tolerance * max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, as_qtensor):
    t, sizes = SIZES[name]
    w, x = stack("order and input scale", as_qtensor), tokens(t)
    found = qjax.ragged_matmul(jnp.asarray(x), w, jnp.array(sizes))
    close(found, product("order and input scale", x, sizes))
    if sum(sizes) < t:
        assert not found[sum(sizes) :].any()


@pytest.mark.parametrize("kind", ["uniform", "mixed", "order and input scale"])
def test_device_layout(kind, as_qtensor):
    t, sizes = SIZES["empty experts"]
    w, x = stack(kind, as_qtensor, Tiles()), tokens(t)
    found = qjax.ragged_matmul(jnp.asarray(x), w, jnp.array(sizes, jnp.uint8))
    close(found, product(kind, x, sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, as_qtensor):
    t, sizes = SIZES["empty experts"]
    w, x, dy = stack(kind, as_qtensor), tokens(t), tokens(t, 1, N)

    @jax.jit
    def gradients(x, w, dy):
        y, back = jax.vjp(lambda x, w: qjax.ragged_matmul(x, w, jnp.array(sizes)), x, w)
        return y, *back(dy)

    y, dx, dw = gradients(*map(jnp.asarray, (x,)), w, jnp.asarray(dy))
    close(y, product(kind, x, sizes))
    each = zip(runs(t, sizes), matrices(kind), strict=True)
    expected = [matrix.gradients(x[run], dy[run]) for run, matrix in each]
    close(dx, np.concatenate([one.pop("x") for one in expected]))
    for name in expected[0]:
        # Sums over the tokens of an expert; experts without any get zero.
        close(getattr(dw, name), np.stack([one[name] for one in expected]))
        assert not getattr(dw, name)[jnp.array([0, 2])].any()
    assert dw.words[0].dtype == jax.dtypes.float0


SECOND = [
    *[(kind, None, "float32") for kind in KINDS],
    ("mixed", Tiles(), "float32"),
    # Where a GPU's kernels, which have no derivative, would multiply.
    ("order and input scale", Tiles(), "bfloat16"),
    ("float zero", Tiles(), "bfloat16"),
]


@pytest.mark.parametrize(("kind", "layout", "dtype"), SECOND, ids=str)
def test_second_derivatives(kind, layout, dtype, as_qtensor):
    """Of half the square of the tokens' gradient, plus that of scales along some."""
    t, sizes = SIZES["empty experts"]
    w, each = stack(kind, as_qtensor, layout), matrices(kind)
    x = jnp.asarray(tokens(t), dtype)
    kernels = dispatch.goes_to_kernels(w, dispatch.Choice(None, kernels=True))
    assert kernels == (layout == Tiles())
    names = [name for name in each[0].gradients(x[:1], x[:1, :N]) if name != "x"]
    leaves = {name: getattr(w, name) for name in names}
    # The weight is linear in these: with others in their place, it is V.
    linear = [name for name in names if name in ("scale", "zero")]
    others = [
        dataclasses.replace(m, **{name: getattr(m, name)[:, ::-1] for name in linear})
        for m in each
    ]
    along = {name: jnp.stack([getattr(m, name) for m in others]) for name in linear}

    def loss(x, leaves):
        held = dataclasses.replace(w, **leaves)
        y = qjax.ragged_matmul(x, held, jnp.array(sizes))
        return (y.astype(jnp.float32) ** 2).sum() / 2

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def second(x, leaves):
        g, found = jax.grad(loss, (0, 1))(x, leaves)
        moved = sum((found[name] * along[name]).sum() for name in linear)
        return (g.astype(jnp.float32) ** 2).sum() / 2 + moved

    dx, found = second(x, leaves)

    # With y = x W the loss is |y|^2 / 2, the gradients g = y W^T and <x V, y>. That of
    # |g|^2 / 2 is g W by y, and y by g.
    def expected(m, other, x):
        y, v = m.matmul(x), other.matmul(x)
        g = m.gradients(x, y)["x"]
        total = m.gradients(x, m.matmul(g) + v)
        for name, part in other.gradients(x, y).items():
            total[name] += 0 if name in linear else part
        for name, part in m.gradients(g, y).items():
            total[name] += 0 if name == "x" else part
        return total

    rows = np.asarray(x, np.float64)
    wanted = [
        expected(m, other, rows[run])
        for m, other, run in zip(each, others, runs(t, sizes), strict=True)
    ]
    # y, g and dx are rounded one after another.
    tolerance = TOLERANCE if dtype == "float32" else 3 * 2.0**-8
    close(dx, np.concatenate([one["x"] for one in wanted]), tolerance)
    for name in names:
        close(found[name], np.stack([one[name] for one in wanted]), tolerance)


@pytest.mark.parametrize("name", cases.KERNELS)
def test_kernels_of_the_layers(name):
    one = qjax.prepare(cases.kernel(name))
    # Experts of their own: every leaf is turned along its last axis.
    each = [jax.tree.map(lambda a, i=i: jnp.roll(a, i, -1), one) for i in range(3)]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    x, sizes = cases.inputs(rows=11), (4, 0, 5)
    found = qjax.ragged_matmul(x, w, jnp.array(sizes))
    wanted = np.zeros((11, cases.N))
    for run, kernel in zip(runs(11, sizes), each, strict=True):
        wanted[run] = cases.product(x[run], kernel)
    close(found, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_rounded_once(dtype, as_qtensor):
    t, sizes = SIZES["ragged"]
    x = jnp.asarray(tokens(t), dtype)
    w = stack("mixed", as_qtensor)
    found = qjax.ragged_matmul(x, w, jnp.array(sizes))
    assert found.dtype == dtype
    wanted = product("mixed", np.asarray(x, np.float32), sizes)
    close(found, wanted, float(jnp.finfo(dtype).eps) / 2 + TOLERANCE)


def test_agrees_with_ragged_dot(as_qtensor):
    t, sizes = SIZES["tokens without an expert"]
    w, x = stack("uniform", as_qtensor), jnp.asarray(tokens(t))
    dense, sizes = qjax.dequantize(w), jnp.array(sizes)
    wanted = jax.lax.ragged_dot(x, dense, sizes, precision="highest")
    close(qjax.ragged_matmul(x, w, sizes), np.asarray(wanted, np.float64))


class TestTransformations:
    def test_vmap(self, as_qtensor):
        w, x = stack("uniform", as_qtensor), tokens(3 * 8).reshape(3, 8, K)
        sizes = [(1, 2, 3, 2), (0, 0, 8, 0), (4, 0, 0, 1)]
        mapped = jax.jit(jax.vmap(qjax.ragged_matmul, (0, None, 0)))
        found = mapped(jnp.asarray(x), w, jnp.array(sizes))
        expected = [product("uniform", *one) for one in zip(x, sizes, strict=True)]
        close(found, np.stack(expected))

    def test_scan_over_layers_and_remat(self, as_qtensor):
        dense = jnp.asarray(tokens(EXPERTS * K).reshape(EXPERTS, K, K))
        one = qjax.quantize(dense, group_size=32)
        layers = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), one)
        sizes = jnp.array([3, 0, 2, 4])

        @jax.jit
        @jax.grad
        def scanned(x):
            step = lambda x, w: (jnp.sin(qjax.ragged_matmul(x, w, sizes)), None)  # noqa: E731
            return jax.lax.scan(jax.checkpoint(step), x, layers)[0].sum()

        @jax.grad
        def unrolled(x):
            for i in range(2):
                w = jax.tree.map(lambda a, i=i: a[i], layers)
                x = jnp.sin(qjax.ragged_matmul(x, w, sizes))
            return x.sum()

        x = jnp.asarray(tokens(9)) / 8
        close(scanned(x), np.asarray(unrolled(x), np.float64), 1e-4)

    def test_second_derivatives_by_vmap_through_a_scan(self):
        """Every second derivative by two factors of scales of experts."""
        drawn = jnp.asarray(tokens(2 * EXPERTS * K).reshape(2, EXPERTS, K, K))
        layers = qjax.quantize(drawn, group_size=32)
        dense = qjax.dequantize(layers)
        x, sizes = jnp.asarray(tokens(9)) / 8, (3, 0, 2, 4)
        expert = jax.nn.one_hot(np.repeat(range(EXPERTS), sizes), EXPERTS)

        def on_packed(x, layer):
            w, factors = layer
            held = dataclasses.replace(w, scale=w.scale * factors[:, None, None])
            return jnp.sin(qjax.ragged_matmul(x, held, jnp.array(sizes))), None

        def on_dense(x, layer):
            w, factors = layer
            every = jnp.einsum("tk,ekn->ten", x, w, precision="highest")
            return jnp.sin(jnp.einsum("ten,te,e->tn", every, expert, factors)), None

        @functools.partial(jax.jit, static_argnums=0)
        def hessian(step, layers, factors):
            loss = lambda f: jax.lax.scan(step, x, (layers, f))[0].sum()  # noqa: E731
            return jax.jacrev(jax.jacrev(loss))(factors)

        factors = jnp.ones((2, EXPERTS))
        found = hessian(on_packed, layers, factors)
        wanted = hessian(on_dense, dense, factors)
        close(found, np.asarray(wanted, np.float64), 1e-4)

    @pytest.mark.parametrize("kind", ["columns", "tokens"])
    def test_shard_map(self, kind, as_qtensor):
        w, x, dy = stack("uniform", as_qtensor), tokens(16), tokens(16, 1, N)
        mesh = Mesh(jax.devices("cpu")[:2], ("d",))
        if kind == "columns":
            sizes, own = (5, 0, 7, 2), [(slice(None), (5, 0, 7, 2))]
            specs = P(), P(None, None, "d"), P(), P(None, "d")
        else:
            # Each device has sorted tokens of its own.
            sizes = ((5, 0, 1, 2), (0, 8, 0, 0))
            own = [(slice(0, 8), sizes[0]), (slice(8, 16), sizes[1])]
            specs = P("d"), P(), P("d"), P("d")
        *specs, out = specs

        @jax.shard_map(mesh=mesh, in_specs=tuple(specs), out_specs=out)
        def local(x, w, sizes):
            return qjax.ragged_matmul(x, w, sizes.reshape(-1))

        @jax.jit
        def gradients(x, w, dy):
            y, back = jax.vjp(lambda x, w: local(x, w, jnp.array(sizes)), x, w)
            return y, *back(dy)

        y, dx, dw = gradients(jnp.asarray(x), w, jnp.asarray(dy))
        close(y, np.concatenate([product("uniform", x[run], s) for run, s in own]))
        scale = np.zeros((EXPERTS, *matrices("uniform")[0].scale.shape))
        wanted = np.zeros((16, K))
        for rows, s in own:
            for e, run in enumerate(runs(len(x[rows]), s)):
                of = matrices("uniform")[e].gradients(x[rows][run], dy[rows][run])
                wanted[rows][run] = of["x"]
                scale[e] += of["scale"]
        close(dx, wanted)
        close(dw.scale, scale)


class TestWork:
    @pytest.mark.parametrize(
        ("t", "sizes", "visited"),
        [(3, (0, 1, 0, 2), 2), (4, (0, 0, 4, 0), 1), (24, (9, 0, 1, 14), 5)],
        ids=str,
    )
    def test_visits_only_blocks_that_hold_tokens(
        self, t, sizes, visited, monkeypatch, as_qtensor
    ):
        calls, inner = [], dispatch.multiply

        def counted(choice, w, x, index):
            jax.debug.callback(lambda: calls.append(len(x)))
            return inner(choice, w, x, index)

        monkeypatch.setattr(dispatch, "multiply", counted)
        w, x = stack("uniform", as_qtensor), tokens(t)
        run = jax.jit(ragged._apply.__wrapped__, static_argnums=3)
        found = run(jnp.asarray(x), w, jnp.array(sizes), None)
        jax.effects_barrier()
        close(found, product("uniform", x, sizes))
        assert len(calls) == visited
        # Blocks are as high as the tokens of an expert, at least eight.
        assert set(calls) == {min(t, 8)}

    def test_memory_grows_with_tokens_not_with_experts(self):
        def temporaries(experts, t):
            struct = jax.ShapeDtypeStruct((experts, 512, 256), jnp.float32)
            w = jax.eval_shape(qjax.quantize, struct)
            x = jax.ShapeDtypeStruct((t, 512), jnp.float32)
            sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
            compiled = jax.jit(qjax.ragged_matmul).lower(x, w, sizes).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        few, many = temporaries(8, 16), temporaries(64, 16)
        # A stack of 64 is 32 MiB dense. One matrix is formed at a time, and each of the
        # 16 tokens may have a block of its own.
        assert many < few + 8 * 8 * (512 + 256) * 4 + 4096
        assert many < 2 * 2**20

    def test_scale_gradients_that_nobody_asks_for_cost_nothing(self, as_qtensor):
        w, x = stack("uniform", as_qtensor), jnp.asarray(tokens(16))

        def loops(wrt):
            def loss(x, scale):
                held = dataclasses.replace(w, scale=scale)
                return qjax.ragged_matmul(x, held, jnp.array([4, 4, 4, 4])).sum()

            compiled = jax.jit(jax.grad(loss, wrt)).lower(x, w.scale).compile()
            return compiled.as_text().count(" while(")

        assert loops(0) < loops((0, 1))


@pytest.mark.parametrize(
    ("x", "sizes", "message"),
    [
        (jnp.ones((2, 3, K)), jnp.ones(4, int), "x.shape=(2, 3, 64) must be [t, k]"),
        (jnp.ones((2, 32)), jnp.ones(4, int), "must end in k=64"),
        (jnp.ones((2, K)), jnp.ones(3, int), "group_sizes must be integers (4,)"),
        (jnp.ones((2, K)), jnp.ones(4), "got float32(4,)"),
        (jnp.ones((2, K), int), jnp.ones(4, int), "x.dtype=int32 must be"),
    ],
)
def test_refuses(x, sizes, message, refuses, as_qtensor):
    with refuses(message):
        qjax.ragged_matmul(x, stack("uniform", as_qtensor), sizes)


def test_refuses_sizes_that_are_no_array(refuses, as_qtensor):
    w = stack("uniform", as_qtensor)
    with refuses("group_sizes is list, and must be an array", TypeError):
        qjax.ragged_matmul(jnp.ones((2, K)), w, [1, 1, 0, 0])
    with refuses("group_sizes is list, and must be an array", TypeError):
        qjax.layers.nnx.Experts.from_qtensor(w)(jnp.ones((2, K)), [1, 1, 0, 0])


def test_refuses_an_open_number_of_tokens():
    stack = qjax.quantize(jnp.ones((2, 64, 8)), group_size=32)
    (t,) = jax.export.symbolic_shape("t")
    run = jax.jit(lambda x: qjax.ragged_matmul(x, stack, jnp.array([1, 1])))
    with pytest.raises(NotImplementedError, match="number of tokens open"):
        jax.export.export(run)(jax.ShapeDtypeStruct((t, 64), jnp.float32))


def test_refuses_one_matrix_and_names(refuses, as_qtensor):
    x, sizes = jnp.ones((2, K)), jnp.ones(EXPERTS, int)
    with refuses("w.shape=(64, 40) must be [experts, k, n]"):
        qjax.ragged_matmul(x, as_qtensor(matrices("uniform")[0]), sizes)
    w = stack("uniform", as_qtensor)
    with refuses("implementation='fast' must be one of"):
        qjax.ragged_matmul(x, w, sizes, implementation="fast")
    with pytest.raises(NotImplementedError, match="declines float32 x"):
        qjax.ragged_matmul(x, w, sizes, implementation="pallas")


def test_no_tokens(as_qtensor):
    x, sizes = jnp.ones((0, K)), jnp.zeros(EXPERTS, int)
    assert qjax.ragged_matmul(x, stack("uniform", as_qtensor), sizes).shape == (0, N)


def test_names_are_taken(as_qtensor):
    t, sizes = SIZES["ragged"]
    w, x = stack("uniform", as_qtensor), tokens(t)
    for name in ("xla_dense", "xla_tiled"):
        found = qjax.ragged_matmul(
            jnp.asarray(x), w, jnp.array(sizes), implementation=name
        )
        close(found, product("uniform", x, sizes))
    chex.assert_shape(found, (t, N))


@pytest.mark.parametrize("experts", [1, 5, 513])
def test_the_expert_of_every_token(experts):
    """Few are added up for each, many one after the other."""
    sizes = np.random.default_rng(experts).integers(0, 3, experts)
    t = int(sizes.sum()) + 2
    found, has_expert = blocks.experts_of(jnp.asarray(sizes), t)
    wanted = np.repeat(np.arange(experts, dtype=np.int32), sizes)
    chex.assert_trees_all_equal(np.asarray(found[:-2]), wanted)
    chex.assert_trees_all_equal(np.asarray(has_expert), np.arange(t) < t - 2)
