"""The shadow gradient: what the integer weights of a product would get.

Integers have no gradient. A product ``y = x @ W`` is therefore given one more argument,
a float array of zeros as large as the weight, that nobody reads: its cotangent is that
of the dense weight,

    dW = (x * input_scale).T @ dy

with the rows in the order of the inputs. `qjax.training.apply_updates` moves the codes
along it. Zeros that are made inside the compiled function take no memory: only the
gradient does, and it is the one dense array that training the weights needs.

Source of the idea, called the privileged gradient there: GreenBitAI/bitorch-engine,
bitorch_engine/layers/qlinear/nbit/cuda/mbwq_layer.py, commit
0009b1f8178e86df6433383879c0005a49c0cc92.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from qjax import ops
from qjax.meshes import vary_together
from qjax.tensor import QTensor


def zeros(tree: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """Makes the shadow of every `QTensor` of a tree.

    Args:
      tree: Any pytree that holds some; abstract ones will do.
      dtype: Dtype of the gradients to come.

    Returns:
      The same tree with zeros ``[*batch, k, n]`` for each tensor, and None for all
      else.

    Example:
      >>> w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> jax.tree.map(jnp.shape, zeros({"kernel": w, "bias": jnp.ones(8)}))
      {'bias': None, 'kernel': (64, 8)}
    """
    is_qtensor = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, dtype) if is_qtensor(leaf) else None,
        tree,
        is_leaf=is_qtensor,
    )


def matmul(
    x: Float[Array, "*batch k"],
    w: QTensor,
    shadow: Float[Array, "k n"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """`qjax.matmul`, and the gradient of the integer weights for ``shadow``.

    Args:
      x: As in `qjax.matmul`.
      w: As in `qjax.matmul`.
      shadow: ``[k, n]`` zeros, of which only shape and dtype count.
      implementation: As in `qjax.matmul`.

    Returns:
      ``qjax.matmul(x, w)``, bit for bit. The cotangent of ``shadow`` is
      ``(x * input_scale).T @ dy``, the product accumulated in float32.

    Raises:
      ValueError: As `qjax.matmul`; or if ``shadow`` has another shape than ``w``.

    Example:
      >>> w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> x = jnp.ones((2, 64))
      >>> gradient = jax.grad(lambda shadow: matmul(x, w, shadow).sum())
      >>> float(gradient(zeros(w))[0, 0])
      2.0
    """
    y = ops.matmul(x, w, implementation=implementation)
    return attach(y, x, w, shadow)


def attach(
    y: Float[Array, "*batch n"],
    x: Float[Array, "*batch k"],
    w: QTensor,
    shadow: Float[Array, "k n"],
) -> Float[Array, "*batch n"]:
    """Gives a product that was computed elsewhere its shadow.

    Args:
      y: ``[..., n]``, the product of ``x`` and ``w``, with or without a bias.
      x: ``[..., k]``.
      w: ``[k, n]``.
      shadow: As in `matmul`.

    Returns:
      ``y``.

    Raises:
      ValueError: If ``shadow`` is not of the shape of ``w``, or not float.
    """
    _check(w, shadow)
    x = jax.lax.stop_gradient(x)
    if w.input_scale is not None:
        scale = jax.lax.stop_gradient(w.input_scale).astype(x.dtype)
        x = x * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    y, shadow = vary_together(y, shadow)
    return _attach(y, x, shadow)


def attach_by(
    product: Callable[..., Array],
    y: Float[Array, "..."],
    inputs: tuple[Array, ...],
    w: QTensor,
    shadow: Float[Array, "*stack k n"],
) -> Float[Array, "..."]:
    """Gives the result of any layer that is linear in its weight a shadow.

    Args:
      product: Of a dense weight ``[*stack, k, n]`` and the inputs, what the layer makes
        of them without bias and input scale. It is transposed, and never called.
      y: What the layer has made of them.
      inputs: Of the layer.
      w: ``[*stack, k, n]``.
      shadow: As in `matmul`.

    Returns:
      ``y``.

    Raises:
      ValueError: As `attach`.
    """
    _check(w, shadow)
    inputs = jax.tree.map(jax.lax.stop_gradient, inputs)
    scale = w.input_scale
    if scale is not None:
        scale = jax.lax.stop_gradient(scale).astype(jnp.float32)
    y, shadow = vary_together(y, shadow)
    return _attach_by(product, shadow.shape, y, inputs, scale, shadow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach_by(
    product: Callable[..., Array],
    shape: tuple[int, ...],
    y: Array,
    inputs: tuple[Array, ...],
    scale: Array | None,
    shadow: Array,
) -> Array:
    del product, shape, inputs, scale, shadow
    return y


def _forward_by(
    product: Callable[..., Array],
    shape: tuple[int, ...],
    y: Array,
    inputs: tuple[Array, ...],
    scale: Array | None,
    shadow: Array,
) -> tuple[Array, tuple]:
    return y, (inputs, scale, jnp.zeros_like(shadow, shape=(0,)))


def _backward_by(
    product: Callable[..., Array],
    shape: tuple[int, ...],
    residuals: tuple,
    dy: Array,
) -> tuple:
    inputs, scale, empty = residuals
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    transposed = jax.linear_transpose(lambda w: product(w, *inputs), weight)
    (dw,) = transposed(dy.astype(jnp.float32))
    if scale is not None:
        dw = dw * scale[..., None]
    return dy, *_no_cotangent((inputs, scale)), dw.astype(empty.dtype)


def _no_cotangent(tree: Any) -> Any:
    def zeros(leaf: Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zeros, tree)


_attach_by.defvjp(_forward_by, _backward_by)


def _check(w: QTensor, shadow: Array) -> None:
    if shadow.shape != w.shape or not jnp.issubdtype(shadow.dtype, jnp.floating):
        raise ValueError(
            f"shadow must be float {w.shape}, as w; got {shadow.dtype}{shadow.shape}. "
            "qjax.training.shadow.zeros(w) makes one."
        )


# y = x W + ..., so dW = x^T dy; y itself passes through, and so does its cotangent.
@jax.custom_vjp
def _attach(y: Array, x: Array, shadow: Array) -> Array:
    del x, shadow
    return y


def _forward(y: Array, x: Array, shadow: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the shadow only the dtype is kept, in an array of no elements.
    return y, (x, jnp.zeros_like(shadow, shape=(0,)))


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    x, empty = residuals
    dtype = x.dtype if x.dtype == dy.dtype else jnp.float32
    dw = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]).astype(dtype),
        dy.reshape(-1, dy.shape[-1]).astype(dtype),
        (((0,), (0,)), ((), ())),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return dy, jnp.zeros_like(x), dw.astype(empty.dtype)


_attach.defvjp(_forward, _backward)
