"""GGUF's types of one to three bits, whose weights are not stored one by one.

Those from IQ1_S to IQ3_S store neighbours together: an index picks a point of a grid,
which has a size for each of eight weights (of four in IQ3_XXS and IQ3_S), and every
weight has a sign. TQ1_0 and TQ2_0 are ternary. Their blocks hold 256 weights of one
output; those of Q2_0, whose codes are 0 to 3, hold 64, and of Q1_0, signs alone, 128.
These are the bytes of each type, from first to last; ``d`` is a float16:

    IQ1_S    d  low 32  high 8 x uint16           IQ3_XXS  d  low 64  signs 8 x uint32
    IQ1_M    low 32  high 16  d and scales 8      IQ3_S    d  low 64  high 8  signs 32
    IQ2_XXS  d  8 x (low 4, signs uint32)                  scales 4
    IQ2_XS   d  low 32 x uint16  scales 8         TQ1_0    fives 48  fours 4  d
    IQ2_S    d  low 32  signs 32  high 8          TQ2_0    fields 64  d
             scales 8                        Q1_0     d  signs 16
                                             Q2_0     d  fields 16

``low`` are the lowest eight bits of the indices. Where a point has eight weights, a
group of 32 has four indices, else it has eight. What is left of them, the signs, and a
small integer ``s`` for each group lie

* in the word of a group, in IQ2_XXS and IQ3_XXS: four times seven bits of signs, each
  for eight weights of which an even number is negative, which is why seven are enough,
  and ``s`` in the highest four bits; there are 256 points, and so no ``high``,
* above the nine bits of an index, in IQ2_XS: seven signs likewise,
* in ``high``, in IQ2_S and IQ3_S: two bits or one for each index, and a bit for each
  weight in ``signs``,
* in ``high``, in IQ1_S: three bits for each index of a group, three of ``s``, and one
  that says that an eighth is taken off all sizes of the group instead of added,
* in ``high``, in IQ1_M: a nibble for each index, three bits of it and that eighth. The
  highest nibbles of ``scales``, four uint16, make ``d``; below are four times three
  bits, ``s`` of groups of 16.

Other ``scales`` are nibbles ``s`` of groups of 16, in IQ3_S of 32. The weight is, in
float32, where all products are exact,

    IQ1_S  IQ1_M             (size +- 1/8) * (2s + 1) * d       of -1, 0, 1
    IQ2_XXS  IQ2_XS  IQ2_S   +- size / 8 * (2s + 1) * d         of 8, 25, 43
    IQ3_XXS                  +- size / 4 * (2s + 1) * d         of 4, 12, ..., 52, 62
    IQ3_S                    +- size * (2s + 1) * d             of 1, 3, ..., 15
    TQ1_0  TQ2_0  Q2_0       (q - 1) * d
    Q1_0                     +- d

where a bit of Q1_0 is set for +, the lowest for the first weight, as of four in a byte
of Q2_0.
A byte of ``fives`` holds five ternary digits and one of ``fours`` four: they are those
behind the point of a number below one, in 256ths, rounded up. ``gguf_grids.json`` has
the points: fields of a 16-bit number in hexadecimal, that of the first weight lowest.

Source: ggml-org/llama.cpp, ggml/src/ggml-common.h, ggml/src/ggml-quants.c and
gguf-py/gguf/quants.py, as in release 0.19.0 of the package gguf; of Q1_0 and Q2_0 the
first two, as in release 0.3.36 of the package llama-cpp-python.
"""

import functools
import importlib.resources
import json
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """What blocks hold, ``[..., n, blocks, x]``.

    Attributes:
      codes: uint8, as many as a block has weights.
      d: float16, one a block.
      factors: int8 ``2s + 1`` of the groups; None where all of a block has one scale.
    """

    codes: np.ndarray
    d: np.ndarray
    factors: np.ndarray | None = None


