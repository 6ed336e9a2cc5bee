"""Which tensors of a checkpoint make a quantized matrix, and which stand alone."""

import contextlib
import dataclasses
import itertools
import os
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints import gguf
from qjax.checkpoints.config import parse_object, read_config, read_object
from qjax.checkpoints.shards import Stored, scan
from qjax.formats import FORMATS, auto_round
from qjax.tensor import QTensor

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
# Names of the tensors that some format has of a matrix.
_OF_WEIGHTS = {name for format_ in FORMATS.values() for name in format_.TENSORS}
# Where no file does: methods by tensors that only they have in one module.
_MARKS = (
    ("exl2", {"q_weight", "q_groups"}),
    ("mbwq", {"qweight", "q_perm"}),
    ("mpq", {"qweight", "zeros"}),
    ("mpq", {"qweight", "qstatistic"}),
    ("sinq", {"W_q", "meta.scale2"}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantized matrix in files, of which only the headers have been read.

    Attributes:
      name: Path of the module.
      tensors: Its tensors by their names below the module.
      format: The module of `FORMATS` that reads it.
      config: That format's ``Config`` for this module.
    """

    name: str
    tensors: Mapping[str, Stored]
    format: types.ModuleType
    config: Any

    @property
    def dialect(self) -> str:
        """Name of the format, with the version of GPTQ's."""
        names = [name for name, module in FORMATS.items() if module is self.format]
        return getattr(self.config, "checkpoint_format", names[0])

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def stacked(self) -> int:
        """How many axes of a stack lead those of the tensors, where `piece` cuts it."""
        axes = next(iter(self._axes.values()), ())
        return len(list(itertools.takewhile(lambda axis: not axis, axes)))

    @property
    def _axes(self) -> Mapping[str, tuple[str, ...]]:
        return getattr(self.format, "axes", lambda *_: {})(self.tensors, self.config)

    def check(self) -> None:
        """Checks names, dtypes and shapes against the format."""
        try:
            self.format.check(self.tensors, self.config)
        except ValueError as error:
            raise self._fault(error) from None

    def read(self) -> QTensor:
        """Reads the matrix in the layout of the file."""
        arrays = {name: _given(stored.read()) for name, stored in self.tensors.items()}
        return self._built(arrays)

    def piece(self, at: Mapping[str, int], of: Mapping[str, int]) -> "Matrix | None":
        """Picks one of equal pieces as a matrix of its own, and reads nothing.

        Args:
          at: Which one, along "k" and "n".
          of: Into how many the matrix is cut. Along k its groups must be runs of rows,
            which ``g_idx`` is then not needed to say.

        Returns:
          The piece, or None where the files do not hold it by itself.
        """
        axes = self._axes
        present = {axis for names in axes.values() for axis in names}
        wanted = {axis for axis, count in of.items() if count > 1}
        if axes.keys() != self.tensors.keys() or wanted - present:
            return None
        pieces = {}
        for name, stored in self.tensors.items():
            if axes[name] == ("k",) and of["k"] > 1:
                continue
            ranges = []
            for size, axis in zip(stored.shape, axes[name], strict=True):
                # All of a column may share a scale.
                count = 1 if size == 1 else of.get(axis, 1)
                if size % count:
                    return None
                share, first = size // count, at[axis] if count > 1 else 0
                ranges.append(slice(first * share, (first + 1) * share))
            pieces[name] = stored.piece(ranges)
        matrix = dataclasses.replace(self, tensors=pieces)
        with contextlib.suppress(ValueError):
            matrix.check()
            return matrix
        return None

    def blank(self) -> QTensor:
        """A matrix of zeros of the same structure; of the files, ``g_idx`` is read."""
        arrays = {
            name: stored.read()
            if len(stored.shape) == 1
            else np.zeros(stored.shape, stored.dtype)
            for name, stored in self.tensors.items()
        }
        return self._built(arrays)

    def _built(self, arrays: Mapping[str, Any]) -> QTensor:
        try:
            return self.format.from_tensors(arrays, self.config)
        except ValueError as error:
            raise self._fault(error) from None

    def _fault(self, error: ValueError) -> ValueError:
        files = sorted({str(stored.file) for stored in self.tensors.values()})
        return ValueError(f"{', '.join(files)}: {self.name}: {error}")


def _given(array: np.ndarray) -> np.ndarray | jax.Array:
    """Gives an array to JAX, which takes its memory; `jnp.asarray` would copy it.

    Not 64 bits, which JAX would cut to 32 before anyone has looked at the values.
    """
    whole = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jax.device_put(array) if whole else array


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
    quantization = _quantization(directory, config, tensors)
    if quantization is None:
        return dict(tensors), _dense_faults(tensors)
    groups = _group(tensors, quantization.format)
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


def _group(
    tensors: Mapping[str, Stored], format_: types.ModuleType
) -> dict[str, dict[str, Stored]]:
    """Groups the tensors that a format knows by module, under their names below it.

    A module is quantized if it has any of them; but "weight" alone, the name that some
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


def _quantization(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Quantization | None:
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
        for group in _group(tensors, format_).values()
        for stored in group.values()
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
        groups = _group(tensors, FORMATS[method]).values()
        if any(mark <= group.keys() for group in groups):
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
