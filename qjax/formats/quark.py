"""AMD Quark's matrices: FP8, int8, 4 and 2 bits, MXFP4, MXFP6, MXFP8 and NVFP4.

``weight`` of torch's orientation ``[n, k]`` has a byte for a code of eight bits, of
"fp4" two a byte and of "fp6_e2m3" and "fp6_e3m2" four in three bytes, the first in the
lowest bits:

    byte 2              byte 1              byte 0
    | q3 (6) | q2 (2) | q2 (4) | q1 (4) | q1 (2) | q0 (6) |

Of integers in groups of inputs ("per_group") it is turned, ``[k, n]``, and so are
scales and zero points, ``[groups, n]``; codes are then packed along outputs, and else
along inputs. "int4" and "uint4" have eight in an int32, with the ``pack_method``
"reorder" in AWQ's order, here from code 7 to 0, and with "order" from 7 down to 0:

    bit 31                             bit 0
    | q7 | q5 | q3 | q1 | q6 | q4 | q2 | q0 |

"uint2" has four in a byte, the first in the highest bits, "int2" one in an int32.
Integers with a sign are in two's complement. ``weight_scale`` is one number, one an
output, one for a group or block, or an E8M0 exponent; NVFP4 multiplies it, an E4M3
float, by ``weight_scale_2``. ``weight_zero_point`` is packed as the codes are, unless
its type is "float32". Older files have scales of groups of integers as ``[n, groups]``.

What stands beside a weight for activations is read over, and beside a dense weight its
scales, too: that is stored after it was rounded ("fake_quantized"). Only
``output_scale``, which in ``k_proj`` and ``v_proj`` is that of the KV cache, stays a
tensor by its name.

The weight is ``float(q) * scale`` or ``(q - zero) * scale`` in float32, rounded once:
to the dtype of the scale, where that has 16 bits, and else to bfloat16. Files of two
stages, FP8 and then int4, multiply twice, and are not read.

Source: amd-quark, quark/torch/utils/pack.py, quark/torch/export/nn/modules
(``qparamslinear_builder.py``, ``realquantizer.py``) and
quark/torch/kernel/hw_emulation/hw_emulation_interface.py, release 0.13;
vllm-project/vllm, vllm/model_executor/layers/quantization/quark, release 0.33.0.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax import decode, tensor
from qjax.formats import fp8, modelopt
from qjax.formats.block_scale import BlockScale
from qjax.formats.checks import (
    FLOATS,
    check_finite,
    check_shapes_among,
    check_tensors,
    lacks_input_order,
    lacks_integer_zeros,
    lacks_plain_groups,
    lacks_whole_groups,
    refusal,
)
from qjax.formats.compressed_tensors_floats import Nibbles
from qjax.formats.gathering import of_whole
from qjax.formats.gptq import Stream
from qjax.formats.mxfp4 import BLOCK, E8M0
from qjax.formats.quark_config import Config
from qjax.formats.quark_integers import codes_of, stored, words_of
from qjax.formats.quark_scheme import Scheme
from qjax.formats.quark_shapes import (
    OF_WEIGHTS,
    TENSORS,
    Extents,
    expected,
    extents_of,
    scheme_in,
    shapes_of,
)
from qjax.tensor import Affine, Encoded, Layout, QTensor, Segment

__all__ = [
    "TENSORS",
    "Config",
    "Scheme",
    "axes",
    "check",
    "from_tensors",
    "is_dense",
    "scheme_of",
    "to_tensors",
]

_NVFP4 = modelopt.Config(algorithm="NVFP4")
# What is turned where groups are.
_OF_GROUPS = {"weight", "weight_scale", "weight_zero_point"}


def is_dense(tensors: Mapping[str, Any]) -> bool:
    """Whether a module's weight is dense, whatever scales stand beside it.

    Args:
      tensors: Arrays or anything with ``dtype``, by upstream name.
    """
    return "weight" in tensors and tensors["weight"].dtype in FLOATS


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` and ``weight_scale``; of integers ``weight_zero_point``, which those
        that are symmetric and have a sign can do without; of NVFP4 ``weight_scale_2``;
        all as the module's docstring has them; and optionally those of activations.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    scheme = scheme_in(config)
    check_tensors(tensors, expected(scheme), f"{scheme.dtype} {scheme.qscheme}")
    shapes = shapes_of(scheme, extents_of(tensors, config))
    source = f"weight.shape={tuple(tensors['weight'].shape)} and {scheme}"
    check_shapes_among(tensors, shapes, source)


def axes(tensors: Mapping[str, Any], config: Config) -> Mapping[str, tuple[str, ...]]:
    """Says what runs along the axes of each tensor, so that a part can be read.

    Args:
      tensors: As in `check`.
      config: The module's configuration.

    Returns:
      "n" and "k" for the axes of each tensor, by upstream name; nothing where outputs
      do not fill what they are packed in, or blocks are cut short.
    """
    scheme, extents = scheme_in(config), extents_of(tensors, config)
    if scheme.block_size is not None:
        return fp8.axes(tensors, _as_fp8(scheme))
    if extents.n % scheme.stored.codes:
        return {}
    found = {name: ("n", "k")[: len(array.shape)] for name, array in tensors.items()}
    if scheme.is_turned:
        found |= dict.fromkeys(_OF_GROUPS & tensors.keys(), ("k", "n"))
        if extents.by_rows:
            found["weight_scale"] = ("n", "k")
    return found


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor: codes in `fp8.Bytes`, pairs in `Nibbles`, integers of four bits
      in `awq.Gemm` (groups) or `awq.Gemv`, two and six bits in a `Stream`. Integers
      begin at 0; floats of six bits are entries of a codebook.

    Raises:
      ValueError: As `check`; or if a weight is not a number, a code or zero point is of
        more bits than the type has, a scale is not finite, or zero points of symmetric
        codes are not 0.

    Example:
      >>> tensors = {
      ...     "weight": np.full((32, 2), 0x11111111, np.int32),
      ...     "weight_scale": np.full((2, 16), 0.5, np.float32),
      ... }
      >>> scheme = Scheme(dtype="int4", qscheme="per_group", group_size=16)
      >>> w = from_tensors(tensors, Config(scheme=scheme))
      >>> w
      QTensor(32x16, 4 bits, group 16, Gemm(), (q - 2^(bits-1)) * s + z, ...)
      >>> qjax.dequantize(w)[0, :2]
      Array([0.5, 0.5], dtype=bfloat16)
    """
    check(tensors, config)
    scheme, extents = scheme_in(config), extents_of(tensors, config)
    if scheme.is_integer:
        return _integers(tensors, config, extents)
    held = {name: tensors[name] for name in OF_WEIGHTS if name in tensors}
    if scheme.nested:
        whole = np.asarray(held["weight_scale_2"]).astype(np.float32)
        return modelopt.from_tensors(held | {"weight_scale_2": whole}, _NVFP4)
    if scheme.qscheme != "per_group":
        return fp8.from_tensors(held, _as_fp8(scheme))
    return _floats(held, scheme)


