"""The codes nearest to a dense weight, and the scales nearest to its codes.

Most functions here take a part: one segment of one matrix, as `tensor.split` gives it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qjax import ops, tensor
from qjax.decode import numbers_of, rounded, spread, stored_weight
from qjax.meshes import automatically
from qjax.sharding import by_segment, cut_as, joined, names
from qjax.tensor import Affine, QTensor

# Rounds of nearest codes and fitted scales; a fifth changes little.
_ROUNDS = 4


def requantize(w: QTensor, target: Float[Array, "*batch k n"]) -> QTensor:
    """Rounds a dense weight to the format of a tensor: bits, groups, order, layout.

    Each group starts from the scale and zero that it has, and from those of the range
    of the new weight; nearest codes, and scales and float zeros of least squares, take
    turns; and the better of the two is taken. A group that ``w`` holds already is not
    changed.

    Args:
      w: A tensor of that format, stacked or not.
      target: The weight; ``input_scale`` is taken out of it, and stays.

    Returns:
      The tensor; scales and zeros that were encoded are plain.

    Raises:
      TypeError: If ``w`` is no `QTensor`.
      ValueError: If ``target`` has another shape than ``w``.
      NotImplementedError: If groups of rows are spread over several segments.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> larger = requantize(w, 3 * qjax.dequantize(w))
      >>> bool((qjax.codes(larger) == qjax.codes(w)).all())
      True
    """
    tensor.check_packed(w)
    if target.shape != w.shape:
        raise ValueError(f"target.shape={target.shape} must be {w.shape}, that of w.")
    return _requantize(ops.decoded(w), target.astype(jnp.float32))


def stacked(function: Callable) -> Callable:
    """Lets a function of one matrix and its arrays take stacks; one program.

    Of a matrix of mixed widths that is cut over devices, the function sees the whole,
    and what it returns is `by_segment` again. Where mesh axes are explicit, tensors
    that it returns are cut as the one that it gets, and arrays as the last of those.
    """

    def over_all(qt: QTensor, *arrays: Array) -> Any:
        over_batch = function
        for _ in qt.batch:
            over_batch = jax.vmap(over_batch)
        whole = joined(qt)
        result = over_batch(whole, *arrays)
        return result if whole is qt else _each(result, by_segment, lambda array: array)

    @jax.jit
    def mapped(qt: QTensor, *arrays: Array) -> Any:
        def specs(result: Any) -> Any:
            like = jax.typeof(arrays[-1]).sharding.spec
            return _each(result, lambda w: cut_as(qt, names(w)), lambda _: like)

        return automatically(over_all, qt, *arrays, specs=specs)

    return mapped


def _each(
    tree: Any, of_tensor: Callable[[QTensor], Any], of_array: Callable[[Any], Any]
) -> Any:
    is_tensor = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: of_tensor(leaf) if is_tensor(leaf) else of_array(leaf),
        tree,
        is_leaf=is_tensor,
    )


@stacked
def _requantize(qt: QTensor, target: Array) -> QTensor:
    check_groups(qt)
    if qt.input_scale is not None:
        target = target / qt.input_scale.astype(jnp.float32)[:, None]
    pairs = parts(qt, stored(qt, target))
    return join(qt, [_requantize_part(*pair) for pair in pairs], "scale", "zero")


def _requantize_part(part: QTensor, w: Array) -> QTensor:
    old, new = _alternate(part, w), _alternate(_by_range(part, w), w)

    def error(part: QTensor) -> Array:
        return group_sum(part, (stored_weight(part, jnp.float32) - w) ** 2)

    fitted = _choose(error(new) < error(old), new, old)
    # A scale of least squares is off by its own rounding, even where none is better.
    return _choose(_is_held(part, w), part, fitted)


def _is_held(part: QTensor, w: Array) -> Array:
    """Which groups are the weight, but for the last bit that `input_scale` costs."""
    # Rounded by itself: a compiler would merge the product and the difference.
    off = jnp.abs(rounded(stored_weight(part, jnp.float32), jnp.float32) - w)
    is_off = off > jnp.finfo(jnp.float32).eps * jnp.abs(w)
    return group_sum(part, is_off.astype(jnp.float32)) == 0


def _choose(groups: Array, one: QTensor, other: QTensor) -> QTensor:
    """Takes some groups of one part, and the rest of another."""
    q = jnp.where(spread(one, groups), codes(one), codes(other))
    chosen = {
        name: jnp.where(groups, getattr(one, name), getattr(other, name))
        for name in ("scale", "zero")
        if getattr(one, name) is not None
    }
    return with_words(dataclasses.replace(one, **chosen), q)


def _alternate(part: QTensor, w: Array) -> QTensor:
    def one(_: Array, part: QTensor) -> QTensor:
        return refit_part(with_words(part, nearest(part, w)), w)

    part = jax.lax.fori_loop(0, _ROUNDS, one, part)
    return with_words(part, nearest(part, w))


def _by_range(part: QTensor, w: Array) -> QTensor:
    """Scales and zeros that cover the weights of each group, as `rtn.quantize` does."""
    shape, top = part.scale.shape, 2 ** part.segments[0].bits - 1
    place = spread(part, jnp.arange(part.scale.size).reshape(shape))
    place = jnp.broadcast_to(place, w.shape).reshape(-1)

    def largest(terms: Array) -> Array:
        found = jax.ops.segment_max(terms.reshape(-1), place, part.scale.size)
        # Columns of padding belong to no group.
        return jnp.where(jnp.isfinite(found), found, 0).reshape(shape)

    low, high = -largest(-w), largest(w)
    size = jnp.maximum(high, -low)
    if not part.affine.counts:
        return _with_scale(part, size / jnp.abs(_entries(part)[0]).max())
    if part.zero is None:
        return _with_scale(part, 2 * size / top)
    if not has_integer_zero(part):
        centre = part.affine.centre(part.segments[0].bits)
        return _with_scale(part, (high - low) / top, lambda s: low + centre * s)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    moved = _with_scale(part, (high - low) / top)
    zero = jnp.clip(jnp.round(-low / moved.scale.astype(jnp.float32)), 0, top)
    kept = part.zero.astype(jnp.float32)
    zero = jnp.where(jnp.isfinite(zero) & _is_group(part), zero, kept)
    return dataclasses.replace(moved, zero=zero.astype(part.zero.dtype))


def _with_scale(
    part: QTensor, scale: Array, offset: Callable[[Array], Array] | None = None
) -> QTensor:
    """Gives a part new scales, and float zeros for the map ``c * scale + offset``.

    Groups keep theirs where the dtype cannot hold them, and padding does.

    Args:
      part: The part.
      scale: float32 scales.
      offset: Gives the offsets for scales as they are stored; None leaves the zeros.
    """
    new, groups = scale.astype(part.scale.dtype), _is_group(part)
    # A compiler takes subnormal numbers for 0.
    good = (new >= jnp.finfo(new.dtype).smallest_normal) & jnp.isfinite(new) & groups
    part = dataclasses.replace(part, scale=jnp.where(good, new, part.scale))
    zero = part.zero
    if offset is None or zero is None:
        return part
    s = part.scale.astype(jnp.float32)
    moved = -offset(s) / s if part.affine is Affine.ZERO else offset(s)
    moved = moved.astype(zero.dtype)
    good = jnp.isfinite(moved) & groups
    return dataclasses.replace(part, zero=jnp.where(good, moved, zero))


def _is_group(part: QTensor) -> Array:
    """Which scales belong to elements; those of padded columns do not."""
    return group_sum(part, jnp.ones((part.k, part.n), jnp.float32)) > 0


def stored(qt: QTensor, rows: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Puts rows in the order of the inputs into that of the stored rows."""
    return rows if qt.order is None else jnp.take(rows, qt.order, axis=0)


