"""Quantizes a language model by GPTQ or AWQ, on text: ``python quantize.py --help``.

Block by block: the inputs of its layers are seen on the text, its matrices are
quantized so that their outputs on such inputs change least, and the next block sees
what the quantized one makes of the text. Memory holds one block, grams of its inputs,
and the hidden states of the text. Finished blocks are checkpoints of their own until
all are there; an interrupted call goes on after the last of them, with hidden states
that it computes anew. ``qjax quantize`` needs no text, and no model code; this costs
more time and less of the model.
"""

import dataclasses
import enum
import functools
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import typer
from blocks import Assembled, Tensors, Written, check_unchanged, job_of
from evaluate import encode_text, read_ids
from flax import nnx
from generate import read_tokenizer
from hf_config import Config, Layer
from jax import Array
from model import Block, Cache
from rich.console import Console
from rich.progress import track
from tensors import stack
from weights import Weights

import qjax
from qjax.quantizers import awq, gptq

# What decides between experts stays dense.
ROUTERS = ("gate", "shared_expert_gate")
# What a directory holds beside the model, and a quantized one as well.
BESIDE = ("*token*", "*.jinja", "vocab.*", "merges.txt", "generation_config.json")

Format = enum.StrEnum(
    "Format", ["gptq", "gptq_v2", "gptq_p", "awq", "compressed-tensors"]
)
Method = enum.StrEnum("Method", ["gptq", "awq"])


class Blocks(Protocol):
    """Where the tensors of quantized blocks are, by index: a dictionary will do."""

    def __contains__(self, i: int) -> bool: ...
    def __getitem__(self, i: int) -> Mapping[str, Any]: ...
    def __setitem__(self, i: int, tensors: Tensors) -> None: ...


def quantize(
    dense: Mapping[str, Any],
    config: Config,
    ids: np.ndarray,
    recipe: "Recipe",
    blocks: Blocks,
    batch: int = 8,
) -> None:
    """Quantizes the linear layers of all blocks of a dense model.

    Args:
      dense: Its tensors, as `qjax.checkpoints.lazy` returns them.
      config: Its configuration.
      ids: Integer token ids ``[sequences, t]``, such as the model will see.
      recipe: How.
      blocks: Where blocks go. Those that are there already are taken as they are.
      batch: Sequences computed at a time.

    Raises:
      ValueError: If the model is quantized already, or cannot be so.
    """
    if config.swiglu is not None:
        raise ValueError(
            "gpt-oss has its experts in MXFP4, or in arrays of all of them that no "
            "format of matrices has names for."
        )
    embedding = dense["model.embed_tokens.weight"]
    states = [
        jnp.take(embedding, ids[i : i + batch], axis=0).astype(jnp.float32)
        * config.embedding_scale
        for i in range(0, len(ids), batch)
    ]
    del embedding
    places = empty(config, states)
    ready = sum(i in blocks for i in range(config.num_layers))
    if ready:
        print(f"going on after {ready} of {config.num_layers} blocks", file=sys.stderr)
    console = Console(stderr=True)
    for i, layer in track(
        list(enumerate(config.layers)),
        "blocks",
        console=console,
        disable=not console.is_terminal,
    ):
        name = f"model.layers.{i}"
        if i not in blocks:
            tensors = {n: dense[n] for n in dense if n.startswith(f"{name}.")}
            if any(isinstance(one, qjax.QTensor) for one in tensors.values()):
                raise ValueError(
                    "the model is quantized already; pass the model it came from."
                )
            inputs = [(x, *places[len(x)]) for x in states]
            whole, origins = block_of(tensors, config, name, layer)
            grams = grams_of(whole, name, origins, recipe.spec, inputs)
            del whole, inputs
            blocks[i] = recipe.quantized(tensors, config, name, grams)
            del tensors, grams
        if any(later not in blocks for later in range(i + 1, config.num_layers)):
            run(block_of(blocks[i], config, name, layer)[0], states, places)


def block_of(
    tensors: Mapping[str, Any], config: Config, name: str, layer: Layer
) -> tuple[Block, dict[str, list[str]]]:
    """A block over tensors of which it leaves all where they are, and their names."""
    tensors = dict(tensors)
    origins = stack(tensors)
    return Block(Weights(tensors, config, jnp.float32), name, layer), origins


def empty(config: Config, states: list[Array]) -> dict[int, tuple[Array, ...]]:
    """An empty cache for one layer, and where sequences begin, by their number."""
    config = dataclasses.replace(config, layers=config.layers[:1])
    places = {}
    # The last batch alone may be smaller.
    for x in (states[0], states[-1]):
        one = Cache.empty(config, len(x), x.shape[1], x.dtype)
        places[len(x)] = one.keys[0], one.values[0], one.length, one.first
    return places


