"""From slots of nibbles to entries of a table of sixteen 16-bit floats.

A gather does not lower to registers, but PRMT picks four bytes out of eight by the four
nibbles of a selector. The table is kept as bytes in eight registers: the high bytes of
its entries 0 to 7, then of 8 to 15, and likewise the low bytes. A register of two slots
in `qjax.formats.tiles.Tiles` with ``nibbles`` holds eight codes, two for each of four
sub-blocks. Two selectors are made of it, each with the codes of two sub-blocks; both
halves of the table are looked up by their low three bits, and a mask of bytes, made of
the highest bit of the codes, chooses between them. That is 24 instructions for eight
weights, whatever the table.
"""

import functools
import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt16, UInt32

ENTRIES = 16
WORDS = 8
LANES = 32


def words(entries: Sequence[Float[Array, ""]]) -> list[UInt32[Array, ""]]:
    """Makes, in a kernel's body, the words that `ptx` and `on_slots` take.

    Args:
      entries: Sixteen, float16 or bfloat16.
    """
    patterns = [
        lax.bitcast_convert_type(entry, jnp.uint16).astype(jnp.uint32)
        for entry in entries
    ]
    bytes_ = [(p >> right) & 255 for right in (8, 0) for p in patterns]
    return [
        functools.reduce(operator.or_, (bytes_[4 * i + j] << 8 * j for j in range(4)))
        for i in range(WORDS)
    ]


_SELECT = "0xE4"  # of LOP3: the bits of a where those of c are 1, else those of b
# For an even and for an odd sub-block: by how much the register moves right to have the
# nibbles of the one slot beside those of the other, which nibbles are kept, by how much
# it moves left to have the highest bits of the codes where bytes have their sign, and
# the selector of PRMT that replicates those signs. The nibbles of a selector are then
# 0, 4, 2, 6 of the register, or 5, 1, 7, 3.
_SELECTORS = ((12, "0x0F0F", 4, "0xB9A8"), (20, "0xF0F0", 0, "0x9B8A"))
# Which of the four entries looked up are those of the sub-block: low and high bytes.
_ENTRIES = ("0x5140", "0x4051", "0x7362", "0x6273")


def ptx(sub_block: int) -> str:
    """PTX with a sub-block's entries in $0, slots in $1 and the table from $2.

    Every word of the table has a register for each of the two slots; they are equal.
    What the texts of the sub-blocks have in common, the assembler computes once.
    """
    right, kept, left, signs = _SELECTORS[sub_block % 2]
    words = [f"${2 + 2 * i}" for i in range(WORDS)]
    lines = [
        "and.b32 i, $1, 0x77777777;",
        f"shr.b32 s, i, {right};",
        f"lop3.b32 s, i, s, {kept}, {_SELECT};",
        f"shl.b32 m, $1, {left};",
        f"prmt.b32 m, m, m, {signs};",
    ]
    for target, (a, b, c, d) in (("h", words[:4]), ("l", words[4:])):
        lines += [
            f"prmt.b32 {target}, {a}, {b}, s;",
            f"prmt.b32 t, {c}, {d}, s;",
            f"lop3.b32 {target}, t, {target}, m, {_SELECT};",
        ]
    lines.append(f"prmt.b32 $0, l, h, {_ENTRIES[sub_block]};")
    return "{ .reg .b32 i, s, m, t, h, l; " + " ".join(lines) + " }"


def on_slots(
    slots: UInt16[Array, "..."],
    words: Sequence[Array],
    sub_block: int,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    """Does in jnp what `ptx` does."""
    bytes_ = lax.bitcast_convert_type(jnp.stack(words), jnp.uint8).reshape(2, ENTRIES)
    high, low = bytes_.astype(jnp.uint16)
    entries = lax.bitcast_convert_type(high << 8 | low, dtype)
    return entries[(slots >> 4 * sub_block) & 15]
