"""NF4 and FP4 against what bitsandbytes wrote, bit for bit."""

import collections
import functools
import json

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import bnb, bnb_blockwise, gptq
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("bnb")
FOUR = [name for name in FILES if name.startswith("bnb_4bit")]
SINGLE = [name for name in FOUR if "double" not in name]
DOUBLE = [name for name in FOUR if "double" in name]
EIGHT = "bnb_blockwise8__b256__s740"
STATE = "weight.quant_state.bitsandbytes__"


def tensors_of(data: dict, **changes) -> dict:
    """The saved tensors; in ``changes`` a dot is ``__``, and None leaves one out."""
    tensors = {"weight": data["packed"]}
    for name, array in data.items():
        if name.startswith("state_"):
            short = name.removeprefix("state_").replace("state__", "state.")
            tensors[f"weight.{short}"] = array
    changes = {k.replace("__", ".", 1): v for k, v in changes.items()}
    return {k: v for k, v in (tensors | changes).items() if v is not None}


def config_of(data: dict) -> bnb.Config:
    return bnb.Config(quant_type=data["config"]["quant_type"])


def read(name: str, **changes) -> qjax.QTensor:
    return bnb.from_tensors(tensors_of(load(name), **changes), config_of(load(name)))


def codes_of(packed):
    """Codes of the bytes, the high nibble first."""
    return np.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).reshape(-1)


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {
        **{"bnb_4bit": 12, "bnb_blockwise8": 1, "bnb_code_tables": 1},
        **{"bnb_int8": 6},
    }
    assert (len(SINGLE), len(DOUBLE)) == (8, 4)


def test_tables():
    data = load("bnb_code_tables")
    tables = bnb_blockwise.TABLES | {"dynamic_signed_8bit": bnb_blockwise.dynamic_map()}
    for name, table in tables.items():
        chex.assert_trees_all_equal(table.view(np.uint32), data[name].view(np.uint32))
    # The scalar code of the original decodes code 8 as -0.0: an equal number.
    assert bnb_blockwise.TABLES["fp4"][8].tobytes() == np.float32(0).tobytes()


@pytest.mark.parametrize("name", FOUR)
def test_reads_and_dequantizes(name):
    data, qt = load(name), read(name)
    n, k = data["in_w"].shape
    assert qt.shape == (k, n)
    assert qt.dtype == data["in_w"].dtype
    rows = k % data["config"]["blocksize"] == 0
    assert qt.grouping is (tensor.Grouping.ROWS if rows else tensor.Grouping.FLAT)
    codes = np.asarray(qjax.codes(qt)).T.reshape(-1)
    chex.assert_trees_all_equal(codes, codes_of(data["packed"]))
    assert isinstance(qt.scale, bnb.Absmax)
    absmax = qt.scale.decode()
    assert absmax.shape == qt.scale.shape
    chex.assert_trees_all_equal(np.asarray(absmax).T.reshape(-1), data["out_absmax"])
    weight, expected = np.asarray(qjax.dequantize(qt)).T, data["out_dequant"]
    assert weight.dtype == expected.dtype
    # 0.0 and -0.0 are equal, which is the two readings of FP4's code 8.
    chex.assert_trees_all_equal(weight, expected)
    integer = np.dtype(f"u{weight.itemsize}")
    differs = weight.view(integer) != expected.view(integer)
    assert not differs[codes.reshape(n, k) != 8].any()
    assert "fp4" in name or not differs.any()


@pytest.mark.parametrize("name", FOUR)
def test_dequantizes_after_prepare(name):
    data = load(name)
    qt = qjax.prepare(read(name))
    # Decoded scales are float32, and the weight still has its own dtype.
    assert (qt.scale.dtype, qt.dtype) == (jnp.float32, data["in_w"].dtype)
    weight = np.asarray(qjax.dequantize(qt)).T
    chex.assert_trees_all_equal(weight, data["out_dequant"])


@pytest.mark.parametrize("name", FOUR)
def test_writes_the_same_bytes(name):
    same_bits(bnb.to_tensors(read(name)), tensors_of(load(name)))


