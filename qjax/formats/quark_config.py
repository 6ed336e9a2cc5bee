"""The ``quantization_config`` that AMD Quark writes.

Source: amd-quark, quark/torch/quantization/config/config.py and type.py (``QConfig``,
``QLayerConfig``, ``QTensorConfig``), quark/torch/export/config/config.py and
main_export/quant_config_parser.py, release 0.13; vllm-project/vllm,
vllm/model_executor/layers/quantization/quark/quark.py and utils.py, release 0.33.0.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.formats.block_scale import block_size
from qjax.formats.checks import (
    check_choice,
    check_method,
    check_object,
    check_positive,
    check_strings,
)
from qjax.formats.patterns import check_pattern, matches
from qjax.formats.quark_scheme import QScheme, Scheme

# What may share a scale.
_OF_INTEGERS: tuple[QScheme, ...] = ("per_tensor", "per_channel", "per_group")
_READ: Mapping[str, tuple[QScheme, ...]] = {
    "fp8_e4m3": (*_OF_INTEGERS, "per_block"),
    **dict.fromkeys(("int8", "uint8", "int4", "uint4"), _OF_INTEGERS),
    **dict.fromkeys(("int2", "uint2"), ("per_channel", "per_group")),
    **dict.fromkeys(("fp4", "fp6_e2m3", "fp6_e3m2"), ("per_group",)),
}
# Types that Quark has beyond these.
_OTHERS = (
    *("int3", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "bfp16"),
    *("fp8_e5m2", "fp8_e5m3", "mx", "mx6", "mx9"),
)
# Which axis of torch's weight a scheme may name: outputs, or inputs in groups.
_AXES = {"per_channel": (0, -2), "per_group": (1, -1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What Quark says about the matrices of a checkpoint.

    Attributes:
      scheme: How those are quantized that no layer's entry is about; None where they
        stay dense.
      reorder: Whether eight codes of four bits lie in AWQ's order in their word.
      is_dense: Whether all weights are stored dense, though rounded.
      versioned: Whether the file names its release, as those after 0.8 do.
      layers: Schemes by patterns of paths, as `fnmatch` has them; the first counts.
      excluded: Such patterns, or regular expressions behind "re:", of what stays dense.
    """

    scheme: Scheme | None = None
    reorder: bool = True
    is_dense: bool = False
    versioned: bool = True
    layers: tuple[tuple[str, Scheme | None], ...] = ()
    excluded: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        How activations and the KV cache are quantized is read over.

        Args:
          entry: The parsed JSON object; older ones may lack "export", and have null
            where there are no entries.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value.
          NotImplementedError: If Quark has what it asks for, and qjax does not.
        """
        check_method(entry, "quark")
        modes = ("eager_mode", "fx_graph_mode")
        check_choice("quant_mode", entry.get("quant_mode", modes[0]), modes)
        _check_algorithms(entry.get("algo_config"))
        export = _object("export", entry.get("export"))
        formats, orders = ("real_quantized", "fake_quantized"), ("reorder", "order")
        weight_format = export.get("weight_format", formats[0])
        check_choice("export.weight_format", weight_format, formats)
        order = export.get("pack_method", orders[0])
        check_choice("export.pack_method", order, orders)
        types = _schemes("layer_type_quant_config", entry)
        default = _layer("global_quant_config", entry.get("global_quant_config"))
        return cls(
            scheme=types.get("Linear", default),
            reorder=order == orders[0],
            is_dense=weight_format == formats[1],
            versioned=entry.get("version") is not None,
            layers=tuple(_schemes("layer_quant_config", entry).items()),
            excluded=_excluded(entry.get("exclude")),
        )

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.down_proj".

        Raises:
          ValueError: If a regular expression may fit the path in too many ways to be
            tried.
        """
        if self.is_dense or any(_fits(one, module) for one in self.excluded):
            return None
        fitting = (s for path, s in self.layers if fnmatch.fnmatchcase(module, path))
        scheme = next(fitting, self.scheme)
        if scheme is None:
            return None
        return dataclasses.replace(self, scheme=scheme, layers=(), excluded=())


