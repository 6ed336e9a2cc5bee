"""The command line: checkpoint directories, and configurations for this GPU."""

import contextlib
import dataclasses
import enum
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qjax import checkpoints, progress, tune
from qjax.checkpoints import modules
from qjax.pallas import tables
from qjax.tensor import QTensor

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_PICTURES = (".png", ".svg", ".pdf")
# As shells report a program that Ctrl-C has ended.
_INTERRUPTED = 130


# What `tune` measures.
Operation = enum.StrEnum("Operation", tables.OPS)


class Format(enum.StrEnum):
    """What `convert` writes."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    GPTQ_P = "gptq_p"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"
    EXL2 = "exl2"


Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        show_default=False,
        help="Holds config.json and model.safetensors (or shards and their index).",
    ),
]


@app.callback()
def _qjax() -> None:
    """Quantized checkpoints: see what is in them, check them, convert them.

    A checkpoint is a directory as Hugging Face hosts it. Results go to stdout,
    everything else to stderr; the exit code is 1 if something is wrong.

    **Examples**

    * What takes how many bits: `qjax inspect llama-gptq`
    * Is the download sound: `qjax verify llama-gptq`
    * GPTQ files for vLLM's compressed-tensors:
      `qjax convert llama-gptq llama-ct --to compressed-tensors`
    * Kernels as fast as this GPU allows: `qjax tune llama-gptq`
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What `inspect` says about a matrix or a dense tensor.

    Attributes:
      name: Path of the module, or full name of a dense tensor.
      shape: (inputs, outputs) of a matrix, or the shape of the tensor.
      format: Format of the checkpoint, or the dtype of a dense tensor.
      bits: Width of a code; the mean if the rows differ.
      group_size: Rows that share a scale; None for all of them, or if rows differ.
      bits_per_weight: All bits in the files, scales and zeros too, by the weights.
      bytes: Bytes in the files.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    group_size: int | None
    bits_per_weight: float
    bytes: int


@app.command()
def inspect(
    directory: Directory,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the bits of each matrix, too: .png, .svg or .pdf. Needs "
            "matplotlib.",
        ),
    ] = None,
) -> None:
    """List the matrices of a checkpoint with their bits, groups and bytes.

    Bits per weight count scales, zeros and orders beside the codes.

    **Examples**

    * `qjax inspect llama-gptq`
    * The five largest:
      `qjax inspect llama-gptq --json | jq '.matrices | sort_by(-.bytes) | .[:5]'`
    * A picture of a mixed model: `qjax inspect llama-exl2 --plot bits.png`
    """
    with _faults_on_stderr():
        pyplot = None if plot is None else _pyplot(plot)
        matrices, dense = _rows(directory)
        if plot is not None:
            _draw(pyplot, plot, matrices)
    if as_json:
        typer.echo(json.dumps(_summary(directory, matrices, dense), indent=2))
    else:
        _print_table(matrices, dense)


def _rows(directory: Path) -> tuple[list[Row], list[Row]]:
    parts = modules.open_parts(directory)
    matrices, dense = [], []
    with progress.bar(sum(part.nbytes for part in parts.values())) as advance:
        for name, part in parts.items():
            if isinstance(part, modules.Matrix):
                matrices.append(_matrix_row(part, part.read()))
            else:
                weights = max(int(np.prod(part.shape)), 1)
                dense.append(
                    Row(
                        name=name,
                        shape=part.shape,
                        format=part.dtype.name,
                        bits=8 * part.dtype.itemsize,
                        group_size=None,
                        bits_per_weight=8 * part.nbytes / weights,
                        bytes=part.nbytes,
                    )
                )
            advance(part.nbytes)
    return matrices, dense


def _matrix_row(part: modules.Matrix, qt: QTensor) -> Row:
    sizes = {segment.group_size for segment in qt.segments}
    return Row(
        name=part.name,
        shape=qt.shape,
        format=part.dialect,
        bits=qt.bits,
        group_size=sizes.pop() if len(sizes) == 1 else None,
        bits_per_weight=8 * part.nbytes / (qt.k * qt.n),
        bytes=part.nbytes,
    )


