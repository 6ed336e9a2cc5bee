"""How a checkpoint is quantized: what says so, and the format that reads it."""

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.checkpoints.config import parse_object, read_object
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import Stored
from qjax.formats import FORMATS, auto_round

# Files that describe a quantization where config.json does not, and the method of those
# that do not name it: green-bit-llm's, AutoGPTQ's, AutoAWQ's, ModelOpt's and
# optimum-quanto's.
BESIDE = {
    "quant_strategy.json": "mbwq",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}
# Where no file does: methods by tensors that only they have in one module.
_MARKS = (
    ("exl2", {"q_weight", "q_groups"}),
    ("mbwq", {"qweight", "q_perm"}),
    ("mpq", {"qweight", "zeros"}),
    ("mpq", {"qweight", "qstatistic"}),
    ("sinq", {"W_q", "meta.scale2"}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
      source: The file that says so.
      format: The module of `FORMATS` that reads it.
      config: That format's ``Config``.
    """

    source: Path
    format: types.ModuleType
    config: Any

    def of(self, module: str, tensors: Mapping[str, Stored]) -> Matrix:
        """Builds and checks the matrix of one module."""
        stored = next(iter(tensors.values()))
        try:
            config = self.config.of(module)
            if hasattr(config, "with_header"):
                config = config.with_header(_header_entry(f"{module}.weight", tensors))
            if hasattr(config, "with_tensors"):
                config = config.with_tensors(tensors)
        except ValueError as error:
            raise ValueError(f"{self.source}: {module}: {error}") from None
        if config is None:
            raise ValueError(
                f"{stored.file}: {stored.name} is quantized, but {self.source} leaves "
                f"{module} dense: {module}.weight was expected."
            )
        matrix = Matrix(name=module, tensors=tensors, format=self.format, config=config)
        matrix.check()
        return matrix

    def leaves_dense(self, module: str, tensors: Mapping[str, Stored]) -> bool:
        """Whether a module has a dense weight, as it should, and scales beside it."""
        is_dense = getattr(self.format, "is_dense", lambda _: False)
        # What is no sound pattern is refused where the module is read.
        with contextlib.suppress(ValueError):
            return is_dense(tensors) and self.config.of(module) is None
        return False


def find(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Quantization | None:
    """Finds what says how a checkpoint is quantized.

    Args:
      directory: Where the files of `BESIDE` may be.
      config: The parsed ``config.json``.
      tensors: All tensors by name.

    Returns:
      What it says; None if nothing is quantized.

    Raises:
      ValueError: If it makes no sense, or nothing says how; with the file.
      NotImplementedError: If it is known, and not read.
    """
    source, entry = _entry(directory, config, tensors)
    if entry is None:
        return None
    method = entry.get("quant_method")
    readers = {**FORMATS, **dict.fromkeys(auto_round.METHODS, auto_round)}
    if not isinstance(method, str) or method not in readers:
        raise ValueError(
            f"{source}: quant_method={method!r} is not supported; it must be one of "
            f"{list(readers)}."
        )
    if sidecar := getattr(readers[method], "SIDECAR", None):
        entry = {**entry, sidecar: read_object(directory / sidecar)}
    try:
        parsed = readers[method].Config.from_json(entry)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except NotImplementedError as error:
        raise NotImplementedError(f"{source}: {error}") from None
    if hasattr(parsed, "with_model"):
        parsed = parsed.with_model(config, tensors)
    packed_as = parsed.format if readers[method] is auto_round else method
    return Quantization(source=source, format=FORMATS[packed_as], config=parsed)


def _entry(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> tuple[Path, Mapping[str, Any] | None]:
    """Returns the JSON object that describes the quantization, if any, and its file."""
    entry = mlx_entry(config) or config.get("quantization_config")
    if entry is not None:
        return directory / "config.json", entry
    packed = [
        stored
        for format_ in FORMATS.values()
        for found in group(tensors, format_).values()
        for stored in found.values()
        # A norm may have a "scale", too.
        if stored.dtype.kind in "iu"
        or stored.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    ]
    if not packed:
        return directory / "config.json", None
    for file, method in BESIDE.items():
        if (directory / file).is_file():
            found = read_object(directory / file)
            return directory / file, {"quant_method": method} | found
    for method, mark in _MARKS:
        groups = group(tensors, FORMATS[method]).values()
        if any(mark <= found.keys() for found in groups):
            return packed[0].file, {"quant_method": method}
    raise ValueError(
        f"{packed[0].file}: {packed[0].name} is quantized, but config.json has no "
        f"quantization_config, and there is none of {', '.join(BESIDE)}."
    )


def mlx_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Finds what mlx-lm goes by, whatever ``quantization_config`` says.

    That may repeat it, or be left from what the model was made of.

    Args:
      config: The parsed ``config.json``.

    Returns:
      The object, with a ``quant_method``; None if there is none.
    """
    entry = config.get("quantization")
    if not isinstance(entry, Mapping) or not {"group_size", "bits"} <= entry.keys():
        return None
    return {"quant_method": "mlx"} | dict(entry)


def group(
    tensors: Mapping[str, Stored], format_: types.ModuleType
) -> dict[str, dict[str, Stored]]:
    """Groups the tensors that a format knows by module, under their names below it.

    Args:
      tensors: All tensors by name.
      format_: The module of `FORMATS`.

    Returns:
      Those of every module that has any of them; but "weight" alone, the name that some
      formats give to their codes, is a dense weight.
    """
    longest_first = sorted(format_.TENSORS, key=len, reverse=True)
    joints = getattr(format_, "JOINTS", ".")
    groups: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        for suffix in longest_first:
            module = name.removesuffix(suffix)
            if module != name and module[-1:] in joints and module[:-1]:
                groups.setdefault(module[:-1], {})[suffix] = stored
                break
    return {name: group for name, group in groups.items() if set(group) != {"weight"}}


def _header_entry(
    weight: str, tensors: Mapping[str, Stored]
) -> Mapping[str, Any] | None:
    """What the headers of a weight's files say about it, in their metadata."""
    texts = {
        stored.metadata[weight]: stored.file
        for stored in tensors.values()
        if weight in stored.metadata
    }
    if len(texts) > 1:
        files = ", ".join(sorted(map(str, texts.values())))
        raise ValueError(f"the headers of {files} say different things about {weight}.")
    for text, file in texts.items():
        return parse_object(text.encode(), f"{file}: metadata of {weight}")
    return None
