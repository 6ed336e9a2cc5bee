"""The PTX text that a GPU runs, run here: the one thing interpret mode does not see."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import tiles
from qjax.pallas import lookup, unpack
from qjax.pallas.affine import AffineMap
from tests import oracle
from tests.gpu.texts import of_each_thread

FLOAT16, BFLOAT16 = jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)
RECIPES = [
    (bits, dtype, floats, index)
    for dtype in (FLOAT16, BFLOAT16)
    for floats, widths in ((False, range(1, 9)), (True, (4, 8)))
    for bits in widths
    for index in range(tiles.sub_blocks(bits))
]


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def _packed(bits, rng):
    """Codes ``[rows, 16]`` with every code in every row, and the slots of each plane.

    The slots of sub-block ``i`` are those of unit ``i // fields`` of its planes.
    """
    rows = tiles.rows_of_block(bits)
    columns = -(-(2**bits) // 16) * 16
    codes = np.tile(np.arange(columns) % 2**bits, (rows, 1))
    codes = rng.permuted(codes, axis=1).astype(np.uint8)
    padded = np.pad(codes, ((0, -rows % 128), (0, 0)))
    words = tiles.Tiles().pack(jnp.asarray(padded), bits)
    return codes, np.asarray(words)[0]  # [units, columns / 16, 256]


def _planes(bits, words, sub_block):
    """The slots of each plane that hold a sub-block, flat."""
    planes, unit = [], 0
    for positions in tiles.POSITIONS[bits]:
        planes.append(words[unit + sub_block // len(positions)].reshape(-1))
        unit += tiles.sub_blocks(bits) // len(positions)
    return planes


def _on_registers(text, *registers):
    """Runs the text on each thread's registers."""
    # PTX clamps; the text has no reason to go so far.
    for distance in re.findall(r"sh[lr]\.b32 [^,]+, [^,]+, (\w+);", text):
        assert 0 <= int(distance, 0) < 32
    return of_each_thread(text, *registers)


def _run(recipe, planes, rng):
    """Runs the text on registers of two slots, paired at random."""
    pairs = rng.permutation(planes[0].size).reshape(-1, 2)
    registers = [
        plane[pairs[:, 0]].astype(np.uint32)
        | plane[pairs[:, 1]].astype(np.uint32) << 16
        for plane in planes
    ]
    result = _on_registers(recipe.ptx, *registers)
    slots = np.empty(planes[0].size, np.uint16)
    slots[pairs[:, 0]] = result & 0xFFFF
    slots[pairs[:, 1]] = result >> 16
    return slots


def _bits(values):
    return np.asarray(values).view(np.uint16)


@pytest.mark.parametrize(("bits", "dtype", "floats", "index"), RECIPES)
def test_text_does_what_the_recipe_says(bits, dtype, floats, index, rng):
    # Random slots: also the bits that belong to other sub-blocks must not matter.
    recipe = unpack.recipes(bits, dtype, floats=floats)[index]
    planes = [
        rng.integers(0, 2**16, 4096, dtype=np.uint16) for _ in tiles.POSITIONS[bits]
    ]
    expected = recipe.on_slots(*map(jnp.asarray, planes))
    np.testing.assert_array_equal(_run(recipe, planes, rng), _bits(expected))


@pytest.mark.parametrize(("bits", "dtype", "floats", "index"), RECIPES)
def test_every_code_becomes_its_number(bits, dtype, floats, index, rng):
    codes, words = _packed(bits, rng)
    recipe = unpack.recipes(bits, dtype, floats=floats)[index]
    slots = _run(recipe, _planes(bits, words, index), rng)
    values = slots.view(dtype).astype(np.float64)
    # Index of a slot in its unit: n2 n1 n0, k2 k1, k3, n3, k0.
    axes = values.reshape(-1, 8, 4, 2, 2, 2)
    by_row = axes.transpose(3, 2, 5, 0, 4, 1).reshape(16, -1)
    codes = codes[16 * index : 16 * (index + 1)]
    if floats:
        numbers = np.array([oracle.small_float(q, bits) for q in range(2**bits)])
        np.testing.assert_array_equal(by_row * recipe.unit, numbers[codes])
    else:
        np.testing.assert_array_equal(by_row, codes + recipe.offset)


