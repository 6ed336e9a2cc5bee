"""compressed-tensors' other formats: FP8 and int8 bytes, NVFP4, MXFP4 and MXFP8.

"float-quantized", "naive-quantized" and "mxfp8-quantized" have ``weight[n, k]`` in
float8_e4m3fn, whose patterns are the codes (`qjax.formats.fp8.Bytes`);
"int-quantized", and "naive-quantized" of integers, in int8
(`qjax.formats.torchao.Bytes`). "nvfp4-pack-quantized" and "mxfp4-pack-quantized" have
``weight_packed[n, i]``, two E2M1 floats a byte, the first in the low nibble:

    bit 7               bit 0
    | q[2i + 1, n] | q[2i, n] |

``weight_scale`` is one number for a tensor, for an output, a group of inputs, or a
block of outputs and inputs: a float, of the MX formats an E8M0 exponent for 32 inputs,
and of NVFP4 a float8_e4m3fn for 16, to be divided by the one ``weight_global_scale``.
Scales of activations are read over.

The weight is ``float(q) * scale``, of integers ``(q - zero) * scale``, rounded once to
the dtype of the scale; of NVFP4, from float32 to bfloat16.

Source: vllm-project/compressed-tensors, src/compressed_tensors/compressors/
naive_quantized, nvfp4, mxfp4, mxfp8 and mx_utils.py, and
quantization/lifecycle/forward.py, release 0.20.0.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer, UInt8

from qjax import decode, tensor
from qjax.formats import fp8
from qjax.formats.block_scale import BlockScale
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_codes,
    check_finite,
    check_shapes_among,
    check_tensors,
    check_width,
    check_words,
    lacks_input_order,
    lacks_plain_groups,
)
from qjax.formats.compressed_tensors_config import Config
from qjax.formats.gathering import of_whole
from qjax.formats.mxfp4 import E8M0, pack_pairs, unpack_pairs
from qjax.formats.torchao_bytes import Bytes
from qjax.tensor import (
    Affine,
    Cut,
    Digits,
    Encoded,
    Layout,
    QTensor,
    Segment,
    StoredGlobal,
)

# What may stand beside a weight for the activations.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")
TENSORS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    *_OF_ACTIVATIONS,
)
# What those may be.
_ANY = (*FLOATS, jnp.int8, jnp.uint8, fp8.E4M3)
NVFP4, MXFP4, MXFP8 = (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)


@dataclasses.dataclass(frozen=True)
class Nibbles(Layout):
    """Two codes a byte along each row of torch's weight: words uint8 ``[n, k / 2]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "n bytes"]:
        """Packs ``[k, n]`` codes of 4 bits; k must be even."""
        check_width(bits, (4,), "compressed_tensors_floats.Nibbles")
        check_codes(codes)
        if codes.shape[0] % 2:
            raise ValueError(
                f"codes.shape[0]={codes.shape[0]} must be even; pad codes."
            )
        return pack_pairs(codes)

    def unpack(self, words: UInt8[Array, "n bytes"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks the bytes."""
        check_width(bits, (4,), "compressed_tensors_floats.Nibbles")
        check_words(words, 2, jnp.uint8)
        return unpack_pairs(words)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(2 * bytes, n)``."""
        check_width(bits, (4,), "compressed_tensors_floats.Nibbles")
        return 2 * shape[1], shape[0]

    def cut(self, bits: int) -> Cut:
        """Cuts between bytes, and between columns."""
        del bits
        return Cut(k_axis=1, rows=2, n_axis=0, columns=1)

    def digits(self, bits: int) -> Digits:
        """Permutes them."""
        del bits
        return Digits("n", fields="k0", width=8)


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OverGlobal(StoredGlobal):
    """NVFP4's scales: small floats over one number for the whole matrix.

    Example:
      >>> scale = OverGlobal(
      ...     local=jnp.array([[56, 64]], jnp.uint8), whole=jnp.float32(8)
      ... )
      >>> scale.decode()
      Array([[0.125, 0.25 ]], dtype=float32)
    """

    @property
    def divides(self) -> bool:
        """Whether the local floats are divided by the number: True."""
        return True


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` float8_e4m3fn or int8 ``[n, k]``, or ``weight_packed`` uint8
        ``[n, k / 2]``; ``weight_scale``, ``[1]``, ``[n, 1]``, ``[n, k / group]`` or
        ``[ceil(n / rows), ceil(k / columns)]`` by strategy; ``weight_global_scale``
        float32 ``[1]`` of NVFP4; ``weight_zero_point`` of asymmetric integers, int8 of
        the shape of the scale; optionally those of activations.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    is_packed = config.format in (NVFP4, MXFP4)
    codes = "weight_packed" if is_packed else "weight"
    dtype = jnp.uint8 if is_packed else fp8.E4M3 if config.is_float else jnp.int8
    scales = {NVFP4: (fp8.E4M3,), MXFP4: (jnp.uint8,), MXFP8: (jnp.uint8,)}
    expected = {
        codes: Expected((dtype,), 2),
        "weight_scale": Expected(scales.get(config.format, FLOATS), None),
        **{name: Expected(_ANY, None, optional=True) for name in _OF_ACTIVATIONS},
    }
    if config.format == NVFP4:
        expected["weight_global_scale"] = Expected((jnp.float32,), None)
    if not config.symmetric:
        expected["weight_zero_point"] = Expected((jnp.int8,), None)
    check_tensors(tensors, expected, f"{config}")
    n, k = shape = tuple(tensors[codes].shape)
    if not n or not k:
        raise ValueError(f"{codes}.shape={shape} must not be empty.")
    k *= 2 if is_packed else 1
    scales = _shapes_of_scales(n, k, config)
    allowed = {"weight_scale": scales, "weight_zero_point": scales}
    check_shapes_among(tensors, allowed, f"{codes}.shape={shape} and {config}")
    whole = tensors.get("weight_global_scale")
    if whole is not None and whole.shape not in ((), (1,)):
        raise ValueError(f"weight_global_scale.shape={whole.shape} must be (1,).")


def _shapes_of_scales(n: int, k: int, config: Config) -> list[tuple[int, ...]]:
    match config.strategy:
        case "tensor":
            return [(), (1,), (1, 1)]
        case "channel":
            return [(n, 1), (n,)]
        case "block":
            rows, columns = config.block_size or (n, k)
            return [(-(-n // rows), -(-k // columns))]
    size = config.group_size or k
    if k % size:
        raise ValueError(f"k={k} must be a multiple of group_size={size}.")
    return [(n, k // size)]


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout.

    Raises:
      ValueError: As `check`; or if a weight is not a number, or of more bits than the
        configuration says, or a scale not finite.
    """
    check(tensors, config)
    if config.format in (NVFP4, MXFP4):
        words, layout = np.asarray(tensors["weight_packed"]), Nibbles()
    elif config.is_float:
        words = fp8.patterns_of("weight", tensors["weight"])
        layout = fp8.Bytes()
    else:
        words, layout = np.asarray(tensors["weight"]), Bytes()
        _check_range("weight", words, config.bits)
    points, zero = tensors.get("weight_zero_point"), None
    if points is not None:
        _check_range("weight_zero_point", np.asarray(points), config.bits)
        points = np.asarray(points).astype(np.int16) + 2 ** (config.bits - 1)
        zero = _along_k(points.astype(np.uint8), words, config)
    size = config.group_size
    if config.block_size is not None:
        # No group is larger than the matrix: its rows are repeated as often.
        size = min(config.block_size[1], words.shape[1])
    if zero is not None:
        affine = Affine.ZERO
    else:
        affine = Affine.FLOAT if config.is_float else Affine.CENTERED
    return tensor.build(
        (jnp.asarray(words),),
        _scale(tensors, words, config),
        zero,
        layout=layout,
        segments=(Segment(config.bits, size),),
        affine=affine,
        weight_dtype="bfloat16" if config.format == NVFP4 else None,
    )


def _check_range(name: str, values: np.ndarray, bits: int) -> None:
    """Checks that int8 values have no more bits than the configuration says."""
    half = 2 ** (bits - 1)
    if values.min() < -half or values.max() >= half:
        raise ValueError(
            f"{name} from {values.min()} to {values.max()} must lie in {-half} to "
            f"{half - 1}, {bits} bits."
        )


def _along_k(values: np.ndarray, words: np.ndarray, config: Config) -> Array | Encoded:
    """What a file has of each output and group, as ``[groups, n]``."""
    if config.strategy in ("tensor", "channel"):
        values = values.reshape(-1, 1)
    turned = jnp.asarray(values.T)
    if config.block_size is None:
        return turned
    return BlockScale.of(turned, n=words.shape[0], size=config.block_size)


def _scale(
    tensors: Mapping[str, Any], words: np.ndarray, config: Config
) -> Array | Encoded:
    """The scales, as the file has them."""
    scale = np.asarray(tensors["weight_scale"])
    if config.format in (MXFP4, MXFP8):
        return E8M0(exponent=jnp.asarray(fp8.exponents_of("weight_scale", scale).T))
    if config.format != NVFP4:
        check_finite(tensors, ["weight_scale"])
        return _along_k(scale, words, config)
    whole = np.asarray(tensors["weight_global_scale"]).reshape(())
    local = fp8.patterns_of("weight_scale", scale).T
    largest = np.abs(scale.astype(np.float32)).max()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if not np.isfinite(whole) or not np.isfinite(largest / whole):
            raise ValueError(
                f"weight_global_scale={whole} must be finite, and so must scales up to "
                f"{largest} over it."
            )
    return OverGlobal(local=jnp.asarray(local), whole=jnp.asarray(whole))


def format_of(qt: QTensor) -> str:
    """Returns the format that holds a matrix of floats, which may be abstract.

    Raises:
      ValueError: If none does, with the reason.
    """
    size, reason = qt.segments[0].group_size, None
    if qt.affine is not Affine.FLOAT:
        reason = f"{qt.affine.value} is not float(q) * s"
    elif qt.scale.shape[-1] not in (1, qt.n):
        reason = "columns share scales"
    reason = reason or lacks_plain_groups(qt, (4, 8)) or lacks_input_order(qt)
    if reason is None and qt.segments[0].bits == 8:
        return MXFP8 if isinstance(qt.scale, E8M0) and size == 32 else "naive-quantized"
    if reason is None and isinstance(qt.scale, OverGlobal) and size == 16:
        return NVFP4
    if reason is None and isinstance(qt.scale, E8M0) and size == 32:
        return MXFP4
    reason = reason or (
        f"floats of 4 bits in groups of {size} with {qt.scale.dtype} scales are "
        "neither NVFP4 nor MXFP4 as its own files have them, with prepare=False"
    )
    raise ValueError(f"compressed-tensors cannot hold {qt!r}: {reason}.")


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one matrix of small floats under the upstream's names.

    Args:
      qt: A matrix. NVFP4 and the MX formats must still have the scales of their files.

    Returns:
      ``weight`` or ``weight_packed``, ``weight_scale``, and of NVFP4
      ``weight_global_scale``.

    Raises:
      ValueError: As `format_of`.
    """
    format_ = format_of(qt)
    if isinstance(qt.scale, OverGlobal):
        local = lax.bitcast_convert_type(qt.scale.local.T, fp8.E4M3)
        whole = {"weight_global_scale": qt.scale.whole.reshape(1)}
        return _nibbles(qt) | {"weight_scale": local} | whole
    if format_ == MXFP4 and isinstance(qt.scale, E8M0):
        return _nibbles(qt) | {"weight_scale": qt.scale.exponent.T}
    weight = fp8.Bytes().pack(tensor.codes(qt), 8)
    stored = _stored(qt.scale, format_)
    return {
        "weight": lax.bitcast_convert_type(weight, fp8.E4M3),
        "weight_scale": stored[0] if is_whole(qt) else stored.T,
    }


def _stored(scale: Any, format_: str) -> Array:
    """The scales of bytes as a file has them, ``[groups, n]`` or of blocks."""
    if isinstance(scale, BlockScale):
        return scale.plain
    if isinstance(scale, E8M0) and format_ == MXFP8:
        return scale.exponent
    return tensor.plain(scale)


def is_whole(qt: QTensor) -> bool:
    """Whether one scale is for all of a matrix, which its strategy then says."""
    plain = not isinstance(qt.scale, BlockScale)
    return plain and qt.segments[0].group_size is None and qt.scale.shape[-1] < qt.n


def _nibbles(qt: QTensor) -> dict[str, Array]:
    return {"weight_packed": decode.relayout(qt, Nibbles()).words[0]}
