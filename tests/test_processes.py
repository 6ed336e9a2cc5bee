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

from tests.checkpoints import test_gguf
from tests.checkpoints.test_cutting import stack_of_experts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "llm"))

import generate  # noqa: E402  (found on the path just added)

PROMPTS = ["def main(", "import "]
TOKENS = 12

# Counts every byte that is read of weights; and compares what lies on this process's
# devices with what one process would put there.
COUNTED = """
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
import qjax

def compared(weight, whole):
    leaves = zip(jax.tree.leaves(weight), jax.tree.leaves(whole), strict=True)
    return [
        np.array_equal(shard.data, np.asarray(wanted)[shard.index])
        for found, wanted in leaves
        for shard in found.addressable_shards
    ]
"""
# Runs the command.
GENERATE = """
sys.path.insert(0, sys.argv[1])
import generate

if json.loads(sys.argv[5]):  # --as-on-gpu
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
    coordinator=sys.argv[6],
    processes=2,
    process=int(sys.argv[7]),
)
counted = read

path, where = generate.SHIPPED, placements[0].weight
plain, equal = qjax.checkpoints.load(path), []
for name, weight in qjax.checkpoints.lazy(path, sharding=where).items():
    equal += compared(weight, plain[name])
print(json.dumps([counted, len(equal), all(equal)]), file=sys.stderr)
"""
# Reads stacks of experts, half of them for each.
STACKS = """
paths, coordinator, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, 2, int(process))
where = jax.NamedSharding(jax.make_mesh((2,), ("model",)), jax.P("model"))
said = []
for path in json.loads(paths):
    read = 0
    (weight,) = qjax.checkpoints.load(path, sharding=lambda _: where).values()
    counted = read
    (whole,) = qjax.checkpoints.load(path).values()
    said.append([counted, read - counted, all(compared(weight, whole))])
print(json.dumps(said), file=sys.stderr)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(worker, *arguments):
    """Stdout of both, and what they say about their reading."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNTED + worker, *arguments]
    command.append(f"127.0.0.1:{free_port()}")
    started = [
        subprocess.Popen(
            [*command, str(process)],
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
    examples = str(ROOT / "examples" / "llm")
    as_on_gpu = json.dumps(pytestconfig.getoption("--as-on-gpu"))
    arguments = examples, json.dumps(PROMPTS), str(TOKENS), "1,2", as_on_gpu
    texts, said = in_two_processes(GENERATE, *arguments)
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


@pytest.mark.slow
def test_half_of_the_experts_each(tmp_path):
    """Of stacks in one tensor, no byte of others'."""
    paths = [tmp_path / name for name in ("mlx", "mxfp4", "e.gguf")]
    for path in paths[:2]:
        stack_of_experts(path, path.name)
    blocks = np.full((4, 64, 4, 18), 7, np.uint8)
    held = {"e.weight": blocks.reshape(4, 64, -1)}
    test_gguf.write(paths[2], held, {"e.weight": "Q4_0"})
    _, said = in_two_processes(STACKS, json.dumps([*map(str, paths)]))
    for counts in zip(*said, strict=True):
        whole = counts[0][1]
        assert whole >= 8 * 64 * 32 / 2
        assert list(counts) == [[whole // 2, whole, True]] * 2
