"""Generates text with a quantized language model: ``python generate.py --help``."""

import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax import Array
from model import Cache, Decoder, load
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import qjax

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
    ) -> None:
        """Prepares for prompts of up to ``prompt_length`` tokens."""
        size = prompt_length + max_new_tokens
        if size > model.config.max_length:
            raise ValueError(
                f"{prompt_length} prompt tokens and {max_new_tokens} new ones exceed "
                f"the model's {model.config.max_length} positions."
            )
        self.prompt_length, self.max_new_tokens = prompt_length, max_new_tokens
        graph, self.state = nnx.split(model)

        def next_token(
            model: Decoder, hidden: Array, position: Array, key: Array
        ) -> Array:
            logits = model.logits(hidden)[:, -1]
            return sampling.draw(logits, jax.random.fold_in(key, position))

        @jax.jit
        def prefill(state: nnx.State, ids: Array, length: Array, key: Array) -> tuple:
            model = nnx.merge(graph, state)
            cache = Cache.empty(model.config, 1, size, model.dtype)
            hidden, cache = model.forward(ids, cache)
            # What lies behind the prompt is padding: later positions overwrite it.
            hidden = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
            token = next_token(model, hidden, length, key)
            return token, cache._replace(length=length)

        @functools.partial(jax.jit, donate_argnames="cache")
        def decode(state: nnx.State, token: Array, cache: Cache, key: Array) -> tuple:
            model = nnx.merge(graph, state)
            hidden, cache = model.forward(token[:, None], cache)
            return next_token(model, hidden, cache.length, key), cache

        self.prefill, self.decode = prefill, decode

    def __call__(self, ids: Sequence[int], key: Array) -> Iterator[int]:
        """Yields the ids of ``max_new_tokens`` tokens that follow ``ids``."""
        padded = np.zeros((1, self.prompt_length), np.int32)
        padded[0, : len(ids)] = ids
        token, cache = self.prefill(self.state, padded, np.int32(len(ids)), key)
        for _ in range(self.max_new_tokens - 1):
            following, cache = self.decode(self.state, token, cache, key)
            # The next step is under way before this one's token is waited for.
            yield int(token[0])
            token = following
        yield int(token[0])


def stop_ids(path: Path) -> set[int]:
    """Ids that end a text: of generation_config.json, or else of config.json."""
    file = path / "generation_config.json"
    if file.is_file():
        config = json.loads(file.read_text())
    else:
        config = qjax.checkpoints.read_config(path)
    ids = config.get("eos_token_id")
    return set(ids if isinstance(ids, list) else [ids]) - {None}


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads tokenizer.json of a model directory."""
    file = path / "tokenizer.json"
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
        weights = sum(kernel.k * kernel.n for kernel in kernels)
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
) -> None:
    """Streams each prompt and its continuation to stdout, figures to stderr."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens; pass some text.")
    generate = Generator(model, sampling, max(map(len, encoded)), max_new_tokens)
    for number, ids in enumerate(encoded):
        key = jax.random.fold_in(jax.random.key(seed), number)
        started, times = time.perf_counter(), []
        text = DecodeStream(skip_special_tokens=True)
        print(tokenizer.decode(ids), end="", flush=True)
        for token in generate(ids, key):
            times.append(time.perf_counter())
            if token in stops:
                break
            print(text.step(tokenizer, token) or "", end="", flush=True)
        print(flush=True)
        report = (
            f"prompt of {len(ids)} tokens, first token after {times[0] - started:.2f} s"
        )
        if len(times) > 2:
            # The second token may have waited for the compilation of the decode step.
            speed = (len(times) - 2) / (times[-1] - times[1])
            report += f", {len(times)} tokens at {speed:.0f} tokens/s"
        print(report, file=sys.stderr)


def main(
    model: Annotated[
        Path, typer.Option(help="Hugging Face directory; default: the shipped model.")
    ] = SHIPPED,
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
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Continues text. The text goes to stdout, everything else to stderr.

    Example: python generate.py --prompt "def main(" --temperature 0.8 --top-p 0.95
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"top_p={top_p} must lie in (0, 1].")
    try:
        tokenizer, decoder = read_tokenizer(model), load(model)
        print(describe(decoder, model), file=sys.stderr)
        stream(
            decoder,
            tokenizer,
            prompt or [PROMPT],
            sampling=Sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            seed=seed,
            stops=stop_ids(model),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
