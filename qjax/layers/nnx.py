"""`Linear`: Flax nnx's `Linear` over a quantized kernel."""

from collections.abc import Generator

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax import ops
from qjax.layers import dense
from qjax.tensor import QTensor


class Quantized(nnx.Variable):
    """Integers of a quantized kernel: words, orders, integer zeros. Never trained."""


class Scale(nnx.Param):
    """Floats of a quantized kernel: scales, float zeros, codebooks, input scales.

    An `nnx.Param`, so that ``wrt=nnx.Param`` trains it; ``wrt=nnx.LoRAParam`` does not.
    """


class Linear(nnx.Module):
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
      ValueError: If ``in_features`` is no multiple of ``group_size`` or does not fill
        whole words, a kernel has another shape, or ``rngs`` is missing.

    Attributes:
      kernel: The kernel as a `QTensor` of arrays, for `qjax.dequantize` and the like.
      packed: The same `QTensor`, but each array a Variable, `Quantized` or `Scale`.
      bias: The bias, an `nnx.Param`, or None.
    """

    packed: QTensor
    bias: nnx.Param | None

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
        if rngs is None and (callable(kernel_init) or bias_init is not zeros):
            raise ValueError(
                "rngs=None, but kernel_init or bias_init takes a key; pass "
                "rngs=nnx.Rngs(seed)."
            )
        # The zeros draw nothing from the key that stands in.
        draw = (lambda: jax.random.key(0)) if rngs is None else rngs.params
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation
        if isinstance(kernel_init, QTensor):
            kernel = ops.prepare(kernel_init)
            shape = (*kernel.batch, in_features, out_features)
            dense.check_shapes(kernel, None, shape)
        else:
            kernel = dense.start(
                kernel_init,
                draw(),
                (in_features, out_features),
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                param_dtype=param_dtype,
            )
        self._fill(kernel)
        if use_bias:
            shape = (*kernel.batch, out_features)
            self.bias = nnx.Param(bias_init(draw(), shape, param_dtype))
        else:
            self.bias = nnx.data(None)

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
        if bias is not None:
            layer.bias = nnx.Param(jnp.asarray(bias))
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
        quantized = ops.quantize(kernel, bits, group_size, symmetric)
        return cls.from_qtensor(
            quantized, bias, dtype=dtype, implementation=implementation
        )

    @property
    def kernel(self) -> QTensor:
        """The kernel, put together of the values of its Variables."""
        return nnx.as_pure(self.packed)

    def load(
        self, kernel: QTensor, bias: Float[Array, "*batch n"] | None = None
    ) -> None:
        """Replaces the kernel by another of the same shape, whatever its format.

        Args:
          kernel: The new kernel. It is prepared for this device once, here.
          bias: The new bias; None leaves the present one.

        Raises:
          ValueError: If a shape differs, or there is a bias but the layer has none.
        """
        dense.check_shapes(kernel, bias, self.kernel.shape)
        if bias is not None and not self.use_bias:
            raise ValueError("bias was given, but the layer has use_bias=False.")
        self._fill(ops.prepare(kernel))
        if bias is not None:
            self.bias = nnx.Param(jnp.asarray(bias))

    def _fill(self, kernel: QTensor) -> None:
        # One Variable an array: jax.grad over one that holds integers raises.
        self.packed = nnx.data(jax.tree.map(_variable, kernel))

    def __call__(self, inputs: Num[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Applies the layer over the last dimension.

        Args:
          inputs: ``[..., in_features]``.

        Returns:
          ``[..., out_features]``; its dtype is that of `nnx.Linear` with a kernel of
          the scales' dtype.
        """
        return dense.apply(
            inputs,
            self.kernel,
            None if self.bias is None else self.bias[...],
            dtype=self.dtype,
            implementation=self.implementation,
        )

    def __nnx_repr__(self) -> Generator[reprlib.Object | reprlib.Attr, None, None]:
        """Shows the kernel as one line in place of its Variables."""
        for part in super().__nnx_repr__():
            if isinstance(part, reprlib.Attr) and part.key == "packed":
                yield reprlib.Attr("kernel", self.kernel)
            else:
                yield part


def _variable(leaf: Array) -> nnx.Variable:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return Scale(leaf) if floating else Quantized(leaf)
