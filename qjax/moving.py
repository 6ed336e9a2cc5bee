"""Codes in another layout, moved there as the device does it best."""

import contextlib
import functools
import math

import jax
from jaxtyping import Array

from qjax import decode, pallas, sharding
from qjax.meshes import is_explicit, shares
from qjax.partitioning import over_devices
from qjax.tensor import Layout, QTensor, matrix_shape


def in_layout(w: QTensor, layout: Layout) -> QTensor:
    """Moves the codes if the layout can hold them."""
    with contextlib.suppress(ValueError):  # xla.dense reads any layout.
        return decode.relayout(w, layout, move=move_words)
    return w


def stays_cut(w: QTensor, layout: Layout) -> bool:
    """Whether words that are cut over devices are cut the same way in another layout.

    Where not, every device would get all of them.

    Args:
      w: A weight; of a traced one, as `meshes.shares`.
      layout: Another layout.
    """
    for words, segment, rows in zip(w.words, w.segments, w.rows, strict=True):
        cut, bits = w.layout.cut(segment.bits), segment.bits
        of_axes = shares(words)[len(w.batch) :]
        if cut is None or math.prod(of_axes) == 1:  # Not cut, or in no way of `shard`.
            continue
        held = w.layout.extents(matrix_shape(words, w.layout), bits)
        pieces = sharding.words_units((w.layout, layout), bits, (rows, w.n), held)
        of_k, of_n = of_axes[cut.k_axis], of_axes[cut.n_axis]
        if pieces["k0"] % of_k or pieces["n"] % of_n:
            return False
    return True


def move_words(
    words: Array, source: Layout, target: Layout, bits: int, shape: tuple[int, int]
) -> Array:
    """`decode.move_words`; on a GPU by a kernel, each device on its pieces."""
    if not (are_permuted(source, target, bits) or is_explicit(words)):
        return decode.move_words(words, source, target, bits, shape)
    move = functools.partial(
        move_piece, source=source, target=target, bits=bits, shape=shape
    )
    of_words, of_moved = (sharding.words_names(one, bits) for one in (source, target))
    held = source.extents(words.shape, bits)
    units = sharding.words_units((source, target), bits, shape, held)
    return over_devices(move, (words,), (of_words,), of_moved, units)


def are_permuted(source: Layout, target: Layout, bits: int) -> bool:
    """Whether the kernel moves codes of a width from one layout to the other."""
    return None not in (source.digits(bits), target.digits(bits))


def move_piece(
    words: Array, source: Layout, target: Layout, bits: int, shape: tuple[int, int]
) -> Array:
    """`move_words` of what a device has of a matrix, or of a whole one."""
    k, n = map(min, shape, source.extents(words.shape, bits))

    def elsewhere(words: Array) -> Array:
        return decode.move_words(words, source, target, bits, (k, n))

    def on_gpu(words: Array) -> Array:
        with contextlib.suppress(NotImplementedError):
            return pallas.relayout(words, source, target, bits, (k, n))
        return elsewhere(words)

    return jax.lax.platform_dependent(words, cuda=on_gpu, default=elsewhere)
