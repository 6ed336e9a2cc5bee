"""How tables of tensors look."""

import functools
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# Of names, on a narrow terminal, and of what is written to a file or a pipe.
_NARROW, _WIDE = 11, 240


def begin(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Makes a table with a column of names, columns of words, and then of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def show(table: Table) -> None:
    """Prints a table on stdout; on a narrow terminal names take more lines."""
    # Names are from the file: brackets and colons in them mean nothing to rich.
    console = functools.partial(Console, highlight=False, markup=False, emoji=False)
    shown = console(width=_WIDE)
    if sys.stdout.isatty():
        # The rest is never cut off, but wrapped by the terminal, if there is no room.
        names, *_ = table.columns
        names.max_width = _NARROW
        least = shown.measure(table).maximum
        names.max_width = None
        shown = console(width=max(least, console().width))
    shown.print(table)
