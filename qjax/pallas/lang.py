"""The one file that names the Pallas backend.

A kernel body takes a `Lang` first: `TRITON` on the GPU, `INTERPRETED` on the CPU, where
tensor-core products and PTX have no meaning. JAX deprecated the Triton backend in
0.11.0; another one would be a third `Lang`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from qjax.pallas import lookup
from qjax.pallas.affine import AffineMap

# Its name on jax 0.10.1, where the backend's module has none.
_dot = plt.dot if hasattr(plt, "dot") else vars(pl)["dot"]


@runtime_checkable
class Lang(Protocol):
    """What a kernel body needs beyond jnp."""

    def dot(self, a: Array, b: Array) -> Array:
        """``a @ b`` of 16-bit floats on tensor cores, accumulated in float32."""
        ...

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        """``a * b + c`` of float32 tiles that broadcast, in one instruction."""
        ...

    def unpack(self, recipe: Any, planes: Sequence[Array]) -> Array:
        """Applies a `qjax.pallas.unpack.Recipe` to tiles of slots."""
        ...

    def affine(self, codes: Array, mapping: AffineMap) -> Array:
        """Applies a map to float16 codes above its offset."""
        ...

    def look_up(
        self, slots: Array, table: Sequence[Array], sub_block: int, dtype: jnp.dtype
    ) -> Array:
        """Looks the codes of a sub-block up in `qjax.pallas.lookup.words`."""
        ...


class _Triton:
    def dot(self, a: Array, b: Array) -> Array:
        return _dot(a, b)

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        # XLA's Triton does not contract a product and a sum.
        tiles = jnp.broadcast_arrays(a, b, c)
        (out,) = plt.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=tiles,
            pack=1,
            constraints="=f,f,f,f",
            result_shape_dtypes=[jax.ShapeDtypeStruct(tiles[0].shape, jnp.float32)],
        )
        return out

    def unpack(self, recipe: Any, planes: Sequence[Array]) -> Array:
        (out,) = plt.elementwise_inline_asm(
            recipe.ptx,
            args=list(planes),
            pack=2,
            constraints=",".join(["=r", *["r"] * len(planes)]),
            result_shape_dtypes=[jax.ShapeDtypeStruct(planes[0].shape, recipe.dtype)],
        )
        return out

    def affine(self, codes: Array, mapping: AffineMap) -> Array:
        tiles = jnp.broadcast_arrays(codes, *mapping.columns)
        (out,) = plt.elementwise_inline_asm(
            mapping.ptx,
            args=tiles,
            pack=2,
            constraints=",".join(["=r", *["r"] * len(tiles)]),
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.float16)],
        )
        return out

    def look_up(
        self, slots: Array, table: Sequence[Array], sub_block: int, dtype: jnp.dtype
    ) -> Array:
        words = [jnp.broadcast_to(word, slots.shape) for word in table]
        (out,) = plt.elementwise_inline_asm(
            lookup.ptx(sub_block),
            args=[slots, *words],
            pack=2,
            # Two slots share a register, and two registers hold a word for them.
            constraints=",".join(["=r", "r", *["r", "r"] * len(words)]),
            result_shape_dtypes=[jax.ShapeDtypeStruct(slots.shape, dtype)],
        )
        return out


class _Interpreted:
    def dot(self, a: Array, b: Array) -> Array:
        # Products of 16-bit floats are exact in float32.
        return jnp.dot(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        return a * b + c

    def unpack(self, recipe: Any, planes: Sequence[Array]) -> Array:
        return recipe.on_slots(*planes)

    def affine(self, codes: Array, mapping: AffineMap) -> Array:
        return mapping.on_codes(codes)

    def look_up(
        self, slots: Array, table: Sequence[Array], sub_block: int, dtype: jnp.dtype
    ) -> Array:
        return lookup.on_slots(slots, table, sub_block, dtype)


TRITON: Lang = _Triton()
INTERPRETED: Lang = _Interpreted()


def load(ref: Any, mask: Array | None = None) -> Array:
    """Loads a block of memory; elements that the mask leaves out are zero."""
    return plt.load(ref, mask=mask, other=None if mask is None else 0)


def gather(ref: Any, *index: Array, mask: Array | None = None) -> Array:
    """Loads the elements at indices that broadcast to the shape of the block."""
    # Interpret mode takes no arrays beside a slice.
    index = jnp.broadcast_arrays(*index)
    if mask is not None:
        mask = jnp.broadcast_to(mask, index[0].shape)
    return load(ref.at[tuple(index)], mask)


def both(a: Array | None, b: Array | None) -> Array | None:
    """Returns where two masks, either of which may be missing, let elements through."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def load_row(ref: Any, *index: Any, columns: Any, mask: Array | None = None) -> Array:
    """Loads part of a row, given by its index on every axis but the last."""
    # Slices of one: interpret mode takes no integers beside a slice.
    where = (*(pl.ds(i, 1) for i in index), columns)
    if mask is not None:
        mask = mask.reshape((1,) * len(index) + mask.shape)
    return load(ref.at[where], mask).reshape(-1)


def scalars(ref: Any, row: Any, count: int) -> list[Array]:
    """Loads the first ``count`` elements of a row of a matrix, each as a scalar."""
    return [load_row(ref, row, columns=pl.ds(i, 1)).sum() for i in range(count)]


def store(ref: Any, value: Array, mask: Array | None = None) -> None:
    """Stores a block of memory where the mask, broadcast to it, allows it."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, value.shape)
    plt.store(ref, value, mask=mask)


def launch(
    body: Callable[..., None],
    *operands: Any,
    name: str,
    grid: tuple[int, ...],
    out: Any,
    warps: int,
    stages: int,
    interpret: bool,
) -> Any:
    """Runs a kernel body once for each point of the grid.

    Args:
      body: Takes a `Lang`, and references to each operand and to the output.
      *operands: Trees of arrays in device memory.
      name: Of the kernel, as profilers show it.
      grid: Extents of the grid, up to three.
      out: Tree of `jax.ShapeDtypeStruct`: the output.
      warps: Warps of 32 threads that share a program.
      stages: Depth of the pipeline of asynchronous loads.
      interpret: Whether to run the body as jnp, on any device.

    Returns:
      The output, a tree of arrays.
    """
    lang = INTERPRETED if interpret else TRITON
    # Inside `jax.shard_map` the output varies over what any operand varies over.
    types = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(operands)]
    varying = max(types, key=lambda one: len(one.varying))
    out = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(
            one.shape, one.dtype, manual_axis_type=varying
        ),
        out,
    )
    # Named explicitly: the default backend differs between versions of JAX.
    parameters = plt.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(
        functools.partial(body, lang),
        grid=grid,
        out_shape=out,
        compiler_params=parameters,
        interpret=interpret,
        name=name,
    )(*operands)