def in_input_order(qt: QTensor, rows: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Puts stored rows into the order of the inputs."""
    if qt.order is None:
        return rows
    return jnp.take(rows, jnp.argsort(qt.order), axis=0)


def weight(qt: QTensor) -> Float[Array, "k n"]:
    """The weight in stored order, unrounded."""
    return stored_weight(qt, jnp.float32)


def parts(qt: QTensor, *arrays: Array) -> list[tuple[Any, ...]]:
    """Every segment with its rows of the arrays."""
    found, row = [], 0
    for part, rows in zip(tensor.split(qt), qt.rows, strict=True):
        found.append((part, *(array[row : row + rows] for array in arrays)))
        row += rows
    return found


def join(qt: QTensor, parts: list[QTensor], *names: str) -> QTensor:
    """Puts the words, and the parameters that changed, back together."""
    words = tuple(part.words[0] for part in parts)
    leaves = {
        name: jnp.concatenate([getattr(part, name) for part in parts])
        for name in names
        if getattr(qt, name) is not None
    }
    return dataclasses.replace(qt, words=words, **leaves)


def has_integer_zero(part: QTensor) -> bool:
    """Whether the zero is an integer, which least squares cannot move."""
    zero = part.zero
    return zero is not None and not jnp.issubdtype(zero.dtype, jnp.floating)


def check_groups(qt: QTensor) -> None:
    """Declines groups whose scale no single segment can move."""
    if qt.row_group is not None and len(qt.segments) > 1:
        raise NotImplementedError(
            f"{qt!r}: a group of row_group may have rows of several widths, and its "
            "scale and zero cannot follow all of them; leave them as they are."
        )


def group_sum(part: QTensor, terms: Array) -> Array:
    """Sums the elements of each group; the transpose of `spread`."""
    like = jnp.zeros(part.scale.shape, jnp.float32)
    broadcast = lambda groups: jnp.broadcast_to(spread(part, groups), terms.shape)  # noqa: E731
    return jax.vjp(broadcast, like)[1](terms)[0]


def group_mean(part: QTensor, terms: Array, empty: Array) -> Array:
    """Means over groups; columns of padding, which are in none, take ``empty``."""
    count = group_sum(part, jnp.ones(terms.shape, jnp.float32))
    return jnp.where(count > 0, group_sum(part, terms) / jnp.maximum(count, 1), empty)


def codes(part: QTensor) -> UInt8[Array, "k n"]:
    """The codes of a part."""
    return tensor.segment_codes(part, 0)


def _levels(part: QTensor, w: Array) -> Array:
    """Where weights lie on the scale of the codes, or of their numbers."""
    s = spread(part, part.scale.astype(jnp.float32))
    s = jnp.where(s == 0, 1, s)
    if not part.affine.counts:
        return w / s
    centre = part.affine.centre(part.segments[0].bits)
    if part.zero is None:
        return w / s + centre
    z = spread(part, part.zero.astype(jnp.float32))
    # Rounded by itself: a compiler would otherwise merge it with what follows.
    if part.affine is Affine.ZERO:
        return rounded(w / s, jnp.float32) + z
    return rounded(w - z, jnp.float32) / s + centre


def nearest(part: QTensor, w: Array, draws: Array | None = None) -> UInt8[Array, "k n"]:
    """The codes nearest to weights, or, given draws from [0, 1), by chance."""
    level, top = _levels(part, w), 2 ** part.segments[0].bits - 1
    if not part.affine.counts:
        return _nearest_entry(*_entries(part), level, draws)
    whole = jnp.round(level) if draws is None else jnp.floor(level + draws)
    return jnp.clip(whole, 0, top).astype(jnp.uint8)


def _entries(part: QTensor) -> tuple[Array, Array]:
    """The numbers that codes may stand for, in ascending order, and their codes."""
    if part.affine is Affine.FLOAT:
        numbers = tensor.numbers(part.segments[0].bits)
        order = np.argsort(numbers, kind="stable")  # those that are none come last
        order = order[: np.isfinite(numbers).sum()]
        return jnp.asarray(numbers[order]), jnp.asarray(order)
    assert part.codebook is not None
    numbers = part.codebook.astype(jnp.float32)
    order = jnp.argsort(numbers)
    return numbers[order], order


def _nearest_entry(
    entries: Array, order: Array, level: Array, draws: Array | None
) -> Array:
    below = jnp.searchsorted(entries, level, side="right") - 1
    below = jnp.clip(below, 0, entries.size - 2)
    low, high = entries[below], entries[below + 1]
    share = jnp.where(
        high > low, (level - low) / jnp.where(high > low, high - low, 1), 0
    )
    up = share > 0.5 if draws is None else share > draws
    return order[below + up.astype(below.dtype)].astype(jnp.uint8)


def with_words(part: QTensor, q: UInt8[Array, "k n"]) -> QTensor:
    """Puts codes into the words of a segment, and leaves its padding as it is."""
    (segment,), (words,) = part.segments, part.words
    held = part.layout.unpack(words, segment.bits)
    q = held.at[: part.k, : part.n].set(q.astype(held.dtype))
    packed = part.layout.pack(q, segment.bits)
    return dataclasses.replace(part, words=(packed.astype(words.dtype),))


def with_codes(
    qt: QTensor, target: Array, keep: Array, draws: Array | None = None
) -> QTensor:
    """Takes the codes of a weight in stored order, except where they are to be kept."""
    moved = []
    rows = [target, keep] if draws is None else [target, keep, draws]
    for part, weights, kept, *drawn in parts(qt, *rows):
        q = nearest(part, weights, *drawn)
        moved.append(with_words(part, jnp.where(kept, codes(part), q)))
    return join(qt, moved)


def remainder(qt: QTensor, target: Array) -> Array:
    """What the codes leave of a weight, at most one step, in the inputs' order."""
    limits = []
    for (part,) in parts(qt):
        s = jnp.abs(spread(part, part.scale.astype(jnp.float32)))
        if not part.affine.counts:
            s = s * jnp.diff(_entries(part)[0]).max()
        limits.append(jnp.broadcast_to(s, (part.k, part.n)))
    limit = jnp.concatenate(limits)
    return in_input_order(qt, jnp.clip(target - weight(qt), -limit, limit))


# With c the codes as the map takes them and w the weights of one group, the least
# squares of w - c s are at s = sum(c w) / sum(c c); those of w - (c s + o), where the
# group has an offset of its own, at the same with c and w taken from their means, and
# o = mean(w) - s mean(c).
def refit_part(part: QTensor, w: Array) -> QTensor:
    """The scale and float zero of least squares, for the codes as they are."""
    c = _map_inputs(part)
    free = part.zero is not None and not has_integer_zero(part)
    mean_c = mean_w = jnp.zeros(part.scale.shape, jnp.float32)
    if free:
        mean_c, mean_w = group_mean(part, c, mean_c), group_mean(part, w, mean_w)
    centred = c - spread(part, mean_c)
    above = group_sum(part, centred * (w - spread(part, mean_w)))
    below = group_sum(part, centred * centred)
    # Where no scale is better than another, none is taken.
    scale = above / jnp.where(below > 0, below, 1)
    return _with_scale(part, scale, (lambda s: mean_w - s * mean_c) if free else None)


def _map_inputs(part: QTensor) -> Array:
    """What the scale multiplies, but for a float zero."""
    q = codes(part)
    if not part.affine.counts:
        return numbers_of(part, q)
    c = q.astype(jnp.float32) - part.affine.centre(part.segments[0].bits)
    zero = part.zero
    if zero is not None and has_integer_zero(part):
        return c - spread(part, zero.astype(jnp.float32))
    return c
