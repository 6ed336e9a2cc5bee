"""Every golden file is exercised, and says who made it."""

import importlib
import inspect
import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests import goldens

MODULES = sorted(
    f"tests.{folder}.{path.stem}"
    for folder in ("formats", "training")
    for path in (goldens.FOLDER.parent / folder).glob("test_*.py")
)


def marks() -> Iterator[tuple[object, pytest.Mark]]:
    """The marks of the tests that read golden files, with their functions."""
    for module in map(importlib.import_module, MODULES):
        places = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
        for place in places:
            for _, test in inspect.getmembers(place, inspect.isfunction):
                for mark in getattr(test, "pytestmark", []):
                    yield test, mark


def strings(value: object) -> Iterator[str]:
    """All strings in the values of a parametrization."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | set | dict):
        for one in value:
            yield from strings(one)


def values(mark: pytest.Mark) -> Iterator[str]:
    given = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
    for one in given:
        # A pytest.param that is marked may be skipped or expected to fail.
        if not getattr(one, "marks", ()):
            yield from strings(getattr(one, "values", one))


def test_every_file_is_a_parameter_of_a_test():
    found = {
        name
        for test, mark in marks()
        if mark.name == "parametrize"
        and not {"skip", "skipif", "xfail"} & {m.name for m in test.pytestmark}
        for name in values(mark)
    }
    missing = goldens.FILES.keys() - found - goldens.ALONE.keys()
    assert not missing, f"no test has these as a parameter: {sorted(missing)}"
    assert len(goldens.FILES) >= 245


@pytest.mark.parametrize("name", goldens.ALONE)
def test_a_file_of_its_own_has_a_test_of_its_own(name):
    file, test = goldens.ALONE[name].split("::")
    module = importlib.import_module(f"tests.formats.{file.removesuffix('.py')}")
    source = inspect.getsource(getattr(module, test))
    # By its name, or by the constant that holds it.
    constants = [key for key, value in vars(module).items() if value == name]
    assert any(f"load({key})" in source for key in [f'"{name}"', *constants])


@pytest.mark.parametrize("folder", sorted(p.name for p in goldens.FOLDER.iterdir()))
def test_origin(folder):
    """Plain arrays with the source of each file, and a page on all of a folder."""
    assert (goldens.FOLDER / folder / "README.md").read_text().startswith("# Golden")
    files = sorted((goldens.FOLDER / folder).glob("*.npz"))
    assert files
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            assert all(arrays[name].dtype != object for name in arrays.files)
        assert meta["source"], file


class TestCounting:
    def test_ids(self):
        awq, exl2 = "autoawq_gemm__g32__32x64__s202", "exl2_b65_g64"
        nodes = [
            f"tests/formats/test_awq.py::test_reads[{awq}]",
            f"tests/formats/test_exl2.py::TestX::test_y[4-{exl2}-True]",
            "tests/formats/test_mbwq.py::test_reads[mbwq_exl2_b84_g32]",
            "tests/formats/test_bnb.py::test_tables",
            "tests/formats/test_awq.py::test_nothing[8]",
            "tests/test_golden.py::test_of_all_files[exl2_b84_g32]",
        ]
        expected = {awq, exl2, "mbwq_exl2_b84_g32", "bnb_code_tables"}
        assert goldens.exercised(nodes) == expected

    def test_lines(self):
        one = "tests/formats/test_exl2.py::test_a[exl2_b65_g64]"
        two = "tests/formats/test_exl2.py::test_b[exl2_b84_g32]"
        count = f"golden files exercised: 1 of {len(goldens.FILES)}"
        assert goldens.summary([one], [one]) == [count]
        skipped = "golden file skipped: exl2_b84_g32"
        assert goldens.summary([one], [one, two]) == [count, skipped]
        assert goldens.summary(["tests/test_bits.py::test_a"], []) == []

    def test_names_have_nothing_that_ids_are_cut_at(self):
        assert not [name for name in goldens.FILES if set(name) & set("-[]")]
        assert len(goldens.FILES) == len(list(goldens.FOLDER.rglob("*.npz")))
