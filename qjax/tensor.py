"""`QTensor`: a quantized matrix as codes, an affine map, a grouping and a layout."""

import abc
import dataclasses
import enum
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Integer, UInt8

from qjax.bits import block


class Cut(typing.NamedTuple):
    """Where words may be cut without unpacking them.

    Attributes:
      k_axis: Axis of one matrix's words that runs along k.
      rows: Rows of the least piece along it.
      n_axis: Axis that runs along n.
      columns: Columns of the least piece along it.
    """

    k_axis: int
    rows: int
    n_axis: int
    columns: int


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

    def cut(self, bits: int) -> Cut | None:
        """Returns where words may be cut; None: nowhere."""
        return None


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
        """Dtype that the weight had upstream, to which `qjax.dequantize` rounds.

        That of the decoded array, unless a subclass knows better: the scales of
        bitsandbytes decode to float32, whatever the weight was.
        """
        return jax.eval_shape(type(self).decode, self).dtype


class Affine(enum.Enum):
    """How a code ``q`` becomes a number; ``s`` is the scale, ``z`` the zero."""

    ZERO = "(q - z) * s"  # GPTQ, AWQ, HQQ
    OFFSET = "q * s + z"  # FlexGen; MBWQ with z = -zeros; AWQ v2
    CENTERED = "(q - 2^(bits-1)) * s + z"  # tinygemm; EXL2 and symmetric without z
    CODEBOOK = "codebook[q] * s"  # NF4, FP4, MXFP4

    def centre(self, bits: int) -> int:
        """Returns the code that the formula takes off: the middle one, or 0."""
        return 2 ** (bits - 1) if self is Affine.CENTERED else 0


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

    `jax.device_put` moves a tensor, to one device or spread over a mesh, and it stays
    packed. Indexing and `numpy` unpack the codes; nothing turns it into numbers by the
    way, as `qjax.dequantize` does: ``numpy.asarray`` and `astype` refuse.

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
    scale: Array  # or Encoded
    zero: Array | None = None  # or Encoded
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
            self.layout.extents(matrix_shape(words, self.layout), segment.bits)[0]
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
        shape = matrix_shape(self.words[0], self.layout)
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
    def bits(self) -> int | float:
        """Bits a code: the one width, or the mean over the rows of a mixed matrix."""
        widths = {segment.bits for segment in self.segments}
        if len(widths) == 1:
            return widths.pop()
        rows = zip(self.rows, self.segments, strict=True)
        return sum(count * segment.bits for count, segment in rows) / self.k

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, which may be abstract."""
        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self)
        )

    def numpy(self) -> np.ndarray:
        """Unpacks the codes into host memory.

        Returns:
          uint8 ``[*batch, k, n]``, as `qjax.codes` gives them: row ``i`` is input
          feature ``order[i]``.

        Example:
          >>> w = qjax.quantize(jnp.eye(32), bits=2, group_size=32)
          >>> w.numpy().shape, w.numpy().dtype
          ((32, 32), dtype('uint8'))
        """
        return np.asarray(codes(self))

    def __getitem__(self, index: Any) -> Array:
        """Unpacks the codes, and indexes them as `jax.numpy` does: uint8.

        Raises:
          ValueError: If ``index`` is a bare ``...``, by which Flax reads a Variable:
            code that does wants the weight.
        """
        if index is Ellipsis:
            raise ValueError(
                "w[...] of a QTensor could mean the weight or the codes; "
                "qjax.dequantize(w) gives the weight, and qjax.codes(w) the codes."
            )
        return codes(self)[index]

    # Otherwise Python would count indices up until one is refused, and none is.
    __iter__ = None

    def astype(self, dtype: DTypeLike) -> "QTensor":
        """Returns the tensor itself; there is no cast to another dtype.

        Args:
          dtype: The dtype that the tensor has.

        Raises:
          ValueError: If ``dtype`` is another one.
        """
        if jnp.dtype(dtype) == self.dtype:
            return self
        raise ValueError(
            f"dtype={jnp.dtype(dtype)}: a QTensor of {self.dtype} is packed and not "
            "cast; qjax.dequantize(w, dtype) gives the weight in any dtype, and "
            "qjax.codes(w) the codes in uint8."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Refuses, with a ValueError: codes and weight could both be meant."""
        raise ValueError(
            "A QTensor is no array: qjax.dequantize(w) gives the weight, and "
            "qjax.codes(w) or w.numpy() the codes."
        )

    def __repr__(self) -> str:
        """Shape, bits, group size, layout, formula and bytes on one line."""
        try:
            size = "x".join(map(str, self.shape))
            bits = f"{self.bits:.4g} bits"
            dtype = "no" if self.scale is None else self.dtype
            last = f"{dtype} scale, {readable(self.nbytes)}"
        except (AttributeError, TypeError, IndexError, ZeroDivisionError):
            # `jax.tree.map` put something else than arrays there.
            return f"QTensor({self.words!r}, scale={self.scale!r})"
        widths = [
            "column" if s.group_size is None else s.group_size for s in self.segments
        ]
        groups = "group " + ",".join(str(w) for w in dict.fromkeys(widths))
        flags = [n for n in ("order", "row_group") if getattr(self, n) is not None]
        parts = [size, bits, groups, repr(self.layout), self.affine.value, *flags, last]
        return f"QTensor({', '.join(parts)})"


