"""AutoRound's ``quantization_config``; its tensors are packed as other formats' are.

Whose tensors they are is what ``packing_format`` says, or in files of releases before
0.5 ``backend``:

* "auto_round:auto_gptq" those of GPTQ v1, without a ``g_idx``; also 5, 6 and 7 bits,
  in one stream,
* "auto_round" those of GPTQ v2: zeros as they are,
* "auto_round:auto_awq" those of AutoAWQ,
* "auto_round:llm_compressor" compressed-tensors' MXFP4, MXFP8 and NVFP4,
* "auto_round:fp8" E4M3 with scales of blocks, of columns, or one.

Source: intel/auto-round, auto_round/export/export_to_autoround (``export.py``,
``export_to_fp8.py``, ``qlinear_fp.py``), auto_round/inference (``convert_model.py``,
``utils.py``) and auto_round_extension/torch, release 0.16.1, and
export_to_autoround/export.py of release 0.4.7; vllm-project/vllm,
vllm/model_executor/layers/quantization/inc/config_parser.py, release 0.33.0.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qjax.formats import (
    awq_config,
    compressed_tensors_config,
    fp8_config,
    gptq_config,
)
from qjax.formats.block_scale import block_size
from qjax.formats.checks import check_choice
from qjax.formats.patterns import check_pattern, grouped, matches

METHODS = ("auto-round", "intel/auto-round")
# What transformers takes where a configuration says nothing.
_PACKING = "auto_round:auto_gptq"
# A name with one of these is a pattern, and not the path of a module.
_SPECIAL = frozenset(r"*+?^$()[]{}|\\")
# Widths from which on a module is left as it is.
_DENSE = 16
# What turns activations, or splits weights, so that these alone are not the model's.
_TRANSFORMS = ("rotation_config", "spinquant_config", "svdquant_config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What AutoRound says about the modules of a checkpoint.

    Attributes:
      format: Whose tensors they have: "gptq", "awq", "compressed-tensors" or "fp8".
      default: That format's configuration of modules that no entry names.
      paths: Configurations by the path of a module, or by the end of one; None where
        it stays dense.
      patterns: The same by patterns, which fit anywhere in a path; the first counts.
    """

    format: str
    default: Any
    paths: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patterns: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        How activations are quantized is read over, where the weights do not depend on
        it.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value, or asks for a variant that
            is not read.

        Example:
          >>> entry = {"bits": 4, "group_size": 32, "packing_format": "auto_round"}
          >>> config = Config.from_json(
          ...     entry | {"extra_config": {"mlp.*": {"bits": 8}}}
          ... )
          >>> config.format, config.of("h.0.attn").bits, config.of("h.0.mlp.up").bits
          ('gptq', 4, 8)
        """
        check_choice("quant_method", entry.get("quant_method", METHODS[0]), METHODS)
        for field in _TRANSFORMS:
            if entry.get(field):
                raise ValueError(
                    f"{field}={entry[field]!r} changes what the weights are multiplied "
                    "by, and is not supported."
                )
        packing = _packing(entry)
        format_, read = _reader(packing)
        extra = entry.get("extra_config") or {}
        if not isinstance(extra, Mapping):
            # No TypeError: the file is wrong, not the type of an argument.
            raise ValueError(  # noqa: TRY004
                f"extra_config={extra!r} must map modules to objects."
            )
        default = _one(entry, read)
        paths, patterns = {}, []
        for name, changes in extra.items():
            where = f"extra_config[{name!r}]"
            if not isinstance(changes, Mapping):
                raise ValueError(f"{where}={changes!r} must be an object.")  # noqa: TRY004
            try:
                config = _one({**entry, **changes}, read)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if _SPECIAL.isdisjoint(name):
                paths[name] = config
            else:
                check_pattern(where, anywhere := f".*{grouped(name)}")
                patterns.append((anywhere, config))
        return cls(
            format=format_, default=default, paths=paths, patterns=tuple(patterns)
        )

    def of(self, module: str) -> Any:
        """Returns its format's configuration of a module, or None if it stays dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        if module in self.paths:
            return self.paths[module]
        for path, config in self.paths.items():
            if module.endswith(f".{path}"):
                return config
        for pattern, config in self.patterns:
            if matches(pattern, module):
                return config
        return self.default


def _packing(entry: Mapping[str, Any]) -> str:
    packing = entry.get("packing_format")
    if packing is None:
        # Later releases name kernels there, and all kinds of them.
        backend = entry.get("backend")
        old = isinstance(backend, str) and backend.startswith("auto_")
        packing = backend if old else _PACKING
    if not isinstance(packing, str):
        raise ValueError(  # noqa: TRY004
            f"packing_format={packing!r} must be a string."
        )
    return packing


