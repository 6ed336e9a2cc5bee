"""The command line: checkpoint directories, and configurations for this GPU."""

import os
import sys
from typing import Annotated

import jax
import typer

import qjax
from qjax.cli import compare, convert, inspect, quantize, tune, verify
from qjax.cli.convert import Format
from qjax.cli.quantize import Method
from qjax.cli.tune import Operation

__all__ = ["Format", "Method", "Operation", "app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"qjax {qjax.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _qjax(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_say_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Quantized checkpoints: make, inspect, check, compare and convert them.

    A checkpoint is a directory as Hugging Face hosts it, or the name of a model there,
    organization/model, which is downloaded; `inspect`, `verify` and `compare` take a
    GGUF file, too. Results go to stdout, everything else to stderr;
    the exit code is 1 if something is wrong.

    **Examples**

    * A dense model in four bits: `qjax quantize llama llama-gptq --to gptq`
    * What takes how many bits: `qjax inspect llama-gptq`
    * Is the download sound: `qjax verify llama-gptq`
    * What the few bits cost: `qjax compare llama llama-gptq`
    * GPTQ files for vLLM's compressed-tensors:
      `qjax convert llama-gptq llama-ct --to compressed-tensors`
    * Kernels as fast as this GPU allows: `qjax tune llama-gptq`
    """


app.command("quantize")(quantize.run)
app.command("inspect")(inspect.run)
app.command("convert")(convert.run)
app.command("verify")(verify.run)
app.command("compare")(compare.run)
app.command("tune")(tune.run)


def main() -> None:
    """Runs the command line."""
    if not os.environ.get("JAX_PLATFORMS") and sys.argv[1:2] != ["tune"]:
        # Words are moved, not multiplied: the GPU is left to others, unless it is
        # asked for.
        jax.config.update("jax_platforms", "cpu")
    app()
