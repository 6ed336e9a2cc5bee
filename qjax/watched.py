"""Weights that see what they are multiplied by, which is what calibration asks for.

The gram ``x.T @ x`` of all inputs x of a weight comes out of a program as a gradient
does: of a leaf that no product reads, and whose cotangent is the gram of the inputs,
whatever the cotangent of the outputs. So it finds its way out of whatever JAX can
differentiate, and sums up as gradients do: over uses, over steps of a scan, and into
the matrices of a stack. Nothing else of the program changes, its other gradients
included.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from qjax.meshes import vary_together, whole
from qjax.tensor import QTensor, position


@jax.tree_util.register_dataclass
@typing.no_type_check  # As of a QTensor.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Watched(QTensor):
    """A weight whose products tell of their inputs.

    Attributes:
      gram: float32 ``[*batch, k, k]``. No value of it counts; its gradient is the sum
        of ``x.T @ x`` over the products ``x @ W`` on which the differentiated value
        depends. Products with the transpose and lookups add nothing.
    """

    gram: Any = None


def watch(w: QTensor, gram: Any) -> Watched:
    """Makes a weight that is watched of any other.

    Args:
      w: The weight.
      gram: Its leaf ``gram``; like any leaf, it may be something else than an array.
    """
    return Watched(**_fields(w), gram=gram)


def bare(w: QTensor) -> QTensor:
    """Inverse of `watch`; of any other weight the weight itself."""
    return QTensor(**_fields(w)) if isinstance(w, Watched) else w


def _fields(w: QTensor) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(QTensor)]
    return {name: getattr(w, name) for name in names}


def see(
    x: Float[Array, "*rows k"], w: Watched, index: int | Integer[Array, ""] | None
) -> tuple[Array, QTensor]:
    """Returns the operands of a product, of which the first tells of itself.

    Args:
      x: As `qjax.matmul` takes it.
      w: As well.
      index: As well.

    Returns:
      ``x`` and the bare weight, for the product.
    """
    gram = w.gram
    if index is not None:
        gram = whole(gram)[position(index, len(gram))]
    return _seen(*vary_together(jnp.asarray(x), gram)), bare(w)


@jax.custom_vjp
def _seen(x: Array, gram: Array) -> Array:
    """``x``; the cotangent of ``gram`` is that of ``x``."""
    return x


def _forward(x: Array, gram: Array) -> tuple[Array, Array]:
    # Seen once more by whoever differentiates a derivative.
    return _seen(x, gram), x


def _backward(x: Array, dx: Array) -> tuple[Array, Array]:
    return dx, outer(whole(x))


_seen.defvjp(_forward, _backward)


def outer(x: Float[Array, "*rows k"]) -> Float[Array, "k k"]:
    """Computes the gram of rows: ``x.T @ x`` in float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest")
