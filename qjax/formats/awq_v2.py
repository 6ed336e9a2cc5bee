"""AWQ, second layout: optimum-quanto's ``pack_v2``, AutoAWQ's GEMVFast, llm-awq.

A 16-bit word of the packed ``[n / 4, k]`` holds four codes of one output, eight inputs
apart; the 64 words of four outputs and 64 inputs lie together. The word in row ``r``
and column ``64*t + 16*o + 8*h + j`` (o below 4, h below 2, j below 8) is

    bit 15                                                         bit 0
    | q[c + 24, 4*r + o] | q[c + 16, ...] | q[c + 8, ...] | q[c, 4*r + o] |
    with c = 64*t + 32*h + j

Zeros are kept as floats, scaled and negated: ``-(scale * zero)``, so that the weight is
``q * scale + shift``. The GPU kernels round that once (``rounding=1``, what
`from_tensors` gives); optimum-quanto's ``dequantize()`` rounds the product and then the
sum (``rounding=2``, `from_qbits`). The integer zero itself cannot be had back.

Source: huggingface/optimum-quanto, optimum/quanto/tensor/weights/awq/packed.py and
qbits.py, commit e33f8202e6c755256b7448789a5ed765c45d5105; casper-hansen/AutoAWQ,
awq/modules/linear/gemv_fast.py, commit 88e4c76b20755db275574e6a03c83c84ba3bece5;
mit-han-lab/llm-awq, awq/quantize/qmodule.py, commit
d6e797a42b9ef7778de8ee2352116e0f48a78d61.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int16, Integer, UInt8, UInt16

from qjax import tensor
from qjax.bits import transpose
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_shapes,
    check_tensors,
    check_width,
    check_words,
    refusal,
)
from qjax.formats.gathering import of_whole
from qjax.tensor import Affine, Cut, Digits, Layout, QTensor, Segment

WIDTHS = (4,)
_ZEROS = ("scaled_zeros", "qzeros")


@dataclasses.dataclass(frozen=True)
class Interleaved(Layout):
    """Four-bit codes in uint16 words ``[n / 4, k]``; k a multiple of 64, n of 4."""

    def pack(
        self, codes: Integer[Array, "k n"], bits: int = 4
    ) -> UInt16[Array, "rows k"]:
        """Packs ``[k, n]`` codes; bits above the fourth are cut off."""
        check_width(bits, WIDTHS, "AWQ")
        check_codes(codes)
        return _pack(codes)

    def unpack(
        self, words: Integer[Array, "rows k"], bits: int = 4
    ) -> UInt8[Array, "k n"]:
        """Unpacks ``[n / 4, k]`` words, int16 or uint16."""
        check_width(bits, WIDTHS, "AWQ")
        return _unpack(words)

    def extents(self, shape: tuple[int, ...], bits: int = 4) -> tuple[int, int]:
        """Returns ``(k, n)`` of ``[n / 4, k]``."""
        del bits
        return shape[1], 4 * shape[0]

    def cut(self, bits: int = 4) -> Cut:
        """Cuts between runs of words: 64 inputs of 4 outputs."""
        del bits
        return Cut(k_axis=1, rows=64, n_axis=0, columns=4)

    def digits(self, bits: int = 4) -> Digits:
        """Permutes those of 4 outputs and 64 inputs."""
        del bits
        return Digits("n", fields="k4 k3", run="n1 n0 k5 k2 k1 k0", width=16)


@jax.jit
def _pack(codes: Array) -> Array:
    k, n = codes.shape
    fields = _fields(codes, k, n).astype(jnp.uint32).reshape(k // 32, 4, 4, 2, n)
    # Words side by side move together. The fields do not overlap: their sum is both.
    pairs = (fields << _pair_shifts()).sum((1, 3), dtype=jnp.uint32)
    pairs = transpose(pairs.reshape(k // 64, 8, n // 4, 4), (2, 0, 3, 1))[..., None]
    words = pairs >> (16 * lax.broadcasted_iota(jnp.uint32, (1, 1, 1, 1, 2), 4))
    return words.astype(jnp.uint16).reshape(n // 4, k)


@jax.jit
def _pack_rows(codes: Array) -> Array:
    """`_pack` of the transpose: nothing moves far."""
    n, k = codes.shape
    fields = _fields(codes, k, n).astype(jnp.uint16)
    fields = fields.reshape(n // 4, 4, k // 64, 2, 4, 8)
    words = (fields << _row_shifts()).sum(4, dtype=jnp.uint16)
    return words.transpose(0, 2, 1, 3, 4).reshape(n // 4, k)


def _fields(codes: Array, k: int, n: int) -> Array:
    """Cuts the codes to four bits, if their dtype and extents are sound."""
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    if k % 64 or n % 4:
        raise ValueError(
            f"codes of k={k} and n={n} must have k a multiple of 64 and n of 4; pad "
            "them, or keep another layout."
        )
    return codes & jnp.array(15, codes.dtype)


@jax.jit
def _unpack(words: Array) -> Array:
    rows, k = _check_words(words)
    pairs = lax.bitcast_convert_type(words.reshape(rows, k // 64, 4, 8, 2), jnp.uint32)
    pairs = transpose(pairs, (1, 3, 0, 2)).reshape(k // 32, 1, 4, 1, 4 * rows)
    fields = (pairs >> _pair_shifts()) & jnp.uint32(15)
    return fields.astype(jnp.uint8).reshape(k, 4 * rows)


@jax.jit
def _unpack_rows(words: Array) -> Array:
    """The transpose of `_unpack`."""
    rows, k = _check_words(words)
    logical = lax.bitcast_convert_type(words, jnp.uint16)
    blocks = logical.reshape(rows, k // 64, 4, 2, 1, 8).transpose(0, 2, 1, 3, 4, 5)
    fields = (blocks >> _row_shifts()) & jnp.uint16(15)
    return fields.astype(jnp.uint8).reshape(4 * rows, k)


def _check_words(words: Array) -> tuple[int, int]:
    check_words(words, 2, jnp.int16, jnp.uint16)
    rows, k = words.shape
    if k % 64:
        raise ValueError(
            f"words.shape={words.shape} must be [n / 4, k] with k a multiple of 64."
        )
    return rows, k


def _pair_shifts() -> Array:
    """Where the codes of two words side by side lie, ``[1, 4, 1, 2, 1]``."""
    shape = (1, 4, 1, 2, 1)
    field, word = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 3))
    return 4 * field + 16 * word


def _row_shifts() -> Array:
    """Where the codes of a word lie, ``[1, 1, 1, 1, 4, 1]``."""
    return 4 * lax.broadcasted_iota(jnp.uint16, (1, 1, 1, 1, 4, 1), 4)


def pack_v2(unpacked: Integer[Array, "n k"]) -> Int16[Array, "rows k"]:
    """Packs codes as optimum-quanto's ``pack_v2``.

    Args:
      unpacked: ``[n, k]`` codes from 0 to 15, the transpose of `QTensor` codes; higher
        bits are cut off.

    Returns:
      int16 words ``[n / 4, k]``, bit patterns: a code above 7 in the highest field
      makes them negative.

    Raises:
      ValueError: If n is no multiple of 4 or k none of 64, or for other dtypes.

    Example:
      >>> codes = jnp.zeros((4, 64), jnp.uint8).at[0, 8].set(7).at[1, 0].set(5)
      >>> words = pack_v2(codes)[0]
      >>> hex(words[0]), int(words[16])
      ('0x70', 5)
    """
    return lax.bitcast_convert_type(_pack_rows(unpacked), jnp.int16)


def unpack_v2(packed: Integer[Array, "rows k"]) -> UInt8[Array, "n k"]:
    """Unpacks words as optimum-quanto's ``unpack_v2``.

    Args:
      packed: ``[n / 4, k]``, int16 or uint16.

    Returns:
      uint8 codes ``[n, k]``.

    Raises:
      ValueError: If k is no multiple of 64, or for other dtypes.
    """
    return _unpack_rows(packed)


@jax.jit
def offset(scale: Float[Array, "*any"], shift: Array) -> Float[Array, "*any"]:
    """What is added to ``q * scale``: the shift as AWQ's second layout stores it.

    Args:
      scale: float16, bfloat16 or float32 scales.
      shift: optimum-quanto's float shift, which is subtracted, or integer zeros.

    Returns:
      ``-shift``, or ``-(scale * shift)`` of integers, rounded once to the dtype of
      ``scale``; a zero of 0 gives -0.
    """
    if jnp.issubdtype(shift.dtype, jnp.floating):
        return -shift.astype(scale.dtype)
    # Exact in float32 for scales of 16 bits.
    product = scale.astype(jnp.float32) * shift.astype(jnp.float32)
    return -product.astype(scale.dtype)


def zeros_width(k: int, group_size: int | None) -> int:
    """Words of zeros for one output in AutoAWQ's GEMV; an eighth of GEMVFast's rows.

    Args:
      k: Number of inputs.
      group_size: Inputs that share a scale; None for all.

    Returns:
      ``ceil(groups / 8)``, rounded up to 2 words for groups of 64 and 4 for 32.

    Raises:
      ValueError: If the group size is not 32, 64, or 128 and more.
    """
    group_size = k if group_size is None else group_size
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    if multiple == 1 and group_size < 128:
        raise ValueError(
            f"group_size={group_size} must be 32, 64, or at least 128: AutoAWQ's GEMV "
            "versions have no others; 'gemm' holds any."
        )
    words = -(-(k // group_size) // 8)
    return -(-words // multiple) * multiple


def check(tensors: Mapping[str, Any], group_size: int | None) -> None:
    """Checks names, dtypes and shapes of one GEMVFast module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``: ``qweight`` int16
        ``[n / 4, k]``; ``scales`` float ``[8 * zeros_width, n]``; ``qzeros`` (as
        AutoAWQ names it) or ``scaled_zeros`` (llm-awq) like ``scales``.
      group_size: Inputs that share a scale; None for all.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    zeros = _zeros_name(tensors)
    expected = {
        "qweight": Expected((jnp.int16,), 2),
        "scales": Expected(FLOATS, 2),
        zeros: Expected((), 2, like="scales"),
    }
    check_tensors(tensors, expected, "AWQ 'gemv_fast'")
    rows, k = tensors["qweight"].shape
    if not rows or not k or k % 64 or k % (group_size or k):
        raise ValueError(
            f"qweight.shape={(rows, k)} must be [n / 4, k] with k a multiple of 64 and "
            f"of group_size={group_size}."
        )
    shape = (8 * zeros_width(k, group_size), 4 * rows)
    source = f"qweight.shape={(rows, k)} and group_size={group_size}"
    check_shapes(tensors, {"scales": shape, zeros: shape}, source)


