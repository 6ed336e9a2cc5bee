"""What more than one command takes."""

from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        show_default=False,
        help="Holds config.json and model.safetensors (or shards and their index).",
    ),
]
