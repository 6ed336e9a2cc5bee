"""HQQ against layers that hqq saved, bit for bit."""

import collections
import dataclasses
import functools
import warnings

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import gptq, hqq
from qjax.formats.tiles import Tiles
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("hqq")
BITPACK = [name for name in FILES if name.startswith("hqq_bitpack")]
LAYERS = [name for name in FILES if name.startswith("hqq_layer")]
FIELDS = {1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}


def tensors_of(data: dict, **changes) -> dict:
    """The saved layer without its bias; ``changes`` of None leave a tensor out."""
    names = {name.removeprefix("state_"): name for name in data if "state_" in name}
    tensors = {short: data[name] for short, name in names.items() if short != "bias"}
    return {k: v for k, v in (tensors | changes).items() if v is not None}


def entry_of(data: dict) -> dict:
    """The ``quantization_config`` that transformers writes for such layers."""
    config = data["config"]
    weight = {
        "nbits": config["bits"],
        **{k: config[k] for k in ("group_size", "axis", "optimize", "view_as_float")},
        "channel_wise": True,
        "round_zero": bool(data["state_round_zero"]),
    }
    quant = {"weight_quant_params": weight, "scale_quant_params": None}
    quant |= {"zero_quant_params": None, "offload_meta": False}
    return {"quant_method": "hqq", "quant_config": quant, "skip_modules": ["lm_head"]}


def config_of(data: dict) -> hqq.Config:
    return hqq.Config.from_json(entry_of(data))


