"""`Linear`: a product over the last axis of the input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax import rtn
from qjax.layers import contraction, dense
from qjax.layers.nnx.packed import Projection
from qjax.tensor import QTensor


class Linear(Projection):
    """A linear transformation over the last dimension of the input; quantized kernel.

    Example:
      A new layer is empty, all scales zero, until a kernel is loaded; no dense kernel
      is ever formed.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import qjax
      >>> from flax import nnx
      >>> layer = qjax.layers.nnx.Linear(256, 64, bits=4, group_size=128)
      >>> kernel = jax.random.normal(jax.random.key(0), (256, 64))
      >>> layer.load(qjax.quantize(kernel, bits=4, group_size=128))
      >>> layer(jnp.ones((2, 256))).shape
      (2, 64)

      A checkpoint's tensor, or a dense kernel, makes a layer of its own. Its words are
      `Quantized`; its scales are parameters and may be trained.

      >>> layer = qjax.layers.nnx.Linear.from_kernel(kernel, bits=3, group_size=64)
      >>> layer.kernel
      QTensor(256x64, 3 bits, group 64, Stream(), (q - z) * s, float32 scale, 7.25 KiB)
      >>> jax.tree.map(jnp.shape, nnx.state(layer, nnx.Param))
      State({
        'packed': {
          'scale': Scale(
            value=(4, 64)
          )
        }
      })

    Args:
      in_features: Number of input features.
      out_features: Number of output features.
      bits: Width of a code, 2 to 8 (default: 4).
      group_size: Input features that share a scale; None for all of a column
        (default: 128).
      symmetric: Whether zero is the middle code, so that none is stored
        (default: False).
      use_bias: Whether to add a bias to the output (default: True).
      dtype: Dtype of the computation (default: None, inferred from inputs and params).
      param_dtype: Dtype of new scales and of the bias (default: float32).
      kernel_init: Draws a dense kernel, which is rounded to nearest. None leaves the
        layer empty, for `load`. A `QTensor` is taken, and ``bits``, ``group_size`` and
        ``symmetric`` are not looked at (default: None).
      bias_init: Initializer of the bias (default: zeros).
      implementation: As in `qjax.matmul` (default: None).
      rngs: Random keys; needed by initializers that draw (default: None).

    Raises:
      TypeError: If ``kernel_init`` is an array.
      ValueError: If ``in_features`` is no multiple of ``group_size`` or does not fill
        whole words, a kernel has another shape, or ``rngs`` is missing.

    Attributes:
      kernel: The kernel as a `QTensor` of arrays, for `qjax.dequantize` and the like.
      packed: The same `QTensor`, but each array a Variable, `Quantized` or `Scale`.
      bias: The bias, an `nnx.Param`, or None.
    """

    def __init__(
        self,
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
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        self._start(
            (in_features, out_features),
            (out_features,) if use_bias else None,
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
        bias: Float[Array, "*batch n"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Linear":
        """Makes a layer of a quantized kernel: any format, act-order, mixed widths.

        Args:
          kernel: ``[k, n]``, or a stack of them for `nnx.vmap` and `nnx.scan`. It is
            prepared for this device once, here.
          bias: ``[n]``, or None for a layer without one.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer.

        Raises:
          TypeError: If the kernel is no `QTensor`.
          ValueError: If the bias does not fit the kernel.
        """
        dense.check_shapes(kernel, bias)
        layer = cls(
            *kernel.shape[-2:],
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
        kernel: Float[Array, "*batch k n"],
        bias: Float[Array, "*batch n"] | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "Linear":
        """Makes a layer of a dense kernel, rounded to nearest by `qjax.quantize`.

        Args:
          kernel: ``[k, n]`` as in `nnx.Linear`, or a stack of them.
          bias: ``[n]``, or None for a layer without one.
          bits: Width of a code, 2 to 8.
          group_size: Input features that share a scale; None for all of a column.
          symmetric: Whether zero is the middle code, so that none is stored.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer; its scales have the dtype of ``kernel``.

        Raises:
          ValueError: As `qjax.quantize`, or if the bias does not fit the kernel.
        """
        quantized = rtn.quantize(kernel, bits, group_size, symmetric)
        return cls.from_qtensor(
            quantized, bias, dtype=dtype, implementation=implementation
        )

    def __call__(
        self, inputs: Num[Array, "*batch k"], out_sharding: jax.P | None = None
    ) -> Float[Array, "*batch n"]:
        """Applies the layer over the last dimension.

        Args:
          inputs: ``[..., in_features]``.
          out_sharding: As in `nnx.Linear`, on a mesh of explicit axes (default: None).

        Returns:
          ``[..., out_features]``; its dtype is that of `nnx.Linear` with a kernel of
          the scales' dtype.
        """
        y = self._apply(dense.apply, inputs)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

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
