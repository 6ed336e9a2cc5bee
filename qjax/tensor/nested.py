"""Scales in two levels: a small integer a group, a float a run of groups."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax.tensor.parts import Encoded


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Nested(Encoded):
    """Scales or zeros as products of an integer a group and a float a run of groups.

    The GPU kernels multiply the two, and so read the bytes that a file has;
    `qjax.prepare` keeps them for these.

    Attributes:
      factor: int8 ``[*batch, groups, n]``.
      step: float16 ``[*batch, runs, n]``; each serves ``groups / runs`` groups.
      negative: Whether the products are taken off: zeros that are minima.

    Example:
      >>> factor = jnp.array([[3], [-2], [1], [0]], jnp.int8)
      >>> scale = Nested(factor=factor, step=jnp.array([[0.5], [2]], jnp.float16))
      >>> scale.decode()[:, 0].tolist(), scale.dtype
      ([1.5, -1.0, 2.0, 0.0], dtype('float32'))
    """

    factor: Array
    step: Array
    negative: bool = dataclasses.field(default=False, metadata={"static": True})

    # Not traced: a kernel asks references.
    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return self.factor.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoded array."""
        return jnp.dtype(jnp.float32)

    @property
    def ratio(self) -> int:
        """Groups that share a step."""
        return self.factor.shape[-2] // self.step.shape[-2]

    @property
    def signed_step(self) -> Array:
        """Steps with the sign of the products."""
        return -self.step if self.negative else self.step

    def decode(self) -> Float32[Array, "*batch groups n"]:
        """Returns the products in float32, which holds them exactly."""
        return _product(self.factor, self.signed_step, self.ratio)

    def step_gradient(
        self, gradient: Float32[Array, "*batch groups n"]
    ) -> Float32[Array, "*batch runs n"]:
        """Takes a gradient of what `decode` returns to one of ``step``."""
        terms = gradient * self.factor.astype(jnp.float32)
        *batch, _, n = terms.shape
        total = terms.reshape(*batch, -1, self.ratio, n).sum(-2)
        return -total if self.negative else total


@functools.partial(jax.jit, static_argnums=2)
def _product(factor: Array, step: Array, ratio: int) -> Array:
    wide = jnp.repeat(step.astype(jnp.float32), ratio, axis=-2)
    return factor.astype(jnp.float32) * wide
