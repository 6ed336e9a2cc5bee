"""From one packing to another without the codes in between: words in, words out.

Where both packings permute the binary digits of a code's row and column
(`qjax.tensor.Digits`), a program takes a tile of rows and columns that is whole words
in both. Digits that count words in the source and fields in the target tell apart the
words that a word of the target takes its fields from; those the other way round tell
apart the words that it goes to; all others only change their places. Words are read and
written in the order of memory, each once.
"""

import collections
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from qjax import decode
from qjax.pallas import lang
from qjax.tensor import Digits, Layout

# Digits of k and n in a tile, unless a layout needs more: 128 x 64 codes.
_TILE = {"k": 7, "n": 6}
_WARPS = 4


class _Table(NamedTuple):
    """The words of a matrix in lines, and the tile that a program takes of them.

    Attributes:
      digits: Where a code lies.
      shape: Lines, and words of a line.
      of_line: Digits that count the lines of a tile, the most significant first.
      of_word: Digits that count the words of its lines, likewise.
    """

    digits: Digits
    shape: tuple[int, int]
    of_line: list[str]
    of_word: list[str]

    @classmethod
    def of(
        cls, digits: Digits, words: Any, extents: Mapping[str, int], tile: Mapping
    ) -> "_Table":
        """Lays out the words of a matrix; declines one of broken runs or fields."""
        left = {letter: digits.left(letter, count) for letter, count in tile.items()}
        for letter, extent in extents.items():
            if extent % 2 ** len(digits.taken(letter)):
                raise NotImplementedError(f"{letter}={extent} breaks words or runs.")
        lines = extents[digits.lines] >> len(digits.taken(digits.lines))
        of_line = left.pop(digits.lines)
        (runs,) = left.values()
        shape = (lines, math.prod(words.shape) // lines)
        return cls(digits, shape, of_line, runs + digits.run.split())

    def tile(self, ref: Any, row: Any, column: Any) -> tuple[Any, Array | None]:
        """The tile at a place of the grid over k and n, and which words it has."""
        places = (row, column) if self.digits.lines == "k" else (column, row)
        where, mask = [], None
        for axis, names in enumerate((self.of_line, self.of_word)):
            size, extent = 2 ** len(names), self.shape[axis]
            where.append(pl.ds(places[axis] * size, size))
            if extent % size:
                inside = places[axis] * size + jnp.arange(size) < extent
                mask = lang.both(mask, jnp.expand_dims(inside, 1 - axis))
        return ref.at[tuple(where)], mask


def relayout(
    words: Array,
    source: Layout,
    target: Layout,
    bits: int,
    shape: tuple[int, int],
    *,
    interpret: bool = False,
) -> Array:
    """Moves the codes of a matrix of one width to another layout.

    Args:
      words: As in `decode.move_words`, and so are ``source``, ``target``, ``bits`` and
        ``shape``.
      source: See ``words``.
      target: See ``words``.
      bits: See ``words``.
      shape: See ``words``.
      interpret: Whether to run as jnp, on any device.

    Returns:
      As `decode.move_words`.

    Raises:
      ValueError: If ``target`` cannot hold the codes.
      NotImplementedError: If the kernel declines, with the reason.
    """
    old, new = source.digits(bits), target.digits(bits)
    if old is None or new is None:
        raise NotImplementedError(
            f"{bits}-bit codes in {source!r} or {target!r} are no permuted digits."
        )
    move = functools.partial(
        decode.move_words, source=source, target=target, bits=bits, shape=shape
    )
    packed = jax.eval_shape(move, words)
    held, wanted = (
        dict(zip("kn", layout.extents(array.shape, bits), strict=True))
        for layout, array in ((source, words), (target, packed))
    )
    for letter, size in zip("kn", shape, strict=True):
        if size < min(held[letter], wanted[letter]):
            raise NotImplementedError(
                f"{letter}={size}: what pads {source!r} would pad {target!r}."
            )
    tile = {
        letter: max(count, old.reach(letter), new.reach(letter))
        for letter, count in _TILE.items()
    }
    before = _Table.of(old, words, held, tile)
    after = _Table.of(new, packed, wanted, tile)
    moved = lang.launch(
        functools.partial(_body, bits, before, after),
        words.reshape(before.shape),
        name=f"relayout_{bits}bit",
        grid=tuple(-(-wanted[letter] >> tile[letter]) for letter in "kn"),
        out=jax.ShapeDtypeStruct(after.shape, packed.dtype),
        warps=_WARPS,
        stages=1,
        interpret=interpret,
    )
    return moved.reshape(packed.shape)


def _body(
    bits: int,
    source: _Table,
    target: _Table,
    language: lang.Lang,
    source_ref: Any,
    target_ref: Any,
) -> None:
    del language
    place = pl.program_id(0), pl.program_id(1)
    old, new = source.digits.fields.split(), target.digits.fields.split()
    entering = [digit for digit in new if digit not in old]
    leaving = [digit for digit in old if digit not in new]
    names = source.of_line + source.of_word
    kept = [digit for digit in names if digit not in entering]

    words = lang.load(*source.tile(source_ref, *place)).astype(jnp.uint32)
    axes = [names.index(digit) for digit in kept + entering[::-1]]
    parts = _split(words.reshape((2,) * len(names)).transpose(axes), len(entering))
    words = _join(
        [
            functools.reduce(operator.or_, (_moved(parts, move) for move in moves))
            for moves in _moves(bits, source.digits, target.digits)
        ]
    )
    names = kept + leaving[::-1]
    axes = [names.index(digit) for digit in target.of_line + target.of_word]
    ref, mask = target.tile(target_ref, *place)
    tile = words.transpose(axes).reshape(ref.shape)
    lang.store(ref, tile.astype(target_ref.dtype), mask)


class _Move(NamedTuple):
    """Bits that go over from a word to another together.

    Attributes:
      part: Number of the word.
      distance: By how many bits they move left; negative: right.
      mask: Which bits.
    """

    part: int
    distance: int
    mask: int


def _moves(bits: int, source: Digits, target: Digits) -> list[list[_Move]]:
    """Lists of what each of the words consists that the parts become."""
    old, new = source.fields.split(), target.fields.split()
    digits = list(dict.fromkeys(old + new))
    words = collections.defaultdict(lambda: collections.defaultdict(int))
    for values in itertools.product((0, 1), repeat=len(digits)):
        of = dict(zip(digits, values, strict=True))
        begin = source.position(_number(of[d] for d in old), bits)
        end = target.position(_number(of[d] for d in new), bits)
        word = words[_number(of[d] for d in old if d not in new)]
        part = _number(of[d] for d in new if d not in old)
        for bit in range(bits):
            at = (begin + bit) % source.width
            word[part, (end + bit) % target.width - at] |= 1 << at
    return [
        [_Move(*key, mask=mask) for key, mask in words[i].items()]
        for i in range(len(words))
    ]


def _number(values: Iterable[int]) -> int:
    """Reads binary digits, the most significant first."""
    return functools.reduce(lambda number, value: 2 * number + value, values, 0)


def _moved(parts: Sequence[Array], move: _Move) -> Array:
    bits = parts[move.part] & jnp.uint32(move.mask)
    if move.distance < 0:
        return bits >> jnp.uint32(-move.distance)
    return bits << jnp.uint32(move.distance) if move.distance else bits


def _split(words: Array, count: int) -> list[Array]:
    """Takes the last ``count`` axes apart; the last has the most significant digit."""
    if not count:
        return [words]
    halves = lax.split(words, (1, 1), axis=words.ndim - 1)
    return [
        part
        for half in halves
        for part in _split(half.reshape(words.shape[:-1]), count - 1)
    ]


def _join(parts: Sequence[Array]) -> Array:
    """Inverse of `_split`."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return jnp.stack([_join(parts[:half]), _join(parts[half:])], axis=-1)
