"""Conversions interrupted at any point, and gone on with where they stopped."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax import checkpoints
from qjax.checkpoints import matrices
from tests.checkpoints import tiny
from tests.checkpoints.writes import Writes

WEIGHTS = 6  # four matrices, two dense tensors
OPTIONS = {"format": "gptq_v2", "shard_bytes": 4000}


def source_at(path: Path) -> Path:
    checkpoint = tiny.checkpoint()
    checkpoint.tensors = {"model.norm.weight": np.ones(64, np.float16)}
    for i in range(4):
        for key, array in tiny.matrix(i).items():
            checkpoint.tensors[f"model.layers.{i}.q_proj.{key}"] = array
    checkpoint.tensors["lm_head.weight"] = np.ones((8, 64), np.float16)
    checkpoint.write(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@pytest.fixture
def writes(monkeypatch):
    return Writes(monkeypatch)


@pytest.fixture
def source(tmp_path):
    return source_at(tmp_path / "source")


@pytest.fixture
def expected(tmp_path, source):
    checkpoints.convert(source, tmp_path / "whole", **OPTIONS)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    return contents(tmp_path / "whole")


def interrupted(source, target, writes, at, error=None, **options):
    """Leaves a conversion that has finished ``at`` weights."""
    error = error or OSError("disk full")
    writes.fail(at, error)
    with pytest.raises(type(error)):
        checkpoints.convert(source, target, **OPTIONS | options)
    writes.watch()
    return target


@pytest.mark.parametrize("at", range(WEIGHTS))
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_goes_on_after_what_is_finished(
    tmp_path, source, expected, writes, at, error, monkeypatch
):
    target = interrupted(source, tmp_path / "x", writes, at, error)
    assert not target.exists()
    files = {f: f.stat() for f in partial(target).glob("checkpoint/*.safetensors")}
    reads = []
    read = matrices.Matrix.read
    monkeypatch.setattr(
        matrices.Matrix, "read", lambda self: reads.append(self.name) or read(self)
    )
    checkpoints.convert(source, target, **OPTIONS)
    assert contents(target) == expected
    assert len(writes.names) == WEIGHTS - at
    # Once to look at all of them, and once to write those that were missing.
    dense = {"model.norm", "lm_head"}
    assert len(reads) == 4 + len(set(writes.names) - dense)
    # What was whole is the same file, not written again.
    written = {f.name for f in files} - {sorted(files)[-1].name}
    for file, before in files.items():
        if file.name in written:
            after = (target / file.name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (
                before.st_ino,
                before.st_mtime_ns,
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "whole", "x"]


KILLED = """
import os, signal, sys
from qjax import checkpoints
from qjax.checkpoints import placing

fill, done = placing.fill, []

def kill(stream, places, arrays):
    if len(done) == int(sys.argv[3]):
        stream.seek(places[0].offset)
        stream.write(b"torn")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(places)
    return fill(stream, places, arrays)

