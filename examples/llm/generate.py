"""Generates text with a quantized language model: ``python generate.py --help``."""

import enum
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import gguf_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from gguf_file import is_gguf, read_config
from jax import Array
from model import Cache, Decoder, load
from placement import MeshOption, Placement, place, rows_of
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import qjax

TokenizerOption = Annotated[
    Path | None,
    typer.Option(help="A tokenizer.json, where the model's own is not to be used."),
]
Dtype = enum.StrEnum("Dtype", ["float32", "bfloat16", "float16"])
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of activations; default: bfloat16 on a GPU, else float32."),
]
SHIPPED = Path(__file__).parent / "checkpoint"
PROMPT = "def "


class Sampling(NamedTuple):
    """How the next token is drawn from the logits."""

    temperature: float = 0.0  # 0 takes the most probable token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0

    def draw(self, logits: Array, key: Array) -> Array:
        """Draws token ids ``[b]`` from ``logits[b, vocab]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        order = jnp.sort(logits, axis=-1, descending=True)
        if 0 < self.top_k < logits.shape[-1]:
            logits = jnp.where(
                logits < order[:, self.top_k - 1, None], -jnp.inf, logits
            )
        if self.top_p < 1:
            # The fewest tokens whose probabilities reach top_p: one is dropped if those
            # before it reach it already.
            probability = jax.nn.softmax(order, axis=-1)
            reached = jnp.cumsum(probability, axis=-1) - probability >= self.top_p
            least = jnp.where(reached, jnp.inf, order).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits)


class Generator:
    """Prefill and decode, compiled once each for all prompts."""

    def __init__(
        self,
        model: Decoder,
        sampling: Sampling,
        prompt_length: int,
        max_new_tokens: int,
        placement: Placement | None = None,
    ) -> None:
        """Prepares for prompts of up to ``prompt_length`` tokens.

        With a placement, as many are continued at a time as it has rows of devices.
        """
        size = prompt_length + max_new_tokens
        if size > model.config.max_length:
            raise ValueError(
                f"{prompt_length} prompt tokens and {max_new_tokens} new ones exceed "
                f"the model's {model.config.max_length} positions."
            )
        self.prompt_length, self.max_new_tokens = prompt_length, max_new_tokens
        self.batch = 1 if placement is None else placement.mesh.shape["data"]
        self.rows = rows_of(placement, self.batch)
        graph, self.state = nnx.split(model)

        def next_token(
            model: Decoder, hidden: Array, cache: Cache, keys: Array
        ) -> Array:
            logits = model.logits(hidden)[:, -1:]
            keys = jax.vmap(jax.random.fold_in)(keys, cache.length - cache.first)
            return jax.vmap(sampling.draw)(logits, keys)[:, 0]

        # Every process reads the tokens, and the cache stays cut as it is.
        out = None if placement is None else (placement.everywhere, placement.cache)

        @functools.partial(jax.jit, out_shardings=out)
        def prefill(state: nnx.State, ids: Array, first: Array, keys: Array) -> tuple:
            model = nnx.merge(graph, state)
            cache = Cache.empty(model.config, len(ids), size, model.dtype)
            hidden, cache = model.forward(ids, cache._replace(first=first))
            return next_token(model, hidden[:, -1:], cache, keys), cache

        @functools.partial(jax.jit, donate_argnames="cache", out_shardings=out)
        def decode(state: nnx.State, token: Array, cache: Cache, keys: Array) -> tuple:
            model = nnx.merge(graph, state)
            hidden, cache = model.forward(token[:, None], cache)
            return next_token(model, hidden, cache, keys), cache

        self.prefill, self.decode = prefill, decode

    def __call__(self, ids: Sequence[int], key: Array) -> Iterator[int]:
        """Yields the ids of ``max_new_tokens`` tokens that follow ``ids``."""
        for tokens in self.together([ids], key[None]):
            yield int(tokens[0])

    def together(
        self, prompts: Sequence[Sequence[int]], keys: Array
    ) -> Iterator[np.ndarray]:
        """Yields the ids ``[b]`` that follow each of up to `batch` prompts."""
        # Rows without a prompt repeat one. Prompts end together, after padding.
        prompts = [prompts[i % len(prompts)] for i in range(self.batch)]
        keys = keys[np.arange(self.batch) % len(keys)]
        padded = np.zeros((self.batch, self.prompt_length), np.int32)
        for row, ids in zip(padded, prompts, strict=True):
            row[-len(ids) :] = ids
        first = np.array([self.prompt_length - len(ids) for ids in prompts], np.int32)
        token, cache = self.prefill(
            self.state, self.rows(padded), self.rows(first), keys
        )
        for _ in range(self.max_new_tokens - 1):
            following, cache = self.decode(self.state, token, cache, keys)
            # The next step is under way before this one's token is waited for.
            yield np.asarray(token)
            token = following
        yield np.asarray(token)


def stop_ids(path: Path) -> set[int]:
    """Ids that end a text: of generation_config.json, or else of config.json."""
    file = path / "generation_config.json"
    config = json.loads(file.read_text()) if file.is_file() else read_config(path)
    ids = config.get("eos_token_id")
    return set(ids if isinstance(ids, list) else [ids]) - {None}


def read_tokenizer(path: Path, file: Path | None = None) -> Tokenizer:
    """Reads tokenizer.json of a model directory, the one of a GGUF file, or another."""
    if file is None and is_gguf(path):
        return gguf_tokenizer.read_tokenizer(path)
    file = file or path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; copy it from the original model.")
    return Tokenizer.from_file(str(file))


def describe(model: Decoder, path: Path) -> str:
    """What was loaded, on two lines."""
    is_quantized = lambda leaf: isinstance(leaf, qjax.QTensor)  # noqa: E731
    kernels = [
        layer.kernel
        for _, layer in nnx.iter_modules(model)
        if is_quantized(getattr(layer, "kernel", None))
    ]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    lines = (
        f"{path}: {model.config.num_layers} layers, {nbytes / 1e6:.2f} MB of weights"
    )
    if kernels:
        packed = sum(kernel.nbytes for kernel in kernels)
        weights = sum(math.prod(kernel.shape) for kernel in kernels)
        lines += (
            f"\n{len(kernels)} quantized matrices, {packed / 1e6:.2f} MB, "
            f"{8 * packed / weights:.2f} bits a weight, such as {kernels[0]!r}"
        )
    return lines


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int = 0,
    stops: set[int] = frozenset(),
    placement: Placement | None = None,
) -> None:
    """Streams each prompt and its continuation to stdout, figures to stderr.

    Of prompts that are continued together the first is streamed, and others follow.
    """
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens; pass some text.")
    longest = max(map(len, encoded))
    generate = Generator(model, sampling, longest, max_new_tokens, placement)
    fold_in = functools.partial(jax.random.fold_in, jax.random.key(seed))
    keys = jax.vmap(fold_in)(np.arange(len(prompts)))
    for start in range(0, len(prompts), generate.batch):
        chosen = slice(start, start + generate.batch)
        _stream(generate, tokenizer, encoded[chosen], keys[chosen], stops)


def _stream(
    generate: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    keys: Array,
    stops: set[int],
) -> None:
    started, times, count = time.perf_counter(), [], 0
    decoders = [DecodeStream(skip_special_tokens=True) for _ in prompts]
    texts = [tokenizer.decode(ids) for ids in prompts]
    # What a token adds to a text depends on those before it.
    for decoder, ids in zip(decoders, prompts, strict=True):
        for token in ids:
            decoder.step(tokenizer, int(token))
    print(texts[0], end="", flush=True)
    running = set(range(len(prompts)))
    for tokens in generate.together(prompts, keys):
        times.append(time.perf_counter())
        count += len(running)
        running -= {row for row in running if tokens[row] in stops}
        if not running:
            break
        for row in running:
            piece = decoders[row].step(tokenizer, int(tokens[row])) or ""
            texts[row] += piece
            if row == 0:
                print(piece, end="", flush=True)
    print("", *texts[1:], sep="\n", flush=True)
    lengths = " and ".join(str(len(ids)) for ids in prompts)
    report = f"prompt of {lengths} tokens, first token after {times[0] - started:.2f} s"
    if len(times) > 2:
        # The second token may have waited for the compilation of the decode step.
        speed = count / len(times) * (len(times) - 2) / (times[-1] - times[1])
        report += f", {count} tokens at {speed:.0f} tokens/s"
    print(report, file=sys.stderr)


def keep_stdout(process: int) -> None:
    """Leaves stdout to the text, and to the first process, as all have the same.

    Gloo, which connects the processes on CPUs, writes to file 1 from C.
    """
    text = os.open(os.devnull, os.O_WRONLY) if process else os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(text, "w")


def main(
    model: Annotated[
        Path,
        typer.Option(
            help="Hugging Face directory, .gguf file, or name of a model there "
            "(organization/model, .../file.gguf); default: the shipped."
        ),
    ] = SHIPPED,
    tokenizer: TokenizerOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the most probable token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the k most probable; 0 from all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the fewest tokens that reach p, 0 < p <= 1."),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")
    ] = 0,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of process 0, where --mesh spans processes."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="How many processes share the mesh.")
    ] = 1,
    process: Annotated[
        int, typer.Option(min=0, help="Which of them this is, from 0: it prints.")
    ] = 0,
) -> None:
    """Continues text. The text goes to stdout, everything else to stderr.

    Example: python generate.py --prompt "def main(" --temperature 0.8 --top-p 0.95

    On four devices, two prompts at a time, each matrix on two devices:
    python generate.py --mesh 2,2 --prompt "def " --prompt "import "

    In two processes, of which each reads its part of the checkpoint (and the same with
    --process 1 beside it):
    python generate.py --mesh 1,2 --coordinator HOST:1234 --processes 2 --process 0
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"top_p={top_p} must lie in (0, 1].")
    if processes > 1:
        keep_stdout(process)
    try:
        model = qjax.checkpoints.locate(model)
        vocabulary = read_tokenizer(model, tokenizer)
        placement = place(model, mesh, coordinator, processes, process)
        where = placement and placement.weight
        decoder = load(model, dtype and dtype.value, where, joined=True)
        print(describe(decoder, model), file=sys.stderr)
        stream(
            decoder,
            vocabulary,
            prompt or [PROMPT],
            sampling=Sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            seed=seed,
            stops=stop_ids(model),
            placement=placement,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
