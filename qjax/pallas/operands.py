"""What every kernel does with its operands: checks, steps of k, rows of float16.

A *step* is the run of k between two applications of a scale: a group, or the part of a
longer group that lies in one iteration of the kernel's loop. ``x`` is put into the
order in which the products of a step take it, because it is small and the weight is
not.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import lang, lookup, unpack
from qjax.tensor import Affine, Grouping, Levels, QTensor, WithGlobal

# Arithmetic of the tensor cores, where no other is asked for.
DTYPE = jnp.dtype(jnp.float16)
# Scaled rows of x have their largest element in [2**14, 2**15).
TOP = 14
# Programs of more rows have no registers for the products of a step beside their sum.
EXACT_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is cut up.

    Attributes:
      block_m: Rows of x of one program, a power of two from 8. It decides how `matmul`
        applies scales (`scales_weights`).
      block_n: Columns of one program, a power of two from 32.
      block_k: Rows of the weight of one iteration, a power of two from 64.
      splits: Runs of k, each the work of another program.
      warps: Warps of a program.
      stages: Iterations whose words are loaded ahead.
      slices: Runs of k that one program takes side by side, each a share of ``block_m``
        and ``block_n`` (`qjax.pallas.matvec`).
    """

    block_m: int
    block_n: int = 128
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 3
    slices: int = 1

    @property
    def scales_weights(self) -> bool:
        """Whether `matmul` scales weights, rounding them, and not their products."""
        return self.block_m > EXACT_ROWS

    def fitting(self, bits: int, rows: int) -> "Config":
        """Returns this with iterations that cut ``rows`` padded rows evenly."""
        block_k = math.gcd(self.block_k, rows)
        return dataclasses.replace(
            self, block_k=max(block_k, tiles.rows_of_block(bits))
        )

    def share(self, split: Array, count: Any) -> tuple[Any, Any]:
        """Returns where the iterations of a split begin and end, of ``count``."""
        return split * count // self.splits, (split + 1) * count // self.splits


