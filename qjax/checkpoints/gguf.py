"""GGUF files: what their headers say, checked before a weight is read.

A file is magic, version, counts, metadata and a list of tensors, and then their bytes,
each tensor aligned. All integers are little-endian; a string is a length and UTF-8.

    "GGUF" | version 2 or 3: u32 | tensors: u64 | entries: u64
    entry:   key: string | kind: u32 | value
    array:   kind of its items: u32 | count: u64 | items
    tensor:  name: string | axes: u32 | sizes: u64, from the contiguous one up
             | type: u32 | offset: u64, from the first aligned byte after the list

The package gguf reads the same. Its reader makes an array of every item, which takes
eight seconds and 670 MB for a tokenizer of 150000 tokens and as many merges, where this
one takes a sixth of a second; and it bounds no count by the size of the file.

Source: ggml-org/ggml, docs/gguf.md; ggml-org/llama.cpp, ggml/src/gguf.cpp and
src/llama-model-loader.cpp (split files), as in release 0.19.0 of the package gguf.
"""

import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.shards import Stored, check_name
from qjax.formats import gguf

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Since then blocks are as `qjax.formats.gguf` reads them.
_QUANTIZATION_VERSION = 2
# The bound that safetensors sets to its headers; those of large models have a tenth.
_MAX_HEADER = 100_000_000
_MAX_AXES, _MAX_DEPTH, _ALIGNMENT = 4, 4, 32
# Kinds of values: numbers by their formats, and then these.
_NUMBERS = {
    **{0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4"},
    **{7: "?", 10: "u8", 11: "i8", 12: "f8"},
}
# The same to `struct`, which is faster for one number than NumPy.
_CODES = {
    **{"u1": "<B", "i1": "<b", "u2": "<H", "i2": "<h", "u4": "<I", "i4": "<i"},
    **{"f4": "<f", "?": "<?", "u8": "<Q", "i8": "<q", "f8": "<d"},
}
_STRING, _ARRAY = 8, 9
# Types of tensors that are no blocks.
_DENSE = {
    **{0: jnp.float32, 1: jnp.float16, 30: jnp.bfloat16, 28: jnp.float64},
    **{24: jnp.int8, 25: jnp.int16, 26: jnp.int32, 27: jnp.int64},
}
_BLOCKS = {kind.number: name for name, kind in gguf.KINDS.items()}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
      stored: Where it lies; blocks as uint8 ``[..., n, k / block, size]``.
      type: Type of its blocks in `qjax.formats.gguf.KINDS`; None if it is dense.
    """

    stored: Stored
    type: str | None


class _Info(NamedTuple):
    """An entry of the list of tensors, as it stands there."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Header(NamedTuple):
    metadata: dict[str, Any]
    infos: list[_Info]
    end: int


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file, by its name, and not of a directory."""
    return Path(path).suffix == SUFFIX and not Path(path).is_dir()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what a GGUF file says beside its tensors.

    Args:
      path: The file; of split ones the first, which has all but a few entries.

    Returns:
      Numbers, strings and lists by key ("general.architecture", "tokenizer.ggml.tokens"
      and so on), unchanged.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If its header is not sound, with the file and the reason.

    Example:
      >>> metadata = read_metadata("tests/data/llama_gguf_q4_k_m/model.gguf")
      >>> metadata["general.architecture"], metadata["llama.block_count"]
      ('llama', 3)
    """
    return _header(Path(path)).metadata


def scan(path: Path) -> tuple[dict[str, Tensor], list[ValueError]]:
    """Lists the tensors of a GGUF file and of those that it was split into.

    Args:
      path: The file; of split ones any.

    Returns:
      The tensors that are sound by name, and what is wrong with the others.

    Raises:
      FileNotFoundError: If there is no such file, or one of those beside it is missing.
      ValueError: If a header is not sound, or split files do not fit together, with the
        file.
    """
    tensors: dict[str, Tensor] = {}
    faults: list[ValueError] = []
    for file, header in _headers(path):
        found, wrong = _tensors(file, header)
        for name in found.keys() & tensors.keys():
            other = tensors[name].stored.file
            raise ValueError(f"{file}: {name} is in {other}, too.")
        tensors |= found
        faults += wrong
    return tensors, faults


def _headers(path: Path) -> list[tuple[Path, _Header]]:
    """The headers of a file and of the others that it belongs with."""
    header = _header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or count < 0:
        raise ValueError(f"{path}: split.count={count!r} must be a number of files.")
    if count in (0, 1):  # 0 after llama.cpp has merged it.
        return [(path, header)]
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{path}: split.count={count!r}, and so its name must end in "
            f"-00001-of-{count!s:0>5}.gguf; give the files the names they had."
        )
    files = [
        path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}{SUFFIX}")
        for i in range(count)
    ]
    headers = []
    for i, file in enumerate(files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {path} is one of {count}.")
        found = _header(file)
        place = found.metadata.get("split.no"), found.metadata.get("split.count")
        if place != (i, count):
            raise ValueError(
                f"{file}: split.no and split.count are {place} and must be "
                f"{(i, count)}."
            )
        headers.append((file, found))
    total = sum(len(found.infos) for _, found in headers)
    wanted = headers[0][1].metadata.get("split.tensors.count", total)
    if wanted != total:
        raise ValueError(
            f"{files[0]}: split.tensors.count={wanted!r}, but the {count} files have "
            f"{total} tensors."
        )
    return headers


def _header(file: Path) -> _Header:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; pass the path of a GGUF file.")
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty; download it again.")
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _Cursor(data).header()
        except ValueError as error:
            raise ValueError(f"{file} is not a sound GGUF file: {error}") from None


class _Cursor:
    """A place in a header that moves on as it is read, and never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, min(len(data), _MAX_HEADER)

    def header(self) -> _Header:
        magic = self.data[self.skip(4) : self.at]
        if magic != _MAGIC:
            raise ValueError(
                f"it begins with {magic!r} and must begin with {_MAGIC!r}."
            )
        version = self.number("u4")
        if version not in _VERSIONS:
            raise ValueError(
                f"version={version} must be {' or '.join(map(str, _VERSIONS))}, "
                "little-endian."
            )
        tensors, entries = self.number("u8"), self.number("u8")
        metadata: dict[str, Any] = {}
        # No entry has fewer than 13 bytes, and no tensor fewer than 32.
        for _ in range(self.count(entries, 13, "entries")):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key!r} is there twice.")
            metadata[key] = self.value(self.number("u4"), key)
        infos = [self.info() for _ in range(self.count(tensors, 32, "tensors"))]
        return _Header(metadata, infos, self.at)

    def skip(self, size: int) -> int:
        """Moves on by so many bytes, and returns where they begin."""
        begin = self.at
        if size > self.size - begin:
            raise ValueError(
                f"its header does not end before byte {self.size}; download it again."
            )
        self.at += size
        return begin

    def count(self, count: int, least: int, what: str) -> int:
        """Checks that a file can have so many things of a size at least."""
        if count * least > self.size - self.at:
            raise ValueError(f"{count} {what} do not fit into its {self.size} bytes.")
        return count

    def number(self, kind: str) -> Any:
        code = _CODES[kind]
        at = self.skip(struct.calcsize(code))
        return struct.unpack_from(code, self.data, at)[0]

    def numbers(self, kind: str, count: int) -> list[Any]:
        dtype = np.dtype(f"<{kind}")
        begin = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data[begin : self.at], dtype).tolist()

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.skip(8))
        return self.data[self.skip(length) : self.at].decode()

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise ValueError(
                f"{key!r} is of kind {kind}, {depth} arrays deep; there are kinds 0 to "
                f"12, and at most {_MAX_DEPTH} arrays in one another."
            )
        kind, count = self.number("u4"), self.number("u8")
        if kind in _NUMBERS:
            return self.numbers(
                _NUMBERS[kind], self.count(count, 1, f"items of {key!r}")
            )
        # The least of a string is its length, of an array also the kind of its items.
        least = 8 if kind == _STRING else 12
        items = range(self.count(count, least, f"items of {key!r}"))
        if kind == _STRING:
            return [self.string() for _ in items]
        return [self.value(kind, key, depth + 1) for _ in items]

    def info(self) -> _Info:
        name, axes = self.string(), self.number("u4")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"{name!r} has {axes} axes; 1 to {_MAX_AXES} can be.")
        sizes = self.numbers("u8", axes)
        return _Info(name, tuple(sizes[::-1]), self.number("u4"), self.number("u8"))


def _tensors(file: Path, header: _Header) -> tuple[dict[str, Tensor], list[ValueError]]:
    """The tensors of one file, each with its bytes to itself."""
    align = header.metadata.get("general.alignment", _ALIGNMENT)
    if type(align) is not int or align < 1 or align & align - 1:
        raise ValueError(f"{file}: general.alignment={align!r} must be a power of two.")
    version = header.metadata.get("general.quantization_version", _QUANTIZATION_VERSION)
    if version != _QUANTIZATION_VERSION:
        raise ValueError(
            f"{file}: general.quantization_version={version!r} must be "
            f"{_QUANTIZATION_VERSION}; convert the original model anew."
        )
    begin, size = header.end + -header.end % align, file.stat().st_size
    tensors: dict[str, Tensor] = {}
    faults: list[ValueError] = []
    end, before = 0, ""
    for info in sorted(header.infos, key=lambda info: info.offset):
        try:
            tensor = _tensor(file, info, begin, info.name in tensors)
            _check_place(tensor.stored, info.offset, align, size, end, before)
        except ValueError as fault:
            faults.append(fault)
            continue
        tensors[info.name] = tensor
        end, before = info.offset + tensor.stored.nbytes, info.name
    in_order = {
        info.name: tensors[info.name] for info in header.infos if info.name in tensors
    }
    return in_order, faults


def _tensor(file: Path, info: _Info, begin: int, is_there: bool) -> Tensor:
    check_name(file, info.name)
    place = f"{file}: {info.name}"
    if is_there:
        raise ValueError(f"{place} is there twice.")
    kind, shape = _BLOCKS.get(info.type), info.shape
    if 0 in shape:
        raise ValueError(f"{place}: shape={shape} must not be empty.")
    if kind is not None:
        block, size = gguf.KINDS[kind].block, gguf.KINDS[kind].size
        if len(shape) < 2 or shape[-1] % block:
            raise ValueError(
                f"{place}: shape={shape} must be [..., n, k], k a multiple of {block}, "
                f"as it is {kind}."
            )
        dtype, shape = jnp.uint8, (*shape[:-1], shape[-1] // block, size)
    elif info.type in _DENSE:
        dtype = _DENSE[info.type]
    else:
        name = gguf.OTHERS.get(info.type, "unknown")
        raise ValueError(
            f"{place}: type {info.type} ({name}) is not read; those that are: "
            f"{', '.join(gguf.KINDS)}, F32, F16 and BF16."
        )
    stored = Stored(
        file=file,
        offset=begin + info.offset,
        name=info.name,
        shape=shape,
        dtype=jnp.dtype(dtype),
    )
    return Tensor(stored, kind)


def _check_place(
    stored: Stored, offset: int, align: int, size: int, end: int, before: str
) -> None:
    """Checks that a tensor is aligned, inside the file, and overlaps none before it."""
    place = f"{stored.file}: {stored.name}"
    if offset % align:
        raise ValueError(f"{place}: offset={offset} must be a multiple of {align}.")
    last = stored.offset + stored.nbytes
    if last > size:
        raise ValueError(
            f"{place} ends at byte {last} of a file of {size}; download it again."
        )
    if offset < end:
        raise ValueError(f"{place}: offset={offset} lies within {before}.")
