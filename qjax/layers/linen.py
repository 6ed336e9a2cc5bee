"""`Dense`: Flax linen's `Dense` over a quantized kernel.

A quantized kernel is two variables of the same name. In the collection "quantized" lies
its `QTensor` without the float leaves: words, orders, integer zeros, and as static
metadata of the tree all that `apply` must know of the format. In "params" lies a
dictionary of the float leaves, which may be trained. So one definition of a model runs
any mix of formats, and loading weights is loading variables, as ever:

    {"params": {"kernel": {"scale": [groups, n], ...}, "bias": [n]},
     "quantized": {"kernel": QTensor(words, ...)}}
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import serialization
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax import ops
from qjax.layers import dense
from qjax.tensor import QTensor

QUANTIZED = "quantized"  # the collection of integers, never trained


class Dense(nn.Module):
    """A linear transformation over the last dimension of the input; quantized kernel.

    Example:
      A checkpoint's tensors, of any format, become the variables of the model.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import qjax
      >>> kernel = qjax.quantize(jnp.ones((256, 64)), bits=3, group_size=64)
      >>> params = {"kernel": kernel, "bias": jnp.zeros(64)}
      >>> variables = qjax.layers.linen.to_variables(params)
      >>> layer = qjax.layers.linen.Dense(features=64)
      >>> layer.apply(variables, jnp.ones((2, 256))).shape
      (2, 64)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (64,), 'kernel': {'scale': (4, 64)}}

    ``bits``, ``group_size``, ``symmetric``, ``param_dtype`` and the initializers say
    what `init` makes. `apply` takes whatever kernel the variables hold.

    Attributes:
      features: Number of output features.
      bits: Width of a code, 2 to 8 (default: 4).
      group_size: Input features that share a scale; None for all of a column
        (default: 128).
      symmetric: Whether zero is the middle code, so that none is stored
        (default: False).
      use_bias: Whether to add a bias to the output (default: True).
      dtype: Dtype of the computation (default: None, inferred from inputs and params).
      param_dtype: Dtype of new scales and of the bias (default: float32).
      kernel_init: Draws a dense kernel, which is rounded to nearest. None makes all
        scales zero and forms no dense kernel (default: None).
      bias_init: Initializer of the bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
    """

    features: int
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer = zeros
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Num[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Applies the layer over the last dimension.

        Args:
          inputs: ``[..., k]``.

        Returns:
          ``[..., features]``; its dtype is that of `nn.Dense` with a kernel of the
          scales' dtype.

        Raises:
          ValueError: If the variables hold no quantized kernel or one of another shape,
            or, from ``init``, if the attributes do not fit the inputs.
        """
        if self.is_initializing() and not self.has_variable(QUANTIZED, "kernel"):
            self._make_kernel(jnp.shape(inputs)[-1])
        kernel = self._read_kernel(jnp.shape(inputs)[-1])
        bias = None
        if self.use_bias:
            shape = (self.features,)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        return dense.apply(
            inputs, kernel, bias, dtype=self.dtype, implementation=self.implementation
        )

    def _make_kernel(self, in_features: int) -> None:
        def start(key: Array) -> dict[str, Array]:
            kernel = dense.start(
                self.kernel_init,
                key,
                (in_features, self.features),
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                param_dtype=self.param_dtype,
            )
            floats, rest = _split(kernel)
            self.put_variable(QUANTIZED, "kernel", rest)
            return floats

        self.param("kernel", start)

    def _read_kernel(self, in_features: int) -> QTensor:
        for collection in ("params", QUANTIZED):
            if not self.has_variable(collection, "kernel"):
                path = "/".join((collection, *self.path, "kernel"))
                raise ValueError(
                    f"{path} is missing; apply needs both collections, "
                    '{"params": ..., "quantized": ...}, as `to_variables` makes them.'
                )
        rest = self.get_variable(QUANTIZED, "kernel")
        kernel = dataclasses.replace(rest, **self.get_variable("params", "kernel"))
        dense.check_shapes(kernel, None, (in_features, self.features))
        return kernel


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
    floats: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    if isinstance(kernel := params.get("kernel"), QTensor):
        dense.check_shapes(kernel, params.get("bias"))
    for name, value in params.items():
        if isinstance(value, Mapping):
            below = to_variables(value)
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
            return dataclasses.replace(rest, **floats)
        if not isinstance(floats, Mapping):
            return floats
        return {name: join(value, rest.get(name, {})) for name, value in floats.items()}

    return join(variables["params"], variables.get(QUANTIZED, {}))


def _split(kernel: QTensor) -> tuple[dict[str, Array], QTensor]:
    """Takes the float leaves out of a prepared kernel, by name."""
    floats = {
        name: leaf
        for name in ("scale", "zero", "codebook", "input_scale")
        if (leaf := getattr(kernel, name)) is not None
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return floats, dataclasses.replace(kernel, **dict.fromkeys(floats))


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


# For `flax.serialization.to_bytes(variables)`; the metadata is that of the target.
serialization.register_serialization_state(
    QTensor, _to_state_dict, _from_state_dict, override=True
)
