"""compressed-tensors against files that two generations of it wrote, bit for bit."""

import collections

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import tensor
from qjax.formats import compressed_tensors as ct
from qjax.formats import gptq
from tests import goldens, oracle
from tests.goldens import load

FILES = [n for n in goldens.names("compressed_tensors") if n[:7] != "ctfloat"]
PACKED = [name for name in FILES if "pack_int32" in name]
STORED = [name for name in FILES if "packquant" in name]
ACT_ORDER = [name for name in STORED if "_gidx_" in name]
CODECS = {
    "ct": (ct.pack_dense, ct.unpack_dense),
    "ctold": (ct.pack_aligned, ct.unpack_aligned),
}


def config_of(name: str) -> ct.Config:
    config = load(name)["config"]
    grouped = config["strategy"] == "group"
    return ct.Config(
        bits=config["bits"],
        strategy=config["strategy"],
        group_size=config["group_size"] if grouped else None,
        symmetric=config["symmetric"],
        act_order=name in ACT_ORDER,
        aligned=name.startswith("ctold"),
    )


def tensors_of(name: str) -> dict:
    return {
        key.removeprefix("state_"): array
        for key, array in load(name).items()
        if key.startswith("state_")
    }


def arrays(tensors: dict) -> dict:
    return {name: np.asarray(array) for name, array in tensors.items()}


