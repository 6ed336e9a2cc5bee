"""Configurations that a caller writes, with numbers that make no matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import fp8, gptq, hqq, quanto, torchao

W = qjax.quantize(jnp.ones((64, 64)), 4, 32, scale_dtype=jnp.float16)
NO_SIZES = [0, -32, 32.0, True, "32", 2**40]


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
@pytest.mark.parametrize(
    "read",
    [
        lambda size: gptq.check(gptq.to_tensors(W), gptq.Config(group_size=size)),
        lambda size: torchao.check(
            torchao.to_tensors(W), torchao.Config(bits=4, group_size=size)
        ),
        lambda size: hqq.check({}, hqq.Config(group_size=size)),
    ],
    ids=["gptq", "torchao", "hqq"],
)
def test_sizes_of_groups(read, size, refuses):
    with refuses(f"group_size={size!r} must be a positive integer below 2**31"):
        read(size)


@pytest.mark.parametrize("size", [np.int64(32), 32])
def test_numbers_of_numpy_are_sizes(size):
    gptq.check(gptq.to_tensors(W), gptq.Config(group_size=size))


@pytest.mark.parametrize("k", NO_SIZES, ids=repr)
def test_inputs_of_quanto(k, refuses):
    with refuses(f"k={k!r} must be a positive integer below 2**31"):
        quanto.from_tensors(quanto.to_tensors(W), quanto.Config(weights="qint4", k=k))


def test_blocks_of_fp8(refuses):
    tensors = fp8.to_tensors(fp8.quantize(jnp.ones((128, 128)), group_size=128))
    with refuses("block_size=(0, 128) must be two positive integers"):
        fp8.check(tensors, fp8.Config(block_size=(0, 128)))
