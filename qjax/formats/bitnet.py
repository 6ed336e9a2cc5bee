"""BitNet: ternary weights, four a byte, with one scale for the whole matrix.

The torch weight ``[n, k]`` of -1, 0 and 1 is stored as 0, 1 and 2, in bytes that lie as
optimum-quanto's of two bits (`quanto.Slabs`): with ``c[j, i]`` the code of output j,

    bit 7                                                         bit 0
    | c[j + 3n/4, i] | c[j + 2n/4, i] | c[j + n/4, i] | c[j, i] |

``weight_scale`` is one number. It multiplies in files whose ``linear_class`` is
"autobitlinear", as Microsoft's, and divides in those of "bitlinear", which is what no
``linear_class`` means. A ``rms_norm`` of the inputs is a layer of its own, and stays
what it is. These models were trained with activations of eight bits: here they are not
quantized.

Source: huggingface/transformers, src/transformers/integrations/bitnet.py and
utils/quantization_config.py (``BitNetQuantConfig``), release 5.23.0; the rounding:
"The Era of 1-bit LLMs", arXiv 2402.17764, equations 1 to 3.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from qjax import tensor
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_choice,
    check_finite,
    check_method,
    check_tensors,
    check_weight,
    is_known,
    lacks_input_order,
    lacks_plain_groups,
)
from qjax.formats.gathering import of_whole
from qjax.formats.patterns import ends_any, left_dense
from qjax.formats.quanto import Slabs
from qjax.tensor import Affine, QTensor, Segment

BITS = 2
# The code that stands for 0, and the largest.
_ZERO, _MOST = 1, 2
# Of the mean magnitude, which a matrix of zeros is divided by.
_LEAST = 1e-5
_CODES = 8 // BITS

_EXPECTED = {
    "weight": Expected((jnp.uint8,), 2),
    "weight_scale": Expected(FLOATS, None),
}
TENSORS = tuple(_EXPECTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a BitNet ``quantization_config`` says.

    Attributes:
      divides: Whether weights are divided by ``weight_scale``, not multiplied.
      ignored: Patterns of paths that stay dense.
    """

    divides: bool = True
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value; or if the weights are dense,
            and rounded as the model runs ("online").
        """
        check_method(entry, "bitnet")
        kind = entry.get("linear_class", "bitlinear")
        check_choice("linear_class", kind, ("bitlinear", "autobitlinear"))
        mode = entry.get("quantization_mode", "offline")
        check_choice("quantization_mode", mode, ("offline", "online"))
        if kind == "autobitlinear" and mode == "online":
            raise ValueError(
                "quantization_mode='online' stores dense weights, which are rounded as "
                "the model runs; remove quantization_config, and round them with "
                "formats.bitnet.quantize."
            )
        return cls(divides=kind == "bitlinear", ignored=left_dense(entry))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.down_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        left = ends_any(self.ignored, module)
        return None if left else dataclasses.replace(self, ignored=())


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one matrix, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight`` uint8 ``[n / 4, k]`` and ``weight_scale``, one float.
      config: The configuration; it changes nothing.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    del config
    check_tensors(tensors, _EXPECTED, "BitNet")
    weight, scale = (tuple(tensors[name].shape) for name in TENSORS)
    if 0 in weight:
        raise ValueError(f"weight.shape={weight} must be [n / 4, k], not empty.")
    if scale not in ((), (1,)):
        raise ValueError(f"weight_scale.shape={scale} must be (1,), one for all.")


def from_tensors(tensors: Mapping[str, Any], config: Config | None = None) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The configuration; None divides by the scale.

    Returns:
      ``[k, n]`` tensor in the file's layout, of the dtype of ``weight_scale``:
      ``(q - 1) * scale``, with one scale and one zero of 1. Where the file divides, the
      scale is the reciprocal in float32.

    Raises:
      ValueError: As `check`; or if a code is 3, or the scale or its reciprocal not
        finite.

    Example:
      >>> tensors = {
      ...     "weight": np.full((8, 96), 0b10_01_00_01, np.uint8),
      ...     "weight_scale": np.ones(1, np.float16),
      ... }
      >>> from_tensors(tensors)
      QTensor(96x32, 2 bits, group column, Slabs(k=96, group_size=None), ...)
      >>> qjax.dequantize(from_tensors(tensors))[0, ::8]
      Array([ 0., -1.,  0.,  1.], dtype=float16)
    """
    config = config or Config()
    check(tensors, config)
    check_finite(tensors, ["weight_scale"])
    words = np.asarray(tensors["weight"])
    # Both bits of a field are set in a 3.
    if count := np.count_nonzero(words & (words >> 1) & 0b01_01_01_01):
        raise ValueError(f"weight holds the code 3, which is none, in {count} bytes.")
    given = np.asarray(tensors["weight_scale"]).reshape(1, 1)
    scale = given
    if config.divides:
        with np.errstate(divide="ignore", over="ignore"):
            scale = np.float32(1) / given.astype(np.float32)
        if not np.isfinite(scale).all():
            raise ValueError(
                f"weight_scale={given.item()} is too small to divide weights by."
            )
    return _build(jnp.asarray(words), jnp.asarray(scale), given.dtype)


