"""Named weights into a directory, in the format that is asked for."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qjax.checkpoints import methods, modules, placing
from qjax.checkpoints.atomic import check_target, replacing
from qjax.checkpoints.dialects import DIALECTS, Dialect, centered
from qjax.checkpoints.journal import Journal
from qjax.checkpoints.shards import INDEX, SINGLE, Stored, check_name, weight_files
from qjax.formats import sinq
from qjax.formats.checks import check_finite, is_known
from qjax.tensor import QTensor, check_array

SHARD_BYTES = 5_000_000_000
# Files that say how weights were quantized.
STALE = ("config.json", *methods.BESIDE, "quant_log.csv", "recipe.yaml")
STALE += ("measurement.json", sinq.SIDECAR)

# Modules with the same fault that are listed by their names.
_LISTED = 3
# Last names of embeddings, beside those with "embed" in them.
_EMBEDDINGS = ("wte", "wpe", "emb", "shared", "relative_attention_bias")
# Names, in a module's path, of what chooses experts.
_ROUTERS = ("gate", "router", "shared_expert_gate")

Named = Iterable[tuple[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a directory will hold, found before anything is written.

    Attributes:
      dialect: How matrices are written.
      config: For ``config.json``.
      beside: Other JSON files, by name.
      files: What each file of weights holds, and where.
    """

    dialect: Dialect
    config: Mapping[str, Any]
    beside: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, placing.File]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QTensor | Array],
    config: Mapping[str, Any],
    *,
    format: str,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint directory: ``config.json`` and ``model.safetensors``.

    Nothing is requantized: codes, scales and zeros are those of the tensors, in the
    layout and under the names of the format. Beside the tensors at hand, memory holds
    one matrix. The directory is written under another name and then renamed: after a
    crash there is the old one or none.

    Args:
      path: The directory to make. The one that holds it must be there.
      tensors: As `load` returns them, prepared or not: quantized matrices under the
        paths of their modules, other arrays under their full names.
      config: The model's ``config.json``, as `read_config` returns it; its
        ``quantization_config`` is replaced by one that fits, and so is the
        "quantization" of MLX.
      format: "gptq" (v1), "gptq_v2", "gptq_p" (planes), "awq" (gemm),
        "compressed-tensors" (pack-quantized, or the formats of small floats), "exl2",
        "hqq", "fp8", "bitnet", "bitsandbytes" (NF4, FP4 or LLM.int8()), "modelopt" (its
        NVFP4, MXFP8, and FP8 with several scales), "quanto" (2, 4 and 8 bits, FP8),
        "quark" (4 and 8 bits, FP8, MXFP4 and MXFP8), "torchao" (1 to 8 bits a byte
        each, 4 bits with float zeros, FP8, MXFP4, MXFP8 and NVFP4), "mlx" (codes with
        offsets, MXFP4, MXFP8, NVFP4; stacks, too) or "metal" (2, 4 and 8 bits).
      overwrite: Whether the weights and the config of a checkpoint that is there
        already may be replaced. Other files and directories in it stay.
      shard_bytes: Size above which weights are spread over several files with a
        ``model.safetensors.index.json``; a module stays in one file.

    Raises:
      TypeError: If a tensor is no array, or has no values.
      ValueError: If the format cannot hold a tensor, or two beside each other: all
        modules with their reasons (of many with the same, one and their number), and
        nothing is written; or if a name is no path with dots.
      FileExistsError: If ``path`` is there without ``overwrite``, or is no checkpoint.
      FileNotFoundError: If the directory that should hold ``path`` is not there.

    Example:
      >>> import tempfile
      >>> w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/eye", {"proj": w}, {}, format="awq")
      ...     qjax.checkpoints.load(f"{folder}/eye", prepare=False)["proj"]
      QTensor(64x64, 4 bits, group 32, Gemm(), (q - z) * s, float32 scale, 2.625 KiB)
    """
    target = check_target(path, overwrite=overwrite)
    for name, weight in tensors.items():
        _check_concrete(name, weight)
    looks = ((name, centered(weight)) for name, weight in tensors.items())
    plan = plan_files(target, looks, config, format, shard_bytes)
    with replacing(target, overwrite=overwrite, stale=superseded) as fresh:
        for _ in write_files(fresh, plan, lambda name: centered(tensors[name])):
            pass


def _check_concrete(name: str, weight: Any) -> None:
    for leaf in jax.tree.leaves(weight) if isinstance(weight, QTensor) else [weight]:
        check_array(leaf, f"tensors[{name!r}]")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"tensors[{name!r}] is abstract, a shape without values; load or make "
                "it first."
            )


def superseded(directory: Path) -> set[str]:
    """Names the files that make no sense without the weights of a directory.

    Args:
      directory: A checkpoint.

    Returns:
      The names, whether they are there or not.
    """
    return weight_files(directory) | {*STALE}


def plan_files(
    path: Path,
    weights: Named,
    config: Mapping[str, Any],
    format_: str,
    shard_bytes: int,
    *,
    advice: str = "",
) -> Plan:
    """Finds what a directory will hold, or why it cannot.

    Args:
      path: The directory, for messages.
      weights: Names with matrices, whose leaves may be abstract; with anything else
        that has ``shape`` and ``dtype``; or with the ValueError that says why there is
        none.
      config: The model's ``config.json``.
      format_: A name in `DIALECTS`.
      shard_bytes: As in `save`.
      advice: What to do about matrices that the format cannot hold.

    Returns:
      The plan.

    Raises:
      ValueError: As `save`.
    """
    if format_ not in DIALECTS:
        raise ValueError(f"format={format_!r} must be one of {list(DIALECTS)}.")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be positive.")
    dialect = DIALECTS[format_]
    matrices: dict[str, QTensor] = {}
    stored: dict[str, dict[str, Stored]] = {}
    reasons: dict[str, str] = {}
    for name, weight in weights:
        if isinstance(weight, ValueError):
            reasons[name] = str(weight)
            continue
        if not isinstance(weight, QTensor):
            stored[name] = {"": _planned(path, name, weight)}
            continue
        try:
            matrix, shapes = _abstract(dialect, weight)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        matrices[name] = matrix
        stored[name] = {
            key: _planned(path, f"{name}.{key}", array) for key, array in shapes.items()
        }
    if not matrices and not reasons:
        raise ValueError(f"No weight is quantized: there is nothing for {format_!r}.")
    dense = _dense_modules(stored, matrices)
    if matrices:
        reasons |= dialect.against(matrices, dense)
    if reasons:
        raise _refusal(format_, reasons, len(matrices | reasons), advice)
    entry = dialect.describe(matrices, dense)
    config, beside = _described(config, dialect, entry), {}
    metadata = dialect.metadata(matrices, sorted(stored.keys() - matrices.keys()))
    read_as = {**config, "quantization_config": entry}
    _check_readable(path, format_, read_as, stored, metadata)
    if dialect.beside is not None:
        method = "quant_method"
        beside[dialect.beside] = {k: v for k, v in entry.items() if k != method}
    files = {
        file: placing.place(
            path / file, {name: stored[name].values() for name in names}, metadata
        )
        for file, names in _deal(stored, shard_bytes).items()
    }
    return Plan(dialect=dialect, config=config, beside=beside, files=files)


def _described(
    config: Mapping[str, Any], dialect: Dialect, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """The config with a description of the quantization, and without an older one."""
    stale = {"quantization_config"}
    if methods.mlx_entry(config):
        stale.add("quantization")
    kept = {key: value for key, value in config.items() if key not in stale}
    return kept | dict.fromkeys(dialect.fields, entry)


def _abstract(dialect: Dialect, qt: QTensor) -> tuple[QTensor, dict[str, Any]]:
    """The matrix, and what will be written of it, without their values."""
    if reason := dialect.refusal(qt):
        raise ValueError(reason)
    _check_finite(qt)
    shapes: dict[str, Any] = {}

    def look(qt: QTensor) -> None:
        # What eval_shape returns would have int32 for NumPy's int64.
        for key, array in dialect.tensors(qt).items():
            shapes[key] = _Shaped(tuple(array.shape), np.dtype(array.dtype))

    known = all(map(is_known, jax.tree.leaves(qt)))
    if known and dialect.encoded is not None:
        qt = dialect.encoded(qt)
        look(qt)
    matrix = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), qt)
    if not shapes:
        jax.eval_shape(look, matrix)
    return matrix, shapes


def _check_finite(qt: QTensor) -> None:
    """Checks floats that are at hand: `load` would refuse a file with others."""
    names = ("scale", "zero", "codebook", "input_scale")
    floats = {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name in names
        for path, leaf in jax.tree.leaves_with_path(getattr(qt, name))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and not isinstance(leaf, jax.ShapeDtypeStruct)
    }
    check_finite(floats)


@dataclasses.dataclass(frozen=True)
class _Shaped:
    shape: tuple[int, ...]
    dtype: np.dtype


def _planned(path: Path, name: str, array: Any) -> Stored:
    check_name(path, name)
    return Stored(
        file=path / SINGLE,
        offset=0,
        name=name,
        shape=tuple(array.shape),
        dtype=np.dtype(array.dtype),
    )


def _refusal(
    format_: str, reasons: Mapping[str, str], total: int, advice: str
) -> ValueError:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = "".join(f"\n  {_some(same)}: {reason}" for reason, same in names.items())
    return ValueError(
        f"{len(reasons)} of {total} matrices cannot be written as {format_!r}; nothing "
        f"was written:{lines}\n{advice}".rstrip()
    )


def _some(names: Sequence[str]) -> str:
    if len(names) <= _LISTED:
        return ", ".join(names)
    return f"{len(names)} modules such as {names[0]}"


def linear_of(name: str, shape: Sequence[int]) -> str | None:
    """Finds the linear layer that a dense tensor is the weight of.

    Args:
      name: The tensor's full name.
      shape: Its shape.

    Returns:
      Path of the layer; None for embeddings and whatever else it may be.
    """
    path = name.removesuffix(".weight")
    return path if path != name and len(shape) == 2 and not is_table(path) else None


def is_table(module: str) -> bool:
    """Whether a module is a table of embeddings, by its name."""
    last = module.rpartition(".")[2]
    return "embed" in last or last in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module is the one that makes logits, which loaders leave dense."""
    return module.rpartition(".")[2] == "lm_head"


