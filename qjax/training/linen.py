"""Training with Flax linen: shadow gradients of a model, and LoRA beside its layers.

Two more collections of variables, with the paths of the layers that they belong to:

    {"params": ..., "quantized": ...,
     "shadow": {"kernel": zeros [k, n]},
     "lora": {"a": [k, rank], "b": [rank, n]}}

`jax.grad` over one of them trains that one, and all else is frozen.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax.layers import contraction, experts
from qjax.layers.linen import (
    QUANTIZED,
    Dense,
    DenseGeneral,
    Einsum,
    Embed,
    Experts,
    MBWQDense,
    to_params,
)
from qjax.tensor import QTensor
from qjax.training import calls, lora, shadow

LORA, SHADOW = "lora", "shadow"
_PRODUCTS = Dense | DenseGeneral | Einsum | Experts | MBWQDense


def shadowed(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a model's ``apply`` take a collection "shadow" beside the others.

    Args:
      apply: The ``apply`` of a module with quantized layers; embeddings have no
        shadow.

    Returns:
      The same function, of variables that may hold "shadow": what `shadow.zeros` makes
      of `layers.linen.to_params`. Its gradient is that of the integer weights. A lifted
      transformation such as `nn.scan` must be told of the collection as of "quantized".

    Example:
      >>> kernel = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> variables = qjax.layers.linen.to_variables({"kernel": kernel})
      >>> apply = shadowed(qjax.layers.linen.Dense(8, use_bias=False).apply)
      >>> def loss(shadow):
      ...     return apply({**variables, "shadow": shadow}, jnp.ones((2, 64))).sum()
      >>> gradient = jax.grad(loss)(shadow.zeros({"kernel": kernel}))
      >>> gradient["kernel"].shape, float(gradient["kernel"][0, 0])
      ((64, 8), 2.0)
    """

    def applied(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_attach):
            return apply(variables, *args, **kwargs)

    return applied


def _attach(
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
) -> Any:
    y, layer = call(*args, **kwargs), context.module
    is_call = isinstance(layer, _PRODUCTS) and context.method_name == "__call__"
    if not is_call or not layer.has_variable(SHADOW, "kernel"):
        return y
    inputs = calls.inputs_of(layer, args, kwargs)
    kernel = dataclasses.replace(
        layer.get_variable(QUANTIZED, "kernel"),
        **layer.get_variable("params", "kernel"),
    )
    zeros = layer.get_variable(SHADOW, "kernel")
    if isinstance(layer, Dense | MBWQDense):
        return shadow.attach(y, jnp.asarray(inputs[0], y.dtype), kernel, zeros)
    product = lambda w, *inputs: layer.factored(w, None, *inputs)  # noqa: E731
    return shadow.attach_by(product, y, inputs, kernel, zeros)


