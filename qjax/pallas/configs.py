"""How launches are cut up: a heuristic that knows no measurements."""

from qjax.pallas.operands import Config
from qjax.tensor import QTensor

# Programs that keep a large GPU busy: four on each of 132 multiprocessors.
_PROGRAMS = 528
# Iterations of a program below which its pipeline of loads does not pay.
_ITERATIONS = 4
_BLOCK_N = 128


def for_matmul(m: int, w: QTensor) -> Config:
    """Configures ``x @ W``: the fewest rows that hold m, up to 64, where registers end.

    Iterations of 256 rows need fewer instructions a weight, and have the registers for
    it as long as m is small and steps are few.
    """
    block_m = _power_of_two(m, 8, 64)
    few_steps = all((s.group_size or w.k) >= 128 for s in w.segments)
    block_k = 256 if block_m <= 16 and few_steps else 128
    programs = _ceil(m, block_m) * _ceil(w.n, _BLOCK_N)
    splits = _splits(programs, w.k // block_k)
    return Config(block_m, _BLOCK_N, block_k, splits)


def for_matmul_t(m: int, w: QTensor) -> Config:
    """Configures ``dy @ W.T``: its programs own rows of the weight and walk along n."""
    block_m = _power_of_two(m, 16, 64)
    block_n = 128 if block_m == 16 else 64
    programs = _ceil(m, block_m) * _ceil(w.k, 128)
    splits = _splits(programs, w.n // block_n)
    return Config(block_m, block_n, 128, splits)


def for_scale_grad(m: int, w: QTensor) -> Config:
    """Configures the gradients of scales: programs write every step that they visit."""
    block_m = _power_of_two(m, 8, 32)
    programs = _ceil(m, block_m) * _ceil(w.n, _BLOCK_N)
    return Config(block_m, _BLOCK_N, 128, _splits(programs, w.k // 128))


def for_dequantize() -> Config:
    """Configures `dequantize`: one iteration a program, nothing to pipeline."""
    return Config(block_m=8, stages=1)


def _splits(programs: int, iterations: int) -> int:
    return max(1, min(_ceil(_PROGRAMS, programs), iterations // _ITERATIONS))


def _power_of_two(m: int, least: int, most: int) -> int:
    """The smallest power of two, from ``least`` to ``most``, that holds m."""
    return min(most, max(least, 1 << (m - 1).bit_length()))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
