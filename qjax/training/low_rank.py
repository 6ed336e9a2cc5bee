"""GaLore: the moments of a gradient in a space of low rank.

A gradient ``g[k, n]`` is projected by singular vectors of itself, ``g V_r`` with V's
first ``rank`` columns or ``U_r.T g`` with U's, and the optimizer keeps its moments of
that. Its step goes back by the same vectors. They are taken anew every
``update_proj_gap`` steps; the moments stay as they are.

Source: GreenBitAI/bitorch-engine, bitorch_engine/optim/galore_projector.py, commit
0009b1f8178e86df6433383879c0005a49c0cc92; the method: Zhao et al., "GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ProjType = Literal["std", "reverse_std", "right", "left", "full"]


class Basis(NamedTuple):
    """The singular vectors in use; None on a side that is not projected."""

    left: Float[Array, "*batch k rank"] | None
    right: Float[Array, "*batch n rank"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLore:
    """How gradients are projected; the names are GaLore's own.

    Example:
      >>> galore = GaLore(rank=4)
      >>> basis = galore.init((64, 32))
      >>> galore.project(jnp.ones((64, 32)), basis).shape
      (64, 4)

    Attributes:
      rank: Number of singular vectors, less than k and n.
      update_proj_gap: Steps between two projections (default: 200).
      scale: Factor of the step on its way back (default: 0.25).
      proj_type: "right" keeps ``g V_r``, "left" ``U_r.T g``, "full" ``U_r.T g V_r``;
        "std" projects the longer axis away from the matrix, "right" where k >= n and
        else "left", and "reverse_std" the other one (default: "std").
    """

    rank: int
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: ProjType = "std"

    def __post_init__(self) -> None:
        """Refuses what no projection can have."""
        for name in ("rank", "update_proj_gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        known = ProjType.__args__
        if self.proj_type not in known:
            raise ValueError(f"proj_type={self.proj_type!r} must be one of {known}.")

    def init(self, shape: tuple[int, ...]) -> Basis:
        """Makes an empty basis for gradients of a shape.

        Args:
          shape: ``(*batch, k, n)``.

        Returns:
          float32 zeros; the first step replaces them.

        Raises:
          ValueError: If ``rank`` is not less than k and n.
        """
        *batch, k, n = shape
        if self.rank >= min(k, n):
            raise ValueError(
                f"rank={self.rank} must be less than both of k={k} and n={n}; choose "
                "a lower rank, or leave this weight out (optax.masked)."
            )
        left, right = self._sides(k, n)
        return Basis(
            left=jnp.zeros((*batch, k, self.rank), jnp.float32) if left else None,
            right=jnp.zeros((*batch, n, self.rank), jnp.float32) if right else None,
        )

    def refresh(
        self, basis: Basis, gradient: Float[Array, "*batch k n"], count: Int[Array, ""]
    ) -> Basis:
        """Takes the basis anew from a gradient, if it is time.

        Args:
          basis: The present one.
          gradient: ``[*batch, k, n]``.
          count: Steps taken before this one.

        Returns:
          The basis for this step.
        """

        def anew() -> Basis:
            wide = gradient.astype(jnp.float32)
            u, _, vh = jnp.linalg.svd(wide, full_matrices=False)
            return Basis(
                left=None if basis.left is None else u[..., : self.rank],
                right=None
                if basis.right is None
                else jnp.swapaxes(vh, -1, -2)[..., : self.rank],
            )

        return jax.lax.cond(count % self.update_proj_gap == 0, anew, lambda: basis)

    def project(self, gradient: Float[Array, "*batch k n"], basis: Basis) -> Array:
        """Returns the gradient in the space of low rank."""
        if basis.left is not None:
            gradient = _product(jnp.swapaxes(basis.left, -1, -2), gradient)
        if basis.right is not None:
            gradient = _product(gradient, basis.right)
        return gradient

    def back(self, step: Array, basis: Basis) -> Float[Array, "*batch k n"]:
        """Returns a step of low rank as one of the weight, times ``scale``."""
        if basis.left is not None:
            step = _product(basis.left, step)
        if basis.right is not None:
            step = _product(step, jnp.swapaxes(basis.right, -1, -2))
        return self.scale * step

    def _sides(self, k: int, n: int) -> tuple[bool, bool]:
        """Whether the left and the right vectors are used."""
        tall = k >= n
        right = {"std": tall, "reverse_std": not tall, "right": True, "left": False}
        if self.proj_type == "full":
            return True, True
        return not right[self.proj_type], right[self.proj_type]


def _product(a: Array, b: Array) -> Array:
    wide = (a.astype(jnp.float32), b.astype(jnp.float32))
    return jnp.matmul(*wide, precision="highest")
