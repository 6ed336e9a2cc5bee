"""A safetensors file laid out before its tensors are at hand, and filled in any order.

So that memory holds one matrix at a time, not a file, and that what is in its place
need not be written again.
"""

import contextlib
import dataclasses
import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.shards import DTYPES, Stored

# Where bytes of codes should begin: PyTorch's int8 product on a CPU reads 16 at a time,
# and faults elsewhere.
_ALIGNED = 64
_CODES = {jnp.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """What a file will hold.

    Attributes:
      header: Its first bytes.
      nbytes: Its size.
      parts: Tensors in their places, by the name of the weight that they make up.
    """

    header: bytes
    nbytes: int
    parts: Mapping[str, Sequence[Stored]]


def place(
    path: Path,
    parts: Mapping[str, Iterable[Stored]],
    metadata: Mapping[str, str] = types.MappingProxyType({}),
) -> File:
    """Gives each tensor its place in a file.

    Args:
      path: Where the file will be.
      parts: Tensors by the weight that they make up; their file and offset do not
        count.
      metadata: Texts that the header has.

    Returns:
      The file: the widest dtypes first, so that all tensors are aligned, then by name.
      The first tensor of bytes begins at a multiple of 64, if the others allow it.
    """
    tensors = [one for part in parts.values() for one in part]
    # Transformers asks for this entry.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts, end = {}, 0
    for one in sorted(tensors, key=lambda one: (-one.dtype.itemsize, one.name)):
        starts[one.name] = end
        entries[one.name] = {
            "dtype": _CODES[jnp.dtype(one.dtype)],
            "shape": list(one.shape),
            "data_offsets": [end, end := end + one.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * _padding(8 + len(text), tensors)
    header = len(text).to_bytes(8, "little") + text
    placed = {
        name: tuple(
            dataclasses.replace(one, file=path, offset=len(header) + starts[one.name])
            for one in part
        )
        for name, part in parts.items()
    }
    return File(header=header, nbytes=len(header) + end, parts=placed)


def _padding(size: int, tensors: Sequence[Stored]) -> int:
    """How many spaces follow a header of that size."""
    wide = [one for one in tensors if one.dtype.itemsize > 1]
    narrow = sum(one.nbytes for one in wide)
    widest = max((one.dtype.itemsize for one in wide), default=1)
    padding = -(size + narrow) % _ALIGNED
    return -size % 8 if (size + padding) % widest else padding


@contextlib.contextmanager
def opened(path: Path, file: File) -> Iterator[BinaryIO]:
    """Opens a file to be filled, and makes it unless it is there.

    Args:
      path: Where it is. One with another header or size is replaced.
      file: What it will hold.

    Yields:
      The open file.
    """
    if not _is_begun(path, file):
        with path.open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    with path.open("r+b") as stream:
        yield stream


def _is_begun(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.nbytes:
        return False
    with path.open("rb") as stream:
        return stream.read(len(file.header)) == file.header


def fill(
    stream: BinaryIO, places: Sequence[Stored], arrays: Mapping[str, np.ndarray]
) -> str:
    """Writes the tensors of one weight.

    Args:
      stream: The open file.
      places: Where they go.
      arrays: The tensors by name.

    Returns:
      The checksum of what was written, as `checksum` finds it.

    Raises:
      ValueError: If they are not what was planned.
    """
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    planned = {one.name: (one.shape, one.dtype) for one in places}
    if found != planned:
        raise ValueError(
            f"{found} was read where {planned} was planned; the source has changed."
        )
    digest = hashlib.sha256()
    for one in places:
        data = np.ascontiguousarray(arrays[one.name]).reshape(-1).view(np.uint8)
        stream.seek(one.offset)
        stream.write(data)
        digest.update(data)
    stream.flush()
    return digest.hexdigest()


def checksum(stream: BinaryIO, places: Sequence[Stored]) -> str:
    """Computes the checksum of one weight's tensors as the file holds them."""
    digest = hashlib.sha256()
    for one in places:
        stream.seek(one.offset)
        digest.update(stream.read(one.nbytes))
    return digest.hexdigest()
