"""Shadow gradients of a linen model: what its integer weights would get."""

from collections.abc import Callable
from typing import Any

from qjax.training.beside import Shadow
from qjax.training.linen.weights import accompanied

SHADOW = "shadow"


def shadowed(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a model's ``apply`` take a collection "shadow" beside the others.

    Args:
      apply: The ``apply`` of a module with quantized layers, or of one that
        `qjax.quantize_model` made.

    Returns:
      The same function, of variables that may hold "shadow": what `shadow.zeros` makes
      of `layers.linen.to_params`, or of a part of it. Its gradient is that of the
      integer weights, zero for one that the call does not use. It raises a ValueError
      if there is a shadow of no packed weight.
      Lifted transformations such as `nn.scan` need not know of the collection: shadows
      go with "quantized".

    Example:
      >>> kernel = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> variables = qjax.layers.linen.to_variables({"kernel": kernel})
      >>> apply = shadowed(qjax.layers.linen.Dense(8, use_bias=False).apply)
      >>> def loss(shadow):
      ...     return apply({**variables, "shadow": shadow}, jnp.ones((2, 64))).sum()
      >>> gradient = jax.grad(loss)(qjax.training.shadow.zeros({"kernel": kernel}))
      >>> gradient["kernel"].shape, float(gradient["kernel"][0, 0])
      ((64, 8), 2.0)
    """
    return accompanied(apply, SHADOW, lambda zeros: Shadow(zeros=zeros))
