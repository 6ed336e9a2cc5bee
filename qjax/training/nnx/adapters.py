"""LoRA beside the packed weights of an nnx model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax.layers import contraction, experts
from qjax.layers.nnx import wrapped
from qjax.layers.nnx.packed import cut_of, variables
from qjax.tensor import QTensor
from qjax.training import calls, lora
from qjax.training.beside import Adapters
from qjax.training.nnx.layers import Layer
from qjax.training.nnx.weights import places, replaced


class LoRA(nnx.Module):
    """LoRA beside any quantized layer.

    Example:
      Only the adapters, `nnx.LoRAParam`, are trained, and only they have a state in the
      optimizer.

      >>> from flax import nnx
      >>> base = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> layer = LoRA(base, 2, alpha=4, rngs=nnx.Rngs(0))
      >>> wrt = nnx.DiffState(0, nnx.LoRAParam)
      >>> loss = lambda layer: (layer(jnp.ones((2, 64))) ** 2).mean()
      >>> sorted(nnx.grad(loss, argnums=wrt)(layer))
      ['a', 'b']

      Of a stack, each matrix has adapters of its own.

      >>> experts = qjax.layers.nnx.Experts(4, 64, 8, group_size=32)
      >>> layer = LoRA(experts, 2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 64)), jnp.array([2, 0, 0, 1])).shape, layer.a.shape
      ((3, 8), (4, 64, 2))

    Args:
      base: The layer that is adapted, one of `layers.nnx`, stacked or not.
      rank: Columns of ``a``.
      alpha: The adapters' product counts ``alpha / rank`` times (default: None, once).
      param_dtype: Dtype of the adapters (default: float32).
      a_init: Initializer of ``a`` (default: None, he_uniform over the inputs).
      b_init: Initializer of ``b`` (default: zeros).
      rngs: Random keys.

    Raises:
      TypeError: If ``base`` is no quantized layer.
      ValueError: If ``rank`` is not positive.

    Attributes:
      base: The layer that is adapted.
      a: ``[*stack, k, rank]`` for the base's weight ``[*stack, k, n]``, an
        `nnx.LoRAParam`.
      b: ``[*stack, rank, n]``, an `nnx.LoRAParam`.
    """

    def __init__(
        self,
        base: Layer,
        rank: int,
        *,
        alpha: float | int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        a_init: Initializer | None = None,
        b_init: Initializer = zeros,
        rngs: nnx.Rngs,
    ) -> None:
        if not isinstance(base, Layer):
            raise TypeError(
                f"base is {type(base).__module__}.{type(base).__name__}, and must be a "
                "quantized layer of layers.nnx; add_lora adapts whole models."
            )
        self.base: Any = base  # which methods there are, its class says
        self.rank = rank
        self.alpha = alpha
        self.scaling = lora.scaling(rank, alpha)
        a, b = lora.start(
            rngs.params(),
            self.weight.shape,
            rank,
            a_init=a_init,
            b_init=b_init,
            param_dtype=param_dtype,
        )
        self.a, self.b = nnx.LoRAParam(a), nnx.LoRAParam(b)

    @property
    def weight(self) -> QTensor:
        """The quantized weight of the base."""
        return nnx.as_pure(self.base.packed)

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        """Applies the base, and adds the adapters' product.

        Args:
          *args: What the base takes.
          **kwargs: What the base takes by name.

        Returns:
          What the base returns, of the same shape, dtype and sharding.
        """
        inputs = calls.inputs_of(self.base, args, kwargs)
        return self._add(
            self.base(*args, **kwargs), lambda a, b: self.base.factored(a, b, *inputs)
        )

    def attend(self, query: Num[Array, "*batch features"]) -> Float[Array, "..."]:
        """As `layers.nnx.Embed.attend`, with the adapters' product added."""
        return self._add(
            self.base.attend(query), lambda a, b: contraction.low_rank(query, a, b)
        )

    def route(
        self,
        inputs: Num[Array, "t k"],
        expert: Integer[Array, "t top_k"],
        weight: Float[Array, "t top_k"],
    ) -> Float[Array, "t n"]:
        """As `layers.nnx.Experts.route`, with the adapters' product added."""
        base: Any = self.base
        return experts.route(self, base.num_experts, inputs, expert, weight)

    def _add(self, y: Array, factored: Callable[[Array, Array], Array]) -> Array:
        return lora.add(y, factored, self.a[...], self.b[...], self.scaling)

    def merge(self) -> Float[Array, "*batch k n"]:
        """Returns the dense weight of base and adapters, in float32."""
        return lora.merge(self.weight, self.a[...], self.b[...], alpha=self.alpha)

    def merge_quantized(self) -> Any:
        """Returns a layer as the base, whose weight has the adapters in it.

        As `lora.merge_quantized`: the adapters are rounded as the weight was.
        """
        merged = nnx.clone(self.base)
        merged.load(
            lora.merge_quantized(
                self.weight, self.a[...], self.b[...], alpha=self.alpha
            )
        )
        return merged


