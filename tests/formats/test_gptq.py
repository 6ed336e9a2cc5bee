"""GPTQ against files that AutoGPTQ and GPTQModel wrote, bit for bit."""

import collections
import dataclasses

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import tensor
from qjax.formats import gptq
from tests import goldens, oracle
from tests.goldens import load

FILES = goldens.names("gptq")
QUIRKS = [name for name in FILES if "zero0_quirk" in name]
SOUND = [name for name in FILES if name not in QUIRKS]
V2 = [name for name in SOUND if name.startswith("gptq_v2")]
PLANAR = [name for name in SOUND if name.startswith("gptq_p")]
ACT_ORDER = [name for name in SOUND if "_desc" in name]
WARNING = "fields of all ones, read as zeros of 0"


def config_of(data: dict, **changes) -> gptq.Config:
    entry = {"checkpoint_format": "gptq", "meta": {}} | data["config"] | changes
    return gptq.Config.from_json(entry)


def tensors_of(data: dict, **changes) -> dict:
    names = [name for name in gptq.TENSORS if f"packed_{name}" in data]
    return {name: data[f"packed_{name}"] for name in names} | changes


def zeros_of(data: dict) -> np.ndarray:
    """What was packed; one file gives [n, groups] floats."""
    zeros = data["in_zeros_gn"] if "in_zeros_gn" in data else data["in_zeros_ng"].T
    return zeros.astype(np.uint8)


def mask_of(data: dict) -> int:
    return 2 ** data["config"]["bits"] - 1


def test_every_golden_file_is_here():
    counts = collections.Counter(name.split("__")[0] for name in FILES)
    assert counts == {
        "gptq_v1": 13,
        "gptq_v1_zero0_quirk": 4,
        "gptq_v2": 8,
        "gptq_p": 4,
    }
    assert (len(V2), len(PLANAR), len(ACT_ORDER)) == (8, 4, 9)


@pytest.mark.parametrize("name", SOUND)
def test_reads_and_dequantizes(name):
    data = load(name)
    qt = gptq.from_tensors(tensors_of(data), config_of(data))
    assert qt.shape == data["in_q_kn"].shape
    assert (qt.row_group is not None) == (name in ACT_ORDER)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["in_q_kn"])
    chex.assert_trees_all_equal(np.asarray(qt.zero), zeros_of(data))
    chex.assert_trees_all_equal(np.asarray(qt.scale), data["packed_scales"])
    weight = qjax.dequantize(qt)
    assert weight.dtype == jnp.float16
    chex.assert_trees_all_equal(
        np.asarray(weight).view(np.uint16), data["out_dequant_kn"].view(np.uint16)
    )


@pytest.mark.parametrize("name", SOUND)
def test_writes_the_same_words(name):
    data = load(name)
    qt = gptq.from_tensors(tensors_of(data), config_of(data))
    written = gptq.to_tensors(qt, data["config"]["checkpoint_format"])
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors_of(data)
    )


@pytest.mark.parametrize("name", ACT_ORDER)
def test_writes_the_same_words_after_prepare(name):
    data = load(name)
    file = gptq.from_tensors(tensors_of(data), config_of(data))
    qt = qjax.prepare(file)
    # Every group of these files is full: 32 rows.
    assert qt.row_group is None
    assert qt.order is not None
    chex.assert_trees_all_equal(qjax.dequantize(qt), qjax.dequantize(file))
    written = gptq.to_tensors(qt, data["config"]["checkpoint_format"])
    chex.assert_trees_all_equal(
        {key: np.asarray(value) for key, value in written.items()}, tensors_of(data)
    )


@pytest.mark.parametrize("name", V2)
def test_reads_zeros_that_gptqmodel_turned_into_v1(name):
    data = load(name)
    v1 = tensors_of(data, qzeros=data["packed_qzeros_v1"])
    config = config_of(
        data, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:7.3.4"]}
    )
    assert config.wordwise_zeros
    qt = gptq.from_tensors(v1, config)
    chex.assert_trees_all_equal(np.asarray(qt.zero), zeros_of(data))


