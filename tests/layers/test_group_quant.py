"""`linen.GroupQuantDense` and `nnx.GroupQuantLinear` against optimum-graphcore."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.formats import flexgen
from qjax.layers.linen import GroupQuantDense, to_params
from qjax.layers.nnx import GroupQuantLinear, Linear
from tests.goldens import load, names
from tests.layers import cases

FILES = [name for name in names("flexgen") if name.startswith("flexgen_group")]


def test_every_golden_file_is_here():
    assert len(FILES) == 8


@pytest.mark.parametrize("name", FILES)
def test_codes_scales_and_output_of_optimum_graphcore(name):
    data = load(name)
    kernel, size = jnp.asarray(data["in_w"]).T, data["config"]["group_size"]
    bias = jnp.asarray(cases.rng().normal(size=kernel.shape[1]), kernel.dtype)
    layer = GroupQuantLinear.from_dense(kernel, bias, group_size=size)
    for found, key in zip(
        flexgen.to_compressed(layer.kernel),
        ("packed", "packed_scale", "packed_bias"),
        strict=True,
    ):
        assert found.dtype == data[key].dtype
        chex.assert_trees_all_equal(np.asarray(found), data[key])
    chex.assert_trees_all_equal(np.asarray(layer.kernel.numpy().T), data["out_q"])
    found = np.asarray(qjax.dequantize(layer.kernel)).T
    chex.assert_trees_all_equal(found, data["out_dequant"])

    x = jnp.asarray(cases.rng(1).normal(size=(3, kernel.shape[0])), kernel.dtype)
    wanted = np.asarray(x, np.float64) @ data["out_dequant"].T.astype(np.float64)
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    # float16 results are rounded once, and so are upstream's weights.
    tolerance = 1e-5 if y.dtype == jnp.float32 else 2e-3
    assert cases.error(y, wanted + np.asarray(bias, np.float64)) <= tolerance
    variables = GroupQuantDense.from_dense(kernel, bias, group_size=size)
    chex.assert_trees_all_equal(to_params(variables)["kernel"], layer.kernel)
    linen = GroupQuantDense(kernel.shape[1])
    chex.assert_trees_all_equal(jax.jit(linen.apply)(variables, x), y)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", ""])
def test_from_model(use_bias):
    theirs = nnx.Linear(64, 16, use_bias=use_bias, dtype="float16", rngs=nnx.Rngs(0))
    layer = GroupQuantLinear.from_model(theirs, 32)
    assert isinstance(layer, Linear)
    assert (layer.kernel.segments[0].group_size, layer.dtype) == (32, "float16")
    wanted = flexgen.quantize(theirs.kernel[...], 32)
    chex.assert_trees_all_equal(layer.kernel, qjax.prepare(wanted))
    assert (layer.bias is None) is not use_bias
    params = nn.Dense(16, use_bias=use_bias).init(jax.random.key(0), jnp.ones((1, 64)))
    made = to_params(GroupQuantDense.from_model(params, 32))
    assert ("bias" in made) is use_bias
    wanted = flexgen.quantize(params["params"]["kernel"], 32)
    chex.assert_trees_all_equal(made["kernel"], qjax.prepare(wanted))


def test_refuses(refuses):
    with refuses("group_size=6 must be a multiple of 4"):
        GroupQuantLinear.from_dense(jnp.ones((64, 8)), group_size=6)
    with refuses("bias.shape=(9,) must be (8,)"):
        GroupQuantDense.from_dense(jnp.ones((64, 8)), jnp.ones(9), group_size=32)
    with refuses("weight must be float16 or float32"):
        flexgen.quantize(jnp.ones((64, 8), jnp.bfloat16), 32)
