"""compressed-tensors' bytes and floats against its own files, bit for bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import compressed_tensors as ct
from qjax.formats import compressed_tensors_floats as floats
from qjax.formats.tiles import Tiles
from tests import goldens
from tests.goldens import load, same_bits

FILES = [n for n in goldens.names("compressed_tensors") if n.startswith("ctfloat")]
FLOATS = [name for name in FILES if "int_quantized" not in name]
NVFP4 = "ctfloat_nvfp4_pack_quantized__g16__16x96__s907"
MXFP4 = "ctfloat_mxfp4_pack_quantized__g32__16x96__s908"
CHANNEL = "ctfloat_float_quantized__channel_bfloat16__16x48__s901"
BLOCK = "ctfloat_float_quantized__block_bfloat16__32x96__s903"


def entry_of(name: str, **changes) -> dict:
    config = load(name)["config"]
    group = {"targets": ["Linear"], "weights": config["weights"] | changes}
    return {"config_groups": {"group_0": group}, "format": config["format"]}


def config_of(name: str) -> ct.Config:
    config = ct.Config.from_json(entry_of(name)).of("mlp.up_proj")
    assert config is not None
    return config


def tensors_of(name: str) -> dict:
    held = load(name).items()
    return {k.removeprefix("state_"): v for k, v in held if k.startswith("state_")}


def test_every_golden_file_is_here():
    assert len(FILES) == 9


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_dequantizes_as_upstream(name, prepare):
    expected = load(name)["out_dequant"]
    w = ct.from_tensors(tensors_of(name), config_of(name))
    w = qjax.prepare(w) if prepare else w
    assert w.dtype == expected.dtype
    same_bits(np.asarray(qjax.dequantize(w)), expected.T)


def test_for_a_gpu_the_number_of_the_matrix_stays_apart():
    w = ct.from_tensors(tensors_of(NVFP4), config_of(NVFP4))
    for_gpu = qjax.prepare(w, layout=Tiles())
    assert isinstance(for_gpu.scale, tensor.WithGlobal)
    assert for_gpu.scale.local.dtype == jnp.float16
    same_bits(np.asarray(qjax.dequantize(for_gpu)), load(NVFP4)["out_dequant"].T)


@pytest.mark.parametrize("name", FLOATS)
def test_writes_the_same_bytes(name):
    held = tensors_of(name)
    w = ct.from_tensors(held, config_of(name))
    found = {key: np.asarray(array) for key, array in ct.to_tensors(w).items()}
    same_bits(found, held)


def test_integers_are_packed_to_be_written():
    name = "ctfloat_int_quantized__channel_asym_float32__16x48__s906"
    w = ct.from_tensors(tensors_of(name), config_of(name))
    tensors = {k: np.asarray(v) for k, v in ct.to_tensors(w).items()}
    config = ct.Config(bits=8, strategy="channel", group_size=None, symmetric=False)
    again = ct.from_tensors(tensors, config)
    same_bits(qjax.dequantize(again), qjax.dequantize(w))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            CHANNEL,
            {"weight": np.full((16, 48), np.nan, ml_dtypes.float8_e4m3fn)},
            "NaN",
        ),
        (CHANNEL, {"weight": np.ones((16, 48), np.int8)}, "weight.dtype=int8 must be"),
        (CHANNEL, {"weight_scale": np.ones((16, 2), np.float32)}, "must be (16, 1) or"),
        (BLOCK, {"weight_scale": np.ones((2, 4), np.float32)}, "must be (2, 3), from"),
        (
            NVFP4,
            {"weight_global_scale": np.zeros(1, np.float32)},
            "must be finite, and",
        ),
        (NVFP4, {"weight_global_scale": np.ones(2, np.float32)}, "must be (1,)"),
        (NVFP4, {"weight_packed": np.ones((16, 44), np.uint8)}, "k=88 must be a mult"),
        (MXFP4, {"weight_scale": np.full((16, 3), 255, np.uint8)}, "holds 255"),
        (MXFP4, {"weight_shape": np.ones(2)}, "weight_shape is no tensor of"),
    ],
)
def test_refuses_tensors(name, changes, message, refuses):
    with refuses(message):
        ct.from_tensors(tensors_of(name) | changes, config_of(name))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (NVFP4, {"group_size": 32}, "group_size=32 must be groups of 16 in 'nvfp4"),
        (NVFP4, {"type": "int"}, "4 bits of 'int' must be 4 of 'float' in 'nvfp4-"),
        (CHANNEL, {"num_bits": 4}, "4 bits of 'float' must be 8 of 'float' in"),
        (CHANNEL, {"symmetric": False}, "symmetric=False must be true for floats"),
        (BLOCK, {"block_structure": "0x32"}, "block_structure=[0, 32] must be two p"),
        (BLOCK, {"block_structure": None}, "block_structure=None must be two posit"),
    ],
)
def test_config_refuses(name, changes, message, refuses):
    with refuses(message):
        ct.Config.from_json(entry_of(name, **changes))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format_", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_integers_of_any_width_in_bytes(bits, format_, symmetric, refuses):
    """W4A8 and W4AFP8: weights of four bits, one a byte, for activations of eight."""
    half, rng = 2 ** (bits - 1), np.random.default_rng(bits)
    code, point = (
        rng.integers(-half, half, shape).astype(np.int8) for shape in ((8, 64), (8, 2))
    )
    tensors = {"weight": code, "weight_scale": np.ones((8, 2), np.float32) / 4}
    if not symmetric:
        tensors["weight_zero_point"] = point
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    weights |= {"symmetric": symmetric}
    group = {"targets": ["Linear"], "weights": weights}
    entry = {"config_groups": {"group_0": group}, "format": format_}
    config = ct.Config.from_json(entry)
    w = ct.from_tensors(tensors, config)
    assert w.bits == bits
    wide = code.astype(np.float32)
    zeros = 0 if symmetric else point.repeat(32, 1)
    np.testing.assert_array_equal(qjax.dequantize(w).T, (wide - zeros) / 4)
    if bits < 8:
        with refuses(f"must lie in {-half} to {half - 1}, {bits} bits"):
            ct.from_tensors(tensors | {"weight": code + np.int8(half)}, config)


def test_blocks_as_a_string():
    config = ct.Config.from_json(entry_of(BLOCK, block_structure="16x32"))
    assert config.block_size == (16, 32)


def test_refuses_to_write(refuses):
    w = ct.from_tensors(tensors_of(NVFP4), config_of(NVFP4))
    # Prepared, NVFP4 has the scales of products, not those of its files.
    with refuses("floats of 4 bits in groups of 16 with float32 scales are neither"):
        ct.to_tensors(qjax.prepare(w))
    mx = ct.from_tensors(tensors_of(MXFP4), config_of(MXFP4))
    with refuses("floats of 4 bits in groups of 32 with bfloat16 scales are neither"):
        ct.to_tensors(qjax.prepare(mx))


def test_nibbles():
    codes = np.random.default_rng(0).integers(0, 16, (6, 5)).astype(np.uint8)
    words = floats.Nibbles().pack(jnp.asarray(codes), 4)
    expected = codes[::2].T | codes[1::2].T << 4
    np.testing.assert_array_equal(words, expected)
    np.testing.assert_array_equal(floats.Nibbles().unpack(words, 4), codes)
    with pytest.raises(ValueError, match="must be even"):
        floats.Nibbles().pack(jnp.ones((5, 2), jnp.uint8), 4)
