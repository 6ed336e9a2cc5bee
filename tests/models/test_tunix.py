"""google-tunix's language models, whose modules all are its own."""

import functools
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from tests.layers import foreign

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm"
sys.path.insert(0, str(EXAMPLE))

import model as llama  # noqa: E402

VOCABULARY, LENGTH, GROUP = 96, 6, 32
CHECKPOINT = EXAMPLE / "checkpoint"
SPEC = qjax.Spec(bits=4, group_size=GROUP)


class Case(NamedTuple):
    """A model, by its module, its class, and what differs from the smallest config."""

    module: str
    name: str
    options: tuple[tuple[str, object], ...] = ()
    dtype: bool = True  # Whether it has one of its own; llama3 is in float32.

    @property
    def needs_inputs(self) -> bool:
        """Whether nothing but its code says how its experts are multiplied."""
        return "num_experts" in dict(self.options)


CASES = {
    "llama3": Case("llama3", "Llama3", dtype=False),
    "llama3-tied": Case("llama3", "Llama3", (("weight_tying", True),), dtype=False),
    "qwen2": Case("qwen2", "Qwen2"),
    "qwen3": Case("qwen3", "Qwen3"),
    "qwen3-tied": Case("qwen3", "Qwen3", (("use_tied_embedding", True),)),
    "qwen3-moe": Case(
        "qwen3", "Qwen3", (("num_experts", 4), ("num_experts_per_tok", 2))
    ),
    "gemma3": Case("gemma3", "Gemma3"),
    "gemma3-qkv": Case("gemma3", "Gemma3", (("num_kv_heads", 4),)),
}
DTYPES = {
    name: ("float32", "bfloat16") if case.dtype else ("float32",)
    for name, case in CASES.items()
}
RUNS = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]
# Relative to the largest logit. float32: the same products, summed in another order.
# bfloat16: each of some ten products of a path is rounded to 8 bits, half a unit of
# 2**-8 at random; the dense weights are rounded once more, ours are not.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-8 * np.sqrt(10) * 2}


def config(case: Case, dtype: str) -> dict:
    options = {
        "num_layers": 2,
        "embed_dim": 64,
        "hidden_dim": 128,
        "num_heads": 4,
        "head_dim": 16,
        "num_kv_heads": 2,
    }
    if case.module == "gemma3":
        options |= {"num_embed": VOCABULARY, "sliding_window_size": 4}
        options |= {"param_dtype": dtype}
    else:
        options |= {"vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-6}
        options |= {"dtype": dtype, "param_dtype": dtype} if case.dtype else {}
    return options | dict(case.options)


def make(case: Case, dtype: str, **options) -> nnx.Module:
    module = importlib.import_module(f"tunix.models.{case.module}.model")
    options = config(case, jnp.dtype(dtype)) | options
    return getattr(module, case.name)(module.ModelConfig(**options), rngs=nnx.Rngs(0))


def drawn(model: nnx.Module) -> nnx.Module:
    """Draws the kernels of linear layers, which some of the models set to zero."""
    key = jax.random.key(1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            key, sample = jax.random.split(key)
            kernel = jax.random.normal(sample, module.kernel.shape) / 8
            module.kernel[...] = kernel.astype(module.kernel.dtype)
    return model


@functools.cache
def dense(name: str, dtype: str) -> nnx.Module:
    return drawn(make(CASES[name], dtype))


@functools.cache
def quantized(name: str, dtype: str) -> nnx.Module:
    inputs = INPUTS if CASES[name].needs_inputs else ()
    return qjax.quantize_model(dense(name, dtype), SPEC, *inputs, strict=True)


@functools.cache
def dequantized(name: str, dtype: str) -> nnx.Module:
    return foreign.dequantized(quantized(name, dtype), dense(name, dtype))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)))
POSITIONS = jnp.tile(jnp.arange(LENGTH)[None], (2, 1))
MASK = jnp.tile(jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None], (2, 1, 1))
INPUTS = (TOKENS, POSITIONS, None, MASK)


@nnx.jit
def run(model, tokens, positions, cache, mask):
    return model(tokens, positions, cache, mask)


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_logits_are_those_of_the_dequantized_model(name, dtype):
    """No projection is dense: a warning that one is would be an error here."""
    found, _ = run(quantized(name, dtype), *INPUTS)
    expected, _ = run(dequantized(name, dtype), *INPUTS)
    foreign.same(found, expected, TOLERANCES[dtype])
    # And they are not those of the weights before they were rounded.
    original, _ = run(dense(name, dtype), *INPUTS)
    assert jnp.abs(original - expected).max() > 0.02 * jnp.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_packed(name):
    report = qjax.memory_report(quantized(name, "float32"))
    plain = [entry for entry in report.entries if entry.bits is None]
    assert plain
    assert all(len(entry.shape) == 1 for entry in plain)
    packed = {entry.path: entry for entry in report.entries if entry.bits}
    if "o_proj" in str(list(packed)):
        # One group is two heads: 32 rows of the flattened contraction.
        assert packed["layers/0/attn/o_proj/w"].shape == (64, 64)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma3"])
