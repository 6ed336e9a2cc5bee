"""SINQ: HQQ's slabs, with a second scale for each input.

``W_q`` holds the codes of torch's ``[N, K]`` weight, viewed with a group of inputs a
row, as `qjax.formats.hqq` draws it for axis 1. Five bits have six slabs in an int32,
and six bits five, where HQQ has a byte for each code:

    bit 31                                                            bit 0
    | 00 | v[d, c] | v[D+d, c] | v[2D+d, c] | ... | v[5D+d, c] |          5 bits
    | 00 | v[d, c] | v[D+d, c] | v[2D+d, c] | v[3D+d, c] | v[4D+d, c] |   6 bits

``meta.scale`` and ``meta.zero`` are ``[N * K / group, 1]``, and ``meta.scale2`` is
``[1, K]``, one for each input. Where a method has "quantAux" in its name, scales and
zeros are bytes, ``x * s + m`` with ``s`` and ``m`` for the columns of ``[32, ...]``
scales, and for all zeros. The weight is ``((q - zero) * scale) * scale2``: each step is
rounded to float16 where it is computed in that and the scales have it; otherwise it is
float32, rounded once to the dtype it is computed in.

Source: huawei-csl/SINQ, sinq/quantizer.py and sinq/bitpack.py, package sinq 0.2.0.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax import tensor
from qjax.formats.checks import (
    Expected,
    check_finite,
    check_shapes,
    check_tensors,
)
from qjax.formats.hqq import Slabs
from qjax.formats.hqq_config import FIELDS
from qjax.formats.sinq_config import SIDECAR, Config
from qjax.tensor import QTensor, Segment

__all__ = ["SIDECAR", "TENSORS", "Config", "check", "from_tensors"]

_AUX = ("x", "s", "m")
TENSORS = (
    "W_q",
    "meta.scale2",
    *(f"meta.{name}" for name in ("scale", "zero")),
    *(f"meta.{name}.{part}" for name in ("scale", "zero") for part in _AUX),
)
_FLOATS = (jnp.float16, jnp.float32)
# Slabs of a word, where HQQ has none.
_WIDE = {5: 6, 6: 5}
# Rows of the scales that are quantized, each column by itself.
_TILE = 32


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``W_q`` uint8, or int32 of 3, 5 and 6 bits, ``[D, group]``; ``meta.scale2``
        float ``[1, K]``; ``meta.scale`` and ``meta.zero`` float ``[N * K / group, 1]``,
        or in their place uint8 ``.x``, and ``.s`` and ``.m`` of the dtype of
        ``meta.scale2``.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    container = jnp.int32 if config.bits in (3, *_WIDE) else jnp.uint8
    like = Expected((), 2, like="meta.scale2")
    expected = {
        "W_q": Expected((container,), 2),
        "meta.scale2": Expected(_FLOATS, 2),
    }
    for name in ("meta.scale", "meta.zero"):
        if name in tensors:
            expected[name] = like
        else:
            bytes_ = {f"{name}.x": Expected((jnp.uint8,), 2)}
            expected |= bytes_ | {f"{name}.{part}": like for part in _AUX[1:]}
    check_tensors(tensors, expected, f"SINQ of {config.nbits} bits")
    n, k = config.shape
    rows, size = tensors["W_q"].shape
    if not size or k % size:
        raise ValueError(
            f"W_q.shape={(rows, size)} must have groups that divide K={k}, from shape="
            f"{[n, k]}."
        )
    groups = n * k // size
    fields = _WIDE.get(config.bits) or FIELDS[config.bits]
    if container == jnp.uint8 and groups % fields:
        raise ValueError(f"shape={[n, k]} must be whole words of {fields} groups.")
    shapes = {"W_q": (-(-groups // fields), size), "meta.scale2": (1, k)}
    shapes |= dict.fromkeys(("meta.scale", "meta.zero"), (groups, 1))
    if "meta.scale" not in tensors and groups % _TILE:
        raise ValueError(f"shape={[n, k]} must have a multiple of {_TILE} groups.")
    shapes["meta.scale.x"] = (_TILE, groups // _TILE)
    shapes |= {f"meta.scale.{part}": (1, groups // _TILE) for part in _AUX[1:]}
    shapes["meta.zero.x"] = (groups, 1)
    shapes |= {f"meta.zero.{part}": (1, 1) for part in _AUX[1:]}
    check_shapes(tensors, shapes, f"shape={[n, k]} and groups of {size}")


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout, of 5 and 6 bits in HQQ's, with
      ``meta.scale2`` as its ``input_scale``. Its dtype is float16 where SINQ rounds to
      that at each step; else it is float32, and ``qjax.dequantize(qt, dtype)`` of the
      dtype that SINQ computes in is what that computes.

    Raises:
      ValueError: As `check`; or if a scale or zero is not finite, or a code is too
        wide.
    """
    check(tensors, config)
    n, k = config.shape
    scale, zero = (_decoded(tensors, f"meta.{name}") for name in ("scale", "zero"))
    second = np.asarray(tensors["meta.scale2"])
    check_finite({"meta.scale": scale, "meta.zero": zero, "meta.scale2": second})
    words, bits, size = np.asarray(tensors["W_q"]), config.bits, tensors["W_q"].shape[1]
    fields = _WIDE.get(bits) or FIELDS[bits]
    words = words.view(f"u{words.itemsize}")
    if (words >> (fields * bits - 1) >> 1).any():
        raise ValueError(f"W_q has codes of more than {bits} bits.")
    if bits in _WIDE:
        shifts = np.arange(fields - 1, -1, -1, dtype=np.uint32)[:, None, None] * bits
        codes = (words[None] >> shifts) & np.uint32(2**bits - 1)
        words = codes.astype(np.uint8).reshape(-1, size)[: n * k // size]
    layout = Slabs(k, size)
    is_narrow = config.compute_dtype == "float16" == second.dtype.name
    return tensor.build(
        (jnp.asarray(words),),
        jnp.asarray(scale.reshape(n, -1).T),
        jnp.asarray(zero.reshape(n, -1).T),
        layout=layout,
        segments=(Segment(bits, size),),
        rounding=2 if is_narrow else 1,
        padding=layout.extents(words.shape, bits)[1] - n,
        weight_dtype=None if is_narrow else "float32",
        input_scale=jnp.asarray(second[0]),
    )


def _decoded(tensors: Mapping[str, Any], name: str) -> np.ndarray:
    """Scales or zeros; of bytes, each step is rounded to the dtype of their scales."""
    if name in tensors:
        return np.asarray(tensors[name])
    x, s, m = (np.asarray(tensors[f"{name}.{part}"]) for part in _AUX)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(s.dtype) * s + m
