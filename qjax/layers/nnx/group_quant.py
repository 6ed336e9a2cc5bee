"""`GroupQuantLinear`: a `Linear` over the groups of FlexGen."""

from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from qjax.formats import flexgen
from qjax.layers.nnx.linear import Linear


class GroupQuantLinear(Linear):
    """``GroupQuantLinear`` of optimum-graphcore: a `Linear` over FlexGen's groups.

    A `Linear` takes a kernel of any format; this one is made of dense ones by the
    arithmetic of optimum-graphcore, ``q * scale + bias`` with the smallest element of a
    group as its bias.

    Example:
      >>> from flax import nnx
      >>> dense = nnx.Linear(64, 16, rngs=nnx.Rngs(0))
      >>> layer = GroupQuantLinear.from_model(dense, group_size=32)
      >>> layer.kernel
      QTensor(64x16, 4 bits, group 32, Stream(), q * s + z, float32 scale, 768 B)
    """

    @classmethod
    def from_dense(
        cls,
        kernel: Float[Array, "k n"],
        bias: Float[Array, " n"] | None = None,
        *,
        group_size: int,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> Linear:
        """Makes a layer of a dense kernel, in four bits.

        Args:
          kernel: float16 or float32 ``[k, n]`` as in `nnx.Linear`.
          bias: ``[n]``, or None for a layer without one.
          group_size: Input features that share a scale, a multiple of 4 that divides k.
          dtype: Dtype of the computation.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer; its scales have the dtype of ``kernel``.

        Raises:
          ValueError: As `formats.flexgen.quantize`, or if the bias does not fit.
        """
        return cls.from_qtensor(
            flexgen.quantize(kernel, group_size),
            bias,
            dtype=dtype,
            implementation=implementation,
        )

    @classmethod
    def from_model(
        cls, linear: nnx.Linear, group_size: int, *, implementation: str | None = None
    ) -> Linear:
        """Makes a layer of Flax's own.

        Args:
          linear: The layer, which stays as it is.
          group_size: As in `from_dense`; upstream calls it ``num_groups``.
          implementation: As in `qjax.matmul`.

        Returns:
          The layer.

        Raises:
          ValueError: As `from_dense`.
        """
        return cls.from_dense(
            linear.kernel[...],
            None if linear.bias is None else linear.bias[...],
            group_size=group_size,
            dtype=linear.dtype,
            implementation=implementation,
        )
