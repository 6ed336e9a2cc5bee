"""The dense weight from `Tiles`, bit for bit that of `qjax.decode.stored_weight`.

But for float32 scales with an added zero: their product with a code is inexact, and a
compiler is free to round it, or not, before the sum.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, DTypeLike, Float

from qjax import decode
from qjax.formats import tiles
from qjax.pallas import lang
from qjax.pallas.operands import Config, Steps, group_rows, parameters
from qjax.pallas.weight import Columns, Place, places
from qjax.tensor import Affine, QTensor


def dequantize(
    w: QTensor,
    dtype: DTypeLike | None,
    config: Config,
    *,
    interpret: bool = False,
) -> Float[Array, "k n"]:
    """Forms the weight of one segment in stored row order.

    Args:
      w: As in `qjax.pallas.matmul.matmul`.
      dtype: As in `qjax.dequantize`.
      config: How to cut the launch up; ``block_m`` and ``splits`` mean nothing here.
      interpret: Whether to run as jnp, on any device.

    Returns:
      ``[k, n]``.

    Raises:
      NotImplementedError: If the kernel declines ``w``, with the reason.
    """
    (segment,) = w.segments
    bits, (group,) = segment.bits, group_rows(w)
    config = config.fitting(bits, w.k + segment.padding)
    steps = Steps.of(bits, group, config)
    k, n = w.k + segment.padding, w.n + w.padding
    sub_blocks, exact = tiles.sub_blocks(bits), w.dtype if dtype is None else None
    dense = lang.launch(
        functools.partial(
            _body, bits, group, steps, config, w.affine, w.rounding, exact
        ),
        w.words[0],
        *parameters(w),
        name=f"dequantize_{bits}bit",
        grid=(k // config.block_k, -(-n // config.block_n)),
        out_shape=(k // tiles.rows_of_block(bits), sub_blocks, tiles.SIDE, n),
        out_dtype=dtype or w.dtype,
        warps=config.warps,
        stages=config.stages,
        interpret=interpret,
    )
    return dense.reshape(k, n)[: w.k, : w.n]


def _body(
    bits: int,
    group: int,
    steps: Steps,
    config: Config,
    affine: Affine,
    rounding: int,
    exact: jnp.dtype | None,
    language: lang.Lang,
    words_ref: Any,
    *refs: Any,
) -> None:
    *parameter_refs, out_ref = refs
    iteration, n = pl.program_id(0), pl.program_id(1)
    columns = Columns(language, words_ref, bits, n * config.block_n, config.block_n)
    last_group = parameter_refs[0].shape[0] - 1
    block = iteration * (config.block_k // tiles.rows_of_block(bits))
    centre = affine.centre(bits)
    for row in range(0, config.block_k, steps.rows):
        g = jnp.minimum((iteration * config.block_k + row) // group, last_group)
        scale, *zero = (
            lang.load_row(ref, g, columns=columns.slice, mask=columns.inside).astype(
                jnp.float32
            )[:, None]
            for ref in parameter_refs
        )
        for place in places(bits, block, row, steps):
            above = columns.offset(place) + centre
            c = columns.operand(place).astype(jnp.float32) - above
            if zero:
                values = decode.affine_map(
                    c, scale, zero[0], affine, rounding, exact, _convert
                )
            else:
                values = c * scale
            _store(out_ref, place, columns, values.astype(out_ref.dtype))


def _convert(x: Array, dtype: DTypeLike) -> Array:
    # Triton leaves a pair of conversions alone.
    return x.astype(dtype).astype(jnp.float32)


def _store(out_ref: Any, place: Place, columns: Columns, values: Array) -> None:
    """Writes a sub-block ``[columns, blocks * 16]`` as rows of the weight."""
    axes = values.reshape(-1, place.width, tiles.SIDE).transpose(1, 2, 0)
    tile = axes.reshape(place.width, 1, tiles.SIDE, -1)
    lang.store(out_ref.at[(*place.rows, columns.slice)], tile, columns.inside)
