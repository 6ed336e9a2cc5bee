"""Directories of every dialect load to the weights that upstream makes of them."""

import dataclasses
import json
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import FORMATS, gptq, hqq, mpq, tinygemm
from tests.checkpoints import assembled
from tests.checkpoints.assembled import BLOCK, DIALECTS, MODULE, NAME


def matrix(directory, **options):
    """The one quantized matrix."""
    weights = checkpoints.load(directory, **options)
    (found,) = (w for w in weights.values() if isinstance(w, qjax.QTensor))
    return found


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", DIALECTS)
def test_loads_to_upstreams_weight(name, prepare, tmp_path):
    made = DIALECTS[name]()
    w = matrix(made.checkpoint.write(tmp_path), prepare=prepare)
    weight = np.asarray(qjax.dequantize(w, made.weight.dtype))
    if prepare and made.prepared is not None:
        np.testing.assert_array_equal(weight, made.prepared)
    elif name == "awq gemv_fast":
        # Its reference is of other zeros, before they were scaled and rounded.
        np.testing.assert_allclose(weight, made.weight, rtol=0, atol=1e-3)
    else:
        np.testing.assert_array_equal(weight, made.weight)


def test_there_is_a_directory_of_each_format(tmp_path):
    methods = set()
    for i, (name, make) in enumerate(DIALECTS.items()):
        made = make()
        directory = made.checkpoint.write(tmp_path / str(i))
        config = made.checkpoint.config.get("quantization_config") or {}
        methods.add(config.get("quant_method", name.split()[0].strip(",")))
        assert checkpoints.verify(directory) == []
    # GGUF is a file by itself: tests/checkpoints/test_gguf.py.
    assert methods == set(FORMATS) - {"gguf"}


def sharded(make):
    made = make()
    made.checkpoint.shard()
    return made


@pytest.mark.parametrize(
    "name", ["torchao tiled and padded", "mbwq channel-mix", "mpq, double quantized"]
)
def test_shards_load_the_same(name, tmp_path):
    made = sharded(DIALECTS[name])
    w = matrix(made.checkpoint.write(tmp_path))
    np.testing.assert_array_equal(
        np.asarray(qjax.dequantize(w, made.weight.dtype)), made.weight
    )


class TestGreenBit:
    """What says that a directory is green-bit-llm's, and what does not."""

    def test_a_strategy_leaves_modules_dense(self, tmp_path):
        made = DIALECTS["mbwq layer-mix"]()
        block = made.checkpoint.files["quant_strategy.json"]["measurement"][BLOCK]
        block["moe_gate"] = {"desc": "Not quantized"}
        gate = np.ones((2, 3), np.float16)
        made.checkpoint.tensors[f"{BLOCK}.mlp.gate.weight"] = gate
        weights = checkpoints.load(made.checkpoint.write(tmp_path))
        np.testing.assert_array_equal(weights[f"{BLOCK}.mlp.gate.weight"], gate)

    def test_layers_may_have_several_widths(self, tmp_path):
        made, other = (
            DIALECTS[f"mbwq {mix}"]() for mix in ("layer-mix", "channel-mix")
        )
        for name, array in other.checkpoint.tensors.items():
            made.checkpoint.tensors[name.replace(NAME, "k_proj")] = array
        weights = checkpoints.load(made.checkpoint.write(tmp_path), prepare=False)
        k_proj = weights[MODULE.replace(NAME, "k_proj")]
        assert [segment.bits for segment in k_proj.segments] == [4, 2]
        assert weights[MODULE].bits == 4

    def test_the_scale_of_the_inputs(self, tmp_path):
        files = assembled.strategy([4], [64], [1.0])
        made = assembled.mbwq("mbwq_q4_g64_cscale", files)
        w = matrix(made.checkpoint.write(tmp_path))
        data = assembled.golden("mbwq/mbwq_q4_g64_cscale")
        y = qjax.matmul(jnp.asarray(data["x"].astype(np.float32)), w)
        bias = data.get("bias", np.zeros(w.n, np.float32))
        # The layer rounds x * channel_scale to float16.
        np.testing.assert_allclose(
            *(np.asarray(y), data["y_ref"] - bias),
            **{"rtol": 0, "atol": 1e-3 * np.abs(data["y_ref"]).max()},
        )

    def test_config_json_goes_before_a_strategy(self, tmp_path):
        # As upstream has it: symmetric GPTQ files are GPTQ whatever lies beside them.
        made = DIALECTS["gptq"]()
        made.checkpoint.files = assembled.strategy([2], [32], [1.0])
        assert matrix(made.checkpoint.write(tmp_path), prepare=False).bits == 4

    def test_shapes_say_what_no_file_does(self, tmp_path):
        made = DIALECTS["mpq, double quantized"]()
        w = matrix(made.checkpoint.write(tmp_path), prepare=False)
        assert (w.bits, w.segments[0].group_size, w.layout) == (4, 128, gptq.Stream())
        assert isinstance(w.scale, mpq.DoubleQuantized)


