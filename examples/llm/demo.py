"""The main job in one command: loads the shipped 4-bit model, writes, measures."""

import sys
from pathlib import Path

import typer
from evaluate import evaluate, read_ids
from generate import SHIPPED, Sampling, describe, read_tokenizer, stop_ids, stream
from model import load
from placement import MeshOption, place

PROMPT = '''class Reader:
    """Reads lines from a file."""

    def __init__(self, name):
'''
IDS = Path(__file__).parent / "evaluation.npz"
# The bf16 model before quantization, on the same ids (PyTorch, float32 arithmetic).
REFERENCE_NATS = 2.4927


def main(mesh: MeshOption = None) -> None:
    """Generates from the shipped model and prints its loss beside the reference."""
    placement, tokenizer = place(SHIPPED, mesh), read_tokenizer(SHIPPED)
    model = load(SHIPPED, sharding=placement and placement.weight, joined=True)
    print(describe(model, SHIPPED), file=sys.stderr)
    stream(
        model,
        tokenizer,
        [PROMPT],
        sampling=Sampling(temperature=0.6, top_k=20),
        max_new_tokens=160,
        stops=stop_ids(SHIPPED),
        placement=placement,
    )
    loss = evaluate(model, tokenizer, read_ids(IDS), placement=placement)
    print(f"4-bit model:    {loss}")
    print(f"bf16 reference: {REFERENCE_NATS:.4f} nats per token")


if __name__ == "__main__":
    typer.run(main)
