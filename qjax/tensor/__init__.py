"""`QTensor`: a quantized matrix as codes, an affine map, a grouping and a layout."""

from qjax.tensor.building import build
from qjax.tensor.digits import Digits
from qjax.tensor.floats import SMALL_FLOATS, numbers, widen
from qjax.tensor.joining import concatenate, stack
from qjax.tensor.levels import (
    Levels,
    Nested,
    StoredGlobal,
    WithGlobal,
    floats_of,
    replace_floats,
)
from qjax.tensor.parts import (
    Affine,
    Cut,
    Encoded,
    Grouping,
    InSteps,
    Layout,
    Segment,
    columns,
    plain,
    position,
)
from qjax.tensor.qtensor import (
    QTensor,
    check_array,
    check_packed,
    codes,
    matrix_shape,
    over_batch,
    readable,
    segment_codes,
)
from qjax.tensor.segments import decoded, group_counts, split

__all__ = [
    "SMALL_FLOATS",
    "Affine",
    "Cut",
    "Digits",
    "Encoded",
    "Grouping",
    "InSteps",
    "Layout",
    "Levels",
    "Nested",
    "QTensor",
    "Segment",
    "StoredGlobal",
    "WithGlobal",
    "build",
    "check_array",
    "check_packed",
    "codes",
    "columns",
    "concatenate",
    "decoded",
    "floats_of",
    "group_counts",
    "matrix_shape",
    "numbers",
    "over_batch",
    "plain",
    "position",
    "readable",
    "replace_floats",
    "segment_codes",
    "split",
    "stack",
    "widen",
]
