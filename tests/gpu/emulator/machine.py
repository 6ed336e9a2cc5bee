"""Runs a kernel: all threads of all programs in step, one statement at a time.

A register is an array ``[programs, threads]`` of bit patterns. Programs that branch
another way than the others go on as a group of their own; threads of a program that
jump elsewhere idle there until the others come, too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tests.gpu.emulator.memory import DeviceMemory, Lanes
from tests.gpu.emulator.parser import (
    Address,
    EmulationError,
    Kernel,
    Number,
    Operand,
    Register,
    Statement,
    Symbol,
    Vector,
)
from tests.gpu.emulator.shared_memory import SHARED, Copy, SharedMemory
from tests.gpu.emulator.tensor_memory import TensorMemory
from tests.gpu.emulator.traffic import Traffic

WARP = 32
_DTYPES = {1: np.dtype(bool)} | {
    bits: np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A wgmma under way.

    Attributes:
      compute: Takes the group of programs that wait for it, and the descriptors.
      descriptors: Of operands in shared memory, ``[programs, warpgroups]``.
    """

    compute: Callable[..., None]
    descriptors: Sequence[np.ndarray]

    def take(self, programs: np.ndarray) -> "Product":
        """Returns that of some of the programs."""
        return Product(self.compute, [d[programs] for d in self.descriptors])


