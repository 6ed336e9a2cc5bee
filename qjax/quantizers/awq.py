"""AWQ: rows that large inputs meet are scaled up before they are rounded.

Source: mit-han-lab/llm-awq, awq/quantize/auto_scale.py, commit
d6e797a42b9ef7778de8ee2352116e0f48a78d61, and https://arxiv.org/abs/2306.00978; sizes of
inputs are root mean squares here, and errors those that a gram gives.
"""

import dataclasses
import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float

from qjax import rtn
from qjax.quantizers import clip as clip_
from qjax.quantizers.error import check_gram, energy
from qjax.rtn import Scheme
from qjax.tensor import QTensor, over_batch

_STEPS, _COLUMNS = 20, 512


def quantize(
    w: Float[Array | np.ndarray, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 128,
    symmetric: bool = False,
    *,
    gram: Float[Array | np.ndarray, "*batch k k"],
    scale_dtype: DTypeLike | None = None,
    clip: bool = False,
) -> QTensor:
    """Quantizes a weight with rows scaled so that its outputs change least, by AWQ.

    Row i is multiplied by a power of the size of input i, rounded, and the input
    divided by it: what large inputs meet is rounded more finely, at the cost of the
    others. Of 20 exponents from 0 to 0.95 the one with the least error is taken; of
    large matrices, in some 512 columns from all over.

    The factors stay beside the matrix, as its ``input_scale``, and cost one product an
    input. The original moves them into the layer before, and so AWQ's files have no
    place for them: a model may do so by ``dataclasses.replace(w, input_scale=None)``
    and a norm, say, whose weight it multiplies.

    Args:
      w: As in `qjax.quantize`.
      bits: As in `qjax.quantize`.
      group_size: As in `qjax.quantize`.
      symmetric: As in `qjax.quantize`.
      gram: As in `quantizers.gptq.quantize`. Layers of the same inputs that should have
        the same factors are one matrix, side by side.
      scale_dtype: As in `qjax.quantize`.
      clip: Whether each group also searches its range, as `quantizers.clip` does.

    Returns:
      As `qjax.quantize`, with a float32 ``input_scale``.

    Raises:
      ValueError: As `qjax.quantize`; if ``gram`` is not float ``[*batch, k, k]``, or
        not finite (of traced arrays, this is not seen).

    Example:
      >>> w, x, sizes = jax.random.normal(jax.random.key(0), (3, 64, 64))
      >>> gram = qjax.quantizers.gram(x * jnp.exp(sizes[:1]))
      >>> rounded = qjax.quantize(w, bits=3, group_size=32)
      >>> packed = quantize(w, bits=3, group_size=32, gram=gram)
      >>> error = qjax.quantizers.output_error
      >>> bool(error(w, packed, gram) < 0.8 * error(w, rounded, gram))
      True
    """
    scheme = rtn.check(w, bits, group_size, symmetric, scale_dtype)
    check_gram(w, gram)
    one = functools.partial(_quantize, scheme, bool(clip))
    packed, error = over_batch(one, jnp.asarray(w), jnp.asarray(gram))
    if not isinstance(error, Tracer) and not jnp.isfinite(error).all():
        raise ValueError("gram must be finite, and so must w.")
    return packed


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(
    scheme: Scheme, clip: bool, w: Array, gram: Array
) -> tuple[QTensor, Array]:
    w, gram = w.astype(jnp.float32), gram.astype(jnp.float32)
    size = jnp.sqrt(jnp.maximum(gram.diagonal(), 0))
    seen = size > 0
    size = jnp.where(seen, size, 1)

    def attempt(w: Array, exponent: Array) -> tuple[Array, QTensor]:
        factor = jnp.where(seen, size**exponent, 1)
        factor /= jnp.sqrt(factor.max() * factor.min())
        groups = rtn.grouped(scheme, w * factor[:, None])
        if clip:
            # In units of w, so that a row counts for as much as its inputs make of it.
            importance = (size / factor) ** 2
            importance = importance.reshape(groups.shape[:2])
            grid = clip_.search(scheme, groups, importance)
        else:
            grid = rtn.cover(scheme, *rtn.bounds(groups))
        codes = rtn.nearest(scheme, groups, grid)
        off = rtn.values(codes, grid).reshape(w.shape) / factor[:, None] - w
        packed = rtn.assemble(scheme, codes, grid)
        packed = dataclasses.replace(packed, input_scale=1 / factor)
        return energy(off, gram), packed

    # What all columns have in common shows in some hundreds of them.
    some = w[:, :: max(1, w.shape[1] // _COLUMNS)]
    exponents = jnp.arange(_STEPS, dtype=jnp.float32) / _STEPS
    errors = jax.lax.map(lambda exponent: attempt(some, exponent)[0], exponents)
    error, packed = attempt(w, exponents[errors.argmin()])
    return packed, error
