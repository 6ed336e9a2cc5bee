"""The example decoder against references computed by other code, and its commands."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.flax import load_file, save_file
from typer.testing import CliRunner

import qjax
from qjax.formats.tiles import Tiles
from tests.goldens import arrays

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "llm"))

import evaluate  # noqa: E402
import generate  # noqa: E402
import model  # noqa: E402
import placement  # noqa: E402
import quantize  # noqa: E402
import typer  # noqa: E402
import weights  # noqa: E402

DATA = ROOT / "tests" / "data"
SHIPPED = ROOT / "examples" / "llm" / "checkpoint"
TRAINED = {
    "llama_gptq4_g128_actorder": SHIPPED,
    "llama_gptq3_g64": DATA / "llama_gptq3_g64",
    "llama_bf16": DATA / "llama_bf16",
}
# Other dialects run the same code once they are loaded: their logits are enough.
DIALECTS = [
    "llama_awq4_g128",
    "llama_ct_w4a16_g128",
    "llama_nf4_dq",
    "llama1L_hqq4_g64",
    "llama1L_torchao_int8",
]
RANDOM = sorted(p.parent for p in (ROOT / "tests" / "reference").glob("*/config.json"))


@contextlib.contextmanager
def defaults():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def jax_as_users_run_it():
    """Examples are written for JAX's defaults, not for the strict library."""
    with defaults():
        yield


@pytest.fixture(scope="module", params=TRAINED, ids=str)
def trained(request):
    reference = arrays(DATA / request.param / "reference.npz")
    return model.load(TRAINED[request.param], joined=True), reference


@pytest.fixture(scope="module")
def shipped():
    return model.load(SHIPPED), generate.read_tokenizer(SHIPPED)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph, state, ids):
    return nnx.merge(graph, state)(ids)


def forward(decoder, ids):
    return logits_of(*nnx.split(decoder), ids)


