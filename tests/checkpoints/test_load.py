"""Real and tiny checkpoints against the files' own bytes and PyTorch's numbers."""

import json
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax import checkpoints
from qjax.formats import gptq
from tests.checkpoints import tiny
from tests.goldens import arrays, same_bits

TESTS = Path(__file__).parents[1]
SHIPPED = TESTS.parent / "examples/llm/checkpoint"
GPTQ = {
    "llama_gptq4_g128_actorder": SHIPPED,
    "llama_gptq3_g64": TESTS / "data/llama_gptq3_g64",
}
QUANTIZED = GPTQ | {
    name: TESTS / "data" / name
    for name in (
        "llama_awq4_g128",
        "llama_ct_w4a16_g128",
        "llama_nf4_dq",
        "llama1L_hqq4_g64",
        "llama1L_torchao_int8",
    )
}
DENSE = [TESTS / "data/llama_bf16", *sorted(TESTS.glob("reference/*/"))]
DENSE = [
    path
    for path in DENSE
    # gpt_oss is in MXFP4.
    if (path / "config.json").exists()
    and path.name != "gpt_oss"
    and not path.name.startswith("mlx_")
]


def split(weights):
    """Matrices and arrays of what `load` returned."""
    quantized = {k: v for k, v in weights.items() if isinstance(v, qjax.QTensor)}
    return quantized, {k: v for k, v in weights.items() if k not in quantized}


