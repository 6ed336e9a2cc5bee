"""Damaged files: loading is right or refuses, and never does anything else."""

import tempfile
import warnings
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import qjax
from qjax import checkpoints
from qjax.formats import tinygemm
from tests.checkpoints import assembled, tiny

INDEX = "model.safetensors.index.json"


def kinds(directory):
    """Without the names: a changed letter in a header makes another valid name."""
    return sorted(map(kind, checkpoints.load(directory, prepare=False).values()))


def kind(w):
    packed = isinstance(w, qjax.QTensor)
    # Where the padding of tiles begins only the header says.
    tiled = packed and isinstance(w.layout, tinygemm.TensorCoreTiled)
    return packed, w.words[0].shape if tiled else w.shape, str(w.dtype)


# Dialects that say much in JSON, beside the file or in its header.
TEXTS = ["mbwq layer-mix", "mbwq channel-mix", "mpq, double quantized", "torchao tiled"]


@pytest.fixture(scope="module", params=["one file", "shards", *TEXTS])
def sound(request, tmp_path_factory):
    """Files of a valid directory, and the kinds of what it loads to."""
    if request.param in TEXTS:
        checkpoint = assembled.DIALECTS[request.param]().checkpoint
    else:
        checkpoint = tiny.checkpoint()
    if request.param == "shards":
        checkpoint.shard()
    directory = checkpoint.write(tmp_path_factory.mktemp("sound"))
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return files, kinds(directory)


def damaged(data: bytes, draw) -> bytes:
    """Bytes changed, taken out or put in, mostly where the header or JSON is."""
    end = min(len(data), draw(st.sampled_from([8, 700, len(data)]), "from the first"))
    place = draw(st.integers(0, end - 1), "place")
    count = draw(st.integers(0, 6), "bytes taken out")
    new = draw(
        st.binary(max_size=6) | st.sampled_from([b"9", b"[", b'"', b"-"]), "put in"
    )
    return data[:place] + new + data[place + count :]


@hypothesis.settings(
    max_examples=40,
    deadline=None,  # a first load compiles
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_damage_is_refused_or_harmless(sound, data):
    files, expected = sound
    name = data.draw(st.sampled_from(sorted(files)), "file")
    cut = data.draw(st.booleans(), "cut")
    if cut:
        content = files[name][
            : data.draw(st.integers(0, len(files[name]) - 1), "length")
        ]
    else:
        content = damaged(files[name], data.draw)
    with tempfile.TemporaryDirectory() as directory:
        for file, original in (files | {name: content}).items():
            (Path(directory) / file).write_bytes(original)
        with warnings.catch_warnings():
            # Zeros of GPTQ v1 with all bits set are read with a warning.
            warnings.simplefilter("ignore", UserWarning)
            try:
                outcome = kinds(directory)
            except (ValueError, FileNotFoundError) as error:
                outcome = str(error)
    assert outcome == expected or directory in outcome