def test_a_step_of_decoding_with_a_cache(name):
    case = CASES[name]
    options = config(case, jnp.dtype("float32"))
    shape = (2, LENGTH, options["num_kv_heads"], options["head_dim"])
    cache = {
        f"layer_{i}": {
            "k": jnp.zeros(shape),
            "v": jnp.zeros(shape),
            "end_index": jnp.zeros(2, jnp.int32),
        }
        for i in range(options["num_layers"])
    }
    results = []
    for model in (quantized(name, "float32"), dequantized(name, "float32")):
        start = (TOKENS[:, :4], POSITIONS[:, :4], cache, MASK[:, :4])
        _, filled = run(model, *start)
        step = (TOKENS[:, 4:5], POSITIONS[:, 4:5], filled, MASK[:, 4:5])
        results.append(run(model, *step))
    (found, cache), (expected, wanted) = results
    foreign.same(found, expected)
    close = functools.partial(foreign.same, tolerance=1e-5)
    jax.tree.map(close, cache, wanted)


@pytest.mark.parametrize("name", ["llama3-tied", "qwen2", "qwen3-moe", "gemma3-qkv"])
def test_every_matrix_has_a_gram(name):
    grams = qjax.quantizers.grams(quantized(name, "float32"), [INPUTS] * 2)
    report = qjax.memory_report(quantized(name, "float32"))
    shapes = {entry.path: entry.shape for entry in report.entries if entry.bits}
    if any("lm_head" in path for path in shapes):
        del shapes["embedder/input_embedding"]  # It is looked up, and no more.
    assert grams.keys() == shapes.keys()
    for path, (*stack, k, _) in shapes.items():
        assert grams[path].shape == (*stack, k, k)
        diagonal = np.asarray(grams[path]).diagonal(axis1=-2, axis2=-1)
        assert (diagonal >= 0).all()
        assert diagonal.any()
    rules = qjax.quantizers.calibrated(SPEC, grams)
    better = qjax.quantize_model(dense(name, "float32"), rules, *INPUTS, strict=True)
    expected, *found = (
        run(model, *INPUTS)[0]
        for model in (dense(name, "float32"), better, quantized(name, "float32"))
    )
    errors = [float(jnp.linalg.norm(one - expected)) for one in found]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("remat", ["BLOCK", "DECODER"])
def test_gradients_of_scales_in_a_rematerialized_model(remat):
    module = importlib.import_module("tunix.models.qwen3.model")
    options = {"remat_config": getattr(module.RematConfig, remat)}
    model = drawn(make(CASES["qwen3"], "float32", **options))
    changed = qjax.quantize_model(model, SPEC)
    graphdef, scales, rest = nnx.split(changed, qjax.layers.nnx.Scale, ...)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(scales, is_dense):
        changed = nnx.merge(graphdef, scales, rest, copy=True)
        used = foreign.dequantized(changed, model) if is_dense else changed
        return (used(*INPUTS)[0] ** 2).mean()

    # Sums over the whole model, back and forth.
    close = functools.partial(foreign.same, tolerance=1e-4)
    jax.tree.map(close, gradient(scales, False), gradient(scales, True))


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_an_abstract_model_is_filled_from_another(name):
    case = CASES[name]
    abstract = nnx.eval_shape(lambda: make(case, "float32"))
    model = qjax.quantize_model(abstract, SPEC, strict=True)
    filled = nnx.state(quantized(name, "float32"))
    nnx.update(model, filled)
    found, _ = run(model, *INPUTS)
    expected, _ = run(quantized(name, "float32"), *INPUTS)
    foreign.same(found, expected, 0)


def test_a_checkpoint_of_gptq_fills_an_abstract_model(tmp_path):
    """The shipped model, act-order and all: its own code here, and tunix's."""
    directory = shutil.copytree(CHECKPOINT, tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    # By which Llama3 of tunix 0.1.7 rotates, whatever its config says.
    settings["rope_parameters"]["rope_theta"] = 1_000_000
    (directory / "config.json").write_text(json.dumps(settings))
    module = importlib.import_module("tunix.models.llama3.model")
    config = module.ModelConfig(
        num_layers=3,
        vocab_size=512,
        embed_dim=256,
        hidden_dim=640,
        num_heads=4,
        head_dim=64,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    abstract = nnx.eval_shape(lambda: module.Llama3(config, rngs=nnx.Rngs(0)))
    model = qjax.quantize_model(abstract, [("layers/.*", qjax.Spec())], strict=True)
    shipped = qjax.checkpoints.load(directory)
    weights = {
        "embedder/input_embedding": shipped.pop("model.embed_tokens.weight"),
        "final_norm/w": shipped.pop("model.norm.weight"),
        "lm_head/w": shipped.pop("lm_head.weight").T,
    }
    for name, weight in shipped.items():
        path = name.removeprefix("model.").replace(".", "/")
        path = path.replace("self_attn", "attn").replace("norm/weight", "norm/w")
        weights[path] = weight
    arrays = {
        path: weight if isinstance(weight, qjax.QTensor) else weight.astype("float32")
        for path, weight in weights.items()
    }
    qjax.layers.nnx.load(model, arrays)
    found, _ = run(model, *INPUTS)
    expected = nnx.jit(lambda model: model(TOKENS))(llama.load(directory))
    foreign.same(found, expected)
