"""What more than one command takes."""

import math
from pathlib import Path
from typing import Annotated

import typer

from qjax.checkpoints import hub


def checkpoint(text: str) -> Path:
    """Reads an argument that is a path, or the name of a model on the Hub."""
    try:
        return hub.locate(text)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        parser=checkpoint,
        show_default=False,
        help="Holds config.json and model.safetensors (or shards and their index); or "
        "a .gguf file; or the name of a model on the Hugging Face Hub.",
    ),
]

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        parser=checkpoint,
        show_default=False,
        help="Checkpoint directory to read, or the name of a model on the Hugging Face "
        "Hub.",
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="DST", show_default=False, help="Directory to make.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST if it is a checkpoint.")
]
ShardGb = Annotated[
    float, typer.Option(min=0.001, help="Largest file of weights, in 10^9 bytes.")
]


def shard_bytes(shard_gb: float) -> int:
    """The bytes of a ``--shard-gb``; a ValueError says that it is not finite."""
    if not math.isfinite(shard_gb):
        raise ValueError(f"--shard-gb={shard_gb} must be a finite number.")
    return int(shard_gb * 1e9)
