"""Runs the few PTX instructions of the kernels' inline text, in NumPy.

Registers are arrays of uint32, one element a thread.
"""

import re

import numpy as np


def run(text: str, inputs: list[np.ndarray]) -> np.ndarray:
    """Executes ``{ .reg .b32 t; op ...; }`` with inputs from $1; returns $0."""
    registers = {f"${1 + i}": np.asarray(x, np.uint32) for i, x in enumerate(inputs)}
    declared = {"$0"}
    body = re.fullmatch(r"\{(.*)\}", text.strip(), re.DOTALL)[1]
    for statement in filter(None, map(str.strip, body.split(";"))):
        operation, rest = statement.split(None, 1)
        names = [name.strip() for name in rest.split(",")]
        if operation == ".reg":
            # .reg .b32 t, v
            declared.update([names[0].removeprefix(".b32").strip(), *names[1:]])
            continue
        target, *sources = names
        if target not in declared:
            raise ValueError(f"{statement!r} sets {target}, which is not declared.")
        operands = [
            registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources
        ]
        result = _OPERATIONS[operation](*operands)
        registers[target] = np.broadcast_to(result, inputs[0].shape)
    return registers["$0"]


def _prmt(a, b, selector):
    """Each of four nibbles names a byte of b:a; its high bit asks for the sign."""
    source = [
        (word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)
    ]
    source += [byte // 128 * np.uint32(255) for byte in source]
    result = np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.choose(nibble, np.broadcast_arrays(*source))
        result = result | byte << np.uint32(8 * i)
    return result


def _lop3(a, b, c, table):
    """Bit i of the table is the result where the bits of (a, b, c) spell i."""
    result = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | term
    return result


def _of_halves(operation):
    """An operation of two float16 in each register, rounded once."""

    def run(*registers):
        # Exact in float64 until it is rounded.
        halves = [
            np.stack([r & 0xFFFF, r >> 16]).astype(np.uint16).view(np.float16)
            for r in np.broadcast_arrays(*registers)
        ]
        result = operation(*(h.astype(np.float64) for h in halves))
        low, high = result.astype(np.float16).view(np.uint16).astype(np.uint32)
        return low | high << np.uint32(16)

    return run


def _shift(move):
    def shift(a, distance):
        # PTX clamps; the text has no reason to go so far.
        if not 0 <= int(distance) < 32:
            raise ValueError(f"distance={distance} must lie in [0, 32).")
        return move(a, distance)

    return shift


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "add.rn.f16x2": _of_halves(lambda a, b: a + b),
    "sub.rn.f16x2": _of_halves(lambda a, b: a - b),
    "mul.rn.f16x2": _of_halves(lambda a, b: a * b),
    "fma.rn.f16x2": _of_halves(lambda a, b, c: a * b + c),
    "and.b32": np.bitwise_and,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "shr.b32": _shift(np.right_shift),
    "shl.b32": _shift(np.left_shift),
}
