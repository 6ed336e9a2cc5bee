"""A `QTensor` as arrays and plain metadata: back as it was, and nothing on trust."""

import importlib
import inspect
import json
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qjax
from qjax import formats, tensor
from qjax.formats import (
    block_scale,
    bnb,
    bnb_int8,
    compressed_tensors_floats,
    exl2,
    flattening,
    gguf,
    gptq,
    modelopt,
    mpq,
)
from tests import goldens, oracle

LAYOUTS = {
    "gptq.Stream": {},
    "gptq.Planar": {},
    "awq.Gemm": {},
    "awq.Gemv": {},
    "awq_v2.Interleaved": {},
    "tinygemm.TensorCoreTiled": {"inner_k_tiles": 4},
    "quanto.Slabs": {"k": 64, "group_size": None},
    "flexgen.Blocks": {"group_size": 32},
    "hqq.Slabs": {"k": 64, "group_size": 32, "axis": 0},
    "bnb.Flat": {"k": 64},
    "compressed_tensors.Dense": {},
    "compressed_tensors.Aligned": {},
    "compressed_tensors_floats.Nibbles": {},
    "fp8.Bytes": {},
    "torchao.Bytes": {},
    "mxfp4.Blocks": {},
    "gguf.Planes": {"block": 32, "run": 16},
    "tiles.Tiles": {},
}


def matrix(bits: int, **kwargs) -> qjax.QTensor:
    w = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float16)
    return qjax.quantize(jnp.asarray(w), bits=bits, group_size=32, **kwargs)


def four_bits(**kwargs) -> qjax.QTensor:
    return matrix(4, **kwargs)


def exl2_matrix(scale) -> qjax.QTensor:
    """Two widths, with an order and an encoded scale."""
    words = [jnp.zeros((8, 32), jnp.uint32), jnp.zeros((6, 32), jnp.uint32)]
    return tensor.build(
        words,
        scale,
        layout=gptq.Stream(),
        segments=[tensor.Segment(4, 32), tensor.Segment(3, None)],
        affine=tensor.Affine.CENTERED,
        order=jnp.arange(128, dtype=jnp.int32)[::-1],
        rounding=2,
    )


def exl2_scale(groups: int = 3) -> exl2.Scale:
    index = jnp.arange(groups * 32, dtype=jnp.uint8).reshape(groups, 32) % 16
    return exl2.Scale(index=index, maximum=jnp.ones(groups, jnp.float16))


def mpq_matrix() -> qjax.QTensor:
    index = jnp.arange(64, dtype=jnp.uint8).reshape(2, 2, 16) % 16
    one = jnp.ones((2, 2, 1), jnp.bfloat16)
    numbers = mpq.DoubleQuantized(index=index, zero=one, step=one)
    w = four_bits()
    return tensor.build(
        w.words,
        numbers,
        numbers,
        layout=w.layout,
        segments=w.segments,
        affine=tensor.Affine.OFFSET,
    )


def bnb_matrix(double: bool) -> qjax.QTensor:
    absmax = jnp.arange(64).reshape(2, 32)
    nested = bnb.Nested(jnp.ones(4), jnp.linspace(0, 1, 256), jnp.float32(0.5))
    scale = bnb.Absmax(
        absmax=absmax.astype(jnp.uint8 if double else jnp.float32),
        nested=nested if double else None,
        nested_blocksize=16,
    )
    return tensor.build(
        qjax.relayout(four_bits(), bnb.Flat(64)).words,
        scale,
        layout=bnb.Flat(64),
        segments=[tensor.Segment(4, 32)],
        affine=tensor.Affine.CODEBOOK,
        codebook=jnp.asarray(bnb.TABLES["nf4"]),
        weight_dtype="bfloat16",
    )


def float_matrix(scale: object, bits: int = 4) -> qjax.QTensor:
    return tensor.build(
        matrix(bits).words,
        scale,
        layout=four_bits().layout,
        segments=[tensor.Segment(bits, 32)],
        affine=tensor.Affine.FLOAT,
    )


def blocks(values: jnp.ndarray, **options) -> block_scale.BlockScale:
    return block_scale.BlockScale.of(values, n=32, size=(12, 32), **options)


