"""The public names: documented, and importable on any machine."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qjax

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in qjax.__all__ if inspect.isfunction(getattr(qjax, name))]


def test_all_is_all():
    assert list(qjax.__all__) == sorted(set(qjax.__all__))
    visible = {
        name
        for name, value in vars(qjax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert visible <= set(qjax.__all__)
    assert {"QTensor", "dequantize", "matmul", "quantize"} <= visible


@pytest.mark.parametrize("name", qjax.__all__)
def test_every_name_is_documented(name):
    summary = inspect.getdoc(getattr(qjax, name)).splitlines()[0]
    assert summary[0].isupper() or summary.startswith("`")
    assert summary.endswith((".", "``"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_gives_and_refuses(name):
    function = getattr(qjax, name)
    doc = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Example:\n  >>> "):
        assert section in doc, section
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for parameter in inspect.signature(function).parameters.values():
        name = stars.get(parameter.kind, "") + parameter.name
        assert f"\n  {name}: " in doc, name
    # These take any tree.
    if function.__name__ not in ("memory_report", "prepare"):
        assert "\nRaises:\n  " in doc


def test_matmul_says_which_names_decline():
    assert "NotImplementedError: If the named implementation" in qjax.matmul.__doc__


def test_imports_without_warnings_devices_or_torch():
    # Any use of a device would fail: there is no such platform.
    result = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c"),
            "import qjax, sys; print({'torch', 'transformers'} & {*sys.modules})",
        ],
        env=os.environ | {"JAX_PLATFORMS": "none_of_them", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("set()\n", "", 0)
