"""What tests run on: codes, matrices of the oracle in `Tiles`, and rows."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax import tensor
from qjax.formats.tiles import Tiles
from tests import oracle

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32

MAPS = {
    "zero": {},
    "float_zero": {"float_zero": True},
    "offset": {"affine": "OFFSET"},
    "centered": {"affine": "CENTERED"},
    "centered_zero": {"affine": "CENTERED", "float_zero": True},
}
CODEBOOK = {"codebook": {"affine": "CODEBOOK"}}
FLOAT = {"float": {"affine": "FLOAT"}}
SCALES = {"float16": F16, "bfloat16": BF16, "float32": F32}
# Of two levels, `tensor.Nested` and `tensor.WithGlobal`.
LEVELS = {"nested": F32, "global": F32, "over global": F32}


def random_codes(seed: int, bits: int, *shape: int) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape)
    return codes.astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTwoLevels(oracle.Matrix):
    """A matrix whose float scales and zeros are those of `levels`, by name."""

    levels: Mapping[str, tensor.Levels]


def random_matrix(seed: int, k: int, n: int, *, scale: str, **options) -> oracle.Matrix:
    """`oracle.random` with scales of `SCALES`, or of `LEVELS`."""
    dtype = (SCALES | LEVELS)[scale]
    matrix = oracle.random(seed, k, n, dtype=dtype, **options)
    if scale not in LEVELS:
        return matrix
    if scale != "nested":
        local = jnp.asarray(matrix.scale, jnp.float8_e4m3fn).astype(jnp.float16)
        whole, divides = jnp.float32(0.37), scale == "over global"
        levels = tensor.WithGlobal(local=local, whole=whole, divides=divides)
        return _in_levels(matrix, {"scale": levels})
    nested = {"scale": _nested(seed, matrix.scale, -8)}
    if matrix.zero is not None and matrix.zero.dtype.kind == "f":
        # Minima are taken off; zeros that belong to codes are not.
        minima = matrix.affine != "ZERO"
        nested["zero"] = _nested(seed, matrix.zero, 0, negative=minima)
    return _in_levels(matrix, nested)


def _in_levels(matrix: oracle.Matrix, levels: Mapping[str, tensor.Levels]):
    plain = {name: np.asarray(one.decode()) for name, one in levels.items()}
    fields = {f.name: getattr(matrix, f.name) for f in dataclasses.fields(matrix)}
    return InTwoLevels(**fields | plain, levels=levels)


def _nested(seed: int, like: np.ndarray, least: int, *, negative: bool = False):
    """Integers from ``least`` on, and steps with which they are as large as others."""
    groups, n = like.shape
    rng = np.random.default_rng(seed)
    ratio = next(r for r in (4, 2, groups) if groups % r == 0)
    step = np.abs(like).max() * rng.uniform(0.2, 1, (groups // ratio, n)) / 64
    return tensor.Nested(
        factor=jnp.asarray(rng.integers(least, 64, like.shape), jnp.int8),
        step=jnp.asarray(step, jnp.float16),
        negative=negative,
    )


def in_tiles(matrix: oracle.Matrix):
    """The matrix as a `QTensor` in `Tiles`."""
    ends = np.cumsum([part.rows for part in matrix.parts])[:-1]
    layout = Tiles(nibbles=matrix.affine == "CODEBOOK")
    words, segments = [], []
    for part, codes in zip(matrix.parts, np.split(matrix.codes, ends), strict=True):
        words.append(layout.pack(jnp.asarray(codes), part.bits))
        k, n = layout.extents(words[-1].shape, part.bits)
        segment = tensor.Segment(part.bits, part.group_size, k - part.rows)
        segments.append(segment)
    leaves = {
        name: None if (leaf := getattr(matrix, name)) is None else jnp.asarray(leaf)
        for name in ("scale", "zero", "order", "input_scale", "codebook")
    }
    if isinstance(matrix, InTwoLevels):
        leaves |= matrix.levels
    return tensor.build(
        words=tuple(words),
        layout=layout,
        segments=tuple(segments),
        affine=tensor.Affine[matrix.affine],
        padding=n - matrix.codes.shape[1],
        **leaves,
    )


def rows(m: int, k: int, seed: int = 1):
    """bfloat16 values, as float32."""
    x = np.random.default_rng(seed).standard_normal((m, k))
    return x.astype(BF16).astype(F32)
