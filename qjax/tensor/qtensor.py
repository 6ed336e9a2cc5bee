"""`QTensor`, its codes, and what is read off its words."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, UInt8

from qjax.meshes import automatically
from qjax.tensor.parts import Affine, Grouping, Layout, Segment


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
      scale: ``[*batch, groups, n]`` float, or `Encoded`; the groups of all segments one
        after another. Of fewer columns, a divisor of n, each serves a run of columns;
        those of padding may be there, too.
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
      weight_dtype: Name of the dtype that the weight had upstream, or None where it is
        that of the scale.
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
    weight_dtype: str | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

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
        """Dtype that the weight had upstream, in most formats that of the scale."""
        return jnp.dtype(self.weight_dtype or self.scale.dtype)

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
            dtype = "no" if self.scale is None else self.scale.dtype
            rounded = self.scale is not None and self.dtype != dtype
            weight = f", {self.dtype} weight" if rounded else ""
            last = f"{dtype} scale{weight}, {readable(self.nbytes)}"
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


def check_packed(w: Any, name: str = "w") -> None:
    """Checks that a weight is packed, before its parts are asked for.

    Args:
      w: The weight.
      name: What the caller calls it, for errors.

    Raises:
      TypeError: If it is anything but a `QTensor`.
      ValueError: If its words are those of another layout than its own.
    """
    if not isinstance(w, QTensor):
        what = f"{type(w).__name__} of shape {getattr(w, 'shape', None)}"
        raise TypeError(
            f"{name} is {what}, and must be a QTensor; qjax.quantize makes one of a "
            "dense array, and get_value() takes one out of a Variable."
        )
    for i, (words, segment) in enumerate(zip(w.words, w.segments, strict=False)):
        if not (hasattr(words, "shape") and hasattr(words, "dtype")):
            continue  # JAX puts anything there.
        shape = matrix_shape(words, w.layout)
        if reason := misfit(w.layout, segment.bits, shape, words.dtype):
            raise ValueError(
                f"{name}.words[{i}] is {words.dtype}{list(words.shape)}, which are no "
                f"words of {w.layout!r}: {reason} They are those of another layout, as "
                "of a model that was prepared on another kind of device. Restore its "
                "arrays into a model that was prepared likewise, or move its weights "
                "as QTensors: by qjax.flatten and qjax.unflatten, layers.nnx.load or "
                "layers.linen.to_variables."
            )


def misfit(
    layout: Layout, bits: int, shape: tuple[int, ...], dtype: DTypeLike
) -> str | None:
    """Says why a layout cannot unpack one matrix's words of a shape and dtype."""
    known = all(type(size) is int for size in shape)  # and no symbol
    return (_misfit if known else _misfit.__wrapped__)(
        layout, bits, shape, jnp.dtype(dtype)
    )


# A checkpoint has thousands of matrices of a few shapes.
@functools.lru_cache(maxsize=4096)
def _misfit(
    layout: Layout, bits: int, shape: tuple[int, ...], dtype: jnp.dtype
) -> str | None:
    try:
        jax.eval_shape(
            functools.partial(layout.unpack, bits=bits),
            jax.ShapeDtypeStruct(shape, dtype),
        )
    except ValueError as error:
        return str(error)
    return None


def check_array(x: Any, name: str) -> None:
    """Checks that an argument has a shape and a dtype, before they are asked for.

    Args:
      x: The argument.
      name: What the caller calls it, for errors.

    Raises:
      TypeError: If it is a list, say, or None.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"{name} is {type(x).__name__}, and must be an array; jnp.asarray makes "
            "one of numbers."
        )


def codes(qt: QTensor) -> UInt8[Array, "*batch k n"]:
    """Unpacks the integer codes, in stored row order.

    Args:
      qt: A quantized tensor, stacked or not.

    Returns:
      uint8 codes ``[*batch, k, n]``; row ``i`` is input feature ``qt.order[i]``.

    Raises:
      TypeError: If ``qt`` is no `QTensor`.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=2, group_size=32)
      >>> codes(w).shape, int(codes(w).max())
      ((32, 32), 3)
    """
    check_packed(qt, "qt")
    return _codes(qt)


@jax.jit
def _codes(qt: QTensor) -> Array:
    def one(qt: QTensor) -> Array:
        return jnp.concatenate([segment_codes(qt, i) for i in range(len(qt.words))])

    # Not all that a layout does has a type where pieces are a part of it.
    cut = _cut_codes(qt)
    return automatically(functools.partial(over_batch, one), qt, specs=lambda _: cut)


def _cut_codes(qt: QTensor) -> PartitionSpec:
    """How the codes are cut where the words are, as far as their type says it."""
    count = len(qt.batch)
    spec = tuple(jax.typeof(qt.words[0]).sharding.spec)
    batch, of_matrix = spec[:count], spec[count:]
    cut = qt.layout.cut(qt.segments[0].bits)
    if cut is None or qt.padding or any(segment.padding for segment in qt.segments):
        return PartitionSpec(*batch, None, None)
    # A device has rows of every segment, which do not follow each other.
    rows = of_matrix[cut.k_axis] if len(qt.words) == 1 else None
    return PartitionSpec(*batch, rows, of_matrix[cut.n_axis])


def segment_codes(qt: QTensor, segment: int) -> UInt8[Array, "rows n"]:
    """Codes of one segment of one matrix, without padding."""
    words, bits = qt.words[segment], qt.segments[segment].bits
    return qt.layout.unpack(words, bits)[: qt.rows[segment], : qt.n]


def over_batch(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Calls a function of matrices, packed or not, on each of stacked ones."""
    for _ in first.shape[:-2]:
        function = jax.vmap(function)
    return function(first, *others)


def readable(nbytes: int | float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"
