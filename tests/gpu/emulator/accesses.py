"""Moves between registers, threads and memories."""

import math
from typing import Any

import numpy as np

from tests.gpu.emulator.machine import WARP, Group, Operation, parts
from tests.gpu.emulator.memory import Lanes
from tests.gpu.emulator.parser import (
    Address,
    EmulationError,
    Number,
    Operand,
    Register,
    Statement,
    Symbol,
)
from tests.gpu.emulator.shared_memory import Copy

_VECTORS = ("", ".v2", ".v4")


def _move(bits: int) -> Operation:
    """mov, which also packs and unpacks vectors."""

    def operate(group: Group, statement: Statement) -> None:
        destination, source = statement.operands
        whole = np.dtype(f"u{bits // 8}") if bits > 1 else np.bool_
        pieces = [f"u{bits // 8 // len(parts(o))}" for o in (source, destination)]
        if bits == 1:
            pieces = [np.bool_, np.bool_]
        values = [_piece(group, part, pieces[0], source) for part in parts(source)]
        joined = np.stack(values, -1).view(whole)[..., 0]
        split = joined[..., None].view(pieces[1])
        for i, part in enumerate(parts(destination)):
            group.write(part, split[..., i])

    return operate


def _piece(group: Group, part: Operand, dtype: Any, whole: Operand) -> np.ndarray:
    """Reads a part of a vector, or garbage, where the compiler wants nothing of it."""
    unwritten = isinstance(part, Register) and part.name not in group.registers
    if part is not whole and unwritten:
        return np.full(group.shape, -1).astype(dtype)
    return group.read(part, dtype)


def _load_parameter(group: Group, statement: Statement) -> None:
    destination, address = statement.operands
    assert isinstance(address, Address)
    assert isinstance(address.base, Symbol)
    number = list(group.kernel.parameters).index(address.base.name)
    start = np.full(group.shape, group.memory.buffers[number].start, np.uint64)
    group.write(destination, start)


def _load(space: str, bits: int, kind: str) -> Operation:
    element = f"i{bits // 8}" if kind == "s" else f"u{bits // 8}"

    def operate(group: Group, statement: Statement) -> None:
        vector, address = statement.operands
        count = len(parts(vector))
        size = count * bits // 8
        who, here = group.acting()
        addresses = group.addresses(address).ravel()[here]
        if space == "global":
            group.traffic.load(who, addresses, size)
            loaded = group.memory.load(addresses, size)
        else:
            group.traffic.share(statement.opcode, who, addresses, size)
            loaded = group.shared.load(who, addresses, size)
        values = np.zeros((math.prod(group.shape), size), np.uint8)
        values[here] = loaded
        values = values.view(element).reshape(*group.shape, count)
        for i, register in enumerate(parts(vector)):
            width = getattr(register, "width", bits)
            group.write(register, values[..., i].astype(f"u{width // 8}"))

    return operate


def _store(space: str, bits: int) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        address, vector = statement.operands
        who, here = group.acting()
        values = []
        for part in parts(vector):
            width = getattr(part, "width", bits)
            values.append(group.read(part, f"u{width // 8}").astype(f"u{bits // 8}"))
        values = np.stack(values, -1).view(np.uint8).reshape(math.prod(group.shape), -1)
        addresses = group.addresses(address).ravel()[here]
        if space == "global":
            group.memory.store(addresses, values[here])
        else:
            group.traffic.share(statement.opcode, who, addresses, values.shape[1])
            group.shared.store(who, addresses, values[here])

    return operate


def _copy(group: Group, statement: Statement) -> None:
    """cp.async: what it reads arrives when a wait says so."""
    destination, source, size, *last = statement.operands
    assert isinstance(size, Number)
    size = size.bits(32)
    who, here = group.acting()
    to = group.addresses(destination).ravel()[here]
    values = np.zeros((len(to), size), np.uint8)
    wanted = ~_ignored(group, size, *last).ravel()[here]
    addresses = group.addresses(source).ravel()[here]
    chosen = Lanes(who.program[wanted], who.warp[wanted])
    group.traffic.load(chosen, addresses[wanted], size)
    group.traffic.share(statement.opcode, who, to, size)
    values[wanted] = group.memory.load(addresses[wanted], size)
    copy = Copy(who, to, values)
    group.shared.begin(copy)
    group.copies[-1].append(copy)


