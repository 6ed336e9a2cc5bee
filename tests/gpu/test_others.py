"""The other kernels as XLA compiles them: the backward of matmul, the dense weight."""

import pytest

from tests.gpu.cases import Other

both = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
CASES = [
    *(Other("dequantize", bits, 1) for bits in (1, 2, 3, 4, 5, 6, 7, 8)),
    Other("dequantize", 4, 1, 32),
    Other("dequantize", 4, 1, 64, codebook=True),
    Other("matmul_t", 4, 16),
    Other("matmul_t", 4, 16, 64, codebook=True),
    Other("matmul_t", 4, 64),
    Other("matmul_t", 8, 16),
    Other("matmul_t", 3, 16),
    Other("scale_grad", 4, 8),
    Other("scale_grad", 4, 32),
    Other("scale_grad", 3, 16),
]
# A block of 3 bits has sixteen sub-blocks, each with an accumulator of its own.
SPILLS = {Other("matmul_t", 3, 16): 204}
every = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def kernel(case, arch, compiled):
    return compiled(case, arch).kernel


@every
@both
def test_registers_suffice(case, kernel):
    assert kernel.spills <= SPILLS.get(case, 0)


@every
@both
def test_instructions(case, arch, kernel, budgets):
    counted = kernel.instructions if case.kernel == "dequantize" else kernel.hot
    budgets.check(case, arch, len(counted) / case.weights, kernel.registers)
