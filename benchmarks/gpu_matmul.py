"""Times products with packed weights on an NVIDIA GPU: qjax, dense, and peers.

    python benchmarks/gpu_matmul.py [--peer-python PATH] [--quick] [--seconds N]

Every width of qjax, the dense product and every peer run in processes of their own,
which are timed in turn, repeat by repeat. The JAX ones put many calls into one program;
PyTorch's are captured in a CUDA graph. All rotate over copies of the weight that
together exceed the L2 cache. A result is compared with float64 before it is timed, and
what is wrong is not timed. A library that does not run is listed with its error;
``--peer-python`` names an interpreter that has PyTorch's, since they and JAX may need
different ones. The roofs are measured in the same run: a copy of 512 MiB, and a
bfloat16 product of 8192 x 8192 x 8192.

Up to 16 rows, qjax and the dense product are timed a second time with XLA's CUDA graphs
turned off (``XLA_FLAGS=--xla_gpu_enable_command_buffer=``). Last, 4-bit codes are moved
between layouts, as a share of the speed of a copy.

Prints tables and writes them, as JSON and a plot, to
``benchmarks/results/gpu_matmul-<device>-jax<version>``, the JSON anew after every
table. With ``--seconds`` it ends before the next table would take longer than that, and
says in the file what is left out. On a CPU (``--platform cpu --quick``) it shows that
the harness works, and writes nothing unless ``--results`` names a folder: such figures
mean nothing.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_engines
import gpu_report
import gpu_serving
import gpu_weights
import harness
from gpu_report import Figures
from harness import Worker

SHAPES = [(4096, 4096), (8192, 8192)]
SHAPES += [(4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)]
ROWS = [1, 4, 16, 64, 128, 256, 1024, 4096]
QUICK = {"gpu": ([(4096, 4096)], [1, 16, 128]), "cpu": ([(1024, 512)], [1, 16])}
LAYOUTS = {"gpu": (4096, 14336), "cpu": (1024, 512)}
GRAPH_ROWS = 16  # up to these, launches are what matters
# Above these, XLA tunes a dense product by timing it, which nothing may disturb.
TOGETHER_ROWS = 128
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ANSWER = 600  # seconds in which a process has compiled and tuned whatever it is asked
TORCH_LIBRARIES = ("torch", "gemlite", "humming", "bitsandbytes", "gptqmodel")
ALL = (*gpu_engines.LIBRARIES, *TORCH_LIBRARIES)
PACKAGES = [
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "qwix",
    "tokamax",
]
PEERS = ["torch", "triton", "gemlite", "humming-kernels", "bitsandbytes", "gptqmodel"]
# In errors after which a process is of no use: it is gone, or its CUDA context is.
LOST = ("CUDA", "the process ended", "no answer")


class Process(NamedTuple):
    """A library at work.

    Attributes:
      worker: Its process.
      suffix: What the names of its engines have appended.
    """

    worker: Worker
    suffix: str = ""

    @property
    def ours(self) -> bool:
        """Whether it runs kernels of qjax."""
        return self.worker.name in gpu_engines.OURS


def ask(process: Process, within: float, **request: Any) -> Figures:
    """What a process answers; if it has ended, that, under the library's name."""
    process.worker.send(**request)
    return receive(process, within)


def receive(process: Process, within: float) -> Figures:
    """The answer to what was sent; as `ask`."""
    try:
        return process.worker.receive(within)
    except harness.GoneError as error:
        return {process.worker.name: {"failed": str(error)}}


def ask_all(
    processes: Sequence[Process], within: float, **request: Any
) -> dict[Process, Figures]:
    """What processes answer that work at the same time."""
    for process in processes:
        process.worker.send(**request)
    return {process: receive(process, within) for process in processes}


def bind(processes: Sequence[Process], m: int, within: float) -> dict[Process, Figures]:
    """Has every engine compiled and compared with some rows."""
    quiet = [p for p in processes if p.ours and m <= TOGETHER_ROWS]
    answers = ask_all(quiet, within, m=m)
    for process in processes:
        if process not in answers:
            answers[process] = ask(process, within, m=m)
    return answers


