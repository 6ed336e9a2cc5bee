"""As test_malformed, with the errors that other dialects than GPTQ can have."""

import numpy as np
import pytest

from tests.checkpoints import assembled
from tests.checkpoints.assembled import checkpoint_of
from tests.checkpoints.bending import (
    SINGLE,
    Case,
    assert_refused,
    drop,
    put,
    quantization,
    write,
)
from tests.checkpoints.tiny import MODULE

IN_FILE = f"{SINGLE}: {MODULE}: "
STRATEGY = "quant_strategy.json"


def mbwq(bend, *pieces, mix="layer-mix", reads=False):
    """MBWQ as green-bit-llm has it; "layer-mix", "channel-mix" or of no strategy."""
    return Case(bend, pieces, reads=reads, make=checkpoint_of(f"mbwq {mix}"))


def mpq(bend, *pieces, reads=False):
    make = checkpoint_of("mpq, double quantized")
    return Case(bend, pieces, reads=reads, make=make)


def tiled(bend, *pieces, reads=False):
    return Case(bend, pieces, reads=reads, make=checkpoint_of("torchao tiled"))


def strategy(**fields):
    """Changes what the strategy says about the module."""

    def bend(checkpoint):
        blocks = checkpoint.files[STRATEGY]["measurement"]
        blocks[assembled.BLOCK][assembled.NAME].update(fields)

    return bend


def metadata(text):
    """Replaces what the header says about the weight; None says nothing."""

    def bend(checkpoint):
        del checkpoint.metadata[f"{MODULE}.weight"]
        if text is not None:
            checkpoint.metadata[f"{MODULE}.weight"] = text

    return bend


def described(size=64, shape=(40, 256)):
    return metadata(assembled.in_header(size, shape)[f"{MODULE}.weight"])


