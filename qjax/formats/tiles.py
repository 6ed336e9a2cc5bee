"""qjax's own layout for GPUs: codes in the order in which tensor cores read them.

The words of a matrix are 16-bit *slots* in *units* of 512 bytes. A unit covers 16
columns (n) and 16 rows (k), one slot for each pair, in the order of the A operand of
``mma.m16n8k16`` and ``wgmma``: with k = k3 k2 k1 k0 and n = n3 n2 n1 n0 in binary, the
index of a slot in its unit is, most significant bit first,

    n2 n1 n0 | k2 k1 | k3 | n3 | k0

so that the 16 bytes that a lane of a warp loads are the four registers it feeds to the
tensor core. A slot does not hold one code: it holds 16 bits of a *plane*. A plane of P
bits has 16 / P fields in a slot, and field f belongs to row ``16 f + k``: to the same
place in the f-th *sub-block* of 16 rows. Codes of 3, 5, 6 and 7 bits are cut into
planes of 4, 2 and 1 bits, the high bits in the first plane. `POSITIONS` says at which
bit of the slot each field starts, modulo 16: chosen so that most fields can be made the
mantissa of a 16-bit float by one AND and OR of a whole register (`qjax.pallas.unpack`).

A *block* is the least run of rows that fills all planes: 32 rows for 8 bits, 64 for 4,
128 for 2 and 6, 256 for 1, 3, 5 and 7. Its units lie plane after plane.
"""

import dataclasses
import functools
import math
import operator
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer, UInt8, UInt16

from qjax.bits import block
from qjax.formats.checks import check_codes, check_words
from qjax.tensor import Cut, Digits, Layout

# Widths of the planes of a code, the high bits first.
PLANES = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
# First bit of each field of a slot, for every plane. Part of the storage format.
POSITIONS = {
    1: ((2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1),),
    2: ((2, 4, 6, 8, 10, 12, 14, 0),),
    3: (
        (2, 4, 6, 8, 10, 12, 14, 0),
        (1, 3, 5, 7, 9, 11, 13, 15, 2, 4, 6, 8, 10, 12, 14, 0),
    ),
    4: ((2, 6, 10, 14),),
    5: ((2, 6, 10, 14), (1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 4, 8, 12, 0)),
    6: ((2, 6, 10, 14), (0, 4, 8, 12, 2, 6, 10, 14)),
    7: (
        (3, 7, 11, 15),
        (1, 9, 3, 11, 5, 13, 7, 15),
        (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),
    ),
    8: ((2, 10),),
}
# The same where codes are looked up in a table: a field is a nibble of its slot.
NIBBLES = ((0, 4, 8, 12),)
SIDE = 16  # of a unit, in columns and in rows of a sub-block
SLOTS = SIDE * SIDE
# Rows are padded to whole steps of the kernels' loops.
STEP = 128


def sub_blocks(bits: int) -> int:
    """Returns how many sub-blocks of 16 rows a block has."""
    block(bits)  # refuses other widths
    return 16 // min(PLANES[bits])


def rows_of_block(bits: int) -> int:
    """Returns how many rows a block has."""
    return SIDE * sub_blocks(bits)


def units_of_block(bits: int) -> int:
    """Returns how many units of each 16 columns a block has, over all its planes."""
    return sub_blocks(bits) * bits // 16


