"""EXL2: rows sorted by importance, widths from 8 to 2 bits, 4-bit indices of scales.

``q_weight`` holds the codes as `qjax.formats.q_groups` draws them; each width is a
segment in the layout `gptq.Stream`. ``q_scale[g, j]`` holds the indices ``e`` of the
scales of eight columns,

    bit 31                                                  bit 0
    | e[g, 8j+7] | e[g, 8j+6] |  ...  | e[g, 8j+1] | e[g, 8j] |

With ``R`` for rounding to float16, whose subnormals count, the weight is

    s[g, n] = R((e[g, n] + 1)**2 * R(q_scale_max[g] / 256))
    W[q_perm[k], n] = R((q[k, n] - 2**(bits-1)) * s[g, n]),  q_perm = argsort(q_invperm)

``q_scale_max / 256`` is subnormal for usual weights and loses bits. For some
architectures exllamav2 multiplies it by a constant; here that is left to the model.

Source: turboderp-org/exllamav2, exllamav2/ext.py, exllamav2/module.py,
exllamav2/conversion/adaptivegptq.py and exllamav2/exllamav2_ext/cuda/pack_tensor.cu,
q_matrix.cu, quant/qdq_*.cuh, commit da07facd10b5c7f35b03664c41a3090c9f093de5.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from qjax import tensor
from qjax.bits import pack_fields, unpack_fields
from qjax.decode import rounded
from qjax.formats.checks import (
    Expected,
    check_finite,
    check_method,
    check_shapes,
    check_tensors,
)
from qjax.formats.gathering import of_whole
from qjax.formats.gptq import Stream
from qjax.formats.q_groups import (
    check_permutation,
    groups_of,
    join_words,
    read_groups,
    split_words,
    unwritable,
    write_groups,
)
from qjax.tensor import Affine, Encoded, Grouping, QTensor

TENSORS = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm", "q_perm")
_EXPECTED = {
    "q_weight": Expected((jnp.int32,), 2),
    "q_groups": Expected((jnp.int16,), 1),
    "q_scale": Expected((jnp.int32,), 2),
    "q_scale_max": Expected((jnp.float16,), 1),
    "q_invperm": Expected((jnp.int32,), 1),
    # Upstream looks for it, and derives it anew all the same.
    "q_perm": Expected((jnp.int16, jnp.int32), 1, optional=True),
}
# The packer pads the columns to a multiple of this.
_COLUMNS = 32


@jax.tree_util.register_dataclass
@typing.no_type_check  # JAX rebuilds pytrees with leaves that are not arrays.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Encoded):
    """``R((index + 1)**2 * R(maximum / 256))``, with EXL2's two roundings to float16.

    Attributes:
      index: uint8 ``[*batch, groups, n]``, 0 to 15.
      maximum: float16 ``[*batch, groups]``.

    Example:
      >>> index = jnp.array([[0, 15]], jnp.uint8)
      >>> scale = Scale(index=index, maximum=jnp.array([0.5], jnp.float16))
      >>> scale.decode().tolist(), scale.shape
      ([[0.001953125, 0.5]], (1, 2))
    """

    index: Array
    maximum: Array

    def decode(self) -> Float[Array, "*batch groups n"]:
        """Returns the float16 scales."""
        return _decode(self.index, self.maximum)


@jax.jit
def _decode(index: Array, maximum: Array) -> Array:
    step = rounded(maximum.astype(jnp.float32) / 256, jnp.float16)[..., None]
    root = index.astype(jnp.float32) + 1
    # Exact in float32: 9 and at most 11 bits.
    return rounded(root * root * step, jnp.float16).astype(jnp.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an EXL2 ``quantization_config`` says; the widths are in ``q_groups``.

    Attributes:
      bits: Mean width that was asked for, or None.
      head_bits: Width that was asked for ``lm_head``, or None; 16 leaves it dense.
      out_features: n of the module, where that is no multiple of 32: the packer pads
        the columns, and does not write how many there were. None takes all.
    """

    bits: float | None = None
    head_bits: int | None = None
    out_features: int | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value.
        """
        check_method(entry, "exl2")
        bits, head_bits = entry.get("bits"), entry.get("head_bits")
        if bits is not None and not (
            type(bits) in (int, float) and math.isfinite(bits) and bits > 0
        ):
            raise ValueError(f"bits={bits!r} must be a positive number.")
        if head_bits is not None and (type(head_bits) is not int or head_bits <= 0):
            raise ValueError(f"head_bits={head_bits!r} must be a positive integer.")
        return cls(bits=None if bits is None else float(bits), head_bits=head_bits)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        return None if module == "lm_head" and self.head_bits == 16 else self


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``q_weight`` int32 ``[rows of words, n]``, ``q_groups`` int16 ``[2 * groups]``,
        ``q_scale`` int32 ``[groups, n / 8]``, ``q_scale_max`` float16 ``[groups]`` and
        ``q_invperm`` int32 ``[k]``. A ``q_perm`` is ignored, as it is upstream.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_tensors(tensors, _EXPECTED, "EXL2")
    height, n = tensors["q_weight"].shape
    (pairs,), (k,) = tensors["q_groups"].shape, tensors["q_invperm"].shape
    if not height or not n or n % _COLUMNS:
        raise ValueError(
            f"q_weight.shape={(height, n)} must be [rows of words, n], n a positive "
            f"multiple of {_COLUMNS}."
        )
    if not pairs or pairs % 2:
        raise ValueError(f"q_groups.shape={(pairs,)} must be (2 * groups,).")
    groups = pairs // 2
    check_shapes(
        tensors,
        {"q_scale": (groups, n // 8), "q_scale_max": (groups,), "q_perm": (k,)},
        f"q_weight.shape={(height, n)}, q_groups.shape={(pairs,)} and k={k}",
    )
    wanted = n if config.out_features is None else config.out_features
    if not n - _COLUMNS < wanted <= n:
        raise ValueError(
            f"q_weight.shape={(height, n)} does not hold out_features={wanted} padded "
            f"to a multiple of {_COLUMNS}."
        )


def from_tensors(tensors: Mapping[str, Any], config: Config | None = None) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the layout `gptq.Stream` with a `Scale`, one segment for each
      width (more where the groups of a width vary in size); ``order`` is
      ``argsort(q_invperm)``, or None where that changes nothing.

    Raises:
      ValueError: As `check` and `q_groups.read_groups`; or if ``q_scale_max`` is not
        finite, or ``q_invperm`` is no permutation of the groups' rows.

    Example:
      >>> tensors = {
      ...     "q_weight": np.zeros((8, 32), np.int32),
      ...     "q_groups": np.array([6, 0, 2, 6], np.int16),
      ...     "q_scale": np.zeros((2, 4), np.int32),
      ...     "q_scale_max": np.ones(2, np.float16),
      ...     "q_invperm": np.arange(64, dtype=np.int32),
      ... }
      >>> from_tensors(tensors)
      QTensor(64x32, 4 bits, group 32, Stream(), (q - 2^(bits-1)) * s + z, ...)
    """
    config = config or Config()
    check(tensors, config)
    check_finite(tensors, ("q_scale_max",))
    q_weight = np.asarray(tensors["q_weight"])
    n = config.out_features or q_weight.shape[1]
    groups = read_groups(tensors["q_groups"], q_weight.shape[0])
    inverse = np.asarray(tensors["q_invperm"])
    is_moved = check_permutation(inverse, sum(groups.rows), "q_invperm")
    words, segments = split_words(q_weight[:, :n], groups)
    index = unpack_fields(jnp.asarray(tensors["q_scale"]), 4, axis=1)
    return tensor.build(
        words,
        Scale(index=index[:, :n], maximum=jnp.asarray(tensors["q_scale_max"])),
        layout=Stream(),
        segments=segments,
        affine=Affine.CENTERED,
        order=jnp.asarray(np.argsort(inverse), jnp.int32) if is_moved else None,
    )


