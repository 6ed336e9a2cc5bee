"""Quantized weights as variables: how they are made, read, split and saved."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from jaxtyping import Array

from qjax import ops
from qjax.layers import dense
from qjax.layers.beside import apart
from qjax.sharding import Segmented
from qjax.tensor import (
    Levels,
    Nested,
    QTensor,
    WithGlobal,
    check_packed,
    replace_floats,
)

QUANTIZED = "quantized"  # the collection of integers, never trained


def weight(
    module: nn.Module,
    start: Callable[[Array], QTensor],
    shape: tuple[int, ...],
    name: str = "kernel",
    axes: str = dense.AXES,
) -> QTensor:
    """Puts a layer's weight together, and makes its variables while initializing.

    Args:
      module: The layer.
      start: Makes the weight of a new layer, prepared for this device, out of a key.
      shape: The shape that the weight must have.
      name: Name of the variables.
      axes: What the two axes are, for errors.

    Returns:
      The weight.

    Raises:
      TypeError: If the variables hold a dense array in its place.
      ValueError: If the variables hold no quantized weight or one of another shape, or
        ``init`` may not make both collections.
    """
    if module.is_initializing() and not module.has_variable(QUANTIZED, name):
        if not module.is_mutable_collection(QUANTIZED):
            raise ValueError(
                f"mutable has no {QUANTIZED!r}, the collection in which init puts the "
                f'words of {name}; pass mutable=["params", "{QUANTIZED}"], or leave it '
                "out."
            )

        def make(key: Array) -> dict[str, Array | Segmented]:
            floats, rest = _split(start(key))
            module.put_variable(QUANTIZED, name, rest)
            return floats

        module.param(name, make)
    _check_both(module, name)
    # What is beside it is added where the layer is called.
    rest, _ = apart(module.get_variable(QUANTIZED, name))
    whole = replace_floats(rest, module.get_variable("params", name))
    dense.check_shapes(whole, None, shape, name=name, axes=axes)
    return whole


def _check_both(module: nn.Module, name: str) -> None:
    """Refuses variables that are not those of a packed weight.

    Raises:
      TypeError: If one of the two is a dense array.
      ValueError: If one is missing.
    """

    def at(collection: str) -> str:
        return "/".join((collection, *module.path, name))

    dense_one = module.get_variable("params", name)
    if dense_one is not None and not isinstance(dense_one, Mapping):
        check_packed(dense_one, at("params"))
    for collection in ("params", QUANTIZED):
        if not module.has_variable(collection, name):
            # What `ToNNX` leaves of the two, as they have the same names.
            bridged = " nnx.bridge.ToNNX loses them: use layers.nnx in a model of nnx."
            raise ValueError(
                f"{at(collection)} is missing; apply needs both collections, "
                '{"params": ..., "quantized": ...}, as `to_variables` makes them.'
                f"{bridged if collection == 'params' else ''}"
            )
    check_packed(module.get_variable(QUANTIZED, name), at(QUANTIZED))


def kernel_and_bias(
    layer: Any,
    shape: tuple[int, ...],
    bias_shape: tuple[int, ...],
    kernel_init: dense.Draw | None,
    bias_init: dense.Draw,
    axes: str = dense.AXES,
) -> tuple[QTensor, Array | None]:
    """Puts a layer's kernel together, and its bias, as `weight` does.

    Args:
      layer: Has ``use_bias``, and what `dense.starting` reads.
      shape: The shape that the kernel must have.
      bias_shape: That of a new bias.
      kernel_init: As in `dense.start`.
      bias_init: Initializer of the bias.
      axes: As in `weight`.

    Returns:
      The kernel; the bias, or None for a layer without one.

    Raises:
      TypeError: As `weight`.
      ValueError: As `weight`.
    """
    start = dense.starting(layer, kernel_init, shape)
    kernel = weight(layer, start, shape, axes=axes)
    if not layer.use_bias:
        return kernel, None
    return kernel, layer.param("bias", bias_init, bias_shape, layer.param_dtype)


def to_variables(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Makes the variables of a model out of params whose kernels are `QTensor`s.

    Args:
      params: Nested dictionaries named as the model's modules. Each `QTensor` is
        prepared for this device once, here; stacked ones go with `nn.scan` and
        `nn.vmap`. All other leaves are taken as they are.

    Returns:
      ``{"params": ..., "quantized": ...}``, for ``apply``.

    Raises:
      ValueError: If a "bias" does not fit the "kernel" beside it.

    Example:
      >>> import jax
      >>> import qjax
      >>> kernel = qjax.quantize(jnp.ones((64, 32)), group_size=64)
      >>> variables = to_variables({"up": {"kernel": kernel}, "norm": jnp.ones(32)})
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'norm': (32,), 'up': {'kernel': {'scale': (1, 32)}}}
      >>> list(variables["quantized"])
      ['up']
    """
    _check_biases(params)
    return in_collections(params)


def _check_biases(params: Mapping[str, Any]) -> None:
    """Refuses a bias that does not fit the kernel beside it, with a ValueError."""
    if isinstance(kernel := params.get("kernel"), QTensor):
        bias = nn.meta.unbox(params.get("bias"))
        # The axes of one of several features, such as (4, 8), its layer knows.
        shape = () if bias is None else jnp.shape(bias)
        fits = math.prod(shape) == math.prod(kernel.batch) * kernel.n
        dense.check_shapes(kernel, bias, bias_shape=shape if fits else None)
    for value in params.values():
        if isinstance(value, Mapping):
            _check_biases(value)


