"""transformers dequantizes the experts of gpt-oss that qjax wrote as MXFP4."""

import jax
import jax.numpy as jnp
import numpy as np
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qjax
from qjax.formats import mxfp4
from tests.peers import arrays


def test_a_stack_of_experts():
    w = jax.random.normal(jax.random.key(0), (3, 96, 40), jnp.bfloat16)
    stack = mxfp4.quantize(w)
    tensors = arrays.state(mxfp4.to_tensors(qjax.prepare(stack)))
    weight = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"])
    found = arrays.to_numpy(weight)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, np.asarray(qjax.dequantize(stack)))