def _summary(
    directory: Path, matrices: Sequence[Row], dense: Sequence[Row]
) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "matrices": [dataclasses.asdict(row) for row in matrices],
        "dense": [dataclasses.asdict(row) for row in dense],
        "total": {
            "weights": _weights(matrices) + _weights(dense),
            "bytes": _bytes(matrices) + _bytes(dense),
            "bits_per_weight": _mean_bits([*matrices, *dense]),
            "matrices": {
                "weights": _weights(matrices),
                "bytes": _bytes(matrices),
                "bits_per_weight": _mean_bits(matrices),
            },
        },
    }


def _weights(rows: Sequence[Row]) -> int:
    return sum(int(np.prod(row.shape)) for row in rows)


def _bytes(rows: Sequence[Row]) -> int:
    return sum(row.bytes for row in rows)


def _mean_bits(rows: Sequence[Row]) -> float | None:
    return 8 * _bytes(rows) / _weights(rows) if _weights(rows) else None


def _print_table(matrices: Sequence[Row], dense: Sequence[Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("shape")
    table.add_column("format")
    for column in ("bits", "group", "bits/weight", "bytes"):
        table.add_column(column, justify="right")
    for row in matrices:
        group = "all" if row.group_size is None else str(row.group_size)
        _add(table, row, f"{row.bits:.4g}", group)
    if matrices:
        table.add_section()
    for row in dense:
        _add(table, row, f"{row.bits:.4g}", "")
    table.add_section()
    for name, rows in (
        (f"{len(matrices)} matrices", matrices),
        (f"{len(dense)} dense tensors", dense),
        ("total", [*matrices, *dense]),
    ):
        bits = "" if not _weights(rows) else f"{_mean_bits(rows):.3f}"
        table.add_row(
            name, f"{_weights(rows):,}", "", "", "", bits, f"{_bytes(rows):,}"
        )
    # Nothing is cut off in a file or a pipe.
    width = None if sys.stdout.isatty() else 240
    # Names are from the file: brackets and colons in them mean nothing to rich.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print(table)


def _add(table: Table, row: Row, bits: str, group: str) -> None:
    shape = "x".join(map(str, row.shape))
    per_weight = f"{row.bits_per_weight:.3f}"
    table.add_row(
        row.name, shape, row.format, bits, group, per_weight, f"{row.bytes:,}"
    )


def _pyplot(file: Path) -> Any:
    """Imports matplotlib, if it can draw that file; before the long work begins."""
    if file.suffix not in _PICTURES:
        raise ValueError(f"--plot={file} must end in {', '.join(_PICTURES)}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} is not a directory; make it first.")
    try:
        import matplotlib  # noqa: PLC0415  (an extra)

        matplotlib.use("agg")
        import matplotlib.pyplot  # noqa: PLC0415
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or 'qjax[examples]'."
        ) from None
    return matplotlib.pyplot


def _draw(pyplot: Any, file: Path, rows: Sequence[Row]) -> None:
    """Draws one bar a matrix: the codes, and what scales and zeros add."""
    if not rows:
        raise ValueError("--plot: no matrix of this checkpoint is quantized.")
    height = max(2.0, 0.18 * len(rows) + 1)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    names = [row.name for row in rows]
    codes = [row.bits for row in rows]
    rest = [row.bits_per_weight - row.bits for row in rows]
    axes.barh(names, codes, label="codes")
    axes.barh(names, rest, left=codes, label="scales, zeros, orders")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("bits per weight")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    try:
        figure.savefig(file, dpi=150)
    finally:
        pyplot.close(figure)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", show_default=False, help="Checkpoint directory to read."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", show_default=False, help="Directory to make."),
    ],
    to: Annotated[
        Format, typer.Option("--to", show_default=False, help="Format to write.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it is a checkpoint.")
    ] = False,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest file of weights, in 10^9 bytes.")
    ] = 5.0,
) -> None:
    """Write a checkpoint in another format, without requantizing.

    Codes, scales and zeros stay what they are; only where they lie changes. If the
    format cannot hold a matrix, all such matrices are listed with the reason, and
    nothing is written. DST appears only when it is complete; until then, what is done
    is in .DST.partial, and the same command goes on after an interruption. Tokenizer
    and generation config are copied.

    **Examples**

    * `qjax convert llama-awq llama-gptq --to gptq_v2`
    * `qjax convert llama-gptq llama-ct --to compressed-tensors --shard-gb 2`
    """
    with _faults_on_stderr():
        if not math.isfinite(shard_gb):
            raise ValueError(f"--shard-gb={shard_gb} must be a finite number.")
        try:
            checkpoints.convert(
                source,
                target,
                format=to.value,
                overwrite=overwrite,
                shard_bytes=int(shard_gb * 1e9),
            )
        except KeyboardInterrupt:
            typer.echo(
                "qjax: interrupted; the same command goes on from here.", err=True
            )
            raise typer.Exit(_INTERRUPTED) from None
    typer.echo(f"{target}: {to.value}")


