"""A checkpoint directory made of another, a weight at a time, resumable."""

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax import progress
from qjax.checkpoints import gguf
from qjax.checkpoints.atomic import check_target, resuming, settle
from qjax.checkpoints.config import read_config
from qjax.checkpoints.shards import Stored
from qjax.checkpoints.writing import (
    SHARD_BYTES,
    STALE,
    Plan,
    plan_files,
    superseded,
    write_files,
)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_WEIGHTS += (".index.json",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """What becomes one weight of the new directory.

    Attributes:
      nbytes: Bytes in the files of the old one.
      look: Gives what a plan has to know of it, as `plan_files` takes it.
      read: Gives the weight, as `write_files` takes it.
    """

    nbytes: int
    look: Callable[[], Any]
    read: Callable[[], Any]


def kept(stored: Stored) -> Weight:
    """A tensor that stays as it is, of which the header says all that counts."""
    return Weight(nbytes=stored.nbytes, look=lambda: stored, read=stored.read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
      target: The directory to make, as in `save`.
      format: As in `save`.
      overwrite: As in `save`.
      shard_bytes: As in `save`.
      how: Says whatever else the new weights depend on, the same in every process.
      advice: What to do about weights that the format cannot hold.
    """

    target: str | os.PathLike[str]
    format: str
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES
    how: str = ""
    advice: str = ""


def rewrite(
    source: str | os.PathLike[str],
    request: Request,
    open_weights: Callable[[Path], Mapping[str, Weight]],
) -> None:
    """Makes a checkpoint directory of the weights of another.

    Args:
      source: The directory to read.
      request: What to make of it.
      open_weights: Gives the new weights by name, without reading them, of the path of
        ``source``.

    Raises:
      ValueError: As `save`; if ``source`` is a GGUF file, or changed meanwhile; or if
        one directory lies in the other.
      OSError: As `save`.
    """
    if gguf.is_file(source):
        raise ValueError(
            f"{source} is a GGUF file, whose weights can be loaded, but not written in "
            "other formats: it lacks the config.json and the names that those need."
        )
    settle(request.target, superseded)
    goal = check_target(request.target, overwrite=request.overwrite)
    origin = Path(os.path.realpath(source))
    if origin != goal and (origin in goal.parents or goal in origin.parents):
        raise ValueError(f"{source} and {request.target} must not lie in one another.")
    states = _states(origin)
    config = read_config(origin)
    weights = open_weights(origin)
    if origin != goal:
        _warn_of_directories(origin)
    total = sum(weight.nbytes for weight in weights.values())
    with progress.bar(total, "Checking weights") as advance:
        looks = _looked_at(weights, advance)
        plan = plan_files(
            goal,
            looks,
            config,
            request.format,
            request.shard_bytes,
            advice=request.advice,
        )
    job = _job(origin, states, plan, request.how)
    with (
        resuming(goal, job, overwrite=request.overwrite, stale=superseded) as (
            fresh,
            journal,
        ),
        progress.bar(total, "Writing weights") as advance,
    ):
        for name in write_files(
            fresh, plan, lambda name: weights[name].read(), journal
        ):
            advance(weights[name].nbytes)
        for name in states:
            if not _is_stale(name):
                shutil.copyfile(origin / name, fresh / name)
        if _states(origin) != states:
            raise ValueError(f"{source} was changed while it was read; start again.")


def _looked_at(
    weights: Mapping[str, Weight], advance: Callable[[int], None]
) -> Iterator[tuple[str, Any]]:
    for name, weight in weights.items():
        yield name, weight.look()
        advance(weight.nbytes)


def _job(
    source: Path, states: Mapping[str, Sequence[int]], plan: Plan, how: str
) -> str:
    """Says all that the files to be written depend on."""
    job = {
        "source": str(source),
        "states": states,
        "config": plan.config,
        "beside": plan.beside,
        "headers": {name: file.header.hex() for name, file in plan.files.items()},
        "how": how,
    }
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _states(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files in a directory, by which changes show."""
    if not directory.is_dir():
        return {}  # for `read_config` to refuse
    statuses = {
        file.name: file.stat() for file in directory.iterdir() if file.is_file()
    }
    return {name: (s.st_size, s.st_mtime_ns) for name, s in sorted(statuses.items())}


def _warn_of_directories(directory: Path) -> None:
    """Tells of directories that are not copied; hidden ones belong to tools."""
    inner = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    left = sorted(name for name in inner if not name.startswith("."))
    if left:
        warnings.warn(
            f"{directory}: the directories {left} are not copied; copy by hand what of "
            "them the model needs.",
            stacklevel=4,
        )


def _is_stale(name: str) -> bool:
    return name in STALE or name.endswith(_WEIGHTS) or name.startswith(".")
