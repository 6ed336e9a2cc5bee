"""What `qjax tune` and the benchmarks time: the calls, and next to nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from qjax.pallas import configs
from qjax.pallas.matmul import matmul
from qjax.tune import timing
from tests.gpu import compiler
from tests.gpu.cases import weight

CALLS = 3
SIDE = 4096


def ours():
    w = weight(4, 128, k=SIDE, n=SIDE)
    op = functools.partial(matmul, config=configs.heuristic("matmul", 8, w))
    return op, jax.ShapeDtypeStruct((8, SIDE), jnp.bfloat16), w


def dense():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return jnp.dot, struct((8, SIDE)), struct((SIDE, SIDE))


@pytest.mark.parametrize(
    ("case", "kernel"), [(ours, "matmul_4bit"), (dense, "gemm|cublas|dot")]
)
def test_a_timed_program(case, kernel):
    op, x, w = case()
    run = timing.chained(op, rounds=10)
    one = compiler.compile_for(op, x, w, arch="sm_90")
    program = compiler.compile_for(run, [x], [w] * CALLS, arch="sm_90")
    # The loop is unrolled into as many calls as there are copies, and counted.
    assert '"known_trip_count":{"n":"10"}' in program.hlo
    names = [launch.name for launch in program.launches if launch.captured]
    assert sum(bool(re.search(kernel, name)) for name in names) == CALLS
    # Beside the calls: the token, and the loop's counter.
    launched = [launch for launch in program.launches if launch.kind != "kWhile"]
    assert len(launched) <= CALLS * len(one.launches) + 3
    # No weight is copied on the way.
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", program.hlo)
    assert not any(copied)
