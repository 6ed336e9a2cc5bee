"""Half-quadratic quantization: zeros that fit most weights well, and some not at all.

Source: mobiusml/hqq, hqq/core/quantize.py and hqq/core/optimize.py, commit
e0b1d00e095653359da9de1d7dbb35a994aa6b96, whose constants these are.
"""

import dataclasses
import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from qjax import rtn
from qjax.rtn import Grid, Scheme
from qjax.tensor import QTensor, over_batch

# |error|**_NORM is what counts: below 1, so that a few large errors count for little.
_NORM = 0.7
_FIRST_WEIGHT, _GROWTH = 10.0, 1.01
_STEPS = 20


def quantize(
    w: Float[Array | np.ndarray, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 64,
    symmetric: bool = False,
    *,
    scale_dtype: DTypeLike | None = None,
) -> QTensor:
    """Quantizes a weight with scales of its range, and zeros that HQQ finds.

    Zeros are floats. They minimize a sum of ``|error| ** 0.7`` by half-quadratic
    splitting: in turns, the largest errors are taken out as what no code can hold, and
    the zero becomes the mean of what is left. It needs no data, and as few steps as 20.

    Args:
      w: As in `qjax.quantize`.
      bits: As in `qjax.quantize`.
      group_size: As in `qjax.quantize`.
      symmetric: Must be False: there are zeros to find.
      scale_dtype: Dtype of scales and zeros; None takes the dtype of ``w``.

    Returns:
      As `qjax.quantize`, with float zeros, as `formats.hqq` and `formats.tinygemm` hold
      them.

    Raises:
      TypeError: As `qjax.quantize`.
      ValueError: As `qjax.quantize`; or if ``symmetric``.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (128, 64))
      >>> quantize(w, bits=4, group_size=64).zero.dtype
      dtype('float32')
    """
    if symmetric:
        raise ValueError(
            "symmetric=True leaves HQQ no zeros to find; quantizers.clip has scales to "
            "find, symmetric or not."
        )
    scheme = rtn.check(w, bits, group_size, symmetric, scale_dtype)
    return over_batch(functools.partial(_quantize, scheme), jnp.asarray(w))


@functools.partial(jax.jit, static_argnums=0)
def _quantize(scheme: Scheme, w: Array) -> QTensor:
    groups = rtn.grouped(scheme, w)
    low, high = rtn.bounds(groups)
    info, size = jnp.finfo(scheme.dtype), jnp.maximum(jnp.abs(low), jnp.abs(high))
    # A group of equal weights has no range: its scale is their size, its zero one. And
    # of one far from 0, the zero must not leave the range of its dtype.
    flat = high - low <= scheme.top * scheme.least
    whole = jnp.where(size > 0, size, 1)
    least = size / (float(info.max) / 2)
    scale = jnp.where(flat, whole, jnp.maximum((high - low) / scheme.top, least))
    step = scale.astype(scheme.dtype).astype(jnp.float32)
    start = Grid(scale.astype(scheme.dtype), -low / step)
    # Stored as it is used: codes are chosen for the zero that the file will have.
    zero = _fit(scheme, groups, start).astype(scheme.dtype)
    grid = start._replace(zero=zero.astype(jnp.float32))
    packed = rtn.assemble(scheme, _nearest(scheme, groups, grid), grid)
    return dataclasses.replace(packed, zero=zero)


def _nearest(scheme: Scheme, groups: Array, grid: Grid) -> Array:
    """The nearest codes, where zeros are no whole numbers."""
    steps = jnp.round(groups / grid.step + grid.zero[:, None])
    return jnp.clip(steps, 0, scheme.top)


def _fit(scheme: Scheme, groups: Array, grid: Grid) -> Array:
    """Finds zeros, until the mean error of the whole matrix grows."""

    def goes_on(state: tuple) -> Array:
        i, _, error, last = state
        return (i < _STEPS) & (error < last)

    def improve(state: tuple) -> tuple:
        i, zero, last, _ = state
        moved = grid._replace(zero=zero)
        codes = _nearest(scheme, groups, moved)
        off = groups - rtn.values(codes, moved)
        size = jnp.abs(off)
        weight = _FIRST_WEIGHT * _GROWTH ** jnp.float32(i)
        # 0 ** a negative exponent is infinite, and what is subtracted is cut at 0.
        kept = jnp.maximum(size - size ** (_NORM - 1) / weight, 0) * jnp.sign(off)
        zero = (codes - (groups - kept) / grid.step).mean(1)
        return i + 1, zero, size.mean(), last

    start = (0, grid.zero, jnp.float32(jnp.inf), jnp.float32(jnp.inf))
    return jax.lax.while_loop(goes_on, improve, improve(start))[1]
