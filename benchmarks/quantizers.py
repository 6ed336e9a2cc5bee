"""Measures what quantizers cost a language model: loss, error and time.

    python benchmarks/quantizers.py MODEL --ids IDS --text FILE [--text FILE ...]

Every quantizer makes a model of every width out of the same dense one, all on the same
text, and the loss of each is measured on the same ids. Those that see inputs see them
block by block, as ``examples/llm/quantize.py`` does. The model must be one that the
example knows, with its ``tokenizer.json``.

Prints a table and writes it, as JSON with the machine and the versions, to
``benchmarks/results/quantizers-jax<version>.json``.
"""

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.quantizers import awq, clip, gptq, hqq

LLM = Path(__file__).resolve().parent.parent / "examples" / "llm"
sys.path.insert(0, str(LLM))

from evaluate import evaluate, read_ids  # noqa: E402  (found on the path just added)
from generate import read_tokenizer  # noqa: E402
from model import Config, Decoder  # noqa: E402
from quantize import Recipe, calibration, clipped, nearest, quantize  # noqa: E402
from weights import Weights  # noqa: E402

KINDS = ((2, 64), (3, 64), (4, 128))
NEEDS_GRAM = (awq.quantize, gptq.quantize, nearest, clipped)


class Method(NamedTuple):
    """A quantizer and how it is called, and what finds factors that it folds before."""

    quantizer: Callable[..., qjax.QTensor]
    symmetric: bool = False
    options: Mapping[str, bool] = {}
    factors: Callable[..., jax.Array] | None = None

    def recipe(self, bits: int, group_size: int) -> Recipe:
        spec = qjax.Spec(
            bits=bits,
            group_size=group_size,
            symmetric=self.symmetric,
            scale_dtype=jnp.float16,
            quantizer=functools.partial(self.quantizer, **self.options),
        )
        return Recipe(spec=spec, factors=self.factors)


METHODS = {
    "rounding, symmetric": Method(qjax.quantize, symmetric=True),
    "rounding": Method(qjax.quantize),
    "hqq": Method(hqq.quantize),
    "clip": Method(clip.quantize),
    "awq": Method(awq.quantize),
    "awq, clip": Method(awq.quantize, options={"clip": True}),
    "awq, folded": Method(nearest, factors=awq.factors),
    "awq, folded, clip": Method(
        clipped, factors=functools.partial(awq.factors, clip=True)
    ),
    "gptq, symmetric": Method(gptq.quantize, symmetric=True),
    "gptq": Method(gptq.quantize),
    "gptq, act_order": Method(gptq.quantize, options={"act_order": True}),
    "gptq, act_order, clip": Method(
        gptq.quantize, options={"act_order": True, "clip": True}
    ),
}


def without_inputs(path: Path, spec: qjax.Spec) -> dict[str, Any]:
    """Quantizes all matrices of the blocks of a model, each by itself."""
    tensors = qjax.checkpoints.load(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name.removesuffix(".weight")] = spec.quantize(tensors.pop(name).T)
    return tensors


def with_inputs(path: Path, seen: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    """Quantizes the blocks of a model, each on what those before it make of ids."""
    dense, blocks = qjax.checkpoints.load(path), {}
    config = Config.from_json(qjax.checkpoints.read_config(path))
    quantize(dense, config, seen, recipe, blocks)
    tensors = {n: one for n, one in dense.items() if not n.startswith("model.layers.")}
    for block in blocks.values():
        tensors |= block
    return tensors


def measure(path: Path, ids: np.ndarray, seen: np.ndarray, recipe: Recipe) -> Any:
    """Nats per token, seconds of quantizing, and bits of a weight."""
    began = time.perf_counter()
    if recipe.spec.quantizer.func in NEEDS_GRAM:
        tensors = with_inputs(path, seen, recipe)
    else:
        tensors = without_inputs(path, recipe.spec)
    jax.block_until_ready(tensors)
    seconds = time.perf_counter() - began
    packed = [one for one in tensors.values() if isinstance(one, qjax.QTensor)]
    bits = 8 * sum(q.nbytes for q in packed) / sum(q.k * q.n for q in packed)
    return loss(path, tensors, ids), seconds, bits


def loss(path: Path, tensors: dict[str, Any], ids: np.ndarray) -> float:
    """Nats per token of a model of these tensors."""
    config = Config.from_json(qjax.checkpoints.read_config(path))
    model = Decoder(Weights(dict(tensors), config, jnp.float32))
    return evaluate(model, read_tokenizer(path), ids).nats_per_token


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="directory of the dense model")
    parser.add_argument("--ids", type=Path, required=True, help="to measure on")
    parser.add_argument(
        "--text", type=Path, action="append", required=True, help="to quantize on"
    )
    parser.add_argument("--context", type=int, default=256, help="tokens of text a row")
    parser.add_argument("--rows", type=int, default=128, help="rows of text")
    arguments = parser.parse_args()
    ids = read_ids(arguments.ids)
    seen = calibration(
        arguments.text, arguments.model, arguments.context, arguments.rows
    )
    dense = loss(arguments.model, qjax.checkpoints.load(arguments.model), ids)
    head = {
        "cpu": harness.cpu(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "tokens_seen": seen.size,
        "tokens": ids[:, 1:].size,
        "dense_nats": dense,
    }
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    columns = [f"{bits} bits, groups of {size}" for bits, size in KINDS]
    print(f"\n| nats per token, dense {dense:.4f} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    rows = []
    for name, method in METHODS.items():
        cells = []
        for kind in KINDS:
            nats, seconds, bits = measure(
                arguments.model, ids, seen, method.recipe(*kind)
            )
            cells.append(f"{nats:.4f} (+{nats - dense:.4f})")
            rows.append(
                {
                    "method": name,
                    "bits": kind[0],
                    "group_size": kind[1],
                    "nats": nats,
                    "seconds": seconds,
                    "bits_a_weight": bits,
                }
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    report = head | {"rows": rows}
    print(harness.write(f"quantizers-jax{jax.__version__}", report))


if __name__ == "__main__":
    main()
