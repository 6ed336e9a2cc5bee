"""Barriers in shared memory that tell of the end of products.

Only what a compiler makes of it: a single arrival, which a commit of products promises,
ends a phase; waits are for the end of a phase by its parity. As late as can be, that is
when a wait asks for it, the products are complete.
"""

import numpy as np

from tests.gpu.emulator.machine import Group, Operation
from tests.gpu.emulator.memory import GARBAGE, Lanes
from tests.gpu.emulator.parser import EmulationError, Number, Statement

# What lies in shared memory: a mark, how many phases have ended, and the products whose
# end is to end this one (or 0), and has ended the last.
_WORD = np.dtype([(name, "<u2") for name in ("mark", "ended", "due", "last")])
_MARK = 0xBA44


def _words(group: Group, who: Lanes, addresses: np.ndarray) -> np.ndarray:
    words = group.shared.load(who, addresses, _WORD.itemsize).view(_WORD)[:, 0]
    if (words["mark"] != _MARK).any():
        raise EmulationError("no mbarrier is there")
    return words


def _bytes(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint8).reshape(len(words), _WORD.itemsize)


def _initialize(group: Group, statement: Statement) -> None:
    address, count = statement.operands
    if count != Number("1"):
        raise EmulationError("an mbarrier that takes several arrivals")
    who, here = group.acting_thread()
    words = np.zeros(len(who.warp), _WORD)
    words["mark"] = _MARK
    group.shared.store(who, group.addresses(address).ravel()[here], _bytes(words))


def _invalidate(group: Group, statement: Statement) -> None:
    (address,) = statement.operands
    who, here = group.acting_thread()
    addresses = group.addresses(address).ravel()[here]
    if _words(group, who, addresses)["due"].any():
        raise EmulationError("an mbarrier is given up that nobody has waited for")
    nothing = np.full((len(addresses), _WORD.itemsize), GARBAGE, np.uint8)
    group.shared.store(who, addresses, nothing)


def commit(group: Group, who: Lanes, addresses: np.ndarray, thread: int) -> None:
    """Lets mbarriers tell of the end of the products that a thread has begun."""
    words = _words(group, who, addresses)
    if words["due"].any():
        raise EmulationError("an mbarrier is committed to before it was waited for")
    # Who has waited without a barrier after it may see the next phase only.
    group.shared.touch(who, addresses, _WORD.itemsize)
    words["due"] = group.shared.progress.commit(thread)
    group.shared.replace(who.program, addresses, _bytes(words))


def _wait(group: Group, statement: Statement) -> None:
    destination, address, parity = statement.operands
    who, here = group.acting()
    addresses = group.addresses(address).ravel()[here]
    parity = group.read(parity, np.uint32).ravel()[here]
    words = _words(group, who, addresses)
    ends = words["ended"] % 2 == parity
    if not words["due"][ends].all():
        raise EmulationError("an mbarrier is waited for that nothing will arrive at")
    words["last"][ends] = words["due"][ends]
    words["due"][ends] = 0
    words["ended"][ends] += 1
    group.shared.replace(who.program, addresses, _bytes(words))
    group.shared.progress.learn(who, words["last"])
    group.write(destination, np.ones(group.shape, bool))


OPERATIONS: dict[str, Operation] = {
    "mbarrier.init.shared::cta.b64": _initialize,
    "mbarrier.inval.shared::cta.b64": _invalidate,
    "mbarrier.try_wait.parity.shared::cta.b64": _wait,
}
