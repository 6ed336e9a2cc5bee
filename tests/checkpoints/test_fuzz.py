"""Wrong tensors and wrong fields, in every dialect: refused, or without any effect."""

import copy
import functools
import json
import tempfile
import warnings
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st

import qjax
from qjax import checkpoints
from tests.checkpoints.assembled import DIALECTS
from tests.checkpoints.tiny import Checkpoint

JUNK = [
    *(None, True, False, -1, 0, 1, 2, 3, 48, 10**30, 1.5, 1e308, "", "x", "4", "(a+)+"),
    *([], {}, [1], ["x"], {"x": 1}, {"_type": "x", "_data": None}),
]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool"]
DTYPES = [*INTEGERS, "float16", "float32"]
few = hypothesis.settings(max_examples=10, deadline=None)


def values(checkpoint: Checkpoint, directory: str) -> dict[str, np.ndarray]:
    """What loads, in numbers that do not depend on the layout."""
    weights = checkpoints.load(checkpoint.write(Path(directory)), prepare=False)
    return {
        name: np.asarray(
            qjax.dequantize(w, jnp.float32) if isinstance(w, qjax.QTensor) else w
        )
        for name, w in weights.items()
    }


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        return values(DIALECTS[name]().checkpoint, directory)


def assert_refused_or_harmless(name: str, checkpoint: Checkpoint):
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            found, message = values(checkpoint, directory), directory
        except (ValueError, NotImplementedError) as error:
            found, message = {}, str(error)
        except jaxtyping.TypeCheckError:  # where annotations are checked at run time
            return
        assert directory in message
        assert "\n" not in message
    for key, wanted in expected(name).items():
        # A matrix of another shape is of another model, which shows.
        if key in found and found[key].shape == wanted.shape:
            np.testing.assert_array_equal(found[key], wanted, key)


def cut(array: np.ndarray, draw) -> np.ndarray:
    axis = draw(st.integers(0, array.ndim - 1), "axis")
    keep = draw(st.sampled_from([slice(1, None), slice(-1), slice(0), slice(0, 1)]))
    return np.take(array, range(array.shape[axis])[keep], axis)


def cast(array: np.ndarray, draw) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(draw(st.sampled_from(DTYPES), "dtype"))


def patterns(array: np.ndarray, draw) -> np.ndarray:
    # Nobody can tell one kind of 16-bit float from the other.
    names = DTYPES if array.dtype.kind in "iu" else INTEGERS
    names = [n for n in names if np.dtype(n).itemsize == array.itemsize]
    return array.view(draw(st.sampled_from(names), "dtype"))


def not_a_number(array: np.ndarray, draw) -> np.ndarray:
    values = array.reshape(-1).copy()
    place = draw(st.integers(0, values.size - 1), "place")
    values[place] = draw(st.sampled_from([np.nan, np.inf, -np.inf]), "value")
    return values.reshape(array.shape)


CHANGES = {
    "cut": cut,
    "twice": lambda a, draw: np.concatenate([a, a], draw(st.integers(0, a.ndim - 1))),
    "cast": cast,
    "patterns": patterns,
    "axis": lambda a, draw: a[None],
    "flat": lambda a, draw: a.reshape(-1),
    "transposed": lambda a, draw: np.ascontiguousarray(a.T),
    "not a number": not_a_number,
}


@pytest.mark.parametrize("name", DIALECTS)
@few
@hypothesis.given(data=st.data())
def test_wrong_tensors(name, data):
    checkpoint = DIALECTS[name]().checkpoint
    dense = (".bias", "norm.weight", ".k_scale")
    packed = sorted(key for key in checkpoint.tensors if not key.endswith(dense))
    key = data.draw(st.sampled_from(packed), "tensor")
    array, changes = checkpoint.tensors.pop(key), list(CHANGES)
    if array.ndim == 0:
        changes = ["cast", "patterns", "axis"]
    elif array.dtype.kind in "iu":
        changes.remove("not a number")
    if len(set(array.shape)) == 1 < array.ndim:
        changes.remove("transposed")
    if not checkpoint.files and "quantization_config" not in checkpoint.config:
        changes.remove("twice")  # Twice the words of four bits are those of eight.
    change = data.draw(st.sampled_from(["dropped", *changes]), "change")
    if change != "dropped":
        checkpoint.tensors[key] = CHANGES[change](array, data.draw)
    assert_refused_or_harmless(name, checkpoint)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [
        place
        for key, item in items
        for place in ((*path, key), *places(item, (*path, key)))
    ]


def replaced(value: object, path: tuple, new: object) -> object:
    value = copy.deepcopy(value)
    inner = functools.reduce(lambda v, key: v[key], path[:-1], value)
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize("name", DIALECTS)
@few
@hypothesis.given(data=st.data())
def test_wrong_fields(name, data):
    checkpoint = DIALECTS[name]().checkpoint
    new = data.draw(st.sampled_from(JUNK), "value")
    described = {"config.json": checkpoint.config, **checkpoint.files}
    described |= {
        key: json.loads(text)
        for key, text in (checkpoint.metadata or {}).items()
        if text[0] == "{"
    }
    file, path = data.draw(
        st.sampled_from([(f, p) for f in described for p in places(described[f])])
    )
    changed = replaced(described[file], path, new)
    if file == "config.json":
        checkpoint.config = changed
    elif file in checkpoint.files:
        checkpoint.files[file] = changed
    else:
        checkpoint.metadata[file] = json.dumps(changed)
    assert_refused_or_harmless(name, checkpoint)
