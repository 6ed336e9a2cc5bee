"""`linen.MBWQDense` and `nnx.MBWQLinear` against bitorch-engine's own layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import training
from qjax.formats import q_groups
from qjax.layers.linen import MBWQDense, to_params
from qjax.layers.nnx import MBWQLinear, Quantized, Scale
from tests.goldens import load, names
from tests.layers import cases

FILES = names("mbwq")
STATE = ("qweight", "scales", "zeros", "q_perm", "bias", "q_groups")
# Of the folder's page, relative to the largest value: float16 sums in another order.
TOLERANCES = {"y_ref": 3e-3, "y_layer": 3e-3, "grad_x": 1e-3, "privileged_grad": 2e-3}


def state_of(name: str) -> dict:
    """What the layer upstream saves."""
    data = load(name)
    state = {key: data[key] for key in STATE if key in data}
    return state | {"channel_scale": data["channel_scale"].reshape(1, 1, -1)}


def layers(name: str) -> tuple[MBWQLinear, MBWQDense, dict]:
    """The twins, made for four bits in one group and loaded with a golden state."""
    state, meta = state_of(name), load(name)["meta"]
    k, n = len(state["q_perm"]), state["scales"].shape[1]
    size, use_bias = meta.get("group_size"), "bias" in state
    size = None if "q_groups" in state else size
    layer = MBWQLinear(k, n, group_size=size, use_bias=use_bias)
    layer.load_state_dict(state)
    linen = MBWQDense(n, group_size=size, use_bias=use_bias)
    return layer, linen, linen.load_state_dict(state)


def same_state(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        one = np.asarray(found[name])
        assert (one.dtype, one.shape) == (array.dtype, array.shape), name
        assert one.tobytes() == array.tobytes(), name


def close(found, name: str, key: str) -> None:
    assert cases.error(found, load(name)[key].astype(np.float64)) <= TOLERANCES[key]


def test_both_modes_are_here():
    assert len(FILES) == 12
    assert {load(name)["meta"]["format"] for name in FILES} == {
        "mbwq_exl2",
        "mbwq_q4",
        "mbwq_q2",
    }
    assert any("bias" in load(name) for name in FILES)
    assert any((load(name)["channel_scale"] != 1).any() for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_computes_what_bitorch_engine_does(name):
    layer, linen, variables = layers(name)
    data = load(name)
    x, dy = jnp.asarray(data["x"]), jnp.asarray(data["grad_y"])
    shadows = training.shadow.zeros(to_params(variables)["kernel"])

    @jax.jit
    def run_nnx(layer, x):
        def forward(x, shadows):
            return training.nnx.with_shadows(layer, {"": shadows})(x)

        y, back = jax.vjp(forward, x, shadows)
        return y, *back(dy)

    @jax.jit
    def run_linen(variables, x):
        apply = training.linen.shadowed(linen.apply)

        def forward(x, shadows):
            return apply({**variables, "shadow": {"kernel": shadows}}, x)

        y, back = jax.vjp(forward, x, shadows)
        return y, *back(dy)

    y, dx, dw = found = run_nnx(layer, x)
    chex.assert_trees_all_equal(found, run_linen(variables, x))
    chex.assert_trees_all_equal(y, nnx.jit(lambda layer, x: layer(x))(layer, x))
    assert (y.dtype, dx.dtype) == (jnp.float16, jnp.float16)
    # The file has float32, from an accumulation in float64, and the layer's float16.
    close(y, name, "y_ref")
    close(y, name, "y_layer")
    close(dx, name, "grad_x")
    close(dw, name, "privileged_grad")


@pytest.mark.parametrize("name", FILES)
def test_gives_the_state_back(name):
    layer, linen, variables = layers(name)
    wanted = state_of(name)
    same_state(layer.state_dict(), wanted)
    same_state(linen.state_dict(variables), wanted)
    chex.assert_trees_all_equal(to_params(variables)["kernel"], layer.kernel)


def test_the_state_decides_the_mix():
    names = ["mbwq_q4_g32_perm", "mbwq_q2_g64_noperm", "mbwq_exl2_b5432_mixedg"]
    loaded = {}
    for name in names:
        state = state_of(name) | {"bias": None}
        state = {key: array for key, array in state.items() if array is not None}
        shape = len(state["q_perm"]), state["scales"].shape[1]
        # Made for one group of two bits each.
        layer = loaded.setdefault(shape, MBWQLinear(*shape, bits=2))
        layer.load_state_dict(state)
        same_state(layer.state_dict(), state)
        assert layer.mixed == ("q_groups" in state)


def test_a_mix_of_one_width_keeps_its_groups():
    layer = MBWQLinear(64, 8, q_groups=(4, 0, 4, 4))
    state = layer.state_dict()
    assert state["q_groups"].tolist() == [4, 0, 4, 4]
    linen = MBWQDense(8)
    variables = linen.load_state_dict(state)
    assert "q_groups" not in linen.state_dict(variables)
    again = linen.state_dict(variables, mixed=True)
    same_state(again, {name: np.asarray(array) for name, array in state.items()})


def test_what_upstream_derives_may_be_there():
    name = "mbwq_exl2_b43_g128"
    data, state = load(name), state_of(name)
    layer = layers(name)[0]
    group_map = data["q_group_map"].reshape(-1)
    layer.load_state_dict(state | {"rows": data["rows"], "q_group_map": group_map})
    same_state(layer.state_dict(), state)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 32},
        {"bits": 4},
        {"q_groups": (6, 0, 3, 6, 2, 12)},
    ],
    ids=str,
)
def test_empty_twins(options):
    layer = MBWQLinear(128, 8, use_bias=True, **options)
    linen = MBWQDense(8, use_bias=True, **options)
    x = jnp.ones((3, 128), jnp.float16)
    made = jax.jit(linen.init)(jax.random.key(0), x)
    chex.assert_trees_all_equal(to_params(made)["kernel"], layer.kernel)
    assert not layer(x).any()
    expected = {name: np.asarray(a) for name, a in layer.state_dict().items()}
    same_state(linen.state_dict(made), expected)
    if "q_groups" in options:
        rows = q_groups.read_groups(expected["q_groups"], len(expected["qweight"])).rows
        assert rows == (32, 64, 32)
    abstract = jax.eval_shape(linen.init, jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, made)


def test_set_scales_and_zeros():
    name = "mbwq_q4_g64_cscale"
    layer, linen, variables = layers(name)
    state = state_of(name)
    scales, zeros = state["scales"] * np.float16(2), -state["zeros"]
    layer.set_scales(scales)
    layer.set_zeros(zeros)
    variables = linen.set_zeros(linen.set_scales(variables, scales), zeros)
    changed = state | {"scales": scales, "zeros": zeros}
    same_state(layer.state_dict(), changed)
    same_state(linen.state_dict(variables), changed)
    x = jnp.asarray(load(name)["x"])
    other = linen.load_state_dict(changed)
    chex.assert_trees_all_equal(linen.apply(variables, x), linen.apply(other, x))


def test_prepare_may_be_called_again():
    name = "mbwq_q2_g32_perm"
    layer, linen, variables = layers(name)
    before, x = layer.kernel, jnp.asarray(load(name)["x"])
    y = layer(x)
    tiles = qjax.formats.tiles.Tiles()
    layer.prepare(tiles)
    assert layer.kernel.layout == tiles
    same_state(layer.state_dict(), state_of(name))
    layer.prepare()
    chex.assert_trees_all_equal(layer.kernel, before)
    chex.assert_trees_all_equal(layer(x), y)
    chex.assert_trees_all_equal(linen.prepare(variables), variables)


def test_variables_and_dtypes():
    layer = layers("mbwq_exl2_b84_g32")[0]
    words = jax.tree.leaves(nnx.state(layer, Quantized))
    packed = layer.kernel.words[0].dtype
    assert {leaf.dtype for leaf in words} == {packed, jnp.dtype("int32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, Scale))} == {
        jnp.dtype("float16")
    }
    layer.dtype = jnp.bfloat16
    assert layer(jnp.ones((1, layer.in_features), jnp.bfloat16)).dtype == jnp.bfloat16


ROWS = np.zeros(7, np.int32)


def changed(**changes) -> dict:
    """A state without bias, and with other tensors; None leaves one out."""
    mixed = "rows" in changes and "q_groups" not in changes
    name = "mbwq_exl2_b43_g128" if mixed else "mbwq_q4_g32_perm"
    state = {k: v for k, v in state_of(name).items() if k != "bias"} | changes
    return {key: array for key, array in state.items() if array is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: changed(scales=None), "scales is missing"),
        (lambda: changed(weight=np.zeros(2)), "weight is no tensor of MBWQ"),
        (lambda: changed(zeros=np.zeros((2, 2), np.float16)), "zeros.shape=(2, 2)"),
        (lambda: changed(rows=ROWS), "rows must be what q_groups says"),
        (lambda: changed(rows=ROWS, q_groups=None), "['rows'] must come with the q_g"),
        (lambda: changed(bias=np.ones(4, np.float16)), "bias is not zero, but the"),
    ],
    ids=["missing", "unknown", "shape", "rows", "mode", "bias"],
)
def test_refuses_a_state(state, message, refuses):
    given = state()
    k, n = len(given["q_perm"]), given["qweight"].shape[1]
    layer, linen = MBWQLinear(k, n), MBWQDense(n)
    before = layer.kernel
    for loading in (layer, linen):
        with refuses(message):
            loading.load_state_dict(given)
    chex.assert_trees_all_equal(layer.kernel, before)


def test_refuses_other_features_and_bias(refuses):
    state = changed()
    k, n = len(state["q_perm"]), state["scales"].shape[1]
    with refuses(f"kernel.shape={(k, n)} must be {(2 * k, n)}, the layer's own."):
        MBWQLinear(2 * k, n).load_state_dict(state)
    with refuses(f"kernel.shape={(k, n)} must be {(k, 4)}"):
        MBWQDense(4).load_state_dict(state)
    with refuses("bias is missing; make the layer with use_bias=False."):
        MBWQLinear(k, n, use_bias=True).load_state_dict(state)
    zero = state | {"bias": np.zeros(n, np.float16)}
    layer = MBWQLinear(k, n)
    layer.load_state_dict(zero)  # which upstream saves, and does not add
    assert layer.bias is None
    with refuses(f"scales must be float16{state['scales'].shape}, as the layer's own"):
        layer.set_scales(state["scales"].astype(np.float32))
    with refuses("zeros must be float16"):
        layer.set_zeros(state["zeros"][:, 1:])
    layer.load(qjax.quantize(jnp.ones((k, n), jnp.float16), group_size=32))
    with refuses("which is no MBWQ kernel"):
        layer.set_zeros(state["zeros"])
    with refuses("MBWQ cannot hold"):
        layer.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 must be one of (2, 4)"),
        ({"group_size": 16}, "group_size=16 must be at least 32"),
        ({"q_groups": (4, 0, 2)}, "q_groups=[4, 0, 2] must be pairs"),
        ({"q_groups": (4, 0, 2, 8)}, "what is left of in_features=64"),
        ({"q_groups": (2, 0, 4, 2)}, "must not increase"),
    ],
    ids=str,
)
def test_refuses_arguments(options, message, refuses):
    with refuses(message):
        MBWQLinear(64, 8, **options)
    with refuses(message):
        MBWQDense(8, **options).init(jax.random.key(0), jnp.ones((1, 64), jnp.float16))
