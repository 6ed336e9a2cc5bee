"""torchao's Float8Tensor, MXTensor and NVFP4Tensor.

``_weight_qdata[n, k]`` of a Float8Tensor is float8_e4m3fn, as `qjax.formats.fp8` has
it, and ``_weight_scale[i, j]`` the float32 scale of a block of outputs and inputs: of a
row, of a group in a row, of 128 x 128, or of all. That of an MXTensor is the same, or
two E2M1 floats a byte, the first in the low nibble, with an E8M0 exponent for 32
inputs; that of an NVFP4Tensor is such a byte, with an E4M3 scale for 16 inputs and one
float32 ``_weight_per_tensor_scale`` for all, which may be missing.

Scales of the last two mostly lie as NVIDIA's tensor cores read them ("swizzled"). With
rows filled up by zeros to 128 and columns to 4, the scale of row ``128 a + 32 b + c``
and column ``4 d + e`` is element ``[a, d, c, b, e]`` of an array, whatever axes the
file gives that.

The weight is ``float(q) * scale`` in float32, rounded once to the dtype that the header
names.

Source: pytorch/ao, torchao/quantization/quantize_/workflows/float8/float8_tensor.py,
torchao/prototype/mx_formats/mx_tensor.py, nvfp4_tensor.py and utils.py, release 0.18.0.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import decode, tensor
from qjax.formats import fp8
from qjax.formats import torchao_header as header
from qjax.formats.block_scale import BlockScale
from qjax.formats.checks import (
    Expected,
    check_finite,
    check_shapes,
    check_shapes_among,
    check_tensors,
    lacks_input_order,
    lacks_plain_groups,
)
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.formats.gathering import of_whole
from qjax.formats.modelopt import TimesGlobal
from qjax.formats.mxfp4 import E8M0
from qjax.formats.torchao_config import Config
from qjax.tensor import Affine, Encoded, QTensor, Segment

QDATA, SCALE = "_weight_qdata", "_weight_scale"
WHOLE, OF_INPUTS = "_weight_per_tensor_scale", "_weight_act_per_tensor_scale"
# Rows and columns of a tile of swizzled scales.
_TILE = (128, 4)
_MX_SIZE, _NVFP4_SIZE = 32, 16


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: As `torchao.check`.
      config: The module's configuration, with what the header says.

    Raises:
      ValueError: As `torchao.check`.
    """
    e8m0, is_packed = jnp.float8_e8m0fnu, config.bits == 4
    scales = {header.FLOAT8: jnp.float32, header.MX: e8m0, header.NVFP4: fp8.E4M3}
    expected = {
        QDATA: Expected((jnp.uint8 if is_packed else fp8.E4M3,), 2),
        SCALE: Expected((scales[config.kind],), 2),
    }
    if config.kind == header.NVFP4:
        expected |= dict.fromkeys(
            (WHOLE, OF_INPUTS), Expected((jnp.float32,), None, optional=True)
        )
    check_tensors(tensors, expected, config.kind)
    n, k = shape = tuple(tensors[QDATA].shape)
    k *= 2 if is_packed else 1
    rows, columns = config.block or (1, k)
    if not n or not k or n % rows or k % columns:
        raise ValueError(
            f"{QDATA}.shape={shape} must be whole blocks of {rows} outputs and "
            f"{columns} inputs, from block_size in the safetensors header."
        )
    wanted = n // rows, k // columns
    source = f"{QDATA}.shape={shape} and block_size={[rows, columns]}"
    if config.swizzled:
        source, wanted = f"{source}, swizzled", _swizzled_shape(*wanted)
    check_shapes(tensors, {SCALE: wanted}, source)
    numbers: dict[str, list[tuple[int, ...]]] = {
        name: [(), (1,), (1, 1)] for name in (WHOLE, OF_INPUTS)
    }
    check_shapes_among(tensors, numbers, "the tensor's one number")


