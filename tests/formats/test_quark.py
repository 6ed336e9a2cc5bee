"""Quark's matrices against what Quark makes of them."""

import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import awq, fp8, modelopt, quark
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.checkpoints.tiny import Checkpoint
from tests.goldens import load, same_bits

# Of whole models, and in the names of other formats.
MODEL, FAKE = "quark_model__4__s1341", "quark_model_fake__4__s1341"
OTHERS = ["quark_custom_awq__32x32__s1343", "quark_custom_fp8__32x32__s1344"]
FILES = [n for n in goldens.names("quark") if n not in (MODEL, FAKE, *OTHERS)]
E4M3 = ml_dtypes.float8_e4m3fn
INT4 = "quark_int4_group__16x64__s1310"
UINT4 = "quark_uint4_group__16x64__s1313"
INT8 = "quark_int8_channel__16x64__s1303"
UINT2 = "quark_uint2_group__16x64__s1317"
INT2 = "quark_int2_group__16x64__s1316"
FP8 = "quark_fp8_tensor__16x64__s1300"
MXFP4 = "quark_mxfp4__16x64__s1319"
MXFP6 = "quark_mxfp6_e2m3__16x64__s1320"
NVFP4 = "quark_nvfp4__16x64__s1324"


def tensors_of(name: str) -> dict:
    held = load(name).items()
    return {k.removeprefix("state_"): v for k, v in held if k.startswith("state_")}


def config_of(name: str) -> quark.Config:
    config = quark.Config.from_json(load(name)["config"]).of("up_proj")
    assert config is not None
    return config


def read(name: str, **changes) -> qjax.QTensor:
    return quark.from_tensors(tensors_of(name) | changes, config_of(name))


def config(dtype: str, qscheme: str, reorder: bool = True, **fields) -> quark.Config:
    scheme = quark.Scheme(dtype=dtype, qscheme=qscheme, **fields)
    return quark.Config(scheme=scheme, reorder=reorder)


def words(*values: int) -> np.ndarray:
    return np.array([values], np.uint32).view(np.int32)


@pytest.mark.parametrize("name", FILES)
def test_dequantizes_as_quark(name):
    """Bit for bit: in float32, and rounded once to what the model was in."""
    expected, w = load(name)["out_dequant"].T, read(name)
    assert expected.dtype == np.float32
    same_bits(qjax.dequantize(w, jnp.float32), expected)
    scale = tensors_of(name)["weight_scale"].dtype
    dtype = scale if scale in (jnp.float16, jnp.bfloat16) else jnp.bfloat16
    same_bits(qjax.dequantize(w), expected.astype(dtype))