@pytest.mark.parametrize("name", SINGLE)
def test_writes_the_same_bytes_after_prepare(name):
    data = load(name)
    written = bnb.to_tensors(qjax.prepare(read(name)))
    same_bits(written, tensors_of(data))


@pytest.mark.parametrize("name", DOUBLE)
def test_prepared_scales_are_written_plainly(name):
    data = load(name)
    written = bnb.to_tensors(qjax.prepare(read(name)))
    chex.assert_trees_all_equal(np.asarray(written["weight"]), data["packed"])
    back = bnb.from_tensors(
        {key: np.asarray(array) for key, array in written.items()}, config_of(data)
    )
    assert back.scale.nested is None
    chex.assert_trees_all_equal(
        np.asarray(qjax.dequantize(back)).T, data["out_dequant"]
    )


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_bytes_stored_as_floats(storage):
    name = DOUBLE[0]
    data = load(name)
    weight = data["packed"].reshape(-1).view(jnp.dtype(storage))[:, None]
    qt = read(name, weight=weight)
    chex.assert_trees_all_equal(np.asarray(qt.words[0]), data["packed"])
    same_bits(bnb.to_tensors(qt), tensors_of(data, weight=weight))
    same_bits(bnb.to_tensors(qt, storage="uint8"), tensors_of(data))


@pytest.mark.parametrize("name", FOUR)
def test_quantizes(name):
    data, config = load(name), load(name)["config"]
    w = jnp.asarray(data["in_w"]).T
    qt = bnb.quantize_4bit(w, config["quant_type"], config["blocksize"])
    chex.assert_trees_all_equal(np.asarray(qt.words[0]), data["packed"])
    assert qt.dtype == w.dtype
    if name in SINGLE:
        same_bits(bnb.to_tensors(qt), tensors_of(data))


def test_eight_bits():
    data = load(EIGHT)
    code, absmax = jnp.asarray(data["state_code"]), jnp.asarray(data["state_absmax"])
    packed = jnp.asarray(data["packed"])
    values = bnb_blockwise.dequantize_blockwise(packed, absmax, code, 256)
    chex.assert_trees_all_equal(np.asarray(values), data["out_dequant"])
    w = jnp.asarray(data["in_w"])
    codes, found = bnb_blockwise.quantize_blockwise(w, code, 256)
    chex.assert_trees_all_equal(np.asarray(found), data["state_absmax"])
    # The original's CPU kernel takes a neighbour of the nearest entry now and then.
    differs = np.asarray(codes) != data["packed"]
    assert differs.sum() == 5
    nearest = np.asarray(bnb_blockwise.dequantize_blockwise(codes, absmax, code, 256))
    theirs = np.abs(data["out_dequant"].astype(np.float64) - data["in_w"])[differs]
    ours = np.abs(nearest.astype(np.float64) - data["in_w"])[differs]
    assert (ours < theirs).all()


def test_blocks_of_zeros_and_short_blocks():
    w = np.zeros((50, 3), np.float32)
    qt = bnb.quantize_4bit(jnp.asarray(w))
    chex.assert_trees_all_equal(np.asarray(qjax.dequantize(qt)), w)
    w[49, 2] = -3  # the last element of the short block
    qt = bnb.quantize_4bit(jnp.asarray(w))
    chex.assert_trees_all_equal(np.asarray(qjax.dequantize(qt)), w)


def test_double_quantization_rounds_twice():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (40, 100)).astype(np.uint8)
    absmax = rng.uniform(0.5, 2, 16).astype(np.float32)
    table, offset = rng.normal(size=256).astype(np.float32), np.float32(0.1431)
    scale = bnb.Absmax(
        absmax=jnp.asarray(codes),
        nested=bnb.Nested(*map(jnp.asarray, (absmax, table, offset))),
    )
    flat = codes.T.reshape(-1)
    product = table[flat] * np.repeat(absmax, 256)[: flat.size]
    expected = (product + offset).reshape(100, 40).T
    exact = table[flat].astype(np.float64) * np.repeat(absmax, 256)[: flat.size]
    once = (exact + offset).astype(np.float32).reshape(100, 40).T
    assert (once != expected).any()
    chex.assert_trees_all_equal(np.asarray(scale.decode()), expected)
    chex.assert_trees_all_equal(
        np.asarray(jax.jit(lambda scale: scale.decode() * 2)(scale)), 2 * expected
    )


