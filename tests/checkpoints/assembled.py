"""Directories of all dialects, put together from what the upstream tools packed.

The tensors are those of tests/golden, each in one module of a tiny model; the JSON
beside them is what the upstream tool writes for them. Those of MBWQ and MPQ are as
bitorch-engine saves its layers and green-bit-llm reads them (GreenBitAI/bitorch-engine,
bitorch_engine/layers/qlinear/nbit/layer.py and cuda/mbwq_layer.py, commit
0009b1f8178e86df6433383879c0005a49c0cc92; GreenBitAI/green-bit-llm,
green_bit_llm/common/model.py and utils.py, commit
71a575da60524c9f7b1b04f63ad397a7c7650309): no quantization_config, a
``quant_strategy.json`` for layers and channels of several widths, nothing otherwise.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from tests import oracle
from tests.checkpoints.tiny import MODULE, Checkpoint
from tests.goldens import arrays

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK, _, NAME = MODULE.rpartition(".")
# What NumPy's files hold as integers.
_VIEWED = ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu")


@dataclasses.dataclass
class Assembled:
    """A checkpoint of one quantized module, and the weight ``[k, n]`` upstream gets.

    And the one that it multiplies by, if that is rounded in other places.
    """

    checkpoint: Checkpoint
    weight: np.ndarray
    prepared: np.ndarray | None = None


@functools.cache
def golden(path: str) -> dict:
    """The arrays of a file, those in bfloat16 as such, and its ``meta``."""
    data = arrays(GOLDEN / f"{path}.npz")
    meta = json.loads(str(data.pop("meta")))
    for name, dtype in meta.get("dtypes", {}).items():
        if dtype in _VIEWED and name in data:
            data[name] = data[name].view(dtype)
    if meta.get("dtype") == "bfloat16":  # widened there
        for name in ("scales", "zeros", "w_unpacked"):
            data[name] = data[name].astype(ml_dtypes.bfloat16)
    return data | {"meta": meta}


def assemble(
    tensors: dict,
    weight: np.ndarray,
    quantization: dict | None = None,
    module: str = MODULE,
    **fields,
) -> Assembled:
    config = {"model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = quantization
    # safetensors writes the memory of an array, whatever its strides.
    stored = {
        f"{module}.{name}": np.ascontiguousarray(array).reshape(np.shape(array))
        for name, array in tensors.items()
    }
    stored["model.norm.weight"] = np.ones(4, np.float32)
    return Assembled(Checkpoint(stored, config, **fields), weight)


def state(data: dict) -> dict:
    """What a layer's ``state_dict`` held."""
    return {k.removeprefix("state_"): v for k, v in data.items() if "state_" in k[:6]}


def gptq() -> Assembled:
    data = golden("gptq/gptq_v2__gptqmodel__b4_g32_desc__64x96__s342")
    names = ("qweight", "qzeros", "scales", "g_idx")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    return assemble(
        {name: data[f"packed_{name}"] for name in names},
        data["out_dequant_kn"],
        config | {"checkpoint_format": "gptq_v2"},
    )


def awq(version: str, path: str, size: int, weight: str) -> Assembled:
    data = golden(path)
    names = ("qweight", "qzeros", "scales")
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version}
    return assemble(
        {name: data[f"packed_{name}"] for name in names}, data[weight], config
    )


def old_awq() -> Assembled:
    """AutoAWQ's first releases wrote a file of their own, in other terms."""
    made = awq("gemm", "awq/autoawq_gemm__g32__32x64__s202", 32, "out_dequant_kn")
    del made.checkpoint.config["quantization_config"]
    entry = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    made.checkpoint.files["quant_config.json"] = entry
    return made


def exl2(quantization: dict | None) -> Assembled:
    data = golden("exl2/exl2_b43_g128")
    names = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm")
    tensors = {name: data[name] for name in names}
    return assemble(tensors, data["w_deq"], quantization)


def hqq() -> Assembled:
    data = golden("hqq/hqq_layer__b4_g64_axis1_float16__16x128__s640")
    weight = {"nbits": 4, "group_size": 64, "axis": 1, "optimize": False}
    weight |= {"view_as_float": False, "channel_wise": True, "round_zero": True}
    weight["round_zero"] = bool(data["state_round_zero"])
    entry = {"weight_quant_params": weight, "scale_quant_params": None}
    entry |= {"zero_quant_params": None, "offload_meta": False}
    config = {"quant_method": "hqq", "quant_config": entry, "skip_modules": ["lm_head"]}
    return assemble(state(data), data["out_dequant"].T, config)


