"""LoRA beside the packed weights of a linen model."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num, PRNGKeyArray

from qjax.layers import contraction, experts
from qjax.layers.linen import QUANTIZED, to_params
from qjax.tensor import QTensor
from qjax.training import calls, lora
from qjax.training.beside import Adapters, path_of
from qjax.training.linen.weights import (
    Names,
    accompanied,
    name_of_weight,
    packed_weights,
    with_kernels,
)

LORA = "lora"


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
            weight = self.get_variable(QUANTIZED, name_of_weight(self.base))
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


def add_lora(
    variables: Mapping[str, Any],
    rank: int,
    key: PRNGKeyArray,
    *,
    where: Callable[[str], bool] = lambda path: True,
    param_dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Draws adapters for the packed weights of a model, for `adapted` to apply.

    Args:
      variables: Those of a model that `qjax.quantize_model` made, or of one of
        quantized layers.
      rank: As in `LoRA`.
      key: Key of the draws.
      where: Says of the path of a weight, such as "layers_0/mlp/up_proj", whether it is
        adapted. The one weight of a module that is called "kernel" or "embedding" has
        the path of the module, others have their names at the end.
      param_dtype: As in `LoRA`.

    Returns:
      The variables, with a collection "lora": at the path of each adapted weight
      ``{"a": [*stack, k, rank], "b": [*stack, rank, n]}``, over the flattened
      contraction.

    Raises:
      ValueError: If ``rank`` is not positive, there is no such weight, or the variables
        have adapters.

    Example:
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(8), jnp.ones((2, 64))
      >>> variables = model.init(jax.random.key(0), x)
      >>> spec = qjax.Spec(bits=4, group_size=32)
      >>> model, variables = qjax.quantize_model(model, spec, x, variables=variables)
      >>> variables = add_lora(variables, 2, jax.random.key(1))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'kernel': {'a': (64, 2), 'b': (2, 8)}}
      >>> adapted(model.apply)(variables, x).shape
      (2, 8)
    """
    lora.scaling(rank, None)
    if LORA in variables:
        raise ValueError(
            f"variables[{LORA!r}] is there already; leave it out, or merge_lora it."
        )
    weights = packed_weights(variables)
    modules: dict[Names, list[str]] = {}
    for *module, name in weights:
        modules.setdefault(tuple(module), []).append(name)
    paths: dict[Names, str] = {
        (*module, name): path_of("/".join(module), name, held)
        for module, held in modules.items()
        for name in held
    }
    picked = [names for names in weights if where(paths[names])]
    if not picked:
        raise ValueError(
            f"where picks none of the packed weights: {[*paths.values()]}."
        )
    drawn = {}
    for names, one in zip(picked, jax.random.split(key, len(picked)), strict=True):
        a, b = lora.start(
            one,
            weights[names].shape,
            rank,
            a_init=None,
            b_init=zeros,
            param_dtype=param_dtype,
        )
        drawn[names] = {"a": a, "b": b}
    return {**variables, LORA: traverse_util.unflatten_dict(drawn)}


def adapted(
    apply: Callable[..., Any], *, alpha: float | int | None = None
) -> Callable[..., Any]:
    """Lets a model's ``apply`` take adapters beside its packed weights.

    Args:
      apply: As in `shadowed`.
      alpha: As in `LoRA`.

    Returns:
      The same function, of variables that may hold "lora", as `add_lora` makes it.
      Adapters count in whatever the model makes of their weights. It raises a
      ValueError if there are some of no packed weight.

    Example:
      >>> from qjax.layers.linen import Dense, to_variables
      >>> kernel, x = qjax.quantize(jnp.eye(64), group_size=32), jnp.ones((2, 64))
      >>> variables = add_lora(to_variables({"kernel": kernel}), 2, jax.random.key(0))
      >>> apply = adapted(Dense(64, use_bias=False).apply, alpha=4)
      >>> def loss(adapters):
      ...     return apply({**variables, "lora": adapters}, x).sum()
      >>> gradient = jax.grad(loss)(variables["lora"])
      >>> jax.tree.map(jnp.shape, gradient)
      {'kernel': {'a': (64, 2), 'b': (2, 64)}}
    """
    return accompanied(apply, LORA, lambda pair: Adapters(**pair, alpha=alpha))


def merge_lora(
    variables: Mapping[str, Any], *, alpha: float | int | None = None
) -> dict[str, Any]:
    """Merges all adapters of a model into weights of their bases' formats.

    As `lora.merge_quantized`: the adapters are rounded as the weights were.

    Args:
      variables: Those of a model, "lora" among them.
      alpha: That of every `LoRA` in it, or that `adapted` was told.

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
        if isinstance(params, QTensor):
            return lora.merge_quantized(params, **adapters, alpha=alpha)
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
