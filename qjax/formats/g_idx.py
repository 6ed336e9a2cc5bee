"""Act-order: ``g_idx``, the group of each input, as GPTQ's family of files says it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from qjax import tensor
from qjax.tensor import QTensor


def read_g_idx(
    g_idx: Any, group_size: int | None, groups: int
) -> Int32[Array, " k"] | None:
    """Reads the group of each row, which `QTensor.row_group` holds.

    Args:
      g_idx: Concrete int32 ``[k]``, or None.
      group_size: Rows that share a scale; None for all.
      groups: How many groups there are.

    Returns:
      The indices, or None where they are simply ``row // group_size``.

    Raises:
      ValueError: If one is out of range.

    Example:
      >>> read_g_idx(np.array([0, 0, 1, 1]), 2, 2) is None
      True
    """
    if g_idx is None:
        return None
    index = np.asarray(g_idx)
    if index.min() < 0 or index.max() >= groups:
        raise ValueError(
            f"g_idx from {index.min()} to {index.max()} must lie in 0 to {groups - 1}, "
            f"as there are {groups} groups."
        )
    runs = np.arange(index.size) // (group_size or index.size)
    return None if np.array_equal(index, runs) else jnp.asarray(index)


def in_input_order(qt: QTensor) -> tuple[UInt8[Array, "k n"], Int32[Array, " k"]]:
    """Unpacks a matrix of one segment, its rows in the order of the inputs.

    Args:
      qt: One matrix with groups of rows.

    Returns:
      The codes, and the group of each row.
    """
    q, g_idx = tensor.codes(qt), qt.row_group
    if g_idx is None:
        g_idx = jnp.arange(qt.k, dtype=jnp.int32) // (qt.segments[0].group_size or qt.k)
    if qt.order is None:
        return q, g_idx
    inverse = jnp.argsort(qt.order)
    return q[inverse], g_idx[inverse]
