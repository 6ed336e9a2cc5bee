"""Compiles and emulates in other processes, each case once a session; budgets.

A fatal error of the compiler ends its process, and fails the test that asked.
"""

import concurrent.futures
import json
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from tests.gpu import cases, compiler, running

BUDGETS = Path(__file__).with_name("budgets.json")
# Above the recorded count, the kernel has become worse; so far below it, the record
# has become worthless.
WORSE, BETTER = 1.03, 0.90
# These have the instructions of sm_80, and take at most so many times as many.
AS_SM_80, ALIKE = ("sm_89", "sm_120"), 1.05


def pytest_addoption(parser):
    parser.addoption(
        "--record-budgets",
        action="store_true",
        help="write the counts of this run into tests/gpu/budgets.json",
    )


def _compile(case, arch):
    function, avals, *specs = case()
    program = compiler.compile_for(
        function, *avals, arch=arch, specs=specs[0] if specs else None
    )
    if isinstance(case, cases.Matmul | cases.Other):
        # What their tests ask for, here, where several processes are at work.
        _ = program.kernel.loops, program.kernel.instructions
    return program


def _processes(count):
    # Not forked: JAX has threads.
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, spawn)


class Pool:
    """Compiler processes; asks for every case of the selected tests at once."""

    def __init__(self, wanted, work=_compile):
        self._all, self._work = _processes(min(8, os.cpu_count())), work
        self._results = {key: self._all.submit(work, *key) for key in wanted}

    def __call__(self, case, arch):
        """Returns what the work makes of a case: a `compiler.Program`, for one."""
        key = (case, arch)
        try:
            if key not in self._results:
                self._results[key] = self._all.submit(self._work, *key)
            return self._results[key].result()
        except BrokenProcessPool:
            # Some case has ended a process, and with it the pool: which one?
            with _processes(1) as alone:
                self._results[key] = alone.submit(self._work, *key)
                if isinstance(self._results[key].exception(), BrokenProcessPool):
                    pytest.fail(f"The compiler dies of {case} for {arch}.")
            return self._results[key].result()

    def close(self):
        self._all.shutdown(cancel_futures=True)


def _wanted(session, name):
    """What the selected tests give that parameter, with the GPU each asks for."""
    parameters = [
        item.callspec.params for item in session.items if hasattr(item, "callspec")
    ]
    return {
        (p[name], p["arch"]): None for p in parameters if {name, "arch"} <= p.keys()
    }


@pytest.fixture(scope="session")
def compiled(request):
    """``compiled(case, arch)``: what the compiler makes of it."""
    pool = Pool(_wanted(request.session, "case"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def emulated(request):
    """``emulated(run, arch)``: the `running.Outcome` of a call."""
    archs = {}
    for run, arch in _wanted(request.session, "run"):
        archs[run] = (*archs.get(run, ()), arch)
    pool = Pool(archs.items(), running.run_for_each)
    yield lambda run, arch: pool(run, archs[run])[arch]
    pool.close()


class Budgets:
    """The recorded instructions a weight, and registers, of every kernel."""

    def __init__(self, recording):
        self.recording = recording
        self.table = json.loads(BUDGETS.read_text())
        self.new = {}

    def check(self, case, arch, instructions, registers):
        """Fails where a count has left the record; notes it where one is recording."""
        counts = {"instructions": round(instructions, 3), "registers": registers}
        alike = arch in AS_SM_80
        if self.recording:
            if not alike:
                self.new.setdefault(str(case), {})[arch] = counts
            return
        recorded = self.table["kernels"].get(str(case), {})
        recorded = recorded.get("sm_80" if alike else arch)
        assert recorded, f"{case} for {arch} is not recorded: {_AGAIN}"
        ratio = instructions / recorded["instructions"]
        least, most = (0, ALIKE) if alike else (BETTER, WORSE)
        assert least <= ratio <= most, (
            f"{case} for {arch} takes {counts}, recorded {recorded} with "
            f"{self.table['versions']}, now {compiler.versions()}: {_AGAIN}"
        )

    def save(self):
        """Replaces the recorded counts of the cases that ran."""
        old = self.table["kernels"]
        new = {name: {**old.get(name, {}), **self.new[name]} for name in self.new}
        kernels = {**old, **new}
        table = {
            "versions": compiler.versions(),
            "kernels": {name: kernels[name] for name in sorted(kernels)},
        }
        BUDGETS.write_text(json.dumps(table, indent=1) + "\n")


_AGAIN = "find out why, or run make gpu-check ARGS=--record-budgets."


@pytest.fixture(scope="session")
def budgets(request):
    budgets = Budgets(request.config.getoption("--record-budgets"))
    yield budgets
    if budgets.recording:
        budgets.save()
