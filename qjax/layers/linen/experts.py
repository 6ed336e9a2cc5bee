"""`Experts`: a kernel for each expert, of which every token takes its own."""

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax.layers import experts
from qjax.layers.linen.variables import kernel_and_bias
from qjax.tensor import QTensor


class Experts(nn.Module):
    """Linear transformations of the experts of a mixture; quantized kernels.

    Only the experts that have tokens are read, and the work grows with the tokens, not
    with the experts.

    Example:
      >>> from qjax.layers.linen import to_variables
      >>> kernel = qjax.quantize(jnp.ones((4, 64, 8)), group_size=32)
      >>> params = {"kernel": kernel, "bias": jnp.zeros((4, 8))}
      >>> layer = Experts(num_experts=4, features=8)
      >>> group_sizes = jnp.array([2, 0, 1, 3])
      >>> layer.apply(to_variables(params), jnp.ones((6, 64)), group_sizes).shape
      (6, 8)

      One layer alone routes tokens itself; a block of several sorts them once, with
      `qjax.layers.experts.dispatch`.

      >>> expert, share = jnp.array([[0, 3], [3, 1]]), jnp.full((2, 2), 0.5)
      >>> routed = jnp.ones((2, 64)), expert, share
      >>> layer.apply(to_variables(params), *routed, method="route").shape
      (2, 8)

    Attributes:
      num_experts: Number of experts.
      features: Number of output features.
      bits: As in `Dense`.
      group_size: As in `Dense`.
      symmetric: As in `Dense`.
      use_bias: Whether to add a bias, one for each expert (default: True).
      dtype: As in `Dense`.
      param_dtype: As in `Dense`.
      kernel_init: As in `Dense`; it draws ``[num_experts, k, features]``.
      bias_init: Initializer of the biases (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
    """

    num_experts: int
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

    def __call__(
        self, inputs: Num[Array, "t k"], group_sizes: Integer[Array, " experts"]
    ) -> Float[Array, "t n"]:
        """Applies the layer to tokens that are sorted by expert.

        Args:
          inputs: ``[t, k]``.
          group_sizes: ``[num_experts]``, how many tokens each expert has.

        Returns:
          ``[t, features]``; rows beyond the sum of ``group_sizes`` are zero. Its dtype
          is that of `nn.Dense` with a kernel of the scales' dtype.

        Raises:
          ValueError: As `Dense`, or if the arguments do not fit.
        """
        kernel, bias = self._weights(jnp.shape(inputs)[-1])
        return experts.apply(
            inputs,
            kernel,
            bias,
            group_sizes,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    def route(
        self,
        inputs: Num[Array, "t k"],
        expert: Integer[Array, "t top_k"],
        weight: Float[Array, "t top_k"],
    ) -> Float[Array, "t n"]:
        """Sorts tokens by expert, applies the layer, and sums over each token's.

        Args:
          inputs: ``[t, k]``.
          expert: ``[t, top_k]``; an expert that there is not gives zero.
          weight: ``[t, top_k]``, what each counts.

        Returns:
          ``[t, features]``, in the dtype of a call.

        Raises:
          ValueError: As `Dense`, or if the arguments do not fit.
        """
        return experts.route(self, self.num_experts, inputs, expert, weight)

    @nn.nowrap
    def factored(
        self,
        a: Float[Array, "experts k rank"],
        b: Float[Array, "experts rank n"] | None,
        inputs: Num[Array, "t k"],
        group_sizes: Integer[Array, " experts"],
    ) -> Float[Array, "t n"]:
        """As in `Dense`; the other arguments are those of a call."""
        return experts.factored(a, b, inputs, group_sizes)

    @nn.compact
    def _weights(self, k: int) -> tuple[QTensor, Array | None]:
        return kernel_and_bias(
            self,
            (self.num_experts, k, self.features),
            (self.num_experts, self.features),
            self.kernel_init,
            self.bias_init,
            experts.AXES,
        )
