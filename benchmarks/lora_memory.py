"""Plans the memory of one LoRA step: a frozen 4-bit Llama against the same one dense.

    python benchmarks/lora_memory.py

    # For an H100, compiled without one, in the environment of `make gpu-check`:
    JAX_PLATFORMS=cpu .venv-gpu/bin/python benchmarks/lora_memory.py --device sm_90

The model is that of ``examples/llm`` with layers of the shape of Llama 2 7B, adapters
of rank 16 beside every matrix and Adam over the adapters. Nothing is allocated: XLA
compiles the step for abstract arrays, and its ``memory_analysis`` is what the table
shows. The activations of a layer are kept for the backward pass, or computed again.

Prints a table and writes it, as JSON, to ``benchmarks/results/``.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_decode
import harness
import jax
import jax.numpy as jnp
import model as llm  # on the path that gpu_decode adds
import optax
from flax import nnx

import qjax
from qjax import training
from qjax.formats.tiles import Tiles

RANK, GROUP, MIB = 16, gpu_decode.GROUP, 1 << 20
KINDS = {"4 bits": None, "dense bf16": jnp.bfloat16, "dense f32": jnp.float32}


def decoder(size: gpu_decode.Size, kind: str, dtype: Any, layout: Any) -> llm.Decoder:
    """The model with adapters, called while abstract arrays are traced."""
    tensors: dict[str, Any] = {}
    for name, (k, n) in size.matrices.items():
        if kind == "4 bits":
            dense = jnp.zeros((k, n), jnp.float32)
            w = qjax.quantize(dense, 4, GROUP, scale_dtype=jnp.float16)
            tensors[name] = qjax.prepare(w, layout=layout)
        else:
            tensors[f"{name}.weight"] = jnp.zeros((n, k), KINDS[kind])
    embedding = jnp.zeros((size.vocabulary, size.hidden), jnp.bfloat16)
    return gpu_decode.assembled(size, tensors, embedding, dtype)


def adapted(model: llm.Decoder, kind: str) -> llm.Decoder:
    """Adapters beside every matrix: qjax's, or Flax's own beside a dense one."""
    rngs = nnx.Rngs(0)
    if kind == "4 bits":
        return training.nnx.add_lora(model, RANK, rngs=rngs)

    def beside(_: tuple, node: Any) -> Any:
        if not isinstance(node, llm.Dense):
            return node
        n, k = node.weight.shape
        return nnx.LoRA(k, RANK, n, base_module=node, dtype=node.dtype, rngs=rngs)

    return nnx.recursive_map(beside, model)


def loss_of(model: llm.Decoder, ids: jax.Array, remat: bool) -> jax.Array:
    """Mean nats of the next token; a layer's activations kept, or its input alone."""
    cache = llm.Cache.empty(model.config, *ids[:, 1:].shape, model.dtype)
    x = jnp.take(model.embed_tokens[...], ids[:, :-1], axis=0).astype(model.dtype)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        run = lambda layer, *operands: layer(*operands)[0]  # noqa: E731
        run = nnx.remat(run) if remat else run
        x = run(layer, x, keys, values, cache.length, cache.first)
    logits = model.logits(model.norm(x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def step(model: llm.Decoder, optimizer: nnx.Optimizer, ids: Any, remat: bool) -> Any:
    """One step of Adam over the adapters."""
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradient = nnx.value_and_grad(loss_of, argnums=wrt)(model, ids, remat)
    optimizer.update(model, gradient)
    return loss


def compiled(size: gpu_decode.Size, kind: str, remat: bool, args: Any) -> Any:
    """The compiled step, and the bytes of weights and of what is trained."""
    gpu = args.device != "cpu"
    layout = Tiles() if gpu else None

    def start() -> tuple[llm.Decoder, nnx.Optimizer]:
        dtype = jnp.bfloat16 if gpu or kind == "dense bf16" else jnp.float32
        model = adapted(decoder(size, kind, dtype, layout), kind)
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)

    # Layers find their matrices prepared, whatever device this machine has.
    keep = mock.patch.object(qjax.ops, "_native_layout", lambda w: layout or w.layout)
    with keep if gpu else mock.MagicMock():
        graph, state = nnx.split(nnx.eval_shape(start))
    ids = jax.ShapeDtypeStruct((args.batch, args.context + 1), jnp.int32)

    def pure(state: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer, ids, remat)
        _, new = nnx.split((model, optimizer))
        # What is frozen is no result.
        return loss, nnx.filter_state(new, nnx.Any(nnx.LoRAParam, nnx.OptState))

    trained = nnx.filter_state(state, nnx.Any(nnx.LoRAParam, nnx.OptState))
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in (state, trained)
    ]
    if gpu:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.gpu import compiler

        program = compiler.compile_for(pure, state, ids, arch=args.device)
        return sizes, program.temporaries
    plan = jax.jit(pure).lower(state, ids).compile().memory_analysis()
    return sizes, plan.temp_size_in_bytes


def main() -> None:
    """Compiles every kind of step, prints the table and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "sm_80", "sm_90"])
    for name, default in (("layers", 2), ("batch", 1), ("context", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    size, rows = gpu_decode.Size(layers=args.layers), []
    heads = ("weights", "adapters, Adam", "temporaries", "in all")
    print(f"| MiB | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for kind in KINDS:
        for remat in (False, True):
            (total, trained), temporaries = compiled(size, kind, remat, args)
            sizes = (total - trained, trained, temporaries, total + temporaries)
            label = f"{kind}{', computed again' if remat else ''}"
            rows.append({"step": label, **dict(zip(heads, sizes, strict=True))})
            cells = " | ".join(f"{s / MIB:.0f}" for s in sizes)
            print(f"| {label} | {cells} |", flush=True)
    release = importlib.metadata.version("jax")
    names = ("device", "layers", "batch", "context")
    arguments = {name: getattr(args, name) for name in names}
    report = {"arguments": arguments, "jax": release, "bytes": rows}
    name = f"lora_memory-{args.device}-jax{release}"
    print(harness.write(name, report, args.results))


if __name__ == "__main__":
    sys.exit(main())
