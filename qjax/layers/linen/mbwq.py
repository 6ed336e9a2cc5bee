"""`MBWQDense`: bitorch-engine's layer of 4, 2 or mixed bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import zeros
from jaxtyping import Array, DTypeLike, Float, Float16, Num

from qjax.layers import contraction, dense, mbwq
from qjax.layers.linen.variables import to_params, to_variables, weight
from qjax.tensor import QTensor


class MBWQDense(nn.Module):
    """bitorch-engine's ``MBWQLinearCuda``: 4, 2 or mixed bits, with an input scale.

    It computes ``(x * channel_scale) @ W + bias``, ``W`` of float zeros that are
    subtracted and of rows in the order ``q_perm``. `load_state_dict` makes its
    variables of the state that bitorch-engine saves, and `state_dict` writes it.

    Example:
      >>> from qjax.layers.linen import MBWQDense
      >>> mixed = MBWQDense(8, q_groups=(4, 0, 2, 4))
      >>> x = jnp.ones((2, 64), jnp.float16)
      >>> state = mixed.state_dict(mixed.init(jax.random.key(0), x))
      >>> state["qweight"].shape
      (6, 8)
      >>> layer = MBWQDense(8)
      >>> layer.apply(layer.load_state_dict(state), x).shape
      (2, 8)

    ``bits``, ``group_size`` and ``q_groups`` say what `init` makes. `apply` takes
    whatever kernel the variables hold. The integer weights get their gradient,
    bitorch-engine's privileged one, from `qjax.training.linen.shadowed`.

    Attributes:
      features: Number of output features, ``out_channels`` upstream.
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
    """

    features: int
    bits: int = 4
    group_size: int | None = None
    q_groups: Sequence[int] | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Num[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Applies the layer over the last dimension.

        Args:
          inputs: ``[..., k]``.

        Returns:
          ``[..., features]``; float16 for float16 inputs.

        Raises:
          ValueError: If the variables hold no quantized kernel or one of another shape,
            or, from ``init``, if the attributes do not fit the inputs.
        """
        shape = (jnp.shape(inputs)[-1], self.features)

        def start(_: Array) -> QTensor:
            return mbwq.empty(
                shape,
                bits=self.bits,
                group_size=self.group_size,
                q_groups=self.q_groups,
            )

        kernel = weight(self, start, shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", zeros, (self.features,), jnp.float16)
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
        """As in `Dense`: ``a`` multiplies inputs without ``channel_scale``."""
        return contraction.low_rank(inputs, a, b)

    @nn.nowrap
    def load_state_dict(self, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Makes the variables of the layer out of a state.

        Args:
          tensors: Concrete arrays by bitorch-engine's names: ``qweight`` int32,
            ``scales`` and ``zeros`` float16 ``[groups, n]``, ``q_perm`` int16 ``[k]``;
            optionally ``channel_scale`` float16 ``[1, 1, k]``, ``q_groups`` int16
            ``[2 * groups]``, ``bias`` float16 ``[n]``, and what upstream derives or
            ignores. Where there are as many scales as the layer's own group size
            makes, it stays; else the size is the power of two that fits.

        Returns:
          ``{"params": ..., "quantized": ...}``.

        Raises:
          ValueError: Naming the tensor that does not fit the others or the layer.
        """
        kernel, bias = mbwq.read(tensors, self.group_size, use_bias=self.use_bias)
        dense.check_shapes(kernel, bias, (kernel.k, self.features))
        params = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        return to_variables(params)

    @nn.nowrap
    def state_dict(
        self, variables: Mapping[str, Any], *, mixed: bool | None = None
    ) -> dict[str, Array]:
        """Gives the state of the layer back, bit for bit as it was loaded.

        Args:
          variables: Those of this layer alone.
          mixed: Whether to write ``q_groups``; None does where ``q_groups`` of the
            layer is not None or the rows need it.

        Returns:
          ``qweight``, ``scales``, ``zeros``, ``q_perm``, ``channel_scale``, and
          ``q_groups`` and ``bias`` where the layer has them.

        Raises:
          ValueError: If bitorch-engine's kernels could not read it, with the reason.
        """
        params = to_params(variables)
        mixed = True if mixed is None and self.q_groups is not None else mixed
        return mbwq.write(params["kernel"], params.get("bias"), mixed)

    @nn.nowrap
    def set_scales(
        self,
        variables: Mapping[str, Any],
        scales: Float16[Array | np.ndarray, "groups n"],
    ) -> dict[str, dict[str, Any]]:
        """Returns variables with other scales.

        Args:
          variables: Those of this layer alone.
          scales: float16 ``[groups, n]``.

        Raises:
          ValueError: If shape or dtype differ from the layer's own.
        """
        params = to_params(variables)
        kernel = mbwq.with_scales(params["kernel"], scales)
        return to_variables(params | {"kernel": kernel})

    @nn.nowrap
    def set_zeros(
        self,
        variables: Mapping[str, Any],
        zeros: Float16[Array | np.ndarray, "groups n"],
    ) -> dict[str, dict[str, Any]]:
        """Returns variables with other zeros.

        Args:
          variables: Those of this layer alone.
          zeros: float16 ``[groups, n]``, to be subtracted.

        Raises:
          ValueError: If shape or dtype differ from the layer's own.
        """
        params = to_params(variables)
        kernel = mbwq.with_zeros(params["kernel"], zeros)
        return to_variables(params | {"kernel": kernel})

    @nn.nowrap
    def prepare(self, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns variables prepared for their device, as loading does: after a move.

        Args:
          variables: Those of this layer alone.
        """
        return to_variables(to_params(variables))
