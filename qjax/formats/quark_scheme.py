"""How AMD Quark quantizes the weights of a layer, and how it says so.

Source: as `quark_config`.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import DTypeLike

QScheme = Literal["per_tensor", "per_channel", "per_group", "per_block"]


class Stored(NamedTuple):
    """How a file has codes: in what dtype, and how many of them in how many items."""

    dtype: DTypeLike
    bits: int
    codes: int = 1
    items: int = 1


# By the type of codes. Sixteen of six bits fill three words of 32 bits.
_STORED = {
    "fp8_e4m3": Stored(jnp.float8_e4m3fn, 8),
    "int8": Stored(jnp.int8, 8),
    "uint8": Stored(jnp.uint8, 8),
    "int4": Stored(jnp.int32, 4, codes=8),
    "uint4": Stored(jnp.int32, 4, codes=8),
    "int2": Stored(jnp.int32, 2),
    "uint2": Stored(jnp.uint8, 2, codes=4),
    "fp4": Stored(jnp.uint8, 4, codes=2),
    "fp6_e2m3": Stored(jnp.uint8, 6, codes=16, items=12),
    "fp6_e3m2": Stored(jnp.uint8, 6, codes=16, items=12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are quantized.

    Attributes:
      dtype: Type of the codes, as Quark names it.
      qscheme: What shares a scale: all, an output, a group of inputs, or a block.
      group_size: Inputs of a group; None for all of them.
      block_size: Outputs and inputs of a block; None unless that is the scheme.
      symmetric: Whether integers have no zero points, or only zeros.
      exponents: Whether scales are E8M0 exponents.
      float_zero: Whether zero points are not packed, as floats cannot be.
      nested: Whether scales are E4M3 floats with a scale of their own: NVFP4.
    """

    dtype: str
    qscheme: QScheme
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    symmetric: bool = True
    exponents: bool = False
    float_zero: bool = False
    nested: bool = False

    @property
    def stored(self) -> Stored:
        """How a file has the codes."""
        return _STORED[self.dtype]

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return "int" in self.dtype

    @property
    def is_signed(self) -> bool:
        """Whether these have a sign, in two's complement."""
        return self.dtype.startswith("int")

    @property
    def is_turned(self) -> bool:
        """Whether files have the weight as ``[k, n]``."""
        return self.is_integer and self.qscheme == "per_group"

    def to_json(self) -> dict[str, Any]:
        """Makes the entry of layers that are quantized so.

        Those in FP8 have inputs in FP8 as well, with scales that are found as the model
        runs: vLLM reads no others.
        """
        return {
            "input_tensors": _inputs(self),
            "output_tensors": None,
            "weight": _tensor(self),
            "bias": None,
            "target_device": None,
        }


# What Quark would find the scales of a scheme with.
_OBSERVERS = {
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
    "per_group": "PerGroupMinMaxObserver",
    "per_block": "PerBlock2DMinMaxObserver",
}


def _tensor(scheme: Scheme) -> dict[str, Any]:
    observer = _OBSERVERS[scheme.qscheme]
    if scheme.qscheme == "per_group" and not scheme.is_integer:
        observer = "PerBlockMXObserver"
    return {
        "dtype": scheme.dtype,
        "is_dynamic": False,
        "qscheme": scheme.qscheme,
        "ch_axis": {"per_channel": 0, "per_group": -1}.get(scheme.qscheme),
        "group_size": scheme.group_size,
        "block_size": scheme.block_size and list(scheme.block_size),
        "symmetric": scheme.symmetric,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": "e8m0" if scheme.exponents else None,
        "scale_calculation_mode": "even" if scheme.exponents else None,
        "mx_element_dtype": None,
        "observer_cls": observer,
        "is_scale_quant": False,
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.dtype != "fp8_e4m3" or scheme.exponents:
        return None
    size = scheme.block_size and scheme.block_size[1]
    groups: QScheme = "per_group" if size else "per_channel"
    inputs = Scheme(dtype=scheme.dtype, qscheme=groups, group_size=size)
    # The last axis of the inputs of a layer, of which each row has its scale.
    return _tensor(inputs) | {"is_dynamic": True, "ch_axis": -1 if size else 1}
