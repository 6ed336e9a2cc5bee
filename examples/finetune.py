"""Fine-tunes the shipped 4-bit model on Python source: ``python finetune.py --help``.

Three ways to train a model whose weights are packed integers, of which two leave the
integers alone: adapters beside them (LoRA), the scales they are multiplied by, and the
integers themselves, along their shadow gradient.
"""

import enum
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import typer
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tokenizers import Tokenizer

from qjax import checkpoints, training
from qjax.layers.nnx import Scale

LLM = Path(__file__).resolve().parent / "llm"
sys.path.insert(0, str(LLM))

from model import Decoder, load  # noqa: E402  (found on the path just added)
from placement import MeshOption, place, rows_of  # noqa: E402

SHIPPED = LLM / "checkpoint"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Every tenth file is held out, and these folders are no ordinary source.
HELD_OUT, LEFT_OUT = 10, {"test", "tests", "site-packages", "lib2to3", "idlelib"}
# What each method takes by default, found by trying a few.
RATES = {"lora": 3e-3, "scales": 3e-4, "weights": 1e-3}
RANK = 8
PICTURES = (".png", ".svg", ".pdf")

Step = Callable[[Array], Array]


class Method(enum.StrEnum):
    """What is trained."""

    LORA = "lora"
    SCALES = "scales"
    WEIGHTS = "weights"


