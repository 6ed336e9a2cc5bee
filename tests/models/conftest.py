"""Models that other packages wrote, quantized: `make test-models`.

Apart from all other tests, as they need google-tunix and qwix. A plain run of pytest
does not come here (norecursedirs in pyproject.toml).
"""

import importlib.util
import sys
import types

import jax
import pytest


def pytest_configure(config):
    # Warnings of the packages are not ours to heed; those that a weight is dense are.
    config.addinivalue_line("filterwarnings", "ignore")
    for message in (".*is made dense", ".*dense weights", ".*stay dense"):
        config.addinivalue_line("filterwarnings", f"error:{message}:UserWarning")


# The package's own __init__ imports trainers, and with them packages by the dozen; its
# models need none of them.
_package = types.ModuleType("tunix")
_package.__path__ = list(importlib.util.find_spec("tunix").submodule_search_locations)
sys.modules["tunix"] = _package


@pytest.fixture(autouse=True)
def promotion():
    """Code of others mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