def test_prompt_logits(trained):
    """Float32 against float32: the order of summation is all that differs."""
    decoder, reference = trained
    logits = forward(decoder, reference["prompt_ids"])
    chex.assert_type(logits, jnp.float32)
    chex.assert_trees_all_close(logits, reference["prompt_logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(name):
    """Logits and loss of AWQ, compressed-tensors, NF4, HQQ and torchao checkpoints."""
    decoder = model.load(DATA / name, joined=True)
    reference = arrays(DATA / name / "reference.npz")
    logits = forward(decoder, reference["prompt_ids"])
    chex.assert_trees_all_close(logits, reference["prompt_logits"], atol=2e-4, rtol=0)
    tokenizer = generate.read_tokenizer(SHIPPED)
    loss = evaluate.evaluate(decoder, tokenizer, reference["eval_ids"])
    assert loss.nats_per_token == pytest.approx(float(reference["eval_nll"]), abs=1e-4)


def test_greedy_tokens(trained):
    """Equal up to the first step whose two best tokens are nearly equally likely."""
    decoder, reference = trained
    prompts, greedy = reference["prompt_ids"], reference["greedy_ids"]
    run = generate.Generator(
        decoder, generate.Sampling(), prompts.shape[1], greedy.shape[1]
    )
    for prompt, expected, margin in zip(
        prompts, greedy, reference["greedy_margin"], strict=True
    ):
        close = np.flatnonzero(margin < 1e-3)
        certain = close[0] if close.size else len(expected)
        assert certain > 0
        tokens = list(run(prompt, jax.random.key(0)))
        chex.assert_trees_all_equal(tokens[:certain], expected[:certain].tolist())


def test_evaluation_loss(trained):
    decoder, reference = trained
    tokenizer = generate.read_tokenizer(SHIPPED)
    loss = evaluate.evaluate(decoder, tokenizer, reference["eval_ids"])
    assert loss.nats_per_token == pytest.approx(float(reference["eval_nll"]), abs=1e-4)
    expected = float(reference["eval_bits_per_byte"])
    assert loss.bits_per_byte == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("path", RANDOM, ids=lambda path: path.name)
def test_architectures(path):
    """All that `hf_config` knows, and scaled rotary positions, against transformers."""
    reference = arrays(path / "reference.npz")
    logits = forward(model.load(path, joined=True), reference["ids"])
    chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)


def dense_decoder(path, config):
    """The model of a quantized directory over its weights as they are read."""
    tensors = {}
    for name, w in qjax.checkpoints.load(path).items():
        if isinstance(w, qjax.QTensor):
            tensors[f"{name}.weight"] = qjax.dequantize(w, jnp.float32).T
        else:
            tensors[name] = w
    model.stack(tensors)
    return model.Decoder(weights.Weights(tensors, config, jnp.float32))


@pytest.mark.slow
def test_ternary_weights(tmp_path):
    """BitNet's, as a directory holds them: the logits of the same weights, dense."""
    source, target = ROOT / "tests" / "reference" / "bitnet", tmp_path / "ternary"
    how = {"bits": 2, "group_size": None, "symmetric": True}
    spec = qjax.Spec(**how, quantizer=qjax.formats.bitnet.quantize)
    qjax.checkpoints.quantize(source, target, format="bitnet", rules=spec)
    packed, stored = model.load(target), qjax.checkpoints.lazy(target)
    assert sum(isinstance(w, qjax.QTensor) for w in stored.values()) == 14
    dense = dense_decoder(target, packed.config)
    ids = arrays(source / "reference.npz")["ids"]
    chex.assert_trees_all_close(
        forward(packed, ids), forward(dense, ids), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "path",
    [SHIPPED, ROOT / "tests" / "reference" / "qwen2"],
    ids=lambda path: path.name,
)
def test_joined_matrices_change_nothing(path):
    """Packed ones whose rows have an order, and dense ones with biases."""
    apart, joined = model.load(path), model.load(path, joined=True)
    for layer in joined.layers:
        assert layer.self_attn.qkv_proj is not None
        assert layer.mlp.gate_up_proj is not None
    ids = np.arange(32)[None] + 2
    chex.assert_trees_all_close(
        forward(joined, ids), forward(apart, ids), atol=1e-4, rtol=0
    )


def test_matrices_that_are_not_alike_stay_apart():
    wide, narrow = (qjax.quantize(jnp.ones((128, 16)), bits) for bits in (4, 3))
    tensors = {
        "a.q_proj": wide,
        "a.k_proj": wide,
        "a.v_proj": narrow,
        "a.gate_proj": wide,
        "a.up_proj": wide,
        "a.up_proj.bias": jnp.ones(16),
    }
    before = dict(tensors)
    model.join(tensors)
    assert tensors.keys() == before.keys()


def test_bf16_activations(shipped):
    """Half-precision activations stay near float32: 8 bits of mantissa, 3 layers."""
    decoder, _ = shipped
    ids = np.arange(32)[None] + 2
    exact = forward(decoder, ids)
    half = forward(model.load(SHIPPED, jnp.bfloat16), ids)
    chex.assert_type(half, jnp.float32)
    chex.assert_trees_all_close(half, exact, atol=0.05 * float(jnp.abs(exact).max()))


@pytest.mark.slow
def test_decode_equals_prefill(shipped):
    """Feeding tokens one by one through the cache gives the logits of one pass."""
    decoder, _ = shipped
    ids = np.arange(12)[None] + 40
    cache = model.Cache.empty(decoder.config, 1, 12, jnp.float32)
    graph, state = nnx.split(decoder)

    @jax.jit
    def step(state, ids, cache):
        decoder = nnx.merge(graph, state)
        hidden, cache = decoder.forward(ids, cache)
        return decoder.logits(hidden), cache

    steps = []
    for i in range(12):
        logits, cache = step(state, ids[:, i : i + 1], cache)
        steps.append(logits)
    whole = forward(decoder, ids)
    chex.assert_trees_all_close(jnp.concatenate(steps, 1), whole, atol=2e-4)


@pytest.mark.slow
def test_prefill_and_decode_compile_once(shipped, monkeypatch):
    """Prompts of other lengths reuse both programs; a step uploads nothing."""
    decoder, _ = shipped
    traces = []
    original = model.Decoder.forward
    monkeypatch.setattr(
        model.Decoder,
        "forward",
        lambda self, ids, cache: traces.append(ids.shape) or original(self, ids, cache),
    )
    run = generate.Generator(decoder, generate.Sampling(0.5, 5), 6, 8)
    key = jax.random.key(1)
    assert len(list(run([5, 6, 7], key))) == 8
    assert len(list(run([5, 6, 7, 8, 9, 10], key))) == 8
    assert traces == [(1, 6), (1, 1)]
    ids, first = np.ones((1, 6), np.int32), np.array([3], np.int32)
    token, cache = run.prefill(run.state, ids, first, key[None])
    keys = key[None]
    with jax.transfer_guard("disallow"):
        token, cache = run.decode(run.state, token, cache, keys)
    chex.assert_shape(token, (1,))
    chex.assert_shape(cache.keys, (1, 14, 2, 64))


def test_activations_are_of_the_dtype_that_kernels_multiply(monkeypatch):
    assert model.load(SHIPPED).dtype == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert model.load(SHIPPED).dtype == jnp.bfloat16
    assert model.load(SHIPPED, "float16").dtype == "float16"


def test_joined_matrices_on_a_mesh():
    """Phi's are cut where queries end, or not; logits are those of one device."""
    path = ROOT / "tests" / "reference" / "phi3"
    where = placement.place(path, "2,2")
    decoder = model.load(path, sharding=where.weight)
    weight = decoder.layers[0].self_attn.qkv_proj.weight[...]
    assert weight.sharding.shard_shape(weight.shape) == (64, 64)
    reference = arrays(path / "reference.npz")
    logits = forward(decoder, where.rows(reference["ids"]))
    chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_padding_does_not_change_a_prompt(shipped):
    decoder, _ = shipped
    key = jax.random.key(0)
    short = generate.Generator(decoder, generate.Sampling(), 4, 6)([9, 8, 7, 6], key)
    padded = generate.Generator(decoder, generate.Sampling(), 9, 6)([9, 8, 7, 6], key)
    assert list(short) == list(padded)


class TestMixtures:
    """Experts: their matrices are one stack, of whatever the checkpoint holds."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
    def test_quantized(self, name, tmp_path):
        """The logits of the same weights, dense."""
        source, target = ROOT / "tests" / "reference" / name, tmp_path / "quantized"
        spec = qjax.Spec(bits=4, group_size=32, scale_dtype="float16")
        rules = [("lm_head|model.embed_tokens", None), (".*", spec)]
        qjax.checkpoints.quantize(source, target, format="gptq_v2", rules=rules)
        decoder = model.load(target, joined=True)
        mixture = decoder.layers[0].mlp.experts
        assert isinstance(mixture.gate_up_proj, qjax.layers.nnx.Experts)
        assert mixture.down_proj.kernel.batch == (4,)
        assert "quantized matrices" in generate.describe(decoder, target)

        dense = dense_decoder(target, decoder.config)
        ids = arrays(source / "reference.npz")["ids"]
        chex.assert_trees_all_close(
            forward(decoder, ids), forward(dense, ids), atol=1e-4, rtol=0
        )

    def test_packed_floats_of_gpt_oss(self):
        """As the file has them: no dense expert is made."""
        decoder = model.load(ROOT / "tests" / "reference" / "gpt_oss")
        for layer in decoder.layers:
            experts = layer.mlp.experts
            for matrix in (experts.gate_up_pairs, experts.down_proj):
                w = matrix.kernel
                assert (w.batch, w.segments[0].bits) == ((4,), 4)
                # In Tiles, 64 rows are padded to 128.
                assert w.nbytes < 4 * w.k * w.n * 12 / 8

    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
    def test_mesh(self, name):
        """Every expert is cut over the devices; logits are those of one device."""
        path = ROOT / "tests" / "reference" / name
        where = placement.place(path, "2,2")
        decoder = model.load(path, sharding=where.weight)
        mixture = decoder.layers[0].mlp.experts
        for layer in (mixture.down_proj, mixture.gate_up_pairs or mixture.up_proj):
            matrix = max(jax.tree.leaves(nnx.state(layer)), key=lambda a: a.nbytes)
            assert matrix.sharding.shard_shape(matrix.shape)[0] == 4
            assert matrix.nbytes == 2 * matrix.addressable_shards[0].data.nbytes
        reference = arrays(path / "reference.npz")
        logits = forward(decoder, where.rows(reference["ids"]))
        chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)

    def test_a_device_for_each_expert(self):
        """A stack that cannot be shared by columns is cut along its experts."""
        path = ROOT / "tests" / "reference" / "gpt_oss"
        where = placement.place(path, "2,2")

        def uneven(name):
            """What is left where columns and rows are no multiple of the devices."""
            return (
                where.weight(name)[-1:] if ".experts." in name else where.weight(name)
            )

        decoder = model.load(path, sharding=uneven)
        for layer in decoder.layers:
            experts = layer.mlp.experts
            for matrix in (experts.gate_up_pairs, experts.down_proj):
                for leaf in jax.tree.leaves(matrix.kernel):
                    assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
        ids = where.rows(arrays(path / "reference.npz")["ids"])
        logits = forward(decoder, ids)
        wanted = arrays(path / "reference.npz")["logits"]
        chex.assert_trees_all_close(logits, wanted, atol=2e-4, rtol=0)
        graphdef, state = nnx.split(decoder)
        run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
        text = run.lower(state, ids).compile().as_text()
        assert not re.search(r"= u\d+\S* all-\w+\(", text)

    def test_experts_that_cannot_be_cut(self, tmp_path):
        """One tensor an expert, or one of all: the stack is cut along them."""
        source = ROOT / "tests" / "reference" / "mixtral"
        tensors = load_file(source / "model.safetensors")
        for name in [name for name in tensors if ".experts." in name]:
            # 63 columns of the first, which two devices do not share.
            one = tensors[name][:, :63] if ".w2." in name else tensors[name][:63]
            tensors[name] = jnp.copy(one)
        stacked = dict(tensors)
        model.stack(stacked)
        config = json.loads((source / "config.json").read_text())
        config["intermediate_size"] = 63
        for folder, held in (("apart", tensors), ("stacked", stacked)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text(json.dumps(config))
            save_file(held, tmp_path / folder / "model.safetensors")
        where = placement.place(tmp_path / "apart", "2,2")
        apart, whole = (
            model.load(tmp_path / folder, sharding=where.weight)
            for folder in ("apart", "stacked")
        )
        chex.assert_trees_all_equal(nnx.state(apart), nnx.state(whole))
        for found, wanted in zip(
            jax.tree.leaves(nnx.state(apart)),
            jax.tree.leaves(nnx.state(whole)),
            strict=True,
        ):
            assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        experts = apart.layers[0].mlp.experts
        by_expert, by_column = experts.up_proj.weight, experts.down_proj.weight
        assert by_expert[...].sharding.spec == P("model")
        assert by_column[...].sharding.shard_shape(by_column.shape) == (4, 32, 63)
        ids = arrays(source / "reference.npz")["ids"]
        alone = forward(model.load(tmp_path / "apart"), ids)
        logits = forward(apart, where.rows(ids))
        chex.assert_trees_all_close(logits, alone, atol=2e-4, rtol=0)

    def test_packed_experts_that_cannot_be_cut(self, as_on_gpu):
        """As `load` has it of a stack: in this device's layout if it can be."""
        where = placement.place(ROOT / "tests" / "reference" / "mixtral", "2,2")
        name = "model.layers.0.mlp.experts"

        def stacked(count, n):
            w = qjax.prepare(qjax.quantize(jnp.ones((128, n)), group_size=32))
            shardings = where.weight(f"{name}.0.up_proj")
            one = qjax.shard(w, where.mesh, shardings[-1].spec)
            tensors = {f"{name}.{i}.up_proj": one for i in range(count)}
            model.stack(tensors, where.weight)
            return tensors[f"{name}.up_proj"]

        # Of Tiles, two devices do not share 24 columns, and of nothing three experts.
        for n, count, layout, pieces in (
            (24, 4, Tiles(), (2, 1)),
            (24, 3, qjax.formats.gptq.Stream(), (1, 2)),
            (9, 4, Tiles(), (2, 1)),
        ):
            w = stacked(count, n)
            assert w.layout == layout
            for leaf in (*w.words, w.scale):
                share = leaf.sharding.shard_shape(leaf.shape)
                cut = leaf.shape[0] // share[0], leaf.shape[-1] // share[-1]
                assert cut == pieces
        with pytest.raises(ValueError, match=r"experts.up_proj: .* has 3 matrices"):
            stacked(3, 9)

    @pytest.mark.slow
    def test_generates(self):
        """Token by token, as in one pass."""
        decoder = model.load(ROOT / "tests" / "reference" / "gpt_oss", joined=True)
        run = generate.Generator(decoder, generate.Sampling(), 5, 8)
        ids = [5, 6, 7, 8, 9]
        tokens = [int(token) for token in run(ids, jax.random.key(0))]
        logits = forward(decoder, np.array([ids + tokens[:-1]]))
        assert logits[0, 4:].argmax(-1).tolist() == tokens

    @pytest.mark.slow
    def test_calibrated(self, tmp_path):
        """Each expert sees its own tokens: less is lost than by rounding."""
        source = ROOT / "tests" / "reference" / "qwen2_moe"
        target, rounded = tmp_path / "gptq", tmp_path / "rounded"
        done = invoke(quantize.main, source, target, *tiny(tmp_path))
        assert done.exit_code == 0, done.stderr
        assert "38 matrices" in done.stdout
        spec = qjax.Spec(bits=4, group_size=32, scale_dtype="float16")
        rules = [(".*(gate|lm_head|embed_tokens)", None), (".*", spec)]
        qjax.checkpoints.quantize(source, rounded, format="gptq_v2", rules=rules)
        with np.load(source / "reference.npz") as reference:
            ids, exact = reference["ids"], reference["logits"]
        errors = []
        for path in (target, rounded):
            decoder = model.load(path)
            mixture = decoder.layers[0].mlp
            assert isinstance(mixture.experts.down_proj, qjax.layers.nnx.Experts)
            assert isinstance(mixture.gate, weights.Dense)
            errors.append(float(np.square(forward(decoder, ids) - exact).mean()))
        assert errors[0] < 0.85 * errors[1]

    @pytest.mark.slow
    def test_folded(self, tmp_path):
        """AWQ's factors go from each expert's last matrix into its first."""
        source = ROOT / "tests" / "reference" / "mixtral"
        options = [*tiny(tmp_path), "--method", "awq", "--bits", 4]
        done = invoke(quantize.main, source, tmp_path / "awq", *options)
        assert done.exit_code == 0, done.stderr
        dense, w = (
            qjax.checkpoints.load(source),
            qjax.checkpoints.load(tmp_path / "awq"),
        )
        name = "model.layers.0.block_sparse_moe.experts.1"
        ratios = [
            np.asarray(qjax.dequantize(w[f"{name}.{one}"], jnp.float32))
            / np.asarray(dense[f"{name}.{one}.weight"], np.float32).T
            for one in ("w3", "w2")
        ]
        # What columns of the one are divided by, rows of the other are multiplied by.
        before, after = np.median(ratios[0], axis=0), np.median(ratios[1], axis=1)
        assert before.std() > 0.02
        assert np.abs(before * after - 1).max() < 0.1
        with np.load(source / "reference.npz") as reference:
            logits = forward(model.load(tmp_path / "awq"), reference["ids"])
            assert np.square(logits - reference["logits"]).mean() < 0.1

    def test_refuses(self):
        w, other = (qjax.quantize(jnp.ones((64, 8)), bits, 32) for bits in (4, 3))
        experts = "model.layers.0.mlp.experts"
        with pytest.raises(ValueError, match=r"experts.up_proj: .* not alike: weights"):
            model.stack({f"{experts}.0.up_proj": w, f"{experts}.1.up_proj": other})
        with pytest.raises(ValueError, match=r"the experts \[1\] are missing"):
            model.stack({f"{experts}.0.up_proj": w, f"{experts}.2.up_proj": w})

    @pytest.mark.parametrize(
        ("change", "dropped", "message"),
        [
            ({}, r"\.experts\.3\.", "mlp has 3 experts, but routes to 4"),
            ({}, r"\.experts\.3\.w1", "has 3 experts at first, but 4 of down_proj"),
            (
                {"num_experts_per_tok": None},
                "-",
                "per_tok=0 must lie in .1, 4., the",
            ),
            ({"num_experts_per_tok": 5}, "-", "num_experts_per_tok=5 must lie in"),
        ],
    )
    def test_checkpoints_that_are_refused(self, change, dropped, message, tmp_path):
        source = ROOT / "tests" / "reference" / "mixtral"
        config = json.loads((source / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(source / "model.safetensors")
        kept = {n: w for n, w in tensors.items() if not re.search(dropped, n)}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            model.load(tmp_path)

    def test_stacks_of_transformers(self, tmp_path):
        """Names that transformers 5 has in memory, and could be in a file."""
        source = ROOT / "tests" / "reference" / "qwen2_moe"
        tensors = dict(qjax.checkpoints.load(source))
        model.stack(tensors)
        model.join(tensors)
        fused = {
            re.sub(r"(experts\.\w+)\.weight", r"\1", name): jnp.copy(w)
            for name, w in tensors.items()
        }
        assert "model.layers.0.mlp.experts.gate_up_proj" in fused
        shutil.copy(source / "config.json", tmp_path)
        save_file(fused, tmp_path / "model.safetensors")
        with np.load(source / "reference.npz") as reference:
            logits = forward(model.load(tmp_path), reference["ids"])
            chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)

    @pytest.mark.slow
    def test_an_expert_without_tokens(self, tmp_path):
        """Its rows stay in their order, which act-order gives to those of others."""
        source = ROOT / "tests" / "reference" / "mixtral"
        np.save(tmp_path / "ids.npy", np.full((2, 8), 5))
        options = ["--text", tmp_path / "ids.npy", "--group-size", 32, "--act-order"]
        done = invoke(quantize.main, source, tmp_path / "gptq", *options)
        assert done.exit_code == 0, done.stderr
        w = model.load(tmp_path / "gptq").layers[0].mlp.experts.up_proj.kernel
        rows = np.arange(64)
        assert {bool((order == rows).all()) for order in w.order} == {True, False}


class TestMesh:
    """What ``--mesh`` asks for: the same text, from pieces of the model."""

    @pytest.mark.slow
    def test_same_tokens_from_rows_and_columns(self):
        """Two prompts at a time, of other lengths; each matrix on two devices."""
        path = DATA / "llama1L_hqq4_g64"
        where = placement.place(path, "2,2")
        pieces = model.load(path, sharding=where.weight)
        attention, mlp = pieces.layers[0].self_attn, pieces.layers[0].mlp
        layers = attention.k_proj, attention.o_proj, mlp.up_proj, mlp.down_proj
        cuts = [layer.kernel.scale.sharding.spec for layer in layers]
        by_column, by_row = P(None, "model"), P("model", None)
        # Of 640 rows, two devices do not share whole pieces of Tiles.
        in_tiles = isinstance(mlp.down_proj.kernel.layout, Tiles)
        last = by_column if in_tiles else by_row
        assert cuts == [by_column, by_row, by_column, last]
        assert pieces.embed_tokens.sharding.spec == P("model", None)

        prompts, keys = [[40, 41, 42], [9, 8, 7, 6]], jax.random.key(0)
        sampling, keys = generate.Sampling(0.7), jax.random.split(keys)
        run = generate.Generator(pieces, sampling, 5, 8, where)
        found = np.stack(list(run.together(prompts, keys)), 1)
        alone = generate.Generator(model.load(path), sampling, 5, 8)
        wanted = [list(alone(*pair)) for pair in zip(prompts, keys, strict=True)]
        chex.assert_trees_all_equal(found.tolist(), wanted)

        ids, first = where.rows(np.ones((2, 5), np.int32)), where.rows(np.zeros(2, int))
        token, cache = run.prefill(run.state, ids, first, keys)
        assert cache.keys[0].sharding.spec == P("data", None, "model")
        step = run.decode.lower(run.state, token, cache, keys).compile().as_text()
        assert re.search(r"= f32\S* all-reduce\(", step)
        assert not re.search(r"= u(16|32)\S* all-\w+\(", step)

    def test_same_loss(self, shipped):
        decoder, tokenizer = shipped
        where = placement.place(SHIPPED, "2,2")
        pieces = model.load(SHIPPED, sharding=where.weight)
        ids = np.random.default_rng(0).integers(2, 512, (3, 17))
        wanted = evaluate.evaluate(decoder, tokenizer, ids, 2)
        found = evaluate.evaluate(pieces, tokenizer, ids, 2, where)
        assert found.nats_per_token == pytest.approx(wanted.nats_per_token, abs=1e-5)
        with pytest.raises(ValueError, match=r"batch=3 must be a multiple of 2"):
            evaluate.evaluate(pieces, tokenizer, ids, 3, where)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--mesh", "2"], "--mesh 2 must be two numbers, such as 2,4"),
            (["--mesh", "1,4"], "2 heads of self_attn.k_proj and v_proj cannot be"),
            (["--mesh", "8,2"], "--mesh 8,2 asks for 16 devices of 8"),
            (["--processes", 2], "--processes 2 needs a --mesh"),
            (["--mesh", "1,1", "--processes", 2], "2 processes cannot share it evenly"),
        ],
    )
    def test_refuses(self, arguments, message, monkeypatch):
        monkeypatch.setattr(generate, "keep_stdout", lambda process: None)
        done = invoke(generate.main, *arguments)
        assert done.exit_code == 1
        assert message in done.stderr

    def test_a_matrix_that_cannot_be_cut_is_named(self, tmp_path):
        # Six heads fit the mesh, but 256 columns do not.
        config = json.loads((SHIPPED / "config.json").read_text())
        shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
        config |= {"num_attention_heads": 6, "num_key_value_heads": 6}
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = invoke(generate.main, "--model", tmp_path, "--mesh", "1,6")
        assert done.exit_code == 1
        assert "model.layers.0.self_attn.q_proj: spec=" in done.stderr


