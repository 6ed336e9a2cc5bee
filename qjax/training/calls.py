"""What a call of a layer gives to its product."""

import inspect
from collections.abc import Mapping
from typing import Any


def inputs_of(
    layer: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: str = "__call__",
) -> tuple[Any, ...]:
    """Finds the inputs among the arguments of a call, whatever way they were passed.

    Args:
      layer: A quantized layer. The first arguments of a call, as many as its
        ``factored`` takes beside the factors, are inputs; others, such as a sharding,
        say what becomes of the product.
      args: What the layer is called with.
      kwargs: More of it, by name.
      method: What of the layer is called.

    Returns:
      The inputs, in the order of ``factored``.

    Raises:
      TypeError: If the layer cannot be called so.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> inputs_of(layer, (), {"out_sharding": None, "inputs": 1})
      (1,)
    """
    count = len(inspect.signature(layer.factored).parameters) - len(("a", "b"))
    return inspect.signature(getattr(layer, method)).bind(*args, **kwargs).args[:count]
