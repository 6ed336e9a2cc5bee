"""Checkpoints written and read again, moved between formats, and refused."""

import dataclasses
import json
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from safetensors import numpy as safetensors
from safetensors import safe_open

import qjax
from qjax import checkpoints
from qjax.checkpoints import placing, shards
from qjax.formats import (
    awq,
    bnb,
    compressed_tensors,
    exl2,
    fp8,
    gptq,
    quanto,
    torchao,
)
from qjax.formats.tiles import Tiles
from tests.checkpoints import tiny
from tests.checkpoints.assembled import DIALECTS
from tests.goldens import arrays, same_bits

TESTS = Path(__file__).parents[1]
SHIPPED = TESTS.parent / "examples/llm/checkpoint"
A, B = "model.layers.0.q_proj", "model.layers.1.q_proj"


def quantized(seed=0, k=64, n=32, bits=4, group=32, **kwargs):
    w = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float16)
    return qjax.quantize(jnp.asarray(w), bits=bits, group_size=group, **kwargs)


def act_order(seed=0):
    tensors = dict(gptq.to_tensors(quantized(seed), "gptq_v2"))
    order = np.random.default_rng(seed).permutation(64)
    tensors["g_idx"] = order.astype(np.int32) // 32
    config = gptq.Config(group_size=32, checkpoint_format="gptq_v2")
    return gptq.from_tensors(tensors, config)


def mixed():
    """A matrix of 4 and 3 bits with EXL2's scales."""
    vectors = arrays(TESTS / "golden/exl2/exl2_b43_g128.npz")
    names = [name for name in exl2.TENSORS if name in vectors]
    return exl2.from_tensors({name: vectors[name] for name in names})


def awq_directory(path):
    """What AutoAWQ packed, as a checkpoint."""
    tensors = {"model.norm.weight": np.ones(4, np.float16)}
    for i, name in enumerate(["g32__32x64__s202", "g32__32x64__s202"]):
        vectors = arrays(TESTS / f"golden/awq/autoawq_gemm__{name}.npz")
        for key in ("qweight", "qzeros", "scales"):
            tensors[f"model.layers.{i}.q_proj.{key}"] = vectors[f"packed_{key}"]
    entry = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config = {"model_type": "llama", "quantization_config": entry}
    return tiny.Checkpoint(tensors=tensors, config=config).write(path)


def load_one(path):
    """The one quantized matrix, as its file has it."""
    weights = checkpoints.load(path, prepare=False)
    (found,) = (w for w in weights.values() if isinstance(w, qjax.QTensor))
    return found


def dequantized(path):
    return {
        name: np.asarray(qjax.dequantize(w) if isinstance(w, qjax.QTensor) else w)
        for name, w in checkpoints.load(path, prepare=False).items()
    }


def entry_of(path):
    return checkpoints.read_config(path)["quantization_config"]


def bytes_of(path):
    return {
        name: (array.shape, array.dtype, array.tobytes())
        for name, array in tiny.tensors_of(path).items()
    }


def test_gptq_to_compressed_tensors_and_back(tmp_path):
    there, back = tmp_path / "ct", tmp_path / "gptq"
    checkpoints.convert(SHIPPED, there, format="compressed-tensors")
    checkpoints.convert(there, back, format="gptq")
    # With act-order, in the columns that hold the groups.
    (group,) = entry_of(there)["config_groups"].values()
    weights = group["weights"]
    assert (weights["symmetric"], weights["actorder"]) == (True, "group")
    assert entry_of(there)["ignore"] == ["lm_head"]
    assert bytes_of(back) == bytes_of(SHIPPED)
    chex.assert_trees_all_equal(dequantized(SHIPPED), dequantized(there))
    chex.assert_trees_all_equal(dequantized(SHIPPED), dequantized(back))
    kept = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "lm_head")
    for key in kept:
        assert entry_of(back)[key] == entry_of(SHIPPED)[key], key
    others = {"tokenizer.json", "generation_config.json", "tokenizer_config.json"}
    assert others <= {file.name for file in back.iterdir()}
    for file in others:
        assert (back / file).read_bytes() == (SHIPPED / file).read_bytes()
    assert not (back / "quantize_config.json").exists()


@pytest.mark.parametrize("stop", ["gptq", "gptq_v2", "gptq_p", "compressed-tensors"])
def test_awq_to_others_and_back(tmp_path, stop):
    source = awq_directory(tmp_path / "awq")
    checkpoints.convert(source, tmp_path / "there", format=stop)
    checkpoints.convert(tmp_path / "there", tmp_path / "back", format="awq")
    assert bytes_of(tmp_path / "back") == bytes_of(source)
    for path in ("there", "back"):
        chex.assert_trees_all_equal(dequantized(source), dequantized(tmp_path / path))
    assert entry_of(tmp_path / "back") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2", "gptq_p", "compressed-tensors"])
