"""MPQ against what bitorch-engine unpacks and prepares, bit for bit."""

import dataclasses
import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import tensor
from qjax.formats import gptq, mpq
from tests import goldens, oracle
from tests.goldens import same_bits

FILES = goldens.names("mpq")
DOUBLE = [name for name in FILES if name.startswith("mpq_gba_w")]
PLAIN = [name for name in FILES if name not in DOUBLE]
GPTQ = [name for name in PLAIN if name.startswith("mpq_gptq")]
GBA = [name for name in PLAIN if name not in GPTQ]
INDICES = ("qzeros_zeros", "qzeros_scales", "qscales_zeros", "qscales_scales")


@functools.cache
def load(name: str) -> dict:
    data = dict(goldens.load(name))
    if data["meta"]["dtype"] == "bfloat16":  # stored widened
        for key in {"scales", "zeros", "w_unpacked"} & data.keys():
            data[key] = data[key].astype(ml_dtypes.bfloat16)
    return data


def tensors_of(data: dict) -> dict:
    names = ("qweight", "g_idx", "scales", "zeros", "qzeros")
    return {name: data[name] for name in names if name in data}


def config_of(data: dict) -> mpq.Config:
    return mpq.Config.from_json(data["meta"] | {"quant_method": "mpq"})


def read(name: str) -> qjax.QTensor:
    return mpq.from_tensors(tensors_of(load(name)), config_of(load(name)))


def test_every_golden_file_is_here():
    assert (len(GPTQ), len(GBA), len(DOUBLE)) == (5, 7, 2)


@pytest.mark.parametrize("name", PLAIN)
def test_reads_and_dequantizes(name):
    data, qt = load(name), read(name)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["qint"])
    weight = np.asarray(qjax.dequantize(qt))
    assert weight.dtype == data["w_unpacked"].dtype == data["meta"]["dtype"]
    assert weight.tobytes() == data["w_unpacked"].tobytes()


@pytest.mark.parametrize("name", PLAIN)
def test_writes_the_same_tensors(name):
    data = load(name)
    written = mpq.to_tensors(read(name))
    if "nogidx" in name:
        k, size = data["meta"]["K"], data["meta"]["group_size"]
        g_idx = np.asarray(written.pop("g_idx"))
        chex.assert_trees_all_equal(g_idx, np.arange(k, dtype=np.int32) // size)
    same_bits(written, tensors_of(data))
    # Upstream's packer agrees.
    assert data["meta"]["repack_is_identity"]
    chex.assert_trees_all_equal(
        np.asarray(written["qweight"]), data["qweight_repacked"]
    )


@pytest.mark.parametrize("name", [name for name in FILES if "nogidx" not in name])
def test_the_shapes_say_what_a_configuration_says(name):
    data = load(name)
    tensors = statistic_of(data) if name in DOUBLE else tensors_of(data)
    qt = mpq.from_tensors(tensors, mpq.Config())
    chex.assert_trees_all_equal(qt, mpq.from_tensors(tensors, config_of(data)))


@pytest.mark.parametrize("name", GPTQ)
def test_a_stored_zero_of_all_ones_is_not_wrapped(name):
    data, qt = load(name), read(name)
    bits, stored = data["meta"]["bits"], data["zint_stored"].astype(int)
    assert qt.zero.dtype == jnp.uint8
    chex.assert_trees_all_equal(np.asarray(qt.zero), (stored + 1).astype(np.uint8))
    assert bool((np.asarray(qt.zero) == 2**bits).any()) == (bits != 8)
    assert qt.row_group is not None
    # After rows are sorted by group, too, the file is the same.
    prepared = qjax.prepare(qt)
    assert (prepared.order is None) == (prepared.row_group is not None)
    same_bits(mpq.to_tensors(prepared), tensors_of(data))


def test_a_zero_of_256():
    tensors = small(8, stored=255)
    qt = mpq.from_tensors(tensors, mpq.Config(bits=8, group_size=32))
    assert (qt.zero.dtype, int(qt.zero.max())) == (jnp.uint16, 256)
    assert (np.asarray(qjax.dequantize(qt)) == -256).all()
    same_bits(mpq.to_tensors(qt), tensors)


@pytest.mark.parametrize("name", GBA)
def test_the_kernels_round_once(name):
    data, qt = load(name), read(name)
    assert (qt.rounding, qt.affine) == (2, tensor.Affine.OFFSET)
    group = np.arange(data["meta"]["K"]) // data["meta"]["group_size"]
    scale, zero = (data[key].astype(np.float64)[group] for key in ("scales", "zeros"))
    exact = data["qint"] * scale - zero
    # float64 holds these sums of a product of 19 bits exactly, or nearly so.
    once = exact.astype(data["w_unpacked"].dtype)
    found = np.asarray(qjax.dequantize(dataclasses.replace(qt, rounding=1)))
    assert found.tobytes() == once.tobytes()
    assert (once != data["w_unpacked"]).any()


@pytest.mark.parametrize("name", ["mpq_gptq_b4", "mpq_gba_nogidx_b2", "mpq_gptq_b1"])
def test_matmul(name):
    qt = read(name)
    x = np.random.default_rng(0).normal(size=(3, qt.k)).astype(np.float32)
    dense = np.asarray(qjax.dequantize(qt, jnp.float32)).astype(np.float64)
    exact = x @ dense
    y = np.asarray(qjax.matmul(jnp.asarray(x), qjax.prepare(qt)))
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def statistic_of(data: dict, **changes) -> dict:
    k, n, bits = (data["meta"][key] for key in ("K", "N", "bits"))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (k, n))
    names = ("g_idx", "qstatistic", *INDICES)
    qweight = oracle.pack(codes, bits).view(np.int32)
    return {name: data[name] for name in names} | {"qweight": qweight} | changes


