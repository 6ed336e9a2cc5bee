"""Steps of a weight that is held as integer codes.

An optimizer hands out float steps for the dense weight; here they become other codes of
the same `QTensor`, in its own layout. A step of less than half a scale rounds back to
the code it came from, and training stalls. There are two ways round that:
`apply_stochastically` rounds up or down by chance, so that the mean is right, and
`apply_with_residual` keeps what was rounded away and adds it to the next step. `refit`
then lets the scales follow the weights.

All steps are in the order of the inputs, and are those of the matrix that
``x * input_scale`` multiplies, as `qjax.training.shadow` gives its gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from qjax import tensor
from qjax.decode import spread, stored_weight
from qjax.tensor import Affine, QTensor
from qjax.training import rounding


def apply_updates(
    params: Any, updates: Any, *, move_zeros: bool | Array = False
) -> Any:
    """Takes one step, in bitorch-engine's arithmetic: bit for bit its integers.

    The weight is rebuilt in the dtype of the scales, with the product and the sum
    rounded apart, stepped in float32, and each element takes the nearest code. Without
    a step (an update of 0) a code stays as it is.

    Args:
      params: Pytree that holds `QTensor`s, stacked or not.
      updates: The same tree with a float ``[*batch, k, n]`` step in place of each
        tensor, as `diode_mix` gives it: added to the weight. Arrays of ``params`` are
        stepped as `optax.apply_updates` does; None leaves anything as it is.
      move_zeros: Whether zeros move too, which bitorch-engine does on every fifth step.
        Float zeros follow the mean step of their group, before the codes are rounded.
        Integer zeros take the mean of ``zero - step``, cut to an integer, after it: no
        sensible rule (a step has another unit), but the one of its results.

    Returns:
      ``params`` with new codes, in the same layouts.

    Raises:
      ValueError: If an update has another shape than its tensor.
      NotImplementedError: If zeros are to move and groups of rows are spread over
        several segments, or 8-bit zeros have no room for 256.

    Source: GreenBitAI/bitorch-engine, bitorch_engine/utils/model_helper.py and
    quant_operators.py, and ``pack_fp_weight`` in
    bitorch_engine/layers/qlinear/nbit/cuda/utils.py, commit
    0009b1f8178e86df6433383879c0005a49c0cc92.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> moved = apply_updates(w, jnp.full((32, 32), float(w.scale[0, 0])))
      >>> int(w[0, 1]), int(moved[0, 1])
      (0, 1)
    """

    def step(qt: QTensor, update: Array) -> QTensor:
        # A bool is known while tracing: if False, no zero is touched.
        if move_zeros is False:
            return _step(qt, update)
        return _step_with_zeros(qt, update, jnp.broadcast_to(move_zeros, qt.batch))

    return _over_tensors(step, params, updates)


def apply_stochastically(params: Any, updates: Any, key: PRNGKeyArray) -> Any:
    """Takes one step, rounding each element up or down by chance.

    A weight between two codes takes the upper one with the probability of how far up it
    is, so that the mean of many steps is right however small they are.

    Args:
      params: As in `apply_updates`.
      updates: As in `apply_updates`.
      key: Key of the draws; take another for each step.

    Returns:
      ``params`` with new codes, in the same layouts.

    Raises:
      ValueError: If an update has another shape than its tensor.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> quarter = jnp.full((32, 32), float(w.scale[0, 0]) / 4)
      >>> moved = apply_stochastically(w, quarter, jax.random.key(0))
      >>> 200 < int(qjax.codes(moved).sum() - qjax.codes(w).sum()) < 300
      True
    """
    tensors = _tensors(params)
    keys = iter(jax.random.split(key, max(len(tensors), 1)))

    def step(qt: QTensor, update: Array) -> QTensor:
        return _draw(qt, update, jax.random.uniform(next(keys), qt.shape))

    return _over_tensors(step, params, updates)


class Stepped(NamedTuple):
    """Tensors after a step, and what of their weights their codes do not hold."""

    params: Any
    residual: Any


def apply_with_residual(params: Any, updates: Any, residual: Any) -> Stepped:
    """Takes one step, and keeps what is rounded away for the next (error feedback).

    Args:
      params: As in `apply_updates`.
      updates: As in `apply_updates`.
      residual: What `shadow.zeros` made before the first step, and this function
        returned after each other: a float ``[*batch, k, n]`` for each tensor, of any
        float dtype. Together with the codes it is the weight; the optimizer could not
        do with less than one bit of it.

    Returns:
      The new ``params``, and the new residual: at most half a scale, or a whole one
      where the codes are at the end of their range.

    Raises:
      ValueError: If an update or residual has another shape than its tensor.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> quarter = jnp.full((32, 32), float(w.scale[0, 0]) / 4)
      >>> residual = qjax.training.shadow.zeros(w)
      >>> for _ in range(3):
      ...     w, residual = apply_with_residual(w, quarter, residual)
      >>> int(w[0, 1])
      1
    """
    stepped = _over_tensors(_feed_back, params, updates, residual)
    return _unzip(stepped, residual)


def refit(params: Any, residual: Any) -> Stepped:
    """Lets scales and float zeros follow the weights, by least squares in each group.

    The codes stay. With ``w`` the weight that codes and residual stand for, each group
    gets the scale and float zero whose ``f(codes, scale, zero)`` is nearest to ``w``;
    where that is not a positive scale it keeps its own. Integer zeros stay.

    Args:
      params: As in `apply_updates`. Encoded scales come back plain.
      residual: As in `apply_with_residual`; None leaves a tensor as it is.

    Returns:
      The new ``params``, and what their new scales leave of ``w``.

    Raises:
      ValueError: If a residual has another shape than its tensor.
      NotImplementedError: If groups of rows are spread over several segments.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> larger, rest = refit(w, 0.5 * qjax.dequantize(w))
      >>> float(larger.scale[0, 0] / w.scale[0, 0]), float(abs(rest).max()) < 1e-6
      (1.5, True)
    """
    return _unzip(_over_tensors(_refit, params, residual), residual)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _tensors(tree: Any) -> list[QTensor]:
    return [
        leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_tensor) if _is_tensor(leaf)
    ]


def _over_tensors(step: Callable, params: Any, *trees: Any) -> Any:
    """Maps over the tensors of a tree that have a step; other arrays are added to."""

    def one(param: Any, *arrays: Any) -> Any:
        # A residual says nothing about other arrays than tensors.
        given = arrays if _is_tensor(param) else arrays[:1]
        if any(array is None or isinstance(array, optax.MaskedNode) for array in given):
            return param
        if not _is_tensor(param):
            # Rounded once, after the sum: optax promotes, which a user may have strict.
            with jax.numpy_dtype_promotion("standard"):
                return optax.apply_updates(param, arrays[0])
        for array in arrays:
            if _is_tensor(array):
                raise ValueError(
                    f"the step or residual of {param!r} must be float {param.shape}; "
                    "got a QTensor, such as the gradient of its scales and zeros. That "
                    "of its codes is the gradient of qjax.training.shadow.zeros(params)"
                    " by shadow.matmul, linen.shadowed or nnx.with_shadows."
                )
            shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
            floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
            if shape != param.shape or not floating:
                raise ValueError(
                    f"the step or residual of {param!r} must be float {param.shape}; "
                    f"got {type(array).__name__} of shape {shape} and {dtype}."
                )
        return step(param, *arrays)

    return jax.tree.map(one, params, *trees, is_leaf=_is_tensor)


def _unzip(tree: Any, residual: Any) -> Stepped:
    """Takes apart a tree in which tensors and their residuals stand together."""
    is_pair = lambda leaf: isinstance(leaf, (Stepped, QTensor))  # noqa: E731
    params = jax.tree.map(
        lambda leaf: leaf.params if isinstance(leaf, Stepped) else leaf,
        tree,
        is_leaf=is_pair,
    )
    rest = jax.tree.map(
        lambda leaf, old: leaf.residual if isinstance(leaf, Stepped) else old,
        tree,
        residual,
        is_leaf=is_pair,
    )
    return Stepped(params, rest)


@rounding.stacked
def _step(qt: QTensor, update: Array) -> QTensor:
    """One step in upstream's arithmetic; all zeros stay."""
    return _upstream_step(qt, update, None)


