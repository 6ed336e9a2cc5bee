"""MBWQ against what bitorch-engine's own layers make of the same tensors."""

import dataclasses

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import tensor
from qjax.formats import exl2, gptq, mbwq, q_groups
from tests import goldens, oracle
from tests.goldens import load, same_bits

FILES = goldens.names("mbwq")
MIXED = [name for name in FILES if name.startswith("mbwq_exl2")]
UNIFORM = [name for name in FILES if name not in MIXED]
STORED = ("qweight", "scales", "zeros", "q_perm", "q_groups")


def tensors_of(data: dict, **changes) -> dict:
    stored = {name: data[name] for name in STORED if name in data}
    channel_scale = data["channel_scale"].reshape(1, 1, -1)
    return stored | {"channel_scale": channel_scale} | changes


def read(name: str) -> qjax.QTensor:
    """As the file says; group sizes of one width come from the configuration."""
    data = load(name)
    size = None if name in MIXED else data["meta"]["group_size"]
    return mbwq.from_tensors(tensors_of(data), mbwq.Config(group_size=size))


def test_every_golden_file_is_here():
    assert (len(MIXED), len(UNIFORM)) == (6, 6)


@pytest.mark.parametrize("name", FILES)
def test_reads_and_dequantizes(name):
    data, qt = load(name), read(name)
    assert (qt.layout, qt.affine, qt.rounding) == (
        gptq.Stream(),
        tensor.Affine.OFFSET,
        1,
    )
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["qint"])
    same_bits(mbwq.unpack_qweight(qt), data["w_deq"])
    if (data["channel_scale"] == 1).all():
        assert qt.input_scale is None
    else:
        same_bits(qt.input_scale, data["channel_scale"])
    bits = data["meta"]["bits"]
    assert [segment.bits for segment in qt.segments] == (
        bits if name in MIXED else [bits]
    )


@pytest.mark.parametrize("name", FILES)
def test_writes_the_same_tensors(name):
    written = mbwq.to_tensors(read(name))
    same_bits(written, tensors_of(load(name)))
    assert ("q_groups" in written) == (name in MIXED)


@pytest.mark.parametrize("name", MIXED)
def test_what_upstream_derives(name):
    data = load(name)
    height = len(data["qweight"])
    group_map = q_groups.make_group_map(data["q_groups"], height).reshape(-1, 2)
    chex.assert_trees_all_equal(group_map, data["q_group_map"])
    assert q_groups.rows(data["q_groups"], height) == tuple(data["rows"])


@pytest.mark.parametrize("name", FILES)
def test_matmul(name):
    data, qt = load(name), read(name)
    w = qjax.prepare(qt)
    chex.assert_trees_all_equal(qjax.relayout(w, qt.layout).words, qt.words)
    x = data["x"].astype(np.float32)
    y = np.asarray(qjax.matmul(jnp.asarray(x), w)).astype(np.float64)
    # The layer rounds x * channel_scale to float16, and so does the reference.
    bias = data.get("bias", np.zeros(qt.n)).astype(np.float64)
    wanted, largest = data["y_ref"] - bias, np.abs(data["y_ref"]).max()
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-3 * largest)
    layer = data["y_layer"].astype(np.float64) - bias
    np.testing.assert_allclose(y, layer, rtol=0, atol=3e-3 * largest)


@pytest.mark.parametrize("name", ["mbwq_q4_g64_cscale", "mbwq_exl2_b5432_mixedg"])
def test_matmul_is_exact(name):
    data, qt = load(name), read(name)
    x = data["x"].astype(np.float32)
    dense = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(np.float64)
    channel_scale = data["channel_scale"].astype(np.float64)[:, None]
    by_hand = data["w_deq"] * channel_scale  # but for the rounding of w_deq
    np.testing.assert_allclose(dense, by_hand, rtol=0, atol=5e-4 * np.abs(dense).max())
    exact = x @ dense
    y = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


