"""The compiled kernels, run by an emulator of PTX, against their interpretation.

Every access to memory is checked on the way: `tests.gpu.emulator.memory`, and those of
shared memory and of tensor memory beside it.
"""

import re

import numpy as np
import pytest

from qjax.formats.awq import Gemm
from qjax.formats.bnb import Flat
from qjax.formats.compressed_tensors import Dense
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from qjax.formats.tinygemm import TensorCoreTiled
from qjax.pallas import gpu
from qjax.pallas.operands import Config
from tests.gpu import compiler, running
from tests.gpu.emulator import parser
from tests.gpu.running import (
    SUMS,
    Dequantize,
    Matmul,
    MatmulT,
    Matvec,
    Relayout,
    ScaleGrad,
    Stack,
    Weight,
)
from tests.oracle import relative_error

EXL2 = Weight(
    convention="centered", k=416, n=40, parts=((5, 96, 32), (4, 256, 128), (3, 64, 64))
)
CASES = [
    # Every width, and a warp, two, four or eight.
    Matmul(Weight(1, 256, "zero"), 16),
    Matmul(Weight(2, 32, "float_zero", "float32"), 5),
    Matmul(Weight(3, 64, "centered"), 33),
    Matmul(Weight(4, 128, "zero", k=2048), 1, Config(8, 128, 256, splits=4)),
    Matmul(Weight(4, 128, "zero", k=1024, n=256), 8, Config(8, 64, 128, 2, warps=1)),
    Matmul(Weight(4, 64, "offset", "bfloat16", k=1024), 64),
    Matmul(Weight(5, None, "offset", k=1024), 16, Config(16, 128, 128, warps=2)),
    Matmul(Weight(6, 256, "centered_zero", "float32"), 8),
    Matmul(Weight(7, 128, "zero", k=640), 33),
    Matmul(Weight(8, 32, "zero", n=256), 16, Config(16, 256, 128, warps=8)),
    # No block divides them; rows beyond a block of 64.
    Matmul(Weight(4, 128, "zero", k=360, n=136), 130),
    Matmul(Weight(8, 64, "centered", k=96, n=16), 33),
    # Weights scaled in registers, in one iteration and in several, for 128 rows too.
    Matmul(Weight(1, 128, "centered", k=1024, n=136), 100),
    Matmul(Weight(2, 64, "float_zero", "bfloat16"), 100),
    Matmul(Weight(3, 32, "zero", "float32"), 100, Config(64, 64, 256, 2, stages=2)),
    Matmul(Weight(4, 128, "zero", k=1024, n=136), 200, Config(128, 128, 64, 3, 8)),
    Matmul(Weight(4, 128, "centered_zero", "bfloat16"), 64, Config(64, 64, 64, 2, 4)),
    Matmul(Weight(5, 64, "offset", "float32"), 100),
    Matmul(Weight(6, None, "centered", k=360), 100),
    Matmul(Weight(8, 32, "zero", "bfloat16"), 100),
    Matmul(Weight(4, 64, "codebook", "float32"), 100),
    Matmul(EXL2, 100, Config(128, 128, 64, 2, 8, 2)),
    Matmul(Weight(4, 64, "codebook", "float32"), 5),
    Matmul(Weight(4, 32, "codebook", "bfloat16", k=360, n=136), 33),
    Matmul(Weight(8, 128, "float", "float32", k=360, n=136), 5),
    Matmul(Weight(4, 16, "float", "float32"), 33),
    Matmul(Weight(4, 16, "float", "over global"), 33),
    Matmul(Weight(6, 16, "centered", "float32"), 100),
    Matmul(Weight(4, 32, "offset", "nested", k=768, n=160), 33),
    Matmul(Weight(6, 16, "centered", "nested", k=768), 100),
    Matmul(EXL2, 33),
    Matmul(Weight(4, 64, "zero"), 5, dtype="bfloat16"),
    Matmul(Weight(7, 128, "offset"), 33, dtype="bfloat16"),
    Stack(Weight(4, 64, "offset", k=384, n=80), 2, m=5),
    Stack(Weight(4, 64, "zero", k=384, n=96), (2, 0, -1, 1)),
    Stack(Weight(3, 128, "centered", k=384, n=80), (1, -1, 2), m=33),
    Stack(Weight(4, 64, "zero", "bfloat16", k=384, n=80), (1, -1, 2), m=100),
    # Eight slices of k, four, two; whole and uneven; with splits beside them.
    Matvec(Weight(4, 128, "zero", k=2048)),
    Matvec(Weight(4, 128, "zero", k=2048), dtype="float16"),
    Matvec(Weight(1, 256, "centered", k=360, n=136)),
    Matvec(Weight(2, 64, "float_zero", "float32", k=1152, n=40), 2),
    Matvec(Weight(3, 32, "offset", k=896), 2, Config(8, slices=4, warps=2, splits=2)),
    Matvec(Weight(4, 32, "centered_zero", "bfloat16", k=1152, n=136), 3),
    Matvec(Weight(5, None, "zero", k=1000, n=40), 5),
    Matvec(Weight(6, 96, "offset", k=1152, n=136), 7, dtype="float16"),
    Matvec(Weight(7, 128, "zero", k=640)),
    Matvec(Weight(8, 64, "zero", k=640, n=136), 4, dtype="float16"),
    Matvec(Weight(8, 128, "zero", k=640, n=136), 2),
    Matvec(Weight(4, 32, "codebook", "float32", k=1152, n=136), 2),
    Matvec(Weight(4, 64, "codebook", "bfloat16", k=640), 8, dtype="float16"),
    Matvec(Weight(8, 128, "float", "float32", k=640, n=136), 2),
    Matvec(Weight(4, 16, "float", "float32", k=640)),
    Matvec(Weight(4, 16, "float", "global", k=640), index=1),
    Matvec(Weight(4, 32, "offset", "nested", k=896, n=160), 2),
    Matvec(Weight(6, 16, "centered", "nested", k=768), index=1),
    Matvec(Weight(3, 16, "centered", "nested", k=768)),
    Matvec(EXL2, 2, index=1),
    Matvec(Weight(4, 64, "offset", k=384, n=80), index=2),
    MatmulT(Weight(4, 128, "zero", n=512)),
    MatmulT(Weight(4, 128, "offset", n=512), 64),
    MatmulT(Weight(3, 64, "centered", k=360, n=136), 5),
    MatmulT(Weight(7, 32, "float_zero"), 33),
    MatmulT(Weight(8, 128, "centered_zero"), 16, Config(16, 32, 128, 2, warps=2)),
    MatmulT(Weight(4, 64, "codebook", "float32"), 16),
    MatmulT(Weight(8, 128, "float", "float32"), 16),
    MatmulT(Weight(4, 32, "offset", "nested"), 16),
    MatmulT(Weight(1, None, "zero"), 64),
    ScaleGrad(Weight(4, 128, "zero", k=1024), 8),
    ScaleGrad(Weight(4, 32, "offset"), 32),
    ScaleGrad(Weight(3, 64, "centered_zero", k=360, n=136), 16),
    ScaleGrad(Weight(8, None, "float_zero"), 5),
    ScaleGrad(Weight(4, 16, "float"), 5),
    Dequantize(Weight(1, 256, "zero"), "bfloat16"),
    Dequantize(Weight(2, 128, "centered"), "float16"),
    Dequantize(Weight(3, 64, "float_zero", k=360, n=136), "float32"),
    Dequantize(Weight(4, 32, "offset"), "float16"),
    Dequantize(Weight(5, None, "zero"), "float32"),
    Dequantize(Weight(6, 96, "centered_zero", "bfloat16"), "bfloat16"),
    Dequantize(Weight(7, 128, "zero", "float32"), "float32"),
    Dequantize(Weight(8, 128, "zero"), "bfloat16"),
    Dequantize(Weight(4, 64, "codebook", "float32", k=360, n=136), "float32"),
    Dequantize(Weight(4, 16, "float", "float32"), "bfloat16"),
    Dequantize(Weight(6, 16, "centered", "nested", k=360, n=160), "float32"),
    Dequantize(Weight(8, 128, "float", "float32"), "bfloat16"),
    Relayout(Stream(), Gemm()),
    Relayout(Gemm(), TensorCoreTiled()),
    Relayout(TensorCoreTiled(), Tiles()),
    Relayout(Tiles(), Stream()),
    Relayout(Stream(), TensorCoreTiled(2), k=224, n=72),
    Relayout(Tiles(), Gemm(), k=384, n=48),
    Relayout(Stream(), Tiles(), 1),
    Relayout(Tiles(), Dense(), 2),
    Relayout(Stream(), Tiles(), 8, k=36, n=20),
    Relayout(Flat(256), Tiles(nibbles=True)),
]
# With four warps, what has sixteen rows or more is multiplied in the tensor memory of a
# B200: by blocks of 16, 32, 64 and 128 rows, 64 columns and 128.
IN_TENSOR_MEMORY = [
    Matmul(Weight(1, 256, "zero"), 16),
    Matmul(Weight(8, 32, "zero", n=256), 16, Config(16, 256, 128, warps=8)),
    Matmul(Weight(7, 128, "offset"), 33, dtype="bfloat16"),
    Matmul(Weight(3, 64, "centered"), 33),
    Matmul(Weight(8, 64, "centered", k=96, n=16), 33),
    Matmul(Weight(4, 128, "zero", k=360, n=136), 130),
    Matmul(Weight(2, 64, "float_zero", "bfloat16"), 100),
    Matmul(Weight(4, 128, "centered_zero", "bfloat16"), 64, Config(64, 64, 64, 2, 4)),
    Matmul(Weight(3, 32, "zero", "float32"), 40, Config(64, 64, 256, 2, stages=2)),
    Matmul(Weight(5, 64, "offset", "float32"), 100),
    Matmul(Weight(4, 64, "codebook", "float32"), 100),
    Matmul(Weight(4, 16, "float", "over global"), 33),
    Matmul(EXL2, 33),
    Stack(Weight(4, 64, "zero", "bfloat16", k=384, n=80), (1, -1, 2), m=100),
    Matvec(EXL2, 2, Config(16, warps=4, stages=2, slices=8), index=1),
    MatmulT(Weight(4, 128, "offset", n=256), 64, Config(64, 64, 128, stages=1)),
    MatmulT(Weight(1, None, "zero"), 64, Config(64, 64, 128, stages=1)),
    ScaleGrad(Weight(4, 32, "offset"), 32),
    ScaleGrad(Weight(3, 64, "centered_zero", k=360, n=136), 16),
]
# The rest is as for older GPUs, but for a few instructions.
WITHOUT_IT = [
    Matmul(Weight(6, 256, "centered_zero", "float32"), 8),
    Matvec(Weight(8, 64, "zero", k=640, n=136), 4, dtype="float16"),
    MatmulT(Weight(3, 64, "centered", k=360, n=136), 5),
    Dequantize(Weight(4, 32, "offset"), "float16"),
    Relayout(Gemm(), TensorCoreTiled()),
]
# Two with more than sixteen rows for what else has no wgmma.
RUNS = [
    *((arch, run) for arch in ("sm_80", "sm_90") for run in CASES),
    *(("sm_100", run) for run in [*IN_TENSOR_MEMORY, *WITHOUT_IT]),
    *(("sm_120", run) for run in [*IN_TENSOR_MEMORY[4:6], *WITHOUT_IT]),
    ("sm_89", IN_TENSOR_MEMORY[4]),
]
each = pytest.mark.parametrize(("arch", "run"), RUNS, ids=str)


