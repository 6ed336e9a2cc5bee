"""`qjax inspect`: what is in a checkpoint, as a table, JSON or a picture."""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from qjax import progress
from qjax.checkpoints import modules
from qjax.checkpoints.matrices import Matrix
from qjax.cli import alike, faults
from qjax.cli.arguments import Directory
from qjax.cli.table import begin, show
from qjax.tensor import QTensor

_PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What `inspect` says about a matrix or a dense tensor.

    Attributes:
      name: Path of the module, or full name of a dense tensor.
      shape: (inputs, outputs) of a matrix, or the shape of the tensor.
      format: Format of the checkpoint, or the dtype of a dense tensor.
      bits: Width of a code; the mean if the rows differ.
      group_size: Rows that share a scale, None for all of them; all sizes if the rows
        differ.
      bits_per_weight: All bits in the files, scales and zeros too, by the weights.
      bytes: Bytes in the files.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bits: int | float
    group_size: int | tuple[int | None, ...] | None
    bits_per_weight: float
    bytes: int


def run(
    directory: Directory,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table, of each.")
    ] = False,
    each: Annotated[
        bool,
        typer.Option(
            "--each",
            help="A line for each; without it, those that are alike but for numbers in "
            "their names, as of layers, have one, with the bytes of all.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the bits of each line, too: .png, .svg or .pdf. Needs "
            "matplotlib.",
        ),
    ] = None,
) -> None:
    """List the matrices of a checkpoint with their bits, groups and bytes.

    Bits per weight count scales, zeros and orders beside the codes.

    **Examples**

    * `qjax inspect llama-gptq`
    * `qjax inspect llama-Q4_K_M.gguf --each`
    * The five largest:
      `qjax inspect llama-gptq --json | jq '.matrices | sort_by(-.bytes) | .[:5]'`
    * A picture of a mixed model: `qjax inspect llama-exl2 --plot bits.png`
    """
    with faults.on_stderr():
        pyplot = None if plot is None else _pyplot(plot)
        matrices, dense = _rows(directory)
        if plot is not None:
            _draw(pyplot, plot, matrices if each else _merged(matrices))
    if as_json:
        typer.echo(json.dumps(_summary(directory, matrices, dense), indent=2))
    else:
        _print_table(matrices, dense, each=each)


def _rows(directory: Path) -> tuple[list[Row], list[Row]]:
    parts = modules.open_parts(directory)
    matrices, dense = [], []
    with progress.bar(sum(part.nbytes for part in parts.values())) as advance:
        for name, part in parts.items():
            if isinstance(part, Matrix):
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


def _matrix_row(part: Matrix, qt: QTensor) -> Row:
    found = {segment.group_size for segment in qt.segments}
    sizes = tuple(sorted(found, key=lambda size: math.inf if size is None else size))
    return Row(
        name=part.name,
        shape=qt.shape,
        format=part.dialect,
        bits=qt.bits,
        group_size=sizes[0] if len(sizes) == 1 else sizes,
        bits_per_weight=8 * part.nbytes / math.prod(qt.shape),
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


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Makes one row of those that differ in numbers of names, with the bytes of all."""
    kinds: dict[Row, dict[str, int]] = collections.defaultdict(dict)
    for i, row in enumerate(rows):
        kinds[dataclasses.replace(row, name="")][row.name] = i
    merged = {}
    for kind, places in kinds.items():
        for name, members in alike.boxes(places):
            whole = {"name": name, "bytes": len(members) * kind.bytes}
            place = min(places[member] for member in members)
            merged[place] = dataclasses.replace(kind, **whole)
    return [merged[place] for place in sorted(merged)]


def _print_table(matrices: Sequence[Row], dense: Sequence[Row], *, each: bool) -> None:
    table = begin(("shape", "format"), ("bits", "group", "bits/weight", "bytes"))
    for row in matrices if each else _merged(matrices):
        sizes = row.group_size
        sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        _add(table, row, ",".join("all" if s is None else str(s) for s in sizes))
    if matrices:
        table.add_section()
    for row in dense if each else _merged(dense):
        _add(table, row, "")
    table.add_section()
    for name, rows in (
        (f"{len(matrices)} matrices", matrices),
        (f"{len(dense)} dense tensors", dense),
        ("total", [*matrices, *dense]),
    ):
        bits = "" if not _weights(rows) else f"{_mean_bits(rows):.3f}"
        weights, size = f"{_weights(rows):,}", f"{_bytes(rows):,}"
        table.add_row(name, weights, "", "", "", bits, size)
    show(table)


def _add(table: Table, row: Row, group: str) -> None:
    shape, bits = "x".join(map(str, row.shape)), f"{row.bits:.4g}"
    numbers = (bits, group, f"{row.bits_per_weight:.3f}", f"{row.bytes:,}")
    table.add_row(row.name, shape, row.format, *numbers)


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
    """Draws one bar a row: the codes, and what scales and zeros add."""
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
