"""Ways to bend a checkpoint, in memory or on the disk, and what comes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qjax import checkpoints
from qjax.checkpoints.shards import Stored
from tests.checkpoints import tiny
from tests.checkpoints.tiny import MODULE, Checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Case(NamedTuple):
    bend: Callable[[Checkpoint], object]
    pieces: tuple[str, ...]
    error: type[Exception] = ValueError
    # Only what the values of a tensor show is found while weights are read.
    reads: bool = False
    make: Callable[[], Checkpoint] = tiny.checkpoint


def put(**arrays):
    """Replaces tensors of the module."""
    return lambda c: c.tensors.update({f"{MODULE}.{k}": v for k, v in arrays.items()})


def add(name, array):
    return lambda c: c.tensors.update({name: array})


def drop(*names):
    return lambda c: [c.tensors.pop(name) for name in names]


def quantization(**fields):
    return lambda c: c.config["quantization_config"].update(fields)


def configuration(**fields):
    return lambda c: c.config.update(fields)


def write(file, data):
    """Replaces a file; ``data`` is its bytes, or a function of the old ones."""

    def action(directory: Path):
        path = directory / file
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return lambda c: c.after.append(action)


def remove(file):
    return lambda c: c.after.append(lambda directory: (directory / file).unlink())


def with_header(text: str, data: bytes = bytes(4)) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def header(change):
    """Changes the header of the one file and leaves the rest as it is."""

    def edit(data: bytes) -> bytes:
        begin = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:begin])
        change(entries)
        return with_header(json.dumps(entries), data[begin:])

    return write(SINGLE, edit)


def offset(name, begin, end):
    return header(lambda h: h[name].update(data_offsets=[begin, end]))


def shards(*more):
    """Two shards, and then more to do."""

    def bend(checkpoint: Checkpoint):
        checkpoint.shard()
        for one in more:
            one(checkpoint)

    return bend


def weight_map(change):
    def edit(data: bytes) -> bytes:
        index = json.loads(data)
        change(index["weight_map"])
        return json.dumps(index).encode()

    return write(INDEX, edit)


def both(*bends):
    return lambda c: [bend(c) for bend in bends]


def assert_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loading raises one clear error, before a weight is read if it can."""
    checkpoint = case.make()
    case.bend(checkpoint)
    directory = checkpoint.write(tmp_path / "model")
    if not case.reads:
        monkeypatch.setattr(Stored, "read", lambda self: pytest.fail("read too early"))
    with pytest.raises(case.error) as caught:
        checkpoints.load(directory)
    message = str(caught.value)
    for piece in (str(directory), *case.pieces):
        assert piece in message
    # One error, without the traceback of what it was made from.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "\n" not in message
