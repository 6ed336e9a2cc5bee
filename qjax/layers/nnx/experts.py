"""`Experts`: a kernel for each expert, of which every token takes its own."""

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Integer, Num

from qjax import rtn
from qjax.layers import dense, experts
from qjax.layers.nnx.packed import Projection
from qjax.tensor import QTensor, check_packed


class Experts(Projection):
    """Linear transformations of the experts of a mixture; quantized kernels.

    Only the experts that have tokens are read, and the work grows with the tokens, not
    with the experts.

    Example:
      A feed-forward block sorts its tokens once.

      >>> from qjax.layers.experts import combine, dispatch
      >>> up = Experts(4, 64, 128, group_size=32)
      >>> down = Experts(4, 128, 64, group_size=32)
      >>> def block(x, logits):
      ...     weight, expert = jax.lax.top_k(jax.nn.softmax(logits), 2)
      ...     routed = dispatch(x, expert, num_experts=4)
      ...     h = jax.nn.relu(up(routed.rows, routed.group_sizes))
      ...     return combine(down(h, routed.group_sizes), routed, weight)
      >>> block(jnp.ones((6, 64)), jnp.ones((6, 4))).shape
      (6, 64)

      One layer alone routes them itself.

      >>> import jax
      >>> kernel = jax.random.normal(jax.random.key(0), (4, 64, 8))
      >>> layer = Experts.from_kernel(kernel, group_size=32)
      >>> expert, weight = jnp.array([[0, 3], [3, 1]]), jnp.full((2, 2), 0.5)
      >>> layer.route(jnp.ones((2, 64)), expert, weight).shape
      (2, 8)

    Args:
      num_experts: Number of experts.
      in_features: Number of input features.
      out_features: Number of output features.
      bits: As in `Linear`.
      group_size: As in `Linear`.
      symmetric: As in `Linear`.
      use_bias: Whether to add a bias, one for each expert (default: True).
      dtype: As in `Linear`.
      param_dtype: As in `Linear`.
      kernel_init: As in `Linear`; it draws ``[num_experts, in_features,
        out_features]``.
      bias_init: Initializer of the biases (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
      rngs: As in `Linear`.

    Raises:
      ValueError: As `Linear`.

    Attributes:
      kernel: As in `Linear`: ``[num_experts, k, n]``.
      packed: As in `Linear`.
      bias: ``[num_experts, n]``, an `nnx.Param`, or None.
    """

    _axes = experts.AXES

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
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
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        self._start(
            (num_experts, in_features, out_features),
            (num_experts, out_features) if use_bias else None,
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
        kernel: QTensor,
        bias: Float[Array, "experts n"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Experts":
        """Makes a layer of quantized kernels: any format, act-order, mixed widths.

        Args:
          kernel: ``[num_experts, k, n]``. It is prepared for this device once, here.
          bias: ``[num_experts, n]``, or None for a layer without one.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer.

        Raises:
          TypeError: If the kernel is no `QTensor`.
          ValueError: If the kernel is no stack, or the bias does not fit it.
        """
        check_packed(kernel, "kernel")
        if kernel.ndim < 3:
            raise ValueError(f"kernel.shape={kernel.shape} must be {cls._axes}.")
        dense.check_shapes(kernel, bias)
        layer = cls(
            *kernel.shape[-3:],
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
        kernel: Float[Array, "experts k n"],
        bias: Float[Array, "experts n"] | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Experts":
        """Makes a layer of dense kernels, rounded to nearest by `qjax.quantize`.

        Args:
          kernel: ``[num_experts, k, n]``.
          bias: ``[num_experts, n]``, or None for a layer without one.
          bits: Width of a code, 2 to 8.
          group_size: Input features that share a scale; None for all of a column.
          symmetric: Whether zero is the middle code, so that none is stored.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer; its scales have the dtype of ``kernel``.

        Raises:
          ValueError: As `qjax.quantize` and `from_qtensor`.
        """
        quantized = rtn.quantize(kernel, bits, group_size, symmetric)
        return cls.from_qtensor(
            quantized, bias, dtype=dtype, implementation=implementation
        )

    def __call__(
        self, inputs: Num[Array, "t k"], group_sizes: Integer[Array, " experts"]
    ) -> Float[Array, "t n"]:
        """Applies the layer to tokens that are sorted by expert.

        Args:
          inputs: ``[t, in_features]``.
          group_sizes: ``[num_experts]``, how many tokens each expert has.

        Returns:
          ``[t, out_features]``; rows beyond the sum of ``group_sizes`` are zero. Its
          dtype is that of `nnx.Linear` with a kernel of the scales' dtype.

        Raises:
          ValueError: If shapes or dtypes do not fit.
        """
        return self._apply(experts.apply, inputs, group_sizes)

    def route(
        self,
        inputs: Num[Array, "t k"],
        expert: Integer[Array, "t top_k"],
        weight: Float[Array, "t top_k"],
    ) -> Float[Array, "t n"]:
        """Sorts tokens by expert, applies the layer, and sums over each token's.

        Args:
          inputs: ``[t, in_features]``.
          expert: ``[t, top_k]``; an expert that there is not gives zero.
          weight: ``[t, top_k]``, what each counts.

        Returns:
          ``[t, out_features]``, in the dtype of a call.

        Raises:
          ValueError: If shapes or dtypes do not fit.
        """
        return experts.route(self, self.num_experts, inputs, expert, weight)

    def factored(
        self,
        a: Float[Array, "experts k rank"],
        b: Float[Array, "experts rank n"] | None,
        inputs: Num[Array, "t k"],
        group_sizes: Integer[Array, " experts"],
    ) -> Float[Array, "t n"]:
        """As in `Linear`; the other arguments are those of a call."""
        return experts.factored(a, b, inputs, group_sizes)