def is_router(module: str) -> bool:
    """Whether a module chooses experts of a mixture, which loaders leave dense."""
    return any(name in _ROUTERS for name in module.split("."))


def _dense_modules(
    stored: Mapping[str, Mapping[str, Stored]], matrices: Mapping[str, QTensor]
) -> list[str]:
    """Paths of the linear layers that stay dense, for a loader to know."""
    rest = stored.keys() - matrices.keys()
    linear = [linear_of(name, stored[name][""].shape) for name in rest]
    dense = {path for path in linear if path is not None}
    # A head that is tied to the embeddings has no tensor, and is dense all the same.
    if not any(map(is_head, matrices)):
        dense.add("lm_head")
    return sorted(dense)


def _check_readable(
    path: Path,
    format_: str,
    config: Mapping[str, Any],
    stored: Mapping[str, Mapping[str, Stored]],
    metadata: Mapping[str, str],
) -> None:
    """Checks that `load` will accept the headers of what will be written."""
    tensors: dict[str, Stored] = {}
    for part in stored.values():
        for one in part.values():
            if one.name in tensors:
                raise ValueError(f"{one.name} would be written twice.")
            tensors[one.name] = dataclasses.replace(one, metadata=metadata)
    parts, faults = modules.survey(path, config, tensors)
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(
            f"{len(faults)} weights cannot be written as {format_!r}; nothing was "
            f"written:{lines}"
        )
    if parts.keys() != stored.keys():
        names = sorted(parts.keys() ^ stored.keys())
        raise ValueError(f"{names} would be read as tensors of {format_!r} matrices.")


