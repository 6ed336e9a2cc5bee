"""A checkpoint directory into another format, a matrix at a time, resumable."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax import progress
from qjax.checkpoints import modules
from qjax.checkpoints.atomic import check_target, resuming
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

Parts = Mapping[str, modules.Matrix | Stored]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint directory in another format, without requantizing.

    Every weight is read twice, one by one: to find what cannot be held before anything
    is written, and to write it. Tokenizer, generation config and whatever other files
    lie in the directory are copied; other weights and older descriptions of the
    quantization are not. Neither are directories in it, of which a warning tells, as
    nothing says whether they hold weights. Where ``target`` is ``source``, all of them
    stay.

    What is interrupted can be resumed: weights that are finished stay in
    ``.NAME.partial`` beside ``target``, and the same call goes on after them, once
    their checksums are right. If a file of ``source`` has another size or time of
    change since, or anything else is asked for, it starts from the beginning.

    Args:
      source: The directory to read, in any format that `load` knows.
      target: The directory to make, as in `save`.
      format: As in `save`.
      overwrite: As in `save`.
      shard_bytes: As in `save`.

    Raises:
      ValueError: As `load` and `save`.
      OSError: As `load` and `save`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     convert("examples/llm/checkpoint", f"{folder}/v2", format="gptq_v2")
      ...     config = qjax.checkpoints.read_config(f"{folder}/v2")
      >>> config["quantization_config"]["checkpoint_format"]
      'gptq_v2'
    """
    goal = check_target(target, overwrite=overwrite)
    origin = Path(os.path.realpath(source))
    if origin != goal and (origin in goal.parents or goal in origin.parents):
        raise ValueError(f"{source} and {target} must not lie in one another.")
    states = _states(origin)
    config = read_config(origin)
    parts = modules.open_parts(origin)
    if origin != goal:
        _warn_of_directories(origin)
    total = sum(part.nbytes for part in parts.values())
    with progress.bar(total, "Checking weights") as advance:
        plan = plan_files(goal, _looked_at(parts, advance), config, format, shard_bytes)
    job = _job(origin, states, plan)
    with (
        resuming(goal, job, overwrite=overwrite, stale=superseded) as (fresh, journal),
        progress.bar(total, "Writing weights") as advance,
    ):
        for name in write_files(fresh, plan, lambda name: parts[name].read(), journal):
            advance(parts[name].nbytes)
        for name in states:
            if not _is_stale(name):
                shutil.copyfile(origin / name, fresh / name)
        if _states(origin) != states:
            raise ValueError(f"{source} was changed while it was read; start again.")


def _looked_at(
    parts: Parts, advance: Callable[[int], None]
) -> Iterator[tuple[str, Any]]:
    """Reads matrices; of dense tensors the headers say all that counts."""
    for name, part in parts.items():
        yield name, part.read() if isinstance(part, modules.Matrix) else part
        advance(part.nbytes)


def _job(source: Path, states: Mapping[str, Sequence[int]], plan: Plan) -> str:
    """Says all that the files to be written depend on."""
    job = {
        "source": str(source),
        "states": states,
        "config": plan.config,
        "headers": {name: file.header.hex() for name, file in plan.files.items()},
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
            stacklevel=3,
        )


def _is_stale(name: str) -> bool:
    return name in STALE or name.endswith(_WEIGHTS) or name.startswith(".")
