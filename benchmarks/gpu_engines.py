"""The JAX libraries that `gpu_matmul.py` times, and what all of its engines share."""

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


def _bind(op: Callable[..., Any], weight: Any, bits: float, codes: Any) -> Weight:
    """A weight of a JAX library: copies of it, and ``op(x, weight)`` over them.

    ``codes`` are those that it stands for, or the columns themselves.
    """
    import jax
    import jax.numpy as jnp

    from qjax.tune import timing

    on_gpu = jax.default_backend() == "gpu"
    nbytes = _stored_bytes(weight)
    count = timing.copies_beyond(nbytes) if on_gpu else 2
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(count)]

    def bind(x: np.ndarray) -> Bound:
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
    return Weight(bits, nbytes, columns, bind)


def _stored_bytes(tree: Any) -> int:
    """Bytes on the device, where two 4-bit integers share one."""
    import jax

    half = ("int4", "uint4")
    return sum(
        leaf.nbytes // 2 if leaf.dtype.name in half else leaf.nbytes
        for leaf in jax.tree.leaves(tree)
    )


def dense_weights(k: int, n: int) -> Weights:
    """What XLA makes of a bfloat16 product."""
    import jax.numpy as jnp

    def make() -> Weight:
        codes = Codes.random(k, n, 4)
        return _bind(jnp.dot, dense_of(codes), 16, codes)

    return {"dense bf16, XLA": make}


def dense_of(codes: Codes) -> Any:
    """The bfloat16 weight, formed on the device."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def form(q: Any, scale: Any, zero: Any) -> Any:
        groups = q.astype(jnp.float32).reshape(len(scale), GROUP, -1)
        centred = groups - zero[:, None].astype(jnp.float32)
        dense = centred * scale[:, None].astype(jnp.float32)
        return dense.reshape(q.shape).astype(jnp.bfloat16)

    return form(*map(jnp.asarray, codes))


def our_weights(k: int, n: int, *, bits: int) -> Weights:
    """Ours of one width."""
    import qjax

    def make() -> Weight:
        codes = Codes.random(k, n, bits)
        return _bind(qjax.matmul, qjax.prepare(packed(codes, bits)), bits, codes)

    return {f"qjax, {bits} bits": make}


def packed(codes: Codes, bits: int) -> Any:
    """The codes as GPTQ's stream, in a `qjax.QTensor`."""
    import jax.numpy as jnp

    import qjax

    return qjax.tensor.build(
        (qjax.bits.pack_fields(jnp.asarray(codes.q), bits),),
        jnp.asarray(codes.scale),
        jnp.asarray(codes.zero),
        layout=qjax.formats.gptq.Stream(),
        segments=(qjax.tensor.Segment(bits, GROUP),),
    )


# Widths of the rows of a matrix, and their share of k: 4.0 bits on the average.
MIX = ((6, 1 / 8), (5, 1 / 8), (4, 3 / 8), (3, 3 / 8))


def mixed_weights(k: int, n: int) -> Weights:
    """Ours with rows of four widths."""
    import jax.numpy as jnp

    import qjax

    def make() -> Weight:
        parts = [
            Codes.random(int(k * share), n, bits, symmetric=True) for bits, share in MIX
        ]
        w = qjax.tensor.build(
            tuple(
                qjax.bits.pack_fields(jnp.asarray(part.q), bits)
                for part, (bits, _) in zip(parts, MIX, strict=True)
            ),
            jnp.concatenate([jnp.asarray(part.scale) for part in parts]),
            layout=qjax.formats.gptq.Stream(),
            segments=tuple(qjax.tensor.Segment(bits, GROUP) for bits, _ in MIX),
            affine=qjax.tensor.Affine.CENTERED,
        )
        columns = np.concatenate([part.columns for part in parts])
        return _bind(qjax.matmul, qjax.prepare(w), 4, columns)

    return {"qjax, EXL2 mix of 4.0 bits": make}


class Floats(NamedTuple):
    """Small floats: a name, their width, groups along k, and the dtype of scales.

    Those of activations, too, where an implementation rounds them.
    """

    name: str
    bits: int
    group: int | None
    dtype: str
    implementation: str | None = None


FLOATS = {
    "float8": Floats("FP8", 8, 128, "float32"),
    "float4": Floats("MXFP4", 4, 32, "bfloat16"),
    "float8x8": Floats("FP8 by FP8", 8, None, "float32", "xla_float8"),
}