def _deal(
    stored: Mapping[str, Mapping[str, Stored]], shard_bytes: int
) -> dict[str, tuple[str, ...]]:
    """Deals the weights out to files, in their order."""
    dealt: list[list[str]] = [[]]
    room = shard_bytes
    for name, part in stored.items():
        nbytes = sum(one.nbytes for one in part.values())
        if nbytes > room and dealt[-1]:
            dealt.append([])
            room = shard_bytes
        dealt[-1].append(name)
        room -= nbytes
    if len(dealt) == 1:
        return {SINGLE: tuple(dealt[0])}
    return {
        f"model-{i:05}-of-{len(dealt):05}.safetensors": tuple(names)
        for i, names in enumerate(dealt, 1)
    }


def write_files(
    directory: Path,
    plan: Plan,
    read: Callable[[str], Any],
    journal: Journal | None = None,
) -> Iterator[str]:
    """Writes the files of a plan, weight by weight.

    Args:
      directory: Empty, or what the same plan has left there.
      plan: What `plan_files` made of the same weights.
      read: Gives the matrix or array of a name, as it was planned.
      journal: The weights that are finished already, and where to add the others.

    Yields:
      The name of each weight that is in its place.
    """
    for name, value in {"config.json": plan.config, **plan.beside}.items():
        _write_json(directory / name, value)
    for file_name, file in plan.files.items():
        with placing.opened(directory / file_name, file) as stream:
            for name, places in file.parts.items():
                mark = None if journal is None else journal.finished.get(name)
                if mark is None or mark != placing.checksum(stream, places):
                    arrays = dict(_arrays(plan.dialect, name, read(name)))
                    mark = placing.fill(stream, places, arrays)
                    if journal is not None:
                        journal.add(name, mark)
                yield name
    if len(plan.files) > 1:
        tensors = [
            one
            for file in plan.files.values()
            for part in file.parts.values()
            for one in part
        ]
        size = sum(one.nbytes for one in tensors)
        weight_map = {one.name: one.file.name for one in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _arrays(
    dialect: Dialect, name: str, weight: Any
) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(weight, QTensor):
        try:
            tensors = dialect.tensors(weight)
        except ValueError as error:
            # What no shape had told.
            raise ValueError(f"{name}: {error}") from None
        for key, array in tensors.items():
            yield f"{name}.{key}", np.asarray(array, order="C")
    else:
        yield name, np.asarray(weight, order="C")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
