"""MLX: a bit stream along each row of torch's weight, with a scale and an offset.

``weight[n, i]``, uint32, of four bits holds eight inputs of one output,

    bit 31                                                            bit 0
    | q[n, 8i+7] | q[n, 8i+6] | ...  | q[n, 8i+2] | q[n, 8i+1] | q[n, 8i] |

and any width is a continuous stream, as `qjax.bits` has it; what MLX writes in packs of
bytes (of 3, 5 and 6 bits) is that stream. ``scales`` and ``biases``, ``[n, groups]``,
are floats of the model's dtype. The weight is ``q * scale + bias``. The modes "mxfp4"
and "mxfp8" have E8M0 exponents for 32 inputs in ``scales``, uint8, and "nvfp4" patterns
of E4M3 floats for 16, without a number for the whole matrix; codes are patterns of E2M1
or E4M3 floats, and there are no ``biases``. Embeddings are quantized as matrices are,
and all experts of a layer are one stack, with a leading axis. (Of quantized matrices of
single experts, as other directories have them, mlx-lm makes that stack for Mixtral,
DeepSeek and a few others, but refuses those of Qwen.) A ``bias`` beside these is that
of the layer.

`qjax.dequantize` rounds as ``mx.dequantize`` does on a CPU: the product to the dtype of
the scale, and then the sum. MLX's products there take the sum in float32, and its
kernels for Metal, too, may round only once.

transformers has the same packing of 2, 4 and 8 bits by the name "metal", its offsets
``qbiases``. It takes the weight in float32 and rounds that to the dtype of the scale:
here once, and there, where float32 does not hold the sum, in two steps.

Source: ml-explore/mlx, mlx/ops.cpp, mlx/backend/cpu/quantized.cpp and
mlx/backend/metal/kernels/quantized.h, release 0.32.4; ml-explore/mlx-lm,
mlx_lm/models/switch_layers.py, release 0.32.2; huggingface/transformers,
src/transformers/integrations/metal_quantization.py, release 5.23.0.
"""

import functools
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, UInt32

from qjax import decode, tensor
from qjax.formats import fp8
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_finite,
    check_shapes,
    check_tensors,
    check_weight,
    is_known,
    lacks_input_order,
    lacks_own_columns,
    lacks_plain_groups,
    lacks_whole_groups,
)
from qjax.formats.compressed_tensors import Dense
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.formats.gathering import of_whole
from qjax.formats.mlx_config import METAL_WIDTHS, METHODS, MODES, Config, Method, Mode
from qjax.formats.modelopt import TimesGlobal
from qjax.formats.mxfp4 import E8M0
from qjax.tensor import Affine, Encoded, QTensor, Segment, StoredGlobal

__all__ = ["TENSORS", "Config", "axes", "check", "config_of", "from_tensors"]
__all__ += ["lacks_exact_offsets", "quantize", "to_tensors"]

