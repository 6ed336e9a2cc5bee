"""Makes the vectors beside this file: what Quark exports, and what it makes of that.

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 amd-quark==0.13 && python
tests/golden/quark/make_vectors.py``. A CPU and a C++ compiler will do.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quark.torch import (
    ModelQuantizer,
    export_safetensors,
    import_model_from_safetensors,
    kernel,  # noqa: F401  (registers the operators)
)
from quark.torch.quantization.config import config as specs
from quark.torch.quantization.config.config import QConfig, QLayerConfig
from quark.torch.quantization.config.type import Dtype, ZeroPointType
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

FOLDER = Path(__file__).parent
N, K = 16, 64
SIGNED = {"symmetric": True, "scale_type": "float", "round_method": "half_even"}
SIGNED |= {"is_dynamic": False}
ZEROS = SIGNED | {"symmetric": False}
INPUTS, OUTPUTS = {"ch_axis": 1, "group_size": 32}, {"ch_axis": 0}
LAST = {"ch_axis": -1, "is_dynamic": False}
WHOLE = {"observer_method": "min_max", "is_dynamic": False}
FP8 = specs.FP8E4M3PerTensorSpec(**WHOLE)


def uint2(float_zero: bool) -> specs.QTensorConfig:
    spec = specs.Uint4PerGroupSpec(**INPUTS, **ZEROS).to_quantization_spec()
    spec.dtype = Dtype.uint2
    spec.zero_point_type = ZeroPointType.float32 if float_zero else ZeroPointType.int32
    return spec


# By the name in the file: how weights are quantized.
CASES = {
    "fp8_tensor": FP8,
    "fp8_channel": specs.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False),
    "int8_tensor": specs.Int8PerTensorSpec(observer_method="min_max", **ZEROS),
    "int8_channel": specs.Int8PerChannelSpec(**OUTPUTS, **SIGNED),
    "int8_group": specs.Int8PerGroupSpec(**INPUTS, **ZEROS),
    "uint8_channel": specs.Uint8PerChannelSpec(**OUTPUTS, **ZEROS),
    "uint8_group": specs.Uint8PerGroupSpec(**INPUTS, **ZEROS),
    "int4_tensor": specs.Int4PerTensorSpec(observer_method="min_max", **ZEROS),
    "int4_channel": specs.Int4PerChannelSpec(**OUTPUTS, **ZEROS),
    "int4_channel_order": specs.Int4PerChannelSpec(**OUTPUTS, **SIGNED),
    "int4_group": specs.Int4PerGroupSpec(**INPUTS, **SIGNED),
    "int4_group_zeros": specs.Int4PerGroupSpec(**INPUTS, **ZEROS),
    "uint4_channel": specs.Uint4PerChannelSpec(**OUTPUTS, **ZEROS),
    "uint4_group": specs.Uint4PerGroupSpec(**INPUTS, **ZEROS),
    "uint4_group_order": specs.Uint4PerGroupSpec(**INPUTS, **ZEROS),
    "uint4_group_symmetric": specs.Uint4PerGroupSpec(**INPUTS, **SIGNED),
    "int2_group": specs.Int2PerGroupSpec(**INPUTS, **SIGNED),
    "uint2_group": uint2(float_zero=False),
    "uint2_group_float_zero": uint2(float_zero=True),
    "mxfp4": specs.OCP_MXFP4Spec(**LAST),
    "mxfp6_e2m3": specs.OCP_MXFP6E2M3Spec(**LAST),
    "mxfp6_e3m2": specs.OCP_MXFP6E3M2Spec(**LAST),
    "fp4_group": specs.FP4PerGroupSpec(group_size=16, **LAST),
    "fp6_group": specs.FP6E2M3PerGroupSpec(group_size=32, **LAST),
    "nvfp4": specs.ScaleQuantSpec(
        first_stage=specs.FP4PerGroupSpec(group_size=16, **LAST), second_stage=FP8
    ),
}
# Models that are not in bfloat16.
DTYPES = {"int4_group": torch.float32, "fp8_channel": torch.float16}


class Config(PretrainedConfig):
    """Of `Model`."""

    model_type = "few"


class Model(PreTrainedModel):
    """Matrices to quantize, one after another."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name, (n, k) in config.matrices.items():
            parent: Any = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    setattr(parent, part, torch.nn.Module())
                parent = getattr(parent, part)
            setattr(parent, last, torch.nn.Linear(k, n, bias=False))
        # What tells the dtype of a model without dense matrices.
        self.norm = torch.nn.RMSNorm(4)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.config.matrices:
            x = self.get_submodule(name)(x)
        return x


