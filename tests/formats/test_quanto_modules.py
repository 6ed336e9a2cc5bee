"""What optimum-quanto saves of layers and of whole models, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.checkpoints import shards
from qjax.formats import fp8, quanto
from qjax.formats.tiles import Tiles
from tests import goldens
from tests.checkpoints.tiny import Checkpoint
from tests.goldens import load, same_bits

FILES = goldens.names("quanto")
LINEAR = [name for name in FILES if name.startswith("quanto_linear")]
FOUR, EIGHT, SMALL = (
    next(name for name in LINEAR if kind in name)
    for kind in ("qint4_float32__3x160", "qint8_float32__7x50", "qfloat8_float32")
)
EVEN = [name for name in LINEAR if "_float16_spread__16x48" in name]
MODELS = ("quanto_model__qint4__190", "quanto_model__qint8_activations__191")
UP = "model.layers.0.mlp.up_proj"


def state_of(name: str) -> dict:
    data = load(name).items()
    return {k.removeprefix("state_"): v for k, v in data if k.startswith("state_")}


def config_of(name: str) -> quanto.Config:
    data = load(name)
    said = quanto.Config.from_json({"up": data["config"]}).of("up")
    assert said is not None
    return quanto.Config(weights=said.weights, k=data["in_w"].shape[1])


@pytest.mark.parametrize("name", LINEAR)
def test_dequantizes_and_writes(name):
    data, held = load(name), state_of(name)
    qt = quanto.from_tensors(held, config_of(name))
    for form in (qt, qjax.prepare(qt)):
        same_bits(qjax.dequantize(form), data["out_dequant"].T)
        # Integer zeros are written as they were.
        same_bits({k: np.asarray(v) for k, v in quanto.to_tensors(form).items()}, held)


@pytest.mark.parametrize("name", [FOUR, *EVEN])
def test_products_and_gradients(name):
    held, weight = state_of(name), load(name)["out_dequant"].astype(np.float64)
    qt = qjax.prepare(quanto.from_tensors(held, config_of(name)))
    if name in EVEN:  # products do not round the weight to 16 bits
        factors = (
            held[f"weight._{key}"].astype(np.float64) for key in ("data", "scale")
        )
        weight = np.multiply(*factors)
    x = np.random.default_rng(0).normal(size=(3, qt.k)).astype(np.float32)
    y, gradient = jax.value_and_grad(lambda x: qjax.matmul(x, qt).sum())(jnp.asarray(x))
    # Sums of numbers of all sizes.
    close = {"rtol": 1e-5, "atol": 1e-6 * np.abs(weight).sum()}
    np.testing.assert_allclose(y, (x @ weight.T).sum(), **close)
    wanted = np.broadcast_to(weight.sum(0), x.shape)
    np.testing.assert_allclose(gradient, wanted, **close)


@pytest.mark.parametrize("kind", ["qint2", "qint4", "qint8", "qfloat8"])
def test_kernels_take_it(kind):
    w = jnp.eye(256, 32, dtype=jnp.bfloat16)
    bits = 8 if "8" in kind else int(kind[-1])
    if kind == "qfloat8":
        qt = fp8.quantize(w, group_size=None, scale_dtype=w.dtype)
    else:
        qt = qjax.quantize(w, bits, None if bits == 8 else 128, symmetric=True)
    tensors = quanto.to_tensors(qt)
    read = quanto.from_tensors(tensors, quanto.config_of(qt))
    moved = qjax.prepare(read, layout=Tiles())
    assert isinstance(moved.layout, Tiles)
    same_bits(qjax.dequantize(moved), qjax.dequantize(read))


def directory(name: str, path, **changes):
    """What quanto's save_pretrained wrote, with changes to config.json."""
    files = load(name)["meta"]["files"]
    config = files["config.json"] | changes
    rest = {"quanto_qmap.json": files["quanto_qmap.json"]}
    tensors = {
        key: np.ascontiguousarray(array).reshape(array.shape)
        for key, array in state_of(name).items()
    }
    return Checkpoint(tensors, config, files=rest).write(path)


