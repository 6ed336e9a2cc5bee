"""What training has beside a packed weight: a shadow of it, or adapters.

It has to be wherever products with the weight are made. In a model that
`qjax.quantize_model` made, products are made by `layers.tracing`, which adds to each
what is beside its weight; in the variables of linen a weight brings it along.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jaxtyping import Array, Integer

from qjax.tensor import QTensor

# Of a dense weight and None, or of two factors of it, and of inputs: their product.
Factored = Callable[..., Array]


@typing.runtime_checkable
class Beside(Protocol):
    """A pytree whose arrays have the axes of the weight's stack first."""

    def add(
        self, y: Array, factored: Factored, inputs: tuple[Any, ...], weight: QTensor
    ) -> Array:
        """Adds what there is to a result of the weight.

        Args:
          y: What the weight makes of the inputs.
          factored: A function of ``a`` ``[*stack, k, rank]``, ``b``
            ``[*stack, rank, n]`` and the inputs: what ``a @ b`` makes of them; where
            ``b`` is None, what ``a`` ``[*stack, k, n]`` makes of them.
          inputs: The inputs.
          weight: ``[*stack, k, n]``.

        Returns:
          The sum, of the shape and dtype of ``y``.
        """
        ...

    def columns(self, index: Integer[Array, " m"]) -> "Beside":
        """What is beside some columns of the weight."""
        ...


def add(
    beside: Sequence[Beside],
    y: Array,
    factored: Factored,
    inputs: tuple[Any, ...],
    weight: QTensor,
) -> Array:
    """Adds all that is beside a weight, as `Beside.add` does."""
    for one in beside:
        y = one.add(y, factored, inputs, weight)
    return y


@jax.tree_util.register_dataclass
@typing.no_type_check  # As of a QTensor.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Accompanied(QTensor):
    """A weight that brings along what is beside it.

    Attributes:
      beside: `Beside`s, in the order in which they are added.
    """

    beside: Any = ()


def accompany(w: QTensor, one: Beside) -> Accompanied:
    """Puts one more beside a weight."""
    bare, beside = apart(w)
    return Accompanied(**_fields(bare), beside=(*beside, one))


def apart(w: QTensor) -> tuple[QTensor, tuple[Beside, ...]]:
    """Takes apart a weight and what is beside it."""
    if not isinstance(w, Accompanied):
        return w, ()
    return QTensor(**_fields(w)), w.beside


def _fields(w: QTensor) -> dict[str, Any]:
    return {field.name: getattr(w, field.name) for field in dataclasses.fields(QTensor)}
