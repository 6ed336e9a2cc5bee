"""The bar on the terminal for jobs that take a minute each."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from qjax.tune.jobs import Job


@contextlib.contextmanager
def bar(count: int) -> Iterator[Callable[[Job], None]]:
    """Shows on stderr which of ``count`` jobs is under way.

    Nothing is written if stderr is no terminal.

    Yields:
      A function to call with each job before it is done.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task("", total=count)
        done = iter(range(count))

        def begin(job: Job) -> None:
            progress.update(task, description=str(job), completed=next(done))

        yield begin
