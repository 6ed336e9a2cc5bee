"""nnx modules over packed weights: they are what they were, whatever they do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

import qjax
from qjax.layers.nnx import wrapped
from tests.layers import foreign
from tests.layers.foreign import MODEL, SPEC, same, x

TOKENS = foreign.tokens(2, 3)
RNGS = nnx.Rngs(0)


def quantize(model, *inputs):
    """A model and its report, without a word of what a rule could not replace."""
    reports = []
    model = qjax.quantize_model(model, SPEC, *inputs, report=reports.append)
    return model, reports[0]


def test_state_of_a_wrapped_module_goes_on():
    model, _ = quantize(foreign.Einsum("BTD,DF->BTF", (MODEL, 8), nnx.Rngs(0)))
    run = nnx.jit(lambda model: model(x(1, 3, MODEL)))
    for calls in (1, 2):
        run(model)
        assert int(model.calls[...]) == calls
    model(x(1, 3, MODEL))
    assert int(model.calls[...]) == 3


class Unusual(nnx.Module):
    """Uses its weight as no product, and reads the weight of another module."""

    def __init__(self):
        self.w = nnx.Param(x(MODEL, MODEL))
        self.inner = foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), RNGS)

    def __call__(self, x):
        return x @ jnp.abs(self.w[...]) + x @ self.inner.w[...] + self.inner(x)


def test_unrecognized_uses_are_dense_and_warn_with_the_path():
    model = Unusual()
    changed, _ = quantize(nnx.List([model]))
    with pytest.warns(UserWarning, match="is made dense") as caught:
        found = changed[0](x(1, 3, MODEL))
    messages = [str(warning.message) for warning in caught]
    assert any(re.match("0/w is made dense for 'abs'", one) for one in messages)
    assert any(
        one.startswith("0/inner/w is made dense, as it is read outside of its own")
        for one in messages
    )
    assert len(messages) == 2
    same(found, foreign.dequantized(changed, nnx.List([model]))[0](x(1, 3, MODEL)))


class Eager(nnx.Module):
    """Looks at values, and keeps one: it cannot be traced."""

    def __init__(self):
        self.w = nnx.Param(x(MODEL, MODEL))
        self.positive, self.last, self.fresh = 0, nnx.data(None), True

    def __call__(self, x):
        y = x @ self.w[...]
        self.positive += int(y.sum() > 0)
        self.last = y
        del self.fresh
        return y


def test_code_that_cannot_be_traced_runs_on_dense_weights():
    changed, _ = quantize(Eager())
    with pytest.warns(UserWarning, match="is run on dense weights, as it cannot be tr"):
        found = changed(x(3, MODEL))
    same(found, x(3, MODEL) @ packed_weight(changed))
    assert changed.positive == int(found.sum() > 0)
    assert changed.last is found
    assert not hasattr(changed, "fresh")


def packed_weight(module):
    return qjax.dequantize(nnx.as_pure(wrapped.packed_weights(module)["w"]))


OUTSIDE = nnx.Variable(jnp.zeros(()))


def count_outside(y):
    OUTSIDE[...] += 1


@pytest.mark.parametrize(
    "look",
    [
        lambda y: bool((y > 0).all()),
        lambda y: float(y.sum()),
        lambda y: range(jnp.argmax(y)),
        lambda y: y[y > 0],
        np.asarray,
        lambda y: jnp.zeros(jnp.argmax(y)),
        lambda y: f"{y.sum():.3f}",
        lambda y: y.sharding,
        lambda y: y.devices(),
        count_outside,
    ],
)
def test_what_only_values_can_say_is_asked_of_dense_weights(look):
    class Looks(Plain):
        def __call__(self, x):
            y = super().__call__(x)
            look(y)
            return y

    changed, _ = quantize(Looks(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="is run on dense weights, as it cannot be tr"):
        found = changed(x(3, MODEL))
    same(found, jnp.tanh(x(3, MODEL) @ packed_weight(changed)))


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda y: y + jnp.ones((3, 5)), TypeError, "add got incompatible shapes"),
        (lambda y: y @ None, TypeError, "unsupported operand|not accepted"),
        (lambda y: y.features, AttributeError, "has no attribute features"),
        (lambda y: {}["gate"], KeyError, "gate"),
        (lambda y: jnp.reshape(y, (5, -1)), TypeError, "reshape"),
    ],
)
def test_errors_of_the_code_are_its_own(mistake, error, message):
    class Wrong(Plain):
        def __call__(self, x):
            return mistake(super().__call__(x))

    # Warnings are errors: nothing is said of a trace, and no weight is made dense.
    with pytest.raises(error, match=message):
        quantize(Wrong(nnx.Rngs(0)))[0](x(3, MODEL))


def test_inputs_of_another_width_are_refused_as_ever():
    changed, _ = quantize(foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), RNGS))
    with pytest.raises(ValueError, match="Size of label 'D'"):
        changed(x(1, 3, MODEL + 1))


class Counter(nnx.Module):
    """Counts in an attribute of its own."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1


