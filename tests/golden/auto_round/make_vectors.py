"""Makes the vectors beside this file: a tiny Llama, quantized and run by AutoRound.

Run by hand: ``pip install auto-round==0.16.1 torch==2.13.0 transformers==5.23.0 &&
python tests/golden/auto_round/make_vectors.py``.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from auto_round import AutoRound
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

FOLDER = Path(__file__).parent
INTEGERS = {"bits": 4, "group_size": 32, "sym": True}
# Some layers otherwise, by name and by pattern.
OTHERWISE = {
    "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64},
    "model.layers.0.self_attn.k_proj": {"bits": 16},
    ".*o_proj.*": {"bits": 2},
}
VARIANTS = {
    "gptq_4": ("auto_round", INTEGERS),
    "gptq_2": ("auto_round", INTEGERS | {"bits": 2, "group_size": -1}),
    "gptq_3": ("auto_round", INTEGERS | {"bits": 3}),
    "six": ("auto_round", INTEGERS | {"bits": 6, "sym": False}),
    "gptq_mixed": ("auto_round", INTEGERS | {"layer_config": OTHERWISE}),
    "gptqmodel": ("auto_round:gptqmodel", INTEGERS | {"sym": False}),
    "awq": ("auto_round:auto_awq", INTEGERS | {"sym": False}),
    "mxfp4": ("auto_round", {"scheme": "MXFP4"}),
    "mxfp8": ("auto_round", {"scheme": "MXFP8"}),
    "nvfp4": ("auto_round", {"scheme": "NVFP4"}),
    "fp8_block": ("auto_round", {"scheme": "FP8_BLOCK"}),
    "fp8_static": ("auto_round", {"scheme": "FP8_STATIC"}),
}
# Modules whose tensors are kept.
KEPT = ("mlp.up_proj", "self_attn.o_proj", "self_attn.k_proj")
WIDE = ("mlp.up_proj",)  # of matrices that are more than a block, ragged


def model(seed: int, hidden: int, folder: str) -> transformers.LlamaForCausalLM:
    """Random weights, from a folder after which AutoRound names its own."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    made = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """One whose tokens are letters, as AutoRound wants one."""
    words = {chr(i) if i else "<s>": i for i in range(128)}
    Tokenizer(models.BPE(vocab=words, merges=[])).save(str(folder / "t.json"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "t.json"), bos_token="<s>", eos_token="<s>"
    )


def make(seed: int, name: str, packing: str, options: dict) -> None:
    """Quantizes, saves, and writes what was saved, and what AutoRound makes of it."""
    is_wide = name == "fp8_block"
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts.json")
        texts.write_text(json.dumps([{"text": "quantized weights " * 40}] * 8))
        rounder = AutoRound(
            model(seed, 160 if is_wide else 64, f"{folder}/tiny"),
            tokenizer(Path(folder)),
            iters=0,
            seqlen=32,
            nsamples=4,
            dataset=str(texts),
            device_map="cpu",
            disable_opt_rtn=True,
            **options,
        )
        rounder.quantize_and_save(f"{folder}/out", format=packing)
        (saved,) = (file.parent for file in Path(folder, "out").rglob("config.json"))
        config = json.loads((saved / "config.json").read_text())["quantization_config"]
        arrays, dtypes = {}, {}
        for key, value in load_file(saved / "model.safetensors").items():
            module = key.removeprefix("model.layers.0.").rpartition(".")[0]
            if module not in (WIDE if is_wide else KEPT):
                continue
            dtypes[f"state_{key}"] = str(value.dtype).removeprefix("torch.")
            # NumPy has neither, only their bits.
            bits = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
            same = bits.get(value.dtype, value.dtype)
            arrays[f"state_{key}"] = value.view(same).numpy()
        if not is_wide:  # which transformers cannot load
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                saved, dtype=torch.float32, device_map="cpu"
            )
            for path in KEPT:
                module = loaded.get_submodule(f"model.layers.0.{path}")
                arrays[f"out_{path}"] = weight_of(module)
    meta = {
        "source": "auto-round, AutoRound.quantize_and_save and its own layers",
        "config": config,
        "dtypes": dtypes,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("auto-round", "torch", "transformers")
        },
    }
    np.savez_compressed(
        FOLDER / f"auto_round__{name}__s{seed}.npz", meta=json.dumps(meta), **arrays
    )


def weight_of(module: torch.nn.Module) -> np.ndarray:
    """The weight ``[k, n]`` that a module multiplies by, as it computes it."""
    if isinstance(module, torch.nn.Linear):
        return module.weight.detach().float().numpy().T
    for name in ("in_features", "infeatures"):
        if hasattr(module, name):
            eye = torch.eye(getattr(module, name))
    with torch.no_grad():
        if hasattr(module, "dequant_weight_online"):  # would round the activations
            return module.dequant_weight_online().float().numpy().T
        return module(eye).float().numpy()


if __name__ == "__main__":
    for seed, (name, (packing, options)) in enumerate(VARIANTS.items(), 1200):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(seed, name, packing, options)
