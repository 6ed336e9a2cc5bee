"""AWQ: rows that large inputs meet are scaled up before they are rounded.

`quantize` does that of a matrix by itself and leaves the factors beside it. Files have
no place for them: for those, `factors` finds what matrices of the same inputs share,
and `fold` moves it into the layer before.

Source: mit-han-lab/llm-awq, awq/quantize/auto_scale.py, commit
d6e797a42b9ef7778de8ee2352116e0f48a78d61, and https://arxiv.org/abs/2306.00978; sizes of
inputs are root mean squares here, and errors those that a gram gives, of the outputs of
the matrices themselves, where the original looks at those of the whole module.
"""

import dataclasses
import functools
from collections.abc import Sequence
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
    place for them: `factors` and `fold` do that.

    Args:
      w: As in `qjax.quantize`.
      bits: As in `qjax.quantize`.
      group_size: As in `qjax.quantize`.
      symmetric: As in `qjax.quantize`.
      gram: As in `quantizers.gptq.quantize`.
      scale_dtype: As in `qjax.quantize`.
      clip: Whether each group also searches its range, as `quantizers.clip` does.

    Returns:
      As `qjax.quantize`, with a float32 ``input_scale``.

    Raises:
      TypeError: If ``w`` or ``gram`` is no array.
      ValueError: As `qjax.quantize`; if ``gram`` is not float ``[*batch, k, k]``; or,
        which of traced arrays is not seen, if ``gram`` or ``w`` is not finite, or
        ``scale_dtype`` cannot hold the scales.

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
    _check_finite(error, scheme, gram=[gram], w=[w])
    return packed


def factors(
    weights: Sequence[Float[Array | np.ndarray, "k _"]],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 128,
    symmetric: bool = False,
    *,
    gram: Float[Array | np.ndarray, "k k"],
    scale_dtype: DTypeLike | None = None,
    clip: bool = False,
) -> Float[Array, " k"]:
    """Finds the factors that matrices of the same inputs have in common.

    They are what `quantize` finds of the matrices side by side: the sum of the squared
    errors of all outputs is least. Multiplied by them, the rows may be rounded by
    `qjax.quantize`; or, with ``clip``, by `quantizers.clip` with the diagonal of the
    gram, divided by the squares of the factors, as ``importance``.

    Args:
      weights: Any number of ``[k, n]``: those of queries, keys and values, say.
      bits: As in `quantize`.
      group_size: As in `quantize`.
      symmetric: As in `quantize`.
      gram: As in `quantize`, of the inputs that all of them see.
      scale_dtype: As in `quantize`; None for the dtype of the first weight.
      clip: As in `quantize`.

    Returns:
      float32 ``[k]``, positive; the largest times the smallest is 1.

    Raises:
      TypeError: If ``weights`` is one array.
      ValueError: As `quantize`; if there are no weights, or their k differ.

    Example:
      >>> up, gate, x = jax.random.normal(jax.random.key(0), (3, 64, 64))
      >>> gram = qjax.quantizers.gram(x.at[:, 0].multiply(9))
      >>> found = factors([gate, up], bits=3, group_size=32, gram=gram)
      >>> found.shape, bool(found[0] == found.max())
      ((64,), True)
    """
    _check_several(weights=weights)
    shapes = [w.shape for w in weights]
    if not shapes or any(len(one) != 2 or one[0] != shapes[0][0] for one in shapes):
        raise ValueError(f"weights must be [k, n], all of one k; got shapes {shapes}.")
    scheme, *_ = (
        rtn.check(w, bits, group_size, symmetric, scale_dtype) for w in weights
    )
    check_gram(weights[0], gram)
    joined = jnp.concatenate([jnp.asarray(w, jnp.float32) for w in weights], -1)
    factor, error = _search(scheme, bool(clip), joined, jnp.asarray(gram))
    _check_finite(error, scheme, gram=[gram], weights=weights)
    return factor


