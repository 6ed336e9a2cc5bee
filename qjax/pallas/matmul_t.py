"""``dy @ W.T`` from the same storage: the backward of `qjax.pallas.matmul`.

A program owns an iteration's rows of the weight, ``block_m`` rows of ``dy``, and a run
of columns. The scale is folded into ``dy``, one rounding to float16; offsets and
integer zeros leave the codes exactly. What an added zero gives does not depend on the
codes: it is one small product with the zeros themselves.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qjax.formats import tiles
from qjax.pallas import gpu, lang, scales
from qjax.pallas.operands import (
    DTYPE,
    Config,
    Steps,
    books,
    fit,
    group_rows,
    joined_words,
    one_of,
    parameters,
    read_book,
    read_index,
    stack_index,
    unit_of,
)
from qjax.pallas.weight import Columns, places
from qjax.tensor import Affine, QTensor, decoded, plain


class Operands(NamedTuple):
    """What a launch takes: arrays, or references to them.

    Attributes:
      dy: Padded rows.
      unit: By which scales are multiplied, ``[1, 1]``.
      index: Of the matrix in a stack.
      books: Codebooks, if there are any.
      words: Of the one segment.
      parameters: Scale, and the zero that is taken off the codes.
    """

    dy: Any
    unit: Any
    index: Any
    books: Any
    words: Any
    parameters: list[Any]


def matmul_t(
    dy: Float[Array, "m n"],
    w: QTensor,
    config: Config,
    *,
    index: Array | None = None,
    interpret: bool = False,
) -> Float[Array, "m k"]:
    """Multiplies rows by the transpose of a matrix of one segment in `Tiles`.

    Args:
      dy: float32 rows, n as ``w.n``.
      w: As in `qjax.pallas.matmul.matmul`.
      config: How to cut the launch up; ``splits`` cuts the columns of ``w``.
      index: Which matrix of ``w``, where that is a stack ``[count, k, n]``.
      interpret: Whether to run as jnp, on any device.

    Returns:
      float32 product.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason.
    """
    whole, w = scales.whole_of(w)
    (segment,), m = w.segments, dy.shape[0]
    bits, (group,) = segment.bits, group_rows(w)
    config = config.fitting(bits, w.k + segment.padding)
    steps = Steps.of(bits, group, config)
    columns = w.n + w.padding
    width = -(-columns // config.block_n) * config.block_n
    rows, unscale = fit(jnp.pad(dy, ((0, -m % config.block_m), (0, width - w.n))))
    scale, *zero = parameters(w)
    added = bool(zero) and w.affine is not Affine.ZERO
    unit, undo = unit_of(plain(one_of(w.scale, index)))
    k = w.k + segment.padding
    partial = lang.launch(
        functools.partial(
            _body, bits, group, w.scale.shape[-2], w.affine, steps, config
        ),
        Operands(
            dy=rows,
            unit=unit.reshape(1, 1),
            index=stack_index(index),
            books=books(w),
            words=joined_words(w)[0],
            parameters=[scale] if added else [scale, *zero],
        ),
        name=f"matmul_t_{bits}bit_{config.block_m}",
        grid=(len(rows) // config.block_m, k // config.block_k, config.splits),
        out=jax.ShapeDtypeStruct(
            (
                config.splits,
                len(rows),
                k // tiles.rows_of_block(bits),
                tiles.sub_blocks(bits),
                tiles.SIDE,
            ),
            jnp.float32,
        ),
        warps=config.warps,
        stages=1 if _would_race(config) else config.stages,
        interpret=interpret,
    )
    dx = (partial.sum(0).reshape(-1, k) * unscale)[:m, : w.k] * undo
    if whole is not None:
        dx = one_of(whole, index).apply(dx)
    if added:
        _, zeros = parameters(decoded(one_of(w, index)))
        zeros = zeros[:, : w.n].astype(jnp.float32)
        by_group = jnp.dot(dy, zeros.T, precision=lax.Precision.HIGHEST)
        dx += jnp.repeat(by_group, group, axis=1)[:, : w.k]
    return dx


def _would_race(config: Config) -> bool:
    """Whether products of a loop that is pipelined would see rows of the next pass.

    With four warps, 64 rows of ``dy`` go to tensor memory, where there is one, for all
    products of a pass, and XLA's Triton overwrites them when the first is complete.
    """
    rows_in_it = config.block_m >= 64 and config.warps >= 4
    return rows_in_it and gpu.at_hand().has_tensor_memory


def _body(
    bits: int,
    group: int,
    groups: int,
    affine: Affine,
    steps: Steps,
    config: Config,
    language: lang.Lang,
    refs: Operands,
    out_ref: Any,
) -> None:
    m, iteration, split = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(m * config.block_m, config.block_m)
    matrix = read_index(refs.index)
    first_block, first_group = matrix * out_ref.shape[2], matrix * groups
    book = read_book(refs.books, matrix, affine, bits)
    block = iteration * (config.block_k // tiles.rows_of_block(bits))
    step_rows = range(0, config.block_k, steps.rows)
    unit = lang.load_row(refs.unit, 0, columns=pl.ds(0, 1))

    def add_columns(j: Array, accs: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = Columns(
            language,
            refs.words,
            bits,
            affine,
            j * config.block_n,
            config.block_n,
            book.words,
        )
        dy = refs.dy[rows, columns.slice].astype(jnp.float32)
        old, new = iter(accs), []
        of_iteration = scales.Iteration(
            refs.parameters, columns.slice, columns.inside, group, config.block_k
        )
        for row in step_rows:
            g = (iteration * config.block_k + row) // group
            g = first_group + jnp.minimum(g, groups - 1)
            scale, *zero = of_iteration.read(row, g)
            scaled = (dy * (scale.astype(jnp.float32) * unit)[None]).astype(DTYPE)
            for place in places(bits, first_block + block, row, steps):
                codes = columns.scaled(place, zero)
                new.append(next(old) + language.dot(scaled, codes))
        return tuple(new)

    per_step = jnp.zeros((config.block_m, steps.blocks * tiles.SIDE), jnp.float32)
    count = -(-refs.words.shape[2] * tiles.SIDE // config.block_n)
    begin, end = config.share(split, count)
    accs = (per_step,) * (len(step_rows) * steps.sub_blocks)
    done = iter(lax.fori_loop(begin, end, add_columns, accs))
    for row in step_rows:
        for place in places(bits, block, row, steps):
            dx = next(done) if book.undo is None else next(done) * book.undo
            tile = dx.reshape(1, config.block_m, place.width, 1, tiles.SIDE)
            lang.store(out_ref.at[(pl.ds(split, 1), rows, *place.rows)], tile)