class TestWords:
    """Codes where they lie in a word, worked out by hand."""

    @pytest.mark.parametrize(
        ("word", "reorder"), [(0x76543210, False), (0x75316420, True)]
    )
    def test_four_bits_along_outputs(self, word, reorder):
        weight = np.repeat(words(word), 32, 0)
        held = {"weight": weight, "weight_scale": np.ones((1, 8), np.float32)}
        held["weight_zero_point"] = words(0)
        w = quark.from_tensors(held, config("uint4", "per_group", reorder))
        assert w.layout == awq.Gemm()
        np.testing.assert_array_equal(w.numpy()[5], np.arange(8))

    @pytest.mark.parametrize(
        ("word", "reorder"), [(0x76543210, False), (0x75316420, True)]
    )
    def test_four_bits_along_inputs(self, word, reorder):
        held = {"weight": words(word, 0), "weight_scale": np.float32(2)}
        w = quark.from_tensors(held, config("int4", "per_tensor", reorder))
        assert w.layout == awq.Gemv()
        # In two's complement.
        np.testing.assert_array_equal(w.numpy()[:9, 0], [*range(8, 16), 8])
        found = qjax.dequantize(w, jnp.float32)[:, 0]
        np.testing.assert_array_equal(found, [2.0 * q for q in [*range(8), *[0] * 8]])

    def test_negative_numbers(self):
        held = {"weight": words(0x0000F8), "weight_scale": np.float32(1)}
        found = quark.from_tensors(held, config("int4", "per_tensor", False))
        np.testing.assert_array_equal(
            qjax.dequantize(found, jnp.float32)[:3, 0], [-8, -1, 0]
        )

    def test_two_bits(self):
        weight = np.full((16, 1), 0b00011011, np.uint8)
        held = {"weight": weight, "weight_scale": np.ones((1, 4), np.float32)}
        held["weight_zero_point"] = np.zeros((1, 1), np.uint8)
        w = quark.from_tensors(held, config("uint2", "per_group"))
        assert w.layout == Stream()
        np.testing.assert_array_equal(w.numpy()[0], [0, 1, 2, 3])

    def test_six_bits(self):
        # 61, 1, 2 and 60 from the lowest bit of the first byte on.
        bits = 61 | 1 << 6 | 2 << 12 | 60 << 18
        weight = np.frombuffer(bits.to_bytes(3, "little") * 8, np.uint8)[None]
        held = {"weight": weight, "weight_scale": np.full((1, 1), 128, np.uint8)}
        fields = {"group_size": 32, "exponents": True}
        w = quark.from_tensors(held, config("fp6_e3m2", "per_group", **fields))
        np.testing.assert_array_equal(w.numpy()[:5, 0], [61, 1, 2, 60, 61])
        found = qjax.dequantize(w, jnp.float32)[:4, 0]
        # 2 ** (7 - 3) * 1.25, and 2 ** -2 * 0.25 * 1 and 2, times 2.
        np.testing.assert_array_equal(found, [-40, 0.125, 0.25, -32])

    @pytest.mark.parametrize(("name", "largest"), [("fp6_e2m3", 7.5), ("fp6_e3m2", 28)])
    def test_numbers_of_six_bits(self, name, largest):
        numbers = quark.numbers(name)
        assert numbers.max() == largest
        assert (np.diff(numbers[:32]) > 0).all()
        same_bits(numbers[32:], -numbers[:32])

    def test_outputs_that_do_not_fill_a_word(self):
        codes = np.random.default_rng(0).integers(0, 16, (32, 12))
        padded = jnp.pad(jnp.asarray(codes, jnp.uint8), ((0, 0), (0, 4)))
        held = {
            "weight": np.asarray(awq.pack(padded, reorder=True)),
            "weight_scale": np.full((2, 12), 0.5, np.float32),
            "weight_zero_point": np.asarray(awq.pack(padded[:2], reorder=True)),
        }
        said = config("uint4", "per_group", group_size=16)
        w = quark.from_tensors(held, said)
        assert w.shape == (32, 12)
        expected = (codes - np.repeat(codes[:2], 16, 0)) * 0.5
        np.testing.assert_array_equal(qjax.dequantize(w, jnp.float32), expected)
        assert quark.axes(held, said) == {}


def test_zero_points_that_are_floats():
    held = tensors_of("quark_uint2_group_float_zero__16x64__s1318")
    shift = np.float32(0.25)
    zero = held["weight_zero_point"].astype(np.float32)
    said = config_of("quark_uint2_group_float_zero__16x64__s1318")
    w = quark.from_tensors(held | {"weight_zero_point": zero + shift}, said)
    found = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
    scale = np.repeat(held["weight_scale"].astype(np.float64), 32, 0)
    whole = np.asarray(quark.from_tensors(held, said).numpy(), np.float64)
    expected = (whole - np.repeat(zero.astype(np.float64) + 0.25, 32, 0)) * scale
    np.testing.assert_array_equal(found, expected)


