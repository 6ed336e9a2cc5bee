"""`build`: a `QTensor` whose leaves fit together."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qjax.bits import block, whole
from qjax.tensor.floats import SMALL_FLOATS
from qjax.tensor.parts import Affine, Layout, Segment
from qjax.tensor.qtensor import QTensor, matrix_shape, misfit
from qjax.tensor.segments import group_counts


def build(
    words: Sequence[Array],
    scale: Any,
    zero: Any = None,
    *,
    layout: Layout,
    segments: Sequence[Segment],
    **fields: Any,
) -> QTensor:
    """Builds a `QTensor` after checking that its leaves fit together.

    Args:
      words: One array a segment.
      scale: Float ``[*batch, groups, n]`` or of a divisor of n columns, or `Encoded`.
      zero: Like ``scale``, or None; integers only with `Affine.ZERO`.
      layout: Layout of the words.
      segments: One `Segment` for each array of words.
      **fields: The other fields of `QTensor`.

    Returns:
      The tensor.

    Raises:
      ValueError: If shapes or dtypes disagree, naming the field, what it has and what
        it should have. Values are not looked at.
    """
    if not words or len(words) != len(segments):
        raise ValueError(
            f"words has {len(words)} arrays for {len(segments)} segments; pass one "
            "each."
        )
    qt = QTensor(
        words=tuple(words),
        scale=scale,
        zero=zero,
        layout=layout,
        segments=tuple(segments),
        **fields,
    )
    _check_words(qt)
    _check_parameters(qt)
    _check_vectors(qt)
    return qt


def _check_words(qt: QTensor) -> None:
    _check_padding("padding", qt.padding)
    for array, segment in zip(qt.words, qt.segments, strict=True):
        block(segment.bits)  # refuses other widths
        if segment.group_size is not None and (whole(segment.group_size) or 0) < 1:
            raise ValueError(
                f"{segment}: group_size must be a positive integer or None."
            )
        _check_padding(f"{segment}: padding", segment.padding)
        shape = matrix_shape(array, qt.layout)
        _, n = qt.layout.extents(shape, segment.bits)
        _require("n of words", n, qt.n + qt.padding)
        _require("batch of words", array.shape[: array.ndim - qt.layout.rank], qt.batch)
        if reason := misfit(qt.layout, segment.bits, shape, array.dtype):
            raise ValueError(reason)
    if qt.rounding not in (1, 2):
        raise ValueError(f"rounding={qt.rounding} must be 1 or 2.")
    if qt.weight_dtype not in (None, "float16", "bfloat16", "float32"):
        raise ValueError(
            f"weight_dtype={qt.weight_dtype!r} must be float16, bfloat16, float32, or "
            "None for that of the scale."
        )


def _check_padding(name: str, padding: Any) -> None:
    if (count := whole(padding)) is None or count < 0:
        raise ValueError(f"{name}={padding!r} must be an integer, and not negative.")


def _check_parameters(qt: QTensor) -> None:
    """Checks scale and zero, and that the affine map has what it needs."""
    if qt.zero is not None and not qt.affine.counts:
        raise ValueError(f"zero must be None with {qt.affine.value}.")
    widths = {segment.bits for segment in qt.segments}
    if qt.affine is Affine.FLOAT and widths not in ({bits} for bits in SMALL_FLOATS):
        raise ValueError(
            f"{sorted(widths)} bits must be one of {list(SMALL_FLOATS)} for all "
            f"segments with {qt.affine.value}."
        )
    if len(qt.scale.shape) < 2:
        raise ValueError(f"scale.shape={qt.scale.shape} must be [*batch, groups, n].")
    groups = sum(group_counts(qt)) if qt.row_group is None else qt.scale.shape[-2]
    for name, array in (("scale", qt.scale), ("zero", qt.zero)):
        if array is None:
            continue
        _require(f"{name}.shape[:-1]", array.shape[:-1], (*qt.batch, groups))
        columns, padded = array.shape[-1], qt.n + qt.padding
        if columns != padded and (columns == 0 or qt.n % columns):
            raise ValueError(
                f"{name}.shape[-1]={columns} must be n={qt.n} or a divisor of it"
                f"{f', or {padded} with padding' if qt.padding else ''}."
            )
        integer = not jnp.issubdtype(array.dtype, jnp.floating)
        if integer and (name == "scale" or qt.affine is not Affine.ZERO):
            raise ValueError(
                f"{name}.dtype={array.dtype} must be a float dtype"
                f"{'' if name == 'scale' else f' for {qt.affine.value}'}."
            )
    if qt.zero is None and qt.affine in (Affine.ZERO, Affine.OFFSET):
        raise ValueError(
            f"zero is None, but {qt.affine.value} needs it; symmetric codes are "
            "Affine.CENTERED."
        )


def _check_vectors(qt: QTensor) -> None:
    """Checks the leaves that lie along k, and the codebook."""
    for name in ("order", "row_group", "input_scale"):
        array = getattr(qt, name)
        if array is not None:
            _require(f"{name}.shape", array.shape, (*qt.batch, qt.k))
        if array is not None and name != "input_scale":
            _require(f"{name}.dtype", array.dtype, jnp.dtype(jnp.int32))
    if (qt.codebook is None) == (qt.affine is Affine.CODEBOOK):
        raise ValueError(f"codebook and affine={qt.affine} must come together.")
    if qt.codebook is not None:
        entries = (*qt.batch, 2 ** max(segment.bits for segment in qt.segments))
        _require("codebook.shape", qt.codebook.shape, entries)
    for name in ("codebook", "input_scale"):
        array = getattr(qt, name)
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype={array.dtype} must be a float dtype.")


def _require(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{name}={found} must be {wanted}.")