def test_matmul():
    for name in ("bnb_4bit__nf4_b64_double_float16__16x128__s701", FOUR[0]):
        qt = qjax.prepare(read(name))
        assert qt.layout in (gptq.Stream(), Tiles(nibbles=True))
        x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
        expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
        y = qjax.matmul(jnp.asarray(x), qt)
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_stack_of_matrices():
    layer = read(DOUBLE[0])
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), layer)
    assert stack.shape == (2, *layer.shape)
    assert stack.scale.shape == (2, *layer.scale.shape)
    for one in (stack, qjax.prepare(stack)):
        weight = qjax.dequantize(one, jnp.float32)
        chex.assert_trees_all_equal(weight[1], qjax.dequantize(layer, jnp.float32))


@hypothesis.given(k=st.integers(1, 9), n=st.integers(1, 9))
@hypothesis.settings(deadline=None, max_examples=10)
def test_round_trips(k, n):
    codes = np.random.default_rng(k).integers(0, 16, (k, n)).astype(np.uint8)
    layout = bnb.Flat(k)
    words = np.asarray(layout.pack(jnp.asarray(codes), 4))
    assert words.shape == (-(-k * n // 2), 1)
    flat = [*codes.T.reshape(-1).tolist(), 0]
    pairs = [16 * a + b for a, b in zip(flat[::2], flat[1::2], strict=False)]
    assert words[:, 0].tolist() == pairs
    unpacked = np.asarray(layout.unpack(jnp.asarray(words), 4))
    assert unpacked.shape == layout.extents(words.shape, 4)
    # An odd number of single-input columns has a column of padding.
    assert unpacked.shape == (k, n + (k == 1 and n % 2))
    chex.assert_trees_all_equal(unpacked[:, :n], codes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(33, 3), (1, 7), (35, 1)])
def test_odd_numbers_of_codes(shape, quant_type):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    qt = bnb.quantize_4bit(jnp.asarray(w), quant_type)
    assert qt.shape == shape
    written = {k: np.asarray(v) for k, v in bnb.to_tensors(qt).items()}
    # The low nibble of the last byte is the code of zero.
    assert written["weight"][-1, 0] & 15 == {"nf4": 7, "fp4": 0}[quant_type]
    back = bnb.from_tensors(written, bnb.Config(quant_type=quant_type))
    assert back.shape == shape
    same_bits(bnb.to_tensors(back), written)
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))


def test_odd_numbers_of_codes_from_another_layout():
    codes = np.random.default_rng(0).integers(0, 16, (8, 3)).astype(np.uint8)
    words = bnb.Flat(8).pack(jnp.asarray(codes), 4)
    qt = tensor.build(
        (gptq.Stream().pack(jnp.asarray(codes), 4),),
        jnp.ones((1, 1)),
        layout=gptq.Stream(),
        segments=(tensor.Segment(4, 32, padding=1),),  # seven rows: 21 codes
        affine=tensor.Affine.CODEBOOK,
        grouping=tensor.Grouping.FLAT,
        codebook=jnp.asarray(bnb_blockwise.TABLES["nf4"]),
    )
    written = np.asarray(bnb.to_tensors(qt)["weight"])
    assert written.shape == (11, 1) != words.shape
    assert codes_of(written).tolist() == [*codes[:7].T.reshape(-1), 7]


def test_relayout_to_the_stream_and_back():
    for name in (DOUBLE[0], "bnb_4bit__nf4_b64_float32__3x50__s703"):
        qt = read(name)
        if qt.k % 8 == 0:
            stream = qjax.relayout(qt, gptq.Stream())
            assert stream.scale.absmax is not None
            chex.assert_trees_all_equal(qjax.dequantize(stream), qjax.dequantize(qt))
            chex.assert_trees_all_equal(qjax.relayout(stream, qt.layout), qt)
            same_bits(bnb.to_tensors(stream), tensors_of(load(name)))
        else:
            with pytest.raises(ValueError, match="must be a multiple of 8"):
                qjax.relayout(qt, gptq.Stream())


