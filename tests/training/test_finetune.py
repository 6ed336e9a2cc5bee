"""`examples/finetune.py`: each method lowers the loss, and the command reports it."""

import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import typer
from typer.testing import CliRunner

import qjax

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import finetune  # noqa: E402  (found on the path just added)

ONE_LAYER = ROOT / "tests" / "data" / "llama1L_hqq4_g64"


@pytest.fixture(autouse=True)
def jax_as_users_run_it():
    """Examples are written for JAX's defaults, not for the strict library."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """One layer, with a tokenizer of as many tokens."""
    folder = tmp_path_factory.mktemp("model")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(ONE_LAYER / file, folder / file)
    shutil.copy(finetune.SHIPPED / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh"),
    [*[(method, None) for method in finetune.Method], ("scales", "1,2")],
)
def test_each_method_lowers_the_loss(method, mesh, small_model, tmp_path):
    for i in range(12):
        text = "def double(x):\n    return 2 * x\n" * (20 + i)
        (tmp_path / f"file_{i:02}.py").write_text(text)
    app = typer.Typer()
    app.command()(finetune.main)
    options = {
        **{"--method": method, "--steps": 6, "--batch": 1, "--context": 16},
        **{"--source": tmp_path, "--output": tmp_path / "curves.png"},
        **{"--model": small_model, "--rate": 0.01},
        **({"--mesh": mesh} if mesh else {}),
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    before, after = map(
        float, re.findall(r"(\d+\.\d+) (?:before|after)", result.output)
    )
    assert after < before
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "weights"])
def test_experts_are_trained(method):
    """gpt-oss: beside its packed experts, and their four-bit floats themselves."""
    path = ROOT / "tests" / "reference" / "gpt_oss"
    decoder = finetune.load(path)
    rate = optax.constant_schedule(0.02 if method == "weights" else 0.001)
    decoder, step = finetune.set_up(decoder, finetune.Method(method), rate)
    before = decoder.layers[0].mlp.experts.down_proj
    before = getattr(before, "base", before).kernel
    with np.load(path / "reference.npz") as reference:
        losses = [float(step(reference["ids"])) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    after = decoder.layers[0].mlp.experts.down_proj
    after = getattr(after, "base", after).kernel
    changed = (qjax.codes(after) != qjax.codes(before)).mean()
    assert (changed > 0.01) == (method == "weights")


def test_files_are_held_out_whole(tmp_path):
    tokenizer = finetune.Tokenizer.from_file(str(finetune.SHIPPED / "tokenizer.json"))
    for i in range(11):
        (tmp_path / f"file_{i:02}.py").write_text(f"x = {i}\n" * 3)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "file.py").write_text("no_ordinary_source\n")
    trained, held = finetune.read_source(tokenizer, tmp_path)
    assert tokenizer.decode(held.tolist()) == "x = 0\n" * 3 + "x = 10\n" * 3
    assert "x = 0" not in tokenizer.decode(trained.tolist())
    assert "no_ordinary_source" not in tokenizer.decode(trained.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "nan"], "--rate=nan must be a positive number"),
        (["--rate", "-1"], "--rate=-1.0 must be a positive number"),
        (["--context", "5000"], "--context=5000 must be at most 1024"),
        (["--output", "nowhere/curves.png"], "must be a file in a folder"),
        (["--output", "curves.foo"], "must end in .png, .svg, .pdf"),
    ],
)
def test_nothing_is_trained_that_would_be_lost(options, message, monkeypatch):
    monkeypatch.setattr(finetune, "set_up", lambda *_: pytest.fail("It is trained."))
    app = typer.Typer()
    app.command()(finetune.main)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_too_little_source(tmp_path):
    app = typer.Typer()
    app.command()(finetune.main)
    result = CliRunner().invoke(app, ["--source", str(tmp_path)])
    assert result.exit_code == 1
    assert "0 Python files; two are needed" in " ".join(result.output.split())
