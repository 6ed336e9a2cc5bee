"""Products with a quantized matrix as GPU kernels: Pallas, lowered through Triton.

Every function takes rows and a matrix in `qjax.formats.tiles.Tiles`, or a stack of
matrices and the index of one, and raises `NotImplementedError` where it declines. The
products run on tensor cores and are accumulated in float32. Up to 16 rows of 16 bits
are multiplied as they are (`matvec`); more, and rows of float32, in float16, scaled by
powers of two first, so that what was bfloat16 or float16 loses nothing. Weights lose
nothing up to 32 rows, and are rounded to float16 above.
"""

from qjax.pallas.configs import dense_rows
from qjax.pallas.operands import check, layout_of, one_of
from qjax.pallas.products import (
    dense,
    dense_t,
    fused,
    fused_bf16,
    fused_blocks,
    fused_grad,
    fused_t,
    weight,
)
from qjax.pallas.relayout import relayout

__all__ = ["check", "dense", "dense_rows", "dense_t", "fused"]
__all__ += ["fused_bf16", "fused_blocks", "fused_grad", "fused_t", "layout_of"]
__all__ += ["one_of", "relayout", "weight"]
