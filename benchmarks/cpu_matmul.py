"""Times 4-bit matmul on the CPU: qjax, dense XLA, and peers where they are installed.

    python benchmarks/cpu_matmul.py [--peer-python PATH]

Every library runs in a process of its own, so that their thread pools do not disturb
each other, and the processes are timed in turn, call by call. Peers are torch (dense
and int4pack) and onnxruntime (MatMulNBits); ``--peer-python`` names an interpreter
that has them, since jax and torch may need different ones. Each engine rotates over
copies of its weight that together exceed the caches. Results are checked against
float64 before they are timed. Prints a table and writes it, as JSON, to
``benchmarks/results/cpu_matmul-jax<version>.json``.
"""

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
from harness import Worker

GROUP = 128
SHAPES = [(4096, 4096), (4096, 11008)]
ROWS = [1, 4, 16, 128]
CACHE = 96 * 2**20  # copies of a weight exceed this many bytes together
Engine = tuple[Callable[[int], Any], int, int]  # run(copy), weight bytes, temporaries


def operands(m: int, k: int, n: int) -> dict[str, np.ndarray]:
    """Activations, codes, scales and zeros from a fixed seed."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((m, k), np.float32),
        "q": rng.integers(0, 16, (k, n), dtype=np.uint8),
        "scale": rng.uniform(0.5, 1, (k // GROUP, n)).astype(np.float32) / 100,
        "zero": rng.integers(6, 10, (k // GROUP, n), dtype=np.uint8),
    }


def dense(data: dict[str, np.ndarray]) -> np.ndarray:
    """The float32 weight ``(q - zero) * scale``."""
    zero, scale = (np.repeat(data[name], GROUP, axis=0) for name in ("zero", "scale"))
    return (data["q"].astype(np.float32) - zero) * scale


def copies(nbytes: int) -> int:
    return max(2, -(-CACHE // nbytes))


def jax_engines(data: dict[str, np.ndarray]) -> dict[str, Engine]:
    import jax
    import jax.numpy as jnp

    import qjax

    x, w = jnp.asarray(data["x"]), dense(data)
    words = qjax.bits.pack_fields(jnp.asarray(data["q"]), 4)
    packed = qjax.tensor.build(
        (words,),
        jnp.asarray(data["scale"]),
        jnp.asarray(data["zero"]),
        layout=qjax.formats.gptq.Stream(),
        segments=(qjax.tensor.Segment(4, GROUP),),
    )

    def engine(function: Callable[..., Any], weight: Any) -> Engine:
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
        weights = [jax.tree.map(jnp.copy, weight) for _ in range(copies(nbytes))]
        compiled = jax.jit(function).lower(x, weight).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes

        def run(i: int) -> Any:
            return jax.block_until_ready(compiled(x, weights[i % len(weights)]))

        return run, nbytes, temporaries

    engines = {
        "XLA dense f32": engine(jnp.dot, jnp.asarray(w)),
        "qjax": engine(qjax.matmul, packed),
    }
    if len(x) > 1:
        engines["qjax int8 activations"] = engine(
            lambda x, w: qjax.matmul(x, w, implementation="xla_int8"), packed
        )
    return engines


def torch_engines(data: dict[str, np.ndarray]) -> dict[str, Engine]:
    import torch

    x, w = torch.from_numpy(data["x"]), torch.from_numpy(dense(data))
    codes = torch.from_numpy(data["q"].T.astype(np.int32)).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 8)
    scale = torch.from_numpy(data["scale"])
    zero = (8 - torch.from_numpy(data["zero"]).float()) * scale
    parameters = torch.stack([scale, zero], -1).bfloat16().contiguous()

    def engine(function: Callable[..., Any], x: Any, weight: Any) -> Engine:
        nbytes = sum(part.nbytes for part in weight)
        weights = [[p.clone() for p in weight] for _ in range(copies(nbytes))]
        return lambda i: function(x, *weights[i % len(weights)]).float(), nbytes, 0

    half = x.bfloat16()
    int4 = lambda x, w, p: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, p)  # noqa: E731
    return {
        "torch dense f32": engine(torch.mm, x, [w]),
        "torch dense bf16": engine(torch.mm, half, [w.bfloat16()]),
        "torch int4pack bf16": engine(int4, half, [packed, parameters]),
    }


def onnxruntime_engines(data: dict[str, np.ndarray]) -> dict[str, Engine]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, (k, n) = len(data["x"]), data["q"].shape
    low, high = data["q"].T.reshape(n, k // GROUP, -1, 2).transpose(3, 0, 1, 2)
    zeros = data["zero"].T.reshape(n, -1, 2)
    weights = {
        "B": low | high << 4,
        "scales": np.ascontiguousarray(data["scale"].T).reshape(-1),
        "zero_points": (zeros[..., 0] | zeros[..., 1] << 4).reshape(-1),
    }
    nbytes = sum(array.nbytes for array in weights.values())

    def engine(level: int) -> Engine:
        node = helper.make_node(
            "MatMulNBits",
            ["x", *weights],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=GROUP,
            accuracy_level=level,
        )
        graph = helper.make_graph(
            [node],
            "matmul",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions = [
            onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            for _ in range(copies(nbytes))
        ]
        x = data["x"]
        return lambda i: sessions[i % len(sessions)].run(None, {"x": x})[0], nbytes, 0

    return {"ORT NBits f32": engine(0), "ORT NBits int8 activations": engine(4)}


LIBRARIES = {
    "jax": jax_engines,
    "torch": torch_engines,
    "onnxruntime": onnxruntime_engines,
}


def work(library: str) -> None:
    """Serves one library."""
    engines: dict[str, Engine] = {}

    def answer(request: dict[str, Any]) -> Any:
        if "shape" not in request:
            run = engines[request["engine"]][0]
            started = time.perf_counter()
            run(request["call"])
            return time.perf_counter() - started
        data = operands(*request["shape"])
        exact = data["x"].astype(np.float64) @ dense(data).astype(np.float64)
        engines.clear()
        engines.update(LIBRARIES[library](data))
        figures = {}
        for name, (run, nbytes, temporaries) in engines.items():
            error = np.abs(np.asarray(run(0)) - exact).max() / np.abs(exact).max()
            figures[name] = {
                "weight_bytes": nbytes,
                "temp_bytes": temporaries,
                "error": float(error),
            }
        return figures

    harness.serve(answer)


def measure(workers: list[Worker], shape: tuple[int, int, int], calls: int) -> dict:
    """Times all engines of all workers in turn at one shape."""
    where, results = {}, {}
    for worker in workers:
        for name, figures in worker.ask(shape=shape).items():
            where[name], results[name] = worker, figures
    times: dict[str, list[float]] = {name: [] for name in where}
    for call in range(calls + 2):
        for name, worker in where.items():
            seconds = worker.ask(engine=name, call=call)
            if call >= 2:  # the first two touch the copies and fill the pools
                times[name].append(seconds * 1e3)
    for name, series in times.items():
        results[name] |= {"min_ms": min(series), "median_ms": statistics.median(series)}
    return results


def table(shape: tuple[int, int, int], results: dict) -> str:
    """Renders the results of one shape as Markdown."""
    base = results["XLA dense f32"]
    lines = [
        f"\n**M = {shape[0]}, {shape[1]} x {shape[2]}**\n",
        "| engine | min ms | median ms | against dense (min, median) | weight MiB "
        "| temporaries MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        fast = [base[key] / r[key] for key in ("min_ms", "median_ms")]
        lines.append(
            f"| {name} | {r['min_ms']:.2f} | {r['median_ms']:.2f} | {fast[0]:.2f}, "
            f"{fast[1]:.2f} | {r['weight_bytes'] / 2**20:.1f} "
            f"| {r['temp_bytes'] / 2**20:.1f} | {r['error']:.0e} |"
        )
    return "\n".join(lines)


def has(python: str, library: str) -> bool:
    """Whether an interpreter can import a library (and what its engines need)."""
    needs = {"onnxruntime": "onnxruntime, onnx"}.get(library, library)
    command = [python, "-c", f"import {needs}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    peers = [p for p in ("torch", "onnxruntime") if has(arguments.peer_python, p)]
    cpu_only = {"JAX_PLATFORMS": "cpu"}
    workers = [Worker(__file__, "jax", **cpu_only)]
    workers += [
        Worker(__file__, peer, arguments.peer_python, **cpu_only) for peer in peers
    ]
    report = {
        "cpu": harness.cpu(),
        "python": platform.python_version(),
        "versions": harness.versions(sys.executable, ["jax", "jaxlib", "numpy"])
        | harness.versions(arguments.peer_python, peers),
        "group_size": GROUP,
        "calls": arguments.calls,
        "results": {},
    }
    print(f"{report['cpu']}; Python {report['python']}; {report['versions']}")
    for k, n in SHAPES:
        for m in ROWS:
            results = measure(workers, (m, k, n), arguments.calls)
            report["results"][f"{m}x{k}x{n}"] = results
            print(table((m, k, n), results), flush=True)
    harness.write(f"cpu_matmul-jax{importlib.metadata.version('jax')}", report)


if __name__ == "__main__":
    main()