@pytest.mark.parametrize("name", V2)
def test_writes_v1_zeros_field_by_field(name):
    data = load(name)
    qt = gptq.from_tensors(tensors_of(data), config_of(data))
    bits, zeros = data["config"]["bits"], zeros_of(data)
    words = np.asarray(gptq.to_tensors(qt, "gptq")["qzeros"])
    expected = oracle.pack((zeros - 1) & mask_of(data), bits, 1).view(np.int32)
    chex.assert_trees_all_equal(words, expected)
    # GPTQModel's own v1 words differ where a zero of 0 borrows, and only there; three
    # bits it subtracts field by field.
    borrows = bits != 3 and bool((zeros == 0).any())
    assert borrows == bool((words != data["packed_qzeros_v1"]).any())


@pytest.mark.parametrize("name", PLANAR)
def test_planes_of_v1_zeros(name):
    data = load(name)
    zeros = (zeros_of(data) - 1) & mask_of(data)
    words = gptq.pack_planes(jnp.asarray(zeros), data["config"]["bits"], axis=1)
    chex.assert_trees_all_equal(
        np.asarray(words).view(np.int32), data["packed_qzeros_v1"]
    )


def read_quirk(name: str, key: str, **changes) -> qjax.QTensor:
    data = load(name)
    return gptq.from_tensors(
        tensors_of(data, qzeros=data[key]), config_of(data, **changes)
    )


@pytest.mark.parametrize("name", QUIRKS)
def test_clean_zeros_of_0_read_as_0(name):
    data = load(name)
    bits, zeros = data["config"]["bits"], zeros_of(data)
    with pytest.warns(UserWarning, match=WARNING):
        qt = read_quirk(name, "packed_qzeros_clean")
    chex.assert_trees_all_equal(np.asarray(qt.zero), zeros)
    chex.assert_trees_all_equal(np.asarray(qjax.codes(qt)), data["in_q_kn"])
    written = np.asarray(gptq.to_tensors(qt, "gptq")["qzeros"])
    chex.assert_trees_all_equal(written, data["packed_qzeros_clean"])

    # AutoGPTQ's decoders agree wherever the zero is not 0. Where it is, the old class
    # gives 0 for 2, 4 and 8 bits and 8 for 3; the newer one gives 2**bits.
    weight, is_0 = np.asarray(qjax.dequantize(qt)), np.repeat(zeros == 0, 32, axis=0)
    scale = np.repeat(data["packed_scales"], 32, axis=0).astype(np.float64)
    for decoder, read in (("cuda_old", 8 if bits == 3 else 0), ("cuda", 2**bits)):
        theirs = data[f"out_dequant_kn_{decoder}"]
        chex.assert_trees_all_equal(weight[~is_0], theirs[~is_0])
        moved = (data["in_q_kn"] - float(read)) * scale  # exact in float64
        chex.assert_trees_all_equal(moved.astype(np.float16)[is_0], theirs[is_0])
        assert (read == 0) == bool((weight == theirs).all())


@pytest.mark.parametrize("name", QUIRKS)
def test_clean_zeros_read_word_by_word_are_gptqmodels(name):
    data = load(name)
    changes = {"sym": False, "meta": {"quantizer": "gptqmodel:7.3.4"}}
    # No warning: this is how GPTQModel reads them, three bits field by field.
    qt = read_quirk(name, "packed_qzeros_clean", **changes)
    theirs = oracle.unpack(
        data["qzeros_v2_from_clean_gptqmodel"], data["config"]["bits"], 1
    )
    chex.assert_trees_all_equal(np.asarray(qt.zero), theirs)
    differs = bool((theirs != zeros_of(data)).any())
    assert differs == (data["config"]["bits"] != 3)


