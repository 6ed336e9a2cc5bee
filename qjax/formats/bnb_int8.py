"""LLM.int8() of bitsandbytes: signed bytes, and the largest magnitude of each output.

``weight[n, k]`` of torch's orientation is one signed byte a code, of which the code of
qjax is 128 more, and ``SCB[n]`` the largest magnitude of the row of each output, which
the codes 127 and -127 stand for:

    bit 7         bit 0
    | q - 128, int8 |

``weight_format`` says in which order the bytes lie; 0, the only one that is written
today, is that of rows. The dense weight, ``int8_vectorwise_dequant``, is
``weight * SCB`` rounded to float32, times 1 / 127 rounded to float32. Where the
original multiplies by a dense weight, in training on a CPU, it rounds ``SCB / 127``
first: those are the scales of a tensor that `qjax.prepare` has seen. The dtype that the
weight had is not in the file.

Elsewhere LLM.int8() rounds activations, too, to 8 bits a row, but for the columns in
which one is as large as ``llm_int8_threshold``: those it multiplies in 16 bits. qjax
multiplies all of them as they are; ``implementation="xla_int8"`` of `qjax.matmul`
rounds all.

Source: bitsandbytes-foundation/bitsandbytes, bitsandbytes/nn/modules.py (``Int8Params``
and ``Linear8bitLt``), bitsandbytes/_ops.py, bitsandbytes/autograd/_functions.py and
bitsandbytes/backends/default/ops.py, release 0.50.2.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax import tensor
from qjax.formats import torchao
from qjax.formats.checks import (
    Expected,
    check_finite,
    check_shapes,
    check_tensors,
    check_weight,
    is_known,
    lacks_input_order,
    lacks_own_columns,
    lacks_plain_groups,
)
from qjax.formats.gathering import of_whole
from qjax.tensor import Affine, InSteps, QTensor, Segment

# In how many steps of a code a magnitude is divided, and one of them.
STEPS = 127
_STEP = 1 / STEPS
# What weight_format may be, and what it stood for in old releases.
_FORMATS = ("row", "col32", "col_turing", "col_ampere")
TENSORS = ("weight", "SCB", "weight_format")


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Maxima(InSteps):
    """The scales of a file: magnitudes, of which each is 127 steps.

    Attributes:
      absmax: float32 ``[*batch, 1, n]``.

    Example:
      >>> Maxima(absmax=jnp.array([[127.0, 1.0]])).decode().tolist()
      [[1.0, 0.007874015718698502]]
    """

    absmax: Array

    last: typing.ClassVar[float] = _STEP

    @property
    def first(self) -> Float32[Array, "*batch 1 n"]:
        """The magnitudes."""
        return self.absmax


def check(tensors: Mapping[str, Any]) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` int8 ``[n, k]``, ``SCB`` float32 ``[n]``, and optionally
        ``weight_format`` uint8 ``[]``.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    expected = {
        "weight": Expected((jnp.int8,), 2),
        "SCB": Expected((jnp.float32,), 1),
        "weight_format": Expected((jnp.uint8,), 0, optional=True),
    }
    check_tensors(tensors, expected, "LLM.int8()")
    shape = tuple(tensors["weight"].shape)
    if not shape[0] or not shape[1]:
        raise ValueError(f"weight.shape={shape} must be [n, k], not empty.")
    check_shapes(tensors, {"SCB": shape[:1]}, f"weight.shape={shape}")


def from_tensors(tensors: Mapping[str, Any]) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.

    Returns:
      ``[k, n]`` tensor of float32 in the file's layout, its scale a `Maxima`.

    Raises:
      ValueError: As `check`; or if a magnitude is negative or not finite, or the bytes
        lie in another order than that of rows.

    Example:
      >>> tensors = {"weight": np.array([[127, -127, 0]], np.int8)}
      >>> tensors["SCB"] = np.array([2], np.float32)
      >>> qjax.dequantize(from_tensors(tensors))[:, 0]
      Array([ 2., -2.,  0.], dtype=float32)
    """
    check(tensors)
    check_finite(tensors, ["SCB"])
    order = int(np.asarray(tensors.get("weight_format", 0)))
    if order:
        name = _FORMATS[order] if order < len(_FORMATS) else "unknown"
        raise ValueError(
            f"weight_format={order} ({name}) must be 0 (row); bitsandbytes before 0.45 "
            "can load the file and save it so."
        )
    scale = np.asarray(tensors["SCB"])
    if scale.min() < 0:
        raise ValueError(f"SCB from {scale.min()} must not be negative.")
    return _build(jnp.asarray(tensors["weight"]), jnp.asarray(scale)[None])