@pytest.fixture
def outcome(run, arch, emulated):
    return emulated(run, arch)


def exact(name, dtype):
    """Whether nothing is summed on the way to an output of this kernel."""
    return name.startswith(("dequantize", "relayout")) or dtype.itemsize == 2


@each
def test_launches_are_their_interpretation(outcome):
    for launched in outcome.launches:
        pairs = zip(launched.emulated, launched.interpreted, strict=True)
        for found, expected in pairs:
            if exact(launched.name, expected.dtype):
                np.testing.assert_array_equal(found, expected)
            else:
                assert relative_error(found, expected) < SUMS


@each
def test_results_are_those_of_the_oracle(run, outcome):
    for found, expected in zip(outcome.found, outcome.expected, strict=True):
        assert relative_error(found, expected) < run.tolerance


@pytest.mark.parametrize("run", IN_TENSOR_MEMORY, ids=str)
@pytest.mark.parametrize("arch", ["sm_100"])
def test_products_are_in_tensor_memory(outcome):
    opcodes = frozenset.union(*(launched.opcodes for launched in outcome.launches))
    assert any(opcode.startswith("tcgen05.mma") for opcode in opcodes)


@pytest.fixture(scope="module")
def programs():
    """What was compiled before, by the GPU and the shapes."""
    return {}