class TestSampling:
    """Draws against the definition, on a distribution of four tokens."""

    probability = np.array([0.5, 0.3, 0.15, 0.05])

    def drawn(self, **options):
        logits = jnp.log(jnp.asarray(self.probability, jnp.float32))[None]
        sampling = generate.Sampling(**options)
        keys = jax.random.split(jax.random.key(0), 2000)
        tokens = jax.vmap(lambda key: sampling.draw(logits, key)[0])(keys)
        return np.bincount(np.asarray(tokens), minlength=4) / 2000

    def test_temperature_zero_is_greedy(self):
        chex.assert_trees_all_equal(self.drawn(), np.array([1.0, 0, 0, 0]))

    def test_temperature_one(self):
        # Four standard deviations of a frequency over 2000 draws.
        assert np.abs(self.drawn(temperature=1.0) - self.probability).max() < 0.045

    def test_top_k(self):
        frequency = self.drawn(temperature=1.0, top_k=2)
        assert np.abs(frequency - np.array([0.625, 0.375, 0, 0])).max() < 0.045

    def test_top_p(self):
        """0.5 + 0.3 falls short of 0.81, so the third token stays."""
        assert (self.drawn(temperature=1.0, top_p=0.79) > 0).tolist() == [1, 1, 0, 0]
        assert (self.drawn(temperature=1.0, top_p=0.81) > 0).tolist() == [1, 1, 1, 0]


