"""Programs for eight GPUs: the kernels on local shards, and what is communicated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import qjax
from tests.gpu import compiler
from tests.gpu.cases import weight
from tests.gpu.programs import DENSE, SIDE, Ragged, gradient
from tests.gpu.test_programs import no_dense_weight, words_stay

both = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])


@dataclasses.dataclass(frozen=True)
class Sharded:
    """``qjax.matmul`` over data and model axes, or its gradient."""

    m: int
    by: str  # columns, rows, or fsdp: columns, along the axis of the batch
    gradient: bool = False

    def __str__(self) -> str:
        return f"{'gradient' if self.gradient else 'matmul'} m{self.m} by {self.by}"

    def __call__(self):
        x = jax.ShapeDtypeStruct((self.m, SIDE), jnp.bfloat16)
        w = weight(4, 128, k=SIDE, n=SIDE)
        mesh = AbstractMesh(tuple(compiler.MESH.values()), tuple(compiler.MESH))
        cut, whole = P("data", "model"), P("data", None)
        axis = "data" if self.by == "fsdp" else "model"
        of_w = P(axis, None) if self.by == "rows" else P(None, axis)
        of_x, of_dy = (cut, whole) if self.by == "rows" else (whole, cut)
        specs = qjax.partition_specs(w, mesh, of_w)
        if self.gradient:
            return gradient, (x, x, w), (of_x, of_dy, specs)
        return qjax.matmul, (x, w), (of_x, specs)


@dataclasses.dataclass(frozen=True)
class Experts(Ragged):
    """`Ragged`, of a stack that is cut along its experts over the model axis."""

    def __str__(self) -> str:
        return f"{super().__str__()} by experts"

    def __call__(self):
        function, avals = super().__call__()
        mesh = AbstractMesh(tuple(compiler.MESH.values()), tuple(compiler.MESH))
        *rows, w, _ = avals
        of_w = qjax.partition_specs(w, mesh, P("model"))
        return function, avals, (*[P()] * len(rows), of_w, P())


@dataclasses.dataclass(frozen=True)
class ByIndex:
    """``qjax.matmul`` by one of eight matrices, which lie on four devices."""

    m: int

    def __str__(self) -> str:
        return f"matmul m{self.m} by index"

    def __call__(self):
        (x, w, _), (of_x, of_w, _) = Experts(self.m)()[1:]
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return _by_index, (x, w, index), (of_x, of_w, P())


def _by_index(x, w, index):
    return qjax.matmul(x, w, index=index)


def communicated(hlo):
    """The dtype and shape of every array that a collective makes."""
    found = []
    for result, operation in re.findall(r"= (\S+) (all-[\w-]+|reduce-\w+)\(", hlo):
        if not operation.endswith("-start"):
            found.append((operation.removesuffix("-done"), result.partition("{")[0]))
    return sorted(found)


def names(program):
    found = (name for name, _ in compiler.calls(program.hlo))
    return sorted(re.sub(r"_4bit.*", "", name) for name in found)


@pytest.fixture
def program(case, arch, compiled):
    return compiled(case, arch)


@pytest.mark.parametrize(
    "case", [Sharded(2, "columns"), Sharded(32, "columns")], ids=str
)
@both
def test_columns(program):
    assert names(program) == ["matvec"]
    assert communicated(program.hlo) == []
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo, least=SIDE * SIDE // 4)
    assert program.temporaries < DENSE / 4 / 3


@pytest.mark.parametrize("case", [Sharded(2, "rows"), Sharded(32, "rows")], ids=str)
@both
def test_rows(case, program):
    assert names(program) == ["matvec"]
    assert communicated(program.hlo) == [("all-reduce", f"f32[{case.m // 2},{SIDE}]")]
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo, least=SIDE * SIDE // 4)
    assert program.temporaries < DENSE / 4 / 3


@pytest.mark.parametrize(
    "case", [Sharded(32, by, gradient=True) for by in ("columns", "rows")], ids=str
)
@both
def test_gradient(case, program):
    assert names(program) == ["matmul_t", "matvec", "scale_grad"]
    # One sum over columns or rows, and that of the gradient of scales over the batch.
    sums = [("all-reduce", f"f32[16,{SIDE}]")]
    scales = (SIDE // 128, SIDE // 4) if case.by == "columns" else (8, SIDE)
    sums.append(("all-reduce", "f32[{},{}]".format(*scales)))
    assert communicated(program.hlo) == sorted(sums)
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo, least=SIDE * SIDE // 4)


@pytest.mark.parametrize("case", [Sharded(4096, "fsdp")], ids=str)
@both
def test_fsdp(program):
    # Packed words, scales and zeros are gathered; the weight is formed of them, once.
    (gathered,) = re.findall(r"= \((.+?)\) all-gather\(", program.hlo)
    groups = SIDE // 128
    assert sorted(re.findall(r"(\w+)\[([\d,]+)\]", gathered)) == [
        ("f16", f"{groups},{SIDE}"),
        ("u16", f"{SIDE // 64},{SIDE // 16},256"),
        # The zeros as columns of bytes.
        ("u8", f"{SIDE // 2},{2 * groups}"),
    ]
    assert names(program) == ["dequantize"]
    assert program.temporaries < 2.5 * DENSE


@pytest.mark.parametrize("case", [Experts(8), Experts(512)], ids=str)
@both
def test_experts(case, program):
    # One launch for the two experts of a device, whose grid has the blocks of all.
    product = "matvec" if case.t == 8 else "matmul"
    assert product in names(program)
    assert set(names(program)) <= {product, "rows"}
    assert " while(" not in program.hlo
    # Of each token one device has the product: the sum is exact in 16 bits.
    assert communicated(program.hlo) == [("all-reduce", f"bf16[{case.t},{SIDE}]")]
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)


@pytest.mark.parametrize("case", [Experts(64, gradient=True)], ids=str)
@both
def test_gradient_of_experts(program):
    assert set(names(program)) == {"matvec", "matmul_t", "scale_grad"}
    # The products, and the cotangents of the tokens; those of scales stay.
    assert communicated(program.hlo) == [("all-reduce", f"bf16[{2 * 64 * SIDE}]")]
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)


@pytest.mark.parametrize("case", [ByIndex(8)], ids=str)
@both
def test_by_index(case, program):
    assert names(program) == ["matvec"]
    assert communicated(program.hlo) == [("all-reduce", f"bf16[{case.m},{SIDE}]")]
    assert words_stay(program.hlo)
    assert no_dense_weight(program.hlo)
