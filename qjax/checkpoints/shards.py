"""The tensors of a directory's safetensors files: listed first, read one by one."""

import contextlib
import dataclasses
import io
import math
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from qjax.checkpoints.config import parse_object, read_object

SINGLE = "model.safetensors"
# As many as NumPy and JAX have in common, and more than a weight has.
_MOST_AXES = 32
INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
DTYPES = {
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F32": jnp.float32,
    "F64": jnp.float64,
    "I8": jnp.int8,
    "I16": jnp.int16,
    "I32": jnp.int32,
    "I64": jnp.int64,
    "U8": jnp.uint8,
    "U16": jnp.uint16,
    "U32": jnp.uint32,
    "U64": jnp.uint64,
    "BOOL": jnp.bool_,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file, of which only the header has been read.

    Attributes:
      file: The file.
      offset: Where its bytes begin.
      name: Its name there.
      shape: Its shape.
      dtype: Its dtype.
      metadata: Texts in the header of the file, which all of its tensors share.
      whole: The shape in the file, where this is only a part; else None.
      starts: Where the part begins on each axis.
    """

    file: Path
    offset: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    metadata: Mapping[str, str] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    whole: tuple[int, ...] | None = None
    starts: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def piece(self, ranges: Sequence[slice]) -> "Stored":
        """Picks a part of the tensor, and reads nothing.

        Args:
          ranges: A slice without steps for each axis.
        """
        parts = [
            range(size)[part] for size, part in zip(self.shape, ranges, strict=True)
        ]
        starts = self.starts or (0,) * len(parts)
        return dataclasses.replace(
            self,
            shape=tuple(map(len, parts)),
            whole=self.whole or self.shape,
            starts=tuple(s + p.start for s, p in zip(starts, parts, strict=True)),
        )

    def read(self) -> np.ndarray:
        """Reads the tensor into memory of its own; of a part, no byte beside it.

        The pages of a map of the file, which safetensors would give, stay resident once
        they are touched. These are whole pages without a file: JAX on the CPU takes
        them as they are, and what is let go is free at once, where `malloc` would keep
        gaps between the tensors of a model.
        """
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages = mmap.mmap(-1, max(self.nbytes, 1), flags=private)
        data = memoryview(pages)[: self.nbytes]
        offsets = self._runs()
        size = self.nbytes // max(1, len(offsets))
        # A buffer would read on.
        with self.file.open("rb", buffering=0) as stream:
            for number, offset in enumerate(offsets):
                stream.seek(offset)
                self._fill(stream, data, number * size, (number + 1) * size)
        return np.frombuffer(pages, self.dtype, math.prod(self.shape)).reshape(
            self.shape
        )

    def narrowed(self) -> np.ndarray:
        """Reads the tensor, integers of 64 bits as those that JAX has here.

        Raises:
          ValueError: If one of them does not fit.
        """
        array = self.read()
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        if dtype == array.dtype:
            return array
        narrow = array.astype(dtype)
        if (narrow != array).any():
            raise ValueError(
                f"{self.file}: {self.name} is {array.dtype}, and has values that do "
                f"not fit {narrow.dtype}; set jax_enable_x64, or remove it."
            )
        return narrow

    def _runs(self) -> list[int]:
        """Where in the file the runs begin, of equal length, that lie together."""
        whole = self.whole or self.shape
        cut = [axis for axis, size in enumerate(whole) if self.shape[axis] != size]
        offsets = np.array([self.offset])
        for axis in range(max(cut, default=-1) + 1):
            stride = math.prod(whole[axis + 1 :]) * self.dtype.itemsize
            # The last axis that is cut, and all behind it, are one run.
            count = 1 if axis == cut[-1] else self.shape[axis]
            steps = (self.starts[axis] + np.arange(count)) * stride
            offsets = (offsets[:, None] + steps).reshape(-1)
        return offsets.tolist()

    def _fill(self, stream: io.FileIO, data: memoryview, done: int, end: int) -> None:
        while done < end:
            size = stream.readinto(data[done:end])
            if not size:
                raise ValueError(
                    f"{self.file}: {self.name} has {done} of {self.nbytes} bytes; the "
                    "file was cut while it was loaded."
                )
            done += size


def scan(directory: Path) -> dict[str, Stored]:
    """Lists the tensors of a directory from the headers of its files.

    Args:
      directory: Holds ``model.safetensors``, or the shards that
        ``model.safetensors.index.json`` lists. Where both are there, the first counts,
        as it does for transformers. Where neither is, one file of another name, as
        ExLlamaV2 and AutoGPTQ have given them, or all of a numbered set.

    Returns:
      The tensors by name.

    Raises:
      FileNotFoundError: If there are no such files, or a shard is missing.
      ValueError: If a header is not sound, a name is a path, or index and shards
        disagree.
    """
    files = _files(directory)
    if SINGLE in files:
        return _header(directory / SINGLE)
    listed = _shards(directory / INDEX) if INDEX in files else None
    for shard, names in (listed or {}).items():
        if shard not in files:
            raise FileNotFoundError(
                f"{directory / shard} is missing; {INDEX} lists it for {names[0]!r} "
                f"and {len(names) - 1} more."
            )
    tensors: dict[str, Stored] = {}
    for shard in listed or _unlisted(directory, files):
        held = _header(directory / shard)
        for name in held.keys() & tensors.keys():
            raise ValueError(f"{name!r} is in {tensors[name].file} and in {shard}.")
        for name in held.keys() ^ {*listed[shard]} if listed else ():
            fault = "is not listed in" if name in held else "is missing, but listed in"
            raise ValueError(f"{directory / shard}: {name!r} {fault} {INDEX}.")
        tensors |= held
    return tensors


def _unlisted(directory: Path, files: Sequence[str]) -> list[str]:
    """The files of tensors of a directory that names none of them as its own."""
    found = [name for name in files if name.endswith(".safetensors")]
    numbered = [match for name in found if (match := _NUMBERED.fullmatch(name))]
    sets = {(match[1], match[3]) for match in numbered}
    if len(found) == 1 and not numbered:
        return found
    if len(sets) == 1 and len(found) == len(numbered) == int(numbered[0][3]):
        return found
    remedy = (
        f"leave one of {found}, or all of a numbered set" if found else "convert it"
    )
    if not found and (pickles := [name for name in files if name.endswith(".bin")]):
        remedy = (
            f"have {pickles}, pickles that may run any code, saved as safetensors by "
            "who wrote them"
        )
    raise FileNotFoundError(
        f"{directory} has neither {SINGLE} nor {INDEX}, nor the one .safetensors file "
        f"that could be meant; {remedy}."
    )


def weight_files(directory: Path) -> set[str]:
    """Names of the files that `scan` reads, or would if the first were not there.

    Args:
      directory: As in `scan`.

    Returns:
      The names. An index that is not sound lists no shards.
    """
    try:
        shards = set(_shards(directory / INDEX))
    except (OSError, ValueError):
        shards = set()
    with contextlib.suppress(OSError):
        files = _files(directory)
        if not shards and SINGLE not in files:
            shards = set(_unlisted(directory, files))
    return {SINGLE, INDEX} | shards


def _files(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_file())


def _header(file: Path) -> dict[str, Stored]:
    try:
        # Bounds the header, and checks that the tensors cover the file with no overlap.
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a sound safetensors file: {error}. Download it again."
        ) from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_object(stream.read(length), file)
    metadata = header.pop("__metadata__", None) or {}
    return {
        name: dataclasses.replace(
            _stored(file, 8 + length, name, header[name]), metadata=metadata
        )
        for name in header
    }


def _stored(file: Path, begin: int, name: str, entry: object) -> Stored:
    check_name(file, name)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, _]}:
            if len(shape) > _MOST_AXES or any(size >= 2**31 for size in shape):
                raise ValueError(
                    f"{file}: {name}: shape={shape} must have at most {_MOST_AXES} "
                    "axes, each below 2**31."
                )
            if dtype in DTYPES:
                return Stored(
                    file=file,
                    offset=begin + start,
                    name=name,
                    shape=tuple(shape),
                    dtype=jnp.dtype(DTYPES[dtype]),
                )
    known = ", ".join(DTYPES)
    raise ValueError(f"{file}: {name}: {entry} must have one of the dtypes {known}.")


def check_name(place: Path, name: str) -> None:
    """Checks that a name is a dotted path of modules.

    It has no separators and no empty parts, so no "..": whatever a program makes of the
    name, it stays where it belongs.

    Args:
      place: The file or directory, for the message.
      name: The name.

    Raises:
      ValueError: If it is none.
    """
    parts = name.split(".")
    is_path = name.isprintable() and "" not in parts and not {*"/\\"} & {*name}
    # safetensors has its metadata under that name.
    if not is_path or name == "__metadata__":
        raise ValueError(
            f"{place}: {name!r} is not the name of a tensor, which is the path of its "
            "module with dots and without slashes, as 'layers.0.up.weight'."
        )


def _shards(index: Path) -> dict[str, list[str]]:
    """Names of the tensors that an index lists, by shard."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map names of tensors to files.")
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not shard.isprintable()
            or not shard.endswith(".safetensors")
            or "/" in shard
            or "\\" in shard
        ):
            raise ValueError(
                f"{index}: weight_map[{name!r}]={shard!r} must name a .safetensors "
                "file beside it."
            )
        by_shard.setdefault(shard, []).append(name)
    return by_shard