@pytest.mark.parametrize("name", QUIRKS)
def test_zeros_that_autogptq_polluted_read_as_they_stand(name):
    data = load(name)
    bits, zeros = data["config"]["bits"], zeros_of(data)
    with pytest.warns(UserWarning, match=WARNING):
        qt = read_quirk(name, "packed_qzeros_autogptq")
    # The packer has set every bit from that of a zero of 0 to the end of the word.
    clean = (zeros[..., None] - 1).astype(np.int64) >> np.arange(bits) & 1
    stream = clean.reshape(len(zeros), -1)
    for row, column in np.argwhere(zeros == 0):
        first = bits * column
        stream[row, first : first // 32 * 32 + 32] = 1
    stored = (stream.reshape(clean.shape) << np.arange(bits)).sum(-1)
    read = (stored + 1) & mask_of(data)
    chex.assert_trees_all_equal(np.asarray(qt.zero), read.astype(np.uint8))
    assert (read != zeros).any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_against_the_oracle(bits, axis):
    shape = (64, 3) if axis == 0 else (3, 64)
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    words = oracle.pack_planes(codes, bits, axis)
    packed = gptq.pack_planes(jnp.asarray(codes), bits, axis)
    chex.assert_trees_all_equal(np.asarray(packed), words)
    unpacked = gptq.unpack_planes(jnp.asarray(words), bits, axis)
    chex.assert_trees_all_equal(np.asarray(unpacked), codes)


def test_planes_worked_by_hand():
    # 3 bits: words 0 and 1 hold the two low bits, word 2 the high ones.
    codes = np.zeros(32, np.uint8)
    codes[[0, 1, 16, 31]] = [0b101, 0b010, 0b111, 0b110]
    words = gptq.pack_planes(jnp.asarray(codes)[:, None], 3, 0)[:, 0]
    assert [hex(word) for word in words] == ["0x9", "0x80000003", "0x80010001"]


def test_ragged_planes_are_refused(refuses):
    with refuses(
        "codes.shape[0]=48 must be a multiple of 32 for planes of 3-bit codes"
    ):
        gptq.Planar().pack(jnp.zeros((48, 2), jnp.uint8), 3)
    with refuses("words.shape[0]=8 must be a multiple of 5"):
        gptq.Planar().unpack(jnp.zeros((8, 2), jnp.uint32), 5)


def test_zeros_of_bfloat16_and_float32_checkpoints():
    for dtype in (ml_dtypes.bfloat16, np.float32):
        m = oracle.random(0, 64, 32, dtype=dtype)
        tensors = {
            "qweight": m.words[0].view(np.int32),
            "qzeros": oracle.pack(m.zero, 4, 1).view(np.int32),
            "scales": m.scale,
        }
        config = gptq.Config(group_size=32, checkpoint_format="gptq_v2")
        qt = gptq.from_tensors(tensors, config)
        assert qt.dtype == dtype
        # The difference of codes and zeros is exact, so that one rounding is left.
        rounded = np.vectorize(lambda v, dtype=dtype: oracle.nearest(v, dtype))
        chex.assert_trees_all_equal(
            np.asarray(qjax.dequantize(qt)).astype(np.float64), rounded(m.weight)
        )


def small_tensors(**changes) -> dict:
    """4 bits, k = 64, n = 16, group 32; ``changes`` of None leave a tensor out."""
    tensors = {
        "qweight": np.zeros((8, 16), np.int32),
        "qzeros": np.zeros((2, 2), np.int32),
        "scales": np.ones((2, 16), np.float16),
        "g_idx": np.repeat(np.arange(2, dtype=np.int32), 32),
    } | changes
    return {name: array for name, array in tensors.items() if array is not None}


SMALL = gptq.Config(bits=4, group_size=32)


@pytest.mark.parametrize("tensors", [small_tensors(), small_tensors(g_idx=None)])
def test_check_accepts(tensors):
    gptq.check(tensors, SMALL)
    assert gptq.from_tensors(tensors, SMALL).row_group is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, "qzeros is missing; found ['g_idx', 'qweight', 'scales']"),
        (
            {"zeros": np.zeros(1)},
            "zeros is no tensor of GPTQ; those are ['qweight', 'qzeros', 'sc",
        ),
        (
            {"qweight": np.zeros((8, 16), np.int64)},
            "qweight.dtype=int64 must be int32",
        ),
        (
            {"scales": np.ones((2, 16))},
            "scales.dtype=float64 must be float16 or bfloat16 or float32",
        ),
        ({"g_idx": np.zeros(64)}, "g_idx.dtype=float64 must be int32"),
        ({"qweight": np.zeros(8, np.int32)}, "qweight.shape=(8,) must have 2 axes"),
        (
            {"g_idx": np.zeros((1, 64), np.int32)},
            "g_idx.shape=(1, 64) must have 1 axes",
        ),
        (
            {"qweight": np.zeros((8, 12), np.int32)},
            "qweight.shape=(8, 12) must be [k * 4 / 32, n] with k and n positive "
            "multiples of 8",
        ),
        ({"qweight": np.zeros((0, 16), np.int32)}, "qweight.shape=(0, 16) must be"),
        (
            {"scales": np.ones((3, 16), np.float16)},
            "scales.shape=(3, 16) must be (2, 16), from qweight.shape=(8, 16), bits=4",
        ),
        (
            {"qzeros": np.zeros((2, 16), np.int32)},
            "qzeros.shape=(2, 16) must be (2, 2)",
        ),
        ({"g_idx": np.zeros(8, np.int32)}, "g_idx.shape=(8,) must be (64,)"),
        (
            {"scales": np.full((2, 16), np.inf, np.float16)},
            "scales must be finite; found NaN or infinity",
        ),
        (
            {"scales": np.full((2, 16), np.nan, np.float16)},
            "scales must be finite; found NaN or infinity",
        ),
        (
            {"g_idx": np.arange(64, dtype=np.int32)},
            "g_idx from 0 to 63 must lie in 0 to 1, as there are 2 groups",
        ),
        (
            {"g_idx": np.arange(-1, 63, dtype=np.int32)},
            "g_idx from -1 to 62 must lie in 0 to 1",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, message, refuses):
    with refuses(message):
        gptq.from_tensors(small_tensors(**changes), SMALL)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_that_are_no_whole_blocks_are_refused(bits, refuses):
    config = gptq.Config(bits=bits, group_size=32, checkpoint_format="gptq_p")
    tensors = small_tensors(qweight=np.zeros((bits + 1, 32), np.int32))
    with refuses(f"qweight.shape=({bits + 1}, 32) must be [k * {bits} / 32, n]"):
        gptq.check(tensors, config)