class Remembers(nnx.Module):
    """Keeps what it did in attributes of every kind."""

    def __init__(self):
        self.w = nnx.Param(x(MODEL, MODEL))
        self.bias = nnx.Param(jnp.zeros(MODEL))
        self.pos, self.fresh = 0, True
        self.last = nnx.data(None)
        self.seen = nnx.data([])
        self.inner, self.layers = Counter(), nnx.List([Counter(), Counter()])
        self.active = self.layers[0]

    def __call__(self, x):
        y = (x * (self.pos + 1)) @ self.w[...] + self.bias[...][None]
        self.pos += 2
        if self.pos == 2:
            del self.fresh
        self.last = y
        self.seen.append(y.sum())
        self.running = nnx.BatchStat(y.max(), note="kept")
        self.inner()
        self.active = self.layers[self.pos % 4 // 2]
        self.active()
        return y


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_attributes_of_a_wrapped_module_go_on(jit):
    changed, report = quantize(Remembers())
    assert [entry.path for entry in report.replaced] == ["w"]
    dense = foreign.dequantized(changed, Remembers())
    run = lambda model, inputs: model(inputs)  # noqa: E731
    run = nnx.jit(run) if jit else run
    for _ in range(3):
        same(run(changed, x(3, MODEL)), run(dense, x(3, MODEL)))
    assert changed.pos == dense.pos == 6
    assert changed.inner.count == 3
    assert [layer.count for layer in changed.layers] == [1, 2]
    assert changed.active is changed.layers[1]
    assert not hasattr(changed, "fresh")
    same(changed.last, dense.last)
    same(jnp.stack(changed.seen), jnp.stack(dense.seen))
    same(changed.running[...], dense.running[...])
    assert changed.running.get_metadata("note") == "kept"


def test_a_list_that_others_have_is_added_to():
    class Logs(Plain):
        def __init__(self, log):
            super().__init__(nnx.Rngs(0))
            self.log = log

        def __call__(self, x):
            y = super().__call__(x)
            self.log["mean"] = y.mean()
            self.log["calls"].append(y.max())
            return y

    changed, _ = quantize(Logs({"calls": []}))
    log = changed.log
    found = [changed(x(rows, MODEL)) for rows in (2, 3)]
    assert changed.log is log
    same(log["mean"], found[1].mean())
    assert [float(y) for y in log["calls"]] == [float(y.max()) for y in found]


class NoPytree(nnx.Module, pytree=False):
    """May have data in any attribute, as modules had before they were pytrees."""

    def __init__(self, rngs):
        self.w = nnx.Param(x(MODEL, MODEL))
        self.layers = [nnx.Einsum("bd,df->bf", (MODEL, MODEL), rngs=rngs)]
        self.last = None

    def __call__(self, x):
        self.last = self.layers[0](x @ self.w[...])
        return self.last


@pytest.mark.parametrize("inputs", [(), (x(3, MODEL),)])
def test_a_module_that_is_no_pytree_does_not_become_one(inputs):
    model = NoPytree(nnx.Rngs(0))
    changed, report = quantize(model, *inputs)
    assert {entry.path for entry in report.replaced} == {"w", "layers/0/kernel"}
    found = changed(x(3, MODEL))
    same(changed.last, found, 0)
    same(found, foreign.dequantized(changed, model)(x(3, MODEL)))


def test_attributes_are_not_changed_in_another_trace():
    changed, _ = quantize(Remembers())
    with pytest.raises(errors.TraceContextError, match="Cannot mutate"):
        jax.jit(changed)(x(3, MODEL))


def test_a_new_module_is_made_with_dense_weights():
    class Grows(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(x(MODEL, MODEL))
            self.cache = nnx.data(None)

        def __call__(self, x):
            y = x @ self.w[...]
            if self.cache is None:
                self.cache = Cache(y)
            return y

    class Cache(nnx.Module):
        def __init__(self, y):
            self.y = nnx.Cache(y)

    changed, _ = quantize(Grows())
    with pytest.warns(UserWarning, match="the attribute 'cache' a new Cache"):
        found = changed(x(3, MODEL))
    same(changed.cache.y[...], found)
    # Now there is nothing new.
    same(changed(x(3, MODEL)), found)


def test_layers_that_differ_in_their_places_alone_are_stacked_and_scanned():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return foreign.Einsum("BD,DF->BF", (MODEL, MODEL), rngs)

    @nnx.scan
    def run(x, layer):
        return layer(x), None

    stacked = make(nnx.Rngs(0))
    changed, report = quantize(stacked)
    assert report.replaced[0].shape == (3, MODEL, MODEL)
    found, _ = run(x(2, MODEL), changed)
    expected = x(2, MODEL)
    for weight in packed_weight(changed):
        expected = expected @ weight
    same(found, expected)
    layers = [
        foreign.Einsum("BD,DF->BF", (MODEL, MODEL), nnx.Rngs(i)) for i in range(2)
    ]
    changed, _ = quantize(nnx.List(layers))
    same_tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *changed)
    assert wrapped.packed_weights(same_tree)["w"].words[0].shape[0] == 2


class Plain(nnx.Module):
    """A weight that no attribute describes."""

    def __init__(self, rngs):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (MODEL,) * 2))

    def __call__(self, x):
        return jnp.tanh(x @ self.w[...])


