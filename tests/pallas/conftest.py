"""Options for the tests of the kernels: on a GPU, and every case there is."""

import jax
import pytest

from qjax.pallas import lang


def pytest_addoption(parser):
    parser.addoption(
        "--on-gpu",
        action="store_true",
        help="compile the kernels for the GPU instead of interpreting them",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="take all combinations of what kernels are tested on: hours on a CPU",
    )


def _on_gpu(config):
    # Not declared where all tests are collected and not this folder alone.
    return config.getoption("--on-gpu", default=False)


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: says what happens where there is no GPU")
    if _on_gpu(config):
        try:
            jax.devices("cuda")
        except RuntimeError:
            raise pytest.UsageError(
                "--on-gpu needs an NVIDIA GPU and jax[cuda]; JAX finds no CUDA device."
            ) from None


def pytest_collection_modifyitems(config, items):
    if not _on_gpu(config):
        return
    of_the_cpu = [item for item in items if item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=of_the_cpu)
    items[:] = [item for item in items if item not in of_the_cpu]
    for item in items:
        # What is not so marked computes on the CPU by default.
        item.add_marker("gpu")


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch):
    """Every launch is compiled, whatever the tests say of interpreting it."""
    if _on_gpu(request.config):
        launch = lang.launch

        def compiled_launch(*arguments, interpret, **options):
            return launch(*arguments, interpret=False, **options)

        monkeypatch.setattr(lang, "launch", compiled_launch)
