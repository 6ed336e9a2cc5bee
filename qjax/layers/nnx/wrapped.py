"""Modules that nobody here wrote, over packed weights: what they hold.

`wrapping` makes them, and `calls` runs their code.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from qjax.layers.beside import Beside
from qjax.layers.nnx.packed import Packed
from qjax.layers.tracing import interpreter
from qjax.layers.tracing.held import Held
from qjax.layers.tracing.views import Form
from qjax.tensor import QTensor

# What a wrapped module has beside the attributes of its own class.
ATTRIBUTES = PACKED, PLACE, BESIDE = "packed", "packed_path", "packed_beside"


class Kind(NamedTuple):
    """What a weight was before it was packed.

    Attributes:
      form: How it is flattened.
      variable: Class of its Variable.
      dtype: Dtype of its array, by name.
      is_used_above: Whether code of modules above its own uses it, or takes it out
        of a stack.
    """

    form: Form
    variable: type[nnx.Variable]
    dtype: str
    is_used_above: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module is in its model: for warnings, and no part of what it is.

    Layers that differ in nothing else have equal trees, so that they can be stacked.
    """

    path: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        """The path, or what stands for that of the model itself."""
        return self.path or "the model"


def is_wrapped(module: Any) -> bool:
    """Whether a module is wrapped; one that is above a stack may hold no weight."""
    return hasattr(type(module), "_kinds")


def kinds(module: Any) -> dict[str, Kind]:
    """What the packed weights of a wrapped module were, by name."""
    return getattr(type(module), "_kinds", {})


def made(module: Any) -> type:
    """The class that was made for a wrapped module."""
    return next(cls for cls in type(module).__mro__ if "_kinds" in vars(cls))


def original(module: Any) -> type:
    """The class that a wrapped module had before."""
    (cls,) = made(module).__bases__
    return cls


def packed_weights(module: Any) -> dict[str, QTensor]:
    """The packed weights of a module by name, each array of them a Variable.

    Args:
      module: Any module, of this package, wrapped, or another, which has none.
    """
    if isinstance(module, Packed):
        return {module._weight: module.packed}
    return dict(getattr(module, PACKED)) if kinds(module) else {}


def put(module: Any, name: str, weight: QTensor) -> None:
    """Puts another packed weight in the place of one that a module has.

    Args:
      module: The module, of this package or wrapped.
      name: One of the names in `packed_weights`.
      weight: The weight, each array of it a Variable.
    """
    if isinstance(module, Packed):
        module.packed = nnx.data(weight)
    else:
        getattr(module, PACKED)[name] = weight


def beside(module: Any, name: str) -> tuple[Beside, ...]:
    """What is beside a packed weight of a wrapped module, as `put_beside` left it."""
    return vars(module).get(BESIDE, {}).get(name, ())


def put_beside(module: Any, name: str, one: Beside) -> None:
    """Has something added to all that a wrapped module makes of a packed weight.

    Args:
      module: The module.
      name: One of the names in `packed_weights`.
      one: What is beside that weight, too, from now on: its arrays are Variables, or
        arrays that the module keeps no longer than a step.
    """
    both = {**vars(module).get(BESIDE, {}), name: (*beside(module, name), one)}
    setattr(module, BESIDE, nnx.data(both))


def clear_beside(module: Any, name: str) -> None:
    """Takes away all that is beside a packed weight of a wrapped module."""
    left = {key: ones for key, ones in getattr(module, BESIDE).items() if key != name}
    delattr(module, BESIDE)
    if left:
        setattr(module, BESIDE, nnx.data(left))


def form_of(module: Any, name: str) -> Form:
    """How a packed weight is flattened; of our own layers, one of a stack."""
    if not isinstance(module, Packed):
        return kinds(module)[name].form
    k, n = module.packed.shape[-2:]
    is_table = module._weight == "embedding"
    return Form((n, k), (1,), (0,)) if is_table else Form((k, n), (0,), (1,))


def held(module: Any) -> dict[str, Held]:
    """The packed weights of a wrapped module in the place of the dense ones."""
    return {
        name: interpreter.hold(
            nnx.as_pure(packed),
            form_of(module, name),
            jnp.dtype(kinds(module)[name].dtype),
            "/".join(filter(None, (getattr(module, PLACE).path, name))),
            nnx.as_pure(beside(module, name)),
        )
        for name, packed in packed_weights(module).items()
    }
