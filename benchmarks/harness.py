"""What the benchmarks share: a process for each library, and the head of a report."""

import contextlib
import json
import math
import os
import platform
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REASON = 160  # characters of an error that a table has room for
_STARTS = 180  # seconds in which JAX has found its devices
_ENDS = 20  # seconds in which a process has ended that is told to


class GoneError(RuntimeError):
    """The process of a library has ended, or was ended for not answering."""


class Clock:
    """What is left of a number of seconds; without one, there is no end of them."""

    def __init__(self, seconds: float | None) -> None:
        """Starts it."""
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative when it is over."""
        return self._end - time.monotonic()


def in_time(todo: Sequence[Any], clock: Clock) -> Iterator[Any]:
    """Yields what there is time for, if nothing takes longer than what was done."""
    longest = 0.0
    for one in todo:
        if clock.left < longest:
            return
        began = time.monotonic()
        yield one
        longest = max(longest, time.monotonic() - began)


class Worker:
    """A process that runs one library and answers requests.

    It imports the qjax of this checkout, installed or not.

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
        self._command = [python, script, "--work", library]
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=with_checkout(os.environ | self._environment),
        )

    def ask(self, within: float | None = None, /, **request: Any) -> Any:
        """Sends a request and waits for the answer, ``within`` seconds at most.

        Raises:
          GoneError: If the process has ended, as after a fault in native code, or has
            not answered in time, and was ended.
        """
        self.send(**request)
        return self.receive(within)

    def send(self, **request: Any) -> None:
        """Sends a request, whose answer `receive` waits for."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` finds out.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self, within: float | None = None) -> Any:
        """Waits for the answer to what was sent; raises as `ask`."""
        assert self._process.stdout is not None
        # An answer is one line, and there is one for each request: none is buffered.
        ready, _, _ = select.select([self._process.stdout], [], [], within)
        if not ready:
            self._process.kill()
            raise GoneError(f"no answer within {within:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise GoneError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)

    def restart(self) -> None:
        """Begins anew, in a process that knows nothing of what was asked before."""
        self._process.kill()
        self.end()
        self._start()

    def close(self) -> None:
        """Tells the process to end, and does not wait for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self) -> None:
        """Lets the process end, so that its memory is free."""
        self.close()
        try:
            self._process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


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
    try:
        subprocess.run(
            command,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=_STARTS,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or "").strip().splitlines() or [str(error)]
        raise SystemExit(
            f"{sys.argv[0]}: JAX finds no {kind}. This measures an NVIDIA GPU; "
            f"--platform cpu shows that the harness works. It says: {said[-1]}"
        ) from None
    return environment


def with_checkout(environment: dict[str, str]) -> dict[str, str]:
    """Puts this checkout before all else that Python imports."""
    root, others = str(Path(__file__).parents[1]), environment.get("PYTHONPATH")
    paths = os.pathsep.join([root, *([others] if others else [])])
    return environment | {"PYTHONPATH": paths}


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0][:REASON]}"


def versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that an interpreter has, of those named."""
    command = [python, "-c", _VERSIONS, *names]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


_VERSIONS = """
import contextlib, importlib.metadata, json, sys

found = {}
for name in sys.argv[1:]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found[name] = importlib.metadata.version(name)
print(json.dumps(found))
"""


def cpu() -> str:
    """The processors of this machine, such as "2 x Intel(R) Xeon(R) Processor"."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def resident(field: str) -> int:
    """A figure of this process in bytes, from /proc: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def slug(device: str) -> str:
    """The letters and digits of a device's kind, as they are part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(name: str, report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a report as JSON, whole or not at all, and returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    fresh = folder / f".{name}.tmp"
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(file)
    return file