def grams_of(
    block: Block,
    name: str,
    origins: Mapping[str, list[str]],
    spec: qjax.Spec,
    inputs: list[tuple],
) -> dict[str, Array]:
    """Grams of the inputs of the layers of a block whose others are rounded.

    Returns:
      The gram of each matrix, by its path in the checkpoint. That of an expert that no
      token takes is the identity: it is rounded, as no matrix of a stack is dense.
    """
    rounding = dataclasses.replace(spec, quantizer=None)
    rules = [(f".*/({'|'.join(ROUTERS)})/.*", None), (".*", rounding)]
    model = qjax.quantize_model(block, rules, *inputs[0], strict=True)
    found = {}
    for path, gram in qjax.quantizers.grams(model, inputs).items():
        names = origins[f"{name}.{path.replace('/', '.')}"]
        parts = gram if gram.ndim == 3 else [gram]
        for matrix, one in zip(names, parts, strict=True):
            taken = one if one.any() else jnp.eye(len(one))
            found[matrix.removesuffix(".weight")] = taken
    return found


def run(
    block: Block, states: list[Array], places: Mapping[int, tuple[Array, ...]]
) -> None:
    """Puts the hidden states that a block makes in the place of its inputs."""
    graph, state = nnx.split(block)
    for i, x in enumerate(states):
        states[i] = forward(graph, state, x, *places[len(x)])


# Blocks differ in their arrays alone, and compile once.
@functools.partial(jax.jit, static_argnums=0)
def forward(graph: Any, state: nnx.State, *inputs: Array) -> Array:
    return nnx.merge(graph, state)(*inputs)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How blocks are quantized.

    Attributes:
      spec: Width, groups, and a quantizer that takes a gram.
      factors: Finds AWQ's, as `awq.factors` does, to be moved into the norm or the
        matrix before; None moves nothing.
    """

    spec: qjax.Spec
    factors: Callable[..., Array] | None = None

    def quantized(
        self, tensors: Tensors, config: Config, name: str, grams: dict[str, Array]
    ) -> Tensors:
        """The tensors of a block with its matrices quantized, of those of a dense one.

        Both dictionaries are used up: memory holds each matrix once.
        """
        linear = {n.removesuffix(".weight") for n, w in tensors.items() if w.ndim == 2}
        linear = {n for n in linear if n.rpartition(".")[2] not in ROUTERS}
        # Those whose inputs are all 0 have none.
        if dense := sorted(linear - grams.keys()):
            print(f"left dense, as their inputs are all 0: {dense}", file=sys.stderr)
        if self.factors is not None:
            for maker, matrices in junctions(config, name, linear):
                if grams.keys() >= set(matrices):
                    self.fold(tensors, maker, matrices, grams)
        for module in list(grams):
            w = tensors.pop(f"{module}.weight").T
            tensors[module] = self.spec.quantize(w, gram=grams.pop(module))
        return tensors

    def fold(
        self, tensors: Tensors, maker: str, matrices: list[str], grams: dict[str, Array]
    ) -> None:
        """Moves the factors of matrices into what makes their inputs."""
        before = [n for n in (f"{maker}.weight", f"{maker}.bias") if n in tensors]
        after = [f"{matrix}.weight" for matrix in matrices]
        smaller, larger = ([tensors[n].T for n in part] for part in (before, after))
        spec, gram = self.spec, grams[matrices[0]]
        codes = spec.bits, spec.group_size, spec.symmetric
        factor = self.factors(larger, *codes, gram=gram, scale_dtype=spec.scale_dtype)
        made = itertools.chain(*awq.fold(factor, smaller, larger))
        for name, array in zip(before + after, made, strict=True):
            tensors[name] = array.T
        for matrix in matrices:
            grams[matrix] = gram / jnp.outer(factor, factor)


def junctions(
    config: Config, name: str, linear: Iterable[str]
) -> Iterator[tuple[str, list[str]]]:
    """What in a block makes the inputs of which matrices, and of no others.

    Left out are the norm before a mixture, which makes those of its router, too,
    norms whose weights are not their factors (Gemma's), and matrices that are a part of
    one (Phi's).

    Args:
      config: That of the model.
      name: Path of the block.
      linear: Paths of all its matrices.
    """
    linear = set(linear)
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    first, second = f"{name}.input_layernorm", f"{name}.post_attention_layernorm"
    after_norms = [
        (first, [f"{attention}.{one}_proj" for one in "qkv"]),
        (first, [f"{attention}.qkv_proj"]),
        (second, [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
        (second, [f"{mlp}.gate_up_proj"]),
    ]
    for norm, matrices in after_norms:
        if linear.issuperset(matrices) and not config.norm_offset:
            yield norm, matrices
    if config.sub_norms:
        yield f"{attention}.attn_sub_norm", [f"{attention}.o_proj"]
        yield f"{mlp}.ffn_sub_norm", [f"{mlp}.down_proj"]
        return
    # Several heads of queries may share one of values, but not its factors.
    values = f"{attention}.v_proj"
    if values in linear and config.num_heads == config.num_kv_heads:
        yield values, [f"{attention}.o_proj"]
    for up, down in (("up_proj", "down_proj"), ("w3", "w2")):
        for path in sorted(linear):
            if path.endswith(f".{up}"):
                yield path, [path.removesuffix(up) + down]


def nearest(w: Array, *codes: Any, gram: Array, **options: Any) -> qjax.QTensor:
    """Rounds to nearest, whatever the inputs are."""
    return qjax.quantize(w, *codes, **options)


def clipped(w: Array, *codes: Any, gram: Array, **options: Any) -> qjax.QTensor:
    """Searches the range of each group, with large inputs counting for more."""
    importance = gram.diagonal()
    return qjax.quantizers.clip.quantize(w, *codes, importance=importance, **options)


def check_places(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raises an OSError or a ValueError now where `save` would in an hour."""
    if not source.is_dir():
        raise NotADirectoryError(f"{source} must be the directory of a model.")
    one, other = (Path(os.path.realpath(path)) for path in (source, target))
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"{source} and {target} must not be the same, nor lie in one another."
        )
    if not other.parent.is_dir():
        raise FileNotFoundError(f"{other.parent} is no directory; make it first.")
    if not other.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} is there; pass --overwrite to replace it.")
    if not other.is_dir() or (
        any(other.iterdir()) and not (other / "config.json").is_file()
    ):
        raise FileExistsError(
            f"{target} is no checkpoint, as it holds no config.json; move it away."
        )