def pack_aligned(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, k] to words, ``32 // bits`` a word, an element at a time."""
    (n, k), per_word = codes.shape, 32 // bits
    words = np.zeros((n, -(-k // per_word)), np.uint32)
    for row, column in np.ndindex(n, k):
        word, field = divmod(column, per_word)
        words[row, word] |= np.uint32(int(codes[row, column]) << (bits * field))
    return words


def pack_dense(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, k] to a stream that ends in the word that its last bit needs."""
    (n, k), whole = codes.shape, -(-codes.shape[1] // 32) * 32
    padded = np.zeros((n, whole), codes.dtype)
    padded[:, :k] = codes
    return oracle.pack(padded, bits, 1)[:, : -(-k * bits // 32)]


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {
        **{"ct_pack_int32": 22, "ct_packquant": 11},
        **{"ctold_pack_int32": 6, "ctold_packquant": 3},
    }
    assert len(ACT_ORDER) == 2


@pytest.mark.parametrize("name", PACKED)
def test_packs_and_unpacks_the_same_words(name):
    data, config = load(name), load(name)["config"]
    bits, axis = config["bits"], config["packed_dim"]
    pack, unpack = CODECS[name.split("_")[0]]
    codes = (data["in_q"].astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    words = np.asarray(pack(jnp.asarray(codes), bits, axis)).view(np.int32)
    chex.assert_trees_all_equal(words, data["packed"])
    unpacked = np.asarray(unpack(jnp.asarray(words), bits, axis))
    rows, columns = codes.shape
    chex.assert_trees_all_equal(unpacked[:rows, :columns], codes)
    assert not unpacked[rows:].any()
    assert not unpacked[:, columns:].any()
    # The package's own unpacking fails on four bits along dimension 0 here.
    assert ("out_unpacked" in data) == ("__b4_dim0__" not in name)
    if "out_unpacked" in data:
        chex.assert_trees_all_equal(data["out_unpacked"], data["in_q"])


@pytest.mark.parametrize("name", STORED)
def test_reads_and_dequantizes(name):
    data, config = load(name), config_of(name)
    qt = ct.from_tensors(tensors_of(name), config)
    k, n = qt.shape
    assert (n, k) == tuple(data["state_weight_shape"])
    assert (qt.row_group is not None) == (name in ACT_ORDER)
    if "out_q" in data:
        codes = np.asarray(qjax.codes(qt)).T.astype(np.int16) - 2 ** (config.bits - 1)
        chex.assert_trees_all_equal(codes, data["out_q"].astype(np.int16))
    if "in_zero_point" in data:
        zeros = np.asarray(qt.zero).T.astype(np.int16) - 2 ** (config.bits - 1)
        chex.assert_trees_all_equal(zeros, data["in_zero_point"].astype(np.int16))
    assert (qt.zero is None) == config.symmetric
    weight = np.asarray(qjax.dequantize(qt)).T
    chex.assert_trees_all_equal(weight, data["out_dequant"])


@pytest.mark.parametrize("name", STORED)
def test_writes_the_same_tensors(name):
    qt = ct.from_tensors(tensors_of(name), config_of(name))
    chex.assert_trees_all_equal(arrays(ct.to_tensors(qt)), tensors_of(name))


@pytest.mark.parametrize("name", ACT_ORDER)
def test_writes_the_same_tensors_after_prepare(name):
    file = ct.from_tensors(tensors_of(name), config_of(name))
    qt = qjax.prepare(file)
    assert qt.row_group is None
    assert qt.order is not None
    chex.assert_trees_all_equal(qjax.dequantize(qt), qjax.dequantize(file))
    chex.assert_trees_all_equal(arrays(ct.to_tensors(qt)), tensors_of(name))


@pytest.mark.parametrize("index", ["unused", "in order"])
def test_an_index_that_says_nothing_is_dropped(index):
    name = ACT_ORDER[0]
    g_idx = np.arange(128, dtype=np.int32) // 32
    if index == "unused":
        g_idx = np.random.default_rng(0).permutation(g_idx)
        g_idx[
            17
        ] = -1  # one entry is enough: upstream then takes the columns as they are
    tensors = tensors_of(name) | {"weight_g_idx": g_idx}
    qt = ct.from_tensors(tensors, config_of(name))
    assert qt.row_group is None
    del tensors["weight_g_idx"]
    chex.assert_trees_all_equal(arrays(ct.to_tensors(qt)), tensors)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 7])
def test_both_generations_are_told_apart(bits, symmetric, aligned):
    rng = np.random.default_rng(bits)
    n, k = 40, 96
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, (n, 3)).astype(np.uint8)
    pack = pack_aligned if aligned else pack_dense
    tensors = {
        "weight_packed": pack(codes, bits).view(np.int32),
        "weight_scale": rng.uniform(0.01, 0.02, (n, 3)).astype(np.float16),
        "weight_shape": np.array([n, k], np.int32),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(zeros.T, bits).T.view(np.int32).copy()
    # Whatever the writer's version, the shapes decide.
    config = ct.Config(
        bits=bits, group_size=32, symmetric=symmetric, aligned=not aligned
    )
    qt = ct.from_tensors(tensors, config)
    assert qt.layout == (ct.Aligned() if aligned else ct.Dense())
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), codes.T)
    if not symmetric:
        chex.assert_trees_all_equal(np.asarray(qt.zero), zeros.T)
    written = arrays(ct.to_tensors(qt))
    assert written.pop("weight_shape").dtype == np.int64
    del tensors["weight_shape"]
    chex.assert_trees_all_equal(written, tensors)
    other = ct.Dense() if aligned else ct.Aligned()
    moved = ct.from_tensors(ct.to_tensors(qt, other), config)
    assert moved.layout == other
    chex.assert_trees_all_equal(qjax.dequantize(moved), qjax.dequantize(qt))


@pytest.mark.parametrize("aligned", [False, True])
def test_ambiguous_sizes_go_by_the_writer(aligned):
    codes = np.random.default_rng(0).integers(0, 8, (5, 13)).astype(np.uint8)
    words = {
        flag: pack(codes, 3) for flag, pack in enumerate((pack_dense, pack_aligned))
    }
    assert words[0].shape == words[1].shape
    assert (words[0] != words[1]).any()
    tensors = {
        "weight_packed": words[aligned].view(np.int32),
        "weight_scale": np.ones((5, 1), np.float32),
        "weight_shape": np.array([5, 13]),
    }
    config = ct.Config(bits=3, strategy="channel", group_size=None, aligned=aligned)
    qt = ct.from_tensors(tensors, config)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), codes.T)


@hypothesis.settings(deadline=None, max_examples=5)
@hypothesis.given(
    st.integers(1, 8), st.integers(1, 70), st.integers(1, 5), st.integers(0, 9)
)
def test_layouts_against_numpy(bits, k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (k, n)).astype(np.uint8)
    for layout, pack in ((ct.Dense(), pack_dense), (ct.Aligned(), pack_aligned)):
        words = layout.pack(jnp.asarray(codes), bits)
        chex.assert_trees_all_equal(np.asarray(words), pack(codes.T, bits))
        padded, columns = layout.extents(words.shape, bits)
        assert columns == n
        for container in (words, jax.lax.bitcast_convert_type(words, jnp.int32)):
            unpacked = np.asarray(layout.unpack(container, bits))
            assert unpacked.shape == (padded, n)
            chex.assert_trees_all_equal(unpacked[:k], codes)


@pytest.mark.parametrize("layout", [ct.Dense(), ct.Aligned()], ids=repr)
def test_layouts_under_jit_and_vmap(layout):
    codes = jnp.arange(3 * 13 * 4, dtype=jnp.uint8).reshape(3, 13, 4) % 8
    words = jax.jit(jax.vmap(lambda q: layout.pack(q, 3)))(codes)
    assert words.shape == (3, 4, 2)
    back = jax.jit(jax.vmap(lambda w: layout.unpack(w, 3)))(words)
    chex.assert_trees_all_equal(back[:, :13], codes)


@pytest.mark.parametrize("layout", [ct.Dense(), ct.Aligned()], ids=repr)
def test_layouts_refuse(layout, refuses):
    with refuses("words.dtype=uint8 must be int32 or uint32"):
        layout.unpack(jnp.zeros((2, 2), jnp.uint8), 4)
    with refuses("codes.dtype=float32 must be an integer dtype"):
        layout.pack(jnp.zeros((2, 2)), 4)
    with refuses("bits=9 must be an integer from 1 to 8"):
        layout.pack(jnp.zeros((2, 2), jnp.uint8), 9)


@pytest.mark.parametrize("layout", [ct.Dense(), ct.Aligned()], ids=repr)
@pytest.mark.parametrize("bits", [3, 4])
def test_relayout_there_and_back(bits, layout):
    qt = qjax.quantize(jnp.eye(64), bits=bits, group_size=32)
    moved = qjax.relayout(qt, layout)
    chex.assert_trees_all_equal(qjax.dequantize(moved), qjax.dequantize(qt))
    chex.assert_trees_all_equal(qjax.relayout(moved, gptq.Stream()), qt)


# In some k does not fill whole words of a stream.
@pytest.mark.filterwarnings("ignore:.* fills no whole words of Stream")
@pytest.mark.parametrize("name", [*ACT_ORDER, *STORED[::3]])
def test_matmul_of_a_prepared_tensor(name):
    qt = ct.from_tensors(tensors_of(name), config_of(name))
    x = np.random.default_rng(0).normal(size=(5, qt.k)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(qjax.dequantize(qt, jnp.float32))
    found = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


GOOD = {
    "weight_packed": np.zeros((4, 8), np.int32),
    "weight_scale": np.ones((4, 2), np.float16),
    "weight_shape": np.array([4, 64]),
}
ASYM = GOOD | {"weight_zero_point": np.zeros((1, 2), np.int32)}
G_IDX = np.repeat(np.arange(2, dtype=np.int32), 32)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (GOOD, {"bits": 9}, "bits=9 must be an integer from 1 to 8"),
        (
            GOOD,
            {"strategy": "block"},
            "strategy='block' must be one of ('group', 'channel', 'tensor')",
        ),
        (GOOD, {"symmetric": False}, "weight_zero_point is missing; found ['weight_p"),
        (GOOD, {"act_order": True}, "weight_g_idx is missing"),
        (ASYM, {}, "weight_zero_point is no tensor of Config("),
        (
            GOOD,
            {"strategy": "channel"},
            "group_size=32 must be given with strategy 'group' and only with it",
        ),
        (
            GOOD | {"weight_packed": np.zeros((4, 8), np.int64)},
            {},
            "weight_packed.dtype=int64 must be int32",
        ),
        (
            GOOD | {"weight_packed": np.zeros((0, 8), np.int32)},
            {},
            "weight_packed.shape=(0, 8) must not be empty",
        ),
        (
            GOOD | {"weight_packed": np.zeros((4, 7), np.int32)},
            {},
            "weight_packed.shape of K=64, 4 bits=(4, 7) must be (4, 8)",
        ),
        (
            GOOD,
            {"bits": 3},
            "weight_packed.shape of K=64, 3 bits=(4, 8) must be (4, 6) or",
        ),
        (
            GOOD | {"weight_scale": np.ones((4, 2))},
            {},
            "weight_scale.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        (
            GOOD | {"weight_scale": np.ones((3, 2), np.float16)},
            {},
            "weight_scale.shape=(3, 2) must be (4, 2), from weight_packed.shape=(4, 8)",
        ),
        (
            GOOD | {"weight_shape": np.array([4.0, 64.0])},
            {},
            "weight_shape.dtype=float64 must be int64 or int32",
        ),
        (
            GOOD | {"weight_shape": np.array([4])},
            {},
            "weight_shape.shape=(1,) must be (2,)",
        ),
        (
            GOOD | {"weight_shape": np.array([8, 64])},
            {},
            "weight_shape=(8, 64) must be (N, K) with N=4",
        ),
        (
            GOOD | {"weight_shape": np.array([4, 60])},
            {},
            "weight_shape=(4, 60) must be (N, K) with N=4 and K a positive multiple",
        ),
        (
            GOOD | {"weight_shape": np.array([4, 32])},
            {},
            "weight_packed.shape of K=32, 4 bits=(4, 8) must be (4, 4)",
        ),
        (
            ASYM | {"weight_zero_point": np.zeros((4, 2), np.int32)},
            {"symmetric": False},
            "weight_zero_point.shape=(4, 2) must be (1, 2)",
        ),
        (
            GOOD | {"weight_scale": np.full((4, 2), np.nan, np.float16)},
            {},
            "weight_scale must be finite; found NaN or infinity",
        ),
        (
            GOOD | {"weight_g_idx": G_IDX[:32]},
            {},
            "weight_g_idx.shape=(32,) must be (64,)",
        ),
        (
            GOOD | {"weight_g_idx": G_IDX * 2},
            {},
            "weight_g_idx from 0 to 2 must give each of 2 groups 32 inputs, or be -1",
        ),
        (
            GOOD | {"weight_g_idx": G_IDX * 0},
            {},
            "weight_g_idx from 0 to 0 must give each of 2 groups 32 inputs",
        ),
        (
            {
                "weight_packed": np.zeros((1, 1), np.int32),
                "weight_scale": np.ones(1, np.float32),
                "weight_shape": np.array([1, 8]),
                "weight_zero_point": np.array([9], np.int8),
            },
            {"strategy": "tensor", "group_size": None, "symmetric": False},
            "weight_zero_point=9 does not fit 4 bits",
        ),
        (
            {
                "weight_packed": np.zeros((40, 10), np.int32),  # aligned
                "weight_scale": np.ones((40, 3), np.float32),
                "weight_shape": np.array([40, 96]),
                "weight_zero_point": np.zeros((5, 3), np.int32),
            },
            {"bits": 3, "symmetric": False},
            "weight_zero_point.shape=(5, 3) must be (4, 3)",
        ),
        (
            {
                "weight_packed": np.zeros((11, 10), np.int32),  # aligned
                "weight_scale": np.ones((11, 3), np.float32),
                "weight_shape": np.array([11, 96]),
                "weight_zero_point": np.zeros((3, 3), np.int32),
            },
            {"bits": 3, "symmetric": False},
            "weight_zero_point.shape=(3, 3) must be (2, 3)",
        ),
        (
            {
                "weight_packed": np.zeros((64, 10), np.int32),  # aligned
                "weight_scale": np.ones((64, 3), np.float32),
                "weight_shape": np.array([64, 96]),
                "weight_zero_point": np.zeros((6, 3), np.int32),  # dense
            },
            {"bits": 3, "symmetric": False},
            "are of two generations of 3-bit packing",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, config, message, refuses):
    with refuses(message):
        ct.from_tensors(tensors, ct.Config(**{"group_size": 32} | config))


def leaves(scale=(2, 8), zero=(2, 8), group=32, dtype=jnp.uint8, **fields):
    qt = qjax.quantize(jnp.ones((64, 8)), group_size=32)
    return tensor.build(
        qt.words * len(fields.get("segments", [0])),
        jnp.ones(scale),
        jnp.zeros(zero, dtype),
        layout=qt.layout,
        **{"segments": (tensor.Segment(4, group),)} | fields,
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: qjax.quantize(jnp.ones((2, 64, 8)), group_size=32),
            "it stacks (2,) matrices; write them one by one",
        ),
        (
            lambda: leaves(
                (4, 8), (4, 8), segments=(tensor.Segment(4, 32), tensor.Segment(4, 32))
            ),
            "its rows have several widths",
        ),
        (
            lambda: leaves(input_scale=jnp.ones(64)),
            "it has an input_scale",
        ),
        (lambda: leaves(dtype=jnp.float32), "does not have integer zeros"),
        (
            lambda: leaves((2, 8), (2, 8), group=48),
            "group_size=48 does not divide k=64; GPTQ holds a short group",
        ),
        (lambda: leaves((2, 8), (2, 1)), "zeros (2, 1) and scales (2, 8) differ"),
        (lambda: leaves((2, 1), (2, 1)), "some columns share scales"),
    ],
)
def test_writing_refuses(make, reason, refuses):
    with refuses(reason):
        ct.to_tensors(make())


def test_writing_refuses_other_layouts(refuses):
    with refuses("layout=Stream() must be Dense() or Aligned()"):
        ct.to_tensors(leaves(), gptq.Stream())


def test_writes_gptq_weights_with_act_order():
    index = np.random.default_rng(0).permutation(G_IDX)
    qt = leaves(row_group=jnp.asarray(index))
    tensors = ct.to_tensors(qt)
    chex.assert_trees_all_equal(np.asarray(tensors["weight_g_idx"]), index)
    back = ct.from_tensors(arrays(tensors), ct.Config(group_size=32, symmetric=False))
    chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))


def scheme(targets=("Linear",), format_=None, **weights) -> dict:
    """A group as llm-compressor writes it."""
    return {
        **{"format": format_, "input_activations": None, "output_activations": None},
        "targets": list(targets),
        "weights": {
            **{"actorder": "static", "block_structure": None, "dynamic": False},
            **{"group_size": 128, "num_bits": 4, "observer": "memoryless_minmax"},
            **{"strategy": "group", "symmetric": True, "type": "int"},
        }
        | weights,
    }


def entry(*groups, **changes) -> dict:
    return {
        **{"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}},
        **{"format": "pack-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None},
        **{"quant_method": "compressed-tensors", "quantization_status": "compressed"},
        **{"sparsity_config": {}, "transform_config": {}, "version": "0.19.0"},
    } | changes


def channel(**changes) -> ct.Config:
    return ct.Config(strategy="channel", group_size=None, **changes)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        (entry(scheme()), ct.Config()),
        (entry(scheme(), version="0.17.1"), ct.Config(aligned=True)),
        (entry(scheme(), version="0.18.0.a1"), ct.Config()),
        (entry(scheme(), version=None), ct.Config()),
        (entry(scheme(actorder="group")), ct.Config(act_order=True)),
        (entry(scheme(actorder=True)), ct.Config(act_order=True)),
        (entry(scheme(actorder="weight")), ct.Config()),
        (
            entry(scheme(num_bits=8, symmetric=False, group_size=32)),
            ct.Config(bits=8, symmetric=False, group_size=32),
        ),
        (entry(scheme(strategy="channel", group_size=None)), channel()),
        (entry(scheme(strategy="channel", group_size=-1)), channel()),
        (entry(scheme(strategy=None, group_size=-1)), channel()),
        (entry(scheme(strategy=None)), ct.Config()),
        (
            entry(scheme(strategy=None, group_size=None)),
            ct.Config(strategy="tensor", group_size=None),
        ),
        (
            entry(scheme(format_="pack-quantized"), format="mixed-precision"),
            ct.Config(),
        ),
        (
            entry(config_groups={"W8A16_ASYM": ["Linear"]}),
            ct.Config(bits=8, symmetric=False),
        ),
        (
            entry(scheme(), sparsity_config={"format": "dense"}, ignore=None),
            ct.Config(),
        ),
    ],
)
def test_config_from_json(given, config):
    read = ct.Config.from_json(given)
    assert read.of("model.layers.0.mlp.up_proj") == config
    assert (read.of("lm_head") is None) == bool(given["ignore"])


def test_config_of_a_module():
    config = ct.Config.from_json(
        entry(
            scheme(["Linear"], num_bits=4),
            scheme(["re:.*down_proj$", "re:.*mlp"], num_bits=8),
            scheme(["a.mlp.up_proj"], num_bits=3),
            ignore=["lm_head", r"re:.*\.gate$"],
        )
    )
    bits = {
        **{"a.q_proj": 4, "a.mlp.gate_proj": 8, "a.down_proj": 8, "a.mlp.up_proj": 3},
        **{"a.lm_head": 4},
    }
    for module, width in bits.items():
        assert config.of(module) == ct.Config(bits=width), module
    assert config.of("lm_head") is None
    assert config.of("a.mlp.gate") is None
    named = ct.Config.from_json(entry(scheme(["Embedding", "re:.*q_proj"])))
    assert named.of("a.q_proj") == ct.Config()
    assert named.of("a.k_proj") is None
    assert ct.Config.from_json(entry(scheme(), ignore=["Linear"])).of("a") is None
    assert ct.Config(bits=3).of("a") == ct.Config(bits=3)
    nowhere = ct.Config.from_json(entry(scheme([]), scheme(["re:b"])))
    assert nowhere.of("a") is None
    # The inputs of attention may be quantized, and a group leave its weights dense.
    attention = {"targets": ["re:.*self_attn$"], "input_activations": {"num_bits": 8}}
    config = ct.Config.from_json(entry(attention, scheme()))
    assert config.of("a.self_attn.q_proj") == ct.Config()
    assert config.of("a.self_attn") is None
    preset = entry(config_groups={"W4A16": ["Linear"], "UNQUANTIZED": ["re:.*gate$"]})
    config = ct.Config.from_json(preset)
    assert (config.of("a.up").bits, config.of("a.gate")) == (4, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "config_groups=None must map names to schemes"),
        (entry(), "config_groups={} must map names to schemes"),
        (entry(scheme(), format="dense"), "['group_0'].format='dense' must be one of"),
        (entry(scheme(format_=["a"])), "['group_0'].format=['a'] must be one of ('pa"),
        (entry({"targets": ["Linear"]}), "quantize no weights"),
        (entry(config_groups={"UNQUANTIZED": ["Linear"]}), "quantize no weights"),
        (entry(scheme() | {"weights": []}), "['group_0'].weights=[] must be an obj"),
        (entry(scheme() | {"targets": "Linear"}), "targets='Linear' must be a list"),
        (entry(scheme(["re:("])), "config_groups['group_0'].targets: '(' is no pat"),
        (entry(scheme(), ignore=["re:("]), "ignore: '(' is no pattern"),
        (entry(scheme(), ignore="lm_head"), "ignore='lm_head' must be a list"),
        (entry(scheme(num_bits=9)), "9 bits of 'int' must be 1 to 8 of 'int'"),
        (entry(scheme(type="float")), "4 bits of 'float' must be 1 to 8 of 'int'"),
        (entry(scheme(dynamic=True)), "dynamic=True must be false"),
        (entry(scheme(symmetric=1)), "symmetric=1 must be true or false"),
        (entry(scheme(actorder="random")), "actorder='random' is not known"),
        (
            entry(scheme(strategy="block")),
            "strategy='block' must be one of ('group', ",
        ),
        (entry(scheme(group_size=None)), "group_size=None must be positive"),
        (entry(scheme(), sparsity_config={"format": "sparse-24-bitmask"}), "be dense"),
        (
            entry(scheme(), transform_config={"a": 1}),
            "transform_config rotates weights",
        ),
        (entry(config_groups={"W8A8": ["Linear"]}), "is no preset that is known"),
        (entry(config_groups={"W4A16": "Linear"}), "must be an object"),
    ],
)
def test_config_refuses(given, message, refuses):
    with refuses(message):
        ct.Config.from_json(given)
