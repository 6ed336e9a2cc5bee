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
from jax.sharding import NamedSharding
from jaxtyping import Array, DTypeLike, Float

from qjax import ops
from qjax.meshes import automatically, is_explicit, mesh_of, vary_together
from qjax.sharding import cut_as, dense_names
from qjax.tensor import QTensor


def zeros(tree: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """Makes the shadow of every `QTensor` of a tree.

    Args:
      tree: Any pytree that holds some; abstract ones will do.
      dtype: Dtype of the gradients to come.

    Returns:
      The same tree with zeros ``[*batch, k, n]`` for each tensor, and None for all
      else. Where mesh axes are explicit, zeros are cut as their tensor: a gradient has
      the type of what it is of.

    Example:
      >>> w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> jax.tree.map(jnp.shape, zeros({"kernel": w, "bias": jnp.ones(8)}))
      {'bias': None, 'kernel': (64, 8)}
    """
    is_qtensor = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: _zeros(leaf, dtype) if is_qtensor(leaf) else None,
        tree,
        is_leaf=is_qtensor,
    )


def _zeros(w: QTensor, dtype: DTypeLike) -> Array:
    if not is_explicit(w):
        return jnp.zeros(w.shape, dtype)

    @jax.jit
    def cut(w: QTensor) -> Array:
        spec = cut_as(w, dense_names(w))
        place = NamedSharding(mesh_of(w), spec)
        return jax.sharding.reshard(jnp.zeros(w.shape, dtype), place)

    return cut(w)


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
    return _attached(_outer, y, (x,), w, shadow)


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
    gradient = functools.partial(_transposed, product, w.shape)
    return _attached(gradient, y, inputs, w, shadow)


def _attached(
    gradient: Callable[..., Array],
    y: Array,
    inputs: tuple[Array, ...],
    w: QTensor,
    shadow: Array,
) -> Array:
    """Checks a shadow, and gives it to a product whose gradient is known."""
    _check(w, shadow)
    inputs, scale = jax.lax.stop_gradient((inputs, w.input_scale))
    if scale is not None:
        scale = scale.astype(jnp.float32)
    y, shadow = vary_together(y, shadow)
    return _attach(gradient, jax.typeof(shadow), y, inputs, scale, shadow)


# y = (s x) W + ..., so dW = s x^T dy, or what another linear layer has; y itself passes
# through, and so does its cotangent. Of the shadow only the type is kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(
    gradient: Callable[..., Array],
    like: Any,
    y: Array,
    inputs: tuple[Array, ...],
    scale: Array | None,
    shadow: Array,
) -> Array:
    del gradient, like, inputs, scale, shadow
    return y


def _forward(
    gradient: Callable[..., Array],
    like: Any,
    y: Array,
    inputs: tuple[Array, ...],
    scale: Array | None,
    shadow: Array,
) -> tuple[Array, tuple]:
    del gradient, like, shadow
    return y, (inputs, scale)


def _backward(
    gradient: Callable[..., Array], like: Any, residuals: tuple, dy: Array
) -> tuple:
    def in_its_type(inputs: tuple[Array, ...], scale: Array | None, dy: Array) -> Array:
        dw = gradient(inputs, dy)
        # Here, as 16 bits may not hold the scaled inputs.
        dw = dw if scale is None else dw * scale[..., None]
        return dw.astype(like.dtype)

    dw = automatically(in_its_type, *residuals, dy, specs=lambda _: like.sharding.spec)
    return dy, *_no_cotangent(residuals), dw


_attach.defvjp(_forward, _backward)


def _outer(inputs: tuple[Array], dy: Array) -> Array:
    (x,) = inputs
    dtype = x.dtype if x.dtype == dy.dtype else jnp.float32
    return jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]).astype(dtype),
        dy.reshape(-1, dy.shape[-1]).astype(dtype),
        (((0,), (0,)), ((), ())),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def _transposed(
    product: Callable[..., Array],
    shape: tuple[int, ...],
    inputs: tuple[Array, ...],
    dy: Array,
) -> Array:
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    transposed = jax.linear_transpose(lambda w: product(w, *inputs), weight)
    (dw,) = transposed(dy.astype(jnp.float32))
    return dw


def _no_cotangent(tree: Any) -> Any:
    def zeros(leaf: Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zeros, tree)


def _check(w: QTensor, shadow: Array) -> None:
    if shadow.shape != w.shape or not jnp.issubdtype(shadow.dtype, jnp.floating):
        raise ValueError(
            f"shadow must be float {w.shape}, as w; got {shadow.dtype}{shadow.shape}. "
            "qjax.training.shadow.zeros(w) makes one."
        )
