"""Modules as others write them, and the same models over the dequantized weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

import qjax
from qjax.layers.nnx import wrapped
from qjax.layers.tracing import interpreter
from qjax.layers.tracing.held import dense

MODEL, HEADS, HEAD, VOCABULARY, GROUP = 64, 4, 16, 96, 32
SPEC = qjax.Spec(bits=4, group_size=GROUP)
# Products of float32 by the same weights, summed in another order.
FLOAT32 = 1e-5


def x(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, VOCABULARY, shape))


def same(found, expected, tolerance: float = FLOAT32) -> None:
    """Compares with the largest of what is expected, as rounding errors do."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    wide = [np.asarray(array, np.float32) for array in (found, expected)]
    assert np.abs(wide[1]).max() > 0
    assert np.abs(wide[0] - wide[1]).max() <= tolerance * np.abs(wide[1]).max()


class Einsum(nnx.Module):
    """As in google-tunix: a weight `w`, cast by `jnp.astype`; and it counts calls."""

    def __init__(self, equation: str, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.einsum_str = equation
        self.w = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    @jax.named_scope("einsum")
    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return jnp.einsum(self.einsum_str, x, jnp.astype(self.w[...], x.dtype))

    @property
    def features(self) -> int:
        return self.w[...].shape[-1]


class Embedder(nnx.Module):
    """A table that is both indexed and multiplied by, transposed."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.normal()
        self.input_embedding = nnx.Param(init(rngs.params(), (VOCABULARY, MODEL)))

    def encode(self, tokens):
        return self.input_embedding[(tokens,)] * 8

    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)


class Experts(nnx.Module):
    """A stack of matrices that no attribute describes, and that is indexed."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.up = nnx.Param(init(rngs.params(), (3, MODEL, 32)))
        self.down = nnx.Param(init(rngs.params(), (3, 32, MODEL)))

    def __call__(self, x):
        y = [nnx.silu(x @ self.up[...][i]) for i in range(3)]
        return jnp.einsum("ebtf,efd->btd", jnp.stack(y), self.down[...])


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedder = Embedder(rngs)
        self.q = Einsum("BTD,DNH->BTNH", (MODEL, HEADS, HEAD), rngs)
        self.o = Einsum("BTNH,NHD->BTD", (HEADS, HEAD, MODEL), rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, MODEL, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(MODEL, rngs=rngs)
        self.up = nnx.Linear(MODEL, MODEL, rngs=rngs)
        self.experts = Experts(rngs)

    def __call__(self, tokens):
        x = self.embedder.encode(tokens)
        x = x + self.o(self.q(x))
        x = x + self.attention(self.norm(x))
        x = x + self.experts(nnx.gelu(self.up(x)))
        return self.embedder.decode(x)


@functools.cache
def transformer() -> Transformer:
    return Transformer(nnx.Rngs(0))


def dequantized(quantized: nnx.Module, model: nnx.Module) -> nnx.Module:
    """The dense model with the weights that the quantized one stands for."""
    model = nnx.clone(model)
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    for path, module in nnx.iter_modules(quantized):
        for name, packed in wrapped.packed_weights(module).items():
            if isinstance(module, qjax.layers.nnx.Linear):
                weight = qjax.dequantize(nnx.as_pure(packed))
            else:
                weight = dense(wrapped.held(module)[name])
            variables[(*path, name)].set_raw_value(weight)
    return model


def dequantized_params(module: nn.Module, variables: dict) -> dict:
    """The dense params that the variables of a quantized linen module stand for."""
    flat = traverse_util.flatten_dict(qjax.layers.linen.to_params(variables))
    for names, weight in flat.items():
        if (path := "/".join(names)) in module.packed_forms:
            form, dtype = module.packed_forms[path]
            flat[names] = dense(interpreter.hold(weight, form, jnp.dtype(dtype), path))
    return traverse_util.unflatten_dict(flat)