class TestDoubleQuantized:
    """Scales and zeros of GBA in small groups."""

    @pytest.mark.parametrize("name", DOUBLE)
    def test_decodes_and_writes_the_same(self, name):
        data = load(name)
        tensors = statistic_of(data)
        qt = mpq.from_tensors(tensors, config_of(data))
        assert (qt.scale.shape, qt.dtype) == (data["scales"].shape, jnp.float16)
        assert np.asarray(qt.scale.decode()).tobytes() == data["scales"].tobytes()
        assert np.asarray(-qt.zero.decode()).tobytes() == data["zeros"].tobytes()
        same_bits(mpq.to_tensors(qt), tensors)

    @pytest.mark.parametrize("name", DOUBLE)
    def test_weighs_the_same_as_decoded(self, name):
        data = load(name)
        tensors, config = statistic_of(data), config_of(data)
        plain = {key: tensors[key] for key in ("qweight", "g_idx")}
        plain |= {"scales": data["scales"], "zeros": data["zeros"]}
        qt, other = (mpq.from_tensors(t, config) for t in (tensors, plain))
        chex.assert_trees_all_equal(qjax.dequantize(qt), qjax.dequantize(other))
        prepared = qjax.prepare(qt)
        chex.assert_trees_all_equal(prepared, qjax.prepare(other))
        same_bits(mpq.to_tensors(prepared), plain)

    def test_unused_scales_are_ignored(self):
        data = load(DOUBLE[0])
        tensors = statistic_of(data)
        unused = {
            "scales": np.full((4, 64), np.nan, np.float16),
            "zeros": np.zeros((4, 64), np.float16),
            "wf": np.zeros((1, 16), np.int32),
        }
        qt = mpq.from_tensors(tensors | unused, config_of(data))
        chex.assert_trees_all_equal(qt, mpq.from_tensors(tensors, config_of(data)))

    def test_unused_statistic_is_ignored(self):
        # From groups of 256 rows on.
        data = load(DOUBLE[1])
        tensors = statistic_of(data, g_idx=np.zeros(256, np.int32))
        names = ("scales", "zeros", "qstatistic", *INDICES)
        tensors |= {name: data[name][:1] for name in names}
        for size in (256, -1, None):
            qt = mpq.from_tensors(tensors, mpq.Config(bits=4, group_size=size))
            assert isinstance(qt.scale, jax.Array)

    def test_a_statistic_is_not_written_where_it_is_ignored(self):
        data = load(DOUBLE[1])
        qt = mpq.from_tensors(statistic_of(data), config_of(data))
        one = jax.tree.map(lambda leaf: leaf[:1], (qt.scale, qt.zero))
        wide = tensor.build(
            qt.words,
            *one,
            layout=qt.layout,
            segments=[tensor.Segment(4, None)],
            affine=qt.affine,
        )
        assert "qstatistic" not in mpq.to_tensors(wide)

    def test_one_small_group_a_column_has_a_statistic(self):
        # Upstream compares the rows that there are with 256.
        data = load(DOUBLE[0])
        tensors = statistic_of(data, g_idx=np.zeros(128, np.int32))
        names = ("qstatistic", *INDICES)
        tensors |= {name: data[name][:1] for name in names}
        for size in (128, -1, None):
            qt = mpq.from_tensors(tensors, mpq.Config(bits=2, group_size=size))
            assert isinstance(qt.scale, mpq.DoubleQuantized)
        same_bits(mpq.to_tensors(qt), tensors)

    def test_stacks(self):
        data = load(DOUBLE[0])
        qt = mpq.from_tensors(statistic_of(data), config_of(data))
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), qt)
        assert (stack.scale.shape, stack.zero.shape) == ((2, 4, 64), (2, 4, 64))
        weights = jax.jit(jax.vmap(qjax.dequantize))(stack)
        chex.assert_trees_all_equal(weights[1], qjax.dequantize(qt))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_other_dtypes_round_twice(self, dtype):
        rng = np.random.default_rng(0)
        zero, step = (rng.uniform(1, 2, (2, 3, 1)).astype(dtype) for _ in range(2))
        index = rng.integers(0, 16, (2, 3, 4)).astype(np.uint8)
        scale = mpq.DoubleQuantized(
            index=jnp.asarray(index), zero=jnp.asarray(zero), step=jnp.asarray(step)
        )
        moved = (index.astype(dtype) - zero) * step  # NumPy rounds each operation
        assert np.asarray(scale.decode()).tobytes() == moved.reshape(2, 12).tobytes()