def fold(
    factor: Float[Array | np.ndarray, " k"],
    before: Sequence[Float[Array | np.ndarray, "... k"]],
    after: Sequence[Float[Array | np.ndarray, "k _"]],
) -> tuple[list[Float[Array, "... k"]], list[Float[Array, "k _"]]]:
    """Moves factors of inputs into the layer that makes these inputs.

    The function of the layers together is what it was, as
    ``(x / factor) @ (factor[:, None] * w) = x @ w``, if x is linear in ``before``, and
    goes nowhere but into ``after``. Of a Llama, before queries, keys and values, or
    gate and up projection, there is the weight of a norm; before the down projection
    the outputs of the up projection; before the output projection of attention those of
    values, if there is a head of values for each of queries.

    Args:
      factor: As `factors` finds it, positive.
      before: What gets smaller: arrays whose last axis these inputs are: the weight of
        a norm ``[k]``; or a matrix ``[j, k]`` (``y = x @ w``) and its bias ``[k]``.
      after: What gets larger: matrices ``[k, n]``.

    Returns:
      Both, in their order, with the dtypes that they had; divided and multiplied in
      float32.

    Raises:
      TypeError: If ``before`` or ``after`` is one array.
      ValueError: If shapes do not fit the factor.

    Example:
      >>> x, up, down = jax.random.normal(jax.random.key(0), (3, 8, 8))
      >>> factor = jnp.arange(1.0, 9.0)
      >>> (less,), (more,) = fold(factor, [up], [down])
      >>> bool(jnp.allclose(x @ less @ more, x @ up @ down, atol=1e-4))
      True
    """
    _check_several(before=before, after=after)
    factor = jnp.asarray(factor, jnp.float32)
    wrong = [one.shape for one in before if one.shape[-1:] != factor.shape]
    wrong += [one.shape for one in after if one.shape[:-1] != factor.shape]
    if factor.ndim != 1 or wrong:
        raise ValueError(
            f"factor.shape={factor.shape} must be [k], with before [..., k] and after "
            f"[k, n]; got {wrong}."
        )
    return (
        [_times(one, 1 / factor) for one in before],
        [_times(one, factor[:, None]) for one in after],
    )


def _times(array: Array | np.ndarray, factor: Array) -> Array:
    wide = jnp.asarray(array, jnp.float32)
    return (wide * jnp.broadcast_to(factor, array.shape)).astype(array.dtype)


def _check_several(**given: object) -> None:
    """Refuses an array, whose rows would be taken for arrays."""
    for name, some in given.items():
        if isinstance(some, Array | np.ndarray):
            raise TypeError(
                f"{name} is an array of shape {some.shape}, and must be a list of "
                "arrays, such as [w]."
            )


def _check_finite(
    error: Array, scheme: Scheme, **given: Sequence[Array | np.ndarray]
) -> None:
    """Says what has made an error that is not finite."""
    if isinstance(error, Tracer) or jnp.isfinite(error).all():
        return
    for name, some in given.items():
        if not all(jnp.isfinite(one).all() for one in some):
            raise ValueError(f"{name} must be finite; it holds NaN or infinity.")
    raise ValueError(
        f"{' or '.join(given)} is too large: scale_dtype={scheme.dtype} cannot hold "
        "the scales, or float32 the errors; pass a wider scale_dtype, or smaller "
        "numbers."
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(
    scheme: Scheme, clip: bool, w: Array, gram: Array
) -> tuple[QTensor, Array]:
    w, gram = w.astype(jnp.float32), gram.astype(jnp.float32)
    factor, _ = _searched(scheme, clip, w, gram)
    error, packed = _attempt(scheme, clip, w, gram, factor)
    return dataclasses.replace(packed, input_scale=1 / factor), error


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(scheme: Scheme, clip: bool, w: Array, gram: Array) -> tuple[Array, Array]:
    factor, error = _searched(scheme, clip, w, gram.astype(jnp.float32))
    # The search does not look at all columns.
    return factor, jnp.where(jnp.isfinite(w).all(), error, jnp.nan)


def _searched(scheme: Scheme, clip: bool, w: Array, gram: Array) -> tuple[Array, Array]:
    """The best factors for a weight, and the error of what was looked at."""
    # What all columns have in common shows in some hundreds of them.
    some = w[:, :: max(1, w.shape[1] // _COLUMNS)]
    exponents = jnp.arange(_STEPS, dtype=jnp.float32) / _STEPS
    trials = _size(gram)[None] ** exponents[:, None]
    trials /= jnp.sqrt(trials.max(1) * trials.min(1))[:, None]
    one = functools.partial(_attempt, scheme, clip, some, gram)
    errors = jax.lax.map(lambda factor: one(factor)[0], trials)
    # Scales of the largest factors may not be finite, where those of others are.
    best = jnp.nanargmin(errors)
    return trials[best], errors[best]


def _size(gram: Array) -> Array:
    """The size of each input; the least of all for those that were always 0."""
    size = jnp.sqrt(jnp.maximum(gram.diagonal(), 0))
    least = jnp.where(size > 0, size, jnp.inf).min()
    return jnp.where(size > 0, size, jnp.where(jnp.isfinite(least), least, 1))


def _attempt(
    scheme: Scheme, clip: bool, w: Array, gram: Array, factor: Array
) -> tuple[Array, QTensor]:
    """The error of a weight whose rows are scaled and rounded, and these rows."""
    groups = rtn.grouped(scheme, w * factor[:, None])
    if clip:
        # In units of w, so that a row counts for as much as its inputs make of it.
        importance = (_size(gram) / factor) ** 2
        grid = clip_.search(scheme, groups, importance.reshape(groups.shape[:2]))
    else:
        grid = rtn.cover(scheme, *rtn.bounds(groups))
    codes = rtn.nearest(scheme, groups, grid)
    off = rtn.values(codes, grid).reshape(w.shape) / factor[:, None] - w
    return energy(off, gram), rtn.assemble(scheme, codes, grid)
