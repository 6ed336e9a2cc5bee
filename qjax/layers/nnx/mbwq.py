"""`MBWQLinear`: bitorch-engine's layer of 4, 2 or mixed bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import zeros
from jaxtyping import Array, DTypeLike, Float, Float16, Num

from qjax import ops
from qjax.layers import contraction, dense, mbwq
from qjax.layers.nnx.packed import Projection
from qjax.tensor import Layout


class MBWQLinear(Projection):
    """bitorch-engine's ``MBWQLinearCuda``: 4, 2 or mixed bits, with an input scale.

    It computes ``(x * channel_scale) @ W + bias``, ``W`` of float zeros that are
    subtracted and of rows in the order ``q_perm``. Its state has the names and shapes
    that bitorch-engine gives it.

    Example:
      Any state may be loaded: its shapes and ``q_groups`` decide the mix, whatever the
      layer was made for.

      >>> from qjax.layers.nnx import MBWQLinear
      >>> layer = MBWQLinear(64, 8, bits=4, group_size=32)
      >>> mixed = MBWQLinear(64, 8, q_groups=[4, 0, 2, 4])
      >>> state = mixed.state_dict()
      >>> {name: array.shape for name, array in state.items()}["qweight"]
      (6, 8)
      >>> layer.load_state_dict(state)
      >>> layer.kernel
      QTensor(64x8, 3 bits, group 32, Stream(), q * s + z, float16 scale, ...)
      >>> layer(jnp.ones((2, 64), jnp.float16)).shape
      (2, 8)

    Its integer weights get their gradient, bitorch-engine's privileged one, from
    `qjax.training.nnx.with_shadows`. Unlike there, scales and zeros are parameters and
    may be trained, and two axes of inputs give two axes of outputs.

    Args:
      in_features: Number of input features, ``in_channels`` upstream.
      out_features: Number of output features, ``out_channels`` upstream.
      bits: Width of a code without ``q_groups``, 4 or 2; ``w_bit`` upstream
        (default: 4).
      group_size: Input features that share a scale without ``q_groups``; None, -1
        upstream, for all of a column (default: None).
      q_groups: Pairs (width, first row of words), one a group, for rows of several
        widths; ``use_mbw`` upstream, with as many ``groups``, and ``rows_packed``
        follows (default: None).
      use_bias: Whether to add a bias; ``disable_bias=False`` upstream (default: False).
      dtype: Dtype of the computation (default: None, inferred from inputs and params,
        which are float16).
      implementation: As in `qjax.matmul` (default: None).

    Raises:
      ValueError: If the arguments do not fit together.

    Attributes:
      kernel: The kernel, `formats.mbwq`, with ``channel_scale`` its ``input_scale``.
      packed: The same `QTensor`, but each array a Variable, `Quantized` or `Scale`.
      bias: The bias, an `nnx.Param`, or None.
      mixed: Whether the state has ``q_groups``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int | None = None,
        q_groups: Sequence[int] | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.mixed = q_groups is not None
        self.dtype = dtype
        self.param_dtype = jnp.float16
        self.implementation = implementation
        shape = in_features, out_features
        kernel = mbwq.empty(shape, bits=bits, group_size=group_size, q_groups=q_groups)
        self._start(shape, (out_features,) if use_bias else None, kernel, zeros, None)

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        """Replaces all of the layer by a state of the same number of features.

        Args:
          tensors: Concrete arrays by bitorch-engine's names: ``qweight`` int32,
            ``scales`` and ``zeros`` float16 ``[groups, n]``, ``q_perm`` int16 ``[k]``;
            optionally ``channel_scale`` float16 ``[1, 1, k]``, ``q_groups`` int16
            ``[2 * groups]``, ``bias`` float16 ``[n]``, and what upstream derives or
            ignores. Where there are as many scales as the layer's own group size
            makes, it stays; else the size is the power of two that fits.

        Raises:
          ValueError: Naming the tensor that does not fit the others or the layer.
        """
        size = self.kernel.segments[0].group_size
        kernel, bias = mbwq.read(tensors, size, use_bias=self.use_bias)
        self.load(kernel, bias)
        self.mixed = "q_groups" in tensors

    def state_dict(self) -> dict[str, Array]:
        """Gives the state back, bit for bit as it was loaded.

        Returns:
          ``qweight``, ``scales``, ``zeros``, ``q_perm``, ``channel_scale``, and
          ``q_groups`` and ``bias`` where the layer has them.

        Raises:
          ValueError: If bitorch-engine's kernels could not read it, with the reason.
        """
        bias = None if self.bias is None else self.bias[...]
        return mbwq.write(self.kernel, bias, self.mixed)

    def set_scales(self, scales: Float16[Array | np.ndarray, "groups n"]) -> None:
        """Replaces the scales.

        Args:
          scales: float16 ``[groups, n]``.

        Raises:
          ValueError: If shape or dtype differ from the layer's own.
        """
        self._fill(mbwq.with_scales(self.kernel, scales))

    def set_zeros(self, zeros: Float16[Array | np.ndarray, "groups n"]) -> None:
        """Replaces the zeros.

        Args:
          zeros: float16 ``[groups, n]``, to be subtracted.

        Raises:
          ValueError: If shape or dtype differ from the layer's own.
        """
        self._fill(mbwq.with_zeros(self.kernel, zeros))

    def prepare(self, layout: Layout | None = None) -> None:
        """Prepares the kernel for its device, as loading does: after a move.

        Args:
          layout: As in `qjax.prepare`.
        """
        self._fill(ops.prepare(self.kernel, layout=layout))

    def __call__(self, inputs: Num[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Applies the layer over the last dimension.

        Args:
          inputs: ``[..., in_features]``.

        Returns:
          ``[..., out_features]``; float16 for float16 inputs.
        """
        return self._apply(dense.apply, inputs)

    def factored(
        self,
        a: Float[Array, "k rank"],
        b: Float[Array, "rank n"] | None,
        inputs: Num[Array, "*batch k"],
    ) -> Float[Array, "*batch n"]:
        """As in `Linear`: ``a`` multiplies inputs without ``channel_scale``."""
        return contraction.low_rank(inputs, a, b)
