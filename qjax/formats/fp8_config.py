"""The ``quantization_config`` of FP8 checkpoints.

Source: huggingface/transformers, src/transformers/utils/quantization_config.py
(``FineGrainedFP8Config``) and quantizers/quantizers_utils.py, release 5.23.0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qjax.formats.block_scale import block_size
from qjax.formats.checks import check_choice, check_method
from qjax.formats.patterns import check_patterns, ends_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an FP8 ``quantization_config`` says.

    Attributes:
      block_size: Outputs and inputs that share a scale; None for one in all, or one an
        output.
      scale_fmt: "float", or "ue8m0" for exponents of powers of two; of the files that
        say so, some have float32 scales, and what counts is what a tensor holds. Bytes
        are taken for exponents only if it says "ue8m0".
      ignored: Patterns of paths that stay dense.
    """

    block_size: tuple[int, int] | None = (128, 128)
    scale_fmt: Literal["float", "ue8m0"] = "float"
    ignored: tuple[str, ...] = ()

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
        check_method(entry, "fp8")
        check_choice("fmt", entry.get("fmt", "e4m3"), ("e4m3",))
        check_choice("expert_dtype", entry.get("expert_dtype", "fp8"), ("fp8",))
        scale_fmt = entry.get("scale_fmt") or "float"
        check_choice("scale_fmt", scale_fmt, ("float", "ue8m0"))
        size = entry.get("weight_block_size")
        if size is not None:
            size = block_size("weight_block_size", size)
        aliases = ("modules_to_not_convert", "ignored_layers")
        field = next((name for name in aliases if entry.get(name)), aliases[0])
        return cls(
            block_size=size,
            scale_fmt=scale_fmt,
            ignored=check_patterns(field, entry.get(field) or []),
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.down_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        left = any(ends_path(pattern, module) for pattern in self.ignored)
        return None if left else dataclasses.replace(self, ignored=())
