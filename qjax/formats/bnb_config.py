"""bitsandbytes' ``quantization_config``, and the quantization state of each weight.

The state is a JSON object, stored as a tensor of its bytes.

Source: bitsandbytes-foundation/bitsandbytes, ``QuantState`` in
bitsandbytes/functional.py, release 0.50.2.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from qjax.formats.bnb_blockwise import TABLES, QuantType
from qjax.formats.checks import check_strings

# The name of the tensor, before that of the table.
PREFIX = "weight.quant_state.bitsandbytes__"
BLOCKSIZES = tuple(2**i for i in range(5, 13))
DTYPES = ("float16", "bfloat16", "float32")
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a bitsandbytes ``quantization_config`` says about one module.

    Block sizes, double quantization, dtypes and the storage are in the tensors.

    Attributes:
      quant_type: "nf4" or "fp4", of 4 bits.
      load_in_8bit: Whether the codes are those of LLM.int8(), and have 8 bits.
      skip_modules: Paths, or parts of them such as "lm_head", that stay dense.
    """

    quant_type: QuantType = "fp4"
    load_in_8bit: bool = False
    skip_modules: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of modules that are not skipped.

        Raises:
          ValueError: If it says neither or both of 4 and 8 bits, or a field has a wrong
            type or value.
        """
        four, eight = (
            _flag(entry, f"load_in_{bits}bit", f"_load_in_{bits}bit") for bits in (4, 8)
        )
        if four == eight:
            raise ValueError(
                f"load_in_4bit={four} and load_in_8bit={eight}: one of them must be "
                "true."
            )
        if eight and _flag(entry, "llm_int8_has_fp16_weight"):
            raise ValueError(
                "llm_int8_has_fp16_weight=true: such weights are dense; remove "
                "quantization_config."
            )
        quant_type = entry.get("bnb_4bit_quant_type", "fp4")
        if not isinstance(quant_type, str) or quant_type not in TABLES:
            raise ValueError(
                f"bnb_4bit_quant_type={quant_type!r} must be one of {list(TABLES)}."
            )
        name = "llm_int8_skip_modules"
        skip = check_strings(name, entry.get(name) or [])
        return cls(
            quant_type=typing.cast(QuantType, quant_type),
            load_in_8bit=eight,
            skip_modules=skip,
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        path = f".{module}."
        return None if any(f".{m}." in path for m in self.skip_modules) else self


def _flag(entry: Mapping[str, Any], *names: str) -> bool:
    """The first of some fields that is there; without any, false."""
    for name in (name for name in names if name in entry):
        if type(value := entry[name]) is not bool:
            raise ValueError(f"{name}={value!r} must be true or false.")
        return value
    return False


class State(NamedTuple):
    """What the object says, in the order of its keys.

    Attributes:
      quant_type: "nf4" or "fp4".
      blocksize: Elements that share a scale.
      dtype: Name of the dtype that the weight had.
      shape: Shape of the torch weight, ``[n, k]``.
      nested_blocksize: Scales that share a scale of theirs; None, as the others below,
        without double quantization.
      nested_dtype: Name of the dtype of scales, "float32".
      nested_offset: What is added to all scales.
    """

    quant_type: QuantType
    blocksize: int
    dtype: str
    shape: list[int]
    nested_blocksize: int | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None

    @classmethod
    def parse(
        cls, blob: UInt8[np.ndarray, " bytes"], quant_type: QuantType, *, nested: bool
    ) -> "State":
        """Reads and checks the bytes of the object.

        Args:
          blob: The file's tensor.
          quant_type: The table that the tensor's name says.
          nested: Whether there are tensors of double quantization.

        Returns:
          The state.

        Raises:
          ValueError: If it is no such object, or has a value that is not supported.
        """
        name = PREFIX + quant_type
        try:
            entry = json.loads(blob.tobytes().decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON: {error}.") from None
        keys = cls._fields if nested else cls._fields[:4]
        if not isinstance(entry, dict) or set(entry) != set(keys):
            raise ValueError(f"{name}={entry!r} must be an object with keys {keys}.")
        state = cls(**entry)
        sound = {
            "quant_type": state.quant_type == quant_type,
            "blocksize": _is_blocksize(state.blocksize),
            "dtype": state.dtype in DTYPES,
            "shape": _is_shape(state.shape),
        }
        if nested:
            sound["nested_blocksize"] = _is_blocksize(state.nested_blocksize)
            sound["nested_dtype"] = state.nested_dtype == "float32"
            sound["nested_offset"] = _is_float32(state.nested_offset)
        for field in (field for field in keys if not sound[field]):
            raise ValueError(f"{name}: {field}={entry[field]!r} is not supported.")
        return state

    def to_blob(self) -> UInt8[np.ndarray, " bytes"]:
        """Writes the bytes of the object, as the original does."""
        entry = {
            key: value for key, value in self._asdict().items() if value is not None
        }
        return np.frombuffer(json.dumps(entry).encode(), np.uint8)


def _is_blocksize(size: Any) -> bool:
    return type(size) is int and size in BLOCKSIZES


def _is_shape(shape: Any) -> bool:
    pair = isinstance(shape, list) and len(shape) == 2
    return pair and all(type(size) is int and size > 0 for size in shape)


def _is_float32(number: Any) -> bool:
    return isinstance(number, int | float) and abs(number) <= _LARGEST
