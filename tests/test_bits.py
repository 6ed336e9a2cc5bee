"""The bit stream against hand-worked words and against the oracle's single bits."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qjax import bits as qbits
from tests import oracle
from tests.samples import random_codes

WIDTHS = range(1, 9)
# Codes and words of the shortest block that fills whole words, worked by hand.
BLOCKS = {
    **{1: (32, 1), 2: (16, 1), 3: (32, 3), 4: (8, 1)},
    **{5: (32, 5), 6: (16, 3), 7: (32, 7), 8: (4, 1)},
}


@pytest.mark.parametrize("bits", WIDTHS)
def test_block(bits):
    assert qbits.block(bits) == BLOCKS[bits]


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", None])
def test_block_refuses_other_widths(bits, refuses):
    with refuses(f"bits={bits!r} must be an integer from 1 to 8"):
        qbits.block(bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pieces_cover_every_bit_of_the_block_once(bits):
    codes, words = BLOCKS[bits]
    bits_of_block = np.zeros(32 * words, int)
    for code, word, left in qbits.pieces(bits):
        place = 32 * word + left
        # A piece is cut where its word begins or ends.
        first, last = max(place, 32 * word), min(place + bits, 32 * word + 32)
        assert place == code * bits
        bits_of_block[first:last] += 1
    chex.assert_trees_all_equal(bits_of_block, np.ones(32 * words, int))
    assert {piece.code for piece in qbits.pieces(bits)} == set(range(codes))


# The codes of each block, and its words as the module's docstring draws them.
BY_HAND = {
    "4 bits": (4, range(8), [0x76543210]),
    "4 bits, sign bit": (4, [0, 0, 0, 0, 0, 0, 0, 15], [0xF0000000]),
    "8 bits": (8, [0x78, 0x56, 0x34, 0x12], [0x12345678]),
    "2 bits": (2, [3, 2, 1, 0] * 4, [0x1B1B1B1B]),
    "1 bit": (1, [1] + [0] * 30 + [1], [0x80000001]),
    # Code 10 has two bits in word 0 and one in word 1; code 21 one bit in word 1.
    "3 bits, code 10": (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x1, 0]),
    "3 bits, code 21": (3, [0] * 21 + [7] + [0] * 10, [0, 0x80000000, 0x3]),
    "3 bits, 10 is 5": (3, [0] * 10 + [5] + [0] * 21, [0x40000000, 0x1, 0]),
    # Code 5 starts at bit 30, code 10 at bit 60.
    "6 bits, straddles": (
        6,
        [0] * 5 + [0b101101] + [0] * 4 + [0b110011] + [0] * 5,
        [0x40000000, 0x3000000B, 0x3],
    ),
    # Code 6 starts at bit 30: one bit pair below, three above.
    "5 bits, code 6": (5, [0] * 6 + [0b10110] + [0] * 25, [0x80000000, 0x5, 0, 0, 0]),
    # Code 4 starts at bit 28 of word 0.
    "7 bits, code 4": (
        7,
        [0] * 4 + [0b1010011] + [0] * 27,
        [0x30000000, 0x5, 0, 0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_words_worked_by_hand(name):
    bits, codes, words = BY_HAND[name]
    codes, words = np.array(codes, np.uint8), np.array(words, np.uint32)
    chex.assert_trees_all_equal(oracle.pack(codes, bits), words)  # the oracle itself
    chex.assert_trees_all_equal(
        np.asarray(qbits.pack_fields(jnp.asarray(codes), bits)), words
    )
    chex.assert_trees_all_equal(
        np.asarray(qbits.unpack_fields(jnp.asarray(words), bits)), codes
    )


@pytest.mark.parametrize(
    ("bits", "rank", "axis"),
    [(bits, 2, axis) for bits in WIDTHS for axis in (0, -1)]
    + [(bits, 3, axis) for bits in (3, 4) for axis in (0, 1, 2, -1, -2, -3)],
)
def test_agrees_with_the_oracle_along_every_axis(bits, rank, axis):
    shape = [2, 3, 4][:rank]
    shape[axis] = 2 * BLOCKS[bits][0]
    codes = random_codes(bits, bits, *shape)
    words = oracle.pack(codes, bits, axis)
    packed = qbits.pack_fields(jnp.asarray(codes), bits, axis)
    assert packed.dtype == jnp.uint32
    chex.assert_trees_all_equal(np.asarray(packed), words)
    unpacked = qbits.unpack_fields(jnp.asarray(words), bits, axis)
    assert unpacked.dtype == jnp.uint8
    chex.assert_trees_all_equal(np.asarray(unpacked), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_signed_words_are_bit_patterns(bits):
    codes = np.full((BLOCKS[bits][0], 2), 2**bits - 1, np.uint8)
    words = np.full((BLOCKS[bits][1], 2), -1, np.int32)
    chex.assert_trees_all_equal(
        np.asarray(qbits.unpack_fields(jnp.asarray(words), bits)), codes
    )
    codes = random_codes(bits, bits, BLOCKS[bits][0], 5)
    signed = oracle.pack(codes, bits).view(np.int32)
    assert (signed < 0).any()
    chex.assert_trees_all_equal(
        np.asarray(qbits.unpack_fields(jnp.asarray(signed), bits)), codes
    )


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
)
def test_codes_of_any_integer_dtype_are_cut_to_their_bits(dtype):
    codes = np.array([-1, 17, 5, 0, 16, 127, 3, 8], np.int64).astype(dtype)
    packed = qbits.pack_fields(jnp.asarray(codes), 4)
    chex.assert_trees_all_equal(np.asarray(packed), np.array([0x83F0051F], np.uint32))


@pytest.mark.parametrize("bits", WIDTHS)
def test_widths_are_integers_of_numpy_as_well(bits):
    # Of eight bits themselves, so that 2**bits is none of theirs.
    narrow = np.int8(bits)
    assert qbits.block(narrow) == BLOCKS[bits]
    assert list(qbits.pieces(narrow)) == list(qbits.pieces(bits))
    codes = jnp.asarray(random_codes(bits, bits, BLOCKS[bits][0], 5))
    chex.assert_trees_all_equal(
        qbits.unpack_fields(qbits.pack_fields(codes, narrow), narrow), codes
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_ragged_codes_are_refused(bits, refuses):
    codes = jnp.zeros((3, BLOCKS[bits][0] + 1), jnp.uint8)
    with refuses(f"codes.shape[1]={BLOCKS[bits][0] + 1} must be a multiple of"):
        qbits.pack_fields(codes, bits, 1)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_ragged_words_are_refused(bits, refuses):
    words = jnp.zeros((BLOCKS[bits][1] + 1, 3), jnp.uint32)
    message = (
        f"words.shape[0]={BLOCKS[bits][1] + 1} must be a multiple of {BLOCKS[bits][1]}"
    )
    with refuses(message):
        qbits.unpack_fields(words, bits)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_codes_that_are_no_integers_are_refused(dtype, refuses):
    with refuses(f"codes.dtype={dtype} must be an integer dtype"):
        qbits.pack_fields(jnp.zeros(8, dtype), 4)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16", "bool"])
def test_words_that_are_no_32_bit_integers_are_refused(dtype, refuses):
    with refuses(f"words.dtype={dtype} must be int32 or uint32"):
        qbits.unpack_fields(jnp.zeros(8, dtype), 4)


@pytest.mark.parametrize("bits", [3, 4])
def test_jit_and_vmap(bits):
    codes = random_codes(0, bits, 2, 5, 64)
    words = oracle.pack(codes, bits, 2)

    @jax.jit
    @jax.vmap
    def pack(codes):
        return qbits.pack_fields(codes, bits, -1)

    @jax.jit
    @jax.vmap
    def unpack(words):
        return qbits.unpack_fields(words, bits, 1)

    chex.assert_trees_all_equal(np.asarray(pack(jnp.asarray(codes))), words)
    chex.assert_trees_all_equal(np.asarray(unpack(jnp.asarray(words))), codes)


def test_no_codes_are_no_words():
    assert qbits.pack_fields(jnp.zeros((0, 3), jnp.uint8), 3).shape == (0, 3)
    assert qbits.unpack_fields(jnp.zeros((0, 3), jnp.uint32), 3).shape == (0, 3)


# Every new shape compiles: few shapes, and always the same examples.
few = hypothesis.settings(
    max_examples=20, deadline=None, derandomize=True, database=None
)


@few
@hypothesis.given(st.sampled_from([1, 3, 4, 6]), st.integers(0, 2**32 - 1))
def test_codes_round_trip(bits, seed):
    codes = random_codes(seed, bits, 3, 2 * BLOCKS[bits][0])
    words = qbits.pack_fields(jnp.asarray(codes), bits, 1)
    chex.assert_trees_all_equal(np.asarray(words), oracle.pack(codes, bits, 1))
    again = qbits.unpack_fields(words, bits, 1)
    chex.assert_trees_all_equal(np.asarray(again), codes)


@few
@hypothesis.given(st.integers(1, 8), st.data())
def test_any_words_round_trip(bits, data):
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=7))
    words = np.resize(np.array(words, np.uint32), BLOCKS[bits][1])
    codes = qbits.unpack_fields(jnp.asarray(words), bits)
    chex.assert_trees_all_equal(np.asarray(codes), oracle.unpack(words, bits))
    again = qbits.pack_fields(codes, bits)
    chex.assert_trees_all_equal(np.asarray(again), words)
