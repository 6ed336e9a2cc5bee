"""Names of axes, for a mesh, go from dense weights to the arrays of packed ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats.tiles import Tiles
from qjax.layers import partitions
from qjax.layers.tracing.views import Form
from qjax.training import nnx as training
from qjax.training.linen import adapted, with_kernels
from tests.layers import foreign
from tests.layers.foreign import GROUP, HEAD, HEADS, MODEL, SPEC, same, x

KERNEL_INIT = nnx.initializers.lecun_normal()
WIDE = 128


# Of all names that are here.
MESH = jax.make_mesh(
    (2, 1, 1),
    ("model", "heads", "layers"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:2],
)


@pytest.fixture(autouse=True)
def on_a_mesh():
    """Flax wants one where a parameter names its axes."""
    with jax.set_mesh(MESH):
        yield


@pytest.mark.parametrize(
    ("form", "names", "expected"),
    [
        (Form((4, 8), (0,), (1,)), ("a", "b"), {"k": "a", "n": "b"}),
        # An embedding is looked up by columns.
        (Form((4, 8), (1,), (0,)), ("a", None), {"n": "a"}),
        # Whole heads to a device, and not a part of each.
        (Form((4, 2, 8), (0,), (1, 2)), (None, "a", None), {"n": "a"}),
        (Form((4, 2, 8), (0,), (1, 2)), (None, None, "a"), {}),
        (Form((4, 1, 8), (0,), (1, 2)), (None, None, "a"), {"n": "a"}),
        # In another order than they are stored in.
        (Form((4, 2, 8), (2, 1), (0,)), ("a", "b", "c"), {"k": "c", "n": "a"}),
        # A stack of the module's own, within one by which layers were mapped.
        (Form((3, 4, 8), (1,), (2,)), ("a", "b", None, "c"), {"b0": "a", "b1": "b"}),
        (Form((4, 8), (0,), (1,)), (("a", "b"),), {"k": ("a", "b")}),
    ],
)
def test_axes(form, names, expected):
    outer = 1 if form.shape[0] == 3 else 0
    if outer:
        expected = {**expected, "n": "c"}
    assert form.names(names, outer + len(form.shape)) == expected


class Model(nnx.Module):
    """Queries by heads, their output, and a layer of Flax."""

    def __init__(self, names, *, rngs=None, **metadata):
        rngs = rngs or nnx.Rngs(0)
        self.q = foreign.Einsum("btd,dnh->btnh", (MODEL, HEADS, HEAD), rngs)
        self.o = foreign.Einsum("btnh,nhd->btd", (HEADS, HEAD, MODEL), rngs)
        init = nnx.with_partitioning(KERNEL_INIT, (None, names), **metadata)
        self.up = nnx.Linear(MODEL, WIDE, kernel_init=init, rngs=rngs)
        self.q.w.set_metadata(out_sharding=(None, names, None), **metadata)
        self.o.w.set_metadata(out_sharding=(names, None, None), **metadata)

    def __call__(self, x):
        return self.up(self.o(self.q(x)))


X = x(1, 3, MODEL)


def names(spec: P) -> tuple[str, ...]:
    """The names in a spec: of words, whose axes depend on the layout."""
    return tuple(filter(None, spec))


def specs_of(model) -> dict[str, tuple]:
    """Specs of the scales and zeros of all packed weights, and `names` of words."""
    specs = nnx.get_partition_spec(nnx.state(model, (nnx.Param, Words)))
    return {
        "/".join(map(str, path)): names(spec) if "words" in path else spec
        for path, spec in nnx.to_flat_state(nnx.as_pure(specs))
        if "packed" in path
    }


Words = qjax.layers.nnx.Quantized


def test_nnx_tells_the_specs_of_packed_weights():
    model = qjax.quantize_model(Model("model"), SPEC, X)
    specs = specs_of(model)
    assert len(specs) == 9
    for path, spec in specs.items():
        of_scales = P("model", None) if path.startswith("o/") else P(None, "model")
        assert spec == (("model",) if "words" in path else of_scales), path


def test_rules_of_names_go_with_them():
    rules = (("heads", "model"),)
    model = qjax.quantize_model(Model("heads", sharding_rules=rules), SPEC, X)
    assert specs_of(model)["q/packed/w/scale"] == P(None, "model")


def test_a_model_is_cut_as_its_specs_say():
    model = qjax.quantize_model(Model("model"), SPEC, X)
    expected = model(X)
    state = nnx.state(model)
    placed = jax.device_put(state, nnx.get_named_sharding(state, MESH))
    nnx.update(model, placed)
    scale = nnx.as_pure(model.up.packed).scale
    assert scale.sharding.shard_shape(scale.shape) == (len(scale), WIDE // 2)
    same(nnx.jit(lambda model, x: model(x))(model, X), expected)


def test_an_abstract_model_says_so_and_keeps_it_when_it_is_filled():
    dense = Model("model")
    abstract = qjax.quantize_model(nnx.eval_shape(lambda: Model("model")), SPEC, X)
    specs = specs_of(abstract)
    assert set(specs.values()) == {P(None, "model"), P("model", None), ("model",)}
    weights = {
        path: jnp.asarray(np.asarray(node[...]))
        for path, node in (("up/kernel", dense.up.kernel), ("q/w", dense.q.w))
    }
    # Of another layout, whose words have other axes.
    up = qjax.quantize(weights["up/kernel"], group_size=GROUP)
    weights["up/kernel"] = qjax.relayout(up, Tiles())
    qjax.layers.nnx.load(abstract, weights)
    assert specs_of(abstract) == specs
    abstract.up.load(qjax.quantize(x(MODEL, WIDE), bits=2, group_size=GROUP))
    assert specs_of(abstract) == specs


def test_words_in_tiles_have_the_names_of_their_own_axes():
    w = qjax.quantize(x(128, 128), bits=4, group_size=64)
    tiles = qjax.relayout(w, Tiles())
    specs = partitions.specs(tiles, {"k": "a", "n": "b"})
    assert specs.words[0] == P("a", None, "b", None)
    assert specs.scale == P("a", "b")
    assert partitions.axes_in(tiles, jax.tree.leaves(specs)) == {"k": "a", "n": "b"}


def test_merged_adapters_keep_it():
    model = qjax.quantize_model(Model("model"), SPEC, X)
    specs = specs_of(model)
    adapted = training.add_lora(model, rank=2, rngs=nnx.Rngs(0))
    merged = training.merge_lora(adapted)
    assert {path: specs_of(merged)[path] for path in specs if "up" not in path} == {
        path: spec for path, spec in specs.items() if "up" not in path
    }


def test_what_is_no_run_of_columns_is_reported():
    model = Model("model")
    model.q.w.set_metadata("out_sharding", (None, None, "model"))
    reports = []
    changed = qjax.quantize_model(model, SPEC, X, report=reports.append)
    reasons = {entry.path: entry.reason for entry in reports[0].replaced}
    assert reasons == {
        "o/w": None,
        "q/w": "of its sharding (None, None, 'model'), ['model'] is not kept",
        "up/kernel": None,
    }
    assert specs_of(changed)["q/packed/w/scale"] == P()


def test_layers_that_are_mapped_name_their_axis_too():
    metadata = {nnx.PARTITION_NAME: "layers"}

    class Layer(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(KERNEL_INIT, (None, "model"))
            self.up = nnx.Linear(MODEL, MODEL, kernel_init=init, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
    def make(rngs):
        return Layer(rngs)

    dense = make(nnx.Rngs(0))
    layers = qjax.quantize_model(dense, SPEC)
    expected = {P("layers", None, "model"), ("layers", "model")}
    assert set(specs_of(layers).values()) == expected

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=metadata)
    def run(layer, x):
        return jnp.tanh(layer.up(x))

    expected = run(foreign.dequantized(layers, dense), x(3, MODEL))
    same(run(layers, x(3, MODEL)), expected)


class Linen(nn.Module):
    """Layers that are scanned, and one more."""

    box: staticmethod
    axes: tuple = (None, "model")

    @nn.compact
    def __call__(self, x):
        init = self.box(nn.initializers.lecun_normal(), self.axes)
        layers = nn.scan(
            _Layer,
            length=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(init, name="layers")(x, None)
        return nn.Dense(WIDE, kernel_init=init, name="up")(x)


class _Layer(nn.Module):
    init: staticmethod

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(MODEL, kernel_init=self.init)(x)), None


@functools.cache
def linen(box, spec=SPEC):
    model, inputs = Linen(box), x(3, MODEL)
    variables = model.init(jax.random.key(0), inputs)
    return (
        model,
        variables,
        *qjax.quantize_model(model, spec, inputs, variables=variables),
    )


BOXES = [nn.with_partitioning, nn.with_logical_partitioning]


@pytest.mark.parametrize("box", BOXES)
def test_linen_tells_the_specs_of_packed_weights(box):
    model, _, module, packed = linen(box)
    specs = nn.get_partition_spec(packed)
    up = specs["quantized"]["up"]["kernel"]
    assert (names(up.words[0]), up.zero) == (("model",), P(None, "model"))
    assert specs["params"]["up"]["kernel"] == {"scale": P(None, "model")}
    (stack,) = specs["quantized"]["layers"]["Dense_0"]["kernel"].words
    assert names(stack) == ("layers", "model")
    params = {"params": foreign.dequantized_params(module, packed)}
    same(module.apply(packed, x(3, MODEL)), model.apply(params, x(3, MODEL)))
    bare = qjax.memory_report(nn.meta.unbox(packed))
    assert qjax.memory_report(packed).nbytes == bare.nbytes


@pytest.mark.parametrize("box", BOXES)
def test_linen_variables_are_cut_as_their_specs_say(box):
    _, _, module, packed = linen(box)
    rules = (("model", "model"), ("layers", None))
    specs = nn.get_partition_spec(packed)
    shardings = nn.logical_to_mesh_sharding(specs, MESH, rules)
    placed = jax.device_put(nn.meta.unbox(packed), shardings)
    scale = placed["params"]["up"]["kernel"]["scale"]
    assert scale.sharding.shard_shape(scale.shape) == (len(scale), WIDE // 2)
    same(jax.jit(module.apply)(placed, x(3, MODEL)), module.apply(packed, x(3, MODEL)))


def test_groups_that_the_mesh_does_not_divide_are_no_obstacle():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
    model, inputs = nn.Dense(8, kernel_init=init), x(3, 3 * GROUP)
    variables = model.init(jax.random.key(0), inputs)
    module, packed = qjax.quantize_model(model, SPEC, inputs, variables=variables)
    specs = nn.get_partition_spec(packed)
    assert specs["params"]["kernel"] == {"scale": P("model", None)}
    params = {"params": foreign.dequantized_params(module, packed)}
    found = jax.jit(module.apply)(packed, inputs)
    same(found, model.apply(nn.meta.unbox(params), inputs))


def test_steps_of_training_keep_the_boxes():
    _, _, module, packed = linen(nn.with_partitioning)
    params = qjax.layers.linen.to_params(packed)
    again = with_kernels(packed, params)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    key = jax.random.key(0)
    adapters = qjax.training.linen.add_lora(packed, 2, key)
    found = adapted(module.apply)(adapters, x(3, MODEL))
    same(found, module.apply(packed, x(3, MODEL)))
    merged = qjax.training.linen.merge_lora(adapters)
    specs = [jax.tree.leaves(nn.get_partition_spec(tree)) for tree in (merged, packed)]
    assert specs[0] == specs[1]
