"""Matrices that are alike, joined along n into one, or stacked."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from qjax.tensor.levels import Levels
from qjax.tensor.parts import Encoded, Grouping, columns, plain
from qjax.tensor.qtensor import QTensor, check_packed
from qjax.tensor.segments import group_counts

# What joined matrices share: static fields, and leaves that have no axis of n.
_STATIC = ("layout", "segments", "affine", "grouping", "rounding", "weight_dtype")
_SHARED = ("order", "row_group", "codebook", "input_scale")


def concatenate(weights: Iterable[QTensor]) -> QTensor:
    """Joins matrices of the same inputs along n, so that one product serves all.

    The queries, keys and values of a layer, say: on a GPU their products are one launch
    then, and the small ones fill it. Nothing is unpacked, and every column stays what
    it was. Of weights that are cut over devices along n, words move.

    Args:
      weights: Matrices, or stacks of as many, alike but for n and their values: packed
        in the same layout, with the same widths, groups, affine map and dtypes, and
        rows in the same order. Encoded scales are decoded, but for `Levels` that
        are alike.

    Returns:
      ``[*batch, k, sum of n]``. `jax.numpy.split` cuts a product into theirs.

    Raises:
      TypeError: If one is no `QTensor`.
      ValueError: If they are not alike, saying in what; or if their layout cannot be
        joined.

    Example:
      >>> import qjax
      >>> q, k = (qjax.quantize(jnp.ones((64, n)), group_size=32) for n in (16, 8))
      >>> w = concatenate([q, k])
      >>> jnp.array_equal(
      ...     qjax.matmul(jnp.ones((2, 64)), w)[:, 16:],
      ...     qjax.matmul(jnp.ones((2, 64)), k),
      ... ).item()
      True
    """
    weights = _checked(weights)
    first, *others = weights
    for i, w in enumerate(others, 1):
        _check_alike(first, w, f"weights[{i}]")
    axis = _axis_of_columns(first)
    for i, w in enumerate(weights[:-1]):
        if w.padding:
            raise ValueError(
                f"weights[{i}] has {w.padding} padded columns in {w.layout!r}, and "
                "another after it; qjax.relayout moves it to gptq.Stream(), which has "
                "none."
            )

    def joined(name: str) -> Array | Encoded:
        leaves: list[Array | Encoded] = [getattr(w, name) for w in weights]
        scale, *others = leaves
        if isinstance(scale, Levels) and (levels := scale.beside(others)) is not None:
            return levels
        own = [columns(plain(x), w.n) for x, w in zip(leaves, weights, strict=True)]
        return jnp.concatenate(own, axis=-1)

    words = zip(*(w.words for w in weights), strict=True)
    return dataclasses.replace(
        first,
        words=tuple(jnp.concatenate(arrays, axis) for arrays in words),
        scale=joined("scale"),
        zero=None if first.zero is None else joined("zero"),
        padding=weights[-1].padding,
    )


def stack(weights: Iterable[QTensor]) -> QTensor:
    """Stacks matrices that are alike: layers of a scan, experts of a mixture.

    What `matmul` takes with ``index=``, `ragged_matmul`, and the layers `Experts`.
    Nothing is unpacked. Of weights that are cut over devices, each keeps its pieces.

    Args:
      weights: Matrices, or stacks, alike but for their values: of one shape, packed in
        the same layout, with the same widths, groups, affine map and dtypes. Each may
        have rows in an order of its own, or in none.

    Returns:
      ``[len(weights), *batch, k, n]``. Indexing with ``jax.tree.map(lambda leaf:
      leaf[i], stacked)`` gives a matrix back.

    Raises:
      TypeError: If one is no `QTensor`.
      ValueError: If there are none, or if they are not alike, saying in what.

    Example:
      >>> import qjax
      >>> gate, up = (
      ...     qjax.quantize(w * jnp.ones((64, 8)), group_size=32) for w in (1, 2)
      ... )
      >>> w = stack([gate, up])
      >>> qjax.matmul(jnp.ones(64), w, index=1)[:2].tolist(), w.shape
      ([128.0, 128.0], (2, 64, 8))
    """
    weights = _ordered_alike(_checked(weights))
    first, *others = weights
    wanted = _form(first) | _shapes(first)
    for i, w in enumerate(others, 1):
        _check_equal(wanted, _form(w) | _shapes(w), f"weights[{i}]")
        if jax.tree.structure(w) != jax.tree.structure(first):
            raise ValueError(
                f"weights[{i}] has its scales or zeros encoded in another way than "
                "weights[0]; qjax.prepare decodes them."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


def _ordered_alike(weights: list[QTensor]) -> list[QTensor]:
    """Writes out that rows are in their own order, where those of others are not.

    GPTQ's act-order leaves some as they are, and files then do not say so.
    """
    for name in ("order", "row_group"):
        if any(getattr(w, name) is not None for w in weights):
            weights = [
                w if getattr(w, name) is not None else _with_rows(w, name)
                for w in weights
            ]
    return weights


def _with_rows(w: QTensor, name: str) -> QTensor:
    rows = jnp.asarray(np.arange(w.k) if name == "order" else _groups(w), jnp.int32)
    return dataclasses.replace(w, **{name: jnp.broadcast_to(rows, (*w.batch, w.k))})


def _groups(w: QTensor) -> np.ndarray:
    """The group of each stored row, counted through all segments."""
    segments = zip(w.rows, w.segments, group_counts(w), strict=True)
    parts, first = [], 0
    for rows, segment, groups in segments:
        parts.append(first + np.arange(rows) // (segment.group_size or rows))
        first += groups
    return np.concatenate(parts)


def _checked(weights: Iterable[QTensor]) -> list[QTensor]:
    if isinstance(weights, QTensor):
        raise TypeError(f"weights={weights!r} must be a sequence of QTensor.")
    weights = list(weights)
    if not weights:
        raise ValueError("weights is empty; pass one QTensor or more.")
    for i, w in enumerate(weights):
        check_packed(w, f"weights[{i}]")
    return weights


def _check_equal(wanted: dict[str, Any], found: dict[str, Any], name: str) -> None:
    for what, value in found.items():
        if value != wanted[what]:
            raise ValueError(
                f"{name}.{what}={value} must be {wanted[what]}, as of weights[0]."
            )


def _check_alike(first: QTensor, w: QTensor, name: str) -> None:
    """Checks all that `concatenate` keeps of the first alone."""
    _check_equal(_form(first), _form(w), name)
    for field in _SHARED:
        one, other = getattr(first, field), getattr(w, field)
        if one is other:
            continue
        traced = isinstance(one, Tracer) or isinstance(other, Tracer)
        if traced:
            raise ValueError(
                f"{name}.{field} is traced and cannot be compared with that of "
                "weights[0]; join weights outside of jit."
            )
        if not np.array_equal(_values(one), _values(other)):
            raise ValueError(
                f"{name}.{field} has other values than that of weights[0]."
            )


def _form(w: QTensor) -> dict[str, Any]:
    """What joined matrices have in common, but for values."""
    dtypes = _of_leaves(w, "dtype")
    static = {field: getattr(w, field) for field in _STATIC}
    return {"shape[:-1]": w.shape[:-1]} | static | dtypes


def _shapes(w: QTensor) -> dict[str, Any]:
    """What stacked matrices have in common besides."""
    words = [array.shape for array in w.words]
    whole = {"shape": w.shape, "words": words, "padding": w.padding}
    return whole | _of_leaves(w, "shape")


def _of_leaves(w: QTensor, what: str) -> dict[str, Any]:
    """The dtype or shape of each leaf besides the words; None where there is none."""
    names = ("scale", "zero", *_SHARED)
    return {f"{name}.{what}": getattr(getattr(w, name), what, None) for name in names}


def _values(leaf: Any) -> np.ndarray:
    return np.asarray(plain(leaf))


def _axis_of_columns(w: QTensor) -> int:
    """The axis of words that runs along n; refuses what has none."""
    if w.grouping is not Grouping.ROWS:
        raise ValueError(f"{w!r} has groups over several columns, and is not joined.")
    cut = w.layout.cut(w.segments[0].bits)
    if cut is None:
        raise ValueError(
            f"{w.layout!r} has no axis of columns to join along; qjax.relayout or "
            "qjax.prepare moves the codes to one that has."
        )
    return len(w.batch) + cut.n_axis
