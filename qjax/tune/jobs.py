"""What there is to measure: operations, rows of activations, kinds of weights."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax import decode, ops, progress, rtn
from qjax.checkpoints import modules
from qjax.checkpoints.matrices import Matrix
from qjax.formats.tiles import Tiles
from qjax.pallas import check, products, tables
from qjax.pallas.operands import group_rows, layout_of
from qjax.tensor import QTensor

# Rows of the activations that are measured unless others are named.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Of most models' activations.
ROWS_DTYPE = jnp.bfloat16


class Job(NamedTuple):
    """A launch to be configured.

    Attributes:
      op: One of `tables.OPS`.
      m: Rows of the activations.
      w: The weight; its leaves may be structs.
    """

    op: str
    m: int
    w: QTensor

    @property
    def key(self) -> tables.Key:
        """What its entry is found by."""
        return tables.Key.of(self.op, self.m, self.w)

    def __str__(self) -> str:
        """Names it in a line: ``matmul 4096x4096, 4 bits, 8 rows``."""
        bits = "+".join(str(segment.bits) for segment in self.w.segments)
        count = f"{self.m} row{'s' * (self.m > 1)}"
        rows = "" if self.key.m is None else f", {count}"
        return f"{self.op} {self.w.k}x{self.w.n}, {bits} bits{rows}"


def uniform(k: int, n: int, bits: int, group_size: int | None) -> QTensor:
    """Describes a matrix of one width in `Tiles`, with integer zeros: only structs.

    Raises:
      ValueError: As `qjax.quantize`, or if the kernels decline it.
    """

    def build() -> QTensor:
        dense = jnp.zeros((k, n), jnp.float16)
        return decode.relayout(rtn.quantize(dense, bits, group_size), Tiles())

    w = jax.eval_shape(build)
    try:
        check(w)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    return w


def of_checkpoint(directory: Path) -> list[QTensor]:
    """Describes the matrices of a checkpoint that the kernels read, each kind once.

    Raises:
      ValueError: As `qjax.checkpoints.load`, or if the kernels read none of them.
    """
    found: dict[tables.Key, QTensor] = {}
    parts = modules.open_parts(directory).values()
    matrices = [part for part in parts if isinstance(part, Matrix)]
    with progress.bar(sum(part.nbytes for part in matrices)) as advance:
        for part in matrices:
            w = _as_kernels_take_it(part.read())
            if w is not None:
                found.setdefault(tables.Key.of("matmul", 1, w), w)
            advance(part.nbytes)
    if not found:
        raise ValueError(f"{directory}: no matrix that the GPU kernels read.")
    return list(found.values())


def _as_kernels_take_it(w: QTensor) -> QTensor | None:
    w = ops.prepare(w, layout=layout_of(w))
    try:
        group_rows(w)
    except NotImplementedError:
        return None
    w = dataclasses.replace(w, order=None, input_scale=None)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), w)


def jobs(
    weights: Iterable[QTensor],
    operations: Iterable[str] = tables.OPS,
    rows: Iterable[int] = ROWS,
) -> list[Job]:
    """Lists what there is to measure, each entry of a table once.

    `dequantize` comes first: the products through the dense weight use it. Only
    products take a mixed matrix at once, so the others are left out for one. Rows that
    `matvec` takes are not measured for `matmul`, if for both.
    """
    weights, chosen, rows = list(weights), set(operations), sorted(rows)

    def measured(op: str, m: int, w: QTensor) -> bool:
        if op not in ("matvec", "matmul"):
            return len(w.segments) == 1
        few = products.takes_few_rows(m, ROWS_DTYPE)
        return few if op == "matvec" else not (few and "matvec" in chosen)

    found = [
        Job(op, tables.bucket(op, m), w)
        for op in ("dequantize", "matvec", "matmul", "matmul_t", "scale_grad")
        if op in chosen
        for w in weights
        for m in ([1] if op == "dequantize" else rows)
        if measured(op, m, w)
    ]
    return list({job.key: job for job in found}.values())
