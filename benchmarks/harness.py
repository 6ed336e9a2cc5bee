"""What the benchmarks share: a process for each library, and the head of a report."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REASON = 160  # characters of an error that a table has room for


class GoneError(RuntimeError):
    """The process of a library has ended."""


class Worker:
    """A process that runs one library and answers requests.

    Attributes:
      name: Of the library.
    """

    def __init__(
        self,
        script: str,
        library: str,
        python: str = sys.executable,
        **environment: str,
    ) -> None:
        """Starts ``python script --work library``, which calls `serve`."""
        self.name = library
        self._process = subprocess.Popen(
            [python, script, "--work", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, **request: Any) -> Any:
        """Sends a request and waits for the answer.

        Raises:
          GoneError: If the process has ended, as after a fault in native code.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # What follows finds out.
        line = self._process.stdout.readline()
        if not line:
            raise GoneError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Lets the process end, so that its memory is free."""
        self._process.communicate()


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answers requests, one a line on stdin, one a line on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def environment_of(kind: str) -> dict[str, str]:
    """What makes JAX compute on the "gpu" or the "cpu"; memory is taken as needed.

    Raises:
      SystemExit: If it does not, in one line.
    """
    environment = {
        "JAX_PLATFORMS": {"gpu": "cuda", "cpu": "cpu"}[kind],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{sys.argv[0]}: JAX finds no {kind}. This measures an NVIDIA GPU; "
            "--platform cpu shows that the harness works."
        )
    return environment


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0][:REASON]}"


def versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that an interpreter has, of those named."""
    code = (
        "import importlib.metadata as m, json, sys;"
        "have = {d.name.lower() for d in m.distributions()};"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if n in have}))"
    )
    command = [python, "-c", code, *names]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def cpu() -> str:
    """The processors of this machine, such as "2 x Intel(R) Xeon(R) Processor"."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}"


def resident(field: str) -> int:
    """A figure of this process in bytes, from /proc: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def write(name: str, report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a report as JSON and returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file