def nvfp4_scale() -> compressed_tensors_floats.OverGlobal:
    local = jnp.arange(64, dtype=jnp.uint8).reshape(2, 32)
    return compressed_tensors_floats.OverGlobal(local=local, whole=jnp.float32(3))


def gguf_matrix() -> qjax.QTensor:
    """Q2_K, whose scales and minima are encoded."""
    blocks = np.random.default_rng(0).integers(0, 256, (32, 1, 84), dtype=np.uint8)
    blocks[..., 80:] = np.float16([0.5, 2]).view(np.uint8)
    return gguf.from_tensors({"weight": blocks}, gguf.Config(type="Q2_K"))


def modelopt_scale() -> modelopt.TimesGlobal:
    scale = nvfp4_scale()
    return modelopt.TimesGlobal(local=scale.local, whole=scale.whole)


CASES = {
    "float": lambda: float_matrix(jnp.ones((2, 1)), 8),
    "nvfp4": lambda: float_matrix(nvfp4_scale()),
    "nvfp4 of modelopt": lambda: float_matrix(modelopt_scale()),
    "blocks": lambda: float_matrix(blocks(jnp.ones((2, 3))), 8),
    "blocks of exponents": lambda: float_matrix(
        blocks(jnp.full((2, 3), 120, jnp.uint8), exponents=True), 8
    ),
    "symmetric columns": lambda: qjax.quantize(jnp.eye(64), 8, None, symmetric=True),
    "three bits": lambda: qjax.quantize(jnp.eye(64), 3, 32),
    "stack": lambda: qjax.quantize(jnp.ones((2, 3, 64, 32)), 4, 32),
    "exl2": lambda: exl2_matrix(exl2_scale()),
    "mpq": mpq_matrix,
    "gguf": gguf_matrix,
    "bnb": lambda: bnb_matrix(False),
    "bnb, double": lambda: bnb_matrix(True),
    "bnb, 8 bits": lambda: bnb_int8.quantize(jnp.eye(64)),
} | {
    name: lambda name=name: qjax.relayout(
        matrix(8 if name == "fp8.Bytes" else 4),
        flattening.LAYOUTS[name](**LAYOUTS[name]),
    )
    for name in LAYOUTS
    if name in flattening.LAYOUTS
}


def there_and_back(w: qjax.QTensor) -> qjax.QTensor:
    arrays, metadata = flattening.flatten(w)
    assert {type(value) for value in metadata.values()} <= {str, int}
    return flattening.unflatten(arrays, json.loads(json.dumps(metadata)))


def assert_same(found: qjax.QTensor, wanted: qjax.QTensor) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    chex.assert_trees_all_equal(found, wanted)
    chex.assert_trees_all_equal_dtypes(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_comes_back_equal(case):
    w = CASES[case]()
    again = there_and_back(w)
    assert_same(again, w)
    chex.assert_trees_all_equal(qjax.codes(again), qjax.codes(w))
    chex.assert_trees_all_equal(qjax.dequantize(again), qjax.dequantize(w))


def test_every_leaf_and_field_comes_back(as_qtensor):
    m = oracle.random(0, 64, 32, row_group=True, order=True, input_scale=True)
    w = as_qtensor(m)
    assert_same(there_and_back(w), w)
    flat = tensor.build(
        w.words,
        jnp.ones((64, 1)),
        jnp.ones((64, 1)),
        layout=w.layout,
        segments=[tensor.Segment(4, 32)],
        grouping=tensor.Grouping.STRIDED,
        affine=tensor.Affine.OFFSET,
        rounding=2,
    )
    assert_same(there_and_back(flat), flat)


def test_all_layouts_and_encodings_have_a_name():
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"qjax.formats.{module.name}")

    def below(base):
        for kind in base.__subclasses__():
            yield from (kind, *below(kind))

    def inside(base, table):
        # `sharding.Segmented` is of no file: flattening joins it.
        packages = "qjax.formats.", "qjax.tensor."
        kinds = [k for k in below(base) if k.__module__.startswith(packages)]
        kinds = [kind for kind in kinds if not inspect.isabstract(kind)]
        assert set(kinds) == set(table.values())
        return {name for name, kind in table.items() if kind in kinds}

    assert inside(tensor.Layout, flattening.LAYOUTS) == LAYOUTS.keys()
    encodings = inside(tensor.Encoded, flattening.ENCODINGS)
    # Encodings of one array need no check of their own.
    several = {
        "exl2.Scale",
        "mpq.DoubleQuantized",
        "bnb.Absmax",
        "levels.Nested",
        "levels.WithGlobal",
    }
    several |= {"compressed_tensors_floats.OverGlobal", "block_scale.BlockScale"}
    several |= {"modelopt.TimesGlobal", "levels.WithGlobal"}
    assert encodings - several == {"mxfp4.E8M0", "bnb_int8.Maxima"}