def command(name, *arguments):
    script = ROOT / "examples" / "llm" / name
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_generate_command():
    arguments = ["--prompt", "def f(x):", "--prompt", "import ", "--max-new-tokens", 5]
    done = command("generate.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(x):")
    assert "\nimport " in done.stdout
    assert "tokens/s" in done.stderr
    assert "12 quantized matrices" in done.stderr
    assert "MB of weights" in done.stderr


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_streamed_words_are_apart(capsys, monkeypatch):
    """A tokenizer's first token has its space only after others: SentencePiece's."""
    known = json.loads((DATA / "sentencepiece" / "pieces.json").read_text())["llama"]
    own = {key: known[key] for key in ("tokens", "scores", "token_type")}
    own |= {"model": "llama", "add_bos_token": False}
    monkeypatch.setattr(
        qjax.checkpoints,
        "read_metadata",
        lambda _: {f"tokenizer.ggml.{key}": value for key, value in own.items()},
    )
    tokenizer = generate.read_tokenizer(Path("model.gguf"))
    ids = tokenizer.encode("def main of the tensor").ids

    class Fixed:
        batch = 1

        def __init__(self, *_):
            pass

        def together(self, prompts, keys):
            yield from (np.array([token]) for token in ids[len(prompts[0]) :])

    monkeypatch.setattr(generate, "Generator", Fixed)
    prompts, sampling = ["def main"], generate.Sampling()
    generate.stream(None, tokenizer, prompts, sampling=sampling, max_new_tokens=9)
    assert capsys.readouterr().out.strip() == "def main of the tensor"