def test_a_configuration_in_config_json_overrides_the_shapes(tmp_path):
    made = DIALECTS["mbwq without a strategy"]()
    entry = {"quant_method": "mbwq", "bits": 4, "group_size": 64}
    made.checkpoint.config["quantization_config"] = entry
    with pytest.raises(ValueError, match=r"scales\.shape=\(5, 64\) must be \(3, 64\)"):
        checkpoints.load(made.checkpoint.write(tmp_path))


class TestTiled:
    """torchao's int4, of which the header of the file says the shape."""

    def test_the_layout_of_the_file_is_kept(self, tmp_path):
        made = DIALECTS["torchao tiled and padded"]()
        w = matrix(made.checkpoint.write(tmp_path), prepare=False)
        assert (w.shape, w.layout) == ((200, 35), tinygemm.TensorCoreTiled())
        stored = made.checkpoint.tensors[f"{MODULE}._weight_qdata"]
        np.testing.assert_array_equal(w.words[0], stored.view(np.uint32))

    def test_others_beside_them(self, tmp_path):
        made, other = DIALECTS["torchao tiled"](), DIALECTS["torchao"]()
        default = made.checkpoint.config["quantization_config"]["quant_type"]["default"]
        kind = other.checkpoint.config["quantization_config"]["quant_type"]["default"]
        k_proj = MODULE.replace(NAME, "k_proj")
        by_name = {"_default": default, "re:.*k_proj": kind}
        made.checkpoint.config["quantization_config"]["quant_type"]["default"] = {
            "_type": "FqnToConfig",
            "_data": {"fqn_to_config": by_name},
        }
        for name, array in other.checkpoint.tensors.items():
            made.checkpoint.tensors[name.replace(NAME, "k_proj")] = array
        weights = checkpoints.load(made.checkpoint.write(tmp_path))
        for module, expected in ((MODULE, made.weight), (k_proj, other.weight)):
            np.testing.assert_array_equal(
                np.asarray(qjax.dequantize(weights[module], expected.dtype)), expected
            )

    def test_headers_of_two_shards_must_agree(self, tmp_path):
        made = sharded(DIALECTS["torchao tiled"])
        directory = made.checkpoint.write(tmp_path)
        made.checkpoint.metadata = assembled.in_header(64, (39, 256))
        second = made.checkpoint.write(tmp_path / "other")
        file = sorted(made.checkpoint.shards)[0]
        (directory / file).write_bytes((second / file).read_bytes())
        with pytest.raises(ValueError, match="say different things about"):
            checkpoints.load(directory)


def test_files_beside_are_read_in_a_fixed_order(tmp_path):
    made = DIALECTS["mbwq layer-mix"]()
    made.checkpoint.files["quantize_config.json"] = {"bits": 3}
    directory = made.checkpoint.write(tmp_path)
    assert matrix(directory).bits == 4
    (directory / "quant_strategy.json").unlink()
    with pytest.raises(ValueError, match=r"quantize_config\.json|must be float16"):
        checkpoints.load(directory)
    assert json.loads((directory / "quantize_config.json").read_text()) == {"bits": 3}