def with_kernels(variables: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Puts kernels that took a step back into the variables they came from.

    Args:
      variables: The variables of a model.
      params: What `layers.linen.to_params` made of them, with other kernels of the same
        formats, such as `apply_updates` returns. Unlike `layers.linen.to_variables`,
        this looks at no values, and so works inside `jax.jit`.

    Returns:
      The new variables; collections beside "params" and "quantized" stay as they are.

    Example:
      >>> from qjax.layers.linen import to_params, to_variables
      >>> kernel = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> variables = to_variables({"up": {"kernel": kernel}})
      >>> again = with_kernels(variables, to_params(variables))
      >>> jax.tree.structure(again) == jax.tree.structure(variables)
      True
    """

    def split(floats: Any, rest: Any, new: Any) -> tuple[Any, Any]:
        if isinstance(rest, QTensor):
            held = {name: getattr(new, name) for name in floats}
            return held, dataclasses.replace(new, **dict.fromkeys(held))
        if not isinstance(floats, Mapping):
            return new, None
        pairs = {
            name: split(value, rest.get(name, {}), new[name])
            for name, value in floats.items()
        }
        return (
            {name: pair[0] for name, pair in pairs.items()},
            {name: pairs[name][1] for name in rest},
        )

    floats, rest = split(variables["params"], variables[QUANTIZED], params)
    return {**variables, "params": floats, QUANTIZED: rest}


class LoRA(nn.Module):
    """LoRA beside any quantized layer.

    Its variables are those of the base, at the same paths, and the adapters in the
    collection "lora": a checkpoint's variables fit as they are. In a compact method the
    name belongs to the base: ``LoRA(Dense(8, name="up"), rank=4)(x)``.

    Example:
      ``init`` draws adapters beside an empty base, and ``apply`` with a mutable "lora"
      beside the base that it is given.

      >>> from qjax.layers.linen import Dense, to_variables
      >>> kernel = qjax.quantize(jnp.ones((64, 8)), group_size=32)
      >>> base = to_variables({"kernel": kernel})
      >>> layer = LoRA(Dense(8, use_bias=False), rank=2, alpha=4)
      >>> rngs, x = {"params": jax.random.key(0)}, jnp.ones((2, 64))
      >>> y, adapters = layer.apply(base, x, rngs=rngs, mutable=["lora"])
      >>> jax.tree.map(jnp.shape, adapters)
      {'lora': {'a': (64, 2), 'b': (2, 8)}}
      >>> layer.apply({**base, **adapters}, x).shape
      (2, 8)

    Attributes:
      base: The layer that is adapted, one of `layers.linen`. Of a weight
        ``[*stack, k, n]`` the adapters are ``[*stack, k, rank]`` and
        ``[*stack, rank, n]``.
      rank: Columns of ``a``.
      alpha: The adapters' product counts ``alpha / rank`` times (default: None, once).
      param_dtype: Dtype of the adapters (default: float32).
      a_init: Initializer of ``a`` (default: None, he_uniform over the inputs).
      b_init: Initializer of ``b`` (default: zeros).
    """

    base: nn.Module
    rank: int
    alpha: float | int | None = None
    param_dtype: DTypeLike = jnp.float32
    a_init: Initializer | None = None
    b_init: Initializer = zeros

    def setup(self) -> None:
        """Takes the base's place among the variables."""
        if not hasattr(self.base, "factored"):
            raise TypeError(
                f"base is {type(self.base).__module__}.{type(self.base).__name__}, and "
                "must be a layer of layers.linen; those of Flax hold no packed weight."
            )
        nn.share_scope(self, self.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        """Applies the base, and adds the adapters' product.

        Args:
          *args: What the base takes.
          **kwargs: What the base takes by name.

        Returns:
          What the base returns, of the same shape and dtype.

        Raises:
          TypeError: If ``base`` is no layer of `layers.linen`.
          ValueError: If ``rank`` is not positive, or as the base.
        """
        base: Any = self.base
        inputs = calls.inputs_of(base, args, kwargs)
        return self._add(
            base(*args, **kwargs), lambda a, b: base.factored(a, b, *inputs)
        )

    def attend(self, query: Num[Array, "*batch features"]) -> Float[Array, "..."]:
        """As `layers.linen.Embed.attend`, with the adapters' product added."""
        base: Any = self.base
        return self._add(
            base.attend(query), lambda a, b: contraction.low_rank(query, a, b)
        )

    def route(
        self,
        inputs: Num[Array, "t k"],
        expert: Integer[Array, "t top_k"],
        weight: Float[Array, "t top_k"],
    ) -> Float[Array, "t n"]:
        """As `layers.linen.Experts.route`, with the adapters' product added."""
        base: Any = self.base
        return experts.route(self, base.num_experts, inputs, expert, weight)

    def _add(self, y: Array, factored: Callable[[Array, Array], Array]) -> Array:
        scaling = lora.scaling(self.rank, self.alpha)
        if self.is_mutable_collection(LORA) and not self.has_variable(LORA, "a"):
            # The base has read its weight, and so made it if there was none.
            weight = self.get_variable(QUANTIZED, _weight_of(self.base))
            a, b = lora.start(
                self.make_rng("params"),
                weight.shape,
                self.rank,
                a_init=self.a_init,
                b_init=self.b_init,
                param_dtype=self.param_dtype,
            )
            self.put_variable(LORA, "a", a)
            self.put_variable(LORA, "b", b)
        if not self.has_variable(LORA, "a"):
            path = "/".join((LORA, *self.path, "a"))
            raise ValueError(
                f'{path} is missing; apply needs the collection "{LORA}", or draws it '
                f'with mutable=["{LORA}"] and rngs={{"params": key}}.'
            )
        a, b = self.get_variable(LORA, "a"), self.get_variable(LORA, "b")
        return lora.add(y, factored, a, b, scaling)


def _weight_of(layer: nn.Module) -> str:
    return "embedding" if isinstance(layer, Embed) else "kernel"


def merge_lora(
    variables: Mapping[str, Any], *, alpha: float | int | None = None
) -> dict[str, Any]:
    """Merges all adapters of a model into weights of their bases' formats.

    As `lora.merge_quantized`: the adapters are rounded as the weights were.

    Args:
      variables: Those of a model, "lora" among them.
      alpha: That of every `LoRA` in it.

    Returns:
      Variables without "lora", for the model without a `LoRA`.

    Raises:
      ValueError: If adapters belong to no layer, or do not fit it.
      NotImplementedError: As `qjax.training.requantize`.

    Example:
      >>> from qjax.layers.linen import Dense
      >>> layer, x = Dense(8, group_size=32), jnp.ones((2, 64))
      >>> variables = LoRA(layer, rank=2).init(jax.random.key(0), x)
      >>> layer.apply(merge_lora(variables), x).shape
      (2, 8)
    """

    def merge(params: Any, adapters: Mapping[str, Any]) -> Any:
        if isinstance(adapters.get("a", {}), Mapping):  # a module of modules
            if unknown := adapters.keys() - params.keys():
                raise ValueError(
                    f'variables["lora"] has {sorted(unknown)}, but variables["params"] '
                    f"has {list(params)} there; both must be of one model."
                )
            below = {name: merge(params[name], adapters[name]) for name in adapters}
        else:
            below = {
                name: lora.merge_quantized(w, **adapters, alpha=alpha)
                for name, w in params.items()
                if isinstance(w, QTensor)
            }
        return {**params, **below}

    bare = {name: value for name, value in variables.items() if name != LORA}
    return with_kernels(bare, merge(to_params(variables), variables[LORA]))