def matrix_shape(words: Any, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of one matrix's words, without the batch axes."""
    return words.shape[words.ndim - layout.rank :]


@jax.jit
def codes(qt: QTensor) -> UInt8[Array, "*batch k n"]:
    """Unpacks the integer codes, in stored row order.

    Args:
      qt: A quantized tensor, stacked or not.

    Returns:
      uint8 codes ``[*batch, k, n]``; row ``i`` is input feature ``qt.order[i]``.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=2, group_size=32)
      >>> codes(w).shape, int(codes(w).max())
      ((32, 32), 3)
    """

    def one(qt: QTensor) -> Array:
        return jnp.concatenate([segment_codes(qt, i) for i in range(len(qt.words))])

    return over_batch(one, qt)


def segment_codes(qt: QTensor, segment: int) -> UInt8[Array, "rows n"]:
    """Codes of one segment of one matrix, without padding."""
    words, bits = qt.words[segment], qt.segments[segment].bits
    return qt.layout.unpack(words, bits)[: qt.rows[segment], : qt.n]


def over_batch(function: Callable[[QTensor], Array], qt: QTensor) -> Array:
    """Calls a function of one matrix on each of stacked ones."""
    for _ in qt.batch:
        function = jax.vmap(function)
    return function(qt)


def readable(nbytes: int | float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


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
      scale: Float ``[*batch, groups, n or 1]``, or `Encoded`.
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
    for array, segment in zip(qt.words, qt.segments, strict=True):
        block(segment.bits)  # refuses other widths
        if segment.group_size is not None and segment.group_size < 1:
            raise ValueError(f"{segment}: group_size must be positive or None.")
        shape = matrix_shape(array, qt.layout)
        _, n = qt.layout.extents(shape, segment.bits)
        _require("n of words", n, qt.n + qt.padding)
        _require("batch of words", array.shape[: array.ndim - qt.layout.rank], qt.batch)
        # The layout refuses words that it cannot unpack.
        matrix = jax.ShapeDtypeStruct(shape, array.dtype)
        jax.eval_shape(functools.partial(qt.layout.unpack, bits=segment.bits), matrix)
    if qt.rounding not in (1, 2):
        raise ValueError(f"rounding={qt.rounding} must be 1 or 2.")


def _check_parameters(qt: QTensor) -> None:
    """Checks scale and zero, and that the affine map has what it needs."""
    if qt.zero is not None and qt.affine is Affine.CODEBOOK:
        raise ValueError("zero must be None with a codebook.")
    if len(qt.scale.shape) < 2:
        raise ValueError(f"scale.shape={qt.scale.shape} must be [*batch, groups, n].")
    groups = sum(group_counts(qt)) if qt.row_group is None else qt.scale.shape[-2]
    for name, array in (("scale", qt.scale), ("zero", qt.zero)):
        if array is None:
            continue
        _require(f"{name}.shape[:-1]", array.shape[:-1], (*qt.batch, groups))
        columns = array.shape[-1]
        if columns < qt.n and (columns == 0 or qt.n % columns):
            raise ValueError(
                f"{name}.shape[-1]={columns} must be n={qt.n} or a divisor of it."
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


def split(qt: QTensor) -> list[QTensor]:
    """Cuts a matrix into its segments, each a matrix of one width.

    The parts have stored row order: ``order`` and ``input_scale`` are left to the
    caller, and encoded scales are decoded.

    Args:
      qt: A matrix, or a stack of them.

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
            row_group, held = qt.row_group[..., row : row + rows], slice(None)
        parts.append(
            dataclasses.replace(
                qt,
                words=(words,),
                segments=(segment,),
                scale=scale[..., held, :],
                zero=None if zero is None else zero[..., held, :],
                row_group=row_group,
                order=None,
                input_scale=None,
            )
        )
        row, group = row + rows, group + groups
    return parts


@typing.overload
def plain(parameter: Array | Encoded) -> Array: ...
@typing.overload
def plain(parameter: Array | Encoded | None) -> Array | None: ...
def plain(parameter: Array | Encoded | None) -> Array | None:
    """Decodes a scale or zero that is kept in its file's encoding."""
    return parameter.decode() if isinstance(parameter, Encoded) else parameter