@dataclasses.dataclass
class Group:
    """Programs that are at the same statement.

    Attributes:
      kernel: What they run.
      memory: Of the device.
      traffic: Counts the accesses.
      shared: Of the programs.
      place: Where they are in the grid, ``[programs, 3]``.
      grid: Its extents.
      registers: By name.
      counter: The next statement.
      copies: Groups of cp.async, the last one open.
      products: Those of wgmma, likewise.
      tensor: Tensor memory, while it is allocated.
      mask: Which threads execute the statement; None for all.
      idle: Which threads wait for the others to come to a statement; None for none.
      rejoin: That statement.
    """

    kernel: Kernel
    memory: DeviceMemory
    traffic: Traffic
    shared: SharedMemory
    place: np.ndarray
    grid: tuple[int, ...]
    registers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counter: int = 0
    copies: list[list[Copy]] = dataclasses.field(default_factory=lambda: [[]])
    products: list[list[Product]] = dataclasses.field(default_factory=lambda: [[]])
    tensor: TensorMemory | None = None
    mask: np.ndarray | None = None
    idle: np.ndarray | None = None
    rejoin: int = 0

    def __post_init__(self):
        self.shape = len(self.place), self.kernel.threads
        self.warps = self.kernel.threads // WARP
        self._constants = {}
        program, thread = np.indices(self.shape)
        self.lanes = Lanes(program.ravel(), thread.ravel() // WARP)

    def take(self, programs: np.ndarray, counter: int) -> "Group":
        """Returns some of the programs, at a statement of their own."""
        shared = self.shared.take(programs)
        tensor = self.tensor and self.tensor.take(programs, shared.progress)
        return Group(
            self.kernel,
            self.memory,
            self.traffic,
            shared,
            self.place[programs],
            self.grid,
            {name: array[programs] for name, array in self.registers.items()},
            counter,
            [[copy.take(programs) for copy in copies] for copies in self.copies],
            [[one.take(programs) for one in products] for products in self.products],
            tensor,
        )

    def read(self, operand: Operand, dtype: Any) -> np.ndarray:
        """Reads a register or a literal as elements of ``dtype``.

        Several of them, if they are narrower than the register: ``[programs, n]``.
        """
        if isinstance(operand, Register):
            if operand.name not in self.registers:
                raise EmulationError(f"{operand.name} is read before it is written")
            return self.registers[operand.name].view(dtype)
        width = 8 * np.dtype(dtype).itemsize
        if np.dtype(dtype) == bool:
            width = 1
        return self.constant(operand, width).view(dtype)

    def constant(self, operand: Operand, width: int) -> np.ndarray:
        """Returns what is no register as an array of bit patterns."""
        key = operand, width
        if key not in self._constants:
            value = self._value(operand, width)
            spread = np.broadcast_to(value, self.shape).astype(_DTYPES[width])
            self._constants[key] = spread
        return self._constants[key]

    def _value(self, operand: Operand, width: int) -> Any:
        if isinstance(operand, Number):
            return operand.bits(width)
        if isinstance(operand, Symbol):
            register, _, axis = operand.name.partition(".")
            i = "xyz".find(axis or "?")
            if operand.name == "%tid.x":
                return np.arange(self.kernel.threads)
            if register == "%ctaid" and i >= 0:
                return self.place[:, i, None]
            if register == "%nctaid" and i >= 0:
                return self.grid[i]
            if operand.name == "global_smem":
                return SHARED
        raise EmulationError(f"unknown operand: {operand}")

    def write(self, register: Operand, values: np.ndarray) -> None:
        """Writes all threads, or those for which the guard is true."""
        if register == Symbol("_"):
            return
        if not isinstance(register, Register):
            raise EmulationError(f"no register to write to: {register}")
        dtype = _DTYPES[register.width]
        values = np.ascontiguousarray(values)
        if values.dtype != dtype:
            values = values.view(dtype)
        if values.shape != self.shape:
            raise EmulationError(
                f"{register} does not hold {values.dtype} {values.shape}"
            )
        if self.mask is not None:
            known = self.registers.get(register.name)
            if known is None:
                known = np.full(self.shape, -1 if register.width > 1 else 0)
                known = known.astype(dtype)
            values = np.where(self.mask, values, known)
        self.registers[register.name] = values

    def addresses(self, address: Operand) -> np.ndarray:
        """Returns what stands in brackets, ``[programs, threads]``."""
        if not isinstance(address, Address):
            raise EmulationError(f"no address: {address}")
        width = getattr(address.base, "width", 64)
        base = self.read(address.base, _DTYPES[width]).astype(np.uint64)
        return base + np.uint64(address.offset & (1 << 64) - 1)

    def refuse_guard(self) -> None:
        """Checks that a statement which warps execute as one is for all threads."""
        if self.mask is not None:
            raise EmulationError("a guard on what is done by a warp as one")

    def acting(self) -> tuple[Lanes, Any]:
        """Returns the threads for which the guard is true, and how to index by them."""
        if self.mask is None:
            return self.lanes, np.s_[:]
        here = np.flatnonzero(self.mask)
        lanes = Lanes(self.lanes.program[here], self.lanes.warp[here])
        return lanes, here

    def acting_thread(self) -> tuple[Lanes, np.ndarray]:
        """Returns the same, where one thread of a program may act, or none."""
        who, here = self.acting()
        if len(np.unique(who.program)) != len(who.program):
            raise EmulationError("several threads do what one of them has to")
        return who, np.arange(self.lanes.program.size)[here]

    def acting_warps(self) -> Lanes:
        """Returns the warps that execute a statement as one, a row each."""
        mask = np.ones(self.shape, bool) if self.mask is None else self.mask
        by_warp = mask.reshape(len(mask), self.warps, WARP)
        if (by_warp != by_warp[..., :1]).any():
            raise EmulationError("a guard on what is done by a warp as one")
        return Lanes(*np.nonzero(by_warp[..., 0]))

    def barrier(self) -> None:
        """All threads have come here."""
        self.refuse_guard()
        self.shared.barrier()
        if self.tensor is not None:
            self.tensor.barrier()


Operation = Callable[[Group, Statement], None]


def run(
    kernel: Kernel,
    operations: Mapping[str, Operation],
    operands: Sequence[np.ndarray],
    outputs: Sequence[int],
    grid: tuple[int, ...],
    shared: int,
) -> tuple[list[np.ndarray], Traffic]:
    """Runs every program of a grid.

    Args:
      kernel: As `parser.parse` reads it.
      operations: What each opcode does.
      operands: What the first parameters point to.
      outputs: Bytes of what the others point to.
      grid: Three extents.
      shared: Bytes of shared memory of a program.

    Returns:
      The bytes of every output, and what the accesses to memory cost.

    Raises:
      EmulationError: Where one does what it must not, or is not known.
    """
    if len(kernel.parameters) != len(operands) + len(outputs):
        raise EmulationError(
            f"{len(kernel.parameters)} parameters for {len(operands)} operands and "
            f"{len(outputs)} outputs"
        )
    align = max(16, *kernel.parameters.values())
    memory = DeviceMemory(operands, outputs, align)
    # The x axis is the fastest.
    place = np.indices(grid[::-1]).reshape(3, -1)[::-1].T
    traffic = Traffic()
    of_programs = SharedMemory.of(len(place), kernel.threads // WARP, shared)
    groups = [Group(kernel, memory, traffic, of_programs, place, grid)]
    with np.errstate(all="ignore"):
        while groups:
            groups += _advance(groups.pop(), operations)
    return [b.data for b in memory.buffers if b.written is not None], traffic


def _advance(group: Group, operations: Mapping[str, Operation]) -> list[Group]:
    """Runs a group to its end, or to where it parts."""
    statements = group.kernel.statements
    while group.counter < len(statements):
        statement = statements[group.counter]
        if group.counter == group.rejoin:
            group.idle = None
        group.counter += 1
        try:
            if statement.opcode == "ret" and statement.guard is None:
                return _end(group)
            if parted := _step(group, statement, operations):
                return parted
        except EmulationError as error:
            where = f"statement {group.counter - 1}: {statement.text}"
            raise EmulationError(f"{error}; {where}") from error
    raise EmulationError("the kernel ends without ret")


def _end(group: Group) -> list[Group]:
    if group.idle is not None:
        raise EmulationError("the threads of a program part")
    if group.tensor is not None:
        raise EmulationError("tensor memory is not freed")
    return []


def _step(
    group: Group, statement: Statement, operations: Mapping[str, Operation]
) -> list[Group]:
    """Runs a statement; returns the groups that the programs part into, if they do."""
    if statement.opcode in ("bra", "bra.uni"):
        return _branch(group, statement)
    if statement.opcode not in operations:
        raise EmulationError(f"unknown opcode {statement.opcode}")
    group.mask = _mask(group, statement)
    operations[statement.opcode](group, statement)
    return []


def _mask(group: Group, statement: Statement) -> np.ndarray | None:
    mask = None if group.idle is None else ~group.idle
    if statement.guard is None:
        return mask
    guard = group.read(statement.guard, bool) != statement.negated
    return guard if mask is None else guard & mask


def _branch(group: Group, statement: Statement) -> list[Group]:
    """Moves a group, or returns the two that it becomes."""
    (label,) = statement.operands
    if not isinstance(label, Symbol) or label.name not in group.kernel.labels:
        raise EmulationError(f"no label: {label}")
    target = group.kernel.labels[label.name]
    mask = _mask(group, statement)
    if group.idle is not None:
        if statement.guard is not None:
            raise EmulationError("the threads of a program part")
        if target > group.rejoin:
            # Who is behind goes on; these wait until the others come.
            group.idle = ~group.idle
            group.rejoin, target = target, group.rejoin
        group.counter = target
        return []
    taken = np.ones(1, bool) if mask is None else mask[:, 0]
    if mask is not None and (mask != taken[:, None]).any():
        group.idle, group.rejoin = mask, target
        return []
    if taken.all():
        group.counter = target
    elif taken.any():
        return [group.take(~taken, group.counter), group.take(taken, target)]
    return []


def parts(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector, or the operand itself."""
    return operand.parts if isinstance(operand, Vector) else (operand,)
