"""Fills a table, one entry after another, each found by climbing.

From the heuristic's configuration, one field after another is halved or doubled for as
long as that is faster. That is some thirty compilations; all combinations would be a
thousand.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from qjax.pallas import configs, tables
from qjax.pallas.operands import Config
from qjax.tune.gauge import WrongResultError
from qjax.tune.jobs import Job

# Seconds of a call; of the product through the dense weight if no config is given.
# Raises one of `_DECLINED` if it does not compile, `WrongResultError` if it compiles to
# something else.
Measure = Callable[[Job, Config | None], float]
_DECLINED = (NotImplementedError, jax.errors.JaxRuntimeError)

# What a configuration must gain to be taken, and rounds over all fields.
_GAIN = 0.99
_ROUNDS = 2
# The operations that the dense weight is an alternative for.
_WITH_DENSE = ("matmul", "matmul_t")


class OutOfTimeError(Exception):
    """The seconds that were given are over."""


def within(
    measure: Measure, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Measure:
    """Limits what measurements take together.

    Args:
      measure: Times a configuration.
      seconds: From now on.
      clock: Tells the time in seconds.

    Returns:
      What raises `OutOfTimeError` instead of beginning another measurement.
    """
    end = clock() + seconds

    def limited(job: Job, config: Config | None) -> float:
        if clock() >= end:
            raise OutOfTimeError
        return measure(job, config)

    return limited


def told(measure: Measure, tell: Callable[[str], object]) -> Measure:
    """Lets every measurement be told in a line: job, configuration, and outcome.

    Args:
      measure: Times a configuration.
      tell: Called with the line.

    Returns:
      What measures as ``measure`` does.
    """

    def telling(job: Job, config: Config | None) -> float:
        said = "dense" if config is None else _in_short(config)
        try:
            seconds = measure(job, config)
        except (*_DECLINED, WrongResultError) as error:
            lines = str(error).splitlines() or [""]
            tell(f"{job}: {said}: {type(error).__name__}: {lines[0]}")
            raise
        tell(f"{job}: {said}: {_microseconds(seconds)} us")
        return seconds

    return telling


def _in_short(config: Config) -> str:
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())


def fill(
    table: tables.Table,
    todo: Sequence[Job],
    measure: Measure,
    *,
    save: Callable[[tables.Table], None],
    begin: Callable[[Job], None] = lambda job: None,
) -> tables.Table:
    """Measures what a table lacks.

    Args:
      table: What is known; its entries are kept.
      todo: What it should have.
      measure: Times a configuration.
      save: Called with the table after every new entry.
      begin: Called with each job, new or known, before its turn.

    Returns:
      The table with an entry for every job, or if ``measure`` raised
      `OutOfTimeError`, for those that were done.
    """
    for job in todo:
        begin(job)
        if job.key in table.entries:
            continue
        try:
            config, seconds = search(job, measure)
            dense = measure(job, None) if job.op in _WITH_DENSE else None
        except OutOfTimeError:
            break
        entry = tables.Entry(
            config,
            _microseconds(seconds),
            None if dense is None else _microseconds(dense),
        )
        table = dataclasses.replace(table, entries={**table.entries, job.key: entry})
        save(table)
    return table


def _microseconds(seconds: float) -> float:
    return float(f"{1e6 * seconds:.4g}")


def search(job: Job, measure: Measure) -> tuple[Config, float]:
    """Climbs from the heuristic's configuration to one that no single step improves.

    Args:
      job: What to configure.
      measure: Times a configuration. What it raises of the first is raised here.
        Others that do not compile are no candidates, nor, with a warning, those that
        compute something else.

    Returns:
      The best configuration and its seconds.
    """
    best = configs.heuristic(job.op, job.m, job.w)
    seconds = measure(job, best)
    tried = {best}
    for _ in range(_ROUNDS):
        before = best
        for field, up in itertools.product(tables.LIMITS, (True, False)):
            for candidate in climb(job, best, field, up=up):
                if candidate in tried:
                    break
                tried.add(candidate)
                found = _seconds(measure, job, candidate)
                if found > _GAIN * seconds:
                    break
                best, seconds = candidate, found
        if best == before:
            break
    return best, seconds


def climb(job: Job, config: Config, field: str, *, up: bool) -> Iterator[Config]:
    """Yields configurations with more and more of one field, or less and less."""
    least, most, powers = tables.LIMITS[field]
    if field == "slices":
        return  # They go with block_m.
    if job.op == "dequantize" and field in ("block_m", "splits"):
        return  # They mean nothing there.
    rows = max(1, config.block_m // config.slices)
    if job.op == "matvec" and field == "block_m":
        # The rows that there are, times the slices: one of them or more.
        slices = config.block_n // tables.LEAST_COLUMNS
        least = max(least, rows)
        most = min(most, rows * min(slices, tables.LIMITS["slices"][1]))
    elif field == "block_m":
        # Tensor cores take sixteen rows of dy at least; more rows than there are idle.
        least = max(least, 16) if job.op == "matmul_t" else least
        most = min(most, max(least, tables.bucket(job.op, job.m)))
    elif field == "block_n":
        least = max(least, config.slices * tables.LEAST_COLUMNS)
    value = getattr(config, field)
    while True:
        if powers or field == "splits":
            value = 2 * value if up else value // 2
        else:
            value = value + 1 if up else value - 1
        if not least <= value <= most:
            return
        changed = dataclasses.replace(config, **{field: value})
        if job.op == "matvec":
            changed = dataclasses.replace(changed, slices=changed.block_m // rows)
        if not configs.fits(changed, job.w):
            # It may compile, but not with other scales, or for the nearest shape.
            return
        yield changed


def _seconds(measure: Measure, job: Job, config: Config) -> float:
    try:
        return measure(job, config)
    except _DECLINED:
        return math.inf
    except WrongResultError as error:
        warnings.warn(str(error), stacklevel=2)
        return math.inf


def known(device: str, file: Path) -> tables.Table:
    """Reads the table of a device that earlier runs have left, or begins one.

    Raises:
      ValueError: If the file is wrong, or of another device.
    """
    if not file.exists():
        return tables.Table(device=device, entries={})
    table = tables.read(file)
    if table.device != device:
        raise ValueError(
            f"{file}: device={table.device!r} is not {device!r}; move the file away."
        )
    return table


def saver(file: Path) -> Callable[[tables.Table], None]:
    """Returns what writes a table to a file, with the versions that measured last."""
    versions = {}
    for name in ("jax", "qjax"):
        # qjax may run from a checkout, and have no number.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)

    def save(table: tables.Table) -> None:
        tables.write(file, dataclasses.replace(table, versions=versions))
        # The dense products of later jobs use what is known of `dequantize`.
        tables.forget()

    return save
