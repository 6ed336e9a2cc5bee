"""Tensor cores, and the loads and stores that feed them.

Which thread holds which element is said by the pictures of the PTX ISA, sections
"Matrix fragments for mma.m16n8k16", "ldmatrix", "stmatrix" and "wgmma". In short, with
``g, t = divmod(lane, 4)``: a register holds two neighbours along k of A or B, element
``2t`` and ``2t + 1`` of a row ``g``, and two of D along n.
"""

from typing import Any

import ml_dtypes
import numpy as np

from tests.gpu.emulator import descriptors
from tests.gpu.emulator.descriptors import Placement
from tests.gpu.emulator.machine import WARP, Group, Operation, Product, parts
from tests.gpu.emulator.memory import Lanes
from tests.gpu.emulator.parser import EmulationError, Number, Statement

F32 = np.float32
_DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def _stacked(group: Group, operands: Any) -> np.ndarray:
    """Registers as ``[programs, warps, g, t, register]``, of uint32."""
    values = [group.read(operand, np.uint32) for operand in operands]
    shape = (*group.shape[:1], group.warps, 8, 4, len(values))
    return np.stack(values, -1).reshape(shape)


def _a(registers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A fragment as ``[programs, warps, 16, 16]``."""
    p, w = registers.shape[:2]
    elements = registers.view(dtype).astype(F32).reshape(p, w, 8, 4, 2, 2, 2)
    # g, t, half of k, half of m, k0 -> half of m, g, half of k, t, k0
    return elements.transpose(0, 1, 5, 2, 4, 3, 6).reshape(p, w, 16, 16)


def _b(registers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """B fragment as ``[programs, warps, k, n]``, 16 by 8."""
    p, w = registers.shape[:2]
    elements = registers.view(dtype).astype(F32).reshape(p, w, 8, 4, 2, 2)
    # g, t, half of k, k0 -> half of k, t, k0, g
    return elements.transpose(0, 1, 4, 3, 5, 2).reshape(p, w, 16, 8)


def _d(registers: np.ndarray) -> np.ndarray:
    """Accumulator as ``[programs, warps, 16, n]``, with 8 columns for 4 registers."""
    p, w, _, _, count = registers.shape
    elements = registers.view(F32).reshape(p, w, 8, 4, count // 4, 2, 2)
    # g, t, eight of n, half of m, n0 -> half of m, g, eight of n, t, n0
    return elements.transpose(0, 1, 5, 2, 4, 3, 6).reshape(p, w, 16, 2 * count)


def _write_d(group: Group, operands: Any, d: np.ndarray) -> None:
    p, w = d.shape[:2]
    elements = d.reshape(p, w, 2, 8, len(operands) // 4, 4, 2)
    registers = elements.transpose(0, 1, 3, 5, 4, 2, 6).reshape(*group.shape, -1)
    for i, operand in enumerate(operands):
        group.write(operand, registers[..., i])


def _uniform(values: np.ndarray) -> Any:
    """The value on which all threads agree."""
    if (values != values.flat[0]).any():
        raise EmulationError("the threads disagree on what is the same for all")
    return values.flat[0]


def _mma(dtype: np.dtype) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        group.refuse_guard()
        d, a, b, c = map(parts, statement.operands)
        product = _a(_stacked(group, a), dtype) @ _b(_stacked(group, b), dtype)
        _write_d(group, d, product + _d(_stacked(group, c)))

    return operate


def _rows_of_matrices(
    group: Group, opcode: str, address: Any, count: int
) -> tuple[Lanes, Any]:
    """The lanes that say where rows lie, eight for each matrix, and the addresses.

    Whole warps access the rows, which is counted.
    """
    group.refuse_guard()
    addresses = group.addresses(address)
    chosen = np.flatnonzero(np.arange(group.shape[1]) % WARP < 8 * count)
    lanes = group.lanes
    by_lane = np.arange(len(lanes.warp)).reshape(group.shape)[:, chosen].ravel()
    who = Lanes(lanes.program[by_lane], lanes.warp[by_lane])
    rows = addresses[:, chosen].ravel()
    group.traffic.share(opcode, who, rows, 16)
    return who, rows


def _load_matrices(count: int, *, transposed: bool) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        destination, address = statement.operands
        who, addresses = _rows_of_matrices(group, statement.opcode, address, count)
        loaded = np.ascontiguousarray(group.shared.load(who, addresses, 16))
        by = (*group.shape[:1], group.warps, count, 8, 8)
        matrices = loaded.view(np.uint16).reshape(by)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        registers = matrices.view(np.uint32).reshape(*by[:3], WARP)
        for i, part in enumerate(parts(destination)):
            group.write(part, registers[:, :, i].reshape(group.shape))

    return operate


def _store_matrices(count: int, *, transposed: bool) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        address, source = statement.operands
        who, addresses = _rows_of_matrices(group, statement.opcode, address, count)
        registers = [group.read(part, np.uint32) for part in parts(source)]
        by = (*group.shape[:1], group.warps, WARP)
        matrices = np.stack([r.reshape(by) for r in registers], 2)
        matrices = matrices.view(np.uint16).reshape(*by[:2], count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        rows = np.ascontiguousarray(matrices.reshape(len(addresses), 8))
        group.shared.store(who, addresses, rows.view(np.uint8))

    return operate


def _from_shared(
    group: Group, found: np.ndarray, extent: int, dtype: np.dtype, transposed: bool
) -> np.ndarray:
    """An operand of every warpgroup: ``[programs, warpgroups, extent, 16]``."""
    operands = descriptors.load(
        group.shared,
        np.repeat(np.arange(len(found)), found.shape[1]),
        [Placement.of(int(d), descriptors.WGMMA) for d in found.flat],
        extent,
        dtype,
        transposed=transposed,
    )
    return operands.reshape(*found.shape, extent, 16)


def _descriptors(group: Group, operand: Any) -> np.ndarray:
    """One for each warpgroup, on which its threads agree."""
    values = group.read(operand, np.uint64)
    values = values.reshape(group.shape[0], group.warps // 4, -1)
    if (values != values[..., :1]).any():
        raise EmulationError("the threads of a warpgroup disagree on a descriptor")
    return values[..., 0]


def _wgmma(n: int, dtype: np.dtype) -> Operation:
    """m64 by n by k16; computed when a wait says so, registers read then."""

    def operate(group: Group, statement: Statement) -> None:
        group.refuse_guard()
        d, a, b, scale, *signs = statement.operands
        in_registers = len(parts(a)) == 4
        transposed = [sign == Number("1") for sign in signs[2:]]
        if signs[:2] != [Number("1")] * 2 or len(signs) != 4 - in_registers:
            raise EmulationError("signs of wgmma other than 1, or operands too many")
        keep = _uniform(group.read(scale, np.bool_))
        operands = [b] if in_registers else [b, a]
        placed = [_descriptors(group, operand) for operand in operands]

        def compute(group: Group, b: np.ndarray, *in_shared: np.ndarray) -> None:
            shape = (*b.shape, 64, 16)
            if in_registers:
                left = _a(_stacked(group, parts(a)), dtype).reshape(shape)
            else:
                left = _from_shared(group, *in_shared, 64, dtype, transposed[0])
            right = _from_shared(group, b, n, dtype, transposed[-1])
            product = (left @ right.swapaxes(-1, -2)).reshape(-1, group.warps, 16, n)
            if keep:
                product += _d(_stacked(group, parts(d)))
            _write_d(group, parts(d), product)

        group.products[-1].append(Product(compute, placed))

    return operate


def _commit(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    group.products.append([])


def _wait(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    (left,) = statement.operands
    assert isinstance(left, Number)
    closed = max(0, len(group.products) - 1 - left.bits(32))
    for products in group.products[:closed]:
        for product in products:
            product.compute(group, *product.descriptors)
    group.products = group.products[closed:]


def _nothing(group: Group, statement: Statement) -> None:
    """Orders what the emulator does in order."""


def _fence(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    group.shared.fence()


OPERATIONS: dict[str, Operation] = {
    **{
        f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32": _mma(dtype)
        for t, dtype in _DTYPES.items()
    },
    **{
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16": _load_matrices(
            count, transposed=bool(trans)
        )
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    },
    **{
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16": _store_matrices(
            count, transposed=bool(trans)
        )
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    },
    **{
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t}": _wgmma(n, dtype)
        for n in range(8, 257, 8)
        for t, dtype in _DTYPES.items()
    },
    "wgmma.fence.sync.aligned": _nothing,
    "wgmma.commit_group.sync.aligned": _commit,
    "wgmma.wait_group.sync.aligned": _wait,
    "fence.proxy.async.shared::cta": _fence,
}
