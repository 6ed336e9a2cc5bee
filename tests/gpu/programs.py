"""Whole programs around the kernels: products, gradients, a decoder's step."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import qjax
from qjax.formats import fp8
from qjax.formats.tiles import Tiles
from qjax.tensor import Affine, Layout, QTensor, Segment
from tests.gpu.cases import NESTED, weight

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "llm"))
import model
from rope import Rope
from weights import Weights

# A function to compile, and its arguments as structs.
Source = tuple[Callable[..., Any], tuple[Any, ...]]
SIDE = 4096  # of the weight
DENSE = 2 * SIDE * SIDE  # bytes of it in 16 bits

_struct = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Product:
    """``qjax.matmul`` of ``m`` rows by a square matrix of 4 bits, or its gradient."""

    m: int
    gradient: bool = False
    codebook: bool = False
    nested: bool = False

    def __str__(self) -> str:
        kind = "codebook " * self.codebook + "nested " * self.nested
        return f"{kind}{'gradient' if self.gradient else 'matmul'} m{self.m}"

    def __call__(self) -> Source:
        x = _struct((self.m, SIDE), jnp.bfloat16)
        codes = {"affine": Affine.CODEBOOK, "zero": None} if self.codebook else {}
        w = weight(4, 128, k=SIDE, n=SIDE, **codes)
        if self.nested:  # Q4_K
            levels = {"scale": NESTED, "zero": NESTED}
            w = weight(4, 32, k=SIDE, n=SIDE, affine=Affine.OFFSET, **levels)
        return (gradient, (x, x, w)) if self.gradient else (qjax.matmul, (x, w))


@dataclasses.dataclass(frozen=True)
class Float8:
    """``m`` rows, rounded to floats of eight bits, by a matrix of such."""

    m: int

    def __str__(self) -> str:
        return f"float8 m{self.m}"

    def __call__(self) -> Source:
        def packed(w):
            return qjax.relayout(fp8.quantize(w, group_size=None), Tiles())

        w = jax.eval_shape(packed, _struct((SIDE, SIDE), jnp.bfloat16))
        function = functools.partial(qjax.matmul, implementation="xla_float8")
        return function, (_struct((self.m, SIDE), jnp.bfloat16), w)


@dataclasses.dataclass(frozen=True)
class Dense:
    """``qjax.dequantize`` of such a matrix, in another dtype than its scale."""

    codebook: bool = False
    layout: Layout | None = None

    def __str__(self) -> str:
        layout = "" if self.layout is None else f" of {self.layout}"
        return f"{'codebook ' * self.codebook}dequantize{layout}"

    def __call__(self) -> Source:
        (_, w) = Product(1, codebook=self.codebook)()[1]
        if self.layout is not None:
            w = jax.eval_shape(functools.partial(qjax.relayout, layout=self.layout), w)
        return functools.partial(qjax.dequantize, dtype=jnp.bfloat16), (w,)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """``m`` rows by a matrix of several widths, as EXL2 mixes them."""

    group_size: int = 32
    padded: int = 0  # rows that the first segment lacks
    m: int = 1
    cut: tuple[tuple[int, int], ...] = ((6, 256), (4, 2048), (3, 1792))

    def __str__(self) -> str:
        widths = "/".join(str(bits) for bits, _ in self.cut)
        padded = " padded" * bool(self.padded)
        return f"mixed {widths} g{self.group_size}{padded} m{self.m}"

    @property
    def weight(self) -> QTensor:
        g = self.group_size
        codes = {"affine": Affine.CENTERED, "zero": None}
        first, *others = (weight(b, g, k=k, n=SIDE, **codes) for b, k in self.cut)
        return dataclasses.replace(
            first,
            words=(*first.words, *(part.words[0] for part in others)),
            scale=_struct(((SIDE - self.padded) // g, SIDE), jnp.float16),
            segments=(
                Segment(first.segments[0].bits, g, self.padded),
                *(part.segments[0] for part in others),
            ),
        )

    def __call__(self) -> Source:
        w = self.weight
        return qjax.matmul, (_struct((self.m, w.k), jnp.bfloat16), w)


def gradient(x, dy, w):
    def product(x, scale):
        return qjax.matmul(x, dataclasses.replace(w, scale=scale))

    y, pullback = jax.vjp(product, x, w.scale)
    return y, pullback(dy)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The gradient of ``m`` rows that go through several such matrices."""

    m: int
    count: int = 3

    def __str__(self) -> str:
        return f"gradient through {self.count} layers m{self.m}"

    def __call__(self) -> Source:
        x = _struct((self.m, SIDE), jnp.bfloat16)
        return jax.grad(_through), (x, [weight(4, 128, k=SIDE, n=SIDE)] * self.count)


def _through(x, layers):
    for w in layers:
        x = jnp.tanh(qjax.matmul(x, w))
    return x.astype(jnp.float32).sum()


def stack_of(count: int, one: QTensor) -> QTensor:
    return jax.tree.map(lambda a: _struct((count, *a.shape), a.dtype), one)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """``qjax.ragged_matmul`` of ``t`` tokens by such matrices, or its gradient."""

    t: int
    gradient: bool = False
    experts: int = 8

    def __str__(self) -> str:
        return f"ragged {'gradient' if self.gradient else 'matmul'} t{self.t}"

    def __call__(self) -> Source:
        w = stack_of(self.experts, weight(4, 128, k=SIDE, n=SIDE))
        x = _struct((self.t, SIDE), jnp.bfloat16)
        sizes = _struct((self.experts,), jnp.int32)
        if self.gradient:
            return _ragged_gradient, (x, x, w, sizes)
        return qjax.ragged_matmul, (x, w, sizes)