HALVES = np.ones((5, 64), np.float16)
WORDS = assembled.golden("mbwq/mbwq_q4_g32_perm")["qweight"]
ORDER = np.zeros(160, np.int16)
MIXED_GROUPS = np.array([4, 0, 4, 4, 4, 8, 2, 12], np.int16)
MBWQ_ERRORS = {
    "strategy is no JSON": mbwq(write(STRATEGY, b"{"), f"{STRATEGY} is not valid JSON"),
    "strategy is a list": mbwq(
        lambda c: c.files[STRATEGY].update(measurement=[]),
        f"{STRATEGY}: measurement=[] must be an object",
    ),
    "strategy has no bits": mbwq(
        strategy(bits=[]), f"{STRATEGY}: model.layers.0.q_proj=", "must have bits"
    ),
    "strategy of another file": mbwq(
        strategy(bits=[2], group_size={"2": 32}), IN_FILE, "and bits=2; rows of several"
    ),
    "group size of another strategy": mbwq(
        strategy(group_size={"4": 64}), IN_FILE + "scales.shape=(5, 64) must be (3, 64)"
    ),
    "strategy leaves it dense": mbwq(
        strategy(desc="Not quantized"), SINGLE, STRATEGY, f"leaves {MODULE} dense"
    ),
    "no q_perm": mbwq(
        drop(f"{MODULE}.q_perm"), IN_FILE + "q_perm is missing; found ['channel_scale'"
    ),
    "q_perm of int32": mbwq(put(q_perm=ORDER.astype(np.int32)), "must be int16"),
    "q_perm is no permutation": mbwq(
        put(q_perm=ORDER + 1), IN_FILE + "q_perm must hold each of 0 to 159", reads=True
    ),
    "q_perm is short": mbwq(put(q_perm=ORDER[:-32]), IN_FILE + "qweight.shape[0]=20"),
    "scales of float32": mbwq(put(scales=np.float32(HALVES)), "must be float16"),
    "zeros are NaN": mbwq(
        put(zeros=HALVES * np.nan), IN_FILE + "zeros must be finite", reads=True
    ),
    "channel_scale is short": mbwq(
        put(channel_scale=np.ones((1, 1, 32), np.float16)), "must be (1, 1, 160)"
    ),
    "words are cut": mbwq(
        put(qweight=WORDS[:-1]), IN_FILE + "qweight.shape[0]=19 must"
    ),
    "an asymmetric layer": mbwq(
        put(qscales=np.ones((5, 64), np.uint8)), f"{MODULE}.qscales.dtype=uint8"
    ),
    "q_groups is odd": mbwq(
        put(q_groups=MIXED_GROUPS[1:]), "must be (2 * groups,)", mix="channel-mix"
    ),
    "q_groups grows": mbwq(
        put(q_groups=MIXED_GROUPS + np.int16(1)),
        IN_FILE + "q_groups has widths [5, 5, 5, 3] and first rows [1, 5, 9, 13]",
        **{"mix": "channel-mix", "reads": True},
    ),
    "q_groups is missing": mbwq(
        drop(f"{MODULE}.q_groups"), "come with q_groups", mix="channel-mix"
    ),
    "q_perm is zeros with q_groups": mbwq(
        put(q_perm=ORDER[:128]),
        IN_FILE + "q_perm is all zeros, which means no permutation only without",
        **{"mix": "channel-mix", "reads": True},
    ),
    "groups of nothing known": mbwq(
        put(scales=HALVES[:4], zeros=HALVES[:4]),
        IN_FILE + "scales.shape[0]=4 does not cut k=160 into groups of a power of two",
        mix="without a strategy",
    ),
    "groups and g_idx disagree": mbwq(
        put(g_idx=np.arange(160, dtype=np.int32) // 64),
        IN_FILE + "g_idx does not have the groups of 32 rows",
        **{"mix": "without a strategy", "reads": True},
    ),
}
MPQ_ERRORS = {
    "statistic of another shape": mpq(
        put(qstatistic=np.ones((2, 3, 32), np.uint8)), "qstatistic.shape[1]=3 must"
    ),
    "no scale of the zeros": mpq(
        drop(f"{MODULE}.qzeros_scales"), IN_FILE + "qstatistic and", "or none; found"
    ),
    "rows of no width": mpq(
        put(g_idx=np.zeros(250, np.int32)), IN_FILE, "must be (256,)"
    ),
    "no g_idx": mpq(drop(f"{MODULE}.g_idx"), IN_FILE + "bits=None, from the config"),
    "groups beyond the last": mpq(
        put(g_idx=np.arange(256, dtype=np.int32)), "must lie in 0 to 1", reads=True
    ),
}
TILED_ERRORS = {
    "nothing in the header": tiled(
        metadata(None), f"config.json: {MODULE}: the metadata in", "save the model anew"
    ),
    "no JSON in the header": tiled(
        metadata("{"), f"{SINGLE}: metadata of {MODULE}.weight is not valid JSON"
    ),
    "a list in the header": tiled(metadata("[]"), "must hold a JSON object, not list"),
    "another tensor in the header": tiled(
        metadata('{"_type": "Tensor"}'), "_type='Tensor' in the safetensors header must"
    ),
    "another group size in the header": tiled(
        described(32), "block_size=[1, 32] in the safetensors header must be [1, 64]"
    ),
    "a smaller shape in the header": tiled(
        described(shape=(32, 256)), IN_FILE + "shape=(32, 256) does not fit the padded"
    ),
    "a larger shape in the header": tiled(
        described(shape=(40, 257)), IN_FILE + "shape=(40, 257) does not fit the padded"
    ),
    "factors that no header lists": tiled(
        put(_weight_act_pre_scale=np.ones(256, np.float32)),
        IN_FILE + "the tensors ['_weight_act_pre_scale', '_weight_qdata', '_weight_sc",
    ),
    "experts": tiled(
        lambda c: c.tensors.update(
            {"a.experts._down_proj_qdata": np.zeros(2, np.int8)}
        ),
        "a.experts: the metadata in the safetensors header, which would tell the shape",
    ),
    "scales and zeros of float16": tiled(
        put(_weight_scale_and_zero=np.ones((4, 40, 2), np.float16)), "must be bfloat16"
    ),
}
AWQ_ERRORS = {
    "gemv_fast in larger groups": Case(
        lambda c: c.config["quantization_config"].update(group_size=-1),
        (IN_FILE + "scales must be 0 beyond the 1 groups that group_size gives",),
        make=checkpoint_of("awq gemv_fast"),
        reads=True,
    ),
    "quant_config.json has three bits": Case(
        lambda c: c.files["quant_config.json"].update(w_bit=3),
        ("quant_config.json: bits=3 must be 4",),
        make=checkpoint_of("awq with quant_config.json"),
    ),
    "quant_config.json is of a later version": Case(
        lambda c: c.files["quant_config.json"].update(version="GEMM2"),
        ("quant_config.json: version='GEMM2' is no AWQ layout",),
        make=checkpoint_of("awq with quant_config.json"),
    ),
}
OLD_MODELOPT = "hf_quant_config.json"


def modelopt(bend, *pieces, name="with hf_quant_config.json", reads=False):
    make = checkpoint_of(f"modelopt {name}")
    return Case(bend, pieces, reads=reads, make=make)


def quantized_by(**fields):
    return lambda c: c.files[OLD_MODELOPT]["quantization"].update(fields)


MODELOPT_ERRORS = {
    "an algorithm that is not read": modelopt(
        quantized_by(quant_algo="W4A8_AWQ"),
        f"{OLD_MODELOPT}: quant_algo='W4A8_AWQ' must be one of",
    ),
    "only the cache is quantized": modelopt(
        quantized_by(quant_algo=None), f"{OLD_MODELOPT}: quant_algo=None must be one of"
    ),
    "a wildcard leaves it dense": modelopt(
        quantized_by(exclude_modules=["model.layers.0*"]),
        f"{OLD_MODELOPT} leaves {MODULE} dense",
    ),
    "no layer of a mixture": modelopt(
        lambda c: c.config["quantization_config"].update(
            quantized_layers={f"{MODULE}2": {"quant_algo": "NVFP4"}}
        ),
        f"config.json leaves {MODULE} dense",
        name="mixed",
    ),
    "nothing says how FP8 is quantized": modelopt(
        lambda c: c.files.clear(),
        f"{MODULE}.weight is quantized, but config.json has no quantization_config",
        OLD_MODELOPT,
        name="fp8 with hf_quant_config.json",
    ),
    "factors of AWQ": modelopt(
        put(pre_quant_scale=np.ones(96, np.float16)),
        IN_FILE + "pre_quant_scale is no tensor of NVFP4",
    ),
    "the scale of all is infinite": modelopt(
        put(weight_scale_2=np.float32([np.inf])),
        IN_FILE + "weight_scale_2=[inf] must be finite",
        reads=True,
    ),
    "FP8 instead of NVFP4": modelopt(
        quantized_by(quant_algo="FP8"), IN_FILE + "weight_scale_2 is no tensor of FP8"
    ),
}


def quark(bend, *pieces, name="quark", error=ValueError, reads=False):
    make = checkpoint_of(name)
    return Case(bend, pieces, error=error, reads=reads, make=make)


def weights(**fields):
    """Changes what is said of all weights."""
    return lambda c: c.config["quantization_config"]["global_quant_config"][
        "weight"
    ].update(fields)


QUARK_ERRORS = {
    "Quark: a type of codes that is not read": quark(
        weights(dtype="int3"),
        "config.json: global_quant_config.weight.dtype='int3' is not read",
        error=NotImplementedError,
    ),
    "Quark: no type of codes": quark(
        weights(dtype=None), "config.json: global_quant_config.weight.dtype=None must"
    ),
    "Quark: a wildcard leaves it dense": quark(
        quantization(exclude=["model.layers.0*"]), f"config.json leaves {MODULE} dense"
    ),
    "Quark: a layer stays dense": quark(
        quantization(layer_quant_config={"*_proj": {"weight": None}}),
        f"config.json leaves {MODULE} dense",
    ),
    "Quark: all weights stay dense": quark(
        quantization(export={"weight_format": "fake_quantized"}),
        f"config.json leaves {MODULE} dense",
    ),
    "Quark: a dense weight that should be quantized": quark(
        put(weight=np.ones((16, 64), np.float16)),
        IN_FILE + "weight.dtype=float16 must be int32 in uint4 per_group",
    ),
    "Quark: no tensor is quantized": quark(
        drop(
            *(f"{MODULE}.{name}" for name in ("weight_scale", "weight_zero_point")),
        ),
        "config.json says that the weights are quantized, but no tensor is",
    ),
    "Quark: a pattern that takes forever": quark(
        quantization(exclude=["re:" + ".*" * 30 + "x"]),
        f"config.json: {MODULE}: ",
        "may fit a name of 21 letters in more than",
    ),
    "Quark: larger groups": quark(
        weights(group_size=64), IN_FILE + "weight_scale.shape=(2, 16) must be (1, 16)"
    ),
    "Quark: no zero points": quark(
        drop(f"{MODULE}.weight_zero_point"), IN_FILE + "weight_zero_point is missing"
    ),
    "Quark: rotated inputs": quark(
        put(input_rotation=np.ones((4, 4), np.int8)),
        IN_FILE + "input_rotation is no tensor of uint4 per_group",
    ),
    "Quark: codes with zero points are symmetric": quark(
        weights(symmetric=True),
        IN_FILE + "weight_zero_point must be 0",
        name="quark int8",
        reads=True,
    ),
    "Quark: a scale is not a number": quark(
        put(weight_scale=np.full((16, 2), 255, np.uint8)),
        IN_FILE + "weight_scale holds 255",
        name="quark mxfp6",
        reads=True,
    ),
}


def mlx(bend, *pieces, name="mlx", error=ValueError, reads=False):
    make = checkpoint_of(name)
    return Case(bend, pieces, error=error, reads=reads, make=make)


def llm_int8(bend, *pieces, reads=False):
    make = checkpoint_of("bitsandbytes int8")
    return Case(bend, pieces, reads=reads, make=make)


INT8_ERRORS = {
    "LLM.int8(): the configuration says 4 bits": llm_int8(
        quantization(load_in_4bit=True, load_in_8bit=False),
        IN_FILE + "weight.absmax is missing",
    ),
    "LLM.int8(): or both": llm_int8(
        quantization(load_in_4bit=True),
        "config.json: load_in_4bit=True and load_in_8bit=True: one of them must be",
    ),
    "LLM.int8(): weights of 16 bits": llm_int8(
        quantization(llm_int8_has_fp16_weight=True),
        "config.json: llm_int8_has_fp16_weight=true: such weights are dense",
    ),
    "LLM.int8(): it should be dense": llm_int8(
        quantization(llm_int8_skip_modules=["layers.0"]),
        f"config.json leaves {MODULE} dense",
    ),
    "LLM.int8(): no magnitudes": llm_int8(
        drop(f"{MODULE}.SCB"), IN_FILE + "SCB is missing"
    ),
    "LLM.int8(): too few magnitudes": llm_int8(
        put(SCB=np.ones(6, np.float32)), IN_FILE + "SCB.shape=(6,) must be (7,)"
    ),
    "LLM.int8(): bytes for tensor cores": llm_int8(
        put(weight_format=np.array(3, np.uint8)),
        IN_FILE + "weight_format=3 (col_ampere) must be 0",
        reads=True,
    ),
}


def quanto(bend, *pieces, name="quanto qint4", error=ValueError, reads=False):
    make = checkpoint_of(name)
    return Case(bend, pieces, error=error, reads=reads, make=make)


def said(**fields):
    """Changes what MLX goes by."""
    return lambda c: c.config["quantization"].update(fields)


MLX_ERRORS = {
    "MLX: another width": mlx(
        said(bits=8), IN_FILE + "scales.shape=(7, 2) must be (7, 1), from weight.shape"
    ),
    "MLX: a width that there is not": mlx(
        said(bits=7), "config.json: quantization.bits=7 must be one of (2, 3, 4, 5, 6,"
    ),
    "MLX: a mode that is not read": mlx(
        said(mode="nf4"),
        "config.json: quantization.mode='nf4' is not read",
        error=NotImplementedError,
    ),
    "MLX: a field that is not known": mlx(
        said(rotation="hadamard"),
        "config.json: quantization['rotation']='hadamard' is not known",
        error=NotImplementedError,
    ),
    "MLX: the module has another mode": mlx(
        said(**{MODULE: {"mode": "mxfp4"}}),
        IN_FILE + "biases is no tensor of mlx with mode='mxfp4'",
    ),
    "MLX: the module stays dense": mlx(
        said(**{MODULE: False}), f"config.json leaves {MODULE} dense"
    ),
    "MLX: no offsets": mlx(drop(f"{MODULE}.biases"), IN_FILE + "biases is missing"),
    "MLX: integers that nothing scales": mlx(
        drop(f"{MODULE}.biases", f"{MODULE}.scales"),
        "config.json says that the weights are quantized, but no tensor is",
    ),
    "MLX: nothing says how": mlx(
        lambda c: c.config.pop("quantization"),
        "config.json: quant_method=None is not supported",
    ),
    "MLX: an offset is not finite": mlx(
        put(biases=np.full((6, 3), np.inf, np.float16)),
        IN_FILE + "biases must be finite",
        name="mlx 3 bits",
        reads=True,
    ),
    "MLX: a scale is not a number": mlx(
        put(scales=np.full((6, 6), 127, np.uint8)),
        IN_FILE + "scales must be finite",
        name="mlx nvfp4",
        reads=True,
    ),
    "metal: the module stays dense": mlx(
        quantization(modules_to_not_convert=["q_proj"]),
        f"config.json leaves {MODULE} dense",
        name="metal",
    ),
}


def mapped(**fields):
    """Changes what the map says of the module."""
    return lambda c: c.files["quanto_qmap.json"][MODULE].update(fields)


QUANTO_ERRORS = {
    "quanto: no map": quanto(
        lambda c: c.files.clear(), "is quantized, but config.json has no", "quanto_qmap"
    ),
    "quanto: the map leaves it out": quanto(
        lambda c: c.files["quanto_qmap.json"].clear(),
        f"quanto_qmap.json leaves {MODULE} dense",
    ),
    "quanto: floats that are not read": quanto(
        mapped(weights="qfloat8_e5m2"),
        f"quanto_qmap.json: {MODULE}.weights='qfloat8_e5m2' is not read",
        error=NotImplementedError,
    ),
    "quanto: types that there are not": quanto(
        mapped(weights="qint5"), f"{MODULE}.weights='qint5' must be one of"
    ),
    "quanto: as transformers' configuration has it": quanto(
        lambda c: c.config.update(
            quantization_config={"quant_method": "quanto", "weights": "int8"}
        ),
        "config.json: weights='int8' must be an object",
    ),
    "quanto: other bits": quanto(
        mapped(weights="qint2"), IN_FILE + "weight._data._data.shape=(4, 128) must be"
    ),
    "quanto: eight bits": quanto(
        mapped(weights="qint8"), IN_FILE + "weight._data is missing"
    ),
    "quanto: inputs that do not fit": quanto(
        mapped(in_features=192), IN_FILE + "weight._data._data.shape=(4, 128) must be"
    ),
    "quanto: nobody says how many inputs": quanto(
        lambda c: c.config.update(hidden_size=128),
        f"quanto_qmap.json: {MODULE}: 8 groups of 128 do not say how many inputs",
    ),
    "quanto: a scale is not a number": quanto(
        put(**{"weight._scale": np.full((7, 1), np.nan, np.float32)}),
        IN_FILE + "weight._scale must be finite",
        name="quanto qint8",
        reads=True,
    ),
}
TABLES = (
    INT8_ERRORS,
    QUANTO_ERRORS,
    MBWQ_ERRORS,
    MPQ_ERRORS,
    TILED_ERRORS,
    AWQ_ERRORS,
    MODELOPT_ERRORS,
    QUARK_ERRORS,
    MLX_ERRORS,
)
CASES = {name: case for table in TABLES for name, case in table.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_malformed(case, tmp_path, monkeypatch):
    assert_refused(case, tmp_path, monkeypatch)


def test_tables_have_no_two_cases_of_one_name():
    assert len(CASES) == sum(map(len, TABLES))
