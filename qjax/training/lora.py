"""LoRA: a trained product of low rank beside a frozen quantized weight.

    y = x @ W + (alpha / rank) (x @ a) @ b,    a [k, rank], b [rank, n]

``b`` starts at zero, and so the layer as its base. `qjax.training.linen.LoRA` and
`qjax.training.nnx.LoRA` are the layers, over any quantized layer: its ``factored`` says
where ``a @ b`` goes. Here is what they share, and what becomes of the adapters when
training is done.

Source of the method: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
2021.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, he_uniform
from jaxtyping import Array, DTypeLike, Float

from qjax import ops
from qjax.meshes import explicitly_like
from qjax.tensor import QTensor, check_packed
from qjax.training.rounding import requantize

__all__ = ["add", "merge", "merge_quantized", "scaling", "start"]


def scaling(rank: int, alpha: float | int | None) -> float:
    """Returns ``alpha / rank``, or 1 where ``alpha`` is None.

    Args:
      rank: Columns of ``a``.
      alpha: LoRA's alpha.

    Raises:
      ValueError: If ``rank`` is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    return 1.0 if alpha is None else alpha / rank


def start(
    key: Array,
    shape: tuple[int, ...],
    rank: int,
    *,
    a_init: Initializer | None,
    b_init: Initializer,
    param_dtype: DTypeLike,
) -> tuple[Array, Array]:
    """Draws the adapters of a kernel.

    Args:
      key: Key for the initializers.
      shape: ``(*batch, k, n)``.
      rank: Columns of ``a``.
      a_init: Draws ``a``; None is `he_uniform` over k, as in Flax.
      b_init: Draws ``b``.
      param_dtype: Dtype of both.

    Returns:
      ``a`` ``[*batch, k, rank]`` and ``b`` ``[*batch, rank, n]``.
    """
    *batch, k, n = shape
    if a_init is None:
        a_init = he_uniform(batch_axis=tuple(range(len(batch))))
    for_a, for_b = jax.random.split(key)
    a = a_init(for_a, (*batch, k, rank), param_dtype)
    return a, b_init(for_b, (*batch, rank, n), param_dtype)


def add(
    y: Float[Array, "..."],
    factored: Callable[[Array, Array], Array],
    a: Float[Array, "*batch k rank"],
    b: Float[Array, "*batch rank n"],
    scaling: float,
) -> Float[Array, "..."]:
    """Adds what the adapters make of some inputs to what the base made, in its dtype.

    Args:
      y: Result of the base.
      factored: A function of adapters: the base's product of the inputs with ``a @ b``.
      a: ``[*batch, k, rank]``.
      b: ``[*batch, rank, n]``.
      scaling: What `scaling` returned.

    Returns:
      The sum, in the dtype of ``y``, and cut over devices as it.
    """
    delta = factored(a.astype(y.dtype), b.astype(y.dtype))
    return y + scaling * explicitly_like(delta, y)


def merge(
    w: QTensor,
    a: Float[Array, "*batch k rank"],
    b: Float[Array, "*batch rank n"],
    *,
    alpha: float | int | None = None,
) -> Float[Array, "*batch k n"]:
    """Merges adapters into the dense weight.

    Args:
      w: Weight of the base, stacked or not.
      a: Adapter ``[*batch, k, rank]``.
      b: Adapter ``[*batch, rank, n]``.
      alpha: LoRA's alpha; None for the rank.

    Returns:
      float32 ``[*batch, k, n]``; ``x`` times it is what the layer computes.

    Raises:
      TypeError: If ``w`` is no `QTensor`.
      ValueError: If ``a`` or ``b`` does not fit ``w``.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> merge(w, jnp.ones((32, 2)), jnp.zeros((2, 32))).shape
      (32, 32)
    """
    check_packed(w)
    return ops.dequantize(w, jnp.float32) + _delta(w, a, b, alpha)


def merge_quantized(
    w: QTensor,
    a: Float[Array, "*batch k rank"],
    b: Float[Array, "*batch rank n"],
    *,
    alpha: float | int | None = None,
) -> QTensor:
    """Merges adapters into a weight of the same format: bits, groups, order, layout.

    As `qjax.training.requantize` does it. The adapters are rounded as the weight was:
    what is smaller than half a step of it is lost, and a dense `merge` may serve
    better.

    Args:
      w: As in `merge`.
      a: As in `merge`.
      b: As in `merge`.
      alpha: As in `merge`.

    Returns:
      The new weight; scales and zeros that were encoded are plain.

    Raises:
      TypeError: If ``w`` is no `QTensor`.
      ValueError: If ``a`` or ``b`` does not fit ``w``.
      NotImplementedError: As `qjax.training.requantize`.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> merge_quantized(w, jnp.ones((32, 2)), jnp.ones((2, 32)))
      QTensor(32x32, 4 bits, group 32, Stream(), (q - z) * s, float32 scale, 672 B)
    """
    return requantize(w, merge(w, a, b, alpha=alpha))


def _delta(w: QTensor, a: Array, b: Array, alpha: float | int | None) -> Array:
    rank = a.shape[-1] if a.ndim else 0
    wanted = ((*w.batch, w.k, rank), (*w.batch, rank, w.n))
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"a.shape={a.shape} and b.shape={b.shape} must be {wanted[0]} and "
            f"{wanted[1]}, as w.shape={w.shape}."
        )
    wide = (a.astype(jnp.float32), b.astype(jnp.float32))
    return scaling(rank, alpha) * jnp.matmul(*wide, precision="highest")
