"""The example decoder on GGUF files: logits, names, metadata, tokenizers."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import typer
from flax import nnx
from typer.testing import CliRunner

import qjax
from qjax import pallas
from qjax.checkpoints import modules
from tests.goldens import arrays

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "llm"))

import evaluate  # noqa: E402
import generate  # noqa: E402
import gguf_file  # noqa: E402
import gguf_tokenizer  # noqa: E402
import model  # noqa: E402
import placement  # noqa: E402
import rope as rotary  # noqa: E402

DATA, RANDOM = ROOT / "tests" / "data", ROOT / "tests" / "reference"
FILE = DATA / "llama_gguf_q4_k_m" / "model.gguf"
SHIPPED_TOKENIZER = generate.SHIPPED / "tokenizer.json"
REFERENCE = arrays(FILE.parent / "reference.npz")


@pytest.fixture(autouse=True)
def jax_as_users_run_it():
    """Examples are written for JAX's defaults, not for the strict library."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def decoder():
    return model.load(FILE, joined=True)


def forward(decoder, ids):
    graph, state = nnx.split(decoder)
    return jax.jit(lambda state: nnx.merge(graph, state)(ids))(state)


class TestModelOfLlamaCpp:
    """The file of llama.cpp, and what llama.cpp computes from it."""

    def test_logits_and_greedy_tokens(self, decoder):
        prompts, greedy = REFERENCE["prompt_ids"], REFERENCE["greedy_ids"]
        given = prompts.shape[1]
        logits = np.asarray(forward(decoder, np.hstack([prompts, greedy[:, :-1]])))
        best = logits[:, given - 1 :].argmax(-1)
        logits = logits[:, :given]
        # The same weights in float32 there: keys and values are float16 in its cache,
        # as which the model before quantization is within 3.3e-3 of PyTorch.
        chex.assert_trees_all_close(
            logits, REFERENCE["float_logits"], atol=5e-3, rtol=0
        )
        # Its own products round activations to eight bits, which moves logits by 0.147.
        quantized = REFERENCE["prompt_logits"].astype(np.float32)
        chex.assert_trees_all_close(logits, quantized, atol=0.2, rtol=0)
        assert np.sqrt(((logits - quantized) ** 2).mean()) < 0.05
        # Those could move one of two past the other.
        assert (REFERENCE["greedy_margin"][best != greedy] < 0.3).all()
        assert (best == greedy).mean() > 0.95

    def test_loss(self, decoder):
        """2.4946, as llama.cpp has it of the same weights in float32; bf16: 2.4927."""
        ids = arrays(DATA / "llama_bf16" / "reference.npz")["eval_ids"]
        loss = evaluate.evaluate(decoder, generate.read_tokenizer(FILE), ids)
        assert loss.nats_per_token == pytest.approx(2.4946, abs=2e-4)
        assert abs(loss.nats_per_token - float(REFERENCE["eval_nll"])) < 1e-3
        assert loss.nats_per_token - 2.4927 < 0.003

    def test_is_packed(self, decoder):
        assert isinstance(decoder.embed_tokens, qjax.layers.nnx.Embed)
        layer = decoder.layers[0]
        assert layer.self_attn.qkv_proj is not None
        assert isinstance(layer.mlp.down_proj.kernel, qjax.QTensor)
        # In the last layer the values have six bits, and stay apart.
        assert decoder.layers[2].self_attn.qkv_proj is None

    def test_tokenizer(self):
        found = generate.read_tokenizer(FILE)
        wanted = generate.read_tokenizer(generate.SHIPPED)
        text = Path(model.__file__).read_text() + "<s>é\r\n\n  日本</s> x"
        ids = found.encode(text).ids
        assert ids == wanted.encode(text).ids
        assert {0, 1} < set(ids)
        assert found.decode(ids, skip_special_tokens=False) == text
        assert generate.stop_ids(FILE) == {1}


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("other", [[], ["--tokenizer", SHIPPED_TOKENIZER]])
def test_generate_command(other, decoder, monkeypatch):
    """What the command hands on; the rest is as for a directory."""
    streamed = []
    monkeypatch.setattr(generate, "load", lambda *_, **__: decoder)
    monkeypatch.setattr(generate, "stream", lambda *a, **k: streamed.append((a, k)))
    done = invoke(generate.main, "--model", FILE, "--prompt", "def", *other)
    assert done.exit_code == 0, done.stderr
    (((_, tokenizer, prompts), options),) = streamed
    assert tokenizer.decode(tokenizer.encode("def main").ids) == "def main"
    assert (prompts, options["stops"]) == (["def"], {1})
    assert re.search(r"model.gguf: 3 layers, 1\.\d+ MB of weights", done.stderr)


