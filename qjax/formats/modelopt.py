"""NVIDIA ModelOpt: NVFP4, FP8 and MXFP8 matrices as its Hugging Face export has them.

NVFP4 and W4A16_NVFP4 have ``weight[n, i]``, two E2M1 floats a byte, the first in the
low nibble, as compressed-tensors has them,

    bit 7               bit 0
    | q[2i + 1, n] | q[2i, n] |

``weight_scale[n, j]``, a float8_e4m3fn for 16 inputs, and ``weight_scale_2``, one
float32 that multiplies all of them (compressed-tensors divides by its own). FP8 has a
float8_e4m3fn ``weight[n, k]`` and one float32 ``weight_scale``; of
FP8_PER_CHANNEL_PER_TOKEN there is one an output, ``[n]``; of FP8_PB_WO one a block of
128 outputs and 128 inputs, ``[n / 128, 1, k / 128, 1]``, or ``[]`` of a single block;
of MXFP8 an E8M0 exponent for 32 inputs, uint8 ``[n, k / 32]``. A static ``input_scale``
is for activations in fewer bits: here they are not quantized, and it is read over.

The weight is ``float(q) * scale`` in float32, rounded once to bfloat16. ModelOpt itself
rounds the scale of FP8 and FP8_PB_WO to bfloat16 before that, which kernels do not, and
takes minus zero for zero.

Source: NVIDIA/Model-Optimizer, modelopt/torch/quantization/qtensor/nvfp4_tensor.py,
fp8_tensor.py and mxfp8_tensor.py, modelopt/torch/export/unified_export_hf.py and
quant_utils.py, release 0.47.0; vllm-project/vllm,
vllm/model_executor/layers/quantization/modelopt.py, commit
00155cdecca722d98e34234c3d172725b7720b7d.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import decode, tensor
from qjax.formats import fp8
from qjax.formats.block_scale import BlockScale
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_shapes,
    check_tensors,
    lacks_input_order,
    lacks_plain_groups,
)
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.formats.gathering import of_whole
from qjax.formats.modelopt_config import Algorithm, Config
from qjax.formats.mxfp4 import E8M0
from qjax.tensor import Affine, QTensor, Segment, StoredGlobal

__all__ = [
    "TENSORS",
    "Config",
    "TimesGlobal",
    "algorithm_of",
    "axes",
    "check",
    "from_tensors",
    "to_tensors",
]

# The last is of AWQ, whose weight is another without it: no algorithm here has it.
TENSORS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_BLOCK = (128, 128)
# Algorithms of a scale for a run of inputs, and how many these are.
_GROUPS: Mapping[Algorithm, int] = types.MappingProxyType(
    {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
)


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TimesGlobal(StoredGlobal):
    """NVFP4's scales: small floats times one number for the whole matrix.

    Example:
      >>> scale = TimesGlobal(
      ...     local=jnp.array([[56, 64]], jnp.uint8), whole=jnp.float32(8)
      ... )
      >>> scale.decode()
      Array([[ 8., 16.]], dtype=float32)
    """

    @property
    def divides(self) -> bool:
        """Whether the local floats are divided by the number: False."""
        return False


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` uint8 ``[n, k / 2]`` of NVFP4 and else float8_e4m3fn ``[n, k]``;
        ``weight_scale`` in the shape and dtype that the algorithm has;
        ``weight_scale_2`` float32 ``[]`` or ``[1]`` of NVFP4; and optionally
        ``input_scale``.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    size, packed = _GROUPS.get(config.algorithm), "NVFP4" in config.algorithm
    of_groups = fp8.E4M3 if packed else jnp.uint8
    expected = {
        "weight": Expected((jnp.uint8 if packed else fp8.E4M3,), 2),
        "weight_scale": Expected((of_groups,), 2)
        if size
        else Expected((jnp.float32,), None),
        "input_scale": Expected(FLOATS, None, optional=True),
    }
    if packed:
        expected["weight_scale_2"] = Expected((jnp.float32,), None)
    check_tensors(tensors, expected, config.algorithm)
    if size is None:
        fp8.check(*_as_fp8(tensors, config))
        return
    n, k = shape = tuple(tensors["weight"].shape)
    k *= 2 if packed else 1
    if not n or not k or k % size:
        raise ValueError(
            f"weight.shape={shape} must have outputs, and groups of {size} inputs, in "
            f"{config.algorithm}."
        )
    check_shapes(tensors, {"weight_scale": (n, k // size)}, f"weight.shape={shape}")
    for name in tensors.keys() & {"weight_scale_2", "input_scale"}:
        if tuple(tensors[name].shape) not in ((), (1,)):
            raise ValueError(
                f"{name}.shape={tuple(tensors[name].shape)} must be () or (1,)."
            )


def _as_fp8(
    tensors: Mapping[str, Any], config: Config
) -> tuple[Mapping[str, Any], fp8.Config]:
    """Tensors as `fp8` knows them, without their values, and their configuration."""
    scale = tensors["weight_scale"]
    held = jax.ShapeDtypeStruct(_shape_of_blocks(scale.shape), scale.dtype)
    # One block alone has a scale without axes.
    blocks = config.algorithm == "FP8_PB_WO" and scale.shape
    as_fp8 = fp8.Config(
        block_size=_BLOCK if blocks else None,
        columns=config.algorithm == "FP8_PER_CHANNEL_PER_TOKEN",
    )
    return {**tensors, "weight_scale": held}, as_fp8


def _shape_of_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leaves out the axes of one that there are within blocks."""
    of_blocks = len(shape) == 4 and shape[1] == shape[3] == 1
    return tuple(shape[::2] if of_blocks else shape)


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      As `fp8.axes`.
    """
    if config.algorithm in _GROUPS:
        return {name: ("n", "k")[: len(array.shape)] for name, array in tensors.items()}
    found = dict(fp8.axes(*_as_fp8(tensors, config)))
    if found and len(tensors["weight_scale"].shape) == 4:
        found["weight_scale"] = ("n", "", "k", "")
    return found


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; scales of NVFP4 are a `TimesGlobal`.

    Raises:
      ValueError: As `check`; or if a weight is not a number, or a scale not finite.

    Example:
      >>> tensors = {
      ...     "weight": np.full((8, 24), 0x21, np.uint8),
      ...     "weight_scale": np.ones((8, 3), jnp.float8_e4m3fn),
      ...     "weight_scale_2": np.float32(0.5),
      ... }
      >>> w = from_tensors(tensors, Config(algorithm="NVFP4"))
      >>> w
      QTensor(48x8, 4 bits, group 16, Nibbles(), float(q) * s, float32 scale, ...)
      >>> qjax.dequantize(w)[:2, 0]
      Array([0.25, 0.5], dtype=bfloat16)
    """
    check(tensors, config)
    scale = np.asarray(tensors["weight_scale"])
    if config.algorithm not in _GROUPS:
        held = {**tensors, "weight_scale": scale.reshape(_shape_of_blocks(scale.shape))}
        return fp8.from_tensors(held, _as_fp8(tensors, config)[1])
    if config.algorithm == "MXFP8":
        words, layout = fp8.patterns_of("weight", tensors["weight"]), fp8.Bytes()
        exponents = fp8.exponents_of("weight_scale", scale)
        parameter = E8M0(exponent=jnp.asarray(exponents.T))
    else:
        words, layout = np.asarray(tensors["weight"]), Nibbles()
        parameter = _times_global(scale, np.asarray(tensors["weight_scale_2"]))
    return tensor.build(
        (jnp.asarray(words),),
        parameter,
        layout=layout,
        segments=(
            Segment(8 if layout == fp8.Bytes() else 4, _GROUPS[config.algorithm]),
        ),
        affine=Affine.FLOAT,
        weight_dtype="bfloat16",
    )