def read_source(tokenizer: Tokenizer, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a folder's Python files: of those to train on, and of the others.

    Raises:
      ValueError: If there are too few files to hold one out.
    """
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    if len(files) < 2:
        raise ValueError(f"{root} has {len(files)} Python files; two are needed.")
    texts = [path.read_text("utf-8", errors="replace") for path in files]
    encodings = tokenizer.encode_batch(texts)
    # Some files are empty.
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    held_out = np.concatenate(ids[::HELD_OUT])
    trained = [one for i, one in enumerate(ids) if i % HELD_OUT]
    return np.concatenate(trained), held_out


def windows(
    ids: np.ndarray, context: int, batch: int, rng: Any
) -> Iterator[np.ndarray]:
    """Yields batches of ``context + 1`` tokens from random places, without end.

    Raises:
      ValueError: If there are not so many tokens.
    """
    if len(ids) < context + 2:
        raise ValueError(f"{len(ids)} tokens are too few for a context of {context}.")
    while True:
        starts = rng.integers(0, len(ids) - context - 1, batch)
        yield np.stack([ids[s : s + context + 1] for s in starts])


def loss_of(model: Decoder, ids: Array) -> Array:
    """Mean nats of predicting ``ids[:, 1:]``."""
    logits = model(ids[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses.mean()


def train_variables(model: Decoder, kind: type, rate: optax.Schedule) -> Step:
    """Trains the Variables of a kind, of which the optimizer alone holds moments."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=kind)

    @nnx.jit
    def step(model: Decoder, optimizer: nnx.Optimizer, ids: Array) -> Array:
        wrt = nnx.DiffState(0, kind)
        loss, gradient = nnx.value_and_grad(loss_of, argnums=wrt)(model, ids)
        optimizer.update(model, gradient)
        return loss

    return lambda ids: step(model, optimizer, ids)


def train_weights(model: Decoder, rate: optax.Schedule) -> Step:
    """Trains the integers: their shadow gradient, DiodeMix, and a residual.

    A step is a small part of the distance between two codes. What of it the codes
    cannot hold is kept in the residual, and is added to the next one.
    """
    optimizer = training.diode_mix(rate, 0.9, 0.99)

    @nnx.jit
    def start(model: Decoder) -> tuple[Any, Any]:
        zeros = training.shadow.zeros(training.nnx.kernels(model))
        return optimizer.init(zeros), zeros

    @nnx.jit
    def step(model: Decoder, state: Any, residual: Any, ids: Array) -> tuple:
        kernels = training.nnx.kernels(model)

        def loss(shadows: dict[str, Array]) -> Array:
            return loss_of(training.nnx.with_shadows(model, shadows), ids)

        # Zeros made here take no memory; their gradient is that of the integers.
        zeros = training.shadow.zeros(kernels)
        value, gradient = jax.value_and_grad(loss)(zeros)
        updates, state = optimizer.update(gradient, state)
        kernels, residual = training.apply_with_residual(kernels, updates, residual)
        training.nnx.load_kernels(model, kernels)
        return value, state, residual

    held = start(model)

    def stepped(ids: Array) -> Array:
        nonlocal held
        value, *held = step(model, *held, ids)
        return value

    return stepped


def set_up(
    model: Decoder, method: Method, rate: optax.Schedule
) -> tuple[Decoder, Step]:
    """The model as it is trained, and what takes a step with a batch."""
    if method is Method.LORA:
        model = training.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
        return model, train_variables(model, nnx.LoRAParam, rate)
    if method is Method.SCALES:
        # Adam's second moments underflow in the float16 that the file has.
        for _, scale in nnx.to_flat_state(nnx.state(model, Scale)):
            scale.set_value(scale[...].astype(jnp.float32))
        return model, train_variables(model, Scale, rate)
    return model, train_weights(model, rate)


@nnx.jit
def _loss(model: Decoder, ids: Array) -> Array:
    return loss_of(model, ids)


def evaluate(
    model: Decoder, ids: np.ndarray, batch: int, rows: Callable[[np.ndarray], Array]
) -> float:
    """Mean nats per token of fixed rows, which ``rows`` puts on devices."""
    parts = np.split(ids, len(ids) // batch)
    return float(np.mean([float(_loss(model, rows(part))) for part in parts]))


def draw(path: Path, method: str, losses: list[float], held_out: list[float]) -> None:
    """Draws the loss curves: of each step, its running mean, held out."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415  (after the backend is chosen)

    size = min(20, len(losses))
    mean = np.convolve(losses, np.ones(size) / size, "valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color="tab:blue", alpha=0.25, label="training, each step")
    axes.plot(np.arange(size - 1, len(losses)), mean, color="tab:blue", label="mean")
    axes.plot([0, len(losses) - 1], held_out, "o--", color="tab:red", label="held out")
    axes.set(xlabel="step", ylabel="nats per token", title=f"--method {method}")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_options(rate: float | None, output: Path) -> None:
    """Refuses what would be found out when all is trained, or never.

    Raises:
      ValueError: If the rate is no positive number, or the curves cannot be drawn
        there.
    """
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"--rate={rate} must be a positive number.")
    if output.suffix not in PICTURES:
        raise ValueError(f"--output={output} must end in {', '.join(PICTURES)}.")
    is_place = output.parent.is_dir() and not output.is_dir()
    written = output if output.exists() else output.parent
    if not is_place or not os.access(written, os.W_OK):
        raise ValueError(
            f"--output={output} must be a file in a folder that can be written to."
        )


def check_context(context: int, model: Decoder) -> None:
    """Refuses rows of more tokens than the model has positions."""
    if context > model.config.max_length:
        raise ValueError(
            f"--context={context} must be at most {model.config.max_length}, the "
            "positions of the model."
        )


def main(
    method: Annotated[Method, typer.Option(help="What is trained.")] = Method.LORA,
    model: Annotated[
        Path,
        typer.Option(
            help="Hugging Face directory, or name of a model there; default: the "
            "shipped model."
        ),
    ] = SHIPPED,
    source: Annotated[
        Path, typer.Option(help="Folder of Python files; default: Python's own.")
    ] = STDLIB,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 128,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate; default: the method's own.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Loss curves, .png, .svg or .pdf; default: finetune-METHOD.png."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batches.")] = 0,
    mesh: MeshOption = None,
) -> None:
    """Trains on the standard library's source, and measures files that were held out.

    Example: python finetune.py --method weights --steps 100 --mesh 2,2
    """
    console = Console(stderr=True)
    path = output or Path(f"finetune-{method}.png")
    try:
        check_options(rate, path)
        model = checkpoints.locate(model)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        placement = place(model, mesh)
        rows = rows_of(placement, batch)
        decoder = load(model, sharding=placement and placement.weight)
        check_context(context, decoder)
        trained, held = read_source(tokenizer, source)
        fixed = next(windows(held, context, 8 * batch, np.random.default_rng(0)))
    except (ValueError, OSError) as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from None
    rng = np.random.default_rng(seed)
    schedule = optax.cosine_decay_schedule(rate or RATES[method], steps, 0.1)
    decoder, step = set_up(decoder, method, schedule)

    before, losses = evaluate(decoder, fixed, batch, rows), []
    started = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=steps)
        for ids in windows(trained, context, batch, rng):
            losses.append(float(step(rows(ids))))
            loss = np.mean(losses[-20:])
            progress.update(task, advance=1, description=f"loss {loss:.4f}")
            if len(losses) == steps:
                break
    seconds = time.perf_counter() - started
    after = evaluate(decoder, fixed, batch, rows)
    draw(path, method, losses, [before, after])
    print(
        f"{method}: held-out loss {before:.4f} before, {after:.4f} after {steps} steps "
        f"of {batch} x {context} tokens in {seconds:.0f} s; curves in {path}"
    )


if __name__ == "__main__":
    typer.run(main)
