"""What the PTX of a kernel loads from device memory, by kernel parameter.

A register that holds an address derives from exactly one pointer among the parameters;
which one is found by following registers from where they are set to where they are
used.
"""

import collections
import dataclasses
import re

_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\[\s*\w+_param_(\d+)\s*\]")
_LABEL = re.compile(r"\$L\w+(?=:)")
# Destination, source, size.
_COPY = re.compile(r"cp\.async\.c[ag]\S*\s+\[[^\]]*\],\s*\[([^\]]*)\],\s*(\w+)")
_TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclasses.dataclass(frozen=True)
class Loads:
    """Loads of one thread.

    Attributes:
      before: Bytes before the hot loop, by the number of the parameter.
      loop: Bytes in one pass of the hot loop.
      copies: Bytes of each cp.async among them, which go to shared memory.
    """

    before: dict[int, int]
    loop: dict[int, int]
    copies: dict[int, list[int]]


def loads(ptx: str) -> Loads:
    """Reads the loads of a kernel with one hot loop, the longest, or with none."""
    statements = _statements(ptx)
    origins = _origins(statements)
    begin, end = _longest_loop(statements)
    before, loop = collections.Counter(), collections.Counter()
    copies = collections.defaultdict(list)
    for i, statement in enumerate(statements[: end + 1]):
        if (load := _load(statement)) is None:
            continue
        size, address = load
        (parameter,) = set().union(*(origins[r] for r in address))
        (before if i < begin else loop)[parameter] += size
        if i >= begin and statement.startswith("cp.async"):
            copies[parameter].append(size)
    return Loads(dict(before), dict(loop), dict(copies))


def _statements(ptx: str) -> list[str]:
    body = re.sub(r"//.*", "", ptx[ptx.index(".entry") :])
    # A label becomes a statement of its own.
    body = re.sub(r"^(\$L\w+:)", r"\1;", body, flags=re.MULTILINE)
    return [re.sub(r"^@!?%p\d+\s+", "", s.strip(" \t\n{}")) for s in body.split(";")]


def _load(statement: str) -> tuple[int, list[str]] | None:
    """Bytes and address registers of a load from device memory."""
    if copy := _COPY.match(statement):
        return int(copy[2], 0), _REGISTER.findall(copy[1])
    if statement.startswith("ld.global"):
        operation, address = statement.split("[", 1)
        vector = re.search(r"\.v(\d)", operation)
        size = _TYPE_BYTES[re.search(r"\.[busf](\d+)\s", operation)[1]]
        return size * int(vector[1] if vector else 1), _REGISTER.findall(address)
    return None


def _origins(statements: list[str]) -> dict[str, set[int]]:
    """The parameters from which each register's value derives, loads aside."""
    origins = collections.defaultdict(set)
    flows = []
    for statement in statements:
        registers = _REGISTER.findall(statement)
        if statement.startswith("ld.param"):
            origins[registers[0]].add(int(_PARAMETER.search(statement)[1]))
        elif registers and not statement.startswith(("ld.", "cp.", "st.", "bra")):
            flows.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for register, sources in flows:
            found = set().union(*(origins[source] for source in sources))
            if not found <= origins[register]:
                origins[register] |= found
                changed = True
    return origins


def _longest_loop(statements: list[str]) -> tuple[int, int]:
    labels = {
        s[:-1]: i for i, s in enumerate(statements) if re.fullmatch(r"\$L\w+:", s)
    }
    ranges = [
        (labels[target], i)
        for i, s in enumerate(statements)
        if s.startswith("bra") and labels.get(target := s.split()[-1], i) < i
    ]
    none = (len(statements), len(statements))
    return max(ranges, key=lambda r: r[1] - r[0], default=none)
