"""`qjax verify`: everything that is wrong with a checkpoint."""

import typer

from qjax import checkpoints
from qjax.checkpoints import modules
from qjax.checkpoints.matrices import Matrix
from qjax.cli import faults
from qjax.cli.arguments import Directory


def run(directory: Directory) -> None:
    """Read a whole checkpoint and list everything that is wrong with it.

    Headers, names and shapes against the config; scales, zeros and dense tensors for
    NaN and infinity; ranges of indices; weights that nothing refers to. Prints OK and a
    summary, or one line for each problem, with exit code 1.

    **Examples**

    * `qjax verify llama-gptq`
    * `qjax verify llama-gptq || echo "download it again"`
    """
    with faults.on_stderr():
        found = checkpoints.verify(directory)
    for fault in found:
        typer.echo(fault)
    if found:
        raise typer.Exit(1)
    parts = modules.open_parts(directory).values()
    matrices = [part for part in parts if isinstance(part, Matrix)]
    formats = ", ".join(sorted({part.dialect for part in matrices}))
    typer.echo(
        f"OK: {len(matrices)} matrices{formats and f' of {formats}'}, "
        f"{len(parts) - len(matrices)} dense tensors, "
        f"{sum(part.nbytes for part in parts):,} bytes"
    )