@pytest.mark.parametrize("name", QUANTIZED)
def test_preparing_changes_no_weight(name):
    stored, _ = split(checkpoints.load(QUANTIZED[name], prepare=False))
    prepared, _ = split(checkpoints.load(QUANTIZED[name]))
    for module, w in prepared.items():
        weight, expected = qjax.dequantize(w), qjax.dequantize(stored[module])
        chex.assert_trees_all_equal(weight, expected)
        assert weight.dtype == expected.dtype


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_what_pytorch_dequantized(name, prepare):
    reference = arrays(TESTS / "data" / name / "reference.npz")
    quantized, _ = split(checkpoints.load(QUANTIZED[name], prepare=prepare))
    probes = [key for key in reference if key.startswith("probe_in/")]
    assert {key.split("/")[1] for key in probes} == {f"{k}.weight" for k in quantized}
    for module, w in quantized.items():
        weight = np.asarray(qjax.dequantize(w, jnp.float32))
        probe = np.cos(0.37 * np.arange(w.k) ** 1.5) @ weight.astype(np.float64)
        expected = reference[f"probe_in/{module}.weight"]
        # The reference is float64 arithmetic on the same float32 weights, stored as
        # float32: half a unit in the last place is 6e-8 of the largest.
        assert np.abs(probe - expected).max() <= 1e-6 * np.abs(expected).max(), module
        if f"rows4/{module}.weight" in reference:
            chex.assert_trees_all_close(
                weight.T[:4], reference[f"rows4/{module}.weight"], rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("name", GPTQ)
def test_unprepared_matrices_write_back_bit_for_bit(name):
    stored = tiny.tensors_of(GPTQ[name])
    quantized, dense = split(checkpoints.load(GPTQ[name], prepare=False))
    written = {
        f"{module}.{key}": np.asarray(array)
        for module, w in quantized.items()
        for key, array in gptq.to_tensors(w).items()
    }
    chex.assert_trees_all_equal(
        written | {k: np.asarray(dense[k]) for k in dense}, stored
    )


@pytest.mark.parametrize("path", DENSE, ids=lambda path: path.name)
def test_dense_tensors_are_the_bytes_of_the_files(path):
    weights, stored = checkpoints.load(path), tiny.tensors_of(path)
    assert weights.keys() == stored.keys()
    for name, array in stored.items():
        assert weights[name].dtype == array.dtype
        assert np.asarray(weights[name]).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("sharded", [False, True])
def test_names_dtypes_and_orientation(tmp_path, sharded):
    checkpoint = tiny.checkpoint()
    # Buffers of older models: floats are passed on.
    checkpoint.tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    checkpoint.tensors["model.step"] = np.array(2, np.float32)
    if sharded:
        checkpoint.shard()
    quantized, dense = split(checkpoints.load(checkpoint.write(tmp_path)))
    assert {k: w.shape for k, w in quantized.items()} == {tiny.MODULE: (tiny.K, tiny.N)}
    assert {k: (a.shape, a.dtype) for k, a in dense.items()} == {
        f"{tiny.MODULE}.bias": ((tiny.N,), np.float16),
        "lm_head.weight": ((8, tiny.N), ml_dtypes.bfloat16),
        "model.norm.weight": ((tiny.N,), np.float32),
        "model.rotary_emb.inv_freq": ((4,), np.float32),
        "model.step": ((), np.float32),
    }


@pytest.mark.parametrize("method", [{"quant_method": "gptq"}, {}])
def test_quantize_config_of_autogptq(tmp_path, method):
    checkpoint = tiny.checkpoint()
    del checkpoint.config["quantization_config"]
    checkpoint.write(tmp_path)
    entry = {
        "bits": 4,
        "group_size": 16,
        "desc_act": False,
        "model_file_base_name": None,
    }
    (tmp_path / "quantize_config.json").write_text(json.dumps(entry | method))
    assert checkpoints.load(tmp_path)[tiny.MODULE].bits == 4


def test_quantize_config_is_not_looked_at_otherwise(tmp_path):
    checkpoint = tiny.checkpoint()
    checkpoint.write(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{")
    assert tiny.MODULE in checkpoints.load(tmp_path)
    checkpoint.tensors = {"model.norm.weight": np.ones(4, np.float32)}
    checkpoint.config["quantization_config"] = None
    checkpoint.write(tmp_path)
    assert list(checkpoints.load(tmp_path)) == ["model.norm.weight"]


def test_overrides_of_modules(tmp_path):
    checkpoint = tiny.checkpoint()
    wide = {f"model.layers.1.q_proj.{k}": v for k, v in tiny.matrix(2, bits=8).items()}
    checkpoint.tensors |= wide | {
        "model.layers.2.q_proj.weight": np.ones((tiny.N, tiny.K), np.float16)
    }
    checkpoint.config["quantization_config"]["dynamic"] = {
        r"+:.*layers\.1\.": {"bits": 8},
        r"-:.*layers\.2\.": {},
    }
    quantized, dense = split(checkpoints.load(checkpoint.write(tmp_path)))
    widths = {module: w.bits for module, w in quantized.items()}
    assert widths == {tiny.MODULE: 4, "model.layers.1.q_proj": 8}
    assert "model.layers.2.q_proj.weight" in dense


def test_prepare_changes_the_layout_and_no_weight(tmp_path):
    checkpoint = tiny.checkpoint()
    planar = {f"{tiny.MODULE}.{k}": v for k, v in tiny.matrix(3, bits=3).items()}
    checkpoint.tensors |= planar
    checkpoint.config["quantization_config"] |= {
        "bits": 3,
        "checkpoint_format": "gptq_p",
    }
    checkpoint.write(tmp_path)
    kept = checkpoints.load(tmp_path, prepare=False)[tiny.MODULE]
    native = checkpoints.load(tmp_path)[tiny.MODULE]
    assert kept.layout == gptq.Planar() != native.layout
    chex.assert_trees_all_equal(qjax.dequantize(kept), qjax.dequantize(native))


def test_one_file_counts_before_shards(tmp_path):
    checkpoint = tiny.checkpoint()
    checkpoint.shard()
    checkpoint.write(tmp_path)
    checkpoint.shards = None
    checkpoint.tensors["model.norm.weight"] += 1
    checkpoint.write(tmp_path)
    loaded = checkpoints.load(tmp_path)["model.norm.weight"]
    chex.assert_trees_all_equal(loaded, checkpoint.tensors["model.norm.weight"])


def test_files_of_other_names(tmp_path):
    whole = tiny.checkpoint()
    expected = checkpoints.load(whole.write(tmp_path / "whole"))
    one = whole.write(tmp_path / "one")
    (one / "model.safetensors").rename(one / "output.safetensors")
    chex.assert_trees_all_equal(checkpoints.load(one), expected)
    whole.shard()
    numbered = whole.write(tmp_path / "numbered")
    (numbered / "model.safetensors.index.json").unlink()
    shards = sorted(numbered.glob("*.safetensors"))
    for i, shard in enumerate(shards, 1):
        shard.rename(numbered / f"out-{i:05}-of-{len(shards):05}.safetensors")
    chex.assert_trees_all_equal(checkpoints.load(numbered), expected)
    # They go when weights of the usual name come.
    checkpoints.save(numbered, expected, {}, format="gptq", overwrite=True)
    assert [file.name for file in numbered.glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_links_into_a_cache(tmp_path):
    blobs = tiny.checkpoint().write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    chex.assert_trees_all_equal(checkpoints.load(snapshot), checkpoints.load(blobs))
    (blobs / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        checkpoints.load(snapshot)


def test_reads_every_format_of_the_table(tmp_path, monkeypatch):
    class Config:
        @classmethod
        def from_json(cls, entry):
            return cls()

        def of(self, module):
            return self

    doubled = types.ModuleType("doubled")
    vars(doubled).update(
        TENSORS=("half",),
        Config=Config,
        check=lambda tensors, config: None,
        from_tensors=lambda tensors, config: qjax.quantize(
            jnp.asarray(tensors["half"]) * 2, group_size=None
        ),
    )
    monkeypatch.setattr("qjax.checkpoints.methods.FORMATS", {"doubled": doubled})
    tiny.Checkpoint(
        tensors={"a.half": np.full((8, 3), 1.5, np.float32)},
        config={"quantization_config": {"quant_method": "doubled"}},
    ).write(tmp_path)
    weights = checkpoints.load(tmp_path)
    assert list(weights) == ["a"]
    chex.assert_trees_all_close(
        qjax.dequantize(weights["a"]), np.full((8, 3), 3, np.float32), rtol=1e-6
    )


def test_read_config_keeps_both_dialects():
    four = checkpoints.read_config(TESTS / "reference/qwen2")
    five = checkpoints.read_config(str(TESTS / "reference/qwen3"))
    assert four["rope_theta"] == five["rope_parameters"]["rope_theta"] == 1e6
    assert four["torch_dtype"] == five["dtype"] == "bfloat16"


class TestNoFloats:
    """Masks, counts and positions, as CLIP, BERT and GPT-2 files have them."""

    TABLES = types.MappingProxyType(
        {
            "vision.position_ids": np.arange(5)[None],
            "vision.num_batches_tracked": np.array(2**31 - 1),
            "h.0.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.bool_)),
            "h.0.attn.mask": np.tril(np.ones((4, 4), np.uint8)),
        }
    )

    @pytest.fixture
    def directory(self, tmp_path):
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((64, 64)).astype(np.float32)
        tensors = {"h.0.mlp.up.weight": weight, **self.TABLES}
        return tiny.Checkpoint(tensors=tensors, config={}).write(tmp_path / "dense")

    def test_come_along(self, directory, tmp_path):
        mesh = jax.make_mesh((2,), ("a",))
        place = lambda name: jax.NamedSharding(mesh, jax.P())  # noqa: E731
        loaded = (
            checkpoints.load(directory),
            checkpoints.load(directory, sharding=place),
        )
        target = tmp_path / "quantized"
        rules = qjax.Spec(bits=4, group_size=32)
        checkpoints.quantize(directory, target, format="gptq_v2", rules=rules)
        for weights in (*loaded, checkpoints.load(target)):
            for name, table in self.TABLES.items():
                narrow = table.astype(np.int32) if table.dtype == int else table
                chex.assert_trees_all_equal(np.asarray(weights[name]), narrow)
                assert weights[name].dtype == narrow.dtype
        # In files they keep their 64 bits.
        stored = load_file(target / "model.safetensors")
        for name, table in self.TABLES.items():
            same_bits(stored[name], table)
        assert checkpoints.verify(directory) == checkpoints.verify(target) == []
        compared = checkpoints.compare(directory, target)
        assert compared.is_one_model
        assert compared.total.same == len(self.TABLES)

    def test_that_do_not_fit(self, directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["vision.position_ids"] = np.array([2**31])
        tiny.Checkpoint(tensors=tensors, config={}).write(directory)
        with pytest.raises(ValueError, match="position_ids is int64, and has values"):
            checkpoints.load(directory)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float64"])
    def test_weights_of_them_are_refused(self, dtype, directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["h.0.mlp.down.weight"] = np.ones((4, 4), dtype)
        tiny.Checkpoint(tensors=tensors, config={}).write(directory)
        with pytest.raises(ValueError, match=f"down.weight.dtype={dtype} must be"):
            checkpoints.load(directory)


def test_what_is_lazy_says_what_it_is():
    weights = checkpoints.lazy(SHIPPED)
    assert repr(weights).startswith("<30 weights, ")


def test_a_sharding_that_is_no_function():
    where = jax.NamedSharding(jax.make_mesh((2,), ("a",)), jax.P())
    for read in (checkpoints.load, checkpoints.lazy):
        with pytest.raises(TypeError, match="must be a function from the name"):
            read(SHIPPED, sharding=where)
