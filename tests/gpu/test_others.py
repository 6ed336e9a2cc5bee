"""The other kernels as XLA compiles them: the backward of matmul, the dense weight."""

import itertools
import math

import pytest

from tests.gpu import ptx
from tests.gpu.cases import K, N, Other

CASES = [
    *(Other("dequantize", bits, 1) for bits in (1, 2, 3, 4, 5, 6, 7, 8)),
    Other("dequantize", 4, 1, 32),
    Other("dequantize", 4, 1, 64, codebook=True),
    Other("matmul_t", 4, 16),
    Other("matmul_t", 4, 16, 64, codebook=True),
    Other("matmul_t", 4, 64),
    Other("matmul_t", 8, 16),
    Other("matmul_t", 3, 16),
    Other("matmul_t", 5, 16),
    Other("matmul_t", 7, 16),
    Other("scale_grad", 4, 8),
    Other("scale_grad", 4, 32),
    Other("scale_grad", 3, 16),
]
ELSEWHERE = [
    Other("dequantize", 4, 1),
    Other("matmul_t", 4, 16),
    Other("matmul_t", 4, 64),
    Other("scale_grad", 4, 8),
]
every = pytest.mark.parametrize(
    ("arch", "case"),
    [
        *itertools.product(("sm_80", "sm_90"), CASES),
        *itertools.product(("sm_89", "sm_100", "sm_120"), ELSEWHERE),
    ],
    ids=str,
)


@pytest.fixture
def kernel(case, arch, compiled):
    return compiled(case, arch).kernel


@every
def test_registers_suffice(kernel):
    assert kernel.spills == 0


@every
def test_instructions(case, arch, kernel, budgets):
    counted = kernel.instructions if case.kernel == "dequantize" else kernel.hot
    budgets.check(case, arch, len(counted) / case.weights, kernel.registers)


# The parameter with words, after the codebook.
WORDS = {"dequantize": 0, "matmul_t": 2, "scale_grad": 3}


@every
def test_words_are_read_once(case, arch, compiled):
    program = compiled(case, arch)
    launch, config = program.kernel_launch, case.config
    loads = ptx.loads(program.kernel.ptx)
    words = WORDS[case.kernel] + case.codebook
    rows = case.weights * 32 * config.warps / config.block_n
    passes = {"matmul_t": N / config.block_n, "scale_grad": K / rows}
    if case.kernel == "dequantize":
        thread = loads.before[words]
    else:
        # Those loaded ahead of the loop are not loaded past the end in return.
        thread = loads.loop[words] * passes[case.kernel] / config.splits
    loaded = thread * launch.threads * math.prod(launch.grid)
    floor = case.weight.words[0].size * 2
    assert 0.99 * floor <= loaded <= 1.03 * floor
