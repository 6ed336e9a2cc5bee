"""tinygemm int4: PyTorch's tiles for the tensor core, bfloat16 scales and zeros.

A word of ``packed[n // 8, k // (16 * I), lane, j]`` holds eight codes of one row ``n``
of torch's ``[N, K]`` weight, ``n % 8 == lane // 4``. With
``k0 = 16 * I * (k // (16 * I)) + 32 * j + 2 * (lane % 4)`` they are the inputs

    bit 31                                                                     bit 0
    | k0+25 | k0+17 | k0+9 | k0+1 | k0+24 | k0+16 | k0+8 | k0 |

so that even inputs lie in the low half of the word and odd ones in the high half.
``I`` is ``inner_k_tiles``: 2, 4 or 8. Rows that N lacks to a multiple of 8 are packed
as zeros. ``scales_and_zeros`` is bfloat16 ``[K / group, N, 2]``. The weight is
``(q - 8) * scale + zero``, which the CUDA kernels compute by one fused multiply-add and
so round once, and torchao's Python rounds twice; `QTensor.rounding` chooses.

A packed tensor carries no mark of its kind: AMD GPUs store another order of the same
words in a tensor of the same shape, and the CPU operator three others
(`qjax.formats.tinygemm_cpu`).

Source: pytorch/pytorch, aten/src/ATen/native/cuda/int4mm.cu, commit
05f814fecfca7d2a17f28cbe7e1cb2d8d4c13230; pytorch/ao,
torchao/csrc/cuda/tensor_core_tiled_layout/tensor_core_tiled_layout.cu, commit
8940de9ce01345e44bdc063ebf7a0b2c5405a70d.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32, Integer, UInt8, UInt32

from qjax import decode, tensor
from qjax.bits import pack_fields, unpack_fields
from qjax.formats.checks import (
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_tensors,
    check_width,
    check_words,
    lacks_input_order,
    lacks_own_columns,
    lacks_plain_groups,
)
from qjax.formats.gathering import of_whole
from qjax.formats.tinygemm_config import GROUP_SIZES, Config
from qjax.tensor import Affine, QTensor, Segment

__all__ = ["GROUP_SIZES", "INNER_K_TILES", "TENSORS", "Config", "TensorCoreTiled"]
__all__ += ["check", "convert_weight_to_int4pack", "from_tensors"]
__all__ += ["dequantize_tensor_core_tiled_layout", "pack_scales_and_zeros"]
__all__ += ["to_tensors", "unpack_tensor_core_tiled_layout"]

INNER_K_TILES = (2, 4, 8)
TENSORS = ("_weight_qdata", "_weight_scale_and_zero")
_EXPECTED = {
    "_weight_qdata": Expected((jnp.int32, jnp.uint32), 4),
    "_weight_scale_and_zero": Expected((jnp.bfloat16,), 3),
}
# torchao pads k with zeros to this. Quantized, they have these scales and zeros.
_K_UNIT = 1024
_PAD_SCALE, _PAD_ZERO = 2.0**-126, 2.0**-123


@dataclasses.dataclass(frozen=True)
class TensorCoreTiled(tensor.Layout):
    """Tiles for ``mma.m16n8k16``: uint32 ``[n / 8, k / (16 * I), 32, I / 2]``.

    Attributes:
      inner_k_tiles: The ``I`` of the shape: 16-wide tiles of k that lie together.
    """

    rank = 4
    inner_k_tiles: int = 8

    def pack(
        self, codes: Integer[Array, "k n"], bits: int
    ) -> UInt32[Array, "n8 kt 32 half"]:
        """Packs ``[k, n]`` codes; k must be whole tiles, n is padded with zeros."""
        self.check(bits)
        check_codes(codes)
        k, tile = codes.shape[0], 16 * self.inner_k_tiles
        if not k or k % tile:
            raise ValueError(
                f"codes.shape[0]={k} must be a positive multiple of {tile} for "
                f"{self.inner_k_tiles} inner k tiles; pad codes, or take fewer tiles."
            )
        return _pack(codes, self.inner_k_tiles)

    def unpack(
        self, words: Integer[Array, "n8 kt 32 half"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks words; n is a multiple of 8, padding included."""
        self.check(bits)
        check_words(words, self.rank, jnp.int32, jnp.uint32)
        if words.shape[2:] != (32, self.inner_k_tiles // 2):
            raise ValueError(
                f"words.shape={words.shape} must be [n / 8, k / "
                f"{16 * self.inner_k_tiles}, 32, {self.inner_k_tiles // 2}] for "
                f"{self.inner_k_tiles} inner k tiles."
            )
        return _unpack(words)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, n)``, n rounded up to whole tiles."""
        del bits
        return shape[1] * 32 * shape[3], shape[0] * 8

    def cut(self, bits: int) -> tensor.Cut:
        """Cuts between whole tiles."""
        del bits
        rows = 16 * self.inner_k_tiles
        return tensor.Cut(k_axis=1, rows=rows, n_axis=0, columns=8)

    def digits(self, bits: int) -> tensor.Digits:
        """Permutes those of 8 columns and ``16 * inner_k_tiles`` rows."""
        del bits
        tiles = {2: "", 4: "k5", 8: "k6 k5"}[self.inner_k_tiles]
        return tensor.Digits("n", fields="k0 k4 k3", run=f"n2 n1 n0 k2 k1 {tiles}")

    def check(self, bits: int) -> None:
        """Refuses widths and tilings that tinygemm does not have."""
        check_width(bits, (4,), "tinygemm")
        check_choice("inner_k_tiles", self.inner_k_tiles, INNER_K_TILES)


@functools.partial(jax.jit, static_argnums=1)
def _pack(codes: Array, inner_k_tiles: int) -> Array:
    k, n = codes.shape
    whole = jnp.pad(codes, ((0, 0), (0, -n % 8)))
    # k is (tiles of I, pair of 16-wide tiles, tile of the pair, half of 8, pair of
    # inputs, parity); n is (tile, row). A field is 4 * parity + 2 * tile + half.
    parts = whole.reshape(-1, inner_k_tiles // 2, 2, 2, 4, 2, whole.shape[1] // 8, 8)
    fields = parts.transpose(6, 0, 7, 4, 1, 5, 2, 3)
    shape = (whole.shape[1] // 8, k // (16 * inner_k_tiles), 32, inner_k_tiles // 2, 8)
    return pack_fields(fields.reshape(shape), 4, axis=-1)[..., 0]


@jax.jit
def _unpack(words: Array) -> Array:
    tiles, blocks, _, half = words.shape
    fields = unpack_fields(words[..., None], 4, axis=-1)
    parts = fields.reshape(tiles, blocks, 8, 4, half, 2, 2, 2)
    return parts.transpose(1, 4, 6, 7, 3, 5, 0, 2).reshape(-1, tiles * 8)


@functools.partial(jax.jit, static_argnames="inner_k_tiles")
def convert_weight_to_int4pack(
    weight: Integer[Array, "n columns"], inner_k_tiles: int
) -> Int32[Array, "n8 kt 32 half"]:
    """Packs a torch weight as ``torch._convert_weight_to_int4pack`` does on CUDA.

    Args:
      weight: uint8 ``[N, K / 2]``, the code of the even input in the HIGH nibble (torch
        2.5 and later), or int32 ``[N, K]``, one code an element (before).
      inner_k_tiles: 2, 4 or 8.

    Returns:
      int32 ``[ceil(N / 8), K / (16 * inner_k_tiles), 32, inner_k_tiles / 2]``.

    Raises:
      ValueError: If the dtype is another, or K is not whole tiles.
    """
    if weight.dtype == jnp.uint8:
        nibbles = jnp.stack([weight >> 4, weight & 15], axis=-1)
        weight = nibbles.reshape(weight.shape[0], -1)
    elif weight.dtype != jnp.int32:
        raise ValueError(
            f"weight.dtype={weight.dtype} must be uint8 (two codes) or int32 (one)."
        )
    words = TensorCoreTiled(inner_k_tiles).pack(weight.T, 4)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


@functools.partial(jax.jit, static_argnames="inner_k_tiles")
def unpack_tensor_core_tiled_layout(
    packed: Integer[Array, "n8 kt 32 half"], inner_k_tiles: int
) -> Int32[Array, "n k"]:
    """Unpacks codes as ``torchao.ops.unpack_tensor_core_tiled_layout`` does.

    Args:
      packed: int32 ``[N / 8, K / (16 * inner_k_tiles), 32, inner_k_tiles / 2]``.
      inner_k_tiles: 2, 4 or 8.

    Returns:
      int32 ``[N, K]`` codes from 0 to 15, in torch's orientation.

    Raises:
      ValueError: If dtype or shape are not those.

    Example:
      >>> codes = jnp.arange(8 * 32, dtype=jnp.int32).reshape(8, 32) % 16
      >>> packed = convert_weight_to_int4pack(codes, 2)
      >>> packed.shape, hex(np.asarray(packed).view(np.uint32)[0, 0, 0, 0])
      ((1, 1, 32, 1), '0x91918080')
      >>> bool((unpack_tensor_core_tiled_layout(packed, 2) == codes).all())
      True
    """
    return TensorCoreTiled(inner_k_tiles).unpack(packed, 4).T.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("group_size", "inner_k_tiles", "rounding"))
def dequantize_tensor_core_tiled_layout(
    packed: Integer[Array, "n8 kt 32 half"],
    scales_and_zeros: BFloat16[Array, "groups n 2"],
    group_size: int,
    inner_k_tiles: int,
    *,
    rounding: int = 1,
) -> BFloat16[Array, "n k"]:
    """Dequantizes as ``torchao.ops.dequantize_tensor_core_tiled_layout`` does.

    Args:
      packed: As in `unpack_tensor_core_tiled_layout`.
      scales_and_zeros: bfloat16 ``[K / group_size, N, 2]``.
      group_size: 32, 64, 128 or 256.
      inner_k_tiles: 2, 4 or 8.
      rounding: 1 for the CUDA kernel's fused multiply-add, 2 for torchao's reference in
        Python, which rounds the product before it adds the zero.

    Returns:
      bfloat16 ``[N, K]``, in torch's orientation.

    Raises:
      ValueError: If the tensors do not fit together.
    """
    tensors = {"_weight_qdata": packed, "_weight_scale_and_zero": scales_and_zeros}
    config = Config(group_size=group_size, inner_k_tiles=inner_k_tiles)
    check(tensors, config)
    qt = _assemble(packed, scales_and_zeros, config)
    return decode.dequantize(dataclasses.replace(qt, rounding=rounding)).T


@jax.jit
def pack_scales_and_zeros(
    scale: BFloat16[Array, "n groups"], zero: BFloat16[Array, "n groups"]
) -> BFloat16[Array, "groups n 2"]:
    """Joins scales and zeros as torchao's ``pack_tinygemm_scales_and_zeros`` does."""
    return jnp.stack([scale.T, zero.T], axis=-1)


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one weight's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``: ``_weight_qdata`` int32
        ``[ceil(N / 8), K / (16 * I), 32, I / 2]`` and ``_weight_scale_and_zero``
        bfloat16 ``[K / group, 8 * ceil(N / 8), 2]``.
      config: The weight's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_tensors(tensors, _EXPECTED, "tinygemm")
    layout = TensorCoreTiled(config.inner_k_tiles)
    words, parameters = (tensors[name] for name in TENSORS)
    check_choice("group_size", config.group_size, GROUP_SIZES)
    if not all(words.shape):
        raise ValueError(f"{TENSORS[0]}.shape={tuple(words.shape)} must not be empty.")
    matrix = jax.ShapeDtypeStruct(words.shape, words.dtype)
    jax.eval_shape(functools.partial(layout.unpack, bits=4), matrix)
    k, n = layout.extents(words.shape, 4)
    wanted = (k // config.group_size, n, 2)
    if k % config.group_size or tuple(parameters.shape) != wanted:
        raise ValueError(
            f"{TENSORS[1]}.shape={tuple(parameters.shape)} must be {wanted}, from "
            f"{TENSORS[0]}.shape={tuple(words.shape)} and "
            f"group_size={config.group_size}."
        )
    rows, columns = config.shape or (n, k)
    if not (n - 8 < rows <= n and k - _K_UNIT < columns <= k):
        raise ValueError(
            f"shape={config.shape} does not fit the padded ({n}, {k}) of "
            f"{TENSORS[0]}.shape={tuple(words.shape)}."
        )


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by name, as `check` lists them.
      config: The weight's configuration.

    Returns:
      ``[k, n]`` tensor, without the padding that ``config.shape`` tells of.

    Raises:
      ValueError: As `check`; or if a scale or zero is not finite.
    """
    check(tensors, config)
    check_finite(tensors, TENSORS[1:])
    words, parameters = (jnp.asarray(tensors[name]) for name in TENSORS)
    return _assemble(words, parameters, config)


@functools.partial(jax.jit, static_argnums=2)
def _assemble(words: Array, parameters: Array, config: Config) -> QTensor:
    layout = TensorCoreTiled(config.inner_k_tiles)
    k, n = layout.extents(words.shape, 4)
    rows, columns = config.shape or (n, k)
    parameters = parameters[: -(-columns // config.group_size), :rows]
    return tensor.build(
        (jax.lax.bitcast_convert_type(words, jnp.uint32),),
        parameters[..., 0],
        parameters[..., 1],
        layout=layout,
        segments=(Segment(4, config.group_size, padding=k - columns),),
        affine=Affine.CENTERED,
        padding=n - rows,
    )


@of_whole
def to_tensors(
    qt: QTensor, inner_k_tiles: int = 8, *, pad_k: bool = False
) -> dict[str, Array]:
    """Writes one quantized matrix under torchao's names.

    Args:
      qt: A 4-bit matrix with bfloat16 scales, zeros that are added (or symmetric), and
        groups of 32, 64, 128 or 256 rows.
      inner_k_tiles: 2, 4 or 8; torchao itself takes 8.
      pad_k: Whether to pad k to a multiple of 1024, as torchao does, with codes that
        dequantize to 0. False needs k in whole tiles. n is padded to 8 in any case.

    Returns:
      ``_weight_qdata`` and ``_weight_scale_and_zero``.

    Raises:
      ValueError: If tinygemm cannot hold ``qt``, with the reason.
    """
    layout = TensorCoreTiled(inner_k_tiles)
    layout.check(4)
    unit = _K_UNIT if pad_k else 16 * inner_k_tiles
    _check_holdable(qt, 1 if pad_k else unit)
    return _write(qt, layout, unit)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _write(qt: QTensor, layout: TensorCoreTiled, unit: int) -> dict[str, Array]:
    """Pads k to whole units and n to whole tiles, and packs."""
    scale = tensor.plain(qt.scale)
    zero = jnp.zeros_like(scale) if qt.zero is None else tensor.plain(qt.zero)
    rows, columns = -qt.k % unit, -qt.n % 8
    codes = jnp.pad(tensor.codes(qt), ((0, rows), (0, columns)))
    size = qt.segments[0].group_size or qt.k
    groups = (0, (qt.k + rows) // size - scale.shape[0])
    pad = functools.partial(jnp.pad, pad_width=(groups, (0, columns)))
    parameters = [
        pad(scale, constant_values=_PAD_SCALE),
        pad(zero, constant_values=_PAD_ZERO),
    ]
    words = layout.pack(codes, 4)
    return {
        "_weight_qdata": jax.lax.bitcast_convert_type(words, jnp.int32),
        "_weight_scale_and_zero": jnp.stack(parameters, axis=-1),
    }


def _check_holdable(qt: QTensor, unit: int) -> None:
    reason = (
        lacks_plain_groups(qt, (4,)) or lacks_input_order(qt) or lacks_own_columns(qt)
    )
    size = qt.segments[0].group_size
    if reason:
        pass
    elif qt.affine is not Affine.CENTERED:
        reason = f"{qt.affine.value} is not (q - 8) * s + z in bfloat16; requantize it"
    elif size not in GROUP_SIZES or qt.k % size:
        reason = f"group size {size} is not one of {GROUP_SIZES} that divides k={qt.k}"
    elif qt.dtype != jnp.bfloat16 or (
        qt.zero is not None and qt.zero.dtype != qt.dtype
    ):
        reason = "scales and zeros must be bfloat16; casting them would lose bits"
    elif qt.k % unit:
        reason = f"k={qt.k} is not a multiple of {unit}; pass pad_k=True"
    if reason:
        raise ValueError(f"tinygemm cannot hold {qt!r}: {reason}.")
