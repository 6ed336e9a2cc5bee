"""LoRA beside every layer: the twins, what it computes, what is trained and merged."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.layers import linen
from qjax.layers import nnx as layers
from qjax.layers.linen import to_params, to_variables
from tests.layers import cases
from tests.layers.cases import K, N

RANK, ALPHA, EXPERTS = 4, 8, 3
SIZES = (2, 0, 2)
STATE = layers.MBWQLinear(K, N, q_groups=(4, 0, 2, 8)).state_dict()


class Case(NamedTuple):
    """A layer of either kind over the same weight.

    Attributes:
      module: The linen layer.
      layer: Makes the nnx layer of a weight and a bias.
      weight: The weight.
      bias: The bias, or None.
      inputs: What a call takes.
      wanted: A call in float64, of a dense weight, without a bias.
    """

    module: nn.Module
    layer: Callable[..., nnx.Module]
    weight: qjax.QTensor
    bias: jnp.ndarray | None
    inputs: tuple[jnp.ndarray, ...]
    wanted: Callable[..., np.ndarray]

    @property
    def name(self) -> str:
        return "embedding" if isinstance(self.module, linen.Embed) else "kernel"

    @property
    def variables(self) -> dict:
        bias = {} if self.bias is None else {"bias": self.bias}
        return to_variables({self.name: self.weight} | bias)

    def base(self) -> Any:
        return self.layer(self.weight, *[self.bias] * (self.bias is not None))

    def adapted(self) -> training.nnx.LoRA:
        made = training.nnx.LoRA(self.base(), RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
        for name, value in self.adapters().items():
            getattr(made, name)[...] = value
        return made

    def adapters(self) -> dict[str, jnp.ndarray]:
        *stack, k, n = self.weight.shape
        rng = cases.rng(5)
        a = rng.normal(size=(*stack, k, RANK))
        b = rng.normal(size=(*stack, RANK, n)) / 20
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


def stack() -> qjax.QTensor:
    one = qjax.prepare(cases.kernel("mixed"))
    each = [
        jax.tree.map(lambda a, i=i: jnp.roll(a, i, -1), one) for i in range(EXPERTS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def mbwq() -> qjax.QTensor:
    """Random codes, scales, zeros, order and input scale, all float32 but in a file."""
    rng = cases.rng(9)
    state = {name: np.asarray(array) for name, array in STATE.items()}
    words = rng.integers(0, 2**32, state["qweight"].shape, np.uint32)
    state |= {
        "qweight": words.view(np.int32),
        "scales": rng.uniform(0.01, 0.02, state["scales"].shape).astype(np.float16),
        "zeros": rng.uniform(0, 0.1, state["zeros"].shape).astype(np.float16),
        "q_perm": rng.permutation(K).astype(np.int16),
        "channel_scale": rng.uniform(0.5, 2, (1, 1, K)).astype(np.float16),
    }
    layer = layers.MBWQLinear(K, N)
    layer.load_state_dict(state)
    return layer.kernel


def mbwq_linear(kernel: qjax.QTensor) -> layers.MBWQLinear:
    layer = layers.MBWQLinear(K, N, dtype="float32")
    layer.load(kernel)
    return layer


def in_runs(w: np.ndarray, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    expert = np.repeat(np.arange(EXPERTS), sizes)
    y = np.zeros((len(x), N))
    y[: len(expert)] = np.einsum("tk,tkn->tn", x[: len(expert)], w[expert])
    return y


NAMES = ("general", "einsum", "stack", "embed", "mbwq", "experts")


@functools.cache
def cases_of() -> dict[str, Case]:
    x, one, bias = cases.inputs(rows=6), cases.kernel("act-order"), cases.bias()
    heads = {"axis": (-2, -1)}
    experts = jnp.stack([bias * i for i in range(EXPERTS)])
    return {
        "general": Case(
            linen.DenseGeneral((5, 8), **heads),
            lambda w, b: layers.LinearGeneral.from_qtensor(
                w, (8, 12), (5, 8), b, **heads
            ),
            one,
            bias.reshape(5, 8),
            (x.reshape(2, 3, 8, 12),),
            lambda w, x: (x.reshape(2, 3, K) @ w).reshape(2, 3, 5, 8),
        ),
        "einsum": Case(
            linen.Einsum((8, 5, 12, 8), "BTNH,NDHF->BDTF", use_bias=False),
            functools.partial(
                layers.Einsum.from_qtensor, "BTNH,NDHF->BDTF", (8, 5, 12, 8)
            ),
            one,
            None,
            (x.reshape(2, 3, 8, 12),),
            lambda w, x: np.einsum(
                "BTK,KDF->BDTF", x.reshape(2, 3, K), w.reshape(K, 5, 8)
            ),
        ),
        "stack": Case(
            linen.Einsum((EXPERTS, K, N), "BEK,EKN->BEN"),
            functools.partial(
                layers.Einsum.from_qtensor, "BEK,EKN->BEN", (EXPERTS, K, N)
            ),
            stack(),
            experts,
            (x.reshape(2, 3, K),),
            lambda w, x: np.einsum("BEK,EKN->BEN", x, w),
        ),
        "embed": Case(
            linen.Embed(N, K),
            layers.Embed.from_qtensor,
            cases.kernel("4bit"),
            None,
            (jnp.array([[0, 3], [-1, 39]]),),
            lambda w, index: w.T[index],
        ),
        "mbwq": Case(
            linen.MBWQDense(N, dtype="float32"),
            mbwq_linear,
            mbwq(),
            None,
            (x,),
            lambda w, x: x @ w,
        ),
        "experts": Case(
            linen.Experts(EXPERTS, N),
            layers.Experts.from_qtensor,
            stack(),
            experts,
            (x, jnp.array(SIZES)),
            in_runs,
        ),
    }


case = pytest.mark.parametrize("case", NAMES, indirect=True)


@pytest.fixture(name="case")
def made(request):
    """Made when it is tested: whoever collects the tests compiles nothing."""
    made = cases_of()
    assert tuple(made) == NAMES
    return made[request.param]


@nnx.jit
def run(layer, *inputs):
    return layer(*inputs)


@case
def test_twins_agree_and_are_base_and_adapters(case):
    layer, module = case.adapted(), training.linen.LoRA(case.module, RANK, ALPHA)
    variables = {**case.variables, "lora": case.adapters()}
    found = run(layer, *case.inputs)
    chex.assert_trees_all_equal(found, jax.jit(module.apply)(variables, *case.inputs))
    base = run(layer.base, *case.inputs)
    assert found.dtype == base.dtype == jnp.float32
    x, *rest = (np.asarray(array) for array in case.inputs)
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x
    delta = np.asarray(layer.merge(), np.float64) - np.asarray(
        qjax.dequantize(case.weight, jnp.float32), np.float64
    )
    wanted = np.asarray(base, np.float64) + case.wanted(delta, wide, *rest)
    # Sums of products in float32, and the difference of weights rounded to it.
    assert cases.error(found, wanted) < 1e-5


@case
def test_calls_by_name(case):
    layer, module = case.adapted(), training.linen.LoRA(case.module, RANK, ALPHA)
    variables = {**case.variables, "lora": case.adapters()}
    wanted = run(layer, *case.inputs)
    named = dict(reversed([*zip(("inputs", "group_sizes"), case.inputs, strict=False)]))
    found = nnx.jit(lambda layer, named: layer(**named))(layer, named)
    chex.assert_trees_all_equal(found, wanted)
    found = jax.jit(module.apply)(variables, **named)
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize("spec", [("data", "model"), (None, "model"), ("model", None)])
def test_an_explicit_mesh_shards_the_sum_as_the_base_is_told(spec):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=explicit)
    base = layers.Linear.from_qtensor(cases.kernel("4bit"))
    layer = training.nnx.LoRA(
        base, RANK, rngs=nnx.Rngs(0), b_init=nnx.initializers.ones
    )
    x = cases.inputs(rows=8)
    wanted = run(layer, x)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, jax.P("data"))
        found = layer(rows, jax.P(*spec))
        assert found.sharding.spec == base(rows, jax.P(*spec)).sharding.spec
        chex.assert_trees_all_equal(layer(rows, out_sharding=jax.P(*spec)), found)
    assert cases.error(found, np.asarray(wanted, np.float64)) < 1e-5


def test_layers_of_flax_are_refused(refuses):
    layer = training.linen.LoRA(nn.Dense(N), RANK)
    message = "base is flax.linen.linear.Dense, and must be a layer of layers.linen"
    with refuses(message, TypeError):
        layer.init(jax.random.key(0), cases.inputs())


def test_arguments_that_the_base_does_not_take_are_refused():
    layer = training.nnx.LoRA(cases_of()["experts"].base(), RANK, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="group_sizes"):
        layer(cases.inputs())


@case
def test_start_is_the_base(case):
    layer = training.nnx.LoRA(case.base(), RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
    wanted = run(layer.base, *case.inputs)
    chex.assert_trees_all_equal(run(layer, *case.inputs), wanted)
    *batch, k, n = case.weight.shape
    assert (layer.a.shape, layer.b.shape) == ((*batch, k, RANK), (*batch, RANK, n))
    module = training.linen.LoRA(case.module, RANK)
    rngs = {"params": jax.random.key(0)}
    apply = functools.partial(module.apply, rngs=rngs, mutable=["lora"])
    y, made = jax.jit(apply)(case.variables, *case.inputs)
    chex.assert_trees_all_equal(y, wanted)
    assert jax.tree.map(jnp.shape, made["lora"]) == {
        "a": layer.a.shape,
        "b": layer.b.shape,
    }


@case
def test_merged_equals_unmerged(case):
    layer, variables = case.adapted(), {**case.variables, "lora": case.adapters()}
    merged = layer.merge_quantized()
    assert type(merged) is type(layer.base)
    again = training.linen.merge_lora(variables, alpha=ALPHA)
    assert "lora" not in again
    chex.assert_trees_all_equal(to_params(again)[case.name], nnx.as_pure(merged.packed))
    # In the weight's few bits, as near as rounding takes it: nearer than without the
    # adapters, most of whose size is kept.
    target = np.asarray(layer.merge())

    def distance(w):
        return ((np.asarray(qjax.dequantize(w, jnp.float32)) - target) ** 2).mean()

    assert distance(nnx.as_pure(merged.packed)) < 0.5 * distance(case.weight)


@case
@pytest.mark.usefixtures("optax_promotion")
def test_only_adapters_are_trained(case):
    layer = case.adapted()
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.LoRAParam)
    shapes = {a.shape for a in jax.tree.leaves(nnx.state(optimizer, nnx.OptState))}
    assert shapes == {(), layer.a.shape, layer.b.shape}
    _, adapters, rest = nnx.split(layer, nnx.LoRAParam, ...)
    before = jax.tree.map(jnp.copy, (adapters, rest))

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return ((layer(*case.inputs) - 1) ** 2).mean()

        value, gradient = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(layer)
        optimizer.update(layer, gradient)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    _, adapters, rest = nnx.split(layer, nnx.LoRAParam, ...)
    chex.assert_trees_all_equal(rest, before[1])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapters, before[0])
    assert all(jax.tree.leaves(moved))


def test_methods_beside_a_call():
    embed, experts = cases_of()["embed"], cases_of()["experts"]
    query = cases.inputs()
    wanted = np.asarray(query, np.float64) @ np.asarray(embed.adapted().merge())
    found = nnx.jit(lambda layer, x: layer.attend(x))(embed.adapted(), query)
    assert cases.error(found, wanted) < 1e-5
    module = training.linen.LoRA(embed.module, RANK, ALPHA)
    variables = {**embed.variables, "lora": embed.adapters()}
    attend = jax.jit(functools.partial(module.apply, method="attend"))
    chex.assert_trees_all_equal(attend(variables, query), found)

    expert = jnp.array([[0, 2], [1, 0], [2, 1], [2, 5], [0, 1]])
    weight = jnp.asarray(cases.rng(3).uniform(size=(5, 2)), jnp.float32)
    routed = query, expert, weight
    found = nnx.jit(lambda layer, *r: layer.route(*r))(experts.adapted(), *routed)
    dense = np.asarray(experts.adapted().merge(), np.float64)
    wanted = np.zeros((5, N))
    for t, j in np.ndindex(5, 2):
        if (e := expert[t, j]) < EXPERTS:
            row = np.asarray(query[t], np.float64) @ dense[e] + experts.bias[e]
            wanted[t] += weight[t, j] * row
    assert cases.error(found, wanted) < 1e-5
    module = training.linen.LoRA(experts.module, RANK, ALPHA)
    variables = {**experts.variables, "lora": experts.adapters()}
    route = jax.jit(functools.partial(module.apply, method="route"))
    chex.assert_trees_all_equal(route(variables, *routed), found)


class Model(nnx.Module):
    def __init__(self):
        self.embed = cases_of()["embed"].base()
        self.up = layers.Linear.from_qtensor(cases.kernel("3bit"))
        self.experts = layers.Experts.from_kernel(
            jnp.stack([cases.dense(N, K)] * EXPERTS), bits=8, group_size=None
        )

    def __call__(self, tokens):
        h = self.up(self.embed(tokens))
        return self.embed.attend(self.experts(h, jnp.array(SIZES)))


def test_models_of_all_layers():
    model, tokens = Model(), jnp.array([1, 2, 3, 4])
    adapted = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
    kinds = {name: type(getattr(adapted, name)) for name in ("embed", "up", "experts")}
    assert set(kinds.values()) == {training.nnx.LoRA}
    y = run(model, tokens)
    # Another program, which XLA may fuse, and so round, in another way.
    chex.assert_trees_all_close(run(adapted, tokens), y, rtol=0, atol=1e-6)
    assert sorted(training.nnx.kernels(model)) == ["embed", "experts", "up"]
    merged = training.nnx.merge_lora(adapted)
    assert type(merged.experts) is layers.Experts
    chex.assert_trees_all_equal(run(merged, tokens), y)
    only = training.nnx.add_lora(
        model, RANK, where=lambda path: path == "experts", rngs=nnx.Rngs(0)
    )
    assert type(only.up) is layers.Linear
    assert type(only.experts.base) is layers.Experts


def test_nested_linen_models():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            up = training.linen.LoRA(linen.Experts(EXPERTS, N, name="up"), RANK)
            down = training.linen.LoRA(linen.Dense(K, name="down"), RANK)
            return down(up(x, sizes))

    w, back = stack(), qjax.quantize(cases.dense(N, K), 8, None)
    made = to_variables({"up": {"kernel": w}, "down": {"kernel": back}})
    made["params"]["up"]["bias"] = jnp.zeros((EXPERTS, N))
    made["params"]["down"]["bias"] = jnp.zeros(K)
    x, sizes = cases.inputs(rows=5), jnp.array(SIZES)
    rngs = {"params": jax.random.key(0)}
    _, drawn = Block().apply(made, x, sizes, rngs=rngs, mutable=["lora"])
    assert jax.tree.map(jnp.shape, drawn["lora"]) == {
        "up": {"a": (EXPERTS, K, RANK), "b": (EXPERTS, RANK, N)},
        "down": {"a": (N, RANK), "b": (RANK, K)},
    }
    merged = training.linen.merge_lora({**made, **drawn})
    assert jax.tree.structure(merged) == jax.tree.structure(made)
    with pytest.raises(ValueError, match=r"has \['gate'\], but"):
        training.linen.merge_lora({**made, "lora": {"gate": drawn["lora"]["up"]}})
    codes = qjax.codes(to_params(merged)["down"]["kernel"])
    chex.assert_trees_all_equal(codes, qjax.codes(back))


def test_experts_start_as_one_layer_does():
    layer = training.nnx.LoRA(cases_of()["experts"].base(), 16, rngs=nnx.Rngs(0))
    # He's variance over the inputs, not over inputs and experts.
    assert float(layer.a[...].std()) == pytest.approx(np.sqrt(2 / K), rel=0.1)
