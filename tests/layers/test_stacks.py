"""nnx modules in stacks: layers that a model takes out of them are read in place."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qjax
from qjax.layers.nnx import wrapped
from qjax.training import nnx as training
from qjax.training import shadow
from tests.layers import foreign
from tests.layers.foreign import MODEL, SPEC, same, x

LAYERS = 3


class Layer(nnx.Module):
    """A layer of Flax, a weight that no attribute describes, and a count of calls."""

    def __init__(self, rngs):
        self.up = nnx.Linear(MODEL, MODEL, rngs=rngs)
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (MODEL,) * 2))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + jnp.tanh(self.up(x)) @ self.w[...]


class Model(nnx.Module):
    """Layers one after another, whose parameters are stacked along an axis."""

    axis = 0

    def __init__(self):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: 0})
        make = nnx.vmap(Layer, in_axes=0, out_axes=axes)
        self.layers = nnx.split_rngs(splits=LAYERS)(make)(nnx.Rngs(0))

    def __call__(self, x):
        axes = (nnx.StateAxes({nnx.Param: self.axis, ...: 0}), nnx.Carry)

        @nnx.scan(in_axes=axes, out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


class Rematerialized(Model):
    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


class Turned(Model):
    axis = 1


class Split(Model):
    """Takes the state of its layers apart, and turns it."""

    axis = 1

    def __call__(self, x):
        graphdef, params, rest = nnx.split(self.layers, nnx.Param, ...)

        def step(x, state):
            layer = nnx.merge(graphdef, *state)
            return layer(x), nnx.state(layer, nnx.Not(nnx.Param))

        params = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, self.axis, 0), params)
        y, rest = jax.lax.scan(step, x, (params, rest))
        nnx.update(self.layers, rest)
        return y


class Indexed(Model):
    """Takes each layer by its number; nothing comes of what its layers count."""

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)

        def step(i, x):
            return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))(x)

        self.layers.calls[...] += 1
        return jax.lax.fori_loop(0, LAYERS, step, x)


class Conditional(Model):
    """Of which each layer may be left out."""

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return nnx.cond(x.sum() < 1e9, lambda layer, x: layer(x), rest, layer, x)

        def rest(layer, x):
            layer.calls[...] += 1
            return x

        return run(self.layers, x)


class Itself(nnx.Module):
    """Is a stack, and scans itself."""

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def __init__(self, rngs):
        self.up = nnx.Linear(MODEL, MODEL, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def __call__(self, x):
        return jnp.tanh(self.up(x))


MODELS = [Model, Rematerialized, Turned, Split, Indexed, Conditional]


@functools.cache
def quantized(cls):
    dense = cls()
    return dense, qjax.quantize_model(dense, SPEC, x(2, MODEL))


def in_place(model) -> bool:
    """Whether matrices are multiplied by where they lie."""
    graphdef, state = nnx.split(model)
    call = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))
    return "_in_place" in str(call(state, x(2, MODEL)))


@pytest.mark.parametrize("cls", MODELS)
def test_layers_are_read_in_place(cls):
    dense, model = quantized(cls)
    graphdef, state = nnx.split(model)

    def run(state, x):
        copy = nnx.merge(graphdef, state)
        return copy(x), copy.layers.calls[...]

    assert in_place(model)
    found, calls = jax.jit(run)(state, x(2, MODEL))
    same(found, foreign.dequantized(model, dense)(x(2, MODEL)))
    assert calls.tolist() == [1] * LAYERS


def test_a_module_that_scans_itself_is_read_in_place():
    dense = Itself(nnx.Rngs(0))
    for inputs in ((), (x(2, MODEL),)):
        model = qjax.quantize_model(dense, SPEC, *inputs)
        assert in_place(model)
        same(model(x(2, MODEL)), foreign.dequantized(model, dense)(x(2, MODEL)))


def test_layers_keep_their_classes():
    _, model = quantized(Model)
    assert isinstance(model, Model)
    assert isinstance(model.layers, Layer)
    assert type(model).__name__ == "Model"
    # Nobody takes these out of a stack.
    alone = qjax.quantize_model(Layer(nnx.Rngs(0)), SPEC, x(2, MODEL))
    assert isinstance(alone.up, qjax.layers.nnx.Linear)


def test_gradients_and_adapters():
    dense, model = quantized(Rematerialized)

    def loss(model, x):
        return (model(x) ** 2).mean()

    adapted = training.add_lora(model, rank=2, rngs=nnx.Rngs(1))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    gradient = nnx.grad(loss, argnums=wrt)(adapted, x(2, MODEL))
    largest = {
        path[-1]: jnp.abs(leaf.get_raw_value()).max(axis=(1, 2))
        for path, leaf in nnx.to_flat_state(gradient)
    }
    assert largest["b"].min() > 0  # of each layer
    assert not largest["a"].any()
    # d loss / d W, through the packed weights and through the dense ones.
    zeros = shadow.zeros(training.kernels(model))
    found = nnx.grad(lambda s, m: loss(training.with_shadows(m, s), x(2, MODEL)))(
        zeros, model
    )
    expected = nnx.grad(loss)(foreign.dequantized(model, dense), x(2, MODEL))
    same(found["layers/up"], expected["layers"]["up"]["kernel"][...])
    same(found["layers/w"], expected["layers"]["w"][...])


def test_what_layers_see_is_watched():
    dense, model = quantized(Model)
    grams = qjax.quantizers.grams(model, [x(20, MODEL)])
    rules = qjax.quantizers.calibrated([(".*", SPEC)], grams)
    better = qjax.quantize_model(dense, rules, x(2, MODEL))
    error = lambda model: jnp.abs(model(x(20, MODEL)) - dense(x(20, MODEL))).mean()  # noqa: E731
    assert error(better) < 0.8 * error(model)


def test_a_second_round_of_rules():
    dense = Model()
    rules = [("layers/up", SPEC), (".*", None)]
    first = qjax.quantize_model(dense, rules, x(2, MODEL))
    second = qjax.quantize_model(first, SPEC, x(2, MODEL))
    assert in_place(second)
    assert {*wrapped.packed_weights(second.layers)} == {"w"}
    same(second(x(2, MODEL)), quantized(Model)[1](x(2, MODEL)))


class Eager(Model):
    """Looks at a value, so that it cannot be traced."""

    def __call__(self, x):
        assert float(jnp.abs(x).sum()) > 0
        return super().__call__(x)


def test_what_cannot_be_traced_scans_packed_layers():
    dense = Eager()
    model = qjax.quantize_model(dense, [("layers/up", SPEC)])
    found = model(x(2, MODEL))
    same(found, foreign.dequantized(model, dense)(x(2, MODEL)))
    assert model.layers.calls[...].tolist() == [1] * LAYERS


class Compiled(Model):
    """Has a method that is compiled, and counts how often it is traced."""

    def __init__(self):
        super().__init__()
        self.traced = []

    @nnx.jit
    def step(self, x):
        self.traced.append(None)
        return self(x)


def test_what_is_compiled_stays_so():
    dense = Compiled()
    model = qjax.quantize_model(dense, SPEC, x(2, MODEL))
    model.step(x(2, MODEL))
    found = model.step(x(2, MODEL))
    assert len(model.traced) == 1
    same(found, foreign.dequantized(model, dense)(x(2, MODEL)))


class Cache(nnx.Module):
    def __init__(self):
        self.last, self.uses = nnx.Cache(jnp.zeros(MODEL)), 0


class Decoder(nnx.Module):
    """Writes into a cache that it is given, and returns it."""

    def __init__(self):
        self.w, self.seen = nnx.Param(x(MODEL, MODEL)), nnx.data(None)

    def __call__(self, x, *, caches):
        y = x @ self.w[...] + caches["first"].last[...][None]
        caches["first"].last[...] = y[0]
        caches["first"].uses += 1
        self.seen = caches["first"]
        return y, caches

    def fresh(self):
        return Cache(), self.w[...].shape


def test_modules_among_the_arguments_are_changed():
    model = qjax.quantize_model(Decoder(), SPEC)
    cache = Cache()
    rows = x(2, MODEL)
    y, returned = model(rows, caches={"first": cache})
    assert returned["first"] is cache
    assert model.seen is cache
    assert cache.uses == 1
    same(cache.last[...], y[0])
    again, _ = nnx.jit(lambda model, cache: model(rows, caches={"first": cache}))(
        model, cache
    )
    same(again, y + y[:1])
    with pytest.warns(UserWarning, match="fresh is run on dense weights, .* new Cache"):
        made, shape = model.fresh()
    assert isinstance(made, Cache)
    assert shape == (MODEL, MODEL)
