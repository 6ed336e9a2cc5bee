"""Machine code of a kernel as `nvdisasm` prints it: its loops, and what is in them."""

import collections
import re
from typing import NamedTuple

# Opcode (modifiers left out) -> class. The first pattern that matches counts.
CLASSES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("HGMMA", "[HIQ]GMMA"),
        ("UTCMMA", "UTC[HIQO]MMA"),
        ("HMMA", "[HIQ]?MMA"),
        ("spill", "STL|LDL"),
        ("uniform", "U[A-Z]|R2UR|VOTEU"),
        ("barrier", "BAR|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|SYNCS|MEMBAR|ERRBAR|CCTL"),
        ("LOP3", "LOP3"),
        ("PRMT", "PRMT"),
        ("shift", "SHF|SHL|SHR|SGXT|BFE"),
        ("FFMA", "FFMA|FADD|FMUL|FSEL|FMNMX"),
        ("half", "HFMA2|HADD2|HMUL2|HSET|HMNMX"),
        ("convert", "I2F|I2FP|F2I|F2F|F2FP|I2I|FRND"),
        ("move", "MOV|CS2R|S2R|SEL|SHFL|R2P|P2R"),
        ("address", "IMAD|IADD|VIADD|LEA|IABS|IMNMX|VIMNMX|ISETP|PLOP3|ISET"),
        ("control", "BRA|BSSY|BSYNC|EXIT|CALL|RET|VOTE|LDC|ULDC|NANOSLEEP|YIELD"),
    )
)
# Classes of their own, with the bits of an access: LDGSTS.128 is cp.async.
MEMORY = ("LDGSTS", "LDG", "LDSM", "LDS", "STS", "STG", "RED", "ATOM")
_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "16": 16, "U8": 8, "S8": 8}
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """One instruction, without its predicate."""

    text: str
    target: str | None = None  # label that it may jump to

    @property
    def kind(self) -> str:
        """Class of the instruction, for a histogram."""
        operation, *modifiers = self.text.split()[0].split(".")
        if operation in MEMORY:
            bits = [_WIDTHS[part] for part in modifiers if part in _WIDTHS]
            return f"{operation}.{bits[0] if bits else 32}"
        names = (name for name, pattern in CLASSES if pattern.match(operation))
        return next(names, operation)


class Loop(tuple[Instruction, ...]):
    """The instructions of one pass of a loop."""

    __slots__ = ()

    @property
    def histogram(self) -> dict[str, int]:
        """Instructions by class, the most frequent first."""
        return dict(collections.Counter(i.kind for i in self).most_common())

    @property
    def matrix(self) -> int:
        """Tensor-core instructions; those of a warp group do the work of sixteen."""
        groups = self.number("HGMMA") + self.number("UTCMMA")
        return self.number("HMMA") + 16 * groups

    def number(self, prefix: str) -> int:
        """Counts the instructions whose class starts so: all STS, or STS.128 alone."""
        return sum(i.kind.startswith(prefix) for i in self)


def kernels(disassembly: str) -> dict[str, Loop]:
    """Returns the instructions of every kernel of ``nvdisasm -c`` by name."""
    parts = re.split(r"^\.text\.(\w+):$", disassembly, flags=re.MULTILINE)[1:]
    return {
        name: Loop(i for i in _read(body) if isinstance(i, Instruction))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def loops(disassembly: str) -> dict[str, list[Loop]]:
    """Returns the innermost loops of every kernel, in the order of the program."""
    parts = re.split(r"^\.text\.(\w+):$", disassembly, flags=re.MULTILINE)[1:]
    return {
        name: _innermost(_read(body))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _read(body: str) -> list[Instruction | str]:
    """Instructions and labels in order, without the padding of ptxas."""
    items: list[Instruction | str] = []
    for line in body.splitlines():
        if line.lstrip().startswith(".section"):
            break
        if label := _LABEL.match(line):
            items.append(label[1])
        elif (found := _LINE.match(line)) and not found[1].startswith("@!PT "):
            text = re.sub(r"^@!?U?P\w+\s+", "", found[1])
            if text.split()[0] != "NOP":
                target = _TARGET.search(text)
                items.append(Instruction(text, target and target[1]))
    return items


def _innermost(items: list[Instruction | str]) -> list[Loop]:
    labels = {item: i for i, item in enumerate(items) if isinstance(item, str)}
    ranges = [
        (labels[item.target], i)
        for i, item in enumerate(items)
        if isinstance(item, Instruction)
        and item.text.startswith("BRA")
        # Every kernel ends in a jump to itself, which is no loop.
        and labels.get(item.target, i) < i - 1
    ]
    inner = [
        (start, end)
        for start, end in ranges
        if not any(
            start <= other[0] and other[1] <= end and other != (start, end)
            for other in ranges
        )
    ]
    return [
        Loop(i for i in items[start : end + 1] if isinstance(i, Instruction))
        for start, end in inner
    ]