def test_saved_is_loaded(tmp_path, format_, prepare):
    tensors = {
        A: act_order(),
        f"{A}.bias": np.ones(32, np.float16),
        B: quantized(1, bits=3, group=64),
        "model.layers.2.q_proj": quantized(2, bits=8, group=None),
        "model.layers.3.q_proj.weight": np.ones((32, 64), ml_dtypes.bfloat16),
        "model.embed_tokens.weight": jnp.ones((16, 32), jnp.bfloat16),
        "model.norm.weight": np.arange(4, dtype=np.float32),
        "model.step": jnp.float32(2),
    }
    given = qjax.prepare(tensors) if prepare else tensors
    checkpoints.save(tmp_path / "x", given, {"model_type": "llama"}, format=format_)
    assert checkpoints.verify(tmp_path / "x") == []
    loaded = checkpoints.load(tmp_path / "x", prepare=False)
    assert loaded.keys() == tensors.keys()
    for name, w in tensors.items():
        if isinstance(w, qjax.QTensor):
            chex.assert_trees_all_equal(qjax.codes(loaded[name]), qjax.codes(w))
            weights = qjax.dequantize(loaded[name]), qjax.dequantize(w)
            chex.assert_trees_all_equal(*weights)
        else:
            assert loaded[name].dtype == w.dtype
            assert np.asarray(loaded[name]).tobytes() == np.asarray(w).tobytes()
    assert entry_of(tmp_path / "x")["quant_method"] == format_.partition("_")[0]


@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors", "hqq", "torchao"])
@pytest.mark.parametrize("layout", [gptq.Stream(), Tiles()], ids=str)
def test_what_lies_on_a_mesh(tmp_path, format_, layout):
    kind = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), kind)
    whole = qjax.relayout(quantized(k=512, n=128), layout)
    checkpoints.save(tmp_path / "whole", {A: whole}, {}, format=format_)
    expected = safetensors.load_file(tmp_path / "whole/model.safetensors")
    for i, spec in enumerate([P(None, "model"), P("model"), P("data", "model")]):
        w = qjax.shard(whole, mesh, spec)
        checkpoints.save(tmp_path / f"{i}", {A: w}, {}, format=format_)
        found = safetensors.load_file(tmp_path / f"{i}/model.safetensors")
        chex.assert_trees_all_equal(found, expected)


def test_widths_and_dense_modules_of_gptq(tmp_path):
    tensors = {name: quantized(i) for i, name in enumerate([A, B])}
    tensors |= {"a.b": quantized(bits=8), "lm_head": quantized(group=None)}
    tensors |= {"model.gate.weight": np.ones((8, 4), np.float16)}
    checkpoints.save(tmp_path / "x", tensors, {}, format="gptq")
    entry = entry_of(tmp_path / "x")
    assert entry["dynamic"] == {
        r"-:^model\.gate$": {},
        r"+:^a\.b$": {"bits": 8, "group_size": 32},
        r"+:^lm_head$": {"bits": 4, "group_size": -1},
    }
    assert (entry["bits"], entry["group_size"], entry["lm_head"]) == (4, 32, True)
    assert not entry["sym"]
    config = gptq.Config.from_json(entry)
    assert config.of("model.gate") is None
    assert config.of("a.bc").bits == 4


def test_schemes_of_compressed_tensors(tmp_path):
    whole = {"weight_packed": np.zeros((32, 8), np.int32)}
    whole |= {"weight_scale": np.ones(1, np.float32)}
    whole |= {"weight_shape": np.array([32, 64])}
    config = compressed_tensors.Config(strategy="tensor", group_size=None)
    tensors = {
        A: quantized(1),
        B: quantized(2),
        "c": act_order(),
        "d": quantized(bits=5, group=None),
        "e": compressed_tensors.from_tensors(whole, config),
    }
    checkpoints.save(tmp_path / "x", tensors, {}, format="compressed-tensors")
    groups = entry_of(tmp_path / "x")["config_groups"].values()
    found = [
        (g["targets"], g["weights"]["strategy"], g["weights"]["actorder"])
        for g in groups
    ]
    assert found == [
        (["Linear"], "group", None),
        (["c"], "group", "group"),
        (["d"], "channel", None),
        (["e"], "tensor", None),
    ]
    expected = {name: np.asarray(qjax.dequantize(w)) for name, w in tensors.items()}
    chex.assert_trees_all_equal(dequantized(tmp_path / "x"), expected)


