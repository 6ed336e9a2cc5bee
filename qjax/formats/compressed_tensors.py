"""compressed-tensors "pack-quantized": a bit stream along each row of torch's weight.

``weight_packed[n, i]`` of four bits holds eight inputs of one output,

    bit 31                                                            bit 0
    | q[n, 8i+7] | q[n, 8i+6] | ...  | q[n, 8i+2] | q[n, 8i+1] | q[n, 8i] |

where the field ``q`` is the signed code plus ``2^(bits-1)``. Since release 0.18 every
width is a continuous stream, as `qjax.bits` has it (`Dense`). Before, a word held
``32 // bits`` whole fields, its upper bits unused (`Aligned`): for 1, 2, 4 and 8 bits
the same words, for 3, 5, 6 and 7 others, without a mark in the file. Fields beyond K
are 0. ``weight_zero_point`` holds the zero points in the same way along N,
``weight_shape`` is ``(N, K)``, and ``weight_g_idx``, which older writers had, the
group of each input; a -1 in it says that it is not used. The weight is
``(q - zero) * scale``, rounded once to the dtype of the scale.

Other formats than that are `qjax.formats.compressed_tensors_floats`.

Source: vllm-project/compressed-tensors, src/compressed_tensors/compressors/
pack_quantized and quantization/lifecycle/forward.py, release 0.20.0 (`Dense` since
commit 66e631f6); neuralmagic/compressed-tensors, src/compressed_tensors/compressors/
quantized_compressors/pack_quantized.py, commit
52792be02ec09e59f3517104e755a02d0e003fbb (`Aligned`, ``weight_g_idx``).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8, UInt32

from qjax import tensor
from qjax.bits import WORD, block, pack_fields, transpose, unpack_fields
from qjax.formats import compressed_tensors_floats as floats
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_shapes,
    check_tensors,
    check_words,
    lacks_even_groups,
    lacks_integer_zeros,
    lacks_plain_groups,
    lacks_plain_scales,
    lacks_whole_groups,
)
from qjax.formats.compressed_tensors_config import PACKED, STRATEGIES, Config
from qjax.formats.g_idx import in_input_order
from qjax.formats.gathering import of_whole
from qjax.tensor import Affine, QTensor, Segment

__all__ = [
    "TENSORS",
    "Aligned",
    "Config",
    "Dense",
    "check",
    "from_tensors",
    "to_tensors",
]

TENSORS = ("weight_shape", "weight_g_idx", *floats.TENSORS)


@dataclasses.dataclass(frozen=True)
class Dense(tensor.Layout):
    """One stream a row: words uint32 ``[n, ceil(k * bits / 32)]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "n words"]:
        """Packs ``[k, n]`` codes; fields beyond k are 0."""
        check_codes(codes)
        return transpose(pack_dense(codes, bits, axis=0), (1, 0))

    def unpack(
        self, words: Integer[Array, "n words"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks as many whole fields as the words have."""
        check_words(words, 2, jnp.int32, jnp.uint32)
        return unpack_dense(transpose(words, (1, 0)), bits, axis=0)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(words * 32 // bits, n)``."""
        return shape[1] * WORD // bits, shape[0]

    def cut(self, bits: int) -> tensor.Cut:
        """Cuts where a code begins a word, and between columns."""
        return tensor.Cut(k_axis=1, rows=block(bits)[0], n_axis=0, columns=1)

    def digits(self, bits: int) -> tensor.Digits | None:
        """Permutes those of codes that fill words evenly."""
        return tensor.Digits.of_stream("n", bits)


@dataclasses.dataclass(frozen=True)
class Aligned(tensor.Layout):
    """``32 // bits`` whole fields a word: words uint32 ``[n, ceil(k / that)]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "n words"]:
        """Packs ``[k, n]`` codes; fields beyond k and bits beyond the fields are 0."""
        check_codes(codes)
        return transpose(pack_aligned(codes, bits, axis=0), (1, 0))

    def unpack(
        self, words: Integer[Array, "n words"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks ``32 // bits`` fields a word."""
        check_words(words, 2, jnp.int32, jnp.uint32)
        return unpack_aligned(transpose(words, (1, 0)), bits, axis=0)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(words * (32 // bits), n)``."""
        return shape[1] * (WORD // bits), shape[0]

    def cut(self, bits: int) -> tensor.Cut:
        """Cuts between words, and between columns."""
        return tensor.Cut(k_axis=1, rows=WORD // bits, n_axis=0, columns=1)

    def digits(self, bits: int) -> tensor.Digits | None:
        """Permutes those of codes that fill words evenly."""
        return tensor.Digits.of_stream("n", bits)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack_dense(
    codes: Integer[Array, "a b"], bits: int, axis: int
) -> UInt32[Array, "c d"]:
    """Packs codes into a stream along ``axis`` (0 or 1) that ends within a word."""
    length, words = codes.shape[axis], _dense_words(codes.shape[axis], bits)
    whole = pack_fields(_pad(codes, -length % block(bits)[0], axis), bits, axis)
    return jax.lax.slice_in_dim(whole, 0, words, axis=axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def unpack_dense(
    words: Integer[Array, "c d"], bits: int, axis: int
) -> UInt8[Array, "a b"]:
    """Inverse of `pack_dense`, with all whole fields of the words."""
    length = words.shape[axis]
    codes = unpack_fields(_pad(words, -length % block(bits)[1], axis), bits, axis)
    return jax.lax.slice_in_dim(codes, 0, length * WORD // bits, axis=axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack_aligned(
    codes: Integer[Array, "a b"], bits: int, axis: int
) -> UInt32[Array, "c d"]:
    """Packs codes along ``axis`` (0 or 1), ``32 // bits`` a word from bit 0 up."""
    block(bits)  # refuses other widths
    per_word = WORD // bits
    wide = jnp.moveaxis(codes, axis, -1).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    whole = _pad(wide, -wide.shape[1] % per_word, 1)
    fields = whole.reshape(whole.shape[0], -1, per_word)
    shifts = jnp.arange(per_word, dtype=jnp.uint32) * jnp.uint32(bits)
    words = (fields << shifts[None, None]).sum(-1, dtype=jnp.uint32)
    return jnp.moveaxis(words, -1, axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def unpack_aligned(
    words: Integer[Array, "c d"], bits: int, axis: int
) -> UInt8[Array, "a b"]:
    """Inverse of `pack_aligned`, with the fields of padding."""
    block(bits)  # refuses other widths
    last = jnp.moveaxis(jax.lax.bitcast_convert_type(words, jnp.uint32), axis, -1)
    shifts = jnp.arange(WORD // bits, dtype=jnp.uint32) * jnp.uint32(bits)
    fields = last[..., None] >> shifts[None, None] & jnp.uint32(2**bits - 1)
    codes = fields.astype(jnp.uint8).reshape(last.shape[0], -1)
    return jnp.moveaxis(codes, -1, axis)


def _pad(x: Array, count: int, axis: int) -> Array:
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(2)])


def _dense_words(length: int, bits: int) -> int:
    return -(-length * bits // WORD)


def _aligned_words(length: int, bits: int) -> int:
    return -(-length // (WORD // bits))


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight_packed`` int32 ``[N, words]``, ``weight_scale`` float
        ``[N, K / group]``, ``[N, 1]`` or ``[1]`` by strategy, ``weight_shape`` int64 or
        int32 ``[2]``; for asymmetric weights ``weight_zero_point`` int32
        ``[words, K / group]`` (int8 ``[1]`` with one in all); optionally
        ``weight_g_idx`` int32 ``[K]``. Of other formats than "pack-quantized" those
        that `compressed_tensors_floats.check` lists.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, or the field of ``config``, what it has and what it
        should have.
    """
    if config.format != PACKED:
        floats.check(tensors, config)
        return
    check_choice("strategy", config.strategy, STRATEGIES[:3])
    block(config.bits)  # refuses other widths
    if (config.strategy == "group") != (config.group_size is not None):
        raise ValueError(
            f"group_size={config.group_size} must be given with strategy 'group' and "
            f"only with it; found {config.strategy!r}."
        )
    whole, grouped = config.strategy == "tensor", config.strategy == "group"
    expected = {
        "weight_packed": Expected((jnp.int32,), 2),
        "weight_scale": Expected(FLOATS, 1 if whole else 2),
        "weight_shape": Expected((np.int64, np.int32), 1),
    }
    if not config.symmetric:
        zeros = Expected((jnp.int8,), 1) if whole else Expected((jnp.int32,), 2)
        expected["weight_zero_point"] = zeros
    if grouped:
        optional = not config.act_order
        expected["weight_g_idx"] = Expected((jnp.int32,), 1, optional=optional)
    check_tensors(tensors, expected, f"{config}")
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    if not all(shapes["weight_packed"]):
        raise ValueError(
            f"weight_packed.shape={shapes['weight_packed']} must not be empty."
        )
    n = shapes["weight_packed"][0]
    groups = shapes["weight_scale"][1] if grouped else 1
    k = groups * (config.group_size or 1)
    wanted = (1,) if whole else (n, groups)
    fixed = {"weight_scale": wanted, "weight_shape": (2,), "weight_g_idx": (k,)}
    check_shapes(tensors, fixed, f"weight_packed.shape={shapes['weight_packed']}")
    if grouped:
        _require_words(shapes["weight_packed"], k, config)
    if "weight_zero_point" in shapes:
        words = (_dense_words(n, config.bits), _aligned_words(n, config.bits))
        allowed = [(1,)] if whole else [(count, groups) for count in words]
        _require("weight_zero_point.shape", shapes["weight_zero_point"], allowed)


def _require(name: str, found: Any, allowed: Iterable[Any]) -> None:
    allowed = list(dict.fromkeys(allowed))
    if found not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ValueError(f"{name}={found} must be {wanted}.")


def _require_words(shape: tuple[int, ...], k: int, config: Config) -> None:
    words = (_dense_words(k, config.bits), _aligned_words(k, config.bits))
    _require(
        f"weight_packed.shape of K={k}, {config.bits} bits",
        shape,
        [(shape[0], count) for count in words],
    )


def _layout(
    words: tuple[int, ...], zeros: tuple[int, ...] | None, k: int, config: Config
) -> tensor.Layout:
    """Tells the two generations apart, by the shapes and else by the writer."""
    pairs = [(words[1], k)] if zeros is None else [(words[1], k), (zeros[0], words[0])]
    dense = all(_dense_words(length, config.bits) == count for count, length in pairs)
    aligned = all(
        _aligned_words(length, config.bits) == count for count, length in pairs
    )
    if not dense and not aligned:
        raise ValueError(
            f"weight_packed.shape={words} and weight_zero_point.shape={zeros} are of "
            f"two generations of {config.bits}-bit packing."
        )
    # Where a word has no bits to spare both are the same words.
    if dense and (not aligned or WORD % config.bits == 0 or not config.aligned):
        return Dense()
    return Aligned()


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; uint8 zeros, or none if symmetric;
      ``row_group`` holds a ``weight_g_idx`` that is used and not simply in order.

    Raises:
      ValueError: As `check`; or if ``weight_shape`` is another, a scale is not finite,
        or ``weight_g_idx`` does not give every group its ``group_size`` inputs.
    """
    if config.format != PACKED:
        return floats.from_tensors(tensors, config)
    check(tensors, config)
    packed, scale = tensors["weight_packed"], np.asarray(tensors["weight_scale"])
    n, k = (int(size) for size in np.asarray(tensors["weight_shape"]))
    if n != packed.shape[0] or k < 1 or k % (config.group_size or k):
        raise ValueError(
            f"weight_shape={(n, k)} must be (N, K) with N={packed.shape[0]} and K a "
            f"positive multiple of group_size={config.group_size}."
        )
    _require_words(tuple(packed.shape), k, config)
    groups = k // (config.group_size or k)
    if config.strategy == "group":
        _require("weight_scale.shape", scale.shape, [(n, groups)])
    check_finite(tensors, ["weight_scale"])
    points = tensors.get("weight_zero_point")
    packed_points = None if points is None or points.ndim == 1 else points
    shape = None if packed_points is None else tuple(packed_points.shape)
    layout = _layout(tuple(packed.shape), shape, k, config)
    padding = layout.extents(packed.shape, config.bits)[0] - k
    zero = None if points is None else _read_zeros(points, n, config.bits, layout)
    return tensor.build(
        (jnp.asarray(np.asarray(packed).view(np.uint32)),),
        jnp.asarray(scale.reshape(-1, groups).T),
        zero,
        layout=layout,
        segments=(Segment(config.bits, config.group_size, padding),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
        row_group=_row_group(tensors.get("weight_g_idx"), groups, config),
    )


def _read_zeros(
    points: Any, n: int, bits: int, layout: tensor.Layout
) -> UInt8[Array, "groups n"]:
    if points.ndim == 1:  # one in all, which is not packed
        value = np.asarray(points).astype(np.int16) + 2 ** (bits - 1)
        if value.min() < 0 or value.max() >= 2**bits:
            raise ValueError(
                f"weight_zero_point={int(points[0])} does not fit {bits} bits."
            )
        return jnp.asarray(value.astype(np.uint8)[None])
    unpack = unpack_aligned if layout == Aligned() else unpack_dense
    zeros = unpack(jnp.asarray(points), bits, axis=0).T
    return zeros[:, :n]


def _row_group(g_idx: Any, groups: int, config: Config) -> Array | None:
    """The group of each row, or None where it is simply ``row // group_size``."""
    if g_idx is None or (np.asarray(g_idx) == -1).any():
        return None
    index, size = np.asarray(g_idx), config.group_size or 1
    in_range = index.min() >= 0 and index.max() < groups
    if not in_range or (np.bincount(index, minlength=groups) != size).any():
        raise ValueError(
            f"weight_g_idx from {index.min()} to {index.max()} must give each of "
            f"{groups} groups {size} inputs, or be -1."
        )
    in_order = (index == np.arange(index.size) // size).all()
    return None if in_order else jnp.asarray(index)


@of_whole
def to_tensors(qt: QTensor, layout: tensor.Layout | None = None) -> dict[str, Any]:
    """Writes one quantized matrix under the upstream's names.

    A ``weight_g_idx`` is written only where rows are not in the order of their groups;
    releases from 0.20 on do not read it.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows; or
        one of small floats.
      layout: `Dense` or `Aligned`. None keeps that of ``qt``, and takes `Dense` for
        others.

    Returns:
      ``weight_packed``, ``weight_scale``, ``weight_shape`` (NumPy's int64), and where
      they are needed ``weight_zero_point`` and ``weight_g_idx``; of small floats what
      `compressed_tensors_floats.to_tensors` says.

    Raises:
      ValueError: If compressed-tensors cannot hold ``qt``, with the reason; or
        ``layout`` is another.
    """
    if layout is None:
        layout = qt.layout if qt.layout == Aligned() else Dense()
    if layout not in (Dense(), Aligned()):
        raise ValueError(f"layout={layout!r} must be Dense() or Aligned().")
    if qt.affine is Affine.FLOAT:
        return floats.to_tensors(qt)
    _check_holdable(qt)
    return _write(qt, layout) | {"weight_shape": np.array([qt.n, qt.k], np.int64)}


@functools.partial(jax.jit, static_argnums=1)
def _write(qt: QTensor, layout: tensor.Layout) -> dict[str, Array]:
    """Everything but ``weight_shape``, which JAX cannot hold in 64 bits."""
    (bits, size, _), scale = qt.segments[0], tensor.plain(qt.scale)
    q, g_idx = in_input_order(qt)
    whole = scale.shape == (1, 1) and qt.n > 1
    tensors = {
        "weight_packed": jax.lax.bitcast_convert_type(layout.pack(q, bits), jnp.int32),
        "weight_scale": scale[0] if whole else scale.T,
    }
    if qt.zero is not None:
        zero = tensor.plain(qt.zero)
        pack = pack_aligned if layout == Aligned() else pack_dense
        tensors["weight_zero_point"] = (
            (zero[0].astype(jnp.int16) - 2 ** (bits - 1)).astype(jnp.int8)
            if whole
            else jax.lax.bitcast_convert_type(pack(zero.T, bits, axis=0), jnp.int32)
        )
    if qt.row_group is not None or (qt.order is not None and size is not None):
        tensors["weight_g_idx"] = g_idx
    return tensors


def _check_holdable(qt: QTensor) -> None:
    """Says why compressed-tensors cannot hold the tensor, if it cannot."""
    reason = (
        lacks_plain_groups(qt, range(1, 9))
        or lacks_integer_zeros(qt)
        or lacks_even_groups(qt)
        or lacks_whole_groups(qt)
        or lacks_plain_scales(qt)
    )
    if reason:
        raise ValueError(f"compressed-tensors cannot hold {qt!r}: {reason}.")