class Grid(NamedTuple):
    """A type of blocks.

    Attributes:
      number: What a file calls it.
      size: Bytes of a block.
      group_size: Weights that share a scale.
      read: Takes blocks ``[..., n, blocks, size]`` apart.
      table: What the codes stand for, sixteen numbers; None if codes count steps.
      bits: Width of a code as it is read.
      block: Weights of a block.
    """

    number: int
    size: int
    group_size: int
    read: Callable[[np.ndarray], Parts]
    table: np.ndarray | None = None
    bits: int = 4
    block: int = 256


# A sign, or the direction of that eighth, is the highest bit of a code.
_SIGN = np.uint8(8)


@functools.cache
def _points(name: str) -> np.ndarray:
    """The digits of a grid's points, uint8 ``[points, weights]``."""
    file = importlib.resources.files(__package__).joinpath("gguf_grids.json")
    digits = bytes.fromhex("".join(json.loads(file.read_text())[name]))
    numbers = np.frombuffer(digits, ">u2")[:, None]
    width = 4 if name.startswith("IQ3") else 2
    return (numbers >> np.arange(0, 16, width) & 2**width - 1).astype(np.uint8)


def _apart(fields: np.ndarray, width: int, count: int | None = None) -> np.ndarray:
    """Fields of integers ``[..., x]``, the lowest first: ``[..., x * count]``."""
    count = count or 8 * fields.itemsize // width
    shifts = np.arange(0, width * count, width, dtype=fields.dtype)
    parts = fields[..., None] >> shifts & fields.dtype.type(2**width - 1)
    return parts.reshape(*fields.shape[:-1], -1)


def _codes(name: str, index: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Codes of the points of ``index``, and of a bit for each weight."""
    digits = _points(name)[index].reshape(*negative.shape)
    return digits | negative.astype(np.uint8) * _SIGN


def _eight_signs(sevens: np.ndarray) -> np.ndarray:
    """Eight signs of seven bits: an even number of them is negative."""
    parity = np.bitwise_count(sevens).astype(np.uint8) & 1
    return _apart(sevens.astype(np.uint8) | parity << np.uint8(7), 1)


def _factors(s: np.ndarray) -> np.ndarray:
    return (2 * s + 1).astype(np.int8)


def _split(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The parts of a block, of so many bytes, each contiguous."""
    parts = np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)
    return [np.ascontiguousarray(part) for part in parts]


def _iq1_s(blocks: np.ndarray) -> Parts:
    d, low, high = _split(blocks, 2, 32, 16)
    high = high.view("<u2")
    index = low | _apart(high, 3, 4) << 8
    down = np.repeat(high >> 15, 32, axis=-1)
    codes = _codes("IQ1", index, down)
    return Parts(codes, d.view("<f2"), _factors(high >> 12 & 7))


def _iq1_m(blocks: np.ndarray) -> Parts:
    low, high, scales = _split(blocks, 32, 16, 8)
    nibbles, scales = _apart(high, 4), scales.view("<u2")
    index = low | (nibbles & 7).astype(np.uint16) << 8
    codes = _codes("IQ1", index, np.repeat(nibbles >> 3, 8, axis=-1))
    d = (scales >> 12) << np.arange(0, 16, 4, dtype=np.uint16)
    d = np.bitwise_or.reduce(d, axis=-1, keepdims=True).view(np.float16)
    return Parts(codes, d, _factors(_apart(scales, 3, 4)))


def _iq2_xxs(blocks: np.ndarray) -> Parts:
    d, pairs = _split(blocks, 2, 64)
    pairs = pairs.reshape(*pairs.shape[:-1], 8, 8)
    low, words = _split(pairs, 4, 4)
    words = words.view("<u4")[..., 0]
    index = low.reshape(*low.shape[:-2], -1)
    codes = _codes("IQ2_XXS", index, _eight_signs(_apart(words, 7, 4)))
    return Parts(codes, d.view("<f2"), _factors(words >> 28))


def _iq2_xs(blocks: np.ndarray) -> Parts:
    d, low, scales = _split(blocks, 2, 64, 8)
    low = low.view("<u2")
    codes = _codes("IQ2_XS", low & 511, _eight_signs(low >> 9))
    return Parts(codes, d.view("<f2"), _factors(_apart(scales, 4)))


