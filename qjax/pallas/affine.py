"""From codes above a base to float16 weights, two at a time.

`qjax.pallas.unpack` leaves ``q + offset``. An `AffineMap` takes offset and zero off,
exactly where both are integers, and scales what is left: one rounding. As text, because
XLA's Triton does not pack float16 arithmetic in pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class AffineMap(NamedTuple):
    """The map ``(code - offset - zero) * scale + added``.

    Attributes:
      offset: By which all codes are too high; float16 holds it.
      zero: float16 of every column, ``[n, 1]``, if there is one.
      scale: Likewise; None leaves codes less their zeros.
      added: Likewise, only with a scale.
      whole: Whether zeros are integers, which add up with the offset exactly.
    """

    offset: float = 0.0
    zero: Float[Array, "n 1"] | None = None
    scale: Float[Array, "n 1"] | None = None
    added: Float[Array, "n 1"] | None = None
    whole: bool = True

    @property
    def columns(self) -> Sequence[Float[Array, "n 1"]]:
        """What the text takes after the codes."""
        each = (self.zero, self.scale, self.added)
        return [value for value in each if value is not None]

    @property
    def ptx(self) -> str:
        """PTX with the result in $0, codes in $1 and `columns` from $2."""
        names = iter(f"${i}" for i in range(2, 5))
        zero, scale, added = (
            None if value is None else next(names)
            for value in (self.zero, self.scale, self.added)
        )
        (half,) = np.array([self.offset], np.float16).view(np.uint16).tolist()
        lines = ["mov.b32 t, $1", f"mov.b32 u, {half | half << 16:#x}"]
        if zero and self.whole:
            # For a column once: ptxas merges what is the same for all its rows.
            lines.append(f"add.rn.f16x2 u, u, {zero}")
        if self.offset or zero:
            lines.append("sub.rn.f16x2 t, t, u")
        if zero and not self.whole:
            lines.append(f"sub.rn.f16x2 t, t, {zero}")
        if added:
            lines.append(f"fma.rn.f16x2 t, t, {scale}, {added}")
        elif scale:
            lines.append(f"mul.rn.f16x2 t, t, {scale}")
        return "{ .reg .b32 t, u; " + "; ".join([*lines, "mov.b32 $0, t"]) + "; }"

    def on_codes(self, codes: Float[Array, "n k"]) -> Float[Array, "n k"]:
        """Does in jnp what `ptx` does."""
        codes = codes - jnp.asarray(self.offset, codes.dtype)
        if self.zero is not None:
            codes = codes - self.zero
        if self.scale is None:
            return codes
        if self.added is None:
            return codes * self.scale
        # One rounding: the product is exact in float32.
        wide = codes.astype(jnp.float32) * self.scale.astype(jnp.float32)
        return (wide + self.added.astype(jnp.float32)).astype(codes.dtype)