_Reader = Callable[[Mapping[str, Any], int], Any]


def _reader(packing: str) -> tuple[str, _Reader]:
    """Whose tensors a packing has, and what reads the configuration of a module."""
    kind, _, rest = packing.partition(":")
    parts = set(rest.split(":"))
    if kind == "auto_round" and parts & {"llm_compressor"}:
        return "compressed-tensors", _small_floats
    if kind == "auto_round" and parts & {"fp8", "fp8_static"}:
        return "fp8", _fp8
    if kind == "auto_round" and parts & {"auto_awq", "awq"}:
        return "awq", _awq
    # Behind it, old releases name kernels, which read the same.
    if parts & {"auto_gptq", "gptq"} or kind == "auto_gptq":
        return "gptq", _gptq("gptq")
    if kind == "auto_round" and parts <= {"", "gptqmodel", "exllamav2", "triton"}:
        return "gptq", _gptq("gptq_v2")
    raise ValueError(
        f"packing_format={packing!r} is not read; known: 'auto_round', and "
        "'auto_round:' with auto_gptq, gptqmodel, auto_awq, llm_compressor or fp8."
    )


def _one(entry: Mapping[str, Any], read: _Reader) -> Any:
    """The configuration of the modules that an entry is about, None if dense."""
    bits = entry.get("bits", 4)
    if type(bits) is not int or not (1 < bits <= 8 or bits >= _DENSE):
        raise ValueError(f"bits={bits!r} must be 2 to 8, or 16 and more for dense.")
    return None if bits >= _DENSE else read(entry, bits)


def _group_size(entry: Mapping[str, Any]) -> int | None:
    size = entry.get("group_size", 128)
    if type(size) is not int or not (size == -1 or size > 0):
        raise ValueError(f"group_size={size!r} must be positive or -1.")
    return None if size == -1 else size


def _check_integers(entry: Mapping[str, Any]) -> None:
    """Checks that codes are integers, with scales for activations of 16 bits."""
    kind, of_inputs = entry.get("data_type", "int"), entry.get("act_bits")
    if not isinstance(kind, str) or "fp" in kind:
        raise ValueError(f"data_type={kind!r} must be 'int' in this packing_format.")
    if of_inputs is not None and (type(of_inputs) is not int or of_inputs < _DENSE):
        raise ValueError(
            f"act_bits={of_inputs!r} must be 16: with less, scales of weights are "
            "packed in other tensors, which are not read."
        )


def _gptq(checkpoint_format: gptq_config.Checkpoint) -> _Reader:
    def read(entry: Mapping[str, Any], bits: int) -> gptq_config.Config:
        _check_integers(entry)
        return gptq_config.Config(
            bits=bits,
            group_size=_group_size(entry),
            checkpoint_format=checkpoint_format,
        )

    return read


def _awq(entry: Mapping[str, Any], bits: int) -> awq_config.Config:
    _check_integers(entry)
    if bits != 4:
        raise ValueError(f"bits={bits} must be 4, the only width of AWQ files.")
    return awq_config.Config(group_size=_group_size(entry), version="gemm")


# Names of small floats begin so; the format of compressed-tensors by their widths.
_SMALL_FLOATS = {
    ("mx_fp", 4): "mxfp4-pack-quantized",
    ("mx_fp", 8): "mxfp8-quantized",
    ("nv_fp", 4): "nvfp4-pack-quantized",
}


def _small_floats(
    entry: Mapping[str, Any], bits: int
) -> compressed_tensors_config.Config:
    kind = entry.get("data_type")
    format_ = _SMALL_FLOATS.get((kind[:5] if isinstance(kind, str) else "", bits))
    if format_ is None:
        raise ValueError(
            f"data_type={kind!r} of {bits} bits is not read; known: 'mx_fp' of 4 and "
            "8, 'nv_fp' of 4."
        )
    size = compressed_tensors_config.GROUPS[format_]
    check_choice("group_size", entry.get("group_size"), (size,))
    return compressed_tensors_config.Config(
        bits=bits, group_size=size, format=format_, is_float=True
    )


def _fp8(entry: Mapping[str, Any], bits: int) -> fp8_config.Config:
    if bits != 8:
        raise ValueError(f"bits={bits} must be 8 in this packing_format.")
    check_choice("fmt", entry.get("fmt", "e4m3"), ("e4m3",))
    size = entry.get("group_size", -1)
    if isinstance(size, list):
        return fp8_config.Config(block_size=block_size("group_size", size))
    if type(size) is not int or size not in (-1, 0):
        raise ValueError(
            f"group_size={size!r} must be -1, 0 or the two sides of a block."
        )
    return fp8_config.Config(block_size=None)
