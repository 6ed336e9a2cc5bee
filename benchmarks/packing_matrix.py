"""The matrix that `packing.py` times, and how results of several libraries compare."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

K, N, GROUP = 4096, 11008, 128
# A call without arguments, and a number that tells whether its result is right.
Engine = tuple[Callable[[], Any], Callable[[Any], float]]
# Rows of the table by (operation, format), each with engines by name. Engines are made
# when their row is reached, and let go after it.
Rows = dict[tuple[str, str], dict[str, Callable[[], Engine]]]


@functools.cache
def codes(bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, (K, N), dtype=np.uint8)


@functools.cache
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((K, N), np.float32)


def digest(result: Any) -> int:
    """Checksum of packed words, the same for the same bytes."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(result)).view(np.uint8).data)


def wrong(expected: np.ndarray, result: Any) -> int:
    """How many codes are not what they should be."""
    return int((np.asarray(result).reshape(-1) != expected.reshape(-1)).sum())


def distance(dequantized: Any) -> float:
    """How far a quantized weight is from the weight, relative."""
    found = np.asarray(dequantized).reshape(N, K).T
    return float(np.linalg.norm(found - weight()) / np.linalg.norm(weight()))