def test_jit_and_vmap():
    layout = bnb.Flat(6)
    codes = np.random.default_rng(0).integers(0, 16, (2, 6, 4)).astype(np.int32)
    words = jax.jit(jax.vmap(functools.partial(layout.pack, bits=4)))(codes)
    chex.assert_trees_all_equal(words[1], layout.pack(jnp.asarray(codes[1]), 4))
    unpacked = jax.jit(jax.vmap(functools.partial(layout.unpack, bits=4)))(words)
    chex.assert_trees_all_equal(np.asarray(unpacked), codes.astype(np.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bnb.Flat(8).pack(jnp.zeros((8, 2), jnp.uint8), 3), "bits=3 must be 4"),
        (
            lambda: bnb.Flat(8).pack(jnp.zeros((4, 2), jnp.uint8), 4),
            "codes.shape=(4, 2) must be [k=8, n]",
        ),
        (
            lambda: bnb.Flat(8).unpack(jnp.zeros((8, 2), jnp.uint8), 4),
            "words.shape=(8, 2) must be [n * k / 2, 1]",
        ),
        (
            lambda: bnb.Flat(8).unpack(jnp.zeros((8, 1), jnp.int8), 4),
            "words.dtype=int8 must be uint8",
        ),
        (lambda: bnb.quantize_4bit(jnp.zeros(8)), "w must be float16, bfloat16 or"),
        (
            lambda: bnb.quantize_4bit(jnp.zeros((8, 8), jnp.int32)),
            "not empty; got int32(8, 8)",
        ),
        (
            lambda: bnb.quantize_4bit(jnp.zeros((8, 8)), "int4"),
            "quant_type='int4' must be one of ['nf4', 'fp4']",
        ),
        (
            lambda: bnb.quantize_4bit(jnp.zeros((8, 8)), blocksize=48),
            "blocksize=48 must be one of (32, 64, 128",
        ),
    ],
)
def test_refuses(call, message, refuses):
    with refuses(message):
        call()


