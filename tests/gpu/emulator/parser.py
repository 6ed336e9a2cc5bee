"""PTX as text -> statements.

Names are resolved here: every register carries its width, and the registers and labels
of a block of inline assembly are told apart from those of the next one.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple


class EmulationError(Exception):
    """What a GPU would do wrong, or what the emulator does not know."""


class Register(NamedTuple):
    """A register, of so many bits: 1 for a predicate."""

    name: str
    width: int


class Number(NamedTuple):
    """A literal, as written."""

    text: str

    def bits(self, width: int) -> int:
        """The bit pattern, of ``width`` bits."""
        if found := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", self.text):
            if width != {"f": 32, "d": 64}[found[1]]:
                raise EmulationError(f"{self.text} where {width} bits are wanted")
            return int(found[2], 16)
        return int(self.text.rstrip("U"), 0) & (1 << width) - 1


class Symbol(NamedTuple):
    """A label, a parameter, an array in shared memory, or a special register."""

    name: str


class Vector(NamedTuple):
    """Registers or literals in braces, or two registers with a bar between them."""

    parts: tuple["Operand", ...]


class Address(NamedTuple):
    """What stands in brackets."""

    base: "Operand"
    offset: int


Operand = Register | Number | Symbol | Vector | Address


@dataclasses.dataclass(frozen=True)
class Statement:
    """An instruction.

    Attributes:
      text: As written, for messages.
      opcode: With all its modifiers.
      operands: The destination first.
      guard: The predicate under which it has an effect, or None.
      negated: Whether that must be false.
    """

    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An entry.

    Attributes:
      parameters: Names, each with the alignment of what it points to.
      threads: Of a program.
      statements: In order.
      labels: The number of the statement that follows each.
    """

    parameters: dict[str, int]
    threads: int
    statements: list[Statement]
    labels: dict[str, int]


_ENTRY = re.compile(
    r"\.entry\s+\w+\((?P<parameters>.*?)\)(?P<directives>[^{]*)\{", re.S
)
_PARAMETER = re.compile(r"\.param \.u64(?: \.ptr(?: \.global)? \.align (\d+))? (\w+)")
_BLOCK = re.compile(r"\s*(?:([{}])|(\$?\w+):|([^;{}][^;]*);)")
_DECLARATION = re.compile(r"\.reg \.(pred|[bsuf]\d+)\s+(.+)", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_PART = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"(\S+?)\s*(?:\+\s*(-?\w+)\s*)?")


def parse(ptx: str) -> Kernel:
    """Reads a text with one entry."""
    text = re.sub(r"//[^\n]*", "", ptx)
    (entry,) = _ENTRY.finditer(text)
    parameters = {
        name: int(align or 1) for align, name in _PARAMETER.findall(entry["parameters"])
    }
    if len(parameters) != entry["parameters"].count(".param"):
        raise EmulationError(f"parameters that are not pointers: {entry['parameters']}")
    threads = re.search(r"\.reqntid (\d+)", entry["directives"])
    if threads is None:
        raise EmulationError(f"no .reqntid among {entry['directives']!r}")
    statements, labels = [], {}
    for label, statement in _statements(text[entry.end() :]):
        if label:
            labels[label] = len(statements)
        else:
            statements.append(statement)
    return Kernel(parameters, int(threads[1]), statements, labels)


def _statements(body: str) -> Iterator[tuple[str, Statement | None]]:
    """Yields labels and statements up to the brace that ends the entry."""
    position, blocks, scopes = 0, 0, [_Scope("", {}, {})]
    while scopes:
        found = _BLOCK.match(body, position)
        if found is None:
            raise EmulationError(f"no statement: {body[position : position + 60]!r}")
        position = found.end()
        brace, label, text = found.groups()
        if brace == "{":
            blocks += 1
            scopes.append(scopes[-1].inner(f"@{blocks}"))
        elif brace == "}":
            scopes.pop()
        elif label:
            yield scopes[-1].label(label), None
        elif declared := _DECLARATION.match(text):
            scopes[-1].declare(declared[1], declared[2])
        elif text.startswith("."):
            raise EmulationError(f"unknown directive: {text}")
        else:
            yield "", scopes[-1].statement(" ".join(text.split()))


class _Scope(NamedTuple):
    """Registers and labels by name, and registers declared as a range by prefix."""

    suffix: str
    names: dict[str, Register | Symbol]
    ranges: dict[str, int]

    def inner(self, suffix: str) -> "_Scope":
        return _Scope(suffix, dict(self.names), self.ranges)

    def declare(self, kind: str, names: str) -> None:
        width = 1 if kind == "pred" else int(kind[1:])
        for name in re.split(r"\s*,\s*", names):
            if found := re.fullmatch(r"(%[a-z]+)<\d+>", name):
                self.ranges[found[1]] = width
            else:
                self.names[name] = Register(name + self.suffix, width)

    def label(self, name: str) -> str:
        """Declares one, for the statements that follow it."""
        self.names[name] = Symbol(name + self.suffix)
        return name + self.suffix

    def statement(self, text: str) -> Statement:
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise EmulationError(f"no instruction: {text}")
        negated, guard, opcode, rest = found.groups()
        if _PART.sub("", rest).strip(" ,"):
            raise EmulationError(f"operands not understood: {text}")
        operands = tuple(map(self.operand, _PART.findall(rest)))
        register = self.register(guard) if guard else None
        return Statement(text, opcode, operands, register, bool(negated))

    def register(self, name: str) -> Register | None:
        if isinstance(known := self.names.get(name), Register):
            return known
        prefix = name.rstrip("0123456789")
        if prefix in self.ranges:
            return Register(name, self.ranges[prefix])
        return None

    def operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(map(self.operand, _PART.findall(text[1:-1]))))
        if text[0] == "[":
            found = _ADDRESS.fullmatch(text[1:-1].strip())
            if found is None:
                raise EmulationError(f"no address: {text}")
            return Address(self.operand(found[1]), int(found[2] or "0", 0))
        if "|" in text:
            return Vector(tuple(map(self.operand, text.split("|"))))
        if re.match(r"-?\d", text):
            return Number(text)
        return self.register(text) or self.names.get(text) or Symbol(text)
