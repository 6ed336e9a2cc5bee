"""Quantizes a language model by GPTQ, on text: ``python quantize.py --help``.

Block by block: the inputs of its layers are seen on the text, its matrices are
quantized so that their outputs on such inputs change least, and the next block sees
what the quantized one makes of the text. ``qjax quantize`` needs no text, and no model
code; this costs more time and less of the model.
"""

import dataclasses
import enum
import functools
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from evaluate import encode_text, read_ids
from flax import nnx
from generate import read_tokenizer
from jax import Array
from model import Block, Cache, Config
from rich.console import Console
from rich.progress import track
from weights import Weights

import qjax
from qjax.quantizers import gptq

# What a directory holds beside the model, and a quantized one as well.
BESIDE = ("*token*", "*.jinja", "vocab.*", "merges.txt", "generation_config.json")

Format = enum.StrEnum("Format", ["gptq", "gptq_v2", "gptq_p", "compressed-tensors"])


def quantize(
    path: Path, ids: np.ndarray, spec: qjax.Spec, batch: int = 8
) -> dict[str, Any]:
    """Quantizes the linear layers of all blocks of a dense model.

    Args:
      path: Its directory.
      ids: Integer token ids ``[sequences, t]``, such as the model will see.
      spec: Width, groups, and a quantizer that takes a gram.
      batch: Sequences computed at a time.

    Returns:
      Its tensors, as `qjax.checkpoints.load` returns them.

    Raises:
      ValueError: If the model is quantized already, or cannot be so.
    """
    tensors = qjax.checkpoints.load(path)
    if any(isinstance(tensor, qjax.QTensor) for tensor in tensors.values()):
        raise ValueError(f"{path} is quantized already; pass the model it came from.")
    config = Config.from_json(qjax.checkpoints.read_config(path))
    # Those that are left over when there are fewer than a batch would compile anew.
    batch = min(batch, len(ids))
    ids = ids[: len(ids) // batch * batch].reshape(-1, batch, ids.shape[1])
    embedding = tensors["model.embed_tokens.weight"]
    states = [jnp.take(embedding, some, axis=0).astype(jnp.float32) for some in ids]
    blocks = list(enumerate(config.windows))
    console = Console(stderr=True)
    for i, window in track(
        blocks, "blocks", console=console, disable=not console.is_terminal
    ):
        name = f"model.layers.{i}"
        build = functools.partial(block, tensors, config, name, window)
        inputs = [(x, *places(config, x)) for x in states]
        for module, gram in grams_of(build(), name, spec, inputs):
            tensors[module] = spec.quantize(
                tensors.pop(f"{module}.weight").T, gram=gram
            )
        states = run(build(), inputs)
    return tensors


def block(
    tensors: dict[str, Any], config: Config, name: str, window: int | None
) -> Block:
    """A block over tensors of which it leaves all where they are."""
    return Block(Weights(dict(tensors), config, jnp.float32), name, window)


def places(config: Config, x: Array) -> tuple[Array, ...]:
    """An empty cache for one layer, and where sequences begin."""
    one = Cache.empty(config, len(x), x.shape[1], x.dtype)
    return one.keys[0], one.values[0], one.length, one.first


def grams_of(
    block: Block, name: str, spec: qjax.Spec, inputs: list[tuple]
) -> Iterator[tuple[str, Array]]:
    """Grams of the inputs of the layers of a block whose others are rounded.

    Yields:
      The path of each layer in the checkpoint, and its gram.
    """
    rounding = dataclasses.replace(spec, quantizer=None)
    rounded = qjax.quantize_model(block, rounding, *inputs[0], strict=True)
    for path, gram in qjax.quantizers.grams(rounded, inputs).items():
        yield f"{name}.{path.removesuffix('/weight').replace('/', '.')}", gram


def run(block: Block, inputs: list[tuple]) -> list[Array]:
    """The hidden states that a block makes of others."""
    graph, state = nnx.split(block)
    return [forward(graph, state, *some) for some in inputs]


# Blocks differ in their arrays alone, and compile once.
@functools.partial(jax.jit, static_argnums=0)
def forward(graph: Any, state: nnx.State, *inputs: Array) -> Array:
    return nnx.merge(graph, state)(*inputs)[0]


def check_format(to: Format, spec: qjax.Spec) -> None:
    """Raises a ValueError now where `save` would in an hour."""
    if to is Format.gptq and not spec.symmetric:
        raise ValueError("--to gptq cannot store all zeros; gptq_v2 can.")
    w = jnp.ones((math.lcm(32, spec.group_size or 1), 32), jnp.bfloat16)
    one = spec.quantize(w, gram=jnp.eye(len(w)))
    with tempfile.TemporaryDirectory() as folder:
        qjax.checkpoints.save(f"{folder}/one", {"proj": one}, {}, format=to.value)


def calibration(sources: list[Path], path: Path, context: int, rows: int) -> np.ndarray:
    """Rows of ids ``[rows, context]`` from all over some texts, or files of ids.

    Raises:
      ValueError: If there are none.
    """
    parts, tokenizer = [], functools.cache(read_tokenizer)
    for source in sources:
        if source.suffix in (".npy", ".npz"):
            parts.append(read_ids(source)[:, :context])
        else:
            parts.append(encode_text(source, tokenizer(path), context)[:, :-1])
    ids = np.concatenate(parts)
    return ids[np.linspace(0, len(ids) - 1, min(rows, len(ids))).round().astype(int)]


def main(
    source: Annotated[Path, typer.Argument(help="Directory of a dense model.")],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text such as the model will see, or ids; may be repeated."),
    ],
    to: Annotated[Format, typer.Option(help="Format to write.")] = Format.gptq_v2,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Width of a code.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Rows that share a scale; -1 for all of a column.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option(help="Whether no zeros are stored.")
    ] = False,
    act_order: Annotated[
        bool, typer.Option(help="Rows of large inputs first: less loss, some speed.")
    ] = False,
    clip: Annotated[
        bool, typer.Option(help="Search ranges, too: pays at 2 bits.")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text to see.")] = 128,
    context: Annotated[int, typer.Option(min=1, help="Tokens of text a row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at a time.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint.")] = False,
) -> None:
    """Writes TARGET: SOURCE with the matrices of its blocks quantized.

    Example: python quantize.py llama llama-2bit --text book.txt --bits 2 --clip
    """
    try:
        spec = qjax.Spec(
            bits=bits,
            group_size=None if group_size == -1 else group_size,
            symmetric=symmetric,
            # compressed-tensors has scales of the weights' own dtype.
            scale_dtype=jnp.float16 if to.value.startswith("gptq") else None,
            quantizer=functools.partial(gptq.quantize, act_order=act_order, clip=clip),
        )
        check_format(to, spec)
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} is there; pass --overwrite to replace it.")
        ids = calibration(text, source, context, rows)
        print(f"{ids.size} tokens to see", file=sys.stderr)
        tensors = quantize(source, ids, spec, batch)
        config = qjax.checkpoints.read_config(source)
        qjax.checkpoints.save(
            target, tensors, config, format=to.value, overwrite=overwrite
        )
        for pattern in BESIDE:
            for file in source.glob(pattern):
                shutil.copy(file, target)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    packed = [one for one in tensors.values() if isinstance(one, qjax.QTensor)]
    size = sum(one.nbytes for one in packed)
    weights = sum(one.k * one.n for one in packed)
    print(f"{target}: {len(packed)} matrices, {8 * size / weights:.2f} bits a weight")


if __name__ == "__main__":
    typer.run(main)
