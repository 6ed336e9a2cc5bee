"""Layers over mixed widths that are cut along k: their scales lie in segments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax
from qjax import training
from qjax.formats.gptq import Stream
from qjax.layers import linen
from qjax.layers import nnx as ours
from qjax.sharding import Segmented
from qjax.tensor import QTensor, Segment, build
from tests.layers.foreign import same, x

K, N = 128, 64


def mixed() -> QTensor:
    draw = np.random.default_rng(0)

    def words(bits: int) -> jnp.ndarray:
        codes = draw.integers(0, 2**bits, (64, N))
        return Stream().pack(jnp.asarray(codes, jnp.uint8), bits)

    return build(
        [words(4), words(2)],
        jnp.asarray(draw.uniform(0.5, 1, (4, N)), jnp.float32),
        jnp.ones((4, N), jnp.uint8),
        layout=Stream(),
        segments=[Segment(4, 32), Segment(2, 32)],
    )


def cut(w: QTensor) -> QTensor:
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = qjax.shard(w, mesh, P("model"))
    assert isinstance(sharded.scale, Segmented)
    return sharded


def dense_general(w):
    variables = linen.to_variables({"kernel": w})
    layer = linen.DenseGeneral((8, 8), use_bias=False)
    return layer.apply(variables, x(3, K)).reshape(3, N)


def rows(w):
    variables = linen.to_variables({"embedding": w})
    return linen.Embed(N, K).apply(variables, jnp.array([3, 1]))


def loaded(w):
    model = qjax.quantize_model(
        nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0)), qjax.Spec(group_size=32)
    )
    ours.load(model, {"kernel": w})
    return model(x(3, K))


def trained(w):
    """A step along a shadow gradient, which gives back leaves of the same tree."""
    layer = ours.Linear.from_qtensor(w)
    step = training.apply_updates(layer.kernel, 0.3 * jnp.sign(x(K, N)))
    training.nnx.load_kernels(layer, {"": step})
    return layer(x(3, K))


def rounded(w):
    return qjax.dequantize(training.requantize(w, 2 * x(K, N)))


@pytest.mark.parametrize("use", [dense_general, rows, loaded, trained, rounded])
def test_equals_the_whole_weight(use):
    # Float32, and each device sums its rows alone.
    same(use(cut(mixed())), use(mixed()))


def test_bytes_round_trip():
    variables = linen.to_variables({"kernel": cut(mixed())})
    again = serialization.from_bytes(variables, serialization.to_bytes(variables))
    chex.assert_trees_all_equal(again, variables)