@pytest.mark.slow
def test_same_seed_same_text(shipped):
    decoder, _ = shipped
    run = generate.Generator(decoder, generate.Sampling(1.0, 50, 0.9), 4, 12)
    texts = [list(run([5, 6], jax.random.key(seed))) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_command(tmp_path):
    text = tmp_path / "code.py"
    text.write_text("import os\n\n\ndef main():\n    return os.getcwd()\n" * 8)
    done = invoke(evaluate.main, text, "--context", 32)
    assert done.exit_code == 0, done.stderr
    assert "nats per token" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--prompt", ""], "has no tokens"),
        (["--max-new-tokens", 5000], "1024 positions"),
        (["--top-p", 0.0], "top_p=0.0 must lie in"),
        (["--seed", 10**20], "'--seed'"),
    ],
)
def test_generate_refuses(arguments, message):
    done = invoke(generate.main, *arguments)
    assert done.exit_code != 0
    assert message in done.stderr
    assert not done.stdout


def test_evaluate_refuses(tmp_path):
    (tmp_path / "short.py").write_text("x")
    np.save(tmp_path / "ids.npy", np.array([[0, 512]]))
    np.save(tmp_path / "float.npy", np.zeros((2, 2)))
    (tmp_path / "latin.txt").write_bytes("très".encode("latin-1"))
    for name, message in (
        ("short.py", "do not fill a row"),
        ("ids.npy", "must lie below the vocabulary"),
        ("float.npy", "must be integers"),
        ("latin.txt", "latin.txt must be a text in UTF-8"),
    ):
        done = invoke(evaluate.main, tmp_path / name)
        assert done.exit_code == 1
        assert message in done.stderr


@pytest.fixture
def dense(tmp_path):
    """The bf16 model with its tokenizer, and a text that it was trained on."""
    shutil.copytree(DATA / "llama_bf16", tmp_path / "dense")
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path / "dense")
    return tmp_path / "dense", inspect.getsourcefile(inspect)


