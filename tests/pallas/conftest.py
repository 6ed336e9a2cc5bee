"""Options for the tests of the kernels: on a GPU, emulated, every case there is."""

import os
import sys

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
        "--emulate",
        choices=["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"],
        help="compile the kernels for that GPU, and emulate it on the CPU",
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
        # Tests ask for what users are warned of.
        config.addinivalue_line("filterwarnings", "ignore:.* on this GPU:UserWarning")
        # The workers of xdist share the memory of the GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            jax.devices("cuda")
        except RuntimeError:
            raise pytest.UsageError(
                "--on-gpu needs an NVIDIA GPU and jax[cuda]; JAX finds no CUDA device."
            ) from None


def pytest_collection_modifyitems(config, items):
    if not _on_gpu(config) and not config.getoption("--emulate", default=None):
        return
    of_the_cpu = [item for item in items if item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=of_the_cpu)
    items[:] = [item for item in items if item not in of_the_cpu]
    for item in items if _on_gpu(config) else ():
        # What is not so marked computes on the CPU by default.
        item.add_marker("gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends a worker of xdist whose GPU context is lost: another takes its place.

    A kernel that reads where nothing is would have all tests after it fail.
    """
    report = yield
    lost = call.excinfo is not None and "CUDA_ERROR" in str(call.excinfo.value)
    if lost and "PYTEST_XDIST_WORKER" in os.environ:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(item.nodeid, report.longreprtext, file=sys.stderr, sep="\n")  # noqa: T201
            sys.stderr.flush()
        os._exit(1)
    return report


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch):
    """Every launch is compiled, whatever the tests say of interpreting it."""
    if _on_gpu(request.config):
        launch = lang.launch

        def compiled_launch(*arguments, interpret, **options):
            return launch(*arguments, interpret=False, **options)

        monkeypatch.setattr(lang, "launch", compiled_launch)


@pytest.fixture(autouse=True)
def hardly_optimized(request):
    """An interpreted kernel runs once: most of its time is that of XLA's passes."""
    if _on_gpu(request.config):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def emulated(request):
    """Every launch is run as a GPU would."""
    arch = request.config.getoption("--emulate", default=None)
    if arch is None:
        yield
        return
    # Needs the CUDA plugin of JAX.
    from tests.gpu.emulator import launches  # noqa: PLC0415

    with launches.emulated(arch):
        yield
