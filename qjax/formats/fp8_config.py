"""The ``quantization_config`` of FP8 checkpoints, fbgemm's among them.

Source: huggingface/transformers, src/transformers/utils/quantization_config.py
(``FineGrainedFP8Config``, ``FbgemmFp8Config``) and quantizers/quantizers_utils.py,
release 5.23.0; vllm-project/vllm, vllm/model_executor/layers/quantization/fp8.py,
commit 0071b24bf8fe8c3d1bc3516d0ff8477f07964aaf; amd-quark,
quark/torch/export/main_export/quant_config_parser.py, release 0.13, which writes such
files in its mode "fp8".
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from qjax.formats.block_scale import block_size
from qjax.formats.checks import check_choice, check_strings
from qjax.formats.patterns import ends_any, left_dense

_FBGEMM = "fbgemm_fp8"
METHODS = ("fp8", _FBGEMM)
SCALES = ("weight_scale_inv", "weight_scale")
# What transformers takes where a configuration says nothing.
_BLOCK = (128, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an FP8 ``quantization_config`` says.

    Attributes:
      block_size: Outputs and inputs that share a scale; None for one in all, or one an
        output.
      columns: Whether, without blocks, there must be one an output: fbgemm's files.
      scale_fmt: "float", or "ue8m0" for exponents of powers of two; of the files that
        say so, some have float32 scales, and what counts is what a tensor holds. Bytes
        are taken for exponents only if it says "ue8m0".
      ignored: Patterns of paths that stay dense.
    """

    block_size: tuple[int, int] | None = _BLOCK
    columns: bool = False
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
        method = entry.get("quant_method", METHODS[0])
        check_choice("quant_method", method, METHODS)
        check_choice("fmt", entry.get("fmt", "e4m3"), ("e4m3",))
        check_choice("expert_dtype", entry.get("expert_dtype", "fp8"), ("fp8",))
        scale_fmt = entry.get("scale_fmt") or "float"
        check_choice("scale_fmt", scale_fmt, ("float", "ue8m0"))
        size = entry.get("weight_block_size")
        if size is not None:
            size = block_size("weight_block_size", size)
        return cls(
            block_size=size,
            columns=method == _FBGEMM,
            scale_fmt=scale_fmt,
            ignored=_ignored(entry),
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.down_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        left = ends_any(self.ignored, module)
        return None if left else dataclasses.replace(self, ignored=())

    def with_tensors(self, tensors: Mapping[str, Any]) -> "Config":
        """Returns the configuration of a matrix whose scales may be of blocks.

        One without ``weight_block_size`` means blocks of 128 x 128 to transformers, and
        one scale to vLLM, and there are files of both. Scales tell which: where both
        have one, they are the same.

        Args:
          tensors: As in `fp8.check`.

        Returns:
          One with blocks of 128 x 128 if this has none, and there is more than one
          scale, in the shape of theirs.
        """
        shape = tuple(tensors["weight"].shape) if "weight" in tensors else ()
        if self.block_size is not None or self.columns or len(shape) != 2:
            return self
        blocks = tuple(-(-a // b) for a, b in zip(shape, _BLOCK, strict=True))
        found = [tuple(tensors[name].shape) for name in SCALES if name in tensors]
        if blocks == (1, 1) or blocks not in found:
            return self
        return dataclasses.replace(self, block_size=_BLOCK)


def _ignored(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Reads what stays dense; files of Quark have the wildcards of a shell."""
    field = "ignored_layers"
    if "export" not in entry:
        return left_dense(entry, field)
    names = check_strings(field, entry.get(field) or [])
    return tuple(".*".join(map(re.escape, name.split("*"))) for name in names)
