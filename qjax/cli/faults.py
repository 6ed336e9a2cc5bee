"""How what goes wrong becomes a line on stderr and an exit code."""

import contextlib
import warnings
from collections.abc import Iterator

import typer

# As shells report a program that Ctrl-C has ended.
_INTERRUPTED = 130


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Errors of the user's files as a message with exit code 1, without a traceback."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (OSError, ValueError, NotImplementedError) as error:
            typer.echo(f"qjax: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                typer.echo(f"qjax: warning: {message}", err=True)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C as a message, around work that keeps what is done."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("qjax: interrupted; the same command goes on from here.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
