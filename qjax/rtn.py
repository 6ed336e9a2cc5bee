"""Quantization by rounding to nearest, and what all quantizers share of it."""

import functools
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, UInt8

from qjax import xla
from qjax.bits import block, whole
from qjax.tensor import Affine, QTensor, Segment, check_array, over_batch


class Scheme(NamedTuple):
    """What codes and parameters a weight gets.

    Attributes:
      bits: Width of a code.
      group_size: Rows that share a scale; None for one group a column.
      symmetric: Whether zero is the middle code, so that none is stored.
      dtype: Dtype of the scales.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    dtype: jnp.dtype

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def least(self) -> float:
        """The scale of a group of zeros, or of one that is too small for the dtype.

        A normal number, but in float16, where weights need those below, one of five
        bits.
        """
        info = jnp.finfo(self.dtype)
        if self.dtype == jnp.float16:
            return 16 * float(info.smallest_subnormal)
        return float(info.smallest_normal)


class Grid(NamedTuple):
    """The numbers that the codes of some groups stand for: ``(q - zero) * scale``.

    Attributes:
      scale: ``[groups, n]``, rounded as it will be stored.
      zero: float32 ``[groups, n]``.
    """

    scale: Float[Array, "groups n"]
    zero: Float[Array, "groups n"]

    @property
    def step(self) -> Float[Array, "groups 1 n"]:
        """The scale in float32, beside the rows of its group."""
        return self.scale.astype(jnp.float32)[:, None]


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


def check(
    w: Array | np.ndarray,
    bits: SupportsIndex,
    group_size: SupportsIndex | None,
    symmetric: bool,
    scale_dtype: DTypeLike | None,
) -> Scheme:
    """Checks the arguments of `quantize`.

    Args:
      w: As in `quantize`.
      bits: As in `quantize`.
      group_size: As in `quantize`.
      symmetric: As in `quantize`.
      scale_dtype: As in `quantize`.

    Returns:
      What codes and parameters the weight gets.

    Raises:
      TypeError: As `quantize`.
      ValueError: As `quantize`.
    """
    check_array(w, "w")
    if isinstance(w, jax.ShapeDtypeStruct):
        raise TypeError(
            "w is abstract, a shape without values; jax.eval_shape(qjax.quantize, w) "
            "says what becomes of it."
        )
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
    return Scheme(width, rows, bool(symmetric), dtype)


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
    The rule is that of GPTQ's quantizer without its error feedback, which
    `quantizers.gptq.quantize` has. Codes are packed as in GPTQ's files; for the kernels
    of an NVIDIA GPU, `prepare` moves them.

    Args:
      w: ``[k, n]`` weight (``y = x @ w``), or a stack of them; finite. Where a scale,
        or codes times it, leave the range of ``scale_dtype`` (65504 in float16), the
        weight is infinite or NaN: pass a wider one.
      bits: Width of a code, 2 to 8. (A range that holds 0 leaves one bit no sign.)
      group_size: Rows that share a scale; None for one group a column.
      symmetric: Whether zero is the middle code, so that none is stored.
      scale_dtype: Dtype of the scales; None takes the dtype of ``w``.

    Returns:
      Tensor in the layout that XLA reads natively (`formats.gptq.Stream`).

    Raises:
      TypeError: If ``w`` is no array, or an abstract one.
      ValueError: If ``w`` has fewer than two axes, no elements or is not float,
        ``bits`` is not an integer from 2 to 8 or ``group_size`` not a positive one, or
        k is not a multiple of ``group_size`` and of whole words.

    Example:
      >>> qjax.quantize(jnp.ones((256, 64)), bits=3, group_size=64, symmetric=True)
      QTensor(256x64, 3 bits, group 64, Stream(), (q - 2^(bits-1)) * s + z, ...)
    """
    scheme = check(w, bits, group_size, symmetric, scale_dtype)
    return over_batch(functools.partial(_quantize, scheme), jnp.asarray(w))


@functools.partial(jax.jit, static_argnums=0)
def _quantize(scheme: Scheme, w: Array) -> QTensor:
    groups = grouped(scheme, w)
    grid = cover(scheme, *bounds(groups))
    return assemble(scheme, nearest(scheme, groups, grid), grid)


def grouped(scheme: Scheme, w: Float[Array, "k n"]) -> Float[Array, "groups rows n"]:
    """The groups of a matrix, in float32."""
    k, n = w.shape
    return w.astype(jnp.float32).reshape(-1, scheme.group_size or k, n)


def bounds(
    groups: Float[Array, "groups rows n"],
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n"]]:
    """The least and the largest number of each group; NaN where one is NaN.

    XLA's own reductions of a CPU may pass over NaNs, and what is broken would look
    sound once it is rounded.
    """
    broken = jnp.isnan(groups).any(1)
    return jnp.where(broken, jnp.nan, groups.min(1)), groups.max(1)


def cover(
    scheme: Scheme, low: Float[Array, "groups n"], high: Float[Array, "groups n"]
) -> Grid:
    """Spreads the codes over ranges.

    Args:
      scheme: What codes there are.
      low: Least number of each group.
      high: Largest number of each group.

    Returns:
      The grid; 0 is on it.
    """
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if scheme.symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    # Codes are rounded against the scale as it will be stored. The width of a range may
    # overflow, and half of it never does.
    scale = ((high / 2 - low / 2) / (scheme.top / 2)).astype(scheme.dtype)
    scale = jnp.maximum(scale, scheme.least)
    if scheme.symmetric:
        zero = jnp.full(scale.shape, 2 ** (scheme.bits - 1), jnp.float32)
    else:
        zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, scheme.top)
    return Grid(scale, zero)


def nearest(
    scheme: Scheme, groups: Float[Array, "groups rows n"], grid: Grid
) -> Float[Array, "groups rows n"]:
    """The codes, as float32, of the numbers of a grid that are nearest to others."""
    steps = jnp.round(groups / grid.step)
    return jnp.clip(steps + grid.zero[:, None], 0, scheme.top)


def values(
    codes: Float[Array, "groups rows n"], grid: Grid
) -> Float[Array, "groups rows n"]:
    """The numbers that codes stand for, in float32."""
    return (codes - grid.zero[:, None]) * grid.step


def assemble(
    scheme: Scheme,
    codes: Float[Array, "... n"] | UInt8[Array, "... n"],
    grid: Grid,
) -> QTensor:
    """Packs codes and the whole zeros of their grid.

    Args:
      scheme: What they are.
      codes: Whole numbers, rows in groups or one after another.
      grid: What they stand for.

    Returns:
      ``[k, n]`` in the layout that XLA reads natively.
    """
    matrix = codes.astype(jnp.uint8).reshape(-1, codes.shape[-1])
    return QTensor(
        words=(xla.NATIVE.pack(matrix, scheme.bits),),
        scale=grid.scale,
        zero=None if scheme.symmetric else grid.zero.astype(jnp.uint8),
        layout=xla.NATIVE,
        segments=(Segment(scheme.bits, scheme.group_size),),
        affine=Affine.CENTERED if scheme.symmetric else Affine.ZERO,
    )
