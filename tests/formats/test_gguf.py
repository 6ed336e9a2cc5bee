"""GGUF's blocks against what the package gguf makes of them, bit for bit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import pallas, tensor
from qjax.formats import flattening, gguf, gptq
from qjax.formats.tiles import Tiles
from tests import goldens
from tests.goldens import load, same_bits

FILES = goldens.names("gguf")
GRIDS = [name for name in FILES if load(name)["meta"]["type"] in gguf.GRIDS]
Q4_K, Q8_0, MXFP4, NVFP4, Q1_0 = (
    next(name for name in FILES if f"__{kind}__" in name)
    for kind in ("q4_k", "q8_0", "mxfp4", "nvfp4", "q1_0")
)


def read(name: str, **changes) -> qjax.QTensor:
    data = load(name)
    return gguf.from_tensors(tensors_of(data, **changes), config_of(data))


def tensors_of(data: dict, **changes) -> dict:
    given = {"weight": data["raw"]} | changes
    return {name: array for name, array in given.items() if array is not None}


def config_of(data: dict) -> gguf.Config:
    return gguf.Config(type=data["meta"]["type"])


def same_weight(qt: qjax.QTensor, data: dict, factor: float = 1) -> None:
    """The same bits; of NVFP4 the same numbers, as its floats have a minus zero."""
    is_float = qt.affine is tensor.Affine.FLOAT
    same = chex.assert_trees_all_equal if is_float else same_bits
    same(qjax.dequantize(qt), jnp.asarray(data["out_dequant"].T * np.float32(factor)))


def test_every_type_has_a_golden_file():
    assert {load(name)["meta"]["type"] for name in FILES} == gguf.KINDS.keys()
    assert len(FILES) == len(gguf.KINDS)


@pytest.mark.parametrize("name", GRIDS)
def test_reads_points_of_a_grid(name, refuses):
    """Every point of it, in four bits a code, or one or two; there is no way back."""
    data = load(name)
    kind, qt = gguf.KINDS[data["meta"]["type"]], read(name)
    n, blocks, size = data["raw"].shape
    assert (kind.size, kind.block * blocks) == (size, qt.k)
    assert (qt.shape, qt.dtype) == ((512, n), jnp.float32)
    assert (qt.segments[0].group_size, qt.bits) == (kind.group_size, kind.bits)
    for layout in (None, gptq.Stream(), pallas.layout_of(qt)):
        same = qt if layout is None else qjax.prepare(qt, layout=layout)
        same_bits(qjax.dequantize(same), data["out_dequant"].T)
    assert qt.nbytes < (kind.bits + 0.6) / 8 * n * 512 + 64
    # Kernels read them as they read IQ4_XS, or other codes of two bits.
    assert isinstance(qjax.prepare(qt, layout=pallas.layout_of(qt)).layout, Tiles)
    stack = gguf.from_tensors({"weight": data["raw"][None]}, config_of(data))
    same_bits(qjax.dequantize(stack)[0], data["out_dequant"].T)
    with refuses("no type has its width, map, group size and scales"):
        gguf.to_tensors(qt)


@pytest.mark.parametrize("kind", [*gguf.GRIDS])
def test_a_scale_of_a_grid_that_is_no_number_is_refused(kind, refuses):
    with refuses("weight's d must be finite"):
        blocks = np.full((1, 1, gguf.KINDS[kind].size), 255, np.uint8)
        gguf.from_tensors({"weight": blocks}, gguf.Config(type=kind))


@pytest.mark.parametrize("name", sorted(set(FILES) - set(GRIDS)))
def test_reads_dequantizes_and_writes(name):
    data = load(name)
    qt = read(name)
    kind = gguf.TYPES[data["meta"]["type"]]
    n, blocks, size = data["raw"].shape
    assert (kind.size, kind.block * blocks) == (size, qt.k)
    assert (qt.shape, qt.dtype) == ((512, n), jnp.float32)
    assert (qt.segments[0].group_size, qt.bits) == (kind.group_size, kind.bits)
    assert qt.nbytes < 1.2 * data["raw"].nbytes + 64
    same_weight(qt, data)
    same_bits(np.asarray(gguf.to_tensors(qt)["weight"]), data["raw"])

    # Prepared it is another layout, on a CPU with plain scales, and the same weight.
    prepared = qjax.prepare(qt)
    in_tiles = isinstance(prepared.layout, Tiles)
    assert in_tiles or prepared.layout == gptq.Stream()
    assert in_tiles or not isinstance(prepared.scale, tensor.Encoded)
    same_weight(prepared, data)
    moved = qjax.relayout(qt, gptq.Stream())
    same_bits(np.asarray(gguf.to_tensors(moved)["weight"]), data["raw"])

    # For a GPU, scales of blocks of 256 stay in two levels, and can be written again.
    for_gpu = qjax.prepare(qt, layout=pallas.layout_of(qt))
    assert isinstance(for_gpu.layout, Tiles)
    same_weight(for_gpu, data)
    if kind.is_nested:
        assert isinstance(for_gpu.scale, tensor.Nested)
        same_bits(np.asarray(gguf.to_tensors(for_gpu)["weight"]), data["raw"])


@pytest.mark.parametrize("name", FILES)
def test_flattens(name):
    qt = read(name)
    again = flattening.unflatten(*flattening.flatten(qt))
    assert jax.tree.structure(again) == jax.tree.structure(qt)
    chex.assert_trees_all_equal(again, qt)


@pytest.mark.parametrize("name", FILES)
def test_matmul(name):
    """Within float32's rounding of a product in float64; MXFP4's scales are huge."""
    data = load(name)
    finite = data["raw"].copy()
    if name == MXFP4:
        finite[..., 0] = 120 + finite[..., 0] % 8
    w = qjax.prepare(read(name, weight=finite))
    x = np.random.default_rng(0).standard_normal((4, 512), np.float32)
    y = np.asarray(qjax.matmul(jnp.asarray(x), w), np.float64)
    exact = x.astype(np.float64) @ np.asarray(qjax.dequantize(w), np.float64)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


# One byte of a block that is not 0, and the codes that it makes.
PLACES = [
    ("Q4_0", 2 + 3, 0x21, {3: 1, 19: 2}),
    ("Q5_0", 2 + 1, 0x81, {8: 16, 15: 16}),
    ("Q5_0", 6 + 3, 0x21, {3: 1, 19: 2}),
    ("Q8_0", 2 + 5, 0x7F, {5: 127}),
    ("Q2_K", 16 + 33, 0b11100100, {161: 1, 193: 2, 225: 3}),
    ("Q3_K", 4, 0b10000001, {4: 4, 228: 4}),
    ("Q3_K", 32 + 33, 0b11100100, {161: 1, 193: 2, 225: 3}),
    ("Q4_K", 16 + 33, 0x21, {65: 1, 97: 2}),
    ("Q5_K", 16 + 1, 0b10000001, {1: 16, 225: 16}),
    ("Q5_K", 48 + 33, 0x21, {65: 1, 97: 2}),
    ("Q6_K", 65, 0x21, {129: 1, 193: 2}),
    ("Q6_K", 128 + 33, 0b11100100, {161: 16, 193: 32, 225: 48}),
    ("IQ4_XS", 8 + 17, 0x21, {33: 1, 49: 2}),
    ("NVFP4", 4 + 9, 0x21, {17: 1, 25: 2}),
]


@pytest.mark.parametrize(("kind", "at", "byte", "codes"), PLACES)
def test_places_of_codes(kind, at, byte, codes):
    """By hand, from the structs of ggml-common.h."""
    size, block = gguf.TYPES[kind].size, gguf.TYPES[kind].block
    blocks = np.zeros((3, 512 // block, size), np.uint8)
    blocks[1, 0, at] = byte
    qt = gguf.from_tensors({"weight": blocks}, gguf.Config(type=kind))
    found = np.asarray(qjax.codes(qt)).astype(int)
    found -= 128 if kind == "Q8_0" else 0
    assert {row: found[row, 1] for row in np.flatnonzero(found[:, 1])} == codes
    assert not found[:, [0, 2]].any()


def test_stacks():
    """Experts have the first axis of the file."""
    data = load(Q4_K)
    raw = np.stack([data["raw"], data["raw"][::-1]])
    qt = gguf.from_tensors({"weight": raw}, config_of(data))
    assert (qt.batch, qt.scale.shape, qt.zero.shape) == ((2,), (2, 16, 3), (2, 16, 3))
    same_bits(qjax.dequantize(qt)[1], data["out_dequant"][::-1].T)
    same_bits(np.asarray(gguf.to_tensors(qt)["weight"]), raw)
    iq4 = load(next(name for name in FILES if "iq4_xs" in name))
    raw = np.stack([iq4["raw"], iq4["raw"]])
    qt = qjax.prepare(gguf.from_tensors({"weight": raw}, config_of(iq4)))
    same_bits(qjax.dequantize(qt)[1], iq4["out_dequant"].T)


def test_one_number_for_all_of_a_matrix():
    """Beside NVFP4: it multiplies, and is written again; a stack has one for each."""
    data = load(NVFP4)
    whole = np.array([0.5], np.float32)
    qt = read(NVFP4, scale=whole)
    same_weight(qt, data, 0.5)
    same_weight(qjax.prepare(qt), data, 0.5)
    written = gguf.to_tensors(qt)
    same_bits(np.asarray(written["weight"]), data["raw"])
    same_bits(np.asarray(written["scale"]), whole)
    raw, each = np.stack([data["raw"]] * 2), np.array([2, 0.25], np.float32)
    tensors = {"weight": raw, "scale": each}
    stack = gguf.from_tensors(tensors, config_of(data))
    chex.assert_trees_all_equal(qjax.dequantize(stack)[1], data["out_dequant"].T / 4)
    same_bits(np.asarray(gguf.to_tensors(stack)["scale"]), each)
    runs = {"weight": ("b0", "n", "k", ""), "scale": ("b0",)}
    assert gguf.axes(tensors, config_of(data)) == runs


def test_modelopt_has_the_same_numbers():
    """Its NVFP4 in GGUF's blocks, and back."""
    words = np.random.default_rng(0).integers(0, 256, (3, 64), np.uint8)
    scale = np.random.default_rng(1).integers(0, 127, (3, 8), np.uint8)
    tensors = {
        "weight": words,
        "weight_scale": scale.view(jnp.float8_e4m3fn),
        "weight_scale_2": np.float32(0.25),
    }
    config = qjax.formats.modelopt.Config(algorithm="NVFP4")
    qt = qjax.formats.modelopt.from_tensors(tensors, config)
    again = gguf.from_tensors(gguf.to_tensors(qt), gguf.Config(type="NVFP4"))
    chex.assert_trees_all_equal(
        qjax.dequantize(again), qjax.dequantize(qt, jnp.float32)
    )
    assert again.shape == (128, 3)


