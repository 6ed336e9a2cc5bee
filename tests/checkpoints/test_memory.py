"""Loading takes the memory of the model and a few of its matrices."""

import json
import os
import subprocess
import sys

import pytest

from tests.checkpoints import tiny

K = N = 8192
MATRICES = 8

# The high-water mark of /proc, not ru_maxrss: that one starts at what the parent of a
# process has used.
LOAD = """
import json, re, sys
import jax
from qjax import checkpoints

def status(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", status.read())[1])

checkpoints.load(sys.argv[1])  # what every load needs, whatever its size
before = status("VmRSS")
weights = checkpoints.load(sys.argv[2])
model = sum(w.nbytes for w in jax.tree.leaves(weights))
largest = max(w.nbytes for w in weights.values())
print(json.dumps([status("VmHWM") - before, model, largest]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act_order", "matrices"),
    # To put rows in order, `prepare` also holds the codes as bytes before and after,
    # each twice as large as the words of four bits.
    [(False, 4), (True, 7)],
    ids=["plain", "act-order"],
)
def test_peak_is_the_model_and_a_few_matrices(
    tmp_path, pytestconfig, act_order, matrices
):
    tensors = {}
    for layer in range(MATRICES):
        matrix = tiny.matrix(layer, K, N, group=128)
        if act_order:
            matrix["g_idx"] = matrix["g_idx"][::-1].copy()
        tensors |= {f"model.layers.{layer}.{k}": v for k, v in matrix.items()}
    big = tiny.checkpoint()
    big.tensors = tensors
    big.config["quantization_config"]["group_size"] = 128
    big.write(tmp_path / "big")
    tiny.checkpoint().write(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "big")],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / "big/model.safetensors").unlink()  # pytest keeps the folder for a while
    assert done.returncode == 0, done.stderr
    peak, model, largest = json.loads(done.stdout)
    assert model > 250_000_000
    # The file in memory beside the model would be eight matrices more.
    assert peak < model + matrices * largest
