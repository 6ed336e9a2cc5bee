"""Foreign code that maps over shards of its weights, which stay packed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P

import qjax
from qjax.layers.tracing import interpreter, uses
from qjax.layers.tracing.held import dense
from tests.layers.foreign import SPEC, same, x
from tests.layers.test_tracing import Case, hold, packed

# A shard in the layout of GPUs has at least 128 rows and 16 columns.
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mapped(body, of_x, of_w, out, **options):
    return jax.shard_map(
        body, mesh=MESH, in_specs=(of_x, of_w), out_specs=out, **options
    )


def summed(body, axes="model"):
    return lambda x, w: jax.lax.psum(body(x, w), axes)


def heads(x, w):
    return jnp.einsum("btd,dnh->btnh", x, w)


def output(x, w):
    return jnp.einsum("btnh,nhd->btd", x, w)


def experts(x, w):
    return jnp.einsum("ebd,edf->ebf", x, w)


def cut_output(x, w):
    run = mapped(summed(output), P(None, None, "model"), P("model"), P())
    return run(x, w)


CASES = {
    "columns": Case(
        (64, 64),
        (0,),
        (1,),
        lambda w: mapped(jnp.matmul, P("data"), P(None, "model"), P("data", "model"))(
            x(4, 64), w
        ),
    ),
    "rows": Case(
        (512, 24),
        (0,),
        (1,),
        lambda w: mapped(summed(jnp.matmul), P("data", "model"), P("model"), P("data"))(
            x(4, 512), w
        ),
    ),
    "both": Case(
        (512, 32),
        (0,),
        (1,),
        lambda w: mapped(
            summed(jnp.matmul), P(None, "model"), P("model", "data"), P(None, "data")
        )(x(4, 512), w),
    ),
    "replicated": Case(
        (64, 24),
        (0,),
        (1,),
        lambda w: mapped(jnp.matmul, P("data"), P(), P("data"))(x(4, 64), w),
    ),
    "heads": Case(
        (64, 4, 16),
        (0,),
        (1, 2),
        lambda w: mapped(heads, P(), P(None, "model"), P(None, None, "model"))(
            x(2, 3, 64), w
        ),
    ),
    "output": Case((8, 64, 24), (0, 1), (2,), lambda w: cut_output(x(2, 3, 8, 64), w)),
    "one head each": Case(
        (4, 128, 24), (0, 1), (2,), lambda w: cut_output(x(2, 3, 4, 128), w)
    ),
    "transposed": Case(
        (24, 512),
        (1,),
        (0,),
        lambda w: mapped(
            summed(lambda x, w: x @ w.T), P(None, "model"), P(None, "model"), P()
        )(x(4, 512), w),
    ),
    "experts": Case(
        (8, 64, 8),
        (1,),
        (2,),
        lambda w: mapped(experts, P("model"), P("model"), P("model"))(x(8, 3, 64), w),
    ),
    "some axes": Case(
        (64, 24),
        (0,),
        (1,),
        lambda w: mapped(jnp.matmul, P("data"), P(), P("data"), axis_names={"data"})(
            x(4, 64), w
        ),
    ),
    "unchecked": Case(
        (64, 64),
        (0,),
        (1,),
        lambda w: mapped(
            jnp.matmul, P(), P(None, "model"), P(None, "model"), check_vma=False
        )(x(4, 64), w),
    ),
}
every = pytest.mark.parametrize("name", CASES)


@every
def test_shards_stay_packed(name):
    weight, form = packed(CASES[name])
    held, function = hold(weight, form), jax.jit(CASES[name].function)
    found = jax.jit(lambda w: interpreter.call(function, {"w": hold(w, form)}))(weight)
    same(found, function(dense(held)))


@every
def test_uses_see_through_the_map(name):
    case = CASES[name]
    shape = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    found = uses.find(lambda weights: case.function(weights["w"]), {"w": shape})
    # Of one head, the program does not show that the product sums it.
    rows, columns = ((1,), (0, 2)) if name == "one head each" else case[1:3]
    assert (found["w"].rows, found["w"].columns) == (rows, columns)


@pytest.mark.parametrize("name", ["columns", "rows", "experts"])
def test_gradients(name):
    weight, form = packed(CASES[name])

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(scale, is_packed):
        held = hold(dataclasses.replace(weight, scale=scale), form)
        function = CASES[name].function
        if is_packed:
            return (interpreter.call(function, {"w": held}) ** 2).mean()
        return (function(dense(held)) ** 2).mean()

    same(gradient(weight.scale, True), gradient(weight.scale, False))


DENSE = {
    # A part of every head is no run of columns.
    "parts of heads": Case(
        (64, 2, 16),
        (0,),
        (1, 2),
        lambda w: mapped(
            heads, P(), P(None, None, "model"), P(None, None, None, "model")
        )(x(2, 3, 64), w),
    ),
    # A device would have half of a group.
    "parts of groups": Case(
        (64, 24),
        (0,),
        (1,),
        lambda w: mapped(summed(jnp.matmul), P(None, "model"), P("model"), P())(
            x(4, 64), w
        ),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_cannot_be_cut_is_dense_and_warns(name):
    weight, form = packed(DENSE[name])
    held = hold(weight, form)
    with pytest.warns(UserWarning, match="layer/w is made dense for 'shard_map'"):
        found = interpreter.call(DENSE[name].function, {"w": held})
    same(found, DENSE[name].function(dense(held)))


class Parallel(nnx.Module):
    """A feed-forward block that is cut by hand."""

    def __init__(self):
        self.up = nnx.Param(x(64, 512))
        self.down = nnx.Param(x(512, 64))

    def __call__(self, x):
        def block(x, up, down):
            return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

        specs = P("data"), P(None, "model"), P("model")
        run = jax.shard_map(block, mesh=MESH, in_specs=specs, out_specs=P("data"))
        return run(x, self.up[...], self.down[...])


def test_a_model_that_is_cut_by_hand():
    reports = []
    model = Parallel()
    quantized = qjax.quantize_model(model, SPEC, x(4, 64), report=reports.append)
    assert len(reports[0].replaced) == 2
    for name, weight in nnx.as_pure(quantized.packed).items():
        getattr(model, name).set_value(qjax.dequantize(weight))
    same(nnx.jit(lambda m, x: m(x))(quantized, x(4, 64)), model(x(4, 64)))


EXPLICIT = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def gathered(w):
    return reshard(x(4, 512), P("data")) @ reshard(w, P(None, "model"))


def tied(w):
    tokens = reshard(jnp.array([[3, -1], [0, 39]]), P("data"))
    rows = w.at[tokens].get(out_sharding=P("data"))
    return jnp.dot(rows, w.T, out_sharding=P("data", None, "model"))


def uneven(w):
    """Cut in pieces that are no whole heads."""
    return heads(reshard(x(4, 3, 256), P("data")), reshard(w, P(None, None, "model")))


RESHARDED = {
    "gathered": (Case((512, 64), (0,), (1,), gathered), P("data", "model")),
    "tied": (Case((64, 512), (1,), (0,), tied), P("model", "data")),
    "uneven": (Case((256, 4, 16), (0,), (1, 2), uneven), P("data", "model")),
}


def with_scale(weight, scale):
    return dataclasses.replace(weight, scale=scale)


@pytest.mark.parametrize("name", RESHARDED)
def test_a_weight_that_is_cut_otherwise_stays_packed(name):
    case, spec = RESHARDED[name]
    weight, form = packed(case)
    sharded = qjax.shard(weight, EXPLICIT, spec)
    with jax.set_mesh(EXPLICIT):
        run = lambda w: interpreter.call(case.function, {"w": hold(w, form)})  # noqa: E731
        found, eager = jax.jit(run)(sharded), run(sharded)
        expected = jax.jit(case.function)(dense(hold(weight, form)))
        slope = jax.jit(jax.grad(lambda s: (run(with_scale(sharded, s)) ** 2).sum()))
        wanted = jax.grad(
            lambda s: (
                case.function(dense(hold(with_scale(weight, s), form))) ** 2
            ).sum()
        )
        same(slope(sharded.scale), jax.jit(wanted)(weight.scale))
    same(found, expected)
    same(eager, expected)
    if name != "uneven":
        assert found.sharding.spec == expected.sharding.spec