def test_pieces_are_matrices():
    """What `axes` promises: the same share of the blocks is a matrix by itself."""
    data = load(Q4_K)
    assert gguf.axes(tensors_of(data), config_of(data)) == {"weight": ("n", "k", "")}
    piece = read(Q4_K, weight=data["raw"][1:, 1:])
    same_bits(qjax.dequantize(piece), data["out_dequant"][1:, 256:].T)
    stack = {"weight": data["raw"][None]}
    assert gguf.axes(stack, config_of(data)) == {"weight": ("b0", "n", "k", "")}


def test_shards():
    """By whole blocks and columns, prepared or not."""
    mesh = jax.make_mesh((2,), ("model",))
    spec = jax.P("model", None)
    for name, prepare in ((Q4_K, True), (Q4_K, False), (Q8_0, False)):
        qt = qjax.prepare(read(name)) if prepare else read(name)
        cut = qjax.shard(qt, mesh, spec)
        assert len({str(s.index) for s in cut.words[0].addressable_shards}) == 2
        same_bits(qjax.dequantize(cut), load(name)["out_dequant"].T)
    with pytest.raises(ValueError, match=r"qjax\.prepare decodes its scales"):
        qjax.shard(read(MXFP4), mesh, spec)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (Q4_K, {"weight": None}, "weight is missing; found []"),
        (
            Q4_K,
            {"bias": np.zeros(3)},
            "bias is no tensor of GGUF; those are ['weight', 'scale']",
        ),
        (
            Q4_K,
            {"weight": np.zeros((3, 2, 144), np.int8)},
            "weight.dtype=int8 must be uint8 in GGUF",
        ),
        (
            Q4_K,
            {"weight": np.zeros((3, 288), np.uint8)},
            "weight.shape=(3, 288) must be [..., n, k / 256, 144] of Q4_K",
        ),
        (Q8_0, {"weight": np.zeros((3, 2, 33), np.uint8)}, "n, k / 32, 34] of Q8_0"),
        (Q8_0, {"weight": np.zeros((0, 2, 34), np.uint8)}, "of Q8_0, not empty"),
        (
            Q8_0,
            {"weight": np.full((3, 2, 34), 255, np.uint8)},
            "weight's d must be finite; found NaN or infinity",
        ),
        (
            MXFP4,
            {"weight": np.full((3, 2, 17), 255, np.uint8)},
            "weight's e must be finite; found 255",
        ),
        (
            NVFP4,
            {"weight": np.full((3, 2, 36), 127, np.uint8)},
            "scales of 8 bits must be at most 126, E4M3's 448; found 127",
        ),
        (
            NVFP4,
            {"scale": np.array([np.inf], np.float32)},
            "scale must be finite; found NaN or infinity",
        ),
        (NVFP4, {"scale": np.ones(3, np.float32)}, "scale.shape=(3,) must be (1,)"),
        (NVFP4, {"scale": np.ones(1, np.float16)}, "scale.dtype=float16 must be float"),
        (
            Q8_0,
            {"scale": np.ones(1, np.float32)},
            "scale beside a weight of Q8_0 is not read, but of NVFP4",
        ),
        (
            Q1_0,
            {"weight": np.full((3, 2, 18), 123, np.uint8)},
            "2 * d of weight must be finite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, changes, message, refuses):
    with refuses(message):
        read(name, **changes)


def test_types_that_are_not_read(refuses):
    for name in ("Q4_2", "Q8_K", "q4_0"):
        with refuses(f"type={name!r} must be one of ('Q4_0', 'Q4_1'"):
            gguf.check({}, gguf.Config(type=name))
    numbers = [kind.number for kind in gguf.KINDS.values()]
    assert not set(numbers) & gguf.OTHERS.keys()
    assert len(set(numbers)) == len(numbers)


def test_no_directory_has_it(refuses):
    with refuses("quant_method='gguf' is that of single files; pass the path"):
        gguf.Config.from_json({"quant_method": "gguf"})


class TestLayout:
    """What `Planes` cannot hold."""

    @pytest.mark.parametrize(
        ("layout", "bits", "message"),
        [
            (gguf.Planes(32, 16), 5, "bits=5 in planes of (4, 1) bits do not fit"),
            (gguf.Planes(32, 16, 1), 4, "bits=4 in planes of (4,) bits do not fit"),
            (gguf.Planes(32, 16), 7, "bits=7 must be 2, 3, 4, 5, 6 or 8 in GGUF"),
            (gguf.Planes(32, 32), 4, "block=32 must be whole runs of 64 codes"),
            (gguf.Planes(32, 16, 8), 5, "block=32 must be whole runs of 64 codes"),
            (gguf.Planes(256, 32), 4, "codes.shape[0]=32 must be a multiple of 256"),
        ],
    )
    def test_packs(self, layout, bits, message, refuses):
        with refuses(message):
            layout.pack(jnp.zeros((32, 2), jnp.uint8), bits)

    def test_unpacks(self, refuses):
        with refuses("words.shape=(2, 1, 17) must be [n, k / 32, 16]"):
            gguf.Planes(32, 16).unpack(jnp.zeros((2, 1, 17), jnp.uint8), 4)

    def test_digits(self):
        digits = gguf.Planes(256, 32).digits(2)
        assert (digits.fields, digits.width) == ("k6 k5", 8)
        assert gguf.Planes(256, 32, 32).digits(5) is None
        assert gguf.Planes(256, 32).digits(3) is None
        assert gguf.Planes(96, 48).digits(4) is None


class TestWriting:
    """What `to_tensors` makes of tensors from elsewhere, and what it refuses."""

    def test_a_tensor_of_any_origin(self):
        w = np.random.default_rng(0).standard_normal((512, 3)).astype(np.float16)
        qt = qjax.quantize(jnp.asarray(w), bits=8, group_size=32, symmetric=True)
        again = gguf.from_tensors(gguf.to_tensors(qt), gguf.Config(type="Q8_0"))
        chex.assert_trees_all_equal(
            qjax.dequantize(again), qjax.dequantize(qt, jnp.float32)
        )

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (
                lambda: qjax.prepare(read(Q4_K), layout=gptq.Stream()),
                "what qjax.prepare decodes; write the",
            ),
            (lambda: qjax.quantize(jnp.ones((64, 3)), 8, 32), "no type has its width"),
            (
                lambda: qjax.quantize(jnp.ones((64, 3)), 8, 32, symmetric=True),
                "no type has its width",  # its scales are float32
            ),
        ],
    )
    def test_refuses(self, make, reason, refuses):
        with refuses(reason):
            gguf.to_tensors(make())

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"factor": jnp.full((16, 3), 64, jnp.int8)}, "factors have too many bits"),
            ({"negative": True}, "no type has its width"),
            ({"step": jnp.ones((4, 3), jnp.float16)}, "no type has its width"),
        ],
    )
    def test_refuses_scales_that_no_file_has(self, changes, reason, refuses):
        qt = read(Q4_K)
        scale = dataclasses.replace(qt.scale, **changes)
        with refuses(reason):
            gguf.to_tensors(dataclasses.replace(qt, scale=scale))
