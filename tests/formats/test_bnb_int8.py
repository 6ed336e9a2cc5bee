"""LLM.int8() against what bitsandbytes wrote, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import bnb, bnb_int8, gptq, torchao
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = [name for name in goldens.names("bnb") if name.startswith("bnb_int8")]
LAYERS = [name for name in FILES if "any" not in name]
PLAIN = "bnb_int8__float16__16x64__s720"
EIGHT = bnb.Config.from_json({"load_in_8bit": True})


def tensors_of(name: str, **changes) -> dict:
    """The saved tensors; in ``changes`` None leaves one out."""
    data = load(name).items()
    held = {k.removeprefix("state_"): v for k, v in data if k.startswith("state_")}
    return {k: v for k, v in (held | changes).items() if v is not None}


def read(name: str, **changes) -> qjax.QTensor:
    return bnb.from_tensors(tensors_of(name, **changes), EIGHT)


@pytest.mark.parametrize("name", FILES)
def test_dequantizes_and_writes(name):
    data, qt = load(name), read(name)
    assert (qt.layout, qt.dtype) == (torchao.Bytes(), jnp.float32)
    codes = np.asarray(qjax.codes(qt)).T.astype(np.int16) - 128
    np.testing.assert_array_equal(codes, data["state_weight"])
    same_bits(qjax.dequantize(qt), data["out_dequant"].T)
    written = bnb.to_tensors(qt)
    held = tensors_of(name, weight_format=np.uint8(0))
    same_bits({k: np.asarray(v) for k, v in written.items()}, held)


@pytest.mark.parametrize("name", LAYERS)
def test_prepared_is_what_a_layer_multiplies_by_in_training(name):
    data, qt = load(name), qjax.prepare(read(name))
    same_bits(qjax.dequantize(qt), data["out_identity"].T)
    # Magnitudes of float16 come back.
    same_bits(bnb_int8.to_tensors(qt)["SCB"], data["state_SCB"])


@pytest.mark.parametrize("name", LAYERS)
def test_quantizes_to_the_same_tensors(name):
    data = load(name)
    dtype = data["meta"]["weight_dtype"]
    qt = bnb.quantize(jnp.asarray(data["in_w"].T).astype(dtype), bits=8)
    written = {k: np.asarray(v) for k, v in bnb.to_tensors(qt).items()}
    same_bits(written, tensors_of(name))


def test_rows_of_zeros_and_of_no_numbers():
    w = jnp.stack([jnp.zeros(8), jnp.full(8, jnp.nan).at[0].set(1)], 1)
    qt = bnb_int8.quantize(w)
    assert not qjax.dequantize(qt)[:, 0].any()
    assert np.isnan(qt.scale.absmax).tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["bnb_int8__bfloat16__8x96__s721", PLAIN])
def test_products_are_close_to_those_of_8_bit_activations(name):
    data, qt = load(name), qjax.prepare(read(name))
    x, y = jnp.asarray(data["in_x"]), data["out_y"].astype(np.float32)
    found = np.asarray(qjax.matmul(x, qt)).astype(np.float32)
    # The other side rounds inputs to one of 255 steps of the largest that is below 6.
    np.testing.assert_allclose(found, y, rtol=0, atol=5e-3 * np.abs(y).max())
    eight = qjax.matmul(x.astype(jnp.float32), qt, implementation="xla_int8")
    # Here the outlier is rounded with the others, in its row.
    np.testing.assert_allclose(eight, y, rtol=0, atol=2e-2 * np.abs(y).max())


def test_gradients():
    data, qt = load(PLAIN), qjax.prepare(read(PLAIN))
    x = jnp.asarray(data["in_x"].astype(np.float32))
    dx, dw = jax.grad(
        lambda x, w: qjax.matmul(x, w).sum(), argnums=(0, 1), allow_int=True
    )(x, qt)
    weight = data["out_identity"].astype(np.float64)
    wanted = np.broadcast_to(weight.sum(0), x.shape)
    np.testing.assert_allclose(dx, wanted, rtol=1e-5, atol=1e-5)
    steps = np.asarray(x, np.float64).sum(0) @ data["state_weight"].T
    np.testing.assert_allclose(dw.scale[0], steps, rtol=1e-4, atol=1e-3)


def test_kernels_take_it():
    qt = read(PLAIN)
    moved = qjax.prepare(qt, layout=Tiles())
    assert isinstance(moved.layout, Tiles)
    np.testing.assert_array_equal(qjax.codes(moved), qjax.codes(qt))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": None}, "SCB is missing; found ['weight', 'weight_format']"),
        ({"weight": np.ones((16, 64), np.uint8)}, "weight.dtype=uint8 must be int8"),
        ({"weight": np.ones((0, 64), np.int8)}, "must be [n, k], not empty"),
        ({"weight": np.ones(64, np.int8)}, "weight.shape=(64,) must have 2 axes"),
        ({"SCB": np.ones(15, np.float32)}, "SCB.shape=(15,) must be (16,), from"),
        ({"SCB": np.ones(16, np.float16)}, "SCB.dtype=float16 must be float32"),
        ({"SCB": np.full(16, np.inf, np.float32)}, "SCB must be finite"),
        ({"SCB": np.full(16, -1, np.float32)}, "SCB from -1.0 must not be negative"),
        ({"weight_format": np.uint8(2)}, "weight_format=2 (col_turing) must be 0"),
        ({"weight_format": np.uint8(9)}, "weight_format=9 (unknown) must be 0 (row)"),
        ({"weight_format": np.zeros(1, np.uint8)}, "weight_format.shape=(1,) must"),
        ({"weight.absmax": np.ones(1)}, "weight.absmax is no tensor of LLM.int8()"),
    ],
)
def test_refuses_tensors(changes, message, refuses):
    with refuses(message):
        read(PLAIN, **changes)


def test_files_of_old_releases_do_without_a_format():
    same_bits(qjax.dequantize(read(PLAIN, weight_format=None)), read_dense())


def read_dense():
    return load(PLAIN)["out_dequant"].T


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group_size": 32}, "a column has 2 scales; it holds one"),
        ({"symmetric": False}, "(q - z) * s here is not symmetric"),
        ({"scale_dtype": jnp.float16}, "float16 scales; bnb_int8.quantize makes float"),
        ({}, "its scales are no magnitudes over 127; bnb_int8.quantize makes such"),
    ],
)
def test_refuses_to_write(options, reason, refuses):
    said = {"bits": 8, "group_size": None, "symmetric": True} | options
    # Scales that are products of 1 / 127 with no number of float32.
    qt = qjax.quantize(oracle_weight(), **said)
    with refuses(f"LLM.int8() cannot hold {qt!r}: {reason}"):
        bnb.to_tensors(qt)


def oracle_weight():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(64, 512)).astype(np.float32))


def test_refuses_what_is_no_matrix_of_inputs_in_order(refuses, as_qtensor):
    m = oracle.random(0, 64, 32, parts=[(8, 64, None)], affine="CENTERED", order=True)
    with refuses("its groups are not runs of inputs"):
        bnb.to_tensors(as_qtensor(m))
    with refuses("it stacks (2,) matrices"):
        bnb.to_tensors(bnb_int8.quantize(jnp.ones((2, 4, 4))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 must be 4 (NF4) or 8 (LLM.int8())"),
        ({"symmetric": False}, "symmetric=False: bitsandbytes has no zeros"),
        ({"scale_dtype": jnp.float16}, "must be None or float32"),
        ({"group_size": 48}, "blocksize=48 must be one of (32, 64,"),
        ({"group_size": None}, "blocksize=None must be one of (32, 64,"),
    ],
)
def test_quantize_refuses(options, message, refuses):
    with refuses(message):
        bnb.quantize(jnp.ones((64, 64)), **options)


def test_other_formats_hold_it(tmp_path):
    """Codes and scales of columns, which compressed-tensors has as well."""
    tensors = {"up_proj": read(PLAIN)}
    checkpoints.save(tmp_path / "x", tensors, {}, format="compressed-tensors")
    found = checkpoints.load(tmp_path / "x", prepare=False)["up_proj"]
    assert not isinstance(found.layout, gptq.Stream)
    same_bits(qjax.dequantize(found), load(PLAIN)["out_identity"].T)
