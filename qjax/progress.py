"""A bar on the terminal for work on weights that takes its time."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)

# Shorter work is over before a bar is of use.
_PATIENCE_S = 2.0


@contextlib.contextmanager
def bar(
    total: int | None, label: str = "Loading weights", *, unit: str = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how much is done, once two seconds have gone by.

    Nothing is written if stderr is no terminal.

    Args:
      total: How much there is to go through, or None if that is not known.
      label: What is done with it.
      unit: What it is counted in.

    Yields:
      A function to call with how much each step has done.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    counted = (MofNCompleteColumn(), TextColumn(unit))
    done = (DownloadColumn(),) if unit == "bytes" else counted
    columns = (TextColumn(label), BarColumn(), *done)
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task, start = progress.add_task("", total=total), time.monotonic()
    with contextlib.ExitStack() as shown:

        def advance(count: int) -> None:
            progress.advance(task, count)
            late = time.monotonic() - start > _PATIENCE_S
            if late and not progress.live.is_started:
                shown.enter_context(progress)

        yield advance