def in_collections(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Does what `to_variables` does to params of modules that anybody wrote.

    What such a module calls its bias may be anything.
    """
    floats: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            below = in_collections(value)
            floats[name] = below["params"]
            if below[QUANTIZED]:
                rest[name] = below[QUANTIZED]
        elif isinstance(value, QTensor):
            floats[name], rest[name] = _split(ops.prepare(value))
        else:
            floats[name] = value
    return {"params": floats, QUANTIZED: rest}


def to_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `to_variables`: params whose kernels are `QTensor`s.

    Args:
      variables: ``{"params": ..., "quantized": ...}``; other collections are not looked
        at.

    Returns:
      Nested dictionaries; the tensors stay in the layout that they have.
    """

    def join(floats: Any, rest: Any) -> Any:
        if isinstance(rest, QTensor):
            return replace_floats(unboxed(rest), unboxed(floats))
        if not isinstance(floats, Mapping):
            return floats
        return {name: join(value, rest.get(name, {})) for name, value in floats.items()}

    return join(variables["params"], variables.get(QUANTIZED, {}))


def box(
    variables: Mapping[str, Any], names: Sequence[str], in_boxes: Callable[..., QTensor]
) -> None:
    """Puts the arrays of a packed weight into boxes of Flax, in place.

    Args:
      variables: What `to_variables` returned.
      names: Those on the way to the weight.
      in_boxes: Makes the weight one of boxes.
    """
    *way, name = names
    floats, rest = (
        functools.reduce(operator.getitem, way, variables[collection])
        for collection in ("params", QUANTIZED)
    )
    whole = in_boxes(replace_floats(rest[name], floats[name]))
    floats[name], rest[name] = take_floats(whole, floats[name])


def unboxed(tree: Any) -> Any:
    """Takes the arrays of a packed weight out of their boxes.

    Without what Flax would tell the compiler there: a box names the axes of its array,
    and not all of them, such as that of the groups, can be cut evenly.
    """
    is_box = nn.meta.is_axis_metadata
    return jax.tree.map(
        lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box
    )


def _split(kernel: QTensor) -> tuple[dict[str, Any], QTensor]:
    """Takes all floats out of a prepared kernel."""
    leaves = {
        name: getattr(kernel, name)
        for name in ("scale", "zero", "codebook", "input_scale")
    }
    floating = [
        name
        for name, leaf in leaves.items()
        if leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return take_floats(kernel, floating)


def take_floats(
    kernel: QTensor, names: Iterable[str]
) -> tuple[dict[str, Any], QTensor]:
    """Takes some leaves out of a kernel, for `replace_floats` to put back.

    Args:
      kernel: The kernel.
      names: Of the leaves; of those that are `Levels`, their floats are taken.

    Returns:
      What was taken, by name, and the rest.
    """
    floats: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name in names:
        leaf = getattr(kernel, name)
        if isinstance(leaf, Levels):
            floats[name] = leaf.floats
            rest[name] = leaf.with_floats(dict.fromkeys(leaf.trained))
        else:
            floats[name], rest[name] = leaf, None
    return floats, dataclasses.replace(kernel, **rest)


_LEAVES = [
    field.name
    for field in dataclasses.fields(QTensor)
    if not field.metadata.get("static")
]


def _to_state_dict(qt: QTensor) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(qt, name)) for name in _LEAVES}


def _from_state_dict(qt: QTensor, state: dict[str, Any]) -> QTensor:
    leaves = {
        name: serialization.from_state_dict(getattr(qt, name), state[name], name)
        for name in _LEAVES
    }
    return dataclasses.replace(qt, **leaves)


def _arrays(leaf: Levels) -> dict[str, Any]:
    fields = dataclasses.fields(leaf)
    names = [field.name for field in fields if not field.metadata.get("static")]
    return {name: getattr(leaf, name) for name in names}


def _levels_to_state_dict(leaf: Levels) -> dict[str, Any]:
    return serialization.to_state_dict(_arrays(leaf))


def _levels_from_state_dict(leaf: Levels, state: dict[str, Any]) -> Levels:
    arrays = serialization.from_state_dict(_arrays(leaf), state)
    return dataclasses.replace(leaf, **arrays)


def _parts_to_state_dict(leaf: Segmented) -> dict[str, Any]:
    return serialization.to_state_dict(leaf.parts)


def _parts_from_state_dict(leaf: Segmented, state: dict[str, Any]) -> Segmented:
    parts = serialization.from_state_dict(leaf.parts, state)
    return dataclasses.replace(leaf, parts=parts)


# For `flax.serialization.to_bytes(variables)`; the metadata is that of the target.
serialization.register_serialization_state(
    QTensor, _to_state_dict, _from_state_dict, override=True
)
for _kind in (Nested, WithGlobal):
    serialization.register_serialization_state(
        _kind, _levels_to_state_dict, _levels_from_state_dict, override=True
    )
serialization.register_serialization_state(
    Segmented, _parts_to_state_dict, _parts_from_state_dict, override=True
)
