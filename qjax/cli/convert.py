"""`qjax convert`: a checkpoint in another format."""

import enum
import math
from pathlib import Path
from typing import Annotated

import typer

from qjax import checkpoints
from qjax.checkpoints import dialects
from qjax.cli import faults

# What is written.
Format = enum.StrEnum("Format", list(dialects.DIALECTS))


def run(
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
    with faults.on_stderr():
        if not math.isfinite(shard_gb):
            raise ValueError(f"--shard-gb={shard_gb} must be a finite number.")
        with faults.resumable():
            checkpoints.convert(
                source,
                target,
                format=to.value,
                overwrite=overwrite,
                shard_bytes=int(shard_gb * 1e9),
            )
    typer.echo(f"{target}: {to.value}")
