"""Measured configurations: one JSON file a device, written by `qjax tune`.

The files lie beside this one, named after the device ("NVIDIA H200" in
``nvidia-h200.json``; none is shipped yet), and a user's own in ``$QJAX_TABLES`` or else
``$XDG_CACHE_HOME/qjax/tables`` (``~/.cache/qjax/tables``), whose entries come first. A
file reads

    {"format": 2, "device": "NVIDIA H200", "versions": {"jax": "0.12.0.1"}, "entries": [
      {"op": "matmul", "k": 4096, "n": 4096, "bits": [4], "codes": "counts",
       "group": 128, "m": 8, "dtype": "float16",
       "block_m": 8, "block_n": 128, "block_k": 256, "splits": 4, "warps": 4,
       "stages": 3, "slices": 1, "us": 1.0, "dense_us": 2.0}, ...]}

and a file that does not is refused with the entry that is wrong, not passed over.
"""

import dataclasses
import functools
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qjax.pallas.operands import DTYPE, Config
from qjax.tensor import QTensor

OPS = ("matvec", "matmul", "matmul_t", "scale_grad", "dequantize")
# Fewest rows of a bucket, and the most that are told apart.
_ROWS = {op: (1, 16) if op == "matvec" else (8, 4096) for op in OPS}
# Values of the fields of a `Config`: least, most, and whether powers of two alone.
LIMITS = {
    "block_m": (8, 256, True),
    "block_n": (32, 256, True),
    "block_k": (64, 512, True),
    "splits": (1, 1024, False),
    "warps": (1, 16, True),
    "stages": (1, 8, False),
    "slices": (1, 16, True),
}
# Columns of the weight that a slice of a program has.
LEAST_COLUMNS = 16
_FORMAT = 2
_EXTENT = 2**31 - 1


# Whole numbers, entries of a table, small floats: each is made a number another way.
CODES = ("counts", "codebook", "float")


class Key(NamedTuple):
    """What a configuration depends on.

    Attributes:
      op: One of `OPS`.
      k: Rows of the weight.
      n: Columns of the weight.
      bits: Widths of its segments, in their order.
      codes: What they are, one of `CODES`.
      group: Rows of its smallest group; None for one group a column.
      m: Rows of the activations, as `bucket` rounds them; None for `dequantize`.
      dtype: Of the arithmetic, whatever 16-bit dtype the activations have. That of
        `matvec` is theirs, and its configuration the same for both.
    """

    op: str
    k: int
    n: int
    bits: tuple[int, ...]
    codes: str
    group: int | None
    m: int | None
    dtype: str = DTYPE.name

    @classmethod
    def of(cls, op: str, m: int, w: QTensor) -> "Key":
        """Returns the key of a launch with ``m`` rows."""
        groups = [s.group_size for s in w.segments if s.group_size is not None]
        rows = None if op == "dequantize" else bucket(op, m)
        bits = tuple(segment.bits for segment in w.segments)
        codes = "counts" if w.affine.counts else w.affine.name.lower()
        return cls(op, w.k, w.n, bits, codes, min(groups, default=None), rows)


