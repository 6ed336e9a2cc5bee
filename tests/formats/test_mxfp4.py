"""MXFP4 against what transformers, torchao and ml_dtypes make of it, bit for bit."""

import collections
import dataclasses
import functools
import json

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import qjax
from qjax import tensor
from qjax.formats import gptq, mxfp4
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("mxfp4")
STORED = [name for name in FILES if name.startswith("mxfp4_moe")]
QUANTIZED = [name for name in FILES if name.startswith("mxfp4_quantize")]
RANDOM = "mxfp4_moe__random__e3_24x160__s900"


def tensors_of(data: dict, **changes) -> dict:
    tensors = {name: data[name] for name in mxfp4.TENSORS} | changes
    return {name: array for name, array in tensors.items() if array is not None}


def random(seed: int, *shape: int) -> dict:
    """Stored tensors whose weights are normal numbers; the shape ends in n, k."""
    rng = np.random.default_rng(seed)
    groups = (*shape[:-1], shape[-1] // 32)
    return {
        "blocks": rng.integers(0, 256, (*groups, 16), dtype=np.uint8),
        "scales": rng.integers(2, 253, groups, dtype=np.uint8),
    }


def dense(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight ``[..., k, n]`` in float32, by the floats of ml_dtypes."""
    codes = np.stack([blocks % 16, blocks // 16], axis=-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    values = values.reshape(*scales.shape, 32)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    weight = (values * powers[..., None]).reshape(*scales.shape[:-1], -1)
    return weight.swapaxes(-1, -2)


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {"mxfp4_moe": 3, "mxfp4_quantize": 3}


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_dequantizes_as_transformers(name, prepare):
    data = load(name)
    qt = mxfp4.from_tensors(tensors_of(data))
    assert qt.shape == data["out_dequant"].shape
    weight = qjax.dequantize(qjax.prepare(qt) if prepare else qt)
    same_bits(weight, data["out_dequant"])


@pytest.mark.parametrize("name", STORED)
def test_writes_the_same_bytes(name):
    tensors = tensors_of(load(name))
    qt = mxfp4.from_tensors(tensors)
    assert isinstance(qt.scale, mxfp4.E8M0)
    for one in (qt, qjax.relayout(qt, gptq.Stream()), qjax.prepare(qt)):
        written = {k: np.asarray(v) for k, v in mxfp4.to_tensors(one).items()}
        chex.assert_trees_all_equal(written, tensors)
        chex.assert_trees_all_equal_dtypes(written, tensors)


def test_codes_are_low_nibble_first():
    blocks = np.arange(16, dtype=np.uint8)[None, None] * 17
    blocks[0, 0, 5] = 0x3A
    codes = mxfp4.Blocks().unpack(jnp.asarray(blocks), 4)
    assert codes.shape == (32, 1)
    assert codes[8:14, 0].tolist() == [4, 4, 0xA, 0x3, 6, 6]


def test_scales_are_those_of_ml_dtypes():
    exponent = np.arange(256, dtype=np.uint8)
    expected = exponent.view(ml_dtypes.float8_e8m0fnu).astype(ml_dtypes.bfloat16)
    scale = mxfp4.E8M0(exponent=jnp.asarray(exponent).reshape(2, 128, 1))
    assert (scale.shape, scale.dtype) == ((2, 128, 1), jnp.bfloat16)
    same_bits(scale.decode().reshape(-1), expected)
    # The smallest is subnormal, and is kept.
    assert np.asarray(scale.decode())[0, 0, 0] == 2.0**-127


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizes_as_torchao(name):
    data = load(name)
    w = jnp.asarray(data["in_w"]).T
    qt = mxfp4.quantize(w)
    (n, k), written = data["in_w"].shape, mxfp4.to_tensors(qt)
    chex.assert_trees_all_equal(np.asarray(written["scales"]), data["scale"])
    packed = np.asarray(written["blocks"]).reshape(n, k // 2)
    chex.assert_trees_all_equal(packed, data["qdata"])
    same_bits(np.asarray(qjax.dequantize(qt)).T, data["out_dequant"])


@hypothesis.given(seed=st.integers(0, 2**16), shift=st.integers(-110, 110))
@hypothesis.settings(deadline=None, max_examples=20)
def test_quantizes_by_the_rule_of_the_specification(seed, shift):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((64, 3)) * 2.0**shift).astype(np.float32)
    blocks = w.reshape(2, 32, 3).astype(np.float64)
    scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(1))) - 2)
    scaled = np.clip(blocks / scale[:, None], -6, 6)
    values = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    qt = mxfp4.quantize(jnp.asarray(w))
    expected = (values * scale[:, None]).reshape(64, 3)
    chex.assert_trees_all_equal(np.asarray(qjax.dequantize(qt, jnp.float32)), expected)
    chex.assert_trees_all_equal(np.asarray(qt.scale.decode()).astype(np.float64), scale)


def test_quantizes_what_is_no_number_to_no_number():
    w = np.ones((96, 2), np.float32)
    w[3, 0], w[70, 1] = np.nan, np.inf
    exponent = np.asarray(mxfp4.quantize(jnp.asarray(w)).scale.exponent)
    assert (exponent == 255).tolist() == [[True, False], [False, False], [False, True]]


def test_quantizes_stacks():
    w = jax.random.normal(jax.random.key(0), (2, 3, 64, 5))
    stack, one = mxfp4.quantize(w), mxfp4.quantize(w[1, 2])
    assert stack.shape == (2, 3, 64, 5)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[1, 2], stack), one)
    # What was rounded once stays as it is.
    weight = qjax.dequantize(stack)
    chex.assert_trees_all_equal(mxfp4.quantize(weight), stack)


@hypothesis.given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@hypothesis.settings(deadline=None, max_examples=15)
def test_reads_any_shape(batch, n, groups, seed):
    tensors = random(seed, *batch, n, 32 * groups)
    qt = mxfp4.from_tensors(tensors)
    expected = dense(**tensors)
    assert qt.shape == expected.shape == (*batch, 32 * groups, n)
    same_bits(qjax.dequantize(qt, jnp.float32), expected)
    same_bits(qjax.dequantize(qt), expected.astype(ml_dtypes.bfloat16))
    written = {k: np.asarray(v) for k, v in mxfp4.to_tensors(qt).items()}
    chex.assert_trees_all_equal(written, tensors)


def test_pieces_are_matrices():
    """What `axes` promises: the same share of the blocks is a matrix by itself."""
    tensors = random(0, 4, 6, 64)
    axes = mxfp4.axes(tensors, mxfp4.Config())
    assert axes == {"blocks": ("b0", "n", "k", ""), "scales": ("b0", "n", "k")}
    share = {"b0": slice(2, 4), "n": slice(3, 6), "k": slice(1, 2), "": slice(None)}
    piece = {
        name: array[tuple(share[axis] for axis in axes[name])]
        for name, array in tensors.items()
    }
    whole = qjax.dequantize(mxfp4.from_tensors(tensors))
    same_bits(qjax.dequantize(mxfp4.from_tensors(piece)), whole[2:, 32:, 3:])
    # A block is not cut.
    assert mxfp4.axes(piece, mxfp4.Config())["scales"] == ("b0", "n", "")


def test_matmul_with_a_stack():
    rng = np.random.default_rng(0)
    tensors = random(1, 3, 48, 64)
    tensors["scales"] = rng.integers(120, 130, tensors["scales"].shape, dtype=np.uint8)
    qt = qjax.prepare(mxfp4.from_tensors(tensors))
    assert qt.layout in (gptq.Stream(), Tiles())
    x = rng.standard_normal((3, 5, 64)).astype(np.float32)
    y = jax.vmap(qjax.matmul)(jnp.asarray(x), qt)
    expected = x.astype(np.float64) @ dense(**tensors).astype(np.float64)
    # The project's bound for float32 activations.
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def test_jit_and_vmap():
    layout = mxfp4.Blocks()
    codes = np.random.default_rng(0).integers(0, 16, (2, 64, 3)).astype(np.int32)
    words = jax.jit(jax.vmap(functools.partial(layout.pack, bits=4)))(codes)
    chex.assert_trees_all_equal(words[1], layout.pack(jnp.asarray(codes[1]), 4))
    unpacked = jax.jit(jax.vmap(functools.partial(layout.unpack, bits=4)))(words)
    chex.assert_trees_all_equal(np.asarray(unpacked), codes.astype(np.uint8))
    # Higher bits of a code cannot damage its neighbour.
    chex.assert_trees_all_equal(layout.pack(jnp.asarray(codes[0]) + 16, 4), words[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mxfp4.Blocks().pack(jnp.zeros((32, 2), jnp.uint8), 3),
            "bits=3 must be 4",
        ),
        (
            lambda: mxfp4.Blocks().pack(jnp.zeros((48, 2), jnp.uint8), 4),
            "codes.shape[0]=48 must be a multiple of 32",
        ),
        (
            lambda: mxfp4.Blocks().unpack(jnp.zeros((2, 3, 8), jnp.uint8), 4),
            "words.shape=(2, 3, 8) must be [n, k / 32, 16]",
        ),
        (
            lambda: mxfp4.Blocks().unpack(jnp.zeros((2, 3, 16), jnp.int8), 4),
            "words.dtype=int8 must be uint8",
        ),
        (lambda: mxfp4.quantize(jnp.zeros(32)), "[..., k, n]; got float32(32,)"),
        (
            lambda: mxfp4.quantize(jnp.zeros((32, 2), jnp.int32)),
            "w must be bfloat16, float16 or float32 [..., k, n]; got int32(32, 2)",
        ),
        (
            lambda: mxfp4.quantize(jnp.zeros((2, 40, 2))),
            "w.shape[-2]=40 must be a multiple of 32",
        ),
    ],
)
def test_refuses(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": None}, "blocks is missing; found ['scales']"),
        ({"scales": None}, "scales is missing; found ['blocks']"),
        (
            {"bias": np.zeros(24)},
            "bias is no tensor of MXFP4; those are ['blocks', 'scales']",
        ),
        (
            {"blocks": np.zeros((3, 24, 5, 16), np.int8)},
            "blocks.dtype=int8 must be uint8",
        ),
        (
            {"scales": np.ones((3, 24, 5), np.float32)},
            "scales.dtype=float32 must be uint8",
        ),
        (
            {"blocks": np.zeros((24, 80), np.uint8)},
            "blocks.shape=(24, 80) must be [..., n, k / 32, 16]",
        ),
        (
            {"blocks": np.zeros((3, 24, 10, 8), np.uint8)},
            "blocks.shape=(3, 24, 10, 8) must be [..., n, k / 32, 16]",
        ),
        (
            {"blocks": np.zeros((3, 0, 5, 16), np.uint8)},
            "blocks.shape=(3, 0, 5, 16) must be [..., n, k / 32, 16], not empty",
        ),
        (
            {"scales": np.ones((3, 5, 24), np.uint8)},
            "scales.shape=(3, 5, 24) must be (3, 24, 5), from blocks.shape=(3, 24, 5, ",
        ),
        (
            {"scales": np.full((3, 24, 5), 255, np.uint8)},
            "scales holds 360 times 255, which is not a number",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    with refuses(message):
        mxfp4.from_tensors(tensors_of(load(RANDOM), **changes))


def test_check_reads_no_values():
    tensors = tensors_of(load(RANDOM), scales=np.full((3, 24, 5), 255, np.uint8))
    mxfp4.check(tensors, mxfp4.Config())


# As gpt-oss has it.
DENSE = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
DENSE += ["model.embed_tokens", "lm_head"]
ENTRY = {"quant_method": "mxfp4", "modules_to_not_convert": DENSE}


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        (ENTRY, mxfp4.Config(ignored=tuple(DENSE))),
        ({"quant_method": "mxfp4"}, mxfp4.Config()),
        ({"modules_to_not_convert": None}, mxfp4.Config()),
    ],
)
def test_config_from_json(entry, config):
    assert mxfp4.Config.from_json(entry) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' must be 'mxfp4'"),
        (
            {"modules_to_not_convert": "lm_head"},
            "modules_to_not_convert='lm_head' must be a list of strings",
        ),
        (
            {"modules_to_not_convert": [1]},
            "modules_to_not_convert=[1] must be a list",
        ),
        (
            {"modules_to_not_convert": ["("]},
            "modules_to_not_convert: '(' is no pattern",
        ),
        (
            {"modules_to_not_convert": ["(a+)+b"]},
            "modules_to_not_convert: '(a+)+b' repeats a group",
        ),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        mxfp4.Config.from_json(entry)


@pytest.mark.parametrize(
    ("pattern", "is_dense"),
    [
        ("lm_head", False),
        ("model.layers.0", True),
        ("model.layers.*.mlp.router", False),
        ("model.layers.*.mlp.exp", False),  # a pattern ends where a name ends
        ("model.layers.*.mlp.experts", True),
        ("experts", True),  # the end of the path of the experts
        ("down_proj", True),
        ("layers.0", False),
    ],
)
def test_config_of_a_matrix(pattern, is_dense):
    config = mxfp4.Config(ignored=(pattern,))
    found = config.of("model.layers.0.mlp.experts.down_proj")
    assert found is (None if is_dense else config)
    assert config.of("model.layers.11.mlp") is config


class TestWriting:
    """What `to_tensors` makes of other forms, and what it refuses."""

    def matrix(self, as_qtensor, *, scale: float = 2.0**-5, **changes):
        """A tensor that MXFP4 holds, with changes."""
        m = oracle.random(0, 64, 32, **{"affine": "FLOAT"} | changes)
        return as_qtensor(dataclasses.replace(m, scale=np.full_like(m.scale, scale)))

    def test_powers_of_two_from_elsewhere(self, as_qtensor):
        qt = self.matrix(as_qtensor)
        written = {k: np.asarray(v) for k, v in mxfp4.to_tensors(qt).items()}
        assert (written["scales"] == 122).all()
        weight = qjax.dequantize(mxfp4.from_tensors(written), jnp.float32)
        chex.assert_trees_all_equal(weight, qjax.dequantize(qt, jnp.float32))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"order": True}, "it has an order of rows or an input scale; GPTQ holds"),
            ({"row_group": True}, "it has an order of rows or an input scale"),
            ({"input_scale": True}, "it has an order of rows or an input scale"),
            ({"affine": "ZERO"}, "its codes are not E2M1 floats; quantize makes them"),
            ({"columns": 1}, "k=64 is not whole blocks, or columns share scales"),
            ({"group_size": 16}, "its scales are not for blocks of 32 inputs"),
            ({"grouping": "STRIDED"}, "its scales are not for blocks of 32 inputs"),
            ({"bits": 8}, "its codes have other widths than 4"),
            ({"parts": [(4, 32, 32)] * 2}, "its codes have other widths"),
            ({"scale": 3.0}, "its scales are no powers of two"),
            ({"scale": -1.0}, "its scales are no powers of two"),
            ({"scale": 0.0}, "its scales are no powers of two"),
            ({"scale": np.nan}, "its scales are no powers of two"),
            ({"scale": np.inf}, "its scales are no powers of two"),
        ],
    )
    def test_refuses(self, changes, reason, refuses, as_qtensor):
        with refuses(reason):
            mxfp4.to_tensors(self.matrix(as_qtensor, **changes))

    def test_refuses_other_tables(self, refuses, as_qtensor):
        qt = as_qtensor(oracle.random(0, 64, 32, affine="CODEBOOK"))
        with refuses("its codes are not E2M1 floats"):
            mxfp4.to_tensors(qt)

    @pytest.mark.parametrize("power", [-127, 127])
    def test_the_smallest_and_the_largest_scale(self, power):
        tensors = random(0, 3, 64) | {"scales": np.full((3, 2), power + 127, np.uint8)}
        qt = qjax.prepare(mxfp4.from_tensors(tensors))
        assert not isinstance(qt.scale, tensor.Encoded)
        written = {k: np.asarray(v) for k, v in mxfp4.to_tensors(qt).items()}
        chex.assert_trees_all_equal(written, tensors)

    def test_refuses_a_scale_below_the_smallest(self, refuses):
        qt = qjax.prepare(mxfp4.from_tensors(random(0, 3, 64)))
        low = np.full(qt.scale.shape, 2.0**-128, ml_dtypes.bfloat16)
        qt = dataclasses.replace(qt, scale=jnp.asarray(low))
        with refuses("its scales are no powers of two"):
            mxfp4.to_tensors(qt)


@pytest.mark.parametrize(
    ("joint", "layer"),
    [("_", "model.layers.0.mlp.experts."), (".", "block.0.mlp.")],
    ids=["transformers", "openai"],
)
def test_a_directory_with_experts(tmp_path, joint, layer):
    """As gpt-oss lays it out, in transformers' names and in openai's own."""
    stacks = {
        f"{layer}gate_up_proj": random(2, 4, 64, 96),
        f"{layer}down_proj": random(3, 4, 96, 32),
    }
    others = {
        f"{layer}gate_up_proj_bias": np.ones((4, 64), ml_dtypes.bfloat16),
        f"{layer}router.weight": np.ones((4, 96), ml_dtypes.bfloat16),
        "lm_head.weight": np.ones((7, 96), ml_dtypes.bfloat16),
    }
    stored = {
        f"{module}{joint}{name}": array
        for module, tensors in stacks.items()
        for name, array in tensors.items()
    }
    save_file(stored | others, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": ENTRY}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = qjax.checkpoints.load(tmp_path, prepare=False)
    assert weights.keys() == stacks.keys() | others.keys()
    for module, tensors in stacks.items():
        same_bits(qjax.dequantize(weights[module], jnp.float32), dense(**tensors))
        written = {
            k: np.asarray(v) for k, v in mxfp4.to_tensors(weights[module]).items()
        }
        chex.assert_trees_all_equal(written, tensors)
    assert qjax.checkpoints.verify(tmp_path) == []