def test_through_a_safetensors_file(tmp_path):
    w = exl2_matrix(exl2_scale())
    arrays, metadata = flattening.flatten(w)
    held = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    save_file(held, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps(metadata))
    found = json.loads((tmp_path / "w.json").read_text())
    again = flattening.unflatten(load_file(tmp_path / "w.safetensors"), found)
    assert_same(again, w)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))


def test_under_jit():
    arrays, metadata = flattening.flatten(four_bits())

    @jax.jit
    def there_and_back(arrays):
        return flattening.flatten(flattening.unflatten(arrays, metadata))[0]

    chex.assert_trees_all_equal(there_and_back(arrays), arrays)


def test_layouts_of_others_have_no_name(refuses):
    class Mine(gptq.Stream):
        pass

    with refuses("Mine() must be one of ['"):
        flattening.flatten(qjax.relayout(four_bits(), Mine()))


def f16(*shape):
    return np.ones(shape, np.float16)


WRONG = [
    # of the tensor of four bits: metadata, arrays, the message
    ({"format": "torch"}, {}, "metadata['format']='torch' must be in ['qjax.QTensor']"),
    ({"version": 2}, {}, "metadata['version']=2 must be an integer from 1 to 1"),
    ({"version": True}, {}, "metadata['version']=True must be an integer"),
    ({"layout": "os.system"}, {}, "metadata['layout']='os.system' must be in ['awq."),
    ({"layout": ["gptq.Stream"]}, {}, "metadata['layout']=['gptq.Stream'] must be"),
    ({"layout": "awq_v2.Interleaved"}, {}, "words.dtype=uint32 must be"),
    ({"layout": "bnb.Flat"}, {}, "metadata['layout.k']=None must be an integer from 1"),
    ({"layout.k": 4}, {}, "metadata has ['layout.k'], which say nothing"),
    ({"affine": "zero"}, {}, "metadata['affine']='zero' must be in ['ZERO', 'OFFSET'"),
    ({"affine": "OFFSET"}, {}, "zero.dtype=uint8 must be a float dtype"),
    ({"grouping": None}, {}, "metadata['grouping']=None must be in ['ROWS', 'FLAT'"),
    ({"rounding": 3}, {}, "metadata['rounding']=3 must be an integer from 1 to 2"),
    ({"weight_dtype": "int8"}, {}, "['weight_dtype']='int8' must be in ['fl"),
    ({"padding": 32}, {}, "more than the padding of 0 rows and 32 columns"),
    ({"segments": 2}, {}, "metadata['segments.1.bits']=None must be an integer"),
    ({"segments": 2, "segments.1.bits": 4}, {}, "metadata['segments.1.padding']=None"),
    (
        {"segments": 2, "segments.1.bits": 4, "segments.1.padding": 0},
        {},
        "arrays['words.1'] is missing",
    ),
    ({"segments": 10**12}, {}, "must be an integer from 1 to 3"),
    ({"segments.0.bits": 9}, {}, "metadata['segments.0.bits']=9 must be an integer"),
    ({"segments.0.bits": 3}, {}, "words.shape[0]=8 must be a multiple of 3"),
    ({"segments.0.bits": "four"}, {}, "metadata['segments.0.bits']='four' must be"),
    ({"segments.0.bits": "9"}, {}, "metadata['segments.0.bits']=9 must be"),
    ({"segments.0.group_size": 0}, {}, "['segments.0.group_size']=0 must be"),
    ({"segments.0.group_size": 16}, {}, "scale.shape[:-1]=(2,) must be (4,)"),
    ({"segments.0.padding": 64}, {}, "more than the padding of 64 rows"),
    ({"scale": "gptq.Stream"}, {}, "metadata['scale']='gptq.Stream' must be in ["),
    ({"scale": "exl2.Scale"}, {}, "scale has the arrays []; it must have ['index'"),
    ({"scale": "mpq.DoubleQuantized"}, {}, "scale has the arrays []"),
    ({"scale": "mxfp4.E8M0"}, {}, "scale: arrays has [], not ['scale.exponent']"),
    ({"scale": "bnb.Absmax"}, {}, "metadata['scale.nested_blocksize']=None must be"),
    ({}, {"scale": None}, "arrays['scale'] is missing"),
    ({}, {"scale": [1.0]}, "arrays['scale'] of list must be an array of one of"),
    ({}, {"scale": np.ones((2, 32))}, "arrays['scale'] of float64 must be an array"),
    ({}, {"scale": np.ones((2, 32), object)}, "arrays['scale'] of object must be"),
    ({}, {"scale": f16(32)}, "scale.shape=(32,) must be [*batch, groups, n]"),
    ({}, {"scale": f16(2, 0)}, "scale.shape[-1]=0 must be n=32 or a divisor of it"),
    ({}, {"scale": f16(2, 40)}, "scale.shape[-1]=40 must be n=32 or a divisor of it"),
    ({}, {"zero": f16(3, 32)}, "zero.shape[:-1]=(3,) must be (2,)"),
    ({}, {"words.0": f16(8)}, "must have at least 2 axes and not be empty"),
    ({}, {"words.0": f16(0, 32)}, "must have at least 2 axes and not be empty"),
    ({}, {"words.0": f16(8, 32)}, "words.dtype=float16 must be int32 or uint32"),
    ({}, {"words.1": f16(8, 32)}, "arrays has ['words.1'], which are no leaves"),
    ({}, {"__class__": f16(8, 32)}, "arrays has ['__class__'], which are no leaves"),
    ({}, {"order": np.arange(63, dtype=np.int32)}, "order"),
    ({}, {"order": np.zeros(64, np.int32)}, "arrays['order'] must be a permutation"),
    ({}, {"order": np.arange(64, dtype=np.int16)}, "order.dtype=int16 must be int32"),
    (
        {},
        {"row_group": np.full(64, 2, np.int32)},
        "arrays['row_group'] from 2 to 2 must lie in 0 to 1",
    ),
    ({}, {"codebook": f16(16)}, "codebook and affine=Affine.ZERO must come together"),
]


