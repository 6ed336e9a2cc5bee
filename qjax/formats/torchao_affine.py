"""torchao's rules for scales, zero points and codes, rounded as torchao rounds them.

Every operation is rounded to the dtype of the weight, which decides some codes: domain
INT multiplies by the rounded reciprocal of the scale, domain FLOAT divides. With r that
rounding, ``middle = (high + low + 1) / 2`` and groups along K of torch's ``[N, K]``,

    FLOAT  scale = max(r(r(most - least) / (high - low)), r(eps))
           zero = r(least + r(scale * middle)),  lo = r(zero - r(scale * middle))
           q = clamp(round(r(r(w - lo) / scale)))
           w' = r(r((q - middle) * scale) + zero)
    INT    zero = clamp(low - round(r(least / scale)))
           q = clamp(r(round(r(w * r(1 / scale))) + zero)),  w' = r((q - zero) * scale)

Source: pytorch/ao, torchao/quantization/quant_primitives.py and utils.py, release
0.18.0.
"""

import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from qjax.decode import rounded
from qjax.formats.checks import FLOATS


class MappingType(enum.Enum):
    """How the range of a group becomes a scale and a zero point, in torchao's names."""

    SYMMETRIC = "max |w| over half of the range of codes"
    SYMMETRIC_NO_CLIPPING_ERR = "the scale at which neither end of the group clips"
    ASYMMETRIC = "from the least to the greatest"


class ZeroPointDomain(enum.Enum):
    """What a zero point is."""

    INT = "a code: (q - zero) * scale"
    FLOAT = "a weight: (q - middle) * scale + zero, as tinygemm has it"


@functools.partial(
    jax.jit,
    static_argnames=(
        "group_size",
        "mapping",
        "domain",
        "preserve_zero",
        "low",
        "high",
        "eps",
    ),
)
def choose_qparams_affine(
    w: Float[Array, "n k"],
    group_size: int,
    *,
    mapping: MappingType = MappingType.ASYMMETRIC,
    domain: ZeroPointDomain = ZeroPointDomain.INT,
    preserve_zero: bool = True,
    low: int = 0,
    high: int = 15,
    eps: float | None = None,
) -> tuple[Float[Array, "n groups"], Shaped[Array, "n groups"]]:
    """Chooses scales and zero points of a torch weight as torchao does.

    Args:
      w: Float ``[N, K]``.
      group_size: Inputs that share a scale; it divides K.
      mapping: How the range of a group is covered; FLOAT needs ASYMMETRIC.
      domain: Whether zero points are codes or weights.
      preserve_zero: Whether the range is widened to hold 0; not in domain FLOAT.
      low: Least code.
      high: Greatest code.
      eps: Least scale. None takes the dtype's machine epsilon, in domain FLOAT its
        smallest normal number.

    Returns:
      Scales ``[N, K / group_size]`` in the dtype of ``w``, and zero points: int32, or
      the dtype of ``w`` in domain FLOAT.

    Raises:
      ValueError: If K is not whole groups, ``w`` is not float, or the mapping is
        symmetric in domain FLOAT.

    Example:
      >>> scale, zero = choose_qparams_affine(jnp.arange(16.0)[None], 16)
      >>> scale, zero
      (Array([[1.]], dtype=float32), Array([[0]], dtype=int32))
    """
    is_float, dtype = domain is ZeroPointDomain.FLOAT, w.dtype
    _check_groups(w, group_size)
    if is_float and mapping is not MappingType.ASYMMETRIC:
        raise ValueError(f"mapping={mapping} must be ASYMMETRIC in domain FLOAT.")
    if eps is None:
        eps = float(getattr(jnp.finfo(dtype), "smallest_normal" if is_float else "eps"))
    groups = w.astype(jnp.float32).reshape(w.shape[0], -1, group_size)
    least, most = groups.min(-1), groups.max(-1)
    if mapping is not MappingType.ASYMMETRIC or (preserve_zero and not is_float):
        least, most = jnp.minimum(least, 0), jnp.maximum(most, 0)
    round_ = functools.partial(rounded, dtype=dtype)
    scale = round_(_scale(least, most, mapping, low, high, round_))
    scale = jnp.maximum(scale, round_(jnp.float32(eps)))
    middle = (high + low + 1) / 2
    if is_float:
        zero = round_(least + round_(scale * middle)).astype(dtype)
    elif mapping is MappingType.ASYMMETRIC:
        zero = low - jnp.round(round_(least / scale))
        zero = jnp.clip(zero, low, high).astype(jnp.int32)
    else:
        zero = jnp.full(scale.shape, int(middle), jnp.int32)
    return scale.astype(dtype), zero


