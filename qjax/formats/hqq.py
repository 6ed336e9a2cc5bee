"""HQQ: codes in slabs of the grouped matrix, the first slab in the highest bits.

The torch weight ``[n, k]`` is flattened and viewed as ``[R, C]``: one group a row
(axis 1, ``C = group_size``) or one group a column (axis 0, ``R = group_size``). The
rows are cut into slabs of ``D``, and a word holds one row of each. Four bits:

    bit 7             bit 0
    | v[d, c] | v[D+d, c] |          v the view, D = R/2

Two bits make four slabs of ``R/4``, one bit eight; 5, 6 and 8 bits take a byte each.
Three bits have ten slabs in an int32, of which the two highest bits are not used:

    bit 31                                                                  bit 0
    | 00 | v[d, c] | v[D+d, c] | v[2D+d, c] | ... | v[8D+d, c] | v[9D+d, c] |

with rows of zeros after the last one up to ``10 D``. The weight is ``(q - z) * s`` with
a float ``z`` in units of codes; the difference and then the product are rounded to the
dtype of ``s``.

Source: mobiusml/hqq, hqq/core/bitpack.py and hqq/core/quantize.py, commit
e0b1d00e095653359da9de1d7dbb35a994aa6b96.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Integer, UInt8

from qjax import decode, tensor
from qjax.bits import transpose_codes
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_positive,
    check_shapes,
    check_tensors,
    check_width,
    check_words,
)
from qjax.formats.gathering import of_whole
from qjax.formats.hqq_config import FIELDS, Config, metadata, tag_of
from qjax.tensor import Affine, Grouping, Layout, QTensor, Segment

__all__ = ["TENSORS", "Config", "Slabs", "check", "config_of", "from_tensors"]
__all__ += ["pack_slabs", "tag_of", "to_tensors", "unpack_slabs"]


@dataclasses.dataclass(frozen=True)
class Slabs(Layout):
    """Slabs of the grouped view: words ``[D, C]``, uint8, or uint32 for three bits.

    Attributes:
      k: Number of inputs; n follows from the words.
      group_size: Extent of the view along ``axis``.
      axis: 1 for a view ``[n * k / group_size, group_size]``, 0 for its transpose's
        shape ``[group_size, n * k / group_size]``.
    """

    k: int
    group_size: int
    axis: int = 1

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Array:
        """Packs ``[k, n]`` codes; whole groups must fill whole words."""
        check_codes(codes)
        # Only axis 1 cuts slabs between groups, and three bits are filled up.
        groups = _fields(bits) if self.axis and bits != 3 else 1
        if codes.shape[0] != self.k or codes.size % (groups * self.group_size):
            raise ValueError(
                f"codes.shape={codes.shape} must be [k={self.k}, n] with k * n a "
                f"multiple of {groups} times group_size={self.group_size}."
            )
        view = (-1, self.group_size) if self.axis else (self.group_size, -1)
        return pack_slabs(transpose_codes(codes).reshape(view), bits)

    def unpack(self, words: Integer[Array, "d c"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks ``[D, C]`` words; n counts what fills up three-bit words."""
        codes = unpack_slabs(words, bits)
        k, n = self.extents(words.shape, bits)
        return transpose_codes(codes.reshape(-1)[: k * n].reshape(n, k))

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns k, and n with the columns that fill up three-bit words."""
        fields = _fields(bits)
        wanted = (-(-self.group_size // fields), shape[1])
        wanted = (shape[0], self.group_size) if self.axis else wanted
        rows = shape[0] * fields
        if shape != wanted or (not self.axis and bits != 3 and rows != self.group_size):
            raise ValueError(
                f"words.shape={shape} must be {list(wanted)} for {fields} codes a word "
                f"and group_size={self.group_size} on axis {self.axis}."
            )
        rows = rows if self.axis else self.group_size
        return self.k, rows * shape[1] // self.k


def _fields(bits: int) -> int:
    check_width(bits, FIELDS, "HQQ")
    return FIELDS[bits]


def _containers(bits: int) -> tuple[DTypeLike, ...]:
    """What words may be, and last what they are made as."""
    return (jnp.int32, jnp.uint32) if bits == 3 else (jnp.uint8,)


@functools.partial(jax.jit, static_argnames="bits")
def pack_slabs(view: Integer[Array, "r c"], bits: int) -> Integer[Array, "d c"]:
    """Packs a grouped matrix along its rows.

    Args:
      view: Codes ``[R, C]``; bits above a code's width are cut off.
      bits: 1, 2, 3, 4, 5, 6 or 8.

    Returns:
      Words ``[D, C]``, uint8; for three bits uint32, with zeros after the last row.

    Raises:
      ValueError: If the width is another, or (not for three bits) R does not fill whole
        words: the original loses or repeats rows there.

    Example:
      >>> pack_slabs(jnp.array([[1], [2]]), 4)
      Array([[18]], dtype=uint8)
    """
    fields, (rows, columns) = _fields(bits), view.shape
    if bits == 3:
        view = jnp.pad(view, ((0, -rows % fields), (0, 0)))
    elif rows % fields:
        raise ValueError(
            f"view.shape[0]={rows} must be a multiple of {fields}, the {bits}-bit "
            "codes of a word; choose another group_size."
        )
    container = _containers(bits)[-1]
    slabs = (view.astype(container) & (2**bits - 1)).reshape(fields, -1, columns)
    shifted = [slab << bits * (fields - 1 - i) for i, slab in enumerate(slabs)]
    return functools.reduce(operator.or_, shifted)


@functools.partial(jax.jit, static_argnames="bits")
def unpack_slabs(words: Integer[Array, "d c"], bits: int) -> UInt8[Array, "r c"]:
    """Unpacks a grouped matrix, the rows that fill up three-bit words included.

    Args:
      words: ``[D, C]``, uint8; int32 or uint32 for three bits.
      bits: 1, 2, 3, 4, 5, 6 or 8.

    Returns:
      Codes ``[D * fields, C]``.

    Raises:
      ValueError: If the width or the dtype is another.
    """
    fields = _fields(bits)
    check_words(words, 2, *_containers(bits))
    unsigned = jax.lax.bitcast_convert_type(words, _containers(bits)[-1])
    shifts = jnp.arange(fields - 1, -1, -1, dtype=unsigned.dtype) * bits
    slabs = (unsigned[None] >> shifts[:, None, None]) & (2**bits - 1)
    return slabs.astype(jnp.uint8).reshape(-1, words.shape[1])


TENSORS = ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing")
TENSORS += ("unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero")
TENSORS += ("compute_dtype", "channel_wise", "optimize", "round_zero", "offload_meta")
TENSORS += ("stores_quant_config", "encoded_state_dict")


def _expected(config: Config) -> dict[str, Expected]:
    """What a layer cannot be read without, and what only repeats the configuration."""
    floats = Expected((), 2, like="scale")
    expected = {
        "scale": Expected(FLOATS, 2),
        "zero": floats,
        "W_q": floats if config.view_as_float else Expected((_container(config),), 2),
    }
    # Their dtypes and axes do not depend on the dtype and the shape of the weight.
    for name, array in metadata(config, jnp.float32, (1, 1)).items():
        optional = name != "shape"
        expected[name] = Expected((array.dtype,), array.ndim, optional=optional)
    return expected


def _container(config: Config) -> DTypeLike:
    return jnp.int32 if config.bits == 3 else jnp.uint8


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``W_q`` ``[D, C]`` uint8 (int32 for three bits; with view_as_float the same
        bytes as floats), ``scale`` and ``zero`` float ``[R, 1]`` for axis 1 and
        ``[1, C]`` for axis 0, ``shape`` int64 ``[2]``, and optionally the other names
        of `TENSORS`.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    check_choice("axis", config.axis, (0, 1))
    if config.group_size is not None:
        check_positive("group_size", config.group_size)
    bits, container = config.bits, jnp.dtype(_container(config))
    name = f"HQQ with group_size={config.group_size}"
    check_tensors(tensors, _expected(config), name)
    scale, words = tensors["scale"], tensors["W_q"]
    said = metadata(config, scale.dtype, (1, 1))
    shapes = {name: array.shape for name, array in said.items()}
    check_shapes(tensors, shapes, "the configuration")
    if 0 in words.shape:
        raise ValueError(f"W_q.shape={tuple(words.shape)} must not be empty.")
    rows, columns = words.shape[0], words.shape[1] * words.dtype.itemsize
    columns //= container.itemsize
    if config.axis == 1 and bits == 3:
        # Only the scales tell how many of the last ten rows are there.
        held = scale.shape[0] if -(-scale.shape[0] // 10) == rows else rows * 10
    else:
        held = rows * FIELDS[bits]
    wanted = (held, 1) if config.axis == 1 else (1, columns)
    source = f"W_q.shape={tuple(words.shape)}"
    check_shapes(tensors, {"scale": wanted, "zero": wanted}, source)
    if config.group_size is not None and config.axis == 1:
        _same("columns of W_q", columns, config.group_size)
    elif config.group_size is not None:
        _same("rows of W_q", rows, -(-config.group_size // FIELDS[bits]))


def _same(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{name}={found} must be {wanted}.")


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout. Its grouping is `Grouping.ROWS` on axis 1
      with a ``group_size`` that divides k, which is multiplied without forming the
      weight; else FLAT (axis 1) or STRIDED (axis 0).

    Raises:
      ValueError: As `check`; or if metadata contradict ``config``, extents do not fit,
        a scale or zero is not finite, or a code is too wide.
    """
    check(tensors, config)
    n, k = (int(extent) for extent in np.asarray(tensors["shape"]))
    scale, zero = np.asarray(tensors["scale"]), np.asarray(tensors["zero"])
    for name, array in metadata(config, scale.dtype, (n, k)).items():
        found = np.asarray(tensors.get(name, array))
        if not np.array_equal(found, array):
            wanted, found = (
                bytes(a).decode("latin-1") if a.ndim else a for a in (array, found)
            )
            raise ValueError(f"{name}={found} must be {wanted}, as the configuration.")
    check_finite(tensors, ["scale", "zero"])
    container = np.uint32 if config.bits == 3 else np.uint8
    words = np.ascontiguousarray(tensors["W_q"]).view(container)
    if words.max() >> FIELDS[config.bits] * config.bits:
        raise ValueError(f"W_q has codes of more than {config.bits} bits.")
    layout, grouping, group_size = _arrangement(config, k, n)
    groups = scale.size
    if min(n, k) < 1 or groups * (group_size or k) != n * k:
        raise ValueError(
            f"shape={[n, k]} must have {groups} groups of {group_size or k} elements, "
            f"as scale.shape={scale.shape} says."
        )
    rows = grouping is Grouping.ROWS
    parameters = [
        jnp.asarray(p.reshape(n, -1).T if rows else p.reshape(-1, 1))
        for p in (scale, zero)
    ]
    return tensor.build(
        (jnp.asarray(words),),
        *parameters,
        layout=layout,
        segments=(Segment(config.bits, group_size),),
        grouping=grouping,
        rounding=2,
        padding=layout.extents(words.shape, config.bits)[1] - n,
    )