@dataclasses.dataclass(frozen=True, repr=False)
class Tiles(Layout):
    """Tensor-core order: words uint16 ``[blocks, units, n / 16, 256]``.

    ``units`` counts those of a block, plane after plane: 1 for 1, 2, 4 and 8 bits, and
    3, 5, 3, 7 for 3, 5, 6, 7 bits. Rows are padded with zero codes to a multiple of 128
    and of the block, columns to one of 16: exactly ``bits`` bits a padded weight. A
    matrix may be cut anywhere between blocks along k and between units along n.

    Attributes:
      nibbles: Whether the four fields of a slot of 4-bit codes lie at bits 0, 4, 8 and
        12. Byte permutations read them there (`qjax.pallas.lookup`): the kernels want
        codes of a codebook so, and codes of an affine map not so.

    Example:
      >>> words = Tiles().pack(jnp.ones((300, 20), jnp.uint8), 3)
      >>> words.shape, Tiles().extents(words.shape, 3)
      ((2, 3, 2, 256), (512, 32))
    """

    nibbles: bool = False
    rank: typing.ClassVar[int] = 4

    def pack(
        self, codes: Integer[Array, "k n"], bits: int
    ) -> UInt16[Array, "blocks units columns 256"]:
        """Packs ``[k, n]`` codes, padding both axes with zeros."""
        self._check(bits)
        check_codes(codes)
        step, columns = _step(bits), SIDE
        k, n = codes.shape
        padding = ((0, -k % step), (0, -n % columns))
        padded = jnp.pad(codes.astype(jnp.uint8), padding)
        return _pack(padded & jnp.uint8(2**bits - 1), bits, self.nibbles)

    def unpack(
        self, words: UInt16[Array, "blocks units columns 256"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks words into codes, padding included."""
        self._check(bits)
        check_words(words, self.rank, jnp.uint16)
        units = units_of_block(bits)
        if words.shape[1] != units or words.shape[3] != SLOTS:
            raise ValueError(
                f"words.shape={words.shape} must be [blocks, {units}, n / {SIDE}, "
                f"{SLOTS}] for {bits}-bit codes in Tiles."
            )
        return _unpack(words, bits, self.nibbles)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(blocks * rows_of_block(bits), 16 * columns)``."""
        return shape[0] * rows_of_block(bits), shape[2] * SIDE

    def cut(self, bits: int) -> Cut:
        """Cuts between whole steps of the kernels' loops, and between units."""
        return Cut(k_axis=0, rows=_step(bits), n_axis=2, columns=SIDE)

    def digits(self, bits: int) -> Digits | None:
        """Permutes those of codes that are a single plane."""
        if len(PLANES[bits]) > 1 or (self.nibbles and bits != 4):
            return None
        count = sub_blocks(bits).bit_length() - 1
        return Digits(
            "k",
            fields=" ".join(f"k{4 + i}" for i in reversed(range(count))),
            run="n2 n1 n0 k2 k1 k3 n3 k0",
            width=16,
            rotate=_positions(bits, self.nibbles)[0][0],
        )

    def __repr__(self) -> str:
        """The constructor, without what is the default."""
        return f"Tiles({'nibbles=True' if self.nibbles else ''})"

    def _check(self, bits: int) -> None:
        if self.nibbles and bits != 4:
            raise ValueError(
                f"bits={bits!r} must be 4 in Tiles(nibbles=True); Tiles() holds 1 to 8."
            )


def _step(bits: int) -> int:
    return math.lcm(STEP, rows_of_block(bits))


def _positions(bits: int, nibbles: bool) -> tuple[tuple[int, ...], ...]:
    return NIBBLES if nibbles else POSITIONS[bits]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack(codes: Array, bits: int, nibbles: bool) -> Array:
    blocks, columns = codes.shape[0] // rows_of_block(bits), codes.shape[1] // SIDE
    planes, low = [], bits
    for width, positions in zip(PLANES[bits], _positions(bits, nibbles), strict=True):
        low -= width
        plane = (codes >> low) & (2**width - 1)
        # block, unit, field, k3, k2 k1, k0, columns, n3, n2 n1 n0
        axes = plane.reshape(blocks, -1, len(positions), 2, 4, 2, columns, 2, 8)
        fields = axes.transpose(2, 0, 1, 6, 8, 4, 3, 7, 5)
        # Or XLA would keep all codes in 16 bits, and those of each plane once more.
        fields = lax.optimization_barrier(fields)
        rotated = map(_rotate, fields.astype(jnp.uint16), positions)
        slots = functools.reduce(operator.or_, rotated)
        planes.append(slots.reshape(blocks, -1, columns, SLOTS))
    return jnp.concatenate(planes, axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unpack(words: Array, bits: int, nibbles: bool) -> Array:
    blocks, _, columns, _ = words.shape
    codes, unit, low = jnp.uint8(0), 0, bits
    for width, positions in zip(PLANES[bits], _positions(bits, nibbles), strict=True):
        low -= width
        count = sub_blocks(bits) // len(positions)
        slots = words[:, unit : unit + count]
        unit += count
        fields = jnp.stack([_rotate(slots, -at) for at in positions])
        fields = fields.astype(jnp.uint8) & (2**width - 1)
        # field, block, unit, columns, n2 n1 n0, k2 k1, k3, n3, k0
        axes = fields.reshape(-1, blocks, count, columns, 8, 4, 2, 2, 2)
        plane = axes.transpose(1, 2, 0, 6, 5, 8, 3, 7, 4)
        codes |= plane.reshape(blocks * rows_of_block(bits), columns * SIDE) << low
    return codes


def _rotate(slots: Array, left: int) -> Array:
    """Rotates 16-bit words left by a static distance."""
    left %= 16
    return slots if left == 0 else (slots << left) | (slots >> (16 - left))
