"""The text of a PTX module with one kernel, as instructions."""

import re
from typing import NamedTuple

from .faults import Unknown


class Register(NamedTuple):
    """type: "pred", "b16", "b32" or "b64"."""

    name: str
    number: int
    type: str


class Immediate(NamedTuple):
    """A number, as its text: what bits it has depends on the instruction's type."""

    text: str


class Symbol(NamedTuple):
    """A name: a parameter, shared memory, a special register without its %, a label."""

    name: str


class Address(NamedTuple):
    base: object
    offset: int


class Vector(NamedTuple):
    """{a, b}"""

    parts: tuple


class Guard(NamedTuple):
    """@%p or @!%p before an instruction."""

    register: Register
    negated: bool


class Instruction(NamedTuple):
    """source: file, line and column that Triton notes for it."""

    line: int
    text: str
    source: str
    guard: Guard | None
    opcode: str
    operands: tuple

    def __str__(self) -> str:
        return f"line {self.line}: {self.text} ({self.source})"


class Parameter(NamedTuple):
    name: str
    type: str


class Program(NamedTuple):
    """labels: the number of the instruction that follows each."""

    name: str
    parameters: tuple[Parameter, ...]
    registers: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


SINK = Symbol("_")
_PARAMETER = re.compile(r"^\s*\.param\s.*?\.(\w+)\s+(?:\.ptr .*?)?(\w+)(?:\[\d+\])?,?$")
_DECLARED = re.compile(r"^\s*\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;")
_DECLARED_ALONE = re.compile(r"^\s*\.reg\s+\.(\w+)\s+(\w+);")
_LABEL = re.compile(r"^\s*([$\w]+):$")
_INSTRUCTION = re.compile(r"^\s*(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*([^;]*);$")
_SPECIAL = re.compile(r"%((?:n?ctaid|n?tid)\.[xyz]|laneid|warpid)$")


def parse(text: str) -> Program:
    name, parameters, instructions, labels, source = "", [], [], {}, ""
    first: dict[str, tuple[str, int]] = {}  # of the registers with a prefix, or of one: type and number
    registers, depth, scope = 0, 0, ""
    for line, raw in enumerate(text.splitlines(), 1):
        code, _, comment = raw.partition("//")
        code = code.rstrip()
        if code.startswith(".visible .entry"):
            name = code.split()[2].rstrip("(")
        elif code.strip() == "{":  # an inner one holds names of its own
            depth, scope = depth + 1, f"@{line}" if depth else ""
        elif code.strip() == "}":
            depth, scope = depth - 1, ""
            if not depth:
                break
        elif not depth and (match := _PARAMETER.match(code)):
            parameters.append(Parameter(match[2], match[1]))
        elif match := _DECLARED.match(code):
            first[match[2]] = match[1], registers
            registers += int(match[3])
        elif match := _DECLARED_ALONE.match(code):
            first[match[2]] = match[1], registers
            registers += 1
        elif depth and code.lstrip().startswith(".loc"):
            source = comment.strip() or source
        elif match := _LABEL.match(code):
            labels[match[1] + scope] = len(instructions)
        elif depth and code and not code.lstrip().startswith("."):
            instructions.append(_instruction(line, code, source, first, scope))
    return Program(name, tuple(parameters), registers, tuple(instructions), labels)


def parts_of(operand) -> tuple:
    """Those of a vector; any other operand alone."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _instruction(line: int, code: str, source: str, first: dict, scope: str) -> Instruction:
    match = _INSTRUCTION.match(code)
    if not match:
        raise Unknown(f"line {line}: {code.strip()}")
    guard = Guard(_register(match[2], first), match[1] == "!") if match[2] else None
    operands = tuple(_operand(part, first) for part in _split(match[4]))
    if match[3].startswith("bra"):
        operands = (Symbol(operands[0].name + scope),)
    return Instruction(line, " ".join(code.split()), source, guard, match[3], operands)


def _split(text: str) -> list[str]:
    """At commas outside braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, first: dict):
    if "|" in text:
        return Vector(tuple(_operand(part, first) for part in text.split("|")))
    if text.startswith("{"):
        return Vector(tuple(_operand(part, first) for part in _split(text[1:-1])))
    if text.startswith("["):
        if "," in text:  # a tensor, and where in it
            return Vector(tuple(_operand(part, first) for part in _split(text[1:-1])))
        base, _, offset = text[1:-1].partition("+")
        return Address(_operand(base.strip(), first), int(offset or "0", 0))
    if match := _SPECIAL.match(text):
        return Symbol(match[1])
    if text.startswith("%") or text in first:
        return _register(text, first)
    if text[0].isdigit() or text[0] == "-":
        return Immediate(text)
    return Symbol(text)


def _register(text: str, first: dict) -> Register:
    if text in first:
        return Register(text, first[text][1], first[text][0])
    prefix = text.rstrip("0123456789")
    if prefix not in first:
        raise Unknown(f"register {text}")
    type, start = first[prefix]
    return Register(text, start + int(text[len(prefix) :]), type)
