"""GGUF files: those of llama.cpp and its writer load, and damaged ones are refused."""

import struct
from pathlib import Path

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import checkpoints
from qjax.checkpoints import matrices, modules
from qjax.formats.gguf import TYPES, to_tensors
from tests.goldens import load, names, same_bits

MODEL = Path(__file__).parents[1] / "data" / "llama_gguf_q4_k_m" / "model.gguf"
GOLDEN = {load(name)["meta"]["type"]: name for name in names("gguf")}


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(MODEL)


@pytest.fixture(scope="module")
def weights():
    return checkpoints.load(MODEL, prepare=False)


class TestFileOfLlamaCpp:
    """What llama.cpp quantized and wrote, beside what the package gguf reads of it."""

    def test_tensors(self, reader, weights):
        assert len(weights) == len(reader.tensors) == 30
        types = set()
        for tensor in reader.tensors:
            types.add(tensor.tensor_type.name)
            if tensor.tensor_type.name == "F32":
                same_bits(np.asarray(weights[tensor.name]), np.array(tensor.data))
                continue
            w = weights[tensor.name.removesuffix(".weight")]
            assert w.shape == tuple(tensor.shape)
            wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
            same_bits(np.asarray(qjax.dequantize(w)).T, wanted)
            written = np.asarray(to_tensors(w)["weight"])
            same_bits(written.reshape(tensor.data.shape), np.array(tensor.data))
        assert types == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}

    def test_metadata(self, reader):
        metadata = checkpoints.read_metadata(MODEL)
        theirs = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        assert metadata == theirs
        assert len(metadata["tokenizer.ggml.tokens"]) == 512

    def test_is_sound(self):
        assert checkpoints.verify(MODEL) == []

    def test_streams_in_the_order_of_the_file(self, reader):
        found = list(checkpoints.lazy(str(MODEL), prepare=False))
        wanted = [tensor.name for tensor in reader.tensors]
        assert [name.removesuffix(".weight") for name in found] == [
            name.removesuffix(".weight") for name in wanted
        ]

    @pytest.mark.parametrize("spec", [jax.P(None, "model"), jax.P("model", None)])
    def test_is_read_in_pieces(self, spec, weights, monkeypatch):
        """Half the blocks on each device, and no others are read."""
        mesh = jax.make_mesh((2,), ("model",))
        read = []
        whole = matrices.Matrix.read
        monkeypatch.setattr(
            matrices.Matrix, "read", lambda one: read.append(one.nbytes) or whole(one)
        )
        name = "blk.0.ffn_down"

        def place(found):
            cut = spec if found == name else jax.P()
            return jax.sharding.NamedSharding(mesh, cut)

        parts = {name: modules.open_parts(MODEL)[name]}
        monkeypatch.setattr(modules, "open_parts", lambda _: parts)
        w = checkpoints.load(MODEL, sharding=place)[name]
        assert read == [parts[name].nbytes // 2] * 2
        same_bits(qjax.dequantize(w), qjax.dequantize(weights[name]))

    def test_a_block_is_not_cut(self, weights):
        """K-quants of 256 inputs have one along k, and are read whole."""
        mesh = jax.make_mesh((2,), ("model",))
        name, wanted = "blk.0.attn_output", jax.P("model")

        def place(found):
            cut = wanted if found == name else jax.P()
            return jax.sharding.NamedSharding(mesh, cut)

        w = checkpoints.lazy(MODEL, sharding=place)[name]
        assert w.words[0].sharding.spec[0] == "model"
        same_bits(qjax.dequantize(w), qjax.dequantize(weights[name]))


@pytest.mark.parametrize(
    ("spec", "pieces"),
    [
        (jax.P("a"), 2),
        (jax.P(None, "a"), 2),
        (jax.P("a", None, "b"), 4),
        (jax.P("a", "b"), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Q4_0", "NVFP4"])
def test_stacks_are_cut(kind, spec, pieces, tmp_path, monkeypatch):
    """Read by themselves: shares of the matrices, and blocks of them."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    size = {"Q4_0": 18, "NVFP4": 36}[kind]
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (4, 64, 4, size), dtype=np.uint8)
    held = {"e.weight": blocks.reshape(4, 64, -1)}
    if kind == "Q4_0":
        blocks[..., :2] = np.float16([0.5]).view(np.uint8)
    else:  # A number of its own for each matrix.
        blocks[..., :4] = 60
        held["e.scale"] = np.array([1, 2, 3, 4], np.float32)
    file = write(tmp_path / "m.gguf", held, {"e.weight": kind})
    where = jax.sharding.NamedSharding(mesh, spec)
    readings, read = [], matrices.Matrix.read
    monkeypatch.setattr(
        matrices.Matrix, "read", lambda one: readings.append(one.nbytes) or read(one)
    )
    found = checkpoints.load(file, sharding=lambda _: where)["e"]
    by_matrix = 2 if spec[0] else 1
    beside = 0 if kind == "Q4_0" else 16 // by_matrix
    assert readings == [blocks.nbytes // pieces + beside] * pieces
    whole = checkpoints.load(file)["e"]
    expected = qjax.shard(qjax.prepare(whole, layout=found.layout), mesh, spec)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    same_bits(qjax.dequantize(found), qjax.dequantize(whole))


def write(path: Path, tensors: dict, kinds: dict | None = None, **more) -> Path:
    """A file of llama.cpp's own writer; what ``kinds`` names are bytes of blocks."""
    writer = gguf.GGUFWriter(path, "llama", **more)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(
            name,
            array,
            raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_every_type_and_stacks_of_experts(tmp_path):
    tensors, kinds = {}, {}
    unwritten = GOLDEN.keys() - gguf.GGMLQuantizationType.__members__.keys()
    assert unwritten == {"Q2_0"}  # newer than llama.cpp's own writer here
    written = {kind: GOLDEN[kind] for kind in GOLDEN.keys() - unwritten}
    for kind, name in written.items():
        raw = load(name)["raw"]
        tensors[f"{kind}.weight"] = raw.reshape(len(raw), -1)
        tensors[f"{kind}.exps"] = np.stack([raw, raw[::-1]]).reshape(2, len(raw), -1)
        kinds |= {f"{kind}.weight": kind, f"{kind}.exps": kind}
    tensors |= {
        "norm.weight": np.arange(5, dtype=np.float32),
        "half.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "short.weight": np.arange(6, dtype=np.uint16).reshape(2, 3),
    }
    tensors["short.weight"] = tensors["short.weight"].view(np.uint8)
    path = write(tmp_path / "a.gguf", tensors, kinds | {"short.weight": "BF16"})
    weights = checkpoints.load(path, prepare=False)
    for kind, name in written.items():
        wanted = load(name)["out_dequant"]
        # The floats of NVFP4 have a minus zero, which ggml has not.
        same = np.testing.assert_array_equal if kind == "NVFP4" else same_bits
        # A name without ".weight" stays.
        stack = weights[f"{kind}.exps"]
        assert (stack.batch, weights[kind].shape) == ((2,), wanted.T.shape)
        same(qjax.dequantize(weights[kind]), wanted.T)
        same(qjax.dequantize(stack)[1], wanted[::-1].T)
    assert weights["norm.weight"].dtype == jnp.float32
    assert (weights["half.weight"].shape, weights["half.weight"].dtype) == (
        (2, 3),
        jnp.float16,
    )
    short = np.asarray(weights["short.weight"])
    assert short.dtype == jnp.bfloat16
    assert (short.view(np.uint16) == np.arange(6).reshape(2, 3)).all()
    assert checkpoints.verify(path) == []


def test_scales_of_nvfp4(tmp_path):
    """They go into their matrices, stacks too; elsewhere they are refused."""
    data = load(GOLDEN["NVFP4"])
    raw = data["raw"].reshape(3, -1)
    tensors = {
        "a.weight": raw,
        "a.scale": np.array([0.5], np.float32),
        "b.weight": np.stack([raw, raw]),
        "b.scale": np.array([2, 4], np.float32),
        "b.input_scale": np.array([1, 1], np.float32),
        "norm.weight": np.ones(4, np.float32),
        "norm.scale": np.ones(1, np.float32),
    }
    kinds = {"a.weight": "NVFP4", "b.weight": "NVFP4"}
    path = write(tmp_path / "a.gguf", tensors, kinds)
    weights = checkpoints.load(path)
    assert [*weights] == ["a", "b", "b.input_scale", "norm.weight", "norm.scale"]
    wanted = data["out_dequant"].T
    np.testing.assert_array_equal(qjax.dequantize(weights["a"]), wanted / 2)
    np.testing.assert_array_equal(qjax.dequantize(weights["b"])[1], wanted * 4)
    blocks = np.zeros((3, 18), np.uint8)
    other = write(
        tmp_path / "b.gguf",
        tensors | {"a.weight": blocks},
        {"a.weight": "Q4_0"} | {"b.weight": "NVFP4"},
    )
    (fault,) = checkpoints.verify(other)
    assert "a: scale beside a weight of Q4_0 is not read, but of NVFP4" in str(fault)
    with pytest.raises(ValueError, match="scale beside a weight of Q4_0"):
        checkpoints.load(other)


def test_kinds_of_metadata(tmp_path):
    values = {
        "add_uint8": 255,
        "add_int8": -128,
        "add_uint16": 65535,
        "add_int16": -32768,
        "add_uint32": 2**32 - 1,
        "add_int32": -(2**31),
        "add_uint64": 2**64 - 1,
        "add_int64": -(2**63),
        "add_float32": 0.5,
        "add_float64": 1e300,
        "add_bool": True,
        "add_string": "größer",
        "add_array": [1, 2, 3],
    }
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for add, value in values.items():
        getattr(writer, add)(add, value)
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("flags", [True, False])
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {"general.architecture": "llama", "general.alignment": 64}
    expected |= values | {"texts": ["a", "", "é"], "flags": [True, False]}
    assert checkpoints.read_metadata(tmp_path / "a.gguf") == expected
    assert checkpoints.load(tmp_path / "a.gguf")["x"].tolist() == [1, 1, 1]


class TestSplitFiles:
    """The shards of a model that llama.cpp has split."""

    @pytest.fixture
    def shards(self, tmp_path) -> list[Path]:
        tensors = {f"blk.{i}.norm": np.full(4, i, np.float32) for i in range(5)}
        write(tmp_path / "m.gguf", tensors, split_max_tensors=2)
        files = sorted(tmp_path.iterdir())
        assert [file.name[-20:] for file in files] == [
            f"-{i:05}-of-00003.gguf" for i in (1, 2, 3)
        ]
        return files

    def test_any_of_them_is_the_model(self, shards):
        for file in shards:
            weights = checkpoints.load(file)
            assert [int(w[0]) for w in weights.values()] == [0, 1, 2, 3, 4]
            assert checkpoints.verify(file) == []
        assert checkpoints.read_metadata(shards[0])["split.count"] == 3

    def test_merged_again(self, tmp_path):
        merged = made(entries=[entry("split.count", 2, struct.pack("<H", 0))])
        (tmp_path / "merged.gguf").write_bytes(merged)
        assert [*checkpoints.load(tmp_path / "merged.gguf")] == ["a"]

    def test_a_missing_one(self, shards):
        shards[1].unlink()
        with pytest.raises(
            FileNotFoundError, match=r"m-00002-of-00003.gguf is missing"
        ):
            checkpoints.load(shards[0])

    def test_another_name(self, shards, refuses):
        lone = shards[0].rename(shards[0].with_name("model.gguf"))
        with refuses(
            "model.gguf: split.count=3, and so its name must end in -00001-of-"
        ):
            checkpoints.load(lone)

    def test_the_wrong_one(self, shards, refuses):
        shards[1].write_bytes(shards[2].read_bytes())
        with refuses("m-00002-of-00003.gguf: split.no and split.count are (2, 3) and"):
            checkpoints.load(shards[0])

    def test_tensors_that_are_there_twice(self, shards, refuses):
        shards[1].write_bytes(
            shards[1].read_bytes().replace(b"blk.2.norm", b"blk.1.norm")
        )
        with refuses("m-00002-of-00003.gguf: blk.1.norm is in "):
            checkpoints.load(shards[0])

    def test_another_count_of_tensors(self, shards, refuses):
        found = shards[0].read_bytes()
        key = b"split.tensors.count"
        begin = found.index(key) + len(key) + 4
        shards[0].write_bytes(found[:begin] + struct.pack("<i", 7) + found[begin + 4 :])
        with refuses("split.tensors.count=7, but the 3 files have 5 tensors"):
            checkpoints.load(shards[2])


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    """One of the list of tensors; the shape as NumPy has it."""
    sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def made(
    infos=None,
    entries=(),
    *,
    magic=b"GGUF",
    version=3,
    counts=None,
    data=64,
) -> bytes:
    """A file, byte by byte."""
    infos = [info("a")] if infos is None else infos
    counts = counts or (len(infos), len(entries))
    header = magic + struct.pack("<IQQ", version, *counts)
    header += b"".join(entries) + b"".join(infos)
    return header + bytes(-len(header) % 32) + bytes(data)


Q8_0, Q4_K = TYPES["Q8_0"].number, TYPES["Q4_K"].number
DAMAGED = {
    "empty": (b"", "is empty"),
    "short": (b"GG", "its header does not end before byte 2"),
    "magic": (
        made(magic=b"GGML"),
        "it begins with b'GGML' and must begin with b'GGUF'",
    ),
    "version 1": (made(version=1), "version=1 must be 2 or 3, little-endian"),
    "big-endian": (made(version=3 << 24), "version=50331648 must be 2 or 3"),
    "tensors": (made(counts=(2**60, 0)), "1152921504606846976 tensors do not fit"),
    "entries": (made(counts=(1, 2**60)), "1152921504606846976 entries do not fit"),
    "cut in the list": (made()[:40], "1 tensors do not fit into its 40 bytes"),
    "cut in the weights": (made()[:-50], "a ends at byte 80 of a file of 78"),
    "length of a name": (
        made(infos=[u64(2**63) + bytes(64)]),
        "its header does not end before",
    ),
    "length of a key": (
        made(entries=[u64(2**40) + bytes(64)]),
        "its header does not end before",
    ),
    "no UTF-8": (made(entries=[entry("k", 8, text(b"\xff"))]), "codec can't decode"),
    "kind": (made(entries=[entry("k", 13, bytes(8))]), "'k' is of kind 13"),
    "items": (
        made(entries=[entry("k", 9, u32(4) + u64(2**61))]),
        "2305843009213693952 items of 'k' do not fit",
    ),
    "strings": (
        made(entries=[entry("k", 9, u32(8) + u64(2**61))]),
        "2305843009213693952 items of 'k' do not fit",
    ),
    "arrays in arrays": (
        made(entries=[entry("k", 9, (u32(9) + u64(1)) * 9 + bytes(8))]),
        "'k' is of kind 9, 4 arrays deep",
    ),
    "key twice": (
        made(entries=[entry("k", 4, u32(1)), entry("k", 4, u32(1))]),
        "the key 'k' is there twice",
    ),
    "alignment": (
        made(entries=[entry("general.alignment", 4, u32(48))]),
        "general.alignment=48 must be a power of two",
    ),
    "alignment 0": (
        made(entries=[entry("general.alignment", 4, u32(0))]),
        "general.alignment=0 must be a power of two",
    ),
    "alignment of another type": (
        made(entries=[entry("general.alignment", 8, text("32"))]),
        "general.alignment='32' must be a power of two",
    ),
    "old blocks": (
        made(entries=[entry("general.quantization_version", 4, u32(1))]),
        "general.quantization_version=1 must be 2",
    ),
    "split": (
        made(entries=[entry("split.count", 8, text("x"))]),
        "split.count='x' must be a number of files",
    ),
    "axes": (made(infos=[info("a", (1,) * 5)]), "'a' has 5 axes; 1 to 4 can be"),
    "no axes": (made(infos=[info("a", ()) + bytes(8)]), "'a' has 0 axes"),
    "many axes": (
        made(infos=[text("a") + u32(2**31) + bytes(32)]),
        "'a' has 2147483648 axes",
    ),
    "no elements": (
        made(infos=[info("a", (0, 4))]),
        "a: shape=(0, 4) must not be empty",
    ),
    "elements": (
        made(infos=[info("a", (2**40, 2**40))]),
        "a ends at byte 4835703278458516698824",
    ),
    "name of a path": (
        made(infos=[info("../a")]),
        "'../a' is not the name of a tensor",
    ),
    "name of nothing": (
        made(infos=[info("", (4, 4))]),
        "'' is not the name of a tensor",
    ),
    "name with a newline": (made(infos=[info("a\nb")]), "'a\\nb' is not the name"),
    "name twice": (
        made(infos=[info("a"), info("a", offset=32)]),
        "a is there twice",
    ),
    "quantized and dense": (
        made(infos=[info("a"), info("a.weight", (1, 32), Q8_0, 32)], data=128),
        "a.weight is there quantized and dense",
    ),
    "offset": (
        made(infos=[info("a", offset=8)]),
        "a: offset=8 must be a multiple of 32",
    ),
    "offset outside": (
        made(infos=[info("a", offset=2**62)]),
        "a ends at byte 4611686018427387984 of a file of 128",
    ),
    "overlap": (
        made(infos=[info("a", (12,)), info("b", offset=32)]),
        "b: offset=32 lies within a",
    ),
    "k": (
        made(infos=[info("a", (2, 128), Q4_K)]),
        "a: shape=(2, 128) must be [..., n, k], k a multiple of 256, as it is Q4_K",
    ),
    "a vector": (made(infos=[info("a", (32,), Q8_0)]), "must be [..., n, k], k a"),
    "unknown type": (made(infos=[info("a", kind=99)]), "type 99 (unknown) is not read"),
    "other blocks": (made(infos=[info("a", kind=15)]), "a: type 15 (Q8_K) is not read"),
    "old type": (made(infos=[info("a", kind=4)]), "a: type 4 (Q4_2) is not read; th"),
    "integers": (
        made(infos=[info("a.weight", kind=26)]),
        "a.weight.dtype=int32 must be float16, bfloat16 or float32",
    ),
    "infinite scales": (
        made(infos=[info("a", (1, 32), Q8_0)], data=0) + b"\xff" * 64,
        "a: weight's d must be finite",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path, refuses):
    data, message = DAMAGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with refuses(message):
        checkpoints.load(path)
    with refuses("m.gguf"):  # Every message names the file.
        checkpoints.load(path)


def test_verify_goes_on(tmp_path):
    """Every tensor that is wrong has its line; what is sound has none."""
    infos = [
        info("a", kind=16),
        info("b", offset=32),
        info("c", offset=8),
        info("d", offset=2**40),
        info("e", (1, 32), Q8_0, 64),
    ]
    (tmp_path / "m.gguf").write_bytes(made(infos=infos, data=64) + b"\xff" * 64)
    faults = checkpoints.verify(tmp_path / "m.gguf")
    assert [fault.split(": ")[1].split(" ")[0] for fault in faults] == list("acde")


SMALL = made(
    infos=[info("a.weight", (2, 32), Q8_0), info("b", (4,), offset=96)],
    entries=[
        entry("general.alignment", 4, u32(32)),
        entry("t", 9, u32(8) + u64(2) + text("x") + text("yz")),
        entry("s", 9, u32(5) + u64(2) + bytes(8)),
    ],
    data=128,
)


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    at=st.integers(0, len(SMALL) - 129),
    byte=st.integers(0, 255),
    end=st.integers(0, len(SMALL)) | st.just(len(SMALL)),
)
def test_any_damage_is_refused_or_harmless(at, byte, end, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes((SMALL[:at] + bytes([byte]) + SMALL[at + 1 :])[:end])
    try:
        parts = modules.open_parts(path)
    except ValueError as fault:
        assert "m.gguf" in str(fault)  # noqa: PT017
    else:
        for part in parts.values():
            for stored in getattr(part, "tensors", {"": part}).values():
                assert stored.offset + stored.nbytes <= end


class TestWhatIsNotDone:
    """A GGUF file is read, and nothing else."""

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"a\.gguf is not there"):
            checkpoints.load(tmp_path / "a.gguf")

    def test_convert(self, tmp_path, refuses):
        with refuses("model.gguf is a GGUF file, whose weights can be loaded, but not"):
            checkpoints.convert(MODEL, tmp_path / "new", format="gptq")
        with refuses("is a GGUF file"):
            checkpoints.quantize(
                MODEL, tmp_path / "new", format="gptq", rules=qjax.Spec()
            )
        assert not any(tmp_path.iterdir())

    def test_config(self):
        with pytest.raises(FileNotFoundError, match=r"config\.json, read_metadata giv"):
            checkpoints.read_config(MODEL)