def test_a_mesh(monkeypatch):
    """Packed columns are cut over devices, and moved where they lie."""
    names = ("blk.0.attn_q", "blk.0.ffn_down", "token_embd")
    parts = {name: modules.open_parts(FILE)[name] for name in names}
    monkeypatch.setattr(modules, "open_parts", lambda _: parts)
    where = placement.place(FILE, "1,2")
    cut, whole = (
        gguf_file.read_tensors(FILE, sharding) for sharding in (where.weight, None)
    )
    for name, pieces in cut.items():
        assert "model" in str(pieces.words[0].sharding.spec)
        chex.assert_trees_all_equal(*map(jax.device_get, (pieces, whole[name])))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "NVFP4", "Q1_0", "F16", "bias"])
def test_columns_back(kind):
    """The converter's own permutation is undone, on packed words and on arrays."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((24, 256)).astype(np.float32)  # three heads of 8 channels
    theirs = w.reshape(3, 2, 4, 256).swapaxes(1, 2).reshape(w.shape)
    if kind == "bias":
        found, wanted = gguf_file.columns_back(jnp.asarray(theirs[:, 0]), 3), w[:, 0]
    elif kind == "F16":
        found, wanted = gguf_file.columns_back(jnp.asarray(theirs), 3), w
    else:
        of = qjax.formats.gguf.KINDS[kind]
        raw = rng.integers(0, 64, (24, 256 // of.block, of.size), np.uint8)
        raw[..., 1] = raw[..., 3] = 0x3C
        config = qjax.formats.gguf.Config(type=kind)
        packed = qjax.formats.gguf.from_tensors({"weight": raw}, config)
        wanted = np.asarray(qjax.dequantize(packed)).T.reshape(3, 4, 2, 256)
        wanted = wanted.swapaxes(1, 2).reshape(24, 256)
        # As a CPU prepares it, and as a GPU does, with scales in two levels.
        for layout in (qjax.formats.gptq.Stream(), pallas.layout_of(packed)):
            prepared = qjax.prepare(packed, layout=layout)
            found = qjax.dequantize(gguf_file.columns_back(prepared, 3)).T
            chex.assert_trees_all_equal(np.asarray(found), wanted)
        found = qjax.dequantize(gguf_file.columns_back(packed, 3)).T
    chex.assert_trees_all_equal(np.asarray(found), wanted)


NAMES = gguf_file.NAMES | gguf_file.GEMMA
NAMES = {new: old for old, new in [*NAMES.items(), *gguf_file.PHI.items()]}


def write(path, source, kind, packed, tensors=None) -> Path:
    """Another model as llama.cpp's converter would write it.

    In float32, but for some matrices that are packed, by their ends.
    """
    config = qjax.checkpoints.read_config(source)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    rope = {"rope_theta": config.get("rope_theta"), "rope_type": "default"} | rope
    writer = gguf.GGUFWriter(path, kind)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if head_dim * heads != config["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "llama3":
        plain = {"rope_theta": rope["rope_theta"]}
        wide, scaled = (
            rotary.rope_frequencies({"rope_parameters": one}, head_dim)
            for one in (plain, rope)
        )
        writer.add_tensor("rope_freqs.weight", (wide / scaled).astype(np.float32))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if kind == "phi3":
        turned = rotary.Rope.from_json(config, head_dim)
        writer.add_rope_dimension_count(2 * len(turned.frequencies))
        writer.add_rope_scaling_attn_factors(turned.scale)
        writer.add_rope_scaling_orig_ctx_len(turned.length)
        for ours, theirs in gguf_file.FACTORS.items():
            writer.add_tensor(theirs, np.array(rope[ours], np.float32))
    if top_k := config.get("num_experts_per_tok"):
        count = config.get("num_experts") or config["num_local_experts"]
        writer.add_expert_count(count)
        writer.add_expert_used_count(top_k)
    for name, array in (tensors or dict(dense_tensors(source))).items():
        module, _, leaf = name.rpartition(".")
        layer = ""
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(module)
        stored = array
        if kind in ("llama", "granite", "smollm3") and count:
            apart = array.reshape(count, 2, head_dim // 2, -1)
            stored = apart.swapaxes(1, 2).reshape(array.shape)
        dtype = None
        for end, type_ in packed.items():
            if module.endswith(end) and leaf == "weight":
                dtype = gguf.GGMLQuantizationType[type_]
                stored = gguf.quantize(array, dtype)
        new = NAMES.get(module, module)
        if module == "post_attention_layernorm" and "gemma" not in kind:
            new = "ffn_norm"
        writer.add_tensor(f"{layer}{new}.{leaf}", stored, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense_tensors(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory, those of experts in stacks as llama.cpp has them."""
    tensors = qjax.checkpoints.load(source)
    model.stack(tensors)
    for name, tensor in tensors.items():
        array = np.asarray(tensor).astype(np.float32)
        is_vector = name.endswith("shared_expert_gate.weight")
        yield name, array.reshape(-1) if is_vector else array