def _ragged_gradient(x, dy, w, sizes):
    def product(x, scale):
        return qjax.ragged_matmul(x, dataclasses.replace(w, scale=scale), sizes)

    y, pullback = jax.vjp(product, x, w.scale)
    return y, pullback(dy)


@dataclasses.dataclass(frozen=True)
class Scanned:
    """``m`` rows through a model that scans its layers, or the rows' gradient."""

    m: int
    gradient: bool = False
    flax: str = "linen"
    side: int = 1024
    count: int = 4

    def __str__(self) -> str:
        what = "gradient" if self.gradient else "layers"
        return f"scanned {self.flax} {what} m{self.m}"

    def __call__(self) -> Source:
        x = _struct((self.m, self.side), jnp.bfloat16)
        # As on a GPU.
        with mock.patch.object(qjax.ops, "_native_layout", qjax.pallas.layout_of):
            apply, variables = getattr(self, f"_{self.flax}")(x)

        def loss(x, variables):
            return apply(variables, x).astype(jnp.float32).sum()

        if self.gradient:
            return jax.grad(loss), (x, variables)
        return apply, (variables, x)

    def _linen(self, x):
        dense = _Layers(self.side, self.count)
        shapes = jax.eval_shape(dense.init, jax.random.key(0), x)
        spec = qjax.Spec(bits=4, group_size=128)
        module, variables = qjax.quantize_model(dense, spec, x, variables=shapes)
        return module.apply, variables

    def _nnx(self, x):
        dense = nnx.eval_shape(lambda: _Stack(self.side, self.count))
        model = qjax.quantize_model(dense, qjax.Spec(bits=4, group_size=128), x)
        graphdef, state = nnx.split(model)
        return lambda state, x: nnx.merge(graphdef, state)(x), state


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        dense = nn.Dense(x.shape[-1], use_bias=False, param_dtype=x.dtype)
        return jnp.tanh(dense(x)), None


class _Layers(nn.Module):
    side: int
    count: int

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(_Layer, length=self.count, **axes)()(x, None)[0]


class _Stack(nnx.Module):
    def __init__(self, side, count):
        @nnx.split_rngs(splits=count)
        @nnx.vmap
        def make(rngs):
            options = {"use_bias": False, "param_dtype": jnp.bfloat16}
            return nnx.Linear(side, side, rngs=rngs, **options)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.layers, x)


@dataclasses.dataclass(frozen=True)
class Native:
    """The same with an array of ``jnp.uint4``, dequantized and multiplied."""

    m: int

    def __str__(self) -> str:
        return f"jnp.uint4 m{self.m}"

    def __call__(self) -> Source:
        scale = _struct((SIDE // 128, SIDE), jnp.bfloat16)
        codes = _struct((SIDE, SIDE), jnp.uint4)
        return _native, (_struct((self.m, SIDE), jnp.bfloat16), codes, scale, scale)


def _native(x, codes, scale, zero):
    groups = codes.astype(jnp.bfloat16).reshape(len(scale), -1, SIDE)
    dense = ((groups - zero[:, None]) * scale[:, None]).reshape(codes.shape)
    return jnp.dot(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderStep:
    """One token through the decoder of examples/llm, all matrices of 4 bits.

    With experts, of which the token takes two, the matrices of all are stacks.
    """

    experts: int = 0
    layers: int = 1
    hidden: int = 1024
    inner: int = 2816
    vocabulary: int = 4096
    positions: int = 256

    def __str__(self) -> str:
        experts = f" with {self.experts} experts" if self.experts else ""
        return f"decoder step of {self.layers} layers{experts}"

    @property
    def config(self) -> model.Config:
        rope = Rope(tuple(1e4 ** (-i / 64) for i in range(64)))
        return model.Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            max_length=self.positions,
            norm_eps=1e-5,
            layers=(model.Layer(None, rope),) * self.layers,
            tied=False,
            top_k=2,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shape of every matrix by its name, those of the same inputs joined."""
        hidden, keys = self.hidden, 256
        mlp = "mlp.experts" if self.experts else "mlp"
        layer = {
            "self_attn.qkv_proj": (hidden, hidden + 2 * keys),
            "self_attn.o_proj": (hidden, hidden),
            f"{mlp}.gate_up_proj": (hidden, 2 * self.inner),
            f"{mlp}.down_proj": (self.inner, hidden),
        }
        shapes = {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        return {**shapes, "lm_head": (hidden, self.vocabulary)}

    def __call__(self) -> Source:
        tensors: dict[str, Any] = {
            name: weight(4, 128, k=k, n=n) for name, (k, n) in self.matrices.items()
        }
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = stack_of(self.experts, tensors[name])
            router = f"{name.partition('.experts')[0]}.gate.weight"
            tensors[router] = _struct((self.experts, self.hidden), jnp.bfloat16)
        embedding = (self.vocabulary, self.hidden)
        tensors["model.embed_tokens.weight"] = _struct(embedding, jnp.bfloat16)
        norms = [
            f"model.layers.{i}.{name}"
            for i in range(self.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        for name in (*norms, "model.norm"):
            tensors[f"{name}.weight"] = _struct((self.hidden,), jnp.bfloat16)
        cache = jax.eval_shape(
            lambda: model.Cache.empty(self.config, 1, self.positions, jnp.bfloat16)
        )
        ids = _struct((1, 1), jnp.int32)
        return functools.partial(_step, self.config), (tensors, ids, cache)


def _step(config, tensors, ids, cache):
    # As on a GPU, where the layers would find the matrices prepared.
    with mock.patch.object(qjax.ops, "_native_layout", lambda w: w.layout):
        decoder = model.Decoder(Weights(dict(tensors), config, jnp.bfloat16))
    hidden, cache = decoder.forward(ids, cache)
    return decoder.logits(hidden[:, -1]).argmax(-1), cache