def slabs(view, bits):
    """Words of a grouped matrix, element by element, from the specification."""
    rows, columns = view.shape
    height = -(-rows // FIELDS[bits])
    words = np.zeros((height, columns), np.int64)
    for r in range(rows):
        slab = FIELDS[bits] - 1 - r // height
        words[r % height] |= view[r].astype(np.int64) << bits * slab
    return words.astype(np.uint32 if bits == 3 else np.uint8)


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {"hqq_bitpack": 11, "hqq_layer": 10}


@pytest.mark.parametrize("name", BITPACK)
def test_packs_and_unpacks(name):
    data = load(name)
    bits = data["config"]["bits"]
    words = hqq.pack_slabs(jnp.asarray(data["in_q"]), bits)
    assert words.dtype == (jnp.uint32 if bits == 3 else jnp.uint8)
    chex.assert_trees_all_equal(
        np.asarray(words).view(data["packed"].dtype), data["packed"]
    )
    codes = hqq.unpack_slabs(jnp.asarray(data["packed"]), bits)
    chex.assert_trees_all_equal(np.asarray(codes), data["out_unpacked"])


@pytest.mark.parametrize("name", LAYERS)
def test_reads_and_dequantizes(name):
    data = load(name)
    qt = hqq.from_tensors(tensors_of(data), config_of(data))
    n, k = data["in_w"].shape
    assert qt.shape == (k, n)
    assert qt.dtype == data["config"]["compute_dtype"]
    rows, columns = (n * k // data["config"]["group_size"],) * 2
    view = (rows, -1) if data["config"]["axis"] else (-1, columns)
    codes = np.asarray(qjax.codes(qt)).T.reshape(view)
    # The package's codes go on with the rows that fill up the words.
    chex.assert_trees_all_equal(codes, data["out_unpacked"][: len(codes)])
    for leaf in ("scale", "zero"):
        stored = np.asarray(getattr(qt, leaf)).T.reshape(data[f"state_{leaf}"].shape)
        assert stored.tobytes() == data[f"state_{leaf}"].tobytes()
    weight = np.asarray(qjax.dequantize(qt)).T
    assert weight.dtype == data["out_dequant"].dtype
    chex.assert_trees_all_equal(
        weight.view(np.uint16), data["out_dequant"].view(np.uint16)
    )


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_writes_the_same_bytes(name, prepare):
    data, config = load(name), config_of(load(name))
    qt = hqq.from_tensors(tensors_of(data), config)
    qt = qjax.prepare(qt) if prepare else qt
    assert isinstance(qt.layout, gptq.Stream | Tiles if prepare else hqq.Slabs)
    same_bits(hqq.to_tensors(qt, config), tensors_of(data))


@pytest.mark.parametrize("name", [name for name in LAYERS if "_b3_" in name])
def test_matmul(name):
    data = load(name)
    qt = qjax.prepare(hqq.from_tensors(tensors_of(data), config_of(data)))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    if data["config"]["axis"] == 0:
        assert qt.grouping is tensor.Grouping.STRIDED
        with warnings.catch_warnings():
            # Strided groups have no native path, of which matmul warns once.
            warnings.simplefilter("ignore", UserWarning)
            y = qjax.matmul(jnp.asarray(x), qt)
    else:
        assert qt.grouping is tensor.Grouping.ROWS
        y = qjax.matmul(jnp.asarray(x), qt)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def random_layer(n, k, config, dtype=np.float16, seed=0):
    """A saved layer made element by element, and its codes [n, k]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**config.bits, (n, k)).astype(np.uint8)
    size = config.group_size or (k if config.axis else n)
    view = (-1, size) if config.axis else (size, -1)
    grouped = codes.reshape(view)
    words = slabs(grouped, config.bits)
    shape = (len(grouped), 1) if config.axis else (1, grouped.shape[1])
    tensors = {
        "W_q": words.view(np.int32) if config.bits == 3 else words,
        "scale": rng.uniform(0.01, 0.03, shape).astype(dtype),
        "zero": rng.uniform(0, 2**config.bits, shape).astype(dtype),
        "shape": np.array([n, k]),
    }
    return tensors, codes


@pytest.mark.parametrize(
    ("n", "k", "config", "grouping"),
    [
        (8, 40, hqq.Config(group_size=16), "FLAT"),
        (3, 20, hqq.Config(group_size=30), "FLAT"),  # groups cross rows
        (7, 18, hqq.Config(nbits=3, group_size=9), "ROWS"),
        (9, 10, hqq.Config(nbits=3, group_size=45, axis=0), "STRIDED"),
        (6, 20, hqq.Config(group_size=None), "ROWS"),
        (6, 20, hqq.Config(group_size=None, axis=0), "STRIDED"),
        (8, 6, hqq.Config(nbits=1, group_size=3), "ROWS"),
        (5, 8, hqq.Config(nbits=6, group_size=10, axis=0), "STRIDED"),
    ],
)
def test_odd_groups(n, k, config, grouping):
    tensors, codes = random_layer(n, k, config, np.float32)
    qt = hqq.from_tensors(tensors, config)
    assert qt.shape == (k, n)
    assert qt.grouping is tensor.Grouping[grouping]
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), codes.T)
    size = config.group_size or (k if config.axis else n)
    grouped = codes.reshape((-1, size) if config.axis else (size, -1))
    weight = (grouped - tensors["zero"]) * tensors["scale"]
    weight = weight.reshape(n, k).T
    chex.assert_trees_all_equal(np.asarray(qjax.dequantize(qt)), weight)
    written = hqq.to_tensors(qt, config)
    same_bits({name: written[name] for name in tensors}, tensors)
    assert ("group_size" in written) == (config.group_size is not None)


@hypothesis.given(
    bits=st.sampled_from(sorted(FIELDS)),
    group_size=st.integers(1, 12),
    axis=st.sampled_from([0, 1]),
    blocks=st.integers(1, 4),
    n=st.integers(1, 6),
)
@hypothesis.settings(deadline=None, max_examples=10)
def test_round_trips(bits, group_size, axis, blocks, n):
    # Whole words: along the groups for axis 1, along a group for axis 0.
    group_size *= 1 if axis or bits == 3 else FIELDS[bits]
    k = group_size * blocks * (1 if not axis or bits == 3 else FIELDS[bits])
    codes = np.random.default_rng(n).integers(0, 2**bits, (k, n)).astype(np.uint8)
    layout = hqq.Slabs(k, group_size, axis)
    words = layout.pack(jnp.asarray(codes), bits)
    view = codes.T.reshape((-1, group_size) if axis else (group_size, -1))
    chex.assert_trees_all_equal(np.asarray(words), slabs(view, bits))
    assert layout.extents(words.shape, bits)[0] == k
    unpacked = layout.unpack(words, bits)
    assert unpacked.shape == layout.extents(words.shape, bits)
    chex.assert_trees_all_equal(np.asarray(unpacked)[:, :n], codes)
    assert not np.asarray(unpacked)[:, n:].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3])
def test_jit_vmap_and_signed_words(bits, axis):
    layout = hqq.Slabs(16, 8, axis)
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 16, 4)).astype(np.int32)
    pack = functools.partial(layout.pack, bits=bits)
    words = jax.jit(jax.vmap(pack))(codes)
    chex.assert_trees_all_equal(words[1], layout.pack(jnp.asarray(codes[1]), bits))
    if bits == 3:
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
        top = hqq.unpack_slabs(jnp.full((1, 1), -1, jnp.int32), 3)
        assert np.asarray(top).tolist() == [[7]] * 10
    unpacked = jax.jit(jax.vmap(functools.partial(layout.unpack, bits=bits)))(words)
    chex.assert_trees_all_equal(np.asarray(unpacked)[:, :, :4], codes.astype(np.uint8))


def test_words_worked_by_hand():
    # Six rows of one column: in 4 bits, three words whose high nibbles are the first
    # three rows; in 3 bits, one word from bit 27 down, and four rows of zeros.
    view = jnp.arange(1, 7, dtype=jnp.uint8)[:, None]
    words = hqq.pack_slabs(view, 4)[:, 0]
    assert [hex(word) for word in words] == ["0x14", "0x25", "0x36"]
    assert bin(hqq.pack_slabs(view, 3)[0, 0]) == "0b1010011100101110" + 12 * "0"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4])
def test_relayout_to_the_stream_and_back(bits, axis):
    config = hqq.Config(nbits=bits, group_size=64, axis=axis)
    qt = hqq.from_tensors(random_layer(10, 64, config)[0], config)
    stream = qjax.relayout(qt, gptq.Stream())
    assert stream.shape == qt.shape
    assert stream.padding == 0
    chex.assert_trees_all_equal(qjax.dequantize(stream), qjax.dequantize(qt))
    chex.assert_trees_all_equal(qjax.relayout(stream, qt.layout), qt)


def test_a_stack_of_matrices():
    config = hqq.Config(nbits=3, group_size=32)
    layers = [
        hqq.from_tensors(random_layer(3, 64, config, seed=seed)[0], config)
        for seed in range(2)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stack.shape == (2, 64, 3)
    weights = jnp.stack([qjax.dequantize(layer) for layer in layers])
    chex.assert_trees_all_equal(qjax.dequantize(stack), weights)


@pytest.mark.parametrize(("bits", "rows"), [(1, 12), (1, 1), (2, 6), (4, 1), (4, 7)])
def test_rows_that_the_original_loses_are_refused(bits, rows, refuses):
    wanted = (
        f"view.shape[0]={rows} must be a multiple of {FIELDS[bits]}, the {bits}-bit"
    )
    with refuses(wanted):
        hqq.pack_slabs(jnp.zeros((rows, 4), jnp.uint8), bits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: hqq.pack_slabs(jnp.zeros((8, 1), jnp.uint8), 7),
            "bits=7 must be 1, 2, 3, 4, 5, 6 or 8 in HQQ; gptq.Stream() holds 1 to 8",
        ),
        (
            lambda: hqq.unpack_slabs(jnp.zeros((8, 1), jnp.uint8), 3),
            "words.dtype=uint8 must be int32 or uint32",
        ),
        (
            lambda: hqq.unpack_slabs(jnp.zeros((8, 1), jnp.int32), 4),
            "words.dtype=int32 must be uint8",
        ),
        (
            lambda: hqq.Slabs(8, 3).pack(jnp.zeros((8, 2), jnp.uint8), 4),
            "codes.shape=(8, 2) must be [k=8, n] with k * n a multiple of 2 times "
            "group_size=3",
        ),
        (
            lambda: hqq.Slabs(8, 4).pack(jnp.zeros((4, 2), jnp.uint8), 4),
            "codes.shape=(4, 2) must be [k=8, n]",
        ),
        (
            lambda: hqq.Slabs(8, 4).unpack(jnp.zeros((2, 8), jnp.uint8), 4),
            "words.shape=(2, 8) must be [2, 4] for 2 codes a word and group_size=4 on "
            "axis 1",
        ),
        (
            lambda: hqq.Slabs(8, 4, 0).unpack(jnp.zeros((4, 8), jnp.uint8), 4),
            "words.shape=(4, 8) must be [2, 8] for 2 codes a word and group_size=4 on "
            "axis 0",
        ),
        (
            lambda: hqq.Slabs(8, 3, 0).unpack(jnp.zeros((2, 8), jnp.uint8), 4),
            "words.shape=(2, 8) must be",
        ),
    ],
)
def test_layouts_refuse(call, message, refuses):
    with refuses(message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_q": None}, "W_q is missing; found ['axis', 'channel_wise'"),
        ({"shape": None}, "shape is missing"),
        ({"scale_q": np.zeros(1)}, "scale_q is no tensor of HQQ"),
        (
            {"scale": np.ones((32, 1))},
            "scale.dtype=float64 must be float16 or bfloat16",
        ),
        ({"zero": np.ones((32, 1), np.float32)}, "zero.dtype=float32 must be float16"),
        ({"zero": np.ones((32, 2), np.float16)}, "zero.shape=(32, 2) must be (32, 1)"),
        (
            {"scale": np.ones((1, 32), np.float16)},
            "scale.shape=(1, 32) must be (32, 1)",
        ),
        ({"W_q": np.zeros((16, 64), np.int32)}, "W_q.dtype=int32 must be uint8"),
        ({"W_q": np.zeros((16, 32), np.uint8)}, "columns of W_q=32 must be 64"),
        ({"W_q": np.zeros((15, 64), np.uint8)}, "scale.shape=(32, 1) must be (30, 1)"),
        (
            {"W_q": np.zeros((0, 64), np.uint8)},
            "W_q.shape=(0, 64) must not be empty",
        ),
        ({"W_q": np.zeros(64, np.uint8)}, "W_q.shape=(64,) must have 2 axes"),
        ({"nbits": np.float32(4)}, "nbits.dtype=float32 must be int32"),
        ({"nbits": np.int32(2)}, "nbits=2 must be 4, as the configuration"),
        ({"axis": np.int32(0)}, "axis=0 must be 1, as the configuration"),
        ({"group_size": np.int32(32)}, "group_size=32 must be 64"),
        ({"optimize": np.uint8(1)}, "optimize=1 must be 0"),
        ({"quant_zero": np.uint8(1)}, "quant_zero=1 must be 0"),
        (
            {"packing": np.frombuffer(b"2bit_u8", np.uint8)},
            "packing=2bit_u8 must be 4bit_u8, as the configuration",
        ),
        (
            # The original evaluates this string.
            {"unpack_view_dtype": np.frombuffer(b"os.abort( )", np.uint8)},
            "unpack_view_dtype=os.abort( ) must be torch.uint8",
        ),
        (
            {"compute_dtype": np.frombuffer(b"torch.float32", np.uint8)},
            "compute_dtype=torch.float32 must be torch.float16",
        ),
        (
            {"compute_dtype": np.frombuffer(b"torch.half", np.uint8)},
            "compute_dtype.shape=(10,) must be (13,)",
        ),
        ({"shape": np.array([16, 64])}, "shape=[16, 64] must have 32 groups of 64"),
        ({"shape": np.array([-16, -128])}, "shape=[-16, -128] must have 32 groups"),
        ({"shape": np.array([16, 128], np.int32)}, "shape.dtype=int32 must be int64"),
        ({"scale": np.full((32, 1), np.nan, np.float16)}, "scale must be finite"),
        ({"zero": np.full((32, 1), np.inf, np.float16)}, "zero must be finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    data = load("hqq_layer__b4_g64_axis1_float16__16x128__s640")
    with refuses(message):
        hqq.from_tensors(tensors_of(data, **changes), config_of(data))


def test_other_tensors_that_do_not_fit_are_refused(refuses):
    config = hqq.Config(nbits=5, group_size=64)
    tensors, _ = random_layer(8, 64, config)
    with refuses("W_q has codes of more than 5 bits"):
        hqq.from_tensors(tensors | {"W_q": np.full((8, 64), 32, np.uint8)}, config)
    config = hqq.Config(nbits=3, group_size=20, axis=0)
    tensors, _ = random_layer(4, 10, config)
    with refuses("W_q has codes of more than 3 bits"):
        hqq.from_tensors(tensors | {"W_q": np.full((2, 2), -1, np.int32)}, config)
    with refuses("rows of W_q=3 must be 2"):
        hqq.from_tensors(tensors | {"W_q": np.zeros((3, 2), np.int32)}, config)
    config = hqq.Config(nbits=3, group_size=16)
    tensors, _ = random_layer(4, 64, config)
    with refuses("scale.shape=(16, 1) must be (30, 1)"):
        hqq.from_tensors(tensors | {"W_q": np.zeros((3, 16), np.int32)}, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nbits": 7}, "nbits=7 must be one of (8, 6, 5, 4, 3, 2, 1.58, 1)"),
        ({"axis": 2}, "axis=2 must be one of (0, 1)"),
    ],
)
def test_unknown_configurations_are_refused(changes, message, refuses):
    config = hqq.Config(group_size=32)
    tensors, _ = random_layer(8, 64, config)
    qt = hqq.from_tensors(tensors, config)
    with refuses(message):
        hqq.from_tensors(tensors, dataclasses.replace(config, **changes))
    with refuses(message):
        hqq.to_tensors(qt, dataclasses.replace(config, **changes))


def test_check_reads_no_values():
    data = load("hqq_layer__b4_g64_axis1_float16__16x128__s640")
    heads = jax.tree.map(
        lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape),
        tensors_of(data),
    )
    hqq.check(heads, config_of(data))
    needed = {name: heads[name] for name in ("W_q", "scale", "zero", "shape")}
    hqq.check(needed, config_of(data))


ENTRY = {"nbits": 4, "group_size": 64, "axis": 1}


@pytest.mark.parametrize(
    ("weight", "config"),
    [
        (ENTRY, hqq.Config()),
        (
            ENTRY | {"nbits": 1.58, "optimize": False, "round_zero": True},
            hqq.Config(nbits=1.58, optimize=False, round_zero=True),
        ),
        (
            {"nbits": 8, "group_size": None},
            hqq.Config(nbits=8, group_size=None, axis=0),
        ),
        (ENTRY | {"view_as_float": True}, hqq.Config(view_as_float=True)),
    ],
)
def test_config_from_json(weight, config):
    entry = {"quant_config": {"weight_quant_params": weight}}
    assert hqq.Config.from_json(entry) == config
    assert config.of("model.layers.0.mlp.up_proj") is config


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({}, "nbits=None must be one of (8, 6, 5, 4, 3, 2, 1.58, 1)"),
        (ENTRY | {"nbits": 7}, "nbits=7 must be one of"),
        (ENTRY | {"nbits": True}, "nbits=True must be one of"),
        (ENTRY | {"nbits": "4"}, "nbits='4' must be one of"),
        (ENTRY | {"axis": 2}, "axis=2 must be 0 or 1"),
        (ENTRY | {"group_size": -1}, "group_size=-1 must be positive or null"),
        (ENTRY | {"group_size": True}, "group_size=True must be positive or null"),
        (
            ENTRY | {"nbits": 3, "group_size": None},
            "group_size=null with nbits=3, which HQQ cannot unpack",
        ),
        (ENTRY | {"optimize": 1}, "optimize=1 must be true or false"),
        (ENTRY | {"channel_wise": False}, "channel_wise=false, one scale a matrix"),
        ([4], "weight_quant_params=[4] must be an object"),
    ],
)
def test_config_refuses(weight, message, refuses):
    with refuses(message):
        hqq.Config.from_json({"quant_config": {"weight_quant_params": weight}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "quant_config=None must be an object"),
        ({"quant_config": {}}, "quant_config={} must be an object"),
        (
            {"skip_modules": "lm_head"},
            "skip_modules='lm_head' must be a list of strings",
        ),
        ({"skip_modules": [1]}, "skip_modules=[1] must be a list of strings"),
        (
            {"quant_config": {"weight_quant_params": ENTRY, "scale_quant_params": {}}},
            "scale_quant_params={} must be null",
        ),
        (
            {"quant_config": {"mlp.up_proj": 3}},
            "quant_config['mlp.up_proj'] has no weight_quant_params",
        ),
    ],
)
def test_config_refuses_whole_entries(entry, message, refuses):
    with refuses(message):
        hqq.Config.from_json(entry)


def test_config_of_a_module():
    data = load("hqq_layer__b4_g64_axis1_float16__16x128__s640")
    config = config_of(data)
    assert config.of("lm_head") is None
    assert config.of("model.layers.3.mlp.up_proj") is config
    tagged = {
        "self_attn.q_proj": {"weight_quant_params": ENTRY},
        "mlp.up_proj": {"weight_quant_params": ENTRY | {"nbits": 2}},
    }
    config = hqq.Config.from_json(
        {"quant_config": tagged, "skip_modules": ["model.layers.1.mlp.up_proj"]}
    )
    assert config.of("model.layers.0.self_attn.q_proj") == hqq.Config()
    assert config.of("model.layers.11.mlp.up_proj") == hqq.Config(nbits=2)
    assert config.of("model.layers.1.mlp.up_proj") is None
    assert config.of("model.layers.0.mlp.down_proj") is None


class TestWriting:
    """What `to_tensors` makes of other forms, and what it refuses."""

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("group_size", [32, None])
    def test_quantized_by_rounding(self, symmetric, group_size):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float16)
        qt = qjax.quantize(w, 4, group_size, symmetric)
        written = hqq.to_tensors(qt)
        config = hqq.Config(group_size=group_size or 64)
        back = hqq.from_tensors(
            {name: np.asarray(array) for name, array in written.items()}, config
        )
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    @pytest.mark.parametrize(
        ("changes", "config", "reason"),
        [
            ({"order": True}, None, "it has an order of rows or an input scale; GPTQ"),
            ({"input_scale": True}, None, "it has an order of rows or an input scale"),
            ({"row_group": True}, None, "it has an order of rows or an input scale"),
            ({"affine": "OFFSET"}, None, "q * s + z has no zero in units of codes"),
            ({"affine": "CODEBOOK"}, None, "codebook[q] * s has no zero in units"),
            ({"affine": "CENTERED", "float_zero": True}, None, "has no zero in units"),
            ({"columns": 1}, None, "columns share scales or zeros"),
            ({"bits": 7}, None, "7 bits are not among (1, 2, 3, 4, 5, 6, 8)"),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                None,
                "its rows have several widths",
            ),
            ({}, hqq.Config(nbits=8), "it has 4 bits, config has nbits=8"),
            ({}, hqq.Config(), "its groups are rows of 32, config says rows of 64"),
            (
                {"grouping": "STRIDED"},
                hqq.Config(group_size=32),
                "its groups are strided of 32, config says rows of 32",
            ),
            ({"group_size": 48}, None, "its groups are rows of 48, config says flat"),
            (
                {"group_size": 33, "grouping": "FLAT"},
                None,
                "its last group is shorter than the others",
            ),
        ],
    )
    def test_refuses(self, changes, config, reason, refuses, as_qtensor):
        with refuses(reason):
            hqq.to_tensors(as_qtensor(oracle.random(0, 64, 32, **changes)), config)

    def test_refuses_stacks(self, refuses):
        stack = qjax.quantize(jnp.ones((2, 64, 32)), group_size=32)
        with refuses("it stacks (2,) matrices; write them one by one"):
            hqq.to_tensors(stack)

    def test_refuses_floats_of_odd_bytes(self, refuses):
        config = hqq.Config(group_size=9, view_as_float=True)
        plain = hqq.Config(group_size=9)
        qt = hqq.from_tensors(random_layer(2, 9, plain)[0], plain)
        with refuses(
            "view_as_float=True: 9 bytes a row of words are not whole float16"
        ):
            hqq.to_tensors(qt, config)
