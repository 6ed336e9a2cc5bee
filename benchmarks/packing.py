"""Times packing, unpacking, moving and quantizing on the CPU, and loading of a model.

    python benchmarks/packing.py [--peer-python PATH]

One matrix of 4096 x 11008 goes through every format of qjax, and through the code of
optimum-quanto, hqq and torchao. Every library runs in a process of its own, and the
processes are timed in turn, call by call; public functions are called as users call
them. The packed bytes of all libraries that share a format are compared first. Peak
memory is what a call adds to the resident memory of its process, result included; it
comes from other processes, whose allocator gives all memory back at once. The least
processor time of a call, over all threads, says more than the clock where others use
the machine. A peer that does not run is listed with its error; ``--peer-python`` names
an interpreter that has the peers, since jax and torch may need different ones.

Then a GPTQ checkpoint of some 1 GB in four shards is written to a temporary folder and
loaded by `qjax.checkpoints.load` in fresh processes.

Prints tables and writes them, as JSON, to
``benchmarks/results/packing-jax<version>.json``.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Worker
from packing_engines import LIBRARIES
from packing_matrix import GROUP, Engine, K, N, Rows

PATIENCE = 10.0  # an engine with so many seconds behind it is called no more


def work(library: str) -> None:
    """Serves one library."""
    engines: dict[str, Engine] = {}
    rows: Rows = {}

    def open_row(row: tuple[str, str]) -> dict[str, Any]:
        engines.clear()
        checks = {}
        for name, make in rows.get(row, {}).items():
            try:
                run, check = make()
                checks[name] = {"check": check(run())}
                engines[name] = run, check
            except Exception as error:
                checks[name] = {"error": harness.reason(error)}
        return checks

    def seconds_of(run: Any) -> tuple[float, float]:
        started, busy = time.perf_counter(), time.process_time()
        result = run()
        seconds = time.perf_counter() - started, time.process_time() - busy
        del result
        return seconds

    def memory_of(run: Any) -> int:
        before = harness.resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark
        result = run()
        peak = harness.resident("VmHWM") - before
        del result
        return peak

    def answer(request: dict[str, Any]) -> Any:
        if "row" in request:
            return open_row(tuple(request["row"]))
        if "time" in request:
            return seconds_of(engines[request["time"]][0])
        if "memory" in request:
            return memory_of(engines[request["memory"]][0])
        try:
            rows.update(LIBRARIES[library]())
            return {"rows": list(rows)}
        except Exception as error:
            return {"rows": [], "error": harness.reason(error)}

    harness.serve(answer)


def measure(
    workers: list[Worker], gauges: list[Worker], row: list[str], calls: int
) -> dict[str, dict[str, Any]]:
    """Times all engines of one row in turn, then takes their memory."""
    print(*row, sep=": ", file=sys.stderr, flush=True)
    where: dict[str, tuple[Worker, Worker]] = {}
    results: dict[str, dict[str, Any]] = {}
    for worker, gauge in zip(workers, gauges, strict=True):
        answers = worker.ask(row=row)
        gauge.ask(row=row)
        results |= answers
        sound = [name for name, answer in answers.items() if "error" not in answer]
        where |= dict.fromkeys(sound, (worker, gauge))
    compare(row, [results[name]["check"] for name in where])
    times: dict[str, list[list[float]]] = {name: [] for name in where}
    for call in range(calls):
        for name, (worker, _) in where.items():
            if call < 2 or sum(seconds for seconds, _ in times[name]) < PATIENCE:
                times[name].append(worker.ask(time=name))
    for name, pairs in times.items():
        series, busy = ([1e3 * pair[i] for pair in pairs] for i in (0, 1))
        first, median, third = statistics.quantiles(series, n=4, method="inclusive")
        peak = where[name][1].ask(memory=name)
        results[name] |= {
            "calls": len(series),
            "min_ms": min(series),
            "quartiles_ms": [first, median, third],
            "min_processor_ms": min(busy),
            "peak_bytes": peak,
        }
    return results


def compare(row: list[str], checks: list[float]) -> None:
    """Stops where libraries disagree: figures of different work mean nothing."""
    if row[0] in ("pack", "relayout") and len(set(checks)) > 1:
        raise SystemExit(f"{row}: the libraries pack different bytes: {checks}.")
    if row[0] == "unpack" and any(checks):
        raise SystemExit(f"{row}: codes came back wrong: {checks}.")


def table(op: str, rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Renders the rows of one operation as Markdown."""
    lines = [
        f"\n**{op}**\n",
        "| format | library | median ms (quartiles) | min ms | processor ms "
        "| peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in rows.items():
        for library, r in results.items():
            if "error" in r:
                lines.append(f"| {name} | {library} | {r['error']} | | | |")
                continue
            first, median, third = r["quartiles_ms"]
            lines.append(
                f"| {name} | {library} | {median:.1f} ({first:.1f} to {third:.1f}) "
                f"| {r['min_ms']:.1f} | {r['min_processor_ms']:.1f} "
                f"| {r['peak_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines)


# A model of ten layers, as GPTQ packs one with four bits and groups of 128: 1.0 GB.
LAYERS, SHARDS, HIDDEN, INNER = 10, 4, 4096, 11008
SHAPES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
SHAPES |= {f"mlp.{name}_proj": (HIDDEN, INNER) for name in ("gate", "up")}
SHAPES["mlp.down_proj"] = (INNER, HIDDEN)

LOAD = """
import json, sys, time
import jax
from qjax import checkpoints

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(l.split()[1]) for l in lines if l.startswith(field))

jax.block_until_ready(jax.numpy.zeros(8) + 1)
before, started, busy = status("VmRSS:"), time.perf_counter(), time.process_time()
weights = checkpoints.load(sys.argv[1])
seconds, busy = time.perf_counter() - started, time.process_time() - busy
model = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
print(json.dumps([seconds, model, before, status("VmHWM:"), busy]))
"""


def write_checkpoint(directory: Path) -> int:
    """Writes the synthetic GPTQ checkpoint, and returns the bytes of its tensors."""
    from safetensors.numpy import save_file

    rng, total = np.random.default_rng(0), 0
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for layer in range(shard, LAYERS, SHARDS):
            for name, (k, n) in SHAPES.items():
                words = rng.integers(-(2**31), 2**31, (k // 8, n), dtype=np.int32)
                scales = rng.uniform(0.001, 0.01, (k // GROUP, n)).astype(np.float16)
                matrix = {
                    "qweight": words,
                    "qzeros": np.full((k // GROUP, n // 8), 0x77777777, np.int32),
                    "scales": scales,
                    "g_idx": np.arange(k, dtype=np.int32) // GROUP,
                }
                module = f"model.layers.{layer}.{name}"
                tensors |= {f"{module}.{key}": array for key, array in matrix.items()}
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    config = {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return total


def evict(directory: Path) -> None:
    """Drops the files from the page cache."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def loads(times: int) -> dict[str, Any]:
    """Loads the checkpoint in fresh processes, from the page cache and the disk."""
    with tempfile.TemporaryDirectory() as folder:
        directory, report = Path(folder), {}
        total = write_checkpoint(directory)
        for state in ("page cache", "disk"):
            runs = []
            for _ in range(times):
                if state == "disk":
                    evict(directory)
                done = subprocess.run(
                    [sys.executable, "-c", LOAD, folder],
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                runs.append(json.loads(done.stdout))
            seconds = [run[0] for run in runs]
            model = runs[0][1]
            report[state] = {
                "packed_bytes": total,
                "model_bytes": model,
                "seconds": seconds,
                "processor_seconds": [run[4] for run in runs],
                "mb_per_s": total / statistics.median(seconds) / 1e6,
                "mb_per_s_best": total / min(seconds) / 1e6,
                "peak_over_model": max(run[3] for run in runs) / model,
                "peak_of_load_over_model": max(run[3] - run[2] for run in runs) / model,
            }
    return report


def load_table(report: dict[str, Any]) -> str:
    lines = [
        "\n**load of a GPTQ checkpoint**\n",
        "| read from | packed MB | median s (least) | least processor s "
        "| MB/s (best) | peak RSS over model | without what was there before |",
        "|---|---|---|---|---|---|---|",
    ]
    for state, r in report.items():
        lines.append(
            f"| {state} | {r['packed_bytes'] / 1e6:.0f} "
            f"| {statistics.median(r['seconds']):.2f} ({min(r['seconds']):.2f}) "
            f"| {min(r['processor_seconds']):.2f} "
            f"| {r['mb_per_s']:.0f} ({r['mb_per_s_best']:.0f}) "
            f"| {r['peak_over_model']:.2f} "
            f"| {r['peak_of_load_over_model']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--only", choices=["packing", "load"])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    peers = ["torch", "optimum-quanto", "hqq", "torchao"]
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": harness.cpu(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": harness.versions(sys.executable, ["jax", "jaxlib", "numpy"])
        | harness.versions(arguments.peer_python, peers),
        "matrix": [K, N],
        "group_size": GROUP,
        "calls": arguments.calls,
        "results": {},
    }
    print(f"{report['cpu']}; Python {report['python']}; {report['versions']}")
    if arguments.only != "load":
        pack(report, arguments.peer_python, arguments.calls)
    if arguments.only != "packing":
        report["load"] = loads(5)
        print(load_table(report["load"]), flush=True)
    report["load_average_after"] = os.getloadavg()[0]
    harness.write(f"packing-jax{importlib.metadata.version('jax')}", report)


def pack(report: dict[str, Any], peer_python: str, calls: int) -> None:
    """Measures all rows of all libraries into the report."""

    def start(**environment: str) -> list[Worker]:
        environment["JAX_PLATFORMS"] = "cpu"
        pythons = {"qjax": sys.executable}
        return [
            Worker(__file__, name, pythons.get(name, peer_python), **environment)
            for name in LIBRARIES
        ]

    # glibc keeps what was freed once; with a fixed threshold it gives it back, so that
    # a call's memory is its own. Timed calls keep glibc's default.
    workers, gauges = start(), start(MALLOC_MMAP_THRESHOLD_="65536")
    opened = [worker.ask() for worker in workers]
    for gauge in gauges:
        gauge.ask()
    report["not_run"] = {
        worker.name: answer["error"]
        for worker, answer in zip(workers, opened, strict=True)
        if "error" in answer
    }
    for library, error in report["not_run"].items():
        print(f"{library} does not run: {error}")
    rows = [tuple(row) for answer in opened for row in answer["rows"]]
    for op in ("pack", "unpack", "relayout", "quantize"):
        results = {
            name: measure(workers, gauges, [op, name], calls)
            for kind, name in dict.fromkeys(rows)
            if kind == op
        }
        report["results"][op] = results
        print(table(op, results), flush=True)


if __name__ == "__main__":
    main()
