"""Shadow gradients of an nnx model: what its integer weights would get."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer, Num

from qjax.layers import experts
from qjax.layers.nnx import wrapped
from qjax.training import calls, shadow
from qjax.training.beside import Shadow
from qjax.training.nnx.layers import Layer, Matrix
from qjax.training.nnx.weights import check_paths, places, replaced


class Shadowed(nnx.Module):
    """A quantized layer whose integer weights have a gradient.

    `with_shadows` makes them, of a shadow that lives as long as a step.

    Args:
      base: The layer.
      shadow: Zeros of the shape of its weight, ``[*stack, k, n]``.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> Shadowed(layer, jnp.zeros((64, 8)))(jnp.ones((2, 64))).shape
      (2, 8)
    """

    def __init__(self, base: Layer, shadow: Float[Array, "*stack k n"]) -> None:
        self.base = base
        self.shadow = nnx.data(shadow)

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        """Applies the base.

        Args:
          *args: As of the base.
          **kwargs: As of the base.

        Returns:
          What the base gives.
        """
        base: Any = self.base
        y, inputs = base(*args, **kwargs), calls.inputs_of(base, args, kwargs)
        weight = nnx.as_pure(base.packed)
        if isinstance(base, Matrix):
            rows = jnp.asarray(inputs[0], y.dtype)
            return shadow.attach(y, rows, weight, self.shadow)
        product = lambda w, *inputs: base.factored(w, None, *inputs)  # noqa: E731
        return shadow.attach_by(product, y, inputs, weight, self.shadow)

    def attend(self, query: Num[Array, "*batch features"]) -> Float[Array, "..."]:
        """As `layers.nnx.Embed.attend`, which the base must have."""
        base: Any = self.base
        y = base.attend(query)
        rows = jnp.asarray(query, y.dtype)
        return shadow.attach(y, rows, base.embedding, self.shadow)

    def route(
        self,
        inputs: Num[Array, "t k"],
        expert: Integer[Array, "t top_k"],
        weight: Float[Array, "t top_k"],
    ) -> Float[Array, "t n"]:
        """As `layers.nnx.Experts.route`, which the base must have."""
        base: Any = self.base
        return experts.route(self, base.num_experts, inputs, expert, weight)


def with_shadows(model: nnx.Module, shadows: Mapping[str, Array]) -> Any:
    """Gives the integer weights of some layers a gradient.

    Args:
      model: The model, which stays as it is.
      shadows: What `shadow.zeros` makes of `kernels`, or of some of them.

    Returns:
      A model of the same Variables, to be called while the gradient of ``shadows`` is
      taken: by `nnx.grad` of a function that has the model as an argument, too. A
      function that closes over the model, as `jax.grad` needs it, can neither change
      Variables nor have `nnx.scan`, `nnx.remat` and the like in the model.

    Raises:
      ValueError: If there is no such weight.

    Example:
      >>> from flax import nnx
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> def loss(shadows, model):
      ...     return with_shadows(model, shadows)(jnp.ones((2, 64))).sum()
      >>> zeros = shadow.zeros(qjax.training.nnx.kernels(layer))
      >>> gradient = nnx.grad(loss)(zeros, layer)
      >>> gradient[""].shape
      (64, 8)
    """
    check_paths(shadows, places(model), "shadows")

    def change(module: Any, paths: dict[str, str]) -> Any:
        picked = {name: path for name, path in paths.items() if path in shadows}
        for name, path in picked.items():
            if isinstance(module, Layer):
                return Shadowed(module, shadows[path])
            wrapped.put_beside(module, name, Shadow(zeros=shadows[path]))
        return module

    return replaced(model, change)
