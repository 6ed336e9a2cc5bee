"""Operations on each thread alone: integers, bits, predicates, floats, conversions."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.gpu.emulator.machine import Group, Operation
from tests.gpu.emulator.parser import EmulationError, Statement

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64
F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
P = np.bool_


def elementwise(function: Callable[..., Any], out: Any, *ins: Any) -> Operation:
    """An operation on each thread alone.

    Operands are read as elements of ``ins``: two of a register, where that is twice as
    wide.
    """

    def operate(group: Group, statement: Statement) -> None:
        destination, *operands = statement.operands
        values = [group.read(o, d) for o, d in zip(operands, ins, strict=True)]
        group.write(destination, np.asarray(function(*values)).astype(out, copy=False))

    return operate


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c``, rounded once."""
    # The product is exact in float64. The sum is rounded to odd, which leaves the
    # rounding to a narrower format as it would be of the exact sum.
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    return _to_odd(total, error)


def _fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same for a format that ml_dtypes makes of float64 by way of float32."""
    exact = _fma(a, b, c)
    with np.errstate(over="ignore"):
        narrow = exact.astype(F32)
    return _to_odd(narrow, exact - narrow)


def _to_odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Rounds ``total + error`` to odd, where ``total`` is the nearest number."""
    one = total.dtype.type(1)
    even = (total.view(f"u{total.itemsize}") & one.astype(f"u{total.itemsize}")) == 0
    infinity = total.dtype.type(np.inf)
    away = np.nextafter(total, np.where(error > 0, infinity, -infinity))
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, away, total)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> np.ndarray:
    table = int(table.flat[0])
    found = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            terms = (v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0)))
            found |= np.bitwise_and.reduce(list(terms))
    return found


def _funnel(low: np.ndarray, high: np.ndarray, distance: np.ndarray) -> np.ndarray:
    both = low.astype(U64) | high.astype(U64) << U64(32)
    return (both << (distance & U32(31)).astype(U64) >> U64(32)).astype(U32)