def blob(**changes) -> np.ndarray:
    """The quantization state of the file below, with changes."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16"}
    state |= {"shape": [16, 128], "nested_blocksize": 256, "nested_dtype": "float32"}
    state = state | {"nested_offset": 0.25} | changes
    state = {key: value for key, value in state.items() if value is not None}
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def blob_of(text: bytes) -> dict:
    return {f"weight__{STATE[7:]}nf4": np.frombuffer(text, np.uint8)}


def test_the_state_of_the_file_is_sound():
    read("bnb_4bit__nf4_b64_double_float16__16x128__s701", **blob_of(blob().tobytes()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "weight is missing; found ['weight.absmax'"),
        ({"weight__quant_map": None}, "weight.quant_map is missing"),
        (
            {"weight__nested_quant_map": None},
            "weight.nested_quant_map is missing",
        ),
        (
            {f"weight__{STATE[7:]}nf4": None},
            "weight.quant_state.bitsandbytes__nf4 is missing",
        ),
        (
            {f"weight__{STATE[7:]}fp4": np.zeros(1, np.uint8)},
            "weight.quant_state.bitsandbytes__fp4 is no tensor of bitsandbytes' nf4",
        ),
        (
            {"bias": np.zeros(16)},
            "bias is no tensor of bitsandbytes' nf4; those are ['weight', 'wei",
        ),
        ({"weight": np.zeros((1024, 1), np.int32)}, "weight.dtype=int32 must be uint8"),
        ({"weight": np.zeros(1024, np.uint8)}, "weight.shape=(1024,) must have 2 axes"),
        (
            {"weight": np.zeros((8, 2), np.uint8)},
            "weight.shape=(8, 2) must be (8, 1)",
        ),
        (
            {"weight": np.zeros((0, 1), np.uint8)},
            "weight has 0 bytes and must have 1024",
        ),
        (
            {"weight": np.zeros((1023, 1), np.uint8)},
            "weight has 1023 bytes and must have 1024, from shape=[16, 128] and "
            "blocksize=64",
        ),
        (
            {"weight__absmax": np.zeros(32, np.float32)},
            "weight.absmax.dtype=float32 must be uint8",
        ),
        (
            {"weight__absmax": np.zeros(31, np.uint8)},
            "weight.absmax has 31 elements and must have 32",
        ),
        (
            {"weight__nested_absmax": np.zeros(2, np.float32)},
            "weight.nested_absmax has 2 elements and must have 1",
        ),
        (
            {"weight__quant_map": np.zeros(256, np.float32)},
            "weight.quant_map.shape=(256,) must be (16,)",
        ),
        (
            {"weight__quant_map": np.full(16, np.nan, np.float32)},
            "weight.quant_map must be finite; found NaN or infinity",
        ),
        (
            {"weight__nested_absmax": np.full(1, np.inf, np.float32)},
            "weight.nested_absmax must be finite",
        ),
        (blob_of(b"{"), "bitsandbytes__nf4 is not valid JSON"),
        (blob_of(b"\xff\xfe"), "bitsandbytes__nf4 is not valid JSON"),
        (blob_of(b"[" * 100_000), "bitsandbytes__nf4 is not valid JSON"),
        (blob_of(b"[4]"), "nf4=[4] must be an object with keys ('quant_type', 'block"),
        (blob_of(blob(dtype=None)), "must be an object with keys"),
        (blob_of(blob(nested_offset=None)), "must be an object with keys"),
        (blob_of(blob(more=1)), "must be an object with keys"),
        (blob_of(blob(quant_type="fp4")), "quant_type='fp4' is not supported"),
        (blob_of(blob(blocksize=63)), "blocksize=63 is not supported"),
        (blob_of(blob(blocksize="64")), "blocksize='64' is not supported"),
        (blob_of(blob(blocksize=[64])), "blocksize=[64] is not supported"),
        (blob_of(blob(blocksize=64.0)), "blocksize=64.0 is not supported"),
        (
            blob_of(blob(nested_blocksize=2**40)),
            "nested_blocksize=1099511627776 is not",
        ),
        (blob_of(blob(dtype="int8")), "dtype='int8' is not supported"),
        (blob_of(blob(dtype=["float16"])), "dtype=['float16'] is not supported"),
        (blob_of(blob(shape=[2048])), "shape=[2048] is not supported"),
        (blob_of(blob(shape=[-16, -128])), "shape=[-16, -128] is not supported"),
        (blob_of(blob(shape=[16.0, 128])), "shape=[16.0, 128] is not supported"),
        (blob_of(blob(shape="16")), "shape='16' is not supported"),
        (blob_of(blob(shape=[16, 2**40])), "weight has 1024 bytes and must have"),
        (blob_of(blob(nested_blocksize=0)), "nested_blocksize=0 is not supported"),
        (
            blob_of(blob(nested_dtype="float16")),
            "nested_dtype='float16' is not supported",
        ),
        (blob_of(blob(nested_offset="0.2")), "nested_offset='0.2' is not supported"),
        (
            blob_of(blob(nested_offset=float("nan"))),
            "nested_offset=nan is not supported",
        ),
        (blob_of(blob(nested_offset=1e300)), "nested_offset=1e+300 is not supported"),
        (blob_of(blob(nested_offset=10**400)), "is not supported"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    with refuses(message):
        read("bnb_4bit__nf4_b64_double_float16__16x128__s701", **changes)


def test_check_reads_no_values():
    data = load(DOUBLE[0])
    heads = jax.tree.map(
        lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape),
        tensors_of(data),
    )
    bnb.check(heads, config_of(data))


ENTRY = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        (ENTRY, bnb.Config()),
        (
            {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            bnb.Config(quant_type="nf4"),
        ),
        (
            ENTRY
            | {"llm_int8_skip_modules": ["lm_head", "mlp.gate"], "load_in_8bit": False},
            bnb.Config(skip_modules=("lm_head", "mlp.gate")),
        ),
        (ENTRY | {"llm_int8_skip_modules": None}, bnb.Config()),
        ({"load_in_8bit": True}, bnb.Config(load_in_8bit=True)),
        (
            {"_load_in_8bit": True, "load_in_4bit": False},
            bnb.Config(load_in_8bit=True),
        ),
    ],
)
def test_config_from_json(entry, config):
    assert bnb.Config.from_json(entry) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "load_in_4bit=False and load_in_8bit=False: one of them must be true"),
        (
            ENTRY | {"_load_in_8bit": True},
            "load_in_4bit=True and load_in_8bit=True: one of them must be true",
        ),
        (ENTRY | {"load_in_4bit": 1}, "load_in_4bit=1 must be true or false"),
        (
            {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            "llm_int8_has_fp16_weight=true: such weights are dense; remove",
        ),
        (
            ENTRY | {"bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type='int4' must be one of ['nf4', 'fp4']",
        ),
        (
            ENTRY | {"bnb_4bit_quant_type": ["nf4"]},
            "bnb_4bit_quant_type=['nf4'] must be",
        ),
        (
            ENTRY | {"llm_int8_skip_modules": "lm_head"},
            "llm_int8_skip_modules='lm_head' must be a list of strings",
        ),
        (ENTRY | {"llm_int8_skip_modules": [1]}, "llm_int8_skip_modules=[1] must be"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        bnb.Config.from_json(entry)


def test_config_of_a_module():
    config = bnb.Config(skip_modules=("lm_head", "mlp.gate", "model.layers.1"))
    for module in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.up_proj"):
        assert config.of(module) is None
    for module in ("model.layers.0.mlp.gate_proj", "model.layers.11.mlp.up_proj"):
        assert config.of(module) is config


class TestWriting:
    """What `to_tensors` makes of other forms, and what it refuses."""

    def quantized(self, as_qtensor, **changes):
        m = oracle.random(0, 64, 32, **{"affine": "CODEBOOK"} | changes)
        return as_qtensor(m)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"order": True}, "it has an order of rows or an input scale; GPTQ holds"),
            ({"row_group": True}, "it has an order of rows or an input scale"),
            ({"input_scale": True}, "it has an order of rows or an input scale"),
            ({"affine": "ZERO"}, "(q - z) * s is no table; quantize_4bit makes one"),
            ({"columns": 1}, "blocks of 32 cross columns, or columns share scales"),
            ({"group_size": 48}, "blocks of 48 cross columns"),
            ({"group_size": 16}, "a group size of 16 is not among (32, 64, 128"),
            ({"grouping": "STRIDED"}, "its groups are strided; HQQ holds those"),
            ({"bits": 3}, "its codes have other widths than 4"),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                "its codes have other widths than 4",
            ),
            ({}, "its codebook is neither NF4 nor FP4"),
        ],
    )
    def test_refuses(self, changes, reason, refuses, as_qtensor):
        with refuses(reason):
            bnb.to_tensors(self.quantized(as_qtensor, **changes))

    def test_refuses_stacks(self, refuses):
        stack = jax.tree.map(lambda leaf: leaf[None], read(DOUBLE[0]))
        with refuses("it stacks (1,) matrices; write them one by one"):
            bnb.to_tensors(stack)

    def test_refuses_floats_of_odd_bytes(self, refuses):
        with refuses("storage=float32: 75 bytes are not whole numbers; write uint8"):
            bnb.to_tensors(
                read("bnb_4bit__nf4_b64_float32__3x50__s703"), storage=jnp.float32
            )


def test_a_layer_computes_in_the_dtype_of_the_weight():
    dense = jnp.eye(64, dtype=jnp.bfloat16)
    w = qjax.prepare(bnb.quantize_4bit(dense))
    layer = qjax.layers.nnx.Linear.from_qtensor(w)
    assert layer.param_dtype == layer(dense).dtype == jnp.bfloat16