def _swizzled_shape(n: int, groups: int) -> tuple[int, int]:
    rows, columns = _TILE
    return -(-n // rows) * (rows // 4), -(-groups // columns) * (columns * 4)


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: As `check`, concrete.
      config: As `check`.

    Returns:
      ``[k, n]`` tensor in the file's layout.

    Raises:
      ValueError: As `check`; or if a weight is not a number, or a scale not finite.
    """
    check(tensors, config)
    scale = np.asarray(tensors[SCALE])
    if config.bits == 8:
        words, layout = fp8.patterns_of(QDATA, tensors[QDATA]), fp8.Bytes()
        n, k = words.shape
    else:
        words, layout = np.asarray(tensors[QDATA]), Nibbles()
        n, k = words.shape[0], 2 * words.shape[1]
    rows, size = config.block or (1, k)
    if config.swizzled:
        scale = _unswizzled(scale, n // rows, k // size)
    if config.kind == header.FLOAT8:
        parameter = _float32(scale, n, (rows, size))
    elif config.kind == header.MX:
        exponents = fp8.exponents_of(SCALE, np.ascontiguousarray(scale))
        parameter = E8M0(exponent=jnp.asarray(exponents.T))
    else:
        parameter = _in_two_levels(scale, tensors.get(WHOLE, np.float32(1)))
    whole_rows = config.kind == header.FLOAT8 and size == k
    return tensor.build(
        (jnp.asarray(words),),
        parameter,
        layout=layout,
        segments=(Segment(config.bits, None if whole_rows else size),),
        affine=Affine.FLOAT,
        weight_dtype=config.weight_dtype,
    )


def _float32(scale: np.ndarray, n: int, block: tuple[int, int]) -> Array | Encoded:
    check_finite({SCALE: scale})
    turned = jnp.asarray(scale.T)
    if block[0] in (1, n):
        return turned
    return BlockScale.of(turned, n=n, size=block)


def _in_two_levels(scale: np.ndarray, whole: Any) -> TimesGlobal:
    whole = np.asarray(whole).reshape(())
    local = fp8.patterns_of(SCALE, np.ascontiguousarray(scale)).T
    largest = np.abs(scale.astype(np.float32)).max()
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(whole) or not np.isfinite(largest * whole):
            raise ValueError(
                f"{WHOLE}={whole} must be finite, and so must scales up to {largest} "
                "times it."
            )
    return TimesGlobal(local=jnp.asarray(local), whole=jnp.asarray(whole))


def _unswizzled(scale: np.ndarray, n: int, groups: int) -> np.ndarray:
    rows, columns = _TILE
    parts = scale.reshape(-(-n // rows), -(-groups // columns), rows // 4, 4, columns)
    turned = parts.transpose(0, 3, 2, 1, 4)
    return turned.reshape(parts.shape[0] * rows, -1)[:n, :groups]


def _swizzle(scale: Array) -> Array:
    """Inverse of `_unswizzled`, with zeros where there are no scales."""
    (n, groups), (rows, columns) = scale.shape, _TILE
    padded = jnp.pad(scale, ((0, -n % rows), (0, -groups % columns)))
    parts = padded.reshape(-1, 4, rows // 4, padded.shape[1] // columns, columns)
    return parts.transpose(0, 3, 2, 1, 4).reshape(_swizzled_shape(n, groups))


def config_of(qt: QTensor) -> Config:
    """Returns the configuration whose files hold a matrix, which may be abstract.

    Raises:
      ValueError: If there is none, with the reason.
    """
    bits, size = qt.segments[0].bits, qt.segments[0].group_size
    reason = lacks_plain_groups(qt, (4, 8)) or lacks_input_order(qt)
    said, scale, block = {"bits": bits, "weight_dtype": qt.dtype.name}, qt.scale, None
    if reason is None and isinstance(scale, E8M0) and size == _MX_SIZE:
        if qt.dtype == jnp.float16:
            reason = "MXTensor has no weights in float16"
        said |= {"kind": header.MX, "swizzled": True}
        block = (1, size)
    elif reason is None and bits == 8:
        block = _block_of(qt)
        said |= {"kind": header.FLOAT8}
        if block not in ((qt.n, qt.k), (128, 128)) and block[0] > 1:
            reason = f"Float8Tensor has no blocks of {block}, but of (128, 128)"
    elif isinstance(scale, TimesGlobal) and size == _NVFP4_SIZE:
        said |= {"kind": header.NVFP4, "swizzled": True}
        block = (1, size)
    if reason is None and block is None:
        reason = (
            f"floats of {bits} bits in groups of {size} do not have the scales of its "
            "files; those of its own and of ModelOpt do, with prepare=False"
        )
    if reason is None and block and (qt.n % block[0] or qt.k % block[1]):
        reason = f"({qt.n}, {qt.k}) is not whole blocks of {block}"
    if reason:
        raise ValueError(f"torchao cannot hold {qt!r}: {reason}.")
    size = None if size == qt.k else size
    per_tensor = block == (qt.n, qt.k) and qt.n > 1
    return Config(block=block, group_size=size, per_tensor=per_tensor, **said)


def _block_of(qt: QTensor) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    if isinstance(qt.scale, BlockScale):
        return qt.scale.rows, qt.scale.columns
    rows = 1 if qt.scale.shape[-1] == qt.n else qt.n // qt.scale.shape[-1]
    return rows, qt.segments[0].group_size or qt.k


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one matrix of small floats under the upstream's names.

    Args:
      qt: A matrix. MX formats and NVFP4 must still have the scales of their files.

    Returns:
      ``_weight_qdata``, ``_weight_scale``, of the last two swizzled, and of NVFP4
      ``_weight_per_tensor_scale``.

    Raises:
      ValueError: As `config_of`.
    """
    config, scale = config_of(qt), qt.scale
    if config.bits == 8:
        codes = fp8.Bytes().pack(tensor.codes(qt), 8)
        words = lax.bitcast_convert_type(codes, fp8.E4M3)
    else:
        words = decode.relayout(qt, Nibbles()).words[0]
    if isinstance(scale, E8M0) and config.kind == header.MX:
        swizzled = _swizzle(scale.exponent.T)
        stored = lax.bitcast_convert_type(swizzled, jnp.float8_e8m0fnu)
        return {QDATA: words, SCALE: stored}
    if isinstance(scale, TimesGlobal):
        stored = lax.bitcast_convert_type(_swizzle(scale.local.T), fp8.E4M3)
        return {QDATA: words, SCALE: stored, WHOLE: scale.whole}
    plain = scale.plain if isinstance(scale, BlockScale) else tensor.plain(scale)
    return {QDATA: words, SCALE: plain.astype(jnp.float32).T}