def _fits(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return matches(pattern.removeprefix("re:"), module)
    return fnmatch.fnmatchcase(module, pattern)


def _excluded(value: Any) -> tuple[str, ...]:
    patterns = check_strings("exclude", [] if value is None else value)
    for pattern in patterns:
        if pattern.startswith("re:"):
            check_pattern("exclude", pattern.removeprefix("re:"))
    return patterns


def _check_algorithms(value: Any) -> None:
    """Refuses what has more to a product than the weight that a file holds."""
    for algorithm in value if isinstance(value, list) else [value]:
        said = _object("algo_config", algorithm)
        rotates = said.get("name") == "rotation" and (
            said.get("r4", True) or said.get("online_r1_rotation")
        )
        if rotates or said.get("name") == "svdquant":
            raise NotImplementedError(
                f"algo_config: {said['name']!r} changes what weights are multiplied "
                "by, or adds to the product; rotations that are folded into weights "
                "are read (r4 and online_r1_rotation false)."
            )


def _object(name: str, value: Any) -> Mapping[str, Any]:
    """Reads an object, which null leaves empty."""
    return {} if value is None else check_object(name, value)


def _schemes(field: str, entry: Mapping[str, Any]) -> dict[str, Scheme | None]:
    layers = _object(field, entry.get(field))
    return {key: _layer(f"{field}[{key!r}]", one) for key, one in layers.items()}


def _layer(where: str, value: Any) -> Scheme | None:
    """Reads how the weights of some layers are quantized, None if they are not."""
    layer = _object(where, value)
    if "weight" not in layer:
        raise ValueError(f"{where}={value!r} must have 'weight', an object or null.")
    if bias := layer.get("bias"):
        _object(f"{where}.bias", bias[0] if isinstance(bias, list) else bias)
        raise NotImplementedError(f"{where}.bias is quantized; only weights are read.")
    return _scheme(f"{where}.weight", layer["weight"])


def _scheme(where: str, value: Any) -> Scheme | None:
    if value is None:
        return None
    stages: Sequence[Any] = value if isinstance(value, list) else [value]
    found = [_stage(where, stage) for stage in stages]
    if len(found) == 1:
        return found[0]
    if len(found) == 2 and _is_nvfp4(*found) and stages[1].get("is_scale_quant"):
        return dataclasses.replace(found[0], nested=True)
    said = [f"{stage.dtype} {stage.qscheme}" for stage in found]
    if not said:
        raise ValueError(f"{where}=[] must be an object, or a list of some.")
    raise NotImplementedError(
        f"{where} quantizes in stages, {said}; of several stages only NVFP4 is read: "
        "'fp4 per_group' of 16 with a scale in 'fp8_e4m3 per_tensor'."
    )


def _is_nvfp4(codes: Scheme, scales: Scheme) -> bool:
    kinds = (codes.dtype, codes.group_size, scales.dtype, scales.qscheme)
    return kinds == ("fp4", 16, "fp8_e4m3", "per_tensor") and not codes.exponents


def _stage(where: str, value: Any) -> Scheme:
    said = _object(where, value)
    dtype: Any = said.get("dtype")
    check_choice(f"{where}.dtype", dtype, (*_READ, *_OTHERS))
    if dtype not in _READ:
        raise NotImplementedError(
            f"{where}.dtype={dtype!r} is not read; those that are: {[*_READ]}."
        )
    # Older names come second.
    dynamic = said.get("is_dynamic", said.get("dynamic"))
    check_choice(f"{where}.is_dynamic", dynamic, (False, None))
    qscheme, axis = said.get("qscheme"), said.get("ch_axis", said.get("axis"))
    check_choice(f"{where}.qscheme", qscheme, _READ["fp8_e4m3"])
    if qscheme not in _READ[dtype]:
        raise NotImplementedError(
            f"{where}: {dtype} with qscheme={qscheme!r} is not read; of {dtype} those "
            f"are: {list(_READ[dtype])}."
        )
    if qscheme in _AXES:
        check_choice(f"{where}.ch_axis", axis, _AXES[qscheme])
    scheme = Scheme(
        dtype=dtype,
        qscheme=qscheme,
        group_size=_group_size(where, said) if qscheme == "per_group" else None,
        block_size=block_size(f"{where}.block_size", said.get("block_size"))
        if qscheme == "per_block"
        else None,
        exponents=_exponents(where, said),
    )
    return _with_zeros(where, said, scheme) if scheme.is_integer else scheme


def _group_size(where: str, said: Mapping[str, Any]) -> int | None:
    size = said.get("group_size")
    if size == -1:
        return None
    check_positive(f"{where}.group_size", size)
    return size


def _exponents(where: str, said: Mapping[str, Any]) -> bool:
    """Whether scales are powers of two, which only floats in groups or blocks have."""
    name = said.get("scale_format")
    check_choice(f"{where}.scale_format", name, (None, "float32", "e8m0", "e5m3"))
    if name == "e5m3" or said.get("scale_type") == "float8_e5m3":
        raise NotImplementedError(f"{where}: scales in E5M3 floats are not read.")
    exponents = name == "e8m0" or said.get("scale_type") == "float8_e8m0fnu"
    in_parts = said["qscheme"] in ("per_group", "per_block")
    if exponents and ("int" in said["dtype"] or not in_parts):
        raise NotImplementedError(
            f"{where}: scales in E8M0 are read of floats in groups and blocks."
        )
    return exponents


def _with_zeros(where: str, said: Mapping[str, Any], scheme: Scheme) -> Scheme:
    symmetric, kind = said.get("symmetric"), said.get("zero_point_type")
    if not isinstance(symmetric, bool):
        raise ValueError(  # noqa: TRY004
            f"{where}.symmetric={symmetric!r} must be true or false."
        )
    check_choice(f"{where}.zero_point_type", kind, (None, "int32", "float32"))
    is_float = kind == "float32"
    if is_float and scheme.is_signed:
        raise NotImplementedError(
            f"{where}: float zero points of {scheme.dtype} are not read; those of "
            "unsigned codes are."
        )
    return dataclasses.replace(scheme, symmetric=symmetric, float_zero=is_float)
