"""Times products with packed weights on an NVIDIA GPU: qjax, dense, and peers.

    python benchmarks/gpu_matmul.py [--peer-python PATH] [--quick]

Every library runs in a process of its own, and the processes are timed in turn, repeat
by repeat. The JAX ones put many calls into one program; PyTorch's are captured in a
CUDA graph. All rotate over copies of the weight that together exceed the L2 cache. A
result is compared with float64 before it is timed, and what is wrong is not timed. A
library that does not run is listed with its error; ``--peer-python`` names an
interpreter that has PyTorch's, since they and JAX may need different ones. The roofs
are measured in the same run: a copy of 512 MiB, and a bfloat16 product of 8192 x 8192 x
8192.

Up to 16 rows, qjax is timed a second time with XLA's CUDA graphs turned off
(``XLA_FLAGS=--xla_gpu_enable_command_buffer=``). Last, 4-bit codes are moved between
layouts, as a share of the speed of a copy.

Prints tables and writes them, as JSON and a plot, to
``benchmarks/results/gpu_matmul-<device>-jax<version>``. On a CPU (``--platform cpu
--quick``) it shows that the harness works, and writes nothing unless ``--results``
names a folder: such figures mean nothing.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gpu_engines
import harness
import numpy as np
from harness import Worker

SHAPES = [(4096, 4096), (8192, 8192)]
SHAPES += [(4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)]
ROWS = [1, 4, 16, 64, 128, 256, 1024, 4096]
QUICK = {"gpu": ([(4096, 4096)], [1, 16, 128]), "cpu": ([(1024, 512)], [1, 16])}
LAYOUTS = {"gpu": (4096, 14336), "cpu": (1024, 512)}
# What bfloat16 results may be off by, relative to the largest element: rounding of the
# result and of a dense weight, 2**-8 together.
TOLERANCE = 1e-2
GRAPH_ROWS = 16  # up to these, launches are what matters
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
JAX_LIBRARIES = ("jax", "qwix", "tokamax")
TORCH_LIBRARIES = ("torch", "gemlite", "humming", "bitsandbytes", "gptqmodel")
PACKAGES = [
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "qwix",
    "tokamax",
]
PEERS = ["torch", "triton", "gemlite", "humming-kernels", "bitsandbytes", "gptqmodel"]
OURS, DENSE = "qjax", "dense"

Figures = dict[str, Any]


def work(library: str) -> None:
    """Serves one library."""
    weights: dict[str, gpu_engines.Weight] = {}
    bound: dict[str, gpu_engines.Bound] = {}

    def libraries() -> dict[str, Any]:
        if library in gpu_engines.LIBRARIES:
            return gpu_engines.LIBRARIES
        import gpu_peers

        return gpu_peers.LIBRARIES

    def pack(k: int, n: int) -> Figures:
        weights.clear()
        bound.clear()
        try:
            makers = libraries()[library](k, n)
        except Exception as error:
            return {library: {"failed": harness.reason(error)}}
        figures: Figures = {}
        for name, make in makers.items():
            try:
                weights[name] = make()
                weight = weights[name]
                figures[name] = {"bits": weight.bits, "weight_bytes": weight.nbytes}
            except Exception as error:
                figures[name] = {"failed": harness.reason(error)}
        return figures

    def bind(m: int) -> Figures:
        bound.clear()
        figures: Figures = {}
        for name, weight in weights.items():
            try:
                x = gpu_engines.rows(m, len(weight.columns))
                bound[name] = weight.bind(x)
                error = checked(bound[name].result(), x, weight.columns)
                figures[name] = {"error": error}
            except Exception as error:
                figures[name] = {"failed": harness.reason(error)}
        return figures

    def timed(name: str) -> Figures:
        try:
            return bound[name].time(1)._asdict()
        except Exception as error:
            return {"failed": harness.reason(error)}

    def answer(request: Figures) -> Any:
        match request:
            case {"shape": [k, n]}:
                return pack(k, n)
            case {"m": m}:
                return bind(m)
            case {"time": name}:
                return timed(name)
            case {"rates": small}:
                return gpu_engines.rates(small=small)
            case {"layouts": [k, n], "small": small}:
                return list(gpu_engines.layout_moves(k, n, small=small))
            case _:
                return device()

    harness.serve(answer)


def checked(found: np.ndarray, x: np.ndarray, columns: np.ndarray) -> float:
    """Compares the sampled part of a product; returns its relative error."""
    expected = x[: gpu_engines.CHECKED[0]].astype(np.float64) @ columns
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    # Not >: NaN is wrong, too.
    if not error <= TOLERANCE:
        raise ValueError(f"wrong result: relative error {error:.1e}")
    return error


def device() -> Figures:
    """The device that JAX computes on."""
    import jax

    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "capability": capability,
    }


def measure(workers: list[Worker], m: int, repeats: int) -> Figures:
    """Times all engines of all workers in turn with some rows, a repeat each."""
    where: dict[str, Worker] = {}
    results: Figures = {}
    for worker in workers:
        for name, figures in ask(worker, m=m).items():
            results[name] = figures
            if "failed" not in figures:
                where[name] = worker
    series: dict[str, list[float]] = {name: [] for name in where}
    for _ in range(repeats):
        for name, worker in list(where.items()):
            answer = ask(worker, time=name)
            answer = answer.get(worker.name, answer)
            results[name] |= answer
            if "failed" in answer:
                del where[name], series[name]
            else:
                series[name] += results[name].pop("seconds")
    for name, seconds in series.items():
        results[name] |= {
            "us": 1e6 * statistics.median(seconds),
            "spread_us": [1e6 * min(seconds), 1e6 * max(seconds)],
        }
    return results


def ask(worker: Worker, **request: Any) -> Figures:
    """What a worker answers; if its process has ended, that, under its name."""
    try:
        return worker.ask(**request)
    except harness.GoneError as error:
        return {worker.name: {"failed": str(error)}}


def floor(nbytes: int, m: int, k: int, n: int, rates: dict[str, float]) -> float:
    """The least microseconds of a product: bytes moved once, or operations."""
    moved = nbytes + 2 * m * (k + n)
    return 1e6 * max(moved / rates["bytes"], 2 * m * k * n / rates["operations"])


def judge(results: Figures, shape: tuple[int, int, int], rates: Figures) -> None:
    """Adds what figures mean: bandwidth, share of the floor, ratios."""
    m, k, n = shape
    ran = {name: r for name, r in results.items() if "us" in r}
    dense = [r["us"] for name, r in ran.items() if name.startswith(DENSE)]
    for name, r in ran.items():
        nbytes = r["weight_bytes"]
        r["gb_per_s"] = (nbytes + 2 * m * (k + n)) / r["us"] / 1e3
        r["floor_share"] = floor(nbytes, m, k, n, rates) / r["us"]
        if dense:
            r["against_dense"] = min(dense) / r["us"]
        peers = [
            other["us"]
            for peer, other in ran.items()
            if other["bits"] == r["bits"] and not peer.startswith((OURS, DENSE))
        ]
        if peers and name.startswith(OURS):
            r["against_best_peer"] = min(peers) / r["us"]


def table(title: str, results: Figures) -> str:
    """Renders the results of one shape as Markdown."""
    lines = [
        f"\n**{title}**\n",
        "| engine | us (least to most) | GB/s | of the roof | against dense "
        "| against the best peer | error | timed as |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if "us" not in r:
            lines.append(f"| {name} | {r['failed']} | | | | | | |")
            continue
        low, high = r["spread_us"]
        ratios = (r.get(key) for key in ("against_dense", "against_best_peer"))
        dense, peer = ("" if x is None else f"{x:.2f}" for x in ratios)
        lines.append(
            f"| {name} | {r['us']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {r['gb_per_s']:.0f} | {r['floor_share']:.0%} | {dense} | {peer} "
            f"| {r['error']:.0e} | {r['how']} |"
        )
    return "\n".join(lines)


def layout_table(title: str, rows: list[Figures], rates: Figures) -> str:
    lines = [
        f"\n**{title}**\n",
        "| move | us | GB/s | of a copy |",
        "|---|---|---|---|",
    ]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        speed = row["bytes"] / seconds
        row["of_copy"] = speed / rates["bytes"]
        lines.append(
            f"| {row['name']} | {1e6 * seconds:.1f} | {speed / 1e9:.0f} "
            f"| {row['of_copy']:.0%} |"
        )
    return "\n".join(lines)


def draw(report: Figures, file: Path) -> None:
    """Draws speed against M, a panel for each shape, with the roofs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shapes = sorted({tuple(r["shape"][1:]) for r in report["results"]})
    figure, panels = pyplot.subplots(
        1,
        len(shapes),
        figsize=(6 * len(shapes), 5),
        squeeze=False,
        layout="constrained",
    )
    labels: dict[str, Any] = {}
    for axes, (k, n) in zip(panels[0], shapes, strict=True):
        of_shape = [r for r in report["results"] if tuple(r["shape"][1:]) == (k, n)]
        names = dict.fromkeys(name for r in of_shape for name in r["engines"])
        ms = [r["shape"][0] for r in of_shape]
        for bits, style in ((16, "k--"), (4, "k:")):
            nbytes = int(
                k * n * (bits + (24 / gpu_engines.GROUP if bits == 4 else 0)) / 8
            )
            roof = [
                2e-6 * m * k * n / floor(nbytes, m, k, n, report["rates"]) for m in ms
            ]
            (line,) = axes.plot(ms, roof, style, linewidth=1)
            labels.setdefault(f"roof, {bits} bits", line)
        for i, name in enumerate(names):
            points = [
                (r["shape"][0], 2e-6 * r["shape"][0] * k * n / r["engines"][name]["us"])
                for r in of_shape
                if "us" in r["engines"].get(name, {})
            ]
            if points:
                marker = "o" if name.startswith(OURS) else "x"
                (line,) = axes.plot(*zip(*points, strict=True), f"C{i}{marker}-", ms=4)
                labels.setdefault(name, line)
        axes.set(xscale="log", yscale="log", title=f"{k} x {n}", xlabel="rows")
        axes.set_xscale("log", base=2)
    panels[0][0].set_ylabel("TFLOP/s")
    what = report["device"]["device"]
    title = f"Products with packed weights, {what}{report['warning']}"
    figure.suptitle(title, fontsize=9)
    figure.legend(labels.values(), labels, loc="outside right center", fontsize=7)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="one matrix, few rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--shape", action="append", metavar="KxN", help="instead of all"
    )
    parser.add_argument("--rows", action="append", type=int, metavar="M")
    parser.add_argument("--library", action="append", help="instead of all")
    parser.add_argument("--results", type=Path, help="folder to write to")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(arguments: argparse.Namespace) -> tuple[list[Worker], list[Worker]]:
    """Starts the workers, and those that run without CUDA graphs."""
    environment = harness.environment_of(arguments.platform)
    chosen = arguments.library or (*JAX_LIBRARIES, *TORCH_LIBRARIES)
    workers = [
        Worker(
            __file__,
            library,
            sys.executable if library in JAX_LIBRARIES else arguments.peer_python,
            **environment,
        )
        for library in dict.fromkeys(["jax", *chosen])
    ]
    if arguments.platform == "cpu":
        return workers, []
    flags = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS}".strip()
    return workers, [Worker(__file__, "jax", **environment, XLA_FLAGS=flags)]


