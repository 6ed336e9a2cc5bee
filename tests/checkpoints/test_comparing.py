"""What `compare` says of two checkpoints, beside NumPy's float64 and the upstreams."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.checkpoints import comparing
from qjax.checkpoints.comparing import compare
from qjax.checkpoints.differences import Held, total
from tests import oracle
from tests.checkpoints import tiny
from tests.checkpoints.assembled import DIALECTS
from tests.checkpoints.tiny import GROUP, MODULE, K, N
from tests.goldens import arrays

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "llm" / "checkpoint"
DATA = ROOT / "tests" / "data"
NORM = "model.norm.weight"
NAN, INF = np.nan, np.inf


def dense(path, **tensors):
    """A dense directory; names have "__" where those of tensors have dots."""
    named = {name.replace("__", "."): array for name, array in tensors.items()}
    return tiny.Checkpoint(tensors=named, config={"model_type": "llama"}).write(path)


def tensors_of(checkpoint):
    """A dense one: the same, but ``[n, k]`` noise in the place of the matrix."""
    rng = np.random.default_rng(2)
    rest = {n: t for n, t in checkpoint.tensors.items() if "q_proj" not in n}
    noise = rng.standard_normal((N, K)).astype(np.float16)
    bias = checkpoint.tensors[f"{MODULE}.bias"]
    return rest | {f"{MODULE}.weight": noise, f"{MODULE}.bias": bias}


def weight_of(tensors):
    """The float64 ``[k, n]`` of GPTQ tensors whose zeros are all stored as 7."""
    codes = oracle.unpack(tensors["qweight"], tiny.BITS).astype(np.float64)
    return (codes - 8) * tensors["scales"].astype(np.float64)[tensors["g_idx"]]


def entry(found, name=MODULE):
    (one,) = (one for one in found.tensors if one.name == name)
    return one


class TestAgainstNumpy:
    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("n", [N, K], ids=["oblong", "square"])
    def test_a_quantized_matrix_and_its_dense_twin(self, tmp_path, act_order, n):
        packed = tiny.matrix(n=n)
        if act_order:
            packed["g_idx"] = np.arange(K, dtype=np.int32)[::-1] // GROUP
        checkpoint = tiny.checkpoint()
        checkpoint.tensors = {f"{MODULE}.{key}": t for key, t in packed.items()}
        quantized = checkpoint.write(tmp_path / "quantized")
        noise = np.random.default_rng(2).standard_normal((n, K)).astype(np.float16)
        other = dense(tmp_path / "dense", **{f"{MODULE}.weight": noise})
        wide, w = noise.T.astype(np.float64), weight_of(packed)

        forth = compare(other, quantized)
        assert forth.is_one_model
        (one,) = forth.tensors
        assert (one.name, one.shape, one.weights) == (MODULE, (K, n), K * n)
        # Scales of 16 bits times codes of 4 are exact in float32.
        assert one.lost == pytest.approx(((wide - w) ** 2).sum(), rel=1e-13)
        assert one.energy == pytest.approx((wide**2).sum(), rel=1e-13)
        assert one.largest == abs(wide - w).max()
        relative = np.linalg.norm(wide - w) / np.linalg.norm(wide)
        assert one.relative_error == pytest.approx(relative, rel=1e-13)
        assert one.snr_db == pytest.approx(-20 * np.log10(relative), rel=1e-13)
        assert not one.same_values
        assert one.same_codes is None
        held = {"is_quantized": False, "bits": 16, "nbytes": 2 * K * n, "not_finite": 0}
        assert one.a == Held(format="float16", **held)
        nbytes = sum(array.nbytes for array in packed.values())
        held |= {"is_quantized": True, "bits": 4, "nbytes": nbytes}
        assert one.b == Held(format="gptq", **held)
        assert one.bits_per_weight == (16, 8 * nbytes / (K * n))

        (back,) = compare(quantized, other).tensors
        assert (back.a, back.b, back.lost) == (one.b, one.a, one.lost)
        assert back.energy == pytest.approx((w**2).sum(), rel=1e-13)

    def test_dense_tensors_of_other_dtypes(self, tmp_path):
        rng = np.random.default_rng(3)
        w = rng.standard_normal((5, 7)).astype(np.float32)
        short = w.astype(ml_dtypes.bfloat16)
        rest = {"norm.weight": w[0], "one": np.array(2, np.float32)}
        a = dense(tmp_path / "a", up__weight=w, **rest)
        b = dense(tmp_path / "b", up__weight=short, **rest)
        found = compare(a, b)
        up = entry(found, "up.weight")
        off = w.astype(np.float64) - short.astype(np.float64)
        assert up.lost == pytest.approx((off**2).sum(), rel=1e-13)
        assert up.largest == abs(off).max()
        assert (up.a.format, up.a.bits) == ("float32", 32)
        assert (up.b.format, up.b.bits) == ("bfloat16", 16)
        assert not up.is_quantized
        for name, shape in (("norm.weight", (7,)), ("one", ())):
            one = entry(found, name)
            assert (one.shape, one.same_values, one.relative_error) == (shape, True, 0)
            assert one.snr_db == INF

    def test_runs_and_chunks_come_to_the_same(self, tmp_path, monkeypatch):
        rng = np.random.default_rng(4)
        w, other = rng.standard_normal((2, 11, 3, 5)).astype(np.float32)
        a, b = (
            dense(tmp_path / "a", up__weight=w),
            dense(tmp_path / "b", up__weight=other),
        )
        (whole,) = compare(a, b).tensors
        reads = []
        read = comparing.Stored.read
        monkeypatch.setattr(
            comparing.Stored, "read", lambda one: reads.append(one.shape) or read(one)
        )
        monkeypatch.setattr(comparing, "_RUN", 40)
        monkeypatch.setattr(comparing, "_CHUNK", 7)
        (one,) = compare(a, b).tensors
        assert set(reads) == {(2, 3, 5), (1, 3, 5)}
        assert len(reads) == 12
        close = dataclasses.asdict(whole)
        for name in ("lost", "energy"):
            assert getattr(one, name) == pytest.approx(close[name], rel=1e-13)
        assert (one.largest, one.shape) == (whole.largest, whole.shape)

    def test_totals_are_of_all_numbers(self, tmp_path):
        rng = np.random.default_rng(5)
        w = rng.standard_normal((2, 4, 6)).astype(np.float32)
        a = dense(tmp_path / "a", x__weight=w[0], y__weight=w[1][:2])
        b = dense(tmp_path / "b", x__weight=w[0], y__weight=w[1][2:])
        found = compare(a, b)
        both = np.concatenate([w[0], w[1][:2]]).astype(np.float64)
        lost = np.linalg.norm(w[1][:2].astype(np.float64) - w[1][2:])
        assert (found.total.count, found.total.same) == (2, 1)
        assert (found.total.weights, found.total.nbytes) == (36, (144, 144))
        assert found.total.bits_per_weight == (32, 32)
        relative = lost / np.linalg.norm(both)
        assert found.total.relative_error == pytest.approx(relative, rel=1e-12)
        assert found.total == total(found.tensors)

    def test_of_nothing(self, tmp_path):
        assert total([]).bits_per_weight is None
        assert total([]).relative_error == 0
        path = dense(
            tmp_path / "a",
            x__weight=np.zeros((2, 0), np.float32),
            y__weight=np.zeros((0, 2), np.float32),
        )
        for one in compare(path, path).tensors:
            assert (one.relative_error, one.bits_per_weight) == (0, None)
            assert one.same_values


class TestAgainstUpstream:
    @pytest.mark.parametrize(
        ("name", "directory"),
        [
            ("llama_gptq4_g128_actorder", SHIPPED),
            ("llama_gptq3_g64", None),
            ("llama_ct_w4a16_g128", None),
            ("llama_nf4_dq", None),
        ],
    )
    def test_errors_of_whole_models(self, name, directory):
        """Each tool's own error, of the weights that it dequantized itself."""
        reference = arrays(DATA / name / "reference.npz")
        found = compare(DATA / "llama_bf16", directory or DATA / name)
        assert found.is_one_model
        matrices = [one for one in found.tensors if one.is_quantized]
        assert len(matrices) == 21
        for one in matrices:
            wanted = reference[f"relerr/{one.name}.weight"]
            # compressed-tensors rounds the weight to bfloat16; all add in float32.
            rel = 1e-4 if "_ct_" in name else 1e-5
            assert one.relative_error == pytest.approx(float(wanted), rel=rel)

    @pytest.mark.parametrize("name", DIALECTS)
    def test_every_dialect_against_upstreams_weight(self, name, tmp_path):
        made = DIALECTS[name]()
        quantized = made.checkpoint.write(tmp_path / "quantized")
        parts = checkpoints.modules.open_parts(quantized)
        (module,) = (n for n, p in parts.items() if isinstance(p, comparing.Matrix))
        # gpt-oss has dense experts as they are multiplied, and others the transpose.
        stored = made.weight if name == "mxfp4" else made.weight.T
        twin = module if name == "mxfp4" else f"{module}.weight"
        other = dense(tmp_path / "dense", **{twin: np.ascontiguousarray(stored)})
        one = entry(compare(other, quantized), module)
        assert one.shape == made.weight.shape
        # Upstream rounds to 16 bits; its reference of gemv_fast is of other zeros.
        close = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-21}
        bound = 1e-2 if name == "awq gemv_fast" else close[made.weight.dtype.name]
        # Upstream rounds the product first, which is larger than the weight.
        bound *= 2 if name == "quanto qint4" else 1
        assert one.relative_error < bound
        assert one.a.bits > one.b.bits


