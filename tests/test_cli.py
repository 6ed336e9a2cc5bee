"""The commands on the shipped model and others: what they print, what they refuse."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib import pyplot
from typer.testing import CliRunner

import qjax
from qjax import checkpoints, cli, progress
from qjax.checkpoints import modules, placing
from qjax.cli import app
from qjax.formats import exl2
from tests.checkpoints import assembled, tiny
from tests.checkpoints.writes import Writes
from tests.goldens import arrays

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "examples" / "llm" / "checkpoint"
DATA = ROOT / "tests" / "data"
AWQ = DATA / "llama_awq4_g128"
UP = "model.layers.0.mlp.up_proj"
UPS = "model.layers.{0-2}.mlp.up_proj"

sys.path.insert(0, str(ROOT / "examples" / "llm"))

import model  # noqa: E402


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def succeeds(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    return done


def fails(*arguments, code=1):
    """Says on stderr, in one message without a traceback, and prints nothing."""
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def words(text):
    """Without the lines and boxes of a terminal."""
    return " ".join(text.translate(dict.fromkeys(map(ord, "│╭╰─╮╯"), " ")).split())


def bytes_of(directory):
    """Every tensor of a checkpoint as the file holds it."""
    tensors = checkpoints.shards.scan(directory)
    return {name: stored.read().tobytes() for name, stored in tensors.items()}


def files_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def exl2_directory(path, name="exl2_b43_g128"):
    """What exllamav2 packed, as a checkpoint."""
    with np.load(ROOT / f"tests/golden/exl2/{name}.npz") as vectors:
        names = [key for key in exl2.TENSORS if key in vectors]
        tensors = {f"{UP}.{key}": vectors[key] for key in names}
    # Derived from q_invperm when a file is read.
    tensors.pop(f"{UP}.q_perm", None)
    entry = {"quant_method": "exl2", "bits": 3.3, "head_bits": 16}
    config = {"model_type": "llama", "quantization_config": entry}
    return tiny.Checkpoint(tensors=tensors, config=config).write(path)


def test_version():
    assert succeeds("--version").stdout.strip() == f"qjax {qjax.__version__}"


class TestHelp:
    @pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
    def test_teaches_what_there_is(self, arguments):
        done = run(*arguments)
        # Without arguments it is an error, and says the same.
        assert done.exit_code == (0 if arguments else 2)
        text = words(done.output)
        assert "Quantized checkpoints: make, inspect, check, compare and" in text
        assert "qjax quantize llama llama-gptq --to gptq" in text
        assert "the exit code is 1 if something is wrong" in text
        for command in ("inspect", "convert", "verify", "tune"):
            assert f"qjax {command} llama-gptq" in text
        assert "qjax compare llama llama-gptq" in text
        for command in ("quantize", "inspect", "convert", "verify", "compare", "tune"):
            assert f" {command} " in text

    @pytest.mark.parametrize(
        ("command", "pieces"),
        [
            ("inspect", ["--json", "--plot", "FILE", ".png, .svg or .pdf", "jq '"]),
            (
                "convert",
                [
                    *("--to", *cli.Format, "--overwrite", "--shard-gb", "10^9 bytes"),
                    "without requantizing",
                    "nothing is written",
                    "goes on after an interruption",
                    "qjax convert llama-awq llama-gptq --to gptq_v2",
                ],
            ),
            (
                "quantize",
                [
                    *("--to", "awq, compressed-tensors, hqq, fp8", "mlx", "--bits"),
                    *("--group-size", "-1 for all", "--symmetric", "--asymmetric"),
                    *("--method", *cli.Method, "--rule", "PATTERN=BITS[,GROU"),
                    *("--skip", "PATTERN", "--head"),
                    *("--overwrite", "--shard-gb", "nothing is written"),
                    "goes on after an interruption",
                    "qjax quantize llama llama-ct --to compressed-tensors",
                    "Embeddings, routers of a mixture",
                    "--skip '.*\\.self_attn\\..*'",
                    "--rule '.*\\.(v_proj|down_proj)=3,32'",
                ],
            ),
            ("verify", ["NaN and infinity", "exit code 1", "download it again"]),
            (
                "compare",
                [
                    *("--at-most", "ERROR", "--json", "the worst first"),
                    "norm(A - B) / norm(A)",
                    "The exit code is 1 if a name or a shape is different",
                    "qjax compare llama-gptq llama-ct --at-most 0",
                    "qjax compare llama-F16.gguf llama-Q4_K_M.gguf",
                ],
            ),
            (
                "tune",
                [
                    *("--shape", "KxN", "--bits", "--rows", *cli.Operation),
                    "goes on after an interruption",
                    "compute capability 8.0 or later",
                    "$QJAX_TABLES",
                    "qjax tune llama-gptq",
                ],
            ),
        ],
    )
    def test_teaches_each_command(self, command, pieces):
        text = words(succeeds(command, "--help").stdout)
        for piece in pieces:
            assert piece in text, piece
        assert "Examples" in text

    def test_to_names_what_save_writes(self):
        assert [*cli.Format] == [*checkpoints.dialects.DIALECTS]


class TestInspect:
    def test_json(self):
        summary = json.loads(succeeds("inspect", SHIPPED, "--json").stdout)
        assert summary.keys() == {"directory", "matrices", "dense", "total"}
        assert summary["directory"] == str(SHIPPED)
        assert (len(summary["matrices"]), len(summary["dense"])) == (21, 9)
        matrices = {row["name"]: row for row in summary["matrices"]}
        # 640 * 256 codes, scales and zeros of two groups, and g_idx of 256 inputs.
        nbytes = 640 * 256 // 2 + 2 * 640 * 2 + 2 * 640 // 2 + 256 * 4
        assert matrices[UP] == {
            "name": UP,
            "shape": [256, 640],
            "format": "gptq",
            "bits": 4,
            "group_size": 128,
            "bits_per_weight": 8 * nbytes / (256 * 640),
            "bytes": nbytes,
        }
        dense = {row["name"]: row for row in summary["dense"]}
        assert dense["lm_head.weight"] == {
            "name": "lm_head.weight",
            "shape": [512, 256],
            "format": "bfloat16",
            "bits": 16,
            "group_size": None,
            "bits_per_weight": 16.0,
            "bytes": 512 * 256 * 2,
        }
        total = summary["total"]
        size = (SHIPPED / "model.safetensors").stat().st_size
        assert size - 20_000 < total["bytes"] < size  # all but the header
        assert total["bytes"] == sum(
            row["bytes"] for row in summary["matrices"] + summary["dense"]
        )
        assert total["bits_per_weight"] == 8 * total["bytes"] / total["weights"]
        weights = sum(np.prod(row["shape"]) for row in matrices.values())
        nbytes = sum(row["bytes"] for row in matrices.values())
        assert total["matrices"] == {
            "weights": weights,
            "bytes": nbytes,
            "bits_per_weight": 8 * nbytes / weights,
        }

    def test_json_of_a_dense_model(self):
        summary = json.loads(succeeds("inspect", DATA / "llama_bf16", "--json").stdout)
        assert summary["matrices"] == []
        assert summary["total"]["matrices"]["bits_per_weight"] is None
        assert summary["total"]["bits_per_weight"] == 16

    def test_json_of_mixed_bits(self, tmp_path):
        directory = exl2_directory(tmp_path / "exl2")
        (row,) = json.loads(succeeds("inspect", directory, "--json").stdout)["matrices"]
        assert (row["format"], row["shape"]) == ("exl2", [384, 32])
        # Two thirds of the rows have three bits.
        assert row["bits"] == pytest.approx(10 / 3)
        assert row["group_size"] == 128
        assert row["bits_per_weight"] > row["bits"]

    def test_groups_of_several_sizes(self, tmp_path):
        directory = exl2_directory(tmp_path / "exl2", "exl2_b5432_mixedg")
        (row,) = json.loads(succeeds("inspect", directory, "--json").stdout)["matrices"]
        assert row["group_size"] == [32, 64]
        lines = succeeds("inspect", directory).stdout.splitlines()
        (up,) = (line for line in lines if UP in line)
        assert up.split()[4] == "32,64"

    def test_one_group_a_column(self, tmp_path):
        w = qjax.quantize(jnp.eye(64), group_size=None, symmetric=True)
        checkpoints.save(tmp_path / "gptq", {UP: w}, {}, format="gptq")
        done = succeeds("inspect", tmp_path / "gptq", "--json")
        (row,) = json.loads(done.stdout)["matrices"]
        assert row["group_size"] is None
        lines = succeeds("inspect", tmp_path / "gptq").stdout.splitlines()
        (up,) = (line for line in lines if UP in line)
        assert up.split()[4] == "all"

    def test_table(self):
        lines = succeeds("inspect", SHIPPED, "--each").stdout.splitlines()
        (head,) = (line for line in lines if line.startswith(" name"))
        columns = ["name", "shape", "format", "bits", "group", "bits/weight", "bytes"]
        assert head.split() == columns
        (up,) = (line for line in lines if UP in line)
        assert up.split() == [UP, "256x640", "gptq", "4", "128", "4.206", "86,144"]
        (dense,) = (line for line in lines if "lm_head.weight" in line)
        assert dense.split()[1:4] == ["512x256", "bfloat16", "16"]
        assert lines[-2].split()[0] == "total" or lines[-1].split()[0] == "total"
        assert any(line.startswith(" 21 matrices") for line in lines)

    def test_those_that_are_alike_have_a_line(self):
        """Not two of six bits in the last layer with those of four in others."""
        file = DATA / "llama_gguf_q4_k_m" / "model.gguf"
        lines = succeeds("inspect", file).stdout.splitlines()
        found = {line.split()[0]: line.split()[1:] for line in lines if "x" in line}
        columns = ["256x640", "gguf", "Q4_K", "4", "32", "4.500", "276,480"]
        assert found["blk.{0-2}.ffn_up"] == columns
        assert found["blk.{0,1}.attn_v"][2] == "Q4_K"
        assert found["blk.2.attn_v"][2] == "Q6_K"
        each = succeeds("inspect", file, "--each").stdout.splitlines()
        assert [line.split() for line in lines[-4:]] == [
            line.split() for line in each[-4:]
        ]

    def test_groups_of_several_sizes_are_alike(self, tmp_path):
        one = exl2_directory(tmp_path / "exl2", "exl2_b5432_mixedg")
        (row,) = (r for r in succeeds("inspect", one).stdout.splitlines() if UP in r)
        assert row.split()[4] == "32,64"

    def test_numbers_that_are_no_layers(self, tmp_path):
        """Of five thousand digits, and five thousand in a name."""
        long = [f"a.{'1' * 5000}.weight", f"{'b.1.' * 5000}weight"]
        tensors = {name: np.ones((2, 2), np.float16) for name in long}
        tiny.Checkpoint(tensors=tensors, config={}).write(tmp_path)
        done = succeeds("inspect", tmp_path).stdout
        assert "2 dense tensors" in done

    def test_names_are_printed_as_they_are(self, tmp_path):
        name = "model.[red]:smile:.weight"
        tensors = {name: np.ones((2, 2), np.float16)}
        tiny.Checkpoint(tensors=tensors, config={}).write(tmp_path)
        assert name in succeeds("inspect", tmp_path).stdout

    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    def test_plot(self, tmp_path, suffix):
        file = tmp_path / f"bits{suffix}"
        done = succeeds("inspect", SHIPPED, "--plot", file)
        assert UPS in done.stdout
        magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
        assert file.read_bytes().startswith(magic[suffix])
        if suffix == ".png":
            picture = pyplot.imread(file)
            height, width, channels = picture.shape
            assert (width, channels) == (9 * 150, 4)
            assert height == pytest.approx((0.18 * 7 + 1) * 150, abs=1)
            # White paper, two kinds of bars and black letters.
            colors = np.unique((picture * 255).astype(np.uint8).reshape(-1, 4), axis=0)
            assert len(colors) > 10
            bars = (picture[..., 2] - picture[..., 0]) > 0.3
            assert 0.2 < bars.mean() < 0.8
        assert pyplot.get_fignums() == []

    def test_plot_replaces_a_picture(self, tmp_path):
        file = tmp_path / "bits.png"
        file.write_bytes(b"an older picture")
        done = succeeds("inspect", SHIPPED, "--plot", file, "--json")
        assert json.loads(done.stdout)["total"]
        assert pyplot.imread(file).ndim == 3

    def test_plot_refusals(self, tmp_path, monkeypatch):
        text = fails("inspect", SHIPPED, "--plot", tmp_path / "bits.docx")
        assert f"--plot={tmp_path}/bits.docx must end in .png, .svg, .pdf" in text
        text = fails("inspect", SHIPPED, "--plot", tmp_path / "no/bits.png")
        assert f"{tmp_path}/no is not a directory; make it first" in text
        text = fails("inspect", DATA / "llama_bf16", "--plot", tmp_path / "bits.png")
        assert "--plot: no matrix of this checkpoint is quantized" in text
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        text = fails("inspect", SHIPPED, "--plot", tmp_path / "bits.png")
        assert "--plot needs matplotlib: pip install matplotlib" in text
        assert list(tmp_path.iterdir()) == []


class TestConvert:
    def test_says_what_it_wrote(self, tmp_path):
        done = succeeds("convert", AWQ, tmp_path / "x", "--to", "gptq_v2")
        assert done.stdout == f"{tmp_path}/x: gptq_v2\n"
        assert done.stderr == ""
        assert succeeds("verify", tmp_path / "x").stdout.startswith("OK: 21 matrices")

    @pytest.mark.slow
    def test_gptq_to_compressed_tensors_and_back(self, tmp_path):
        there, back = tmp_path / "ct", tmp_path / "gptq"
        succeeds("convert", SHIPPED, there, "--to", "compressed-tensors")
        succeeds("convert", there, back, "--to", "gptq")
        assert bytes_of(back) == bytes_of(SHIPPED)
        assert_same_model([SHIPPED, there, back], "llama_gptq4_g128_actorder")

    @pytest.mark.slow
    @pytest.mark.parametrize("stop", ["gptq_p", "compressed-tensors"])
    def test_three_bits_and_back(self, tmp_path, stop):
        source, there, back = DATA / "llama_gptq3_g64", tmp_path / "x", tmp_path / "y"
        succeeds("convert", source, there, "--to", stop)
        succeeds("convert", there, back, "--to", "gptq")
        assert bytes_of(there) != bytes_of(source)
        assert bytes_of(back) == bytes_of(source)

    @pytest.mark.slow
    def test_awq_to_gptq_v2_and_back(self, tmp_path):
        there, back = tmp_path / "gptq", tmp_path / "awq"
        succeeds("convert", AWQ, there, "--to", "gptq_v2")
        succeeds("convert", there, back, "--to", "awq")
        assert bytes_of(back) == bytes_of(AWQ)
        assert_same_model([AWQ, there, back], AWQ.name)

    @pytest.mark.parametrize("name", ["exl2_b43_g128", "exl2_b6_subnormal"])
    def test_exl2_to_exl2(self, tmp_path, name):
        source = exl2_directory(tmp_path / "source", name)
        succeeds("convert", source, tmp_path / "x", "--to", "exl2")
        assert bytes_of(tmp_path / "x") == bytes_of(source)
        loaded = checkpoints.load(tmp_path / "x", prepare=False)
        with np.load(ROOT / f"tests/golden/exl2/{name}.npz") as vectors:
            chex.assert_trees_all_equal(loaded[UP].numpy(), vectors["qint"])
            found = np.asarray(qjax.dequantize(loaded[UP]))
            chex.assert_trees_all_equal(found, vectors["w_deq"])

    def test_overwrites_only_on_request(self, tmp_path):
        target = tmp_path / "x"
        succeeds("convert", AWQ, target, "--to", "gptq")
        before = files_of(target)
        text = fails("convert", AWQ, target, "--to", "gptq_v2")
        assert f"{target} is already there; choose another name, or overwrite" in text
        assert files_of(target) == before
        succeeds("convert", AWQ, target, "--to", "gptq_v2", "--overwrite")
        entry = checkpoints.read_config(target)["quantization_config"]
        assert entry["checkpoint_format"] == "gptq_v2"

    def test_never_overwrites_what_is_no_checkpoint(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        text = fails("convert", AWQ, tmp_path, "--to", "gptq", "--overwrite")
        assert "holds no config.json; it is not overwritten" in text
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_shards(self, tmp_path):
        options = ("--to", "gptq", "--shard-gb", "0.001")
        succeeds("convert", SHIPPED, tmp_path / "x", *options)
        shards = sorted((tmp_path / "x").glob("*.safetensors"))
        assert len(shards) == 2
        assert all(file.stat().st_size < 1_100_000 for file in shards)
        assert bytes_of(tmp_path / "x") == bytes_of(SHIPPED)

    def test_goes_on_after_an_interruption(self, tmp_path, monkeypatch):
        writes = Writes(monkeypatch)
        writes.fail(20, KeyboardInterrupt())
        command = ("convert", AWQ, tmp_path / "x", "--to", "gptq_v2")
        text = fails(*command, code=130)
        assert text == "qjax: interrupted; the same command goes on from here.\n"
        assert [file.name for file in tmp_path.iterdir()] == [".x.partial"]
        writes.watch()
        succeeds(*command)
        assert len(writes.names) == 30 - 20
        assert [file.name for file in tmp_path.iterdir()] == ["x"]
        monkeypatch.undo()
        succeeds("convert", AWQ, tmp_path / "whole", "--to", "gptq_v2")
        assert files_of(tmp_path / "x") == files_of(tmp_path / "whole")

    @pytest.mark.slow
    def test_the_files_of_the_shell_survive_a_signal(self, tmp_path):
        """Ctrl-C of a real process: exit code 130, one line, nothing at DST."""
        script = (
            "import os, signal, sys\n"
            "from qjax import cli\n"
            "from qjax.checkpoints import placing\n"
            # A shell may have started the tests with the signal ignored.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "placing.fill = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
            "cli.main()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "convert", AWQ, tmp_path / "x", "--to=gptq"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (130, -signal.SIGINT), done.stderr
        assert done.stderr.startswith("qjax: interrupted; the same command")
        assert not (tmp_path / "x").exists()


class TestQuantize:
    @pytest.fixture
    def source(self, tmp_path):
        """Two layers of 2048 weights each, and a head of as many."""
        rng = np.random.default_rng(0)
        names = (UP, UP.replace(".0.", ".1."), "lm_head")
        tensors = {
            f"{name}.weight": rng.standard_normal((32, 64)).astype(np.float16)
            for name in names
        }
        tensors["model.norm.weight"] = np.ones(64, np.float16)
        return tiny.Checkpoint(tensors=tensors, config={}).write(tmp_path / "source")

    def test_says_what_it_wrote(self, tmp_path, source):
        options = ("--to", "gptq", "--group-size", "32")
        done = succeeds("quantize", source, tmp_path / "x", *options)
        # 2048 codes of 4 bits; 64 scales of 16 and zeros of 4; g_idx of 64 inputs.
        nbytes = (2048 * 4 + 64 * 20 + 64 * 32) // 8
        before, after = 3 * 4096 + 128, 2 * nbytes + 4096 + 128
        said, _, error = done.stdout.rpartition(", mean relative error ")
        assert said == (
            f"{tmp_path}/x: gptq, 2 matrices of {8 * nbytes / 2048:.3f} bits a weight, "
            f"{before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after"
        )
        assert done.stderr == ""
        assert succeeds("verify", tmp_path / "x").stdout.startswith(
            "OK: 2 matrices of g"
        )
        weights = checkpoints.load(tmp_path / "x", prepare=False)
        assert weights[UP].scale.dtype == jnp.float16
        dense = {
            name: checkpoints.shards.scan(source)[f"{name}.weight"].read().T
            for name, w in weights.items()
            if isinstance(w, qjax.QTensor)
        }
        errors = [qjax.quantizers.output_error(w, weights[n]) for n, w in dense.items()]
        assert float(error) == pytest.approx(np.mean(errors), abs=6e-5)

    @pytest.mark.parametrize(
        ("options", "bits", "group", "zeros"),
        [
            (["--to=gptq", "--bits=3", "--method=clip"], 3, 32, None),
            (["--to=gptq_v2", "--asymmetric"], 4, 32, jnp.uint8),
            (["--to=awq"], 4, 32, jnp.uint8),
            (["--to=compressed-tensors", "--group-size=-1", "--head"], 4, None, None),
            (["--to=hqq", "--method=hqq", "--bits=2"], 2, 32, jnp.float16),
            (["--to=fp8"], 8, 32, None),
            (["--to=mlx", "--bits=5"], 5, 32, "offsets"),
            (["--to=mlx", "--symmetric", "--method=clip"], 4, 32, "offsets"),
            (["--to=bitsandbytes"], 4, 32, None),
            (["--to=bitsandbytes", "--bits=8"], 8, None, None),
            (["--to=quanto", "--group-size=64"], 4, 64, None),
        ],
    )
    def test_options(self, tmp_path, source, options, bits, group, zeros):
        succeeds("quantize", source, tmp_path / "x", "--group-size=32", *options)
        weights = checkpoints.load(tmp_path / "x", prepare=False)
        packed = {name for name, w in weights.items() if isinstance(w, qjax.QTensor)}
        assert ("lm_head" in packed) == ("--head" in options)
        (segment,) = weights[UP].segments
        assert (segment.bits, segment.group_size) == (bits, group)
        # Symmetric codes are read from GPTQ with zeros of the middle code.
        zero = weights[UP].zero
        if zeros == "offsets":
            middle = -(2 ** (bits - 1)) * weights[UP].scale
            assert (zero == middle).all() == ("--symmetric" in options)
        elif zeros is None:
            assert zero is None or (zero == 2 ** (bits - 1)).all()
        else:
            assert zero.dtype == zeros
            assert len(np.unique(zero)) > 1

    def test_skip_may_be_repeated(self, tmp_path, source):
        options = ("--to=gptq", "--group-size=64", "--skip", UP, "--skip", "lm_head")
        done = succeeds("quantize", source, tmp_path / "x", *options)
        assert "gptq, 1 matrices" in done.stdout
        assert f"{UP}.weight" in checkpoints.load(tmp_path / "x")

    def test_rules_of_other_widths(self, tmp_path, source):
        rules = ("--rule", f"(?=.*){UP}=8", "--rule=.*up.*=4,-1", "--rule=lm.*=2")
        options = ("--to=gptq", "--bits=3", "--group-size=32", "--head", *rules)
        succeeds("quantize", source, tmp_path / "x", *options)
        weights = checkpoints.load(tmp_path / "x", prepare=False)
        names = (UP, UP.replace(".0.", ".1."), "lm_head")
        found = [weights[name].segments[0] for name in names]
        kinds = [(segment.bits, segment.group_size) for segment in found]
        assert kinds == [(8, 32), (4, None), (2, 32)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--to=gptq", "--method=hqq"], "--to=gptq cannot hold; write --to hqq"),
            (["--to=hqq", "--method=hqq", "--symmetric"], "--symmetric leaves none"),
            (["--to=awq", "--symmetric"], "--to=awq is asymmetric; leave out"),
            (["--to=awq", "--bits=3"], "--bits=3 must be one of 4 for --to awq"),
            (["--to=gptq", "--bits=5"], "--bits=5 must be one of 2, 3, 4, 8 for"),
            (["--to=hqq", "--bits=7"], "--bits=7 must be one of 2, 3, 4, 8 for --to"),
            (["--to=gptq", "--asymmetric"], "write --to gptq_v2, or leave out --asym"),
            (["--to=gptq", "--group-size=0"], "--group-size=0 must be positive, or -1"),
            (["--to=hqq", "--bits=5"], "--bits=5 would take the room of 8 in HQQ's wo"),
            (["--to=hqq", "--bits=6"], "take --bits 4 or 8"),
            (
                ["--to=fp8", "--method=clip"],
                "--method=clip finds whole numbers; --to=f",
            ),
            (["--to=fp8", "--asymmetric"], "--to=fp8 is symmetric; leave out --asymme"),
            (
                ["--to=mlx", "--method=clip"],
                "their products with scales; add --symmetric",
            ),
            (["--to=bitsandbytes", "--bits=5"], "--bits=5 must be one of 4, 8 for --t"),
            (
                ["--to=bitsandbytes", "--method=hqq"],
                "--method=hqq finds float zeros, which --to=bitsandbytes cannot hold",
            ),
            (
                ["--to=bitsandbytes", "--asymmetric"],
                "--to=bitsandbytes is symmetric; leave out --asymmetric",
            ),
            (["--to=fp8", "--bits=4"], "--bits=4 must be one of 8 for --to fp8"),
            (["--to=gptq", "--skip=("], "--skip='(' is not a regular expression"),
            (["--to=gptq", "--skip=no"], "qjax: --skip='no' matches the whole path of"),
            (["--to=gptq", "--rule=x"], "--rule='x' must be PATTERN=BITS or PATTERN=B"),
            (["--to=gptq", "--rule=x=5"], "--rule='x=5': --bits=5 must be one of 2, 3"),
            (["--to=gptq", "--rule=x=4,0"], "'x=4,0': --group-size=0 must be positive"),
            (["--to=gptq", "--rule=x=4"], "--rule='x', which matches the whole path"),
            (["--to=gptq", "--rule=(=4"], "--rule='(', which is no regular expressio"),
            (["--to=gptq", "--rule=lm_head=4"], "and lm_head does without --head."),
        ],
    )
    def test_what_does_not_go_together(self, tmp_path, source, options, message):
        text = fails("quantize", source, tmp_path / "x", *options)
        assert message in text
        assert text.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_groups_that_do_not_fit(self, tmp_path, source):
        text = fails("quantize", source, tmp_path / "x", "--to", "gptq")
        lines = text.splitlines()
        assert lines[0] == (
            "qjax: 2 of 2 matrices cannot be written as 'gptq'; nothing was written:"
        )
        # One reason of two modules.
        assert lines[1] == (
            f"  {UP}, {UP.replace('.0.', '.1.')}: inputs k=64 must be a multiple of "
            "--group-size=128; choose one that divides it, -1 for all inputs."
        )
        assert lines[2].startswith("Choose another group size or width")
        assert lines[2].endswith("or leave these modules dense (--skip).")
        assert len(lines) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_goes_on_after_an_interruption(self, tmp_path, source, monkeypatch):
        writes = Writes(monkeypatch)
        writes.fail(2, KeyboardInterrupt())
        command = ("quantize", source, tmp_path / "x", "--to=gptq", "--group-size=32")
        text = fails(*command, code=130)
        assert text == "qjax: interrupted; the same command goes on from here.\n"
        writes.watch()
        said = succeeds(*command).stdout
        assert "gptq, 2 matrices" in said
        assert said.endswith(" of the 1 now\n")
        whole = ("quantize", source, tmp_path / "whole", *command[3:])
        succeeds(*whole)
        assert files_of(tmp_path / "x") == files_of(tmp_path / "whole")

    def test_what_is_quantized_already(self, tmp_path):
        text = fails("quantize", AWQ, tmp_path / "x", "--to", "gptq")
        assert "is awq. `qjax convert` moves it to another format" in text

    def test_a_head_that_is_not_there(self, tmp_path, source):
        tensors = tiny.tensors_of(source)
        del tensors["lm_head.weight"]
        tiny.Checkpoint(tensors=tensors, config={}).write(source)
        text = fails("quantize", source, tmp_path / "x", "--to=gptq", "--head")
        assert text.startswith("qjax: --head, but ")


@pytest.mark.parametrize("module", ["qjax", "qjax.cli"])
def test_python_m_runs_the_commands(module, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["qjax", "inspect", str(AWQ)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__")
    assert UPS in capsys.readouterr().out


CANNOT = {
    # source: format: how many, and why
    "act-order into AWQ": (SHIPPED, "awq", 21, "(act-order); GPTQ holds those"),
    "GPTQ into EXL2": (SHIPPED, "exl2", 21, "EXL2 cannot hold"),
    "3 bits into AWQ": (
        DATA / "llama_gptq3_g64",
        "awq",
        21,
        "3 bits are not among (4,); compressed-tensors holds 1 to 8",
    ),
    "plain scales into EXL2": (
        DATA / "llama_gptq3_g64",
        "exl2",
        21,
        "its scales are plain numbers, not indices and maxima",
    ),
    "zeros into EXL2": (AWQ, "exl2", 21, "is not around the middle code; requantize"),
    "NF4 into GPTQ": (DATA / "llama_nf4_dq", "gptq", 21, "codebook[q] * s here does"),
    "NF4 into compressed-tensors": (
        DATA / "llama_nf4_dq",
        "compressed-tensors",
        21,
        "does not have integer zeros; requantize it",
    ),
    "HQQ into GPTQ": (DATA / "llama1L_hqq4_g64", "gptq_v2", 7, "integer zeros"),
    "8 bits into AWQ": (
        DATA / "llama1L_torchao_int8",
        "awq",
        7,
        "8 bits are not among (4,)",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_convert_says_beforehand_what_cannot_be_held(tmp_path, case):
    source, name, count, reason = CANNOT[case]
    lines = fails("convert", source, tmp_path / "x", "--to", name).splitlines()
    assert lines[0] == (
        f"qjax: {count} of {count} matrices cannot be written as '{name}'; nothing was "
        "written:"
    )
    assert all(reason in line for line in lines[1:])
    counts, said = [], [line[2:].partition(": ")[0] for line in lines[1:]]
    for names in said:
        number, many, _ = names.partition(" modules such as ")
        counts.append(int(number) if many else len(names.split(", ")))
    assert sum(counts) == count
    # Each reason once.
    assert len({line.partition(": ")[2] for line in lines[1:]}) == len(lines) - 1
    assert list(tmp_path.iterdir()) == []


def test_convert_of_several_widths_into_formats_of_one(tmp_path):
    source = exl2_directory(tmp_path / "exl2")
    for name in ("gptq", "gptq_v2", "gptq_p", "awq", "compressed-tensors"):
        text = fails("convert", source, tmp_path / "x", "--to", name)
        assert "1 of 1 matrices" in text
        assert "its rows have several widths; EXL2 holds those" in text
    assert [file.name for file in tmp_path.iterdir()] == ["exl2"]


def test_convert_of_a_dense_model(tmp_path):
    text = fails("convert", DATA / "llama_bf16", tmp_path / "x", "--to", "gptq")
    assert text == "qjax: No weight is quantized: there is nothing for 'gptq'.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", AWQ], "Missing argument 'DST'"),
        (["convert", AWQ, "x"], "Missing option '--to'"),
        (["convert", AWQ, "x", "--to", "gguf"], "'gguf' is not one of 'gptq'"),
        (
            ["convert", AWQ, "x", "--to", "gptq", "--shard-gb", "0"],
            "Invalid value for '--shard-gb'",
        ),
        (["convert", AWQ, "x", "--to", "gptq", "--force"], "No such option"),
        (["quantize", AWQ, "x"], "Missing option '--to'"),
        (["quantize", AWQ, "x", "--to", "exl2"], "'exl2' is not one of 'gptq'"),
        (["quantize", AWQ, "x", "--to", "gptq", "--bits", "9"], "for '--bits'"),
        (["quantize", AWQ, "x", "--to=gptq", "--method=awq"], "'awq' is not one of"),
        (["inspect"], "Missing argument 'DIR'"),
        (["verify", AWQ, "more"], "unexpected extra argument"),
        (["compare", AWQ], "Missing argument 'B'"),
        (["compare", AWQ, AWQ, "--at-most", "-1"], "Invalid value for '--at-most'"),
        (["quantise", AWQ], "No such command 'quantise'"),
    ],
)
def test_usage(arguments, message):
    assert message in words(fails(*arguments, code=2))


@pytest.mark.parametrize("size", ["inf", "nan"])
def test_shards_of_no_size(tmp_path, size):
    options = ("--to", "gptq", "--shard-gb", size)
    done = run("convert", AWQ, tmp_path / "x", *options)
    # Newer releases of typer refuse nan by themselves, as a wrong usage.
    assert done.exit_code in (1, 2)
    assert "--shard-gb" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be(tmp_path):
    text = fails("convert", AWQ, tmp_path / "no/x", "--to", "gptq")
    assert f"{tmp_path}/no is not a directory; make it first" in text
    source = shutil.copytree(AWQ, tmp_path / "awq")
    text = fails("convert", source, source / "gptq", "--to", "gptq")
    assert "must not lie in one another" in text


class TestGguf:
    """A file of llama.cpp in the place of a directory."""

    FILE = DATA / "llama_gguf_q4_k_m" / "model.gguf"

    def test_inspect(self):
        lines = succeeds("inspect", self.FILE, "--each").stdout.splitlines()
        (up,) = (line for line in lines if "blk.0.ffn_up" in line)
        assert up.split()[1:] == [
            "256x640",
            "gguf",
            "Q4_K",
            "4",
            "32",
            "4.500",
            "92,160",
        ]
        (down,) = (line for line in lines if "blk.2.ffn_down" in line)
        assert down.split()[1:] == [
            "640x256",
            "gguf",
            "Q8_0",
            "8",
            "32",
            "8.500",
            "174,080",
        ]
        assert any(line.startswith(" 23 matrices") for line in lines)

    def test_inspect_counts_all_experts(self, tmp_path):
        # What llama.cpp's own writer makes of two matrices of ones, one after another.
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        raw = gguf.quantize(
            np.ones((2, 8, 32), np.float32), gguf.GGMLQuantizationType(8)
        )
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("blk.0.ffn_up_exps.weight", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (row,) = json.loads(succeeds("inspect", tmp_path / "m.gguf", "--json").stdout)[
            "matrices"
        ]
        assert (row["shape"], row["bits_per_weight"]) == ([2, 32, 8], 8.5)

    def test_verify(self, tmp_path):
        done = succeeds("verify", self.FILE)
        kinds = ", ".join(f"gguf {kind}" for kind in ("Q4_K", "Q5_0", "Q6_K", "Q8_0"))
        assert done.stdout == (
            f"OK: 23 matrices of {kinds}, 7 dense tensors, 1,480,960 bytes\n"
        )
        (tmp_path / "m.gguf").write_bytes(self.FILE.read_bytes()[:-50_000])
        done = run("verify", tmp_path / "m.gguf")
        assert done.exit_code == 1
        assert "m.gguf: blk.2.ffn_up.weight ends at byte" in done.stdout

    @pytest.mark.parametrize("command", ["convert", "quantize"])
    def test_is_not_written(self, command, tmp_path):
        text = fails(command, self.FILE, tmp_path / "x", "--to", "gptq")
        assert text.startswith(
            f"qjax: {self.FILE} is a GGUF file, whose weights can be"
        )
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_no_sound_file(self, command, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        assert "m.gguf is not a sound GGUF file" in fails(command, tmp_path / "m.gguf")
        assert "n.gguf is not there" in fails(command, tmp_path / "n.gguf")


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "compare", "convert", "quantize"]
)
class TestBadDirectories:
    def outcome(self, command, directory, tmp_path):
        writes = command in ("convert", "quantize")
        rest = [tmp_path / "x", "--to", "gptq"] if writes else []
        rest = [SHIPPED] if command == "compare" else rest
        text = fails(command, directory, *rest)
        assert not (tmp_path / "x").exists()
        assert text.startswith("qjax: ")
        return text

    def test_not_there(self, command, tmp_path):
        text = self.outcome(command, tmp_path / "nowhere", tmp_path)
        assert f"{tmp_path}/nowhere is not a directory; pass one that holds" in text

    def test_no_checkpoint(self, command, tmp_path):
        (tmp_path / "empty").mkdir()
        text = self.outcome(command, tmp_path / "empty", tmp_path)
        assert f"{tmp_path}/empty/config.json is missing" in text

    def test_no_weights(self, command, tmp_path):
        (tmp_path / "m").mkdir()
        (tmp_path / "m/config.json").write_text("{}")
        (tmp_path / "m/pytorch_model.bin").write_bytes(b"\x80")
        text = self.outcome(command, tmp_path / "m", tmp_path)
        assert "neither model.safetensors nor" in text
        assert "pytorch_model.bin" in text

    def test_cut_off(self, command, tmp_path):
        source = shutil.copytree(AWQ, tmp_path / "awq")
        os.truncate(source / "model.safetensors", 1_000_000)
        text = self.outcome(command, source, tmp_path)
        assert f"{source}/model.safetensors is not a sound safetensors file" in text
        assert "Download it again" in text

    def test_of_an_unknown_method(self, command, tmp_path):
        checkpoint = tiny.checkpoint()
        checkpoint.config["quantization_config"]["quant_method"] = "magic"
        text = self.outcome(command, checkpoint.write(tmp_path / "m"), tmp_path)
        assert "quant_method='magic' is not supported; it must be one of" in text

    def test_of_what_is_not_read(self, command, tmp_path):
        checkpoint = assembled.DIALECTS["quark"]().checkpoint
        said = checkpoint.config["quantization_config"]["global_quant_config"]
        said["weight"]["dtype"] = "int3"
        text = self.outcome(command, checkpoint.write(tmp_path / "m"), tmp_path)
        assert "global_quant_config.weight.dtype='int3' is not read" in text


class TestVerify:
    def test_sound(self):
        done = succeeds("verify", SHIPPED)
        assert done.stdout == (
            "OK: 21 matrices of gptq, 9 dense tensors, 1,626,496 bytes\n"
        )
        assert done.stderr == ""

    @pytest.mark.parametrize("path", sorted(DATA.glob("*/config.json")), ids=str)
    def test_all_test_checkpoints_are_sound(self, path):
        assert succeeds("verify", path.parent).stdout.startswith("OK: ")

    def test_a_bad_scale(self, tmp_path):
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
        (line,) = done.stdout.splitlines()
        assert "model.layers.1.mlp.up_proj: scales must be finite" in line

    def test_warnings_are_told_and_do_no_harm(self, tmp_path):
        checkpoint = tiny.checkpoint()
        checkpoint.tensors[f"{tiny.MODULE}.qzeros"][0, 0] = -1
        done = succeeds("verify", checkpoint.write(tmp_path))
        assert done.stderr.startswith(f"qjax: warning: {tiny.MODULE}: qzeros of GPTQ")
        assert done.stdout.startswith("OK: 1 matrices of gptq")


class TestCompare:
    DENSE = DATA / "llama_bf16"

    def rows(self, *arguments, code=0):
        """The lines of the table between the head and the totals, by name."""
        done = run("compare", *arguments)
        assert done.exit_code == code, done.output
        lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
        (end,) = (i for i, line in enumerate(lines) if line[1:] and "matrices" in line)
        return done, {line[0]: line[1:] for line in lines[2:end]}

    def test_table(self):
        done, rows = self.rows(self.DENSE, SHIPPED)
        lines = done.stdout.splitlines()
        (head,) = (line for line in lines if line.startswith(" name"))
        sides = ["A,", "bits", "B,", "bits"]
        assert head.split() == ["name", *sides, "error", "dB", "largest", "same"]
        reference = arrays(DATA / "llama_gptq4_g128_actorder" / "reference.npz")
        errors = {name: float(reference[f"relerr/{name}.weight"]) for name in rows}
        # Only matrices differ, and the worst are first.
        assert list(rows) == sorted(rows, key=lambda name: -errors[name])
        assert len(rows) == 21
        held, (error, snr, _) = rows[UP][:4], rows[UP][4:]
        assert held == ["bfloat16", "16.000", "gptq", "4.206"]
        assert float(error) == pytest.approx(errors[UP], rel=1e-3)  # as rounded
        assert float(snr) == pytest.approx(-20 * np.log10(errors[UP]), abs=0.06)
        totals = [line.split() for line in lines if line.strip()][-3:]
        assert totals[0][:4] == ["21", "matrices", "16.000", "4.257"]
        assert totals[0][-3:] == ["0", "of", "21"]
        assert totals[1][:5] == ["9", "dense", "tensors", "16.000", "16.000"]
        assert totals[1][-5:] == ["0", "inf", "9", "of", "9"]
        assert totals[2][:3] == ["total", "16.000", "5.589"]
        assert totals[2][-3:] == ["9", "of", "30"]
        assert done.stderr == ""

    def test_of_many_the_worst_have_rows(self, tmp_path):
        tensors = {
            f"{i}.up": qjax.quantize(jnp.ones((32, 8)), 4, 32) for i in range(103)
        }
        checkpoints.save(tmp_path / "a", tensors, {}, format="gptq_v2")
        tensors["7.up"] = qjax.quantize(2 * jnp.ones((32, 8)), 4, 32)
        checkpoints.save(tmp_path / "b", tensors, {}, format="gptq_v2")
        found = tmp_path / "a", tmp_path / "b"
        done, rows = self.rows(*found)
        assert next(iter(rows)) == "7.up"
        assert len(rows) == 101
        assert "and 3 more: --each" in done.stdout
        assert len(self.rows(*found, "--each")[1]) == 103

    def test_dense_tensors_that_differ_have_rows(self):
        source = DATA / "llama1L_torchao_int8"
        _, rows = self.rows(source, DATA / "llama1L_hqq4_g64")
        other = {name for name in rows if name.endswith(".weight")}
        assert other == {"model.embed_tokens.weight", "lm_head.weight"}
        assert rows["lm_head.weight"][:3:2] == ["bfloat16", "float16"]

    def test_a_conversion(self, tmp_path):
        succeeds("convert", SHIPPED, tmp_path / "ct", "--to", "compressed-tensors")
        done, rows = self.rows(SHIPPED, tmp_path / "ct", "--at-most", "0")
        assert {tuple(row[-4:]) for row in rows.values()} == {("0", "inf", "0", "all")}
        assert done.stderr == ""

    def test_json(self):
        found = json.loads(succeeds("compare", self.DENSE, SHIPPED, "--json").stdout)
        assert (found["a"], found["b"]) == (str(self.DENSE), str(SHIPPED))
        assert (len(found["matrices"]), len(found["dense"])) == (21, 9)
        assert (found["only_in_a"], found["only_in_b"]) == ([], [])
        assert found["other_shapes"] == []
        names = [name for name in checkpoints.lazy(self.DENSE) if "_proj" in name]
        matrices = {row["name"]: row for row in found["matrices"]}
        assert [f"{name}.weight" for name in matrices] == names
        library = checkpoints.compare(self.DENSE, SHIPPED)
        (up,) = (one for one in library.tensors if one.name == UP)
        nbytes = 2 * 256 * 640
        assert matrices[UP] == {
            "name": UP,
            "shape": [256, 640],
            "a": {"format": "bfloat16", "bits": 16, "bytes": nbytes, "not_finite": 0},
            "b": {"format": "gptq", "bits": 4, "bytes": 86144, "not_finite": 0},
            "bits_per_weight": [16, 8 * 86144 / (256 * 640)],
            "relative_error": up.relative_error,
            "snr_db": up.snr_db,
            "largest": up.largest,
            "same_values": False,
            "same_codes": None,
        }
        (norm,) = (row for row in found["dense"] if row["name"] == "model.norm.weight")
        assert (norm["relative_error"], norm["snr_db"]) == (0, None)
        assert norm["same_values"]
        total = found["total"]
        assert (total["tensors"], total["same_values"]) == (30, 9)
        assert total["weights"] == library.total.weights
        assert total["bytes"] == list(library.total.nbytes)
        assert total["relative_error"] == library.total.relative_error
        assert total["matrices"]["tensors"] == 21
        assert total["matrices"]["relative_error"] > total["relative_error"]

    def test_at_most(self):
        reference = arrays(DATA / "llama_gptq4_g128_actorder" / "reference.npz")
        errors = {
            name.removeprefix("relerr/").removesuffix(".weight"): float(reference[name])
            for name in reference
            if name.startswith("relerr/")
        }
        above = {name for name, error in errors.items() if error > 0.155}
        assert 0 < len(above) < 21
        done, rows = self.rows(self.DENSE, SHIPPED, "--at-most", "0.155", code=1)
        assert len(rows) == 21
        lines = done.stderr.splitlines()
        assert {line.split(": ")[1] for line in lines} == above
        for line in lines:
            _, name, said = line.split(": ")
            error = float(said.split()[3])
            assert error == pytest.approx(errors[name], rel=2e-5)  # as rounded
        assert all(line.endswith("is above --at-most=0.155.") for line in lines)
        done, _ = self.rows(self.DENSE, SHIPPED, "--at-most", "0.2")
        assert done.stderr == ""

    @pytest.mark.parametrize("bound", ["nan", "inf"])
    def test_at_most_of_no_number(self, bound):
        done = run("compare", SHIPPED, SHIPPED, "--at-most", bound)
        # Newer releases of typer refuse nan by themselves, as a wrong usage.
        assert done.exit_code in (1, 2)
        assert "--at-most" in done.stderr
        assert done.stdout == ""

    def test_another_model(self, tmp_path):
        checkpoint = tiny.checkpoint()
        a = checkpoint.write(tmp_path / "a")
        del checkpoint.tensors["model.norm.weight"]
        checkpoint.tensors["model.[red]:smile:"] = np.ones(3, np.float16)
        head = checkpoint.tensors["lm_head.weight"]
        checkpoint.tensors["lm_head.weight"] = head[:7]
        b = checkpoint.write(tmp_path / "b")
        done, rows = self.rows(a, b, code=1)
        assert list(rows) == [tiny.MODULE]
        assert done.stdout.splitlines()[-3:] == [
            "only in A: model.norm.weight",
            "only in B: model.[red]:smile:",
            "other shape: lm_head.weight, 8x64 in A and 7x64 in B",
        ]
        assert done.stderr == (
            f"qjax: {a} and {b} are not the same model: tensors only in the one: 1, "
            "only in the other: 1, of other shapes: 1.\n"
        )
        found = json.loads(run("compare", a, b, "--json").stdout)
        assert found["only_in_a"] == ["model.norm.weight"]
        assert found["only_in_b"] == ["model.[red]:smile:"]
        assert found["other_shapes"] == [
            {"name": "lm_head.weight", "a": [8, 64], "b": [7, 64]}
        ]

    def test_not_finite(self, tmp_path):
        checkpoint = tiny.checkpoint()
        a = checkpoint.write(tmp_path / "a")
        checkpoint.tensors["model.norm.weight"][2] = np.nan
        b = checkpoint.write(tmp_path / "b")
        done, rows = self.rows(a, b, code=1)
        assert rows["model.norm.weight"][-3:] == ["inf", "-inf", "inf"]
        note = "NaN or infinite: model.norm.weight, 0 numbers in A and 1 in B"
        assert done.stdout.splitlines()[-1] == note
        assert done.stderr == (
            "qjax: model.norm.weight: the relative error inf is due to numbers that "
            "are NaN or infinite.\n"
        )
        found = json.loads(run("compare", a, b, "--json").stdout)
        (row,) = (r for r in found["dense"] if r["name"] == "model.norm.weight")
        assert (row["relative_error"], row["b"]["not_finite"]) == (None, 1)
        assert found["total"]["relative_error"] is None
        # Where both have it, nothing differs.
        done, _ = self.rows(b, b, "--at-most", "0")
        assert note.replace("0 numbers", "1 numbers") in done.stdout

    def test_gguf(self):
        file = DATA / "llama_gguf_q4_k_m" / "model.gguf"
        _, rows = self.rows(file, file, "--at-most", "0")
        held = ["gguf", "Q4_K", "4.500"]
        assert rows["blk.0.ffn_up"] == [*held, *held, "0", "inf", "0", "all"]
        text = fails("compare", self.DENSE, file)
        assert text.startswith(f"qjax: no matrix is in both {self.DENSE} and {file}: ")
        assert "Compare it with a GGUF file of the dense model" in text


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_tables_on_a_terminal_are_not_cut_off(monkeypatch, capsys, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    directories = {"inspect": [SHIPPED], "compare": [DATA / "llama_bf16", SHIPPED]}
    arguments = [command, *map(str, directories[command])]
    app(arguments, standalone_mode=False)
    text = re.sub(r"\x1b\[[0-9]*m", "", capsys.readouterr().out)
    assert "…" not in text
    assert " 4.206" in text
    # Where 60 are too few for the numbers alone, the terminal wraps lines.
    assert max(map(len, text.splitlines())) <= max(columns, 80)
    name = UPS if command == "inspect" else UP
    assert (name in text) == (columns == 200)


class TestProgress:
    """Every command goes through all bytes of the checkpoint, and says so."""

    @pytest.fixture
    def bars(self, monkeypatch):
        """Label, total and steps of every bar."""
        bars = []

        @contextlib.contextmanager
        def bar(total, label="Loading weights"):
            bars.append((label, total, []))
            yield bars[-1][2].append

        monkeypatch.setattr(progress, "bar", bar)
        return bars

    @pytest.mark.parametrize(
        ("command", "labels"),
        [
            ("inspect", ["Loading weights"]),
            ("verify", ["Checking weights"]),
            ("convert", ["Checking weights", "Writing weights"]),
        ],
    )
    def test_goes_through_all_bytes(self, tmp_path, bars, command, labels):
        rest = [tmp_path / "x", "--to", "gptq_v2"] if command == "convert" else []
        succeeds(command, AWQ, *rest)
        size = sum(part.nbytes for part in modules.open_parts(AWQ).values())
        assert [label for label, _, _ in bars] == labels
        for _, total, steps in bars:
            assert total == sum(steps) == size
            assert len(steps) == 30

    def test_compare_goes_through_both(self, bars):
        succeeds("compare", AWQ, DATA / "llama_bf16")
        sizes = [
            sum(part.nbytes for part in modules.open_parts(path).values())
            for path in (AWQ, DATA / "llama_bf16")
        ]
        ((label, total, steps),) = bars
        assert label == "Comparing weights"
        assert total == sum(steps) == sum(sizes)
        assert len(steps) == 30

    def test_what_is_there_already_counts(self, tmp_path, bars, monkeypatch):
        fill = placing.fill
        monkeypatch.setattr(placing, "fill", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.convert(AWQ, tmp_path / "x", format="gptq")
        monkeypatch.setattr(placing, "fill", fill)
        bars.clear()
        checkpoints.convert(AWQ, tmp_path / "x", format="gptq")
        assert all(total == sum(steps) for _, total, steps in bars)


def assert_same_model(directories, name):
    """The same logits, close to those of the tool that quantized the model."""
    reference = arrays(DATA / name / "reference.npz")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = [logits(path, reference["prompt_ids"]) for path in directories]
    for one in found:
        chex.assert_trees_all_equal(one, found[0])
        # Float32 against float32: the order of summation is all that differs.
        chex.assert_trees_all_close(one, reference["prompt_logits"], atol=2e-4, rtol=0)


def logits(path, ids):
    graph, state = nnx.split(model.load(path))
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)
