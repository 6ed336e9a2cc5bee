"""Makes the files beside this one: llama_bf16 as llama.cpp quantizes it.

Run by hand, from the root of the repository:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 numpy safetensors ml_dtypes
    python tests/data/llama_gguf_q4_k_m/make.py

llama.cpp quantizes, and computes what ``reference.npz`` has. With its float32 file it
must first give the logits of llama_bf16, which PyTorch computed.
"""

import ctypes
import importlib.metadata
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import ml_dtypes  # noqa: F401  (lets safetensors read bfloat16)
import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parent / "llama_bf16"
TOKENIZER = FOLDER.parents[2] / "examples" / "llm" / "checkpoint" / "tokenizer.json"
GOLDEN = FOLDER.parents[1] / "golden" / "gguf"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def converted(config: dict) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp's own converter makes them, in float32."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = {}
    for full, tensor in load_file(SOURCE / "model.safetensors").items():
        wide, name = tensor.astype(np.float32), full
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        for part, count in heads.items():
            if f".{part}." in name:  # Pairs that rotate together become neighbours.
                apart = wide.reshape(count, 2, -1, wide.shape[1])
                wide = apart.swapaxes(1, 2).reshape(wide.shape)
        tensors[name] = wide
    return tensors


def dequantized(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def write_float32(path: Path, tensors: dict[str, np.ndarray] | None = None) -> None:
    """Writes the model, or one of other weights, with its metadata and tokenizer."""
    config = json.loads((SOURCE / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llama_bf16 of qjax")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokenizer = json.loads(TOKENIZER.read_text())
    ids = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in special else normal for t in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    for name, tensor in (tensors or converted(config)).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, ftype: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert not failed, f"llama.cpp could not quantize {source}"


class Model:
    """llama.cpp, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=512, n_threads=1, logits_all=True, verbose=False
        )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.llama.reset()
        self.llama.eval([int(i) for i in ids])
        return np.array(self.llama.scores[: len(ids)], np.float32)

    def greedy(self, ids: np.ndarray, count: int) -> tuple[list[int], list[float]]:
        scores = self.logits(ids)[-1]
        found, margins = [], []
        for _ in range(count):
            *_, second, first = np.argsort(scores)
            found.append(int(first))
            margins.append(float(scores[first] - scores[second]))
            self.llama.eval([int(first)])
            scores = np.array(self.llama.scores[self.llama.n_tokens - 1])
        return found, margins

    def nll(self, rows: np.ndarray) -> np.ndarray:
        """Mean nats per token of each row."""
        means = []
        for row in rows:
            logits = self.logits(row[:-1]).astype(np.float64)
            most = logits.max(-1)
            total = most + np.log(np.exp(logits - most[:, None]).sum(-1))
            means.append((total - logits[np.arange(len(logits)), row[1:]]).mean())
        return np.array(means)


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        (
            "to_float",
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
        ),
    )


def check_golden_vectors() -> None:
    """ggml's own C code gives the bits of ``tests/golden/gguf``."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    for file in sorted(GOLDEN.glob("*.npz")):
        data = np.load(file)
        kind = gguf.GGMLQuantizationType[json.loads(str(data["meta"]))["type"]]
        raw, wanted = np.ascontiguousarray(data["raw"]), data["out_dequant"]
        found = np.empty_like(wanted)
        traits = library.ggml_get_type_traits(int(kind)).contents
        assert traits.name.decode().lower() == kind.name.lower()
        traits.to_float(raw.ctypes.data, found.ctypes.data, found.size)
        different = (found.view(np.uint32) != wanted.view(np.uint32)).sum()
        print(f"{kind.name}: {different} of {found.size} differ in ggml's own code")


def main() -> None:
    """Makes and measures; prints what README.md has."""
    check_golden_vectors()
    given = np.load(SOURCE / "reference.npz")
    prompts, rows = given["prompt_ids"], given["eval_ids"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "f32.gguf"
        write_float32(whole)
        model = Model(whole)
        difference = np.abs(model.logits(prompts[0]) - given["prompt_logits"][0]).max()
        print(
            f"float32 against PyTorch: {difference:.2e}, {model.nll(rows).mean():.4f}"
        )
        assert difference < 0.02
        other = Path(folder) / "q4_0.gguf"
        quantize(whole, other, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(other).tensors}
        print(
            f"Q4_0: {other.stat().st_size}, {Model(other).nll(rows).mean():.4f}", kinds
        )
        target = FOLDER / "model.gguf"
        quantize(whole, target, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M)
        exact = Path(folder) / "exact.gguf"
        write_float32(exact, dequantized(target))
        model = Model(exact)
        float_logits = np.stack([model.logits(prompt) for prompt in prompts])
        print(f"its weights in float32: {model.nll(rows).mean():.4f}")
    model = Model(target)
    logits = np.stack([model.logits(prompt) for prompt in prompts])
    print(f"int8 activations move a logit by {np.abs(logits - float_logits).max():.3f}")
    greedy = [model.greedy(prompt, 32) for prompt in prompts]
    reference = {
        "prompt_ids": prompts,
        "prompt_logits": logits.astype(np.float16),
        "float_logits": float_logits,
        "greedy_ids": np.array([ids for ids, _ in greedy], np.int32),
        "greedy_margin": np.array([margin for _, margin in greedy], np.float32),
        "eval_nll": model.nll(rows).mean(),
        "versions": json.dumps(
            {
                name: importlib.metadata.version(name)
                for name in ("llama-cpp-python", "gguf")
            }
        ),
    }
    np.savez_compressed(FOLDER / "reference.npz", **reference)
    tensors = gguf.GGUFReader(target).tensors
    print(f"Q4_K_M: {target.stat().st_size} bytes, {reference['eval_nll']:.4f}")
    print({t.name: t.tensor_type.name for t in tensors})


if __name__ == "__main__":
    main()
