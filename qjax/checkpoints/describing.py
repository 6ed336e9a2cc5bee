"""The ``quantization_config`` of what `save` writes, one function for each dialect.

Each takes the matrices by the paths of their modules, whose leaves may be abstract, and
the paths of modules with a dense matrix.
"""

import collections
import dataclasses
import glob
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from qjax import tensor
from qjax.formats import (
    bnb,
    fp8,
    hqq,
    mlx,
    modelopt,
    quanto,
    quark,
    torchao,
)
from qjax.formats import compressed_tensors_floats as floats
from qjax.formats.block_scale import BlockScale
from qjax.tensor import QTensor

Matrices = Mapping[str, QTensor]


def of_gptq(
    checkpoint_format: str, matrices: Matrices, dense: Sequence[str]
) -> dict[str, Any]:
    """GPTQ's, with an entry for each matrix that is not like most."""
    kinds = {name: width(qt) for name, qt in matrices.items()}
    bits, size = most_common(kinds)
    # Loaders leave a head dense unless "lm_head" says otherwise.
    rules: dict[str, Any] = {
        f"-:{_exactly(name)}": {} for name in dense if name != "lm_head"
    }
    rules |= {
        f"+:{_exactly(name)}": {"bits": kind[0], "group_size": _or_all(kind[1])}
        for name, kind in kinds.items()
        if kind != (bits, size)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": _or_all(size),
        "desc_act": any(
            qt.row_group is not None or qt.order is not None for qt in matrices.values()
        ),
        "sym": all(qt.zero is None for qt in matrices.values()),
        "lm_head": "lm_head" in matrices,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qjax"]},
    } | ({"dynamic": rules} if rules else {})


def of_awq(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """AutoAWQ's; all matrices are alike."""
    _, size = most_common({name: width(qt) for name, qt in matrices.items()})
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _or_all(size),
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(dense) or None,
    }


def of_fp8(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """Fine-grained FP8's, as DeepSeek-V3 and Qwen3 have it."""
    config = most_common({name: fp8.config_of(qt) for name, qt in matrices.items()})
    size = config.block_size
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if size is None else list(size),
        "scale_fmt": config.scale_fmt,
        "modules_to_not_convert": list(dense) or None,
    }


def of_bitnet(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """BitNet's, as transformers has it."""
    del matrices  # All are of one kind.
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(dense) or None,
    }


def of_bitsandbytes(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """bitsandbytes', as transformers has it; all matrices are of one kind."""
    eight = any(bnb.is_int8(qt) for qt in matrices.values())
    entry = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dense) or None,
        # What transformers takes where nothing is said.
        "llm_int8_threshold": 6.0,
    }
    if eight:
        return entry
    quant_type, storage = most_common(kinds_of_bitsandbytes(matrices))
    dtypes = {name: qt.dtype.name for name, qt in matrices.items()}
    nested = any(_absmax(qt).nested is not None for qt in matrices.values())
    return entry | {
        "bnb_4bit_compute_dtype": most_common(dtypes),
        "bnb_4bit_quant_storage": storage,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
    }


def kinds_of_bitsandbytes(matrices: Matrices) -> dict[str, tuple[str, str]]:
    """The codes of each matrix, and the dtype as which they are stored."""
    return {
        name: ("LLM.int8()", "int8")
        if bnb.is_int8(qt)
        else (_absmax(qt).quant_type, _absmax(qt).storage)
        for name, qt in matrices.items()
    }


def _absmax(qt: QTensor) -> bnb.Absmax:
    """The scale of a matrix that `bnb.encoded` has seen."""
    return cast(bnb.Absmax, qt.scale)