@pytest.mark.parametrize("case", CASES)
def test_a_program_with_it_is_exported(case):
    """`jax.export` writes down the structure of what a function takes and returns."""
    w = CASES[case]()
    program = jax.export.export(jax.jit(lambda w: jax.tree.map(jnp.negative, w)))(w)
    again = jax.export.deserialize(program.serialize())
    assert again.in_tree == program.in_tree == jax.tree.structure(((w,), {}))
    assert again.out_tree == jax.tree.structure(w)
    chex.assert_trees_all_equal(
        again.call(w).words, jax.tree.map(jnp.negative, w.words)
    )


def test_an_exported_product(refuses):
    x, w = jnp.ones((2, 64)), four_bits()
    program = jax.export.export(jax.jit(qjax.matmul))(x, w)
    blob = program.serialize()
    y = jax.export.deserialize(blob).call(x, w)
    chex.assert_trees_all_equal(y, jax.jit(qjax.matmul)(x, w))
    changed = bytes(blob).replace(b"gptq.Stream", b"gptq.Scream")
    with refuses("metadata['layout']='gptq.Scream' must be in"):
        jax.export.deserialize(bytearray(changed))


@pytest.mark.parametrize(("entries", "leaves", "message"), WRONG)
def test_wrong_parts_are_refused(entries, leaves, message, refuses):
    arrays, metadata = flattening.flatten(four_bits())
    given = {name: a for name, a in (arrays | leaves).items() if a is not None}
    with refuses(message):
        flattening.unflatten(given, metadata | entries)


