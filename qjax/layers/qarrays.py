"""Arrays that qwix quantized, as `QTensor`s of the same codes.

A `QArray` is known by its fields (qvalue, scale, zero_point); qwix is not imported. Its
scale has the axes of the array, each a divisor of the array's.

Source: google/qwix, qwix/_src/core/qarray.py, version 0.1.8.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax import ops, tensor, xla
from qjax.bits import block
from qjax.layers.tracing.views import Form
from qjax.tensor import Affine, QTensor, Segment


def is_qarray(value: Any) -> bool:
    """Whether a value is a `QArray`, or qwix's box of one."""
    value = unboxed(value)
    return all(hasattr(value, name) for name in ("qvalue", "scale", "zero_point"))


def unboxed(value: Any) -> Any:
    """Takes a `QArray` out of the box (`WithAux`) in which qwix keeps weights."""
    inner = getattr(value, "array", None)
    return inner if hasattr(inner, "qvalue") else value


def _width(array: Any) -> int | None:
    """Bits of the codes, or None if they are no integers."""
    dtype = jnp.dtype(array.qvalue.dtype)
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        return None
    return jnp.iinfo(dtype).bits


def _group(array: Any, form: Form) -> int | None:
    """Rows that share a scale; 0 if they are not neighbours, None for all of them."""
    outer = array.qvalue.ndim - len(form.shape)
    sizes = [form.shape[axis] for axis in form.rows]
    scales = [array.scale.shape[outer + axis] for axis in form.rows]
    # From the fastest axis: whole axes in one group, a part of one, then single steps.
    group, split = 1, False
    for size, count in zip(reversed(sizes), reversed(scales), strict=True):
        if split and count != size:
            return 0
        group *= size // count
        split = split or count > 1
    return group if split else None


def unfit(array: Any, form: Form) -> str | None:
    """Returns why a `QArray` is no `QTensor` of that form, or None if it is one."""
    array = unboxed(array)
    width = _width(array)
    if width is None or not 2 <= width <= 8:
        return f"its qvalue is {array.qvalue.dtype}, no signed integer of 2 to 8 bits"
    if form.k % block(width)[0]:
        return f"k={form.k} is no multiple of {block(width)[0]}"
    if _group(array, form) == 0:
        return f"its scale {array.scale.shape} has groups that are no runs of rows"
    return None


def to_qtensor(array: Any, form: Form) -> QTensor:
    """Turns a `QArray` into a `QTensor` of the same codes, prepared for this device.

    Args:
      array: The `QArray`, or qwix's box of one.
      form: How the array is flattened.

    Returns:
      ``[*outer, *stack, k, n]`` that dequantizes to ``(qvalue - zero_point) * scale``.

    Raises:
      ValueError: If there is none, with the reason.
    """
    array = unboxed(array)
    if reason := unfit(array, form):
        raise ValueError(f"array.shape={array.qvalue.shape}: {reason}.")
    width, group = _width(array), _group(array, form)
    assert width is not None
    middle = 2 ** (width - 1)
    codes = form.matrix(array.qvalue.astype(jnp.int32) + middle).astype(jnp.uint8)
    words = _pack(codes, width)
    counts = form.k // (group or form.k)
    scale = _flat(array.scale, array, form, counts)
    zero = array.zero_point
    if zero is not None:
        zero = _flat(zero, array, form, counts).astype(jnp.float32) + middle
        zero = zero.astype(scale.dtype)
    return ops.prepare(
        tensor.build(
            [words],
            scale,
            zero,
            layout=xla.NATIVE,
            segments=[Segment(width, group)],
            affine=Affine.CENTERED if zero is None else Affine.ZERO,
        )
    )


def _pack(codes: Array, width: int) -> Array:
    def pack(codes: Array) -> Array:
        return xla.NATIVE.pack(codes, width)

    for _ in codes.shape[:-2]:
        pack = jax.vmap(pack)
    return pack(codes)


def _flat(parameter: Array, array: Any, form: Form, counts: int) -> Array:
    """Scales or zeros as ``[*outer, *stack, groups, n]``."""
    shape = array.qvalue.shape
    outer = len(shape) - len(form.shape)
    rows = {outer + axis for axis in form.rows}
    for axis, size in enumerate(shape):
        if axis not in rows and parameter.shape[axis] != size:
            factor = size // parameter.shape[axis]
            parameter = jnp.repeat(parameter, factor, axis=axis)
    own = tuple(parameter.shape[outer:])
    flat = Form(own, form.rows, form.columns).matrix(parameter)
    found = math.prod(parameter.shape[axis] for axis in rows)
    assert flat.shape[-2] == found
    return flat if found == counts else jnp.repeat(flat, counts // found, axis=-2)