class TestSmallFloats:
    def tensors(self):
        w = jnp.asarray(
            np.random.default_rng(0).standard_normal((96, 64)), jnp.bfloat16
        )
        return fp8.quantize(w, group_size=32), fp8.quantize(w, group_size=None)

    def test_blocks_and_columns_of_compressed_tensors(self, tmp_path):
        blocks, columns = self.tensors()
        tensors = {A: blocks, B: columns, "c": quantized()}
        checkpoints.save(tmp_path / "x", tensors, {}, format="compressed-tensors")
        entry = entry_of(tmp_path / "x")
        assert entry["format"] == "mixed-precision"
        found = [
            (g["format"], g["weights"]["type"], g["weights"]["strategy"])
            for g in entry["config_groups"].values()
        ]
        assert sorted(found) == [
            ("naive-quantized", "float", "block"),
            ("naive-quantized", "float", "channel"),
            ("pack-quantized", "int", "group"),
        ]
        loaded = checkpoints.load(tmp_path / "x")
        for name, w in tensors.items():
            again, wanted = (qjax.dequantize(x, jnp.float32) for x in (loaded[name], w))
            chex.assert_trees_all_equal(again, wanted)

    @pytest.mark.parametrize("name", ["fp8", "compressed-tensors nvfp4"])
    def test_the_same_bytes_again(self, name, tmp_path):
        made = DIALECTS[name]().checkpoint
        source = made.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "again", format=name.split()[0])
        # safetensors has no float8 of NumPy's.
        found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
        same_bits(found, dict(made.tensors))

    @pytest.mark.parametrize(
        "name",
        [
            "modelopt fp8_pb_wo",
            "modelopt mxfp8",
            "modelopt mixed",
            "modelopt fp8 with hf_quant_config.json",
            "modelopt with hf_quant_config.json",
        ],
    )
    def test_the_same_bytes_of_modelopt(self, name, tmp_path):
        made = DIALECTS[name]().checkpoint
        source = made.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "again", format="modelopt")
        found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
        scales = [key for key in made.tensors if key.endswith("input_scale")]
        same_bits(found, {k: v for k, v in made.tensors.items() if k not in scales})
        assert not (tmp_path / "again/hf_quant_config.json").exists()
        entry = entry_of(tmp_path / "again")
        # vLLM asks for no scale of activations where this says that there is none.
        weights = "W4A16_NVFP4" if "weight_scale_2" in str([*found]) else ""
        assert entry["quant_algo"].startswith(weights)
        assert entry["ignore"] == ["lm_head"]

    @pytest.mark.parametrize("name", ["quark fp8", "quark mxfp4"])
    def test_the_same_bytes_of_quark(self, name, tmp_path):
        made = DIALECTS[name]().checkpoint
        source = made.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "again", format="quark")
        found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
        same_bits(found, dict(made.tensors))

    @pytest.mark.parametrize("name", ["bitsandbytes", "bitsandbytes int8"])
    def test_the_same_bytes_of_bitsandbytes(self, name, tmp_path):
        made = DIALECTS[name]().checkpoint
        source = made.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "again", format="bitsandbytes")
        found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
        same_bits(found, dict(made.tensors))

    def test_one_kind_of_codes_for_bitsandbytes(self, tmp_path, refuses):
        w = jnp.eye(64, dtype=jnp.bfloat16)
        nf4, fp4, eight = (
            bnb.quantize_4bit(w),
            bnb.quantize_4bit(w, "fp4", 32),
            bnb.quantize(w, 8),
        )
        dense = {"lm_head.weight": np.ones((4, 4), np.float16)}
        # Prepared, and still NF4.
        tensors = {"a": nf4, "b": qjax.prepare(nf4)} | dense
        checkpoints.save(tmp_path / "4", tensors, {}, format="bitsandbytes")
        entry = entry_of(tmp_path / "4")
        assert entry["bnb_4bit_quant_type"] == "nf4"
        assert entry["bnb_4bit_compute_dtype"] == "bfloat16"
        assert entry["llm_int8_skip_modules"] == ["lm_head"]
        found = checkpoints.load(tmp_path / "4", prepare=False)
        for name in "ab":
            same_bits(qjax.dequantize(found[name]), qjax.dequantize(nf4))
        for other, said in ((fp4, "fp4 in uint8"), (eight, "LLM.int8() in int8")):
            with refuses(f"here nf4 in uint8, and it has {said}"):
                three = {"a": nf4, "b": nf4, "c": other}
                checkpoints.save(tmp_path / "5", three, {}, format="bitsandbytes")
        with refuses("head: bitsandbytes leaves modules dense by the ends of their"):
            checkpoints.save(
                *(tmp_path / "5", {"x.lm_head": nf4} | dense, {}), format="bitsandbytes"
            )
        assert not (tmp_path / "5").exists()

    def test_schemes_of_quark(self, tmp_path):
        tensors = {
            "model.layers[0].a": quantized(1, bits=4, group=64),
            "model.layers[0].b": quantized(2, bits=4, group=64),
            "c": quantized(3, bits=8, group=None),
            "d": fp8.quantize(jnp.ones((64, 32)), group_size=32),
        }
        dense = {"lm_head.weight": np.ones((4, 4), np.float16)}
        checkpoints.save(tmp_path / "x", tensors | dense, {}, format="quark")
        entry = entry_of(tmp_path / "x")
        assert entry["exclude"] == ["lm_head"]
        layers = entry["layer_quant_config"]
        assert layers.keys() == {"c", "d"}
        assert entry["global_quant_config"]["weight"]["group_size"] == 64
        inputs = layers["d"]["input_tensors"]
        assert inputs["qscheme"] == "per_group"
        assert inputs["group_size"] == 32
        assert inputs["is_dynamic"] is True
        weights = checkpoints.load(tmp_path / "x", prepare=False)
        for name, w in tensors.items():
            found = qjax.dequantize(weights[name], jnp.float32)
            same_bits(found, qjax.dequantize(w, jnp.float32))

    @pytest.mark.parametrize(
        "name",
        # The padding of the one left out is no whole group.
        [one for one in DIALECTS if "torchao" in one and "padded" not in one],
    )
    def test_the_same_bytes_of_torchao(self, name, tmp_path):
        made = DIALECTS[name]().checkpoint
        source = made.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "again", format="torchao")
        assert checkpoints.verify(tmp_path / "again") == []
        same_bits(dequantized(tmp_path / "again"), dequantized(source))
        found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
        if name != "torchao tiled":  # which torchao pads to 1024 inputs
            same_bits(found, dict(made.tensors))

    def test_weights_of_torchao_that_differ(self, tmp_path):
        tensors = {
            "model.layers.0.a": quantized(1, bits=4, group=32),
            "model.layers.1.a": quantized(2, bits=4, group=32),
            "b": quantized(3, bits=8, group=None, symmetric=True),
            "c": fp8.quantize(jnp.ones((256, 128)), group_size=128),
            "model.embed_tokens": quantized(4, bits=2, group=None),
        }
        dense = {
            "lm_head.weight": np.ones((4, 4), np.float16),
            "b.bias": np.ones(32, np.float16),
            "step": np.ones(1, np.float32),
        }
        path = tmp_path / "x"
        checkpoints.save(path, tensors | dense, {}, format="torchao", shard_bytes=3000)
        entry = entry_of(path)
        assert entry["modules_to_not_convert"] == ["lm_head"]
        assert entry["include_input_output_embeddings"] is True
        table = entry["quant_type"]["default"]["_data"]["fqn_to_config"]
        kinds = {name: kind["_type"] for name, kind in table.items()}
        assert kinds == {
            "model.layers.0.a": "IntxWeightOnlyConfig",
            "model.layers.1.a": "IntxWeightOnlyConfig",
            "b": "Int8WeightOnlyConfig",
            "c": "Float8DynamicActivationFloat8WeightConfig",
            "model.embed_tokens": "IntxWeightOnlyConfig",
        }
        files = sorted(path.glob("*.safetensors"))
        assert len(files) > 1
        for file in files:  # each says all, as transformers keeps the last
            with safe_open(file, framework="np") as opened:
                said = opened.metadata()
            listed = json.loads(said.pop("tensor_names"))
            assert said.pop("format") == "pt"
            assert set(listed) == said.keys()
            assert {"b.weight", "b.bias", "lm_head.weight"} < said.keys()
        weights = checkpoints.load(path, prepare=False)
        for name, w in tensors.items():
            same_bits(qjax.dequantize(weights[name]), qjax.dequantize(w))

    def test_a_matrix_that_torchao_would_leave_dense(self, tmp_path, refuses):
        pair = {"a.up": quantized(), "up.weight": np.ones((4, 4), np.float16)}
        with refuses("torchao leaves modules dense by the ends of their paths, and up"):
            checkpoints.save(tmp_path / "x", pair, {}, format="torchao")

    def test_algorithms_of_modelopt(self, tmp_path, refuses):
        one = load_one(DIALECTS["modelopt fp8"]().checkpoint.write(tmp_path / "1"))
        four = load_one(DIALECTS["modelopt nvfp4"]().checkpoint.write(tmp_path / "4"))
        columns = self.tensors()[1]
        with refuses("a: it has one scale for all, with which loaders of ModelOpt's"):
            checkpoints.save(tmp_path / "x", {"a": one}, {}, format="modelopt")
        pair = {"a": four, "b": four, "c": columns}
        with refuses("c: one algorithm is for all, here W4A16_NVFP4, and it has FP8_P"):
            checkpoints.save(tmp_path / "x", pair, {}, format="modelopt")
        checkpoints.save(tmp_path / "x", {"c": columns}, {}, format="modelopt")
        same_bits(
            qjax.dequantize(checkpoints.load(tmp_path / "x")["c"], jnp.float32),
            qjax.dequantize(columns, jnp.float32),
        )

    def test_blocks_of_one_size(self, tmp_path, refuses):
        blocks, columns = self.tensors()
        checkpoints.save(tmp_path / "x", {A: blocks}, {}, format="fp8")
        assert entry_of(tmp_path / "x")["weight_block_size"] == [32, 32]
        chex.assert_trees_all_equal(
            dequantized(tmp_path / "x")[A], np.asarray(qjax.dequantize(blocks))
        )
        pair = {A: blocks, "b": blocks, B: columns}
        with refuses(
            "it has a scale for each output, which loaders of FP8 do not read"
        ):
            checkpoints.save(tmp_path / "y", pair, {}, format="fp8")
        pair = {A: blocks, "b": blocks, B: qjax.prepare(blocks)}
        with refuses("blocks of 32 x 32, and it has float for blocks of 1 x 32; load"):
            checkpoints.save(tmp_path / "y", pair, {}, format="fp8")
        pair = {A: blocks, "q_proj.weight": jnp.ones((4, 4))}
        with refuses("FP8 leaves modules dense by the ends of their paths, and q_proj"):
            checkpoints.save(tmp_path / "y", pair, {}, format="fp8")

    def test_outputs_that_are_no_whole_blocks(self, tmp_path):
        # As those of DeepSeek-V3 beside others: n = 576 there.
        made = [fp8.quantize(jnp.ones((64, n)), group_size=32) for n in (48, 64, 16)]
        tensors = {f"{i}.q": w for i, w in enumerate(made)}
        for format_ in ("fp8", "compressed-tensors"):
            checkpoints.save(tmp_path / format_, tensors, {}, format=format_)
            checkpoints.convert(
                tmp_path / format_, tmp_path / f"{format_} again", format=format_
            )
            loaded = checkpoints.load(tmp_path / f"{format_} again")
            for name, w in tensors.items():
                same_bits(
                    qjax.dequantize(loaded[name], jnp.float32),
                    qjax.dequantize(w, jnp.float32),
                )

    def test_a_model_into_fp8(self, tmp_path):
        spec = qjax.Spec(bits=8, symmetric=True, quantizer=fp8.quantize)
        options = {"format": "fp8", "rules": spec}
        checkpoints.quantize(TESTS / "data/llama_bf16", tmp_path / "x", **options)
        weights = checkpoints.load(tmp_path / "x", prepare=False)
        w = weights["model.layers.0.mlp.up_proj"]
        assert w.layout == fp8.Bytes()
        assert w.scale.values.shape == (2, 5)
        assert checkpoints.verify(tmp_path / "x") == []