def test_unknown_checkpoint_formats_are_refused(refuses):
    wanted = "checkpoint_format='v2' must be one of ('gptq', 'gptq_v2', 'gptq_p')"
    with refuses(wanted):
        gptq.to_tensors(qjax.quantize(jnp.ones((64, 32)), group_size=32), "v2")
    with refuses(wanted):
        config = dataclasses.replace(SMALL, checkpoint_format="v2")
        gptq.from_tensors(small_tensors(), config)


class TestWriting:
    """What `to_tensors` refuses, and what it makes of other forms."""

    def quantized(self, **changes):
        m = oracle.random(0, 64, 32, **changes)
        leaves = {"zero": m.zero, "codebook": m.codebook, "input_scale": m.input_scale}
        return tensor.build(
            [jnp.asarray(words) for words in m.words],
            jnp.asarray(m.scale),
            layout=gptq.Stream(),
            segments=[tensor.Segment(part.bits, part.group_size) for part in m.parts],
            affine=tensor.Affine[m.affine],
            grouping=tensor.Grouping[m.grouping],
            **{k: None if v is None else jnp.asarray(v) for k, v in leaves.items()},
        )

    @pytest.mark.parametrize(
        ("changes", "checkpoint_format", "reason"),
        [
            (
                {"bits": 5},
                "gptq",
                "5 bits are not among (2, 3, 4, 8); compressed-tensors holds 1 to 8",
            ),
            ({"bits": 1}, "gptq_p", "1 bits are not among (2, 3, 4, 5, 6, 7, 8)"),
            (
                {"parts": [(4, 32, 32), (2, 32, 32)]},
                "gptq",
                "its rows have several widths; EXL2 holds those",
            ),
            ({"grouping": "FLAT"}, "gptq", "it has flat groups"),
            ({"input_scale": True}, "gptq", "it has an input_scale"),
            ({"affine": "OFFSET"}, "gptq", "does not have integer zeros"),
            ({"float_zero": True}, "gptq", "does not have integer zeros"),
            (
                {"affine": "CENTERED", "float_zero": True},
                "gptq",
                "does not have integer zeros",
            ),
            ({"affine": "CODEBOOK"}, "gptq", "does not have integer zeros"),
            ({"columns": 1}, "gptq", "columns share scales or zeros"),
        ],
    )
    def test_refuses(self, changes, checkpoint_format, reason, refuses):
        with refuses(reason):
            gptq.to_tensors(self.quantized(**changes), checkpoint_format)

    def test_refuses_shared_zeros(self, refuses):
        qt = self.quantized()
        shared = tensor.build(
            qt.words, qt.scale, qt.zero[:, :1], layout=qt.layout, segments=qt.segments
        )
        with refuses("columns share scales or zeros"):
            gptq.to_tensors(shared)

    def test_refuses_stacks(self, refuses):
        stack = qjax.quantize(jnp.ones((2, 64, 32)), group_size=32)
        with refuses("it stacks (2,) matrices; write them one by one"):
            gptq.to_tensors(stack)

    def test_refuses_zeros_that_fill_no_words(self, refuses):
        with refuses("n=12 does not fill whole words of zeros"):
            gptq.to_tensors(qjax.quantize(jnp.ones((64, 12)), group_size=32))

    def test_symmetric_zeros_are_the_middle_code(self):
        qt = qjax.quantize(jnp.eye(64), bits=4, group_size=32, symmetric=True)
        tensors = gptq.to_tensors(qt, "gptq")
        assert (np.asarray(tensors["qzeros"]) == 0x77777777).all()
        back = gptq.from_tensors(
            {name: np.asarray(array) for name, array in tensors.items()},
            gptq.Config(group_size=32),
        )
        chex.assert_trees_all_equal(qjax.dequantize(back), qjax.dequantize(qt))

    def test_padding_is_left_out(self):
        m = oracle.random(0, 96, 48)
        qt = tensor.build(
            [jnp.asarray(m.words[0])],
            jnp.asarray(m.scale)[:2, :40],
            jnp.asarray(m.zero)[:2, :40],
            layout=gptq.Stream(),
            segments=[tensor.Segment(4, 32, padding=32)],
            padding=8,
        )
        words = np.asarray(gptq.to_tensors(qt)["qweight"]).view(np.uint32)
        chex.assert_trees_all_equal(words, oracle.pack(m.codes[:64, :40], 4))


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ({"bits": 4}, gptq.Config(bits=4, group_size=None)),
        ({"bits": 3, "group_size": 64}, gptq.Config(bits=3, group_size=64)),
        (
            {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
            gptq.Config(bits=8, group_size=None, checkpoint_format="gptq_v2"),
        ),
        # Newer files of GPTQModel name the format "format".
        (
            {"bits": 5, "group_size": 32, "format": "gptq_p"},
            gptq.Config(bits=5, group_size=32, checkpoint_format="gptq_p"),
        ),
        # Only GPTQModel, and only without symmetry, subtracts from whole words.
        (
            {"bits": 4, "group_size": 32, "sym": False, "meta": {"quantizer": "auto"}},
            gptq.Config(group_size=32),
        ),
        (
            {
                **{"bits": 4, "group_size": 32, "sym": False},
                "meta": {"quantizer": ["gptqmodel:1.4.0"]},
            },
            gptq.Config(group_size=32, wordwise_zeros=True),
        ),
        (
            {"bits": 4, "group_size": 32, "meta": {"quantizer": "gptqmodel:2.0.0"}},
            gptq.Config(group_size=32),
        ),
        (
            {"bits": 4, "group_size": 32, "pack_dtype": "int32", "desc_act": True},
            gptq.Config(group_size=32, act_order=True),
        ),
    ],
)
def test_config_from_json(entry, config):
    assert gptq.Config.from_json(entry) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "bits=None must be one of (2, 3, 4, 8)"),
        (
            {"bits": 5},
            "bits=5 must be one of (2, 3, 4, 8) with checkpoint_format='gptq'",
        ),
        (
            {"bits": 9, "checkpoint_format": "gptq_p"},
            "bits=9 must be one of (2, 3, 4, 5",
        ),
        ({"bits": "4"}, "bits='4' must be one of"),
        ({"bits": True}, "bits=True must be one of"),
        ({"bits": 4.0}, "bits=4.0 must be one of"),
        ({"bits": 4, "group_size": 0}, "group_size=0 must be positive or -1"),
        ({"bits": 4, "group_size": -2}, "group_size=-2 must be positive or -1"),
        ({"bits": 4, "group_size": None}, "group_size=None must be positive or -1"),
        ({"bits": 4, "group_size": 1.5}, "group_size=1.5 must be positive or -1"),
        (
            {"bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is no GPTQ layout; known: ['gptq', 'gptq_v2'",
        ),
        ({"bits": 4, "checkpoint_format": ["gptq"]}, "is no GPTQ layout"),
        ({"bits": 4, "is_marlin_format": True}, "is_marlin_format=true"),
        ({"bits": 4, "pack_dtype": "int16"}, "pack_dtype='int16' must be 'int32'"),
        ({"bits": 4, "sym": "false"}, "sym='false' must be true or false"),
        ({"bits": 4, "desc_act": 1}, "desc_act=1 must be true or false"),
        ({"bits": 4, "dynamic": {"a": 1}}, "must map patterns to objects"),
        ({"bits": 4, "dynamic": ["a"]}, "must map patterns to objects"),
        ({"bits": 4, "dynamic": {"+:(": {}}}, "dynamic['+:(']: '(' is no pattern"),
    ],
)
def test_config_refuses(entry, message, refuses):
    with refuses(message):
        gptq.Config.from_json(entry)