@app.command()
def verify(directory: Directory) -> None:
    """Read a whole checkpoint and list everything that is wrong with it.

    Headers, names and shapes against the config; scales, zeros and dense tensors for
    NaN and infinity; ranges of indices; weights that nothing refers to. Prints OK and a
    summary, or one line for each problem, with exit code 1.

    **Examples**

    * `qjax verify llama-gptq`
    * `qjax verify llama-gptq || echo "download it again"`
    """
    with _faults_on_stderr():
        faults = checkpoints.verify(directory)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    parts = modules.open_parts(directory).values()
    matrices = [part for part in parts if isinstance(part, modules.Matrix)]
    formats = ", ".join(sorted({part.dialect for part in matrices}))
    typer.echo(
        f"OK: {len(matrices)} matrices{formats and f' of {formats}'}, "
        f"{len(parts) - len(matrices)} dense tensors, "
        f"{sum(part.nbytes for part in parts):,} bytes"
    )


_SHAPE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@app.command("tune")
def _tune(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
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
            max=tables.bucket(2**31),
            help="Rows of the activations, rounded up to a power of two. "
            f"[default: {', '.join(map(str, tune.ROWS))}]",
        ),
    ] = None,
    op: Annotated[
        list[Operation] | None,
        typer.Option(help="Operation. [default: matmul and dequantize]"),
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
    as those of models.

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
    with _faults_on_stderr():
        shapes = [_extents(text) for text in shape or []]
        if directory is None and not shapes:
            raise ValueError(
                "nothing to tune for: name a checkpoint, or a --shape KxN."
            )
        device = tune.gpu()
        weights = [
            tune.uniform(k, n, width, group_size or None)
            for k, n in shapes
            for width in bits or [4]
        ]
        weights += tune.of_checkpoint(directory) if directory is not None else []
        todo = tune.jobs(weights, op or ("matmul", "dequantize"), rows or tune.ROWS)
        file = tables.user_directory() / tables.file_name(device)
        table = tune.known(device, file)
        known = sum(job.key in table.entries for job in todo)
        measure = tune.Gauge()
        if verbose:
            measure = tune.told(measure, lambda line: typer.echo(line, err=True))
        if seconds is not None:
            measure = tune.within(measure, seconds)
        try:
            with tune.bar(len(todo)) as begin:
                save = tune.saver(file)
                table = tune.fill(table, todo, measure, save=save, begin=begin)
        except KeyboardInterrupt:
            typer.echo(
                "qjax: interrupted; the same command goes on from here.", err=True
            )
            raise typer.Exit(_INTERRUPTED) from None
    left = sum(job.key not in table.entries for job in todo)
    said = f"{file}: {len(todo) - known - left} measured, {known} were known"
    typer.echo(f"{said}, {left} left: the same command goes on" if left else said)


def _extents(text: str) -> tuple[int, int]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(f"--shape={text} must be KxN, such as 4096x14336.")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def _faults_on_stderr() -> Iterator[None]:
    """Errors of the user's files as a message with exit code 1, without a traceback."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (OSError, ValueError) as error:
            typer.echo(f"qjax: {error}", err=True)
            raise typer.Exit(1) from None
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                typer.echo(f"qjax: warning: {message}", err=True)


def main() -> None:
    """Runs the command line."""
    if not os.environ.get("JAX_PLATFORMS") and sys.argv[1:2] != ["tune"]:
        # Words are moved, not multiplied: the GPU is left to others.
        jax.config.update("jax_platforms", "cpu")
    app()


if __name__ == "__main__":
    main()
