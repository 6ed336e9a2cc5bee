"""Experts: what `linen.Experts` and `nnx.Experts` share, and the way to them and back.

routed = dispatch(x, expert, num_experts)
h = act(up(routed.rows, routed.group_sizes))
y = combine(down(h, routed.group_sizes), routed, weight)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, DTypeLike, Float, Int32, Integer, Num

from qjax import blocks, ragged
from qjax.layers import dense
from qjax.meshes import gathered
from qjax.tensor import QTensor, check_array

AXES = "[num_experts, in_features, out_features]"
# Up to so many entries are compared with each other: a sort, a scatter and a cumulative
# sum are several launches on a GPU, and the tokens of a step of decoding are few.
_FEW = 256


class Routed(NamedTuple):
    """Tokens sorted by expert, once for each of their experts.

    Attributes:
      rows: The tokens.
      group_sizes: How many rows each expert has; those that have none come last.
      order: Of every row, which entry of ``expert``, row by row, it is for.
    """

    rows: Num[Array, "rows k"]
    group_sizes: Int32[Array, " experts"]
    order: Int32[Array, " rows"]


def dispatch(
    x: Num[Array, "t k"], expert: Integer[Array, "t top_k"], num_experts: int
) -> Routed:
    """Sorts tokens by expert.

    Args:
      x: ``[t, k]`` tokens.
      expert: ``[t, top_k]``, the experts of each; others than 0 to ``num_experts - 1``
        stand for none.
      num_experts: Number of experts.

    Returns:
      ``t * top_k`` rows.

    Raises:
      TypeError: If an argument is a list, say, and no array.
      ValueError: If shapes or dtypes do not fit.
      NotImplementedError: If t is left open for `jax.export`.

    Example:
      >>> x = jnp.array([[10.0], [11.0]])
      >>> routed = dispatch(x, jnp.array([[2, 0], [0, 1]]), num_experts=3)
      >>> routed.rows[:, 0].tolist(), routed.group_sizes.tolist()
      ([10.0, 11.0, 11.0, 10.0], [2, 1, 1])
    """
    check_array(x, "x")
    check_array(expert, "expert")
    integer = jnp.issubdtype(expert.dtype, jnp.integer)
    fits = x.ndim == expert.ndim == 2 and x.shape[0] == expert.shape[0]
    if not (fits and expert.shape[1] and integer):
        raise ValueError(
            f"expert must be integers [t, top_k] for x.shape={x.shape}, [t, k]; got "
            f"{expert.dtype}{expert.shape}."
        )
    if is_symbolic_dim(x.shape[0]):
        raise NotImplementedError(
            f"x.shape={x.shape} leaves the number of tokens open, and they are sorted "
            "for a number; export one."
        )
    # Every device sorts all of them.
    x, expert = gathered((x, expert))
    flat = expert.reshape(-1)
    if flat.dtype.itemsize < 4:  # which may not hold num_experts
        flat = flat.astype(jnp.int32)
    is_one = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(is_one, flat, 0).astype(jnp.int32)
    flat = jnp.where(is_one, flat, num_experts)
    if len(flat) <= _FEW:
        entries = jnp.arange(len(flat), dtype=jnp.int32)
        mine, other = flat[:, None], flat[None]
        before = (other < mine) | ((other == mine) & (entries[None] < entries[:, None]))
        order = _inverse(before.sum(1, dtype=jnp.int32))
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        sizes = (experts[:, None] == other).sum(1, dtype=jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    return Routed(x[order // expert.shape[1]], sizes, order)


def _inverse(order: Int32[Array, " rows"]) -> Int32[Array, " rows"]:
    """The permutation that undoes another."""
    if len(order) > _FEW:
        return jnp.argsort(order).astype(jnp.int32)
    entries = jnp.arange(len(order), dtype=jnp.int32)
    here = order[None] == entries[:, None]
    return jnp.where(here, entries[None], 0).sum(1, dtype=jnp.int32)


def combine(
    y: Float[Array, "rows n"], routed: Routed, weight: Float[Array, "t top_k"]
) -> Float[Array, "t n"]:
    """Sums for every token what its experts gave.

    Args:
      y: ``[t * top_k, n]``, in the order of ``routed.rows``.
      routed: What `dispatch` returned.
      weight: ``[t, top_k]``, what each expert counts.

    Returns:
      ``[t, n]`` in the dtype of ``y``, summed in float32.

    Raises:
      TypeError: If ``weight`` is a list, say, and no array.
      ValueError: If shapes do not fit.

    Example:
      >>> x, expert = jnp.array([[10.0], [11.0]]), jnp.array([[2, 0], [0, 1]])
      >>> routed = dispatch(x, expert, num_experts=3)
      >>> combine(routed.rows, routed, jnp.array([[0.5, 0.5], [0.0, 2.0]])).tolist()
      [[10.0], [22.0]]
    """
    check_array(weight, "weight")
    if weight.ndim != 2 or not len(y) == weight.size == len(routed.order):
        raise ValueError(
            f"weight.shape={weight.shape} must be [t, top_k] with t * top_k the rows "
            f"of y.shape={y.shape}, which are {len(routed.order)}."
        )
    back = y[_inverse(routed.order)].reshape(*weight.shape, y.shape[1])
    counted = back.astype(jnp.float32) * weight.astype(jnp.float32)[..., None]
    return counted.sum(1).astype(y.dtype)


def route(
    layer: Callable[..., Array],
    num_experts: int,
    x: Num[Array, "t k"],
    expert: Integer[Array, "t top_k"],
    weight: Float[Array, "t top_k"],
) -> Float[Array, "t n"]:
    """Sorts tokens by expert, applies a layer, and sums over each token's experts.

    Args:
      layer: Of sorted rows and group sizes.
      num_experts: As in `dispatch`.
      x: As in `dispatch`.
      expert: As in `dispatch`.
      weight: As in `combine`.

    Returns:
      As `combine`.

    Raises:
      TypeError: If an argument is a list, say, and no array.
      ValueError: As `dispatch`; or if ``weight`` has not the shape of ``expert``.
    """
    routed = dispatch(x, expert, num_experts)
    check_array(weight, "weight")
    if weight.shape != expert.shape:
        raise ValueError(
            f"weight.shape={weight.shape} must be that of expert, {expert.shape}: what "
            "each counts."
        )
    return combine(layer(routed.rows, routed.group_sizes), routed, weight)


def apply(
    inputs: Num[Array, "t k"],
    kernel: QTensor,
    bias: Float[Array, "experts n"] | None,
    group_sizes: Integer[Array, " experts"],
    *,
    dtype: DTypeLike | None,
    implementation: str | None,
) -> Float[Array, "t n"]:
    """Multiplies every token by the matrix of its expert, and adds its bias.

    Args:
      inputs: Tokens sorted by expert.
      kernel: ``[experts, k, n]``.
      bias: ``[experts, n]`` or None.
      group_sizes: As in `qjax.ragged_matmul`.
      dtype: As in `dense.apply`.
      implementation: As in `qjax.matmul`.

    Returns:
      ``[t, n]``; rows without an expert are zero.
    """
    dtype = dense.computed_in(inputs, kernel, bias, dtype)
    inputs = jnp.asarray(inputs, dtype)
    y = ragged.ragged_matmul(inputs, kernel, group_sizes, implementation=implementation)
    if bias is None:
        return y
    expert, has_expert = blocks.experts_of(group_sizes, len(y))
    added = gathered(jnp.asarray(bias, dtype))[expert]
    return y + jnp.where(has_expert[:, None], added, 0)


def factored(
    a: Float[Array, "experts k rank"],
    b: Float[Array, "experts rank n"] | None,
    inputs: Num[Array, "t k"],
    group_sizes: Integer[Array, " experts"],
) -> Float[Array, "t n"]:
    """The product of the layers, were their kernel ``a @ b``.

    Args:
      a: ``[experts, k, rank]``.
      b: ``[experts, rank, n]`` of the dtype of ``a``; None where the kernel is ``a``.
      inputs: As in `apply`.
      group_sizes: As in `apply`.

    Returns:
      ``[t, n]`` in the dtype of ``a``.
    """
    sizes = group_sizes.astype(jnp.int32)
    low = lax.ragged_dot(jnp.asarray(inputs, a.dtype), a, sizes, precision="highest")
    return low if b is None else lax.ragged_dot(low, b, sizes, precision="highest")