def weight_of(n: int, k: int) -> torch.Tensor:
    """Random rows of several magnitudes."""
    size = torch.exp2(torch.randint(-6, 3, (n, k // 16)).float())
    return torch.randn(n, k) * size.repeat_interleave(16, 1)


def exported(
    matrices: dict[str, tuple[int, int]],
    quantization: QConfig,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """The tensors and the configuration of a directory, and the weights in float32."""
    config = Config(matrices=matrices)
    model: Any = Model(config)
    for name, shape in matrices.items():
        model.get_submodule(name).weight.data = weight_of(*shape)
    model = model.to(dtype)
    first = next(iter(matrices.values()))[1]
    inputs: Any = [torch.randn(4, first, dtype=dtype) for _ in range(2)]
    quantizer = ModelQuantizer(quantization)
    model = quantizer.freeze(quantizer.quantize_model(model, inputs))
    if options.get("custom_mode") == "awq":
        # The name alone, which this mode asks for, and not the search for factors.
        model.quant_config.algo_config = [specs.AWQConfig()]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_safetensors(model, folder, **options)
        tensors = load_file(f"{folder}/model.safetensors")
        said = json.loads(Path(folder, "config.json").read_text())
        if options.get("custom_mode", "quark") == "quark":
            model = import_model_from_safetensors(Model(config), folder)
        weights = {name: dequantized(model.get_submodule(name)) for name in matrices}
    return tensors, said["quantization_config"], weights


def dequantized(module: Any) -> torch.Tensor:
    """What Quark's layer multiplies by, before it rounds to the dtype of inputs."""
    quantizer = getattr(module, "weight_quantizer", None)
    weight = module.weight.data
    return (weight if quantizer is None else quantizer(weight)).to(torch.float32)


def stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy has it: patterns of what NumPy does not know."""
    patterns = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    array = tensor.contiguous().view(patterns.get(tensor.dtype, tensor.dtype)).numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array


def save(name: str, arrays: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    version = importlib.metadata.version("amd-quark")
    meta = {
        "source": f"amd-quark {version}: quark.torch.ModelQuantizer, "
        "export_safetensors and import_model_from_safetensors",
        "config": config,
        "dtypes": {
            key: str(tensor.dtype).removeprefix("torch.")
            for key, tensor in arrays.items()
        },
        "torch": torch.__version__,
    }
    np.savez_compressed(
        FOLDER / f"quark_{name}.npz",
        allow_pickle=False,
        **{key: stored(tensor) for key, tensor in arrays.items()},
        meta=np.asarray(json.dumps(meta)),
    )


def make(seed: int, name: str) -> None:
    """Quantizes, exports, reads and dequantizes one matrix."""
    torch.manual_seed(seed)
    spec: Any = CASES[name]
    if not isinstance(spec, specs.QTensorConfig):
        spec = spec.to_quantization_spec()
    said = QConfig(global_quant_config=QLayerConfig(weight=spec))
    order = "order" if name.endswith("order") else "reorder"
    tensors, config, weights = exported(
        {"up_proj": (N, K)},
        said,
        DTYPES.get(name, torch.bfloat16),
        pack_method=order,
    )
    arrays = {
        f"state_{key.removeprefix('up_proj.')}": tensor
        for key, tensor in tensors.items()
        if key.startswith("up_proj.")
    }
    save(
        f"{name}__{N}x{K}__s{seed}",
        arrays | {"out_dequant": weights["up_proj"]},
        config,
    )


def make_blocks(seed: int) -> None:
    """Blocks, which Quark keeps of models that are in FP8 already."""
    torch.manual_seed(seed)
    n, k, size = 32, 48, [16, 24]
    weight = (100 * torch.randn(n, k)).to(torch.float8_e4m3fn)
    scale = torch.rand(n // size[0], k // size[1]) + 0.01
    found = torch.ops.quark.dequantize(
        "fp8_e4m3", weight, scale, None, 0, 0, "per_block"
    )
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": size}
    spec |= {"is_dynamic": False, "symmetric": True, "group_size": None}
    config = {"quant_method": "quark", "global_quant_config": {"weight": spec}}
    arrays = {"state_weight": weight, "state_weight_scale": scale}
    save(f"fp8_block__{n}x{k}__s{seed}", arrays | {"out_dequant": found}, config)


MATRICES = {
    "model.layers.0.self_attn.k_proj": (32, 32),
    "model.layers.0.mlp.up_proj": (16, 32),
    "model.layers.0.mlp.down_proj": (32, 16),
    "lm_head": (8, 32),
}


def make_model(seed: int, name: str, **options: Any) -> None:
    """A model whose layers differ, with the scale of a KV cache and of inputs."""
    torch.manual_seed(seed)
    four = specs.Uint4PerGroupSpec(**INPUTS, **ZEROS).to_quantization_spec()
    eight = specs.Int8PerChannelSpec(**OUTPUTS, **SIGNED).to_quantization_spec()
    inputs = specs.Int8PerTensorSpec(observer_method="min_max", **ZEROS)
    fp8 = FP8.to_quantization_spec()
    cache = QLayerConfig(weight=fp8, input_tensors=fp8, output_tensors=fp8)
    down = QLayerConfig(weight=eight, input_tensors=inputs.to_quantization_spec())
    said = QConfig(
        global_quant_config=QLayerConfig(weight=four),
        layer_quant_config={"*k_proj": cache, "*.down_proj": down},
        kv_cache_quant_config={"*k_proj": cache},
        kv_cache_group=["*k_proj"],
        exclude=["*lm_head"],
    )
    tensors, config, weights = exported(MATRICES, said, **options)
    arrays = {f"state_{key}": tensor for key, tensor in tensors.items()}
    arrays |= {f"out_{key}": weight for key, weight in weights.items()}
    save(f"{name}__4__s{seed}", arrays, config)


def make_custom(seed: int, mode: str) -> None:
    """What Quark exports under the names of other formats."""
    torch.manual_seed(seed)
    fp8 = FP8.to_quantization_spec()
    layers = {
        "awq": QLayerConfig(
            weight=specs.Uint4PerGroupSpec(**INPUTS, **ZEROS).to_quantization_spec()
        ),
        "fp8": QLayerConfig(weight=fp8, input_tensors=fp8),
    }
    said = QConfig(global_quant_config=layers[mode], exclude=["*lm_head"])
    matrices = {"up_proj": (32, 32), "lm_head": (8, 32)}
    tensors, config, weights = exported(matrices, said, custom_mode=mode)
    # Without the dense ones, which transformers 5.6 and later call "qweight", too.
    arrays = {f"state_{k}": t for k, t in tensors.items() if k.startswith("up_proj.")}
    name = f"custom_{mode}__32x32__s{seed}"
    save(name, arrays | {"out_dequant": weights["up_proj"]}, config)


if __name__ == "__main__":
    for seed, name in enumerate(CASES, 1300):
        make(seed, name)
    make_blocks(1340)
    make_model(1341, "model")
    make_model(1341, "model_fake", weight_format="fake_quantized")
    make_custom(1343, "awq")
    make_custom(1344, "fp8")