def _iq2_s(blocks: np.ndarray) -> Parts:
    d, low, signs, high, scales = _split(blocks, 2, 32, 32, 8, 8)
    index = low | _apart(high, 2).astype(np.uint16) << 8
    codes = _codes("IQ2_S", index, _apart(signs, 1))
    return Parts(codes, d.view("<f2"), _factors(_apart(scales, 4)))


def _iq3_xxs(blocks: np.ndarray) -> Parts:
    d, low, words = _split(blocks, 2, 64, 32)
    words = words.view("<u4")
    codes = _codes("IQ3_XXS", low, _eight_signs(_apart(words, 7, 4)))
    return Parts(codes, d.view("<f2"), _factors(words >> 28))


def _iq3_s(blocks: np.ndarray) -> Parts:
    d, low, high, signs, scales = _split(blocks, 2, 64, 8, 32, 4)
    index = low | _apart(high, 1).astype(np.uint16) << 8
    codes = _codes("IQ3_S", index, _apart(signs, 1))
    return Parts(codes, d.view("<f2"), _factors(_apart(scales, 4)))


def _tq1_0(blocks: np.ndarray) -> Parts:
    fives, fours, d = _split(blocks, 48, 4, 2)
    runs = [(fives[..., :32], 5), (fives[..., 32:], 5), (fours, 4)]
    # The digit after the point comes before it, times three; powers wrap around.
    digits = [
        (part * np.uint8(3**place)).astype(np.uint16) * 3 >> 8
        for part, count in runs
        for place in range(count)
    ]
    return Parts(np.concatenate(digits, axis=-1).astype(np.uint8), d.view("<f2"))


def _tq2_0(blocks: np.ndarray) -> Parts:
    fields, d = _split(blocks, 64, 2)
    halves = fields.reshape(*fields.shape[:-1], 2, 1, 32)
    codes = halves >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    return Parts(codes.reshape(*fields.shape[:-1], -1), d.view("<f2"))


def _q1_0(blocks: np.ndarray) -> Parts:
    d, signs = _split(blocks, 2, 16)
    return Parts(_apart(signs, 1), d.view("<f2"))


def _q2_0(blocks: np.ndarray) -> Parts:
    d, fields = _split(blocks, 2, 16)
    return Parts(_apart(fields, 2), d.view("<f2"))


def _signed(*sizes: float | int) -> np.ndarray:
    """A table of these and, from `_SIGN` on, their negatives."""
    half = np.zeros(8, np.float32)
    half[: len(sizes)] = sizes
    return np.concatenate([half, 0 - half])


_IQ1 = np.zeros(16, np.float32)
_IQ1[[0, 1, 2]] = -7 / 8, 1 / 8, 9 / 8
_IQ1[[8, 9, 10]] = -9 / 8, -1 / 8, 7 / 8
_IQ2 = _signed(8 / 8, 25 / 8, 43 / 8)
_IQ3_XXS = _signed(*(size / 4 for size in (4, 12, 20, 28, 36, 44, 52, 62)))
_IQ3_S = _signed(*range(1, 16, 2))

GRIDS: Mapping[str, Grid] = types.MappingProxyType(
    {
        "IQ2_XXS": Grid(16, 66, 32, _iq2_xxs, _IQ2),
        "IQ2_XS": Grid(17, 74, 16, _iq2_xs, _IQ2),
        "IQ3_XXS": Grid(18, 98, 32, _iq3_xxs, _IQ3_XXS),
        "IQ1_S": Grid(19, 50, 32, _iq1_s, _IQ1),
        "IQ3_S": Grid(21, 110, 32, _iq3_s, _IQ3_S),
        "IQ2_S": Grid(22, 82, 16, _iq2_s, _IQ2),
        "IQ1_M": Grid(29, 56, 16, _iq1_m, _IQ1),
        "TQ1_0": Grid(34, 54, 256, _tq1_0, bits=2),
        "TQ2_0": Grid(35, 66, 256, _tq2_0, bits=2),
        "Q1_0": Grid(41, 18, 128, _q1_0, bits=1, block=128),
        "Q2_0": Grid(42, 18, 64, _q2_0, bits=2, block=64),
    }
)