WRITTEN = [
    *(FP8, MXFP4, INT4, UINT4, INT8),
    "quark_fp8_channel__16x64__s1301",
    "quark_fp8_block__32x48__s1340",
    "quark_uint8_channel__16x64__s1305",
    "quark_uint8_group__16x64__s1306",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_the_same_bytes(name):
    w = read(name)
    found = {key: np.asarray(array) for key, array in quark.to_tensors(w).items()}
    same_bits(found, tensors_of(name))
    scheme = config_of(name).scheme
    assert quark.scheme_of(w) == scheme
    # What is said of a layer is read as it was meant.
    entry = {"global_quant_config": scheme.to_json(), "version": "0.13"}
    assert quark.Config.from_json(entry).of("x").scheme == scheme


def test_zeros_of_signed_codes_are_written_unsigned():
    w = read("quark_int4_group_zeros__16x64__s1311")
    held = {key: np.asarray(array) for key, array in quark.to_tensors(w).items()}
    again = quark.from_tensors(held, quark.Config(scheme=quark.scheme_of(w)))
    assert quark.scheme_of(w).dtype == "uint4"
    same_bits(qjax.dequantize(again), qjax.dequantize(w))


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (lambda: read(NVFP4), "floats of 4 bits in groups of 16 do not have scales"),
        (lambda: qjax.prepare(read(MXFP4)), "floats of 4 bits in groups of 32 do not"),
        (lambda: read(MXFP6), "6 bits are not among (4, 8)"),
        (lambda: read(UINT2), "2 bits are not among (4, 8)"),
        (
            lambda: fp8.quantize(jnp.eye(64), 8, 48),
            "group_size=48 does not divide k=64",
        ),
        (lambda: qjax.prepare(fp8.quantize(jnp.eye(64), 8, 32)), "of 32 do not have s"),
        (lambda: qjax.quantize(jnp.ones((32, 12)), 4, 32), "n=12 is no multiple of 8"),
        (lambda: qjax.stack([read(INT4)] * 2), "it stacks (2,) matrices"),
    ],
)
def test_refuses_to_write(w, message, refuses):
    with refuses(message):
        quark.to_tensors(w())


@pytest.mark.parametrize("spelling", ["per_group", "per_block"])
def test_mxfp8(spelling):
    """Of whose scales vLLM knows two spellings; ModelOpt's files have the same."""
    held = {
        key: array
        for key, array in tensors_of("modelopt_mxfp8__32x96__s1103").items()
        if key != "input_scale"
    }
    weight = {"dtype": "fp8_e4m3", "qscheme": spelling, "ch_axis": -1}
    if spelling == "per_group":
        weight |= {"group_size": 32, "scale_format": "e8m0"}
    else:
        weight |= {"block_size": [1, 32], "scale_type": "float8_e8m0fnu"}
    said = quark.Config.from_json({"global_quant_config": {"weight": weight}})
    found = qjax.dequantize(quark.from_tensors(held, said))
    wanted = modelopt.from_tensors(held, modelopt.Config(algorithm="MXFP8"))
    same_bits(found, qjax.dequantize(wanted))


@pytest.mark.parametrize("layout", [Tiles(), Stream()], ids=str)
@pytest.mark.parametrize("name", [INT4, UINT4, MXFP6, UINT2])
def test_products_are_those_of_the_weight(name, layout):
    w = qjax.prepare(read(name), layout=layout)
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    expected = x @ load(name)["out_dequant"].T.astype(np.float64)
    # Sums of 64 products in float32.
    assert oracle.relative_error(qjax.matmul(jnp.asarray(x), w), expected) < 1e-5


class TestOlderFiles:
    """Scales of groups were not turned, and some names were others."""

    def entry(self, **fields):
        weight = {"dtype": "uint4", "qscheme": "per_group", "group_size": 32}
        weight |= {"axis": 1, "dynamic": False, "symmetric": False} | fields
        null = ("exclude", "layer_quant_config", "layer_type_quant_config")
        return {
            "quant_method": "quark",
            "global_quant_config": {"weight": weight},
            **dict.fromkeys(null),
        }

    def test_scales(self):
        said = quark.Config.from_json(self.entry()).of("up_proj")
        held = tensors_of(UINT4)
        turned = held | {"weight_scale": held["weight_scale"].T}
        same_bits(
            qjax.dequantize(quark.from_tensors(turned, said), jnp.float32),
            load(UINT4)["out_dequant"].T,
        )
        assert quark.axes(turned, said)["weight_scale"] == ("n", "k")

    def test_scales_of_either(self, refuses):
        said = quark.Config.from_json(self.entry()).of("up_proj")
        held = {
            "weight": np.zeros((256, 1), np.int32),
            "weight_scale": np.arange(64.0, dtype=np.float32).reshape(8, 8),
            "weight_zero_point": np.zeros((8, 1), np.int32),
        }
        with refuses("weight_scale.shape=(8, 8) may be [groups, n] or, as in older"):
            quark.from_tensors(held, said)
        newer = quark.Config.from_json(self.entry() | {"version": "0.9"}).of("up_proj")
        w = quark.from_tensors(held, newer)
        np.testing.assert_array_equal(w.scale, held["weight_scale"])

    @pytest.mark.parametrize("name", [FP8, "quark_int4_tensor__16x64__s1307"])
    def test_one_scale_has_an_axis(self, name):
        held = tensors_of(name)
        ones = {key: held[key].reshape(1) for key in held if held[key].ndim == 0}
        assert ones
        same_bits(qjax.dequantize(read(name, **ones)), qjax.dequantize(read(name)))


