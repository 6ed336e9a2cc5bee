"""Makes the files `quanto_linear__*` and `quanto_model__*` beside this one.

Run by hand: ``pip install torch==2.13.0 transformers==5.23.0 optimum-quanto==0.2.7
accelerate && python tests/golden/quanto/make_vectors.py``. A CPU will do. The other
files are older than it.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum import quanto
from optimum.quanto.tensor import HqqOptimizer, MaxOptimizer, quantize_weight
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
PATTERNS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def write(name: str, made: dict[str, torch.Tensor], **meta: Any) -> None:
    """Floats that NumPy does not have are written as their bits."""
    made = {key: value.detach().contiguous() for key, value in made.items()}
    dtypes = {
        key: str(value.dtype).removeprefix("torch.")
        for key, value in made.items()
        if value.dtype in PATTERNS
    }
    held = {
        key: value.view(PATTERNS.get(value.dtype, value.dtype)).numpy()
        for key, value in made.items()
    }
    version = importlib.metadata.version("optimum-quanto")
    meta |= {"dtypes": dtypes, "source": f"optimum-quanto {version}"}
    np.savez_compressed(FOLDER / f"{name}.npz", meta=np.array(json.dumps(meta)), **held)


def dense(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of what is saved: tensors that a CPU prefers are turned into it."""
    weight = layer.weight
    if isinstance(weight, quanto.WeightQBitsTensor):
        if type(weight) is not WeightQBitsTensor:
            weight = weight.weight_qbits_tensor()
    else:
        assert type(weight) is WeightQBytesTensor
    return weight.dequantize()


def random(n: int, k: int, seed: int, dtype: torch.dtype, spread: bool) -> torch.Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if spread:
        w *= 2.0 ** torch.linspace(-12, 12, n)[:, None]
    return w.to(dtype)


# Type, outputs, inputs, dtype; how scales are found, or that weights are far apart.
LAYERS = [
    ("qint2", 6, 64, torch.float32, ""),
    ("qint2", 5, 320, torch.bfloat16, ""),
    ("qint2", 7, 50, torch.float16, "spread"),
    ("qint4", 4, 256, torch.float16, ""),
    ("qint4", 16, 256, torch.bfloat16, ""),
    ("qint4", 3, 160, torch.float32, ""),
    ("qint4", 5, 192, torch.bfloat16, "spread"),
    ("qint4", 7, 200, torch.float16, ""),
    ("qint4", 6, 128, torch.float32, "hqq"),
    ("qint4", 6, 160, torch.bfloat16, "zeros"),
    ("qint2", 6, 96, torch.float16, "zeros"),
    ("qint8", 7, 50, torch.float32, ""),
    ("qint8", 16, 48, torch.float16, "spread"),
    ("qint8", 16, 48, torch.bfloat16, "spread"),
    ("qint8", 1, 33, torch.float32, ""),
    ("qfloat8", 7, 50, torch.float32, ""),
    ("qfloat8", 16, 48, torch.float16, "spread"),
    ("qfloat8", 16, 48, torch.bfloat16, "spread"),
]


def layers() -> None:
    for seed, (qtype, n, k, dtype, how) in enumerate(LAYERS, 160):
        weight = random(n, k, seed, dtype, how == "spread")
        layer = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        layer.weight = torch.nn.Parameter(weight)
        model = torch.nn.Sequential(layer)
        optimizer = HqqOptimizer() if how == "hqq" else None
        quanto.quantize(model, weights=quanto.qtypes[qtype], optimizer=optimizer)
        if how == "zeros":
            # An argument of the optimizer, which modules leave alone.
            size = model[0].weight_group_size
            kind = quanto.qtypes[qtype]
            scale, shift = MaxOptimizer()(weight, kind, 0, size, zeropoint=True)
            made = quantize_weight(weight, kind, 0, scale, shift, size)
            model[0].weight = torch.nn.Parameter(made)
        quanto.freeze(model)
        state = {
            f"state_{name.removeprefix('0.')}": value
            for name, value in model.state_dict().items()
        }
        entry = quanto.quantization_map(model)["0"]
        name = "_".join(filter(None, [qtype, str(dtype).removeprefix("torch."), how]))
        state |= {"in_w": weight, "out_dequant": dense(model[0])}
        write(
            f"quanto_linear__{name}__{n}x{k}__s{seed}", state, config=entry, seed=seed
        )


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def model(name: str, weights: str, activations: str | None, seed: int) -> None:
    """All that a directory has."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16)
    packed = quanto.QuantizedModelForCausalLM.quantize(
        made, weights=weights, activations=activations
    )
    if activations is not None:
        with quanto.Calibration(), torch.no_grad():
            packed(torch.arange(16)[None])
    with tempfile.TemporaryDirectory() as folder:
        packed.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
        entries = {
            file: json.loads((Path(folder) / file).read_text())
            for file in ("config.json", "quanto_qmap.json")
        }
    held = {f"state_{key}": value for key, value in state.items()}
    for path in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        layer = made.get_submodule(path)
        held[f"out_{path}"] = dense(layer)
    write(f"quanto_model__{name}__{seed}", held, files=entries)


layers()
model("qint4", "qint4", None, 190)
model("qint8_activations", "qint8", "qint8", 191)