def measure(
    engines: Mapping[Process, Sequence[str]], m: int, repeats: int, within: float
) -> Figures:
    """Times engines in turn with some rows, a repeat each.

    Args:
      engines: Their names, of every process.
      m: The number of rows.
      repeats: How often each is timed.
      within: Seconds in which a process has to answer.

    Returns:
      Figures by the name of the engine and the suffix of its process.
    """
    answers = bind([p for p, names in engines.items() if names], m, within)
    results: Figures = {}
    where: dict[str, tuple[Process, str]] = {}
    for process, names in engines.items():
        for name in names:
            answer = answers[process]
            results[name + process.suffix] = (
                answer.get(process.worker.name) or answer[name]
            )
            where[name + process.suffix] = process, name
    series: dict[str, list[float]] = {
        label: [] for label, figures in results.items() if "failed" not in figures
    }
    for _ in range(repeats):
        for label in list(series):
            process, name = where[label]
            answer = ask(process, within, time=name)
            results[label] |= answer.get(process.worker.name, answer)
            if "failed" in results[label]:
                del series[label]
            else:
                series[label] += results[label].pop("seconds")
    for label, seconds in series.items():
        results[label] |= {
            "us": 1e6 * statistics.median(seconds),
            "spread_us": [1e6 * min(seconds), 1e6 * max(seconds)],
        }
    return results


class Products:
    """Measures one matrix after another, each with several rows."""

    def __init__(
        self, processes: Sequence[Process], repeats: int, within: float
    ) -> None:
        """Takes over processes that have just started."""
        self._processes, self._repeats, self._within = processes, repeats, within
        self._shape: tuple[int, int] | None = None
        self._packed: dict[Process, Figures] = {}

    def __call__(self, m: int, k: int, n: int) -> Figures:
        """Returns the figures of every engine, by name."""
        self._pack(k, n)
        chosen = [p for p in self._processes if m <= GRAPH_ROWS or not p.suffix]
        packed = {
            name + process.suffix: figures
            for process in chosen
            for name, figures in self._packed[process].items()
        }
        engines = {
            process: [
                name
                for name, figures in self._packed[process].items()
                if "failed" not in figures
            ]
            for process in chosen
        }
        measured = measure(engines, m, self._repeats, self._within)
        for process, names in engines.items():
            # The next rows must not fail with an error of these.
            if any(is_lost(measured[name + process.suffix]) for name in names):
                process.worker.restart()
                del self._packed[process]
        return {
            label: figures | measured.get(label, {})
            for label, figures in packed.items()
        }

    def _pack(self, k: int, n: int) -> None:
        if (k, n) != self._shape:
            self._shape, self._packed = (k, n), {}
        missing = [p for p in self._processes if p not in self._packed]
        self._packed |= ask_all(missing, self._within, shape=(k, n))
        for process in missing:
            if any(map(is_lost, self._packed[process].values())):
                process.worker.restart()


def is_lost(figures: Figures) -> bool:
    """Whether an error leaves a process of no use."""
    return any(lost in figures.get("failed", "") for lost in LOST)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="one matrix, few rows")
    parser.add_argument("--seconds", type=float, help="after which nothing is begun")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--shape", action="append", metavar="KxN", help="instead of all"
    )
    parser.add_argument("--rows", action="append", type=int, metavar="M")
    parser.add_argument(
        "--library",
        dest="libraries",
        action="append",
        choices=["qjax", *ALL],
        help="instead of all, beside dense; qjax for every width",
    )
    parser.add_argument("--results", type=Path, help="folder to write to")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(arguments: argparse.Namespace, environment: dict[str, str]) -> list[Process]:
    """Starts the processes, the dense product's first."""
    chosen = tuple(arguments.libraries or ALL)
    libraries = ["dense", *(a for a in ALL[1:] if a.startswith(chosen))]
    processes = [
        Process(
            Worker(
                __file__,
                library,
                arguments.peer_python if library in TORCH_LIBRARIES else sys.executable,
                **environment,
            )
        )
        for library in libraries
    ]
    if arguments.platform == "cpu":
        return processes
    flags = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS}".strip()
    return processes + [
        Process(Worker(__file__, a, **environment, XLA_FLAGS=flags), ", no graphs")
        for a in libraries
        if a == "dense" or a in gpu_engines.OURS
    ]


