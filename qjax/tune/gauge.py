"""Times a configuration on the GPU, and compares what it computes."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.pallas import products
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import matvec
from qjax.pallas.operands import DTYPE, Config
from qjax.pallas.scale_grad import scale_grad
from qjax.tune import timing
from qjax.tune.jobs import ROWS_DTYPE, Job

_LEAST_CAPABILITY = (8, 0)
_REPEATS = 5
# Between configurations, relative to the largest element: sums in another order, and of
# operands rounded to float16.
_AGREEMENT = 2e-3

Kernel = Callable[..., Any]  # of x, dy, w and, by name, config


def _matmul(x: Array, dy: Array, w: Any, config: Config) -> Array:
    return matmul(x, w, config)


def _matvec(x: Array, dy: Array, w: Any, config: Config) -> Array:
    return matvec(x, w, config)


def _matmul_t(x: Array, dy: Array, w: Any, config: Config) -> Array:
    return matmul_t(dy, w, config)


def _dequantize(x: Array, dy: Array, w: Any, config: Config) -> Array:
    return dequantize(w, DTYPE, config)


def _dense(x: Array, dy: Array, w: Any) -> Array:
    return products.dense(x, w)


def _dense_t(x: Array, dy: Array, w: Any) -> Array:
    return products.dense_t(dy, w)


KERNELS: Mapping[str, Kernel] = {
    "matvec": _matvec,
    "matmul": _matmul,
    "matmul_t": _matmul_t,
    "scale_grad": scale_grad,
    "dequantize": _dequantize,
}
_DENSE: Mapping[str, Callable[..., Array]] = {"matmul": _dense, "matmul_t": _dense_t}


def gpu() -> str:
    """Returns the kind of the GPU to measure on.

    Raises:
      ValueError: If there is none that the kernels run on.
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        raise ValueError(
            "tuning times the kernels on an NVIDIA GPU, and JAX finds none: its "
            f"devices are {jax.devices()}. Without one, the heuristic is used."
        ) from None
    # Only CUDA devices have it: "9.0".
    capability = str(getattr(device, "compute_capability", "0.0"))
    if tuple(map(int, capability.split("."))) < _LEAST_CAPABILITY:
        raise ValueError(
            f"{device.device_kind} has compute capability {capability}; the kernels "
            "need 8.0 or later."
        )
    return device.device_kind


def _compared_and_timed(op: Callable[..., Any], rounds: int) -> Callable[..., Any]:
    """`timing.chained`, and before it a call whose result is returned.

    One program for both: compiling takes most of the time that tuning takes.
    """
    op = jax.jit(op)  # Traced and lowered once, not for every copy of the weight.
    chain = timing.chained(op, rounds)

    @jax.jit
    def run(operands: Sequence[Array], weights: Sequence[Any]) -> tuple[Any, Array]:
        return op(*operands, weights[0]), chain(operands, weights)

    return run


class WrongResultError(ValueError):
    """A configuration computes something else than the heuristic's."""


class Gauge:
    """Times configurations on the default device: a `search.Measure`.

    With what models call the products with: activations of `jobs.ROWS_DTYPE`, and
    cotangents in float32, since `qjax.matmul` rounds its result after the product.
    """

    def __init__(
        self, kernels: Mapping[str, Kernel] = KERNELS, nbytes: int = timing.CACHE
    ) -> None:
        """Begins without a job.

        Args:
          kernels: By operation.
          nbytes: What copies of a weight have together.
        """
        self._kernels, self._nbytes = kernels, nbytes
        self._job: Job | None = None

    def __call__(self, job: Job, config: Config | None) -> float:
        """Returns the seconds of a call, a median.

        Raises:
          jax.errors.JaxRuntimeError: If the configuration does not compile.
          WrongResultError: If its result is not that of the first one of the job.
        """
        if job is not self._job:
            self._prepare(job)
        if config is None:
            op = _DENSE[job.op]
        else:
            op = functools.partial(self._kernels[job.op], config=config)
        calls, w = len(self._copies), job.w
        operations = 2 * job.m * w.k * w.n
        rounds = timing.rounds(timing.nbytes_of(w), operations, calls)
        program = _compared_and_timed(op, rounds)
        run = functools.partial(program, self._rows, self._copies)
        self._compare(job, config, run()[0])
        return statistics.median(timing.timed(run, _REPEATS)) / (rounds * calls + 1)

    def _prepare(self, job: Job) -> None:
        # Those of the job before leave memory first.
        self._copies, self._expected = [], None
        self._copies = timing.copies(job.w, self._nbytes)
        x, dy = (
            jax.random.normal(key, (job.m, extent), ROWS_DTYPE)
            for key, extent in zip(
                jax.random.split(jax.random.key(1)), (job.w.k, job.w.n), strict=True
            )
        )
        self._rows = [x, dy.astype(jnp.float32)]
        self._job = job

    def _compare(self, job: Job, config: Config | None, found: Any) -> None:
        found = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(found)]
        if self._expected is None:
            self._expected = found
        for leaf, expected in zip(found, self._expected, strict=True):
            largest = float(jnp.abs(expected).max())
            error = float(jnp.abs(leaf - expected).max())
            # Not >: NaN is no agreement either.
            if not (math.isfinite(largest) and error <= _AGREEMENT * largest):
                raise WrongResultError(
                    f"{job}: {config or 'the dense product'} does not give what the "
                    "heuristic's configuration gives; a fault of qjax or the compiler."
                )
