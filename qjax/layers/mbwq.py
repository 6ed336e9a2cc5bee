"""bitorch-engine's MBWQ layer: what `linen.MBWQDense` and `nnx.MBWQLinear` share.

The kernel is the `QTensor` that `qjax.formats.mbwq` reads; here are the tensors of an
empty layer, and those of the layer beside the kernel.

Source: GreenBitAI/bitorch-engine, bitorch_engine/layers/qlinear/nbit/cuda/
mbwq_layer.py, commit 0009b1f8178e86df6433383879c0005a49c0cc92.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float16

from qjax import ops, tensor
from qjax.formats import mbwq
from qjax.formats.checks import Expected, check_tensors
from qjax.formats.q_groups import make_group_map, rows
from qjax.layers import dense
from qjax.tensor import QTensor

# What a layer has beside what its kernel is read from.
_BESIDE = {
    "bias": Expected((jnp.float16,), 1, optional=True),
    "rows": Expected((jnp.int32,), 1, optional=True),
}


def empty(
    shape: tuple[int, ...],
    *,
    bits: int,
    group_size: int | None,
    q_groups: Sequence[int] | None,
) -> QTensor:
    """Makes the kernel of a new layer, prepared for this device: all zeros.

    Args:
      shape: (in_features, out_features).
      bits: Width of a code where ``q_groups`` is None, 4 or 2.
      group_size: Rows that share a scale there; None for all.
      q_groups: Pairs (width, first row of words), one a group; the last group has the
        rows that are left. None: all rows have ``bits``.

    Returns:
      The kernel, as `formats.mbwq.from_tensors` gives it.

    Raises:
      ValueError: If the arguments do not fit together.
    """
    k, n = shape
    if q_groups is None:
        mbwq.Config.from_json({"bits": bits, "group_size": group_size})
        if k % 32:
            raise ValueError(
                f"in_features={k} must be a multiple of 32; pad the inputs."
            )
        height, groups, mix = k * bits // 32, -(-k // (group_size or k)), {}
        q_perm = np.zeros(k, np.int16)
    else:
        height, groups = _height(k, q_groups), len(q_groups) // 2
        mix = {"q_groups": np.array(q_groups, np.uint16).view(np.int16)}
        q_perm = np.arange(k, dtype=np.uint16).view(np.int16)
    tensors = {
        "qweight": np.zeros((height, n), np.int32),
        "scales": np.zeros((groups, n), np.float16),
        "zeros": np.zeros((groups, n), np.float16),
        "q_perm": q_perm,
    }
    config = mbwq.Config(bits=bits, group_size=group_size or k)
    return ops.prepare(mbwq.from_tensors(tensors | mix, config))


def _height(k: int, q_groups: Sequence[int]) -> int:
    """Rows of words of ``k`` rows."""
    pairs = np.array(q_groups, np.int64)
    if pairs.ndim == 1 and pairs.size and pairs.size % 2 == 0:
        bits, first = pairs.reshape(-1, 2).T
        before = (np.diff(first) * 32 // np.maximum(bits[:-1], 1)).sum()
        words, rest = divmod(int((k - before) * bits[-1]), 32)
        if words > 0 and not rest:
            return int(first[-1]) + words
    raise ValueError(
        f"q_groups={list(q_groups)} must be pairs (width, first row of words) whose "
        f"last group has whole words of what is left of in_features={k}."
    )


def read(
    tensors: Mapping[str, Any], group_size: int | None, *, use_bias: bool
) -> tuple[QTensor, Array | None]:
    """Reads the state of a layer, whose shapes and ``q_groups`` decide the mix.

    Args:
      tensors: Concrete arrays by upstream name: those of `formats.mbwq.check`, and
        optionally ``bias`` float16 ``[n]`` and, beside ``q_groups``, ``rows`` int32.
      group_size: Rows that share a scale without ``q_groups``, where several sizes
        would have as many scales as there are; None for the power of two among them.
      use_bias: Whether the layer has a bias. Upstream saves one with every layer, also
        where it is not added; it then must be zero.

    Returns:
      Kernel and bias.

    Raises:
      ValueError: As `formats.mbwq.from_tensors`; or if ``rows`` or ``q_group_map``
        contradicts ``q_groups``, or the bias is missing or is not for this layer.
    """
    beside = {name: tensors[name] for name in _BESIDE if name in tensors}
    check_tensors(beside, _BESIDE, "an MBWQ layer")
    stored = {name: array for name, array in tensors.items() if name not in _BESIDE}
    bias = jnp.asarray(beside["bias"]) if "bias" in beside else None
    if use_bias and bias is None:
        raise ValueError("bias is missing; make the layer with use_bias=False.")
    if not use_bias and bias is not None and bias.any():
        raise ValueError(
            "bias is not zero, but the layer has none; make it with use_bias=True."
        )
    fits = (
        group_size is not None
        and {"q_perm", "scales"} <= stored.keys()
        and -(-len(stored["q_perm"]) // group_size) == len(stored["scales"])
    )
    config = mbwq.Config(group_size=group_size if fits else None)
    kernel = mbwq.from_tensors(stored, config)
    _check_derived(stored, beside.get("rows"))
    dense.check_shapes(kernel, bias)
    return kernel, bias if use_bias else None


def _check_derived(tensors: Mapping[str, Any], cumulative: Any) -> None:
    """Checks what upstream derives from ``q_groups``, where it was saved as well."""
    found = {"rows": cumulative, "q_group_map": tensors.get("q_group_map")}
    found = {name: array for name, array in found.items() if array is not None}
    if found and "q_groups" not in tensors:
        raise ValueError(
            f"{[*found]} must come with the q_groups that they are made of."
        )
    for name, array in found.items():
        derive = rows if name == "rows" else make_group_map
        wanted = derive(tensors["q_groups"], len(tensors["qweight"]))
        if not np.array_equal(np.asarray(array).reshape(-1), wanted):
            raise ValueError(f"{name} must be what q_groups says; leave it out.")


def write(kernel: QTensor, bias: Array | None, mixed: bool | None) -> dict[str, Array]:
    """Writes the state of a layer, bit for bit as it was read.

    Args:
      kernel: Its kernel.
      bias: Its bias, or None.
      mixed: As in `formats.mbwq.to_tensors`.

    Returns:
      What `formats.mbwq.to_tensors` gives, and ``bias``.

    Raises:
      ValueError: If MBWQ cannot hold the kernel, with the reason.
    """
    tensors = mbwq.to_tensors(kernel, mixed)
    return tensors if bias is None else tensors | {"bias": bias}


def with_scales(
    kernel: QTensor, scales: Float16[Array | np.ndarray, "groups n"]
) -> QTensor:
    """Returns a kernel with other scales.

    Args:
      kernel: The kernel.
      scales: ``[groups, n]`` in its dtype.

    Raises:
      ValueError: If shape or dtype differ.
    """
    held = tensor.plain(kernel.scale)
    return dataclasses.replace(kernel, scale=_like("scales", scales, held))


def with_zeros(
    kernel: QTensor, zeros: Float16[Array | np.ndarray, "groups n"]
) -> QTensor:
    """Returns a kernel with other zeros: upstream's, which are subtracted.

    Args:
      kernel: An MBWQ kernel.
      zeros: ``[groups, n]`` in the dtype of its scales.

    Raises:
      ValueError: If shape or dtype differ, or the kernel has no such zeros.
    """
    if kernel.affine is not tensor.Affine.OFFSET or kernel.zero is None:
        raise ValueError(f"zeros were given for {kernel!r}, which is no MBWQ kernel.")
    negated = -_like("zeros", zeros, tensor.plain(kernel.zero))
    return dataclasses.replace(kernel, zero=negated)


def _like(name: str, given: Array | np.ndarray, held: Array) -> Array:
    array = jnp.asarray(given)
    if (array.shape, array.dtype) != (held.shape, held.dtype):
        raise ValueError(
            f"{name} must be {held.dtype}{held.shape}, as the layer's own; got "
            f"{array.dtype}{array.shape}."
        )
    return array
