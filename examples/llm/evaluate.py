"""Measures the loss of a language model on text: ``python evaluate.py --help``."""

import functools
import math
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from generate import SHIPPED, DtypeOption, TokenizerOption, describe, read_tokenizer
from jax import Array
from model import Decoder, load
from placement import MeshOption, Placement, place, rows_of
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from qjax import checkpoints


class Loss(NamedTuple):
    """Mean loss over all predicted tokens."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.nats_per_token:.4f} nats per token, "
            f"{self.bits_per_byte:.4f} bits per byte over {self.tokens} tokens"
        )


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    batch: int = 8,
    placement: Placement | None = None,
) -> Loss:
    """Loss of predicting ``ids[:, 1:]``, each row by itself.

    Args:
      model: The model.
      tokenizer: Its tokenizer, for the bytes of the predicted tokens.
      ids: Integer token ids ``[sequences, t + 1]``.
      batch: Sequences computed at a time.
      placement: Where the model is, if on many devices.

    Returns:
      The mean loss.

    Raises:
      ValueError: If ``ids`` has no token to predict or holds ids beyond the vocabulary,
        or devices cannot share a batch evenly.
    """
    if ids.ndim != 2 or ids.shape[1] < 2 or not len(ids):
        raise ValueError(f"ids.shape={ids.shape} must be [sequences, 2 or more].")
    if ids.shape[1] - 1 > model.config.max_length:
        raise ValueError(
            f"ids.shape={ids.shape} exceeds {model.config.max_length} positions."
        )
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"ids from {ids.min()} to {ids.max()} must lie below the vocabulary of "
            f"{model.config.vocab_size}."
        )
    rows = rows_of(placement, batch)
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, out_shardings=placement and placement.everywhere)
    def nats(state: nnx.State, ids: Array) -> Array:
        logits = nnx.merge(graph, state)(ids[:, :-1])
        target = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target).sum(-1)

    # The last batch is filled up with rows that do not count: one shape compiles.
    starts = range(0, len(ids), batch)
    console = Console(stderr=True)
    total = 0.0
    for start in track(
        starts, "loss", console=console, transient=True, disable=not console.is_terminal
    ):
        some = ids[start : start + batch]
        padded = np.resize(some, (batch, ids.shape[1])).astype(np.int32)
        losses = np.asarray(nats(state, rows(padded)), np.float64)
        total += float(losses[: len(some)].sum())
    tokens = ids[:, 1:].size
    predicted = [
        tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in ids[:, 1:]
    ]
    size = sum(len(text.encode()) for text in predicted)
    return Loss(total / tokens, total / math.log(2) / size, tokens)


def read_ids(path: Path) -> np.ndarray:
    """Reads token ids ``[sequences, t + 1]`` from .npy or the key ``ids`` of .npz."""
    loaded = np.load(path, allow_pickle=False)
    ids = loaded if isinstance(loaded, np.ndarray) else loaded["ids"]
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path}: ids have dtype {ids.dtype}; they must be integers.")
    return ids


def encode_text(path: Path, tokenizer: Tokenizer, context: int) -> np.ndarray:
    """Cuts a text into rows of ``context + 1`` ids, one shared; what is left over goes.

    Raises:
      ValueError: If the text is shorter than one row, or is no UTF-8.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}.") from error
    ids = np.array(tokenizer.encode(text).ids)
    rows = (len(ids) - 1) // context
    if rows < 1:
        raise ValueError(
            f"{path}: {len(ids)} tokens do not fill a row of {context + 1}."
        )
    return np.stack([ids[i * context : (i + 1) * context + 1] for i in range(rows)])


def main(
    source: Annotated[
        Path, typer.Argument(help="A text file, or ids in .npy or .npz.")
    ],
    model: Annotated[
        Path,
        typer.Option(
            help="Hugging Face directory, .gguf file, or name of a model there "
            "(organization/model, .../file.gguf); default: the shipped."
        ),
    ] = SHIPPED,
    tokenizer: TokenizerOption = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of text a row.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at a time.")] = 8,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Prints nats per token and bits per byte of a model on SOURCE.

    Example: python evaluate.py my_module.py --model path/to/model --mesh 2,2
    """
    try:
        model = checkpoints.locate(model)
        vocabulary = read_tokenizer(model, tokenizer)
        is_ids = source.suffix in (".npy", ".npz")
        ids = read_ids(source) if is_ids else encode_text(source, vocabulary, context)
        placement = place(model, mesh)
        where = placement and placement.weight
        decoder = load(model, dtype and dtype.value, where, joined=True)
        print(describe(decoder, model), file=sys.stderr)
        print(evaluate(decoder, vocabulary, ids, batch, placement))
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