@pytest.mark.parametrize(
    ("name", "kind", "packed", "tolerance"),
    [
        # Scaled rotary positions as factors, output tied to a dense table.
        ("llama3_tied", "llama", {}, 2e-4),
        # Biases, output tied to a packed table: eight bits move a logit by 0.06, and
        # what is left out or wrong by 0.6 or more.
        ("qwen2_tied", "qwen2", {"embed_tokens": "Q8_0"}, 0.1),
        # Biases of the matrices whose rows are moved, too.
        ("llama3_bias", "llama", {}, 2e-4),
        # Norms of queries and keys, heads of another size.
        ("qwen3", "qwen3", {}, 2e-4),
        # Experts, rows that are moved.
        ("mixtral", "llama", {}, 2e-4),
        # An expert that all tokens share; scaled positions. Eight bits in experts.
        ("qwen2_moe", "qwen2moe", {"down_proj": "Q8_0"}, 0.05),
        # A layer without experts.
        ("qwen3_moe", "qwen3moe", {}, 2e-4),
        # Matrices that are joined, a window, half of the channels turned by factors.
        ("phi3", "phi3", {}, 2e-4),
        ("phi3_long", "phi3", {}, 2e-4),
        # Scales of all kinds, rows that are moved, output tied.
        ("granite", "granite", {}, 2e-4),
    ],
)
def test_architectures(name, kind, packed, tolerance, tmp_path):
    """The logits of transformers, by way of llama.cpp's names and metadata."""
    path = write(tmp_path / "m.gguf", RANDOM / name, kind, packed)
    reference = arrays(RANDOM / name / "reference.npz")
    decoder = model.load(path, joined=True)
    assert decoder.config.tied == ("tied" in name or name == "granite")
    logits = forward(decoder, reference["ids"])
    chex.assert_trees_all_close(logits, reference["logits"], atol=tolerance, rtol=0)


def test_experts_of_2023(tmp_path):
    """Mixtral's first files have a matrix for each expert."""
    ends = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    tensors = {}
    for name, array in dense_tensors(RANDOM / "mixtral"):
        layer, _, end = name.partition(".mlp.experts.")
        for i, part in enumerate(array if end else ()):
            tensors[f"{layer}.ffn_{ends[end.partition('.')[0]]}.{i}.weight"] = part
        if not end:
            tensors[name] = array
    path = write(tmp_path / "m.gguf", RANDOM / "mixtral", "llama", {}, tensors)
    with np.load(RANDOM / "mixtral" / "reference.npz") as reference:
        logits = forward(model.load(path), reference["ids"])
        chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "granted"),
    [
        (
            "gemma3",
            {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 32},
        ),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
    ],
)
def test_what_is_granted(kind, granted, tmp_path):
    """Against a directory that says what llama.cpp takes for granted."""
    source = tmp_path / kind
    shutil.copytree(RANDOM / kind, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | granted))
    shifted = {
        name: array + 1 if name.endswith("norm.weight") and "gemma" in kind else array
        for name, array in dense_tensors(source)
    }
    path = write(tmp_path / "m.gguf", source, kind, {}, shifted)
    ids = arrays(RANDOM / kind / "reference.npz")["ids"]
    found, wanted = (forward(model.load(one), ids) for one in (path, source))
    chex.assert_trees_all_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_gpt_oss():
    """The same of a file by llama.cpp's converter: sinks, the codes of its experts."""
    reference = arrays(RANDOM / "gpt_oss" / "reference.npz")
    decoder = model.load(RANDOM / "gpt_oss" / "model.gguf", joined=True)
    experts = decoder.layers[0].mlp.experts.gate_up_proj.kernel
    assert (experts.shape, experts.segments[0].bits) == ((4, 64, 128), 4)
    logits = forward(decoder, reference["ids"])
    chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)


METADATA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 32,
}


def test_metadata_that_are_left_out():
    config = model.Config.from_json(gguf_file.config_of(METADATA))
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.layers[0].rope.frequencies[1] == pytest.approx(10000 ** (-2 / 16))


def test_every_fourth_layer_of_smollm3_is_not_turned():
    metadata = {key.replace("llama", "smollm3"): one for key, one in METADATA.items()}
    metadata |= {"general.architecture": "smollm3", "smollm3.block_count": 5}
    config = model.Config.from_json(gguf_file.config_of(metadata))
    assert [i for i, layer in enumerate(config.layers) if layer.rope is None] == [3]


