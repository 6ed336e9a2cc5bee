"""The packed weights of an nnx model, by path: those that are trained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from qjax.layers.nnx import wrapped
from qjax.layers.report import path_name
from qjax.tensor import QTensor
from qjax.training.beside import path_of


class Place(NamedTuple):
    """A module that holds a packed weight.

    Attributes:
      module: The module, of `layers.nnx`, or another that `qjax.quantize_model` packed.
      name: What the module calls the weight.
    """

    module: Any
    name: str

    @property
    def packed(self) -> QTensor:
        """The weight, each array of it a Variable."""
        return wrapped.packed_weights(self.module)[self.name]

    @property
    def weight(self) -> QTensor:
        """The weight, put together of the values of its Variables."""
        return nnx.as_pure(self.packed)


def kernels(model: nnx.Module) -> dict[str, QTensor]:
    """All packed weights of a model, by path.

    Args:
      model: A module with quantized layers somewhere below it, or what
        `qjax.quantize_model` made.

    Returns:
      The weights of `layers.nnx` by the path of their layers, such as
      "layers/0/mlp/up_proj". So is the one weight of another module that is called
      "kernel" or "embedding"; all others have their names at the end of the path
      ("layers/0/attention/w_q"). One that is shared has the first of its paths, and the
      weight of the model itself the path "".

    Example:
      >>> from flax import nnx
      >>> up = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> list(kernels(nnx.List([up])))
      ['0']
      >>> model = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> model = qjax.quantize_model(model, qjax.Spec(bits=4, group_size=32))
      >>> list(kernels(model))
      ['key', 'out', 'query', 'value']
    """
    return {path: held[0].weight for path, held in places(model).items()}


def load_kernels(model: nnx.Module, kernels: Mapping[str, QTensor]) -> None:
    """Gives layers other kernels of the same formats, such as `apply_updates` returns.

    Unlike `layers.nnx.load`, this looks at no values, and so works inside `nnx.jit`.

    Args:
      model: The model, which is changed in place.
      kernels: Kernels by path, as `kernels` gives them; other layers keep theirs.

    Raises:
      ValueError: If there is no such weight, or it has another tree or shapes.

    Example:
      >>> layer = qjax.layers.nnx.Linear(64, 8, group_size=32)
      >>> load_kernels(layer, kernels(layer))
    """
    held = places(model)
    check_paths(kernels, held, "kernels")
    for path, new in kernels.items():
        place, *_ = held[path]  # those that share a weight share its Variables
        old = place.weight
        shapes = [[leaf.shape for leaf in jax.tree.leaves(w)] for w in (new, old)]
        if (
            jax.tree.structure(new) != jax.tree.structure(old)
            or len({str(shape) for shape in shapes}) > 1
        ):
            raise ValueError(
                f"kernels[{path!r}]={new!r} must have the format of the layer's own, "
                f"{old!r}; layers.nnx.load takes any."
            )

        def fill(variable: nnx.Variable, leaf: Array) -> None:
            variable[...] = leaf

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        jax.tree.map(fill, place.packed, new, is_leaf=is_variable)


def places(model: nnx.Module) -> dict[str, list[Place]]:
    """Finds the packed weights of a model, and the modules that share each."""
    found: dict[int, tuple[str, list[Place]]] = {}
    for path, module in nnx.iter_modules(model):
        weights = wrapped.packed_weights(module)
        for name, packed in weights.items():
            first = path_of(path_name(path), name, weights)
            _, held = found.setdefault(id(packed.words[0]), (first, []))
            held.append(Place(module, name))
    return dict(found.values())


def check_paths(given: Mapping[str, Any], held: Mapping[str, Any], name: str) -> None:
    """Refuses paths of no packed weight.

    Raises:
      ValueError: If there are some.
    """
    if unknown := given.keys() - held.keys():
        raise ValueError(
            f"{name} has {sorted(unknown)}, which are no packed weights of the model; "
            f"it has {list(held)}."
        )


def replaced(
    model: nnx.Module, change: Callable[[Any, dict[str, str]], nnx.Module]
) -> Any:
    """A copy of a model, of the same Variables, with other modules in it.

    Args:
      model: The model.
      change: Takes a module that holds packed weights, which is a copy, and the paths
        of the weights by their names in it; returns what takes its place.
    """
    paths = {
        id(place.packed.words[0]): path
        for path, held in places(model).items()
        for place in held
    }

    def replace(_: tuple, node: Any) -> Any:
        packed = wrapped.packed_weights(node)
        if not packed:
            return node
        return change(node, {name: paths[id(w.words[0])] for name, w in packed.items()})

    return nnx.recursive_map(replace, model)
