"""`qjax compare`: how far two checkpoints of one model are apart."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qjax import checkpoints
from qjax.checkpoints.differences import Comparison, Difference, Held, Total, total
from qjax.cli import faults
from qjax.cli.arguments import checkpoint
from qjax.cli.table import begin, show

# Rows of matrices, and of dense tensors, where not each has one: those of a mixture are
# thousands.
_ROWS = 100
_HELP = (
    "Directory as Hugging Face hosts it, .gguf file, or name of a model on its Hub; "
    "dense or quantized."
)


def run(
    a: Annotated[
        Path,
        typer.Argument(
            metavar="A",
            parser=checkpoint,
            show_default=False,
            help=f"{_HELP} Errors are relative to its weights.",
        ),
    ],
    b: Annotated[
        Path,
        typer.Argument(metavar="B", parser=checkpoint, show_default=False, help=_HELP),
    ],
    at_most: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            min=0,
            show_default=False,
            help="Exit with 1 if a tensor has a larger relative error, and name it.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table, of each.")
    ] = False,
    each: Annotated[
        bool,
        typer.Option(
            "--each", help=f"A line for each; without it, for the {_ROWS} worst."
        ),
    ] = False,
) -> None:
    r"""Say how far a checkpoint is from another of the same model, tensor by tensor.

    Every matrix that A or B has quantized, the worst first, and dense tensors that
    differ: bits of a weight, scales and zeros included; the relative error
    norm(A - B) / norm(A), also in decibels; the largest difference of a weight; and
    what is the same: codes, values or all of it. Weights are compared in float32,
    those of act-order in the order of the inputs, and as they are in the files: factors
    that AWQ moved into the norms before count as errors.

    The exit code is 1 if a name or a shape is different, if a number of one side only
    is NaN or infinite, which makes the error infinite, or if an error is above
    --at-most. JSON has all tensors in the order of A, and null for infinity.

    **Examples**

    * What four bits cost: `qjax compare llama llama-gptq`
    * A conversion changes nothing: `qjax compare llama-gptq llama-ct --at-most 0`
    * GGUF files: `qjax compare llama-F16.gguf llama-Q4_K_M.gguf`
    * The three worst: `qjax compare llama llama-gptq --json |
      jq '.matrices | sort_by(-.relative_error) | .[:3]'`
    """
    with faults.on_stderr():
        if at_most is not None and not math.isfinite(at_most):
            raise ValueError(f"--at-most={at_most} must be a finite number.")
        found = checkpoints.compare(a, b)
    if as_json:
        typer.echo(json.dumps(_summary(a, b, found), indent=2))
    else:
        _print_table(found, None if each else _ROWS)
    wrong = _wrong(a, b, found, at_most)
    for line in wrong:
        typer.echo(f"qjax: {line}", err=True)
    if wrong:
        raise typer.Exit(1)


def _wrong(a: Path, b: Path, found: Comparison, at_most: float | None) -> list[str]:
    """Says why the exit code is 1."""
    wrong = []
    if not found.is_one_model:
        counts = map(len, (found.only_in_a, found.only_in_b, found.other_shapes))
        wrong.append(
            "{} and {} are not the same model: tensors only in the one: {}, only in "
            "the other: {}, of other shapes: {}.".format(a, b, *counts)
        )
    for one in found.tensors:
        error = f"{one.name}: the relative error {one.relative_error:.6g}"
        if math.isinf(one.largest):
            wrong.append(f"{error} is due to numbers that are NaN or infinite.")
        elif at_most is not None and one.relative_error > at_most:
            wrong.append(f"{error} is above --at-most={at_most}.")
    return wrong


def _split(found: Comparison) -> tuple[list[Difference], list[Difference]]:
    """Matrices that either side has quantized, and the other tensors."""
    matrices = [one for one in found.tensors if one.is_quantized]
    return matrices, [one for one in found.tensors if not one.is_quantized]


def _summary(a: Path, b: Path, found: Comparison) -> dict[str, Any]:
    matrices, dense = _split(found)
    return {
        "a": str(a),
        "b": str(b),
        "matrices": [_entry(one) for one in matrices],
        "dense": [_entry(one) for one in dense],
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "other_shapes": [
            {"name": name, "a": shape, "b": other}
            for name, (shape, other) in found.other_shapes.items()
        ],
        "total": _sum_entry(found.total) | {"matrices": _sum_entry(total(matrices))},
    }


def _entry(one: Difference) -> dict[str, Any]:
    return {
        "name": one.name,
        "shape": one.shape,
        "a": _side(one.a),
        "b": _side(one.b),
        "bits_per_weight": one.bits_per_weight,
        "relative_error": _number(one.relative_error),
        "snr_db": _number(one.snr_db),
        "largest": _number(one.largest),
        "same_values": one.same_values,
        "same_codes": one.same_codes,
    }


def _side(held: Held) -> dict[str, Any]:
    return {
        "format": held.format,
        "bits": held.bits,
        "bytes": held.nbytes,
        "not_finite": held.not_finite,
    }


def _sum_entry(of: Total) -> dict[str, Any]:
    return {
        "tensors": of.count,
        "same_values": of.same,
        "weights": of.weights,
        "bytes": of.nbytes,
        "bits_per_weight": of.bits_per_weight,
        "relative_error": _number(of.relative_error),
        "snr_db": _number(of.snr_db),
    }


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _print_table(found: Comparison, most: int | None) -> None:
    matrices, dense = _split(found)
    table = begin((), ("A, bits", "B, bits", "error", "dB", "largest"))
    table.add_column("same")
    for rows in (matrices, [one for one in dense if not one.same_values]):
        for one in sorted(rows, key=lambda one: -one.relative_error)[:most]:
            _add(table, one)
        if most is not None and len(rows) > most:
            table.add_row(f"and {len(rows) - most} more: --each")
        if rows:
            table.add_section()
    for name, rows in (
        (f"{len(matrices)} matrices", matrices),
        (f"{len(dense)} dense tensors", dense),
        ("total", found.tensors),
    ):
        _add_total(table, name, rows)
    show(table)
    for line in _notes(found):
        typer.echo(line)


def _add(table: Table, one: Difference) -> None:
    a, b = one.bits_per_weight or (math.nan, math.nan)
    table.add_row(
        one.name,
        f"{one.a.format} {a:.3f}",
        f"{one.b.format} {b:.3f}",
        *_error(one),
        f"{one.largest:.3g}",
        _same(one),
    )


def _same(one: Difference) -> str:
    if one.same_values:
        return "all" if one.same_codes else "values"
    return "codes" if one.same_codes else ""


def _add_total(table: Table, name: str, rows: Sequence[Difference]) -> None:
    of = total(rows)
    bits = [f"{bits:.3f}" for bits in of.bits_per_weight or ()] or ["", ""]
    table.add_row(name, *bits, *_error(of), "", f"{of.same} of {of.count}")


def _error(of: Difference | Total) -> list[str]:
    return [f"{of.relative_error:.4g}", f"{of.snr_db:.1f}"]


def _notes(found: Comparison) -> list[str]:
    """One line for each thing that no row of the table says."""
    size = "x".join
    return [
        *(f"only in A: {name}" for name in found.only_in_a),
        *(f"only in B: {name}" for name in found.only_in_b),
        *(
            f"other shape: {name}, {size(map(str, shape))} in A and "
            f"{size(map(str, other))} in B"
            for name, (shape, other) in found.other_shapes.items()
        ),
        *(
            f"NaN or infinite: {one.name}, {one.a.not_finite} numbers in A and "
            f"{one.b.not_finite} in B"
            for one in found.tensors
            if one.a.not_finite or one.b.not_finite
        ),
    ]
