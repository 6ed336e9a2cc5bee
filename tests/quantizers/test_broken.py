"""What is not finite shows, whichever quantizer it goes through; x64; meshes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import bitnet, fp8, mxfp4
from qjax.quantizers import awq, calibrated, clip, gptq, gram, grams, hqq, output_error

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 24)).astype(np.float32)
X = RNG.standard_normal((128, 64)).astype(np.float32)
GRAM = gram(X)
ALONE = {"rtn": qjax.quantize, "clip": clip.quantize, "hqq": hqq.quantize}
SEEING = {
    "gptq": functools.partial(gptq.quantize, clip=True),
    "awq": functools.partial(awq.quantize, clip=True),
}
ALL = ALONE | {
    name: functools.partial(quantize, gram=GRAM) for name, quantize in SEEING.items()
}


@pytest.mark.parametrize("name", ["rtn", "clip", "hqq", "gptq"])
def test_a_nan_stays_where_it_is(name):
    w = W.copy()
    w[5, 3] = np.nan
    packed = ALL[name](w, 4, 32)
    dense = np.asarray(qjax.dequantize(packed))
    assert np.isnan(dense[:32, 3]).all()
    assert np.isfinite(np.delete(dense, 3, 1)).all()
    assert np.isnan(output_error(w, packed))


def test_an_error_that_is_not_finite_is_no_0(refuses):
    packed = qjax.quantize(W, 4, 32)
    assert np.isnan(output_error(np.full_like(W, np.nan), packed))
    with refuses("w must be finite; it holds NaN or infinity"):
        awq.quantize(np.full_like(W, np.nan), 4, 32, gram=GRAM)


@pytest.mark.parametrize("of", [*ALL.values(), bitnet, fp8, mxfp4])
def test_a_list_is_refused(of, refuses):
    quantize = getattr(of, "quantize", of)
    with refuses("w is list, and must be an array", TypeError):
        quantize(W.tolist())


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_a_gram_that_is_not_finite_is_refused(refuses, value):
    with refuses("is not positive definite"):
        gptq.quantize(W, 4, 32, gram=GRAM.at[0, 0].set(value).at[9, 9].set(value))
    with refuses("damp=inf must be finite"):
        gptq.quantize(W, 4, 32, gram=GRAM, damp=float("inf"))


def test_the_size_of_inputs_says_nothing():
    chex.assert_trees_all_equal(
        gptq.quantize(W, 4, 32, gram=GRAM * 2.0**100),
        gptq.quantize(W, 4, 32, gram=GRAM),
    )


def test_zeros_of_hqq_stay_in_range():
    w = 8 + 1e-3 * W
    packed = hqq.quantize(w, 4, 32, scale_dtype=jnp.float16)
    assert jnp.isfinite(packed.zero).all()
    assert output_error(w, packed) < 1e-3


@pytest.mark.parametrize("name", ALL)
def test_with_x64_it_is_the_same(name):
    expected = ALL[name](W, 3, 32)
    with jax.enable_x64(True):
        found = ALL[name](W, 3, 32)
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [
            leaf.dtype for leaf in jax.tree.leaves(expected)
        ]
    same = np.asarray(found.numpy()) == np.asarray(expected.numpy())
    assert same.mean() > 0.99


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)])
def test_operands_on_a_mesh(spec):
    mesh = jax.make_mesh((2,), ("model",))
    w = jax.device_put(W, NamedSharding(mesh, spec))
    x = jax.device_put(X, NamedSharding(mesh, P("model")))
    seen = gram(x)
    np.testing.assert_allclose(seen, GRAM, rtol=1e-5, atol=1e-3)
    found = gptq.quantize(w, 4, 32, gram=seen)
    assert (found.numpy() == gptq.quantize(W, 4, 32, gram=GRAM).numpy()).mean() > 0.99


def model():
    return nnx.Sequential(
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 32, rngs=nnx.Rngs(1))
    )


SPEC = qjax.Spec(bits=4, group_size=32)


def test_grams_name_inputs_that_are_not_finite(refuses):
    rounded = qjax.quantize_model(model(), SPEC)
    with refuses("the inputs of ['layers/0/kernel', 'layers/1/kernel'] are not finite"):
        grams(rounded, [jnp.full((2, 64), jnp.nan)])


def test_rules_for_other_models_are_told_of():
    rules = calibrated(SPEC, {"layers/7/kernel": GRAM})
    with pytest.warns(UserWarning, match="quantizers for 1 paths that no weight has"):
        qjax.quantize_model(model(), rules)


def test_errors_of_a_quantizer_name_the_weight(refuses):
    with refuses("layers/0/kernel: gram is float32(32, 32)"):
        qjax.quantize_model(model(), calibrated(SPEC, {"layers/0/kernel": jnp.eye(32)}))
    half = qjax.Spec(
        group_size=32, quantizer=lambda w, *kind, **_: qjax.quantize(w[:, ::2], 4, 32)
    )
    with refuses("layers/0/kernel: quantizer returned QTensor(64x32"):
        qjax.quantize_model(model(), half)
    with refuses("what quantizer returned is ArrayImpl", TypeError):
        none = qjax.Spec(group_size=32, quantizer=lambda w, *kind, **_: w)
        qjax.quantize_model(model(), none)


def test_the_report_names_quantizers():
    reports = []
    rules = calibrated(SPEC, {"layers/0/kernel": GRAM}, act_order=True)
    qjax.quantize_model(model(), rules, report=reports.append)
    assert [entry.reason for entry in reports[0].replaced] == ["by gptq.quantize", None]


def test_what_rounding_cannot_make_is_not_loaded_from_dense_arrays(refuses):
    abstract = nnx.eval_shape(model)
    reports = []
    spec = qjax.Spec(bits=4, group_size=32, quantizer=hqq.quantize)
    packed = qjax.quantize_model(abstract, spec, report=reports.append)
    assert "a dense array that is loaded there is" in reports[0].replaced[0].reason
    dense = {"layers/0/kernel": jnp.ones((64, 64))}
    with refuses("its quantizer found; quantize the weight, and pass a QTensor"):
        qjax.layers.nnx.load(packed, dense)
