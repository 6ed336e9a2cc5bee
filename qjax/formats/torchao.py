"""torchao: int8, intx and tiled int4 weights, as its safetensors files hold them.

``_weight_qdata[n, k]`` is one signed byte a code of torch's ``[N, K]`` weight, whatever
the width; codes of fewer bits are sign-extended:

    bit 7                bit 0
    | q - 2^(bits-1), int8 |

``_weight_scale`` and ``_weight_zero_point`` are ``[N, K / group]``. The weight is
``(q8 - zero_point) * scale`` of the signed values, rounded once; qjax adds
``2^(bits-1)`` to both, and keeps no zero where all zero points are 0. A float32 scale
stands beside a bfloat16 weight: ``qjax.dequantize(qt, jnp.bfloat16)`` is then what
torchao computes.

Its int4 tensors for CUDA, ``_weight_qdata`` with ``_weight_scale_and_zero``, are those
of `qjax.formats.tinygemm`; only the header of the file has their shape before padding.
How torchao finds all of these values is in `qjax.formats.torchao_affine`.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_support.py,
torchao/quantization/quantize_/workflows/int8/int8_tensor.py,
workflows/intx/intx_unpacked_to_int8_tensor.py and
workflows/int4/int4_tile_packed_to_4d_tensor.py, release 0.18.0.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Integer, Shaped, UInt8

from qjax import tensor
from qjax.bits import block, transpose_codes
from qjax.formats import tinygemm
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_codes,
    check_finite,
    check_positive,
    check_shapes,
    check_tensors,
    check_words,
    lacks_input_order,
    lacks_integer_zeros,
    lacks_plain_groups,
    lacks_plain_scales,
    lacks_whole_groups,
)
from qjax.formats.torchao_config import Config
from qjax.tensor import Affine, QTensor, Segment

__all__ = ["TENSORS", "Bytes", "Config", "check", "from_tensors", "to_tensors"]

# The last three change the activations too; they are named so that they are refused.
TENSORS = (
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "_weight_scale_and_zero",
    "_weight_act_pre_scale",
    "_weight_act_quant_scale",
    "_weight_act_quant_zero_point",
)
_EXPECTED = {
    "_weight_qdata": Expected((jnp.int8,), 2),
    "_weight_scale": Expected(FLOATS, 2),
    "_weight_zero_point": Expected((jnp.int8,), 2, optional=True),
}


@dataclasses.dataclass(frozen=True)
class Bytes(tensor.Layout):
    """One signed byte a code, in torch's orientation: words int8 ``[n, k]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Int8[Array, "n k"]:
        """Packs ``[k, n]`` codes of 1 to 8 bits."""
        block(bits)  # refuses other widths
        check_codes(codes)
        return _signed(codes, bits)

    def unpack(self, words: Shaped[Array, "n k"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks int8 bytes; a byte out of the range of ``bits`` wraps around."""
        block(bits)  # refuses other widths
        check_words(words, 2, jnp.int8)
        return _unsigned(words, bits)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, n)``."""
        del bits
        return shape[1], shape[0]


@functools.partial(jax.jit, static_argnums=1)
def _signed(codes: Array, bits: int) -> Array:
    """Codes, cut to ``bits``, as int8 values around 0, transposed."""
    fields = transpose_codes(codes) & jnp.uint8(2**bits - 1)
    return lax.bitcast_convert_type(fields - jnp.uint8(2 ** (bits - 1)), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _unsigned(words: Array, bits: int) -> Array:
    """Inverse of `_signed`."""
    fields = lax.bitcast_convert_type(words, jnp.uint8) + jnp.uint8(2 ** (bits - 1))
    return transpose_codes(fields & jnp.uint8(2**bits - 1))


def check(tensors: Mapping[str, Any], config: Config | tinygemm.Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``_weight_qdata`` int8 ``[N, K]``, ``_weight_scale`` float ``[N, K / group]``
        (``[1, 1]`` for one scale in all), and optionally ``_weight_zero_point`` int8 of
        the same shape. Of int4 weights those that `tinygemm.check` lists.
      config: The module's configuration; of int4 weights what `Config.with_header` made
        of it.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    if isinstance(config, tinygemm.Config):
        tinygemm.check(tensors, config)
        return
    block(config.bits)  # refuses other widths
    if config.group_size is not None:
        check_positive("group_size", config.group_size)
    # Tensors of activations ("_weight_act_...") have no place here.
    check_tensors(tensors, _EXPECTED, "torchao's weight-only matrices")
    shape = tuple(tensors["_weight_qdata"].shape)
    if not shape[0] or not shape[1]:
        raise ValueError(f"_weight_qdata.shape={shape} must be [N, K], not empty.")
    n, k = shape
    size = config.group_size or k
    if k % size:
        raise ValueError(
            f"_weight_qdata.shape={shape}: K must be a multiple of group_size={size}."
        )
    wanted = (1, 1) if config.per_tensor else (n, k // size)
    source = f"_weight_qdata.shape={shape} and group_size={config.group_size}"
    names = ("_weight_scale", "_weight_zero_point")
    check_shapes(tensors, dict.fromkeys(names, wanted), source)


def from_tensors(
    tensors: Mapping[str, Any], config: Config | tinygemm.Config
) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; uint8 zeros, none where all are 0.

    Raises:
      ValueError: As `check`; or if a scale is not finite, or a code or zero point does
        not fit the width.

    Example:
      >>> qdata = np.array([[-128, 0, 127]], np.int8)
      >>> scale = np.array([[0.5]], np.float32)
      >>> qt = from_tensors({"_weight_qdata": qdata, "_weight_scale": scale}, Config())
      >>> qjax.dequantize(qt)[:, 0]
      Array([-64. ,   0. ,  63.5], dtype=float32)
    """
    if isinstance(config, tinygemm.Config):
        return tinygemm.from_tensors(tensors, config)
    check(tensors, config)
    check_finite(tensors, ["_weight_scale"])
    middle = 2 ** (config.bits - 1)
    for name in ("_weight_qdata", "_weight_zero_point"):
        values = np.asarray(tensors.get(name, np.int8(0)))
        low, high = int(values.min()), int(values.max())
        if low < -middle or high >= middle:
            raise ValueError(
                f"{name} from {low} to {high} must lie in {-middle} to {middle - 1}, "
                f"the range of {config.bits} bits."
            )
    points, zero = np.asarray(tensors.get("_weight_zero_point", np.int8(0))), None
    if points.any():
        zero = jnp.asarray((points.T.astype(np.int16) + middle).astype(np.uint8))
    return tensor.build(
        (jnp.asarray(tensors["_weight_qdata"]),),
        jnp.asarray(np.asarray(tensors["_weight_scale"]).T),
        zero,
        layout=Bytes(),
        segments=(Segment(config.bits, config.group_size),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
    )


def to_tensors(qt: QTensor, *, zero_point: bool = True) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows.
      zero_point: Whether to write zero points of 0 for a symmetric matrix, as torchao
        0.16 and later do.

    Returns:
      ``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``.

    Raises:
      ValueError: If torchao cannot hold ``qt``, with the reason.
    """
    _check_holdable(qt)
    return _write(qt, zero_point)


@functools.partial(jax.jit, static_argnums=1)
def _write(qt: QTensor, zero_point: bool) -> dict[str, Array]:
    bits, scale = qt.segments[0].bits, tensor.plain(qt.scale)
    tensors = {
        "_weight_qdata": Bytes().pack(tensor.codes(qt), bits),
        "_weight_scale": scale.T,
    }
    if qt.zero is not None:
        tensors["_weight_zero_point"] = _signed(tensor.plain(qt.zero), bits)
    elif zero_point:
        tensors["_weight_zero_point"] = jnp.zeros(scale.T.shape, jnp.int8)
    return tensors


def _check_holdable(qt: QTensor) -> None:
    reason = (
        lacks_plain_groups(qt, range(1, 9))
        or lacks_input_order(qt)
        or lacks_integer_zeros(qt)
        or lacks_whole_groups(qt)
        or lacks_plain_scales(qt)
    )
    if reason:
        raise ValueError(f"torchao cannot hold {qt!r}: {reason}.")