def float_weights(k: int, n: int, *, floats: Floats) -> Weights:
    """Ours of small floats."""
    import jax.numpy as jnp

    import qjax

    name, bits, group, dtype, implementation = floats
    op = functools.partial(qjax.matmul, implementation=implementation)
    rows = group or k

    def make() -> Weight:
        rng = np.random.default_rng(bits)
        q = rng.integers(0, 2**bits, (k, n), dtype=np.uint8)
        numbers = qjax.tensor.numbers(bits)
        q[np.isnan(numbers[q])] = 0
        largest = qjax.tensor.SMALL_FLOATS[bits].largest
        scale = rng.uniform(0.5, 1, (k // rows, n)) / largest / 4
        # Powers of two, as those of MXFP4 are; for FP8 they are as good as others.
        scale = (2.0 ** np.round(np.log2(scale))).astype(np.float32)
        w = qjax.tensor.build(
            (qjax.bits.pack_fields(jnp.asarray(q), bits),),
            jnp.asarray(scale, dtype),
            layout=qjax.formats.gptq.Stream(),
            segments=(qjax.tensor.Segment(bits, group),),
            affine=qjax.tensor.Affine.FLOAT,
        )
        chosen = sampled(n)
        columns = numbers[q[:, chosen]].astype(np.float64)
        columns *= np.repeat(scale[:, chosen], rows, axis=0)
        made = _bind(op, qjax.prepare(w), bits, columns)
        # Activations of four significant bits.
        rounds = implementation is not None
        return dataclasses.replace(made, tolerance=5e-2) if rounds else made

    return {f"qjax, {name}": make}


# Scales in two levels, by what files call them: width of a code, and groups along k.
LEVELS = {"Q4_K": (4, 32), "Q6_K": (6, 16), "NVFP4": (4, 16)}


def level_weights(k: int, n: int, *, kind: str) -> Weights:
    """Ours of scales in two levels: GGUF's in blocks of 256, and NVFP4's."""
    import jax.numpy as jnp

    import qjax

    bits, group = LEVELS[kind]

    def make() -> Weight:
        rng = np.random.default_rng(group)
        q = rng.integers(0, 2**bits, (k, n), dtype=np.uint8)
        small = 2.0**-bits / 64
        nested = functools.partial(_nested, rng, (k // group, n), k // 256, small)
        scale, zero = nested(negative=False), None
        numbers, affine = q.astype(np.float64), qjax.tensor.Affine.OFFSET
        if kind == "Q4_K":
            zero = nested(negative=True)
        elif kind == "Q6_K":
            numbers, affine = numbers - 2 ** (bits - 1), qjax.tensor.Affine.CENTERED
        else:
            numbers, affine = qjax.tensor.numbers(bits)[q], qjax.tensor.Affine.FLOAT
            local = jnp.asarray(rng.uniform(1, 2, (k // group, n)), jnp.float8_e4m3fn)
            scale = qjax.tensor.WithGlobal(
                local=local.astype(jnp.float16), whole=jnp.float32(small)
            )
        w = qjax.tensor.build(
            (qjax.bits.pack_fields(jnp.asarray(q), bits),),
            scale,
            zero,
            layout=qjax.formats.gptq.Stream(),
            segments=(qjax.tensor.Segment(bits, group),),
            affine=affine,
        )
        chosen = sampled(n)
        wide = [
            np.repeat(np.asarray(p.decode())[:, chosen].astype(np.float64), group, 0)
            for p in (scale, zero)
            if p is not None
        ]
        columns = sum(wide[1:], numbers[:, chosen] * wide[0])
        return _bind(qjax.matmul, qjax.prepare(w), bits, columns)

    return {f"qjax, {kind}": make}


def _nested(
    rng: np.random.Generator,
    shape: tuple[int, int],
    runs: int,
    step: float,
    *,
    negative: bool,
) -> Any:
    """Integers of six bits, and steps of runs of groups."""
    import jax.numpy as jnp

    import qjax

    steps = rng.uniform(0.5, 1, (runs, shape[1])) * step
    return qjax.tensor.Nested(
        factor=jnp.asarray(rng.integers(1, 64, shape), jnp.int8),
        step=jnp.asarray(steps, jnp.float16),
        negative=negative,
    )


def _qarray(codes: Codes) -> Any:
    import jax.numpy as jnp
    import qwix

    signed = codes.q.astype(np.int8) - np.int8(8)
    # An array made here: a constant of two to a byte cannot be moved.
    value = jnp.asarray(signed).astype(jnp.int4)
    return qwix.QArray(qvalue=value, scale=jnp.asarray(codes.scale, jnp.bfloat16))


def qwix_weights(k: int, n: int) -> Weights:
    """qwix dequantizes, then multiplies; XLA may fuse that, or not."""
    import qwix

    def make() -> Weight:
        codes = Codes.random(k, n, 4, symmetric=True)
        dims = (((1,), (0,)), ((), ()))
        op = lambda x, w: qwix.dot_general(x, w, dims)  # noqa: E731
        return _bind(op, _qarray(codes), 4, codes)

    return {"qwix, int4": make}


def tokamax_weights(k: int, n: int) -> Weights:
    """A ragged product of one group; its GPU kernel, and no fallback from it."""
    import jax
    import jax.numpy as jnp
    import tokamax

    on_gpu = jax.default_backend() == "gpu"
    implementation = "mosaic" if on_gpu else "xla"

    def make(*, transposed: bool) -> Weight:
        codes = Codes.random(k, n, 4, symmetric=True)
        axes = (1, 0) if transposed else (0, 1)
        weight = jax.tree.map(lambda a: a.transpose(axes)[None], _qarray(codes))

        def op(x: Any, w: Any) -> Any:
            w = w.swapaxes(1, 2) if transposed else w
            sizes = jnp.full(1, len(x), jnp.int32)
            return tokamax.ragged_dot(x, w, sizes, implementation=implementation)

        return _bind(op, weight, 4, codes)

    name = f"tokamax {implementation}, int4"
    return {
        f"{name} [k, n]": functools.partial(make, transposed=False),
        f"{name} [n, k]": functools.partial(make, transposed=True),
    }


# Each in a process of its own, so that a fault of one kernel ends no other's.
OURS: dict[str, Callable[[int, int], Weights]] = {
    **{f"qjax-{b}": functools.partial(our_weights, bits=b) for b in (4, 2, 3, 8)},
    "qjax-mixed": mixed_weights,
    **{
        f"qjax-{k}": functools.partial(float_weights, floats=f)
        for k, f in FLOATS.items()
    },
    **{f"qjax-{k.lower()}": functools.partial(level_weights, kind=k) for k in LEVELS},
}
LIBRARIES: dict[str, Callable[[int, int], Weights]] = {
    "dense": dense_weights,
    **OURS,
    "qwix": qwix_weights,
    "tokamax": tokamax_weights,
}


def rates(*, small: bool) -> dict[str, float]:
    """What this device reaches: bytes copied and bfloat16 operations a second.

    The roofs of the figures; measured as everything else is.
    """
    import jax
    import jax.numpy as jnp

    from qjax.tune import timing

    words, side = (2**20, 512) if small else (2**27, 8192)

    def seconds(op: Callable[..., Any], operands: list[Any], weights: list[Any]) -> Any:
        rounds = 1 if small else 4
        program = timing.chained(op, rounds)
        runs = timing.timed(lambda: program(operands, weights), 5)
        return min(runs) / (rounds * len(weights))

    # Not zeros, which a GPU moves and multiplies faster.
    arrays = [jax.random.bits(jax.random.key(i), words) for i in range(2)]
    copy = seconds(lambda w: w + jnp.uint32(1), [], arrays)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = seconds(jnp.dot, [x], [x, x + 1])
    return {"bytes": 2 * 4 * words / copy, "operations": 2 * side**3 / product}


def layout_moves(k: int, n: int, *, small: bool) -> dict[str, Callable[[], Any]]:
    """Moves of 4-bit codes between layouts, and to the dense weight.

    Returns:
      For each, by name, what gives its seconds and bytes.
    """
    import jax
    import jax.numpy as jnp

    import qjax
    from qjax.formats import awq, gptq, tiles, tinygemm
    from qjax.pallas import configs
    from qjax.pallas.dequantize import dequantize as kernel
    from qjax.tune import timing

    layouts = {
        "GPTQ": gptq.Stream(),
        "AWQ": awq.Gemm(),
        "tinygemm": tinygemm.TensorCoreTiled(),
        "Tiles": tiles.Tiles(),
    }
    stream = packed(Codes.random(k, n, 4), 4)
    codes, dense = stream.words[0].nbytes, 2 * k * n
    to_dense = functools.partial(qjax.dequantize, dtype=jnp.bfloat16)

    def launched(w: Any) -> Any:
        return kernel(w, jnp.bfloat16, configs.for_dequantize(w))

    def move(source: Any, op: Callable[..., Any], written: int) -> dict[str, Any]:
        w = qjax.relayout(stream, source)
        count = 2 if small else timing.copies_beyond(w.nbytes)
        copies = [jax.tree.map(jnp.copy, w) for _ in range(count)]
        rounds = 1 if small else timing.rounds(codes + written, 0, count)
        program = timing.chained(op, rounds)
        seconds = timing.timed(lambda: program([], copies), 5)
        return {
            "seconds": [s / (rounds * count) for s in seconds],
            "bytes": codes + written,
        }

    moves: dict[str, Callable[[], Any]] = {}
    for name, source in layouts.items():
        for other, target in layouts.items():
            if other != name:
                words = functools.partial(_relaid, layout=target)
                moves[f"{name} to {other}"] = functools.partial(
                    move, source, words, codes
                )
        moves[f"{name} to dense bf16"] = functools.partial(
            move, source, to_dense, dense
        )
    if not small:
        moves["Tiles to dense bf16, kernel"] = functools.partial(
            move, layouts["Tiles"], launched, dense
        )
    return moves


def _relaid(w: Any, layout: Any) -> Any:
    import qjax

    return qjax.relayout(w, layout).words