def test_the_same_bytes_of_bitnet(tmp_path, refuses):
    made = DIALECTS["bitnet"]().checkpoint
    source = made.write(tmp_path / "source")
    checkpoints.convert(source, tmp_path / "again", format="bitnet")
    found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
    same_bits(found, dict(made.tensors))
    entry = entry_of(tmp_path / "again")
    assert entry["modules_to_not_convert"] == ["lm_head"]
    assert entry["linear_class"] == "autobitlinear"
    pair = {A: load_one(source), "q_proj.weight": jnp.ones((4, 4))}
    with refuses("BitNet leaves modules dense by the ends of their paths, and q_proj"):
        checkpoints.save(tmp_path / "x", pair, {}, format="bitnet")
    with refuses("BitNet cannot hold QTensor(64x32, 4 bits"):
        checkpoints.save(tmp_path / "x", {A: quantized()}, {}, format="bitnet")


@pytest.mark.parametrize("head", [False, True])
def test_exl2(tmp_path, head):
    tensors = {A: mixed()} | ({"lm_head": mixed()} if head else {})
    checkpoints.save(tmp_path / "x", tensors, {}, format="exl2")
    checkpoints.convert(tmp_path / "x", tmp_path / "y", format="exl2")
    names = [f"{A}.{key}" for key in exl2.TENSORS if key != "q_perm"]
    vectors = arrays(TESTS / "golden/exl2/exl2_b43_g128.npz")
    with safe_open(tmp_path / "y/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name in names:
            expected = vectors[name.rpartition(".")[2]]
            chex.assert_trees_all_equal(file.get_tensor(name), expected)
    assert entry_of(tmp_path / "y") == {
        "quant_method": "exl2",
        "bits": round(mixed().bits, 2),
        "head_bits": 3 if head else 16,
    }


def test_shards(tmp_path):
    tensors = {f"a.{i}": quantized(i) for i in range(3)} | {
        "norm.weight": np.ones(4, np.float16)
    }
    checkpoints.save(tmp_path / "x", tensors, {}, format="gptq", shard_bytes=3000)
    files = sorted(file.name for file in (tmp_path / "x").iterdir())
    assert files == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
    stored = tiny.tensors_of(tmp_path / "x")
    size = sum(array.nbytes for array in stored.values())
    assert index["metadata"] == {"total_size": size}
    assert index["weight_map"].keys() == stored.keys()
    # A module stays in one file.
    for i in range(3):
        assert len({f for n, f in index["weight_map"].items() if f"a.{i}." in n}) == 1
    checkpoints.save(tmp_path / "one", tensors, {}, format="gptq")
    chex.assert_trees_all_equal(
        dequantized(tmp_path / "x"), dequantized(tmp_path / "one")
    )


def test_files_are_those_of_safetensors(tmp_path):
    """The same header and the same places as the library's own writer gives."""
    tensors = {"a": quantized(), "b.bias": np.ones(3, np.float16)}
    checkpoints.save(tmp_path / "x", tensors, {}, format="gptq")
    file = tmp_path / "x/model.safetensors"
    held = tiny.tensors_of(tmp_path / "x")
    assert file.read_bytes() == safetensors.save(held, metadata={"format": "pt"})
    odd = {"a": quantized(), "é.bias": np.array(3, np.float32)}
    odd |= {"b.bias": np.ones((0,), np.float32)}
    checkpoints.save(tmp_path / "y", odd, {}, format="gptq")
    loaded = safetensors.load_file(tmp_path / "y/model.safetensors")
    assert loaded["b.bias"].shape == (0,)
    assert (loaded["é.bias"].shape, loaded["é.bias"]) == ((), 3)


def wide_zeros():
    """MPQ has zeros of 2**bits, which no code is."""
    w = quantized()
    return dataclasses.replace(w, zero=jnp.full_like(w.zero, 16))


def uneven():
    """Groups of 31 and 33 rows, as a GPTQ file may have them."""
    w = quantized()
    rows = jnp.where(jnp.arange(64) < 31, 0, 1).astype(jnp.int32)
    return dataclasses.replace(w, row_group=rows)


REFUSALS = {
    **{
        f"zeros of 16 into {name}": (name, wide_zeros(), "and 4 bits hold up to 15")
        for name in ("gptq", "gptq_v2", "gptq_p", "awq", "compressed-tensors")
    },
    "uneven groups into compressed-tensors": (
        "compressed-tensors",
        uneven(),
        "its groups have 31 to 33 rows; GPTQ holds those",
    ),
    **{
        f"infinite scales into {name}": (
            name,
            dataclasses.replace(quantized(), scale=jnp.full((2, 32), jnp.inf)),
            "scale must be finite; found NaN or infinity",
        )
        for name in ("gptq_v2", "awq", "compressed-tensors", "hqq")
    },
    "3 bits into AWQ": ("awq", quantized(bits=3), "3 bits are not among (4,)"),
    "act-order into AWQ": ("awq", act_order(), "(act-order); GPTQ holds those"),
    "GPTQ into EXL2": ("exl2", act_order(), "EXL2 cannot hold"),
    "plain scales into EXL2": (
        "exl2",
        quantized(symmetric=True),
        "its scales are plain numbers",
    ),
    "5 bits into GPTQ": ("gptq", quantized(bits=5), "GPTQ's 'gptq_p' 2 to 8"),
    "several widths into GPTQ": ("gptq_v2", mixed(), "EXL2 holds those"),
    "several widths into compressed-tensors": (
        "compressed-tensors",
        mixed(),
        "EXL2 holds those",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_list_all_modules_and_write_nothing(tmp_path, case):
    format_, w, reason = REFUSALS[case]
    tensors = {A: w, "model.fine.weight": np.ones((4, 4), np.float16), B: w}
    with pytest.raises(ValueError, match=f"2 of 2 matrices .* '{format_}'") as caught:
        checkpoints.save(tmp_path / "x", tensors, {}, format=format_)
    lines = str(caught.value).splitlines()[1:]
    assert [line.partition(": ")[0].strip() for line in lines] == [f"{A}, {B}"]
    assert all(reason in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda w: awq.to_tensors(w, "gemm"),
        lambda w: awq.to_tensors(w, "gemv"),
        lambda w: gptq.to_tensors(w, "gptq_v2"),
        compressed_tensors.to_tensors,
        torchao.to_tensors,
        quanto.to_tensors,
    ],
)
def test_zeros_that_are_no_codes_are_not_cut(write, refuses):
    with refuses("its zeros reach 16, and 4 bits hold up to 15"):
        write(wide_zeros())


def test_a_good_checkpoint_stays_where_its_successor_could_not_be_read(tmp_path):
    target = tmp_path / "x"
    checkpoints.save(target, {A: uneven()}, {}, format="gptq_v2")
    before = {file: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(ValueError, match="31 to 33 rows"):
        checkpoints.convert(target, target, format="compressed-tensors", overwrite=True)
    assert {file: file.read_bytes() for file in target.iterdir()} == before


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, 2.0], "tensors['b'] is list, and must be an array"),
        (jax.eval_shape(quantized), "tensors['b'] is abstract, a shape"),
        (jax.ShapeDtypeStruct((4,), jnp.float32), "tensors['b'] is abstract, a shape"),
    ],
)
def test_what_has_no_values(weight, message, tmp_path, refuses):
    with refuses(message, TypeError):
        checkpoints.save(
            tmp_path / "x", {A: quantized(), "b": weight}, {}, format="awq"
        )
    assert list(tmp_path.iterdir()) == []


