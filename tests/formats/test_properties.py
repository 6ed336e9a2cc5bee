"""What holds for every layout: round trips, jit and vmap, relayout, and refusals.

Their words are compared with the upstreams' in the test of each format.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import tensor
from qjax.formats import (
    awq,
    awq_v2,
    bnb,
    compressed_tensors,
    compressed_tensors_floats,
    exl2,
    flexgen,
    fp8,
    gguf,
    gptq,
    hqq,
    mpq,
    mxfp4,
    quanto,
    tiles,
    tinygemm,
    torchao,
)
from tests import oracle

ALL = tuple(range(1, 9))
# How many codes of each width fill whole 32-bit words, and whole planes.
WORDS = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}
PLANES = WORDS | {6: 32}
# HQQ packs whole rows of 8 here; three bits are filled up.
SLABS = {1: 64, 2: 32, 3: 8, 4: 16, 5: 8, 6: 8, 8: 8}


class Case(NamedTuple):
    """A layout, and what it holds: by width, where its widths differ.

    Attributes:
      make: The layout for k inputs.
      widths: The widths of codes.
      k: What k is a multiple of.
      n: What n is a multiple of.
      codes: What k * n is a multiple of.
    """

    make: Callable[[int], tensor.Layout]
    widths: tuple[int, ...] = ALL
    k: int | dict[int, int] = 1
    n: int = 1
    codes: int | dict[int, int] = 1

    def units(self, bits: int) -> tuple[int, int, int]:
        k, codes = (u[bits] if isinstance(u, dict) else u for u in (self.k, self.codes))
        return k, self.n, codes

    def holds(self, k: int, n: int, bits: int) -> bool:
        units = self.units(bits)
        return not any(x % unit for x, unit in zip((k, n, k * n), units, strict=True))

    def shape(self, bits: int, more_k: int = 1, more_n: int = 1) -> tuple[int, int]:
        """So many units of k, and at least so many of n."""
        k, n, codes = self.units(bits)
        k, n = k * more_k, n * more_n
        return k, n * (codes // math.gcd(codes, k * n))


CASES = {
    "gptq.Stream": Case(lambda k: gptq.Stream(), k=WORDS),
    "gptq.Planar": Case(lambda k: gptq.Planar(), k=PLANES),
    "awq.Gemm": Case(lambda k: awq.Gemm(), (4,), n=8),
    "awq.Gemv": Case(lambda k: awq.Gemv(), (4,), k=8),
    "awq_v2.Interleaved": Case(lambda k: awq_v2.Interleaved(), (4,), k=64, n=4),
    "bnb.Flat": Case(bnb.Flat, (4,)),
    "compressed_tensors.Dense": Case(lambda k: compressed_tensors.Dense()),
    "compressed_tensors.Aligned": Case(lambda k: compressed_tensors.Aligned()),
    "compressed_tensors_floats.Nibbles": Case(
        lambda k: compressed_tensors_floats.Nibbles(), (4,), k=2
    ),
    "fp8.Bytes": Case(lambda k: fp8.Bytes(), (8,)),
    "flexgen.Blocks": Case(lambda k: flexgen.Blocks(8), (4,), k=8, codes=16),
    "gguf.Planes": Case(lambda k: gguf.Planes(32, 4), (2, 4, 8), k=32),
    "gguf.Planes, two": Case(lambda k: gguf.Planes(64, 8, 2), (3, 5, 6), k=64),
    "hqq.Slabs": Case(lambda k: hqq.Slabs(k, 8), tuple(SLABS), codes=SLABS),
    "hqq.Slabs, axis 0": Case(lambda k: hqq.Slabs(k, 8, 0), tuple(SLABS), codes=8),
    "mxfp4.Blocks": Case(lambda k: mxfp4.Blocks(), (4,), k=32),
    "quanto.Slabs": Case(lambda k: quanto.Slabs(k, 8), (2, 4), k=8),
    "quanto.Slabs, rows": Case(lambda k: quanto.Slabs(k, None), (2, 4)),
    "tiles.Tiles": Case(lambda k: tiles.Tiles()),
    "tinygemm.TensorCoreTiled": Case(lambda k: tinygemm.TensorCoreTiled(2), (4,), k=32),
    "torchao.Bytes": Case(lambda k: torchao.Bytes()),
}
# Each new shape is compiled, so that there are few of them to draw.
MORE = st.sampled_from([1, 2, 5])
few = functools.partial(
    hypothesis.settings,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def test_every_layout_is_here():
    def below(kind: type) -> Iterable[type]:
        for one in kind.__subclasses__():
            yield from (one, *below(one))

    known = {type(case.make(8)) for case in CASES.values()}
    found = {kind for kind in below(tensor.Layout) if "qjax" in kind.__module__}
    assert found == known


def some_codes(k: int, n: int, seed: int = 0) -> np.ndarray:
    """Codes of 8 bits, and bits above them that no layout may let through."""
    rng = np.random.default_rng(seed)
    return rng.integers(-(2**31), 2**31, (k, n), dtype=np.int32)


def assert_holds(found: jax.Array, codes: np.ndarray, bits: int):
    """Unpacked are the codes that were packed, and perhaps some padding."""
    k, n = codes.shape
    assert found.dtype == jnp.uint8
    assert found.shape[0] >= k
    assert found.shape[1] >= n
    found = np.asarray(found)
    chex.assert_trees_all_equal(found[:k, :n], (codes & (2**bits - 1)).astype(np.uint8))
    assert found.max() < 2**bits


@pytest.mark.parametrize("name", CASES)
@few(max_examples=6)
@hypothesis.given(data=st.data())
def test_round_trips(name, data):
    case = CASES[name]
    bits = data.draw(st.sampled_from(case.widths), "bits")
    k, n = case.shape(
        bits, data.draw(MORE, "units of k"), data.draw(MORE, "units of n")
    )
    codes = some_codes(k, n, seed=data.draw(st.integers(0, 99), "seed"))
    layout = case.make(k)
    words = layout.pack(jnp.asarray(codes), bits)
    assert words.ndim == layout.rank
    assert words.nbytes * 8 >= k * n * bits
    found = layout.unpack(words, bits)
    assert found.shape == layout.extents(words.shape, bits)
    assert_holds(found, codes, bits)
    # The bits above a code make no difference to the words.
    masked = jnp.asarray(codes & (2**bits - 1))
    chex.assert_trees_all_equal(layout.pack(masked, bits), words)


@pytest.mark.parametrize("name", CASES)
def test_jit_and_vmap(name):
    case = CASES[name]
    bits = case.widths[-1]
    k, n = case.shape(bits, more_n=2)
    layout, experts = case.make(k), np.stack([some_codes(k, n), some_codes(k, n, 1)])
    pack = functools.partial(layout.pack, bits=bits)
    unpack = functools.partial(layout.unpack, bits=bits)
    words = jax.jit(jax.vmap(pack))(experts)
    one_by_one = jnp.stack([pack(jnp.asarray(codes)) for codes in experts])
    chex.assert_trees_all_equal(words, one_by_one)
    for codes, found in zip(experts, jax.jit(jax.vmap(unpack))(words), strict=True):
        assert_holds(found, codes, bits)


def experts(bits: int) -> qjax.QTensor:
    """Two matrices of a shape that all layouts hold, with leaves that move along."""
    m = oracle.random(bits, 64, 16, bits=bits, order=True, input_scale=True)
    qt = tensor.build(
        [jnp.asarray(m.words[0])],
        jnp.asarray(m.scale),
        jnp.asarray(m.zero),
        layout=gptq.Stream(),
        segments=[tensor.Segment(bits, 32)],
        order=jnp.asarray(m.order),
        input_scale=jnp.asarray(m.input_scale),
    )
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), qt)


@pytest.mark.parametrize("bits", ALL)
@few(max_examples=1)
@hypothesis.given(data=st.data())
def test_relayout_between_any_two_is_lossless(bits, data):
    able = [name for name, case in CASES.items() if bits in case.widths]
    start = moved = experts(bits)
    for name in data.draw(st.permutations(able), "way"):
        moved = qjax.relayout(moved, CASES[name].make(start.k))
        assert (moved.shape, moved.layout) == (start.shape, CASES[name].make(start.k))
    chex.assert_trees_all_equal(qjax.codes(moved), qjax.codes(start))
    chex.assert_trees_all_equal(qjax.dequantize(moved), qjax.dequantize(start))
    chex.assert_trees_all_equal(qjax.relayout(moved, gptq.Stream()), start)


def zeros(*shape: int, dtype: str = "uint8") -> jax.Array:
    """Those of NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.zeros(shape, jnp.dtype(dtype)))


