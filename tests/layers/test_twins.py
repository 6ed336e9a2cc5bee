"""The linen and the nnx layer agree bit for bit, and with Flax on dtypes."""

import itertools

import chex
import flax.linen as nn
import jax
import pytest
from flax import nnx

from qjax.layers.linen import Dense, to_params, to_variables
from qjax.layers.nnx import Linear
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

DTYPES = (None, *cases.FLOATS)


@pytest.mark.parametrize(
    ("name", "use_bias"), [*((name, True) for name in cases.KERNELS), ("3bit", False)]
)
def test_twins_agree(name, use_bias):
    kernel, bias = cases.kernel(name), cases.bias() if use_bias else None
    params = {"kernel": kernel} | ({"bias": bias} if use_bias else {})
    linen, nnx_layer = Dense(N, use_bias=use_bias), Linear.from_qtensor(kernel, bias)
    xs = [cases.inputs(dtype) for dtype in cases.FLOATS]

    # Two programs, each for every dtype: in one, XLA would see that they are the same.
    @jax.jit
    def run_linen(variables):
        return [linen.clone(dtype=x.dtype).apply(variables, x) for x in xs]

    @nnx.jit
    def run_nnx(layer):
        return [_in_dtype(layer, x.dtype)(x) for x in xs]

    found = run_linen(to_variables(params))
    chex.assert_trees_all_equal(found, run_nnx(nnx_layer))
    assert [y.dtype for y in found] == [x.dtype for x in xs]


def _in_dtype(layer, dtype):
    copy = nnx.clone(layer)
    copy.dtype = dtype
    return copy


@pytest.mark.parametrize("name", cases.KERNELS)
def test_twins_hold_the_same_arrays(name):
    kernel = cases.kernel(name)
    ours = to_params(to_variables({"kernel": kernel}))["kernel"]
    chex.assert_trees_all_equal(ours, Linear.from_qtensor(kernel).kernel)


@pytest.mark.parametrize("use_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("param_dtype", cases.FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype_is_that_of_flax(dtype, param_dtype, use_bias):
    options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
    pairs = [
        (
            Linear(K, N, group_size=GROUP, **options),
            nnx.Linear(K, N, rngs=nnx.Rngs(0), **options),
        ),
        (
            lambda x: Dense(N, group_size=GROUP, **options).init_with_output(
                jax.random.key(0), x
            )[0],
            lambda x: nn.Dense(N, **options).init_with_output(jax.random.key(0), x)[0],
        ),
    ]
    for (ours, theirs), x in itertools.product(pairs, (*cases.FLOATS, "int32")):
        struct = jax.ShapeDtypeStruct((2, 3, K), x)
        with jax.numpy_dtype_promotion("standard"):
            found, wanted = jax.eval_shape(ours, struct), jax.eval_shape(theirs, struct)
        assert found == wanted, x


def test_strict_promotion_refuses_what_flax_refuses():
    x, theirs = cases.inputs("bfloat16"), nnx.Linear(K, N, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for layer in (Linear(K, N, group_size=GROUP), theirs):
            with pytest.raises(
                ValueError, match="no available implicit dtype promotion"
            ):
                layer(x)
        cast = Linear(K, N, group_size=GROUP, dtype=x.dtype)
        assert cast(x).dtype == x.dtype