@pytest.mark.slow
def test_quantize_command(dense, tmp_path):
    """Two bits lose less than by rounding, on text that GPTQ has not seen."""
    source, text = dense
    options = ["--bits", 2, "--group-size", 64, "--rows", 16, "--context", 128]
    done = invoke(quantize.main, source, tmp_path / "gptq", "--text", text, *options)
    assert done.exit_code == 0, done.stderr
    assert "21 matrices, 2.38 bits a weight" in done.stdout
    assert "2048 tokens to see" in done.stderr
    rounded = qjax.Spec(bits=2, group_size=64, scale_dtype=jnp.float16)
    qjax.checkpoints.quantize(source, tmp_path / "rtn", format="gptq_v2", rules=rounded)
    tokenizer = generate.read_tokenizer(tmp_path / "gptq")
    ids = evaluate.read_ids(ROOT / "examples" / "llm" / "evaluation.npz")[::4]
    found = {
        name: evaluate.evaluate(model.load(tmp_path / name), tokenizer, ids)
        for name in ("dense", "gptq", "rtn")
    }
    losses = {name: loss.nats_per_token for name, loss in found.items()}
    added = losses["rtn"] - losses["dense"]
    assert 0 < losses["gptq"] - losses["dense"] < 0.85 * added


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", 5], "5 bits are not among (2, 3, 4, 8)"),
        (["--to", "gptq"], "--to gptq cannot store all zeros; gptq_v2 can."),
        (["--context", 100000], "do not fill a row of 100001"),
        (["--group-size", 96], "k=256 is no multiple of group_size=96"),
        (["--method", "awq", "--bits", 3], "3 bits are not among (4,)"),
        (["--method", "awq", "--act-order"], "--act-order is of --method gptq"),
        (["--to", "awq", "--symmetric"], "--to awq is asymmetric; leave out --symm"),
    ],
)
def test_quantize_refuses(dense, tmp_path, arguments, message):
    source, text = dense
    done = invoke(quantize.main, source, tmp_path / "new", "--text", text, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ("none", "new", [], "none must be the directory of a model"),
        ("file", "new", [], "file must be the directory of a model"),
        ("dense", "no/new", [], "no is no directory; make it first"),
        ("dense", "kept", [], "kept is there; pass --overwrite"),
        ("dense", "kept", ["--overwrite"], "kept is no checkpoint"),
        ("dense", "file", ["--overwrite"], "file is no checkpoint"),
        ("dense", "dense", ["--overwrite"], "must not be the same"),
        ("link", "dense", ["--overwrite"], "must not be the same"),
        ("dense", "dense/new", [], "nor lie in one another"),
    ],
)
def test_places_are_looked_at_first(tmp_path, source, target, options, message):
    for name in ("dense", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("dense")
    places = [tmp_path / source, tmp_path / target]
    text = ["--text", tmp_path / "there is none"]
    done = invoke(quantize.main, *places, *text, *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *("dense", "file", "kept", "link")
    }
    assert [file.name for file in (tmp_path / "dense").iterdir()] == ["mine"]


def with_all_heads(tensors, config):
    """The same model with a head of keys and of values for each of queries."""
    tensors = dict(tensors)
    times = config.num_heads // config.num_kv_heads
    for name in [n for n in tensors if ".k_proj" in n or ".v_proj" in n]:
        heads = tensors[name].reshape(config.num_kv_heads, config.head_dim, -1)
        shape = (config.num_heads * config.head_dim, *tensors[name].shape[1:])
        tensors[name] = jnp.repeat(heads, times, axis=0).reshape(shape)
    return tensors, dataclasses.replace(config, num_kv_heads=config.num_heads)


@pytest.mark.parametrize(
    ("model_type", "left"),
    [("llama3_bias", set()), ("bitnet", set()), ("phi3", {"o_proj", "down_proj"})],
)
def test_folding_leaves_a_block_as_it_is(model_type, left):
    """Biases, a head of values for each of queries, and norms of their own included."""
    path, name = ROOT / "tests" / "reference" / model_type, "model.layers.0"
    config = model.Config.from_json(qjax.checkpoints.read_config(path))
    # In the dtype of the file, folding would round weights to it.
    tensors = jax.tree.map(jnp.float32, qjax.checkpoints.load(path))
    if not left:
        tensors, config = with_all_heads(tensors, config)
    x = jax.random.normal(jax.random.key(0), (2, 8, config.hidden_size))
    places = quantize.empty(config, [x])
    spread, outputs = jax.random.normal(jax.random.key(1), (256,)), []
    linear = [
        n.removesuffix(".weight")
        for n in tensors
        if n.startswith(name) and n.endswith("_proj.weight")
    ]
    for _ in range(2):
        states = [x]
        block, _ = quantize.block_of(tensors, config, name, config.layers[0])
        quantize.run(block, states, places)
        outputs += states
        recipe = quantize.Recipe(
            spec=qjax.Spec(group_size=32),
            factors=lambda ws, *_, **__: jnp.exp(spread[: len(ws[0])]),
        )
        for maker, matrices in quantize.junctions(config, name, linear):
            k = len(tensors[f"{matrices[0]}.weight"].T)
            grams = dict.fromkeys(matrices, jnp.eye(k))
            recipe.fold(tensors, maker, matrices, grams)
            factor = jnp.exp(spread[:k])
            chex.assert_trees_all_close(grams[matrices[-1]].diagonal(), 1 / factor**2)
    junctions = quantize.junctions(config, name, linear)
    folded = {m for _, ms in junctions for m in ms}
    assert {one.rpartition(".")[2] for one in set(linear) - folded} == left
    # Float32 weights, each rounded twice at most.
    before, after = outputs
    chex.assert_trees_all_close(after, before, atol=1e-5 * float(jnp.abs(before).max()))


QWEN2 = ROOT / "tests" / "reference" / "qwen2"


def tiny(folder):
    """Arguments that fit a small model, and ids for it to see."""
    ids = np.random.default_rng(0).integers(0, 96, (8, 24))
    np.save(folder / "ids.npy", ids)
    return ["--text", folder / "ids.npy", "--group-size", 32, "--batch", 4]


@pytest.fixture(scope="module")
def awq(tmp_path_factory):
    """What AWQ makes of a model of two small blocks, and the arguments that do."""
    folder = tmp_path_factory.mktemp("awq")
    options = [*tiny(folder), "--method", "awq"]
    with defaults():
        done = invoke(quantize.main, QWEN2, folder / "awq", *options)
    assert done.exit_code == 0, done.stderr
    assert "14 matrices, 4.75 bits a weight" in done.stdout
    return folder / "awq", options


@pytest.mark.slow
def test_awq_ends_in_a_directory_that_needs_no_factors(awq):
    path, _ = awq
    entry = qjax.checkpoints.read_config(path)["quantization_config"]
    assert (entry["quant_method"], entry["version"]) == ("awq", "gemm")
    before, after = qjax.checkpoints.load(QWEN2), qjax.checkpoints.load(path)
    packed = [w for w in after.values() if isinstance(w, qjax.QTensor)]
    assert len(packed) == 14
    assert all(w.input_scale is None for w in packed)
    changed = {
        name
        for name, w in after.items()
        if name in before and not np.array_equal(w, before[name])
    }
    # Two heads of queries share one of values, and so o_proj has no factors.
    norms = ("input_layernorm", "post_attention_layernorm")
    assert changed == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in norms}
    logits = arrays(QWEN2 / "reference.npz")["logits"]
    found = forward(model.load(path), arrays(QWEN2 / "reference.npz")["ids"])
    # Rounded without factors, it is 0.27 of random weights.
    assert np.linalg.norm(found - logits) < 0.3 * np.linalg.norm(logits)