@rounding.stacked
def _step_with_zeros(qt: QTensor, update: Array, when: Array) -> QTensor:
    """One step in upstream's arithmetic; zeros move where ``when`` is true."""
    rounding.check_groups(qt)
    return _upstream_step(qt, update, when)


def _upstream_step(qt: QTensor, update: Array, when: Array | None) -> QTensor:
    upstream = dataclasses.replace(qt, rounding=2)
    update = rounding.stored(qt, update.astype(jnp.float32))
    stepped = stored_weight(upstream).astype(jnp.float32) + update
    moved = []
    for part, target, change in rounding.parts(qt, stepped, update):
        new = part if when is None else _move_zero(part, change, when)
        # Upstream rounds against float zeros as they become, integers as they were.
        against = part if rounding.has_integer_zero(part) else new
        kept = change == 0
        if against.zero is not None:
            kept &= spread(part, against.zero == part.zero)
        q = jnp.where(kept, rounding.codes(part), rounding.nearest(against, target))
        moved.append(rounding.with_words(new, q))
    return rounding.join(qt, moved, *([] if when is None else ["zero"]))


@rounding.stacked
def _draw(qt: QTensor, update: Array, draws: Array) -> QTensor:
    """One step rounded by chance, with draws from [0, 1)."""
    update = rounding.stored(qt, update.astype(jnp.float32))
    target, draws = rounding.weight(qt) + update, rounding.stored(qt, draws)
    return rounding.with_codes(qt, target, update == 0, draws)