def check_format(to: Format, spec: qjax.Spec) -> None:
    """Raises a ValueError now where `save` would in an hour."""
    if to is Format.awq and spec.symmetric:
        raise ValueError("--to awq is asymmetric; leave out --symmetric.")
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


def recipe_of(method: Method, *, act_order: bool, clip: bool, **codes: Any) -> Recipe:
    """What the options ask for; a ValueError if they do not go together."""
    if method is Method.gptq:
        how = functools.partial(gptq.quantize, act_order=act_order, clip=clip)
        return Recipe(spec=qjax.Spec(**codes, quantizer=how))
    if act_order:
        raise ValueError("--act-order is of --method gptq; leave it out.")
    return Recipe(
        spec=qjax.Spec(**codes, quantizer=clipped if clip else nearest),
        factors=functools.partial(awq.factors, clip=clip),
    )


def finish(target: Path, whole: Assembled, blocks: Written, source: Path) -> None:
    """Writes a whole model, and copies what its source holds beside the weights."""
    # In one that is replaced, other files stay.
    made = target if target.exists() else blocks.folder / "whole"
    qjax.checkpoints.save(made, whole, blocks.config, format=blocks.to, overwrite=True)
    for pattern in BESIDE:
        for file in source.glob(pattern):
            shutil.copy(file, made)
    if made != target:
        made.rename(target)


def main(
    source: Annotated[
        Path,
        typer.Argument(
            help="Directory of a dense model, or its name on the Hugging Face Hub."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text such as the model will see, or ids; may be repeated."),
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="GPTQ; or AWQ, whose factors go into norms and matrices, so that any "
            "program reads what it writes."
        ),
    ] = Method.gptq,
    to: Annotated[
        Format | None,
        typer.Option(
            show_default=False,
            help="Format to write. [default: gptq_v2, or awq for --method awq]",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Width of a code.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Rows that share a scale; -1 for all of a column.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option(help="Whether no zeros are stored.")
    ] = False,
    act_order: Annotated[
        bool,
        typer.Option(
            help="Rows of large inputs first, for GPTQ: less loss, some speed."
        ),
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

    Memory holds a block at a time. TARGET appears when it is complete, or has its
    weights replaced when they are; until then, finished blocks are in .TARGET.blocks,
    and the same command goes on after them.

    Example: python quantize.py llama llama-2bit --text book.txt --bits 2 --clip
    """
    try:
        source = qjax.checkpoints.locate(source)
        check_places(source, target, overwrite=overwrite)
        to = to or (Format.awq if method is Method.awq else Format.gptq_v2)
        options = {
            "bits": bits,
            "group_size": None if group_size == -1 else group_size,
            "symmetric": symmetric,
            # compressed-tensors has scales of the weights' own dtype.
            "scale_dtype": None if to.value == "compressed-tensors" else "float16",
            "act_order": act_order,
            "clip": clip,
        }
        recipe = recipe_of(method, **options)
        check_format(to, recipe.spec)
        dense = qjax.checkpoints.lazy(source)
        known = qjax.checkpoints.read_config(source)
        config = Config.from_json(known)
        ids = calibration(text, source, context, rows)
        print(f"{ids.size} tokens to see", file=sys.stderr)
        options |= {"method": method.value, "to": to.value, "batch": batch}
        job = job_of(source, ids, options)
        goal = Path(os.path.realpath(target))
        folder = goal.with_name(f".{goal.name}.blocks")
        with Written(folder, job, known, to.value) as blocks:
            quantize(dense, config, ids, recipe, blocks, batch)
            check_unchanged(job, source, ids, options)
            whole = Assembled(dense, blocks, config.num_layers)
            finish(goal, whole, blocks, source)
            blocks.clear()
        print(f"{target}: {whole.summary()}")
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
