"""MPQ of bitorch-engine: 1, 2, 4 or 8 bits, GPTQ's zeros or double-quantized floats.

``qweight`` holds each column as the bit stream of `qjax.bits`, at four bits

    bit 31                                                            bit 0
    | q[8i+7, j] | q[8i+6, j] | ...  | q[8i+2, j] | q[8i+1, j] | q[8i, j] |

and ``g_idx`` the group of each row. There are two ways to say the zeros:

* GPTQ, with integer ``qzeros`` packed like the codes, but along n. Here the 1 that is
  added to a stored zero is not wrapped, unlike in GPTQModel: a field of all ones means
  ``2**bits``. ``W = (q - (stored + 1)) * scales``, rounded once.
* GBA, with float zeros: ``W = q * scales - zeros``, where `from_tensors` asks for the
  two roundings of upstream's own unpacking. Its kernels round once, as does
  ``dataclasses.replace(qt, rounding=1)``. Zeros are held negated (`Affine.OFFSET`).

Scales and zeros of GBA in groups of fewer than 256 rows are themselves quantized to
four bits, in runs of columns. A byte of ``qstatistic`` has both indices,

    bit 7                      bit 0
    | scale's index | zero's index |

with ``scales = R(R(index - qscales_zeros) * qscales_scales)``, ``R`` for rounding to
the dtype, and zeros likewise. A layer that was prepared has saved ``scales`` and
``zeros`` instead; one that was not has unused ones beside them. The asymmetric GBA,
which has ``qscales``, is switched off upstream and not read.

Source: GreenBitAI/bitorch-engine, bitorch_engine/layers/qlinear/nbit/layer.py,
cuda/mpq_layer.py, cuda/utils.py and cuda/mpq_linear_cuda_kernel.cu, commit
0009b1f8178e86df6433383879c0005a49c0cc92.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer

from qjax import decode, tensor
from qjax.bits import block, pack_fields, unpack_fields
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_finite,
    check_method,
    check_shapes,
    check_tensors,
    group_size_of,
)
from qjax.formats.g_idx import in_input_order, read_g_idx
from qjax.formats.gathering import of_whole
from qjax.formats.gptq import Stream
from qjax.tensor import Affine, Encoded, Grouping, QTensor, Segment

BITS = (1, 2, 4, 8)
_INDICES = ("qzeros_zeros", "qzeros_scales", "qscales_zeros", "qscales_scales")
_EXPECTED = {
    "qweight": Expected((jnp.int32,), 2),
    "g_idx": Expected((jnp.int32,), 1, optional=True),
    "qzeros": Expected((jnp.int32,), 2, optional=True),
    "scales": Expected(FLOATS, 2, optional=True),
    "zeros": Expected(FLOATS, 2, optional=True),
    "qstatistic": Expected((jnp.uint8,), 3, optional=True),
    **{name: Expected(FLOATS, 3, optional=True) for name in _INDICES},
    "wf": Expected((jnp.int32,), 2, optional=True),  # a table of shifts
}
TENSORS = tuple(_EXPECTED)
_INTEGERS = ("qstatistic", "qzeros")
# From here on upstream takes ``scales`` and ``zeros`` as they are.
_PLAIN_GROUP = 256


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DoubleQuantized(Encoded):
    """``R(R(index - zero) * step)``, rounded to the dtype of ``step`` twice.

    Attributes:
      index: uint8 ``[*batch, groups, runs, size]``, 0 to 15; n is ``runs * size``.
      zero: float ``[*batch, groups, runs, 1]``.
      step: float ``[*batch, groups, runs, 1]``. MPQ's zeros are held negated, and so is
        their step here.

    Example:
      >>> zero = jnp.full((1, 2, 1), 2, jnp.float16)
      >>> index = jnp.array([[[1, 2], [3, 4]]], jnp.uint8)
      >>> DoubleQuantized(index=index, zero=zero, step=zero).decode().tolist()
      [[-2.0, 0.0, 2.0, 4.0]]
    """

    index: Array
    zero: Array
    step: Array

    def decode(self) -> Float[Array, "*batch groups n"]:
        """Returns the numbers in the dtype of ``step``."""
        return _decode(self.index, self.zero, self.step)


@jax.jit
def _decode(index: Array, zero: Array, step: Array) -> Array:
    # Either operation is exact enough in float32 for its rounding to be the only one.
    moved = index.astype(jnp.float32) - zero.astype(jnp.float32)
    product = decode.rounded(moved, step.dtype) * step.astype(jnp.float32)
    numbers = decode.rounded(product, step.dtype).astype(step.dtype)
    return numbers.reshape(*index.shape[:-2], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Bits and group size of all modules; the tensors say the rest.

    Attributes:
      bits: Width of a code: 1, 2, 4 or 8; None takes it from the shapes.
      group_size: Rows that share a scale, -1 for one group a column; None takes it from
        the shapes, as `checks.group_size_of` does.
    """

    bits: int | None = None
    group_size: int | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads ``bits`` and ``group_size``.

        Upstream has no file of them: green-bit-llm takes them from the name of the
        model, such as "...-w4a16g32", and here the shapes say them as well.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value.
        """
        check_method(entry, "mpq")
        bits, size = entry.get("bits"), entry.get("group_size")
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise ValueError(f"bits={bits!r} must be one of {BITS}.")
        if size is not None and (type(size) is not int or not (size == -1 or size > 0)):
            raise ValueError(f"group_size={size!r} must be positive or -1.")
        return cls(bits=bits, group_size=size)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, which is that of all."""
        del module
        return self


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``qweight`` int32 ``[k * bits / 32, n]``, optionally ``g_idx`` int32 ``[k]``,
        and one of three: ``qzeros`` int32 ``[groups, n * bits / 32]`` with ``scales``
        float ``[groups, n]``; ``scales`` and ``zeros``; or ``qstatistic`` uint8
        ``[groups, runs, n / runs]`` with ``qscales_zeros``, ``qscales_scales``,
        ``qzeros_zeros`` and ``qzeros_scales`` ``[groups, runs, 1]`` (groups of fewer
        than 256 rows; ``scales`` and ``zeros`` are then ignored). ``wf`` is ignored.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_tensors(tensors, _EXPECTED, "MPQ")
    height, n = tensors["qweight"].shape
    if not height or not n:
        raise ValueError(f"qweight.shape={(height, n)} must not be empty.")
    bits, size = _segment(tensors, config)[:2]
    k = height * 32 // bits
    groups = -(-k // (size or k))
    shapes = {"g_idx": (k,)}
    parts = [name for name in ("qstatistic", *_INDICES) if name in tensors]
    if parts and len(parts) <= len(_INDICES):
        # Otherwise scales that upstream would not look at would count.
        raise ValueError(
            f"qstatistic and {_INDICES} must all be there or none; found {parts}."
        )
    if {"qzeros", "zeros"} <= tensors.keys():
        raise ValueError("qzeros and zeros are two kinds of zeros; one must be there.")
    if _has_statistic(tensors, size or k):
        needed, runs = ("qstatistic", *_INDICES), tensors["qstatistic"].shape[1]
        shapes |= dict.fromkeys(_INDICES, (groups, runs, 1))
        shapes["qstatistic"] = (groups, runs, n // (runs or n))
        if not runs or n % runs:
            raise ValueError(f"qstatistic.shape[1]={runs} must divide n={n}.")
    else:
        needed = ("scales", "qzeros" if "qzeros" in tensors else "zeros")
        shapes |= {"scales": (groups, n), "zeros": (groups, n)}
        shapes["qzeros"] = (groups, n * bits // 32)
    for name in needed:
        if name not in tensors:
            raise ValueError(f"{name} is missing; found {sorted(tensors)}.")
    if "qzeros" in needed and n % block(bits)[0]:
        raise ValueError(
            f"qweight.shape[1]={n} must be a multiple of {block(bits)[0]}, so that "
            "qzeros fill whole words."
        )
    floats = {name: tensors[name].dtype for name in needed if name not in _INTEGERS}
    if len(set(floats.values())) > 1:
        raise ValueError(f"dtypes {floats} must be the same.")
    source = f"qweight.shape={(height, n)} and {config}"
    check_shapes(tensors, shapes, source)


def _segment(tensors: Mapping[str, Any], config: Config) -> Segment:
    """Width and group size, from the shapes where the configuration does not say."""
    height, bits, size = tensors["qweight"].shape[0], config.bits, config.group_size
    if bits is None:
        rows = tensors["g_idx"].shape[0] if "g_idx" in tensors else 0
        bits = height * 32 // rows if rows else None
    if bits not in BITS:
        raise ValueError(
            f"bits={bits}, from the configuration or from qweight.shape[0]={height} "
            f"words of g_idx.shape[0] rows, must be one of {BITS}."
        )
    if size is None:
        k = height * 32 // bits
        name = "qstatistic" if "qstatistic" in tensors else "scales"
        groups = tensors[name].shape[0] if name in tensors else 1
        size = group_size_of(k, groups)
        if size is None:
            raise ValueError(
                f"{name}.shape[0]={groups} does not cut k={k} into groups of a power "
                "of two; the configuration must have group_size."
            )
        size = -1 if groups == 1 else size
    return Segment(bits, None if size == -1 else size)


def _has_statistic(tensors: Mapping[str, Any], group_size: int) -> bool:
    return "qstatistic" in tensors and group_size < _PLAIN_GROUP


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the layout `gptq.Stream`. With ``qzeros``, ``zero`` is the
      integer that is subtracted: uint8, or uint16 where 8 bits have a zero of 256.
      Otherwise it is the negated float zero, and ``rounding`` is 2; with
      ``qstatistic``, scale and zero are `DoubleQuantized`. ``row_group`` holds a
      ``g_idx`` that is not simply ``row // group_size``.

    Raises:
      ValueError: As `check`; or if a number is not finite or a ``g_idx`` out of range.
    """
    check(tensors, config)
    words = np.asarray(tensors["qweight"]).view(np.uint32)
    segment, affine, rounding = _segment(tensors, config), Affine.OFFSET, 2
    group_size = segment.group_size or words.shape[0] * 32 // segment.bits
    if _has_statistic(tensors, group_size):
        check_finite(tensors, _INDICES)
        scale, zero = _read_statistic(tensors)
    else:
        check_finite(tensors, ("scales", "zeros"))
        scale = jnp.asarray(tensors["scales"])
        if "qzeros" in tensors:
            affine, rounding = Affine.ZERO, 1
            stored = unpack_fields(jnp.asarray(tensors["qzeros"]), segment.bits, axis=1)
            wide = int(stored.max()) == 255
            zero = stored.astype(jnp.uint16) + 1 if wide else stored + 1
        else:
            zero = -jnp.asarray(tensors["zeros"])
    return tensor.build(
        [jnp.asarray(words)],
        scale,
        zero,
        layout=Stream(),
        segments=[segment],
        affine=affine,
        rounding=rounding,
        row_group=read_g_idx(tensors.get("g_idx"), group_size, scale.shape[0]),
    )


def _read_statistic(
    tensors: Mapping[str, Any],
) -> tuple[DoubleQuantized, DoubleQuantized]:
    named = {name: jnp.asarray(tensors[name]) for name in ("qstatistic", *_INDICES)}
    scale = DoubleQuantized(
        index=named["qstatistic"] >> 4,
        zero=named["qscales_zeros"],
        step=named["qscales_scales"],
    )
    zero = DoubleQuantized(
        index=named["qstatistic"] & 15,
        zero=named["qzeros_zeros"],
        step=-named["qzeros_scales"],
    )
    return scale, zero


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width: with integer zeros or symmetric, for GPTQ's way; or
        with float zeros that are added, for GBA's.

    Returns:
      ``qweight``, ``g_idx``, and ``scales`` with ``qzeros`` or ``zeros``, or what
      `DoubleQuantized` scales and zeros were read from. Rows are in the inputs' order.

    Raises:
      ValueError: If MPQ cannot hold ``qt``, with the reason.
    """
    _require_holdable(qt)
    bits, (codes, g_idx) = qt.segments[0].bits, in_input_order(qt)
    tensors = {"qweight": _words(codes, bits, 0), "g_idx": g_idx}
    # In larger groups upstream would not look at the statistics.
    small = (qt.segments[0].group_size or qt.k) < _PLAIN_GROUP
    scale, zero = qt.scale, qt.zero
    if (
        small
        and isinstance(scale, DoubleQuantized)
        and isinstance(zero, DoubleQuantized)
    ):
        return tensors | _write_statistic(scale, zero)
    (plain,) = tensor.split(qt)
    tensors["scales"] = plain.scale
    if plain.zero is not None and qt.affine is Affine.OFFSET:
        return tensors | {"zeros": -plain.zero}
    return tensors | {"qzeros": _write_zeros(plain)}


def _words(codes: Integer[Array, "a b"], bits: int, axis: int) -> Int32[Array, "c d"]:
    return jax.lax.bitcast_convert_type(pack_fields(codes, bits, axis), jnp.int32)


def _write_zeros(plain: QTensor) -> Int32[Array, "groups words"]:
    bits = plain.segments[0].bits
    middle = jnp.full(plain.scale.shape, 2 ** (bits - 1), jnp.uint8)
    zero = middle if plain.zero is None else plain.zero
    low, high = int(zero.min()), int(zero.max())
    if low < 1 or high > 2**bits:
        raise ValueError(
            f"MPQ cannot hold {plain!r}: its zeros go from {low} to {high}, and only "
            f"1 to {2**bits} can be written, as a file has them less 1."
        )
    return _words((zero - 1).astype(jnp.uint8), bits, 1)


def _write_statistic(scale: DoubleQuantized, zero: DoubleQuantized) -> dict[str, Array]:
    return {
        "qstatistic": scale.index << 4 | zero.index,
        "qscales_zeros": scale.zero,
        "qscales_scales": scale.step,
        "qzeros_zeros": zero.zero,
        "qzeros_scales": -zero.step,
    }


def _require_holdable(qt: QTensor) -> None:
    """Says why MPQ cannot hold the tensor, if it cannot."""
    reason, bits = None, qt.segments[0].bits
    leaves = [leaf for leaf in (qt.scale, qt.zero) if leaf is not None]
    integers = qt.affine is Affine.CENTERED and qt.zero is None
    if qt.affine is Affine.ZERO:
        integers = not jnp.issubdtype(leaves[-1].dtype, jnp.floating)
    double = [isinstance(leaf, DoubleQuantized) for leaf in leaves]
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif len(qt.segments) != 1:
        reason = "its rows have several widths; MBWQ holds those"
    elif qt.grouping is not Grouping.ROWS:
        reason = f"it has {qt.grouping.value} groups"
    elif qt.input_scale is not None:
        reason = "it has an input_scale, which it could hand on to the layer before it"
    elif bits not in BITS:
        reason = f"{bits} bits are not among {BITS}"
    elif not integers and qt.affine is not Affine.OFFSET:
        reason = f"{qt.affine.value} here has float zeros; requantize it"
    elif any(double) and not all(double):
        reason = "only one of scale and zero is double-quantized; decode it"
    elif any(leaf.shape[-1] != qt.n for leaf in leaves):
        reason = "columns share scales or zeros"
    elif qt.k % 32 or (integers and qt.n % block(bits)[0]):
        reason = f"k={qt.k} or n={qt.n} does not fill whole words"
    if reason:
        raise ValueError(f"MPQ cannot hold {qt!r}: {reason}.")
