"""The kernel that moves words from one layout to another, interpreted."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import awq, awq_v2, bnb, fp8, gguf, gptq, mxfp4, tiles, tinygemm
from qjax.formats import compressed_tensors as ct
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.pallas.relayout import relayout

K, N = 256, 80
FOUR_BITS = [
    gptq.Stream(),
    awq.Gemm(),
    awq.Gemv(),
    awq_v2.Interleaved(),
    bnb.Flat(K),
    gguf.Planes(256, 32),
    gguf.Planes(32, 16),
    mxfp4.Blocks(),
    Nibbles(),
    tinygemm.TensorCoreTiled(2),
    tinygemm.TensorCoreTiled(4),
    tinygemm.TensorCoreTiled(8),
    tiles.Tiles(),
    tiles.Tiles(nibbles=True),
]
ANY_BITS = [gptq.Stream(), gptq.Planar(), ct.Dense(), ct.Aligned(), tiles.Tiles()]


def pairs(layouts):
    """Each with the first and with the next, there and back."""
    first, *rest = layouts
    near = {(first, one) for one in rest} | {*itertools.pairwise(rest)}
    return [pair for a, b in sorted(near, key=repr) for pair in ((a, b), (b, a))]


PAIRS = [(4, *pair) for pair in pairs(FOUR_BITS)]
PAIRS += [(bits, *pair) for bits in (1, 2, 8) for pair in pairs(ANY_BITS)]
PAIRS += [(8, *pair) for pair in pairs([tiles.Tiles(), fp8.Bytes()])]
PAIRS += [
    (2, gguf.Planes(256, 32), tiles.Tiles()),
    (8, gguf.Planes(32, 32), gptq.Stream()),
]


def codes(k, n, bits):
    return np.random.default_rng(k + n).integers(0, 2**bits, (k, n)).astype(np.uint8)


def moved(words, source, target, bits, k, n):
    return relayout(words, source, target, bits, (k, n), interpret=True)


def check(source, target, bits, k, n):
    matrix = jnp.asarray(codes(k, n, bits))
    found = moved(source.pack(matrix, bits), source, target, bits, k, n)
    expected = target.pack(matrix, bits)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("bits", "source", "target"), PAIRS, ids=str)
def test_words_are_those_that_codes_are_packed_into(bits, source, target):
    check(source, target, bits, K, N)


@pytest.mark.parametrize(
    ("bits", "source", "target", "k", "n"),
    [
        # No tile divides them; what pads one layout is cut off, or put on.
        (4, gptq.Stream(), tiles.Tiles(), 200, 20),
        (4, tiles.Tiles(), gptq.Stream(), 200, 20),
        (4, tinygemm.TensorCoreTiled(2), gptq.Stream(), 96, 13),
        (4, gptq.Stream(), tinygemm.TensorCoreTiled(2), 96, 13),
        (4, awq.Gemm(), tiles.Tiles(), 130, 200),
        (1, gptq.Stream(), tiles.Tiles(), 288, 17),
        (2, tiles.Tiles(), ct.Dense(), 144, 130),
        (8, ct.Aligned(), tiles.Tiles(), 36, 5),
    ],
    ids=str,
)
def test_ragged_extents(bits, source, target, k, n):
    check(source, target, bits, k, n)


def test_signed_words_are_bit_patterns():
    matrix = jnp.asarray(codes(K, N, 4) | 8)
    words = gptq.Stream().pack(matrix, 4).view(jnp.int32)
    found = moved(words, gptq.Stream(), awq.Gemm(), 4, K, N)
    np.testing.assert_array_equal(found, awq.Gemm().pack(matrix, 4))


@pytest.mark.parametrize(
    ("source", "target", "bits", "k", "match"),
    [
        (gptq.Stream(), tiles.Tiles(), 3, 128, "3-bit codes in Stream"),
        # Rows beyond k = 96 of either.
        (tinygemm.TensorCoreTiled(), tiles.Tiles(), 4, 96, "k=96: what pads"),
    ],
)
def test_declines(source, target, bits, k, match):
    words = source.pack(jnp.zeros((128, 16), jnp.uint8), bits)
    with pytest.raises(NotImplementedError, match=match):
        moved(words, source, target, bits, k, 16)


def test_flat_pairs_that_reach_over_columns_are_declined():
    words = bnb.Flat(5).pack(jnp.zeros((5, 16), jnp.uint8), 4)
    with pytest.raises(NotImplementedError, match="k=5 breaks"):
        moved(words, bnb.Flat(5), tiles.Tiles(), 4, 5, 16)


def test_what_the_target_cannot_hold_is_the_callers_error():
    words = gptq.Stream().pack(jnp.zeros((32, 12), jnp.uint8), 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        moved(words, gptq.Stream(), awq.Gemm(), 4, 32, 12)