def directory(name: str, path, **changes):
    tensors = {
        key: np.ascontiguousarray(array).reshape(array.shape)
        for key, array in tensors_of(name).items()
    }
    entry = load(name)["config"] | changes
    return Checkpoint(tensors, {"quantization_config": entry}).write(path)


@pytest.mark.parametrize("name", [MODEL, FAKE])
def test_a_model(name, tmp_path):
    """Layers that differ, and one that stays dense; and all of it stored dense."""
    data = load(name)
    weights = checkpoints.load(directory(name, tmp_path), prepare=False)
    cache = "model.layers.0.self_attn.k_proj.output_scale"
    same_bits(weights.pop(cache), data[f"state_{cache}"])
    assert weights.pop("norm.weight").shape == (4,)
    wanted = {key.removeprefix("out_") for key in data if key.startswith("out_")}
    assert {key.removesuffix(".weight") for key in weights} == wanted
    for key, w in weights.items():
        quantized = isinstance(w, qjax.QTensor)
        assert quantized == (name == MODEL and key != "lm_head.weight")
        dense = qjax.dequantize(w, jnp.float32).T if quantized else w
        expected = data[f"out_{key.removesuffix('.weight')}"]
        np.testing.assert_array_equal(np.float32(dense), expected)
    assert checkpoints.verify(tmp_path) == []


def test_scales_of_inputs_beside_a_dense_weight(tmp_path):
    # So does Quark leave a layer whose inputs alone are quantized.
    path = directory(MODEL, tmp_path, exclude=["*k_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"leaves model\.layers\.0\..*k_proj dense"):
        checkpoints.load(path)
    tensors = tensors_of(MODEL)
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = tensors[key].astype(np.float32)
    del tensors["model.layers.0.self_attn.k_proj.weight_scale"]
    entry = load(MODEL)["config"] | {"exclude": ["*k_proj", "lm_head"]}
    made = Checkpoint(tensors, {"quantization_config": entry})
    weights = checkpoints.load(made.write(tmp_path / "dense"))
    same_bits(weights[key], tensors[key])


@pytest.mark.parametrize("name", OTHERS)
def test_files_in_the_names_of_other_formats(name, tmp_path):
    (data, held), expected = (load(name), tensors_of(name)), load(name)["out_dequant"]
    held = {f"{key}": array.reshape(array.shape) for key, array in held.items()}
    held["lm_head.weight"] = np.ones((4, 32), np.float32)
    entry = data["config"]
    field = "ignored_layers" if "fp8" in name else "modules_to_not_convert"
    # Wildcards are Quark's, and no patterns of transformers.
    entry = entry | {field: ["*lm_head"]}
    made = Checkpoint(held, {"quantization_config": entry})
    weights = checkpoints.load(made.write(tmp_path), prepare=False)
    same_bits(qjax.dequantize(weights["up_proj"], jnp.float32), expected.T)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"zero_point": False}, "pack_method='reorder' and zero_point=False must be"),
        ({"pack_method": "order"}, "pack_method='order' and zero_point=True must be"),
    ],
)
def test_words_that_are_none_of_awq(entry, message, refuses):
    said = {"bits": 4, "group_size": 32, "pack_method": "reorder", "zero_point": True}
    with refuses(message):
        awq.Config.from_json(said | entry)


