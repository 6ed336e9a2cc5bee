"""What torchao's safetensors files say in their headers about a tiled int4 weight.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_utils.py and
torchao/quantization/quantize_/workflows/int4/int4_tile_packed_to_4d_tensor.py, release
0.18.0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

GROUP_SIZES = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the header of torchao's ``Int4TilePackedTo4dTensor`` says about one weight.

    Attributes:
      group_size: The inputs that share a scale: 32, 64, 128 or 256.
      inner_k_tiles: 8 in torchao's tensors; gpt-fast also wrote 2 and 4.
      shape: torch's ``(N, K)`` before padding. None: nothing is padding.
      names: The weight's tensors, factors of its inputs among them; None is not told.
    """

    group_size: int
    inner_k_tiles: int = 8
    shape: tuple[int, int] | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads ``_data`` of the tensor's entry in the safetensors header.

        Args:
          entry: ``{"block_size": [1, group], "shape": [N, K]}``.

        Raises:
          ValueError: If a field is missing or wrong.
        """
        block, shape = entry.get("block_size"), entry.get("shape")
        if (
            not isinstance(block, list)
            or len(block) != 2
            or block[0] != 1
            or type(block[1]) is not int
            or block[1] not in GROUP_SIZES
        ):
            raise ValueError(f"block_size={block!r} must be [1, one of {GROUP_SIZES}].")
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(type(size) is int and size > 0 for size in shape)
        ):
            raise ValueError(f"shape={shape!r} must be [N, K].")
        return cls(group_size=block[1], shape=(shape[0], shape[1]))

    def of(self, module: str) -> "Config | None":
        """Returns this configuration: a header describes one weight."""
        del module
        return self