def test_what_values_tell_has_a_name(tmp_path):
    """Scales that differ, where the format has one for all."""
    tensors = {"layers.0.a": quantized(bits=2, group=None)}
    with pytest.raises(ValueError, match=r"layers\.0\.a: .*it has more than one scale"):
        checkpoints.save(tmp_path / "x", tensors, {}, format="bitnet")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_tensor_of_a_file(tmp_path, refuses):
    with refuses("'__metadata__' is not the name of a tensor"):
        tensors = {A: quantized(), "__metadata__": np.ones(2, np.float32)}
        checkpoints.save(tmp_path / "x", tensors, {}, format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_zeros_of_zero_are_not_written_as_v1(tmp_path):
    tensors = dict(gptq.to_tensors(quantized(), "gptq_v2"))
    tensors["qzeros"] = tensors["qzeros"] & ~15
    config = gptq.Config(group_size=32, checkpoint_format="gptq_v2")
    w = {A: gptq.from_tensors(tensors, config)}
    with pytest.raises(ValueError, match="'gptq_v2' holds them"):
        checkpoints.save(tmp_path / "x", w, {}, format="gptq")
    checkpoints.save(tmp_path / "x", w, {}, format="gptq_v2")
    loaded = checkpoints.load(tmp_path / "x", prepare=False)
    chex.assert_trees_all_equal(loaded, w)


def test_what_cannot_stand_side_by_side(tmp_path, refuses):
    four = {"a": quantized(), "b": quantized(), "c": quantized(group=64)}
    with refuses("c: AWQ has one group size for all, here 32, and it has 64"):
        checkpoints.save(tmp_path / "x", four, {}, format="awq")
    dense = {"l.gate.weight": np.ones((4, 4), np.float16)}
    with refuses("l.gate_proj: AWQ leaves modules dense by parts of their names"):
        pair = {"l.gate_proj": quantized()} | dense
        checkpoints.save(tmp_path / "x", pair, {}, format="awq")
    with refuses("l.gate is quantized"):
        pair = {"l.gate": quantized()} | dense
        checkpoints.save(tmp_path / "x", pair, {}, format="gptq")
    with refuses("a.scales would be written twice"):
        pair = {"a": quantized(), "a.scales": np.ones(4, np.float16)}
        checkpoints.save(tmp_path / "x", pair, {}, format="gptq")
    for name in ("layers/0/up", "a..b", "a\n", ""):
        with refuses(f"{name + '.qweight'!r} is not the name of a tensor"):
            checkpoints.save(tmp_path / "x", {name: quantized()}, {}, format="awq")
    with refuses("b.dtype=float64 must be float16"):
        pair = {"a": quantized(), "b": np.ones(4)}
        checkpoints.save(tmp_path / "x", pair, {}, format="gptq")
    with refuses("b: weight_packed is missing; found ['weight_scale']"):
        pair = {"a": quantized(), "b.weight_scale": np.ones(4, np.float16)}
        checkpoints.save(tmp_path / "x", pair, {}, format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path, refuses):
    with refuses("format='int4' must be one of ['gptq'"):
        checkpoints.save(tmp_path / "x", {A: quantized()}, {}, format="int4")
    with refuses("shard_bytes=0 must be positive"):
        checkpoints.save(
            tmp_path / "x", {A: quantized()}, {}, format="awq", shard_bytes=0
        )
    with refuses("No weight is quantized"):
        checkpoints.save(tmp_path / "x", {"a": np.ones(4)}, {}, format="awq")
    with pytest.raises(FileNotFoundError, match="make it first"):
        checkpoints.save(tmp_path / "x/y", {A: quantized()}, {}, format="awq")
    assert list(tmp_path.iterdir()) == []


def failing_at(monkeypatch, count, error):
    """Lets the ``count``-th weight to be written fail; returns those written."""
    fill, written = placing.fill, []

    def failing(stream, places, arrays):
        if len(written) == count - 1:
            raise error
        written.append(stream.name)
        return fill(stream, places, arrays)

    monkeypatch.setattr(placing, "fill", failing)
    return written


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_crash_leaves_what_was_there(tmp_path, monkeypatch, there, error):
    target = tmp_path / "x"
    if there:
        checkpoints.save(target, {A: quantized()}, {}, format="gptq")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    written = failing_at(monkeypatch, 2, error)
    tensors = {A: quantized(1), B: quantized(2)}
    options = {"format": "awq", "overwrite": there, "shard_bytes": 1}
    with pytest.raises((OSError, KeyboardInterrupt)):
        checkpoints.save(target, tensors, {}, **options)
    assert len(written) == 1
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if there else [])


