"""The ``quantization_config`` that llm-compressor and compressed-tensors write.

Source: vllm-project/compressed-tensors, src/compressed_tensors/quantization/
quant_config.py, quant_scheme.py and utils/match.py, release 0.20.0.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from qjax.formats.block_scale import block_size
from qjax.formats.checks import check_choice, check_object, check_strings
from qjax.formats.patterns import check_pattern, matches

Strategy = Literal["group", "channel", "tensor", "block"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PACKED = "pack-quantized"
# Other formats: the types of their codes, with the widths of each.
_OTHERS: Mapping[str, Mapping[str, Sequence[int]]] = {
    "float-quantized": {"float": (8,)},
    "naive-quantized": {"float": (8,), "int": range(1, 9)},
    "int-quantized": {"int": range(1, 9)},
    "mxfp8-quantized": {"float": (8,)},
    "nvfp4-pack-quantized": {"float": (4,)},
    "mxfp4-pack-quantized": {"float": (4,)},
}
# Groups that these formats have.
GROUPS = {
    "mxfp8-quantized": 32,
    "nvfp4-pack-quantized": 16,
    "mxfp4-pack-quantized": 32,
}
# The release from which on codes are one stream.
_DENSE_SINCE = (0, 18)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a compressed-tensors ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code, 1 to 8.
      strategy: One scale a "group" of inputs and output, a "channel" (output), in all
        ("tensor"), or a "block" of outputs and inputs.
      group_size: Inputs of a group; None unless the strategy is "group".
      block_size: Outputs and inputs of a block; None unless that is the strategy.
      symmetric: Whether there are no zero points.
      format: "pack-quantized", or one of those of `compressed_tensors_floats`.
      is_float: Whether codes are small floats.
      act_order: Whether groups are of inputs sorted by activation (``actorder`` of
        "group" or "dynamic"), so that ``weight_g_idx`` must be there.
      aligned: Whether the writer was older than 0.18 and left bits unused; what counts
        where the shapes of 3, 5, 6 or 7 bits do not tell.
      groups: (targets, configuration) of each group, in the file's order; None for one
        whose weights stay dense, as where only the inputs of attention are quantized.
      ignore: Names, patterns and classes that stay dense.
    """

    bits: int = 4
    strategy: Strategy = "group"
    group_size: int | None = 128
    block_size: tuple[int, int] | None = None
    symmetric: bool = True
    format: str = PACKED
    is_float: bool = False
    act_order: bool = False
    aligned: bool = False
    groups: tuple[tuple[tuple[str, ...], "Config | None"], ...] = ()
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` that llm-compressor writes.

        Schemes that also quantize activations are read for their weights.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of the whole checkpoint; `of` gives that of a module.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for a
            variant that this format does not cover.
        """
        sparsity = entry.get("sparsity_config") or {}
        if sparsity and sparsity.get("format", "dense") != "dense":
            raise ValueError(f"sparsity_config={sparsity!r} must be dense.")
        if entry.get("transform_config"):
            raise ValueError(
                "transform_config rotates weights, which is not supported."
            )
        groups = entry.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"config_groups={groups!r} must map names to schemes.")
        aligned = _version(entry.get("version")) < _DENSE_SINCE
        read = tuple(
            _group(name, group, entry.get("format"), aligned)
            for name, group in groups.items()
        )
        configs = [config for _, config in read if config is not None]
        if not configs:
            raise ValueError(f"config_groups={groups!r} quantize no weights.")
        ignore = _targets("ignore", entry.get("ignore") or [])
        return dataclasses.replace(configs[0], groups=read, ignore=ignore)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        A target is a module's path, a pattern behind "re:", or a class, of which
        every module is taken to be a "Linear"; they go before each other in that order.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        if any(_matches(target, module) for target in self.ignore):
            return None
        if not self.groups:
            return dataclasses.replace(self, ignore=())
        found = [
            (_matches(target, module), target, config)
            for targets, config in self.groups
            for target in targets
        ]
        rank = min(found, key=lambda match: (match[0] or 4, match[1]), default=None)
        return rank[2] if rank and rank[0] else None


def _matches(target: str, module: str) -> int:
    """0: no match; 1, 2, 3: as a path, a pattern, a class."""
    if target == module:
        return 1
    if target.startswith("re:"):
        return 2 if matches(target[3:], module) else 0
    return 3 if target in ("Linear", "Module") else 0


def _targets(name: str, targets: Any) -> tuple[str, ...]:
    """Reads a list of paths, patterns and classes."""
    for target in (strings := check_strings(name, targets)):
        if target.startswith("re:"):
            check_pattern(name, target.removeprefix("re:"))
    return strings


def _version(text: Any) -> tuple[int, ...]:
    """A release as numbers; one that is not there is taken for the newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return tuple(map(int, numbers.groups())) if numbers else _DENSE_SINCE


def _group(
    name: str, group: Any, default_format: Any, aligned: bool
) -> tuple[tuple[str, ...], Config | None]:
    """Reads one entry of ``config_groups``."""
    where = f"config_groups[{name!r}]"
    if isinstance(group, list):
        return _targets(where, group), _preset(where, name, aligned)
    weights = check_object(where, group).get("weights")
    targets = _targets(f"{where}.targets", group.get("targets"))
    if weights is None:
        return targets, None
    check_object(f"{where}.weights", weights)
    format_ = group.get("format") or default_format
    check_choice(f"{where}.format", format_, (PACKED, *_OTHERS))
    try:
        return targets, _scheme(weights, format_, aligned)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _preset(where: str, name: str, aligned: bool) -> Config | None:
    """A scheme that is only named."""
    if name.upper() == "UNQUANTIZED":
        return None
    bits = re.fullmatch(r"W([2-8])A16(_ASYM)?", name.upper())
    if not bits:
        raise ValueError(f"{where} is no preset that is known; write its weights.")
    return Config(bits=int(bits[1]), symmetric=bits[2] is None, aligned=aligned)


def _scheme(weights: Mapping[str, Any], format_: str, aligned: bool) -> Config:
    """Reads how weights are quantized."""
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    kinds = _OTHERS.get(format_, {"int": range(1, 9)})
    known = isinstance(kind, str) and kind in kinds
    if not known or type(bits) is not int or bits not in kinds[kind]:
        wanted = " or ".join(
            f"{widths[0]}{f' to {widths[-1]}' * (len(widths) > 1)} of {name!r}"
            for name, widths in kinds.items()
        )
        raise ValueError(f"{bits!r} bits of {kind!r} must be {wanted} in {format_!r}.")
    if weights.get("dynamic"):
        raise ValueError(f"dynamic={weights['dynamic']!r} must be false.")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        # No TypeError: the file is wrong, not the type of an argument.
        raise ValueError(  # noqa: TRY004
            f"symmetric={symmetric!r} must be true or false."
        )
    actorder = weights.get("actorder")
    if actorder not in (None, True, False, "weight", "static", "group", "dynamic"):
        raise ValueError(f"actorder={actorder!r} is not known.")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(size, "group")
    strategy = "group" if strategy == "tensor_group" else strategy
    allowed = STRATEGIES if format_ in _OTHERS else STRATEGIES[:3]
    if strategy not in allowed:
        raise ValueError(f"strategy={strategy!r} must be one of {allowed}.")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ValueError(f"group_size={size!r} must be positive.")
    if format_ in GROUPS and (strategy, size) != ("group", GROUPS[format_]):
        raise ValueError(
            f"strategy={strategy!r} with group_size={size!r} must be groups of "
            f"{GROUPS[format_]} in {format_!r}."
        )
    if kind == "float" and not symmetric:
        raise ValueError("symmetric=False must be true for floats.")
    return Config(
        bits=bits,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        block_size=_block(weights) if strategy == "block" else None,
        symmetric=symmetric,
        format=format_,
        is_float=kind == "float",
        act_order=actorder is True or actorder in ("group", "dynamic"),
        aligned=aligned,
    )


def _block(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Reads the size of a block, [128, 128] or "128x128"."""
    size = weights.get("block_structure")
    if isinstance(size, str) and re.fullmatch(r"[0-9]{1,10}x[0-9]{1,10}", size):
        size = [int(length) for length in size.split("x")]
    return block_size("block_structure", size)
