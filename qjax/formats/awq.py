"""AWQ: four-bit codes in 32-bit words along n (GEMM) or along k (GEMV).

AutoAWQ's ``qweight[i, j]`` of version "gemm" holds eight outputs of input ``i``, even
ones in the low half, so that one mask takes two 16-bit halves apart,

    bit 31                                                                      bit 0
    | q[i,c+7] | q[i,c+5] | q[i,c+3] | q[i,c+1] | q[i,c+6] | ... | q[i,c+2] | q[i,c] |
    with c = 8*j

and ``qzeros[g, j]`` the zeros of group ``g`` in the same order, as they are (no minus
one). Version "gemv" has the torch weight's ``[n, k / 8]`` in natural order,

    bit 31                                                                      bit 0
    | q[8j+7, i] | q[8j+6, i] | ...                      | q[8j+1, i] | q[8j, i] |

with zeros and scales ``[n, groups]`` padded to a multiple of 8 groups or more. The
weight is ``(q - zero) * scale``, rounded once. Version "gemv_fast" is another layout
with float zeros: `qjax.formats.awq_v2`.

Source: huggingface/optimum-quanto, optimum/quanto/tensor/weights/awq/packed.py, commit
e33f8202e6c755256b7448789a5ed765c45d5105; casper-hansen/AutoAWQ,
awq/modules/linear/gemm.py, awq/modules/linear/gemv.py and awq/utils/packing_utils.py,
commit 88e4c76b20755db275574e6a03c83c84ba3bece5.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Integer, UInt8, UInt32

from qjax import tensor
from qjax.bits import pack_fields, transpose, unpack_fields
from qjax.formats import awq_v2
from qjax.formats.awq_config import VERSIONS, Config, Version
from qjax.formats.awq_v2 import WIDTHS, zeros_width
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
    lacks_narrow_zeros,
    refusal,
)
from qjax.formats.gathering import of_whole
from qjax.tensor import Affine, Cut, Digits, Layout, QTensor, Segment

__all__ = ["TENSORS", "Config", "Gemm", "Gemv", "Version", "axes", "check"]
__all__ += ["from_tensors", "pack", "to_tensors", "unpack"]


@dataclasses.dataclass(frozen=True)
class Gemm(Layout):
    """Eight outputs a word in AWQ's order: uint32 ``[k, n / 8]``."""

    def pack(
        self, codes: Integer[Array, "k n"], bits: int = 4
    ) -> UInt32[Array, "k words"]:
        """Packs ``[k, n]`` codes; n must be a multiple of 8."""
        check_width(bits, WIDTHS, "AWQ")
        check_codes(codes)
        return _pack(codes, reorder=True)

    def unpack(
        self, words: Integer[Array, "k words"], bits: int = 4
    ) -> UInt8[Array, "k n"]:
        """Unpacks ``[k, n / 8]`` words, int32 or uint32."""
        check_width(bits, WIDTHS, "AWQ")
        check_words(words, 2, jnp.int32, jnp.uint32)
        return _unpack(words, reorder=True)

    def extents(self, shape: tuple[int, ...], bits: int = 4) -> tuple[int, int]:
        """Returns ``(k, n)`` of ``[k, n / 8]``."""
        del bits
        return shape[0], 8 * shape[1]

    def cut(self, bits: int = 4) -> Cut:
        """Cuts between rows, and between words."""
        del bits
        return Cut(k_axis=0, rows=1, n_axis=1, columns=8)

    def digits(self, bits: int = 4) -> Digits:
        """Permutes them: field i holds output ``2 * (i % 4) + i // 4``."""
        del bits
        return Digits("k", fields="n0 n2 n1")


@dataclasses.dataclass(frozen=True)
class Gemv(Layout):
    """Eight inputs a word in natural order: uint32 ``[n, k / 8]``."""

    def pack(
        self, codes: Integer[Array, "k n"], bits: int = 4
    ) -> UInt32[Array, "n words"]:
        """Packs ``[k, n]`` codes; k must be a multiple of 8."""
        check_width(bits, WIDTHS, "AWQ")
        check_codes(codes)
        return transpose(pack_fields(codes, bits, axis=0), (1, 0))

    def unpack(
        self, words: Integer[Array, "n words"], bits: int = 4
    ) -> UInt8[Array, "k n"]:
        """Unpacks ``[n, k / 8]`` words, int32 or uint32."""
        check_width(bits, WIDTHS, "AWQ")
        check_words(words, 2, jnp.int32, jnp.uint32)
        return unpack_fields(transpose(words, (1, 0)), bits, axis=0)

    def extents(self, shape: tuple[int, ...], bits: int = 4) -> tuple[int, int]:
        """Returns ``(k, n)`` of ``[n, k / 8]``."""
        del bits
        return 8 * shape[1], shape[0]

    def cut(self, bits: int = 4) -> Cut:
        """Cuts between words, and between columns."""
        del bits
        return Cut(k_axis=1, rows=8, n_axis=0, columns=1)

    def digits(self, bits: int = 4) -> Digits | None:
        """Permutes them as a stream along k."""
        return Digits.of_stream("n", bits)


