"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from qjax.checkpoints.journal import Journal

_JOURNAL, _LOCK, _FRESH = "journal", "lock", "checkpoint"

Stale = Callable[[Path], Collection[str]]


def check_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Checks that a directory may be written, before any work goes into it.

    Args:
      path: The directory.
      overwrite: Whether it may be there already.

    Returns:
      The path, absolute and without links.

    Raises:
      FileNotFoundError: If the directory that would hold it is not there.
      FileExistsError: If it is there and must not be, or is no checkpoint.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a directory; make it first.")
    if not target.exists():
        return target
    if not overwrite:
        raise FileExistsError(
            f"{path} is already there; choose another name, or overwrite it "
            "(overwrite=True, --overwrite)."
        )
    # What a typing error names should survive.
    replaceable = target.is_dir() and (
        (target / "config.json").is_file() or not any(target.iterdir())
    )
    if not replaceable:
        raise FileExistsError(
            f"{path} is no checkpoint directory, as it holds no config.json; it is not "
            "overwritten."
        )
    return target


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, overwrite: bool, stale: Stale
) -> Iterator[Path]:
    """Makes a directory that takes its place only when it is complete.

    Args:
      path: The directory to make or to replace.
      overwrite: Whether it may be there already.
      stale: Names the files of one that is there which go with what is replaced. All
        others stay in it, unless they are written anew.

    Yields:
      An empty directory beside it, to be filled. It is renamed when the block ends, and
      deleted if that raises: then ``path`` is as it was.

    Raises:
      OSError: As `check_target`.
    """
    settle(path, stale)
    target = check_target(path, overwrite=overwrite)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        _put(fresh, target, overwrite=overwrite, stale=stale)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def left_over(path: str | os.PathLike[str]) -> list[Path]:
    """Finds what a process that was killed while it replaced a directory has left.

    Args:
      path: The directory.

    Returns:
      What was in its place, beside it: whole if ``path`` is not there, and else without
      what was put back.
    """
    target = Path(os.path.realpath(path))
    names = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.old")
    if not target.parent.is_dir():
        return []
    return sorted(
        file for file in target.parent.iterdir() if names.fullmatch(file.name)
    )


def settle(path: str | os.PathLike[str], stale: Stale) -> None:
    """Finishes what a process that was killed while it replaced a directory has left.

    Args:
      path: The directory. If it is not there, what was in its place is put back.
      stale: As in `replacing`.

    Raises:
      FileExistsError: If another process is writing it.
    """
    target, found = Path(os.path.realpath(path)), left_over(path)
    if not found:
        return
    lock = partial_of(target) / _LOCK
    with _locked(lock) if lock.is_file() else contextlib.nullcontext():
        for old in found:
            if target.exists():
                _put_back(old, target, {*stale(old)})
            else:
                old.rename(target)


def partial_of(target: Path) -> Path:
    """Where `resuming` keeps what it has of a directory that is not complete."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def resuming(
    path: str | os.PathLike[str], job: str, *, overwrite: bool, stale: Stale
) -> Iterator[tuple[Path, Journal]]:
    """Does what `replacing` does, and keeps what there is if it is interrupted.

    Args:
      path: As in `replacing`.
      job: Says all that the directory depends on. What another job has left is deleted.
      overwrite: As in `replacing`.
      stale: As in `replacing`.

    Yields:
      A directory beside ``path``, with what the same job has left there; and the
      journal of what it had finished. A ValueError in the block deletes both: the same
      job would meet it again.

    Raises:
      FileExistsError: As `check_target`; or if the place is taken by something else, or
        by another process.
      FileNotFoundError: As `check_target`.
    """
    target = check_target(path, overwrite=overwrite)
    partial = partial_of(target)
    partial.mkdir(exist_ok=True)
    strangers = {file.name for file in partial.iterdir()} - {_JOURNAL, _LOCK, _FRESH}
    if strangers:
        raise FileExistsError(
            f"{partial} holds {sorted(strangers)}, which no conversion has left; move "
            "it away."
        )
    with _locked(partial / _LOCK):
        try:
            with Journal(partial / _JOURNAL, job) as journal:
                fresh = partial / _FRESH
                if not journal.finished:
                    shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(exist_ok=True)
                yield fresh, journal
            _put(fresh, target, overwrite=overwrite, stale=stale)
        except ValueError:
            shutil.rmtree(partial)
            raise
        shutil.rmtree(partial)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("wb") as stream:
        try:
            # Goes with the process, however that ends.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{file.parent} is being written by another process; wait for it, or "
                "choose another name."
            ) from None
        yield


def _put(fresh: Path, target: Path, *, overwrite: bool, stale: Stale) -> None:
    """Puts a complete directory in its place, on disk."""
    for file in [*fresh.iterdir(), fresh]:
        _to_disk(file)
    check_target(target, overwrite=overwrite)
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    _rename(fresh, target, old, stale)
    _to_disk(target.parent)


def _rename(fresh: Path, target: Path, old: Path, stale: Stale) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    replaced = {*stale(target), *(entry.name for entry in fresh.iterdir())}
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _put_back(old, target, replaced)


def _put_back(old: Path, target: Path, replaced: Collection[str]) -> None:
    """Moves what stays in a directory from what was there before, which goes."""
    for entry in old.iterdir():
        if entry.name not in replaced and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(old)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
