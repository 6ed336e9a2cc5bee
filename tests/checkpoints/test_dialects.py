"""Directories of every dialect load to the weights that upstream makes of them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import FORMATS, gptq, mpq, tinygemm
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
    if name == "awq gemv_fast":
        # Its reference is of other zeros, before they were scaled and rounded.
        np.testing.assert_allclose(weight, made.weight, rtol=0, atol=1e-3)
    else:
        np.testing.assert_array_equal(weight, made.weight)


def test_there_is_a_directory_of_each_format(tmp_path):
    methods = set()
    for i, (name, make) in enumerate(DIALECTS.items()):
        made = make()
        directory = made.checkpoint.write(tmp_path / str(i))
        config = made.checkpoint.config.get("quantization_config")
        methods.add(config["quant_method"] if config else name.split()[0].strip(","))
        assert checkpoints.verify(directory) == []
    assert methods == set(FORMATS)


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
