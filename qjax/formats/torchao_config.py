"""torchao's ``quantization_config``, as transformers writes it to config.json.

Source: pytorch/ao, torchao/quantization/quant_api.py, release 0.18.0;
huggingface/transformers, src/transformers/quantizers/quantizers_utils.py.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from qjax.formats import tinygemm_config
from qjax.formats import torchao_header as header
from qjax.formats.checks import check_strings
from qjax.formats.patterns import check_pattern, ends_any, matches
from qjax.formats.torchao_header import attributes

# What each configuration makes of a weight.
_CLASSES: Mapping[str, str] = types.MappingProxyType(
    {
        "Int8WeightOnlyConfig": header.INT8,
        "Int8DynamicActivationInt8WeightConfig": header.INT8,
        "Int8StaticActivationInt8WeightConfig": header.INT8,
        "IntxWeightOnlyConfig": header.INTX,
        "Int8DynamicActivationIntxWeightConfig": header.INTX,
        "Int4WeightOnlyConfig": header.INT4,
        "Float8DynamicActivationInt4WeightConfig": header.INT4,
        "Float8WeightOnlyConfig": header.FLOAT8,
        "Float8DynamicActivationFloat8WeightConfig": header.FLOAT8,
        "MXDynamicActivationMXWeightConfig": header.MX,
        "NVFP4WeightOnlyConfig": header.NVFP4,
        "NVFP4DynamicActivationNVFP4WeightConfig": header.NVFP4,
    }
)
# These quantize as another configuration does, and keep a factor of each input.
_WITH_FACTORS = ("AWQConfig", "SmoothQuantConfig")
_TABLES = ("FqnToConfig", "ModuleFqnToConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a torchao ``quantization_config``, and a file's header, say of one weight.

    Attributes:
      kind: Class of torchao's tensor.
      bits: Width of a code, 1 to 8.
      group_size: Inputs that share a scale; None for one scale an output.
      per_tensor: Whether the whole weight shares one scale.
      block: Outputs and inputs that share a scale, where the header has told; it then
        stands for the two before.
      shape: torch's ``(N, K)``, where the header has told.
      weight_dtype: Name of the dtype that the weight had, where the header has told.
      swizzled: Whether scales lie as NVIDIA's tensor cores read them.
      names: The tensors that there are, where the header has told.
      described: Whether nothing else than this is needed; else `with_header` is.
      overrides: Configurations by module or ``re:`` pattern, as torchao's
        ``FqnToConfig`` has them; None leaves a module dense.
      ignored: Modules that transformers left dense (``modules_to_not_convert``).
    """

    kind: str = header.INT8
    bits: int = 8
    group_size: int | None = None
    per_tensor: bool = False
    block: tuple[int, int] | None = None
    shape: tuple[int, int] | None = None
    weight_dtype: str | None = None
    swizzled: bool = False
    names: tuple[str, ...] | None = None
    described: bool = True
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
        table = attributes(kind["default"])
        if kind["default"].get("_type") not in _TABLES:
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
        if entry is None and self.described:
            return self
        if entry is None:
            raise ValueError(
                f"the metadata in the safetensors header, which would tell the shape "
                f"of {self.kind} and of its scales, does not name the weight; save the "
                "model anew."
            )
        said = header.read(entry, (self.kind,))
        if self.kind == header.TILED:
            config = tinygemm_config.Config.from_json(attributes(entry))
            config = dataclasses.replace(config, names=said["names"])
            block = (1, config.group_size)
        else:
            config = dataclasses.replace(self, described=True, **said)
            block = said["block"]
        if self.kind == header.INTX and said["bits"] != self.bits:
            raise ValueError(
                f"target_dtype='int{said['bits']}' in the safetensors header must be "
                f"'int{self.bits}', from quant_type."
            )
        if self.group_size is not None and block != (1, self.group_size):
            raise ValueError(
                f"block_size={list(block)} in the safetensors header must be "
                f"[1, {self.group_size}], from quant_type."
            )
        return config

    def described_alike(self) -> "Config":
        """Returns what weights of other shapes have as well."""
        alike = self.block if self.block == (128, 128) else None
        return dataclasses.replace(self, block=alike, shape=None, weight_dtype=None)

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration by which torchao would make such weights."""
        said: dict[str, Any] = {"set_inductor_config": True}
        version, granularity = 2, self._granularity_to_json()
        if self.kind == header.INT8:
            name = "Int8WeightOnlyConfig"
            said |= {"granularity": granularity, "group_size": None}
        elif self.kind == header.INTX:
            name, said = (
                "IntxWeightOnlyConfig",
                {
                    "granularity": granularity,
                    "weight_dtype": header.dtype_to_json(f"int{self.bits}"),
                    "mapping_type": _enum("MappingType", "SYMMETRIC"),
                    "scale_dtype": None,
                    "intx_packing_format": _enum(
                        "IntxPackingFormat", "UNPACKED_TO_INT8"
                    ),
                },
            )
        elif self.kind in (header.INT4, header.TILED):
            packing = "PLAIN" if self.kind == header.INT4 else "TILE_PACKED_TO_4D"
            name, said["group_size"] = "Int4WeightOnlyConfig", self.group_size
            said["int4_packing_format"] = _enum("Int4PackingFormat", packing)
        elif self.kind == header.FLOAT8 and self.block is not None:
            name = "Float8DynamicActivationFloat8WeightConfig"
            sizes = ([1, self.block[1]], list(self.block))
            blocks = [_object("PerBlock", {"block_size": size}) for size in sizes]
            said["granularity"] = blocks
        elif self.kind == header.FLOAT8:
            name, said["granularity"] = "Float8WeightOnlyConfig", granularity
        elif self.kind == header.MX:
            name, version = "MXDynamicActivationMXWeightConfig", 1
            element = header.dtype_to_json(header.element_of(self.bits))
            said = {"activation_dtype": element, "weight_dtype": element}
        else:
            name, version, said = "NVFP4WeightOnlyConfig", 1, {}
        return _object(name, said, version)

    def _granularity_to_json(self) -> dict[str, Any]:
        if self.per_tensor and self.kind != header.INTX:
            return _object("PerTensor", {})
        if self.group_size is not None:
            return _object("PerGroup", {"group_size": self.group_size})
        if self.kind == header.INTX:
            return _object("PerAxis", {"axis": 0})
        return _object("PerRow", {"dim": -1})


def _object(name: str, data: Mapping[str, Any], version: int = 1) -> dict[str, Any]:
    return {"_type": name, "_version": version, "_data": dict(data)}


def _enum(name: str, member: str) -> dict[str, str]:
    return {"_type": name, "_data": member}


def _check_patterns(name: str, patterns: Any) -> None:
    for pattern in check_strings(name, patterns):
        check_pattern(name, pattern)


def _one(entry: Any) -> Config:
    """Reads the configuration of one kind of tensor."""
    if isinstance(entry, Mapping) and entry.get("_type") in _WITH_FACTORS:
        entry = attributes(entry).get("base_config")
    data, name = attributes(entry), entry.get("_type")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(
            f"quant_type {name!r} is not supported; known: "
            f"{[*_CLASSES, *_WITH_FACTORS]}, alone or in FqnToConfig."
        )
    kind = _CLASSES[name]
    if kind == header.INT4:
        return _int4(name, data)
    _check_packing(data, "intx_packing_format", "unpacked_to_int8", optional=True)
    _check_packing(data, "packing_format", "plain", optional=True)
    if data.get("group_size") is not None:
        raise ValueError(
            f"group_size={data['group_size']!r} is of version 1 of torchao's {name}, "
            "which no safetensors file has; it must be null."
        )
    bits = _intx_bits(data) if kind == header.INTX else 8
    if not name.endswith("WeightOnlyConfig") or kind not in (header.INT8, header.INTX):
        return Config(kind=kind, bits=bits, described=False)
    return dataclasses.replace(_granularity(data), kind=kind, bits=bits)


def _granularity(data: Mapping[str, Any]) -> Config:
    """Reads what of a weight of integers shares a scale."""
    granularity = data.get("granularity", {"_type": "PerRow", "_data": {}})
    fields, name = attributes(granularity), granularity.get("_type")
    if name == "PerGroup":
        size = fields.get("group_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"group_size={size!r} must be a positive integer.")
        return Config(group_size=size)
    if name == "PerTensor":
        return Config(per_tensor=True)
    rows = name == "PerRow" and fields.get("dim", -1) in (-1, 1)
    if not rows and not (name == "PerAxis" and fields.get("axis", 0) == 0):
        raise ValueError(
            f"granularity={granularity!r} must be PerRow, PerAxis(0), PerGroup or "
            "PerTensor."
        )
    return Config()


def _intx_bits(data: Mapping[str, Any]) -> int:
    dtype = data.get("weight_dtype")
    name = dtype.get("_data") if isinstance(dtype, Mapping) else None
    if name not in [f"int{width}" for width in range(1, 9)]:
        raise ValueError(f"weight_dtype={dtype!r} must be torch.int1 to int8.")
    return int(name[3:])


def _int4(name: str, data: Mapping[str, Any]) -> Config:
    """Reads that of int4 weights, which have several packings."""
    packing = _member(data.get("int4_packing_format"))
    if packing == "plain":
        size = data.get("group_size") if name == "Int4WeightOnlyConfig" else None
        return Config(kind=header.INT4, bits=4, group_size=size, described=False)
    if packing != "tile_packed_to_4d":
        raise ValueError(
            f"int4_packing_format={packing!r} must be 'plain' or 'tile_packed_to_4d': "
            "others are those of one device, and not of a file."
        )
    tile, size = data.get("int4_tile_packed_ntile", 8), data.get("group_size")
    sizes = tinygemm_config.GROUP_SIZES
    if tile != 8:
        raise ValueError(
            f"int4_tile_packed_ntile={tile!r} must be 8: AMD GPUs, which have 16, "
            "store another order of the same words."
        )
    if type(size) is not int or size not in sizes:
        raise ValueError(f"group_size={size!r} must be one of {sizes}, for int4.")
    return Config(kind=header.TILED, bits=4, group_size=size, described=False)


def _check_packing(
    data: Mapping[str, Any], name: str, wanted: str, optional: bool = False
) -> None:
    packing = _member(data.get(name))
    if packing not in (wanted, *((None,) if optional else ())):
        raise ValueError(f"{name}={packing!r} must be {wanted!r}.")


def _member(value: Any) -> Any:
    """An enumeration is an object with the name of a member, or its value."""
    found = value.get("_data") if isinstance(value, Mapping) else value
    return found.lower() if isinstance(found, str) else found
