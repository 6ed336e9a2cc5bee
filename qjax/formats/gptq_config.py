"""GPTQ's ``quantization_config``, and the older file of AutoGPTQ.

Source: AutoGPTQ/AutoGPTQ, auto_gptq/quantization/config.py, commit
9f7d37072917ab3a7545835f23e808294a542153; ModelCloud/GPTQModel,
gptqmodel/quantization/config.py, commit f4c327a17eb3e24524d5a97a3d682e3696ae6a28.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qjax.formats.patterns import check_pattern, matches

Checkpoint = Literal["gptq", "gptq_v2", "gptq_p"]
# What each can hold.
WIDTHS: Mapping[Checkpoint, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "gptq_p": tuple(range(2, 9)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a GPTQ ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code: 2, 3, 4, 8; with "gptq_p" any from 2 to 8.
      group_size: Rows that share a scale; None (-1 in the file) for one group a column.
      checkpoint_format: "gptq" (v1: stored zero + 1), "gptq_v2", or "gptq_p" (planes;
        the stored zero is the zero, as in v2).
      wordwise_zeros: The v1 zeros were made by subtracting from whole words, as
        GPTQModel does for asymmetric weights: a zero of 0 has borrowed from its
        neighbour. Reading adds to whole words again; the default reads field by field.
      act_order: The groups are no runs of rows (``desc_act``): ``g_idx`` must be there.
      dynamic: GPTQModel's per-module overrides: patterns of module paths in order, each
        with its configuration, or None where the module is left dense.
    """

    bits: int = 4
    group_size: int | None = 128
    checkpoint_format: Checkpoint = "gptq"
    wordwise_zeros: bool = False
    act_order: bool = False
    dynamic: tuple[tuple[str, "Config | None"], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json (or quantize_config.json).

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of modules without an override.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for a
            variant that this format does not cover.
        """
        name = entry.get("checkpoint_format", entry.get("format", "gptq"))
        if entry.get("is_marlin_format"):
            raise ValueError(
                "is_marlin_format=true is a device layout, no GPTQ layout."
            )
        if name not in tuple(WIDTHS):
            raise ValueError(
                f"checkpoint_format={name!r} is no GPTQ layout; known: {list(WIDTHS)}."
            )
        if entry.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"pack_dtype={entry['pack_dtype']!r} must be 'int32'.")
        bits, group_size = entry.get("bits"), entry.get("group_size", -1)
        if type(bits) is not int or bits not in WIDTHS[name]:
            raise ValueError(
                f"bits={bits!r} must be one of {WIDTHS[name]} with "
                f"checkpoint_format={name!r}."
            )
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ValueError(f"group_size={group_size!r} must be positive or -1.")
        for field in ("sym", "desc_act"):
            if not isinstance(entry.get(field), bool | None):
                raise ValueError(  # noqa: TRY004
                    f"{field}={entry[field]!r} must be true or false."
                )
        meta = entry.get("meta")
        writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
        writers = writers if isinstance(writers, list) else [writers]
        by_gptqmodel = any(str(writer).startswith("gptqmodel") for writer in writers)
        return cls(
            bits=bits,
            group_size=None if group_size == -1 else group_size,
            checkpoint_format=name,
            wordwise_zeros=by_gptqmodel and entry.get("sym") is False,
            act_order=bool(entry.get("desc_act")),
            dynamic=_read_dynamic(entry),
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        for pattern, config in self.dynamic:
            if matches(pattern, module):
                return config
        return self


def _read_dynamic(
    entry: Mapping[str, Any],
) -> tuple[tuple[str, Config | None], ...]:
    """Reads the per-module overrides: patterns in order, with what they stand for."""
    dynamic = entry.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(
        isinstance(value, Mapping) for value in dynamic.values()
    ):
        raise ValueError(f"dynamic={dynamic!r} must map patterns to objects.")
    rules = []
    for signed, overrides in dynamic.items():
        pattern = signed.removeprefix("-:").removeprefix("+:")
        check_pattern(f"dynamic[{signed!r}]", pattern)
        if signed.startswith("-:"):
            rules.append((pattern, None))
            continue
        merged = {**entry, **overrides, "dynamic": None}
        try:
            rules.append((pattern, Config.from_json(merged)))
        except ValueError as error:
            raise ValueError(f"dynamic[{signed!r}]: {error}") from None
    return tuple(rules)