def test_config_of_a_module():
    config = gptq.Config.from_json(
        {
            **{"bits": 4, "group_size": 128, "sym": False},
            "meta": {"quantizer": ["gptqmodel:4.0.0"]},
            "dynamic": {
                r"-:.*\.mlp\.gate": {},
                r"+:model\.layers\.1\..*": {"bits": 8, "group_size": 64},
                r"model\.layers\.2\..*": {"bits": 2, "desc_act": True},
                r"+:model\.layers\.3\..*": {"group_size": -1},
                r"+:.*\.down_proj": {"bits": 3},
            },
        }
    )
    assert config.of("model.layers.0.mlp.up_proj") is config
    assert config.of("model.layers.1.mlp.gate") is None  # the first match decides
    cases = {
        "model.layers.1.mlp.down_proj": (8, 64),
        "model.layers.2.self_attn.q_proj": (2, 128),
        "model.layers.3.mlp.up_proj": (4, None),
        "model.layers.4.mlp.down_proj": (3, 128),
    }
    for module, (bits, group_size) in cases.items():
        found = config.of(module)
        assert found.act_order == (bits == 2)
        expected = gptq.Config(bits=bits, group_size=group_size, wordwise_zeros=True)
        assert dataclasses.replace(found, act_order=False) == expected