class TestRefusals:
    """By layouts: names what is wrong, and never packs it some way or other."""

    @pytest.mark.parametrize(
        ("name", "bits"),
        [
            (name, bits)
            for name, case in CASES.items()
            for bits in range(10)
            if bits not in case.widths
        ],
    )
    def test_widths(self, name, bits, refuses):
        case = CASES[name]
        layout, (k, n) = case.make(64), (64, 16)
        with refuses(f"bits={bits}"):
            layout.pack(zeros(k, n), bits)
        words = layout.pack(zeros(k, n), case.widths[-1])
        with refuses(f"bits={bits}"):
            layout.unpack(words, bits)

    @pytest.mark.parametrize(
        "name", [n for n, c in CASES.items() if c[2:] != (1, 1, 1)]
    )
    @few(max_examples=10)
    @hypothesis.given(data=st.data())
    def test_ragged_shapes(self, name, data, refuses):
        case = CASES[name]
        bits = data.draw(st.sampled_from(case.widths), "bits")
        k, n = data.draw(st.integers(1, 999), "k"), data.draw(st.integers(1, 99), "n")
        hypothesis.assume(not case.holds(k, n, bits))
        with refuses("codes"):
            case.make(k).pack(zeros(k, n), bits)

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("shape", [(64,), (2, 64, 16), (64, 0), (0, 16), ()])
    def test_what_is_no_matrix(self, name, shape, refuses):
        case = CASES[name]
        with refuses(f"codes.shape={shape} must be [k, n], not empty"):
            case.make(64).pack(zeros(*shape), case.widths[-1])

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
    def test_dtypes(self, name, dtype, refuses):
        layout, bits = CASES[name].make(64), CASES[name].widths[-1]
        with refuses(f"codes.dtype={dtype} must be an integer dtype"):
            layout.pack(zeros(64, 16, dtype=dtype), bits)
        words = layout.pack(zeros(64, 16), bits)
        with refuses(f"words.dtype={dtype} must be"):
            layout.unpack(zeros(*words.shape, dtype=dtype), bits)

    @pytest.mark.parametrize("name", CASES)
    def test_words_of_other_axes(self, name, refuses):
        layout, bits = CASES[name].make(64), CASES[name].widths[-1]
        words = np.asarray(layout.pack(zeros(64, 16), bits))
        for other in (jnp.asarray(words[None]), jnp.asarray(words[0])):
            with refuses(f"words.shape={other.shape} must have {layout.rank} axes"):
                layout.unpack(other, bits)


