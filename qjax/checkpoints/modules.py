"""Which tensors of a checkpoint make a quantized matrix, and which stand alone."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.checkpoints import gguf, methods
from qjax.checkpoints.config import read_config
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import Stored, scan
from qjax.formats import FORMATS

# Names of the tensors that some format has of a matrix.
_OF_WEIGHTS = {name for format_ in FORMATS.values() for name in format_.TENSORS}


def open_parts(path: str | os.PathLike[str]) -> dict[str, Matrix | Stored]:
    """Opens a checkpoint directory or a GGUF file, and checks all headers.

    Args:
      path: The directory, or the file.

    Returns:
      As `arrange`.

    Raises:
      FileNotFoundError: If the directory, a JSON file, a shard or the file is missing.
      ValueError: As `arrange`.
    """
    if gguf.is_file(path):
        parts, faults = survey_file(Path(path))
        for fault in faults:
            raise fault
        return parts
    config, directory = read_config(path), Path(path)
    return arrange(directory, config, scan(directory))


def arrange(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> dict[str, Matrix | Stored]:
    """Groups the tensors of a checkpoint into matrices and checks all of them.

    Args:
      directory: Where ``quantize_config.json`` may be.
      config: The parsed ``config.json``.
      tensors: All tensors by name.

    Returns:
      Matrices under the paths of their modules, other tensors under their names.

    Raises:
      ValueError: If the tensors are not what the quantization says, with file and name.
    """
    parts, faults = survey(directory, config, tensors)
    for fault in faults:
        raise fault
    return parts


def survey(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> tuple[dict[str, Matrix | Stored], list[ValueError]]:
    """Does the work of `arrange`, and goes on where that would raise.

    Args:
      directory: As in `arrange`.
      config: As in `arrange`.
      tensors: As in `arrange`.

    Returns:
      The parts that are sound, and what is wrong with the others.

    Raises:
      ValueError: If the quantization as a whole makes no sense.
    """
    quantization = methods.find(directory, config, tensors)
    if quantization is None:
        return dict(tensors), _dense_faults(tensors)
    groups = methods.group(tensors, quantization.format)
    grouped = {stored.name for group in groups.values() for stored in group.values()}
    rest = {name: tensors[name] for name in tensors if name not in grouped}
    # Of these, scales are no part of the weight.
    dense = [one for one in groups if quantization.leaves_dense(one, groups[one])]
    for module in dense:
        weight = groups.pop(module)["weight"]
        rest[weight.name] = weight
    if not groups and not getattr(quantization.config, "is_dense", False):
        raise ValueError(
            f"{quantization.source} says that the weights are quantized, but no tensor "
            "is; remove quantization_config if they are dense."
        )
    parts: dict[str, Matrix | Stored] = dict(rest)
    faults = _dense_faults(rest, groups)
    for module, group in groups.items():
        for dense in {module, f"{module}.weight"} & rest.keys():
            stored = next(iter(group.values()))
            message = (
                f"{stored.file}: {module} is quantized, as there is {stored.name}, and "
                f"dense, as there is {dense}; it must be one of them."
            )
            faults.append(ValueError(message))
        try:
            parts[module] = quantization.of(module, group)
        except ValueError as fault:
            faults.append(fault)
    return parts, faults


def survey_file(file: Path) -> tuple[dict[str, Matrix | Stored], list[ValueError]]:
    """Does the work of `survey` for a GGUF file, which says itself what is quantized.

    Args:
      file: The file; of split ones any.

    Returns:
      As `survey`. Matrices are under the names of their tensors without ".weight".

    Raises:
      FileNotFoundError: As `gguf.scan`.
      ValueError: As `gguf.scan`.
    """
    tensors, faults = gguf.scan(file)
    parts: dict[str, Matrix | Stored] = {}
    for name, (stored, kind) in tensors.items():
        module = name if kind is None else name.removesuffix(".weight")
        if module in parts:
            message = f"{stored.file}: {name} is there quantized and dense."
            faults.append(ValueError(message))
        elif kind is None:
            parts[name] = stored
        else:
            parts[module] = Matrix(
                name=module,
                tensors={"weight": stored},
                format=FORMATS["gguf"],
                config=FORMATS["gguf"].Config(type=kind),
            )
    faults += _join_scales(parts)
    faults += _dense_faults(
        {name: part for name, part in parts.items() if isinstance(part, Stored)}
    )
    return parts, faults


def _join_scales(parts: dict[str, Matrix | Stored]) -> list[ValueError]:
    """Moves what llama.cpp multiplies a whole product by into its matrix."""
    faults = []
    for module, matrix in list(parts.items()):
        scale = parts.get(f"{module}.scale")
        if not isinstance(matrix, Matrix) or not isinstance(scale, Stored):
            continue
        tensors = {**matrix.tensors, "scale": scale}
        parts[module] = scaled = dataclasses.replace(matrix, tensors=tensors)
        del parts[f"{module}.scale"]
        try:
            scaled.check()
        except ValueError as fault:
            faults.append(fault)
            del parts[module]
    return faults


def _dense_faults(
    tensors: Mapping[str, Stored], matrices: Collection[str] = ()
) -> list[ValueError]:
    """Refuses weights that are no floats; a mask, say, or positions may be so.

    But nothing of a quantized matrix, which the format may not know.
    """

    def is_sound(stored: Stored) -> bool:
        if stored.dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            return True
        module, _, last = stored.name.rpartition(".")
        is_of_weight = last in _OF_WEIGHTS or module in matrices
        return stored.dtype.kind in "iub" and not is_of_weight

    return [
        ValueError(
            f"{stored.file}: {stored.name}.dtype={stored.dtype} must be float16, "
            "bfloat16 or float32; cast it, or remove it if it is no weight."
        )
        for stored in tensors.values()
        if not is_sound(stored)
    ]
