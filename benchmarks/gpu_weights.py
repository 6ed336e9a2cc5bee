"""What the engines of `gpu_matmul.py` share: weights, rows, and how a product is timed.

Nothing of JAX is imported before a weight is made: PyTorch's engines have none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

GROUP = 128
CHECKED = 8, 256  # rows and columns of a result that are compared


class Times(NamedTuple):
    """Seconds of a call, several times measured, and how."""

    seconds: list[float]
    how: str


class Bound(NamedTuple):
    """A weight and some rows."""

    result: Callable[[], np.ndarray]  # [rows, columns] that are compared
    time: Callable[[int], Times]  # of so many repeats


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight as a library packs it.

    Attributes:
      bits: Width of its codes, 16 for a dense one.
      nbytes: What a product has to read of it.
      columns: The `sampled` columns of the weight that it stands for, float64.
      bind: Brings ``[m, k]`` float32 rows to the device.
      tolerance: What products may be off by, relative to the largest: bfloat16's
        rounding of the result and of a dense weight is 2**-8 together.
    """

    bits: float
    nbytes: int
    columns: np.ndarray
    bind: Callable[[np.ndarray], Bound]
    tolerance: float = 1e-2


# The weights of a library for a shape, by name; each is made when it is called for.
Weights = dict[str, Callable[[], Weight]]


def rows(m: int, k: int) -> np.ndarray:
    """Activations from a fixed seed, values of bfloat16 and float16 both."""
    x = np.random.default_rng(m).standard_normal((m, k), np.float32)
    return np.round(x * 32) / 32


def sampled(n: int) -> np.ndarray:
    """Which columns are compared: spread over all."""
    return np.unique(np.linspace(0, n - 1, min(n, CHECKED[1])).astype(int))


class Codes(NamedTuple):
    """A weight ``(q - zero) * scale`` in groups of 128 rows."""

    q: np.ndarray  # uint8 [k, n]
    scale: np.ndarray  # float16 [k / 128, n]
    zero: np.ndarray  # uint8 [k / 128, n]

    @classmethod
    def random(cls, k: int, n: int, bits: int, *, symmetric: bool = False) -> "Codes":
        """Codes from a fixed seed; zeros are the middle code or near it."""
        rng = np.random.default_rng(bits)
        middle, near = 2 ** (bits - 1), 2 ** (bits - 2)
        low, high = (middle, middle) if symmetric else (middle - near, middle + near)
        groups = k // GROUP, n
        return cls(
            rng.integers(0, 2**bits, (k, n), dtype=np.uint8),
            (rng.uniform(0.5, 1, groups) / 2**bits / 4).astype(np.float16),
            rng.integers(low, high, groups, np.uint8, endpoint=True),
        )

    @property
    def columns(self) -> np.ndarray:
        """The sampled columns, dequantized."""
        chosen = sampled(self.q.shape[1])
        scale, zero = (
            np.repeat(p[:, chosen], GROUP, axis=0).astype(np.float64)
            for p in (self.scale, self.zero)
        )
        return (self.q[:, chosen] - zero) * scale


def bind(op: Callable[..., Any], weight: Any, bits: float, codes: Any) -> Weight:
    """A weight of a JAX library: copies of it, and ``op(x, weight)`` over them.

    ``codes`` are those that it stands for, or the columns themselves.
    """
    import jax
    import jax.numpy as jnp

    from qjax.tune import timing

    on_gpu = jax.default_backend() == "gpu"
    nbytes = stored_bytes(weight)
    count = timing.copies_beyond(nbytes) if on_gpu else 2
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(count)]

    def over_rows(x: np.ndarray) -> Bound:
        operand = jnp.asarray(x, jnp.bfloat16)
        y = jax.eval_shape(op, operand, weight)
        operations = 2 * x.shape[1] * math.prod(y.shape)
        rounds = timing.rounds(nbytes, operations, count) if on_gpu else 1
        program = timing.chained(op, rounds)

        def result() -> np.ndarray:
            y = jax.jit(op)(operand, copies[0])
            return np.asarray(y[: CHECKED[0], sampled(y.shape[1])], np.float64)

        def time(repeats: int) -> Times:
            run = functools.partial(program, [operand], copies)
            seconds = timing.timed(run, repeats)
            return Times([s / (rounds * count) for s in seconds], "one program")

        return Bound(result, time)

    columns = codes.columns if isinstance(codes, Codes) else codes
    return Weight(bits, nbytes, columns, over_rows)


def stored_bytes(tree: Any) -> int:
    """Bytes on the device, where two 4-bit integers share one."""
    import jax

    half = ("int4", "uint4")
    return sum(
        leaf.nbytes // 2 if leaf.dtype.name in half else leaf.nbytes
        for leaf in jax.tree.leaves(tree)
    )
