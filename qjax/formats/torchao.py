"""torchao: weights in integers and small floats, as its safetensors files hold them.

The header of a file says of each weight which class of torchao's it is
(`qjax.formats.torchao_header`). Of an Int8Tensor and an IntxUnpackedToInt8Tensor,
``_weight_qdata[n, k]`` is one signed byte a code of torch's ``[N, K]`` weight, whatever
the width (`torchao_bytes`); codes of fewer bits are sign-extended.
``_weight_scale`` and ``_weight_zero_point`` are ``[N, K / group]``. The weight is
``(q8 - zero_point) * scale`` of the signed values, rounded once to the dtype that the
header names; qjax adds ``2^(bits-1)`` to both, and keeps no zero where all zero points
are 0.

An Int4Tensor ("plain") has two signed codes a byte,

    bit 7                              bit 0
    | q4[n, 2i + 1]     | q4[n, 2i]     |

and ``_weight_scale`` and a float ``_weight_zero_point`` are ``[K / group, N]``. The
weight is ``q4 * scale + zero_point``, here rounded once; torchao has it in products of
CUDA's kernels alone. Its int4 tensors for tensor cores, with
``_weight_scale_and_zero``, are those of `qjax.formats.tinygemm`; small floats are in
`qjax.formats.torchao_floats`.

``_weight_act_pre_scale``, of AWQ and SmoothQuant, multiplies the inputs: the
``input_scale`` of a tensor. Inputs themselves stay floats, and what would quantize them
is read over. How torchao finds scales and codes is in `qjax.formats.torchao_affine`.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_support.py,
torchao/quantization/quantize_/workflows/int8/int8_tensor.py,
workflows/intx/intx_unpacked_to_int8_tensor.py, workflows/int4/int4_tensor.py and
int4_tile_packed_to_4d_tensor.py, release 0.18.0; pytorch/FBGEMM,
fbgemm_gpu/experimental/gen_ai/gen_ai/quantize.py, release 1.4.2, for how the codes of
an Int4Tensor are found and packed.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import decode, tensor
from qjax.bits import block
from qjax.formats import tinygemm, torchao_floats
from qjax.formats import torchao_header as header
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_finite,
    check_positive,
    check_shapes,
    check_shapes_among,
    check_tensors,
    lacks_input_order,
    lacks_integer_zeros,
    lacks_own_columns,
    lacks_plain_groups,
    lacks_plain_scales,
    lacks_whole_groups,
)
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.formats.gathering import of_whole
from qjax.formats.torchao_bytes import Bytes, signed
from qjax.formats.torchao_config import Config
from qjax.formats.torchao_floats import QDATA, SCALE
from qjax.tensor import Affine, QTensor, Segment

__all__ = ["TENSORS", "Bytes", "Config", "check", "config_of", "from_tensors"]
__all__ += ["metadata", "to_tensors"]

ZERO = "_weight_zero_point"
_FACTORS = "_weight_act_pre_scale"
_OF_INPUTS = ("_weight_act_quant_scale", "_weight_act_quant_zero_point")
# The last are of stacks of experts; they are named so that they are refused.
TENSORS = (
    QDATA,
    SCALE,
    ZERO,
    "_weight_scale_and_zero",
    torchao_floats.WHOLE,
    torchao_floats.OF_INPUTS,
    _FACTORS,
    *_OF_INPUTS,
    "_gate_up_proj_qdata",
    "_down_proj_qdata",
)
_FLOATS = (header.FLOAT8, header.MX, header.NVFP4)
_BYTES = {
    QDATA: Expected((jnp.int8,), 2),
    SCALE: Expected(FLOATS, 2),
    ZERO: Expected((jnp.int8,), 2, optional=True),
    **{name: Expected((*FLOATS, jnp.int8), None, optional=True) for name in _OF_INPUTS},
}
_NIBBLES = {
    QDATA: Expected((jnp.int8,), 2),
    SCALE: Expected(FLOATS, 2),
    ZERO: Expected(FLOATS, 2),
}
# Turns a pair of signed codes into those less than 16, or back.
_SIGNS = 0x88


def check(tensors: Mapping[str, Any], config: Config | tinygemm.Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name. Of
        integers a byte each, ``_weight_qdata`` int8 ``[N, K]``, ``_weight_scale`` float
        ``[N, K / group]`` (``[1, 1]`` for one scale in all), and optionally
        ``_weight_zero_point`` int8 of the same shape. Of an Int4Tensor, int8
        ``[N, K / 2]``, and floats ``[K / group, N]``. Of others those that
        `tinygemm.check` lists, or `qjax.formats.torchao_floats` describes. Of integers
        optionally ``_weight_act_pre_scale``, float ``[K]``.
      config: The module's configuration, where the header has to tell more what
        `Config.with_header` made of it.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    header.check_names(tensors, config.names)
    if isinstance(config, Config) and config.kind in _FLOATS:
        torchao_floats.check(tensors, config)
        return
    rest = {name: array for name, array in tensors.items() if name != _FACTORS}
    if isinstance(config, tinygemm.Config):
        tinygemm.check(rest, config)
        layout = tinygemm.TensorCoreTiled(config.inner_k_tiles)
        k, _ = layout.extents(tensors[QDATA].shape, 4)
        k = config.shape[1] if config.shape else k
    else:
        k = _check_integers(rest, config)
    if _FACTORS in tensors:
        factors = {_FACTORS: tensors[_FACTORS]}
        check_tensors(factors, {_FACTORS: Expected(FLOATS, None)}, "torchao")
        check_shapes_among(factors, {_FACTORS: [(k,), (1, k)]}, f"K={k}")


def _check_integers(tensors: Mapping[str, Any], config: Config) -> int:
    """Does the work of `check`, and returns K."""
    block(config.bits)  # refuses other widths
    if config.group_size is not None:
        check_positive("group_size", config.group_size)
    plain = config.kind == header.INT4
    check_tensors(tensors, _NIBBLES if plain else _BYTES, f"torchao's {config.kind}")
    shape = tuple(tensors[QDATA].shape)
    n, k = shape[0], shape[1] * (2 if plain else 1)
    if not n or not k:
        raise ValueError(f"{QDATA}.shape={shape} must be [N, K], not empty.")
    if config.shape not in (None, (n, k)):
        raise ValueError(
            f"{QDATA}.shape={shape} must be half of shape={list(config.shape or ())}, "
            "from the safetensors header: two codes a byte."
        )
    rows, size = _blocks(config, n, k)
    if k % size:
        raise ValueError(
            f"{QDATA}.shape={shape}: K must be a multiple of group_size={size}."
        )
    if rows > 1 and (plain or (rows, size) != (n, k)):
        raise ValueError(
            f"block_size={[rows, size]} must have one output, or all of the tensor, "
            f"{[n, k]}, in {config.kind}."
        )
    wanted = (k // size, n) if plain else (n // rows, k // size)
    source = f"{QDATA}.shape={shape} and groups of {size}"
    check_shapes(tensors, dict.fromkeys((SCALE, ZERO), wanted), source)
    return k


def _blocks(config: Config, n: int, k: int) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    if config.block is not None:
        return config.block
    return (n, k) if config.per_tensor else (1, config.group_size or k)


def from_tensors(
    tensors: Mapping[str, Any], config: Config | tinygemm.Config
) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; of integers a byte each, uint8 zeros, none
      where all are 0.

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
    check(tensors, config)
    if isinstance(config, Config) and config.kind in _FLOATS:
        return torchao_floats.from_tensors(tensors, config)
    rest = {name: array for name, array in tensors.items() if name != _FACTORS}
    if isinstance(config, tinygemm.Config):
        qt = tinygemm.from_tensors(rest, config)
    elif config.kind == header.INT4:
        qt = _from_nibbles(rest, config)
    else:
        qt = _from_bytes(rest, config)
    if _FACTORS not in tensors:
        return qt
    check_finite(tensors, [_FACTORS])
    factors = jnp.asarray(tensors[_FACTORS]).reshape(-1)
    return dataclasses.replace(qt, input_scale=factors)


def _from_bytes(tensors: Mapping[str, Any], config: Config) -> QTensor:
    check_finite(tensors, [SCALE])
    middle = 2 ** (config.bits - 1)
    for name in (QDATA, ZERO):
        values = np.asarray(tensors.get(name, np.int8(0)))
        low, high = int(values.min()), int(values.max())
        if low < -middle or high >= middle:
            raise ValueError(
                f"{name} from {low} to {high} must lie in {-middle} to {middle - 1}, "
                f"the range of {config.bits} bits."
            )
    points, zero = np.asarray(tensors.get(ZERO, np.int8(0))), None
    if points.any():
        zero = jnp.asarray((points.T.astype(np.int16) + middle).astype(np.uint8))
    n, k = tensors[QDATA].shape
    _, size = _blocks(config, n, k)
    scale = jnp.asarray(np.asarray(tensors[SCALE]).T)
    dtype = config.weight_dtype
    return tensor.build(
        (jnp.asarray(tensors[QDATA]),),
        scale,
        zero,
        layout=Bytes(),
        segments=(Segment(config.bits, None if size == k else size),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
        weight_dtype=None if dtype == scale.dtype.name else dtype,
    )


def _from_nibbles(tensors: Mapping[str, Any], config: Config) -> QTensor:
    check_finite(tensors, [SCALE, ZERO])
    words = np.asarray(tensors[QDATA]).view(np.uint8) ^ np.uint8(_SIGNS)
    n, k = words.shape[0], 2 * words.shape[1]
    return tensor.build(
        (jnp.asarray(words),),
        jnp.asarray(tensors[SCALE]),
        jnp.asarray(tensors[ZERO]),
        layout=Nibbles(),
        segments=(Segment(4, _blocks(config, n, k)[1]),),
        affine=Affine.CENTERED,
    )


def config_of(qt: QTensor) -> Config:
    """Returns the configuration whose files hold a matrix, which may be abstract.

    Symmetric codes of 8 bits are an Int8Tensor, other codes with integer zeros or none
    an IntxUnpackedToInt8Tensor, and codes of 4 bits with float zeros an Int4Tensor, or
    where they lie in tiles an Int4TilePackedTo4dTensor.

    Raises:
      ValueError: If there is none, with the reason.
    """
    if qt.affine is Affine.FLOAT:
        return torchao_floats.config_of(qt)
    base = dataclasses.replace(qt, input_scale=None)
    zero = tensor.plain(qt.zero)
    is_plain = qt.affine is Affine.CENTERED and zero is not None
    reason = lacks_plain_groups(base, (4,) if is_plain else range(1, 9))
    reason = reason or lacks_input_order(base) or lacks_whole_groups(base)
    if reason is None and is_plain:
        reason = lacks_own_columns(base)
        if reason is None and zero is not None and zero.dtype != qt.dtype:
            reason = "scales and zeros have other dtypes, or not that of the weight"
    elif reason is None:
        reason = lacks_integer_zeros(base) or lacks_plain_scales(base)
    if reason:
        raise ValueError(f"torchao cannot hold {qt!r}: {reason}.")
    bits, size = qt.segments[0].bits, qt.segments[0].group_size or qt.k
    rows = qt.n if tuple(qt.scale.shape) == (1, 1) else 1
    said: dict[str, Any] = {"bits": bits, "block": (rows, size), "per_tensor": rows > 1}
    said |= {"group_size": size if is_plain or size < qt.k else None}
    if is_plain:
        tiled = qt.layout == tinygemm.TensorCoreTiled() and qt.dtype == jnp.bfloat16
        kind = header.TILED if tiled else header.INT4
        return Config(kind=kind, shape=(qt.n, qt.k), **said)
    kind = header.INT8 if bits == 8 and qt.zero is None else header.INTX
    if kind == header.INTX and qt.input_scale is not None:
        raise ValueError(
            f"torchao cannot hold {qt!r}: it has an input_scale, which {kind} has not."
        )
    return Config(kind=kind, weight_dtype=qt.dtype.name, **said)


@of_whole
def to_tensors(qt: QTensor, *, zero_point: bool = True) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows; or of
        4 bits with float zeros; or of small floats.
      zero_point: Whether to write zero points of 0 for a symmetric matrix, as torchao
        0.16 and later do.

    Returns:
      The tensors of the class that `config_of` names.

    Raises:
      ValueError: If torchao cannot hold ``qt``, with the reason.
    """
    config = config_of(qt)
    if config.kind in _FLOATS:
        return torchao_floats.to_tensors(qt)
    base = dataclasses.replace(qt, input_scale=None)
    if config.kind == header.TILED:
        written = tinygemm.to_tensors(base, pad_k=True)
    elif config.kind == header.INT4:
        written = _write_nibbles(base)
    else:
        written = _write_bytes(base, zero_point)
    return written if qt.input_scale is None else {**written, _FACTORS: qt.input_scale}


