"""Training with Flax nnx: shadow gradients of a model, and LoRA beside its layers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax.layers import contraction, experts
from qjax.layers.nnx import (
    Einsum,
    Embed,
    Experts,
    Linear,
    LinearGeneral,
    MBWQLinear,
)
from qjax.layers.report import path_name
from qjax.tensor import QTensor
from qjax.training import calls, lora, shadow

# Layers whose weight is one matrix over the last axis of the inputs; those that are
# products with a quantized weight, which have shadows; and all that have adapters.
_Matrix = Linear | MBWQLinear
_Product = _Matrix | LinearGeneral | Einsum | Experts
_Layer = _Product | Embed


def kernels(model: nnx.Module) -> dict[str, QTensor]:
    """The kernels of all quantized layers but embeddings, by path.

    Args:
      model: A module with quantized layers somewhere below it.

    Returns:
      Kernels by the path of their layers, such as "layers/0/mlp/up_proj"; one that is
      shared has the first of its paths, and the model itself the path "".

    Example:
      >>> from flax import nnx
      >>> up = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> list(kernels(nnx.List([up])))
      ['0']
    """
    return {path: layer.kernel for path, layer in _layers(model)}


def load_kernels(model: nnx.Module, kernels: Mapping[str, QTensor]) -> None:
    """Gives layers other kernels of the same formats, such as `apply_updates` returns.

    Unlike `layers.nnx.Linear.load`, this looks at no values, and so works inside
    `nnx.jit`.

    Args:
      model: The model, which is changed in place.
      kernels: Kernels by path, as `kernels` gives them; other layers keep theirs.

    Raises:
      ValueError: If there is no such layer, or its kernel has another tree or shapes.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> load_kernels(layer, kernels(layer))
    """
    layers = _named(model, kernels, "kernels")
    for path, layer in layers.items():
        new, old = kernels[path], layer.kernel
        shapes = [[leaf.shape for leaf in jax.tree.leaves(w)] for w in (new, old)]
        if (
            jax.tree.structure(new) != jax.tree.structure(old)
            or len({str(shape) for shape in shapes}) > 1
        ):
            raise ValueError(
                f"kernels[{path!r}]={new!r} must have the format of the layer's own, "
                f"{old!r}; Linear.load takes any."
            )

        def fill(variable: nnx.Variable, leaf: Array) -> None:
            variable[...] = leaf

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        jax.tree.map(fill, layer.packed, new, is_leaf=is_variable)


class Shadowed(nnx.Module):
    """A quantized layer whose integer weights have a gradient.

    `with_shadows` makes them, of a shadow that lives as long as a step.

    Args:
      base: The layer.
      shadow: Zeros of the shape of its kernel, ``[*stack, k, n]``.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> Shadowed(layer, jnp.zeros((64, 8)))(jnp.ones((2, 64))).shape
      (2, 8)
    """

    def __init__(self, base: _Product, shadow: Float[Array, "*stack k n"]) -> None:
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
        if isinstance(base, _Matrix):
            rows = jnp.asarray(inputs[0], y.dtype)
            return shadow.attach(y, rows, base.kernel, self.shadow)
        product = lambda w, *inputs: base.factored(w, None, *inputs)  # noqa: E731
        return shadow.attach_by(product, y, inputs, base.kernel, self.shadow)

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
      taken.

    Raises:
      ValueError: If there is no such layer.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> def loss(shadows):
      ...     return with_shadows(layer, shadows)(jnp.ones((2, 64))).sum()
      >>> gradient = jax.grad(loss)(shadow.zeros(kernels(layer)))
      >>> gradient[""].shape
      (64, 8)
    """
    _named(model, shadows, "shadows")
    return _replaced(
        model,
        _Product,
        lambda path, layer: (
            Shadowed(layer, shadows[path]) if path in shadows else layer
        ),
    )


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
        base: _Layer,
        rank: int,
        *,
        alpha: float | int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        a_init: Initializer | None = None,
        b_init: Initializer = zeros,
        rngs: nnx.Rngs,
    ) -> None:
        if not isinstance(base, _Layer):
            raise TypeError(
                f"base is {type(base).__module__}.{type(base).__name__}, and must be a "
                "quantized layer of layers.nnx; qjax.quantize_model makes them."
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
    """Puts adapters beside the quantized layers of a model.

    Args:
      model: The model, which stays as it is.
      rank: As in `LoRA`.
      alpha: As in `LoRA`.
      where: Says of the path of a layer, such as "layers/0/mlp/up_proj", whether it is
        adapted.
      param_dtype: As in `LoRA`.
      rngs: As in `LoRA`.

    Returns:
      A model of the same Variables, with a `LoRA` in place of each adapted layer.

    Raises:
      ValueError: If ``rank`` is not positive, or there is no such layer.

    Example:
      >>> from flax import nnx
      >>> model = nnx.List([qjax.layers.nnx.Linear(64, 8, group_size=32)])
      >>> adapted = add_lora(model, rank=2, rngs=nnx.Rngs(0))
      >>> type(adapted[0]).__name__, type(model[0]).__name__
      ('LoRA', 'Linear')
    """
    paths = [path for path, _ in _layers(model, _Layer)]
    if not any(map(where, paths)):
        raise ValueError(f"where picks none of the quantized layers: {paths}.")
    return _replaced(
        model,
        _Layer,
        lambda path, layer: (
            LoRA(layer, rank, alpha=alpha, param_dtype=param_dtype, rngs=rngs)
            if where(path)
            else layer
        ),
    )


def merge_lora(model: nnx.Module) -> Any:
    """Merges all adapters of a model into weights of their bases' formats.

    Args:
      model: What `add_lora` returned; it stays as it is.

    Returns:
      A model with a quantized layer in place of each `LoRA`.

    Example:
      >>> from flax import nnx
      >>> model = nnx.List([qjax.layers.nnx.Linear(64, 8, group_size=32)])
      >>> merged = merge_lora(add_lora(model, rank=2, rngs=nnx.Rngs(0)))
      >>> type(merged[0]).__name__
      'Linear'
    """

    def merge(_: tuple, node: Any) -> Any:
        return node.merge_quantized() if isinstance(node, LoRA) else node

    return nnx.recursive_map(merge, model)


def _layers(model: nnx.Module, kinds: Any = _Product) -> Iterator[tuple[str, Any]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, kinds):
            yield path_name(path), module


def _named(
    model: nnx.Module, given: Mapping[str, Any], name: str
) -> dict[str, _Product]:
    layers = dict(_layers(model))
    if unknown := given.keys() - layers.keys():
        raise ValueError(
            f"{name} has {sorted(unknown)}, which are no quantized layers of the "
            f"model; it has {list(layers)}."
        )
    return {path: layers[path] for path in given}


def _replaced(
    model: nnx.Module, kinds: Any, make: Callable[[str, Any], nnx.Module]
) -> Any:
    """A copy of a model, of the same Variables, with other layers in it."""

    def replace(path: tuple, node: Any) -> Any:
        return make(path_name(path), node) if isinstance(node, kinds) else node

    return nnx.recursive_map(replace, model)
