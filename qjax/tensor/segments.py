"""The segments of a `QTensor`: its groups, and each as a matrix of its own."""

import dataclasses

from qjax.tensor.parts import Grouping, plain
from qjax.tensor.qtensor import QTensor


def group_counts(qt: QTensor) -> tuple[int, ...]:
    """Returns how many rows of ``scale`` each segment has."""
    return tuple(
        _ceil_div(
            rows if qt.grouping is Grouping.ROWS else rows * qt.n, segment.group_size
        )
        for rows, segment in zip(qt.rows, qt.segments, strict=True)
    )


def _ceil_div(count: int, size: int | None) -> int:
    return 1 if size is None else -(-count // size)


def decoded(qt: QTensor) -> QTensor:
    """Replaces encoded scales and zeros by what they decode to."""
    return dataclasses.replace(qt, scale=plain(qt.scale), zero=plain(qt.zero))


def split(qt: QTensor) -> list[QTensor]:
    """Cuts a matrix into its segments, each a matrix of one width.

    The parts have stored row order: ``order`` and ``input_scale`` are left to the
    caller, and encoded scales are decoded.

    Args:
      qt: A matrix, or a stack of them.

    Returns:
      One single-segment `QTensor` a segment, from the first stored row to the last.
    """
    qt = decoded(qt)
    parts, row, group = [], 0, 0
    segments = zip(qt.words, qt.segments, qt.rows, group_counts(qt), strict=True)
    for words, segment, rows, groups in segments:
        if qt.row_group is None:
            row_group, held = None, slice(group, group + groups)
        else:
            row_group, held = qt.row_group[..., row : row + rows], slice(None)
        parts.append(
            dataclasses.replace(
                qt,
                words=(words,),
                segments=(segment,),
                scale=qt.scale[..., held, :],
                zero=None if qt.zero is None else qt.zero[..., held, :],
                row_group=row_group,
                order=None,
                input_scale=None,
            )
        )
        row, group = row + rows, group + groups
    return parts
