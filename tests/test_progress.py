"""A bar for long loads on a terminal, and for nothing else."""

import io

import pytest

from qjax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "shown"),
    [(Terminal, -1, True), (Terminal, 60, False), (io.StringIO, -1, False)],
    ids=["slow, terminal", "fast, terminal", "slow, file"],
)
def test_bar(monkeypatch, stream, patience, shown):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_PATIENCE_S", patience)
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar(2_000_000) as advance:
        advance(1_000_000)
        advance(1_000_000)
    assert bool(stderr.getvalue()) == shown
    if shown:
        assert "Loading weights" in stderr.getvalue()
        assert "2.0/2.0 MB" in stderr.getvalue()


@pytest.mark.parametrize(("total", "shown"), [(3, "2/3"), (None, "2/?")])
def test_bar_of_other_things_than_bytes(monkeypatch, total, shown):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_PATIENCE_S", -1)
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar(total, "Collecting", unit="batches") as advance:
        advance(1)
        advance(1)
    assert shown in stderr.getvalue()
    assert "batches" in stderr.getvalue()


def test_the_bar_goes_when_a_load_fails(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_PATIENCE_S", -1)
    monkeypatch.setenv("TERM", "xterm")

    def load():
        with progress.bar(2) as advance:
            advance(1)
            raise ValueError("a scale is NaN")

    with pytest.raises(ValueError, match="a scale"):
        load()
    assert stderr.getvalue().endswith("\x1b[1A\x1b[2K")  # its line is erased