class TestConversions:
    @pytest.mark.parametrize(
        ("source", "format_"),
        [
            (SHIPPED, "compressed-tensors"),
            (DATA / "llama_awq4_g128", "gptq_v2"),
            (DATA / "llama_gptq3_g64", "gptq_p"),
        ],
        ids=str,
    )
    def test_nothing_differs(self, tmp_path, source, format_):
        checkpoints.convert(source, tmp_path / "x", format=format_)
        found = compare(source, tmp_path / "x")
        assert found.is_one_model
        assert [one.name for one in found.tensors] == list(checkpoints.lazy(source))
        for one in found.tensors:
            assert one.same_values
            assert (one.relative_error, one.largest) == (0, 0)
            assert one.same_codes is (True if one.is_quantized else None)
        assert (found.total.relative_error, found.total.snr_db) == (0, INF)
        assert found.total.same == found.total.count == 30

    def test_rows_in_another_order(self, tmp_path):
        """EXL2 stores rows in an order of its own."""
        made = DIALECTS["exl2"]()
        a = made.checkpoint.write(tmp_path / "a")
        (w,) = (
            w
            for w in checkpoints.load(a, prepare=False).values()
            if hasattr(w, "words")
        )
        # Two rows of one group change places, and so do their inputs.
        codes = [qjax.tensor.segment_codes(w, i) for i in range(len(w.segments))]
        codes[0] = codes[0].at[jnp.array([3, 5])].set(codes[0][jnp.array([5, 3])])
        words = [
            w.layout.pack(part, segment.bits)
            for part, segment in zip(codes, w.segments, strict=True)
        ]
        order = w.order.at[jnp.array([3, 5])].set(w.order[jnp.array([5, 3])])
        moved = dataclasses.replace(w, words=tuple(words), order=order)
        assert not np.array_equal(moved.numpy(), w.numpy())
        norm = jnp.ones(4)
        tensors = {MODULE: moved, NORM: norm}
        checkpoints.save(tmp_path / "b", tensors, {}, format="exl2")
        one = entry(compare(a, tmp_path / "b"))
        assert one.same_codes
        assert one.same_values

    def test_codes_without_their_scales(self, tmp_path):
        a, b = tiny.checkpoint(), tiny.checkpoint()
        b.tensors[f"{MODULE}.scales"] = b.tensors[f"{MODULE}.scales"] * np.float16(2)
        one = entry(compare(a.write(tmp_path / "a"), b.write(tmp_path / "b")))
        assert one.same_codes
        assert not one.same_values
        assert one.relative_error == 1
        b.tensors[f"{MODULE}.qweight"][0, 0] ^= 1
        one = entry(compare(tmp_path / "a", b.write(tmp_path / "c")))
        assert one.same_codes is False


