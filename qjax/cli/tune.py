"""`qjax tune`: the fastest launches of the kernels on this GPU."""

import enum
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qjax import tune
from qjax.cli import faults
from qjax.cli.arguments import checkpoint
from qjax.pallas import tables
from qjax.tensor import QTensor

# What is measured, and what of it unless anything is named.
Operation = enum.StrEnum("Operation", tables.OPS)
_USUAL = ("matvec", "matmul", "dequantize")
_SHAPE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


def run(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            parser=checkpoint,
            show_default=False,
            help="A checkpoint, whose quantized matrices are tuned for.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KxN", help="Tune for a matrix of K inputs and N outputs, too."
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(min=2, max=8, help="Width of the codes of --shape. [default: 4]"),
    ] = None,
    group_size: Annotated[
        int, typer.Option(min=0, help="Rows that share a scale in --shape; 0 for all.")
    ] = 128,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=tables.bucket("matmul", 2**31),
            help="Rows of the activations, rounded up to a power of two. "
            f"[default: {', '.join(map(str, tune.ROWS))}]",
        ),
    ] = None,
    op: Annotated[
        list[Operation] | None,
        typer.Option(help=f"Operation. [default: {', '.join(_USUAL)}]"),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Stop after so many seconds; what is complete is kept. "
            "[default: when all is measured]",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Say what every configuration takes."),
    ] = False,
) -> None:
    """Measure which launches of the kernels are fastest on this GPU.

    Without it, a heuristic configures them. Each combination of matrix, operation and
    rows takes some tens of compilations, a minute or so; every result is kept at once,
    known ones are not measured again, and the same command goes on after an
    interruption. Programs that start later use the results. Activations are bfloat16,
    as those of models. Up to 16 rows are multiplied by matvec, more by matmul.

    They are kept in one JSON file a device in `$QJAX_TABLES`, or else in
    `~/.cache/qjax/tables`. Deleting the file forgets them. Needs an NVIDIA GPU of
    compute capability 8.0 or later, otherwise idle. Training also uses matmul_t and
    scale_grad.

    **Examples**

    * For a model: `qjax tune llama-gptq`
    * For one matrix, generating text: `qjax tune --shape 4096x14336 --rows 1`
    * As far as five minutes go: `qjax tune llama-gptq --seconds 300`
    * For training: `qjax tune llama-gptq --op matmul --op dequantize --op matmul_t
      --op scale_grad`
    """
    with faults.on_stderr():
        shapes = [_extents(text) for text in shape or []]
        if directory is None and not shapes:
            raise ValueError(
                "nothing to tune for: name a checkpoint, or a --shape KxN."
            )
        device = tune.gpu()
        weights = _weights(directory, shapes, bits or [4], group_size or None)
        todo = tune.jobs(weights, op or _USUAL, rows or tune.ROWS)
        said = _measure(todo, device, seconds=seconds, verbose=verbose)
    typer.echo(said)


def _extents(text: str) -> tuple[int, int]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(f"--shape={text} must be KxN, such as 4096x14336.")
    return int(found[1]), int(found[2])


def _weights(
    directory: Path | None,
    shapes: Sequence[tuple[int, int]],
    bits: Sequence[int],
    group_size: int | None,
) -> list[QTensor]:
    """Describes the matrices to tune for."""
    each = [tune.uniform(k, n, width, group_size) for k, n in shapes for width in bits]
    return each if directory is None else each + tune.of_checkpoint(directory)


def _measure(
    todo: Sequence[tune.Job], device: str, *, seconds: float | None, verbose: bool
) -> str:
    """Fills the table of this device with what it lacks, and says how far that went."""
    file = tables.user_directory() / tables.file_name(device)
    table = tune.known(device, file)
    known = sum(job.key in table.entries for job in todo)
    measure = tune.Gauge()
    if verbose:
        measure = tune.told(measure, lambda line: typer.echo(line, err=True))
    if seconds is not None:
        measure = tune.within(measure, seconds)
    with faults.resumable(), tune.bar(len(todo)) as begin:
        save = tune.saver(file)
        table = tune.fill(table, todo, measure, save=save, begin=begin)
    left = sum(job.key not in table.entries for job in todo)
    said = f"{file}: {len(todo) - known - left} measured, {known} were known"
    return f"{said}, {left} left: the same command goes on" if left else said