placing.fill = kill
checkpoints.convert(sys.argv[1], sys.argv[2], format="gptq_v2", shard_bytes=4000)
"""


def test_goes_on_after_a_kill(tmp_path, source, expected, writes, pytestconfig):
    target = tmp_path / "x"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target), "3"],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    checkpoints.convert(source, target, **OPTIONS)
    assert len(writes.names) == WEIGHTS - 3
    assert contents(target) == expected
    assert not partial(target).exists()


def rewritten(source: Path) -> None:
    """Other scales in a file of the same size."""
    tensors = tiny.tensors_of(source)
    tensors["model.layers.0.q_proj.scales"] = np.full((2, 64), 0.125, np.float16)
    checkpoint = tiny.checkpoint()
    checkpoint.tensors = tensors
    size = (source / "model.safetensors").stat().st_size
    checkpoint.write(source)
    assert (source / "model.safetensors").stat().st_size == size


CHANGES = {
    "scales": rewritten,
    "tokenizer": lambda source: (source / "tokenizer.json").write_text("{ }"),
    "config": lambda source: (source / "config.json").write_text(
        json.dumps(tiny.checkpoint().config | {"vocab_size": 9})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_source_is_not_gone_on_with(tmp_path, source, writes, change):
    target = interrupted(source, tmp_path / "x", writes, 4)
    CHANGES[change](source)
    checkpoints.convert(source, target, **OPTIONS)
    assert len(writes.names) == WEIGHTS
    checkpoints.convert(source, tmp_path / "whole", **OPTIONS)
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "options", [{"format": "gptq"}, {"format": "awq"}, {"shard_bytes": 5000}], ids=str
)
def test_other_arguments_are_not_gone_on_with(tmp_path, source, writes, options):
    target = interrupted(source, tmp_path / "x", writes, 4)
    checkpoints.convert(source, target, **OPTIONS | options)
    assert len(writes.names) == WEIGHTS
    checkpoints.convert(source, tmp_path / "whole", **OPTIONS | options)
    assert contents(target) == contents(tmp_path / "whole")


def test_another_directory_of_the_same_files_is_not_gone_on_with(
    tmp_path, source, expected, writes
):
    target = interrupted(source, tmp_path / "x", writes, 4)
    source.rename(tmp_path / "moved")
    checkpoints.convert(tmp_path / "moved", target, **OPTIONS)
    assert len(writes.names) == WEIGHTS
    assert contents(target) == expected


def first_shard(folder: Path) -> Path:
    return min(folder.glob("checkpoint/*.safetensors"))


def flipped(folder: Path) -> None:
    data = bytearray(first_shard(folder).read_bytes())
    data[-1] ^= 1
    first_shard(folder).write_bytes(data)


DAMAGE = {
    # how many of the four finished weights have to be written again
    "a bit flipped": (flipped, 1),
    "a file cut": (lambda f: os.truncate(first_shard(f), 100), 3),
    "a file gone": (lambda f: first_shard(f).unlink(), 3),
    "a header of another": (
        lambda f: first_shard(f).write_bytes(b"\0" * first_shard(f).stat().st_size),
        3,
    ),
    "a line torn": (
        lambda f: os.truncate(f / "journal", (f / "journal").stat().st_size - 9),
        1,
    ),
    "no journal": (lambda f: (f / "journal").unlink(), 4),
    "an empty journal": (lambda f: (f / "journal").write_bytes(b""), 4),
    "noise for a journal": (lambda f: (f / "journal").write_bytes(b"\xff[" * 99), 4),
    "a journal too deep": (
        lambda f: (f / "journal").write_bytes(b"[" * 100_000),
        4,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_written_again(tmp_path, source, expected, writes, damage):
    target = interrupted(source, tmp_path / "x", writes, 4)
    spoil, lost = DAMAGE[damage]
    spoil(partial(target))
    checkpoints.convert(source, target, **OPTIONS)
    assert contents(target) == expected
    assert len(writes.names) == WEIGHTS - 4 + lost


def test_interrupted_again_and_again(tmp_path, source, expected, writes):
    for at in range(WEIGHTS):
        target = interrupted(source, tmp_path / "x", writes, min(at, 1))
    checkpoints.convert(source, target, **OPTIONS)
    assert len(writes.names) == 1
    assert contents(target) == expected


def test_only_the_renaming_is_left(tmp_path, source, expected, writes, monkeypatch):
    rename = Path.rename

    def refused(self, other):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    monkeypatch.setattr(Path, "rename", rename)
    writes.watch()
    checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert writes.names == []
    assert contents(tmp_path / "x") == expected


def test_the_old_directory_stays_until_the_new_one_is_whole(
    tmp_path, source, expected, writes
):
    before = contents(source)
    interrupted(source, source, writes, 4, overwrite=True)
    assert contents(source) == before
    checkpoints.convert(source, source, overwrite=True, **OPTIONS)
    assert len(writes.names) == WEIGHTS - 4
    assert contents(source) == expected
    assert not partial(source).exists()


def test_an_error_that_would_come_again_leaves_nothing(
    tmp_path, source, writes, refuses
):
    writes.fail(2, ValueError("a scale is NaN"))
    with refuses("a scale is NaN"):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_of_other_shapes_meanwhile_is_refused(tmp_path, source, monkeypatch):
    read, reads = matrices.Matrix.read, []

    def changing(self):
        reads.append(self.name)
        w = read(self)
        if len(reads) > 4:  # the first four look at all matrices
            other = tiny.matrix(0, n=32)
            return self.format.from_tensors(other, self.config)
        return w

    monkeypatch.setattr(matrices.Matrix, "read", changing)
    with pytest.raises(ValueError, match="the source has changed"):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changed_meanwhile_is_refused(tmp_path, source, writes):
    """Also where all of it could be read: its parts may not belong together."""
    fill = writes._fill

    def changing(*arguments):
        os.utime(source / "model.safetensors", ns=(1, 1))
        return fill(*arguments)

    writes._fill = changing
    with pytest.raises(ValueError, match="source was changed while it was read; start"):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_two_at_once_are_refused(tmp_path, source, expected, writes):
    target = interrupted(source, tmp_path / "x", writes, 4)
    with (partial(target) / "lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="written by another process; wait"):
            checkpoints.convert(source, target, **OPTIONS)
    checkpoints.convert(source, target, **OPTIONS)
    assert len(writes.names) == WEIGHTS - 4
    assert contents(target) == expected


def test_a_place_that_is_taken_is_left_alone(tmp_path, source):
    thesis = partial(tmp_path / "x") / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("")
    with pytest.raises(FileExistsError, match=r"holds \['thesis.tex'\], which no conv"):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert list(thesis.parent.iterdir()) == [thesis]


def test_directories_are_not_copied_and_a_warning_says_so(tmp_path, source):
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (source / ".cache").mkdir()
    with pytest.warns(UserWarning, match=r"the directories \['original'\] are not cop"):
        checkpoints.convert(source, tmp_path / "x", **OPTIONS)
    assert not [entry for entry in (tmp_path / "x").iterdir() if entry.is_dir()]