class TestStacks:
    def stack(self, path, arrays):
        """A GGUF file as llama.cpp's own writer makes it."""
        writer = gguf.GGUFWriter(path, "llama")
        for name, (array, kind) in arrays.items():
            raw = array if kind is None else gguf.quantize(array, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def test_gguf_experts_and_embeddings(self, tmp_path):
        w = np.random.default_rng(6).standard_normal((3, 8, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        names = {"blk.0.ffn_up_exps.weight": w, "token_embd.weight": w[0]}
        a = self.stack(tmp_path / "a.gguf", {n: (w, None) for n, w in names.items()})
        b = self.stack(tmp_path / "b.gguf", {n: (w, kind) for n, w in names.items()})
        found = compare(a, b)
        assert found.is_one_model
        for name, w in names.items():
            one = entry(found, name.removesuffix(".weight"))
            assert one.shape == (*w.shape[:-2], 64, 8)
            near = gguf.dequantize(gguf.quantize(w, kind), kind).reshape(w.shape)
            off = w.astype(np.float64) - near
            relative = np.linalg.norm(off) / np.linalg.norm(w.astype(np.float64))
            assert one.relative_error == pytest.approx(relative, rel=1e-6)
            assert one.largest == abs(off).max()
            assert one.b.format == "gguf Q8_0"
        assert all(one.same_codes for one in compare(b, b).tensors)

    def test_a_code_of_the_last_matrix(self, tmp_path):
        w = np.random.default_rng(6).standard_normal((3, 8, 64)).astype(np.float32)
        kind, name = gguf.GGMLQuantizationType.Q8_0, "blk.0.ffn_up_exps.weight"
        a = self.stack(tmp_path / "a.gguf", {name: (w, kind)})
        data = bytearray(a.read_bytes())
        data[-1] ^= 1
        (tmp_path / "b.gguf").write_bytes(bytes(data))
        (one,) = compare(a, tmp_path / "b.gguf").tensors
        assert one.same_codes is False
        assert 0 < one.relative_error < 1e-2


def test_modules_that_store_the_transpose(tmp_path):
    """GPT-2 has dense ``[k, n]``, also of square matrices, which shapes do not tell."""
    name = "h.0.attn.c_proj"
    packed = tiny.matrix(n=K)
    quantization = tiny.checkpoint().config["quantization_config"]
    config = {"model_type": "gpt2"}
    tensors = {f"{name}.{key}": array for key, array in packed.items()}
    tiny.Checkpoint(tensors, config | {"quantization_config": quantization}).write(
        tmp_path / "quantized"
    )
    w = weight_of(packed).astype(np.float32)
    tiny.Checkpoint({f"{name}.weight": w}, config).write(tmp_path / "dense")
    assert compare(tmp_path / "dense", tmp_path / "quantized").total.same == 1


class TestWhatOnlyOneHas:
    def test_names(self, tmp_path):
        checkpoint = tiny.checkpoint()
        a = checkpoint.write(tmp_path / "a")
        others = tensors_of(checkpoint)
        del others[NORM], others[f"{MODULE}.bias"]
        w = np.ones((2, 2), np.float16)
        b = dense(tmp_path / "b", **others, **{"model.more.weight": w})
        found = compare(a, b)
        assert set(found.only_in_a) == {NORM, f"{MODULE}.bias"}
        assert found.only_in_b == ("model.more.weight",)
        assert not found.is_one_model
        assert {one.name for one in found.tensors} == {MODULE, "lm_head.weight"}
        back = compare(b, a)
        assert (back.only_in_a, back.only_in_b) == (found.only_in_b, found.only_in_a)

    def test_shapes(self, tmp_path):
        checkpoint = tiny.checkpoint()
        a = checkpoint.write(tmp_path / "a")
        others = tensors_of(checkpoint)
        others[f"{MODULE}.weight"] = others[f"{MODULE}.weight"].T.copy()
        others["lm_head.weight"] = others["lm_head.weight"][:7]
        found = compare(a, dense(tmp_path / "b", **others))
        assert found.other_shapes == {
            MODULE: ((K, N), (N, K)),
            "lm_head.weight": ((8, N), (7, N)),
        }
        assert not found.is_one_model
        assert {one.name for one in found.tensors} == {NORM, f"{MODULE}.bias"}
        # A vector cannot be turned.
        others[f"{MODULE}.weight"] = np.ones(K, np.float16)
        found = compare(a, dense(tmp_path / "c", **others))
        assert found.other_shapes[MODULE] == ((K, N), (K,))

    def test_no_matrix_in_both(self, tmp_path):
        file = DATA / "llama_gguf_q4_k_m" / "model.gguf"
        with pytest.raises(ValueError, match="no matrix is in both") as caught:
            compare(SHIPPED, file)
        text = str(caught.value)
        for piece in (SHIPPED, file, "'output'", "model.layers.0", "llama.cpp's names"):
            assert str(piece) in text
        a = dense(tmp_path / "a", x__weight=np.ones((2, 2), np.float16))
        shared = np.ones(2, np.float16)
        tensors = {"y.weight": np.ones((2, 2), np.float16), "norm.weight": shared}
        with pytest.raises(ValueError, match=r"such names as 'x\.weight', the other"):
            compare(a, dense(tmp_path / "b", **tensors))

    def test_errors_of_load(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
            compare(SHIPPED, tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"m\.gguf is not there"):
            compare(tmp_path / "m.gguf", SHIPPED)


class TestNotFinite:
    def one(self, tmp_path, w, other):
        arrays = {
            "a": np.array([w], np.float32),
            "b": np.array([other], np.float32),
        }
        for name, array in arrays.items():
            dense(
                tmp_path / name, x__weight=array, y__weight=np.ones((2, 2), np.float16)
            )
        found = compare(tmp_path / "a", tmp_path / "b")
        return entry(found, "x.weight"), found.total

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("at_b", [False, True])
    def test_of_one_side_does_not_vanish(self, tmp_path, bad, at_b):
        pair = ([1.0, 2.0], [bad, 2.0])
        one, of_all = self.one(tmp_path, *(pair if at_b else pair[::-1]))
        assert (one.a.not_finite, one.b.not_finite) == (1 - at_b, at_b)
        assert (one.relative_error, one.snr_db, one.largest) == (INF, -INF, INF)
        assert one.energy == (5 if at_b else 4)
        assert not one.same_values
        assert of_all.relative_error == INF

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_the_same_of_both(self, tmp_path, bad):
        one, _ = self.one(tmp_path, [bad, 3.0, 4.0], [bad, 3.0, 4.5])
        assert (one.a.not_finite, one.b.not_finite) == (1, 1)
        assert (one.lost, one.energy, one.largest) == (0.25, 25, 0.5)
        assert one.relative_error == 0.1

    def test_other_infinities(self, tmp_path):
        one, _ = self.one(tmp_path, [INF, 1.0], [-INF, 1.0])
        assert one.relative_error == INF

    @pytest.mark.parametrize(("other", "error"), [(0.0, 0), (0.5, INF)])
    def test_of_nothing(self, tmp_path, other, error):
        one, _ = self.one(tmp_path, [0.0, 0.0], [0.0, other])
        assert one.relative_error == error
        assert one.largest == other
        assert one.same_values == (error == 0)

    def test_numbers_whose_squares_float32_cannot_hold(self, tmp_path):
        one, _ = self.one(tmp_path, [1e30, 1e-30], [0.0, 1e-30])
        assert one.relative_error == pytest.approx(1, rel=1e-12)
        one, _ = self.one(tmp_path, [1e-30, 0.0], [2e-30, 0.0])
        assert one.relative_error == pytest.approx(1, rel=1e-6)


# As in test_memory.py.
COMPARE = """
import json, re, sys
from qjax import checkpoints

def status(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", status.read())[1])

checkpoints.compare(sys.argv[1], sys.argv[1])
before = status("VmRSS")
found = checkpoints.compare(sys.argv[2], sys.argv[3])
print(json.dumps([status("VmHWM") - before, found.total.same]))
"""


@pytest.mark.slow
def test_memory_holds_a_matrix_at_a_time(tmp_path, pytestconfig):
    size, count = 4096, 4
    matrix = tiny.matrix(0, size, size, group=128)
    quantization = tiny.checkpoint().config["quantization_config"] | {"group_size": 128}
    table = {"model.embed_tokens.weight": np.zeros((4 * size, size), np.float16)}
    packed = {f"{i}.up.{key}": v for i in range(count) for key, v in matrix.items()}
    config = {"quantization_config": quantization}
    tiny.Checkpoint(packed | table, config).write(tmp_path / "packed")
    w = np.zeros((size, size), np.float16)
    dense(tmp_path / "dense", **{f"{i}.up.weight": w for i in range(count)}, **table)
    tiny.checkpoint().write(tmp_path / "tiny")
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMPARE, str(tmp_path / "tiny")),
            *(str(tmp_path / "dense"), str(tmp_path / "packed")),
        ],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    for name in ("packed", "dense"):  # pytest keeps the folder for a while
        (tmp_path / name / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    peak, same = json.loads(done.stdout)
    assert same == 1
    # A matrix of float32 from codes and scales; all of them, or both tables, would be
    # four of them.
    assert peak < 3 * 4 * size**2
