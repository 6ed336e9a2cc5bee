"""What tests run on: codes, matrices of the oracle in `Tiles`, and rows."""

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


def random_codes(seed: int, bits: int, *shape: int) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape)
    return codes.astype(np.uint8)


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
