"""What the benchmarks compute beside times: operands, checks, roofs, processes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_decode  # noqa: E402
import gpu_engines  # noqa: E402
import gpu_matmul  # noqa: E402
import gpu_ours  # noqa: E402
import gpu_report  # noqa: E402
import gpu_serving  # noqa: E402
import gpu_weights  # noqa: E402
import harness  # noqa: E402

SERVER = """
import os, sys, time
sys.path.insert(0, {folder!r})
import harness

def answer(request):
    print("libraries print what they like")
    if request.get("die"):
        os._exit(3)
    time.sleep(request.get("sleep", 0))
    return {{"twice": 2 * request["value"], "mode": os.environ["MODE"]}}

assert sys.argv[1:] == ["--work", "some library"]
harness.serve(answer)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER.format(folder=str(ROOT / "benchmarks")))
    worker = harness.Worker(str(script), "some library", MODE="quiet")
    yield worker
    worker.end()


class TestWorker:
    def test_answers(self, worker):
        for value in (1, 2):
            assert worker.ask(value=value) == {"twice": 2 * value, "mode": "quiet"}

    def test_a_process_that_dies_is_an_error_and_no_hang(self, worker):
        for _ in range(2):
            with pytest.raises(harness.GoneError, match="status 3"):
                worker.ask(die=True)
        gone = {"some library": {"failed": "the process ended with status 3"}}
        assert gpu_matmul.ask(gpu_matmul.Process(worker), 5, value=1) == gone

    def test_a_process_that_hangs_is_ended(self, worker):
        with pytest.raises(harness.GoneError, match="no answer within 1 s"):
            worker.ask(1, value=1, sleep=60)
        with pytest.raises(harness.GoneError, match="status -9"):
            worker.ask(value=1)
        worker.restart()
        assert worker.ask(5, value=1)["twice"] == 2

    def test_imports_the_qjax_of_this_checkout(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        script = tmp_path / "server.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
            "import harness, importlib.util as u\n"
            "origins = [u.find_spec(n).origin for n in ('qjax', 'server')]\n"
            "harness.serve(lambda request: origins)\n"
        )
        worker = harness.Worker(str(script), "any")
        spec = importlib.util.find_spec("qjax")
        assert worker.ask() == [spec.origin, str(script)]
        worker.end()