def _build(weight: Array, absmax: Float32[Array, "1 n"]) -> QTensor:
    return tensor.build(
        (weight,),
        Maxima(absmax=absmax),
        layout=torchao.Bytes(),
        segments=(Segment(8, None),),
        affine=Affine.CENTERED,
    )


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of symmetric 8-bit codes with a float32 scale for each column, which
        is a `Maxima`, or was one before it was prepared.

    Returns:
      ``weight``, ``SCB`` and ``weight_format``.

    Raises:
      ValueError: If LLM.int8() cannot hold ``qt``, with the reason.
    """
    reason = (
        lacks_plain_groups(qt, (8,))
        or lacks_input_order(qt)
        or lacks_own_columns(qt)
        or _lacks_maxima(qt)
    )
    if reason:
        raise ValueError(f"LLM.int8() cannot hold {qt!r}: {reason}.")
    absmax = qt.scale.absmax if isinstance(qt.scale, Maxima) else _maxima(qt.scale)
    return {
        "weight": torchao.Bytes().pack(tensor.codes(qt), 8),
        "SCB": absmax.reshape(-1),
        "weight_format": jnp.uint8(0),
    }


def _lacks_maxima(qt: QTensor) -> str | None:
    if qt.affine is not Affine.CENTERED or qt.zero is not None:
        return f"{qt.affine.value} here is not symmetric"
    if qt.scale.shape[-2] != 1:
        return f"a column has {qt.scale.shape[-2]} scales; it holds one"
    if isinstance(qt.scale, Maxima):
        return None
    if qt.scale.dtype != jnp.float32:
        return f"{qt.scale.dtype} scales; bnb_int8.quantize makes float32 ones"
    scale = tensor.plain(qt.scale)
    if is_known(scale) and not (Maxima(absmax=_maxima(scale)).decode() == scale).all():
        return "its scales are no magnitudes over 127; bnb_int8.quantize makes such"
    return None


def _maxima(scale: Float32[Array, "1 n"]) -> Float32[Array, "1 n"]:
    """Magnitudes that have these scales, if there are any.

    Of several neighbours with the same, files have the one that float16 holds.
    """
    near = scale * STEPS
    half = near.astype(jnp.float16).astype(jnp.float32)
    others = [jnp.nextafter(near, jnp.float32(end)) for end in (-jnp.inf, jnp.inf)]
    found = near
    for one in (*others, near, half):
        found = jnp.where(one * jnp.float32(_STEP) == scale, one, found)
    return found


def quantize(w: Float[Array, "*batch k n"]) -> QTensor:
    """Quantizes a weight as LLM.int8() does on a CPU, to the nearest of 255 steps.

    Args:
      w: ``[k, n]`` weight (``y = x @ w``), or a stack of them, float16, bfloat16 or
        float32. It is cast to float16 first, as upstream has it.

    Returns:
      The tensor that a file would hold.

    Raises:
      TypeError: If ``w`` is no array.
      ValueError: If it is no dense weight.

    Example:
      >>> quantize(jnp.eye(64))
      QTensor(64x64, 8 bits, group column, Bytes(), (q - 2^(bits-1)) * s + z, ...)
    """
    check_weight(w)
    return tensor.over_batch(_quantize, jnp.asarray(w))


@jax.jit
def _quantize(w: Array) -> QTensor:
    half = w.astype(jnp.float16).astype(jnp.float32)
    absmax = jnp.abs(half).max(0, keepdims=True)
    # Upstream finds 0 / 0 in a row of zeros, and stores 0.
    steps = jnp.where(absmax == 0, 0, jnp.float32(STEPS) / absmax)
    codes = jnp.round(half * steps) + 128
    # A maximum may leave out NaN.
    absmax = jnp.where(jnp.isnan(half).any(0, keepdims=True), jnp.nan, absmax)
    return _build(torchao.Bytes().pack(codes.astype(jnp.uint8), 8), absmax)