class Stack(nnx.Module):
    """Three layers, one after another and side by side."""

    def __init__(self):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Plain))(nnx.Rngs(0))

    def __call__(self, x):
        one_by_one = nnx.scan(lambda x, layer: (layer(x), None))
        side_by_side = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return one_by_one(x, self.layers)[0] + side_by_side(self.layers, x).sum(axis=0)


def test_a_stack_that_a_traced_call_shows_is_scanned_and_mapped():
    changed, report = quantize(Stack(), x(2, MODEL))
    assert "QTensor(3x64x64" in report.replaced[0].weight
    found = nnx.jit(lambda model: model(x(2, MODEL)))(changed)
    same(found, foreign.dequantized(changed, Stack())(x(2, MODEL)))


def test_a_stack_of_linear_layers_is_scanned():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(MODEL, MODEL, rngs=rngs)

    @nnx.scan
    def run(x, layer):
        return layer(x), None

    stacked = make(nnx.Rngs(0))
    changed, _ = quantize(stacked)
    assert changed.kernel.shape == (2, MODEL, MODEL)
    same(
        run(x(2, MODEL), changed)[0],
        run(x(2, MODEL), foreign.dequantized(changed, stacked))[0],
    )


def test_a_stack_is_one_of_matrices_unless_a_product_sums_it():
    changed, _ = quantize(foreign.Experts(RNGS), x(1, 5, MODEL))
    weights = wrapped.packed_weights(changed)
    assert weights["up"].words[0].shape[0] == 3
    # Both experts and features are summed: they are rows of one matrix.
    assert nnx.as_pure(weights["down"]).shape == (96, MODEL)


def test_a_shared_weight_is_packed_once():
    first = foreign.Einsum("BTD,DF->BTF", (MODEL, MODEL), RNGS)
    second = foreign.Einsum("BTF,FD->BTD", (MODEL, MODEL), RNGS)
    second.w = first.w
    changed, report = quantize(nnx.List([first, second]))
    assert len(report.replaced) == 1
    packed = [wrapped.packed_weights(module)["w"] for module in changed]
    assert packed[0].scale is packed[1].scale
    weight = packed_weight(changed[0])
    same(changed[1](x(1, 3, MODEL)), x(1, 3, MODEL) @ weight)


def test_flax_layers_keep_their_options():
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    layer = nnx.Linear(MODEL, 8, use_bias=False, rngs=RNGS, **options)
    changed, _ = quantize(layer)
    assert isinstance(changed, nnx.Linear)
    assert changed(x(3, MODEL), out_sharding=None).dtype == jnp.float32
    general = nnx.LinearGeneral(
        MODEL, (2, 8), batch_axis={0: 3}, axis=-1, rngs=RNGS, use_bias=False
    )
    changed, report = quantize(general)
    assert "3x64x16" in report.replaced[0].weight
    same(
        changed(x(3, 5, MODEL)),
        foreign.dequantized(changed, general)(x(3, 5, MODEL)),
    )
    einsum = nnx.Einsum("btd,dnh->btnh", (MODEL, 2, 8), (2, 8), rngs=RNGS)
    changed, _ = quantize(einsum)
    same(changed(x(3, 5, MODEL)), foreign.dequantized(changed, einsum)(x(3, 5, MODEL)))
    embed = nnx.Embed(foreign.VOCABULARY, MODEL, rngs=RNGS)
    changed, _ = quantize(embed)
    dense = foreign.dequantized(changed, embed)
    same(changed(TOKENS), dense(TOKENS))
    same(changed.attend(x(3, MODEL)), dense.attend(x(3, MODEL)))


@pytest.mark.parametrize("linear", [nnx.Linear, type("Own", (nnx.Linear,), {})])
def test_an_explicit_mesh_shards_the_output_as_it_is_told(linear):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=explicit)
    changed, _ = quantize(linear(MODEL, 8, rngs=RNGS))
    expected = changed(x(4, MODEL))
    with jax.set_mesh(mesh):
        rows = jax.device_put(x(4, MODEL), jax.P("data"))
        found = changed(rows, out_sharding=jax.P("data", "model"))
    assert found.sharding.spec == jax.P("data", "model")
    same(found, expected)


def test_a_packed_weight_is_not_assigned_to():
    changed, _ = quantize(foreign.Einsum("BTD,DF->BTF", (MODEL, 8), nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"w is packed, .* qjax.layers.nnx.load"):
        changed.w[...] = x(MODEL, 8)
    with pytest.raises(ValueError, match="w is packed, and not set to Param"):
        changed.w = nnx.Param(x(MODEL, 8))
