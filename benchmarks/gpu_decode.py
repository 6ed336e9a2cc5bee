"""Times decoding of a Llama of 7 billion random weights: 4 bits against dense bfloat16.

    python benchmarks/gpu_decode.py [--seconds N]

    # A smoke run, which shows that the script works:
    python benchmarks/gpu_decode.py --platform cpu --layers 2 --hidden 256 \\
        --inner 512 --heads 4 --vocabulary 1024 --positions 64 --steps 8

Both are the model of ``examples/llm``, one token of one sequence a step, one compiled
step that owns its cache; only the matrices differ. Each runs in a process of its own,
with XLA's CUDA graphs and without them. Peak memory is what the allocator has handed
out at once, packing included, and beside it what XLA plans for a step: weights, cache
and temporaries.

Prints a table and writes it, as JSON, to
``benchmarks/results/gpu_decode-<device>-jax<version>.json``, anew after every process.
With ``--seconds`` it ends before the next process would take longer than that, and says
in the file what is left out. On a CPU nothing is written unless ``--results`` names a
folder: such figures mean nothing.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness
from harness import Worker

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "llm"))

GROUP = 128
WARM_UP = 3
REPEATS = 5
# In the order in which they are measured, as long as there is time.
DENSE = "dense bf16"
KINDS = ("4 bits", DENSE)
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ANSWER = 900  # seconds in which a process has packed, compiled and decoded


@dataclasses.dataclass(frozen=True)
class Size:
    """Extents of the model, those of Llama 2 7B if nothing is said."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    positions: int = 512
    steps: int = 128

    @property
    def config(self) -> dict[str, Any]:
        """As in config.json."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
        }

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs by name; the largest first, while memory is empty."""
        square = {f"self_attn.{name}_proj": (self.hidden,) * 2 for name in "qkvo"}
        layer = square | {
            "mlp.gate_proj": (self.hidden, self.inner),
            "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }
        shapes = {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        return {"lm_head": (self.hidden, self.vocabulary), **shapes}


def decoder(size: Size, kind: str) -> Any:
    """A model of random weights."""
    import jax
    import jax.numpy as jnp
    from tensors import join

    import qjax

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def dense(key: Any, n: int, k: int) -> Any:
        return jax.random.normal(key, (n, k), jnp.bfloat16) / k**0.5

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def packed(key: Any, n: int, k: int) -> Any:
        return qjax.quantize(dense(key, n, k).T, 4, GROUP, scale_dtype=jnp.float16)

    tensors: dict[str, Any] = {}
    for i, (name, (k, n)) in enumerate(size.matrices.items()):
        key = jax.random.key(i)
        if kind == "4 bits":
            tensors[name] = qjax.prepare(packed(key, n, k))
        else:
            tensors[f"{name}.weight"] = dense(key, n, k)
    join(tensors)
    embedding = dense(jax.random.key(-1), size.vocabulary, size.hidden)
    return assembled(size, tensors, embedding, jnp.bfloat16)


def assembled(size: Size, tensors: dict[str, Any], embedding: Any, dtype: Any) -> Any:
    """The model of these matrices, norms of ones, and activations of a dtype."""
    import jax.numpy as jnp
    import model
    from weights import Weights

    tensors["model.embed_tokens.weight"] = embedding
    norms = [
        f"model.layers.{i}.{name}"
        for i in range(size.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in (*norms, "model.norm"):
        tensors[f"{name}.weight"] = jnp.ones(size.hidden, jnp.bfloat16)
    config = model.Config.from_json(size.config)
    return model.Decoder(Weights(tensors, config, dtype))


def run(size: Size, kind: str) -> dict[str, Any]:
    """Decodes, and returns figures."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from model import Cache

    built = decoder(size, kind)
    config, dtype = built.config, built.dtype
    graph, state = nnx.split(built)
    del built

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(state: Any, token: Any, cache: Any) -> tuple[Any, Any]:
        merged = nnx.merge(graph, state)
        hidden, cache = merged.forward(token[:, None], cache)
        return merged.logits(hidden[:, -1]).argmax(-1).astype(jnp.int32), cache

    def start() -> tuple[Any, Any]:
        cache = Cache.empty(config, 1, size.positions, dtype)
        return jnp.zeros(1, jnp.int32), cache

    compiled = step.lower(state, *start()).compile()
    rates = []
    for _ in range(REPEATS + 1):
        token, cache = start()
        for _ in range(WARM_UP):
            token, cache = compiled(state, token, cache)
        jax.block_until_ready(token)
        started = time.perf_counter()
        for _ in range(size.steps):
            token, cache = compiled(state, token, cache)
        jax.block_until_ready(token)
        rates.append(size.steps / (time.perf_counter() - started))
    plan = compiled.memory_analysis()
    device = jax.devices()[0]
    memory = device.memory_stats()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    embedding = 2 * size.vocabulary * size.hidden
    return {
        "device": device.device_kind,
        "tokens_per_s": rates[1:],
        "weight_bytes": weights,
        "read_bytes": weights - embedding,  # of which a step reads one row
        "planned_bytes": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes,
        "peak_bytes": memory["peak_bytes_in_use"]
        if memory
        else harness.resident("VmHWM"),
    }


def work(kind: str) -> None:
    """Serves one kind of weights."""

    def answer(request: dict[str, Any]) -> Any:
        try:
            return run(Size(**request), kind)
        except Exception as error:
            return {"failed": harness.reason(error)}

    harness.serve(answer)


def table(results: dict[str, dict[str, Any]], title: str) -> str:
    """Renders the results as Markdown."""
    lines = [
        f"\n**{title}**\n",
        "| weights | tokens/s (least to most) | against dense | GB/s of weights "
        "| weights, GB | peak, GB | planned, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = {
        name: statistics.median(r["tokens_per_s"])
        for name, r in results.items()
        if "tokens_per_s" in r
    }
    # The faster of the two ways to run it.
    dense = [rate for name, rate in medians.items() if name.startswith(DENSE)]
    for name, r in results.items():
        if name not in medians:
            lines.append(f"| {name} | {r['failed']} | | | | | |")
            continue
        rate, rates = medians[name], r["tokens_per_s"]
        ratio = f"{rate / max(dense):.2f}" if dense else ""
        lines.append(
            f"| {name} | {rate:.1f} ({min(rates):.1f} to {max(rates):.1f}) | {ratio} "
            f"| {r['read_bytes'] * rate / 1e9:.0f} | {r['weight_bytes'] / 1e9:.2f} "
            f"| {r['peak_bytes'] / 1e9:.2f} | {r['planned_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--seconds", type=float, help="after which nothing is begun")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--results", type=Path, help="folder to write to")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    kind: str, size: dict[str, int], environment: dict[str, str], within: float
) -> dict[str, Any]:
    """The figures of one kind of weights, in a process of its own."""
    worker = Worker(__file__, kind, **environment)
    try:
        figures = worker.ask(within, **size)
    except harness.GoneError as error:
        return {"failed": str(error)}
    worker.end()
    return figures


def main() -> None:
    arguments = parse()
    if arguments.work:
        work(arguments.work)
        return
    clock = harness.Clock(arguments.seconds)
    on_cpu = arguments.platform == "cpu"
    names = [field.name for field in dataclasses.fields(Size)]
    environment = harness.environment_of(arguments.platform)
    flags = os.environ.get("XLA_FLAGS", "")
    suffixes = {"": flags}
    if not on_cpu:
        suffixes[", no graphs"] = f"{flags} {NO_GRAPHS}".strip()
    todo = [(kind, suffix) for suffix in suffixes for kind in KINDS]
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "warning": " (CPU: SMOKE RUN, NO MEASUREMENT)" if on_cpu else "",
        "date": time.strftime("%Y-%m-%d"),
        "device": "",
        "cpu": harness.cpu(),
        "python": platform.python_version(),
        "versions": harness.versions(sys.executable, ["jax", "jaxlib", "flax"]),
        "size": {name: getattr(arguments, name) for name in names},
        "results": {},
        "left_out": [kind + suffix for kind, suffix in todo],
    }
    folder = arguments.results or (None if on_cpu else harness.RESULTS)
    for kind, suffix in harness.in_time(todo, clock):
        label = kind + suffix
        print(label + report["warning"], file=sys.stderr, flush=True)
        chosen = environment | {"XLA_FLAGS": suffixes[suffix]}
        # All of what is left, and a little: `in_time` expects no more.
        within = min(ANSWER, max(60, clock.left))
        report["results"][label] = measure(kind, report["size"], chosen, within)
        report["left_out"].remove(label)
        save(report, folder)
    device = report["device"] or "no device"
    print(table(report["results"], f"Decoding on {device}{report['warning']}"))
    if not report["device"]:
        raise SystemExit("Nothing ran.")
    if file := save(report, folder):
        print(file)


def save(report: dict[str, Any], folder: Path | None) -> Path | None:
    """Writes the report as it is, once a process has named the device."""
    devices = [r["device"] for r in report["results"].values() if "device" in r]
    if not devices:
        return None
    report["device"] = devices[0]
    kind = "CPU-SMOKE" if report["warning"] else harness.slug(devices[0])
    name = f"gpu_decode-{kind}-jax{importlib.metadata.version('jax')}"
    return None if folder is None else harness.write(name, report, folder)


if __name__ == "__main__":
    main()
