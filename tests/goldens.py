"""Golden files: which there are, what they hold, and which of them a test exercises."""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(__file__).parent / "golden"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*/*.npz"))}
# Files of a kind of their own, read in the body of a test of tests/formats.
ALONE = {
    "bnb_code_tables": "test_bnb.py::test_tables",
    "bnb_blockwise8__b256__s740": "test_bnb.py::test_eight_bits",
    "tinygemm_tc_npad__i4__12x64__s450": (
        "test_tinygemm.py::test_missing_rows_are_packed_as_zeros"
    ),
}


def names(folder: str) -> list[str]:
    """The files of one upstream, without their suffix."""
    return [name for name, path in FILES.items() if path.parent.name == folder]


@functools.cache
def load(name: str) -> dict[str, Any]:
    """The arrays of a file, what it says of them in "meta", and of that "config"."""
    data = arrays(FILES[name])
    meta = json.loads(str(data["meta"]))
    # NumPy's files have none of these, only their bits.
    for key, dtype in meta.get("dtypes", {}).items():
        if dtype in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu"):
            data[key] = data[key].view(dtype)
    return data | {"meta": meta, "config": meta.get("config")}


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that is closed: one left open may warn in another test."""
    with np.load(path) as file:
        return dict(file)


def patterns(array: Any) -> np.ndarray:
    """Bit patterns: -0.0 is not 0.0, and a NaN is itself."""
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def same_bits(found: Any, wanted: Any) -> None:
    """Two arrays, or trees of them, have the same names, dtypes, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, one), other in pairs:
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, f"{name}: {one.dtype}, not {other.dtype}"
        np.testing.assert_array_equal(patterns(one), patterns(other), name, strict=True)


def exercised(nodes: Iterable[str]) -> set[str]:
    """The golden files that the tests of these ids have as a parameter, or alone."""
    found = set()
    for node in nodes:
        if not node.startswith("tests/test_golden.py"):
            found |= FILES.keys() & set(re.split(r"[-\[\]]", node))
        found |= {name for name, test in ALONE.items() if node.endswith(test)}
    return found


def summary(passed: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """Lines for the end of a run; none if it had no test of golden files."""
    done = exercised(passed)
    left_out = exercised(skipped) - done
    if not done | left_out:
        return []
    lines = [f"golden files exercised: {len(done)} of {len(FILES)}"]
    return lines + [f"golden file skipped: {name}" for name in sorted(left_out)]
