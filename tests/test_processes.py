"""Two processes on one machine, each with a part of the checkpoint and of the work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "llm"))

import generate  # noqa: E402  (found on the path just added)

PROMPTS = ["def main(", "import "]
TOKENS = 12

# Runs the command, with every byte counted that it reads of the weights; then compares
# what lies on this process's devices with what one process would put there.
WORKER = """
import io, json, pathlib, sys
import jax
import numpy as np

read, open_path = 0, pathlib.Path.open

class Counted(io.FileIO):
    def readinto(self, buffer):
        global read
        size = super().readinto(buffer)
        read += size
        return size

def counting(self, mode="r", buffering=-1, **options):
    if buffering == 0:
        return Counted(self, mode)
    return open_path(self, mode, buffering, **options)

pathlib.Path.open = counting
sys.path.insert(0, sys.argv[1])
import generate
import qjax

if json.loads(sys.argv[7]):  # --as-on-gpu
    qjax.ops._has_kernels = lambda words: True

placements, place = [], generate.place

def noted(*arguments):
    placements.append(place(*arguments))
    return placements[-1]

generate.place = noted
generate.main(
    prompt=json.loads(sys.argv[2]),
    max_new_tokens=int(sys.argv[3]),
    mesh=sys.argv[4],
    coordinator=sys.argv[5],
    processes=2,
    process=int(sys.argv[6]),
)
counted = read

path, where = generate.SHIPPED, placements[0].weight
plain, equal = qjax.checkpoints.load(path), []
for name, weight in qjax.checkpoints.lazy(path, sharding=where).items():
    leaves = zip(jax.tree.leaves(weight), jax.tree.leaves(plain[name]), strict=True)
    for found, wanted in leaves:
        equal += [
            np.array_equal(shard.data, np.asarray(wanted)[shard.index])
            for shard in found.addressable_shards
        ]
print(json.dumps([counted, len(equal), all(equal)]), file=sys.stderr)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(mesh, as_on_gpu):
    """Stdout of both, and what they say about their reading."""
    address = f"127.0.0.1:{free_port()}"
    examples = str(ROOT / "examples" / "llm")
    arguments = [examples, json.dumps(PROMPTS), str(TOKENS), mesh, address]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments, str(process), as_on_gpu],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        done = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()  # One waits for the other, should that have failed.
            process.wait()
    for process, (_, stderr) in zip(started, done, strict=True):
        assert process.returncode == 0, stderr
    said = [json.loads(stderr.splitlines()[-1]) for _, stderr in done]
    return [stdout for stdout, _ in done], said


def share(name):
    """What each of two processes reads of a tensor of the shipped model."""
    if name.endswith("norm.weight"):
        return 1
    # Read for the structure of the matrix, and again with its columns.
    return 2 if name.endswith("g_idx") else 0.5


@pytest.mark.slow
def test_same_text_from_half_of_the_file_each(capsys, pytestconfig):
    as_on_gpu = json.dumps(pytestconfig.getoption("--as-on-gpu"))
    texts, said = in_two_processes("1,2", as_on_gpu)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        generate.main(prompt=PROMPTS, max_new_tokens=TOKENS)
    assert texts == [capsys.readouterr().out, ""]
    needed = 0
    with safe_open(generate.SHIPPED / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118  (not iterable itself)
            tensor = file.get_slice(name)
            size = {"I32": 4, "F16": 2, "BF16": 2}[tensor.get_dtype()]
            needed += share(name) * size * np.prod(tensor.get_shape())
    # Words, scales, zeros and order of 21 matrices; two tables and seven norms.
    assert said == [[needed, 21 * 4 + 9, True]] * 2
