"""What surrounds the kernels in whole programs: memory, copies, launches."""

import collections
import math
import re

import pytest

from qjax.formats import bnb, tinygemm
from tests.gpu import compiler
from tests.gpu.programs import (
    DENSE,
    SIDE,
    DecoderStep,
    Dense,
    Float8,
    Layers,
    Mixed,
    Native,
    Product,
    Ragged,
    Scanned,
)

both = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
# A decoder's step and a product, on a GPU of each later generation.
four = pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
MIB = 1 << 20


@pytest.fixture
def program(case, arch, compiled):
    return compiled(case, arch)


def results(hlo, dtypes):
    """The operation and the size of every array of these dtypes that is computed."""
    line = re.compile(rf"= (?:{dtypes})\[([\d,]*)\]\S* ([\w-]+)\(")
    return [
        (operation, math.prod(int(n) for n in shape.split(",") if n))
        for shape, operation in line.findall(hlo)
    ]


def words_stay(hlo):
    """Whether all packed words are read from where the caller has put them."""
    operations = {operation for operation, _ in results(hlo, "u16")}
    return operations <= {"parameter", "bitcast", "get-tuple-element"}


def no_dense_weight(hlo, least=DENSE // 2):
    """Whether no float array has as many elements as a weight."""
    floats = results(hlo, "f16|bf16|f32")
    return all(size < least for name, size in floats if name != "parameter")


@pytest.mark.parametrize("case", [Product(m) for m in (1, 16, 64, 256, 512)], ids=str)
@both
def test_matmul(case, program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
    assert program.temporaries < DENSE / 3
    names = [name for name, _ in compiler.calls(program.hlo)]
    if case.m <= 16:
        assert re.fullmatch(r"matvec_4bit_\d", *names)
    else:
        prepared, product = sorted(names)[::-1]
        assert prepared == "rows_4bit"
        assert product.startswith("matmul_4bit")


@pytest.mark.parametrize(
    "case",
    [Product(1), Product(16), Product(64), Product(1, codebook=True)],
    ids=str,
)
@four
def test_launches_of_a_product(case, program):
    # One row: the product and nothing else. Several: the sum over splits after it.
    # Many: the rows of x before it. XLA makes a CUDA graph of five launches or more: a
    # decoder's step is in one.
    # The table of a codebook is made by the kernel itself.
    few = {1: 1, 16: 2}
    assert len(program.launches) == few.get(case.m, 3)
    assert {launch.kind for launch in program.launches} == {"kCustomKernel"}


@pytest.mark.parametrize(
    "case", [Product(m, nested=True) for m in (1, 16, 256)], ids=str
)
@both
def test_scales_in_two_levels_stay_so(case, program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
    assert f"f32[{SIDE // 32},{SIDE}]" not in program.hlo
    few = {1: 1, 16: 2}
    assert len(program.launches) == few.get(case.m, 3)


@pytest.mark.parametrize("case", [Product(16, gradient=True, nested=True)], ids=str)
@both
def test_gradient_of_two_levels(program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)


@pytest.mark.parametrize("case", [Dense(), Dense(codebook=True)], ids=str)
@both
def test_dequantize(program):
    (launch,) = program.launches
    assert launch.name.startswith("dequantize_4bit")
    assert program.temporaries == 0


@pytest.mark.parametrize(
    "case",
    [Dense(layout=tinygemm.TensorCoreTiled()), Dense(True, bnb.Flat(SIDE))],
    ids=str,
)
@both
def test_dequantize_of_other_layouts(program):
    first, second = [launch.name for launch in program.launches]
    assert first == "relayout_4bit"
    assert second.startswith("dequantize_4bit")
    # The words, once more.
    assert program.temporaries == DENSE / 4


@pytest.mark.parametrize("case", [Mixed(32, padded=32), Mixed(128)], ids=str)
@both
def test_mixed_widths(case, program):
    # Where segments are padded, so is x, before.
    assert len(program.launches) == (2 if case.padded else 1)
    assert words_stay(program.hlo)
    (kernel,) = program.kernels
    assert kernel.spills == 0
    # A loop for each, of the same width of loads as alone.
    assert len(kernel.loops) == 3
    for loop in kernel.loops:
        assert loop.number("LDG.16") <= 1 + 2 * (256 // case.group_size)
        assert loop.number("LDGSTS.128") > 0


@pytest.mark.parametrize(
    "case",
    [
        Mixed(m=4, cut=((4, 512), (3, 3584))),
        Mixed(m=16, cut=((8, 256), (4, 512), (3, 3328))),
        Mixed(m=32, cut=((8, 256), (6, 512), (5, 3328))),
    ],
    ids=str,
)
@both
def test_mixed_widths_have_registers(program):
    # Small groups, whose scales are loaded ahead, in long iterations.
    assert all(kernel.spills == 0 for kernel in program.kernels)


@pytest.mark.parametrize("case", [Product(16, gradient=True)], ids=str)
@both
def test_gradient(program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
    assert program.temporaries < DENSE / 2
    names = sorted(
        re.sub(r"_4bit.*", "", name) for name, _ in compiler.calls(program.hlo)
    )
    assert names == ["matmul_t", "matvec", "scale_grad"]


@pytest.mark.parametrize(
    "case",
    [
        Scanned(1),
        Scanned(8, gradient=True),
        Scanned(1, flax="nnx"),
        Scanned(8, gradient=True, flax="nnx"),
    ],
    ids=str,
)
@both
def test_scanned_layers(case, program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo, least=case.side**2)
    names = [re.sub(r"_4bit.*", "", name) for name, _ in compiler.calls(program.hlo)]
    if case.gradient:
        # Inputs of all layers and parts of sums: less than the words of one.
        again = ["matvec"] if case.flax == "nnx" else []  # by nnx.remat
        assert sorted(names) == ["matmul_t", "matvec", *again]
        assert program.temporaries < case.side**2 // 2
    else:
        assert names == ["matvec"]
        assert program.temporaries < 16 * case.side


@pytest.mark.parametrize("case", [Ragged(8), Ragged(512)], ids=str)
@both
def test_ragged_matmul(case, program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
    names = [name for name, _ in compiler.calls(program.hlo)]
    # All experts in one launch.
    if case.t == 8:
        assert re.fullmatch(r"matvec_4bit_\d", *names)
    else:
        prepared, product = sorted(names)[::-1]
        assert prepared == "rows_4bit"
        assert product.startswith("matmul_4bit")
    assert " while(" not in program.hlo
    assert all(kernel.spills == 0 for kernel in program.kernels)


@pytest.mark.parametrize("case", [Ragged(64, gradient=True)], ids=str)
@both
def test_gradient_of_ragged_matmul(program):
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
    names = {re.sub(r"_4bit.*", "", name) for name, _ in compiler.calls(program.hlo)}
    assert names == {"matvec", "matmul_t", "scale_grad"}


@pytest.mark.parametrize("case", [Product(1024)], ids=str)
@both
def test_many_rows_form_the_weight_once(program):
    assert words_stay(program.hlo)
    (name,) = (name for name, _ in compiler.calls(program.hlo))
    assert name.startswith("dequantize_4bit")
    # float16, and no wider or second copy of it; rows of x, in float16 and as ordered.
    assert DENSE <= program.temporaries < 1.6 * DENSE


@pytest.mark.parametrize("arch", ["sm_90"])
@pytest.mark.parametrize("case", [Float8(1024)], ids=str)
def test_floats_of_eight_bits_are_multiplied_as_they_are(case, program):
    # By the one kernel that multiplies, whose operands are fusions, or views of them.
    (product,) = re.findall(r"= f32\[1024,4096\]\S* dot\((.*?)\)", program.hlo)
    operands = re.findall(r"%[\w.]+", product)
    for operand in operands:
        assert re.search(rf"{re.escape(operand)} = f8e4m3fn\[", program.hlo)
    # The weight and the rows in a byte each, the product in float32.
    expected = DENSE // 2 + case.m * SIDE + 4 * case.m * SIDE
    assert program.temporaries <= expected
    assert no_dense_weight(program.hlo)


@pytest.mark.parametrize("case", [Layers(1024)], ids=str)
@both
def test_backward_forms_weights_again(case, program):
    names = [re.sub(r"_4bit.*", "", name) for name, _ in compiler.calls(program.hlo)]
    assert names == ["dequantize"] * 2 * case.count
    # One at a time, in 16 bits, and rows, a quarter or half of that each.
    assert program.temporaries < 3 * DENSE


@pytest.mark.parametrize("case", [Native(1)], ids=str)
@both
def test_uint4_forms_the_weight(program):
    # What the kernels are for: XLA does not fuse the dequantization into the product.
    assert program.temporaries >= DENSE == 32 * MIB


@pytest.mark.parametrize("case", [DecoderStep(), DecoderStep(experts=8)], ids=str)
@four
def test_decoder_step(case, arch, program):
    assert words_stay(program.hlo)
    smallest = min(k * n for k, n in case.matrices.values() if k * n > MIB // 2)
    assert no_dense_weight(program.hlo, least=smallest)
    assert program.temporaries < MIB
    names = collections.Counter(name for name, _ in compiler.calls(program.hlo))
    # One launch for each.
    assert names == {"matvec_4bit_8": len(case.matrices)}
    kernels = {kernel.name for kernel in program.kernels}
    launches = [i for i in program.launches if i.name in kernels]
    assert len(launches) == names.total()
    assert all(launch.captured for launch in launches)
    # What XLA makes of the rest; to route a token takes nine of them, or ten.
    routed = 29 if arch == "sm_120" else 28
    assert len(program.launches) <= (routed if case.experts else 22)