def add_lora(
    model: nnx.Module,
    rank: int,
    *,
    alpha: float | int | None = None,
    where: Callable[[str], bool] = lambda path: True,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> Any:
    """Puts adapters beside the packed weights of a model.

    Args:
      model: The model, which stays as it is.
      rank: As in `LoRA`.
      alpha: As in `LoRA`.
      where: Says of the path of a weight, as `kernels` gives it, such as
        "layers/0/mlp/up_proj", whether it is adapted.
      param_dtype: As in `LoRA`.
      rngs: As in `LoRA`.

    Returns:
      A model of the same Variables, with a `LoRA` in place of each adapted layer of
      `layers.nnx`. Other modules that `qjax.quantize_model` packed stay what they are,
      and have adapters in an attribute ``packed_beside``: `nnx.LoRAParam`s that count
      in whatever the modules make of the weight, ``[*stack, k, rank]`` and
      ``[*stack, rank, n]`` over the flattened contraction.

    Raises:
      ValueError: If ``rank`` is not positive, or there is no such weight.

    Example:
      >>> from flax import nnx
      >>> model = nnx.List([qjax.layers.nnx.Linear(64, 8, group_size=32)])
      >>> adapted = add_lora(model, rank=2, rngs=nnx.Rngs(0))
      >>> type(adapted[0]).__name__, type(model[0]).__name__
      ('LoRA', 'Linear')
    """
    paths = list(places(model))
    if not any(map(where, paths)):
        raise ValueError(f"where picks none of the packed weights: {paths}.")
    lora.scaling(rank, alpha)
    drawn: dict[str, Adapters] = {}  # modules that share a weight share them

    def adapters(shape: tuple[int, ...]) -> Adapters:
        a, b = lora.start(
            rngs.params(),
            shape,
            rank,
            a_init=None,
            b_init=zeros,
            param_dtype=param_dtype,
        )
        return Adapters(a=nnx.LoRAParam(a), b=nnx.LoRAParam(b), alpha=alpha)

    def change(module: Any, paths: dict[str, str]) -> Any:
        picked = {name: path for name, path in paths.items() if where(path)}
        for name, path in picked.items():
            if isinstance(module, Layer):
                return LoRA(
                    module, rank, alpha=alpha, param_dtype=param_dtype, rngs=rngs
                )
            if path not in drawn:
                drawn[path] = adapters(wrapped.packed_weights(module)[name].shape)
            wrapped.put_beside(module, name, drawn[path])
        return module

    return replaced(model, change)


def merge_lora(model: nnx.Module) -> Any:
    """Merges all adapters of a model into weights of their formats.

    Args:
      model: What `add_lora` returned; it stays as it is.

    Returns:
      A model with a quantized layer in place of each `LoRA`, and nothing beside other
      packed weights.

    Example:
      >>> from flax import nnx
      >>> model = nnx.List([qjax.layers.nnx.Linear(64, 8, group_size=32)])
      >>> merged = merge_lora(add_lora(model, rank=2, rngs=nnx.Rngs(0)))
      >>> type(merged[0]).__name__
      'Linear'
    """
    merged: dict[str, QTensor] = {}  # what modules share they share merged

    def of_layer(_: tuple, node: Any) -> Any:
        return node.merge_quantized() if isinstance(node, LoRA) else node

    def change(module: Any, paths: dict[str, str]) -> Any:
        for name, path in paths.items():
            if not (beside := wrapped.beside(module, name)):
                continue
            if path not in merged:
                weight = wrapped.packed_weights(module)[name]
                whole = _merged(nnx.as_pure(weight), beside)
                merged[path] = variables(whole, cut_of(weight))
            wrapped.put(module, name, merged[path])
            wrapped.clear_beside(module, name)
        return module

    return nnx.recursive_map(of_layer, replaced(model, change))


def _merged(weight: QTensor, beside: Sequence[Any]) -> QTensor:
    """A weight with all adapters in it that are beside it."""
    for one in nnx.as_pure(beside):
        weight = lora.merge_quantized(weight, one.a, one.b, alpha=one.alpha)
    return weight
