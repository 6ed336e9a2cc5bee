"""Convolutions that are products, as their windows do not overlap.

A convolution with a kernel of one pixel is a product, and so is one that cuts images
into patches: every number of its input is in one window at most, so that the windows
are the input, reshaped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from qjax.layers.tracing.held import Held
from qjax.layers.tracing.products import product


def is_product(params: Mapping[str, Any], x: Sequence[int], w: Sequence[int]) -> bool:
    """Returns whether a convolution is a product of windows and a matrix.

    Args:
      params: Parameters of JAX's operation.
      x: Shape of its input.
      w: Shape of its kernel.
    """
    grouped = (params["feature_group_count"], params["batch_group_count"]) != (1, 1)
    if grouped or params.get("out_sharding") is not None:
        return False
    kernel = _windows(params, w)
    padded = _padded(params, x)
    sizes = [padded[axis] for axis in params["dimension_numbers"].lhs_spec[2:]]
    counts = _counts(params, sizes, kernel)
    return all(
        window == 1 or (dilation == 1 and (count == 1 or stride >= window))
        for window, dilation, count, stride in zip(
            kernel,
            params["rhs_dilation"],
            counts,
            params["window_strides"],
            strict=True,
        )
    )


def convolve(x: Array, held: Held, params: Mapping[str, Any]) -> Array | None:
    """Computes a convolution with a packed kernel, or None if it is no product."""
    if not is_product(params, x.shape, held.view.shape):
        return None
    numbers = params["dimension_numbers"]
    batch, feature, *spatial = numbers.lhs_spec
    kernel = _windows(params, held.view.shape)
    x = _pad(x, _padding(params)).transpose(batch, *spatial, feature)
    counts = _counts(params, x.shape[1:-1], kernel)
    places = zip(counts, params["window_strides"], kernel, strict=True)
    for i, (count, stride, window) in enumerate(places):
        x = _cut(x, 1 + 2 * i, count, stride if count > 1 else window, window)
    # The batch, count and window by turns, and the features.
    summed = (*range(2, x.ndim - 1, 2), x.ndim - 1)
    _, w_feature, *w_spatial = numbers.rhs_spec
    y = product(
        held,
        x,
        ((summed, (*w_spatial, w_feature)), ((), ())),
        x_first=True,
        dtype=params["preferred_element_type"] or x.dtype,
    )
    if y is None:
        return None
    # The batch, the counts, and the features.
    batch, feature, *spatial = numbers.out_spec
    places = (batch, *spatial, feature)
    return y.transpose([places.index(axis) for axis in range(y.ndim)])


def _windows(params: Mapping[str, Any], w: Sequence[int]) -> list[int]:
    """Sizes of the kernel along the axes of the image."""
    return [w[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]


def _padding(params: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """What is put around, and between, the numbers of the input, by axis."""
    padding = [(0, 0, 0)] * len(params["dimension_numbers"].lhs_spec)
    for axis, (low, high), dilation in zip(
        params["dimension_numbers"].lhs_spec[2:],
        params["padding"],
        params["lhs_dilation"],
        strict=True,
    ):
        padding[axis] = (low, high, dilation - 1)
    return padding


def _padded(params: Mapping[str, Any], x: Sequence[int]) -> list[int]:
    """Shape of the padded input."""
    return [
        low + size + max(size - 1, 0) * between + high
        for size, (low, high, between) in zip(x, _padding(params), strict=True)
    ]


def _counts(
    params: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int]
) -> list[int]:
    """How many windows there are along the axes of the image, if none is dilated."""
    return [
        max(0, (size - window) // stride + 1)
        for size, window, stride in zip(
            sizes, kernel, params["window_strides"], strict=True
        )
    ]


def _cut(x: Array, axis: int, count: int, stride: int, window: int) -> Array:
    """Cuts an axis into ``count`` and ``window``."""
    # The last window may end before another would start, or after it.
    more = count * stride - x.shape[axis]
    x = _pad(x, [(0, more if i == axis else 0, 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], count, stride, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(x, 0, window, axis=axis + 1) if window < stride else x


def _pad(x: Array, padding: Sequence[tuple[int, int, int]]) -> Array:
    """Puts zeros around and between numbers, or takes some away at the ends."""
    return jax.lax.pad(x, x.dtype.type(0), padding) if np.any(padding) else x
