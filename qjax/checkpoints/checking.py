"""Every value of a checkpoint looked at, and all that is wrong with it."""

import collections
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax import progress, tensor
from qjax.checkpoints import gguf, modules
from qjax.checkpoints.config import read_config
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import INDEX, SINGLE, Stored, scan
from qjax.tensor import QTensor


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Looks for everything that is wrong with a checkpoint directory or a GGUF file.

    What `load` checks, but going on after the first fault; and that dense tensors,
    scales and zeros have neither NaN nor infinity, orders are permutations, groups are
    in range, matrices and their biases have as many outputs, and no bias or file of
    weights is left over.

    Args:
      path: As in `load`.

    Returns:
      One line for each fault; none if the checkpoint is sound. What only may be wrong
      is a warning.

    Raises:
      FileNotFoundError: If the directory, a JSON file, a shard or the file is missing.
      ValueError: If the files are so damaged that nothing in them can be told apart.
      NotImplementedError: As `load`.

    Example:
      >>> verify("examples/llm/checkpoint")
      []
    """
    if gguf.is_file(path):
        parts, errors = modules.survey_file(Path(path))
        faults = [str(error) for error in errors] + _orphan_tensors(parts)
    else:
        config, directory = read_config(path), Path(path)
        tensors = scan(directory)
        parts, errors = modules.survey(directory, config, tensors)
        faults = [str(error) for error in errors]
        faults += _orphan_files(directory, tensors) + _orphan_tensors(parts)
    total = sum(part.nbytes for part in parts.values())
    doubts: dict[str, list[str]] = {}
    with progress.bar(total, "Checking weights") as advance:
        for name, part in parts.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                faults += _look_at(name, part, parts)
            for text in dict.fromkeys(str(warning.message) for warning in caught):
                doubts.setdefault(text, []).append(name)
            advance(part.nbytes)
    for text, (name, *others) in doubts.items():
        also = f" and {len(others)} more" if others else ""
        warnings.warn(f"{name}{also}: {text}", stacklevel=2)
    return faults


def _look_at(
    name: str, part: Matrix | Stored, parts: Mapping[str, object]
) -> list[str]:
    """Reads one part, and says what is wrong with its values."""
    try:
        weight = part.read()
    except ValueError as error:
        return [str(error)]
    faults = []
    if isinstance(weight, QTensor):
        faults += [f"{name}: {fault}" for fault in _matrix_faults(weight)]
        bias = parts.get(f"{name}.bias")
        wanted = (*weight.batch, weight.n)
        if isinstance(bias, Stored) and bias.shape != wanted:
            faults.append(
                f"{bias.file}: {bias.name}.shape={bias.shape} must be {wanted}, as "
                f"{name} has {weight.n} outputs."
            )
    elif isinstance(part, Stored) and _not_finite(weight):
        faults.append(
            f"{part.file}: {name} holds {_not_finite(weight)} NaN or infinity."
        )
    return faults


def _not_finite(values: Array | np.ndarray) -> int:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return 0
    return int(np.sum(~np.isfinite(np.asarray(values).astype(np.float32))))


def _matrix_faults(qt: QTensor) -> list[str]:
    faults = []
    for field in ("scale", "zero", "codebook", "input_scale"):
        values = tensor.plain(getattr(qt, field))
        if values is not None and _not_finite(values):
            faults.append(f"its {field} holds {_not_finite(values)} NaN or infinity.")
    if qt.order is not None and (np.sort(qt.order) != np.arange(qt.k)).any():
        faults.append("its order is no permutation of the inputs.")
    if qt.row_group is not None:
        groups, last = np.asarray(qt.row_group), qt.scale.shape[-2] - 1
        if groups.min() < 0 or groups.max() > last:
            faults.append(f"its groups of rows must lie in 0 to {last}.")
    return faults


def _orphan_files(directory: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """Files of weights that nothing is read from."""
    used = {stored.file.name for stored in tensors.values()} | {SINGLE}
    whole = (directory / SINGLE).is_file()
    reason = f"as there is {SINGLE}" if whole else f"as {INDEX} does not list it"
    return [
        f"{file} is not read, {reason}."
        for file in sorted(directory.glob("*.safetensors"))
        if file.name not in used
    ]


def _orphan_tensors(parts: Mapping[str, Matrix | Stored]) -> list[str]:
    """Biases alone in their module."""
    shared = collections.Counter(
        ".".join(path[:depth])
        for path in (name.split(".") for name in parts)
        for depth in range(1, len(path))
    )
    return [
        f"{part.file}: {name} belongs to no module that is there."
        for name, part in parts.items()
        for module, _, last in [name.rpartition(".")]
        if isinstance(part, Stored) and last == "bias"
        if module not in parts and shared[module] == 1
    ]
