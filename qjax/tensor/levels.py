"""Scales in two levels, as files have them and the GPU kernels read them."""

import abc
import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32

from qjax.tensor.floats import widen
from qjax.tensor.parts import Encoded


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Levels(Encoded):
    """Scales or zeros whose two levels the kernels multiply themselves.

    `qjax.prepare` keeps them for a GPU, so that no more is read than a file has. They
    are float32. Their arrays of floats may be trained.
    """

    # Names of the attributes that are arrays of floats.
    trained: typing.ClassVar[tuple[str, ...]]

    @property
    def floats(self) -> dict[str, Any]:
        """The arrays that may be trained, by name."""
        return {name: getattr(self, name) for name in self.trained}

    def with_floats(self, floats: Mapping[str, Any]) -> "Levels":
        """Returns the same with other such arrays."""
        return dataclasses.replace(self, **floats)

    def for_kernels(self) -> "Levels":
        """Returns itself."""
        return self

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoded array."""
        return jnp.dtype(jnp.float32)

    @abc.abstractmethod
    def gradient(
        self, of_decoded: Float32[Array, "*batch groups n"]
    ) -> dict[str, Array]:
        """Takes a gradient of what `decode` returns to those of `floats`."""

    @abc.abstractmethod
    def beside(self, others: Sequence[Any]) -> "Levels | None":
        """Joins these and others along n, or returns None where they are not alike."""


def floats_of(leaf: Any) -> Any:
    """Returns what may be trained of a leaf: itself, or the floats of `Levels`."""
    return leaf.floats if isinstance(leaf, Levels) else leaf


def replace_floats(qt: Any, floats: Mapping[str, Any]) -> Any:
    """Replaces leaves of a `QTensor`; of those that are `Levels`, their floats."""
    leaves = {
        name: held.with_floats(new)
        if isinstance(held := getattr(qt, name), Levels)
        else new
        for name, new in floats.items()
    }
    return dataclasses.replace(qt, **leaves)


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Nested(Levels):
    """Products of an integer a group and a float a run of groups: GGUF's K-quants.

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

    trained: typing.ClassVar[tuple[str, ...]] = ("step",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array; not traced, as a kernel asks references."""
        return self.factor.shape

    @property
    def ratio(self) -> int:
        """Groups that share a step."""
        return self.factor.shape[-2] // self.step.shape[-2]

    def decode(self) -> Float32[Array, "*batch groups n"]:
        """Returns the products in float32, which holds them exactly."""
        step = -self.step if self.negative else self.step
        return _product(self.factor, step, self.ratio)

    def gradient(
        self, of_decoded: Float32[Array, "*batch groups n"]
    ) -> dict[str, Array]:
        """Returns the gradient of ``step``."""
        terms = of_decoded * self.factor.astype(jnp.float32)
        *batch, _, n = terms.shape
        total = terms.reshape(*batch, -1, self.ratio, n).sum(-2)
        return {"step": -total if self.negative else total}

    def beside(self, others: Sequence[Any]) -> "Nested | None":
        """Joins those of as many groups a step."""
        form = type(self), self.ratio, self.negative
        if any((type(o), o.ratio, o.negative) != form for o in others):
            return None
        join = functools.partial(_along_columns, self, others)
        return dataclasses.replace(self, factor=join("factor"), step=join("step"))


def _along_columns(first: Levels, others: Sequence[Levels], name: str) -> Array:
    return jnp.concatenate([getattr(one, name) for one in (first, *others)], axis=-1)


@functools.partial(jax.jit, static_argnums=2)
def _product(factor: Array, step: Array, ratio: int) -> Array:
    wide = jnp.repeat(step.astype(jnp.float32), ratio, axis=-2)
    return factor.astype(jnp.float32) * wide


@jax.tree_util.register_dataclass
@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WithGlobal(Levels):
    """Floats of 16 bits, and one number for the whole matrix: those of NVFP4.

    Attributes:
      local: float16 ``[*batch, groups, n]``.
      whole: float32 ``[*batch]``.
      divides: Whether the local ones are divided by it, and not multiplied.

    Example:
      >>> local = jnp.array([[0.5, 448]], jnp.float16)
      >>> scale = WithGlobal(local=local, whole=jnp.float32(4), divides=True)
      >>> scale.decode().tolist()
      [[0.125, 112.0]]
    """

    local: Array
    whole: Array
    divides: bool = dataclasses.field(default=False, metadata={"static": True})

    trained: typing.ClassVar[tuple[str, ...]] = ("local", "whole")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return self.local.shape

    def apply(self, values: Float[Array, "*batch a b"]) -> Float[Array, "*batch a b"]:
        """Multiplies or divides matrices by their numbers."""
        whole = self.whole[..., None, None]
        return values / whole if self.divides else values * whole

    def decode(self) -> Float32[Array, "*batch groups n"]:
        """Returns the scales in float32."""
        return self.apply(self.local.astype(jnp.float32))

    def gradient(
        self, of_decoded: Float32[Array, "*batch groups n"]
    ) -> dict[str, Array]:
        """Returns the gradients of both."""
        total = (of_decoded * self.local.astype(jnp.float32)).sum((-2, -1))
        whole = -total / self.whole**2 if self.divides else total
        return {"local": self.apply(of_decoded), "whole": whole}

    def beside(self, others: Sequence[Any]) -> "WithGlobal | None":
        """Joins those with the same number for the whole, if its value is known."""
        form = type(self), self.divides
        if any((type(o), o.divides) != form for o in others):
            return None
        wholes = [one.whole for one in (self, *others)]
        if any(isinstance(whole, Tracer) for whole in wholes):
            return None
        if any(not np.array_equal(wholes[0], whole) for whole in wholes):
            return None
        return dataclasses.replace(self, local=_along_columns(self, others, "local"))


@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredGlobal(Encoded):
    """`WithGlobal` as a file has it, the local floats in eight bits.

    Attributes:
      local: uint8 ``[*batch, groups, n]``: patterns of E4M3 floats.
      whole: float32 ``[*batch]``.
    """

    local: Array
    whole: Array

    @property
    @abc.abstractmethod
    def divides(self) -> bool:
        """As in `WithGlobal`."""

    def for_kernels(self) -> WithGlobal:
        """Returns the same numbers; float16 holds the small floats."""
        local = widen(self.local, 8).astype(jnp.float16)
        return WithGlobal(local=local, whole=self.whole, divides=self.divides)

    def decode(self) -> Float32[Array, "*batch groups n"]:
        """Returns the scales in float32."""
        return self.for_kernels().decode()
