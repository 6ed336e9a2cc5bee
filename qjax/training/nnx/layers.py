"""The layers of `layers.nnx` that have shadows and adapters."""

from qjax.layers.nnx import (
    Einsum,
    Embed,
    Experts,
    Linear,
    LinearGeneral,
    MBWQLinear,
)

# Those whose weight is one matrix over the last axis of the inputs, and all.
Matrix = Linear | MBWQLinear
Layer = Matrix | LinearGeneral | Einsum | Experts | Embed
