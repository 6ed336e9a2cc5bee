"""`QTensor`: a quantized matrix as codes, an affine map, a grouping and a layout."""

import abc
import dataclasses
import enum
import functools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Integer, UInt8


class Layout(abc.ABC):
    """Where the codes of one segment lie in machine words.

    A layout is a frozen, hashable dataclass: it is static metadata of a `QTensor`. Its
    methods are pure jnp, take one matrix (batch axes come through `jax.vmap`), and
    raise `ValueError` with the reason when the layout cannot hold what it is given.
    """

    # Number of axes that the words of one segment have.
    rank: typing.ClassVar[int] = 2

    @abc.abstractmethod
    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Array:
        """Packs codes of ``bits`` bits, ``[k, n]``, into words."""

    @abc.abstractmethod
    def unpack(self, words: Array, bits: int) -> UInt8[Array, "k n"]:
        """Unpacks the words of one segment into uint8 codes, ``[k, n]``."""

    @abc.abstractmethod
    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns the (k, n) that words of this shape hold, padding included."""


class Encoded(abc.ABC):
    """A scale or zero kept in the encoding of its file, so that writing is exact.

    Subclasses are pytrees of arrays. `qjax.prepare` replaces them by what they decode
    to.
    """

    @abc.abstractmethod
    def decode(self) -> Array:
        """Returns the plain ``[*batch, groups, n]`` array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return jax.eval_shape(type(self).decode, self).shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoded array."""
        return jax.eval_shape(type(self).decode, self).dtype


class Affine(enum.Enum):
    """How a code ``q`` becomes a number; ``s`` is the scale, ``z`` the zero."""

    ZERO = "(q - z) * s"  # GPTQ, AWQ, HQQ
    OFFSET = "q * s + z"  # FlexGen; MBWQ with z = -zeros; AWQ v2
    CENTERED = "(q - 2^(bits-1)) * s + z"  # tinygemm; EXL2 and symmetric without z
    CODEBOOK = "codebook[q] * s"  # NF4, FP4, MXFP4


class Grouping(enum.Enum):
    """Which elements share a scale."""

    ROWS = "rows"  # runs of group_size stored rows, in each column
    FLAT = "flat"  # runs of group_size elements of W.T in row-major order
    STRIDED = "strided"  # element f of that order belongs to group f % groups


class Segment(typing.NamedTuple):
    """A run of stored rows whose codes have the same width.

    Attributes:
      bits: Width of a code, 1 to 8.
      group_size: Number of rows (`Grouping.ROWS`) or elements that share a scale; the
        last group may be shorter. None: all rows of the segment share one.
      padding: Rows at the end of the segment's words that hold nothing.
    """

    bits: int
    group_size: int | None
    padding: int = 0


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QTensor:
    """A quantized matrix ``W[k, n]``, used as ``y = x @ W``.

    With ``q`` the code of stored row ``i`` and column ``j``, ``g`` the group of that
    element, and ``f`` the formula of `affine`,

        W[order[i], j] = input_scale[order[i]] * f(q[i, j], scale[g], zero[g])

    ``order`` and ``input_scale`` that are None stand for the identity and ones. Stacked
    matrices (layers, experts) have the same leading batch axes on every leaf.

    Extents are read off the leaves, never stored: `jax.vmap`, `jax.lax.scan`,
    `jax.shard_map` and `jax.pmap` hand out leaves of other sizes under the same
    metadata. Nothing is validated here, as JAX builds pytrees of tracers, structs and
    strings; `build` does it.

    Attributes:
      words: Packed codes, one array a segment, in the order of the stored rows.
      scale: ``[*batch, groups, n]`` or ``[*batch, groups, 1]`` float, or `Encoded`; the
        groups of all segments one after another.
      zero: Like ``scale``, integer or float, or None.
      order: int32 ``[*batch, k]``, the input feature of each stored row, or None.
      row_group: int32 ``[*batch, k]``, the group of each stored row (act-order), or
        None where groups are runs of rows.
      codebook: float ``[*batch, 2**bits]``, or None.
      input_scale: float ``[*batch, k]``, one factor an input feature, or None.
      layout: Where the codes lie in the words.
      segments: Width, group size and padding of each segment.
      affine: How a code becomes a number.
      grouping: Which elements share a scale.
      rounding: How many times the upstream's own arithmetic rounds to the dtype of the
        scale: 1, or 2 where it rounds the product before it adds.
      padding: Columns at the end of the words that hold nothing.
    """

    words: tuple[Array, ...]
    scale: Array | Encoded
    zero: Array | Encoded | None = None
    order: Array | None = None
    row_group: Array | None = None
    codebook: Array | None = None
    input_scale: Array | None = None
    layout: Layout = dataclasses.field(metadata={"static": True})
    segments: tuple[Segment, ...] = dataclasses.field(metadata={"static": True})
    affine: Affine = dataclasses.field(default=Affine.ZERO, metadata={"static": True})
    grouping: Grouping = dataclasses.field(
        default=Grouping.ROWS, metadata={"static": True}
    )
    rounding: int = dataclasses.field(default=1, metadata={"static": True})
    padding: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of stored rows of each segment."""
        return tuple(
            self.layout.extents(_matrix_shape(words, self.layout), segment.bits)[0]
            - segment.padding
            for words, segment in zip(self.words, self.segments, strict=True)
        )

    @property
    def k(self) -> int:
        """Number of inputs."""
        return sum(self.rows)

    @property
    def n(self) -> int:
        """Number of outputs."""
        shape = _matrix_shape(self.words[0], self.layout)
        return self.layout.extents(shape, self.segments[0].bits)[1] - self.padding

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading axes of stacked matrices, ``()`` for one matrix."""
        return self.words[0].shape[: self.words[0].ndim - self.layout.rank]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, k, n)``."""
        return (*self.batch, self.k, self.n)

    @property
    def ndim(self) -> int:
        """Number of axes, two for one matrix."""
        return len(self.batch) + 2

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the scale, which is the dtype that the weight had upstream."""
        return self.scale.dtype

    @property
    def bits(self) -> float:
        """Bits a code: the one width, or the mean over the rows of a mixed matrix."""
        widths = {segment.bits for segment in self.segments}
        if len(widths) == 1:
            return widths.pop()
        rows = zip(self.rows, self.segments, strict=True)
        return sum(count * segment.bits for count, segment in rows) / self.k

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        """Shape, bits, group size, layout, formula and bytes on one line."""
        try:
            size = "x".join(map(str, self.shape))
            bits = f"{self.bits:.4g} bits"
            last = f"{self.dtype} scale, {_readable(self.nbytes)}"
        except (AttributeError, TypeError, IndexError):
            # The leaves are not arrays: `jax.tree.map` put something else there.
            return f"QTensor({self.words!r}, scale={self.scale!r})"
        widths = [
            "column" if s.group_size is None else s.group_size for s in self.segments
        ]
        groups = "group " + ",".join(str(w) for w in dict.fromkeys(widths))
        flags = [n for n in ("order", "row_group") if getattr(self, n) is not None]
        parts = [size, bits, groups, repr(self.layout), self.affine.value, *flags, last]
        return f"QTensor({', '.join(parts)})"


def _matrix_shape(words: Array, layout: Layout) -> tuple[int, ...]:
    return words.shape[words.ndim - layout.rank :]


def _readable(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def build(
    words: Sequence[Array],
    scale: Array | Encoded,
    zero: Array | Encoded | None = None,
    *,
    layout: Layout,
    segments: Sequence[Segment],
    **fields: typing.Any,
) -> QTensor:
    """Builds a `QTensor` after checking that its leaves fit together.

    Args:
      words: One array a segment.
      scale: Float ``[*batch, groups, n or 1]``.
      zero: Like ``scale``; integers only with `Affine.ZERO`.
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
            "for each."
        )
    qt = QTensor(
        words=tuple(words),
        scale=scale,
        zero=zero,
        layout=layout,
        segments=tuple(segments),
        **fields,
    )
    for array, segment in zip(qt.words, qt.segments, strict=True):
        _, n = layout.extents(_matrix_shape(array, layout), segment.bits)
        _require("n of words", n, qt.n + qt.padding)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale.dtype={scale.dtype} must be a float dtype.")
    batch, k, n = qt.batch, qt.k, qt.n
    groups = sum(group_counts(qt)) if qt.row_group is None else scale.shape[-2]
    for name, array in (("scale", scale), ("zero", zero)):
        if array is None:
            continue
        _require(f"{name}.shape[:-1]", array.shape[:-1], (*batch, groups))
        columns = array.shape[-1]
        if columns < n and n % columns:
            raise ValueError(
                f"{name}.shape[-1]={columns} must be n={n} or a divisor of it."
            )
    if zero is not None and qt.affine is Affine.CODEBOOK:
        raise ValueError("zero must be None with a codebook.")
    is_integer = zero is not None and not jnp.issubdtype(zero.dtype, jnp.floating)
    if is_integer and qt.affine is not Affine.ZERO:
        raise ValueError(
            f"zero.dtype={zero.dtype} must be a float dtype for {qt.affine.value}."
        )
    if zero is None and qt.affine in (Affine.ZERO, Affine.OFFSET):
        raise ValueError(
            f"zero is None, but {qt.affine.value} needs it; symmetric codes are "
            "Affine.CENTERED."
        )
    for name in ("order", "row_group"):
        array = getattr(qt, name)
        if array is not None:
            _require(f"{name}.shape", array.shape, (*batch, k))
            _require(f"{name}.dtype", array.dtype, jnp.dtype(jnp.int32))
    if qt.input_scale is not None:
        _require("input_scale.shape", qt.input_scale.shape, (*batch, k))
    if (qt.codebook is None) == (qt.affine is Affine.CODEBOOK):
        raise ValueError(f"codebook and affine={qt.affine} must come together.")
    if qt.codebook is not None:
        entries = (*batch, 2 ** max(s.bits for s in qt.segments))
        _require("codebook.shape", qt.codebook.shape, entries)
    return qt