def _ignored(group: Group, size: int, last: Operand | None = None) -> np.ndarray:
    """Which threads fill up with zeros: a predicate says so, or no bytes to read."""
    if last is None:
        return np.zeros(group.shape, bool)
    if isinstance(last, Register) and last.width == 1:
        return group.read(last, np.bool_)
    sizes = group.read(last, np.uint32)
    if not np.isin(sizes, (0, size)).all():
        raise EmulationError("cp.async of a part of its size")
    return sizes == 0


def _commit_copies(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    group.copies.append([])


def _wait_copies(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    (left,) = statement.operands
    assert isinstance(left, Number)
    closed = len(group.copies) - 1 - left.bits(32)
    for copies in group.copies[: max(0, closed)]:
        for copy in copies:
            group.shared.end(copy)
    group.copies = group.copies[max(0, closed) :]


def _barrier(group: Group, statement: Statement) -> None:
    if statement.operands != (Number("0"),):
        raise EmulationError("a barrier for some threads, or another than the first")
    group.barrier()


def _nothing(group: Group, statement: Statement) -> None:
    """Orders what the emulator does in order."""


def _shuffle(mode: str) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        destination, source, lane, clamp, members = statement.operands
        group.refuse_guard()
        if [clamp, members] != [Number("31"), Number("-1")]:
            raise EmulationError("a shuffle of a part of a warp")
        by = (*group.shape[:1], group.warps, WARP)
        own = np.arange(WARP)
        lane = group.read(lane, np.uint32).reshape(by).astype(np.intp)
        chosen = own ^ lane if mode == "bfly" else lane & 31
        if chosen.max() >= WARP:
            raise EmulationError("a shuffle with no lane")
        values = group.read(source, np.uint32).reshape(by)
        found = np.take_along_axis(values, chosen, -1)
        group.write(destination, found.reshape(group.shape))

    return operate


def _largest(group: Group, statement: Statement) -> None:
    destination, source, members = statement.operands
    group.refuse_guard()
    if members != Number("-1"):
        raise EmulationError("a reduction over a part of a warp")
    values = group.read(source, np.float32).reshape(group.shape[0], group.warps, WARP)
    found = np.fmax.reduce(values, -1, keepdims=True)
    found = np.broadcast_to(found, values.shape)
    group.write(destination, found.reshape(group.shape))


OPERATIONS: dict[str, Operation] = {
    # Moves.
    **{
        f"mov.{t}{bits}": _move(bits)
        for bits in (16, 32, 64)
        for t in ("b", "u", "s", "f")
    },
    "mov.pred": _move(1),
    **{f"shfl.sync.{mode}.b32": _shuffle(mode) for mode in ("bfly", "idx")},
    "redux.sync.max.f32": _largest,
    # Memory.
    "ld.param.b64": _load_parameter,
    "ld.param.u64": _load_parameter,
    "ld.param::entry.b64": _load_parameter,
    **{
        f"ld.{space}{vector}.{t}{bits}": _load(space, bits, t)
        for space in ("global", "shared")
        for vector in _VECTORS
        for bits in (8, 16, 32, 64)
        for t in ("b", "u", "s", "f")
    },
    **{
        f"st.{space}{vector}.{t}{bits}": _store(space, bits)
        for space in ("global", "shared")
        for vector in _VECTORS
        for bits in (8, 16, 32, 64)
        for t in ("b", "u", "f")
    },
    "cp.async.ca.shared.global": _copy,
    "cp.async.cg.shared.global": _copy,
    "cp.async.commit_group": _commit_copies,
    "cp.async.wait_group": _wait_copies,
    "bar.sync": _barrier,
    "barrier.sync": _barrier,
    "bar.warp.sync": _nothing,
    "griddepcontrol.wait": _nothing,
}
