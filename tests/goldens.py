"""Which golden files there are, and which of them a test exercises."""

import re
from collections.abc import Iterable
from pathlib import Path

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
