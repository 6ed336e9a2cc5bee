"""From words to codes to numbers, and from one layout to another."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from qjax.tensor import (
    Affine,
    Grouping,
    InSteps,
    Layout,
    QTensor,
    columns,
    matrix_shape,
    over_batch,
    plain,
    segment_codes,
    split,
    widen,
)

# Patterns of float32: all but the sign, and one step of the exponent.
_SIZE, _ONE = 2**31 - 1, 2**23


def dequantize(
    qt: QTensor,
    dtype: DTypeLike | None = None,
    *,
    stored: Callable[[QTensor, DTypeLike | None], Array] | None = None,
) -> Float[Array, "*b k n"]:
    """Computes the dense weight in jnp, on any device.

    Args:
      qt: As in `qjax.dequantize`.
      dtype: As in `qjax.dequantize`.
      stored: What computes the weight of one matrix; None takes `stored_weight`.

    Returns:
      ``[*batch, k, n]``, rows in the order of the input features.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> dequantize(w).shape, dequantize(w, jnp.bfloat16).dtype
      ((32, 32), dtype(bfloat16))
    """
    # float64 is float32, unless JAX has been told otherwise, as everywhere in JAX.
    dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    return _dequantize(qt, dtype, stored or stored_weight)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantize(
    qt: QTensor, dtype: jnp.dtype | None, stored_weight: Callable[..., Array]
) -> Array:
    def one(qt: QTensor) -> Array:
        # Another dtype is rounded to once, after the input scale.
        other = None if dtype == qt.dtype else dtype
        wide = other is not None and qt.input_scale is not None
        stored = stored_weight(qt, jnp.float32 if wide else other)
        if qt.order is not None:
            # Gathering by the inverse is a copy; scattering would zero and then write.
            stored = jnp.take(stored, jnp.argsort(plain(qt.order)), axis=0)
        if qt.input_scale is not None:
            stored = stored * qt.input_scale.astype(stored.dtype)[:, None]
        return stored if dtype is None else stored.astype(dtype)

    return over_batch(one, qt)


def stored_weight(qt: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
    """The weight of one matrix in stored row order, without ``input_scale``.

    Traceable, for use inside a kernel's tile; `dequantize` is the public form.

    Args:
      qt: One matrix.
      dtype: None gives the upstream's dtype with the upstream's rounding. Any dtype,
        also that one, evaluates the map in float32 and rounds the result to it: what
        kernels want, as nothing then stands between the operations.

    Returns:
      ``[k, n]``: row ``i`` belongs to input feature ``qt.order[i]``.
    """
    if dtype is None and isinstance(qt.scale, InSteps):
        first = stored_weight(dataclasses.replace(qt, scale=qt.scale.first))
        return rounded(first, jnp.float32) * jnp.float32(qt.scale.last)
    exact = qt.dtype if dtype is None else None
    parts = [_evaluate(part, exact) for part in split(qt)]
    return jnp.concatenate(parts).astype(dtype or qt.dtype)


def _columns(parameter: Array, n: int) -> Array:
    """`tensor.columns`, but one column stays one."""
    return parameter if parameter.shape[-1] == 1 else columns(parameter, n)


def spread(part: QTensor, parameter: Array) -> Array:
    """Gives every stored row its group's value of a scale or zero.

    Args:
      part: A matrix of one segment.
      parameter: Its scale or zero.

    Returns:
      ``[k, n]``, or ``[k, 1]`` where all columns share one value.
    """
    (segment,), k, n = part.segments, part.k, part.n
    size = segment.group_size
    if part.row_group is not None:
        return jnp.take(_columns(parameter, n), part.row_group, axis=0)
    if part.grouping is Grouping.ROWS:
        repeats = k if size is None else size
        return jnp.repeat(_columns(parameter, n), repeats, axis=0)[:k]
    flat, count = parameter.reshape(-1), k * n
    if part.grouping is Grouping.FLAT:
        flat = jnp.repeat(flat, count if size is None else size)[:count]
    else:
        flat = jnp.tile(flat, -(-count // flat.size))[:count]
    return flat.reshape(n, k).T


def _evaluate(part: QTensor, exact: jnp.dtype | None) -> Array:
    """The affine map of one segment, in float32.

    Where ``exact`` is a dtype, rounding the result to it once more gives what the
    upstream's arithmetic in that dtype gives.
    """
    q = segment_codes(part, 0)
    s = spread(part, part.scale.astype(jnp.float32))
    if not part.affine.counts:
        numbers = numbers_of(part, q)
        return numbers * s if exact is None else _times(numbers, s)
    centre = part.affine.centre(part.segments[0].bits)
    c = (q.astype(jnp.int32) - centre).astype(jnp.float32)
    if part.zero is None:
        return c * s
    z = spread(part, part.zero.astype(jnp.float32))
    return affine_map(c, s, z, part.affine, part.rounding, exact)


def numbers_of(part: QTensor, q: Array) -> Float[Array, "k n"]:
    """What codes of a codebook, or of small floats, stand for, in float32."""
    if part.affine is Affine.FLOAT:
        return widen(q, part.segments[0].bits)
    assert part.codebook is not None
    return jnp.take(part.codebook.astype(jnp.float32), q, axis=0)


def affine_map(
    c: Array,
    s: Array,
    z: Array,
    affine: Affine,
    rounding: int,
    exact: jnp.dtype | None,
    convert: Callable[[Array, DTypeLike], Array] | None = None,
) -> Array:
    """Evaluates an affine map in float32, at any array of codes.

    Args:
      c: Codes as float32, less the middle one of `Affine.CENTERED`.
      s: Their scales in float32.
      z: Their zeros in float32.
      affine: The map: any with a zero.
      rounding: As in `QTensor`.
      exact: Where it is a dtype, rounding the result to it once more gives what the
        upstream's arithmetic in that dtype gives.
      convert: How to round to a dtype and widen again; None takes `rounded`.

    Returns:
      float32 numbers.
    """
    convert = convert or rounded
    if affine is Affine.ZERO:
        if exact is not None and rounding == 2:
            return convert(c - z, exact) * s
        return (c - z) * s
    product = c * s  # exact for 16-bit scales: with a code they have at most 24 bits
    if exact is not None and rounding == 2:
        return convert(product, exact) + z
    if exact is None or exact == jnp.float32:
        return product + z
    return _add_to_odd(product, z)


def rounded(x: Float[Array, "*any"], dtype: DTypeLike) -> Float[Array, "*any"]:
    """Rounds float32 numbers to another dtype, and widens them again.

    A compiler cannot leave that rounding out, as it may with a pair of conversions (for
    excess precision) or a product and a sum (as one operation with one rounding).

    Args:
      x: float32 numbers.
      dtype: The dtype to round to; float32 only fixes what ``x`` is.

    Returns:
      float32 numbers that ``dtype`` can hold.

    Example:
      >>> rounded(jnp.float32([1 / 3]), jnp.float16).tolist()
      [0.333251953125]
    """
    # The barrier keeps the conversions, but not the product and the sum apart; the
    # choice, which changes nothing, does.
    held = lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)
    return jnp.where(jnp.isnan(held), jnp.nan, held)


@jax.custom_jvp
def _times(a: Array, b: Array) -> Array:
    """``a * b`` in float32, also where ``b`` or the product is subnormal.

    XLA on a CPU takes subnormal numbers for 0. Where ``b`` is tiny, the product is
    taken 2**100 times too large, and its exponent is put right in its bits; what falls
    off the end of a subnormal product is cut off (nothing, if ``b`` is a power of two).
    """
    pattern = lax.bitcast_convert_type(b, jnp.int32)
    size = pattern & _SIZE
    raised = lax.bitcast_convert_type(pattern + 100 * _ONE, jnp.float32)
    subnormal = size.astype(jnp.float32) * jnp.float32(2.0**-49)
    subnormal = jnp.where(pattern < 0, -subnormal, subnormal)  # of -0.0, too
    product = a * jnp.where(size < _ONE, subnormal, raised)
    pattern = lax.bitcast_convert_type(product, jnp.int32)
    size = pattern & _SIZE
    below = 1 - (size // _ONE - 100)  # places under the last of the normal numbers
    shifted = ((size % _ONE) | _ONE) >> jnp.clip(below, 0, 31)
    size = jnp.where(below > 0, shifted, size - 100 * _ONE)
    lowered = lax.bitcast_convert_type(size | (pattern & ~_SIZE), jnp.float32)
    return jnp.where(jnp.abs(b) < 2.0**-64, lowered, a * b)


_times.defjvps(lambda da, _, a, b: da * b, lambda db, _, a, b: a * db)


def _add_to_odd(a: Array, b: Array) -> Array:
    """``a + b`` in float32 rounded to odd, so that rounding it again is rounding once.

    Two roundings to nearest can differ from one where the first lands on a tie of the
    second. If the sum is inexact and its last bit is even, its odd neighbour on the
    side of the error is taken instead; that never is a tie of a shorter format.
    """
    total = a + b
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)  # a + b == total + error, exactly
    pattern = lax.bitcast_convert_type(total, jnp.int32)
    outwards = (error > 0) == (total > 0)
    odd = pattern + jnp.where(outwards, 1, -1)
    take = (error != 0) & (pattern & 1 == 0) & jnp.isfinite(total)
    moved = lax.bitcast_convert_type(jnp.where(take, odd, pattern), jnp.float32)
    # The step of one unit in the last place is exact, and no gradient flows through it.
    return total + lax.stop_gradient(moved - total)


def relayout(
    qt: QTensor, layout: Layout, *, move: Callable[..., Array] | None = None
) -> QTensor:
    """Moves the codes into another layout in jnp, on any device.

    Args:
      qt: As in `qjax.relayout`.
      layout: As in `qjax.relayout`.
      move: What moves the words of one segment of one matrix; None takes `move_words`.

    Returns:
      A tensor with the same codes and the same weight.

    Raises:
      ValueError: If ``layout`` cannot hold the codes, with the reason.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> relayout(w, qjax.formats.gptq.Planar()).layout
      Planar()
    """
    if layout == qt.layout:
        return qt
    return _relayout(qt, layout, move or move_words)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _relayout(qt: QTensor, layout: Layout, move: Callable[..., Array]) -> QTensor:
    def words_of(i: int) -> Callable[[QTensor], Array]:
        bits, shape = qt.segments[i].bits, (qt.rows[i], qt.n)
        return lambda one: move(one.words[i], qt.layout, layout, bits, shape)

    words, segments, padding = [], [], 0
    for i, (segment, rows) in enumerate(zip(qt.segments, qt.rows, strict=True)):
        moved = over_batch(words_of(i), qt)
        padded, columns = layout.extents(matrix_shape(moved, layout), segment.bits)
        words.append(moved)
        segments.append(segment._replace(padding=padded - rows))
        padding = columns - qt.n
    return dataclasses.replace(
        qt,
        words=tuple(words),
        segments=tuple(segments),
        layout=layout,
        padding=padding,
    )


def move_words(
    words: Array, source: Layout, target: Layout, bits: int, shape: tuple[int, int]
) -> Array:
    """Packs the codes of one segment of one matrix into another layout.

    Args:
      words: Words in ``source``.
      source: Their layout.
      target: Another.
      bits: Width of a code.
      shape: Rows and columns, without the padding in ``words``.

    Returns:
      What ``target`` packs the codes into.
    """
    rows, columns = shape
    return target.pack(source.unpack(words, bits)[:rows, :columns], bits)
