"""`LinearGeneral`: a product over any axes of the input."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax import rtn
from qjax.layers import contraction
from qjax.layers.nnx.packed import Projection
from qjax.tensor import QTensor, check_packed


class LinearGeneral(Projection):
    """A linear transformation over any axes of the input; quantized kernel.

    The kernel is one matrix: its rows are the axes of the input, flattened in their
    order, and its columns the features. Groups run over the flattened rows.

    Example:
      An attention's output projection sums heads and their features.

      >>> from qjax.layers.nnx import LinearGeneral
      >>> heads, head_dim, model = 4, 32, 64
      >>> layer = LinearGeneral((heads, head_dim), model, axis=(-2, -1), group_size=128)
      >>> dense = jax.random.normal(jax.random.key(0), (heads, head_dim, model))
      >>> layer.load(qjax.quantize(dense.reshape(-1, model), group_size=128))
      >>> layer(jnp.ones((2, 5, heads, head_dim))).shape
      (2, 5, 64)
      >>> layer.kernel.shape
      (128, 64)

      A dense kernel makes a layer of its own.

      >>> LinearGeneral.from_kernel(dense, axis=(-2, -1)).in_features
      (4, 32)

    ``batch_axis`` of Flax's own layer is not there: `Einsum` has stacks of kernels.

    Args:
      in_features: Number of input features, or one for each axis.
      out_features: Number of output features, or several: the output's last axes.
      axis: Axis of the input that is summed, or several; in ascending order, as in
        Flax (default: -1).
      bits: As in `Linear`.
      group_size: Rows of the flattened kernel that share a scale; None for all of a
        column (default: 128).
      symmetric: As in `Linear`.
      use_bias: Whether to add a bias of the shape ``out_features`` (default: True).
      dtype: As in `Linear`.
      param_dtype: As in `Linear`.
      kernel_init: As in `Linear`; it draws the flattened kernel, as in Flax.
      bias_init: Initializer of the flattened bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
      rngs: As in `Linear`.

    Raises:
      ValueError: As `Linear`, or if ``in_features`` and ``axis`` differ in length.

    Attributes:
      kernel: As in `Linear`: ``[k, n]``, both flattened.
      packed: As in `Linear`.
      bias: The bias, an `nnx.Param` of the shape ``out_features``, or None.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer | QTensor | None = None,
        bias_init: Initializer = zeros,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.in_features = contraction.as_tuple(in_features)
        self.out_features = contraction.as_tuple(out_features)
        self.axis = contraction.as_tuple(axis)
        if len(self.in_features) != len(self.axis):
            raise ValueError(
                f"in_features={in_features} must have one size for each of axis={axis}."
            )
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        self._start(
            (math.prod(self.in_features), math.prod(self.out_features)),
            self.out_features if use_bias else None,
            kernel_init,
            contraction.flat(bias_init),
            rngs,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
        )

    @classmethod
    def from_qtensor(
        cls,
        kernel: QTensor,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        bias: Float[Array, "..."] | None = None,
        *,
        axis: int | Sequence[int] = -1,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "LinearGeneral":
        """Makes a layer of a quantized kernel: any format, act-order, mixed widths.

        Args:
          kernel: ``[k, n]``, or a stack of them for `nnx.vmap` and `nnx.scan`. It is
            prepared for this device once, here.
          in_features: As in the constructor; their product is k.
          out_features: As in the constructor; their product is n.
          bias: ``[*out_features]``, or None for a layer without one.
          axis: As in the constructor.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer.

        Raises:
          TypeError: If the kernel is no `QTensor`.
          ValueError: If the kernel or the bias does not fit the features.
        """
        check_packed(kernel, "kernel")
        layer = cls(
            in_features,
            out_features,
            axis=axis,
            use_bias=bias is not None,
            dtype=dtype,
            param_dtype=kernel.dtype,
            kernel_init=kernel,
            implementation=implementation,
        )
        layer._replace_bias(bias)
        return layer

    @classmethod
    def from_kernel(
        cls,
        kernel: Float[Array, "..."],
        bias: Float[Array, "..."] | None = None,
        *,
        axis: int | Sequence[int] = -1,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "LinearGeneral":
        """Makes a layer of a dense kernel, rounded to nearest by `qjax.quantize`.

        Args:
          kernel: ``[*in_features, *out_features]`` as in `nnx.LinearGeneral`; it has an
            input axis for each of ``axis``.
          bias: ``[*out_features]``, or None for a layer without one.
          axis: As in the constructor.
          bits: Width of a code, 2 to 8.
          group_size: Rows of the flattened kernel that share a scale.
          symmetric: Whether zero is the middle code, so that none is stored.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer; its scales have the dtype of ``kernel``.

        Raises:
          ValueError: As `qjax.quantize`, or if the bias does not fit the kernel.
        """
        count = len(contraction.as_tuple(axis))
        sizes = kernel.shape[:count], kernel.shape[count:]
        matrix = kernel.reshape(math.prod(sizes[0]), math.prod(sizes[1]))
        return cls.from_qtensor(
            rtn.quantize(matrix, bits, group_size, symmetric),
            *sizes,
            bias,
            axis=axis,
            dtype=dtype,
            implementation=implementation,
        )

    def __call__(self, inputs: Num[Array, "..."]) -> Float[Array, "..."]:
        """Applies the layer over its axes.

        Args:
          inputs: Has the axes ``axis``, of the sizes ``in_features``.

        Returns:
          The other axes of the inputs, and ``out_features``; its dtype is that of
          `nnx.LinearGeneral` with a kernel of the scales' dtype.

        Raises:
          ValueError: If the inputs do not fit.
        """
        inputs = jnp.asarray(inputs)
        return self._apply(contraction.apply, inputs, self._plan(inputs.shape))

    def factored(
        self,
        a: Float[Array, "k rank"],
        b: Float[Array, "rank n"] | None,
        inputs: Num[Array, "..."],
    ) -> Float[Array, "..."]:
        """As in `Linear`."""
        return contraction.factored(a, b, inputs, self._plan(jnp.shape(inputs)))

    def _plan(self, shape: tuple[int, ...]) -> contraction.Plan:
        plan = contraction.plan_axes(self.axis, self.out_features, shape)
        if tuple(shape[axis] for axis in plan.summed) != self.in_features:
            raise ValueError(
                f"inputs.shape={shape} must have in_features={self.in_features} "
                f"on axis={self.axis}, in ascending order."
            )
        return plan
