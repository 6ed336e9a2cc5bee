"""Quantized blocks of a model on disk, until all of them are there."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import qjax

Tensors = dict[str, Any]


def job_of(source: Path, ids: np.ndarray, options: Mapping[str, Any]) -> str:
    """Says all that blocks depend on."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    stats = {file.name: file.stat() for file in files}
    return json.dumps(
        {
            "source": os.path.realpath(source),
            "files": {
                name: (one.st_size, one.st_mtime_ns) for name, one in stats.items()
            },
            "ids": [
                ids.shape,
                hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest(),
            ],
            "options": options,
            "versions": {name: metadata.version(name) for name in ("jax", "qjax")},
        }
    )


def check_unchanged(job: str, source: Path, *rest: Any) -> None:
    """Raises a ValueError if it is no longer the job that it was."""
    if job_of(source, *rest) != job:
        raise ValueError(f"{source} was changed while it was read; start again.")


class Written:
    """Blocks as checkpoints of their own in a folder, each there as a whole or not.

    The folder also says of what job they are. To be used in a ``with``, which deletes
    those of another job, keeps other calls away, and leaves no folder without blocks.
    """

    def __init__(self, folder: Path, job: str, config: Mapping[str, Any], to: str):
        self.folder, self.job, self.config, self.to = folder, job, config, to
        self.note, self.lock = folder / "job.json", folder / "lock"

    def __enter__(self) -> "Written":
        self.folder.mkdir(exist_ok=True)
        # What a typing error names should survive.
        names = {file.name for file in self.folder.iterdir()}
        if self.note.name not in names and names - {self.lock.name}:
            raise FileExistsError(
                f"{self.folder} holds no blocks of a model; move it away."
            )
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(self.lock.open("wb"))
            try:
                # Goes with the process, however that ends.
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"{self.folder} is in use by another call; wait for it, or choose "
                    "another target."
                ) from None
            if not self.note.is_file() or self.note.read_text() != self.job:
                self.clear()
                self.note.write_text(self.job)
            self.held = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.kept():
            self.note.unlink()
            self.lock.unlink()
            self.folder.rmdir()
        self.held.close()

    def kept(self) -> list[Path]:
        return [entry for entry in self.folder.iterdir() if entry.is_dir()]

    def clear(self) -> None:
        """Deletes all blocks; if that is interrupted, the rest is of no job."""
        self.note.write_text("")
        for entry in self.kept():
            shutil.rmtree(entry)

    def path(self, i: int) -> Path:
        return self.folder / str(i)

    def __contains__(self, i: int) -> bool:
        return self.path(i).is_dir()

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return qjax.checkpoints.load(self.path(i))

    def __setitem__(self, i: int, tensors: Tensors) -> None:
        qjax.checkpoints.save(self.path(i), tensors, self.config, format=self.to)


class Assembled(Mapping[str, Any]):
    """A whole model: the blocks that are written, and the rest of the dense one."""

    def __init__(self, dense: Mapping[str, Any], blocks: Written, count: int):
        lazy = functools.partial(qjax.checkpoints.lazy, prepare=False)
        parts = [lazy(blocks.path(i)) for i in range(count)]
        self.places = {name: part for part in parts for name in part}
        layers = tuple(f"model.layers.{i}." for i in range(count))
        self.places |= {n: dense for n in dense if not n.startswith(layers)}
        # Bytes and weights of the matrices that were read.
        self.sizes: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> Any:
        one = self.places[name][name]
        if isinstance(one, qjax.QTensor):
            self.sizes[name] = one.nbytes, one.k * one.n
        return one

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def summary(self) -> str:
        """How many matrices were read, and of how many bits."""
        nbytes, weights = map(sum, zip(*self.sizes.values(), strict=True))
        return f"{len(self.sizes)} matrices, {8 * nbytes / weights:.2f} bits a weight"