def test_wildcards_in_the_name_of_fp8(refuses):
    entry = {"quant_method": "fp8", "export": {}, "ignored_layers": ["*.gate", "head"]}
    said = fp8.Config.from_json(entry)
    assert said.of("model.layers.3.gate") is None
    assert said.of("model.layers.3.gate_proj") is not None
    assert said.of("head") is None
    with refuses("ignored_layers='x' must be a list of strings"):
        fp8.Config.from_json(entry | {"ignored_layers": "x"})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            INT4,
            {"weight": np.ones((64, 2), np.int8)},
            "weight.dtype=int8 must be int32",
        ),
        (INT4, {"weight": np.ones((60, 2), np.int32)}, "in whole groups of 32 and in"),
        (INT4, {"weight": np.ones((0, 2), np.int32)}, "and not be empty"),
        (INT4, {"weight": np.ones((64, 3), np.int32)}, "(2, 16) must be (2, 24), from"),
        (
            INT4,
            {"weight_scale": np.full((2, 16), np.nan, np.float32)},
            "must be finite",
        ),
        (INT4, {"weight_scale": np.ones(16, np.float32)}, "scale.shape=(16,) must be"),
        (INT4, {"weight_scale": np.ones((2, 16), E4M3)}, "must be float16 or bfloat16"),
        (INT4, {"weight_zero_point": np.ones((2, 2), np.int32)}, "must be 0: the conf"),
        (
            INT4,
            {"weight_zero_point": np.ones((2, 3), np.int32)},
            "must be (2, 2), from",
        ),
        (
            INT4,
            {"input_rotation": np.ones((4, 4))},
            "input_rotation is no tensor of in",
        ),
        (
            INT4,
            {"input_prescale": np.ones(4)},
            "input_prescale is no tensor of int4 pe",
        ),
        (
            INT4,
            {"weight_scale_2": np.float32(1)},
            "weight_scale_2 is no tensor of int4",
        ),
        (UINT4, {"weight_zero_point": np.ones((2, 2), np.int8)}, "int8 must be int32"),
        (INT8, {"weight_scale": np.ones(15, np.float32)}, "must be (16,) or (16, 1)"),
        (INT8, {"weight": np.ones((16, 64), np.uint8)}, "dtype=uint8 must be int8"),
        (INT2, {"weight": np.full((64, 16), 4)}, "int64 must be int32"),
        (
            INT2,
            {"weight": np.full((64, 16), 4, np.int32)},
            "weight from 4 to 4 must lie in the range of int2",
        ),
        (UINT2, {"weight": np.ones((8, 4), np.uint8)}, "in whole groups of 32 and in"),
        (
            FP8,
            {"weight_scale": np.ones((1, 16), np.float32)},
            "must be () or (1,), fro",
        ),
        (FP8, {"weight": np.full((16, 64), np.nan, E4M3)}, "weight must be finite"),
        (
            FP8,
            {"weight_zero_point": np.int32(0)},
            "weight_zero_point is no tensor of f",
        ),
        (MXFP4, {"weight_scale": np.full((16, 2), 255, np.uint8)}, "holds 255"),
        (
            MXFP4,
            {"weight_scale": np.ones((16, 2), np.float32)},
            "must be uint8 or floa",
        ),
        (MXFP4, {"weight": np.ones((16, 40), np.uint8)}, "here 80 of fp4"),
        (MXFP6, {"weight": np.ones((16, 47), np.uint8)}, "here 48 of fp6_e2m3"),
        (NVFP4, {"weight_scale_2": np.ones(2, np.float32)}, "(2,) must be () or (1,)"),
        (NVFP4, {"weight_scale_2": np.float32(np.inf)}, "weight_scale_2=inf must be"),
        (NVFP4, {"weight_scale": np.ones((16, 4), np.float32)}, "float8_e4m3fn in fp4"),
    ],
)
def test_refuses_tensors(name, changes, message, refuses):
    with refuses(message):
        read(name, **changes)


