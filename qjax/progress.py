"""A bar on the terminal for work on weights that takes its time."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

# Shorter work is over before a bar is of use.
_PATIENCE_S = 2.0


@contextlib.contextmanager
def bar(total: int, label: str = "Loading weights") -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many bytes are done, once two seconds have gone by.

    Nothing is written if stderr is no terminal.

    Args:
      total: Bytes to go through.
      label: What is done with them.

    Yields:
      A function to call with the number of bytes that each step has done.
    """
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task, start = progress.add_task("", total=total), time.monotonic()
    with contextlib.ExitStack() as shown:

        def advance(nbytes: int) -> None:
            progress.advance(task, nbytes)
            late = time.monotonic() - start > _PATIENCE_S
            if late and not progress.live.is_started:
                shown.enter_context(progress)

        yield advance
