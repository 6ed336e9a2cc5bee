"""FP8: a byte a weight, an E4M3 float, with a scale for each block of the matrix.

``weight[n, k]`` of torch's orientation is ``float8_e4m3fn``; a code is its pattern, as
`qjax.tensor.floats` draws it. ``weight_scale_inv[i, j]``, which multiplies in spite of
its name, belongs to the block of 128 outputs and 128 inputs at ``(128 i, 128 j)``; the
last blocks may be cut short. It is float32, bfloat16 or an E8M0 exponent. Where the
configuration has no blocks, ``weight_scale`` is one number, or one an output, as
fbgemm has it. So DeepSeek-V3, Qwen3-FP8, Llama-3.1-405B-FP8 and many others are
published. A static ``input_scale``, or its bound, is for activations in eight bits:
here they are not quantized, and it is read over.

The weight is ``float(q) * scale`` in float32, rounded once: to the dtype of the scale,
where that has 16 bits, and else to bfloat16.

Source: huggingface/transformers, src/transformers/integrations/finegrained_fp8.py,
fbgemm_fp8.py and utils/quantization_config.py, release 5.23.0; deepseek-ai/DeepSeek-V3,
inference/kernel.py and README_WEIGHTS.md, commit
f6e34dd26772dd4a216be94a8899276c5dca9e43.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Integer, UInt8

from qjax import tensor
from qjax.bits import transpose_codes
from qjax.formats.block_scale import MOST, BlockScale, block_size
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_codes,
    check_finite,
    check_shapes_among,
    check_tensors,
    check_weight,
    check_width,
    check_words,
    lacks_input_order,
    lacks_plain_groups,
)
from qjax.formats.fp8_config import SCALES, Config
from qjax.formats.gathering import of_whole
from qjax.formats.mxfp4 import E8M0
from qjax.tensor import Affine, Cut, Digits, Encoded, Layout, QTensor, Segment

__all__ = [
    "TENSORS",
    "Bytes",
    "Config",
    "axes",
    "check",
    "config_of",
    "from_tensors",
    "quantize",
    "to_tensors",
]

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = tensor.SMALL_FLOATS[8].largest
# Of the pattern, without its sign: all ones is not a number.
_NAN = 127
# How E8M0 numbers may be stored; as uint8 only where the configuration says so.
_EXPONENTS = (jnp.float8_e8m0fnu, jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Bytes(Layout):
    """One byte a code, in torch's orientation: words uint8 ``[n, k]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt8[Array, "n k"]:
        """Packs ``[k, n]`` codes of 8 bits."""
        check_width(bits, (8,), "fp8.Bytes")
        check_codes(codes)
        return transpose_codes(codes)

    def unpack(self, words: UInt8[Array, "n k"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks the bytes."""
        check_width(bits, (8,), "fp8.Bytes")
        check_words(words, 2, jnp.uint8)
        return transpose_codes(words)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, n)``."""
        check_width(bits, (8,), "fp8.Bytes")
        return shape[1], shape[0]

    def cut(self, bits: int) -> Cut:
        """Cuts anywhere."""
        del bits
        return Cut(k_axis=1, rows=1, n_axis=0, columns=1)

    def digits(self, bits: int) -> Digits:
        """Permutes nothing within a row."""
        del bits
        return Digits("n", fields="", width=8)


_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub")
TENSORS = ("weight", *SCALES, *_OF_ACTIVATIONS)


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one matrix, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` float8_e4m3fn ``[n, k]``; ``weight_scale_inv`` or ``weight_scale``, a
        float or E8M0 ``[ceil(n / rows), ceil(k / columns)]``, or without blocks
        ``[n]``, ``[n, 1]``, ``[]``, ``[1]`` or ``[1, 1]``, where E8M0 may be uint8 if
        ``scale_fmt`` says "ue8m0"; and optionally ``input_scale``,
        ``activation_scale`` or ``input_scale_ub``.
      config: The configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    name = scale_name(tensors)
    others = {key: Expected(FLOATS, None, optional=True) for key in _OF_ACTIVATIONS}
    exponents = _EXPONENTS if config.scale_fmt == "ue8m0" else _EXPONENTS[:1]
    scales = Expected((*FLOATS, *exponents), None)
    expected = {"weight": Expected((E4M3,), 2), name: scales} | others
    check_tensors(tensors, expected, "FP8")
    n, k = shape = tuple(tensors["weight"].shape)
    if not n or not k:
        raise ValueError(f"weight.shape={shape} must be [n, k], not empty.")
    allowed = [(n,), (n, 1)]
    if not config.columns:
        allowed = [(), (1,), (1, 1), *allowed]
    if config.block_size is not None:
        rows, columns = block_size("block_size", config.block_size)
        allowed = [(-(-n // rows), -(-k // columns))]
    shapes = {name: allowed} | {key: [(), (1,)] for key in _OF_ACTIVATIONS}
    source = f"weight.shape={shape} and weight_block_size={config.block_size}"
    check_shapes_among(tensors, shapes, source)


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    The same share of each is a matrix by itself, unless a block is cut short. Blocks
    themselves are not cut.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      "n" and "k" for the axes of each tensor, by upstream name; nothing where blocks
      are cut short, or there is only one along an axis.
    """
    shape, sizes = tuple(tensors["weight"].shape), config.block_size
    if sizes is not None and any(
        length % size or length == size
        for length, size in zip(shape, sizes, strict=True)
    ):
        return {}
    return {name: ("n", "k")[: len(array.shape)] for name, array in tensors.items()}


def scale_name(tensors: Mapping[str, Any]) -> str:
    """Returns which of the two names of scales a matrix has.

    Raises:
      ValueError: If it has both, or none.
    """
    found = [name for name in SCALES if name in tensors]
    if len(found) != 1:
        raise ValueError(f"there must be one of {SCALES}; found {sorted(tensors)}.")
    return found[0]


def from_tensors(tensors: Mapping[str, Any], config: Config | None = None) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The configuration; None has blocks of 128 x 128.

    Returns:
      ``[k, n]`` tensor in the layout `Bytes`; scales of blocks are a `BlockScale`.

    Raises:
      ValueError: As `check`; or if a weight is not a number, or a scale not finite.

    Example:
      >>> tensors = {
      ...     "weight": np.ones((256, 384), jnp.float8_e4m3fn),
      ...     "weight_scale_inv": np.full((2, 3), 0.5, np.float32),
      ... }
      >>> w = from_tensors(tensors)
      >>> w
      QTensor(384x256, 8 bits, group 128, Bytes(), float(q) * s, float32 scale, ...)
      >>> w.scale.values.shape, qjax.dequantize(w)[0, 0]
      ((3, 2), Array(0.5, dtype=bfloat16))
    """
    config = config or Config()
    check(tensors, config)
    name = scale_name(tensors)
    codes, scale = patterns_of("weight", tensors["weight"]), np.asarray(tensors[name])
    exponents = scale.dtype in _EXPONENTS
    if exponents:
        scale = exponents_of(name, scale)
    else:
        check_finite(tensors, [name])
    values = jnp.asarray(scale.reshape(-1, scale.shape[-1] if scale.ndim == 2 else 1).T)
    return _build(jnp.asarray(codes), values, config.block_size, exponents=exponents)


def patterns_of(name: str, weight: Any) -> UInt8[np.ndarray, "... n k"]:
    """Takes float8_e4m3fn numbers for their patterns.

    Args:
      name: What they are called, for the message.
      weight: The numbers.

    Raises:
      ValueError: If one is not a number.
    """
    patterns = np.asarray(weight).view(np.uint8)
    # A row at a time: masks of a whole matrix would take as much memory as it does.
    if any(((row & _NAN) == _NAN).any() for row in patterns):
        raise ValueError(f"{name} must be finite; found NaN.")
    return patterns


def exponents_of(name: str, scale: Any) -> UInt8[np.ndarray, "..."]:
    """Takes E8M0 numbers for their exponents.

    Args:
      name: What they are called, for the message.
      scale: The numbers, as uint8 or float8_e8m0fnu.

    Raises:
      ValueError: If one is 255, which is not a number.
    """
    exponents = np.asarray(scale).view(np.uint8)
    if (exponents == 255).any():
        raise ValueError(f"{name} holds 255, which is not a number.")
    return exponents


def _build(
    words: Array,
    values: Array,
    size: tuple[int, int] | None,
    *,
    exponents: bool = False,
) -> QTensor:
    n, k = words.shape
    is_float32 = values.dtype == jnp.float32
    scale: Array | Encoded = values
    if size is not None:
        scale = BlockScale.of(values, n=n, size=size, exponents=exponents)
    elif exponents:
        scale = E8M0(exponent=values)
    return tensor.build(
        (words,),
        scale,
        layout=Bytes(),
        # No group is larger than the matrix: its rows are repeated as often.
        segments=(Segment(8, size and min(size[1], k)),),
        affine=Affine.FLOAT,
        weight_dtype="bfloat16" if is_float32 else None,
    )


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of E4M3 codes. `qjax.prepare` gives each column its scales: of such a
        matrix, blocks are of one output.

    Returns:
      ``weight``, and ``weight_scale_inv``, or, of a scale for each output, which only
      fbgemm's files have, ``weight_scale``; exponents as float8_e8m0fnu.

    Raises:
      ValueError: If such a file cannot hold ``qt``, with the reason.
    """
    if reason := lacks_patterns(qt):
        raise ValueError(f"FP8 cannot hold {qt!r}: {reason}.")
    weight = Bytes().pack(tensor.codes(qt), 8)
    scale = _stored(qt.scale).T
    name, size = SCALES[0], qt.segments[0].group_size
    if size is None and scale.size > 1:
        name = SCALES[1]
    elif size is None:
        scale = scale.reshape(())
    return {"weight": lax.bitcast_convert_type(weight, E4M3), name: scale}


def _stored(scale: Array | Encoded) -> Array:
    """The values that a file has."""
    if isinstance(scale, BlockScale) and not scale.exponents:
        return scale.values
    if not isinstance(scale, BlockScale | E8M0):
        return tensor.plain(scale)
    values = scale.values if isinstance(scale, BlockScale) else scale.exponent
    return lax.bitcast_convert_type(values, jnp.float8_e8m0fnu)


def config_of(qt: QTensor) -> Config:
    """The configuration of a matrix, whose leaves may be abstract."""
    size: Any = qt.segments[0].group_size
    exponents = isinstance(qt.scale, E8M0)
    if isinstance(qt.scale, BlockScale):
        size, exponents = (qt.scale.rows, qt.scale.columns), qt.scale.exponents
    elif size is not None:
        size = (1 if qt.scale.shape[-1] == qt.n else qt.n, size)
    return Config(block_size=size, scale_fmt="ue8m0" if exponents else "float")


def lacks_patterns(qt: QTensor) -> str | None:
    """Why a tensor is no matrix of E4M3 floats in the order of its inputs, if so."""
    if qt.affine is not Affine.FLOAT:
        return f"{qt.affine.value} is not float(q) * s; requantize it"
    return (
        lacks_plain_groups(qt, (8,))
        or lacks_input_order(qt)
        or (None if qt.scale.shape[-1] in (1, qt.n) else "columns share scales")
    )


def quantize(
    w: Float[Array, "*batch k n"],
    bits: SupportsIndex = 8,
    group_size: SupportsIndex | None = 128,
    symmetric: bool = True,
    *,
    scale_dtype: DTypeLike | None = None,
    columns: SupportsIndex | None = None,
) -> QTensor:
    """Rounds a dense weight to FP8, called as `qjax.quantize` is.

    The scale of a block is its largest magnitude over 448, the largest E4M3 number,
    within what ``scale_dtype`` holds. A weight over its scale is rounded to the nearest
    number, to the one with an even mantissa if midway, and is 448 at most. A block of
    zeros has the scale 1.

    Args:
      w: ``[*batch, k, n]`` bfloat16, float16 or float32 weight (``y = x @ w``).
      bits: 8.
      group_size: Inputs that share a scale; None for all.
      symmetric: True: floats have a sign.
      scale_dtype: bfloat16, float16 or float32, which None stands for.
      columns: Outputs that share a scale; None for ``group_size``, or for 1 where that
        is None.

    Returns:
      The tensor that a file would hold, but for its dtype, which is that of ``w``. NaN
      or infinity makes the scale of its block NaN.

    Raises:
      TypeError: If ``w`` is a list, say, and no array.
      ValueError: If an argument is not as described.

    Example:
      >>> w = quantize(jnp.array([[448.0, 7.0], [1.06, 0.51]]), group_size=None)
      >>> qjax.dequantize(w)
      Array([[448. ,   7. ],
             [  1. ,   0.5]], dtype=float32)
    """
    check_weight(w)
    if 0 in w.shape:
        raise ValueError(f"w.shape={w.shape} must be without an extent of 0.")
    size = None if group_size is None else operator.index(group_size)
    together = size or 1 if columns is None else operator.index(columns)
    if operator.index(bits) != 8 or not symmetric:
        raise ValueError(
            f"bits={bits} and symmetric={symmetric} must be 8 and True: codes are "
            "floats of 8 bits with a sign."
        )
    if not 0 < together < MOST or not 0 < (size or 1) < MOST or size == 0:
        raise ValueError(
            f"group_size={group_size} and columns={columns} must be positive, or None."
        )
    dtype = jnp.dtype(scale_dtype or jnp.float32)
    check_choice("scale_dtype", dtype, tuple(map(jnp.dtype, FLOATS)))

    def one(w: Array) -> QTensor:
        k, n = w.shape
        codes, scale = _quantize(w, min(together, n), min(size or k, k), dtype)
        # Of single outputs, or all inputs, there are no blocks.
        blocks = None if size is None and together == 1 else (together, size or k)
        made = _build(Bytes().pack(codes, 8), scale, blocks)
        return dataclasses.replace(made, weight_dtype=jnp.dtype(w.dtype).name)

    return tensor.over_batch(one, w)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(
    w: Array, rows: int, columns: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    (k, n), wide = w.shape, w.astype(jnp.float32)
    padded = jnp.pad(wide, ((0, -k % columns), (0, -n % rows)))
    blocks = padded.reshape(-(-k // columns), columns, -(-n // rows), rows)
    scale = jnp.abs(blocks).max((1, 3)) / jnp.float32(LARGEST)
    # A maximum may leave out NaN.
    finite = jnp.isfinite(blocks).all((1, 3))
    bounds = jnp.finfo(dtype)
    held = jnp.clip(scale, float(bounds.smallest_normal), float(bounds.max))
    scale = jnp.where(finite, jnp.where(scale == 0, 1, held), jnp.nan).astype(dtype)
    step = jnp.where(finite, scale, 1).astype(jnp.float32)
    level = blocks / step[:, None, :, None]
    return _nearest(level.reshape(padded.shape)[:k, :n]), scale


def _nearest(level: Array) -> Array:
    """Patterns of the nearest E4M3 numbers, at most the largest."""
    size = jnp.minimum(jnp.abs(level), LARGEST)
    # Of float32's exponent; numbers below 2**-6 are as far apart as those above it.
    exponent = lax.bitcast_convert_type(jnp.maximum(size, 2.0**-6), jnp.int32) >> 23
    step = lax.bitcast_convert_type((exponent - 3) << 23, jnp.float32)
    rounded = jnp.round(size / step).astype(jnp.int32)
    # Eight patterns an octave; the first octave's numbers begin with the pattern 8.
    pattern = rounded + 8 * (exponent - 127 + 6)
    return pattern.astype(jnp.uint8) | jnp.signbit(level).astype(jnp.uint8) << 7
