"""The commands on the shipped model: what they print, what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qjax import checkpoints
from qjax.cli import app

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "examples" / "llm" / "checkpoint"
AWQ = ROOT / "tests" / "data" / "llama_awq4_g128"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def bytes_of(directory):
    """Every tensor of a single-file checkpoint as the file holds it."""
    tensors = checkpoints.shards.scan(directory)
    return {name: stored.read().tobytes() for name, stored in tensors.items()}


def test_inspect_json():
    done = run("inspect", SHIPPED, "--json")
    assert done.exit_code == 0, done.stderr
    text = json.dumps(json.loads(done.stdout))
    assert text.count('"gptq"') >= 21
    assert "model.layers.2.mlp.down_proj" in text


def test_inspect_table():
    done = run("inspect", SHIPPED)
    assert done.exit_code == 0, done.stderr
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert "lm_head.weight" in done.stdout


def test_verify():
    done = run("verify", SHIPPED)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("OK: 21 matrices of gptq, 9 dense tensors")


def test_awq_to_gptq_and_back_is_the_same_file(tmp_path):
    for source, target, name in (
        (AWQ, tmp_path / "gptq", "gptq_v2"),
        (tmp_path / "gptq", tmp_path / "awq", "awq"),
    ):
        done = run("convert", source, target, "--to", name)
        assert done.exit_code == 0, done.stderr
    assert bytes_of(tmp_path / "awq") == bytes_of(AWQ)


def test_convert_says_beforehand_what_cannot_be_held(tmp_path):
    done = run("convert", SHIPPED, tmp_path / "awq", "--to", "awq")
    assert done.exit_code == 1
    assert "model.layers.0.mlp.up_proj" in done.stderr
    assert "act-order" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_directory_that_is_not_there(command):
    done = run(command, "nowhere")
    assert done.exit_code != 0
    assert "nowhere" in done.stderr
    assert not done.stdout


def test_verify_finds_a_bad_scale(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = checkpoints.shards.scan(tmp_path / "model")
    scales = stored["model.layers.1.mlp.up_proj.scales"]
    data = bytearray(file.read_bytes())
    nan = np.float16(np.nan).tobytes()
    data[scales.offset : scales.offset + 2] = nan
    file.write_bytes(bytes(data))
    done = run("verify", tmp_path / "model")
    assert done.exit_code == 1
    assert "model.layers.1.mlp.up_proj" in done.stderr + done.stdout
    assert "finite" in done.stderr + done.stdout