class TestOrder:
    """A q_perm of zeros is no permutation, and means one only without q_groups."""

    def test_zeros_are_the_identity(self):
        names = [name for name in FILES if not load(name)["q_perm"].any()]
        assert names == ["mbwq_q2_g64_noperm", "mbwq_q4_g128_noperm"]
        for name in names:
            assert read(name).order is None

    def test_permutations_are_kept(self):
        for name in ("mbwq_q2_g32_perm", "mbwq_exl2_b65_g64"):
            chex.assert_trees_all_equal(
                np.asarray(read(name).order), load(name)["q_perm"].astype(np.int32)
            )

    def test_the_identity_of_mixed_bits(self):
        name = "mbwq_exl2_b42_g32_identity"
        assert (load(name)["q_perm"] == np.arange(128)).all()
        assert read(name).order is None

    def test_an_identity_that_is_not_zeros_is_written_again(self):
        data = load("mbwq_q4_g128_noperm")
        tensors = tensors_of(data, q_perm=np.arange(256, dtype=np.int16))
        qt = mbwq.from_tensors(tensors)
        assert qt.order is not None
        same_bits(mbwq.unpack_qweight(qt), data["w_deq"])
        same_bits(mbwq.to_tensors(qt), tensors)

    def test_zeros_with_mixed_bits_are_refused(self, refuses):
        data = load("mbwq_exl2_b65_g64")
        with refuses("q_perm is all zeros, which means no permutation only without"):
            mbwq.from_tensors(tensors_of(data, q_perm=np.zeros(256, np.int16)))

    def test_k_beyond_the_sign_of_int16(self):
        k = 40960
        tensors = {
            "qweight": np.zeros((k // 8, 4), np.int32),
            "scales": np.ones((1, 4), np.float16),
            "zeros": np.ones((1, 4), np.float16),
            "q_perm": np.arange(k)[::-1].astype(np.uint16).view(np.int16),
        }
        qt = mbwq.from_tensors(tensors)
        chex.assert_trees_all_equal(np.asarray(qt.order), np.arange(k)[::-1])
        found = mbwq.to_tensors(qt)["q_perm"]
        chex.assert_trees_all_equal(np.asarray(found), tensors["q_perm"])


@pytest.mark.parametrize(
    "name", ["exl2_b5432_mixedg", "exl2_b6_subnormal", "exl2_b8_big", "exl2_b2_g64"]
)
def test_exl2_becomes_mbwq_without_loss(name):
    data = load(name)
    qt = exl2.from_tensors({key: data[key] for key in exl2.TENSORS[:5]})
    written = mbwq.to_tensors(qt, mixed=True)
    chex.assert_trees_all_equal(np.asarray(written["qweight"]), data["q_weight"])
    chex.assert_trees_all_equal(np.asarray(written["q_groups"]), data["q_groups"])
    same_bits(written["scales"], data["scales"])
    back = mbwq.from_tensors(written)
    # By value: a zero of EXL2 may be negative.
    chex.assert_trees_all_equal(np.asarray(qjax.dequantize(back)), data["w_deq"])


def test_a_width_may_have_groups_of_several_sizes():
    groups = q_groups.Groups((4, 4, 4, 2), (64, 32, 32, 64))
    codes = np.random.default_rng(0).integers(0, 4, (192, 8))
    words = [oracle.pack(codes[:128], 4), oracle.pack(codes[128:], 2)]
    tensors = {
        "qweight": np.concatenate(words).view(np.int32),
        "q_groups": np.array([4, 0, 4, 8, 4, 12, 2, 16], np.int16),
        "scales": np.arange(1, 33, dtype=np.float16).reshape(4, 8),
        "zeros": np.zeros((4, 8), np.float16),
        "q_perm": np.arange(192, dtype=np.int16),
        "channel_scale": np.ones((1, 1, 192), np.float16),
    }
    qt = mbwq.from_tensors(tensors)
    assert [segment[:2] for segment in qt.segments] == [(4, 64), (4, 32), (2, 64)]
    assert q_groups.groups_of(qt) == groups
    scales = np.repeat(tensors["scales"], groups.rows, axis=0)
    chex.assert_trees_all_equal(
        np.asarray(qjax.dequantize(qt)), codes.astype(np.float16) * scales
    )
    same_bits(mbwq.to_tensors(qt), tensors)


few = hypothesis.settings(
    max_examples=4, deadline=None, derandomize=True, database=None
)


@few
@hypothesis.given(
    st.sampled_from([2, 4]),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_any_matrix_round_trips(bits, group_size, groups, seed):
    # The last group is cut to 32 rows.
    k = (groups - 1) * group_size + 32
    m = oracle.random(
        seed,
        *(k, 8),
        **{"bits": bits, "group_size": group_size, "dtype": np.float16},
        affine="OFFSET",
        order=True,
        input_scale=True,
    )
    tensors = {
        "qweight": m.words[0].view(np.int32),
        "scales": m.scale,
        "zeros": -m.zero,
        "q_perm": m.order.astype(np.int16),
        "channel_scale": m.input_scale[None, None],
    }
    config = mbwq.Config(bits=bits, group_size=group_size)
    qt = mbwq.from_tensors(tensors, config)
    same_bits(mbwq.to_tensors(qt), tensors)
    stored = np.vectorize(lambda v: oracle.nearest(v, np.float16))(m.stored)
    weight = np.empty_like(stored)
    weight[m.order] = stored
    found = np.asarray(mbwq.unpack_qweight(qt)).astype(np.float64)
    chex.assert_trees_all_equal(found, weight)


def test_stacks_under_vmap_and_jit():
    qt = read("mbwq_exl2_b42_g32_identity")
    other = dataclasses.replace(qt, scale=qt.scale * jnp.float16(2))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), qt, other)
    weights = jax.jit(jax.vmap(mbwq.unpack_qweight))(stack)
    same_bits(weights[0], mbwq.unpack_qweight(qt))
    same_bits(weights[1], mbwq.unpack_qweight(other))


def small(**changes) -> dict:
    """Four bits, k = 64, n = 8, groups of 32; ``changes`` of None leave one out."""
    tensors = {
        "qweight": np.zeros((8, 8), np.int32),
        "scales": np.ones((2, 8), np.float16),
        "zeros": np.ones((2, 8), np.float16),
        "q_perm": np.zeros(64, np.int16),
        "channel_scale": np.ones((1, 1, 64), np.float16),
    } | changes
    return {name: array for name, array in tensors.items() if array is not None}


def mixed(**changes) -> dict:
    """Four and two bits."""
    tensors = {
        "qweight": np.zeros((6, 8), np.int32),
        "q_groups": np.array([4, 0, 2, 4], np.int16),
        "q_perm": np.arange(64, dtype=np.int16),
    }
    return small(**tensors | changes)


def test_ignores_what_the_layer_ignores():
    rest = {
        "qstatistic": np.ones((2, 1, 32), np.uint8),
        "qzeros_zeros": np.zeros((2, 1, 1), np.float16),
        "g_idx": np.zeros(64, np.int32),
        "wf": np.zeros((1, 8), np.int32),
    }
    config = mbwq.Config(group_size=32)
    chex.assert_trees_all_equal(
        mbwq.from_tensors(small(**rest), config), mbwq.from_tensors(small(), config)
    )


@pytest.mark.parametrize(("k", "groups", "size"), [(64, 2, 32), (96, 1, 96)])
@pytest.mark.parametrize("saved", [True, False])
def test_group_sizes_from_the_shapes(k, groups, size, saved):
    made = small(
        qweight=np.zeros((k // 8, 8), np.int32),
        scales=np.ones((groups, 8), np.float16),
        zeros=np.zeros((groups, 8), np.float16),
        q_perm=np.zeros(k, np.int16),
        channel_scale=None,
        g_idx=np.arange(k, dtype=np.int32) // size if saved else None,
    )
    qt, other = (
        mbwq.from_tensors(made, mbwq.Config(group_size=s)) for s in (None, size)
    )
    chex.assert_trees_all_equal(qt, other)


def test_a_last_group_that_is_short_from_the_shapes():
    made = small(
        qweight=np.zeros((12, 8), np.int32),
        q_perm=np.zeros(96, np.int16),
        channel_scale=None,
    )
    assert mbwq.from_tensors(made).segments == (tensor.Segment(4, 64),)


def test_channel_scale_may_be_missing():
    qt = mbwq.from_tensors(small(channel_scale=None))
    same_bits(mbwq.to_tensors(qt), small())


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (small(zeros=None), {}, "zeros is missing; found ['channel_scale', 'q_perm', "),
        (small(qzeros=np.zeros(1)), {}, "qzeros is no tensor of MBWQ; those are "),
        (
            small(scales=np.ones((2, 8), np.float32)),
            {},
            "scales.dtype=float32 must be float16",
        ),
        (
            small(q_perm=np.zeros(64, np.int32)),
            {},
            "q_perm.dtype=int32 must be int16",
        ),
        (
            small(channel_scale=np.ones(64, np.float16)),
            {},
            "channel_scale.shape=(64,) must have 3 axes",
        ),
        (
            small(channel_scale=np.ones((1, 1, 32), np.float16)),
            {},
            "channel_scale.shape=(1, 1, 32) must be (1, 1, 64), from qweight.shape=",
        ),
        (
            small(qweight=np.zeros((0, 8), np.int32)),
            {},
            "qweight.shape=(0, 8) and k=64 must not be empty",
        ),
        (
            small(qweight=np.zeros((6, 8), np.int32)),
            {},
            "qweight.shape[0]=6 must be k * bits / 32 with k=64 a multiple of 32 and "
            "bits in (2, 4); rows of several widths come with q_groups",
        ),
        (
            small(qweight=np.zeros((16, 8), np.int32)),
            {},
            "qweight.shape[0]=16 must be k * bits / 32",
        ),
        (small(), {"bits": 2}, "with k=64 a multiple of 32 and bits=2; rows of"),
        (
            small(q_perm=np.zeros(48, np.int16), qweight=np.zeros((6, 8), np.int32)),
            {},
            "with k=48 a multiple of 32",
        ),
        (
            small(scales=np.ones((3, 8), np.float16)),
            {},
            "scales.shape[0]=3 does not cut k=64 into groups of a power of two, at "
            "least 32; the configuration must have group_size",
        ),
        (
            small(g_idx=np.arange(64, dtype=np.int32) // 48),
            {},
            "g_idx does not have the groups of 32 rows that scales.shape[0] looks like",
        ),
        (
            small(scales=np.ones((4, 8), np.float16)),
            {},
            "scales.shape[0]=4 does not cut k=64",
        ),
        (small(), {"group_size": 64}, "scales.shape=(2, 8) must be (1, 8), from"),
        (
            small(zeros=np.ones((2, 4), np.float16)),
            {},
            "zeros.shape=(2, 4) must be (2, 8)",
        ),
        (
            small(scales=np.full((2, 8), np.inf, np.float16)),
            {},
            "scales must be finite; found NaN or infinity",
        ),
        (
            small(zeros=np.full((2, 8), np.nan, np.float16)),
            {},
            "zeros must be finite; found NaN or infinity",
        ),
        (
            small(channel_scale=np.full((1, 1, 64), np.nan, np.float16)),
            {},
            "channel_scale must be finite",
        ),
        (
            small(q_perm=np.full(64, 1, np.int16)),
            {},
            "q_perm must hold each of 0 to 63 once",
        ),
        (
            mixed(q_groups=np.array([4, 0, 2], np.int16)),
            {},
            "q_groups.shape=(3,) must be (2 * groups,)",
        ),
        (
            mixed(scales=np.ones((3, 8), np.float16)),
            {},
            "scales.shape=(3, 8) must be (2, 8), from qweight.shape=(6, 8), k=64 and "
            "q_groups.shape=(4,)",
        ),
        (
            mixed(q_groups=np.array([4, 0, 2, 5], np.int16)),
            {},
            "q_groups has widths [4, 2] and first rows [0, 5] of 6",
        ),
        (
            mixed(q_perm=np.arange(96, dtype=np.int16), channel_scale=None),
            {},
            "q_perm.shape=(96,) must be (64,), as many as q_groups has rows",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, config, message, refuses):
    with refuses(message):
        mbwq.from_tensors(tensors, mbwq.Config(**config))


class TestWriting:
    """What `to_tensors` refuses, and what it makes of other forms."""

    @pytest.mark.parametrize(
        ("made", "changes", "reason"),
        [
            ({"affine": "ZERO"}, {}, "(q - z) * s here is not q * scale - zero"),
            ({"affine": "CENTERED", "float_zero": True}, {}, "here is not q * scale -"),
            ({"row_group": True}, {}, "its groups are not runs of stored rows"),
            ({"grouping": "FLAT"}, {}, "its groups are not runs of stored rows"),
            (
                {"dtype": np.float32},
                {},
                "scales, zeros and input scale must be float16",
            ),
            ({"columns": 1}, {}, "columns share scales or zeros"),
            (
                {"bits": 3},
                {"mixed": False},
                "its rows must all have one of (2, 4) bits",
            ),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                {"mixed": False},
                "its rows must all have one of (2, 4) bits",
            ),
            (
                {"parts": [(2, 32, 32), (4, 32, 32)]},
                {},
                "its rows have [2, 4] bits; the widest must come first",
            ),
            ({"bits": 7}, {}, "its widths [7] are not all among (8, 6, 5, 4, 3, 2)"),
            (
                {"group_size": 16},
                {},
                "it has groups of 16 rows, and upstream's kernels",
            ),
            (
                {"group_size": 48},
                {},
                "it has groups of 48 rows, and upstream's kernels",
            ),
        ],
    )
    def test_refuses(self, as_qtensor, made, changes, reason, refuses):
        made = {"affine": "OFFSET", "dtype": np.float16} | made
        with refuses(reason):
            mbwq.to_tensors(as_qtensor(oracle.random(0, 64, 8, **made)), **changes)

    def test_refuses_stacks(self, as_qtensor, refuses):
        m = oracle.random(0, 64, 8, affine="OFFSET", dtype=np.float16)
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), as_qtensor(m))
        with refuses("it stacks (2,) matrices; write them one by one"):
            mbwq.to_tensors(stack)

    def test_refuses_sizes_of_no_kernel(self, as_qtensor, refuses):
        m = oracle.random(0, 64, 6, affine="OFFSET", dtype=np.float16)
        with refuses("k=64 must be a multiple of 32 up to 65536, n=6 one of 4"):
            mbwq.to_tensors(as_qtensor(m))

    def test_refuses_zeros_that_overflow(self, as_qtensor, refuses):
        m = oracle.random(0, 64, 8, bits=8, affine="CENTERED", dtype=np.float16)
        qt = dataclasses.replace(
            as_qtensor(m), scale=jnp.full((2, 8), 512, jnp.float16)
        )
        with refuses("scale * 2**(bits-1) overflows float16"):
            mbwq.to_tensors(qt)

    def test_middle_codes_become_zeros(self, as_qtensor):
        m = oracle.random(0, 64, 8, affine="CENTERED", dtype=np.float16)
        qt = as_qtensor(m)
        tensors = mbwq.to_tensors(qt)
        assert "q_groups" not in tensors
        chex.assert_trees_all_equal(np.asarray(tensors["zeros"]), m.scale * 8)
        back = mbwq.from_tensors(tensors)
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    def test_one_width_as_mixed_bits(self, as_qtensor):
        m = oracle.random(0, 64, 8, affine="OFFSET", dtype=np.float16)
        tensors = mbwq.to_tensors(as_qtensor(m), mixed=True)
        assert np.asarray(tensors["q_groups"]).tolist() == [4, 0, 4, 4]
        assert np.asarray(tensors["q_perm"]).tolist() == list(range(64))
        back = mbwq.from_tensors(tensors)
        same_bits(qjax.dequantize(back), qjax.dequantize(as_qtensor(m)))

    def test_from_another_layout(self):
        name = "mbwq_exl2_b65_g64"
        planar = qjax.relayout(read(name), gptq.Planar())
        same_bits(mbwq.to_tensors(planar), tensors_of(load(name)))


STRATEGY = {
    "measurement": {
        "model.layers.1": {
            "q_proj": {
                **{"group_size": {"4": 32, "2": 64}, "bits": [4, 2]},
                **{"bits_prop": [0.75, 0.25], "scale_bits": 4},
            },
            "down_proj": {"group_size": {"2": 64}, "bits": [2], "bits_prop": [1.0]},
            "moe_expert_up_proj": {"group_size": {"2": 32}, "bits": [2]},
            "moe_shared_expert_up_proj": {"group_size": {"4": 32}, "bits": [4]},
            "moe_gate": {"desc": "Not quantized"},
        },
        "model.layers.11": {"q_proj": {"group_size": {"2": 128}, "bits": [2]}},
    }
}


def test_config_of_a_module():
    config = mbwq.Config.from_json(STRATEGY)
    cases = {
        "model.layers.1.self_attn.q_proj": (4, 32),
        "model.layers.1.mlp.down_proj": (2, 64),
        "model.layers.1.mlp.experts.7.up_proj": (2, 32),
        "model.layers.1.mlp.shared_experts.up_proj": (4, 32),
        "model.layers.11.self_attn.q_proj": (2, 128),
        # Without a strategy the shapes decide.
        "model.layers.1.self_attn.k_proj": (None, None),
        "model.layers.2.self_attn.q_proj": (None, None),
    }
    for module, (bits, group_size) in cases.items():
        assert config.of(module) == mbwq.Config(bits=bits, group_size=group_size)
    assert config.of("model.layers.1.mlp.gate") is None


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ({}, mbwq.Config()),
        (
            {"quant_method": "mbwq", "bits": 4, "group_size": 64},
            mbwq.Config(bits=4, group_size=64),
        ),
    ],
)
def test_config_from_json(entry, config):
    assert mbwq.Config.from_json(entry) == config
    assert config.of("model.layers.0.mlp.up_proj") == config
    hash(mbwq.Config.from_json(STRATEGY))


def one(**strategy) -> dict:
    return {"measurement": {"model.layers.0": {"q_proj": strategy}}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' must be 'mbwq'"),
        ({"bits": 3}, "bits=3 must be one of (2, 4)"),
        ({"bits": True}, "bits=True must be one of (2, 4)"),
        ({"group_size": 16}, "group_size=16 must be at least 32"),
        ({"group_size": "64"}, "group_size='64' must be at least 32"),
        ({"measurement": [1]}, "measurement=[1] must be an object"),
        ({"measurement": {"model.layers.0": 1}}, "model.layers.0=1 must be an object"),
        (one(), "model.layers.0.q_proj={} must have bits, a list, and group_size"),
        (one(bits=[4]), "must have bits, a list, and group_size"),
        (one(bits=4, group_size={"4": 32}), "must have bits, a list, and group_size"),
        (one(bits=[4], group_size={"2": 32}), "must have bits, a list, and group_size"),
        (one(bits=[4], group_size={"4": 0}), "must have bits, a list, and group_size"),
        (one(bits=[4], group_size=32), "must have bits, a list, and group_size"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        mbwq.Config.from_json(entry)