SCALES = {
    "exl2": (
        lambda: exl2_matrix(exl2_scale()),
        [
            ("index", np.full((3, 32), 16, np.uint8), "from 16 to 16 must lie in 0"),
            ("index", np.zeros(32, np.uint8), "arrays['scale.maximum']=float16[3]"),
            ("index", np.zeros((3, 32), np.int8), "arrays['scale.index']=int8[3, 32]"),
            (
                "maximum",
                f16(1),
                "arrays['scale.maximum']=float16[1] must be float16[3]",
            ),
            ("minimum", f16(3), "scale has the arrays ['index', 'maximum', 'minimum']"),
        ],
    ),
    "mpq": (
        mpq_matrix,
        [
            ("index", np.full((2, 2, 16), 16, np.uint8), "must lie in 0 to 15"),
            ("zero", f16(1, 2, 1), "must be float16 or bfloat16 or float32[2, 2, 1]"),
            ("step", np.ones((2, 2, 1), np.int8), "arrays['scale.step']=int8[2, 2, 1]"),
        ],
    ),
    "gguf": (
        gguf_matrix,
        [
            ("factor", np.zeros((16, 32), np.uint8), "=uint8[16, 32] must be int8"),
            ("factor", np.zeros(32, np.int8), "'scale.factor'], whose shape is (32,)"),
            ("step", f16(1, 16), "=float16[1, 16] must be float16[1, 32]"),
            ("step", f16(0, 32), "(0,) blocks must have a divisor of the groups"),
            ("step", f16(3, 32), "(3,) blocks must have a divisor of the groups"),
            ("step", f16(32), "=float16[32] must be float16[1, 32]"),
            ("negative", 2, "['scale.negative']=2 must be an integer from 1 to 1"),
        ],
    ),
    "bnb": (
        lambda: bnb_matrix(True),
        [
            ("nested.table", np.ones(16, np.float32), "must be float32[256]"),
            ("nested.absmax", np.ones(1, np.float32), "must be float32[4]"),
            ("nested.offset", np.ones(1, np.float32), "must be float32[]"),
            ("absmax", np.ones((2, 32), np.float32), "must be uint8[2, 32]"),
            ("storage", "object", "['scale.storage']='object' must be in"),
            ("quant_type", "nf5", "['scale.quant_type']='nf5' must be in ['nf4'"),
            ("nested_blocksize", 0, "['scale.nested_blocksize']=0 must be"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [(case, *wrong) for case, (_, wrongs) in SCALES.items() for wrong in wrongs],
)
def test_wrong_encodings_are_refused(case, name, value, message, refuses):
    arrays, metadata = flattening.flatten(SCALES[case][0]())
    part = {f"scale.{name}": value}
    if isinstance(value, np.ndarray):
        arrays |= part
    else:
        metadata |= part
    with refuses(message):
        flattening.unflatten(arrays, metadata)


SCALARS = st.none() | st.booleans() | st.integers(-2, 2**40) | st.text(max_size=9)
NAMES = st.sampled_from([*flattening.LAYOUTS, *flattening.ENCODINGS, "ROWS", "FLAT"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_metadata_is_right_or_refused(data):
    """Whatever is changed, a tensor of another kind or a ValueError comes of it."""
    arrays, metadata = flattening.flatten(CASES[data.draw(st.sampled_from([*CASES]))]())
    keys = st.sampled_from([*metadata, "scale", "layout.k", "layout.group_size"])
    changes = data.draw(st.dictionaries(keys, SCALARS | NAMES, max_size=3))
    try:
        w = flattening.unflatten(arrays, metadata | changes)
    except ValueError:
        return
    assert flattening.flatten(w)[1] == metadata | changes
    assert qjax.codes(w).shape == w.shape


def test_a_safetensors_file_holds_it(tmp_path):
    """Its metadata are texts."""
    qt = four_bits()
    arrays, metadata = flattening.flatten(qt)
    texts = {key: str(value) for key, value in metadata.items()}
    save_file({k: np.asarray(a) for k, a in arrays.items()}, tmp_path / "w", texts)
    with safe_open(tmp_path / "w", framework="numpy") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        again = flattening.unflatten(stored, file.metadata())
    assert jax.tree.structure(again) == jax.tree.structure(qt)
    chex.assert_trees_all_equal(again, qt)


def test_a_file_of_numpy_holds_bfloat16(tmp_path):
    qt = qjax.quantize(jnp.eye(64, dtype=jnp.bfloat16), group_size=32)
    arrays, metadata = flattening.flatten(qt)
    np.savez(tmp_path / "w.npz", **arrays)
    again = flattening.unflatten(goldens.arrays(tmp_path / "w.npz"), metadata)
    chex.assert_trees_all_equal(again, qt)
