"""Every way to be wrong is one clear error, raised before a weight is read.

A row of the table bends a tiny valid checkpoint and lists pieces of the message.
"""

import os

import numpy as np
import pytest

from qjax import checkpoints
from qjax.checkpoints.shards import Stored
from tests.checkpoints import tiny
from tests.checkpoints.bending import (
    INDEX,
    SINGLE,
    Case,
    add,
    assert_refused,
    both,
    configuration,
    drop,
    header,
    offset,
    put,
    quantization,
    remove,
    shards,
    weight_map,
    with_header,
    write,
)
from tests.checkpoints.tiny import MODULE, SHARDS

QWEIGHT = tiny.matrix()["qweight"]
SCALES = tiny.matrix()["scales"]
WRONG_GROUPS = np.arange(tiny.K, dtype=np.int32) // 8
NAN, INF = SCALES.copy(), SCALES.copy()
NAN[1, 3], INF[0, 0] = np.nan, np.inf
NORM = np.ones(4, np.float32)
ENTRY = '{"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}'
IN_FILE = f"{SINGLE}: {MODULE}: "
JSON_ERRORS = {
    "config.json is missing": Case(
        remove("config.json"), ("config.json is missing",), FileNotFoundError
    ),
    "config.json is cut": Case(
        write("config.json", lambda b: b[:-1]), ("config.json is not valid JSON",)
    ),
    "config.json is not UTF-8": Case(
        write("config.json", b'{"a": "\xff"}'),
        ("config.json is not valid JSON", "utf-8"),
    ),
    "config.json is a list": Case(
        write("config.json", b"[]"), ("config.json must hold a JSON object, not list",)
    ),
    "config.json is deep": Case(
        write("config.json", b"[" * 200_000), ("config.json nests too deeply",)
    ),
    "config.json is huge": Case(
        lambda c: c.after.append(lambda d: os.truncate(d / "config.json", 10**8 + 1)),
        ("config.json has 100000001 bytes",),
    ),
    "config.json says it twice": Case(
        write("config.json", b'{"bits": 4, "bits": 8}'),
        ("config.json", "'bits'", "twice"),
    ),
    "config.json has a long number": Case(
        write("config.json", b'{"a": ' + b"9" * 5000 + b"}"), ("config.json", "digits")
    ),
    "index is no JSON": Case(
        shards(write(INDEX, b"weights")), (f"{INDEX} is not valid JSON",)
    ),
    "index is empty": Case(shards(write(INDEX, b"{}")), (INDEX, "weight_map")),
    "index maps to a number": Case(
        shards(weight_map(lambda m: m.update({"a.b": 5}))),
        (INDEX, "weight_map['a.b']=5", "a .safetensors file"),
    ),
    "quantize_config.json is no JSON": Case(
        both(
            configuration(quantization_config=None), write("quantize_config.json", b"-")
        ),
        ("quantize_config.json is not valid JSON",),
    ),
}
FILE_ERRORS = {
    "no weights": Case(remove(SINGLE), (SINGLE, INDEX, "neither"), FileNotFoundError),
    "other weights": Case(
        both(remove(SINGLE), write("pytorch_model.bin", b"")),
        ("neither", "have ['pytorch_model.bin'], pickles that may run any code"),
        FileNotFoundError,
    ),
    "one of a set under another name": Case(
        both(remove(SINGLE), write("out-00001-of-00002.safetensors", b"")),
        ("neither", "leave one of ['out-00001-of-00002.safetensors'], or all of a"),
        FileNotFoundError,
    ),
    "several of other names": Case(
        both(
            remove(SINGLE),
            write("a.safetensors", b""),
            write("b.safetensors", b""),
        ),
        ("neither", "leave one of ['a.safetensors', 'b.safetensors']"),
        FileNotFoundError,
    ),
    "empty": Case(write(SINGLE, b""), (f"{SINGLE} is not a sound",)),
    "cut in the header": Case(write(SINGLE, lambda b: b[:99]), (f"{SINGLE} is not a",)),
    "cut in the data": Case(write(SINGLE, lambda b: b[:-1]), (f"{SINGLE} is not a",)),
    "too long": Case(write(SINGLE, lambda b: b + b"\0"), (f"{SINGLE} is not a sound",)),
    "header longer than the file": Case(
        write(SINGLE, lambda b: b"\0\0\1" + bytes(5) + b[8:]), (f"{SINGLE} is not a",)
    ),
    "header length is garbage": Case(
        write(SINGLE, lambda b: b"\xff" * 8 + b[8:]), (f"{SINGLE} is not a sound",)
    ),
    "header is no JSON": Case(
        write(SINGLE, lambda b: b[:8] + b"?" + b[9:]), (f"{SINGLE} is not a sound",)
    ),
    "header says it twice": Case(
        write(SINGLE, with_header(f'{{"a.b": {ENTRY}, "a.b": {ENTRY}}}')),
        (SINGLE, "'a.b'", "twice"),
    ),
    "header entry is a list": Case(
        write(SINGLE, with_header('{"a.b": ["F16", [2], [0, 4]]}')),
        (f"{SINGLE}: a.b: ['F16', [2], [0, 4]]",),
    ),
    "offsets overlap": Case(
        offset("lm_head.weight", 0, 16 * tiny.N), (f"{SINGLE} is not a sound", "offset")
    ),
    "offsets beyond the end": Case(
        offset("lm_head.weight", 10**6, 10**6 + 16 * tiny.N),
        (f"{SINGLE} is not a sound", "offset"),
    ),
    "shape and bytes disagree": Case(
        header(lambda h: h["model.norm.weight"].update(shape=[3])),
        (f"{SINGLE} is not a sound",),
    ),
    "dtype of no array": Case(
        header(
            lambda h: h["model.norm.weight"].update(dtype="C64", shape=[tiny.N // 2])
        ),
        (f"{SINGLE}: model.norm.weight", "C64", "BF16"),
    ),
    **{
        f"tensor name {name!r}": Case(
            add(name, NORM), (SINGLE, repr(name), "not the name")
        )
        for name in ("../up", "/etc/passwd", "a/b", "a\\b", "..", "a..b", "", "a\nb")
    },
}
SHARD_ERRORS = {
    "shard is missing": Case(
        shards(remove(SHARDS[1])), (f"{SHARDS[1]} is missing", INDEX), FileNotFoundError
    ),
    "shard is cut": Case(
        shards(write(SHARDS[1], lambda b: b[:-9])), (f"{SHARDS[1]} is not a sound",)
    ),
    **{
        f"shard is {shard!r}": Case(
            shards(weight_map(lambda m, shard=shard: m.update({"a.b": shard}))),
            (INDEX, f"weight_map['a.b']={shard!r}", "beside it"),
        )
        for shard in (
            "../a.safetensors",
            "/a.safetensors",
            "a\\b.safetensors",
            "a.bin",
            "",
        )
    },
    "tensor is listed and nowhere": Case(
        shards(weight_map(lambda m: m.update({"a.b": SHARDS[0]}))),
        (f"{SHARDS[0]}: 'a.b' is missing, but listed in {INDEX}",),
    ),
    "tensor is there and not listed": Case(
        shards(weight_map(lambda m: m.pop("model.norm.weight"))),
        ("model-0000", f"'model.norm.weight' is not listed in {INDEX}"),
    ),
    "tensor is in two shards": Case(
        shards(
            lambda c: [names.append("lm_head.weight") for names in c.shards.values()]
        ),
        (*SHARDS, "'lm_head.weight' is in"),
    ),
}
QUANTIZATION_ERRORS = {
    "no object": Case(
        configuration(quantization_config="gptq"), ("config.json", "='gptq'", "object")
    ),
    "no method": Case(
        configuration(quantization_config={"bits": 4}),
        ("config.json", "quant_method=None", "['gptq'"),
    ),
    "method is unknown": Case(
        quantization(quant_method="hocuspocus"),
        ("quant_method='hocuspocus'", "['gptq'"),
    ),
    "method is no string": Case(
        quantization(quant_method=["gptq"]), ("=['gptq'] is not",)
    ),
    "no quantization_config": Case(
        lambda c: c.config.pop("quantization_config"),
        (f"{SINGLE}: {MODULE}.g_idx is quantized", "quantize_config.json"),
    ),
    "nothing is quantized": Case(
        drop(*(f"{MODULE}.{name}" for name in tiny.matrix())),
        ("config.json says", "no tensor is"),
    ),
    "bits are missing": Case(
        configuration(quantization_config={"quant_method": "gptq"}),
        ("config.json: bits=None",),
    ),
    "bits 5 without planes": Case(
        quantization(bits=5), ("config.json: bits=5", "'gptq'")
    ),
    "bits are a string": Case(quantization(bits="4"), ("config.json: bits='4'",)),
    "group_size 0": Case(quantization(group_size=0), ("config.json: group_size=0",)),
    "marlin": Case(quantization(is_marlin_format=True), ("json: is_marlin_format",)),
    "format is a list": Case(
        quantization(checkpoint_format=["gptq"]), ("config.json: checkpoint_format=",)
    ),
    "dynamic is a list": Case(
        quantization(dynamic=["-:a"]), ("config.json: dynamic=",)
    ),
    "dynamic holds a number": Case(quantization(dynamic={"a": 5}), ("json: dynamic=",)),
    **{
        f"dynamic is {pattern[:9]}": Case(
            quantization(dynamic={pattern: {}}),
            ("config.json: dynamic[", "is no pattern"),
        )
        for pattern in ("+:(", "-:*a", "a{99999999999}")
    },
    "dynamic takes forever": Case(
        quantization(dynamic={"+:([a-z.]+)+X": {}}),
        ("config.json: dynamic['+:([a-z.]+)+X']: ", "repeats a group, which may take"),
    ),
    "dynamic takes long": Case(
        quantization(dynamic={"+:" + ".*" * 9 + "X": {}}),
        (f"config.json: {MODULE}: ", "may fit a name of 21 letters in more than"),
    ),
    "override is wrong": Case(
        quantization(dynamic={".*q_proj": {"bits": 11}}),
        ("config.json: dynamic['.*q_proj']: bits=11",),
    ),
    "module should be dense": Case(
        quantization(dynamic={"-:.*q_proj": {}}), (SINGLE, f"leaves {MODULE} dense")
    ),
}
TENSOR_ERRORS = {
    "qzeros are missing": Case(
        drop(f"{MODULE}.qzeros"), (IN_FILE + "qzeros is missing", "'qweight'")
    ),
    "g_idx is missing": Case(
        both(quantization(desc_act=True), drop(f"{MODULE}.g_idx")),
        (IN_FILE + "g_idx is missing, and desc_act says that groups are no runs",),
    ),
    "orphan": Case(
        add("model.x.qzeros", tiny.matrix()["qzeros"]),
        (f"{SINGLE}: model.x: qweight is missing; found ['qzeros']",),
    ),
    "rows of qweight": Case(
        put(qweight=QWEIGHT[:-1]), (IN_FILE, "must be", f"qweight.shape=(3, {tiny.N})")
    ),
    "bits of another file": Case(quantization(bits=8), (IN_FILE, "bits=8")),
    "group size of another file": Case(
        quantization(group_size=32), (IN_FILE + "scales.shape=(2, 64) must be (1, 64)",)
    ),
    "dtype of qweight": Case(
        put(qweight=QWEIGHT.astype(np.int16)),
        (IN_FILE + "qweight.dtype=int16", "int32"),
    ),
    "dtype of scales": Case(
        put(scales=SCALES.astype(np.float64)), (IN_FILE + "scales.dtype=float64",)
    ),
    "axes of g_idx": Case(
        put(g_idx=WRONG_GROUPS[None]), (IN_FILE + "g_idx.shape=(1, 32) must have 1",)
    ),
    "shape of scales": Case(
        put(scales=SCALES[:, :-8]), (IN_FILE + "scales.shape=(2, 56) must be (2, 64)",)
    ),
    "qweight without columns": Case(
        put(qweight=QWEIGHT[:, :0]), (IN_FILE + "qweight.shape=(4, 0)",)
    ),
    "shards of a wrong module": Case(
        shards(put(scales=SCALES[:1])), (*SHARDS, f"{MODULE}: scales.shape=(1, 64)")
    ),
    "quantized and dense": Case(
        add(f"{MODULE}.weight", NORM), (SINGLE, f"{MODULE} is quantized", "and dense")
    ),
    "name of a module": Case(
        add(MODULE, NORM), (SINGLE, f"{MODULE} is quantized", "and dense")
    ),
    **{
        f"plain {dtype.__name__}": Case(
            add("model.up.weight", np.ones(3, dtype)),
            (f"{SINGLE}: model.up.weight.dtype={np.dtype(dtype)} must be float16",),
        )
        for dtype in (np.int64, np.int32, np.uint8, np.bool_, np.float64)
    },
    "qweight of no module": Case(
        add("qweight", QWEIGHT), (f"{SINGLE}: qweight.dtype",)
    ),
    "scale is NaN": Case(
        put(scales=NAN), (IN_FILE + "scales must be finite",), reads=True
    ),
    "scale is inf": Case(
        put(scales=INF), (IN_FILE + "scales must be finite",), reads=True
    ),
    "g_idx out of range": Case(
        put(g_idx=WRONG_GROUPS), (IN_FILE + "g_idx from 0 to 3", "0 to 1"), reads=True
    ),
    "g_idx is negative": Case(
        put(g_idx=-WRONG_GROUPS), (IN_FILE + "g_idx from -3 to 0",), reads=True
    ),
}
TABLES = (
    *(JSON_ERRORS, FILE_ERRORS, SHARD_ERRORS, QUANTIZATION_ERRORS, TENSOR_ERRORS),
)
CASES = {name: case for table in TABLES for name, case in table.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_malformed(case, tmp_path, monkeypatch):
    assert_refused(case, tmp_path, monkeypatch)


def test_table_has_no_two_cases_of_one_name():
    assert len(CASES) == sum(map(len, TABLES))


@pytest.mark.parametrize("name", ["absent", "config.json"])
def test_no_directory(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{name} is not a directory; pass one"):
        checkpoints.load(tmp_path / name)


def test_file_that_changes_while_it_is_loaded(tmp_path, monkeypatch):
    directory = tiny.checkpoint().write(tmp_path)
    read = Stored.read

    def cut_and_read(self):
        self.file.write_bytes(self.file.read_bytes()[: self.offset + 1])
        return read(self)

    monkeypatch.setattr(Stored, "read", cut_and_read)
    with pytest.raises(ValueError, match=r"model\.safetensors: .* has 1 of \d+ bytes"):
        checkpoints.load(directory)