@pytest.mark.parametrize(
    ("write", "changes", "reason", "instead"),
    [
        (
            awq.to_tensors,
            {"bits": 3},
            "3 bits are not among (4,)",
            "compressed-tensors",
        ),
        (awq.to_tensors, {"row_group": True}, "(act-order)", "GPTQ holds those"),
        (awq.to_tensors, {"group_size": 48}, "does not divide k=64", "GPTQ holds"),
        (
            awq_v2.to_tensors,
            {"bits": 2},
            "2 bits are not among (4,)",
            "'gptq_p' 2 to 8",
        ),
        (quanto.to_tensors, {"bits": 3}, "bits are not among (2, 4, 8)", "'gptq_p'"),
        (tinygemm.to_tensors, {"row_group": True}, "(act-order)", "GPTQ holds those"),
        (tinygemm.to_tensors, {"order": True}, "(act-order)", "GPTQ holds those"),
        (tinygemm.to_tensors, {"bits": 3}, "3 bits are not among (4,)", "compressed-"),
        (torchao.to_tensors, {"row_group": True}, "(act-order)", "GPTQ holds those"),
        (flexgen.to_compressed, {"bits": 8}, "8 bits are not", "compressed-tensors"),
        (hqq.to_tensors, {"order": True}, "an order of rows", "GPTQ holds an order"),
        (gguf.to_tensors, {"order": True}, "an order of rows", "GPTQ holds an order"),
        (gguf.to_tensors, {"affine": "ZERO"}, "no type has its width", "before that"),
        (bnb.to_tensors, {"affine": "ZERO"}, "is no table", "quantize_4bit makes one"),
        (gptq.to_tensors, {"bits": 5}, "not among (2, 3, 4, 8)", "'gptq_p' 2 to 8"),
        (gptq.to_tensors, {"float_zero": True}, "not have integer zeros", "requantize"),
        (
            mpq.to_tensors,
            {"parts": [(4, 32, 32), (2, 32, 32)]},
            "several",
            "MBWQ holds",
        ),
        (exl2.to_tensors, {"affine": "CENTERED"}, "plain numbers", "requantize it"),
        (
            compressed_tensors.to_tensors,
            {"parts": [(4, 32, 32), (2, 32, 32)]},
            "its rows have several widths",
            "EXL2 holds those",
        ),
    ],
)
def test_writing_says_why_not_and_what_would_do(
    write, changes, reason, instead, as_qtensor, refuses
):
    qt = as_qtensor(oracle.random(0, 64, 32, **changes))
    for message in (" cannot hold QTensor(", reason, instead):
        with refuses(message):
            write(qt)