@functools.partial(jax.jit, static_argnums=1)
def _write_bytes(qt: QTensor, zero_point: bool) -> dict[str, Array]:
    bits, scale = qt.segments[0].bits, tensor.plain(qt.scale)
    tensors = {QDATA: Bytes().pack(tensor.codes(qt), bits), SCALE: scale.T}
    if qt.zero is not None:
        tensors[ZERO] = signed(tensor.plain(qt.zero), bits)
    elif zero_point:
        tensors[ZERO] = jnp.zeros(scale.T.shape, jnp.int8)
    return tensors


@jax.jit
def _write_nibbles(qt: QTensor) -> dict[str, Any]:
    words = decode.relayout(qt, Nibbles()).words[0] ^ jnp.uint8(_SIGNS)
    packed = lax.bitcast_convert_type(words, jnp.int8)
    return {QDATA: packed, SCALE: tensor.plain(qt.scale), ZERO: tensor.plain(qt.zero)}


def metadata(matrices: Mapping[str, QTensor], others: Iterable[str]) -> dict[str, str]:
    """What the header of each file of a checkpoint says.

    Args:
      matrices: By the paths of their modules; they may be abstract.
      others: Names of all other tensors.

    Returns:
      Texts by name.

    Raises:
      ValueError: As `config_of`.
    """
    # torchao cuts every name at its last dot.
    entries: dict[str, Any] = {
        name: {"_type": "Tensor"} for name in others if "." in name
    }
    for name, qt in matrices.items():
        config = config_of(qt)
        entries[f"{name}.weight"] = header.to_json(
            config.kind,
            (qt.n, qt.k),
            config.block or (1, qt.k),
            bits=config.bits,
            weight_dtype=qt.dtype.name,
            names=list(jax.eval_shape(to_tensors, qt)),
        )
    texts = {name: json.dumps(entry) for name, entry in entries.items()}
    return {**texts, "tensor_names": json.dumps(list(entries))}
