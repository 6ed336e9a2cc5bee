"""Moving packed words to another layout, as XLA compiles it."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import tensor
from qjax.formats import awq, gptq, tiles, tinygemm
from qjax.tensor import Layout, Segment

both = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
K, N = 4096, 14336
LAYOUTS = {
    "GPTQ": gptq.Stream(),
    "AWQ": awq.Gemm(),
    "tinygemm": tinygemm.TensorCoreTiled(),
    "Tiles": tiles.Tiles(),
}


@dataclasses.dataclass(frozen=True)
class Relayout:
    """``qjax.relayout`` of a matrix."""

    source: str
    target: str
    bits: int = 4
    k: int = K
    n: int = N

    def __str__(self) -> str:
        return f"relayout {self.bits}bit {self.source} to {self.target}"

    def __call__(self):
        layout = LAYOUTS[self.source]
        move = functools.partial(_words, layout=LAYOUTS[self.target])
        pack = functools.partial(_packed, layout, self.bits, self.k)
        codes = jax.ShapeDtypeStruct((self.k, self.n), jnp.uint8)
        return move, (jax.eval_shape(pack, codes),)


def _packed(layout: Layout, bits: int, k: int, codes):
    scale = jnp.zeros((k // 128, codes.shape[1]), jnp.float16)
    return tensor.build(
        (layout.pack(codes, bits),),
        scale,
        None,
        layout=layout,
        segments=(Segment(bits, 128),),
        affine=tensor.Affine.CENTERED,
    )


def _words(w, layout):
    return qjax.relayout(w, layout).words


CASES = [
    *(Relayout(*names) for names in itertools.permutations(LAYOUTS, 2)),
    Relayout("GPTQ", "Tiles", bits=2),
    Relayout("GPTQ", "Tiles", bits=8),
]
every = pytest.mark.parametrize("case", CASES, ids=str)


@every
@both
def test_one_launch_and_no_memory(case, arch, compiled):
    program = compiled(case, arch)
    (launch,) = program.launches
    assert launch.name == f"relayout_{case.bits}bit"
    assert program.temporaries == 0


@every
@both
def test_words_go_in_and_out_once(case, arch, compiled):
    program = compiled(case, arch)
    count, (launch,) = program.kernel.instructions.number, program.launches
    threads = launch.threads * math.prod(launch.grid)
    for access in ("LDG", "STG"):
        assert count(access) == count(f"{access}.128")
        assert 8 * 16 * threads * count(access) == case.bits * case.k * case.n


@every
@both
def test_instructions(case, arch, compiled, budgets):
    program = compiled(case, arch)
    kernel, (launch,) = program.kernel, program.launches
    assert kernel.spills == 0
    codes = case.k * case.n / (launch.threads * math.prod(launch.grid))
    budgets.check(case, arch, len(kernel.instructions) / codes, kernel.registers)


@pytest.mark.parametrize("names", [("GPTQ", "Tiles"), ("Tiles", "GPTQ")], ids=str)
@pytest.mark.parametrize("bits", [3, 6])
def test_codes_of_several_planes_take_two_bytes(bits, names, compiled):
    """XLA moves them: as bytes in one order, and in the other."""
    case = Relayout(*names, bits=bits)
    assert compiled(case, "sm_90").temporaries <= 2.01 * case.k * case.n
