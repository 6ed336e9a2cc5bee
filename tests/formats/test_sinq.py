"""SINQ against the weights that it makes of its own files, bit for bit."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import hqq, sinq
from qjax.formats.tiles import Tiles
from tests.goldens import load, names, same_bits

FILES = names("sinq")
MODULE = "model.layers.0.q_proj"


def said(name: str) -> dict:
    """What the file beside the weights says of the module."""
    return copy.deepcopy(load(name)["meta"]["sidecar"])


def config_of(entry: dict, **fields) -> sinq.Config:
    whole = {"quant_method": "sinq", sinq.SIDECAR: {MODULE: entry}} | fields
    config = sinq.Config.from_json(whole).of(MODULE)
    assert config is not None
    return config


def stored(name: str) -> tuple[dict, sinq.Config]:
    tensors = {
        key.removeprefix("state_"): array
        for key, array in load(name).items()
        if key.startswith("state_")
    }
    return tensors, config_of(said(name))


def one(kind: str) -> str:
    (name,) = (name for name in FILES if name.startswith(f"sinq_{kind}__"))
    return name


def test_every_golden_file_is_here():
    assert len(FILES) == 16


@pytest.mark.parametrize("name", FILES)
def test_dequantizes_as_sinq(name):
    tensors, config = stored(name)
    qt = sinq.from_tensors(tensors, config)
    wanted = load(name)["out_dequant"]
    assert qt.shape == wanted.shape[::-1]
    # Where each step is rounded to float16, a wider dtype would be of other numbers.
    assert (qt.dtype == jnp.float16) == (wanted.dtype == np.float16)
    same_bits(np.asarray(qjax.dequantize(qt, wanted.dtype)).T, wanted)
    same_bits(np.asarray(qt.input_scale), tensors["meta.scale2"][0])
    if config.bits not in (5, 6):
        assert qt.layout == hqq.Slabs(qt.k, tensors["W_q"].shape[1])
        container = f"u{tensors['W_q'].itemsize}"
        same_bits(np.asarray(qt.words[0]), tensors["W_q"].view(container))


@pytest.mark.parametrize("name", FILES)
def test_multiplies(name):
    qt = sinq.from_tensors(*stored(name))
    # In float32, as products round nothing on the way.
    base = dataclasses.replace(qt, weight_dtype="float32", rounding=1)
    w = np.asarray(qjax.dequantize(base, jnp.float32)).astype(np.float64)
    x = np.random.default_rng(0).normal(size=(3, qt.k)).astype(np.float32)
    found = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    assert np.abs(found - x @ w).max() <= 1e-5 * (np.abs(x) @ np.abs(w)).max()


@pytest.mark.parametrize("kind", ["b4_aux", "b5_plain", "b3_plain"])
def test_moves_to_the_layout_of_gpus_and_has_a_gradient(kind):
    qt = sinq.from_tensors(*stored(one(kind)))
    moved = qjax.relayout(qt, Tiles())
    same_bits(qjax.dequantize(moved), qjax.dequantize(qt))
    x, ready = jnp.ones((2, qt.k)), qjax.prepare(qt)
    dx = jax.grad(lambda x: qjax.matmul(x, ready).sum())(x)
    w = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(np.float64)
    wanted = np.broadcast_to(w.sum(1), x.shape)
    assert np.abs(dx - wanted).max() <= 1e-5 * np.abs(w).sum(1).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nbits": 7}, "nbits=7 must be one of (8, 6, 5, 4, 3, 2, 1.58, 1)"),
        ({"nbits": True}, "nbits='True' must be one of (8, 6, "),
        ({"nbits": [4]}, "nbits='[4]' must be one of (8, 6, "),
        ({"nbits": None}, "nbits='None' must be one of (8, 6, "),
        ({"packing": "3bit_32"}, "packing='3bit_32' must be one of ('4bit_u8',)"),
        ({"packing": None}, "packing=None must be one of ('4bit_u8',)"),
        ({"axis": 0}, "axis=0 must be one of (1,)"),
        ({"view_as_float": True}, "view_as_float=True must be one of (False,)"),
        ({"awq_scale": [1]}, "awq_scale=[1] must be one of (None,)"),
        ({"compute_dtype": "torch.float64"}, "compute_dtype='torch.float64' must be"),
        ({"method": "sinq_nf4"}, "method='sinq_nf4' is not read: it must not have"),
        ({"method": "sinq_noz_quantAux"}, "'sinq_noz_quantAux' is not read"),
        ({"method": None}, "method=None is not read"),
        ({"shape": [32]}, "shape=[32] must be [N, K]"),
        ({"shape": [32, 2**40]}, "must be [N, K]"),
        ({"rotation": 1}, "meta has ['rotation']; known: ['awq_scale', 'axis', "),
    ],
)
def test_what_the_file_beside_says_is_refused(changes, message, refuses):
    entry = said(one("b4_aux"))
    entry["meta"] |= changes
    with refuses(message):
        config_of(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method='hqq' must be 'sinq'"),
        ({"tiling_mode": "2D"}, "tiling_mode='2D' must be one of ('1D',)"),
        ({}, f"{sinq.SIDECAR}=None must be an object"),
        ({sinq.SIDECAR: []}, f"{sinq.SIDECAR}=[] must be an object"),
    ],
)
def test_configurations_are_refused(entry, message, refuses):
    with refuses(message):
        sinq.Config.from_json(entry)


@pytest.mark.parametrize("entry", [{MODULE: 1}, {MODULE: {}}, {MODULE: {"meta": []}}])
def test_modules_are_objects(entry, refuses):
    with refuses("must be an object"):
        sinq.Config.from_json({sinq.SIDECAR: entry}).of(MODULE)


def test_other_modules_are_dense():
    config = sinq.Config.from_json({sinq.SIDECAR: {MODULE: said(FILES[0])}})
    assert config.of("lm_head") is None


HALF = np.float16


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("b4_aux", {"W_q": np.zeros((32, 32), np.int32)}, "W_q.dtype=int32 must be ui"),
        ("b4_aux", {"W_q": np.zeros((64, 32), np.uint8)}, "(64, 32) must be (32, 32)"),
        ("b4_aux", {"W_q": np.zeros((32, 24), np.uint8)}, "groups that divide K=64"),
        ("b4_aux", {"W_q": np.zeros((32, 0), np.uint8)}, "groups that divide K=64"),
        ("b4_aux", {"meta.scale2": np.ones((1, 32), HALF)}, "(1, 32) must be (1, 64)"),
        (
            "b4_aux",
            {"meta.scale2": np.ones((1, 64), int)},
            "must be float16 or float32",
        ),
        ("b4_aux", {"meta.scale.x": np.zeros((16, 4), np.uint8)}, "must be (32, 2)"),
        (
            "b4_aux",
            {"meta.scale.s": np.ones((1, 2), np.float32)},
            "must be float16, th",
        ),
        ("b4_aux", {"meta.zero.m": np.ones((2, 1), HALF)}, "(2, 1) must be (1, 1)"),
        ("b4_aux", {"meta.scale": np.ones((64, 1), HALF)}, "meta.scale.x is no tensor"),
        (
            "b4_aux",
            {"meta.scale.s": np.full((1, 2), 6e4, HALF)},
            "meta.scale must be finite",
        ),
        ("b4_plain", {"meta.zero": np.zeros((24, 2), HALF)}, "(24, 2) must be (48, 1)"),
        (
            "b4_plain",
            {"meta.scale2": np.full((1, 64), np.nan, HALF)},
            "meta.scale2 must be finite",
        ),
        (
            "b3_plain",
            {"W_q": np.full((10, 16), -1, np.int32)},
            "codes of more than 3 bits",
        ),
        (
            "b5_plain",
            {"W_q": np.full((4, 32), -1, np.int32)},
            "codes of more than 5 b",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kind, changes, message, refuses):
    tensors, config = stored(one(kind))
    with refuses(message):
        sinq.from_tensors(tensors | changes, config)


@pytest.mark.parametrize("kind", ["b4_aux", "b4_plain", "b6_plain"])
def test_no_tensor_is_missing(kind, refuses):
    tensors, config = stored(one(kind))
    for name in tensors:
        left = {key: array for key, array in tensors.items() if key != name}
        with refuses("is missing; found"):
            sinq.check(left, config)


def test_words_and_tiles_are_whole(refuses):
    tensors, config = stored(one("b4_plain"))
    with refuses("shape=[1, 32] must be whole words of 2 groups"):
        sinq.check(tensors, dataclasses.replace(config, shape=(1, 32)))
    tensors, config = stored(one("b4_aux"))
    with refuses("shape=[2, 64] must have a multiple of 32 groups"):
        sinq.check(tensors, dataclasses.replace(config, shape=(2, 64)))
