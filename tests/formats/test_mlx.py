"""MLX's matrices against what MLX makes of them, and transformers' "metal"."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import compressed_tensors, gptq, hqq, mlx, modelopt, mxfp4
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.checkpoints.tiny import Checkpoint
from tests.goldens import load, same_bits

MODEL = "mlx_model__9__s1440"
FILES = [n for n in goldens.names("mlx") if n != MODEL]
METAL = goldens.names("metal")
FOUR = "mlx_affine__b4_g64_bfloat16__7x128__s1405"
THREE = "mlx_affine__b3_g32_float16__6x96__s1402"
MXFP4, MXFP8 = "mlx_mxfp4__6x96__s1430", "mlx_mxfp8__6x96__s1431"
NVFP4 = "mlx_nvfp4__6x96__s1432"


def tensors_of(name: str) -> dict:
    held = load(name).items()
    return {k.removeprefix("state_"): v for k, v in held if k.startswith("state_")}


def config_of(name: str) -> mlx.Config:
    config = mlx.Config.from_json(load(name)["config"]).of("up_proj")
    assert config is not None
    return config


def read(name: str, **changes) -> qjax.QTensor:
    return mlx.from_tensors(tensors_of(name) | changes, config_of(name))


def written(qt: qjax.QTensor, method="mlx") -> dict[str, np.ndarray]:
    return {k: np.asarray(array) for k, array in mlx.to_tensors(qt, method).items()}


def meant(qt: qjax.QTensor) -> np.ndarray:
    """The map of a matrix in float64, which rounds nothing here."""
    (segment,), q = qt.segments, np.asarray(qt.numpy(), np.float64)
    size = segment.group_size or qt.k
    wide = [
        None if one is None else np.asarray(one, np.float64).repeat(size, -2)
        for one in (qt.scale, qt.zero)
    ]
    scale, zero = wide
    if qt.affine is qjax.tensor.Affine.OFFSET:
        return q * scale + zero
    return (q - (2 ** (segment.bits - 1) if zero is None else zero)) * scale


def same_number(found: qjax.QTensor, wanted: qjax.QTensor) -> None:
    np.testing.assert_array_equal(meant(found), meant(wanted))


@pytest.mark.parametrize("name", FILES + METAL)
def test_dequantizes_as_upstream(name):
    same_bits(np.asarray(qjax.dequantize(read(name))), load(name)["out_dequant"].T)


@pytest.mark.parametrize("name", FILES + METAL)
def test_writes_the_same_bytes(name):
    config = config_of(name)
    same_bits(written(read(name), config.method), tensors_of(name))
    assert mlx.config_of(read(name), config.method) == config


@pytest.mark.parametrize("layout", [Tiles(), gptq.Stream()], ids=str)
@pytest.mark.parametrize("name", [THREE, FOUR])
def test_writes_what_was_prepared(name, layout):
    same_bits(written(qjax.prepare(read(name), layout=layout)), tensors_of(name))


@pytest.mark.parametrize("name", [n for n in FILES if "w" in load(n)])
def test_quantizes_as_mlx(name):
    config, w = config_of(name), jnp.asarray(load(name)["w"].T)
    made = mlx.quantize(w, config.bits, config.group_size)
    same_bits(written(made), tensors_of(name))
    assert jax.tree.structure(made) == jax.tree.structure(read(name))


class TestWords:
    """Codes where they lie in a word, worked out by hand."""

    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    def test_a_stream(self, bits):
        codes = [(7 * i + 3) % 2**bits for i in range(32)]
        stream = sum(code << bits * i for i, code in enumerate(codes))
        weight = np.frombuffer(stream.to_bytes(4 * bits, "little"), np.uint32)[None]
        ones = np.ones((1, 1), np.float32)
        held = {"weight": weight, "scales": ones, "biases": -2 * ones}
        w = mlx.from_tensors(held, mlx.Config(bits=bits, group_size=32))
        np.testing.assert_array_equal(w.numpy()[:, 0], codes)
        np.testing.assert_array_equal(
            qjax.dequantize(w)[:, 0], np.array(codes, np.float32) - 2
        )

    @pytest.mark.parametrize(
        ("mode", "word", "numbers"),
        [
            ("mxfp4", 0xF7654321, [0.5, 1, 1.5, 2, 3, 4, 6, -6]),
            ("mxfp8", 0xB8303840, [2, 1, 0.5, -1]),
            ("nvfp4", 0xF7654321, [0.5, 1, 1.5, 2, 3, 4, 6, -6]),
        ],
    )
    def test_small_floats(self, mode, word, numbers):
        config = mlx.Config.from_json(
            {"mode": mode} | dict(zip(("group_size", "bits"), SIZES[mode], strict=True))
        )
        weight = np.full((1, 32 * config.bits // 32), word, np.uint32)
        groups = 32 // config.group_size
        # Of either kind, the number 2.
        two = 64 if mode == "nvfp4" else 128
        held = {"weight": weight, "scales": np.full((1, groups), two, np.uint8)}
        w = mlx.from_tensors(held, config)
        found = qjax.dequantize(w)[: len(numbers), 0]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, 2 * np.array(numbers, np.float32))


SIZES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


class TestStacks:
    @pytest.mark.parametrize("name", [THREE, MXFP4, MXFP8, NVFP4])
    def test_stack_of_experts(self, name):
        held = {k: np.stack([a, a[::-1]]) for k, a in tensors_of(name).items()}
        w = mlx.from_tensors(held, config_of(name))
        expected = load(name)["out_dequant"]
        same_bits(
            np.asarray(qjax.dequantize(w)), np.stack([expected.T, expected[::-1].T])
        )
        same_bits(written(w), held)
        assert mlx.axes(held, config_of(name))["scales"] == ("b0", "n", "k")

    def test_quantizes_a_stack(self):
        w = jax.random.normal(jax.random.key(0), (2, 64, 8))
        each = [mlx.quantize(one, 3, 32) for one in w]
        same_bits(mlx.quantize(w, 3, 32), qjax.stack(each))

    def test_of_symmetric_codes(self):
        w = jax.random.normal(jax.random.key(0), (2, 64, 8))
        stack = qjax.quantize(w, 4, 32, symmetric=True)
        again = mlx.from_tensors(written(stack), mlx.Config(group_size=32))
        same_number(again, stack)


class TestExactOffsets:
    """What is written stands for the same numbers, or is refused."""

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_symmetric_codes(self, bits, dtype):
        w = jax.random.normal(jax.random.key(bits), (64, 8), dtype)
        symmetric = qjax.quantize(w, bits, 32, symmetric=True)
        config = mlx.Config(bits=bits, group_size=32)
        same_number(mlx.from_tensors(written(symmetric), config), symmetric)

    def test_zeros_whose_products_with_scales_are_numbers(self):
        scale = jnp.full((2, 8), 1.5, jnp.float16).at[0].set(-0.375)
        zero = jnp.arange(16, dtype=jnp.uint8).reshape(2, 8)
        w = dataclasses.replace(integer_zeros(jnp.float16), scale=scale, zero=zero)
        again = mlx.from_tensors(written(w), mlx.Config(group_size=32))
        same_number(again, w)
        # 0 * scale is no minus zero.
        assert not np.signbit(again.zero[0, 0])

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_float32_holds_products_of_16_bits(self, dtype, refuses):
        w = integer_zeros(dtype)
        with refuses(f"must be numbers in {jnp.dtype(dtype)}, as MLX adds them, and"):
            mlx.to_tensors(w)
        wide = dataclasses.replace(w, scale=w.scale.astype(jnp.float32))
        same_number(mlx.from_tensors(written(wide), mlx.Config(group_size=32)), w)

    def test_products_of_float32(self, refuses):
        with refuses("must be numbers in float32, as MLX adds them"):
            mlx.to_tensors(integer_zeros(jnp.float32))

    def test_float_zeros(self, refuses):
        with refuses("must be numbers in float32, as MLX adds them"):
            mlx.to_tensors(float_zeros(0.3))
        halves = float_zeros(2.0)
        again = mlx.from_tensors(written(halves), mlx.Config(group_size=32))
        same_number(again, halves)

    def test_products_beyond_the_dtype(self, refuses):
        w = qjax.quantize(jnp.eye(32), 8, 32, symmetric=True, scale_dtype="float16")
        large = dataclasses.replace(w, scale=jnp.full_like(w.scale, 1000))
        with refuses("must be numbers in float16, as MLX adds them"):
            mlx.to_tensors(large)

    def test_abstract_zeros(self):
        shape = jax.ShapeDtypeStruct((32, 8), jnp.float16)
        asymmetric = jax.eval_shape(lambda w: qjax.quantize(w, 4, 32), shape)
        assert "must be numbers in float16" in mlx.lacks_exact_offsets(asymmetric)
        symmetric = jax.eval_shape(lambda w: qjax.quantize(w, 4, 32, True), shape)
        assert mlx.lacks_exact_offsets(symmetric) is None
        offsets = jax.eval_shape(lambda w: mlx.quantize(w, 4, 32), shape)
        assert mlx.lacks_exact_offsets(offsets) is None


def integer_zeros(dtype) -> qjax.QTensor:
    w = jax.random.normal(jax.random.key(1), (64, 8), dtype)
    return qjax.quantize(w, 4, 32)


def float_zeros(zero: float) -> qjax.QTensor:
    w = integer_zeros(jnp.float32)
    return dataclasses.replace(w, zero=jnp.full(w.scale.shape, zero, jnp.float32))


def scaled(whole: float) -> qjax.QTensor:
    """NVFP4 with a number for the whole matrix."""
    w = read(NVFP4)
    scale = dataclasses.replace(w.scale, whole=jnp.float32(whole))
    return dataclasses.replace(w, scale=scale)


def with_order() -> qjax.QTensor:
    w = qjax.quantize(jnp.eye(64), 4, 32, True)
    tensors = gptq.to_tensors(w, "gptq_v2")
    tensors["g_idx"] = tensors["g_idx"][::-1]
    config = gptq.Config(group_size=32, checkpoint_format="gptq_v2")
    return gptq.from_tensors(tensors, config)


@pytest.mark.parametrize(
    ("w", "method", "message"),
    [
        (lambda: qjax.quantize(jnp.eye(64), 7, 32, True), "mlx", "7 bits are not amon"),
        (
            lambda: qjax.quantize(jnp.eye(48), 4, 16, True),
            "mlx",
            "it has groups of 16, and with mode='affine' there are (32, 64, 128)",
        ),
        (
            lambda: qjax.quantize(jnp.eye(96), 4, None, True),
            "mlx",
            "it has groups of 96, and with mode='affine'",
        ),
        (lambda: qjax.quantize(jnp.eye(64), 3, 32, True), "metal", "3 bits are not a"),
        (lambda: qjax.stack([read(FOUR)] * 2), "metal", "it stacks (2,) matrices"),
        (lambda: read(MXFP4), "metal", "float(q) * s is not q * scale + bias"),
        (lambda: qjax.prepare(read(MXFP4)), "mlx", "load it with prepare=False"),
        (lambda: scaled(2.0), "mlx", "its scales have the factor 2.0 for all, and MLX"),
        (with_order, "mlx", "its groups are not runs of inputs (act-order)"),
        (
            lambda: dataclasses.replace(
                qjax.quantize(jnp.eye(64), 4, 32, True),
                zero=jnp.ones((2, 64), jnp.float32),
            ),
            "mlx",
            "here is not q * scale + bias; requantize it",
        ),
        (lambda: read(FOUR), "mxl", "method='mxl' must be one of ('mlx', 'metal')"),
    ],
)
def test_refuses_to_write(w, method, message, refuses):
    with refuses(message):
        mlx.to_tensors(w(), method)


class TestOtherFormats:
    def test_mxfp4_is_that_of_others(self):
        w = mxfp4.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
        config = mlx.Config(group_size=32, mode="mxfp4")
        again = mlx.from_tensors(written(w), config)
        same_bits(qjax.dequantize(again), qjax.dequantize(w))
        tensors = compressed_tensors.to_tensors(again, compressed_tensors.Dense())
        assert tensors.keys() == {"weight_packed", "weight_scale"}

    def test_nvfp4_with_the_number_1(self):
        tensors = modelopt.to_tensors(read(NVFP4))
        assert tensors["weight_scale_2"] == 1
        config = modelopt.Config(algorithm="W4A16_NVFP4")
        again = modelopt.from_tensors(tensors, config)
        same_bits(written(again), tensors_of(NVFP4))

    def test_offsets_have_no_zeros(self, refuses):
        with refuses("q * s + z has no zero in units of codes; requantize it"):
            hqq.to_tensors(read(FOUR))


@pytest.mark.parametrize("layout", [Tiles(), gptq.Stream()], ids=str)
@pytest.mark.parametrize("name", [FOUR, THREE, MXFP4, MXFP8, NVFP4])
def test_products_are_those_of_the_weight(name, layout):
    # What is beyond float16 is not for sums.
    held = {k: a.copy() for k, a in tensors_of(name).items()}
    if held["scales"].dtype == np.uint8:
        held["scales"][:] = 60 if name == NVFP4 else 120
    w = mlx.from_tensors(held, config_of(name))
    x = np.random.default_rng(1).standard_normal((5, w.k)).astype(np.float32)
    exact = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
    found = qjax.matmul(jnp.asarray(x), qjax.prepare(w, layout=layout))
    # Sums of up to 128 products in float32.
    assert oracle.relative_error(found, x.astype(np.float64) @ exact) < 1e-5


def test_gradients_of_scales_and_offsets():
    w = qjax.prepare(read(THREE))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, w.k)), jnp.float32)

    def loss(x, w):
        return qjax.matmul(x, w).sum()

    dx, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
    dense = np.asarray(qjax.dequantize(w, jnp.float32), np.float64)
    assert oracle.relative_error(dx, np.tile(dense.sum(1), (3, 1))) < 1e-5
    sums, size = np.asarray(x, np.float64).sum(0), w.segments[0].group_size
    codes = np.asarray(w.numpy(), np.float64)
    of_codes = (sums[:, None] * codes).reshape(-1, size, w.n).sum(1)
    of_groups = np.tile(sums.reshape(-1, size).sum(1)[:, None], w.n)
    # Gradients have the scales' dtype, float16.
    assert oracle.relative_error(dw.scale, of_codes) < 1e-3
    assert oracle.relative_error(dw.zero, of_groups) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "bits=7 must be one of (2, 3, 4, 5, 6, 8)"),
        ({"group_size": None}, "group_size=None must be one of (32, 64, 128)"),
        ({"symmetric": True}, "symmetric=True must be False: every group has its"),
        ({"scale_dtype": jnp.int8}, "scale_dtype=dtype('int8') must be one of"),
        ({"w": jnp.ones((48, 4))}, "w.shape=(48, 4) must have no extent of 0 and k a"),
        ({"w": jnp.ones((64, 0))}, "w.shape=(64, 0) must have no extent of 0"),
    ],
)
def test_refuses_to_quantize(arguments, message, refuses):
    w = arguments.pop("w", jnp.ones((64, 4)))
    with refuses(message):
        mlx.quantize(w, **arguments)


def test_quantizes_what_is_not_finite():
    w = mlx.quantize(jnp.ones((64, 2)).at[3, 1].set(jnp.nan), 4, 32)
    assert not jnp.isfinite(qjax.dequantize(w)[:32, 1]).any()
    assert jnp.isfinite(qjax.dequantize(w)[:, 0]).all()


def directory(path, tensors=None, **changes):
    tensors = {
        key: np.ascontiguousarray(array).reshape(array.shape)
        for key, array in (tensors or tensors_of(MODEL)).items()
    }
    config = copy.deepcopy(load(MODEL)["config"]) | changes
    return Checkpoint(tensors, config).write(path)


class TestModel:
    """All that mlx-lm writes of one: embeddings, experts, modules that differ."""

    @pytest.mark.parametrize("name", [MODEL])
    def test_loads(self, tmp_path, name):
        path, data = directory(tmp_path), load(name)
        weights = checkpoints.load(path, prepare=False)
        assert checkpoints.verify(path) == []
        packed = {k: w for k, w in weights.items() if isinstance(w, qjax.QTensor)}
        assert {f"out_{k}" for k in packed} == {k for k in data if k[:4] == "out_"}
        for name, w in packed.items():
            expected = data[f"out_{name}"].swapaxes(-1, -2)
            same_bits(np.asarray(qjax.dequantize(w)), expected)
        assert weights["experts"].shape == (3, 64, 8)
        assert weights["embed_tokens"].shape == (64, 12)
        dense = {"left.weight", "odd.weight", "norm.weight"}
        assert weights.keys() - packed.keys() == dense | {"up_proj.bias"} | {
            "experts.bias"
        }

    def test_is_written_again(self, tmp_path):
        path = directory(tmp_path / "a")
        checkpoints.convert(path, tmp_path / "b", format="mlx")
        stored = checkpoints.shards.scan(tmp_path / "b")
        same_bits({k: v.read() for k, v in stored.items()}, tensors_of(MODEL))
        config = checkpoints.read_config(tmp_path / "b")
        assert config["quantization"] == config["quantization_config"]
        said, before = (
            mlx.Config.from_json(one)
            for one in (config["quantization"], load(MODEL)["config"]["quantization"])
        )
        for name in ("up_proj", "gate", "few", "experts", "embed_tokens"):
            found, wanted = said.of(name), before.of(name)
            assert found.to_json() == wanted.to_json(), name

    def test_what_mlx_goes_by(self, tmp_path):
        """What a model was made of may have left its own configuration."""
        path = directory(tmp_path / "a", quantization_config={"quant_method": "fp8"})
        assert checkpoints.load(path)["experts"].ndim == 3
        # As older releases wrote.
        entry = dict(load(MODEL)["config"]["quantization"])
        del entry["mode"]
        config = {"model_type": "few", "quantization": entry}
        made = Checkpoint(tensors_of(MODEL), config)
        made.tensors = {k: np.ascontiguousarray(v) for k, v in made.tensors.items()}
        assert checkpoints.load(made.write(tmp_path / "b"))["experts"].ndim == 3

    def test_other_formats_leave_it_out(self, tmp_path):
        tensors = {f"x.{k}": v for k, v in tensors_of(MXFP4).items()}
        config = load(MXFP4)["config"]
        path = directory(
            tmp_path / "a", tensors, quantization=config, quantization_config=config
        )
        checkpoints.convert(path, tmp_path / "b", format="compressed-tensors")
        found = checkpoints.read_config(tmp_path / "b")
        assert "quantization" not in found
        assert found["quantization_config"]["quant_method"] == "compressed-tensors"
        checkpoints.convert(tmp_path / "b", tmp_path / "c", format="mlx")
        stored = checkpoints.shards.scan(tmp_path / "c")
        same_bits({k: v.read() for k, v in stored.items()}, tensors)

    def test_tables_become_dense_where_others_read_none(self, tmp_path):
        names = ("model.embed_tokens", "x")
        tensors = {
            f"{name}.{k}": v for name in names for k, v in tensors_of(MXFP4).items()
        }
        path = directory(tmp_path / "a", tensors, quantization=load(MXFP4)["config"])
        checkpoints.convert(path, tmp_path / "b", format="compressed-tensors")
        found = checkpoints.load(tmp_path / "b")
        assert found.keys() == {"model.embed_tokens.weight", "x"}
        table = checkpoints.load(path)["model.embed_tokens"]
        same_bits(found["model.embed_tokens.weight"], qjax.dequantize(table).T)

    def test_other_objects_of_that_name(self, tmp_path):
        """Only what MLX could read is taken for its own, and only that is dropped."""
        w = qjax.quantize(jnp.eye(64), 4, 32, symmetric=True)
        config = {"quantization": {"of": "something else"}}
        checkpoints.save(tmp_path / "a", {"x": w}, config, format="gptq")
        assert checkpoints.read_config(tmp_path / "a")["quantization"] == {
            "of": "something else"
        }
        assert checkpoints.load(tmp_path / "a")["x"].shape == (64, 64)


class TestSaving:
    def test_quantizes_a_directory(self, tmp_path):
        w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float16)
        tensors = {f"{i}.up_proj.weight": w + np.float16(i) for i in range(3)}
        source = Checkpoint(tensors, {}).write(tmp_path / "a")
        six = qjax.Spec(bits=6, group_size=32, quantizer=mlx.quantize)
        four = qjax.Spec(group_size=64, quantizer=mlx.quantize)
        rules = [("1.*", six), (".*", four)]
        checkpoints.quantize(source, tmp_path / "b", format="mlx", rules=rules)
        config = checkpoints.read_config(tmp_path / "b")
        usual = {"group_size": 64, "bits": 4, "mode": "affine"}
        other = {"group_size": 32, "bits": 6, "mode": "affine"}
        assert config["quantization"] == usual | {"1.up_proj": other}
        weights = checkpoints.load(tmp_path / "b", prepare=False)
        for i, spec in enumerate((four, six, four)):
            made = mlx.quantize(
                jnp.asarray(w + np.float16(i)).T, spec.bits, spec.group_size
            )
            same_bits(weights[f"{i}.up_proj"], made)

    def test_zeros_are_refused_before_anything_is_quantized(self, tmp_path, refuses):
        w = np.ones((8, 64), np.float16)
        source = Checkpoint({"up_proj.weight": w}, {}).write(tmp_path / "a")
        with refuses("its offsets, -zero * scale, must be numbers in float16"):
            checkpoints.quantize(
                source, tmp_path / "b", format="mlx", rules=qjax.Spec(group_size=32)
            )

    def test_names_beside_paths(self, tmp_path, refuses):
        w = mlx.quantize(jnp.eye(64))
        with refuses("bits: MLX has paths beside group_size, bits, mode, which are no"):
            checkpoints.save(tmp_path / "x", {"bits": w, "y": w}, {}, format="mlx")

    def test_metal(self, tmp_path, refuses):
        w, eight = mlx.quantize(jnp.eye(64)), mlx.quantize(jnp.eye(64), 8)
        tensors = {"a.x": w, "a.y": w, "left.weight": jnp.ones((4, 4))}
        checkpoints.save(tmp_path / "x", tensors, {}, format="metal")
        entry = checkpoints.read_config(tmp_path / "x")["quantization_config"]
        assert entry == {
            "quant_method": "metal",
            "bits": 4,
            "group_size": 64,
            "modules_to_not_convert": ["left", "lm_head"],
        }
        found = checkpoints.load(tmp_path / "x", prepare=False)["a.x"]
        np.testing.assert_array_equal(meant(found), meant(w))
        with refuses("y: transformers has one width and group size for all, here 4 bi"):
            pair = {"a.x": w, "a.z": w, "a.y": eight}
            checkpoints.save(tmp_path / "y", pair, {}, format="metal")
        with refuses("lm_head: transformers would leave it dense"):
            pair = {"a.x": w, "lm_head": w}
            checkpoints.save(tmp_path / "y", pair, {}, format="metal")
        with refuses("leaves modules dense by the ends of their paths, and x, which"):
            pair = {"a.x": w, "x.weight": jnp.ones((4, 4))}
            checkpoints.save(tmp_path / "y", pair, {}, format="metal")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (FOUR, {"weight": np.ones((7, 16), np.int32)}, "dtype=int32 must be uint32"),
        (FOUR, {"weight": np.ones((7, 12), np.uint32)}, "k in whole groups of 64, and"),
        (FOUR, {"weight": np.ones((0, 16), np.uint32)}, "of 64, and not empty"),
        (FOUR, {"weight": np.ones(16, np.uint32)}, "weight.shape=(16,) must be [...,"),
        (FOUR, {"weight": np.uint32(1)}, "weight.shape=() must be [..., n"),
        (THREE, {"weight": np.ones((6, 10), np.uint32)}, "n, k * 3 / 32] with k in"),
        (FOUR, {"weight": np.ones((2, 7, 16), np.uint32)}, "(7, 2) must be (2, 7, 2)"),
        (FOUR, {"scales": np.ones((7, 2), np.uint8)}, "scales.dtype=uint8 must be fl"),
        (FOUR, {"scales": np.ones((7, 2), np.float32)}, "biases.dtype=bfloat16 must b"),
        (FOUR, {"biases": np.ones((7, 3), jnp.bfloat16)}, "biases.shape=(7, 3) must b"),
        (FOUR, {"qbiases": np.ones((7, 2), jnp.bfloat16)}, "qbiases is no tensor of m"),
        (FOUR, {"scales": np.full((7, 2), np.inf, jnp.bfloat16)}, "scales must be fin"),
        (FOUR, {"biases": np.full((7, 2), np.nan, jnp.bfloat16)}, "biases must be fin"),
        (MXFP4, {"biases": np.ones((6, 3), np.float16)}, "biases is no tensor of mlx "),
        (MXFP4, {"scales": np.full((6, 3), 255, np.uint8)}, "scales holds 255, which "),
        (MXFP4, {"scales": np.ones((6, 3), np.float16)}, "must be uint8 in mlx with m"),
        (MXFP8, {"weight": np.full((6, 24), 127, np.uint32)}, "weight must be finite;"),
        (NVFP4, {"scales": np.full((6, 6), 255, np.uint8)}, "scales must be finite; f"),
        (METAL[0], {"biases": np.ones((6, 3), np.float16)}, "biases is no tensor of m"),
    ],
)
def test_refuses_tensors(name, changes, message, refuses):
    with refuses(message):
        read(name, **changes)


def test_what_is_missing_is_named(refuses):
    held = tensors_of(FOUR)
    del held["biases"]
    with refuses("biases is missing; found ['scales', 'weight']"):
        mlx.from_tensors(held, config_of(FOUR))


ALL = {"group_size": 64, "bits": 4}
OF_METAL = {"quant_method": "metal"}


class TestConfig:
    def test_modules(self):
        said = mlx.Config.from_json(
            ALL
            | {
                "quant_method": "mlx",
                "mode": "affine",
                "a.b": {"group_size": 32, "bits": 8, "quantize_input": True},
                "a.c": {"mode": "nvfp4"},
                "a.d": False,
                "a.e": True,
                "a.f": {"bits": 3, "group_size": None},
            }
        )
        found = {name: said.of(f"a.{name}") for name in "bcdefg"}
        assert found.pop("d") is None
        assert {name: tuple(c.to_json().values()) for name, c in found.items()} == {
            "b": (32, 8, "affine"),
            "c": (16, 4, "nvfp4"),
            "e": (64, 4, "affine"),
            "f": (64, 3, "affine"),
            "g": (64, 4, "affine"),
        }

    def test_metal(self):
        said = mlx.Config.from_json(OF_METAL | {"modules_to_not_convert": ["lm_head"]})
        assert said.of("lm_head") is None
        of_one = said.of("model.layers.0.mlp.up_proj")
        assert (of_one.bits, of_one.group_size, of_one.offsets) == (4, 64, "qbiases")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"quant_method": "gptq"}, "quant_method='gptq' must be one of ('mlx', 'm"),
            ({"bits": 4}, "quantization.group_size is missing"),
            (ALL | {"bits": None}, "quantization.bits is missing"),
            (
                ALL | {"bits": 7},
                "quantization.bits=7 must be one of (2, 3, 4, 5, 6, 8)",
            ),
            (ALL | {"bits": True}, "quantization.bits=True must be one of"),
            (ALL | {"group_size": "64"}, "group_size='64' must be one of (32, 64, 128"),
            (
                ALL | {"mode": "mxfp4"},
                "group_size=64 must be one of (32,) with mode='mx",
            ),
            (
                ALL | {"x": {"mode": "mxfp8", "bits": 4}},
                "quantization['x'].bits=4 must be one of (8,) with mode='mxfp8'",
            ),
            (OF_METAL | {"bits": 3}, "bits=3 must be one of (2, 4, 8)"),
            (OF_METAL | {"group_size": 0}, "group_size=0 must be a positive integer"),
            (
                OF_METAL | {"modules_to_not_convert": ["(a+)+"]},
                "modules_to_not_convert: '(a+)+' repeats a group",
            ),
        ],
    )
    def test_refuses(self, entry, message, refuses):
        with refuses(message):
            mlx.Config.from_json(entry)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                ALL | {"mode": "nf4"},
                "quantization.mode='nf4' is not read; those are: [",
            ),
            (ALL | {"mode": []}, "quantization.mode=[] is not read"),
            (ALL | {"x": 3}, "quantization['x']=3 is not known: what stands beside"),
            (ALL | {"x": {"scheme": 1}}, "quantization['x'].scheme=1 is not known"),
        ],
    )
    def test_does_not_know(self, entry, message):
        with pytest.raises(NotImplementedError) as caught:
            mlx.Config.from_json(entry)
        assert message in str(caught.value)
