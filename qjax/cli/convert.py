"""`qjax convert`: a checkpoint in another format."""

import enum
from typing import Annotated

import typer

from qjax import checkpoints
from qjax.checkpoints import dialects
from qjax.cli import faults
from qjax.cli.arguments import Overwrite, ShardGb, Source, Target, shard_bytes

# What is written.
Format = enum.StrEnum("Format", list(dialects.DIALECTS))


def run(
    source: Source,
    target: Target,
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            metavar="FORMAT",
            show_default=False,
            help=f"Format to write: {', '.join(Format)}.",
        ),
    ],
    overwrite: Overwrite = False,
    shard_gb: ShardGb = 5.0,
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
        size = shard_bytes(shard_gb)
        with faults.resumable():
            checkpoints.convert(
                source,
                target,
                format=to.value,
                overwrite=overwrite,
                shard_bytes=size,
            )
    typer.echo(f"{target}: {to.value}")