def test_an_interrupted_call_goes_on(awq, tmp_path, monkeypatch):
    whole, options = awq
    made, keep = [], quantize.Written.__setitem__

    def noted(blocks, i, tensors):
        made.append(i)
        if made == [0, 1]:
            raise KeyboardInterrupt
        keep(blocks, i, tensors)

    monkeypatch.setattr(quantize.Written, "__setitem__", noted)
    done = invoke(quantize.main, QWEN2, tmp_path / "new", *options)
    assert done.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == [".new.blocks"]
    done = invoke(quantize.main, QWEN2, tmp_path / "new", *options)
    assert done.exit_code == 0
    assert "going on after 1 of 2 blocks" in done.stderr
    assert made == [0, 1, 1]
    for file in whole.iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_blocks_of_another_job_are_not_gone_on_with(tmp_path):
    tensors = {"a": qjax.quantize(jnp.ones((32, 32)), group_size=32)}
    folder = tmp_path / "blocks"
    first, second = (
        quantize.Written(folder, job, {}, "gptq_v2") for job in ("first", "second")
    )
    with first as blocks:
        blocks[0] = tensors
        with pytest.raises(FileExistsError, match="is in use by another call"), second:
            pass
    with first as blocks:
        assert 0 in blocks
    with second as blocks:
        assert 0 not in blocks
    assert not folder.exists()
    with second as blocks:
        blocks[0] = tensors
    (folder / "job.json").unlink()
    with pytest.raises(FileExistsError, match="holds no blocks of a model"), second:
        pass


