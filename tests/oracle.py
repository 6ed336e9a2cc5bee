"""What qjax computes, straight from the definitions: float64 NumPy and Python integers.

Imports nothing of qjax. Slow and plain on purpose: bits are taken one at a time, every
element looks up its own scale, and gradients are sums over elements.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Planes of "gptq_p" as (bits of the plane, its lowest bit of the code), from the low.
PLANES = {
    **{1: [(1, 0)], 2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 5: [(4, 0), (1, 4)]},
    **{6: [(4, 0), (2, 4)], 7: [(4, 0), (2, 4), (1, 6)], 8: [(8, 0)]},
}

# Bits of exponent and mantissa of small floats, by their width, and the bias.
SMALL = {4: (2, 1, 1), 8: (4, 3, 7)}

# Significant bits, and the exponent of the smallest normal number.
FLOATS = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}


def pack(codes, bits, axis=0):
    """Codes to uint32 words: bit j of code i is bit ``bits * i + j`` of the stream."""
    last = np.moveaxis(np.asarray(codes), axis, -1).astype(np.int64)
    stream = (last[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*last.shape[:-1], -1, 32)
    words = (stream << np.arange(32)).sum(-1).astype(np.uint32)
    return np.moveaxis(words, -1, axis)


def unpack(words, bits, axis=0):
    """Words, signed or not, to codes: the inverse of `pack`."""
    last = np.moveaxis(np.asarray(words), axis, -1).astype(np.int64)
    stream = (last[..., None] >> np.arange(32)) & 1
    stream = stream.reshape(*last.shape[:-1], -1, bits)
    codes = (stream << np.arange(bits)).sum(-1).astype(np.uint8)
    return np.moveaxis(codes, -1, axis)


def pack_planes(codes, bits, axis=0):
    """Blocks of 32 codes to ``bits`` words: the planes of `PLANES`, low plane first."""
    last = np.moveaxis(np.asarray(codes), axis, -1).astype(np.int64)
    blocks = last.reshape(*last.shape[:-1], -1, 32)
    words = np.zeros((*blocks.shape[:-1], bits), np.int64)
    first = 0
    for width, low in PLANES[bits]:
        per_word = 32 // width
        for r in range(32):
            field = (blocks[..., r] >> low) & (2**width - 1)
            words[..., first + r // per_word] |= field << (width * (r % per_word))
        first += width
    flat = words.reshape(*last.shape[:-1], -1).astype(np.uint32)
    return np.moveaxis(flat, -1, axis)


def nearest(value, dtype):
    """Rounds an exact number to the nearest value of a float format, ties to even."""
    value = Fraction(value)
    if value == 0:
        return 0.0
    precision, lowest = FLOATS[np.dtype(dtype).name]
    magnitude = abs(value.numerator)
    shift = value.denominator.bit_length() - 1
    assert value.denominator == 1 << shift, "a sum of products of floats"
    exponent = magnitude.bit_length() - 1 - shift
    # The last bit kept stands for 2**quantum.
    quantum = max(exponent, lowest) - precision + 1
    dropped = quantum + shift
    if dropped > 0:
        kept, rest = divmod(magnitude, 1 << dropped)
        half = 1 << (dropped - 1)
        kept += rest > half or (rest == half and kept & 1)
    else:
        kept = magnitude << -dropped
    return math.copysign(math.ldexp(kept, quantum), value)


def small_float(code, bits):
    """The number of a pattern of sign, exponent and mantissa, from the definition."""
    exponents, mantissas, bias = SMALL[bits]
    fraction = code % 2**mantissas / 2**mantissas
    exponent = code >> mantissas & (2**exponents - 1)
    size = fraction * 2.0 ** (1 - bias) if exponent == 0 else 2.0 ** (exponent - bias)
    size = size if exponent == 0 else size * (1 + fraction)
    return -size if code >> (bits - 1) else size


class Part(NamedTuple):
    """A run of stored rows of one width."""

    bits: int
    rows: int
    group_size: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantized matrix in stored row order; affine maps and groupings by name."""

    codes: np.ndarray
    parts: tuple[Part, ...]
    scale: np.ndarray
    zero: np.ndarray | None = None
    affine: str = "ZERO"
    grouping: str = "ROWS"
    order: np.ndarray | None = None
    row_group: np.ndarray | None = None
    codebook: np.ndarray | None = None
    input_scale: np.ndarray | None = None

    @property
    def words(self):
        """Stream words of each part."""
        ends = np.cumsum([part.rows for part in self.parts])
        codes = np.split(self.codes, ends[:-1])
        return [pack(q, part.bits) for q, part in zip(codes, self.parts, strict=True)]

    def spread(self, parameter):
        """The scale or zero of every element, and where it stands in the array."""
        (k, n), parameter = self.codes.shape, np.asarray(parameter)
        i, j = np.mgrid[:k, :n]
        if self.grouping == "ROWS":
            if self.row_group is not None:
                group = self.row_group[i]
            else:
                group, first = np.zeros((k, n), int), 0
                start = 0
                for _, rows, group_size in self.parts:
                    size = group_size or rows
                    group[start : start + rows] = (
                        first + np.arange(rows)[:, None] // size
                    )
                    start, first = start + rows, first + -(-rows // size)
            where = (group, j * parameter.shape[1] // n)
        else:
            (_, _, size), groups = self.parts[0], parameter.size
            f = j * k + i  # place in W.T, row by row
            group = f // (size or k * n) if self.grouping == "FLAT" else f % groups
            where = np.unravel_index(group, parameter.shape)
        return parameter.astype(np.float64)[where], where

    @property
    def centre(self):
        """Middle code of each row, ``[k, 1]``."""
        middles = [np.full(part.rows, 2 ** (part.bits - 1)) for part in self.parts]
        return np.concatenate(middles)[:, None]

    @property
    def numbers(self):
        """What codes of a codebook, or small floats, stand for."""
        if self.affine == "CODEBOOK":
            return self.codebook.astype(np.float64)[self.codes]
        bits = self.parts[0].bits
        return np.array([small_float(q, bits) for q in range(2**bits)])[self.codes]

    @property
    def stored(self):
        """The weight in stored row order, without the input scale, unrounded."""
        q, (s, _) = self.codes.astype(np.float64), self.spread(self.scale)
        z = 0.0 if self.zero is None else self.spread(self.zero)[0]
        match self.affine:
            case "ZERO":
                return (q - z) * s
            case "OFFSET":
                return q * s + z
            case "CENTERED":
                return (q - self.centre) * s + z
            case "CODEBOOK" | "FLOAT":
                return self.numbers * s

    @property
    def rows(self):
        """Input feature of every stored row."""
        return np.arange(len(self.codes)) if self.order is None else self.order

    @property
    def weight(self):
        """``W[k, n]`` in input order, unrounded."""
        weight = np.empty(self.codes.shape)
        weight[self.rows] = self.stored
        if self.input_scale is not None:
            weight *= self.input_scale.astype(np.float64)[:, None]
        return weight

    def matmul(self, x):
        """``x @ W`` in float64."""
        return np.asarray(x, np.float64) @ self.weight

    def gradients(self, x, dy):
        """Derivatives of ``sum(dy * (x @ W))`` by x and the float leaves."""
        x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
        dw = x.T @ dy
        gradients = {"x": dy @ self.weight.T}
        by_row = dw[self.rows]
        if self.input_scale is not None:
            total = (by_row * self.stored).sum(1)
            gradients["input_scale"] = np.empty_like(total)
            gradients["input_scale"][self.rows] = total
            by_row = by_row * self.input_scale.astype(np.float64)[self.rows][:, None]
        q = self.codes.astype(np.float64)
        s, place = self.spread(self.scale)
        z = 0.0 if self.zero is None else self.spread(self.zero)[0]
        if self.affine in ("CODEBOOK", "FLOAT"):
            by_scale = self.numbers
        else:
            subtrahends = {"ZERO": z, "OFFSET": 0.0, "CENTERED": self.centre}
            by_scale = q - subtrahends[self.affine]
        gradients["scale"] = _sum_at(self.scale, place, by_row * by_scale)
        if self.zero is not None and self.zero.dtype.kind not in "iu":
            by_zero = -s if self.affine == "ZERO" else np.ones_like(s)
            place = self.spread(self.zero)[1]
            gradients["zero"] = _sum_at(self.zero, place, by_row * by_zero)
        if self.codebook is not None:
            gradients["codebook"] = _sum_at(self.codebook, self.codes, by_row * s)
        return gradients


def _sum_at(like, place, terms):
    total = np.zeros(np.shape(like))
    np.add.at(total, place, terms)
    return total


def random(
    seed,
    k,
    n,
    *,
    bits=4,
    group_size=32,
    parts=None,
    affine="ZERO",
    dtype=np.float32,
    float_zero=False,
    grouping="ROWS",
    columns=None,
    order=False,
    row_group=False,
    input_scale=False,
):
    """A `Matrix` with codes of all values, scales around 0.02 and zeros to match.

    ``columns`` is how many the scales have (1 or a divisor of n); ``row_group`` deals
    every group its rows at random.
    """
    rng = np.random.default_rng(seed)
    parts = tuple(Part(*part) for part in parts or [(bits, k, group_size)])
    codes = [rng.integers(0, 2**part.bits, (part.rows, n)) for part in parts]
    if affine == "FLOAT" and bits == 8:
        codes = [np.where(q % 128 == 127, q - 1, q) for q in codes]  # those are NaN
    counts = [
        -(-(rows if grouping == "ROWS" else rows * n) // (size or rows * n))
        for _, rows, size in parts
    ]
    shape = (sum(counts), columns or (n if grouping == "ROWS" else 1))
    scale = rng.uniform(0.01, 0.03, shape).astype(dtype)
    middle = 2.0 ** (min(part.bits for part in parts) - 1)
    zero = None
    if affine == "ZERO":
        zero = rng.integers(0, 2 * middle, shape).astype(np.uint8)
        if float_zero:
            zero = rng.uniform(0, 2 * middle, shape).astype(dtype)
    elif affine in ("OFFSET", "CENTERED") and (affine == "OFFSET" or float_zero):
        zero = (-middle * 0.02 * rng.uniform(0, 2, shape)).astype(dtype)
    widest = max(part.bits for part in parts)
    return Matrix(
        codes=np.concatenate(codes).astype(np.uint8),
        parts=parts,
        scale=scale,
        zero=zero,
        affine=affine,
        grouping=grouping,
        order=rng.permutation(k).astype(np.int32) if order else None,
        row_group=rng.permutation(
            np.repeat(np.arange(shape[0]), -(-k // shape[0]))[:k]
        ).astype(np.int32)
        if row_group
        else None,
        codebook=np.sort(rng.normal(size=2**widest)).astype(dtype)
        if affine == "CODEBOOK"
        else None,
        input_scale=rng.uniform(0.5, 2, k).astype(dtype) if input_scale else None,
    )


def relative_error(found, expected) -> float:
    """Largest error over the largest expected value."""
    expected = np.asarray(expected, np.float64)
    found = np.asarray(found).astype(np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()
