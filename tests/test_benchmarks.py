"""What the benchmarks compute beside times: operands, checks, roofs, processes."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_engines  # noqa: E402
import gpu_matmul  # noqa: E402
import harness  # noqa: E402

SERVER = """
import os, sys
sys.path.insert(0, {folder!r})
import harness

def answer(request):
    print("libraries print what they like")
    if request.get("die"):
        os._exit(3)
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
        assert gpu_matmul.ask(worker, value=1) == gone


def test_versions_of_what_is_there():
    found = harness.versions(sys.executable, ["numpy", "no-such-package"])
    assert found == {"numpy": np.__version__}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_operands_stand_for_the_same_weight(bits, symmetric):
    codes = gpu_engines.Codes.random(256, 24, bits, symmetric=symmetric)
    w = gpu_engines.packed(codes, bits)
    weight = np.asarray(qjax.dequantize(w, "float32"), np.float64)
    chosen = gpu_engines.sampled(24)
    np.testing.assert_array_equal(weight[:, chosen], codes.columns)
    if symmetric:
        assert (codes.zero == 2 ** (bits - 1)).all()


def test_rows_are_exact_in_both_16_bit_floats():
    x = gpu_engines.rows(3, 4096)
    for dtype in ("float16", "bfloat16"):
        np.testing.assert_array_equal(
            np.asarray(x.astype(jax.numpy.dtype(dtype)), x.dtype), x
        )


@pytest.fixture(scope="module")
def weights():
    return gpu_engines.jax_weights(2048, 64)


@pytest.mark.parametrize("name", list(gpu_engines.jax_weights(2048, 64)))
def test_engines_multiply_by_what_they_say(name, weights):
    weight = weights[name]()
    x = gpu_engines.rows(2, 2048)
    bound = weight.bind(x)
    assert gpu_matmul.checked(bound.result(), x, weight.columns) < 1e-2
    assert len(bound.time(2).seconds) == 2
    wide = {"dense bf16, XLA": 16, "qjax, EXL2 mix of 4.0 bits": 4}
    bits = wide.get(name) or int(name.split()[1])
    assert weight.bits == bits
    # Codes, and at most 24 bits of scale and zero for 128 of them.
    assert 0 <= 8 * weight.nbytes / (2048 * 64) - bits <= 24 / 128


@pytest.mark.parametrize("factor", [0.9, np.nan])
def test_wrong_results_are_not_timed(factor, weights):
    weight = weights["qjax, 4 bits"]()
    x = gpu_engines.rows(2, 2048)
    result = weight.bind(x).result()
    with pytest.raises(ValueError, match="wrong result: relative error"):
        gpu_matmul.checked(factor * result, x, weight.columns)


RATES = {"bytes": 4e12, "operations": 8e14}


class TestJudgement:
    def test_floors(self):
        # 8.7 MB at 4 TB/s, and 2 * 4096**3 operations at 800 TFLOP/s.
        nbytes = 4096 * 4096 * 4.1875 / 8
        few = gpu_matmul.floor(nbytes, 1, 4096, 4096, RATES)
        assert few == pytest.approx(2.2, abs=0.01)
        many = gpu_matmul.floor(nbytes, 4096, 4096, 4096, RATES)
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
        gpu_matmul.judge(results, (1, 4096, 4096), RATES)
        ours = results["qjax, 4 bits"]
        assert ours["against_dense"] == 3.0
        assert ours["against_best_peer"] == 1.5
        assert ours["floor_share"] == pytest.approx(0.7, abs=0.01)
        assert ours["gb_per_s"] == pytest.approx(2801, abs=1)
        assert "against_best_peer" not in results["qjax, 2 bits"]
        assert results["A, 4 bits"]["against_dense"] == 1.5
        for r in results.values():
            r.update({"spread_us": [1, 2], "error": 1e-3, "how": "one program"})
        text = gpu_matmul.table("M = 1", results)
        assert "| C | RuntimeError: no |" in text
        assert "| 3.00 | 1.50 |" in text