@functools.partial(jax.jit, static_argnames="reorder")
def _pack(codes: Array, *, reorder: bool) -> Array:
    rows, columns = codes.shape
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    if columns % 8:
        raise ValueError(
            f"{columns} codes must be a multiple of 8 to fill whole words; pad codes "
            "(optimum-quanto would drop the rest)."
        )
    fields = (codes & jnp.array(15, codes.dtype)).astype(jnp.uint32)
    fields = fields.reshape(rows, columns // 8, 8)
    # The fields do not overlap: their sum is the word.
    return (fields << _shifts(reorder)).sum(-1, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="reorder")
def _unpack(words: Array, *, reorder: bool) -> Array:
    if words.dtype not in (jnp.int32, jnp.uint32):
        raise ValueError(f"words.dtype={words.dtype} must be int32 or uint32.")
    logical = lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    fields = (logical >> _shifts(reorder)) & jnp.uint32(15)
    return fields.astype(jnp.uint8).reshape(words.shape[0], 8 * words.shape[1])


def _shifts(reorder: bool) -> Array:
    """Where the eight codes of a word lie, ``[1, 1, 8]``."""
    code = lax.broadcasted_iota(jnp.uint32, (1, 1, 8), 2)
    return 4 * (code // 2 + 4 * (code % 2)) if reorder else 4 * code


def pack(
    unpacked: Integer[Array, "r c"], reorder: bool = False
) -> Int32[Array, "r words"]:
    """Packs codes along the rows of a matrix as optimum-quanto's AWQ ``pack``.

    Args:
      unpacked: ``[r, c]`` codes from 0 to 15; higher bits are cut off.
      reorder: Code ``j`` of a word goes to field ``j // 2 + 4 * (j % 2)``, the order of
        AutoAWQ's GEMM, instead of field ``j``.

    Returns:
      int32 words ``[r, c / 8]``, bit patterns: negative where the highest bit is set.

    Raises:
      ValueError: If c is no multiple of 8 (upstream drops the rest without a word), or
        ``unpacked`` is not of integers.

    Example:
      >>> codes = jnp.arange(8)[None] % 8
      >>> hex(pack(codes)[0, 0]), hex(pack(codes, reorder=True)[0, 0])
      ('0x76543210', '0x75316420')
    """
    return lax.bitcast_convert_type(_pack(unpacked, reorder=reorder), jnp.int32)


def unpack(
    packed: Integer[Array, "r words"], reorder: bool = False
) -> UInt8[Array, "r c"]:
    """Unpacks words as optimum-quanto's AWQ ``unpack``: the inverse of `pack`.

    Args:
      packed: ``[r, c / 8]`` words, int32 or uint32.
      reorder: As in `pack`.

    Returns:
      uint8 codes ``[r, c]``.

    Raises:
      ValueError: If ``packed`` has another dtype.
    """
    return _unpack(packed, reorder=reorder)


TENSORS = ("qweight", "qzeros", "scales", "scaled_zeros")
_EXPECTED = {
    "qweight": Expected((jnp.int32,), 2),
    "scales": Expected(FLOATS, 2),
    "qzeros": Expected((jnp.int32,), 2),
}


def _version(tensors: Mapping[str, Any], config: Config) -> Version:
    """The version that the config names, or the one that the tensors look like."""
    if config.version is not None:
        check_choice("version", config.version, VERSIONS)
        return config.version
    if not {"qweight", "scales"} <= tensors.keys():
        return "gemm"  # All versions need both, and that one's check says so.
    qweight, scales = tensors["qweight"], tensors["scales"]
    if qweight.dtype == jnp.int16:
        return "gemv_fast"
    # Rows of outputs, or of inputs and of their groups.
    return "gemv" if qweight.shape[:1] == scales.shape[:1] else "gemm"


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name.
        Version "gemm": ``qweight`` int32 ``[k, n / 8]``, ``qzeros`` int32
        ``[groups, n / 8]``, ``scales`` float ``[groups, n]``. Version "gemv", with w
        the `awq_v2.zeros_width`: ``[n, k / 8]``, ``[n, w]``, ``[n, 8 * w]``. Version
        "gemv_fast": `awq_v2.check`.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    version = _version(tensors, config)
    if version == "gemv_fast":
        awq_v2.check(tensors, config.group_size)
        return
    check_tensors(tensors, _EXPECTED, f"AWQ {version!r}")
    rows, columns = tensors["qweight"].shape
    k, n = (rows, 8 * columns) if version == "gemm" else (8 * columns, rows)
    if not k or not n or k % (config.group_size or k):
        raise ValueError(
            f"qweight.shape={(rows, columns)} of version {version!r} has k={k} and "
            f"n={n}, but k must be a multiple of group_size={config.group_size}."
        )
    if version == "gemm":
        groups = k // (config.group_size or k)
        shapes = {"qzeros": (groups, n // 8), "scales": (groups, n)}
    else:
        width = zeros_width(k, config.group_size)
        shapes = {"qzeros": (n, width), "scales": (n, 8 * width)}
    source = f"qweight.shape={(rows, columns)}, group_size={config.group_size} and "
    check_shapes(tensors, shapes, source + f"version {version!r}")


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, as `gptq.axes`."""
    # Groups of "gemv" are padded along k; "gemv_fast" has rows of four outputs, and
    # zeros that lie the other way round.
    along = {"gemm": ("k", "n"), "gemv": ("n", "")}.get(_version(tensors, config))
    return dict.fromkeys(tensors, along) if along else {}


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout, with uint8 zeros; of "gemv_fast" with the
      scaled float zeros. The groups that pad GEMV files are left out.

    Raises:
      ValueError: As `check` and `awq_v2.check_padding`; or if a scale is not finite.

    Example:
      >>> import qjax
      >>> w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
      >>> from_tensors(to_tensors(w, "gemm"), Config(group_size=32))
      QTensor(64x64, 4 bits, group 32, Gemm(), (q - z) * s, float32 scale, 2.625 KiB)
    """
    check(tensors, config)
    version = _version(tensors, config)
    if version == "gemv_fast":
        return awq_v2.from_tensors(tensors, config.group_size)
    layout = Gemm() if version == "gemm" else Gemv()
    words, qzeros, scale = (
        jnp.asarray(tensors[name]) for name in ("qweight", "qzeros", "scales")
    )
    zero = _unpack(qzeros, reorder=version == "gemm")
    if version == "gemv":
        k = 8 * words.shape[1]
        groups = k // (config.group_size or k)
        scale, zero = (p[:, :groups].T for p in (scale, zero))
    check_finite({"scales": scale})
    if version == "gemv":
        awq_v2.check_padding(tensors["scales"].T, scale.shape[0])
    return tensor.build(
        (lax.bitcast_convert_type(words, jnp.uint32),),
        scale,
        zero,
        layout=layout,
        segments=(Segment(4, config.group_size),),
    )


@of_whole
def to_tensors(qt: QTensor, version: Version = "gemm") -> dict[str, Array]:
    """Writes one quantized matrix under AutoAWQ's names.

    Args:
      qt: Four bits, groups of inputs, with integer zeros or symmetric; for "gemv_fast"
        with scaled float zeros.
      version: The version to write; `Config.version` of the file.

    Returns:
      ``qweight``, ``qzeros`` and ``scales``.

    Raises:
      ValueError: If that version cannot hold ``qt``, with the reason; or there is none
        of that name.
    """
    check_choice("version", version, VERSIONS)
    if version == "gemv_fast":
        return awq_v2.to_tensors(qt)
    reason = refusal(qt, WIDTHS)
    symmetric = qt.affine is Affine.CENTERED and qt.zero is None
    if not (symmetric or (qt.zero is not None and qt.zero.dtype == jnp.uint8)):
        instead = "'gemv_fast' holds" if qt.affine is Affine.OFFSET else "requantize"
        reason = reason or f"{qt.affine.value} here has no integer zeros; {instead} it"
    reason = reason or lacks_narrow_zeros(qt)
    if qt.n % 8:
        reason = reason or f"n={qt.n} is no multiple of 8"
    if reason:
        raise ValueError(f"AWQ {version!r} cannot hold {qt!r}: {reason}.")
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    if zero is None:
        zero = jnp.full(scale.shape, 8, jnp.uint8)
    layout, reorder = (Gemm(), True) if version == "gemm" else (Gemv(), False)
    if version == "gemv":
        padding = 8 * zeros_width(qt.k, qt.segments[0].group_size) - scale.shape[0]
        scale, zero = (jnp.pad(p.T, ((0, 0), (0, padding))) for p in (scale, zero))
    return {
        "qweight": lax.bitcast_convert_type(layout.pack(tensor.codes(qt)), jnp.int32),
        "qzeros": pack(zero, reorder),
        "scales": scale,
    }