def _field(dtype: Any) -> Callable[..., Any]:
    """bfe: some bits of a register, with the sign of the last if there are signs."""

    def field(a: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
        begin, count = begin & U32(255), np.minimum(count & U32(255), U32(64))
        if (begin >= 8 * a.itemsize).any():
            raise EmulationError("a field that begins beyond its register")
        above = np.minimum(U32(64) - count, U32(63)).astype(dtype)
        found = a.astype(dtype) >> begin.astype(dtype) << above >> above
        return np.where(count == 0, 0, found)

    return field


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.stack([a, b], -1).view(U8)
    nibbles = selector[..., None] >> U32(4) * np.arange(4, dtype=U32)
    chosen = np.take_along_axis(pool, (nibbles & U32(7)).astype(np.intp), -1)
    sign = np.where(chosen >= 128, U8(255), U8(0))
    return np.where(nibbles & U32(8), sign, chosen).view(U32)[..., 0]


def _wide(dtype: Any) -> Callable[..., Any]:
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def _combined(compare: Callable[..., Any], combine: Callable[..., Any]) -> Any:
    return lambda a, b, p: combine(compare(a, b), p)


def _to_float(values: np.ndarray) -> np.ndarray:
    # Exact, so that what follows is the only rounding.
    return values.astype(F64)


def _to_integer(dtype: Any) -> Callable[..., Any]:
    bounds = np.iinfo(dtype)
    return lambda values: np.clip(
        np.trunc(np.nan_to_num(values.astype(F64), nan=0.0)), bounds.min, bounds.max
    )


def _extreme(function: Callable[..., Any], dtype: Any) -> Operation:
    """max or min, of two operands or of three."""
    of_two = elementwise(function, dtype, dtype, dtype)
    of_three = elementwise(
        lambda a, b, c: function(function(a, b), c), dtype, dtype, dtype, dtype
    )

    def operate(group: Group, statement: Statement) -> None:
        (of_two if len(statement.operands) == 3 else of_three)(group, statement)

    return operate


def _pair(dtype: Any) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        destination, high, low = statement.operands
        values = [group.read(o, F32).astype(dtype) for o in (low, high)]
        group.write(destination, np.stack(values, -1).view(U32)[..., 0])

    return operate


_COMPARISONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}
# Of floats, these are false with NaN, and those with a u are true.
_FLOAT_COMPARISONS = {
    **_COMPARISONS,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_INTEGERS = {
    **{"s16": S16, "u16": U16, "b16": U16, "s32": S32, "u32": U32, "b32": U32},
    **{"s64": S64, "u64": U64, "b64": U64},
}
_SCALAR_FLOATS = {"f16": F16, "bf16": BF16, "f32": F32}
_FLOATS = {**_SCALAR_FLOATS, "f16x2": F16, "bf16x2": BF16}
_SUMMED_FLOATS = {**_FLOATS, "f32x2": F32}


OPERATIONS: dict[str, Operation] = {
    # Integers.
    **{
        f"{name}.{t}": elementwise(function, d, d, d)
        for name, function in (("add", np.add), ("sub", np.subtract))
        for t, d in _INTEGERS.items()
        if t[0] != "b"
    },
    **{
        f"{name}.{t}": elementwise(function, d, d, d)
        for name, function in (("min", np.minimum), ("max", np.maximum))
        for t, d in _INTEGERS.items()
        if t[0] != "b"
    },
    **{
        f"mul.lo.{t}": elementwise(np.multiply, d, d, d)
        for t, d in _INTEGERS.items()
        if t[0] != "b"
    },
    "mul.wide.s32": elementwise(_wide(S64), S64, S32, S32),
    "mul.wide.u32": elementwise(_wide(U64), U64, U32, U32),
    "mul.wide.s16": elementwise(_wide(S32), S32, S16, S16),
    "mul.wide.u16": elementwise(_wide(U32), U32, U16, U16),
    "mul.hi.s32": elementwise(lambda a, b: _wide(S64)(a, b) >> S64(32), S32, S32, S32),
    "mul.hi.u32": elementwise(lambda a, b: _wide(U64)(a, b) >> U64(32), U32, U32, U32),
    "mul.hi.s16": elementwise(lambda a, b: _wide(S32)(a, b) >> 16, S16, S16, S16),
    "mul.hi.u16": elementwise(lambda a, b: _wide(U32)(a, b) >> U32(16), U16, U16, U16),
    **{
        f"mad.lo.{t}": elementwise(lambda a, b, c: a * b + c, d, d, d, d)
        for t, d in _INTEGERS.items()
        if t[0] != "b"
    },
    "neg.s32": elementwise(np.negative, S32, S32),
    "abs.s32": elementwise(np.abs, S32, S32),
    # Bits.
    **{
        f"{name}.{t}": elementwise(function, d, d, d)
        for name, function in (
            ("and", np.bitwise_and),
            ("or", np.bitwise_or),
            ("xor", np.bitwise_xor),
        )
        for t, d in (("b16", U16), ("b32", U32), ("b64", U64), ("pred", P))
    },
    **{
        f"not.{t}": elementwise(np.invert, d, d)
        for t, d in (("b16", U16), ("b32", U32), ("b64", U64), ("pred", P))
    },
    **{
        f"shl.{t}": elementwise(np.left_shift, d, d, U32)
        for t, d in (("b16", U16), ("b32", U32))
    },
    **{
        f"shr.{t}": elementwise(np.right_shift, d, d, U32)
        for t, d in _INTEGERS.items()
        if t[1:] != "64"
    },
    "shl.b64": elementwise(lambda a, n: a << n.astype(U64), U64, U64, U32),
    "shr.u64": elementwise(lambda a, n: a >> n.astype(U64), U64, U64, U32),
    "shr.b64": elementwise(lambda a, n: a >> n.astype(U64), U64, U64, U32),
    "shr.s64": elementwise(lambda a, n: a >> n.astype(S64), S64, S64, U32),
    "lop3.b32": elementwise(_lop3, U32, U32, U32, U32, U32),
    "prmt.b32": elementwise(_prmt, U32, U32, U32, U32),
    **{
        f"bfe.{t}": elementwise(_field(wide), d, d, U32, U32)
        for t, d, wide in (("u32", U32, U64), ("u64", U64, U64), ("s32", S32, S64))
    },
    "shf.l.wrap.b32": elementwise(_funnel, U32, U32, U32, U32),
    # Predicates.
    **{
        f"setp.{name}.{t}": elementwise(function, P, d, d)
        for comparisons, dtypes in (
            (_COMPARISONS, _INTEGERS),
            (_FLOAT_COMPARISONS, _SCALAR_FLOATS),
        )
        for name, function in comparisons.items()
        for t, d in dtypes.items()
    },
    **{
        f"setp.{name}.{also}.{t}": elementwise(_combined(function, combine), P, d, d, P)
        for comparisons, dtypes in (
            (_COMPARISONS, _INTEGERS),
            (_FLOAT_COMPARISONS, _SCALAR_FLOATS),
        )
        for name, function in comparisons.items()
        for t, d in dtypes.items()
        for also, combine in _COMBINATIONS.items()
    },
    **{
        f"selp.{t}": elementwise(lambda a, b, p: np.where(p, a, b), d, d, d, P)
        for t, d in (
            ("b16", U16),
            *(("b32", U32), ("s32", S32), ("f32", F32), ("b64", U64)),
        )
    },
    # Floats.
    **{
        f"{name}.{rounding}{t}": elementwise(function, d, d, d)
        for name, function in (
            ("add", np.add),
            ("sub", np.subtract),
            ("mul", np.multiply),
        )
        for rounding in ("", "rn.")
        for t, d in _SUMMED_FLOATS.items()
    },
    **{
        f"fma.rn.{t}": elementwise(_fma_bf16 if d is BF16 else _fma, d, d, d, d)
        for t, d in _SUMMED_FLOATS.items()
    },
    **{f"abs.{t}": elementwise(np.abs, d, d) for t, d in _FLOATS.items()},
    # Off by two units in the last place at most, which the device is and this is not.
    "div.full.f32": elementwise(np.divide, F32, F32, F32),
    **{f"neg.{t}": elementwise(np.negative, d, d) for t, d in _FLOATS.items()},
    # Operands of 16 bits are widened first.
    **{
        f"add.rn.f32.{t}": elementwise(lambda a, b: a.astype(F32) + b, F32, d, F32)
        for t, d in (("f16", F16), ("bf16", BF16))
    },
    **{
        f"sub.rn.f32.{t}": elementwise(lambda a, b: a.astype(F32) - b, F32, d, F32)
        for t, d in (("f16", F16), ("bf16", BF16))
    },
    **{
        f"fma.rn.f32.{t}": elementwise(_fma, F32, d, d, F32)
        for t, d in (("f16", F16), ("bf16", BF16))
    },
    **{
        f"{name}.{t}": _extreme(function, d)
        for name, function in (
            ("max", np.fmax),
            ("min", np.fmin),
            ("max.NaN", np.maximum),
            ("min.NaN", np.minimum),
        )
        for t, d in _FLOATS.items()
    },
    # Conversions.
    **{
        f"cvt.{to}.{of}": elementwise(lambda v: v, d, e)
        for to, d in _INTEGERS.items()
        for of, e in _INTEGERS.items()
        if "b" not in to + of
    },
    **{
        f"cvt.rn.{to}.{of}": elementwise(_to_float, d, e)
        for to, d in (("f16", F16), ("f32", F32))
        for of, e in _INTEGERS.items()
        if of[0] != "b"
    },
    **{
        f"cvt.rzi.{to}.{of}": elementwise(_to_integer(d), d, e)
        for to, d in _INTEGERS.items()
        if to in ("s32", "u32", "s16", "u16")
        for of, e in (("f32", F32), ("f16", F16))
    },
    # Bytes are the low half of registers of 16 bits, which get their sign.
    **{
        f"cvt.{to}.s8": elementwise(lambda v: v.astype(S8), d, S16)
        for to, d in (("s16", S16), ("s32", S32))
    },
    **{
        f"cvt.s8.{of}": elementwise(lambda v: v.astype(S8), S16, e)
        for of, e in (("s16", S16), ("s32", S32))
    },
    "cvt.f32.f16": elementwise(lambda v: v, F32, F16),
    "cvt.f32.bf16": elementwise(lambda v: v, F32, BF16),
    **{
        f"cvt.rn.{to}.{of}": elementwise(lambda v: v.astype(F32), d, e)
        for to, d in _SCALAR_FLOATS.items()
        for of, e in _SCALAR_FLOATS.items()
        if to not in (of, "f32")
    },
    "cvt.rn.f16x2.f32": _pair(F16),
    "cvt.rn.bf16x2.f32": _pair(BF16),
    "cvta.to.global.u64": elementwise(lambda v: v, U64, U64),
}