def test_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    target, renamed = tmp_path / "x", []
    checkpoints.save(target, {A: quantized()}, {}, format="gptq")
    rename = Path.rename

    def second_fails(self, other):
        renamed.append(other)
        if len(renamed) == 2:
            raise PermissionError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(PermissionError):
        checkpoints.save(target, {B: quantized()}, {}, format="gptq", overwrite=True)
    assert list(checkpoints.load(target)) == [A]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("again", ["save", "convert"])
@pytest.mark.parametrize("moved_in", [False, True])
def test_goes_on_after_a_kill_amid_the_last_renames(tmp_path, again, moved_in):
    """What a process leaves that is killed between any two of them."""
    target, old = tmp_path / "x", tmp_path / ".x.0123abcd.old"
    checkpoints.save(target, {A: quantized()}, {}, format="gptq")
    (target / "onnx").mkdir()
    (target / "onnx/notes.txt").write_text("mine")
    target.rename(old)
    if moved_in:
        checkpoints.save(tmp_path / "new", {B: quantized()}, {}, format="gptq")
        (tmp_path / "new").rename(target)
    else:
        with pytest.raises(FileNotFoundError, match=r"\.x\.0123abcd\.old"):
            checkpoints.load(target)
    options = {"format": "awq", "overwrite": True}
    if again == "save":
        checkpoints.save(target, {B: quantized()}, {}, **options)
    else:
        checkpoints.convert(target, target, **options)
    assert (target / "onnx/notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]
    replaced = again == "convert" and not moved_in
    assert list(checkpoints.load(target)) == [A if replaced else B]


def test_overwrite(tmp_path):
    target = tmp_path / "x"
    checkpoints.save(target, {A: quantized()}, {}, format="gptq")
    with pytest.raises(FileExistsError, match="already there"):
        checkpoints.save(target, {B: quantized()}, {}, format="gptq")
    (target / "tokenizer.json").write_text("{}")
    checkpoints.save(target, {B: quantized()}, {}, format="gptq", overwrite=True)
    assert list(checkpoints.load(target)) == [B]
    assert (target / "tokenizer.json").exists()
    assert list(tmp_path.iterdir()) == [target]
    # In its own place, with what lies beside the weights.
    checkpoints.convert(target, target, format="awq", overwrite=True)
    assert (target / "tokenizer.json").exists()
    assert entry_of(target)["quant_method"] == "awq"
    if os.name == "posix":
        (tmp_path / "y").mkdir()
        assert target.stat().st_mode == (tmp_path / "y").stat().st_mode


def test_only_checkpoints_are_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match="not overwritten"):
            checkpoints.save(
                tmp_path / name, {A: quantized()}, {}, format="gptq", overwrite=True
            )
    checkpoints.save(
        tmp_path / "empty", {A: quantized()}, {}, format="gptq", overwrite=True
    )
    assert list(checkpoints.load(tmp_path / "empty")) == [A]