def _zeros_name(tensors: Mapping[str, Any]) -> str:
    return next((name for name in _ZEROS if name in tensors), "qzeros")


def check_padding(scale: Array | np.ndarray, groups: int) -> None:
    """Checks that the scales of GEMV files end where they should.

    Args:
      scale: Concrete ``[groups and padding, n]``.
      groups: Groups that the configuration says there are.

    Raises:
      ValueError: If a scale of the padding is not 0, as upstream writes it: then the
        tensors were packed with smaller groups; or if half of the groups have no other
        scale, which upstream writes of no weight: then with larger ones.
    """
    scale = np.asarray(scale)
    if scale[groups:].any():
        raise ValueError(
            f"scales must be 0 beyond the {groups} groups that group_size gives; the "
            "tensors were packed with smaller groups."
        )
    half = -(-groups // 2)
    if scale[:half].any() and groups > half and not scale[half:groups].any():
        raise ValueError(
            f"scales are 0 from half of the {groups} groups on that group_size gives; "
            "the tensors were packed with larger groups."
        )


def from_tensors(tensors: Mapping[str, Any], group_size: int | None) -> QTensor:
    """Reads one GEMVFast matrix; `qjax.formats.awq` calls it for checkpoints.

    Args:
      tensors: Concrete arrays, as `check` lists them.
      group_size: Inputs that share a scale; None for all.

    Returns:
      ``[k, n]`` tensor in the file's layout, ``q * scale + zero`` rounded once as the
      kernels do. The rows of zeros that pad the scales are left out.

    Raises:
      ValueError: As `check` and `check_padding`; or if a scale or zero is not finite.
    """
    check(tensors, group_size)
    name = _zeros_name(tensors)
    groups = tensors["qweight"].shape[1] // (group_size or tensors["qweight"].shape[1])
    scale, zero = (tensors[key][:groups] for key in ("scales", name))
    check_finite({"scales": scale, name: zero})
    check_padding(tensors["scales"], groups)
    return _build(tensors["qweight"], scale, zero, group_size, rounding=1)


def _build(
    words: Any, scale: Any, zero: Any, group_size: int | None, rounding: int
) -> QTensor:
    return tensor.build(
        (lax.bitcast_convert_type(jnp.asarray(words), jnp.uint16),),
        jnp.asarray(scale),
        jnp.asarray(zero),
        layout=Interleaved(),
        segments=(Segment(4, group_size),),
        affine=Affine.OFFSET,
        rounding=rounding,
    )


@of_whole
def to_tensors(
    qt: QTensor, zeros: Literal["qzeros", "scaled_zeros"] = "qzeros"
) -> dict[str, Array]:
    """Writes one matrix as AutoAWQ's GEMVFast and llm-awq do.

    Args:
      qt: Four bits, ``q * scale + zero``, groups of 32, 64, or at least 128 rows.
      zeros: AutoAWQ's or llm-awq's name of the scaled zeros.

    Returns:
      ``qweight`` int16, ``scales`` and the scaled zeros, padded with rows of zeros.

    Raises:
      ValueError: If the format cannot hold ``qt``, with the reason; or ``zeros`` is
        another name.
    """
    check_choice("zeros", zeros, _ZEROS)
    words, scale, zero = _parts(qt)
    rows = 8 * zeros_width(qt.k, qt.segments[0].group_size) - scale.shape[0]
    scale, zero = (jnp.pad(p, ((0, rows), (0, 0))) for p in (scale, zero))
    return {"qweight": words, zeros: zero, "scales": scale}


# optimum-quanto's inner tensors, in its order.
_QBITS = {
    "_data": Expected((jnp.int16,), 2),
    "_scale": Expected(FLOATS, 2),
    "_shift": Expected((), 2, like="_scale"),
}


def from_qbits(tensors: Mapping[str, Any]) -> QTensor:
    """Takes over optimum-quanto's AWQ tensor (``AWQWeightQBitsTensor``).

    Args:
      tensors: Its inner tensors: ``_data`` int16 ``[n / 4, k]``, ``_scale`` and
        ``_shift`` float ``[groups, n]``, the shift negated as `offset` gives it.

    Returns:
      ``[k, n]`` tensor, ``q * scale + zero`` with the two roundings of upstream's
      ``dequantize()``. Its kernels round once:
      ``dataclasses.replace(qt, rounding=1)``.

    Raises:
      ValueError: If names, shapes or dtypes do not fit.
    """
    check_tensors(tensors, _QBITS, "AWQWeightQBitsTensor")
    data, scale, shift = (tensors[name] for name in _QBITS)
    check_shapes(tensors, {"_shift": tuple(scale.shape)}, "_scale.shape")
    k, groups = data.shape[1], scale.shape[0]
    if not groups or k % groups:
        raise ValueError(f"_scale.shape[0]={groups} must divide k={k}.")
    return _build(data, scale, shift, k // groups, rounding=2)


def to_qbits(qt: QTensor) -> dict[str, Array]:
    """Inverse of `from_qbits`.

    Args:
      qt: Four bits, ``q * scale + zero`` with groups of rows.

    Returns:
      ``_data`` int16 ``[n / 4, k]``, ``_scale`` and ``_shift`` ``[groups, n]``.

    Raises:
      ValueError: If the format cannot hold ``qt``, with the reason.
    """
    return dict(zip(_QBITS, _parts(qt), strict=True))


def _parts(qt: QTensor) -> tuple[Array, Array, Array]:
    """Words, scales and scaled zeros, or why there are none."""
    reason = refusal(qt, WIDTHS)
    if reason is None and qt.affine is not Affine.OFFSET:
        reason = (
            f"it is {qt.affine.value}, and scaled zeros would be rounded; write "
            "AWQ 'gemm', or replace zero by awq_v2.offset(scale, zero) knowingly"
        )
    if reason:
        raise ValueError(f"AWQ v2 cannot hold {qt!r}: {reason}.")
    words = lax.bitcast_convert_type(_pack(tensor.codes(qt)), jnp.int16)
    zero = tensor.plain(qt.zero)
    assert zero is not None  # build() has seen to it
    return words, tensor.plain(qt.scale), zero