class TestSinq:
    """Huawei's SINQ, which says what each module got in a file beside the weights."""

    BESIDE = "model.safetensors.index.json.meta.json"

    def test_the_file_beside_must_be_there(self, tmp_path):
        made = DIALECTS["sinq"]()
        del made.checkpoint.files[self.BESIDE]
        directory = made.checkpoint.write(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{self.BESIDE} is missing"):
            checkpoints.load(directory)

    def test_the_file_beside_says_what_is_dense(self, tmp_path, refuses):
        made = DIALECTS["sinq"]()
        files = made.checkpoint.files
        files[self.BESIDE] = {"other": files[self.BESIDE][MODULE]}
        with refuses(f"leaves {MODULE} dense"):
            checkpoints.load(made.checkpoint.write(tmp_path))

    def test_scales_of_inputs_are_of_no_other_format(self, tmp_path, refuses):
        source = DIALECTS["sinq"]().checkpoint.write(tmp_path / "source")
        with refuses("it has an order of rows or an input scale"):
            checkpoints.convert(source, tmp_path / "x", format="hqq")
        weights = checkpoints.load(source, prepare=False)
        base = dataclasses.replace(weights[MODULE], input_scale=None)
        checkpoints.save(
            source, weights | {MODULE: base}, {}, format="hqq", overwrite=True
        )
        assert not (source / self.BESIDE).exists()
        assert checkpoints.verify(source) == []


class TestHqq:
    """Directories of HQQ, written as transformers' HqqConfig describes them."""

    HQQ = Path(__file__).parents[1] / "data/llama1L_hqq4_g64"

    def test_the_directory_of_transformers_comes_out_as_it_was(self, tmp_path):
        checkpoints.convert(self.HQQ, tmp_path, format="hqq", overwrite=True)
        before, after = (
            {name: stored.read() for name, stored in checkpoints.shards.scan(d).items()}
            for d in (self.HQQ, tmp_path)
        )
        assert before.keys() == after.keys()
        for name, array in before.items():
            # How zeros were found is nothing that a matrix knows.
            if not name.endswith(".round_zero"):
                assert array.dtype == after[name].dtype
                np.testing.assert_array_equal(array, after[name])
        entries = [
            checkpoints.read_config(d)["quantization_config"]
            for d in (self.HQQ, tmp_path)
        ]
        assert entries[0]["quant_config"]["weight_quant_params"].pop("round_zero")
        assert not entries[1]["quant_config"]["weight_quant_params"].pop("round_zero")
        assert entries[0] == entries[1]

    @pytest.mark.parametrize(
        "name",
        ["b3_g64_axis0_float16__16x128__s644", "b8_g32_axis1_bfloat16__8x64__s642"],
    )
    def test_what_hqq_saved_is_saved_again(self, tmp_path, name):
        data = assembled.state(assembled.golden(f"hqq/hqq_layer__{name}"))
        fields = {key: int(data[key]) for key in ("nbits", "group_size", "axis")}
        fields |= {key: bool(data[key]) for key in ("optimize", "round_zero")}
        w = hqq.from_tensors(data, hqq.Config(**fields))
        checkpoints.save(tmp_path / "x", {MODULE: w}, {}, format="hqq")
        loaded = matrix(tmp_path / "x", prepare=False)
        assert loaded.layout == w.layout
        chex.assert_trees_all_equal(loaded, w)

    @pytest.mark.parametrize("name", ["awq gemm", "compressed-tensors"])
    def test_of_other_formats(self, tmp_path, name):
        source = DIALECTS[name]().checkpoint.write(tmp_path / "source")
        checkpoints.convert(source, tmp_path / "x", format="hqq")
        assert checkpoints.verify(tmp_path / "x") == []
        before, after = (matrix(d, prepare=False) for d in (source, tmp_path / "x"))
        np.testing.assert_array_equal(qjax.codes(before), qjax.codes(after))
        np.testing.assert_array_equal(before.scale, after.scale)
        weights = (np.asarray(qjax.dequantize(w, jnp.float32)) for w in (before, after))
        # (q - z) * s, each step rounded to float16 by HQQ.
        np.testing.assert_allclose(*weights, rtol=2**-10)

    def test_modules_that_differ_have_tags(self, tmp_path):
        four, two = (qjax.quantize(jnp.eye(64), bits, 32) for bits in (4, 2))
        tensors = {f"model.layers.{i}.mlp.up_proj": four for i in range(2)}
        tensors |= {f"model.layers.{i}.mlp.down_proj": two for i in range(2)}
        tensors |= {"model.layers.0.gate.weight": np.ones((4, 4), np.float16)}
        checkpoints.save(tmp_path / "x", tensors, {}, format="hqq")
        entry = checkpoints.read_config(tmp_path / "x")["quantization_config"]
        assert entry.keys() == {"quant_method", "quant_config", "skip_modules"}
        assert entry["skip_modules"] == ["gate", "lm_head"]
        kinds = {
            tag: (one["weight_quant_params"]["nbits"], one["scale_quant_params"])
            for tag, one in entry["quant_config"].items()
        }
        assert kinds == {"mlp.up_proj": (4, None), "mlp.down_proj": (2, None)}
        loaded = checkpoints.load(tmp_path / "x", prepare=False)
        for name, w in tensors.items():
            if isinstance(w, qjax.QTensor):
                np.testing.assert_array_equal(loaded[name].numpy(), w.numpy())

    def test_what_tags_cannot_tell_apart(self, tmp_path, refuses):
        four, two = (qjax.quantize(jnp.eye(64), bits, 32) for bits in (4, 2))
        up = "model.layers.{}.mlp.up_proj"
        tensors = {up.format(0): four, up.format(1): two, up.format(2): four}
        with refuses(
            "1 of 3 matrices cannot be written as 'hqq'; nothing was written:\n  "
            "model.layers.1.mlp.up_proj: HQQ tells modules apart by tags, and most of "
            "'mlp.up_proj' have 4 bits in groups of 32 on axis 1, where it has 2 bits"
        ):
            checkpoints.save(tmp_path / "x", tensors, {}, format="hqq")
        dense = np.ones((4, 4), np.float16)
        for name in (up.format(1), "mlp.up"):
            pair = {up.format(0): four, f"{name}.weight": dense}
            with refuses(f"the tag of {name}, which is dense, is its or a part of"):
                checkpoints.save(tmp_path / "x", pair, {}, format="hqq")
        with refuses("HQQ cannot hold"):
            checkpoints.convert(
                DIALECTS["gptq"]().checkpoint.write(tmp_path / "act-order"),
                *(tmp_path / "x",),
                format="hqq",
            )
        assert [path.name for path in tmp_path.iterdir()] == ["act-order"]