def test_config_of_a_module_refuses_a_bad_override(refuses):
    with refuses("dynamic['+:lm_head']: bits=5 must be one of (2, 3, 4, 8)"):
        gptq.Config.from_json({"bits": 4, "dynamic": {"+:lm_head": {"bits": 5}}})


def test_config_of_an_asymmetric_module_in_a_symmetric_model():
    """The override decides how the module's zeros were written."""
    config = gptq.Config.from_json(
        {
            **{"bits": 4, "sym": True, "meta": {"quantizer": "gptqmodel:4.0.0"}},
            "dynamic": {"+:lm_head": {"sym": False}},
        }
    )
    assert not config.wordwise_zeros
    assert config.of("lm_head").wordwise_zeros


def test_layouts_of_configs():
    for bits in (2, 3, 4, 8):
        assert gptq.layout_of(gptq.Config(bits=bits)) == gptq.Stream()
    for bits in range(2, 9):
        config = gptq.Config(bits=bits, checkpoint_format="gptq_p")
        expected = gptq.Planar() if bits in (3, 5, 6, 7) else gptq.Stream()
        assert gptq.layout_of(config) == expected


def test_formats_table():
    assert qjax.formats.FORMATS["gptq"] is gptq


def test_zeros_beyond_their_field_are_refused(refuses):
    """MPQ does not wrap stored + 1; written as four bits, 16 would become 0."""
    qt = qjax.quantize(jnp.ones((32, 32)), bits=4, group_size=32)
    wide = dataclasses.replace(qt, zero=jnp.full((1, 32), 16, jnp.uint8))
    for checkpoint_format in ("gptq", "gptq_v2"):
        with refuses("its zeros reach 16, and 4 bits hold up to 15"):
            gptq.to_tensors(wide, checkpoint_format)
