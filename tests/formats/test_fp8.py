"""FP8 against what transformers makes of it, bit for bit."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.formats import fp8
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = [name for name in goldens.names("fp8") if "finegrained" in name]
DEFAULT = "fp8_default__float32__256x384__s914"
FBGEMM = "fp8_fbgemm__float32__32x96__s913"
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def stored(name: str) -> tuple[dict, fp8.Config]:
    data = load(name)
    tensors = {"weight": data["weight"], "weight_scale_inv": data["scale"]}
    return tensors, fp8.Config.from_json(data["config"])


def tensors(n=40, k=72, scale=(2, 3), seed=0, **others) -> dict:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(E4M3)
    scales = rng.uniform(0.01, 0.02, scale).astype(np.float32)
    return {"weight": weight, "weight_scale_inv": scales} | others


SMALL = fp8.Config(block_size=(32, 32))


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_dequantizes_as_transformers(name, prepare):
    w, expected = fp8.from_tensors(*stored(name)), load(name)["out_dequant"]
    w = qjax.prepare(w) if prepare else w
    assert w.dtype == jnp.bfloat16
    same_bits(qjax.dequantize(w, expected.dtype), expected.T)


def arrays(w: qjax.QTensor) -> dict:
    return {name: np.asarray(array) for name, array in fp8.to_tensors(w).items()}


@pytest.mark.parametrize("name", FILES)
def test_writes_the_same_bytes(name):
    held, config = stored(name)
    w = fp8.from_tensors(held, config)
    assert fp8.config_of(w) == config
    same_bits(arrays(w), held)
    # Products read scales of each column, which are blocks of one.
    prepared = qjax.prepare(w)
    rows = fp8.config_of(prepared)
    assert rows.block_size == (1, config.block_size[1])
    again = fp8.from_tensors(arrays(prepared), rows)
    same_bits(qjax.dequantize(again), qjax.dequantize(w))


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 128), (16, 2**31 - 1)])
def test_blocks_that_are_cut_short(rows, columns):
    config = fp8.Config(block_size=(rows, columns))
    held = tensors(scale=(-(-40 // rows), -(-72 // columns)))
    w = fp8.from_tensors(held, config)
    assert fp8.config_of(w) == config
    weight, scale = held["weight"].astype(np.float64), held["weight_scale_inv"]
    i, j = np.mgrid[:40, :72]
    expected = (weight * scale[i // rows, j // columns]).T.astype(np.float32)
    for form in (w, qjax.prepare(w)):
        np.testing.assert_array_equal(qjax.dequantize(form, jnp.float32), expected)
    same_bits(arrays(w), held)


def test_exponents_are_told_by_their_dtype():
    # DeepSeek-V3.1 says "ue8m0" and has float32; others say nothing.
    said = dataclasses.replace(SMALL, scale_fmt="ue8m0")
    w = fp8.from_tensors(tensors(), said)
    same_bits(qjax.dequantize(w), qjax.dequantize(fp8.from_tensors(tensors(), SMALL)))
    exponents = np.full((2, 3), 120, np.uint8)
    for scale, config in ((exponents, said), (exponents.view(E8M0), SMALL)):
        found = fp8.from_tensors(tensors() | {"weight_scale_inv": scale}, config)
        expected = tensors()["weight"].astype(np.float32).T * 2.0**-7
        np.testing.assert_array_equal(qjax.dequantize(found, jnp.float32), expected)
        assert fp8.config_of(found).scale_fmt == "ue8m0"
        assert arrays(found)["weight_scale_inv"].dtype == E8M0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (40, 1)])
def test_without_blocks(shape):
    config = fp8.Config(block_size=None)
    held = tensors(scale=shape, input_scale=np.float32(1))
    held["weight_scale"] = held.pop("weight_scale_inv").astype(ml_dtypes.bfloat16)
    w = fp8.from_tensors(held, config)
    assert w.dtype == jnp.bfloat16
    scale = held["weight_scale"].astype(np.float32).reshape(-1, 1)
    expected = (held["weight"].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    same_bits(np.asarray(qjax.dequantize(w)), expected.T)
    # transformers knows one scale as this.
    name = "weight_scale" if 40 in shape else "weight_scale_inv"
    again = arrays(w)[name]
    assert again.shape == ((40, 1) if 40 in shape else ())
    same_bits(again.reshape(shape), held["weight_scale"])


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize(
    ("name", "key"), [(DEFAULT, "weight_scale_inv"), (FBGEMM, "weight_scale")]
)
def test_scales_say_what_they_are_of(name, key, prepare):
    data = load(name)
    held = {"weight": data["weight"], key: data["scale"]}
    config = fp8.Config.from_json(data["config"])
    assert config.block_size is None
    w = fp8.from_tensors(held, config.with_tensors(held))
    found = qjax.dequantize(qjax.prepare(w) if prepare else w)
    same_bits(np.asarray(found), data["out_dequant"].T)
    same_bits(arrays(w), held)


@pytest.mark.parametrize(
    ("n", "k", "scale", "blocks"),
    [
        (256, 128, (2, 1), True),
        (129, 40, (2, 1), True),
        (40, 300, (1, 3), True),
        (256, 128, (256, 1), False),
        (256, 128, (256,), False),
        (256, 128, (2,), False),
        (256, 256, (1, 1), False),
        (256, 128, (), False),
    ],
)
def test_shapes_of_blocks(n, k, scale, blocks):
    config = fp8.Config(block_size=None)
    settled = config.with_tensors(tensors(n, k, scale))
    assert settled == (fp8.Config() if blocks else config)
    # What a configuration says, shapes do not change.
    small = fp8.Config(block_size=(64, 64))
    assert small.with_tensors(tensors(n, k, scale)) == small


@pytest.mark.parametrize(("n", "k"), [(128, 128), (40, 72), (1, 128), (1, 1)])
def test_one_scale_of_a_block_or_of_all_is_the_same(n, k):
    held = tensors(n, k, scale=(1, 1))
    plain = fp8.Config(block_size=None)
    assert plain.with_tensors(held) == plain
    one, block = (fp8.from_tensors(held, c) for c in (plain, fp8.Config()))
    same_bits(qjax.dequantize(one), qjax.dequantize(block))
    same_bits(*(qjax.dequantize(w, jnp.float32) for w in (one, block)))


@pytest.mark.parametrize("layout", [Tiles(), qjax.formats.gptq.Stream()])
def test_products_are_those_of_the_weight(layout):
    held = tensors(n=48, k=96, scale=(2, 3))
    w = qjax.prepare(fp8.from_tensors(held, SMALL), layout=layout)
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    dense = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
    assert oracle.relative_error(qjax.matmul(jnp.asarray(x), w), x @ dense) < 1e-5


class TestQuantize:
    def test_nearest_numbers(self):
        # All of E4M3, what lies between, and what lies midway.
        numbers = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
        midway = (numbers[1:] + numbers[:-1]) / 2
        beside = [
            np.nextafter(midway, side) for side in (np.float32(0), np.float32(500))
        ]
        all_of_them = np.concatenate([numbers, midway, *beside])
        w = np.concatenate([all_of_them, -all_of_them])[:, None]
        quantized = fp8.quantize(jnp.asarray(w), group_size=None)
        assert float(quantized.scale[0, 0]) == 1
        expected = w.astype(E4M3).view(np.uint8)
        np.testing.assert_array_equal(quantized.numpy(), expected)

    def test_scales_of_blocks(self):
        w = np.random.default_rng(0).standard_normal((72, 40)).astype(np.float32)
        w[:32, :32] = 0
        quantized = fp8.quantize(jnp.asarray(w), group_size=32)
        scale = arrays(quantized)["weight_scale_inv"]
        largest = [np.abs(w[i : i + 32, 32:]).max() for i in (0, 32, 64)]
        expected = np.float32(largest) / np.float32(448)
        np.testing.assert_allclose(scale[1], expected, rtol=2e-7)
        assert scale[0, 0] == 1
        error = np.abs(np.asarray(qjax.dequantize(quantized)) - w)
        # Half of a step of three bits of mantissa, or of the least one.
        step = np.maximum(np.abs(w) / 16, np.abs(w).max() / 448 * 2.0**-10)
        assert (error <= step * 1.0001).all()

    def test_is_a_quantizer(self):
        spec = qjax.Spec(bits=8, group_size=32, symmetric=True, quantizer=fp8.quantize)
        w = jnp.stack([jnp.eye(64), 2 * jnp.eye(64)])
        made = spec.quantize(w)
        assert made.scale.values.shape == (2, 2, 2)
        np.testing.assert_allclose(qjax.dequantize(made), w, rtol=1e-6)
        columns = fp8.quantize(w, group_size=None, columns=16, scale_dtype="bfloat16")
        assert columns.scale.values.shape == (2, 1, 4)
        assert columns.scale.dtype == jnp.bfloat16
        assert jnp.isfinite(qjax.dequantize(columns)).all()

    def test_not_finite(self):
        w = jnp.ones((64, 64)).at[3, 40].set(jnp.nan).at[40, 3].set(jnp.inf)
        bad = np.isnan(arrays(fp8.quantize(w, group_size=32))["weight_scale_inv"])
        np.testing.assert_array_equal(bad, [[False, True], [True, False]])

    @pytest.mark.parametrize("value", [3e8, 1e-6])
    def test_scales_stay_in_range(self, value):
        w = jnp.full((2, 2), value)
        q = fp8.quantize(w, group_size=None, scale_dtype=jnp.float16)
        found = qjax.dequantize(q, jnp.float32)
        assert jnp.isfinite(found).all()
        assert (found > 0).all()

    def test_refuses(self, refuses):
        with refuses("w must be bfloat16, float16 or float32 [..., k, n]; got int32("):
            fp8.quantize(jnp.ones((3, 2), jnp.int32))
        with refuses("bits=4 and symmetric=True must be 8 and True"):
            fp8.quantize(jnp.ones((3, 2)), 4)
        with refuses("group_size=0 and columns=None must be positive"):
            fp8.quantize(jnp.ones((3, 2)), group_size=0)
        with refuses("w.shape=(0, 4) must be without an extent of 0"):
            fp8.quantize(jnp.ones((0, 4)))
        with refuses("scale_dtype=dtype('int8') must be one of"):
            fp8.quantize(jnp.ones((3, 2)), scale_dtype=jnp.int8)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (
            {"weight": np.ones((40, 72), np.int8)},
            SMALL,
            "weight.dtype=int8 must be flo",
        ),
        ({"weight": np.ones((0, 72), E4M3)}, SMALL, "weight.shape=(0, 72) must be [n"),
        ({"weight_scale": np.float32(1)}, SMALL, "there must be one of ('weight_scal"),
        (
            {"weight_scale_inv": np.ones((2, 2), np.float32)},
            SMALL,
            "must be (2, 3), fr",
        ),
        ({"weight_scale_inv": np.full((2, 3), np.inf, np.float32)}, SMALL, "be finite"),
        ({"weight": np.full((40, 72), np.nan, E4M3)}, SMALL, "weight must be finite"),
        ({"bias": np.ones(3)}, SMALL, "bias is no tensor of FP8"),
        (
            {"weight_scale_inv": np.full((2, 3), 255, np.uint8)},
            dataclasses.replace(SMALL, scale_fmt="ue8m0"),
            "weight_scale_inv holds 255",
        ),
        (
            {"weight_scale_inv": np.full((2, 3), 120, np.uint8)},
            SMALL,
            "weight_scale_inv.dtype=uint8 must be",
        ),
        ({}, fp8.Config(block_size=None), "weight_scale_inv.shape=(2, 3) must be ()"),
        (
            {"weight_scale_inv": np.ones((1, 1), np.float32)},
            fp8.Config(block_size=None, columns=True),
            "weight_scale_inv.shape=(1, 1) must be (40,) or (40, 1), from",
        ),
        ({"input_scale": np.ones((1, 1), np.float32)}, SMALL, "input_scale.shape=(1,"),
    ],
)
def test_refuses_tensors(changes, config, message, refuses):
    with refuses(message):
        fp8.from_tensors(tensors() | changes, config)


def test_refuses_to_write(refuses):
    with refuses("is not float(q) * s; requantize it"):
        fp8.to_tensors(qjax.quantize(jnp.eye(128), 8))
    w = fp8.quantize(jnp.eye(64), group_size=32)
    shared = dataclasses.replace(w, scale=w.scale.values)
    with refuses("columns share scales"):
        fp8.to_tensors(shared)


def test_config():
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 128]}
    config = fp8.Config.from_json(entry | {"modules_to_not_convert": ["lm_head"]})
    assert config == fp8.Config(block_size=(64, 128), ignored=("lm_head",))
    assert config.of("lm_head") is None
    assert config.of("model.layers.0.mlp.up_proj") == fp8.Config(block_size=(64, 128))
    older = {"ignored_layers": ["model.layers.1"], "activation_scheme": "static"}
    config = fp8.Config.from_json(older)
    assert config.block_size is None
    assert config.of("model.layers.1.mlp.up_proj") is None
    assert config.of("model.layers.10.mlp.up_proj") is not None
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    of_columns = fp8.Config(block_size=None, columns=True)
    assert fp8.Config.from_json(fbgemm) == of_columns


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' must be one of ('fp8', 'fbg"),
        ({"fmt": "e5m2"}, "fmt='e5m2' must be one of ('e4m3',)"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' must be one of ('fp8',)"),
        ({"scale_fmt": "int"}, "scale_fmt='int' must be one of ('float', 'ue8m0')"),
        ({"weight_block_size": [128]}, "weight_block_size=[128] must be two positive"),
        ({"weight_block_size": [128, 0]}, "weight_block_size=[128, 0] must be two pos"),
        ({"weight_block_size": [128, 2**31]}, "two positive integers below 2**31"),
        ({"modules_to_not_convert": "a"}, "modules_to_not_convert='a' must be a list"),
        ({"ignored_layers": ["("]}, "ignored_layers: '(' is no pattern"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        fp8.Config.from_json(entry)