def small(bits: int = 4, stored: int = 0, **changes) -> dict:
    """k = 64, n = 32, groups of 32, as GPTQ; ``changes`` of None leave one out."""
    zeros = oracle.pack(np.full((2, 32), stored), bits, axis=1)
    tensors = {
        "qweight": np.zeros((2 * bits, 32), np.int32),
        "g_idx": np.repeat(np.arange(2, dtype=np.int32), 32),
        "scales": np.ones((2, 32), np.float16),
        "qzeros": zeros.view(np.int32),
    } | changes
    return {name: array for name, array in tensors.items() if array is not None}


def double(**changes) -> dict:
    """The same with statistics in runs of 16 columns."""
    indices = {name: np.ones((2, 2, 1), np.float16) for name in INDICES}
    statistic = np.zeros((2, 2, 16), np.uint8)
    rest = {"scales": None, "qzeros": None, "qstatistic": statistic}
    return small(**indices | rest | changes)


few = hypothesis.settings(
    max_examples=4, deadline=None, derandomize=True, database=None
)


@few
@hypothesis.given(
    st.sampled_from(mpq.BITS), st.sampled_from([8, 32]), st.integers(0, 99)
)
def test_any_matrix_round_trips(bits, group_size, seed):
    m = oracle.random(
        seed, 64, 32, bits=bits, group_size=group_size, row_group=True, dtype=np.float16
    )
    zero = np.maximum(m.zero, 1)
    m = dataclasses.replace(m, zero=zero)
    tensors = {
        "qweight": m.words[0].view(np.int32),
        "g_idx": m.row_group,
        "scales": m.scale,
        "qzeros": oracle.pack(zero - 1, bits, axis=1).view(np.int32),
    }
    qt = mpq.from_tensors(tensors, mpq.Config(bits=bits, group_size=group_size))
    same_bits(mpq.to_tensors(qt), tensors)
    # The difference is exact, and the product of it in float64, too.
    found = np.asarray(qjax.dequantize(qt))
    assert found.tobytes() == m.weight.astype(np.float16).tobytes()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (small(qweight=None), {}, "qweight is missing; found ['g_idx', 'qzeros', "),
        (small(scales=None), {}, "scales is missing; found"),
        (
            small(qzeros=None),
            {},
            "zeros is missing; found ['g_idx', 'qweight', 'scales",
        ),
        (small(zeros=np.ones((2, 32), np.float16)), {}, "qzeros and zeros are two"),
        (double(qzeros_scales=None), {}, "must all be there or none; found ['qstat"),
        (
            double(qstatistic=None, scales=np.ones((2, 32), np.float16)),
            {},
            "must all be there or none; found ['qzeros_zeros',",
        ),
        (small(qscales=np.zeros(1)), {}, "qscales is no tensor of MPQ; those are"),
        (
            small(qweight=np.zeros((8, 32), np.uint32)),
            {},
            "qweight.dtype=uint32 must be int32",
        ),
        (
            small(scales=np.ones((2, 32))),
            {},
            "scales.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        (small(g_idx=np.zeros((1, 64), np.int32)), {}, "must have 1 axes"),
        (small(), {"bits": 3}, "bits=3, from the configuration or from qweight.shape"),
        (small(g_idx=None), {"bits": None}, "bits=None, from the configuration or"),
        (
            small(qweight=np.zeros((6, 32), np.int32)),
            {"bits": None},
            "qweight.shape[0]=6 words of g_idx.shape[0] rows, must be one of",
        ),
        (
            small(g_idx=np.zeros(63, np.int32)),
            {"bits": None},
            "g_idx.shape=(63,) must be (64,)",
        ),
        (
            small(scales=np.ones((3, 32), np.float16)),
            {"group_size": None},
            "scales.shape[0]=3 does not cut k=64 into groups of a power of two; the",
        ),
        (
            small(),
            {"group_size": -1},
            "scales.shape=(2, 32) must be (1, 32), from qweight.shape=(8, 32)",
        ),
        (
            small(qweight=np.zeros((0, 32), np.int32)),
            {},
            "qweight.shape=(0, 32) must not be empty",
        ),
        (
            small(qweight=np.zeros((8, 12), np.int32)),
            {},
            "qweight.shape[1]=12 must be a multiple of 8, so that qzeros fill whole",
        ),
        (
            small(qzeros=None, zeros=np.ones((2, 32), np.float32)),
            {},
            "dtypes {'scales': dtype('float16'), 'zeros': dtype('float32')} must be "
            "the",
        ),
        (
            small(scales=np.ones((1, 32), np.float16)),
            {},
            "scales.shape=(1, 32) must be (2, 32), from qweight.shape=(8, 32) and "
            "Config(bits=4, group_size=32)",
        ),
        (
            small(qzeros=np.zeros((2, 32), np.int32)),
            {},
            "qzeros.shape=(2, 32) must be (2, 4)",
        ),
        (small(g_idx=np.zeros(8, np.int32)), {}, "g_idx.shape=(8,) must be (64,)"),
        (
            double(qstatistic=np.zeros((2, 3, 16), np.uint8)),
            {},
            "qstatistic.shape[1]=3 must divide n=32",
        ),
        (
            double(qstatistic=np.zeros((2, 2, 8), np.uint8)),
            {},
            "qstatistic.shape=(2, 2, 8) must be (2, 2, 16)",
        ),
        (
            double(qscales_zeros=np.ones((1, 32, 1), np.float16)),
            {},
            "qscales_zeros.shape=(1, 32, 1) must be (2, 2, 1)",
        ),
        (
            small(scales=np.full((2, 32), np.nan, np.float16)),
            {},
            "scales must be finite; found NaN or infinity",
        ),
        (
            double(qscales_zeros=np.full((2, 2, 1), np.inf, np.float16)),
            {},
            "qscales_zeros must be finite; found NaN or infinity",
        ),
        (
            small(g_idx=np.arange(64, dtype=np.int32)),
            {},
            "g_idx from 0 to 63 must lie in 0 to 1, as there are 2 groups",
        ),
        (
            small(g_idx=np.arange(-1, 63, dtype=np.int32)),
            {},
            "g_idx from -1 to 62 must lie in 0 to 1",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, config, message, refuses):
    with refuses(message):
        mpq.from_tensors(tensors, mpq.Config(**{"bits": 4, "group_size": 32} | config))


class TestWriting:
    """What `to_tensors` refuses, and what it makes of other forms."""

    @pytest.mark.parametrize(
        ("made", "reason"),
        [
            ({"bits": 3}, "3 bits are not among (1, 2, 4, 8)"),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                "its rows have several widths; MBWQ holds those",
            ),
            ({"grouping": "FLAT"}, "it has flat groups"),
            ({"input_scale": True}, "it has an input_scale"),
            ({"float_zero": True}, "(q - z) * s here has float zeros; requantize it"),
            ({"affine": "CENTERED", "float_zero": True}, "here has float zeros"),
            ({"affine": "CODEBOOK"}, "codebook[q] * s here has float zeros"),
            ({"columns": 1}, "columns share scales or zeros"),
        ],
    )
    def test_refuses(self, as_qtensor, made, reason, refuses):
        with refuses(reason):
            mpq.to_tensors(as_qtensor(oracle.random(0, 64, 32, **made)))

    def test_refuses_stacks(self, refuses):
        stack = qjax.quantize(jnp.ones((2, 64, 32)), group_size=32)
        with refuses("it stacks (2,) matrices; write them one by one"):
            mpq.to_tensors(stack)

    def test_refuses_sizes_that_fill_no_words(self, refuses):
        with refuses("k=64 or n=12 does not fill whole words"):
            mpq.to_tensors(qjax.quantize(jnp.ones((64, 12)), group_size=32))

    def test_refuses_zeros_of_0(self, as_qtensor, refuses):
        qt = as_qtensor(oracle.random(0, 64, 32))
        assert int(qt.zero.min()) == 0
        with refuses("its zeros go from 0 to 15, and only 1 to 16 can be written"):
            mpq.to_tensors(qt)

    def test_refuses_one_statistic(self, refuses):
        data = load(DOUBLE[0])
        qt = mpq.from_tensors(statistic_of(data), config_of(data))
        qt = dataclasses.replace(qt, zero=qt.zero.decode())
        with refuses("only one of scale and zero is double-quantized; decode it"):
            mpq.to_tensors(qt)

    def test_symmetric_zeros_are_the_middle_code(self):
        qt = qjax.quantize(jnp.eye(64), bits=4, group_size=32, symmetric=True)
        tensors = mpq.to_tensors(qt)
        assert (np.asarray(tensors["qzeros"]) == 0x77777777).all()
        back = mpq.from_tensors(tensors, mpq.Config(bits=4, group_size=32))
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    def test_from_another_layout(self):
        qt = read("mpq_gba_nogidx_b4")
        planar = qjax.relayout(qt, gptq.Planar())
        assert isinstance(planar.layout, gptq.Planar)
        written = mpq.to_tensors(planar)
        chex.assert_trees_all_equal(written, mpq.to_tensors(qt))
        chex.assert_trees_all_equal(qjax.relayout(planar, gptq.Stream()), qt)


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ({}, mpq.Config()),
        ({"bits": 4}, mpq.Config(bits=4, group_size=None)),
        ({"bits": 2, "group_size": -1}, mpq.Config(bits=2, group_size=-1)),
        ({"bits": 1, "group_size": 32}, mpq.Config(bits=1, group_size=32)),
    ],
)
def test_config_from_json(entry, config):
    assert mpq.Config.from_json(entry) == config
    assert config.of("model.layers.0.mlp.up_proj") is config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": "4"}, "bits='4' must be one of (1, 2, 4, 8)"),
        ({"bits": True}, "bits=True must be one of"),
        ({"bits": 3}, "bits=3 must be one of"),
        ({"bits": 4, "group_size": 0}, "group_size=0 must be positive or -1"),
        ({"bits": 4, "group_size": 1.5}, "group_size=1.5 must be positive or -1"),
        ({"bits": 4, "quant_method": "gptq"}, "quant_method='gptq' must be 'mpq'"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        mpq.Config.from_json(entry)