def test_what_lies_beside_the_weights_survives(tmp_path):
    source = awq_directory(tmp_path / "awq")
    (source / ".git").mkdir()
    (source / "original").mkdir()
    strangers = [".git/HEAD", "original/params.json", "model.gguf", ".gitattributes"]
    for name in strangers:
        (source / name).write_text(name)
    options = {"format": "gptq", "overwrite": True}
    # Shards and a description of the quantization, which the second call replaces.
    checkpoints.convert(source, source, shard_bytes=1, **options)
    (source / "quantize_config.json").write_text("{}")
    shards = {file.name for file in source.glob("*.safetensors*")}
    assert len(shards) > 2
    checkpoints.save(source, {A: quantized()}, {}, **options)
    assert [(source / name).read_text() for name in strangers] == strangers
    assert list(checkpoints.load(source)) == [A]
    left = {entry.name for entry in source.iterdir()}
    files = {name.split("/")[0] for name in strangers}
    assert left == {"config.json", "model.safetensors", *files}


def test_convert_into_itself_is_refused(tmp_path, refuses):
    source = awq_directory(tmp_path / "awq")
    with refuses("must not lie in one another"):
        checkpoints.convert(source, source / "gptq", format="gptq")


def test_lazy_is_load(tmp_path):
    source = awq_directory(tmp_path)
    for prepare in (True, False):
        weights = checkpoints.lazy(source, prepare=prepare)
        loaded = checkpoints.load(source, prepare=prepare)
        assert len(weights) == len(loaded)
        chex.assert_trees_all_equal(dict(weights), loaded)
    assert "no.such.weight" not in weights
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):  # before anything is asked for
        checkpoints.lazy(source)