def bnb() -> Assembled:
    data = golden("bnb/bnb_4bit__nf4_b64_double_float16__16x128__s701")
    tensors = {
        f"weight.{name.replace('state__', 'state.')}": array
        for name, array in state(data).items()
    }
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config |= {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    config |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"}
    return assemble({"weight": data["packed"]} | tensors, data["out_dequant"].T, config)


def bnb_int8() -> Assembled:
    data = golden("bnb/bnb_int8__float32__7x50__s722")
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config |= {"load_in_4bit": False, "llm_int8_threshold": 6.0}
    config |= {"llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None}
    made = assemble(state(data), data["out_dequant"].T, config)
    made.prepared = data["out_identity"].T
    return made


def compressed_tensors() -> Assembled:
    data = golden("compressed_tensors/ct_packquant__b4_g32_asym_float16__16x128__s851")
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights |= {"group_size": 32, "actorder": None, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    config |= {"quantization_status": "compressed", "version": "0.12.0"}
    return assemble(state(data), data["out_dequant"].T, config)


def compressed_floats(name: str) -> Assembled:
    data = golden(f"compressed_tensors/ctfloat_{name}")
    described = data["meta"]["config"]
    group = {"targets": ["Linear"], "weights": described["weights"]}
    config = {"quant_method": "compressed-tensors", "format": described["format"]}
    config |= {"config_groups": {"group_0": group}, "version": "0.20.0"}
    return assemble(state(data), data["out_dequant"].T, config)


def fp8() -> Assembled:
    data = golden("fp8/fp8_finegrained__bfloat16__32x96__s911")
    tensors = {"weight": data["weight"], "weight_scale_inv": data["scale"]}
    return assemble(tensors, data["out_dequant"].T, data["meta"]["config"])


def scales_alone(name: str, key: str) -> Assembled:
    """FP8 whose configuration says nothing of its scales."""
    data = golden(f"fp8/fp8_{name}")
    tensors = {"weight": data["weight"], key: data["scale"]}
    if key == "weight_scale":
        tensors["input_scale_ub"] = np.full(1, 1200, np.float32)
    return assemble(tensors, data["out_dequant"].T, data["meta"]["config"])


def bitnet() -> Assembled:
    data = golden("bitnet/bitnet_autobitlinear__32x96__s1200")
    tensors = {name: data[name] for name in ("weight", "weight_scale")}
    # What it is multiplied by is of the dtype of the scale, and was widened.
    weight = data["out_identity"].astype(tensors["weight_scale"].dtype)
    return assemble(tensors, weight, data["meta"]["config"])


def modelopt(name: str, **changes) -> Assembled:
    """With the scale of a KV cache, as ModelOpt writes it beside the weight."""
    data = golden(f"modelopt/modelopt_{name}")
    config = data["meta"]["config"] | changes
    made = assemble(state(data), data["out_dequant"].T, config)
    scale = np.asarray(0.25, np.float32)
    made.checkpoint.tensors[f"{BLOCK}.k_proj.k_scale"] = scale
    return made


def old_modelopt(name: str) -> Assembled:
    """Directories of older releases, and what of others stands beside config.json."""
    made = modelopt(name)
    del made.checkpoint.config["quantization_config"]
    entry = golden(f"modelopt/modelopt_{name}")["meta"]["hf_quant_config"]
    made.checkpoint.files["hf_quant_config.json"] = copy.deepcopy(entry)
    return made


def quark(name: str) -> Assembled:
    """As it is multiplied by: rounded to what the model was in."""
    data = golden(f"quark/quark_{name}")
    scale = data["state_weight_scale"].dtype
    dtype = scale if scale == np.float16 else ml_dtypes.bfloat16
    config = copy.deepcopy(data["meta"]["config"])
    return assemble(state(data), data["out_dequant"].T.astype(dtype), config)


def mlx(name: str) -> Assembled:
    """With the configuration twice, as mlx-lm writes it."""
    data = golden(f"mlx/mlx_{name}")
    config = data["meta"]["config"]
    made = assemble(state(data), data["out_dequant"].T, copy.deepcopy(config))
    made.checkpoint.config["quantization"] = copy.deepcopy(config)
    return made


def metal() -> Assembled:
    data = golden("metal/metal_b4_g64_bfloat16__5x128__s1451")
    config = data["meta"]["config"] | {"modules_to_not_convert": ["lm_head"]}
    return assemble(state(data), data["out_dequant"].T, config)


def quanto(name: str, **sizes) -> Assembled:
    """With the map beside config.json, which says the sizes of its one layer."""
    data = golden(f"quanto/quanto_linear__{name}")
    made = assemble(state(data), data["out_dequant"].T)
    made.checkpoint.config |= sizes
    entry = copy.deepcopy(data["meta"]["config"])
    made.checkpoint.files["quanto_qmap.json"] = {MODULE: entry}
    return made


def sinq(kind: str, entry: bool = True) -> Assembled:
    """What SINQ saves; transformers alone writes a ``quantization_config``."""
    (path,) = GOLDEN.glob(f"sinq/sinq_{kind}__*.npz")
    data = golden(f"sinq/{path.stem}")
    files = {
        "model.safetensors.index.json.meta.json": {MODULE: data["meta"]["sidecar"]}
    }
    config = {"quant_method": "sinq", "nbits": 4, "tiling_mode": "1D"}
    config |= {"method": "sinq", "modules_to_not_convert": ["lm_head"]}
    weight = data["out_dequant"].T
    return assemble(state(data), weight, config if entry else None, files=files)


def torchao_entry(kind: str, **data) -> dict:
    default = {"_type": kind, "_version": 2, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": default}}


def torchao() -> Assembled:
    data = golden("torchao/torchao_tensors__int4_g32__24x64__s0")
    config = torchao_entry(
        "IntxWeightOnlyConfig",
        weight_dtype={"_type": "torch.dtype", "_data": "int4"},
        granularity={"_type": "PerGroup", "_data": {"group_size": 32}},
    )
    return assemble(state(data), data["out_dequant"].T, config)


def torchao_weight(kind: str) -> Assembled:
    """What torchao stored, with the header that says what it is."""
    (path,) = GOLDEN.glob(f"torchao/torchao_weights__{kind}__*.npz")
    data = golden(f"torchao/{path.stem}")
    weight, meta = f"{MODULE}.weight", data["meta"]
    texts = {weight: meta["header"], "tensor_names": json.dumps([weight])}
    config = {"quant_method": "torchao", "quant_type": {"default": meta["quant_type"]}}
    dense = data["out_dequant"].T
    if (factors := data.get("state__weight_act_pre_scale")) is not None:
        wide = dense.astype(np.float32) * factors.astype(np.float32)[:, None]
        dense = wide.astype(dense.dtype)
    return assemble(state(data), dense, config, metadata=texts)


def in_header(size: int, shape: tuple[int, int]) -> dict[str, str]:
    """The metadata that torchao has safetensors keep."""
    entry = {
        "_type": "Int4TilePackedTo4dTensor",
        "_data": {"block_size": [1, size], "shape": list(shape)},
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }
    plain = json.dumps({"_type": "Tensor"})
    weight = f"{MODULE}.weight"
    names = json.dumps([weight, "model.norm.weight"])
    return {
        **{weight: json.dumps(entry), "model.norm.weight": plain},
        **{"tensor_names": names, "format": "pt"},
    }


def torchao_tiled(shape: tuple[int, int] = (40, 256)) -> Assembled:
    """int4 for tensor cores; ``shape`` cuts what counts as padding."""
    data = golden("tinygemm/tinygemm_tc__i8_g64_adv__40x256__s411")
    config = torchao_entry(
        "Int4WeightOnlyConfig", group_size=64, int4_packing_format="tile_packed_to_4d"
    )
    tensors = {
        "_weight_qdata": data["packed"],
        "_weight_scale_and_zero": data["packed_scales_and_zeros"],
    }
    weight = data["out_dequant_fused"][: shape[0], : shape[1]].T
    return assemble(tensors, weight, config, metadata=in_header(64, shape))


def strategy(bits: list[int], sizes: list[int], props: list[float]) -> dict:
    """The ``quant_strategy.json`` of green-bit-llm."""
    by_bits = {str(b): size for b, size in zip(bits, sizes, strict=True)}
    one = {"group_size": by_bits, "bits": bits, "bits_prop": props, "scale_bits": 4}
    return {"quant_strategy.json": {"measurement": {BLOCK: {NAME: one}}}}


def mbwq(path: str, files: dict, saved: bool = False) -> Assembled:
    """One width, or several; ``saved`` before `prepare_params` freed its buffers."""
    data = golden(f"mbwq/{path}")
    names = ("qweight", "scales", "zeros", "q_perm", "q_groups")
    tensors = {name: data[name] for name in names if name in data}
    k, n = data["w_deq"].shape
    tensors["channel_scale"] = data["channel_scale"].reshape(1, 1, k)
    weight = data["w_deq"]
    if saved:
        runs = (len(data["scales"]), n // 32)
        size = data["meta"]["group_size"]
        tensors |= {
            "g_idx": np.arange(k, dtype=np.int32) // size,
            "wf": np.arange(0, 32, 4, dtype=np.int32)[None],
            "bias": np.zeros(n, np.float16),
            "qstatistic": np.ones((*runs, 32), np.uint8),
            "qzeros_zeros": np.zeros((*runs, 1), np.float16),
            "qzeros_scales": np.ones((*runs, 1), np.float16),
            "qscales_zeros": np.zeros((*runs, 1), np.float16),
            "qscales_scales": np.ones((*runs, 1), np.float16),
        }
    return assemble(tensors, weight, files=files)


def mpq_double() -> Assembled:
    """GBA as it is published, its scales in four bits; nothing says how but shapes."""
    data = golden("mpq/mpq_gba_w4_g128")
    rng, bits = np.random.default_rng(0), data["meta"]["bits"]
    k, n = data["meta"]["K"], data["meta"]["N"]
    codes = rng.integers(0, 2**bits, (k, n))
    indices = ("qzeros_zeros", "qzeros_scales", "qscales_zeros", "qscales_scales")
    tensors = {name: data[name] for name in ("g_idx", "qstatistic", *indices)}
    tensors |= {
        "qweight": oracle.pack(codes, bits).view(np.int32),
        "scales": np.ones_like(data["scales"]),  # as they were before any loading
        "zeros": np.zeros_like(data["zeros"]),
        "wf": np.arange(0, 32, bits, dtype=np.int32)[None],
        "bias": np.zeros(n, np.float16),
    }
    scale, zero = data["scales"][data["g_idx"]], data["zeros"][data["g_idx"]]
    # NumPy rounds each operation to float16, as upstream's unpacking does.
    return assemble(tensors, codes.astype(np.float16) * scale - zero)


def mpq(path: str, quantization: dict | None = None) -> Assembled:
    data = golden(f"mpq/{path}")
    names = ("qweight", "g_idx", "scales", "zeros", "qzeros")
    tensors = {name: data[name] for name in names if name in data}
    return assemble(tensors, data["w_unpacked"], quantization)


def mxfp4() -> Assembled:
    """Experts of gpt-oss, under the names that transformers has."""
    data = golden("mxfp4/mxfp4_moe__random__e3_24x160__s900")
    experts = f"{BLOCK}.mlp.experts"
    stored = {f"{experts}.gate_up_proj_{k}": data[k] for k in ("blocks", "scales")}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    made = assemble({}, data["out_dequant"], config)
    made.checkpoint.tensors |= stored
    return made


AWQ = "awq/autoawq_{}__g32__32x64__s202"
FAST = "awq_v2/autoawq_gemvfast__g128__32x256__s200"
DIALECTS: dict[str, Callable[[], Assembled]] = {
    "gptq": gptq,
    "awq gemm": lambda: awq("gemm", AWQ.format("gemm"), 32, "out_dequant_kn"),
    "awq gemv": lambda: awq("gemv", AWQ.format("gemv"), 32, "ref_dequant_kn"),
    "awq gemv_fast": lambda: awq("gemv_fast", FAST, 128, "ref_dequant_kn"),
    "awq with quant_config.json": old_awq,
    "exl2": lambda: exl2({"quant_method": "exl2", "bits": 3.1, "head_bits": 6}),
    "exl2 without a config": lambda: exl2(None),
    "hqq": hqq,
    "bitsandbytes": bnb,
    "bitsandbytes int8": bnb_int8,
    "compressed-tensors": compressed_tensors,
    "compressed-tensors fp8": lambda: compressed_floats(
        "float_quantized__channel_bfloat16__16x48__s901"
    ),
    "compressed-tensors nvfp4": lambda: compressed_floats(
        "nvfp4_pack_quantized__g16__16x96__s907"
    ),
    "fp8": fp8,
    "fp8 without a block size": lambda: scales_alone(
        "default__float32__256x384__s914", "weight_scale_inv"
    ),
    "fbgemm_fp8": lambda: scales_alone("fbgemm__float32__32x96__s913", "weight_scale"),
    "bitnet": bitnet,
    "modelopt fp8": lambda: modelopt("fp8__32x96__s1100"),
    "modelopt fp8_pb_wo": lambda: modelopt("fp8_pb_wo__128x384__s1102"),
    "modelopt mxfp8": lambda: modelopt("mxfp8__32x96__s1103"),
    "modelopt nvfp4": lambda: modelopt(
        "nvfp4__32x96__s1104", quant_method="modelopt_fp4"
    ),
    "modelopt mixed": lambda: modelopt(
        "w4a16_nvfp4__32x96__s1105",
        quant_algo="MIXED_PRECISION",
        quantized_layers={MODULE: {"quant_algo": "W4A16_NVFP4", "group_size": 16}},
    ),
    "modelopt with hf_quant_config.json": lambda: old_modelopt("nvfp4__32x96__s1104"),
    "modelopt fp8 with hf_quant_config.json": lambda: old_modelopt(
        "fp8_per_channel__32x96__s1101"
    ),
    "quark": lambda: quark("uint4_group_order__16x64__s1314"),
    "quark int4": lambda: quark("int4_channel__16x64__s1308"),
    "quark int8": lambda: quark("int8_group__16x64__s1304"),
    "quark uint2": lambda: quark("uint2_group_float_zero__16x64__s1318"),
    "quark fp8": lambda: quark("fp8_channel__16x64__s1301"),
    "quark mxfp4": lambda: quark("mxfp4__16x64__s1319"),
    "quark mxfp6": lambda: quark("mxfp6_e3m2__16x64__s1321"),
    "quark nvfp4": lambda: quark("nvfp4__16x64__s1324"),
    "mlx": lambda: mlx("affine__b4_g64_bfloat16__7x128__s1405"),
    "mlx 3 bits": lambda: mlx("affine__b3_g32_float16__6x96__s1402"),
    "mlx mxfp8": lambda: mlx("mxfp8__6x96__s1431"),
    "mlx nvfp4": lambda: mlx("nvfp4__6x96__s1432"),
    "metal": metal,
    "quanto qint4": lambda: quanto(
        "qint4_float16__4x256__s163",
        **{"hidden_size": 256, "num_attention_heads": 2, "head_dim": 2},
    ),
    "quanto qint2": lambda: quanto("qint2_float16_spread__7x50__s162"),
    "quanto qint8": lambda: quanto("qint8_float32__7x50__s171"),
    "quanto qfloat8": lambda: quanto("qfloat8_bfloat16_spread__16x48__s177"),
    "sinq": lambda: sinq("b4_aux"),
    "sinq of 3 bits": lambda: sinq("b3_plain", entry=False),
    "sinq of 6 bits": lambda: sinq("b6_plain"),
    "torchao": torchao,
    "torchao int8 awq": lambda: torchao_weight("int8_awq"),
    "torchao int4": lambda: torchao_weight("plain_int4"),
    "torchao int4 awq": lambda: torchao_weight("plain_int4_awq"),
    "torchao fp8": lambda: torchao_weight("float8_row"),
    "torchao mxfp8": lambda: torchao_weight("mxfp8"),
    "torchao mxfp4": lambda: torchao_weight("mxfp4"),
    "torchao nvfp4": lambda: torchao_weight("nvfp4"),
    "torchao tiled": torchao_tiled,
    "torchao tiled and padded": lambda: torchao_tiled((35, 200)),
    "mbwq layer-mix": lambda: mbwq("mbwq_q4_g32_perm", strategy([4], [32], [1.0])),
    "mbwq layer-mix before it is prepared": lambda: mbwq(
        "mbwq_q2_g64_noperm", strategy([2], [64], [1.0]), saved=True
    ),
    "mbwq channel-mix": lambda: mbwq(
        "mbwq_exl2_b42_g32_identity", strategy([4, 2], [32, 32], [0.75, 0.25])
    ),
    "mbwq without a strategy": lambda: mbwq("mbwq_q4_g32_perm", {}),
    "mpq, double quantized": mpq_double,
    "mpq of bfloat16": lambda: mpq("mpq_gba_gidx_b4_bf16"),
    "mpq of gptq": lambda: mpq("mpq_gptq_b4", {"quant_method": "mpq"}),
    "mxfp4": mxfp4,
}


def checkpoint_of(dialect: str) -> Callable[[], Checkpoint]:
    return lambda: DIALECTS[dialect]().checkpoint