def main() -> None:
    arguments = parse()
    if arguments.work:
        harness.serve(gpu_serving.Server(arguments.work).answer)
        return
    clock = harness.Clock(arguments.seconds)
    # A process that hangs leaves time for the others.
    within = min(ANSWER, max(120, clock.left / 2))
    on_cpu = arguments.platform == "cpu"
    shapes, rows = QUICK[arguments.platform] if arguments.quick else (SHAPES, ROWS)
    if arguments.shape:
        shapes = [tuple(map(int, text.split("x"))) for text in arguments.shape]
    todo = [(m, k, n) for k, n in shapes for m in arguments.rows or rows]
    environment = harness.environment_of(arguments.platform)
    processes = start(arguments, environment)
    report = head(arguments, processes[0].worker, within)
    report["left_out"] = [*todo, "layouts"]
    save = saver(report, arguments.results or (None if on_cpu else harness.RESULTS))
    products = Products(processes, arguments.repeats, within)
    for shape in harness.in_time(todo, clock):
        m, k, n = shape
        title = f"M = {m}, {k} x {n}{report['warning']}"
        print(title, file=sys.stderr, flush=True)
        results = products(*shape)
        gpu_report.judge(results, shape, report["rates"])
        report["results"].append({"shape": shape, "engines": results})
        report["left_out"].remove(shape)
        print(gpu_report.table(title, results), flush=True)
        save()
    for process in processes:
        process.worker.close()
    for process in processes:
        process.worker.end()
    if clock.left > 0:
        layouts(report, Worker(__file__, "layouts", **environment), clock, within, save)
    if file := save():
        draw(report, file)


def head(arguments: argparse.Namespace, worker: Worker, within: float) -> Figures:
    """A report without results: machine, versions and roofs."""
    on_cpu = arguments.platform == "cpu"
    found, rates = worker.ask(within), worker.ask(within, rates=on_cpu)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "warning": " (CPU: SMOKE RUN, NO MEASUREMENT)" if on_cpu else "",
        "date": time.strftime("%Y-%m-%d"),
        "device": found,
        "cpu": harness.cpu(),
        "python": platform.python_version(),
        "versions": harness.versions(sys.executable, PACKAGES)
        | harness.versions(arguments.peer_python, PEERS),
        "rates": rates,
        "group_size": gpu_weights.GROUP,
        "repeats": arguments.repeats,
        "results": [],
    }
    print(f"{found['device']}{report['warning']}; {report['versions']}")
    print(
        f"roofs: {rates['bytes'] / 1e9:.0f} GB/s copied, "
        f"{rates['operations'] / 1e12:.1f} TFLOP/s bf16{report['warning']}",
        flush=True,
    )
    return report


def saver(report: Figures, folder: Path | None) -> Callable[[], Path | None]:
    """Returns what writes the report as it is, and names the file."""
    device = report["device"]
    kind = (
        "CPU-SMOKE" if device["platform"] == "cpu" else harness.slug(device["device"])
    )
    name = f"gpu_matmul-{kind}-jax{importlib.metadata.version('jax')}"
    return lambda: None if folder is None else harness.write(name, report, folder)


def layouts(
    report: Figures,
    worker: Worker,
    clock: harness.Clock,
    within: float,
    save: Callable[[], Any],
) -> None:
    """Measures the moves between layouts into the report."""
    small = report["device"]["platform"] == "cpu"
    shape = LAYOUTS["cpu" if small else "gpu"]
    moves: list[Figures] = []
    report["layouts"] = {"shape": shape, "moves": moves}
    try:
        names = worker.ask(within, layouts=shape, small=small)
        for name in harness.in_time(names, clock):
            moves.append(worker.ask(within, move=name))
            save()
        if len(moves) == len(names):
            report["left_out"].remove("layouts")
    except harness.GoneError as error:
        print(f"layouts: {error}", file=sys.stderr)
    title = "4-bit layouts, {} x {}".format(*shape) + report["warning"]
    print(gpu_report.layout_table(title, moves, report["rates"]), flush=True)
    worker.end()


def draw(report: Figures, file: Path) -> None:
    """Draws the report beside its file, where matplotlib is."""
    if not report["results"]:
        return
    try:
        gpu_report.draw(report, file.with_suffix(".png"))
    except ImportError as error:
        print(f"{file}; no plot: {error}")
    else:
        print(f"{file} and .png")


if __name__ == "__main__":
    main()
