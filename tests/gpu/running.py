"""Calls of the kernels on data, small enough to be emulated, and what they should give.

Between them they meet every kernel, every width, every map of codes, groups shorter and
longer than an iteration, extents that no block divides, and every way of cutting up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas import configs, products
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import matvec
from qjax.pallas.operands import EXACT_ROWS, Config
from qjax.pallas.relayout import relayout
from qjax.pallas.scale_grad import scale_grad
from qjax.tensor import Layout
from tests import oracle
from tests.gpu.emulator import launches
from tests.samples import CODEBOOK, FLOAT, MAPS, in_tiles, random_matrix, rows

# Relative to the largest output, as in the tests of the interpreted kernels: float32
# sums of terms larger than what is left of them, or an operand rounded to float16.
SUMS, ROUNDED = 5e-5, 1e-3


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix; parts as ``(bits, rows, group_size)`` where widths are mixed."""

    bits: int = 4
    group_size: int | None = 128
    convention: str = "zero"
    scale: str = "float16"
    k: int = 512
    n: int = 128
    parts: tuple[tuple[int, int, int], ...] | None = None

    def __str__(self) -> str:
        bits = "_".join(str(p[0]) for p in self.parts) if self.parts else self.bits
        group = "column" if self.group_size is None else f"g{self.group_size}"
        return f"{bits}bit {group} {self.convention} {self.scale} {self.k}x{self.n}"

    def matrix(self, seed: int = 0) -> oracle.Matrix:
        """Returns one with random codes."""
        return random_matrix(
            seed,
            self.k,
            self.n,
            bits=self.bits,
            group_size=self.group_size,
            parts=self.parts,
            scale=self.scale,
            **(MAPS | CODEBOOK | FLOAT)[self.convention],
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
      launches: That it made.
      found: Its results, from what the launches computed.
      expected: The same, in float64.
    """

    launches: list[launches.Launched]
    found: list[np.ndarray]
    expected: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Matmul:
    """``x @ W``; without a config, as the heuristic cuts it up."""

    weight: Weight
    m: int = 8
    config: Config | None = None
    dtype: str = "float16"

    def __str__(self) -> str:
        return f"matmul {self.weight} m{self.m} {self.dtype}{_cut(self.config)}"

    @property
    def tolerance(self) -> float:
        rounded = self.weight.convention == "codebook" or self._config.scales_weights
        return ROUNDED if rounded else SUMS

    @functools.cached_property
    def _config(self) -> Config:
        w = in_tiles(self.weight.matrix())
        exact = self.dtype != "float16"
        choose = configs.for_exact if exact else configs.for_matmul
        return self.config or choose(self.m, w)

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        matrix, x = self.weight.matrix(), rows(self.m, self.weight.k)
        w = in_tiles(matrix)
        dtype = jnp.dtype(self.dtype)
        call = functools.partial(matmul, jnp.asarray(x), w, self._config, dtype=dtype)
        return call, [matrix.matmul(x)]


@dataclasses.dataclass(frozen=True)
class Matvec(Matmul):
    """The same of few rows in one launch, as they are, by one of a stack if need be."""

    m: int = 1
    dtype: str = "bfloat16"
    index: int | None = None

    @property
    def tolerance(self) -> float:
        # Entries are rounded to the dtype of x.
        half_a_step = float(jnp.finfo(self.dtype).eps) / 2
        return half_a_step if self.weight.convention == "codebook" else SUMS

    def __str__(self) -> str:
        stack = "" if self.index is None else f" of {self.index}"
        return super().__str__().replace("matmul", "matvec", 1) + stack

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        if self.index is None:
            matrices, index = [self.weight.matrix()], None
            w = in_tiles(*matrices)
        else:
            (matrices, w), index = _stack(self.weight), jnp.int32(self.index)
        x = rows(self.m, self.weight.k)
        config = self.config or configs.for_matvec(self.m, w)
        call = functools.partial(matvec, jnp.asarray(x, self.dtype), w, config)
        call = functools.partial(call, index=index)
        return call, [matrices[self.index or 0].matmul(x)]


def _stack(weight: Weight) -> tuple[list[oracle.Matrix], Any]:
    """Three matrices, and the stack of them."""
    matrices = [weight.matrix(seed) for seed in range(3)]
    in_stack = map(in_tiles, matrices)
    return matrices, jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_stack)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Rows by matrices of a stack: each ``m`` of them by its own, or all by one."""

    weight: Weight
    index: int | tuple[int, ...]
    m: int = 8

    @property
    def tolerance(self) -> float:
        return ROUNDED if self.m > EXACT_ROWS else SUMS

    def __str__(self) -> str:
        index = str(self.index).replace(" ", "")
        return f"stack {self.weight} m{self.m} of {index}"

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        matrices, stacked = _stack(self.weight)
        index = jnp.asarray(self.index, jnp.int32)
        if not index.ndim:
            x = rows(self.m, self.weight.k)
            config = configs.heuristic("matmul", self.m, stacked)
            call = functools.partial(matmul, jnp.asarray(x), stacked, config)
            call = functools.partial(call, index=index)
            return call, [matrices[self.index].matmul(x)]
        x = rows(self.m * index.size, self.weight.k).reshape(index.size, self.m, -1)
        call = functools.partial(products.fused_blocks, jnp.asarray(x), stacked, index)
        expected = np.zeros((*x.shape[:2], self.weight.n))
        for i, e in enumerate(self.index):
            if e >= 0:
                expected[i] = matrices[e].matmul(x[i])
        return call, [expected]


@dataclasses.dataclass(frozen=True)
class MatmulT:
    """``dy @ W.T``."""

    weight: Weight
    m: int = 16
    config: Config | None = None
    tolerance = ROUNDED

    def __str__(self) -> str:
        return f"matmul_t {self.weight} m{self.m}{_cut(self.config)}"

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        matrix, dy = self.weight.matrix(), rows(self.m, self.weight.n)
        w = in_tiles(matrix)
        config = self.config or configs.heuristic("matmul_t", self.m, w)
        call = functools.partial(matmul_t, jnp.asarray(dy), w, config)
        return call, [dy.astype(np.float64) @ matrix.weight.T]


@dataclasses.dataclass(frozen=True)
class ScaleGrad:
    """Gradients of scale and zero."""

    weight: Weight
    m: int = 8
    config: Config | None = None
    tolerance = SUMS

    def __str__(self) -> str:
        return f"scale_grad {self.weight} m{self.m}{_cut(self.config)}"

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        matrix, x = self.weight.matrix(), rows(self.m, self.weight.k)
        dy = rows(self.m, self.weight.n, seed=2)
        w = in_tiles(matrix)
        config = self.config or configs.heuristic("scale_grad", self.m, w)
        call = functools.partial(scale_grad, jnp.asarray(x), jnp.asarray(dy), w, config)
        gradients = matrix.gradients(x, dy)
        names = sorted(gradients.keys() & {"scale", "zero"})
        return call, [gradients[name] for name in names]


@dataclasses.dataclass(frozen=True)
class Dequantize:
    """The dense weight."""

    weight: Weight
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"dequantize {self.weight} to {self.dtype}"

    @property
    def tolerance(self) -> float:
        # One rounding of the result; of the product before it, where a zero is added.
        return 2 * float(jnp.finfo(self.dtype).eps)

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        matrix = self.weight.matrix()
        w = in_tiles(matrix)
        config = configs.for_dequantize(w)
        call = functools.partial(dequantize, w, jnp.dtype(self.dtype), config)
        return call, [matrix.stored]


@dataclasses.dataclass(frozen=True)
class Relayout:
    """Words in another layout."""

    source: Layout
    target: Layout
    bits: int = 4
    k: int = 256
    n: int = 128
    tolerance = float(np.finfo(np.float64).tiny)  # nothing is rounded

    def __str__(self) -> str:
        shape = f"{self.k}x{self.n}"
        return f"relayout {self.bits}bit {self.source} to {self.target} {shape}"

    def __call__(self) -> tuple[Callable[[], Any], list[np.ndarray]]:
        """Returns the call and what it should give."""
        generator, shape = np.random.default_rng(0), (self.k, self.n)
        codes = jnp.asarray(generator.integers(0, 2**self.bits, shape), jnp.uint8)
        words, expected = (
            layout.pack(codes, self.bits) for layout in (self.source, self.target)
        )
        call = functools.partial(
            relayout, words, self.source, self.target, self.bits, shape
        )
        return call, [np.asarray(expected)]


def _cut(c: Config | None) -> str:
    if c is None:
        return ""
    return f" by {c.block_m}x{c.block_n}x{c.block_k} splits{c.splits} w{c.warps}"


def run(case: Any, arch: str) -> Outcome:
    """Makes a call as a GPU would."""
    call, expected = case()
    with launches.emulated(arch) as launched:
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(call())]
    return Outcome(launched, found, expected)


def run_for_each(case: Any, archs: tuple[str, ...]) -> dict[str, Outcome]:
    """Does so for several GPUs: what surrounds the kernels is compiled but once."""
    return {arch: run(case, arch) for arch in archs}