def _build(words: Array, scale: Array, dtype: DTypeLike) -> QTensor:
    return tensor.build(
        (words,),
        scale,
        jnp.full((1, 1), _ZERO, jnp.uint8),
        layout=Slabs(words.shape[1], None),
        segments=(Segment(BITS, None),),
        affine=Affine.ZERO,
        weight_dtype=jnp.dtype(dtype).name,
    )


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A ternary matrix with one scale, and concrete leaves, prepared or not.

    Returns:
      ``weight`` and ``weight_scale``, which multiplies: ``linear_class`` is to be
      "autobitlinear".

    Raises:
      ValueError: If BitNet cannot hold ``qt``, with the reason.
    """
    if reason := _refusal(qt):
        raise ValueError(f"BitNet cannot hold {qt!r}: {reason}.")
    words = Slabs(qt.k, None).pack(tensor.codes(qt), BITS)
    return {"weight": words, "weight_scale": tensor.plain(qt.scale)[0, :1]}


def _refusal(qt: QTensor) -> str | None:
    """Why no such file can hold a matrix, of whose values not all need be known."""
    if reason := lacks_plain_groups(qt, (BITS,)) or lacks_input_order(qt):
        return reason
    scale, zero = tensor.plain(qt.scale), tensor.plain(qt.zero)
    if qt.affine is not Affine.ZERO or zero is None or zero.dtype != jnp.uint8:
        return f"{qt.affine.value} here is not (q - 1) * s"
    if qt.n % _CODES:
        return f"n={qt.n} is not a multiple of {_CODES}"
    if is_known(scale) and (scale != scale[:1, :1]).any():
        return "it has more than one scale"
    if is_known(zero) and (zero != _ZERO).any():
        return f"it has other zeros than {_ZERO}"
    if is_known(qt.words[0]) and (tensor.codes(qt) > _MOST).any():
        return "it has codes of 3"
    return None


def quantize(
    w: Float[Array, "*batch k n"],
    bits: SupportsIndex = BITS,
    group_size: SupportsIndex | None = None,
    symmetric: bool = True,
    *,
    scale_dtype: DTypeLike | None = None,
) -> QTensor:
    """Rounds a dense weight to -1, 0 and 1 times its mean magnitude.

    That is what a model of BitNet computes with while it is trained, and what makes its
    dense weights ("online") the ternary ones; other models it destroys. ``q`` is
    ``w / mean(abs(w))``, rounded to the nearest, half to even.

    Args:
      w: ``[*batch, k, n]`` bfloat16, float16 or float32 weight (``y = x @ w``), n a
        multiple of 4.
      bits: 2.
      group_size: None: one scale is for all.
      symmetric: True: weights are on both sides of 0.
      scale_dtype: bfloat16, float16 or float32, which None stands for.

    Returns:
      The tensor that a file would hold, but for its dtype, which is that of ``w``. NaN
      or infinity makes the scale NaN.

    Raises:
      TypeError: If ``w`` is a list, say, and no array.
      ValueError: If an argument is not as described.

    Example:
      >>> w = quantize(jnp.array([[1.0, -0.125, 0.75, -0.125]]))
      >>> qjax.dequantize(w)
      Array([[0.5, 0. , 0.5, 0. ]], dtype=float32)
    """
    check_weight(w)
    if 0 in w.shape or w.shape[-1] % _CODES:
        raise ValueError(
            f"w must be [..., k, n], not empty, n a multiple of {_CODES}; got "
            f"{w.dtype}{w.shape}."
        )
    if operator.index(bits) != BITS or group_size is not None or not symmetric:
        raise ValueError(
            f"bits={bits}, group_size={group_size} and symmetric={symmetric} must be "
            f"{BITS}, None and True: weights are ternary, with one scale."
        )
    dtype = jnp.dtype(scale_dtype or jnp.float32)
    check_choice("scale_dtype", dtype, tuple(map(jnp.dtype, FLOATS)))

    def one(w: Array) -> QTensor:
        codes, scale = _quantize(w)
        words = Slabs(w.shape[0], None).pack(codes, BITS)
        return _build(words, scale.astype(dtype), w.dtype)

    return tensor.over_batch(one, w)


@jax.jit
def _quantize(w: Array) -> tuple[Array, Array]:
    wide = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).mean(keepdims=True), _LEAST)
    # As transformers rounds: once more than a quotient.
    level = jnp.clip(jnp.round(wide * (1 / scale)), -1, 1)
    # What is not a number has some code, and a scale that is none.
    codes = jnp.where(jnp.isnan(level), 0, level).astype(jnp.int32) + _ZERO
    return codes, jnp.where(jnp.isfinite(scale), scale, jnp.nan)
