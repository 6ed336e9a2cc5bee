"""What is beside a packed weight while it is trained: a shadow of it, or adapters."""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, Integer

from qjax.layers.beside import Factored
from qjax.tensor import QTensor
from qjax.training import lora, shadow


def path_of(path: str, name: str, names: Collection[str]) -> str:
    """The path of a packed weight, as `training` calls it.

    Args:
      path: That of its module.
      name: What the module calls it.
      names: The names of all packed weights of the module.

    Returns:
      The path of the module where that has one weight, by one of Flax's own names.
    """
    is_usual = len(names) == 1 and name in ("kernel", "embedding")
    return path if is_usual else "/".join(filter(None, (path, name)))


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shadow:
    """The shadow of a weight, which adds nothing but a gradient.

    Attributes:
      zeros: Float ``[*stack, k, n]``.
    """

    zeros: Any

    def add(
        self, y: Array, factored: Factored, inputs: tuple[Any, ...], weight: QTensor
    ) -> Array:
        """As `layers.beside.Beside.add`; returns ``y``."""
        product = lambda w, *inputs: factored(w, None, *inputs)  # noqa: E731
        return shadow.attach_by(product, y, inputs, weight, self.zeros)

    def columns(self, index: Integer[Array, " m"]) -> "Shadow":
        """As `layers.beside.Beside.columns`."""
        return Shadow(zeros=self.zeros[..., index])


@jax.tree_util.register_dataclass
@typing.no_type_check  # As of a shadow.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA's two factors.

    Attributes:
      a: ``[*stack, k, rank]``, an array or a Variable.
      b: ``[*stack, rank, n]``, an array or a Variable.
      alpha: Their product counts ``alpha / rank`` times; None, once.
    """

    a: Any
    b: Any
    alpha: float | int | None = dataclasses.field(metadata={"static": True})

    def add(
        self, y: Array, factored: Factored, inputs: tuple[Any, ...], weight: QTensor
    ) -> Array:
        """As `layers.beside.Beside.add`."""
        del weight
        scaling = lora.scaling(self.a.shape[-1], self.alpha)
        both = lambda a, b: factored(a, b, *inputs)  # noqa: E731
        return lora.add(y, both, self.a, self.b, scaling)

    def columns(self, index: Integer[Array, " m"]) -> "Adapters":
        """As `layers.beside.Beside.columns`."""
        return dataclasses.replace(self, b=self.b[..., index])
