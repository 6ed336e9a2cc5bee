"""Arrays that qwix quantized, by the fields of its `QArray`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.layers import qarrays
from qjax.layers.tracing.views import Form
from tests.layers.foreign import same, x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """The fields of qwix's own, version 0.1.8; `make test-models` reads real ones."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    shape = property(lambda self: self.qvalue.shape)
    ndim = property(lambda self: self.qvalue.ndim)
    dtype = property(lambda self: self.scale.dtype)


def make(shape, scale_shape, *, dtype=jnp.int4, zero=False) -> QArray:
    draw = np.random.default_rng(0)
    limits = jnp.iinfo(dtype)
    codes = draw.integers(int(limits.min), int(limits.max) + 1, shape)
    scale = jnp.asarray(draw.uniform(0.5, 1.5, scale_shape), jnp.float32)
    zeros = jnp.asarray(draw.integers(-3, 4, scale_shape), dtype) if zero else None
    return QArray(jnp.asarray(codes, dtype), scale, zeros)


def dense(array: QArray) -> np.ndarray:
    """The formula of qwix's class, in float64: (qvalue - zero_point) * scale."""
    weight = np.asarray(array.qvalue, np.float64)
    scale, zero = (
        np.zeros(()) if leaf is None else np.asarray(leaf, np.float64)
        for leaf in (array.scale, array.zero_point)
    )
    for axis, size in enumerate(weight.shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
        if zero.ndim:
            zero = np.repeat(zero, size // zero.shape[axis], axis)
    return (weight - zero) * scale


CASES = {
    "column": ((64, 24), (1, 24), Form((64, 24), (0,), (1,)), None),
    "tiles": ((64, 24), (4, 24), Form((64, 24), (0,), (1,)), 16),
    "one": ((64, 24), (1, 1), Form((64, 24), (0,), (1,)), None),
    "output": ((4, 16, 24), (1, 1, 24), Form((4, 16, 24), (0, 1), (2,)), None),
    "by-head": ((4, 16, 24), (4, 1, 24), Form((4, 16, 24), (0, 1), (2,)), 16),
    "within-heads": ((4, 16, 24), (4, 2, 24), Form((4, 16, 24), (0, 1), (2,)), 8),
    "heads": ((64, 4, 6), (2, 4, 6), Form((64, 4, 6), (0,), (1, 2)), 32),
    "heads-together": ((64, 4, 6), (2, 4, 1), Form((64, 4, 6), (0,), (1, 2)), 32),
    "experts": ((3, 64, 8), (3, 2, 8), Form((3, 64, 8), (1,), (2,)), 32),
    "table": ((24, 64), (24, 2), Form((24, 64), (1,), (0,)), 32),
    "stacked": ((2, 64, 8), (2, 1, 8), Form((64, 8), (0,), (1,)), None),
}


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero"])
@pytest.mark.parametrize("dtype", [jnp.int4, jnp.int8])
@pytest.mark.parametrize("name", CASES)
def test_codes_are_kept(name, dtype, zero):
    shape, scale_shape, form, group = CASES[name]
    array = make(shape, scale_shape, dtype=dtype, zero=zero)
    w = qarrays.to_qtensor(array, form)
    assert (w.segments[0].group_size, w.bits) == (group, jnp.iinfo(dtype).bits)
    found = qjax.dequantize(w)
    # One product of an integer and a float32 scale: one rounding.
    wanted = form.matrix(dense(array))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (make((64, 8), (1, 8), dtype=jnp.uint8), "no signed integer of 2 to 8 bits"),
        (make((64, 8), (1, 8), dtype=jnp.int16), "no signed integer of 2 to 8 bits"),
        (make((36, 8), (1, 8)), "k=36 is no multiple of 8"),
    ],
)
def test_what_is_no_qtensor_says_why(array, reason):
    form = Form(array.shape, (0,), (1,))
    with pytest.raises(ValueError, match=reason):
        qarrays.to_qtensor(array, form)


def test_groups_across_rows_are_refused():
    array = make((4, 16, 24), (1, 16, 24))
    with pytest.raises(ValueError, match="groups that are no runs of rows"):
        qarrays.to_qtensor(array, Form((4, 16, 24), (0, 1), (2,)))


def test_a_linen_model_of_qarrays_keeps_its_codes():
    array = make((64, 24), (2, 24))
    variables = {"params": {"kernel": array, "bias": x(24)}}
    module, packed = qjax.quantize_model(nn.Dense(24), qjax.Spec(), variables=variables)
    expected = x(3, 64) @ jnp.asarray(dense(array), jnp.float32) + x(24)[None]
    same(module.apply(packed, x(3, 64)), expected)


def test_an_nnx_model_of_qarrays_keeps_its_codes():
    layer = nnx.Linear(64, 24, rngs=nnx.Rngs(0))
    array = make((64, 24), (2, 24))
    layer.kernel.set_raw_value(array)
    changed = qjax.quantize_model(layer, qjax.Spec())
    same(changed(x(3, 64)), x(3, 64) @ jnp.asarray(dense(array), jnp.float32))
