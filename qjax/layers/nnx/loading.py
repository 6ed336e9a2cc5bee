"""`load`: weights by path into a model that `qjax.quantize_model` made."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qjax import ops
from qjax.layers import packing
from qjax.layers.nnx import wrapped
from qjax.layers.nnx.packed import cut_of, variables
from qjax.layers.report import path_name
from qjax.tensor import QTensor

# The modules that share a packed weight, each with its name for it.
_Holders = Sequence[tuple[Any, str]]


def load(model: nnx.Module, weights: Mapping[str, QTensor | Array]) -> None:
    """Fills a quantized model, in place: one whose arrays are abstract, or any other.

    If anything is refused, the model stays as it was.

    Args:
      model: What `qjax.quantize_model` returned.
      weights: By path: of a parameter ("layers/0/attn/q_proj/w"), or of a module that
        has one packed weight ("layers/0/attn/q_proj"). A `QTensor`, of any format, is
        the matrix ``[*stack, k, n]`` that the report shows. An array in the place of a
        packed weight is rounded to nearest, to the widths and groups of that, whatever
        quantizer made it; any other is taken as it is. Parameters that are not named
        stay as they are.

    Raises:
      TypeError: If a `QTensor` is for a parameter that is not packed.
      ValueError: If there is no such parameter, a shape differs, of a dense weight from
        that of the one which was packed, or an array cannot be rounded so, as where
        the packed weight has an order, factors or float zeros.

    Example:
      >>> from flax import nnx
      >>> dense = nnx.eval_shape(lambda: nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
      >>> model = qjax.quantize_model(dense, qjax.Spec(group_size=32))
      >>> load(model, {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)})
      >>> model(jnp.ones((1, 64))).shape
      (1, 8)
    """
    packed, plain = _packed(model), _plain(model)
    # All of them, before the first is put in its place.
    fitting = {
        path: _fitting(path, weight, packed, plain) for path, weight in weights.items()
    }
    for path, weight in fitting.items():
        if not isinstance(weight, QTensor):
            _put_plain(plain[path], weight)
            continue
        module, name = packed[path][0]
        new = variables(weight, cut_of(wrapped.packed_weights(module)[name]))
        for module, name in packed[path]:
            wrapped.put(module, name, new)


def _packed(model: nnx.Module) -> dict[str, _Holders]:
    """The packed weights by path, and by the path of a module that has only one."""
    packed: dict[str, _Holders] = {}
    holders: dict[int, list[tuple[Any, str]]] = {}
    for path, module in nnx.iter_modules(model):
        names = wrapped.packed_weights(module)
        for name, weight in names.items():
            shared = holders.setdefault(id(weight.words[0]), [])
            shared.append((module, name))
            packed[path_name((*path, name))] = shared
            if len(names) == 1:
                packed[path_name(path)] = shared
    return packed


class _Attribute(NamedTuple):
    """An array that a module has as an attribute, as `nnx.data` takes it.

    Attributes:
      module: The module.
      name: The attribute.
    """

    module: nnx.Module
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return getattr(self.module, self.name).shape


def _plain(model: nnx.Module) -> dict[str, nnx.Variable | _Attribute]:
    """What holds an array that is not packed, by path."""
    variables = {
        path_name(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }
    attributes = {
        path_name((*path, name)): _Attribute(module, name)
        for path, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Array | jax.ShapeDtypeStruct)
    }
    return variables | attributes


def _put_plain(place: nnx.Variable | _Attribute, array: Array) -> None:
    if isinstance(place, _Attribute):
        setattr(place.module, place.name, array)
    else:
        place.set_raw_value(array)


def _fitting(
    path: str,
    weight: QTensor | Array,
    packed: Mapping[str, _Holders],
    plain: Mapping[str, nnx.Variable | _Attribute],
) -> QTensor | Array:
    """What takes the place of a parameter: of a packed one, a prepared `QTensor`."""
    if path in packed:
        return _fitting_packed(path, weight, *packed[path][0])
    what = f"weights[{path!r}] has the shape {jnp.shape(weight)}"
    if path not in plain:
        near = difflib.get_close_matches(path, {*packed, *plain})
        raise ValueError(
            f"{what}, but the model's parameter is not there; close to it are {near}."
        )
    if plain[path].shape != jnp.shape(weight):
        shape = plain[path].shape
        raise ValueError(f"{what}, but the model's parameter is of shape {shape}.")
    if isinstance(weight, QTensor):
        raise TypeError(
            f"weights[{path!r}] is {weight!r}, but the model's parameter is not packed;"
            " qjax.quantize_model packs it, and qjax.dequantize gives the dense weight."
        )
    return jnp.asarray(weight)


def _fitting_packed(
    path: str, weight: QTensor | Array, module: Any, name: str
) -> QTensor:
    old = nnx.as_pure(wrapped.packed_weights(module)[name])
    if isinstance(weight, QTensor):
        if weight.shape != old.shape:
            raise ValueError(
                f"weights[{path!r}] is {weight!r}; its shape must be {old.shape}."
            )
        return ops.prepare(weight)
    form = wrapped.form_of(module, name)
    # Not that of the matrix: other axes may be flattened to as many rows and columns.
    shape = form.view(old.batch, old.dtype).shape
    if jnp.shape(weight) != shape:
        raise ValueError(
            f"weights[{path!r}] has the shape {jnp.shape(weight)}, and must have "
            f"{shape}, that of the dense weight; a QTensor must have {old.shape}."
        )
    try:
        return packing.pack(jnp.asarray(weight), form, packing.spec_of(old))
    except ValueError as error:
        raise ValueError(
            f"weights[{path!r}] cannot be rounded as {old!r} is: {error}"
        ) from error
