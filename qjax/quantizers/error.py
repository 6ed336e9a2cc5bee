"""What a quantization costs the outputs of a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import ops, tensor
from qjax.tensor import QTensor


def gram(x: Float[Array | np.ndarray, "*batch k"]) -> Float[Array, "k k"]:
    """Sums the outer products of inputs with themselves.

    It is all that `gptq` has to know of the inputs of a layer; grams of batches add up.

    Args:
      x: Inputs, any number of rows.

    Returns:
      float32 ``x.T @ x``.

    Raises:
      ValueError: If ``x`` is not float, or has no axis.

    Example:
      >>> gram(jnp.ones((8, 3, 2)))
      Array([[24., 24.],
             [24., 24.]], dtype=float32)
    """
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be float [..., k]; got {x.dtype}{x.shape}.")
    return _gram(jnp.asarray(x))


@jax.jit
def _gram(x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest")


def output_error(
    w: Float[Array | np.ndarray, "*batch k n"],
    packed: QTensor,
    gram: Float[Array | np.ndarray, "*batch k k"] | None = None,
) -> Float[Array, "*batch"]:
    """Computes the relative error of ``x @ packed`` against ``x @ w``.

    Args:
      w: The dense weight.
      packed: The same, quantized.
      gram: As `gram` computes it of x; None for inputs that have nothing to do with
        each other and are all alike: then it is the error of the weight.

    Returns:
      float32 ``norm(x @ packed - x @ w) / norm(x @ w)``, Frobenius norms; 0 where both
      are 0.

    Raises:
      TypeError: If ``packed`` is no `QTensor`.
      ValueError: If the shapes do not fit.

    Example:
      >>> w = jnp.eye(32)
      >>> bool(output_error(w, qjax.quantize(w, bits=4, group_size=32)) < 1e-6)
      True
    """
    tensor.check_packed(packed, "packed")
    if packed.shape != w.shape:
        raise ValueError(f"packed.shape={packed.shape} must be w.shape={w.shape}.")
    if gram is not None and gram.shape != (*w.shape[:-1], w.shape[-2]):
        raise ValueError(
            f"gram.shape={gram.shape} must be {(*w.shape[:-1], w.shape[-2])}, as "
            f"w.shape={w.shape}."
        )
    return _output_error(
        jnp.asarray(w), packed, None if gram is None else jnp.asarray(gram)
    )


@jax.jit
def _output_error(w: Array, packed: QTensor, gram: Array | None) -> Array:
    w = w.astype(jnp.float32)
    off = ops.dequantize(packed, jnp.float32) - w

    def energy(of: Array) -> Array:
        if gram is None:
            return (of**2).sum((-2, -1))
        product = functools.partial(jnp.matmul, precision="highest")
        # Rounding may leave a little less than nothing.
        seen = (of * product(gram.astype(jnp.float32), of)).sum((-2, -1))
        return jnp.maximum(seen, 0)

    lost, whole = energy(off), energy(w)
    return jnp.sqrt(jnp.where(lost > 0, lost / whole, 0))
