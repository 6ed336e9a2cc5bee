"""torchao's ``quantization_config``, as transformers writes it to config.json.

Source: pytorch/ao, torchao/quantization/quant_api.py, release 0.18.0;
huggingface/transformers, src/transformers/quantizers/quantizers_utils.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.formats import tinygemm_config
from qjax.formats.checks import check_strings
from qjax.formats.patterns import check_pattern, ends_any, matches

_INTX = ("IntxWeightOnlyConfig",)
_INT8 = ("Int8WeightOnlyConfig",)
_INT4 = ("Int4WeightOnlyConfig",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a torchao ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code, 1 to 8.
      group_size: Inputs that share a scale; None for one scale an output.
      per_tensor: Whether the whole weight shares one scale.
      tiled: Whether the tensors are tinygemm's, which `with_header` has to describe.
      overrides: Configurations by module or ``re:`` pattern, as torchao's
        ``FqnToConfig`` has them; None leaves a module dense.
      ignored: Modules that transformers left dense (``modules_to_not_convert``).
    """

    bits: int = 8
    group_size: int | None = None
    per_tensor: bool = False
    tiled: bool = False
    overrides: tuple[tuple[str, "Config | None"], ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object, as transformers writes it beside safetensors.

        Returns:
          The configuration of the whole checkpoint; `of` gives that of a module.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for a
            kind of tensor that this format does not cover.
        """
        kind = entry.get("quant_type")
        if not isinstance(kind, Mapping) or not isinstance(
            kind.get("default"), Mapping
        ):
            # No TypeError, here and below: the file is wrong, not an argument's type.
            raise ValueError(  # noqa: TRY004
                f"quant_type={kind!r} must be an object with 'default', as newer "
                "transformers write it beside safetensors files; save the model anew."
            )
        ignored = entry.get("modules_to_not_convert") or []
        _check_patterns("modules_to_not_convert", ignored)
        table = _data(kind["default"])
        if kind["default"].get("_type") not in ("FqnToConfig", "ModuleFqnToConfig"):
            return dataclasses.replace(_one(kind["default"]), ignored=tuple(ignored))
        by_name = table.get("fqn_to_config") or table.get("module_fqn_to_config")
        if not isinstance(by_name, Mapping) or not by_name:
            raise ValueError(f"fqn_to_config={by_name!r} must map modules to objects.")
        patterns = [name[3:] for name in by_name if name.startswith("re:")]
        _check_patterns("fqn_to_config", patterns)
        overrides = tuple(
            (name, None if one is None else _one(one)) for name, one in by_name.items()
        )
        return cls(overrides=overrides, ignored=tuple(ignored))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        if ends_any(self.ignored, module):
            return None
        if not self.overrides:
            return dataclasses.replace(self, ignored=())
        names, table = (f"{module}.weight", module), dict(self.overrides)
        for name in names:
            if name in table:
                return table[name]
        for name in names:
            for pattern, config in self.overrides:
                if pattern[:3] == "re:" and matches(pattern[3:], name, whole=True):
                    return config
        return table.get("_default")

    def with_header(
        self, entry: Mapping[str, Any] | None
    ) -> "Config | tinygemm_config.Config":
        """Adds what the safetensors header says about one weight.

        Args:
          entry: The parsed JSON of the weight's entry in the header's metadata, or None
            if there is none.

        Returns:
          The configuration of that weight.

        Raises:
          ValueError: If the header is needed and says nothing, or something else than
            the configuration.
        """
        if not self.tiled:
            return self
        if entry is None:
            raise ValueError(
                "the weight is padded, and the metadata in the safetensors header, "
                "which would tell its shape, does not name it; save the model anew."
            )
        if entry.get("_type") != "Int4TilePackedTo4dTensor":
            raise ValueError(
                f"_type={entry.get('_type')!r} in the safetensors header must be "
                "'Int4TilePackedTo4dTensor', from quant_type."
            )
        config = tinygemm_config.Config.from_json(_data(entry))
        if config.group_size != self.group_size:
            raise ValueError(
                f"block_size=[1, {config.group_size}] in the safetensors header must "
                f"be [1, {self.group_size}], from quant_type."
            )
        return config


def _check_patterns(name: str, patterns: Any) -> None:
    for pattern in check_strings(name, patterns):
        check_pattern(name, pattern)


def _data(entry: Any) -> Mapping[str, Any]:
    """The fields of an object that torchao wrote as ``{"_type", "_data"}``."""
    data = entry.get("_data") if isinstance(entry, Mapping) else None
    if not isinstance(data, Mapping):
        raise ValueError(  # noqa: TRY004
            f"{entry!r} must be an object with '_type' and '_data'."
        )
    return data


def _one(entry: Any) -> Config:
    """Reads the configuration of one kind of tensor."""
    data, kind = _data(entry), entry.get("_type")
    if kind in _INT4:
        return _int4(data)
    if kind not in _INT8 + _INTX:
        raise ValueError(
            f"quant_type {kind!r} is not supported; known: {[*_INT8, *_INTX, *_INT4]}, "
            "alone or in FqnToConfig."
        )
    bits = _intx_bits(data) if kind in _INTX else 8
    if data.get("group_size") is not None:
        raise ValueError(
            f"group_size={data['group_size']!r} is of version 1 of torchao's {kind}, "
            "which no safetensors file has; it must be null."
        )
    granularity = data.get("granularity", {"_type": "PerRow", "_data": {}})
    fields, name = _data(granularity), granularity.get("_type")
    if name == "PerGroup":
        size = fields.get("group_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"group_size={size!r} must be a positive integer.")
        return Config(bits=bits, group_size=size)
    if name == "PerTensor":
        return Config(bits=bits, per_tensor=True)
    rows = name == "PerRow" and fields.get("dim", -1) in (-1, 1)
    if not rows and not (name == "PerAxis" and fields.get("axis", 0) == 0):
        raise ValueError(
            f"granularity={granularity!r} must be PerRow, PerAxis(0), PerGroup or "
            "PerTensor."
        )
    return Config(bits=bits)


def _intx_bits(data: Mapping[str, Any]) -> int:
    dtype = data.get("weight_dtype")
    name = dtype.get("_data") if isinstance(dtype, Mapping) else None
    if name not in [f"int{width}" for width in range(1, 9)]:
        raise ValueError(f"weight_dtype={dtype!r} must be torch.int1 to int8.")
    _check_packing(data, "intx_packing_format", "unpacked_to_int8", optional=True)
    return int(name[3:])


def _int4(data: Mapping[str, Any]) -> Config:
    _check_packing(data, "int4_packing_format", "tile_packed_to_4d")
    tile, size = data.get("int4_tile_packed_ntile", 8), data.get("group_size")
    sizes = tinygemm_config.GROUP_SIZES
    if tile != 8:
        raise ValueError(
            f"int4_tile_packed_ntile={tile!r} must be 8: AMD GPUs, which have 16, "
            "store another order of the same words."
        )
    if type(size) is not int or size not in sizes:
        raise ValueError(f"group_size={size!r} must be one of {sizes}, for int4.")
    return Config(bits=4, group_size=size, tiled=True)


def _check_packing(
    data: Mapping[str, Any], name: str, wanted: str, optional: bool = False
) -> None:
    """An enumeration is an object with the name of a member, or its value."""
    packing = data.get(name)
    packing = packing.get("_data") if isinstance(packing, Mapping) else packing
    known = (wanted, wanted.upper(), *((None,) if optional else ()))
    if packing not in known:
        raise ValueError(f"{name}={packing!r} must be {wanted!r}.")