def _as_fp8(scheme: Scheme) -> fp8.Config:
    return fp8.Config(
        block_size=scheme.block_size,
        columns=scheme.qscheme == "per_channel",
        scale_fmt="ue8m0" if scheme.exponents else "float",
    )


def _floats(tensors: Mapping[str, Any], scheme: Scheme) -> QTensor:
    """Small floats in groups of inputs."""
    weight, bits = np.asarray(tensors["weight"]), scheme.stored.bits
    layout: Layout = Nibbles()
    affine, codebook = Affine.FLOAT, None
    if bits == 8:
        weight, layout = fp8.patterns_of("weight", weight), fp8.Bytes()
    elif bits == 6:
        weight, layout = np.ascontiguousarray(weight).view("<u4").T, Stream()
        affine, codebook = Affine.CODEBOOK, jnp.asarray(numbers(scheme.dtype))
    scale: Array | Encoded
    if scheme.exponents:
        exponents = fp8.exponents_of("weight_scale", tensors["weight_scale"])
        scale = E8M0(exponent=jnp.asarray(exponents.T))
    else:
        check_finite(tensors, ["weight_scale"])
        scale = jnp.asarray(np.asarray(tensors["weight_scale"]).T)
    return tensor.build(
        (jnp.asarray(weight),),
        scale,
        layout=layout,
        segments=(Segment(bits, scheme.group_size),),
        affine=affine,
        codebook=codebook,
        weight_dtype=_weight_dtype(scale),
    )