@pytest.mark.parametrize("is_other", [False, True])
def test_what_an_interrupted_deletion_leaves_is_of_no_job(
    tmp_path, monkeypatch, is_other
):
    folder, keep = tmp_path / "blocks", shutil.rmtree
    with quantize.Written(folder, "job", {}, "gptq_v2") as blocks:
        for i in (0, 1):
            blocks[i] = {"a": qjax.quantize(jnp.ones((32, 32)), group_size=32)}

    def killed(entry):
        (entry / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    job = "other" if is_other else "job"
    with (
        pytest.raises(KeyboardInterrupt),
        quantize.Written(folder, job, {}, "gptq_v2") as blocks,
    ):
        blocks.clear()
    monkeypatch.setattr(shutil, "rmtree", keep)
    with quantize.Written(folder, "job", {}, "gptq_v2") as blocks:
        assert 0 not in blocks
        assert 1 not in blocks
    assert not folder.exists()


def test_a_job_is_its_files_ids_and_options():
    ids = np.arange(6).reshape(2, 3)
    jobs = [
        quantize.job_of(*given)
        for given in (
            (QWEN2, ids, {"bits": 4}),
            (QWEN2, ids.astype(np.int16), {"bits": 4}),
            (QWEN2, ids, {"bits": 3}),
            (QWEN2, ids.reshape(3, 2), {"bits": 4}),
            (QWEN2, ids + 1, {"bits": 4}),
            (DATA / "llama_bf16", ids, {"bits": 4}),
        )
    ]
    assert jobs[0] == jobs[1]
    assert len(set(jobs)) == 5
    assert json.loads(jobs[0])["versions"] == {
        "jax": jax.__version__,
        "qjax": metadata.version("qjax"),
    }


@pytest.fixture
def source(tmp_path):
    """A small model of two blocks, with a tokenizer."""
    shutil.copytree(QWEN2, tmp_path / "source")
    (tmp_path / "source/tokenizer.json").write_text("{}")
    return tmp_path / "source"


def test_a_target_appears_with_all_of_its_files(awq, source, tmp_path, monkeypatch):
    _, options = awq
    keep = shutil.copy

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copy", killed)
    target = tmp_path / "new"
    assert invoke(quantize.main, source, target, *options).exit_code == 130
    assert not target.exists()
    monkeypatch.setattr(shutil, "copy", keep)
    done = invoke(quantize.main, source, target, *options)
    assert done.exit_code == 0, done.stderr
    assert "going on after 2 of 2 blocks" in done.stderr
    assert (target / "tokenizer.json").read_text() == "{}"
    (target / "mine").touch()
    again = [*options, "--overwrite", "--rows", 4]
    assert invoke(quantize.main, source, target, *again).exit_code == 0
    assert (target / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new"}


def test_a_source_that_changes_while_it_is_read(awq, source, tmp_path, monkeypatch):
    _, options = awq
    keep = quantize.Written.__setitem__

    def changing(blocks, i, tensors):
        (source / "model.safetensors").touch()
        keep(blocks, i, tensors)

    monkeypatch.setattr(quantize.Written, "__setitem__", changing)
    done = invoke(quantize.main, source, tmp_path / "new", *options)
    assert done.exit_code == 1
    assert "source was changed while it was read; start again" in done.stderr
    assert not (tmp_path / "new").exists()


def test_no_row_is_left_out(monkeypatch):
    config = model.Config.from_json(qjax.checkpoints.read_config(QWEN2))
    ids = np.random.default_rng(0).integers(0, 96, (7, 24))
    seen = []

    class Recipe:
        spec = None

        def quantized(self, tensors, *_):
            return tensors

    monkeypatch.setattr(quantize, "grams_of", lambda *given: seen.append(given[-1]))
    blocks = {}
    dense = qjax.checkpoints.lazy(QWEN2)
    quantize.quantize(dense, config, ids, Recipe(), blocks, 4)
    assert blocks.keys() == {0, 1}
    for inputs in seen:
        rows = [(len(x), len(keys)) for x, keys, *_ in inputs]
        assert rows == [(4, 4), (3, 3)]


def test_matrices_whose_inputs_are_all_0_stay_dense(awq, source, tmp_path):
    _, options = awq
    name, file = "model.layers.1.mlp", source / "model.safetensors"
    weights = load_file(file)
    weights[f"{name}.up_proj.weight"] *= 0
    save_file(weights, file)
    done = invoke(quantize.main, source, tmp_path / "new", *options)
    assert done.exit_code == 0, done.stderr
    assert f"left dense, as their inputs are all 0: ['{name}.down_proj']" in done.stderr
    assert "13 matrices" in done.stdout
    written = qjax.checkpoints.load(tmp_path / "new")
    expected = weights[f"{name}.down_proj.weight"]
    np.testing.assert_array_equal(written[f"{name}.down_proj.weight"], expected)


class Deep(Mapping):
    """A model of two blocks, six blocks deep."""

    def __init__(self, shallow):
        self.shallow, self.names = shallow, {}
        for name in shallow:
            found = re.fullmatch(r"model\.layers\.([01])\.(.*)", name)
            copies = range(int(found[1]), 6, 2) if found else ()
            self.names |= {f"model.layers.{i}.{found[2]}": name for i in copies}
            if not copies:
                self.names[name] = name

    def __getitem__(self, name):
        return self.shallow[self.names[name]]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def live():
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def young():
    """Collections of cycles look at no objects from before: a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("young")
def test_memory_holds_one_block_grams_and_the_hidden_states(tmp_path):
    known = qjax.checkpoints.read_config(QWEN2)
    config = model.Config.from_json(known)
    dense = qjax.checkpoints.lazy(QWEN2)
    first = {name: dense[name] for name in dense if "layers.0." in name}
    block = sum(array.nbytes for array in first.values())
    ks = [array.shape[1] for array in first.values() if array.ndim == 2]
    ids = np.random.default_rng(0).integers(0, 96, (8, 24))
    states = ids.size * config.hidden_size * 4
    del first
    at_matrices, at_blocks, before = [], [], live()

    def noted(w, *codes, gram, **options):
        at_matrices.append(live())
        return quantize.nearest(w, *codes, gram=gram, **options)

    class Noted(quantize.Written):
        def __setitem__(self, i, tensors):
            # Cycles, of traced functions say, may still hold what nobody needs.
            gc.collect()
            at_blocks.append(live())
            super().__setitem__(i, tensors)

    recipe = quantize.Recipe(spec=qjax.Spec(group_size=32, quantizer=noted))
    deep = dataclasses.replace(config, layers=config.layers * 3)
    with Noted(tmp_path / "blocks", "", known, "gptq_v2") as blocks:
        quantize.quantize(Deep(dense), deep, ids, recipe, blocks, 4)
    # Beside them, the matrix that is quantized as JAX turns it, and an empty cache.
    room = block + 4 * sum(k * k for k in ks) + states
    assert max(at_matrices) - before < 1.25 * room
    assert len(at_blocks) == 6
    # The first block compiles, and leaves a few constants.
    assert max(at_blocks[1:]) == min(at_blocks[1:])
    assert max(at_blocks) - before < block + 1.25 * states


def test_quantize_wants_the_dense_model(tmp_path):
    text = ["--text", inspect.getsourcefile(inspect), "--rows", 1, "--context", 16]
    done = invoke(quantize.main, SHIPPED, tmp_path / "again", *text)
    assert done.exit_code == 1
    assert "is quantized already; pass the model it came from" in done.stderr


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_one_that_sees(prefix, tmp_path):
    """Gemma 3's names of transformers 4 and 5; what the config leaves out is known."""
    source = ROOT / "tests" / "reference" / "gemma3"
    config = json.loads((source / "config.json").read_text())
    assert config.pop("hidden_activation") == "gelu_pytorch_tanh"
    nested = {"model_type": "gemma3", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    tensors = {
        name.replace("model.", prefix, 1): array
        for name, array in load_file(source / "model.safetensors").items()
    }
    tensors["vision_tower.patch.weight"] = jnp.ones((2, 2))
    tensors["model.rotary_emb.inv_freq"] = jnp.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with np.load(source / "reference.npz") as reference:
        logits = forward(model.load(tmp_path), reference["ids"])
        chex.assert_trees_all_close(logits, reference["logits"], atol=2e-4, rtol=0)
    nested["text_config"]["final_logit_softcapping"] = 0.0
    with pytest.raises(ValueError, match=r"softcapping=0.0 must be above 0, or null"):
        model.Config.from_json(nested)


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' must be one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type='dynamic' must be"),
        ({"rope_parameters": YARN | {"factor": None}}, "factor=None of rope_type='ya"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks 'factor'"),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {"long_factor": [1], "short_factor": [0] * 32},
            },
            "short_factor=.* must be 32 numbers above 0",
        ),
        ({"no_rope_layers": [1, 1]}, r"no_rope_layers=\[1, 1\] must say so of 3"),
        ({"model_type": "granite", "logits_scaling": 0}, "scaling=0 must be above 0"),
        ({"num_hidden_layers": 2}, "the model has no place for"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    config = json.loads((SHIPPED / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        model.load(tmp_path)


def test_model_is_short():
    """The decoder stays a page that a newcomer reads from top to bottom."""
    lines = (ROOT / "examples" / "llm" / "model.py").read_text().splitlines()
    assert len(lines) < 350


def test_weights_stay_packed(shipped):
    decoder, _ = shipped
    kernels = [
        layer.kernel
        for _, layer in nnx.iter_modules(decoder)
        if isinstance(getattr(layer, "kernel", None), qjax.QTensor)
    ]
    assert len(kernels) == 21
    # 4 bits, and for each group of 128 a scale of 16 bits, a zero of 8, an order.
    assert all(8 * w.nbytes / (w.k * w.n) < 4.5 for w in kernels)