def _times_global(scale: np.ndarray, whole: np.ndarray) -> TimesGlobal:
    local = fp8.patterns_of("weight_scale", scale).T
    largest = np.abs(scale.astype(np.float32)).max()
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(whole).all() or not np.isfinite(largest * whole).all():
            raise ValueError(
                f"weight_scale_2={whole} must be finite, and so must scales up to "
                f"{largest} times it."
            )
    return TimesGlobal(local=jnp.asarray(local), whole=jnp.asarray(whole.reshape(())))


def algorithm_of(qt: QTensor) -> Algorithm:
    """Returns the algorithm whose files hold a matrix, which may be abstract.

    Raises:
      ValueError: If there is none, with the reason.
    """
    size, reason = qt.segments[0].group_size, None
    if qt.affine is not Affine.FLOAT:
        reason = f"{qt.affine.value} is not float(q) * s; requantize it"
    reason = reason or lacks_plain_groups(qt, (4, 8)) or lacks_input_order(qt)
    if reason is None and isinstance(qt.scale, TimesGlobal) and size == 16:
        return "W4A16_NVFP4"
    if reason is None and qt.segments[0].bits == 8:
        if isinstance(qt.scale, E8M0) and size == 32:
            return "MXFP8"
        if size is None and qt.scale.shape[-1] in (1, qt.n):
            return "FP8" if qt.scale.shape[-1] == 1 else "FP8_PER_CHANNEL_PER_TOKEN"
        if (
            isinstance(qt.scale, BlockScale)
            and (qt.scale.rows, qt.scale.columns) == _BLOCK
        ):
            return "FP8_PB_WO"
    reason = reason or (
        f"floats of {qt.segments[0].bits} bits in groups of {size} do not have the "
        "scales of its files; those of ModelOpt do, with prepare=False"
    )
    raise ValueError(f"ModelOpt cannot hold {qt!r}: {reason}.")


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one matrix of small floats under the upstream's names.

    Args:
      qt: A matrix. NVFP4, MXFP8 and blocks must still have the scales of their files.

    Returns:
      ``weight``, ``weight_scale`` in the shape and dtype that `algorithm_of` has, and
      of NVFP4 ``weight_scale_2``.

    Raises:
      ValueError: As `algorithm_of`.
    """
    algorithm, scale = algorithm_of(qt), typing.cast(Any, qt.scale)
    if algorithm == "W4A16_NVFP4":
        return {
            "weight": decode.relayout(qt, Nibbles()).words[0],
            "weight_scale": lax.bitcast_convert_type(scale.local.T, fp8.E4M3),
            "weight_scale_2": scale.whole,
        }
    weight = fp8.Bytes().pack(tensor.codes(qt), 8)
    weight = lax.bitcast_convert_type(weight, fp8.E4M3)
    if algorithm == "MXFP8":
        return {"weight": weight, "weight_scale": scale.exponent.T}
    of_blocks = algorithm == "FP8_PB_WO"
    values: Any = scale.plain if of_blocks else tensor.plain(scale)
    stored = values.astype(jnp.float32).T
    shape = () if algorithm == "FP8" else (-1,)
    shaped = stored[:, None, :, None] if of_blocks else stored.reshape(shape)
    return {"weight": weight, "weight_scale": shaped}
