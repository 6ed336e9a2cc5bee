"""Makes the ``torchao_weights__*`` beside this file: what torchao stores and rebuilds.

Run by hand: ``pip install torch==2.13.0 torchao==0.18.0``, ``pip download --no-deps
fbgemm-gpu-genai==1.4.2`` and ``python tests/golden/torchao/make_vectors.py
fbgemm_gpu_genai-*.whl``. A CPU will do: of the wheel only functions in Python are used.
"""

import json
import sys
import types
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchao.core.config import config_to_dict
from torchao.prototype.awq import AWQConfig
from torchao.prototype.mx_formats import (
    MXDynamicActivationMXWeightConfig,
    NVFP4WeightOnlyConfig,
)
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Float8DynamicActivationInt4WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerTensor,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerBlock
from torchao.quantization.quantize_.workflows.int4 import int4_tensor

FOLDER = Path(__file__).parent
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FP4, FP8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
# What NumPy has no dtypes for.
STORED = {
    BF16: torch.int16,
    FP8: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}


def of_fbgemm(wheel: str) -> types.ModuleType:
    """The module that torchao imports of MSLK, which took it over from FBGEMM."""
    path = "fbgemm_gpu/experimental/gen_ai/quantize.py"
    text = zipfile.ZipFile(wheel).read(path).decode()
    # Triton's quantizer of inputs, which is not called.
    name = "fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].quantize_fp8_row = None
    module = types.ModuleType("quantize")
    exec(compile(text, path, "exec"), vars(module))
    return module


def weight_of(n: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random rows of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-9, 4, (n, -(-k // 16)), generator=generator))
    w = torch.randn(n, k, generator=generator)
    return (w * size.float().repeat_interleave(16, 1)[:, :k]).to(dtype)


def by_config(config: Any) -> Callable[[torch.Tensor], Any]:
    def make(w: torch.Tensor) -> Any:
        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(*w.shape[::-1], False)})
        model["layer"].weight.data = w
        quantize_(model.to(w.dtype), config)
        return model["layer"].weight.data

    make.config = config
    return make


def with_inputs(wrap: Any, base: Any) -> Callable[[torch.Tensor], Any]:
    """AWQ and SmoothQuant, which look at inputs."""

    def make(w: torch.Tensor) -> Any:
        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(*w.shape[::-1], False)})
        model["layer"].weight.data = w
        quantize_(model, wrap(base, step="prepare"))
        model["layer"](weight_of(8, w.shape[1], w.dtype, 99))
        quantize_(model, wrap(base, step="convert"))
        return model["layer"].weight.data

    make.config = wrap(base, step="prepare_for_loading")
    return make


def with_factors(config: Any) -> Callable[[torch.Tensor], Any]:
    """AWQ's tensor, without its search, which multiplies on a GPU."""

    def make(w: torch.Tensor) -> Any:
        factors = torch.exp2(torch.randn(w.shape[1])).to(w.dtype)
        made = by_config(config)(w * factors)
        made.act_pre_scale = 1.0 / factors
        return made

    make.config = AWQConfig(config, step="prepare_for_loading")
    return make


def float8(granularity: Any) -> Callable[[torch.Tensor], Any]:
    return lambda w: Float8Tensor.from_hp(w, granularity=granularity)


def mx(dtype: torch.dtype, swizzled: bool = False) -> Callable[[torch.Tensor], Any]:
    return lambda w: MXTensor.to_mx(w, dtype, is_swizzled_scales=swizzled)


def nvfp4(**options: Any) -> Callable[[torch.Tensor], Any]:
    return lambda w: NVFP4Tensor.to_nvfp4(w, **options)


def sparse(make: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """Of a few weights other than 0, where matrices must be large and files small."""

    def of(w: torch.Tensor) -> Any:
        return make(torch.where(w.abs() > 8, w, torch.zeros_like(w)))

    of.config = getattr(make, "config", None)
    return of


SMOOTH = Int8DynamicActivationInt8WeightConfig()
STATIC = by_config(
    Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.tensor([[0.5]]))
)
# Directories have that scale beside the weight.
STATIC.config = Int8StaticActivationInt8WeightConfig()
FOUR = {"weight_dtype": torch.int4}
MXFP4 = MXDynamicActivationMXWeightConfig(activation_dtype=FP4, weight_dtype=FP4)
TWO = {"act_per_tensor_scale": torch.tensor(0.25)}

