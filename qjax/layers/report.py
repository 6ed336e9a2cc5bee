"""What became of the weights of a model, as values that print as tables."""

import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from qjax.tensor import readable


def path_name(keys: Iterable[Any]) -> str:
    """The path of a weight or a module as rules and reports have it."""
    return "/".join(map(str, keys))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What became of one weight.

    Attributes:
      path: Where it is, such as "layers/0/attn/q_proj/w".
      shape: Shape of the dense weight.
      dtype: Dtype of the dense weight.
      weight: The packed matrix in one line, or None if the weight stays dense.
      reason: Why it stays dense, or what there is to know of the packed one; or None.
      asked: Whether a rule wants it quantized.
      before: Bytes of the dense weight.
      after: Bytes of what is there now.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    weight: str | None = None
    reason: str | None = None
    asked: bool = False
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize_model` replaced, what it did not, and why. It prints as a table.

    Attributes:
      entries: One for each parameter of the model.
    """

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The weights that are packed now."""
        return tuple(entry for entry in self.entries if entry.weight)

    @property
    def kept(self) -> tuple[Entry, ...]:
        """The weights that are what they were."""
        return tuple(entry for entry in self.entries if not entry.weight)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """The weights that a rule wants quantized, but that are what they were."""
        return tuple(entry for entry in self.kept if entry.asked)

    @property
    def before(self) -> int:
        """Bytes of all parameters before."""
        return sum(entry.before for entry in self.entries)

    @property
    def after(self) -> int:
        """Bytes of all parameters now."""
        return sum(entry.after for entry in self.entries)

    def __rich__(self) -> Table:
        """The table, for `rich.print`."""
        title = f"{len(self.replaced)} of {len(self.entries)} parameters quantized"
        names = ("shape", "now", "before", "after")
        table = Table(path_column(), *names, title=title)
        for entry in self.entries:
            now = " - ".join(filter(None, (entry.weight or "dense", entry.reason)))
            sizes = readable(entry.before), readable(entry.after)
            table.add_row(entry.path, f"{entry.dtype}{entry.shape}", now, *sizes)
        sums = readable(self.before), readable(self.after)
        table.add_row("all", "", "", *sums)
        return table

    def __str__(self) -> str:
        """The table in plain text."""
        return in_text(self.__rich__())


def in_text(table: Table) -> str:
    """Renders a table as plain text."""
    file = io.StringIO()
    Console(file=file, width=150).print(table)
    return file.getvalue()


def path_column() -> Column:
    """A column of paths, of which all letters are shown."""
    return Column("path", overflow="fold")


Listener = Callable[[Report], object]
