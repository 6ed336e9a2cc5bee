"""AWQ's ``quantization_config``, and the older file of AutoAWQ.

Source: casper-hansen/AutoAWQ, awq/models/_config.py, commit
88e4c76b20755db275574e6a03c83c84ba3bece5; huggingface/transformers,
src/transformers/utils/quantization_config.py; amd-quark,
quark/torch/export/main_export/quant_config_parser.py, release 0.13, which writes such
files in its mode "awq".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from qjax.formats.checks import check_strings

Version = Literal["gemm", "gemv", "gemv_fast"]
VERSIONS: tuple[Version, ...] = get_args(Version)
# By what files say.
_NAMES: Mapping[str, Version] = {
    **{version: version for version in VERSIONS},
    # Names of kernels: the files are those of gemm.
    "exllama": "gemm",
    "ipex": "gemm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an AWQ ``quantization_config`` says about one module.

    Attributes:
      group_size: Inputs that share a scale; None (-1 in the file) for all of them.
      version: Which tensors the file has; None where the file does not say: then their
        dtypes and shapes do.
      modules_to_not_convert: Parts of names; a module with one in its path is dense.
    """

    group_size: int | None = 128
    version: Version | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json, or AutoAWQ's older file.

        Args:
          entry: The parsed JSON object; ``w_bit`` and ``q_group_size`` are older names
            of ``bits`` and ``group_size``.

        Returns:
          The configuration.

        Raises:
          ValueError: If a field has a wrong type or value, or asks for a variant that
            this format does not cover.
        """
        bits = entry.get("bits", entry.get("w_bit"))
        if type(bits) is not int or bits != 4:
            raise ValueError(f"bits={bits!r} must be 4, the only width of AWQ files.")
        group_size = entry.get("group_size", entry.get("q_group_size", 128))
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ValueError(f"group_size={group_size!r} must be positive or -1.")
        _check_quark(entry)
        name = entry.get("version")
        # With llm-awq's own files transformers leaves "version" at its default.
        if name is None or entry.get("backend") == "llm-awq":
            version = None
        elif isinstance(name, str) and name.lower() in _NAMES:
            version = _NAMES[name.lower()]
        else:
            raise ValueError(
                f"version={name!r} is no AWQ layout; known: {list(_NAMES)}."
            )
        field = "modules_to_not_convert"
        return cls(
            group_size=None if group_size == -1 else group_size,
            version=version,
            modules_to_not_convert=check_strings(field, entry.get(field) or []),
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        dense = any(part in module for part in self.modules_to_not_convert)
        return None if dense else self


def _check_quark(entry: Mapping[str, Any]) -> None:
    """Checks Quark's files, which alone name how codes are packed."""
    if "pack_method" not in entry:
        return
    order, zeros = entry["pack_method"], entry.get("zero_point")
    if order != "reorder" or zeros is not True:
        raise ValueError(
            f"pack_method={order!r} and zero_point={zeros!r} must be 'reorder' and "
            "true: the words of Quark's others are none of AWQ's."
        )
