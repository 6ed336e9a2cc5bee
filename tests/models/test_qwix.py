"""Rules and arrays of qwix itself."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

import qjax
from qjax import rules
from tests.layers.foreign import same, x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 16), name="heads")(x)
        x = nn.DenseGeneral(64, axis=(-2, -1), name="out")(x)
        return nn.Dense(8, name="head")(nn.gelu(x))


RULES = [
    qwix.QuantizationRule(module_path="head"),
    qwix.QuantizationRule(module_path=".*", weight_qtype="int4", tile_size=16),
]


def test_rules_are_read():
    first, second = rules.read(RULES)
    assert first.spec is None
    assert second.spec == qjax.Spec(bits=4, group_size=16, symmetric=True)


def test_what_has_no_meaning_here_names_the_field():
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    with pytest.raises(NotImplementedError, match=re.escape("has act_qtype='int8'")):
        rules.read([rule])
    with pytest.raises(NotImplementedError, match=re.escape("has weight_qtype='nf4'")):
        rules.read([qwix.QuantizationRule(weight_qtype="nf4")])


def test_arrays_keep_their_codes():
    w = x(64, 24)
    for options in ({}, {"tiled_axes": {0: 16}}):
        array = qwix.quantize(w, jnp.int4, channelwise_axes=[1], **options)
        packed = qjax.layers.qarrays.to_qtensor(
            array, qjax.layers.tracing.views.Form(w.shape, (0,), (1,))
        )
        expected = qwix.dequantize(array)
        np.testing.assert_allclose(qjax.dequantize(packed), expected, rtol=1e-6)


def test_a_model_that_qwix_quantized_gives_the_same_logits():
    model, inputs = Model(), x(3, 64)
    dense = model.init(jax.random.key(0), inputs)["params"]
    theirs = qwix.quantize_model(model, qwix.PtqProvider(RULES))
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), inputs)["params"]
    params = qwix.quantize_params(dense, shapes)
    expected = theirs.apply({"params": params}, inputs)
    given = [("head", None), (".*", qjax.Spec())]
    module, variables = qjax.quantize_model(
        model, given, inputs, variables={"params": params}, strict=True
    )
    found = module.apply(variables, inputs)
    packed = qjax.layers.linen.to_params(variables)
    assert packed["out"]["kernel"].shape == (64, 64)
    assert not isinstance(packed["head"]["kernel"], qjax.QTensor)
    # They sum group by group, in another order.
    same(found, expected)


def test_rules_quantize_a_model_here():
    model, inputs = Model(), x(3, 64)
    variables = model.init(jax.random.key(0), inputs)
    _, packed = qjax.quantize_model(
        model, RULES, inputs, variables=variables, strict=True
    )
    packed = qjax.layers.linen.to_params(packed)
    # Their tile runs over the last axis of the contraction; ours over all of it.
    assert packed["out"]["kernel"].scale.shape == (4, 64)
