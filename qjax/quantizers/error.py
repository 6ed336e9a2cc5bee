"""What a quantization costs the outputs of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import ops, tensor, watched
from qjax.meshes import whole
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
    return _gram(whole(jnp.asarray(x)))


_gram = jax.jit(watched.outer)


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
      float32 ``norm(x @ packed - x @ w) / norm(x @ w)``, Frobenius norms; 0 where
      nothing is lost, and not finite where either is not.

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
    if gram is not None:
        check_gram(w, gram)
    return _output_error(
        jnp.asarray(w), packed, None if gram is None else jnp.asarray(gram)
    )


@jax.jit
def _output_error(w: Array, packed: QTensor, gram: Array | None) -> Array:
    w = w.astype(jnp.float32)
    off = ops.dequantize(packed, jnp.float32) - w
    seen = None if gram is None else gram.astype(jnp.float32)
    lost, all_ = energy(off, seen), energy(w, seen)
    return jnp.sqrt(jnp.where(lost == 0, 0, lost / all_))


def energy(
    w: Float[Array, "*batch k n"], gram: Float[Array, "*batch k k"] | None
) -> Float[Array, "*batch"]:
    """The sum of squares of ``x @ w``, of all inputs that a gram is of."""
    if gram is None:
        return (w**2).sum((-2, -1))
    squares = (w * jnp.matmul(gram, w, precision="highest")).sum((-2, -1))
    # Rounding may leave a little less than nothing.
    return jnp.maximum(squares, 0)


def check_gram(w: Array | np.ndarray, gram: Array | np.ndarray) -> None:
    """Checks that a gram is one of inputs of a weight.

    Args:
      w: ``[*batch, k, n]``.
      gram: The gram.

    Raises:
      TypeError: If ``gram`` is no array.
      ValueError: If ``gram`` is not float ``[*batch, k, k]``.
    """
    tensor.check_array(gram, "gram")
    wanted = (*w.shape[:-1], w.shape[-2])
    if gram.shape != wanted or not jnp.issubdtype(gram.dtype, jnp.floating):
        raise ValueError(
            f"gram is {gram.dtype}{gram.shape} and must be float{wanted}, the sum of "
            "x.T @ x over inputs x [m, k]; quantizers.gram(x) computes it."
        )