class Entry(NamedTuple):
    """What was measured.

    Attributes:
      config: The fastest configuration.
      us: Microseconds of a call with it.
      dense_us: Microseconds of the same product through the dense weight, where that is
        an alternative.
    """

    config: Config
    us: float
    dense_us: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The measurements of one device.

    Attributes:
      device: Its kind, as JAX names it.
      entries: What was measured, by key.
      versions: Of the packages that measured last.
    """

    device: str
    entries: Mapping[Key, Entry]
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def nearest(self, key: Key) -> tuple[Key, Entry] | None:
        """Finds the entry of a key, or of the nearest shape that was measured.

        Nearest is the least sum of the ratios of the extents, as logarithms. All else
        has to agree.

        Returns:
          The key found and its entry; None if there is none.
        """
        alike = [
            other
            for other in self.entries
            if other == key._replace(k=other.k, n=other.n)
        ]
        if not alike:
            return None
        found = min(
            alike,
            key=lambda o: (_distance(o.k, key.k) + _distance(o.n, key.n), o.k, o.n),
        )
        return found, self.entries[found]

    def dense_rows(self, key: Key, unmeasured: int) -> int:
        """Returns the rows from which the dense weight is faster.

        Args:
          key: Of a product with any number of rows.
          unmeasured: What to take where its shape and widths were not measured, or not
            of so many rows.

        Returns:
          The number of rows.
        """
        rows = {
            k.m: entry
            for k, entry in self.entries.items()
            if k._replace(m=key.m) == key and k.m is not None and entry.dense_us
        }
        if not rows:
            return unmeasured
        won = [m for m, entry in rows.items() if entry.us <= (entry.dense_us or 0)]
        most = max(won, default=0)
        return max(most + 1, unmeasured) if most == max(rows) else most + 1


def bucket(op: str, m: int) -> int:
    """The smallest power of two from 8 to 4096, of matvec 1 to 16, that holds m."""
    least, most = _ROWS[op]
    return min(most, max(least, 1 << (m - 1).bit_length()))


def _distance(a: int, b: int) -> float:
    return abs(math.log(a / b))


@functools.cache
def device_kind() -> str | None:
    """The kind of the GPU that programs are compiled for, or None without one."""
    try:
        return jax.devices("cuda")[0].device_kind
    except RuntimeError:
        return None


def user_directory() -> Path:
    """Where a user's own tables lie."""
    if named := os.environ.get("QJAX_TABLES"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qjax" / "tables"


def file_name(device: str) -> str:
    """Name of the file of a device: letters and digits of its kind."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def of_device(device: str) -> Table:
    """Reads what was measured on a device, the user's entries before qjax's own.

    A file is read once in a process.

    Raises:
      ValueError: If a file is wrong, naming it and the entry.
    """
    return _merged(device, user_directory())


@functools.cache
def _merged(device: str, directory: Path) -> Table:
    files = (
        folder / file_name(device) for folder in (Path(__file__).parent, directory)
    )
    found = {file: read(file) for file in files if file.is_file()}
    for file, table in found.items():
        if table.device != device:
            raise ValueError(
                f"{file}: device={table.device!r} must be {device!r}, which the name "
                "of the file stands for."
            )
    entries = {
        key: entry for table in found.values() for key, entry in table.entries.items()
    }
    return Table(device=device, entries=entries)


def forget() -> None:
    """Lets the files be read anew, after one was written."""
    _merged.cache_clear()


def write(file: Path, table: Table) -> None:
    """Writes a table, one entry a line; the file appears whole or not at all."""
    entries = ",\n  ".join(
        json.dumps(_as_json(key, entry))
        for key, entry in sorted(table.entries.items(), key=lambda item: _rank(item[0]))
    )
    head = json.dumps(
        {
            "format": _FORMAT,
            "device": table.device,
            "versions": dict(table.versions),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with fresh.open("w") as stream:
            stream.write(f'{head[:-1]}, "entries": [\n  {entries}\n]}}\n')
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def _rank(key: Key) -> tuple:
    return (key.op, key.bits, key.codes, key.group or 0, key.k, key.n, key.m or 0)


def _as_json(key: Key, entry: Entry) -> dict[str, Any]:
    times = {"us": entry.us, "dense_us": entry.dense_us}
    return key._asdict() | dataclasses.asdict(entry.config) | times


def read(file: Path) -> Table:
    """Reads and checks a table.

    Raises:
      ValueError: If it is no table of this format, naming file and entry.
    """
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); delete it.") from None
    match content:
        case {
            "format": int(version),
            "device": str(device),
            "versions": dict(versions),
            "entries": list(listed),
        } if all(isinstance(value, str) for value in versions.values()):
            pass
        case _:
            raise ValueError(
                f"{file}: must be an object of format, device, versions and entries; "
                "delete it, and `qjax tune` writes it anew."
            )
    if version != _FORMAT:
        raise ValueError(f"{file}: format={version} must be {_FORMAT}; delete it.")
    entries: dict[Key, Entry] = {}
    for i, item in enumerate(listed):
        try:
            key, entry = _parse(item)
        except ValueError as error:
            raise ValueError(f"{file}: entries[{i}]: {error}") from None
        if key in entries:
            raise ValueError(f"{file}: entries[{i}]: a second entry of {key}.")
        entries[key] = entry
    return Table(device=device, entries=entries, versions=versions)


def _parse(item: Any) -> tuple[Key, Entry]:
    names = {*Key._fields, *LIMITS, "us", "dense_us"}
    if not isinstance(item, dict) or item.keys() != names:
        raise ValueError(f"must have the fields {sorted(names)}; got {item!r}.")
    _require(item, "op", item["op"] in OPS, f"one of {OPS}")
    for name in ("k", "n"):
        _require(item, name, _whole(item[name], 1, _EXTENT), "a positive integer")
    bits = item["bits"]
    sound = isinstance(bits, list) and bits and all(_whole(b, 1, 8) for b in bits)
    _require(item, "bits", sound, "a list of integers from 1 to 8")
    _require(item, "codes", item["codes"] in CODES, f"one of {CODES}")
    group = item["group"]
    sound = group is None or _whole(group, 1, _EXTENT)
    _require(item, "group", sound, "a positive integer or null")
    rows = item["m"]
    if item["op"] == "dequantize":
        _require(item, "m", rows is None, "null for dequantize")
    else:
        least, most = _ROWS[item["op"]]
        sound = _whole(rows, least, most, powers=True)
        _require(item, "m", sound, f"a power of two from {least} to {most}")
    _require(item, "dtype", item["dtype"] == DTYPE.name, repr(DTYPE.name))
    for name, (least, most, powers) in LIMITS.items():
        kind = "a power of two" if powers else "an integer"
        sound = _whole(item[name], least, most, powers=powers)
        _require(item, name, sound, f"{kind} from {least} to {most}")
    most = min(item["block_m"], item["block_n"] // LEAST_COLUMNS)
    most = most if item["op"] == "matvec" else 1
    _require(item, "slices", item["slices"] <= most, f"at most {most} here")
    _require(item, "us", _positive(item["us"]), "a positive number")
    sound = item["dense_us"] is None or _positive(item["dense_us"])
    _require(item, "dense_us", sound, "a positive number or null")
    fields = {name: item[name] for name in Key._fields if name != "bits"}
    key = Key(bits=tuple(bits), **fields)
    config = Config(**{name: item[name] for name in LIMITS})
    return key, Entry(config, item["us"], item["dense_us"])


def _require(item: dict[str, Any], name: str, sound: Any, wanted: str) -> None:
    if not sound:
        raise ValueError(f"{name}={item[name]!r} must be {wanted}.")


def _whole(value: Any, least: int, most: int, *, powers: bool = False) -> bool:
    # Not isinstance: True is an int.
    whole = type(value) is int and least <= value <= most
    return whole and (not powers or value & (value - 1) == 0)


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
