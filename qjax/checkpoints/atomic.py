"""Directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


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
            f"{path} is already there; choose another name, or overwrite it."
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
def replacing(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Makes a directory that takes its place only when it is complete.

    Args:
      path: The directory to make or to replace.
      overwrite: Whether it may be there already.

    Yields:
      An empty directory beside it, to be filled. It is renamed when the block ends, and
      deleted if that raises: then ``path`` is as it was.

    Raises:
      OSError: As `check_target`.
    """
    target = check_target(path, overwrite=overwrite)
    mark = secrets.token_hex(4)
    fresh = target.with_name(f".{target.name}.{mark}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        for file in [*fresh.iterdir(), fresh]:
            _to_disk(file)
        check_target(target, overwrite=overwrite)
        _rename(fresh, target, target.with_name(f".{target.name}.{mark}.old"))
        _to_disk(target.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _rename(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