def _scale(
    least: Array,
    most: Array,
    mapping: MappingType,
    low: int,
    high: int,
    round_: Callable[[Array], Array],
) -> Array:
    """The scale of the range of a group, before its last rounding."""
    if mapping is MappingType.SYMMETRIC:
        return _divide(jnp.maximum(-least, most), (high - low) / 2)
    if mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
        return jnp.maximum(_divide(least, low), _divide(most, high))
    return _divide(round_(most - least), high - low)


@functools.partial(jax.jit, static_argnames=("group_size", "domain", "low", "high"))
def quantize_affine(
    w: Float[Array, "n k"],
    scale: Float[Array, "n groups"],
    zero: Shaped[Array, "n groups"],
    group_size: int,
    *,
    domain: ZeroPointDomain = ZeroPointDomain.INT,
    low: int = 0,
    high: int = 15,
) -> Integer[Array, "n k"]:
    """Quantizes a torch weight as torchao does.

    Domain INT multiplies by the rounded reciprocal of the scale, FLOAT divides. Where
    the reciprocal overflows the dtype (float16 scales below 2**-16), torchao's own
    codes of zeros are undefined; here it stays in float32, and they are the zero point.

    Args:
      w: Float ``[N, K]``.
      scale: ``[N, K / group_size]`` in the dtype of ``w``.
      zero: Zero points of the same shape, as `choose_qparams_affine` gives them.
      group_size: Inputs that share a scale.
      domain: What the zero points are.
      low: Least code.
      high: Greatest code.

    Returns:
      int32 ``[N, K]`` codes.

    Raises:
      ValueError: If the shapes do not fit or ``w`` is not float.
    """
    _check_groups(w, group_size, scale, zero)
    round_ = functools.partial(rounded, dtype=w.dtype)
    groups = w.astype(jnp.float32).reshape(*scale.shape, group_size)
    s, z = (p.astype(jnp.float32)[..., None] for p in (scale, zero))
    if domain is ZeroPointDomain.FLOAT:
        least = round_(z - round_(s * ((high + low + 1) / 2)))
        codes = jnp.round(round_(round_(groups - least) / s))
    else:
        inverse = round_(1 / s)
        inverse = jnp.where(jnp.isinf(inverse), 1 / s, inverse)
        codes = round_(jnp.round(round_(groups * inverse)) + z)
    return jnp.clip(codes, low, high).astype(jnp.int32).reshape(w.shape)


@functools.partial(jax.jit, static_argnames=("group_size", "domain", "low", "high"))
def dequantize_affine(
    codes: Integer[Array, "n k"],
    scale: Float[Array, "n groups"],
    zero: Shaped[Array, "n groups"],
    group_size: int,
    *,
    domain: ZeroPointDomain = ZeroPointDomain.INT,
    low: int = 0,
    high: int = 15,
) -> Float[Array, "n k"]:
    """Dequantizes a torch weight as torchao's Python does.

    Domain FLOAT rounds twice here; tinygemm's CUDA kernels round once
    (`qjax.formats.tinygemm`).

    Args:
      codes: Integer ``[N, K]``.
      scale: ``[N, K / group_size]``.
      zero: Zero points of the same shape.
      group_size: Inputs that share a scale.
      domain: What the zero points are.
      low: Least code.
      high: Greatest code.

    Returns:
      ``[N, K]`` in the dtype of ``scale``.

    Raises:
      ValueError: If the shapes do not fit.
    """
    _check_groups(codes, group_size, scale, zero, floating=False)
    dtype = scale.dtype
    groups = codes.astype(jnp.float32).reshape(*scale.shape, group_size)
    s, z = (p.astype(jnp.float32)[..., None] for p in (scale, zero))
    if domain is ZeroPointDomain.FLOAT:
        weight = rounded((groups - (high + low + 1) / 2) * s, dtype) + z
    else:
        weight = (groups - z) * s
    return weight.astype(dtype).reshape(codes.shape)


def _check_groups(
    w: Array, group_size: int, *parameters: Array, floating: bool = True
) -> None:
    if floating and w.dtype not in FLOATS:
        raise ValueError(f"w.dtype={w.dtype} must be float16, bfloat16 or float32.")
    if len(w.shape) != 2 or group_size < 1 or w.shape[1] % group_size:
        raise ValueError(
            f"shape={w.shape} must be [N, K], K a multiple of group_size={group_size}."
        )
    wanted = (w.shape[0], w.shape[1] // group_size)
    for parameter in parameters:
        if parameter.shape != wanted:
            raise ValueError(
                f"scale and zero must have shape {wanted}; found {parameter.shape}."
            )


def _divide(x: Array, by: int | float) -> Array:
    # XLA would multiply by the reciprocal of a constant; what it cannot tell to be one,
    # it divides by.
    return x / jnp.where(jnp.isnan(x), x, by)
