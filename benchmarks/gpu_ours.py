"""The weights of qjax that `gpu_matmul.py` times: mixed, floats, in two levels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gpu_weights import GROUP, Codes, Weight, Weights, bind, sampled


def our_weights(k: int, n: int, *, bits: int) -> Weights:
    """Ours of one width."""
    import qjax

    def make() -> Weight:
        codes = Codes.random(k, n, bits)
        return bind(qjax.matmul, qjax.prepare(packed(codes, bits)), bits, codes)

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
        return bind(qjax.matmul, qjax.prepare(w), 4, columns)

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
        made = bind(op, qjax.prepare(w), bits, columns)
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
        return bind(qjax.matmul, qjax.prepare(w), bits, columns)

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


OURS: dict[str, Callable[[int, int], Weights]] = {
    **{f"qjax-{b}": functools.partial(our_weights, bits=b) for b in (4, 2, 3, 8)},
    "qjax-mixed": mixed_weights,
    **{
        f"qjax-{k}": functools.partial(float_weights, floats=f)
        for k, f in FLOATS.items()
    },
    **{f"qjax-{k.lower()}": functools.partial(level_weights, kind=k) for k in LEVELS},
}