def _require(name: str, found: typing.Any, wanted: typing.Any) -> None:
    if found != wanted:
        raise ValueError(f"{name}={found} must be {wanted}.")


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


def _over_batch(function: typing.Callable, qt: QTensor) -> Array:
    for _ in qt.batch:
        function = jax.vmap(function)
    return function(qt)


@jax.jit
def codes(qt: QTensor) -> UInt8[Array, "*batch k n"]:
    """Unpacks the integer codes, in stored row order.

    Args:
      qt: A quantized tensor, stacked or not.

    Returns:
      uint8 codes ``[*batch, k, n]``; row ``i`` is input feature ``qt.order[i]``.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(32), bits=2, group_size=32)
      >>> codes(w).shape, int(codes(w).max())
      ((32, 32), 3)
    """

    def one(qt: QTensor) -> Array:
        unpacked = [
            qt.layout.unpack(words, segment.bits)[:rows, : qt.n]
            for words, segment, rows in zip(qt.words, qt.segments, qt.rows, strict=True)
        ]
        return jnp.concatenate(unpacked)

    return _over_batch(one, qt)


def dequantize(qt: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*b k n"]:
    """Computes the dense weight.

    Args:
      qt: A quantized tensor, stacked or not.
      dtype: None gives the upstream's dtype (the scale's) with the upstream's rounding,
        bit for bit. Any other dtype widens scales and zeros to float32, evaluates the
        map there, and rounds the result once to ``dtype``.

    Returns:
      ``[*batch, k, n]``, rows in the order of the input features.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> dequantize(w).shape, dequantize(w, jnp.bfloat16).dtype
      ((32, 32), dtype(bfloat16))
    """
    return _dequantize(qt, None if dtype is None else jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(qt: QTensor, dtype: jnp.dtype | None) -> Array:
    def one(qt: QTensor) -> Array:
        stored = stored_weight(qt, dtype)
        if qt.order is not None:
            # Gathering by the inverse is a copy; scattering would zero and then write.
            stored = jnp.take(stored, jnp.argsort(qt.order), axis=0)
        if qt.input_scale is not None:
            stored = stored * qt.input_scale.astype(stored.dtype)[:, None]
        return stored

    return _over_batch(one, qt)


def stored_weight(qt: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
    """The weight of one matrix in stored row order, without ``input_scale``.

    Traceable, for use inside a kernel's tile; `dequantize` is the public form.

    Args:
      qt: One matrix.
      dtype: As in `dequantize`.

    Returns:
      ``[k, n]``: row ``i`` belongs to input feature ``qt.order[i]``.
    """
    target = jnp.dtype(dtype or qt.dtype)
    # In float32 the map is evaluated as it stands: nothing is rounded after it.
    exact = target if target == qt.dtype != jnp.float32 else None
    parts = [_evaluate(part, exact) for part in split(qt)]
    return jnp.concatenate(parts).astype(target)


def split(qt: QTensor) -> list[QTensor]:
    """Cuts one matrix into its segments, each a matrix of one width.

    The parts have stored row order: ``order`` and ``input_scale`` are left to the
    caller, and encoded scales are decoded.

    Args:
      qt: One matrix.

    Returns:
      One single-segment `QTensor` a segment, from the first stored row to the last.
    """
    scale, zero = plain(qt.scale), plain(qt.zero)
    parts, row, group = [], 0, 0
    segments = zip(qt.words, qt.segments, qt.rows, group_counts(qt), strict=True)
    for words, segment, rows, groups in segments:
        if qt.row_group is None:
            row_group, held = None, slice(group, group + groups)
        else:
            row_group, held = qt.row_group[row : row + rows], slice(None)
        parts.append(
            dataclasses.replace(
                qt,
                words=(words,),
                segments=(segment,),
                scale=scale[held],
                zero=None if zero is None else zero[held],
                row_group=row_group,
                order=None,
                input_scale=None,
            )
        )
        row, group = row + rows, group + groups
    return parts


def plain(parameter: Array | Encoded | None) -> Array | None:
    """Decodes a scale or zero that is kept in its file's encoding."""
    return parameter.decode() if isinstance(parameter, Encoded) else parameter


def _columns(parameter: Array, n: int) -> Array:
    """Cuts or repeats the columns of a scale to n; one column stays one."""
    count = parameter.shape[-1]
    if count == 1 or count == n:
        return parameter
    return parameter[:, :n] if count > n else jnp.repeat(parameter, n // count, axis=1)


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
    (words,), (segment,) = part.words, part.segments
    q = part.layout.unpack(words, segment.bits)[: part.k, : part.n]
    s = spread(part, part.scale.astype(jnp.float32))
    if part.affine is Affine.CODEBOOK:
        return jnp.take(part.codebook.astype(jnp.float32), q, axis=0) * s
    centre = 2 ** (segment.bits - 1) if part.affine is Affine.CENTERED else 0
    c = (q.astype(jnp.int32) - centre).astype(jnp.float32)
    if part.zero is None:
        return c * s
    z = spread(part, part.zero.astype(jnp.float32))
    if part.affine is Affine.ZERO:
        twice = exact is not None and part.rounding == 2
        return (_rounded(c - z, exact) if twice else c - z) * s
    product = c * s  # exact: a code and a 16-bit scale have at most 24 bits together
    if exact is None:
        return product + z
    if part.rounding == 2:
        return _rounded(product, exact) + z
    return _add_to_odd(product, z)


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    # The barrier keeps XLA from removing the pair of conversions as excess precision.
    return lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


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


def relayout(qt: QTensor, layout: Layout) -> QTensor:
    """Moves the codes into another layout; scales, zeros and order stay as they are.

    Lossless: the codes are unpacked and packed, never requantized.

    Args:
      qt: A quantized tensor, stacked or not.
      layout: The layout to move to.

    Returns:
      A tensor with the same codes and the same weight.

    Raises:
      ValueError: If ``layout`` cannot hold the codes, with the reason.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> planar = relayout(w, qjax.formats.gptq.Planar())
      >>> bool((codes(planar) == codes(w)).all())
      True
    """
    if layout == qt.layout:
        return qt
    return _relayout(qt, layout)


@functools.partial(jax.jit, static_argnums=1)
def _relayout(qt: QTensor, layout: Layout) -> QTensor:
    words, segments = [], []
    for old, segment, rows in zip(qt.words, qt.segments, qt.rows, strict=True):

        def move(old: Array, segment: Segment = segment, rows: int = rows) -> Array:
            q = qt.layout.unpack(old, segment.bits)[:rows, : qt.n]
            return layout.pack(q, segment.bits)

        for _ in qt.batch:
            move = jax.vmap(move)
        new = move(old)
        padded, columns = layout.extents(_matrix_shape(new, layout), segment.bits)
        words.append(new)
        segments.append(segment._replace(padding=padded - rows))
    return dataclasses.replace(
        qt,
        words=tuple(words),
        segments=tuple(segments),
        layout=layout,
        padding=columns - qt.n,
    )