@pytest.mark.parametrize("sub_block", range(4))
def test_lookup_of_every_code(sub_block, rng):
    # Entries of all bit patterns; a word of the table is there for each of two slots.
    entries = rng.integers(0, 2**16, 16, dtype=np.uint16).view(np.float16)
    words = np.array(lookup.words(list(jnp.asarray(entries))))
    slots = rng.permutation(2**16).astype(np.uint16).reshape(-1, 2)
    registers = [slots[:, 0].astype(np.uint32) | slots[:, 1].astype(np.uint32) << 16]
    registers += [np.full(len(slots), word) for word in words for _ in range(2)]
    result = _on_registers(lookup.ptx(sub_block), *registers)
    found = np.stack([result & 0xFFFF, result >> 16], 1).astype(np.uint16)
    expected = entries[slots >> 4 * sub_block & 15]
    np.testing.assert_array_equal(found, expected.view(np.uint16))
    in_jnp = lookup.on_slots(
        jnp.asarray(slots), list(jnp.asarray(words)), sub_block, FLOAT16
    )
    np.testing.assert_array_equal(_bits(in_jnp), expected.view(np.uint16))


@pytest.mark.parametrize("offset", [256.0, -1151.0, 0.0])
@pytest.mark.parametrize("zero", ["whole", "float", None])
@pytest.mark.parametrize("scaled", ["scaled", "added", None])
def test_text_does_what_the_map_says(offset, zero, scaled, rng):
    codes = rng.integers(0, 256, (64, 1)) + offset
    zeros = rng.integers(0, 256, (64, 1)) + (0.37 if zero == "float" else 0)
    mapping = AffineMap(
        offset,
        zero=jnp.asarray(zeros, FLOAT16) if zero else None,
        scale=jnp.asarray(rng.random((64, 1)), FLOAT16) if scaled else None,
        added=jnp.asarray(rng.random((64, 1)), FLOAT16) if scaled == "added" else None,
        whole=zero != "float",
    )
    codes = jnp.asarray(codes, FLOAT16)
    columns = [
        _bits(value).ravel().astype(np.uint32) for value in (codes, *mapping.columns)
    ]
    # Two neighbors of a column share a register.
    result = _on_registers(mapping.ptx, *(low | low << 16 for low in columns))
    expected = _bits(mapping.on_codes(codes)).ravel().astype(np.uint32)
    np.testing.assert_array_equal(result, expected | expected << 16)


def test_every_width_has_every_code(rng):
    for bits in range(1, 9):
        codes, _ = _packed(bits, rng)
        assert set(np.unique(codes)) == set(range(2**bits))
        assert all(len(np.unique(row)) == 2**bits for row in codes)


def test_offsets_balance():
    # So that a mean of x costs the accumulator no precision: the offsets of a step of
    # 32 rows or more must nearly cancel.
    for bits in range(1, 9):
        offsets = [recipe.offset for recipe in unpack.recipes(bits, FLOAT16)]
        largest = max(map(abs, offsets))
        assert all(abs(sum(offsets[:i])) <= largest for i in range(len(offsets) + 1))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_work_of_an_unpack(dtype):
    # A LOP3 a plane; what remains is what the positions of the fields are chosen for.
    for bits in range(1, 9 if dtype == FLOAT16 else 8):
        recipes = unpack.recipes(bits, dtype)
        for recipe in recipes:
            assert recipe.ptx.count("lop3") == len(tiles.PLANES[bits])
    views = {
        take.view for recipe in unpack.recipes(4, FLOAT16) for take in recipe.takes
    }
    assert all(view.right == 0 for view in views)  # 4 bits: no shift at all