@pytest.fixture
def compiled_once(programs, monkeypatch):
    compile_for = compiler.compile_for

    def once(launch, *avals, arch):
        key = arch, str(avals)
        if key not in programs:
            programs[key] = compile_for(launch, *avals, arch=arch)
        return programs[key]

    monkeypatch.setattr(compiler, "compile_for", once)


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize(
    ("arch", "missing", "message"),
    [
        ("sm_90", "bar.sync", "without a barrier"),
        ("sm_90", "cp.async.wait_group", "a copy is still on its way"),
        ("sm_90", "fence.proxy.async", "without a proxy fence"),
        ("sm_100", "cp.async.wait_group", "a copy is still on its way"),
        ("sm_100", "fence.proxy.async", "without a proxy fence"),
        ("sm_100", "tcgen05.wait::st", "a store is still on its way"),
        ("sm_100", "mbarrier.try_wait", "that nobody has waited for"),
        ("sm_100", "tcgen05.commit", "nothing will arrive at"),
        ("sm_100", "tcgen05.dealloc", "not freed"),
    ],
)
def test_what_orders_the_threads_is_needed(arch, missing, message, monkeypatch):
    parse = parser.parse

    def without(ptx):
        # A wait in a loop has to end it.
        instead = "mov.pred complete, -1;" if missing == "mbarrier.try_wait" else ""
        statement = rf"(@%p\d+ )?{re.escape(missing)}\b[^;]*;"
        return parse(re.sub(statement, instead, ptx))

    monkeypatch.setattr(parser, "parse", without)
    case = Matmul(Weight(4, 128, "zero", k=1024), 16, Config(16, splits=2))
    with pytest.raises(parser.EmulationError, match=message):
        running.run(case, arch)