def main() -> None:
    arguments = parse()
    if arguments.work:
        work(arguments.work)
        return
    on_cpu = arguments.platform == "cpu"
    shapes, rows = QUICK[arguments.platform] if arguments.quick else (SHAPES, ROWS)
    if arguments.shape:
        shapes = [tuple(map(int, text.split("x"))) for text in arguments.shape]
    rows = arguments.rows or rows
    workers, without_graphs = start(arguments)
    found, rates = workers[0].ask(), workers[0].ask(rates=on_cpu)
    report: Figures = {
        "command": " ".join(["python", *sys.argv]),
        "warning": " (CPU: SMOKE RUN, NO MEASUREMENT)" if on_cpu else "",
        "date": time.strftime("%Y-%m-%d"),
        "device": found,
        "cpu": harness.cpu(),
        "python": platform.python_version(),
        "versions": harness.versions(sys.executable, PACKAGES)
        | harness.versions(arguments.peer_python, PEERS),
        "rates": rates,
        "group_size": gpu_engines.GROUP,
        "repeats": arguments.repeats,
        "results": [],
    }
    print(f"{found['device']}{report['warning']}; {report['versions']}")
    print(
        f"roofs: {rates['bytes'] / 1e9:.0f} GB/s copied, "
        f"{rates['operations'] / 1e12:.1f} TFLOP/s bf16{report['warning']}"
    )
    for k, n in shapes:
        products(report, workers, without_graphs, (k, n), rows)
    moves = workers[0].ask(layouts=LAYOUTS[arguments.platform], small=on_cpu)
    title = "4-bit layouts, {} x {}".format(*LAYOUTS[arguments.platform])
    print(layout_table(title + report["warning"], moves, rates), flush=True)
    report["layouts"] = {"shape": LAYOUTS[arguments.platform], "moves": moves}
    for worker in (*workers, *without_graphs):
        worker.end()
    folder = arguments.results or (None if on_cpu else harness.RESULTS)
    if folder is not None:
        kind = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
        name = f"gpu_matmul-{'CPU-SMOKE' if on_cpu else kind}"
        name = f"{name}-jax{importlib.metadata.version('jax')}"
        file = harness.write(name, report, folder)
        draw(report, file.with_suffix(".png"))
        print(f"{file} and .png")


def products(
    report: Figures,
    workers: list[Worker],
    without_graphs: list[Worker],
    extents: tuple[int, int],
    rows: list[int],
) -> None:
    """Measures one matrix with all rows into the report."""
    packed: Figures = {}
    for worker in workers:
        packed |= ask(worker, shape=extents)
    for worker in without_graphs:
        ask(worker, shape=extents)
    for m in rows:
        title = f"M = {m}, {extents[0]} x {extents[1]}{report['warning']}"
        print(title, file=sys.stderr, flush=True)
        results = packed | {
            name: packed.get(name, {}) | figures
            for name, figures in measure(workers, m, report["repeats"]).items()
        }
        if without_graphs and m <= GRAPH_ROWS:
            launched = measure(without_graphs, m, report["repeats"])
            for name, figures in launched.items():
                results[f"{name}, no graphs"] = packed.get(name, {}) | figures
        judge(results, (m, *extents), report["rates"])
        report["results"].append({"shape": (m, *extents), "engines": results})
        print(table(title, results), flush=True)


if __name__ == "__main__":
    main()
