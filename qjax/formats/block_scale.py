"""Scales of blocks of outputs and inputs, as files of FP8 have them."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from qjax.formats.mxfp4 import E8M0
from qjax.tensor import Encoded

# Of a block: larger ones would be no numbers of 32 bits, and no matrix needs them.
MOST = 2**31


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockScale(Encoded):
    """One value for each block of some outputs and the inputs of a group.

    Attributes:
      values: ``[*batch, groups, blocks]``: floats, or exponents of powers of two as
        `mxfp4.E8M0` has them; of zeros, integers.
      block: int32 ``[*batch, n]``, the block of each column.
      rows: Outputs of a block; the last one may have fewer.
      columns: Inputs of a block, likewise.
      exponents: Whether ``values`` are exponents.

    Example:
      >>> values = jnp.array([[0.5, 2.0]])
      >>> BlockScale.of(values, n=3, size=(2, 128)).decode()
      Array([[0.5, 0.5, 2. ]], dtype=float32)
    """

    values: Array
    block: Array
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    exponents: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls, values: Array, *, n: int, size: tuple[int, int], exponents: bool = False
    ) -> "BlockScale":
        """Builds one for ``n`` outputs, in blocks of a size."""
        rows, columns = size
        return cls(
            values=values,
            block=jnp.asarray(np.arange(n) // rows, jnp.int32),
            rows=rows,
            columns=columns,
            exponents=exponents,
        )

    @property
    def plain(self) -> Shaped[Array, "*batch groups blocks"]:
        """The values of blocks, decoded if they are exponents."""
        return E8M0(exponent=self.values).decode() if self.exponents else self.values

    def decode(self) -> Shaped[Array, "*batch groups n"]:
        """Returns a value for each column."""
        block = jnp.broadcast_to(
            self.block[..., None, :], (*self.values.shape[:-1], self.block.shape[-1])
        )
        return jnp.take_along_axis(self.plain, block, axis=-1)


def block_size(name: str, size: Any) -> tuple[int, int]:
    """Reads the size of a block from a configuration.

    Args:
      name: Name of the field, for messages.
      size: What was found there.

    Returns:
      Outputs and inputs.

    Raises:
      ValueError: If it is anything but two positive integers below 2**31.
    """
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(type(length) is int and 0 < length < MOST for length in size)
    ):
        raise ValueError(f"{name}={size!r} must be two positive integers below 2**31.")
    return size[0], size[1]