def test_what_is_missing_is_named(refuses):
    held = tensors_of(UINT4)
    del held["weight_zero_point"]
    with refuses("weight_zero_point is missing; found ['weight', 'weight_scale']"):
        quark.from_tensors(held, config_of(UINT4))
    with refuses("config.scheme=None must say how the weight is quantized"):
        quark.check(held, quark.Config())
    # Codes that are symmetric do without.
    held = tensors_of(INT4)
    del held["weight_zero_point"]
    expected = qjax.dequantize(read(INT4))
    same_bits(qjax.dequantize(quark.from_tensors(held, config_of(INT4))), expected)


FOUR = {"dtype": "uint4", "qscheme": "per_group", "group_size": 32, "ch_axis": 1}
FOUR |= {"symmetric": False}
EIGHT = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
WHOLE = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
FLOATS = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "ch_axis": -1}


def entry_of(weight=FOUR, **fields):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}} | fields


class TestConfig:
    def test_a_layer_goes_before_its_type_and_before_all(self):
        entry = entry_of(
            FLOATS,
            layer_type_quant_config={
                "Linear": {"weight": FOUR},
                "Conv2d": {"weight": 0},
            }
            | {"Conv2d": {"weight": None}},
            layer_quant_config={
                "*.down_proj": {"weight": EIGHT},
                "*_proj": {"weight": None},
                "model.layers.1.mlp.up": {"weight": [WHOLE]},
            },
            exclude=["lm_head", "*.gate", r"re:model\.layers\.[23]\..*"],
        )
        said = quark.Config.from_json(entry)

        def dtype(module):
            found = said.of(module)
            return found and found.scheme.dtype

        assert dtype("model.layers.0.mlp.down_proj") == "int8"
        assert dtype("model.layers.0.mlp.up_proj") is None
        assert dtype("model.layers.1.mlp.up") == "fp8_e4m3"
        assert dtype("model.layers.0.mlp.up") == "uint4"
        assert dtype("model.lm_head") == "uint4"
        assert dtype("lm_head") is None
        assert dtype("model.layers.0.gate") is None
        assert dtype("model.layers.2.mlp.down_proj") is None

    def test_wildcards_take_no_time(self):
        said = quark.Config(excluded=("*a" * 500 + "b", "[" * 1000))
        start = time.monotonic()
        assert said.of("a" * 2000) is None  # as nothing is quantized
        assert time.monotonic() - start < 5

    def test_patterns_that_take_forever(self, refuses):
        with refuses("exclude: '(a+)+b' repeats a group, which may take forever"):
            quark.Config.from_json(entry_of(exclude=["re:(a+)+b"]))
        said = quark.Config.from_json(entry_of(exclude=["re:" + ".*" * 9 + "b"]))
        with refuses("may fit a name of 60 letters in more than"):
            said.of("a" * 60)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"quant_method": "fp8"}, "quant_method='fp8' must be 'quark'"),
            ({}, "global_quant_config=None must have 'weight', an object or null"),
            ({"global_quant_config": []}, "global_quant_config=[] must be an object"),
            (entry_of(quant_mode=1), "quant_mode=1 must be one of ('eager_mode', "),
            (entry_of(export=[]), "export=[] must be an object"),
            (
                entry_of(export={"weight_format": "x"}),
                "export.weight_format='x' must be one of ('real_quantized', 'fake_qu",
            ),
            (
                entry_of(export={"pack_method": ["order"]}),
                "export.pack_method=['order'] must be one of ('reorder', 'order')",
            ),
            (
                entry_of(exclude="lm_head"),
                "exclude='lm_head' must be a list of strings",
            ),
            (entry_of(exclude=["re:("]), "exclude: '(' is no pattern"),
            (entry_of(algo_config=[1]), "algo_config=1 must be an object"),
            (entry_of(layer_quant_config=["x"]), "layer_quant_config=['x'] must be an"),
            (
                entry_of(layer_quant_config={"x": {}}),
                "layer_quant_config['x']={} must have 'weight', an object or null",
            ),
            (
                entry_of(layer_type_quant_config={"Linear": {"weight": 1}}),
                "layer_type_quant_config['Linear'].weight=1 must be an object",
            ),
            (entry_of([]), "global_quant_config.weight=[] must be an object, or a lis"),
            (entry_of([None]), "global_quant_config.weight.dtype=None must be one of"),
            (entry_of({"dtype": []}), ".weight.dtype=[] must be one of ('fp8_e4m3',"),
            (entry_of({"dtype": "nf4"}), ".weight.dtype='nf4' must be one of ('fp8_e"),
            (entry_of(FOUR | {"is_dynamic": True}), ".is_dynamic=True must be one of"),
            (entry_of(FOUR | {"qscheme": {}}), ".qscheme={} must be one of ('per_tens"),
            (entry_of(FOUR | {"ch_axis": 0}), ".ch_axis=0 must be one of (1, -1)"),
            (entry_of(EIGHT | {"ch_axis": [0]}), ".ch_axis=[0] must be one of (0, -2)"),
            (entry_of(FOUR | {"group_size": 0}), ".group_size=0 must be a positive in"),
            (entry_of(FOUR | {"group_size": "32"}), "='32' must be a positive integer"),
            (entry_of(FOUR | {"symmetric": None}), "symmetric=None must be true or f"),
            (
                entry_of(FOUR | {"zero_point_type": "int4"}),
                ".zero_point_type='int4' must be one of (None, 'int32', 'float32')",
            ),
            (
                entry_of(FLOATS | {"scale_format": "x"}),
                ".scale_format='x' must be one of (None, 'float32', 'e8m0', 'e5m3')",
            ),
            (
                entry_of(WHOLE | {"qscheme": "per_block", "block_size": [128]}),
                "weight.block_size=[128] must be two positive integers below 2**31",
            ),
            (
                {"global_quant_config": {"weight": FOUR, "bias": 8}},
                "global_quant_config.bias=8 must be an object",
            ),
        ],
    )
    def test_refuses(self, entry, message, refuses):
        with refuses(message):
            quark.Config.from_json(entry)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                entry_of(FOUR | {"dtype": "int3"}),
                ".weight.dtype='int3' is not read; th",
            ),
            (entry_of(WHOLE | {"dtype": "fp8_e5m2"}), "dtype='fp8_e5m2' is not read"),
            (entry_of({"dtype": "mx", "group_size": 32}), "dtype='mx' is not read"),
            (
                entry_of(FLOATS | {"qscheme": "per_tensor"}),
                "fp4 with qscheme='per_tensor' is not read; of fp4 those are: ['per_gr",
            ),
            (
                entry_of([WHOLE, EIGHT | {"dtype": "int4"}]),
                "in stages, ['fp8_e4m3 per_tensor', 'int4 per_channel']; of several",
            ),
            (entry_of([FLOATS, WHOLE]), "in stages, ['fp4 per_group', 'fp8_e4m3 per_t"),
            (
                entry_of(FLOATS | {"scale_format": "e5m3"}),
                "global_quant_config.weight: scales in E5M3 floats are not read",
            ),
            (
                entry_of(EIGHT | {"scale_format": "e8m0"}),
                "scales in E8M0 are read of floats in groups and blocks",
            ),
            (
                entry_of(FOUR | {"dtype": "int4", "zero_point_type": "float32"}),
                "float zero points of int4 are not read; those of unsigned codes are",
            ),
            (
                {"global_quant_config": {"weight": FOUR, "bias": [EIGHT]}},
                "global_quant_config.bias is quantized; only weights are read",
            ),
            (
                entry_of(algo_config=[{"name": "awq"}, {"name": "svdquant"}]),
                "algo_config: 'svdquant' changes what weights are multiplied by",
            ),
            (
                entry_of(algo_config={"name": "rotation", "r1": True}),
                "algo_config: 'rotation' changes what weights are multiplied by",
            ),
        ],
    )
    def test_does_not_support(self, entry, message):
        with pytest.raises(NotImplementedError) as caught:
            quark.Config.from_json(entry)
        assert message in str(caught.value)

    def test_rotations_that_are_folded(self):
        folded = {"name": "rotation", "r1": True, "r2": True, "r4": False}
        assert quark.Config.from_json(entry_of(algo_config=[folded])).scheme
