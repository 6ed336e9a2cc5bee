"""`Dense` and `DenseGeneral`: products over one axis of the input, or several."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax.layers import contraction, dense
from qjax.layers.linen.variables import kernel_and_bias


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
          TypeError: If the variables hold a dense kernel.
          ValueError: If the variables hold no quantized kernel or one of another shape,
            or, from ``init``, if the attributes do not fit the inputs.
        """
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel, bias = kernel_and_bias(
            self, shape, (self.features,), self.kernel_init, self.bias_init
        )
        return dense.apply(
            inputs, kernel, bias, dtype=self.dtype, implementation=self.implementation
        )

    @nn.nowrap
    def factored(
        self,
        a: Float[Array, "k rank"],
        b: Float[Array, "rank n"] | None,
        inputs: Num[Array, "*batch k"],
    ) -> Float[Array, "*batch n"]:
        """Applies the layer as if its kernel were ``a @ b``, and it had no bias.

        Args:
          a: ``[k, rank]``, for a stack ``[*stack, k, rank]``: as the kernel, ``k`` and
            ``n`` flattened.
          b: ``[rank, n]`` of the dtype of ``a``; None where the kernel is ``a``.
          inputs: As in a call.

        Returns:
          What a call returns, in the dtype of ``a``.
        """
        return contraction.low_rank(inputs, a, b)


class DenseGeneral(nn.Module):
    """A linear transformation over any axes of the input; quantized kernel.

    The kernel is one matrix: its rows are the axes of the input, flattened in their
    order, and its columns the features. Groups run over the flattened rows.

    Example:
      An attention's output projection sums heads and their features.

      >>> from qjax.layers.linen import DenseGeneral, to_variables
      >>> heads, head_dim, model = 4, 32, 64
      >>> kernel = jnp.ones((heads, head_dim, model))
      >>> kernel = qjax.quantize(kernel.reshape(-1, model), group_size=128)
      >>> layer = DenseGeneral(model, axis=(-2, -1), use_bias=False)
      >>> variables = to_variables({"kernel": kernel})
      >>> layer.apply(variables, jnp.ones((2, 5, heads, head_dim))).shape
      (2, 5, 64)

      The projections into heads have several features; so has the bias.

      >>> kernel = qjax.quantize(jnp.ones((model, heads * head_dim)), group_size=64)
      >>> params = {"kernel": kernel, "bias": jnp.zeros((heads, head_dim))}
      >>> layer = DenseGeneral((heads, head_dim))
      >>> layer.apply(to_variables(params), jnp.ones((2, 5, model))).shape
      (2, 5, 4, 32)

    ``batch_dims`` of Flax's own layer is not there: `Einsum` has stacks of kernels.

    Attributes:
      features: Number of output features, or several: the output's last axes.
      axis: Axis of the input that is summed, or several; in ascending order, as in
        Flax (default: -1).
      bits: As in `Dense`.
      group_size: Rows of the flattened kernel that share a scale; None for all of a
        column (default: 128).
      symmetric: As in `Dense`.
      use_bias: Whether to add a bias of the shape of ``features`` (default: True).
      dtype: As in `Dense`.
      param_dtype: As in `Dense`.
      kernel_init: As in `Dense`; it draws the flattened kernel, as in Flax.
      bias_init: Initializer of the flattened bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
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
    def __call__(self, inputs: Num[Array, "..."]) -> Float[Array, "..."]:
        """Applies the layer over its axes.

        Args:
          inputs: Has the axes ``axis``.

        Returns:
          The other axes of the inputs, and ``features``; its dtype is that of
          `nn.DenseGeneral` with a kernel of the scales' dtype.

        Raises:
          ValueError: As `Dense`, or if the inputs lack an axis.
        """
        inputs = jnp.asarray(inputs)
        features = contraction.as_tuple(self.features)
        plan = self._plan(inputs.shape)
        rows = math.prod(inputs.shape[axis] for axis in plan.summed)
        shape = (rows, math.prod(features))
        bias_init = contraction.flat(self.bias_init)
        kernel, bias = kernel_and_bias(
            self, shape, features, self.kernel_init, bias_init
        )
        return contraction.apply(
            inputs,
            kernel,
            bias,
            plan,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    @nn.nowrap
    def factored(
        self,
        a: Float[Array, "k rank"],
        b: Float[Array, "rank n"] | None,
        inputs: Num[Array, "..."],
    ) -> Float[Array, "..."]:
        """As in `Dense`."""
        return contraction.factored(a, b, inputs, self._plan(jnp.shape(inputs)))

    @nn.nowrap
    def _plan(self, shape: tuple[int, ...]) -> contraction.Plan:
        features = contraction.as_tuple(self.features)
        return contraction.plan_axes(self.axis, features, shape)
