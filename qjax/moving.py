"""Codes in another layout, moved there as the device does it best."""

import contextlib
import functools

import jax
from jaxtyping import Array

from qjax import decode, pallas, sharding
from qjax.meshes import is_explicit
from qjax.partitioning import over_devices
from qjax.tensor import Layout, QTensor


def in_layout(w: QTensor, layout: Layout) -> QTensor:
    """Moves the codes if the layout can hold them."""
    with contextlib.suppress(ValueError):  # xla.dense reads any layout.
        return decode.relayout(w, layout, move=move_words)
    return w


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
