"""The blocks of GGUF's types: where codes, scales and minima lie in their bytes.

A block holds 32, 64 or 256 weights of one output. These are the bytes of each type,
from first to last; ``d`` and ``m`` are float16, ``low`` and ``high`` are the planes
that `gguf_planes` draws:

    Q4_0  d low             Q2_K  scales low d m            IQ4_NL  d low
    Q4_1  d m low           Q3_K  high low scales d         IQ4_XS  d scales low
    Q5_0  d high low        Q4_K  d m scales low            MXFP4   e low
    Q5_1  d m high low      Q5_K  d m scales high low       NVFP4   4 x s, low
    Q8_0  d low             Q6_K  low high scales d

A group of a block of 256 has a small integer, its factor ``f``, and some types another
for its minimum, ``u``, in ``scales``. Those of Q6_K are plain int8; Q2_K has

    bit 7         bit 0
    | u[i] | f[i] |                                       16 bytes

Six bits are split between bytes. In Q4_K and Q5_K, eight groups in twelve bytes, i from
0 to 3, each ":2" or ":4" so many bits,

    bit 7                       bit 0
    | f[i+4] >> 4 :2 | f[i] :6      |                     byte i
    | u[i+4] >> 4 :2 | u[i] :6      |                     byte i + 4
    | u[i+4] & 15 :4 | f[i+4] & 15 :4 |                   byte i + 8

Sixteen groups of Q3_K and eight of IQ4_XS have ``f + 32``, here ``g``:

    bit 7                       bit 0
    | g[i+8] & 15 | g[i] & 15 |                           Q3_K, byte i of 0 to 7
    | g[i+12] >> 4 | g[i+8] >> 4 | g[i+4] >> 4 | g[i] >> 4 |   byte i + 8 of 8 to 11
    | g[4i+3] >> 4 | g[4i+2] >> 4 | g[4i+1] >> 4 | g[4i] >> 4 |   IQ4_XS, byte 0 and 1
    | g[2i+1] & 15 | g[2i] & 15 |                         IQ4_XS, byte i + 2

Source: ggml-org/llama.cpp, ggml/src/ggml-common.h, ggml/src/ggml-quants.c and
gguf-py/gguf/quants.py, as in release 0.19.0 of the package gguf.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qjax.tensor import Affine

# What the codes of IQ4_NL and IQ4_XS stand for.
IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    np.float32,
)
FACTORS, MINIMA = "factors", "minima"


class Type(NamedTuple):
    """A type of blocks.

    Attributes:
      number: What a file calls it.
      bits: Width of a code.
      group_size: Weights that share a scale.
      affine: How a code becomes a number.
      parts: Bytes of each part of a block, in order.
      run: Bytes of a run of the low plane, as in `gguf_planes.Planes`.
      high_run: Likewise of the high plane.
    """

    number: int
    bits: int
    group_size: int
    affine: Affine
    parts: Mapping[str, int]
    run: int
    high_run: int | None = None

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(self.parts.values())

    @property
    def block(self) -> int:
        """Weights of a block."""
        codes = self.parts["low"] + self.parts.get("high", 0)
        return codes * 8 // self.bits

    @property
    def is_nested(self) -> bool:
        """Whether the groups of a block have factors of their own."""
        return "scales" in self.parts


_CENTERED, _OFFSET, _CODEBOOK = Affine.CENTERED, Affine.OFFSET, Affine.CODEBOOK
_K4 = {"d": 2, "m": 2, "scales": 12}

TYPES: Mapping[str, Type] = types.MappingProxyType(
    {
        "Q4_0": Type(2, 4, 32, _CENTERED, {"d": 2, "low": 16}, 16),
        "Q4_1": Type(3, 4, 32, _OFFSET, {"d": 2, "m": 2, "low": 16}, 16),
        "Q5_0": Type(6, 5, 32, _CENTERED, {"d": 2, "high": 4, "low": 16}, 16, 1),
        "Q5_1": Type(7, 5, 32, _OFFSET, {"d": 2, "m": 2, "high": 4, "low": 16}, 16, 1),
        "Q8_0": Type(8, 8, 32, _CENTERED, {"d": 2, "low": 32}, 32),
        "Q2_K": Type(10, 2, 16, _OFFSET, {"scales": 16, "low": 64, "d": 2, "m": 2}, 32),
        "Q3_K": Type(
            11, 3, 16, _CENTERED, {"high": 32, "low": 64, "scales": 12, "d": 2}, 32, 32
        ),
        "Q4_K": Type(12, 4, 32, _OFFSET, {**_K4, "low": 128}, 32),
        "Q5_K": Type(13, 5, 32, _OFFSET, {**_K4, "high": 32, "low": 128}, 32, 32),
        "Q6_K": Type(
            14, 6, 16, _CENTERED, {"low": 128, "high": 64, "scales": 16, "d": 2}, 64, 32
        ),
        "IQ4_NL": Type(20, 4, 32, _CODEBOOK, {"d": 2, "low": 16}, 16),
        "IQ4_XS": Type(23, 4, 32, _CODEBOOK, {"d": 2, "scales": 6, "low": 128}, 16),
        "MXFP4": Type(39, 4, 32, _CODEBOOK, {"e": 1, "low": 16}, 16),
        "NVFP4": Type(40, 4, 16, Affine.FLOAT, {"s": 4, "low": 32}, 8),
    }
)

# Types of files that are not read, so that they are declined by name.
OTHERS: Mapping[int, str] = types.MappingProxyType(
    {
        **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K"},
        **{31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
        **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
    }
)


def split_blocks(blocks: np.ndarray, kind: Type) -> dict[str, np.ndarray]:
    """Takes blocks apart.

    Args:
      blocks: uint8 ``[..., n, blocks, size]``.
      kind: Their type.

    Returns:
      The parts by name, ``[..., n, blocks, bytes]``: ``d`` and ``m`` as float16, and
      for ``scales`` the int8 `FACTORS` and, if the type has them, `MINIMA`.
    """
    ends = np.cumsum(list(kind.parts.values()))[:-1]
    parts = dict(zip(kind.parts, np.split(blocks, ends, axis=-1), strict=True))
    for name in parts.keys() & {"d", "m"}:
        parts[name] = np.ascontiguousarray(parts[name]).view("<f2")
    if kind.is_nested:
        parts |= _read_scales(parts.pop("scales"), kind)
    return parts


def join_blocks(parts: Mapping[str, np.ndarray], kind: Type) -> np.ndarray:
    """Inverse of `split_blocks`.

    Args:
      parts: What `split_blocks` returns.
      kind: The type.

    Returns:
      uint8 ``[..., n, blocks, size]``.
    """
    parts = dict(parts)
    if kind.is_nested:
        parts["scales"] = _write_scales(parts, kind)
    stored = [np.ascontiguousarray(parts[name]).view(np.uint8) for name in kind.parts]
    return np.concatenate(stored, axis=-1)


def _read_scales(scales: np.ndarray, kind: Type) -> dict[str, np.ndarray]:
    if kind is TYPES["Q6_K"]:
        return {FACTORS: scales.view(np.int8)}
    if kind is TYPES["Q2_K"]:
        found = {FACTORS: scales & 15, MINIMA: scales >> 4}
    elif kind is TYPES["Q3_K"]:
        low = _fields(scales[..., :8], 4)
        found = {FACTORS: (low | _fields(scales[..., 8:], 2) << 4) - 32}
    elif kind is TYPES["IQ4_XS"]:
        # Its fields follow each other within a byte first.
        high, low = (
            _fields(part[..., None], bits).reshape(*part.shape[:-1], -1)
            for part, bits in ((scales[..., :2], 2), (scales[..., 2:], 4))
        )
        found = {FACTORS: (low | high << 4) - 32}
    else:
        first, second, low = np.split(scales, 3, axis=-1)
        found = {
            name: np.concatenate([six & 63, nibble | (six >> 6) << 4], axis=-1)
            for name, six, nibble in (
                (FACTORS, first, low & 15),
                (MINIMA, second, low >> 4),
            )
        }
    return {name: values.astype(np.int8) for name, values in found.items()}


def _write_scales(parts: Mapping[str, np.ndarray], kind: Type) -> np.ndarray:
    factors = parts[FACTORS].view(np.uint8)
    if kind is TYPES["Q6_K"]:
        return factors
    if kind is TYPES["Q2_K"]:
        return factors | parts[MINIMA].view(np.uint8) << 4
    if kind is TYPES["Q3_K"]:
        raised = factors + np.uint8(32)
        low, high = _joined(raised & 15, 4), _joined(raised >> 4, 2)
        return np.concatenate([low, high], axis=-1)
    if kind is TYPES["IQ4_XS"]:
        raised = factors + np.uint8(32)
        low, high = (
            _joined(fields.reshape(*fields.shape[:-1], -1, 8 // bits), bits)[..., 0]
            for fields, bits in ((raised & 15, 4), (raised >> 4, 2))
        )
        return np.concatenate([high, low], axis=-1)
    pairs = [np.split(v, 2, -1) for v in (factors, parts[MINIMA].view(np.uint8))]
    sixes = [before | (after >> 4) << 6 for before, after in pairs]
    (_, factors), (_, minima) = pairs
    return np.concatenate([*sixes, (factors & 15) | (minima & 15) << 4], axis=-1)


def _fields(stored: np.ndarray, bits: int) -> np.ndarray:
    """The fields of bytes: the lowest of all first, and then those above them."""
    fields = [stored >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return np.concatenate(fields, axis=-1)


def _joined(fields: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `_fields`."""
    parts = np.split(fields, 8 // bits, axis=-1)
    moved = [part << np.uint8(i * bits) for i, part in enumerate(parts)]
    return np.bitwise_or.reduce(moved)