class TestTime:
    def test_nothing_is_begun_that_may_not_fit(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
        done = []
        for seconds in harness.in_time([3, 1, 2, 1], harness.Clock(8.5)):
            done.append(seconds)
            now[0] += seconds
        # 2.5 seconds are left, and the longest took three.
        assert done == [3, 1, 2]

    def test_without_a_limit_all_is_done(self):
        assert list(harness.in_time([1, 2], harness.Clock(None))) == [1, 2]


def test_a_report_appears_whole(tmp_path):
    file = harness.write("name", {"a": 1}, tmp_path / "new")
    with pytest.raises(TypeError):
        harness.write("name", {"a": object()}, tmp_path / "new")
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(file.parent) == ["name.json"]


def test_versions_of_what_is_there():
    found = harness.versions(sys.executable, ["numpy", "no-such-package"])
    assert found == {"numpy": np.__version__}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_operands_stand_for_the_same_weight(bits, symmetric):
    codes = gpu_weights.Codes.random(256, 24, bits, symmetric=symmetric)
    w = gpu_ours.packed(codes, bits)
    weight = np.asarray(qjax.dequantize(w, "float32"), np.float64)
    chosen = gpu_weights.sampled(24)
    np.testing.assert_array_equal(weight[:, chosen], codes.columns)
    if symmetric:
        assert (codes.zero == 2 ** (bits - 1)).all()


def test_rows_are_exact_in_both_16_bit_floats():
    x = gpu_weights.rows(3, 4096)
    for dtype in ("float16", "bfloat16"):
        np.testing.assert_array_equal(
            np.asarray(x.astype(jax.numpy.dtype(dtype)), x.dtype), x
        )


LIBRARIES = [gpu_engines.dense_weights, *gpu_ours.OURS.values()]


@pytest.fixture(scope="module")
def weights():
    return {name: make for of in LIBRARIES for name, make in of(2048, 64).items()}


@pytest.mark.parametrize("name", [name for of in LIBRARIES for name in of(2048, 64)])
def test_engines_multiply_by_what_they_say(name, weights):
    weight = weights[name]()
    x = gpu_weights.rows(2, 2048)
    bound = weight.bind(x)
    assert gpu_serving.checked(bound.result(), x, weight) < weight.tolerance
    assert len(bound.time(2).seconds) == 2
    wide = {"dense bf16, XLA": 16, "qjax, EXL2 mix of 4.0 bits": 4}
    wide |= {f"qjax, {one.name}": one.bits for one in gpu_ours.FLOATS.values()}
    wide |= {f"qjax, {kind}": bits for kind, (bits, _) in gpu_ours.LEVELS.items()}
    bits = wide.get(name) or int(name.split()[1])
    assert weight.bits == bits
    # Codes, and at most 24 bits of scale and zero for 128 of them.
    parameters = {"qjax, FP8": 32 / 128, "qjax, MXFP4": 16 / 32}.get(name, 24 / 128)
    if name.split()[1] in gpu_ours.LEVELS:
        parameters = 2  # On a CPU, as float32.
    assert 0 <= 8 * weight.nbytes / (2048 * 64) - bits <= parameters


@pytest.mark.parametrize("factor", [0.9, np.nan])
def test_wrong_results_are_not_timed(factor, weights):
    weight = weights["qjax, 4 bits"]()
    x = gpu_weights.rows(2, 2048)
    result = weight.bind(x).result()
    with pytest.raises(ValueError, match="wrong result: relative error"):
        gpu_serving.checked(factor * result, x, weight)


RATES = {"bytes": 4e12, "operations": 8e14}


class TestJudgement:
    def test_floors(self):
        # 8.7 MB at 4 TB/s, and 2 * 4096**3 operations at 800 TFLOP/s.
        nbytes = 4096 * 4096 * 4.1875 / 8
        few = gpu_report.floor(nbytes, 1, 4096, 4096, RATES)
        assert few == pytest.approx(2.2, abs=0.01)
        many = gpu_report.floor(nbytes, 4096, 4096, 4096, RATES)
        assert many == pytest.approx(171.8, abs=0.1)

    def test_ratios(self):
        nbytes = 4096 * 4096 // 2
        results = {
            "dense bf16, XLA": {"us": 10.0, "bits": 16, "weight_bytes": 4 * nbytes},
            "dense bf16, cuBLAS": {"us": 9.0, "bits": 16, "weight_bytes": 4 * nbytes},
            "qjax, 4 bits": {"us": 3.0, "bits": 4, "weight_bytes": nbytes},
            "qjax, 2 bits": {"us": 2.0, "bits": 2, "weight_bytes": nbytes // 2},
            "A, 4 bits": {"us": 6.0, "bits": 4, "weight_bytes": nbytes},
            "B, 4 bits": {"us": 4.5, "bits": 4, "weight_bytes": nbytes},
            "C": {"failed": "RuntimeError: no"},
        }
        gpu_report.judge(results, (1, 4096, 4096), RATES)
        ours = results["qjax, 4 bits"]
        assert ours["against_dense"] == 3.0
        assert ours["against_best_peer"] == 1.5
        assert ours["floor_share"] == pytest.approx(0.7, abs=0.01)
        assert ours["gb_per_s"] == pytest.approx(2801, abs=1)
        assert "against_best_peer" not in results["qjax, 2 bits"]
        assert results["A, 4 bits"]["against_dense"] == 1.5
        for r in results.values():
            r.update({"spread_us": [1, 2], "error": 1e-3, "how": "one program"})
        text = gpu_report.table("M = 1", results)
        assert "| C | RuntimeError: no |" in text
        assert "| 3.00 | 1.50 |" in text


class Pretended:
    """A process that answers at once, and what it was asked."""

    def __init__(self, name, *failures):
        self.name, self.failures, self.asked = name, list(failures), []

    def send(self, **request):
        self.asked.append(request)

    def receive(self, within):
        match self.asked[-1]:
            case {"shape": _}:
                return {"engine": {"bits": 4, "weight_bytes": 100}}
            case {"m": _} if "the process" in (self.failures or [""])[0]:
                raise harness.GoneError(self.failures.pop())
            case {"m": _} if self.failures:
                return {"engine": {"failed": self.failures.pop()}}
            case {"m": _}:
                return {"engine": {"error": 1e-3}}
            case {"time": "engine"}:
                return {"seconds": [1e-6], "how": "one program"}

    def restart(self):
        self.asked.append("restart")


class TestProducts:
    def test_a_matrix_is_packed_once(self):
        worker = Pretended("qjax-4")
        products = gpu_matmul.Products([gpu_matmul.Process(worker)], 2, 1)
        for shape in ((1, 64, 32), (8, 64, 32), (8, 32, 64)):
            found = products(*shape)["engine"]
        assert found == {
            "bits": 4,
            "weight_bytes": 100,
            "error": 1e-3,
            "how": "one program",
            "us": pytest.approx(1),
            "spread_us": pytest.approx([1, 1]),
        }
        assert [r["shape"] for r in worker.asked if "shape" in r] == [
            (64, 32),
            (32, 64),
        ]
        assert sum("time" in request for request in worker.asked) == 3 * 2

    @pytest.mark.parametrize(
        ("failure", "restarted"),
        [
            ("JaxRuntimeError: INTERNAL: CUDA error: an illegal address", True),
            ("the process ended with status -6", True),
            ("ValueError: wrong result: relative error 2e-01", False),
        ],
    )
    def test_a_lost_process_begins_anew(self, failure, restarted):
        worker = Pretended("qjax-4", failure)
        products = gpu_matmul.Products([gpu_matmul.Process(worker)], 1, 1)
        found = products(1, 64, 32)
        assert found["engine"]["failed"] == failure
        assert failure in gpu_report.table("M = 1", found)
        assert ("restart" in worker.asked) == restarted
        assert products(8, 64, 32)["engine"]["us"] == pytest.approx(1)
        packed = [r for r in worker.asked if r != "restart" and "shape" in r]
        assert len(packed) == 1 + restarted

    def test_what_does_not_pack_is_listed(self):
        class Absent(Pretended):
            def receive(self, within):
                return {"qwix": {"failed": "ModuleNotFoundError: no qwix"}}

        worker = Absent("qwix")
        products = gpu_matmul.Products([gpu_matmul.Process(worker)], 1, 1)
        found = products(1, 64, 32)
        assert found == {"qwix": {"failed": "ModuleNotFoundError: no qwix"}}
        assert len(worker.asked) == 1
        assert "no qwix" in gpu_report.table("M = 1", found)

    def test_launches_matter_for_few_rows_only(self):
        processes = [
            gpu_matmul.Process(Pretended("dense")),
            gpu_matmul.Process(Pretended("dense"), ", no graphs"),
        ]
        products = gpu_matmul.Products(processes, 1, 1)
        assert list(products(16, 64, 32)) == ["engine", "engine, no graphs"]
        assert list(products(17, 64, 32)) == ["engine"]


class TestDecode:
    def test_what_was_measured_is_kept(self, tmp_path):
        report = {"device": "", "warning": "", "results": {}}
        assert gpu_decode.save(report, tmp_path) is None
        report["results"]["4 bits"] = {"device": "NVIDIA H200"}
        file = gpu_decode.save(report, tmp_path)
        assert file.name == f"gpu_decode-nvidia-h200-jax{jax.__version__}.json"
        assert json.loads(file.read_text())["device"] == "NVIDIA H200"


# Says what it was called with. Decoding ends as `timeout` ends what takes too long, and
# tuning fails.
STUB = """\
#!/bin/sh
echo "$QJAX_TABLES" "$PYTHONPATH" "$@"
case "$*" in
*gpu_decode*) exit 124 ;;
*tune*) exit 3 ;;
esac
"""


class TestSession:
    def run(self, tmp_path, *arguments):
        python = tmp_path / "python"
        python.write_text(STUB)
        python.chmod(0o755)
        return subprocess.run(
            [ROOT / "scripts" / "gpu-session", *arguments],
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_no_step_stops_the_next(self, tmp_path):
        folder = tmp_path / "results"
        done = self.run(tmp_path, folder, "600")
        assert done.returncode == 1
        logs = {file.stem: file.read_text() for file in folder.iterdir()}
        assert sorted(logs) == ["decode", "kernels", "matmul", "tune"]
        assert all(text.startswith(f"{folder} {ROOT}") for text in logs.values())
        assert "tests/pallas/test_kernels.py --on-gpu" in logs["kernels"]
        # 45 % of the seconds that kernels left, and the last 20 of those are to spare.
        limit = int(re.search(r"matmul: at most (\d+) s", done.stdout)[1])
        assert 225 <= limit <= 270  # however slow the machine: 100 s are a lot
        assert logs["matmul"].endswith(f"--seconds {limit - 20}\n")
        outcomes = [line.split(" s  ") for line in done.stdout.splitlines()[-4:]]
        assert [(name.split()[0], said) for name, said in outcomes] == [
            ("kernels", "passed"),
            ("matmul", "passed"),
            ("decode", "out of time"),
            ("tune", "failed, status 3"),
        ]

    def test_nothing_begins_that_has_no_time(self, tmp_path):
        done = self.run(tmp_path, tmp_path / "results", "20")
        assert done.returncode == 1
        assert done.stdout.count("no time is left") == 4
        assert not list((tmp_path / "results").iterdir())

    def test_says_how_it_is_used(self, tmp_path):
        done = self.run(tmp_path)
        assert done.returncode == 2
        assert done.stderr == "usage: scripts/gpu-session FOLDER [SECONDS]\n"
