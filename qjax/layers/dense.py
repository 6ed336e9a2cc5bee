"""What linen and nnx layers share: a kernel's start, its checks, its product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, DTypeLike, Num

from qjax import ops, rtn
from qjax.bits import block
from qjax.tensor import QTensor, check_packed

# An `Initializer`, or a function of (key, shape, dtype) around one.
Draw = Callable[..., Array]

AXES = "[in_features, out_features]"


def start(
    kernel_init: Draw | None,
    key: Array,
    shape: tuple[int, ...],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    param_dtype: DTypeLike,
    rows: str = "in_features",
) -> QTensor:
    """Makes the kernel of a new layer, prepared for this device.

    Args:
      kernel_init: Draws the dense kernel that is quantized. None: all words and scales
        are zero, and no dense array exists.
      key: Key for ``kernel_init``.
      shape: (in_features, out_features), or a stack's (*batch, ...).
      bits: Width of a code.
      group_size: Rows that share a scale; None for one group a column.
      symmetric: Whether no zeros are stored.
      param_dtype: Dtype of the sample and of the scales.
      rows: What the layer calls the number of rows, for errors.

    Returns:
      The kernel.

    Raises:
      ValueError: If the arguments do not fit together.
    """
    _check_sizes(rows, shape[-2], bits, group_size, param_dtype)

    def pack(kernel: Array) -> QTensor:
        return ops.prepare(rtn.quantize(kernel, bits, group_size, symmetric))

    if kernel_init is None:
        abstract = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, param_dtype))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    sample = kernel_init(key, shape, param_dtype)
    check_sample("kernel_init", sample, shape)
    return pack(sample)


def starting(
    layer: Any,
    kernel_init: Draw | None,
    shape: tuple[int, ...],
    start: Callable[..., QTensor] = start,
) -> Callable[[Array], QTensor]:
    """Returns a function of a key that starts the kernel of a layer.

    Args:
      layer: Has ``bits``, ``group_size``, ``symmetric`` and ``param_dtype``.
      kernel_init: As in `start`.
      shape: As in `start`.
      start: Makes the kernel.
    """
    return lambda key: start(
        kernel_init,
        key,
        shape,
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.symmetric,
        param_dtype=layer.param_dtype,
    )


def check_sample(name: str, sample: Any, shape: tuple[int, ...]) -> None:
    """Checks what an initializer gave.

    Args:
      name: Name of the initializer.
      sample: What it gave.
      shape: The shape that was asked for.

    Raises:
      ValueError: If ``sample`` is no array of that shape.
    """
    if getattr(sample, "shape", None) != shape:
        hint = ""
        if isinstance(sample, meta.AxisMetadata | nnx.VariableMetadata):
            hint = (
                " That is an array in a box, as with_partitioning gives it; leave that "
                "out, and let qjax.shard cut the packed weight."
            )
        raise ValueError(
            f"{name} gave {type(sample).__name__} of shape "
            f"{getattr(sample, 'shape', None)}; it must give an array of shape {shape}."
            f"{hint}"
        )


def _check_sizes(
    name: str, rows: int, bits: int, group_size: int | None, param_dtype: DTypeLike
) -> None:
    bits, group_size = rtn.check_groups(bits, group_size)
    codes = block(bits)[0]
    if rows % codes:
        raise ValueError(
            f"{name}={rows} must be a multiple of {codes}, so that "
            f"{bits}-bit codes fill whole 32-bit words; choose other bits or pad the "
            "inputs."
        )
    if group_size is not None and rows % group_size:
        raise ValueError(
            f"{name}={rows} must be a multiple of group_size={group_size}; "
            "choose one that divides it, or None for one group a column."
        )
    if jnp.dtype(param_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"param_dtype={jnp.dtype(param_dtype)} must be bfloat16, float16 or "
            "float32."
        )


def check_shapes(
    kernel: QTensor,
    bias: Array | jax.ShapeDtypeStruct | None,
    shape: tuple[int, ...] | None = None,
    *,
    name: str = "kernel",
    axes: str = AXES,
    bias_shape: tuple[int, ...] | None = None,
) -> None:
    """Checks a kernel and its bias against each other and against a layer.

    Args:
      kernel: ``[*batch, k, n]`` kernel.
      bias: Its bias, or None.
      shape: The shape that the kernel must have, if any.
      name: What the layer calls the kernel, for errors.
      axes: What its two axes are, for errors.
      bias_shape: The shape that the bias must have; None for ``[*batch, n]``.

    Raises:
      TypeError: If the kernel is no `QTensor`.
      ValueError: Naming what has the wrong shape, and the right one.
    """
    check_packed(kernel, name)
    if shape is not None and kernel.shape != shape:
        hint = ""
        if kernel.shape[-2:] == shape[:-3:-1]:
            hint = f" It is transposed: kernels are {axes}."
        raise ValueError(
            f"{name}.shape={kernel.shape} must be {shape}, the layer's own.{hint}"
        )
    wanted = (*kernel.batch, kernel.n) if bias_shape is None else bias_shape
    if bias is not None and jnp.shape(bias) != wanted:
        raise ValueError(
            f"bias.shape={jnp.shape(bias)} must be {wanted}, as {name}.shape="
            f"{kernel.shape}."
        )


def computed_in(
    inputs: Num[Array, "..."],
    kernel: QTensor,
    bias: Array | None,
    dtype: DTypeLike | None,
) -> DTypeLike:
    """Finds the dtype in which Flax's own layers would compute.

    Args:
      inputs: Inputs of the layer.
      kernel: Its kernel, of which the dtype of the weight counts.
      bias: Its bias, or None.
      dtype: The dtype that the layer was made for; None promotes the three together.

    Returns:
      The dtype.
    """
    return canonicalize_dtype(inputs, np.zeros((), kernel.dtype), bias, dtype=dtype)


def apply(
    inputs: Num[Array, "*batch k"],
    kernel: QTensor,
    bias: Array | None,
    *,
    dtype: DTypeLike | None,
    implementation: str | None,
) -> Num[Array, "*batch n"]:
    """Computes ``inputs @ kernel + bias`` in the dtype that Flax's own layers take.

    Args:
      inputs: ``[..., k]``.
      kernel: ``[k, n]``; its scales are not cast.
      bias: ``[n]`` or None.
      dtype: Dtype of the computation; None promotes inputs, scales and bias together.
      implementation: As in `qjax.matmul`.

    Returns:
      ``[..., n]`` in that dtype.
    """
    dtype = computed_in(inputs, kernel, bias, dtype)
    inputs = jnp.asarray(inputs, dtype)
    y = ops.matmul(inputs, kernel, implementation=implementation)
    if bias is None:
        return y
    return y + jnp.asarray(bias, dtype).reshape((1,) * (y.ndim - 1) + (-1,))