@of_whole
def to_tensors(qt: QTensor) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: What `from_tensors` returned, or a tensor like it with a `Scale`.

    Returns:
      ``q_weight``, ``q_groups``, ``q_scale``, ``q_scale_max`` and ``q_invperm``, n
      padded to a multiple of 32 as upstream does: middle codes, and index 15.

    Raises:
      ValueError: If EXL2 cannot hold ``qt``, with the reason.
    """
    scale = _holdable(qt)
    columns = qt.n + -qt.n % _COLUMNS
    order = jnp.arange(qt.k) if qt.order is None else qt.order
    return {
        "q_weight": join_words(qt, columns),
        "q_groups": write_groups(groups_of(qt)),
        "q_scale": _write_index(scale.index, columns),
        "q_scale_max": scale.maximum,
        "q_invperm": jnp.argsort(order).astype(jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=1)
def _write_index(index: Array, columns: int) -> Int32[Array, "groups words"]:
    padding = ((0, 0), (0, columns - index.shape[1]))
    padded = jnp.pad(index, padding, constant_values=15)
    return jax.lax.bitcast_convert_type(pack_fields(padded, 4, 1), jnp.int32)


def _holdable(qt: QTensor) -> Scale:
    """Returns the scale, or says why EXL2 cannot hold the tensor."""
    scale: Any = qt.scale
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif qt.grouping is not Grouping.ROWS or qt.row_group is not None:
        reason = "its groups are not runs of stored rows"
    elif qt.affine is not Affine.CENTERED or qt.zero is not None:
        reason = f"{qt.affine.value} here is not around the middle code; requantize it"
    elif qt.input_scale is not None:
        reason = "it has an input scale; MBWQ holds that"
    elif not isinstance(scale, Scale):
        reason = (
            "its scales are plain numbers, not indices and maxima; write the tensor "
            "before qjax.prepare decodes them, or requantize it"
        )
    else:
        reason = unwritable(groups_of(qt))
    if reason:
        raise ValueError(f"EXL2 cannot hold {qt!r}: {reason}.")
    return scale