@rounding.stacked
def _feed_back(qt: QTensor, update: Array, residual: Array) -> Stepped:
    """One step of a weight that is codes and residual."""
    update = rounding.stored(qt, update.astype(jnp.float32))
    held = rounding.weight(qt) + rounding.stored(qt, residual.astype(jnp.float32))
    moved = rounding.with_codes(qt, held + update, update == 0)
    rest = rounding.remainder(moved, held + update)
    return Stepped(moved, rest.astype(residual.dtype))


@rounding.stacked
def _refit(qt: QTensor, residual: Array) -> Stepped:
    """Scales and float zeros nearest to a weight that is codes and residual."""
    rounding.check_groups(qt)
    target = rounding.weight(qt) + rounding.stored(qt, residual.astype(jnp.float32))
    plain = dataclasses.replace(
        qt, scale=tensor.plain(qt.scale), zero=tensor.plain(qt.zero)
    )
    pairs = rounding.parts(plain, target)
    parts = [rounding.refit_part(part, weights) for part, weights in pairs]
    fitted = rounding.join(plain, parts, "scale", "zero")
    return Stepped(fitted, rounding.remainder(fitted, target).astype(residual.dtype))


def _move_zero(part: QTensor, update: Array, when: Array) -> QTensor:
    if part.zero is None:
        return part
    zero = part.zero.astype(jnp.float32)
    if rounding.has_integer_zero(part):
        bits = part.segments[0].bits
        if bits == 8 and part.zero.dtype == jnp.uint8:
            raise NotImplementedError(
                f"{part!r}: zeros of 8-bit codes may become 256, which uint8 cannot "
                "hold; leave move_zeros=False."
            )
        drifted = rounding.group_mean(part, spread(part, zero) - update, zero)
        stored = jnp.trunc(drifted).astype(jnp.int32) - 1
        new = ((stored & (2**bits - 1)) + 1).astype(part.zero.dtype)
    else:
        change = rounding.group_mean(part, update, jnp.zeros_like(zero))
        if part.affine is Affine.ZERO:
            change = -change / part.scale.astype(jnp.float32)
        new = (zero + change).astype(part.zero.dtype)
    return dataclasses.replace(part, zero=jnp.where(when, new, part.zero))
