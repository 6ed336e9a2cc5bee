"""From slots of `qjax.formats.tiles` to 16-bit floats, two at a time.

A float16 whose exponent makes the last mantissa bit worth ``2**-p`` holds, when a field
lies at bit p of the mantissa, the number ``base + q`` with ``base = 2**(10 - p)``: one
AND and one OR turn a field of a slot into an operand of a tensor core, and one LOP3
does it for the two slots of a register. The base is not taken off again: the kernels
subtract ``base * x``, summed once, from the accumulator.

Half of the sub-blocks hold ``-(base + 2**bits - 1 - q) = q + offset`` instead (the
complement and the sign bit are free in the LOP3), so that the sum of ``offset * x``
stays small when ``x`` has a mean.

Eight bits are one more than bfloat16 has beside its leading one. The seven low bits are
taken so, and the eighth is added as one of two numbers whose patterns differ in one
bit, by one FMA for the two slots.

Codes that are small floats (`qjax.tensor.SMALL_FLOATS`) keep their fields: sign and
size move to where the wider float has its own, which makes a number too small by a
power of two, subnormal ones included. In float16 that is left to who takes the numbers;
in bfloat16, where they would be too small to be multiplied, an FMA takes it off.

A `Recipe` is the plan for one sub-block. Its PTX text acts on each 16-bit slot alone,
because Triton does not say which elements share a register; `Recipe.on_slots` is the
same in jnp, for interpret mode and as the specification of the text.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt16

from qjax.formats.tiles import PLANES, POSITIONS, sub_blocks
from qjax.tensor import SMALL_FLOATS, widen

# Mantissa bits and exponent bias.
_FLOATS = {jnp.dtype(jnp.float16): (10, 15), jnp.dtype(jnp.bfloat16): (7, 127)}
# 1 in bfloat16, and -256, which is -128 with the last bit of the exponent cleared.
_ONE, _BELOW = 0x3F80, 0xC380
# Fields that start at bit 2 or above keep the base at a quarter of the largest
# possible: what the accumulator loses to it falls by four.
_LOWEST = 2


class View(NamedTuple):
    """A slot, its bytes swapped or not, moved right (negative: left)."""

    swap: bool
    right: int

    def start(self, position: int) -> int:
        """Where a field that starts at ``position`` of the slot starts, unmoved."""
        return (position + 8 * self.swap) % 16

    @property
    def cost(self) -> tuple[bool, bool, bool]:
        """Orders views: without a shift before with one, right before left."""
        return self.right != 0, self.right < 0, self.swap


class Take(NamedTuple):
    """The bits ``mask`` of a view of the slots of one plane."""

    plane: int
    view: View
    mask: int

    @property
    def ptx(self) -> list[str]:
        """Lines that leave the view in t. What texts share, ptxas computes once."""
        source, lines = f"${1 + self.plane}", []
        if self.view.swap:
            lines.append(f"prmt.b32 t, {source}, {source}, 0x2301;")
            source = "t"
        if self.view.right:
            op = "shr" if self.view.right > 0 else "shl"
            lines.append(f"{op}.b32 t, {source}, {abs(self.view.right)};")
        elif not self.view.swap:
            lines.append(f"mov.b32 t, {source};")
        return lines

    def on_slots(self, planes: Sequence[UInt16[Array, "..."]]) -> UInt16[Array, "..."]:
        """Takes the bits in jnp."""
        slots = planes[self.plane]
        if self.view.swap:
            slots = (slots << 8) | (slots >> 8)
        right = self.view.right
        slots = slots >> right if right >= 0 else slots << -right
        return slots & jnp.uint16(self.mask)


class Recipe(NamedTuple):
    """How the codes of one sub-block become floats.

    Attributes:
      dtype: float16 or bfloat16.
      takes: Bits to take, from each plane.
      magic: The 16-bit pattern that they are merged into.
      negative: Whether bits are merged by exclusive or, below a sign bit.
      offset: The float is ``code + offset``.
      above: The highest bit of a code, where the mantissa has no room for it.
    """

    dtype: jnp.dtype
    takes: tuple[Take, ...]
    magic: int
    negative: bool
    offset: float
    above: Take | None = None

    @property
    def ptx(self) -> str:
        """PTX with the result in $0 and one register of two slots a plane from $1."""
        # The truth tables of taking bits and merging them by XOR or OR.
        table = "0x6A" if self.negative else "0xEA"
        lines, merged = [], f"{_both(self.magic):#x}"
        for take in self.takes:
            lines += [
                *take.ptx,
                f"lop3.b32 v, t, {_both(take.mask):#x}, {merged}, {table};",
            ]
            merged = "v"
        if self.above is None:
            lines.append("mov.b32 $0, v;")
        else:
            # sm_80 has no addition of bfloat16, but FMA.
            mask, pattern = _both(self.above.mask), _both(_BELOW)
            lines += [
                *self.above.ptx,
                f"lop3.b32 t, t, {mask:#x}, {pattern:#x}, 0x6A;",
                f"mov.b32 o, {_both(_ONE):#x};",
                "fma.rn.bf16x2 $0, v, o, t;",
            ]
        return "{ .reg .b32 t, v, o; " + " ".join(lines) + " }"

    def on_slots(self, *planes: UInt16[Array, "..."]) -> Float[Array, "..."]:
        """Does in jnp what `ptx` does."""
        merged = jnp.uint16(self.magic)
        for take in self.takes:
            bits = take.on_slots(planes)
            merged = merged ^ bits if self.negative else merged | bits
        values = lax.bitcast_convert_type(merged, self.dtype)
        if self.above is None:
            return values
        pattern = self.above.on_slots(planes) ^ jnp.uint16(_BELOW)
        return values + lax.bitcast_convert_type(pattern, self.dtype)


class FloatRecipe(NamedTuple):
    """How the codes of one sub-block, small floats, become wider ones.

    Attributes:
      dtype: float16 or bfloat16.
      bits: Width of a code.
      sign: The bit to take for the sign.
      size: The bits to take for exponent and mantissa.
    """

    dtype: jnp.dtype
    bits: int
    sign: Take
    size: Take

    @property
    def offset(self) -> float:
        """As of a `Recipe`: none."""
        return 0.0

    @property
    def _bias(self) -> float:
        """How many times too small a number is, by its exponent alone."""
        return 2.0 ** (_FLOATS[self.dtype][1] - SMALL_FLOATS[self.bits].bias)

    @property
    def unit(self) -> float:
        """What the result has to be multiplied by to be the number."""
        return self._bias if self.dtype == jnp.float16 else 1.0

    @property
    def ptx(self) -> str:
        """PTX with the result in $0 and a register of two slots in $1."""
        lines = [
            *self.size.ptx,
            f"and.b32 v, t, {_both(self.size.mask):#x};",
            *self.sign.ptx,
            f"lop3.b32 v, t, {_both(self.sign.mask):#x}, v, 0xEA;",
        ]
        if self.dtype == jnp.float16:
            lines.append("mov.b32 $0, v;")
        else:
            # The patterns of the power of two, and of -0, which changes no sum.
            power = int(math.log2(self._bias)) + 127 << 7
            lines += [
                f"mov.b32 t, {_both(power):#x};",
                f"mov.b32 o, {_both(0x8000):#x};",
                "fma.rn.bf16x2 $0, v, t, o;",
            ]
        return "{ .reg .b32 t, v, o; " + " ".join(lines) + " }"

    def on_slots(self, slots: UInt16[Array, "..."]) -> Float[Array, "..."]:
        """Does in jnp what `ptx` does."""
        size, sign = (take.on_slots([slots]) for take in (self.size, self.sign))
        if self.dtype == jnp.float16:
            return lax.bitcast_convert_type(size | sign, self.dtype)
        # Not by the same patterns: XLA on a CPU takes subnormal numbers for 0.
        size //= jnp.uint16(self.size.mask & -self.size.mask)
        code = size | sign >> (16 - self.bits)
        return widen(code.astype(jnp.uint8), self.bits).astype(self.dtype)


def _both(pattern: int) -> int:
    return pattern | pattern << 16


@functools.cache
def recipes(
    bits: int, dtype: jnp.dtype, *, floats: bool = False
) -> tuple[Recipe | FloatRecipe, ...]:
    """Returns the recipe of every sub-block of a block.

    Args:
      bits: Width of a code, 1 to 8.
      dtype: float16 or bfloat16.
      floats: Whether codes are small floats.

    Example:
      >>> [recipe.offset for recipe in recipes(4, jnp.dtype(jnp.float16))]
      [256.0, -31.0, -271.0, 16.0]
    """
    if floats:
        blocks = range(sub_blocks(bits))
        return tuple(_float_recipe(bits, i, jnp.dtype(dtype)) for i in blocks)
    built, total = [], 0.0
    for sub_block in range(sub_blocks(bits)):
        recipe = _recipe(bits, sub_block, jnp.dtype(dtype), negative=total > 0)
        built.append(recipe)
        total += recipe.offset
    return tuple(built)


def unit(bits: int, dtype: jnp.dtype) -> float:
    """Returns what small floats have to be multiplied by that recipes made wider."""
    return _float_recipe(bits, 0, jnp.dtype(dtype)).unit


def _recipe(bits: int, sub_block: int, dtype: jnp.dtype, negative: bool) -> Recipe:
    mantissa, bias = _FLOATS[dtype]
    if bits > mantissa:
        return _tall_recipe(bits, sub_block, dtype)
    low = bits - PLANES[bits][0]  # bits that lie below the main plane's
    view, start = _main_view(bits, sub_block, mantissa)
    place = start - low  # of the code in the mantissa
    takes = []
    for plane, width in enumerate(PLANES[bits]):
        if plane:
            low -= width
            view = _cheapest_view(bits, plane, sub_block, place + low)
        takes.append(Take(plane, view, (2**width - 1) << (place + low)))
    top, base = 2**bits - 1, 2.0 ** (mantissa - place)
    magic = (bias + mantissa - place) << mantissa
    if negative:
        magic ^= 0x8000 | top << place
    offset = -(base + top) if negative else base
    return Recipe(dtype, tuple(takes), magic, negative, offset)


def _tall_recipe(bits: int, sub_block: int, dtype: jnp.dtype) -> Recipe:
    """Of 8-bit codes in bfloat16: ``128 + low`` less 256, or 128 with the high bit."""
    mantissa, bias = _FLOATS[dtype]
    view, high = _cheapest_view(bits, 0, sub_block, 0), 2**mantissa
    take, above = Take(0, view, high - 1), Take(0, view, high)
    magic = (bias + mantissa) << mantissa
    return Recipe(dtype, (take,), magic, False, -float(high), above)


def _float_recipe(bits: int, sub_block: int, dtype: jnp.dtype) -> FloatRecipe:
    place = _FLOATS[dtype][0] - SMALL_FLOATS[bits].mantissa
    size = _cheapest_view(bits, 0, sub_block, place, width=bits - 1)
    sign = _cheapest_view(bits, 0, sub_block, 15, width=1, above=bits - 1)
    return FloatRecipe(
        dtype,
        bits,
        sign=Take(0, sign, 1 << 15),
        size=Take(0, size, (2 ** (bits - 1) - 1) << place),
    )


def _main_view(bits: int, sub_block: int, mantissa: int) -> tuple[View, int]:
    """The first view that puts the main plane's field into the mantissa, and where."""
    width, positions = PLANES[bits][0], POSITIONS[bits][0]
    position = positions[sub_block % len(positions)]
    low = bits - width
    least = max(low, _LOWEST if _LOWEST + width <= mantissa else 0)
    for right in (0, 4, 2, 1, 3, *range(5, 13), -1, -2, -3):
        for swap in (False, True):
            view = View(swap, right)
            start = view.start(position)
            in_slot = start + width <= 16
            place = start - right
            # The low planes of 7 bits fit below bit 3 alone.
            right_place = place == low if bits == 7 else place >= least
            if in_slot and right_place and place + width <= mantissa:
                return view, place
    raise AssertionError(f"{bits}-bit codes and a mantissa of {mantissa} bits")


def _cheapest_view(
    bits: int,
    plane: int,
    sub_block: int,
    place: int,
    *,
    width: int | None = None,
    above: int = 0,
) -> View:
    """The cheapest view that puts a field of a plane at bit ``place``.

    Of the field, it takes ``width`` bits (None: all) from bit ``above`` on.
    """
    positions = POSITIONS[bits][plane]
    width = width or PLANES[bits][plane]
    position = positions[sub_block % len(positions)] + above
    views = [
        View(swap, View(swap, 0).start(position) - place) for swap in (False, True)
    ]
    whole = [view for view in views if view.start(position) + width <= 16]
    return min(whole, key=lambda view: view.cost)