def numbers(dtype: str) -> np.ndarray:
    """The 64 numbers of "fp6_e2m3" or "fp6_e3m2", by their patterns."""
    exponent_bits, mantissa_bits = int(dtype[-3]), int(dtype[-1])
    sizes = np.arange(32)
    exponent, mantissa = np.divmod(sizes, 2**mantissa_bits)
    # Those with the exponent 0 lack the first bit and have the exponent 1.
    mantissa = np.where(exponent, mantissa + 2**mantissa_bits, mantissa)
    bias = 2 ** (exponent_bits - 1) - 1
    positive = np.ldexp(mantissa, np.maximum(exponent, 1) - bias - mantissa_bits)
    return np.concatenate([positive, -positive]).astype(np.float32)


def _integers(tensors: Mapping[str, Any], config: Config, extents: Extents) -> QTensor:
    scheme, bits = scheme_in(config), scheme_in(config).stored.bits
    check_finite(tensors, ["weight_scale"])
    words, layout = words_of(
        np.asarray(tensors["weight"]), scheme, extents.n, reorder=config.reorder
    )
    scale = jnp.asarray(_of_groups(tensors["weight_scale"], extents))
    zero = _zeros(tensors, config, extents)
    return tensor.build(
        (words,),
        scale,
        zero,
        layout=layout,
        segments=(Segment(bits, scheme.group_size),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
        padding=layout.extents(words.shape, bits)[1] - extents.n,
        weight_dtype=_weight_dtype(scale),
    )


def _zeros(
    tensors: Mapping[str, Any], config: Config, extents: Extents
) -> Array | None:
    """Zero points of groups, or None where codes with a sign are symmetric."""
    scheme, name = scheme_in(config), "weight_zero_point"
    if name not in tensors:
        return None
    points = np.asarray(tensors[name])
    if scheme.float_zero:
        check_finite(tensors, [name])
        floats = points if points.dtype in FLOATS else points.astype(np.float32)
        return jnp.asarray(_of_groups(floats, extents))
    if scheme.qscheme == "per_tensor":
        points = points.reshape(())  # One number is not packed.
    codes = codes_of(name, points, scheme, reorder=config.reorder)
    codes = codes.reshape(-1, codes.shape[-1])[:, : extents.n]
    if not (scheme.symmetric and scheme.is_signed):
        return jnp.asarray(codes)
    if (codes != 2 ** (scheme.stored.bits - 1)).any():
        raise ValueError(f"{name} must be 0: the configuration says symmetric=True.")
    return None


def _weight_dtype(scale: Array | Encoded) -> str | None:
    return "bfloat16" if scale.dtype == jnp.float32 else None


def _of_groups(values: Any, extents: Extents) -> np.ndarray:
    """What a file has of groups, outputs or all, as ``[groups, n]`` or ``[1, 1]``."""
    values = np.asarray(values)
    if values.ndim == 2:
        return values.T if extents.by_rows else values
    return values.reshape(1, -1)


def scheme_of(qt: QTensor) -> Scheme:
    """Returns the scheme whose files hold a matrix, which may be abstract.

    Raises:
      ValueError: If there is none that others read, with the reason.
    """
    is_float = qt.affine is Affine.FLOAT
    if is_float:
        reason = (
            lacks_plain_groups(qt, (4, 8))
            or lacks_input_order(qt)
            or lacks_whole_groups(qt)
        )
    else:
        reason = refusal(qt, (4, 8)) or lacks_integer_zeros(qt)
    bits, size = qt.segments[0].bits, qt.segments[0].group_size
    if reason is None and bits == 4 and qt.n % 8 and not is_float:
        reason = f"n={qt.n} is no multiple of 8"
    if reason is None:
        scheme = _float_scheme(qt) if is_float else _integer_scheme(qt)
        if scheme is not None:
            return scheme
        reason = (
            f"floats of {bits} bits in groups of {size} do not have scales that its "
            "readers know; MXFP4, MXFP8 and FP8 with prepare=False do"
        )
    raise ValueError(f"Quark cannot hold {qt!r}: {reason}.")


def _integer_scheme(qt: QTensor) -> Scheme:
    (bits, size), symmetric = qt.segments[0][:2], qt.zero is None
    # Readers of four bits know groups alone, and Quark no -1 for all inputs.
    in_groups = size is not None or bits == 4
    return Scheme(
        dtype=f"int{bits}" if symmetric else f"uint{bits}",
        qscheme="per_group" if in_groups else "per_channel",
        group_size=(size or qt.k) if in_groups else None,
        symmetric=symmetric,
    )


def _float_scheme(qt: QTensor) -> Scheme | None:
    (bits, size), scale, columns = qt.segments[0][:2], qt.scale, qt.scale.shape[-1]
    if isinstance(scale, E8M0):
        if size != BLOCK or columns != qt.n:
            return None
        dtype = "fp4" if bits == 4 else "fp8_e4m3"
        return Scheme(dtype=dtype, qscheme="per_group", group_size=size, exponents=True)
    if isinstance(scale, BlockScale):
        block = (scale.rows, scale.columns)
        # Quark reads no blocks that are cut short.
        if scale.exponents or qt.n % block[0]:
            return None
        return Scheme(dtype="fp8_e4m3", qscheme="per_block", block_size=block)
    if bits == 4 or size is not None or columns not in (1, qt.n):
        return None
    whole = columns == 1
    return Scheme(dtype="fp8_e4m3", qscheme="per_tensor" if whole else "per_channel")


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one matrix under the upstream's names, in the order "reorder".

    Args:
      qt: Integers of four or eight bits, FP8, MXFP4 or MXFP8; blocks and exponents must
        still have the scales of their files.

    Returns:
      ``weight``, ``weight_scale``, and of integers ``weight_zero_point``.

    Raises:
      ValueError: As `scheme_of`.
    """
    scheme, scale = scheme_of(qt), qt.scale
    if scheme.is_integer:
        return _integer_tensors(qt, scheme)
    if scheme.dtype == "fp4":
        weight = decode.relayout(qt, Nibbles()).words[0]
    else:
        weight = fp8.Bytes().pack(tensor.codes(qt), 8)
        weight = lax.bitcast_convert_type(weight, fp8.E4M3)
    if isinstance(scale, E8M0):
        return {"weight": weight, "weight_scale": scale.exponent.T}
    if isinstance(scale, BlockScale):
        return {"weight": weight, "weight_scale": scale.plain.T}
    shape = () if scheme.qscheme == "per_tensor" else (-1,)
    return {"weight": weight, "weight_scale": tensor.plain(scale).reshape(shape)}


def _integer_tensors(qt: QTensor, scheme: Scheme) -> dict[str, Array]:
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    if zero is None:
        zero = jnp.full(scale.shape, 2 ** (scheme.stored.bits - 1), jnp.uint8)
    points = stored(zero, scheme)
    return {
        "weight": stored(tensor.codes(qt), scheme),
        "weight_scale": scale if scheme.is_turned else scale.reshape(-1),
        "weight_zero_point": points if scheme.is_turned else points.reshape(-1),
    }
