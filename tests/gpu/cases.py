"""The launches whose compiled form is pinned."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats import tiles
from qjax.pallas import configs
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import matvec
from qjax.pallas.operands import Config
from qjax.pallas.scale_grad import scale_grad
from qjax.tensor import Affine, Nested, QTensor, Segment, WithGlobal

# Shape of the weight of the kernels' cases: an iteration is what is counted, so any
# will do whose extents are whole blocks.
K, N = 8192, 4096
# Scales in two levels, and the rows that share a step: those of GGUF's blocks.
NESTED, RUN = "nested", 256
# float16, and one number for the matrix: those of NVFP4.
GLOBAL = "global"


def weight(
    bits: int,
    group_size: int | None,
    *,
    k: int = K,
    n: int = N,
    affine: Affine = Affine.ZERO,
    zero: Any = jnp.uint8,
    scale: Any = jnp.float16,
) -> QTensor:
    """Returns a matrix in Tiles, of structs."""
    struct = jax.ShapeDtypeStruct
    groups = (1 if group_size is None else -(-k // group_size), n)
    words = (
        k // tiles.rows_of_block(bits),
        tiles.units_of_block(bits),
        n // tiles.SIDE,
        tiles.SLOTS,
    )

    def parameter(dtype: Any, *, negative: bool = False) -> Any:
        if dtype == GLOBAL:
            local = struct(groups, jnp.float16)
            return WithGlobal(local=local, whole=struct((), jnp.float32))
        if dtype != NESTED:
            return None if dtype is None else struct(groups, dtype)
        factor, step = struct(groups, jnp.int8), struct((k // RUN, n), jnp.float16)
        return Nested(factor=factor, step=step, negative=negative)

    return QTensor(
        words=(struct(words, jnp.uint16),),
        scale=parameter(scale),
        zero=parameter(zero, negative=True),
        codebook=struct((16,), jnp.float32) if affine is Affine.CODEBOOK else None,
        layout=tiles.Tiles(nibbles=affine is Affine.CODEBOOK),
        segments=(Segment(bits, group_size),),
        affine=affine,
    )


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A launch of `qjax.pallas.matmul`."""

    bits: int
    block_m: int = 8
    block_k: int = 128
    group_size: int | None = 128
    convention: str = "zero"
    scale: str = "float16"
    block_n: int = 128
    warps: int = 4
    splits: int = 4
    stages: int = 3

    def __str__(self) -> str:
        group = "column" if self.group_size is None else f"g{self.group_size}"
        return (
            f"matmul {self.bits}bit {group} {self.convention} {self.scale} "
            f"m{self.block_m} n{self.block_n} k{self.block_k} w{self.warps}"
        )

    @property
    def config(self) -> Config:
        return Config(
            self.block_m,
            self.block_n,
            self.block_k,
            self.splits,
            self.warps,
            self.stages,
        )

    @property
    def rows(self) -> int:
        """Rows of the weight in one pass of the loop."""
        return max(self.block_k, tiles.rows_of_block(self.bits))

    @property
    def weights(self) -> float:
        """Weights of one thread in one pass of the loop."""
        return self.rows * self.config.block_n / (32 * self.config.warps)

    @property
    def pieces(self) -> int:
        """Into how many k is cut."""
        return self.splits

    @property
    def products(self) -> float:
        """Tensor-core instructions of a warp in one pass, of eight rows of x each."""
        return self.weights * 32 / 256 * self.block_m / 8

    @property
    def constants(self) -> float:
        """Those by rows of constants, which serve all columns of a warp."""
        return 0

    @property
    def words(self) -> int:
        """The parameter of the kernel with the words: after x, sums of x or a table."""
        if self.convention == "float":
            return 1
        plain = self.config.scales_weights and self.convention != "codebook"
        return 1 if plain else 2

    @property
    def fits_float16(self) -> bool:
        """Whether no weight is rounded, or as float16 they need no common scale."""
        plain = self.scale == "float16" and self.weight.affine.counts
        return plain or not self.config.scales_weights

    @property
    def weight(self) -> QTensor:
        affine, zero = {
            "zero": (Affine.ZERO, jnp.uint8),
            "offset": (Affine.OFFSET, self.scale),
            "centered": (Affine.CENTERED, None),
            "codebook": (Affine.CODEBOOK, None),
            "float": (Affine.FLOAT, None),
        }[self.convention]
        return weight(
            self.bits, self.group_size, affine=affine, zero=zero, scale=self.scale
        )

    def __call__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the function to compile and its arguments."""
        x = jax.ShapeDtypeStruct((self.block_m, K), jnp.float32)
        return functools.partial(matmul, config=self.config), (x, self.weight)


@dataclasses.dataclass(frozen=True)
class Matvec(Matmul):
    """A launch of `qjax.pallas.matvec`."""

    m: int = 1
    dtype: str = "bfloat16"
    slices: int = 8
    warps: int = 2
    splits: int = 1

    fits_float16 = True

    def __str__(self) -> str:
        cut = super().__str__().removeprefix("matmul ")
        return f"matvec {cut} s{self.slices} {self.dtype} x"

    @property
    def config(self) -> Config:
        return dataclasses.replace(super().config, slices=self.slices)

    @property
    def words(self) -> int:
        return 2 if self.convention == "codebook" else 1

    @property
    def pieces(self) -> int:
        return self.splits * self.slices

    @property
    def constants(self) -> float:
        columns = self.block_n / 16 / self.warps
        constants = 1 if self.weight.zero is None else 2
        if not self.weight.affine.counts:
            constants = 0
        return self.products * constants / columns

    def __call__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the function to compile and its arguments."""
        x = jax.ShapeDtypeStruct((self.m, K), jnp.dtype(self.dtype))
        return functools.partial(matvec, config=self.config), (x, self.weight)


@dataclasses.dataclass(frozen=True)
class Other:
    """A launch of another kernel, configured as `qjax.pallas.configs` does."""

    kernel: str
    bits: int
    m: int
    group_size: int | None = 128
    codebook: bool = False

    def __str__(self) -> str:
        group = "column" if self.group_size is None else f"g{self.group_size}"
        codes = "codebook" if self.codebook else f"{self.bits}bit"
        return f"{self.kernel} {codes} {group} m{self.m}"

    @property
    def weight(self) -> QTensor:
        if self.codebook:
            return weight(4, self.group_size, affine=Affine.CODEBOOK, zero=None)
        return weight(self.bits, self.group_size)

    @property
    def config(self) -> Config:
        w = self.weight
        if self.kernel == "dequantize":
            return configs.for_dequantize(w)
        config = getattr(configs, f"for_{self.kernel}")(self.m, w)
        # Few enough for a loop to be left.
        return dataclasses.replace(config, splits=2)

    @property
    def weights(self) -> float:
        """Weights of one thread in one pass of the loop, or in all where is none."""
        rows = max(self.config.block_k, tiles.rows_of_block(self.bits))
        return rows * self.config.block_n / (32 * self.config.warps)

    def __call__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the function to compile and its arguments."""
        w = self.weight
        x = jax.ShapeDtypeStruct((self.m, K), jnp.float32)
        dy = jax.ShapeDtypeStruct((self.m, N), jnp.float32)
        if self.kernel == "dequantize":
            dtype = jnp.dtype(jnp.bfloat16)
            return functools.partial(dequantize, dtype=dtype, config=self.config), (w,)
        if self.kernel == "matmul_t":
            return functools.partial(matmul_t, config=self.config), (dy, w)
        return functools.partial(scale_grad, config=self.config), (x, dy, w)