def of_modelopt(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """NVIDIA ModelOpt's; one algorithm is for all."""
    algorithms = {name: modelopt.algorithm_of(qt) for name, qt in matrices.items()}
    size = next(iter(matrices.values())).segments[0].group_size
    return {
        "quant_method": "modelopt",
        "quant_algo": most_common(algorithms),
        "group_size": size,
        "ignore": list(dense),
        "producer": {"name": "qjax"},
    }


def of_quanto(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """optimum-quanto's map of modules, beside which config.json says nothing."""
    del dense  # The map has what is quantized.
    configs = {name: quanto.config_of(qt) for name, qt in matrices.items()}
    return {"quant_method": "quanto"} | {
        name: {"weights": config.weights, "activations": "none"}
        | ({} if config.k is None else {"in_features": config.k})
        for name, config in configs.items()
    }


def of_quark(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """AMD Quark's, with an entry for each matrix that is not like most."""
    schemes = {name: quark.scheme_of(qt) for name, qt in matrices.items()}
    usual = most_common(schemes)
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": usual.to_json(),
        "layer_type_quant_config": {},
        "layer_quant_config": {
            glob.escape(name): scheme.to_json()
            for name, scheme in schemes.items()
            if scheme != usual
        },
        "kv_cache_quant_config": {},
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": [glob.escape(name) for name in dense],
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        # The release whose files these are like.
        "version": "0.13",
    }


def of_mlx(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """MLX's "quantization", with an entry for each matrix that is not like most."""
    del dense  # A module is quantized if it has scales.
    configs = {name: mlx.config_of(qt).to_json() for name, qt in matrices.items()}
    usual = dict(most_common({name: (*one.items(),) for name, one in configs.items()}))
    return usual | {name: one for name, one in configs.items() if one != usual}


def of_metal(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """That of transformers for Apple's GPUs; all matrices are alike."""
    configs = {name: mlx.config_of(qt, "metal") for name, qt in matrices.items()}
    # Of two numbers; a `Config` has a mapping, and cannot be counted.
    bits, size = most_common({k: (c.bits, c.group_size) for k, c in configs.items()})
    return {
        "quant_method": "metal",
        "bits": bits,
        "group_size": size,
        "modules_to_not_convert": list(dense) or None,
    }


def of_torchao(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """torchao's, as transformers has it; headers of the files say the rest."""
    configs = {name: torchao.config_of(qt) for name, qt in matrices.items()}
    kinds = {name: config.described_alike() for name, config in configs.items()}
    usual = most_common(kinds)
    default = usual.to_json()
    if set(kinds.values()) != {usual}:
        by_name = {name: kind.to_json() for name, kind in kinds.items()}
        data = {"fqn_to_config": by_name}
        default = {"_type": "FqnToConfig", "_version": 1, "_data": data}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": default},
        "modules_to_not_convert": list(dense),
        "include_input_output_embeddings": any(
            "embed" in name.rpartition(".")[2] for name in matrices
        ),
        "untie_embedding_weights": False,
    }


def of_compressed(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """compressed-tensors', with a group for each scheme."""
    kinds = {name: _scheme(qt) for name, qt in matrices.items()}
    usual = most_common(kinds)
    schemes = [
        usual,
        *(kind for kind in dict.fromkeys(kinds.values()) if kind != usual),
    ]
    formats = {scheme.format for scheme in schemes}
    groups = {
        f"group_{i}": {
            "format": scheme.format,
            "input_activations": None,
            "output_activations": None,
            # Paths go before classes.
            "targets": ["Linear"]
            if scheme == usual
            else [name for name, kind in kinds.items() if kind == scheme],
            "weights": {
                "actorder": scheme.actorder,
                "block_structure": scheme.block_size and list(scheme.block_size),
                "dynamic": False,
                "group_size": scheme.group_size,
                "num_bits": scheme.bits,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": scheme.strategy,
                "symmetric": scheme.symmetric,
                "type": "float" if scheme.is_float else "int",
            },
        }
        for i, scheme in enumerate(schemes)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # The last release that packs as `Dense` and reads weight_g_idx.
        "version": "0.19.0",
    }


@dataclasses.dataclass(frozen=True)
class _Scheme:
    bits: int
    group_size: int | None
    strategy: str
    symmetric: bool
    actorder: str | None
    format: str = "pack-quantized"
    block_size: tuple[int, int] | None = None
    is_float: bool = False


def _scheme(qt: QTensor) -> _Scheme:
    bits, size = width(qt)
    whole = tuple(qt.scale.shape) == (1, 1) and qt.n > 1
    strategy = "tensor" if whole else "channel" if size is None else "group"
    if qt.affine is tensor.Affine.FLOAT:
        return _float_scheme(qt, strategy)
    sorted_ = qt.row_group is not None or qt.order is not None
    return _Scheme(
        bits=bits,
        group_size=size if strategy == "group" else None,
        strategy=strategy,
        symmetric=qt.zero is None,
        actorder="group" if sorted_ and strategy == "group" else None,
    )


def _float_scheme(qt: QTensor, strategy: str) -> _Scheme:
    (bits, size), format_ = width(qt), floats.format_of(qt)
    block_size = None
    if isinstance(qt.scale, BlockScale):
        strategy, block_size = "block", (qt.scale.rows, qt.scale.columns)
    elif size is not None and qt.scale.shape[-1] < qt.n:
        strategy, block_size = "block", (qt.n, size)
    elif format_ == floats.NVFP4:
        strategy = "tensor_group"
    return _Scheme(
        bits=bits,
        group_size=size if strategy.endswith("group") else None,
        strategy=strategy,
        symmetric=True,
        actorder=None,
        format=format_,
        block_size=block_size,
        is_float=True,
    )


def of_exl2(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """ExLlamaV2's."""
    del dense  # A module is quantized if its tensors are.
    body = {name: qt for name, qt in matrices.items() if name != "lm_head"} or matrices
    weights = sum(qt.k * qt.n for qt in body.values())
    mean = sum(qt.bits * qt.k * qt.n for qt in body.values()) / weights
    head = matrices.get("lm_head")
    return {
        "quant_method": "exl2",
        "bits": round(mean, 2),
        "head_bits": 16 if head is None else round(head.bits),
    }


def of_hqq(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    """HQQ's, with an entry for each kind of module, if they differ."""
    tagged = {hqq.tag_of(name): hqq.config_of(qt) for name, qt in matrices.items()}
    one, *others = dict.fromkeys(tagged.values())
    by_tag = {tag: config.to_json() for tag, config in tagged.items()}
    return {
        "quant_method": "hqq",
        "quant_config": by_tag if others else one.to_json(),
        # Transformers compares tags, not paths.
        "skip_modules": sorted({hqq.tag_of(name) for name in dense}),
    }


def width(qt: QTensor) -> tuple[int, int | None]:
    """Bits and group size of a matrix that has one width."""
    return qt.segments[0].bits, qt.segments[0].group_size


def _or_all(size: int | None) -> int:
    return -1 if size is None else size


def most_common(kinds: Mapping[str, Any]) -> Any:
    """The kind that most matrices have."""
    kinds_: Sequence[Hashable] = list(kinds.values())
    return collections.Counter(kinds_).most_common(1)[0][0]


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"
