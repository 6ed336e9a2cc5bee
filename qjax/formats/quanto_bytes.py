"""optimum-quanto's weights of eight bits: bytes, and a scale for each output.

``weight._data[n, k]`` is one signed byte a code ("qint8"), of which the code of qjax is
128 more, or an E4M3 float ("qfloat8", which quanto calls "qfloat8_e4m3fn" in full);
``weight._scale`` is ``[n, 1]``, and one number where n is 1. The weight is their
product, rounded once to the dtype of the scale.

Source: huggingface/optimum-quanto, optimum/quanto/tensor/qbytes.py and
optimum/quanto/tensor/weights/qbytes.py, release 0.2.7.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import tensor
from qjax.formats import fp8, torchao
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_finite,
    check_shapes_among,
    check_tensors,
    lacks_input_order,
    lacks_own_columns,
    lacks_plain_groups,
)
from qjax.formats.gathering import of_whole
from qjax.formats.quanto_config import FLOAT8
from qjax.tensor import Affine, QTensor, Segment

DATA, SCALE = "weight._data", "weight._scale"


def check(
    tensors: Mapping[str, Any], weights: str, others: Mapping[str, Expected]
) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name.
      weights: "qint8" or "qfloat8_e4m3fn".
      others: What there may be beside codes and scales.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    dtype = fp8.E4M3 if weights == FLOAT8 else jnp.int8
    expected = {DATA: Expected((dtype,), 2), SCALE: Expected(FLOATS, None), **others}
    check_tensors(tensors, expected, weights)
    shape = n, k = tuple(tensors[DATA].shape)
    if not n or not k:
        raise ValueError(f"{DATA}.shape={shape} must be [n, k], not empty.")
    allowed = [(n, 1)] + ([()] if n == 1 else [])
    check_shapes_among(tensors, {SCALE: allowed}, f"{DATA}.shape={shape}")


def from_tensors(tensors: Mapping[str, Any], weights: str) -> QTensor:
    """Reads one quantized matrix, which was checked.

    Args:
      tensors: Concrete arrays by upstream name.
      weights: As in `check`.

    Returns:
      ``[k, n]`` tensor in the file's layout.

    Raises:
      ValueError: If a scale is not finite, or a float not a number.
    """
    check_finite(tensors, [SCALE])
    is_float, data = weights == FLOAT8, tensors[DATA]
    return tensor.build(
        (jnp.asarray(fp8.patterns_of(DATA, data) if is_float else data),),
        jnp.asarray(np.asarray(tensors[SCALE]).reshape(1, -1)),
        layout=fp8.Bytes() if is_float else torchao.Bytes(),
        segments=(Segment(8, None),),
        affine=Affine.FLOAT if is_float else Affine.CENTERED,
    )


def lacks(qt: QTensor) -> str | None:
    """Why a matrix of eight bits is none of quanto's, if so."""
    symmetric = qt.affine is Affine.CENTERED and qt.zero is None
    reason = lacks_plain_groups(qt, (8,)) or lacks_input_order(qt)
    if not (symmetric or qt.affine is Affine.FLOAT):
        reason = reason or f"{qt.affine.value} is not symmetric, as its 8 bits are"
    if (groups := qt.scale.shape[-2]) != 1:
        reason = reason or f"a column has {groups} scales; of 8 bits it holds one"
    if qt.scale.dtype != qt.dtype:
        reason = reason or (
            f"its scales are {qt.scale.dtype} and its weight is {qt.dtype}; both have "
            "one dtype there"
        )
    return reason or lacks_own_columns(qt)


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes codes and scales of a matrix in which nothing `lacks`."""
    if qt.affine is Affine.FLOAT:
        data = fp8.Bytes().pack(tensor.codes(qt), 8)
        data = lax.bitcast_convert_type(data, fp8.E4M3)
    else:
        data = torchao.Bytes().pack(tensor.codes(qt), 8)
    scale = tensor.plain(qt.scale).T
    return {DATA: data, SCALE: scale.reshape(()) if qt.n == 1 else scale}