@pytest.mark.parametrize("name", MODELS)
def test_reads_a_model(name, tmp_path):
    source = directory(name, tmp_path / "source")
    assert checkpoints.verify(source) == []
    weights = checkpoints.load(source, prepare=False)
    expected = {k: v for k, v in load(name).items() if k.startswith("out_")}
    for key, weight in expected.items():
        same_bits(qjax.dequantize(weights[key.removeprefix("out_")]), weight.T)
    assert weights[UP].shape == (16, 160)
    assert weights["model.layers.0.self_attn.o_proj"].shape == (48, 16)
    # Nothing of it is left over, but for what is dense.
    dense = {k for k, w in weights.items() if not isinstance(w, qjax.QTensor)}
    assert dense == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_writes_the_same_files(tmp_path):
    source = directory(MODELS[0], tmp_path / "source")
    checkpoints.convert(source, tmp_path / "again", format="quanto")
    found = {k: v.read() for k, v in shards.scan(tmp_path / "again").items()}
    same_bits(found, state_of(MODELS[0]))
    assert "quantization_config" not in checkpoints.read_config(tmp_path / "again")
    before, after = (
        checkpoints.config.read_object(path / "quanto_qmap.json")
        for path in (source, tmp_path / "again")
    )
    assert after[UP].pop("in_features") == 16
    assert before[UP] == after[UP]
    assert before.keys() == after.keys()
    # And once more, in place, from what it says itself.
    changed = checkpoints.read_config(tmp_path / "again") | {"hidden_size": 0}
    weights = checkpoints.load(tmp_path / "again", prepare=False)
    checkpoints.save(
        tmp_path / "again", weights, changed, format="quanto", overwrite=True
    )
    again = checkpoints.load(tmp_path / "again", prepare=False)
    same_bits(qjax.dequantize(again[UP]), qjax.dequantize(weights[UP]))


def test_other_formats(tmp_path):
    source = directory(MODELS[1], tmp_path / "source")
    checkpoints.convert(source, tmp_path / "ct", format="compressed-tensors")
    checkpoints.convert(tmp_path / "ct", tmp_path / "again", format="quanto")
    assert not (tmp_path / "ct" / "quanto_qmap.json").exists()
    first, second = (
        checkpoints.load(d, prepare=False)[UP] for d in (source, tmp_path / "again")
    )
    same_bits(qjax.dequantize(first), qjax.dequantize(second))


class TestShapes:
    """Who says how many inputs there are, of two and four bits."""

    def test_sizes_that_do_not_fit(self, tmp_path, refuses):
        path = directory(MODELS[0], tmp_path, intermediate_size=161)
        with refuses("down_proj: 80 groups of 32 do not say how many inputs there"):
            checkpoints.load(path)

    def test_a_model_in_a_model(self, tmp_path):
        config = load(MODELS[0])["meta"]["files"]["config.json"]
        path = directory(MODELS[0], tmp_path, hidden_size=None, text_config=config)
        assert checkpoints.load(path)[UP].shape == (16, 160)

    @pytest.mark.parametrize("n", [16, 8])
    def test_a_bias(self, tmp_path, n, refuses):
        tensors = quanto.to_tensors(qjax.quantize(jnp.eye(160, 16), 4, 32))
        stored = {f"fc1.{name}": np.asarray(one) for name, one in tensors.items()}
        stored |= {"fc1.bias": np.zeros(n, np.float32)}
        files = {"quanto_qmap.json": {"fc1": {"weights": "qint4"} | NONE}}
        path = Checkpoint(stored, {}, files=files).write(tmp_path)
        if n == 16:
            assert checkpoints.load(path, prepare=False)["fc1"].shape == (160, 16)
            return
        # Twice as many inputs would be in larger groups.
        with refuses("fc1: 80 groups of 32 do not say how many inputs there are"):
            checkpoints.load(path)

    def test_groups_of_all_inputs(self):
        said = quanto.Config.from_json({"x": {"weights": "qint2"} | NONE}).of("x")
        w = qjax.quantize(jnp.eye(80, 6), 2, None)
        assert said.with_tensors(quanto.to_tensors(w)).k == 80

    @pytest.mark.parametrize(
        ("k", "size"), [(64, 64), (128, 128), (129, 129), (160, 32), (192, 96)]
    )
    def test_sizes_of_groups(self, k, size):
        assert quanto.quanto_config.group_size(k) == size


NONE = {"activations": "none"}


class TestConfig:
    def test_modules(self):
        said = quanto.Config.from_json(
            {
                "a": {"weights": "qint4"} | NONE,
                "norm": {"weights": "none", "activations": "qint8"},
                "b": {"weights": "qfloat8", "activations": "qfloat8_e5m2"},
            }
        )
        assert said.of("a").weights == "qint4"
        assert said.of("norm") is None
        assert said.of("c") is None
        assert (said.of("b").weights, said.of("b").bits) == ("qfloat8_e4m3fn", 8)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"a": "qint4"}, "a='qint4' must be an object"),
            ({"weights": "int8"}, "weights='int8' must be an object"),
            ({"a": {"weights": "qint3"} | NONE}, "a.weights='qint3' must be one of ("),
            ({"a": {"weights": ["x"]} | NONE}, "a.weights=['x'] must be one of"),
            ({"a": {"weights": "qint4"}}, "a.activations=None must be one of"),
            ({"a": {"group": 3} | NONE}, "a.group is not known; fields are ('wei"),
            (
                {"a": {"weights": "qint4", "in_features": -1} | NONE},
                "a.in_features=-1 must be a positive integer",
            ),
        ],
    )
    def test_refuses(self, entry, message, refuses):
        with refuses(message):
            quanto.Config.from_json(entry)

    @pytest.mark.parametrize("kind", ["qfloat8_e5m2", "qfloat8_e4m3fnuz"])
    def test_does_not_support(self, kind):
        with pytest.raises(NotImplementedError, match=f"a.weights='{kind}' is not"):
            quanto.Config.from_json({"a": {"weights": kind} | NONE})