TENSORS = ("weight", "scales", "biases", "qbiases")
# The least scale of a group.
_LEAST = 1e-7


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one matrix or stack, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` uint32 ``[*batch, n, k * bits / 32]``; ``scales``
        ``[*batch, n, k / group_size]``, floats with the mode "affine" and else uint8;
        with "affine" ``biases`` (of transformers ``qbiases``) like ``scales``.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    is_affine, bits, size = config.mode == "affine", config.bits, config.group_size
    expected = {
        "weight": Expected((jnp.uint32,), None),
        "scales": Expected(FLOATS if is_affine else (jnp.uint8,), None),
    }
    if is_affine:
        expected[config.offsets] = Expected((), None, like="scales")
    check_tensors(tensors, expected, f"{config.method} with mode={config.mode!r}")
    shape = tuple(tensors["weight"].shape)
    k, rest = divmod(32 * shape[-1] if shape else 0, bits)
    if len(shape) < 2 or 0 in shape or rest or k % size:
        raise ValueError(
            f"weight.shape={shape} must be [..., n, k * {bits} / 32] with k in whole "
            f"groups of {size}, and not empty."
        )
    shapes = dict.fromkeys(expected, (*shape[:-1], k // size)) | {"weight": shape}
    source = f"weight.shape={shape}, bits={bits} and group_size={size}"
    check_shapes(tensors, shapes, source)


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      "n" and "k" for the last two axes of each, "b0" and so on for those of a stack.
    """
    del config
    return {
        name: (*[f"b{i}" for i in range(len(array.shape) - 2)], "n", "k")
        for name, array in tensors.items()
    }


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix, or a stack of them.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[*batch, k, n]`` tensor: words in `compressed_tensors.Dense`, of small floats in
      `compressed_tensors_floats.Nibbles` or `fp8.Bytes`. Scales of "nvfp4" are
      `modelopt.TimesGlobal` with the number 1.

    Raises:
      ValueError: As `check`; or if a scale or offset is not finite, or a weight is not
        a number.

    Example:
      >>> tensors = {
      ...     "weight": np.full((16, 8), 0x22222222, np.uint32),
      ...     "scales": np.full((16, 1), 0.5, np.float16),
      ...     "biases": np.full((16, 1), -4, np.float16),
      ... }
      >>> w = from_tensors(tensors, Config(group_size=64, bits=4))
      >>> w
      QTensor(64x16, 4 bits, group 64, Dense(), q * s + z, float16 scale, 576 B)
      >>> qjax.dequantize(w)[0, 0]
      Array(-3., dtype=float16)
    """
    check(tensors, config)
    if config.mode != "affine":
        return _floats(tensors, config)
    check_finite(tensors, ["scales", config.offsets])
    scale, offset = (
        jnp.asarray(tensors[name]).swapaxes(-1, -2)
        for name in ("scales", config.offsets)
    )
    return tensor.build(
        (jnp.asarray(tensors["weight"]),),
        scale,
        offset,
        layout=Dense(),
        segments=(Segment(config.bits, config.group_size),),
        affine=Affine.OFFSET,
        rounding=1 if config.method == "metal" and scale.dtype.itemsize < 4 else 2,
    )


def _floats(tensors: Mapping[str, Any], config: Config) -> QTensor:
    patterns = np.ascontiguousarray(tensors["weight"]).view(np.uint8)
    if config.bits == 8:
        patterns = fp8.patterns_of("weight", patterns)
    scales = np.asarray(tensors["scales"])
    scale: Encoded
    if config.mode == "nvfp4":
        local = jnp.asarray(fp8.patterns_of("scales", scales).swapaxes(-1, -2))
        scale = TimesGlobal(local=local, whole=jnp.ones(local.shape[:-2], jnp.float32))
    else:
        exponent = fp8.exponents_of("scales", scales).swapaxes(-1, -2)
        scale = E8M0(exponent=jnp.asarray(exponent))
    return tensor.build(
        (jnp.asarray(patterns),),
        scale,
        layout=fp8.Bytes() if config.bits == 8 else Nibbles(),
        segments=(Segment(config.bits, config.group_size),),
        affine=Affine.FLOAT,
        weight_dtype="bfloat16",
    )


def config_of(qt: QTensor, method: Method = "mlx") -> Config:
    """Returns the configuration of a matrix or stack, whose leaves may be abstract.

    Args:
      qt: The tensor.
      method: Whose configuration it is.

    Raises:
      ValueError: If it can hold no such matrix, with the reason.
    """
    check_choice("method", method, METHODS)
    bits, mode = qt.segments[0].bits, _mode_of(qt)
    # One group of all inputs is one of as many.
    size = qt.segments[0].group_size or qt.k
    widths = METAL_WIDTHS if method == "metal" else tuple(sorted(MODES[mode].widths))
    reason = (
        lacks_plain_groups(qt, widths, stacks=method == "mlx")
        or lacks_input_order(qt)
        or lacks_whole_groups(qt)
        or lacks_own_columns(qt)
    )
    sizes = tuple(sorted(MODES[mode].group_sizes))
    if reason is None and method == "mlx" and size not in sizes:
        reason = f"it has groups of {size}, and with mode={mode!r} there are {sizes}"
    if reason is None and mode != "affine":
        reason = _lacks_scales(qt, mode, method)
    elif reason is None and (not qt.affine.counts or _is_centered_with_offset(qt)):
        reason = f"{qt.affine.value} here is not q * scale + bias; requantize it"
    if reason:
        raise ValueError(f"{method} cannot hold {qt!r}: {reason}.")
    return Config(group_size=size, bits=bits, mode=mode, method=method)


def _is_centered_with_offset(qt: QTensor) -> bool:
    return qt.affine is Affine.CENTERED and qt.zero is not None


def _mode_of(qt: QTensor) -> Mode:
    """The mode whose codes a matrix has, whatever its scales."""
    if qt.affine is not Affine.FLOAT:
        return "affine"
    if qt.segments[0].bits == 8:
        return "mxfp8"
    return "nvfp4" if qt.segments[0].group_size == 16 else "mxfp4"


def _lacks_scales(qt: QTensor, mode: Mode, method: Method) -> str | None:
    if method == "metal":
        return f"{qt.affine.value} is not q * scale + bias; requantize it"
    if isinstance(qt.scale, StoredGlobal if mode == "nvfp4" else E8M0):
        return None
    return "its scales are not those of a file any more; load it with prepare=False"


def lacks_exact_offsets(qt: QTensor) -> str | None:
    """Why MLX would multiply by other numbers, None if it would not.

    It adds ``-zero * scale`` in the dtype of the scale, which cannot hold all products.

    Args:
      qt: A tensor that `config_of` knows. Of abstract zeros some might be no such
        numbers.

    Returns:
      The reason, for an error message.
    """
    if isinstance(qt.scale, StoredGlobal):
        whole = qt.scale.whole
        if not is_known(whole) or (whole == 1).all():
            return None
        return f"its scales have the factor {whole} for all, and MLX has none"
    if not qt.affine.counts or (qt.zero is None and not is_known(qt.scale)):
        return None
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    reason = (
        f"its offsets, -zero * scale, must be numbers in {scale.dtype}, as MLX adds "
        "them, and some are not; those of symmetric codes are, or float32 scales "
        "would hold them"
    )
    if not is_known(scale) or (zero is not None and not is_known(zero)):
        return None if qt.affine is Affine.OFFSET else reason
    wide = np.asarray(scale).astype(np.float64)
    if zero is None:
        exact = -(2.0 ** (qt.segments[0].bits - 1)) * wide
    else:
        held = np.asarray(zero).astype(np.float64)
        # With 24 bits of either, float64 holds the product.
        exact = held if qt.affine is Affine.OFFSET else -held * wide
    found = np.asarray(_offset(qt)).astype(np.float64)
    return reason if (found != exact).any() else None


@jax.jit
def _offset(qt: QTensor) -> Array:
    """What is added to ``q * scale``, in the dtype of the scale."""
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    if zero is not None and qt.affine is Affine.OFFSET:
        return zero.astype(scale.dtype)
    middle = jnp.float32(qt.affine.centre(qt.segments[0].bits))
    z = middle if zero is None else zero.astype(jnp.float32)
    return (0 - z * scale.astype(jnp.float32)).astype(scale.dtype)


@of_whole
def to_tensors(qt: QTensor, method: Method = "mlx") -> dict[str, Array]:
    """Writes one quantized matrix, or a stack of them, under the upstream's names.

    Every code stands for the same number as before, exactly. How that is rounded is for
    MLX to choose: a float16 weight may differ in its last places. Where JAX traces
    this, values are not looked at, and offsets are rounded.

    Args:
      qt: Codes with offsets, with zeros whose products with scales the dtype of these
        can hold, or symmetric; or small floats with the scales of their files.
      method: In whose names: "mlx" or "metal".

    Returns:
      The tensors that `check` describes.

    Raises:
      ValueError: As `config_of`; or as `lacks_exact_offsets` says.
    """
    config = config_of(qt, method)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(qt))
    if not traced and (reason := lacks_exact_offsets(qt)):
        raise ValueError(f"{method} cannot hold {qt!r}: {reason}.")
    if config.mode == "affine":
        words = decode.relayout(qt, Dense()).words[0]
        parameters = {"scales": tensor.plain(qt.scale), config.offsets: _offset(qt)}
    else:
        layout = fp8.Bytes() if config.bits == 8 else Nibbles()
        words = _words(decode.relayout(qt, layout).words[0])
        scale: Any = qt.scale
        stored = scale.exponent if isinstance(scale, E8M0) else scale.local
        parameters = {"scales": stored}
    turned = {name: array.swapaxes(-1, -2) for name, array in parameters.items()}
    return {"weight": words} | turned


def _words(patterns: Array) -> UInt32[Array, "... words"]:
    """Four bytes a word, the first in its lowest bits."""
    fours = patterns.reshape(*patterns.shape[:-1], -1, 4)
    return lax.bitcast_convert_type(fours, jnp.uint32)


def quantize(
    w: Float[Array, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 64,
    symmetric: bool = False,
    *,
    scale_dtype: DTypeLike | None = None,
) -> QTensor:
    """Rounds a dense weight as ``mx.quantize`` does on a CPU, bit for bit.

    Called as `qjax.quantize` is. The offset of a group is its number of the largest
    magnitude, exactly; the scale, which has the other sign, covers its range, but is
    then changed to make 0 a number of the group. Codes are rounded against that scale,
    before it is rounded itself.

    Args:
      w: ``[*batch, k, n]`` bfloat16, float16 or float32 weight (``y = x @ w``).
      bits: 2, 3, 4, 5, 6 or 8.
      group_size: 32, 64 or 128 inputs that share a scale.
      symmetric: False. Of codes without offsets, which `qjax.quantize` makes, MLX's
        files get some.
      scale_dtype: bfloat16, float16 or float32; None, as in MLX, for that of ``w``.

    Returns:
      The tensor that a file would hold.

    Raises:
      TypeError: If ``w`` is a list, say, and no array.
      ValueError: If an argument is not as described.

    Example:
      >>> w = quantize(jnp.arange(64.0)[:, None] / 8, bits=4, group_size=32)
      >>> w.scale[0], w.zero[0], qjax.dequantize(w)[:2, 0]
      (Array([-0.25833333], dtype=float32), Array([3.875], dtype=float32), ...)
    """
    check_weight(w)
    kinds = MODES["affine"]
    check_choice("bits", bits, sorted(kinds.widths))
    check_choice("group_size", group_size, sorted(kinds.group_sizes))
    if symmetric:
        raise ValueError(
            "symmetric=True must be False: every group has its offset; qjax.quantize "
            "makes symmetric codes, and to_tensors writes them."
        )
    dtype = jnp.dtype(scale_dtype or w.dtype)
    check_choice("scale_dtype", dtype, tuple(map(jnp.dtype, FLOATS)))
    size: Any = group_size
    if 0 in w.shape or w.shape[-2] % size:
        raise ValueError(
            f"w.shape={w.shape} must have no extent of 0 and k a multiple of "
            f"group_size={group_size}; pad w with zero rows."
        )

    def one(w: Array) -> QTensor:
        # An operand, not a constant, by whose inverse a compiler might multiply.
        codes, scale, offset = _quantize(w, jnp.float32(2 ** int(bits) - 1), int(size))
        return tensor.build(
            (Dense().pack(codes, int(bits)),),
            scale.astype(dtype),
            offset.astype(dtype),
            layout=Dense(),
            segments=(Segment(int(bits), int(size)),),
            affine=Affine.OFFSET,
            rounding=2,
        )

    return tensor.over_batch(one, w)


@functools.partial(jax.jit, static_argnums=2)
def _quantize(w: Array, top: Array, size: int) -> tuple[Array, Array, Array]:
    groups = w.astype(jnp.float32).reshape(-1, size, w.shape[1])
    low, high = groups.min(1), groups.max(1)
    low = jnp.where(jnp.isnan(groups).any(1), jnp.nan, low)
    below = jnp.abs(low) > jnp.abs(high)
    top = lax.optimization_barrier(jnp.full(low.shape, top))
    step = jnp.maximum((high - low) / top, jnp.float32(_LEAST))
    step = jnp.where(below, step, -step)
    edge = jnp.where(below, low, high)
    count = jnp.round(edge / step)
    scale = jnp.where(count == 0, step, edge / count)
    offset = jnp.where(count == 0, 0, edge)
    # Behind a barrier, or the compiler multiplies by the inverse of what is repeated.
    divisor = lax.optimization_barrier(jnp.repeat(scale, size, 0).reshape(groups.shape))
    codes = jnp.round((groups - offset[:, None]) / divisor)
    codes = jnp.clip(codes, 0, top[0, 0]).astype(jnp.uint8)
    return codes.reshape(w.shape), scale, offset
