"""`GroupQuantDense`: a `Dense` over the groups of FlexGen."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from qjax.formats import flexgen
from qjax.layers.linen.dense import Dense
from qjax.layers.linen.variables import to_variables


class GroupQuantDense(Dense):
    """``GroupQuantLinear`` of optimum-graphcore: a `Dense` over FlexGen's groups.

    A `Dense` takes a kernel of any format; this one's variables are made of dense ones
    by the arithmetic of optimum-graphcore, ``q * scale + bias`` with the smallest
    element of a group as its bias.

    Example:
      >>> import jax
      >>> import flax.linen as nn
      >>> x = jnp.ones((2, 64))
      >>> dense = nn.Dense(16).init(jax.random.key(0), x)
      >>> variables = GroupQuantDense.from_model(dense, group_size=32)
      >>> GroupQuantDense(16).apply(variables, x).shape
      (2, 16)
    """

    @staticmethod
    def from_dense(
        kernel: Float[Array, "k n"],
        bias: Float[Array, " n"] | None = None,
        *,
        group_size: int,
    ) -> dict[str, dict[str, Any]]:
        """Makes the variables of a layer out of a dense kernel, in four bits.

        Args:
          kernel: float16 or float32 ``[k, n]`` as in `nn.Dense`.
          bias: ``[n]``, or None for a layer without one.
          group_size: Input features that share a scale, a multiple of 4 that divides k.

        Returns:
          ``{"params": ..., "quantized": ...}``.

        Raises:
          ValueError: As `formats.flexgen.quantize`, or if the bias does not fit.
        """
        params = {} if bias is None else {"bias": bias}
        return to_variables({"kernel": flexgen.quantize(kernel, group_size), **params})

    @staticmethod
    def from_model(
        variables: Mapping[str, Any], group_size: int
    ) -> dict[str, dict[str, Any]]:
        """Makes the variables of a layer out of those of Flax's own.

        Args:
          variables: ``{"params": {"kernel": ..., "bias": ...}}`` of an `nn.Dense`.
          group_size: As in `from_dense`; upstream calls it ``num_groups``.

        Returns:
          As `from_dense`.

        Raises:
          ValueError: As `from_dense`.
        """
        return GroupQuantDense.from_dense(**variables["params"], group_size=group_size)