def test_dense_weights_beside_scales(tmp_path):
    """Those of a LayerNorm whose outputs are quantized, and of no linear layer."""
    files = load(MODELS[1])["meta"]["files"]
    norm = {"weights": "none", "activations": "qint8"}
    tensors = {k: np.array(v, order="C") for k, v in state_of(MODELS[1]).items()}
    for name in ("input_scale", "output_scale"):
        tensors[f"model.norm.{name}"] = np.ones((), np.float32)
    rest = {"quanto_qmap.json": files["quanto_qmap.json"] | {"model.norm": norm}}
    made = Checkpoint(tensors, files["config.json"], files=rest)
    weights = checkpoints.load(made.write(tmp_path))
    same_bits(np.asarray(weights["model.norm.weight"]), tensors["model.norm.weight"])
    assert "model.norm.output_scale" not in weights


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (EIGHT, {"weight._data": np.ones((7, 50), np.uint8)}, "uint8 must be int8"),
        (EIGHT, {"weight._data": np.ones((7, 5, 2), np.int8)}, "must have 2 axes"),
        (EIGHT, {"weight._data": np.ones((0, 5), np.int8)}, "must be [n, k], not emp"),
        (EIGHT, {"weight._scale": np.ones(7, np.float32)}, "(7,) must be (7, 1), from"),
        (EIGHT, {"weight._scale": np.full((7, 1), np.inf, "f")}, "must be finite"),
        (EIGHT, {"weight._shift": np.ones((7, 1))}, "weight._shift is no tensor of qi"),
        (EIGHT, {"input_scale": np.ones(2, "f")}, "input_scale.shape=(2,) must be ()"),
        (EIGHT, {"weight": np.ones((7, 50), "f")}, "weight is dense, and should be q"),
        (SMALL, {"weight._data": np.ones((7, 50), np.int8)}, "must be float8_e4m3fn"),
        (
            SMALL,
            {"weight._data": np.full((7, 50), np.nan, jnp.float8_e4m3fn)},
            "weight._data must be finite",
        ),
        (FOUR, {"weight._data": np.ones((3, 160), np.int8)}, "weight._data is no tens"),
    ],
)
def test_refuses_tensors(name, changes, message, refuses):
    with refuses(message):
        quanto.from_tensors(state_of(name) | changes, config_of(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((4, 32), "quanto has groups of 128 for k=256, where it has 32"),
        ((8, 128, True), "a column has 2 scales; of 8 bits it holds one"),
        ((8, None), "(q - z) * s is not symmetric, as its 8 bits are"),
    ],
)
def test_refuses_to_write(options, message, refuses, tmp_path):
    qt = qjax.quantize(jnp.eye(256), *options)
    with refuses(message):
        checkpoints.save(tmp_path / "x", {"up": qt}, {}, format="quanto")


def test_shifts_that_the_loader_wants_as_floats(refuses, tmp_path):
    w = jnp.linspace(-1, 1, 256 * 8, dtype=jnp.bfloat16).reshape(256, 8)
    qt = qjax.quantize(w, symmetric=True)
    tensors = quanto.to_tensors(qt)
    same_bits(tensors["weight._shift"], 8 * tensors["weight._scale"])
    read = quanto.from_tensors(tensors, quanto.config_of(qt))
    same_bits(qjax.dequantize(read, jnp.float32), qjax.dequantize(qt, jnp.float32))
    asymmetric = {"up": qjax.quantize(w)}
    with refuses("beside bfloat16 scales in groups of 128 quanto loads no integer zer"):
        checkpoints.save(tmp_path / "x", asymmetric, {}, format="quanto")
    integers = quanto.to_tensors(qjax.quantize(w, scale_dtype=jnp.float16))
    assert integers["weight._shift"].dtype == jnp.uint8


def test_refuses_floats_of_two_dtypes(refuses):
    qt = fp8.quantize(jnp.ones((64, 64), jnp.bfloat16), group_size=None)
    with refuses("its scales are float32 and its weight is bfloat16; both have one"):
        quanto.to_tensors(qt)