def test_products_that_share_rows_race_but_for_what_matmul_t_does(monkeypatch):
    # Products of a loop that take the same rows of dy from tensor memory: the next rows
    # are put there when the first product is complete, whatever the others do. XLA's
    # Triton makes a buffer of the rows outside of the loop for the first, and takes it
    # for one that no iteration overwrites at the others (`isOperandPipelineableBase`).
    # With a single stage each is waited for. Once this finds no race, matmul_t may have
    # its stages on a B200.
    case = MatmulT(Weight(4, 128, "offset", n=256), 64, Config(64, 64, 128))
    with pytest.raises(parser.EmulationError, match="that a product under way reads"):
        running.run(case, "sm_100")
    monkeypatch.setattr(gpu, "at_hand", lambda: gpu.H100._replace(major=10))
    (launched,) = running.run(case, "sm_100").launches
    assert relative_error(*launched.emulated, *launched.interpreted) < SUMS


@each
def test_no_access_is_wasteful(run, arch, outcome):
    for launched in outcome.launches:
        for parameter, sectors in launched.traffic.device.items():
            # Bounds of segments are read one by one.
            if "5_4_3bit" in launched.name:
                continue
            if launched.name.startswith("rows") and "g16" in str(run):
                # Steps of 16 rows of x: little, and read once for all columns.
                assert sectors.taken <= 2 * sectors.least
                continue
            # In a stack, the numbers of the matrices come first.
            zeros = 4 if isinstance(run, Stack) else 3
            bytewise = parameter == zeros or (parameter > 1 and "nested" in str(run))
            if bytewise and (launched.name.startswith("matvec") or arch == "sm_100"):
                # Zeros, and the integers of two levels, of 16 columns are half a
                # sector; another program has the rest, or another warp.
                assert sectors.taken <= 2 * sectors.least
                continue
            assert sectors.taken == sectors.least, (launched.name, parameter)
        for opcode, passes in launched.traffic.shared.items():
            # A thread has a row of the weight to put into tensor memory, whose words,
            # with those of the rows beside it, lie in four of the banks.
            if arch == "sm_100" and opcode == "ld.shared.b32":
                assert passes.taken <= 8 * passes.least, (launched.name, opcode)
                continue
            # A transpose needs the codes of neighbouring columns, which do not lie side
            # by side.
            if launched.name.startswith("matmul_t") and opcode == "ld.shared.b16":
                continue
            assert passes.taken == passes.least, (launched.name, opcode)