@pytest.mark.parametrize(
    "scaled",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling(scaled):
    config = model.Config.from_json(gguf_file.config_of(METADATA | scaled))
    assert config.layers[0].rope.frequencies[0] == 0.25


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_gating_func", 2, "gating_func=2 is not supported, but 1"),
        ("general.architecture", "gemma", "='gemma' must be one of ['llama', 'qwen2"),
        ("llama.expert_group_count", 8, "group_count=8 is not supported, but 0"),
        ("llama.rope.dimension_count", 8, "dimension_count=8 is not supported, but 16"),
        ("llama.attention.value_length", 8, "value_length=8 is not supported, but 16"),
        ("llama.attention.sliding_window", 8, "window=8 is not supported, but 0"),
        ("llama.attention.scale", 0.5, "attention.scale=0.5 is not supported, but 0"),
        ("llama.logit_scale", 2.0, "logit_scale=2.0 is not supported, but 1"),
        ("llama.embedding_length", "64", "embedding_length='64' must be one number"),
        ("llama.attention.head_count_kv", [2, 4], "[2, 4] must be one number, for all"),
        ("llama.expert_used_count", [2, 4], "[2, 4] must be one number, for all"),
        ("llama.rope.scaling.type", "longrope", "type='longrope' is not supported"),
    ],
)
def test_metadata_that_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        gguf_file.config_of(METADATA | {key: value})


def test_a_file_without_a_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = invoke(evaluate.main, "x.npy", "--model", tmp_path / "m.gguf")
    assert done.exit_code == 1
    assert "tokenizer.ggml.model=None must be one of ['gpt2', 'llama']" in done.stderr
    with pytest.raises(ValueError, match=r"lack llama.block_count, llama.context_len"):
        model.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentence_pieces(kind, monkeypatch):
    """Tokens and texts of SentencePiece itself, and what llama.cpp puts before them."""
    known = json.loads((DATA / "sentencepiece" / "pieces.json").read_text())[kind]
    own = {key: known[key] for key in ("tokens", "scores", "token_type")}
    own |= {"model": "llama", "bos_token_id": 1, "add_space_prefix": kind == "llama"}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    monkeypatch.setattr(qjax.checkpoints, "read_metadata", lambda _: metadata)
    tokenizer = gguf_tokenizer.read_tokenizer(FILE)
    for entry in known["texts"]:
        ids = tokenizer.encode(entry["text"]).ids
        assert ids == [1, *entry["ids"]]
        assert tokenizer.decode(ids) == entry["back"]


class TestTokenizers:
    """Byte-level BPE from tokens and merges."""

    @pytest.fixture
    def read(self, monkeypatch):
        metadata = qjax.checkpoints.read_metadata(FILE)

        def read(**changes) -> tokenizers.Tokenizer:
            changed = {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
            monkeypatch.setattr(
                qjax.checkpoints, "read_metadata", lambda _: metadata | changed
            )
            return gguf_tokenizer.read_tokenizer(FILE)

        return read

    @pytest.mark.parametrize(
        ("pre", "words"),
        [
            ("gpt-2", ["Don", "'t", "Ġx", "=", "1234", "!", "ĊĊ", "Ġy"]),
            ("llama-bpe", ["Don", "'t", "Ġx", "=", "123", "4", "!ĊĊ", "Ġy"]),
            ("qwen2", ["Don", "'t", "Ġx", "=", "1", "2", "3", "4", "!ĊĊ", "Ġy"]),
            ("gpt-4o", ["Don't", "Ġx", "=", "123", "4", "!ĊĊ", "Ġy"]),
            ("dbrx", ["Don", "'t", "Ġx", "=", "123", "4", "!ĊĊ", "Ġy"]),
            ("refact", ["Don", "'t", "Ġx", "=", *"1234", "!", "ĊĊ", "Ġy"]),
        ],
    )
    def test_cuts_texts(self, pre, words, read):
        found = read(pre=pre).pre_tokenizer.pre_tokenize_str("Don't x=1234!\n\n y")
        assert [word for word, _ in found] == words

    def test_begin_of_text(self, read):
        assert read(add_bos_token=True).encode("x").ids[0] == 0
        assert read(pre="llama-bpe").encode("x").ids[0] != 0  # The file says no.

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model": "t5"},
                "model='t5' must be one of .'gpt2', 'llama'.; pass --tok",
            ),
            ({"model": "llama"}, "tokens, scores and token_type have 512, 0 and 512"),
            ({"model": "llama", "scores": ["0"] * 512}, "scores must be floats"),
            ({"pre": "tekken"}, "pre='tekken' must be one of"),
            ({"tokens": ["a"] * 512}, "tokenizer.ggml.tokens has a token twice"),
            ({"add_bos_token": True, "bos_token_id": 512}, "token_id=512 is no token"),
            ({"merges": ["a b c"]}, "merges has one that makes no token"),
            ({"tokens": ["a"], "merges": ["a a"]}, "merges has one that makes no tok"),
        ],
    )
    def test_refuses(self, changes, message, read):
        with pytest.raises(ValueError, match=message):
            read(**changes)
