"""`Einsum`: a product with a kernel of many axes, written as an equation."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax import rtn
from qjax.layers import contraction
from qjax.layers.nnx.packed import Projection
from qjax.tensor import QTensor, check_packed


class Einsum(Projection):
    """An einsum of the input and a quantized kernel that is one matrix, or a stack.

    The rows of the matrix are the kernel's axes that are summed, flattened in the
    kernel's order, and its columns those that the output keeps. Groups run over the
    flattened rows. Letters that inputs, kernel and output share count matrices of a
    stack: ``"EBD,EDF->EBF"`` gives each expert its own.

    Example:
      >>> from qjax.layers.nnx import Einsum
      >>> kernel = jax.random.normal(jax.random.key(0), (4, 64, 16))
      >>> layer = Einsum.from_kernel("BTD,NDH->BTNH", kernel, group_size=32)
      >>> layer.kernel.shape
      (64, 64)
      >>> layer(jnp.ones((2, 5, 64))).shape
      (2, 5, 4, 16)

      An empty one, with a bias, for `load`.

      >>> layer = Einsum("BTNH,NHD->BTD", (4, 16, 64), (64,), group_size=32)
      >>> layer(jnp.ones((2, 5, 4, 16))).shape
      (2, 5, 64)

    Args:
      einsum_str: The equation, ``"inputs,kernel->output"``; the inputs may have an
        ellipsis. It says which matrix was packed, and so belongs to the layer, where
        Flax's own also takes it in a call.
      kernel_shape: Shape of the kernel.
      bias_shape: Shape of the bias: the kernel's axes that the output has, in the order
        of the output. None for a layer without one (default: None).
      bits: As in `Linear`.
      group_size: Rows of the matrix that share a scale; None for all of a column
        (default: 128).
      symmetric: As in `Linear`.
      dtype: As in `Linear`.
      param_dtype: As in `Linear`.
      kernel_init: As in `Linear`; it draws an array of ``kernel_shape``, as in Flax.
      bias_init: Initializer of the bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
      rngs: As in `Linear`.

    Raises:
      ValueError: As `Linear`, or if the equation is none, or ``bias_shape`` differs
        from what it says.
      NotImplementedError: If the equation is more than one product with a matrix.

    Attributes:
      kernel: As in `Linear`: ``[*stack, k, n]``.
      packed: As in `Linear`.
      bias: The bias, an `nnx.Param`, or None.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer | QTensor | None = None,
        bias_init: Initializer = zeros,
        implementation: str | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.equation = contraction.parse(einsum_str, kernel_shape)
        wanted = self.equation.bias_shape
        if bias_shape is not None and tuple(bias_shape) != wanted:
            raise ValueError(
                f"bias_shape={tuple(bias_shape)} must be {wanted}, the kernel's axes "
                f"in the output of einsum_str={einsum_str!r}."
            )
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        if not isinstance(kernel_init, QTensor):
            kernel_init = self.equation.drawing(kernel_init)
        self._start(
            self.equation.matrix_shape,
            None if bias_shape is None else wanted,
            kernel_init,
            bias_init,
            rngs,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
        )

    @classmethod
    def from_qtensor(
        cls,
        einsum_str: str,
        kernel_shape: Sequence[int],
        kernel: QTensor,
        bias: Float[Array, "..."] | None = None,
        *,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Einsum":
        """Makes a layer of a quantized kernel: any format, act-order, mixed widths.

        Args:
          einsum_str: As in the constructor.
          kernel_shape: As in the constructor.
          kernel: The matrix, ``[*stack, k, n]``. It is prepared for this device once,
            here.
          bias: The bias, or None for a layer without one.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer.

        Raises:
          TypeError: If the kernel is no `QTensor`.
          ValueError: If the kernel or the bias does not fit the equation.
          NotImplementedError: As the constructor.
        """
        check_packed(kernel, "kernel")
        equation = contraction.parse(einsum_str, kernel_shape)
        layer = cls(
            einsum_str,
            kernel_shape,
            None if bias is None else equation.bias_shape,
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
        einsum_str: str,
        kernel: Float[Array, "..."],
        bias: Float[Array, "..."] | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Einsum":
        """Makes a layer of a dense kernel, rounded to nearest by `qjax.quantize`.

        Args:
          einsum_str: As in the constructor.
          kernel: The second operand, as in `nnx.Einsum`.
          bias: The bias, or None for a layer without one.
          bits: Width of a code, 2 to 8.
          group_size: Rows of the matrix that share a scale.
          symmetric: Whether zero is the middle code, so that none is stored.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer; its scales have the dtype of ``kernel``.

        Raises:
          ValueError: As `qjax.quantize`, or if the bias does not fit the equation.
          NotImplementedError: As the constructor.
        """
        matrix = contraction.parse(einsum_str, kernel.shape).matrix(kernel)
        return cls.from_qtensor(
            einsum_str,
            kernel.shape,
            rtn.quantize(matrix, bits, group_size, symmetric),
            bias,
            dtype=dtype,
            implementation=implementation,
        )

    def __call__(self, inputs: Num[Array, "..."]) -> Float[Array, "..."]:
        """Applies the equation.

        Args:
          inputs: The first operand.

        Returns:
          The output; its dtype is that of `nnx.Einsum` with a kernel of the scales'
          dtype.

        Raises:
          ValueError: If the inputs do not fit the equation.
        """
        inputs = jnp.asarray(inputs)
        plan = self.equation.plan(inputs.shape)
        return self._apply(contraction.apply, inputs, plan)

    def factored(
        self,
        a: Float[Array, "*stack k rank"],
        b: Float[Array, "*stack rank n"] | None,
        inputs: Num[Array, "..."],
    ) -> Float[Array, "..."]:
        """As in `Linear`."""
        plan = self.equation.plan(jnp.shape(inputs))
        return contraction.factored(a, b, inputs, plan)
