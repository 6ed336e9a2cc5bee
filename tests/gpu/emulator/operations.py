"""What every opcode does. One that is not here, with all its modifiers, is refused."""

from tests.gpu.emulator import accesses, arithmetic, matrices, mbarriers, tcgen05
from tests.gpu.emulator.machine import Operation

OPERATIONS: dict[str, Operation] = {
    **arithmetic.OPERATIONS,
    **accesses.OPERATIONS,
    **matrices.OPERATIONS,
    **mbarriers.OPERATIONS,
    **tcgen05.OPERATIONS,
}
