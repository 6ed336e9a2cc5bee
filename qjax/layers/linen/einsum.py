"""`Einsum`: a product with a kernel of many axes, written as an equation."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax.layers import contraction
from qjax.layers.linen.variables import kernel_and_bias


class Einsum(nn.Module):
    """An einsum of the input and a quantized kernel that is one matrix, or a stack.

    The rows of the matrix are the kernel's axes that are summed, flattened in the
    kernel's order, and its columns those that the output keeps. Groups run over the
    flattened rows. Letters that inputs, kernel and output share count matrices of a
    stack: ``"EBD,EDF->EBF"`` gives each expert its own.

    Example:
      >>> from qjax.layers.contraction import parse
      >>> from qjax.layers.linen import Einsum, to_variables
      >>> kernel = jnp.ones((4, 64, 16))
      >>> layer = Einsum(kernel.shape, "BTD,NDH->BTNH", use_bias=False)
      >>> matrix = parse("BTD,NDH->BTNH", kernel.shape).matrix(kernel)
      >>> matrix.shape
      (64, 64)
      >>> variables = to_variables({"kernel": qjax.quantize(matrix, group_size=32)})
      >>> layer.apply(variables, jnp.ones((2, 5, 64))).shape
      (2, 5, 4, 16)

    Attributes:
      shape: Shape of the kernel.
      einsum_str: The equation, ``"inputs,kernel->output"``; the inputs may have an
        ellipsis. It says which matrix was packed, and so belongs to the layer, where
        Flax's own also takes it in a call.
      bits: As in `Dense`.
      group_size: Rows of the matrix that share a scale; None for all of a column
        (default: 128).
      symmetric: As in `Dense`.
      use_bias: Whether to add a bias, of the kernel's axes that the output has, in the
        order of the output (default: True).
      dtype: As in `Dense`.
      param_dtype: As in `Dense`.
      kernel_init: As in `Dense`; it draws an array of ``shape``, as in Flax.
      bias_init: Initializer of the bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
    """

    shape: Sequence[int]
    einsum_str: str
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
        """Applies the equation.

        Args:
          inputs: The first operand.

        Returns:
          The output; its dtype is that of `nn.Einsum` with a kernel of the scales'
          dtype.

        Raises:
          ValueError: As `Dense`, or if the equation is none or the inputs do not fit
            it.
          NotImplementedError: If the equation is more than one product with a matrix.
        """
        inputs = jnp.asarray(inputs)
        equation = contraction.parse(self.einsum_str, self.shape)
        plan = equation.plan(inputs.shape)
        kernel, bias = kernel_and_bias(
            self,
            equation.matrix_shape,
            equation.bias_shape,
            equation.drawing(self.kernel_init),
            self.bias_init,
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
        a: Float[Array, "*stack k rank"],
        b: Float[Array, "*stack rank n"] | None,
        inputs: Num[Array, "..."],
    ) -> Float[Array, "..."]:
        """As in `Dense`."""
        equation = contraction.parse(self.einsum_str, self.shape)
        return contraction.factored(a, b, inputs, equation.plan(jnp.shape(inputs)))