def _arrangement(config: Config, k: int, n: int) -> tuple[Slabs, Grouping, int | None]:
    """Layout, grouping and group size of a matrix."""
    size = config.group_size
    if size is None:  # the view is the weight itself
        layout = Slabs(k, k)
        return (
            (layout, Grouping.ROWS, None)
            if config.axis
            else (layout, Grouping.STRIDED, n)
        )
    if not config.axis:
        return Slabs(k, size, 0), Grouping.STRIDED, size
    return Slabs(k, size), Grouping.FLAT if k % size else Grouping.ROWS, size


@of_whole
def to_tensors(
    qt: QTensor, config: Config | None = None
) -> dict[str, Array | np.ndarray]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width with groups of equal size, in input order. Integer
        zeros become floats, symmetric codes get the zero that they imply.
      config: What to write; None takes width and groups from ``qt``.

    Returns:
      All of `TENSORS` (without ``group_size`` where there is none).

    Raises:
      ValueError: If HQQ, or ``config``, cannot hold ``qt``, with the reason.
    """
    config = config or config_of(qt)
    check_choice("axis", config.axis, (0, 1))
    _holdable(qt, config)
    scale, bits = tensor.plain(qt.scale), config.bits
    zero = tensor.plain(qt.zero)
    if zero is None:
        zero = jnp.full(scale.shape, 2 ** (bits - 1), scale.dtype)
    layout, _, _ = _arrangement(config, qt.k, qt.n)
    words = decode.relayout(qt, layout).words[0]
    stored = scale.dtype if config.view_as_float else jnp.dtype(_container(config))
    row = words.shape[1] * words.dtype.itemsize
    if row % stored.itemsize:
        raise ValueError(
            f"view_as_float=True: {row} bytes a row of words are not whole {stored} "
            "numbers; write with view_as_float=False."
        )
    shape = (-1, 1) if config.axis else (1, -1)
    return {
        "W_q": words.view(stored),
        "scale": scale.T.reshape(shape),
        "zero": zero.astype(scale.dtype).T.reshape(shape),
        **metadata(config, scale.dtype, (qt.n, qt.k)),
    }


def config_of(qt: QTensor) -> Config:
    """Finds the configuration that `to_tensors` writes a matrix with.

    Args:
      qt: The matrix; its leaves may be abstract.

    Returns:
      The configuration, of its width and groups.

    Raises:
      ValueError: If HQQ has no such width.
    """
    segment, strided = qt.segments[0], qt.grouping is Grouping.STRIDED
    if segment.bits not in FIELDS:
        raise ValueError(
            f"HQQ cannot hold {qt!r}: {segment.bits} bits are not among "
            f"{tuple(FIELDS)}."
        )
    # Three bits need a group size; a whole column is one of k elements.
    size = qt.k if segment.group_size is None else segment.group_size
    return Config(nbits=segment.bits, group_size=size, axis=0 if strided else 1)


def _holdable(qt: QTensor, config: Config) -> None:
    """Says why HQQ cannot hold the tensor, if it cannot."""
    size, reason = qt.segments[0].group_size, None
    _, grouping, wanted = _arrangement(config, qt.k, qt.n)
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif len(qt.segments) != 1:
        reason = "its rows have several widths; EXL2 holds those"
    elif any(v is not None for v in (qt.order, qt.row_group, qt.input_scale)):
        reason = "it has an order of rows or an input scale; GPTQ holds an order"
    elif qt.affine is not Affine.ZERO and (
        qt.affine is not Affine.CENTERED or qt.zero is not None
    ):
        reason = f"{qt.affine.value} has no zero in units of codes; requantize it"
    elif qt.segments[0].bits != config.bits:
        reason = f"it has {qt.segments[0].bits} bits, config has nbits={config.nbits}"
    elif (qt.grouping, size or qt.k) != (grouping, wanted or qt.k):
        reason = (
            f"its groups are {qt.grouping.value} of {size or qt.k}, config says "
            f"{grouping.value} of {wanted or qt.k}"
        )
    elif qt.grouping is Grouping.ROWS and any(
        p is not None and p.shape[-1] != qt.n for p in (qt.scale, qt.zero)
    ):
        reason = "columns share scales or zeros"
    elif qt.k * qt.n % (size or qt.k):
        reason = "its last group is shorter than the others"
    if reason:
        raise ValueError(f"HQQ cannot hold {qt!r}: {reason}.")
