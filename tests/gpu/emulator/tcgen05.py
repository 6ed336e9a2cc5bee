"""The tensor cores of Blackwell: products in tensor memory, and what moves it.

Sources: PTX ISA 9.2, "TensorCore 5th Generation Family Instructions". Which thread
holds which word: "Data Movement Shape", and NVIDIA/cutlass, 0d2b201e8c1c,
include/cute/atom/copy_traits_sm100.hpp. Which lanes a product takes: "Data Path Layout
Organization", D and F, and triton-lang/triton, tensorMemoryToLinearLayout in
lib/Dialect/TritonGPU/IR/LinearLayoutConversions.cpp. The bits of an instruction:
"Instruction Descriptor", and cutlass, include/cute/arch/mma_sm100_desc.hpp.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from tests.gpu.emulator import descriptors, mbarriers
from tests.gpu.emulator.descriptors import Placement
from tests.gpu.emulator.machine import WARP, Group, Operation, parts
from tests.gpu.emulator.memory import Lanes
from tests.gpu.emulator.parser import Address, EmulationError, Number, Statement
from tests.gpu.emulator.tensor_memory import TensorMemory

F32, U32 = np.float32, np.uint32
_DTYPES = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}
_K = 16


def _allocated(group: Group) -> TensorMemory:
    if group.tensor is None:
        raise EmulationError("tensor memory is not allocated")
    return group.tensor


def _one_warp(group: Group) -> Lanes:
    """The warp of each program that executes a statement."""
    who = group.acting_warps()
    if not np.array_equal(who.program, np.arange(group.shape[0])):
        raise EmulationError("not one warp of each program")
    return who


def _uniform(values: np.ndarray) -> int:
    if (values != values.flat[0]).any():
        raise EmulationError("the threads disagree on what is the same for all")
    return int(values.flat[0])


def _allocate(group: Group, statement: Statement) -> None:
    address, columns = statement.operands
    who = _one_warp(group)
    if group.tensor is not None:
        raise EmulationError("a second allocation of tensor memory")
    columns = _uniform(group.read(columns, U32))
    group.tensor = TensorMemory.of(group.shape[0], columns, group.shared.progress)
    start = np.full((len(who.warp), 1), group.tensor.start, U32)
    addresses = group.addresses(address)[who.program, who.warp * WARP]
    group.shared.store(who, addresses, start.view(np.uint8))


def _free(group: Group, statement: Statement) -> None:
    address, columns = statement.operands
    who = _one_warp(group)
    start = _uniform(group.read(address, U32)[who.program, who.warp * WARP])
    _allocated(group).free(who, start, _uniform(group.read(columns, U32)))
    group.tensor = None


def _relinquish(group: Group, statement: Statement) -> None:
    """Says that nothing more is allocated."""
    _one_warp(group)
    _allocated(group)


def _elect(group: Group, statement: Statement) -> None:
    vector, members = statement.operands
    if members != Number("-1"):
        raise EmulationError("an election among a part of a warp")
    group.acting_warps()
    lane, elected = parts(vector)
    # Any would do: the last, as nobody must count on the first.
    group.write(lane, np.full(group.shape, WARP - 1, U32))
    mine = np.arange(group.shape[1]) % WARP == WARP - 1
    group.write(elected, np.broadcast_to(mine, group.shape))


def _words_of_threads(shape: str, count: int, split: int) -> tuple[Any, Any]:
    """Lanes and columns of what each thread holds, ``[32, registers]``."""
    thread, register = np.indices((WARP, count))
    if shape == "32x32b":
        return thread, register
    if shape == "16x32bx2":
        return thread % 16, register + thread // 16 * split
    # As fragments of mma.sync: of A, whose pairs of k are words, and of D.
    g, t = thread // 4, thread % 4
    if shape == "16x128b":
        return g + register % 2 * 8, register // 2 * 4 + t
    return g + register // 2 % 2 * 8, register // 4 * 8 + 2 * t + register % 2


def _words(
    group: Group, shape: str, count: int, address: Any, split: int
) -> tuple[Lanes, np.ndarray, np.ndarray]:
    """The warps that act, and lanes and columns of their words, ``[warps, n]``."""
    who = group.acting_warps()
    addresses = group.addresses(address).reshape(-1, group.warps, WARP)
    addresses = addresses[who.program, who.warp].astype(np.int64)
    if (addresses != addresses[:, :1]).any():
        raise EmulationError("the threads of a warp disagree on an address")
    first = addresses[:, 0] >> 16
    if (first % (32 if shape == "32x32b" else 16)).any():
        raise EmulationError("lanes that begin at another than one of 16 or 32")
    lanes, columns = (
        array.reshape(1, -1) for array in _words_of_threads(shape, count, split)
    )
    return who, first[:, None] + lanes, (addresses[:, :1] & 0xFFFF) + columns


def _load(shape: str, count: int) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        vector, address, *split = statement.operands
        registers = _registers(vector, shape, count)
        who, *placed = _words(group, shape, count, address, *_immediate(split))
        loaded = np.zeros((group.shape[0], group.warps, WARP * count), U32)
        loaded[who.program, who.warp] = _allocated(group).load(who, *placed)
        # A thread may use what it loads before it waits: the use itself has to wait.
        for i, register in enumerate(registers):
            group.write(register, loaded.reshape(*group.shape, count)[..., i])

    return operate


def _store(shape: str, count: int) -> Operation:
    def operate(group: Group, statement: Statement) -> None:
        address, *split, vector = statement.operands
        registers = _registers(vector, shape, count)
        who, *placed = _words(group, shape, count, address, *_immediate(split))
        values = np.stack([group.read(register, U32) for register in registers], -1)
        values = values.reshape(-1, group.warps, WARP * count)
        _allocated(group).store(who, *placed, values[who.program, who.warp])

    return operate


def _loaded(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    _allocated(group).loaded()


def _stored(group: Group, statement: Statement) -> None:
    group.refuse_guard()
    _allocated(group).stored()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """What an instruction descriptor says, of A, of B where there are two."""

    m: int
    n: int
    dtypes: tuple[np.dtype, np.dtype]
    signs: tuple[int, int]
    transposed: tuple[bool, bool]

    @classmethod
    def of(cls, bits: int) -> "_Instruction":
        field = lambda low, width: bits >> low & (1 << width) - 1  # noqa: E731
        m, n = field(24, 5) << 4, field(17, 6) << 3
        # Dense, float32 sums, no shift.
        known = field(0, 7) == 1 << 4 and not field(23, 1) and not field(29, 3)
        known &= n % (8 if m == 64 else 16) == 0 and 0 < n <= 256 and m in (64, 128)
        if not known or not {field(7, 3), field(10, 3)} <= _DTYPES.keys():
            raise EmulationError(f"an unknown instruction descriptor: {bits:#x}")
        return cls(
            m,
            n,
            (_DTYPES[field(7, 3)], _DTYPES[field(10, 3)]),
            (1 - 2 * field(13, 1), 1 - 2 * field(14, 1)),
            (bool(field(15, 1)), bool(field(16, 1))),
        )

    def lanes(self, first: int) -> np.ndarray:
        """Those of its rows."""
        row = np.arange(self.m)
        if first not in ((0,) if self.m == 128 else (0, 16)):
            raise EmulationError(f"a product that begins at lane {first}")
        return first + (row if self.m == 128 else row // 16 * 32 + row % 16)


def _product(group: Group, statement: Statement) -> None:
    """m64 or m128 by n by k16: A in tensor memory or by a descriptor, as B is."""
    d, a, b, instruction, keep = statement.operands
    who, here = group.acting_thread()
    if not len(who.program):
        return
    memory, product = _allocated(group), group.shared.progress.begun
    group.shared.progress.begin(_uniform(here % group.shape[1]))
    bits = _uniform(group.read(instruction, U32).ravel()[here])
    one = _Instruction.of(bits)

    def from_shared(operand: Any, which: int, extent: int) -> np.ndarray:
        found = group.read(operand, np.uint64).ravel()[here]
        return descriptors.load(
            group.shared,
            who.program,
            [Placement.of(int(value), descriptors.TCGEN05) for value in found],
            extent,
            one.dtypes[which],
            transposed=one.transposed[which],
            product=product,
        )

    def words(address: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        first = _uniform(group.addresses(address).ravel()[here])
        lanes, columns = np.broadcast_arrays(
            one.lanes(first >> 16)[:, None], (first & 0xFFFF) + np.arange(count)
        )
        shape = len(who.program), lanes.size
        return (
            np.broadcast_to(lanes.ravel(), shape),
            np.broadcast_to(columns.ravel(), shape),
        )

    result = words(d, one.n)
    if isinstance(a, Address):
        of_a = words(a, _K // 2)
        if of_a[0][0, 0] != result[0][0, 0] or one.transposed[0]:
            raise EmulationError("A is transposed, or in other lanes than D")
        left = memory.operand(who, *of_a).view(one.dtypes[0])
        left = left.astype(F32).reshape(-1, one.m, _K)
    else:
        left = from_shared(a, 0, one.m)
    right = from_shared(b, 1, one.n)
    found = one.signs[0] * left @ (one.signs[1] * right).swapaxes(-1, -2)
    kept = group.read(keep, np.bool_).ravel()[here]
    memory.accumulate(who, *result, found.reshape(len(found), -1), kept, bits)


def _commit(group: Group, statement: Statement) -> None:
    (address,) = statement.operands
    who, here = group.acting_thread()
    if len(who.program):
        thread = _uniform(here % group.shape[1])
        mbarriers.commit(group, who, group.addresses(address).ravel()[here], thread)


def _immediate(split: list[Any]) -> tuple[int]:
    return (split[0].bits(32),) if split else (0,)


def _registers(vector: Any, shape: str, count: int) -> tuple[Any, ...]:
    registers = parts(vector)
    if len(registers) != count:
        raise EmulationError(f"{len(registers)} registers for {shape}, {count} of them")
    return registers


# Registers of a thread for each repetition.
_SHAPES = {"32x32b": 1, "16x32bx2": 1, "16x128b": 2, "16x256b": 4}

OPERATIONS: dict[str, Operation] = {
    **{
        f"tcgen05.{name}.sync.aligned.{shape}.x{times}.b32": move(shape, each * times)
        for name, move in (("ld", _load), ("st", _store))
        for shape, each in _SHAPES.items()
        for times in (1, 2, 4, 8, 16, 32, 64, 128)
        if each * times <= 128
    },
    "tcgen05.wait::ld.sync.aligned": _loaded,
    "tcgen05.wait::st.sync.aligned": _stored,
    "tcgen05.mma.cta_group::1.kind::f16": _product,
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": _commit,
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": _allocate,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": _free,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": _relinquish,
    "elect.sync": _elect,
}
