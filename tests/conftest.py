"""Strict JAX, eight CPU devices, and the GPU tests only where there is a GPU."""

import collections
import contextlib
import pathlib
import zlib

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests import goldens, oracle

# What made reference data needs packages that are no dependencies.
collect_ignore_glob = ["data/*/make.py", "golden/*/make_vectors.py", "reference/*.py"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run: what one change breaks must not show in another's.
# New ones are drawn with --hypothesis-profile=default.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")
# Before any device is asked for: what pmap and shard_map are tested on.
jax.config.update("jax_num_cpu_devices", 8)

# Where all weights are prepared, and this warning is an error with --as-on-gpu.
LAYERS = pathlib.Path(__file__).parent / "layers"
UNPREPARED = r"\S+\(\) is multiplied by XLA on this GPU"


def pytest_addoption(parser):
    parser.addoption(
        "--thin",
        type=int,
        default=1,
        metavar="N",
        help="run one in N cases of tests that have several, but all of those of "
        "pytest.mark.every_version",
    )
    parser.addoption(
        "--sparse",
        type=int,
        default=1,
        metavar="N",
        help="run one in N tests, but all of pytest.mark.every_version",
    )
    parser.addoption(
        "--as-on-gpu",
        action="store_true",
        help="give weights the layout that they have on an NVIDIA GPU, on the CPU; "
        "without the tests of pytest.mark.on_cpu",
    )


# After -k and -m have chosen.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    n, sparse = (config.getoption(name, default=1) for name in ("--thin", "--sparse"))
    if min(n, sparse) < 1:
        raise pytest.UsageError(f"--thin {n} --sparse {sparse}: both must be positive.")
    as_on_gpu = config.getoption("--as-on-gpu", default=False)
    kept = set()
    cases = collections.defaultdict(list)
    for item in items:
        if as_on_gpu and _is_of_the_cpu(item):
            continue
        if as_on_gpu and item.path.is_relative_to(LAYERS):
            item.add_marker(pytest.mark.filterwarnings(f"error:{UNPREPARED}"))
        test, _, case = item.nodeid.partition("[")
        if item.get_closest_marker("every_version"):
            kept.add(item)
        elif zlib.crc32(test.encode()) % sparse == 0:
            # By the case, so that tests of the same cases take the same, which some
            # compile once for all; and where another run takes one in M, not those.
            cases[test].append((zlib.crc32(f"{n} {case}".encode()), item))
    for drawn in cases.values():
        lot = [item for number, item in drawn if number % n == 0]
        kept.update(lot or [min(drawn, key=lambda pair: pair[0])[1]])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _is_of_the_cpu(item) -> bool:
    """Whether a test is about the layout of CPUs; a doctest that prints it is."""
    examples = item.dtest.examples if isinstance(item, pytest.DoctestItem) else []
    return bool(item.get_closest_marker("on_cpu")) or any(
        "Stream()" in example.want for example in examples
    )


def pytest_configure(config):
    config.pluginmanager.register(Everywhere(), "everywhere")
    if config.getoption("--as-on-gpu", default=False):
        # Most tests compute in float32, and many with weights as they were packed.
        for message in ("float32 x is multiplied by XLA", UNPREPARED):
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """With --as-on-gpu, takes the device for one that has kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if session.config.getoption("--as-on-gpu", default=False):
            import qjax  # noqa: PLC0415  (jaxtyping's pytest hook must come first)

            patch.setattr(qjax.ops, "_has_kernels", lambda words: True)
        return (yield)


def pytest_terminal_summary(terminalreporter):
    """Counts the golden files; with xdist, over the reports of all workers."""
    passed, skipped = (
        [report.nodeid for report in terminalreporter.stats.get(outcome, [])]
        for outcome in ("passed", "skipped")
    )
    for line in goldens.summary(passed, skipped):
        terminalreporter.write_line(line)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU")


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


class Everywhere:
    """Fixtures for the doctests in qjax/ too: a conftest's reach only its folder."""

    @pytest.fixture(autouse=True)
    def cpu_by_default(self, request):
        """Tests that are not for the GPU run on the CPU, also where there is one."""
        marked = request.node.get_closest_marker("gpu")
        if marked or jax.default_backend() == "cpu":
            yield
        else:
            with jax.default_device(jax.devices("cpu")[0]):
                yield

    @pytest.fixture(autouse=True)
    def names(self, doctest_namespace):
        import qjax  # noqa: PLC0415  (jaxtyping's pytest hook must come first)

        doctest_namespace.update(jax=jax, jnp=jnp, np=np, qjax=qjax)


@pytest.fixture(scope="session")
def refuses():
    """``with refuses(message)``: a ValueError, or another error that is named, with it.

    Where annotations are checked at run time (--jaxtyping-packages), a wrong dtype or
    rank does not get as far as the function's own check.
    """

    @contextlib.contextmanager
    def refuses(message: str, error: type[Exception] = ValueError):
        with pytest.raises((error, jaxtyping.TypeCheckError)) as caught:
            yield
        if not isinstance(caught.value, jaxtyping.TypeCheckError):
            assert message in str(caught.value)

    return refuses


@pytest.fixture(scope="session")
def as_qtensor():
    """Turns an `oracle.Matrix` into the `QTensor` that says the same."""
    import qjax  # noqa: PLC0415  (jaxtyping's pytest hook must come first)

    def as_qtensor(matrix: oracle.Matrix, layout=None) -> qjax.QTensor:
        leaves = {
            name: None if array is None else jnp.asarray(array)
            for name in ("zero", "order", "row_group", "codebook", "input_scale")
            for array in [getattr(matrix, name)]
        }
        w = qjax.tensor.build(
            [jnp.asarray(words) for words in matrix.words],
            jnp.asarray(matrix.scale),
            layout=qjax.formats.gptq.Stream(),
            segments=[
                qjax.tensor.Segment(part.bits, part.group_size) for part in matrix.parts
            ],
            affine=qjax.tensor.Affine[matrix.affine],
            grouping=qjax.tensor.Grouping[matrix.grouping],
            **leaves,
        )
        return w if layout is None else qjax.relayout(w, layout)

    return as_qtensor


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Takes the device for one that has kernels, as --as-on-gpu does for all tests."""
    import qjax  # noqa: PLC0415  (jaxtyping's pytest hook must come first)

    monkeypatch.setattr(qjax.ops, "_has_kernels", lambda words: True)


@pytest.fixture
def optax_promotion():
    """Optax mixes floats, integers and bools, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
