"""Quantization by rounding to nearest."""

import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from qjax import xla
from qjax.bits import block, whole
from qjax.tensor import Affine, QTensor, Segment


def check_groups(
    bits: SupportsIndex, group_size: SupportsIndex | None
) -> tuple[int, int | None]:
    """Checks the width of codes and the size of groups.

    Args:
      bits: As in `quantize`.
      group_size: As in `quantize`.

    Returns:
      Both as Python's own integers.

    Raises:
      ValueError: If ``bits`` is not an integer from 2 to 8, or ``group_size`` not a
        positive one or None.
    """
    width, rows = whole(bits), whole(group_size)
    if width is None or not 2 <= width <= 8:
        raise ValueError(f"bits={bits!r} must be an integer from 2 to 8.")
    if group_size is not None and (rows is None or rows < 1):
        raise ValueError(
            f"group_size={group_size!r} must be a positive integer or None."
        )
    return width, rows


def quantize(
    w: Float[Array | np.ndarray, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 128,
    symmetric: bool = False,
    *,
    scale_dtype: DTypeLike | None = None,
) -> QTensor:
    """Quantizes a weight by rounding to nearest, in groups of rows of each column.

    Asymmetric codes cover the range of a group widened to hold 0, so that 0 is exact:
    ``scale = (max - min) / (2**bits - 1)``, ``zero = round(-min / scale)``. Symmetric
    ones are ``(q - 2**(bits-1)) * scale`` with ``scale = 2 max|w| / (2**bits - 1)``.
    The rule is that of GPTQ's quantizer without its error feedback.

    Args:
      w: ``[k, n]`` weight (``y = x @ w``), or a stack of them; finite. Where a scale,
        or codes times it, leave the range of ``scale_dtype`` (65504 in float16), the
        weight is infinite: pass a wider one.
      bits: Width of a code, 2 to 8. (A range that holds 0 leaves one bit no sign.)
      group_size: Rows that share a scale; None for one group a column.
      symmetric: Whether zero is the middle code, so that none is stored.
      scale_dtype: Dtype of the scales; None takes the dtype of ``w``.

    Returns:
      Tensor in the layout that XLA reads natively (`formats.gptq.Stream`).

    Raises:
      ValueError: If ``w`` has fewer than two axes, no elements or is not float,
        ``bits`` is not an integer from 2 to 8 or ``group_size`` not a positive one, or
        k is not a multiple of ``group_size`` and of whole words.

    Example:
      >>> qjax.quantize(jnp.ones((256, 64)), bits=3, group_size=64, symmetric=True)
      QTensor(256x64, 3 bits, group 64, Stream(), (q - 2^(bits-1)) * s + z, ...)
    """
    if w.ndim < 2 or 0 in w.shape or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            "w must be float [..., k, n] without an extent of 0; got "
            f"{w.dtype}{w.shape}."
        )
    (width, rows), k = check_groups(bits, group_size), w.shape[-2]
    if k % (codes := block(width)[0]):
        raise ValueError(
            f"w.shape[-2]={k} must be a multiple of {codes}, so that {width}-bit codes "
            "fill whole 32-bit words; pad w with zero rows."
        )
    if rows is not None and k % rows:
        raise ValueError(
            f"w.shape[-2]={k} must be a multiple of group_size={group_size}; choose "
            "one that divides it, None for one group a column, or pad w."
        )
    # NumPy's float64 is float32, unless JAX has been told otherwise.
    dtype = jnp.dtype(scale_dtype or jax.dtypes.canonicalize_dtype(w.dtype))
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        source = "" if scale_dtype else ", that of w,"
        raise ValueError(
            f"scale_dtype={dtype}{source} must be bfloat16, float16 or float32."
        )
    return _quantize(w, width, rows, symmetric, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    w: Array, bits: int, group_size: int | None, symmetric: bool, dtype: jnp.dtype
) -> QTensor:
    if w.ndim > 2:
        return jax.vmap(lambda w: _quantize(w, bits, group_size, symmetric, dtype))(w)
    k, n = w.shape
    groups = w.astype(jnp.float32).reshape(-1, group_size or k, n)
    low = jnp.minimum(groups.min(1), 0)
    high = jnp.maximum(groups.max(1), 0)
    top = 2**bits - 1
    if symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    # Codes are rounded against the scale as it will be stored. A group of zeros, or one
    # too small for the dtype, takes the smallest normal scale.
    tiny = jnp.finfo(dtype).smallest_normal
    scale = jnp.maximum(((high - low) / top).astype(dtype), tiny)
    step = scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low / step), 0, top)
    offset = jnp.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    codes = jnp.clip(jnp.round(groups / step[:, None]) + offset[:, None], 0, top)
    return QTensor(
        words=(xla.NATIVE.pack(codes.astype(jnp.uint8).reshape(k, n), bits),),
        scale=scale,
        zero=None if symmetric else zero.astype(jnp.uint8),
        layout=xla.NATIVE,
        segments=(Segment(bits, group_size),),
        affine=Affine.CENTERED if symmetric else Affine.ZERO,
    )