def test_verify_finds_everything(tmp_path):
    checkpoint = tiny.checkpoint()
    checkpoint.tensors["model.norm.weight"][1] = np.nan
    checkpoint.tensors[f"{tiny.MODULE}.scales"][0, 0] = np.inf
    checkpoint.tensors["model.step"] = np.zeros(1, np.float64)
    for i, name in enumerate([B, "model.layers.2.q_proj", "model.layers.3.q_proj"], 1):
        tensors = {f"{name}.{key}": v for key, v in tiny.matrix(i).items()}
        checkpoint.tensors |= tensors
    del checkpoint.tensors[f"{B}.qzeros"]
    checkpoint.tensors["model.layers.2.q_proj.g_idx"][0] = 9
    checkpoint.tensors["model.layers.3.q_proj.bias"] = np.ones(5, np.float16)
    checkpoint.tensors["model.lost.bias"] = np.ones(5, np.float16)
    checkpoint.write(tmp_path)
    (tmp_path / "model-old.safetensors").write_bytes(b"")
    faults = checkpoints.verify(tmp_path)
    expected = [
        "model.norm.weight holds 1 NaN or infinity",
        "scales must be finite",
        "model.step.dtype=float64 must be float16",
        f"{B}: qzeros is missing",
        "g_idx from 0 to 9 must lie in 0 to 1",
        "model.layers.3.q_proj.bias.shape=(5,) must be (64,)",
        "model.lost.bias belongs to no module",
        "model-old.safetensors is not read",
    ]
    for piece in expected:
        assert sum(piece in fault for fault in faults) == 1, (piece, faults)
    assert len(faults) == len(expected)


def test_verify_warns_of_what_may_be_wrong(tmp_path):
    checkpoint = tiny.checkpoint()
    checkpoint.tensors[f"{tiny.MODULE}.qzeros"][0, 0] = -1
    with pytest.warns(UserWarning, match=f"{tiny.MODULE}: qzeros of GPTQ v1"):
        assert checkpoints.verify(checkpoint.write(tmp_path / "one")) == []
    # Of many that are alike, once.
    for i in range(2):
        module = tiny.MODULE.replace("layers.0", f"layers.{i + 1}")
        for name in tiny.matrix():
            stored = checkpoint.tensors[f"{tiny.MODULE}.{name}"]
            checkpoint.tensors[f"{module}.{name}"] = stored
    with pytest.warns(UserWarning, match=r"_proj and 2 more: qzeros of") as caught:
        assert checkpoints.verify(checkpoint.write(tmp_path / "three")) == []
    assert len(caught) == 1