# By the name in the file: what makes the tensor, and of which weights [n, k].
CASES = {
    "float8_row": (by_config(Float8WeightOnlyConfig()), (12, 80), BF16),
    "float8_row_float32": (by_config(Float8WeightOnlyConfig()), (12, 40), F32),
    "float8_row_float16": (by_config(Float8WeightOnlyConfig()), (12, 40), F16),
    "float8_tensor": (
        by_config(Float8WeightOnlyConfig(granularity=PerTensor())),
        (12, 40),
        BF16,
    ),
    "float8_group": (
        by_config(Float8WeightOnlyConfig(granularity=PerGroup(16))),
        (12, 80),
        BF16,
    ),
    "float8_block": (sparse(float8(PerBlock([128, 128]))), (256, 128), BF16),
    "float8_small_block": (float8(PerBlock([6, 20])), (12, 40), BF16),
    "int8_row": (by_config(Int8WeightOnlyConfig()), (12, 40), BF16),
    "int8_row_float16": (by_config(Int8WeightOnlyConfig()), (12, 40), F16),
    "int8_inputs": (by_config(SMOOTH), (12, 40), BF16),
    "int8_static": (STATIC, (12, 40), F32),
    "int8_zeros": (
        lambda w: Int8Tensor.from_hp(
            w, granularity=PerGroup(20), mapping_type=MappingType.ASYMMETRIC
        ),
        (12, 40),
        BF16,
    ),
    "int8_awq": (with_inputs(AWQConfig, Int8WeightOnlyConfig()), (12, 40), BF16),
    "int8_smooth": (with_inputs(SmoothQuantConfig, SMOOTH), (12, 40), F32),
    "int4_scale_float32": (
        by_config(
            IntxWeightOnlyConfig(granularity=PerGroup(20), scale_dtype=F32, **FOUR)
        ),
        (12, 40),
        BF16,
    ),
    "int4_inputs": (
        by_config(
            Int8DynamicActivationIntxWeightConfig(
                weight_granularity=PerGroup(32),
                weight_mapping_type=MappingType.ASYMMETRIC,
                **FOUR,
            )
        ),
        (12, 64),
        F16,
    ),
    "int2_row": (
        by_config(
            IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerAxis(0))
        ),
        (12, 48),
        F32,
    ),
    "plain_int4": (by_config(Int4WeightOnlyConfig(group_size=32)), (12, 64), BF16),
    "plain_int4_float16": (
        by_config(Int4WeightOnlyConfig(group_size=20)),
        (12, 40),
        F16,
    ),
    "plain_int4_awq": (
        with_factors(Int4WeightOnlyConfig(group_size=32)),
        (12, 64),
        BF16,
    ),
    "plain_int4_float8": (
        by_config(Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain")),
        (8, 256),
        BF16,
    ),
    "mxfp8": (by_config(MXDynamicActivationMXWeightConfig()), (12, 160), BF16),
    "mxfp8_plain": (mx(FP8), (12, 96), F32),
    "mxfp4": (by_config(MXFP4), (136, 32), BF16),
    "mxfp4_plain": (mx(FP4), (12, 64), F32),
    "nvfp4": (sparse(by_config(NVFP4WeightOnlyConfig())), (144, 80), BF16),
    "nvfp4_plain": (nvfp4(), (12, 48), F32),
    "nvfp4_inputs": (
        nvfp4(per_tensor_scale=torch.tensor(0.125), is_swizzled_scales=True, **TWO),
        (12, 48),
        BF16,
    ),
}


def dequantized(tensor: Any) -> torch.Tensor:
    """torchao's own, where it has one."""
    if not isinstance(tensor, int4_tensor.Int4Tensor):
        return tensor.dequantize()
    packed = tensor.qdata.int()
    # The sign of a nibble is its highest bit.
    codes = torch.stack([packed << 28 >> 28, packed << 24 >> 28], -1)
    size = tensor.block_size[1]
    scale, zero = (
        part.t().repeat_interleave(size, 1).double()
        for part in (tensor.scale, tensor.zero_point)
    )
    # In float64 nothing is lost, and so there is one rounding.
    return (codes.reshape(tensor.shape) * scale + zero).to(tensor.dtype)


def main(wheel: str) -> None:
    fbgemm = of_fbgemm(wheel)
    for name in ("int4_row_quantize", "int4_row_quantize_zp", "pack_int4"):
        setattr(int4_tensor, name, getattr(fbgemm, name))
    for seed, (name, (make, (n, k), dtype)) in enumerate(CASES.items(), 500):
        torch.manual_seed(seed)
        tensor = make(weight_of(n, k, dtype, seed))
        tensors, header = flatten_tensor_state_dict({"layer.weight": tensor})
        again, left = unflatten_tensor_state_dict(tensors, header)
        assert not left
        arrays = {
            f"state_{key.removeprefix('layer.')}": t for key, t in tensors.items()
        }
        arrays["out_dequant"] = dequantized(again["layer.weight"])
        dtypes = {
            key: str(t.dtype).removeprefix("torch.")
            for key, t in arrays.items()
            if t.dtype in STORED
        }
        meta: dict[str, Any] = {
            "source": f"torchao {version('torchao')} (pytorch/ao), "
            f"{type(tensor).__name__}: flatten_tensor_state_dict and dequantize",
            "dtypes": dtypes,
            "header": header["layer.weight"],
        }
        if getattr(make, "config", None) is not None:
            meta["quant_type"] = config_to_dict(make.config)
        stored = {
            key: t.contiguous().view(STORED.get(t.dtype, t.dtype)).numpy()
            for key, t in arrays.items()
        }
        file = FOLDER / f"torchao_weights__{name}__{n}x{k}__s{seed}.npz"
        np.savez_compressed(file, meta=np.array(json.dumps(meta)), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