class Steps(NamedTuple):
    """The steps of k and their products.

    Attributes:
      rows: Rows of a step.
      blocks: Blocks of the storage that a step covers, at least one.
      sub_blocks: Sub-blocks of each of them that belong to the step.
      joined: Sub-blocks that one product takes at once.
    """

    rows: int
    blocks: int
    sub_blocks: int
    joined: int

    @classmethod
    def of(cls, bits: int, group: int, config: Config) -> "Steps":
        """Returns the steps of a segment whose groups have ``group`` rows."""
        rows = math.gcd(group, config.block_k)
        block = tiles.rows_of_block(bits)
        blocks = max(1, rows // block)
        sub_blocks = min(tiles.sub_blocks(bits), rows // tiles.SIDE)
        if config.scales_weights:
            # Two products a step: tensor cores have work while the second is unpacked,
            # and where one follows another, no two warps unpack the same weights.
            joined = max(1, sub_blocks // 2)
        else:
            # One product a step keeps wgmma busy. mma.sync, which eight rows of x take,
            # needs no join, only 32 rows a product.
            joined = sub_blocks if config.block_m > 8 else -(-2 // blocks)
            joined = min(joined, sub_blocks)
        return cls(rows, blocks, sub_blocks, joined)


def check(w: QTensor) -> None:
    """Declines what no kernel reads.

    Args:
      w: A matrix or a stack of them, in any layout: `Tiles` is what `qjax.prepare`
        would bring it to. Leaves may be abstract.

    Raises:
      NotImplementedError: With the reason and, if there is one, a way out.
    """
    if w.codebook is not None and w.codebook.shape[-1] != lookup.ENTRIES:
        raise NotImplementedError(
            f"The kernels look up 4-bit codes; codebook.shape={w.codebook.shape}."
        )
    if w.grouping is not Grouping.ROWS:
        raise NotImplementedError(
            f"The kernels read scales of runs of rows, not {w.grouping.value} groups."
        )
    if w.row_group is not None:
        raise NotImplementedError(
            "The kernels do not gather scales by row_group (act-order); qjax.prepare "
            "turns one whose groups are full into an order of the rows."
        )
    if not _levels_are_alike(w):
        raise NotImplementedError(
            "The kernels read scales in two levels of one width of codes, and beside "
            "added zeros that are likewise, or none."
        )
    for segment in w.segments:
        if (segment.group_size or tiles.SIDE) % tiles.SIDE:
            raise NotImplementedError(
                f"group_size={segment.group_size} is not a multiple of {tiles.SIDE}, "
                "the rows of a product of tensor cores."
            )


def _levels_are_alike(w: QTensor) -> bool:
    parameters = [p for p in (w.scale, w.zero) if p is not None]
    levels = [isinstance(p, Levels) for p in parameters]
    if not any(levels):
        return True
    # A number for the whole matrix comes last, when zeros are in the sum.
    with_global = any(isinstance(p, WithGlobal) for p in parameters)
    alone = len(parameters) == 1
    alike = alone or (not with_global and (all(levels) or w.affine is Affine.ZERO))
    return alike and len(w.segments) == 1


def layout_of(w: QTensor) -> tiles.Tiles:
    """Returns the layout in which the kernels read a matrix."""
    return tiles.Tiles(nibbles=w.affine is Affine.CODEBOOK)


def group_rows(w: QTensor) -> list[int]:
    """Checks a matrix and returns the rows of a group, for every segment.

    One group a column has as many as the padded segment.

    Raises:
      NotImplementedError: As `check`, and for layouts other than `Tiles`.
    """
    check(w)
    if w.layout != layout_of(w):
        raise NotImplementedError(
            f"The kernels read {layout_of(w)!r}, not {w.layout!r}; use qjax.prepare."
        )
    return [
        segment.group_size or rows + segment.padding
        for segment, rows in zip(w.segments, w.rows, strict=True)
    ]


_Tree = TypeVar("_Tree")


def one_of(tree: _Tree, index: Array | None) -> _Tree:
    """Returns entry ``index`` of stacked leaves, or leaves that are no stack."""
    return tree if index is None else jax.tree.map(lambda leaf: leaf[index], tree)


def stack_index(index: Array | None) -> Array | None:
    """Returns, for a kernel, which matrices of a stack it takes: one, or several."""
    # As it is: to reckon with it here would be one more launch.
    return None if index is None else index.reshape(-1)


def read_index(ref: Any, at: Any = 0) -> Any:
    """Reads, in a kernel's body, one that `stack_index` has returned; 0 of none."""
    return 0 if ref is None else lang.load_row(ref, columns=pl.ds(at, 1)).sum()


def joined_words(w: QTensor) -> list[Array]:
    """Returns the words of every segment, those of a stack one after another."""
    return [array.reshape(-1, *array.shape[-3:]) for array in w.words]


def split_padded(x: Float[Array, "m k"], w: QTensor) -> list[Float[Array, "m _"]]:
    """Cuts rows into those of the segments, padded with zeros as they are."""
    ends = list(itertools.accumulate(w.rows))
    parts = zip(jnp.split(x, ends[:-1], axis=1), w.segments, strict=True)
    return [jnp.pad(part, ((0, 0), (0, segment.padding))) for part, segment in parts]


def parameters(w: QTensor) -> list[Any]:
    """Returns the scale and zero with a value for each padded column.

    They are arrays, or `Nested` ones, for `qjax.pallas.scales` to read. Those of a
    stack come one after another. The values of padded columns are never stored; they
    only have to be readable.
    """
    columns = w.n + w.padding

    def whole(parameter: Array) -> Array:
        parameter = parameter.reshape(-1, parameter.shape[-1])
        count = parameter.shape[1]
        if count < w.n:
            parameter = jnp.repeat(parameter, w.n // count, axis=1)
        return jnp.pad(
            parameter[:, :columns], ((0, 0), (0, max(0, columns - parameter.shape[1])))
        )

    return [jax.tree.map(whole, p) for p in (w.scale, w.zero) if p is not None]


class Book(NamedTuple):
    """What a kernel knows of numbers that codes stand for but are not.

    Attributes:
      tables: Of a codebook in 16 bits, each the words of `lookup.words`; their entries
        add up to the codebook's.
      undo: The power of two that undoes what scaled the numbers into the range of
        float16; bfloat16 has that of any. None of codes that are numbers themselves.
    """

    tables: Sequence[list[Array]] = ()
    undo: Array | float | None = None

    @property
    def words(self) -> list[Array] | None:
        """The only table, if there is one."""
        return self.tables[0] if self.tables else None


def read_book(
    ref: Any,
    row: Any,
    affine: Affine,
    bits: int,
    dtype: jnp.dtype = DTYPE,
    *,
    exponent: int = 0,
    count: int = 1,
) -> Book:
    """Reads, in a kernel's body, one of the `books`; of small floats, none is needed.

    Args:
      ref: The books, or None.
      row: Which. -1, of a block that takes no matrix, reads any: there are no codes.
      affine: The map of the codes.
      bits: Their width.
      dtype: Of the entries.
      exponent: float16 entries are scaled so that the largest lies in
        ``[2**exponent, 2**(exponent + 1))``.
      count: How many tables. Each holds what those before have left: eleven bits of
        float16, where float32 has 24.
    """
    if affine is Affine.FLOAT:
        unit = unpack.unit(bits, dtype)
        return Book(undo=None if unit == 1 else unit)
    if ref is None:
        return Book()
    # Each lane reads another entry, and a sum of floats leaves it in a register. Of a
    # sum of integers, of a maximum on sm_100, or of what is loaded alone, the assembler
    # knows that all lanes have the same: it keeps that in uniform registers, from which
    # PRMT does not read, and moves it for every use, one more instruction for each
    # weight. To add -0.0 changes nothing.
    lanes = jnp.arange(lookup.LANES)
    where = jnp.full(lanes.shape, jnp.maximum(row, 0)), lanes % lookup.ENTRIES
    entry = lang.gather(ref, *where)
    rest = [jnp.where(lanes == i, entry, -0.0).sum() for i in range(lookup.ENTRIES)]
    undo = None
    if dtype == DTYPE:
        largest = functools.reduce(jnp.maximum, map(jnp.abs, rest))
        factor, undo = bring_to(largest, exponent)
        rest = [one * factor for one in rest]
    tables = []
    for _ in range(count):
        entries = [one.astype(dtype) for one in rest]
        tables.append(lookup.words(entries))
        rest = [
            one - held.astype(jnp.float32)
            for one, held in zip(rest, entries, strict=True)
        ]
    return Book(tables, undo)


def books(w: QTensor) -> Float[Array, "count 16"] | None:
    """Returns the codebook, or those of a stack; None without one."""
    if w.codebook is None:
        return None
    return w.codebook.astype(jnp.float32).reshape(-1, lookup.ENTRIES)


def fit(
    x: Float[Array, "m k"], dtype: jnp.dtype = DTYPE
) -> tuple[Float[Array, "m k"], Float[Array, "m 1"]]:
    """Scales every row by a power of two so that float16 holds it.

    Exact for bfloat16 and float16 values, but for elements 2**28 times smaller than the
    largest of their row, which lose bits or vanish: at most 2**-39 of the largest.

    Args:
      x: Rows of any float dtype.
      dtype: What the rows become. bfloat16 has the range of float32: they are not
        scaled.

    Returns:
      Rows, and the float32 factors that undo the scaling. A row with an infinity or NaN
      is not scaled.
    """
    wide = x.astype(jnp.float32)
    if dtype != DTYPE:
        return wide.astype(dtype), jnp.ones((len(x), 1), jnp.float32)
    factor, inverse = bring_to(jnp.abs(wide).max(1, keepdims=True), TOP)
    return (wide * factor).astype(DTYPE), inverse


def unit_of(
    scale: Float[Array, "..."], added: Float[Array, "..."] | None = None
) -> tuple[Array, Array]:
    """One power of two that brings all scales to at most one, and its inverse.

    float16 then holds what is multiplied by them, whatever their range, down to 2**-28
    of its largest. What is ``added`` to that comes to at most ``2**TOP``.
    """
    largest = jnp.abs(scale.astype(jnp.float32)).max()
    if added is not None:
        of_added = jnp.abs(added.astype(jnp.float32)).max() * 2.0**-TOP
        largest = jnp.maximum(largest, of_added)
    return bring_to(largest, -1)


def bring_to(largest: Float[Array, "..."], exponent: int) -> tuple[Array, Array]:
    """Powers of two that bring numbers to ``[2**exponent, 2**(exponent + 1))``, undone.

    Both are normal, so that neither is flushed to zero: very small numbers end lower.
    Zeros, infinities and NaN give ones.
    """
    biased = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    power = jnp.clip(127 + exponent - biased, -126, 126)
    power = jnp.where((biased == 0) | (biased == 255), 0, power)
    two_to = lambda e: lax.bitcast_convert_type((e + 127) << 23, jnp.float32)  # noqa: E731
    return two_to(power), two_to(-power)


def arrange(x: Float[Array, "m k"], steps: Steps) -> Float[Array, "m k"]:
    """Orders k as the products take it: step, product, sub-block, block, row of it."""
    m, k = x.shape
    products = steps.sub_blocks // steps.joined
    axes = (m, k // steps.rows, steps.blocks, products, steps.joined, tiles.SIDE)
    return x.reshape(axes).transpose(0, 1, 3, 4, 2, 5).reshape(m, k)


def start(
    x: Float[Array, "m k"], bits: int, affine: Affine, steps: Steps, *, zeros: bool
) -> Float[Array, "steps sums m"]:
    """What has to be taken off the product of a step: ``-sum offset * x``.

    The offsets are those of codes in the dtype of ``x``.

    The sum includes the middle code of `Affine.CENTERED`. For ``zeros``, ``-sum x``
    comes after it.
    """
    m, k = x.shape
    centre = affine.centre(bits)
    recipes = unpack.recipes(bits, x.dtype, floats=affine is Affine.FLOAT)
    offsets = jnp.array([recipe.offset + centre for recipe in recipes], jnp.float32)
    wide = x.astype(jnp.float32)
    by_sub_block = wide.reshape(m, -1, len(recipes), tiles.SIDE)
    by_sub_block *= offsets[None, None, :, None]
    sums = [
        values.reshape(m, k // steps.rows, steps.rows).sum(-1)
        for values in ((by_sub_block, wide) if zeros else (by_sub_block,))
    ]
    return -jnp.stack(sums, 1).transpose(2, 1, 0)
