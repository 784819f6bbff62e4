"""AMD's assembly of one kernel, as LLVM writes it, as instructions."""

import re
from typing import NamedTuple

from ..faults import Unknown

VCC, NULL, M0, EXEC = 106, 124, 125, 126
"""Numbers of scalar registers with a name; of the 64-bit ones the lower half."""
NUMBERED = {
    "vcc_lo": VCC, "vcc_hi": VCC + 1, "vcc": VCC, "exec_lo": EXEC, "exec_hi": EXEC + 1, "exec": EXEC, "m0": M0,
    "null": NULL,
}  # fmt: skip
ACCUMULATORS = 256
"""Number of a0; those of v0 and others are their own."""


class Register(NamedTuple):
    """`count` registers from `number` on. half: "l" or "h" of 32 bits, or ""; negated, absolute: of a float source."""

    kind: str
    number: int
    count: int = 1
    half: str = ""
    negated: bool = False
    absolute: bool = False


class Number(NamedTuple):
    """Its text: which bits it has depends on the type of the operand."""

    text: str
    negated: bool = False
    absolute: bool = False


class Name(NamedTuple):
    """A label, `off`."""

    name: str


class Instruction(NamedTuple):
    """opcode: without what tells its encoding. modifiers: what follows the operands, as `offset:16` or `offen`;
    second: what v_dual_ instructions do beside. source: file, line and column that Triton notes for it."""

    line: int
    text: str
    source: str
    opcode: str
    operands: tuple
    modifiers: dict[str, str]
    second: "Instruction | None" = None

    def __str__(self) -> str:
        return f"line {self.line}: {self.text} ({self.source})"


class Argument(NamedTuple):
    offset: int
    size: int
    is_pointer: bool


class Program(NamedTuple):
    """labels: the number of the instruction that follows each; settings: .amdhsa_ directives."""

    name: str
    arch: str
    arguments: tuple[Argument, ...]
    settings: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_LABEL = re.compile(r"^(\.?[$\w]+):")
_INSTRUCTION = re.compile(r"^\t([a-z]\w+)(?:\s+(.*))?$")
_SETTING = re.compile(r"^\t\t\.amdhsa_(\w+) (\d+)$", re.M)
_REGISTER = re.compile(r"^([vsa])(?:(\d+)|\[(\d+):(\d+)\])(?:\.([lh]))?$")
_NUMBER = re.compile(r"^-?(0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?)$")
_PIECES = re.compile(r"(?:\[[^]]*\]|\([^)]*\)|[^,\[(])+")


def parse(text: str) -> Program:
    name = re.search(r"^\t\.globl\t(\w+)", text, re.M)[1]
    arch = re.search(r"unknown-(\w+)", text)[1]
    instructions, labels, source = [], {}, ""
    for line, raw in enumerate(text.splitlines(), 1):
        code, _, comment = raw.partition(";")
        code = code.rstrip()
        if code.startswith("\t.section"):
            break
        if code.startswith("\t.loc"):
            source = comment.strip() or source
        elif match := _LABEL.match(code):
            labels[match[1]] = len(instructions)
        elif code and not code.lstrip().startswith("."):
            instructions.append(instruction(line, code, source))
    settings = {key: int(value) for key, value in _SETTING.findall(text)}
    return Program(name, arch, _arguments(text), settings, tuple(instructions), labels)


def _arguments(text: str) -> tuple[Argument, ...]:
    notes = text.partition(".amdgpu_metadata")[2].partition("    .group_segment")[0]
    found = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", notes)
    return tuple(Argument(int(offset), int(size), kind != "by_value") for offset, size, kind in found)


def instruction(line: int, code: str, source: str) -> Instruction:
    first, _, second = code.partition(" :: ")
    match = _INSTRUCTION.match(first)
    if not match:
        raise Unknown(f"line {line}: {code.strip()}")
    opcode, text = match[1].replace("v_dual_", "v_"), " ".join(code.split())
    beside = instruction(line, "\t" + second, source) if second else None
    if opcode.startswith(("s_waitcnt", "s_delay_alu", "s_sendmsg", "s_nop", "s_clause")):
        return Instruction(line, text, source, opcode, (match[2] or "",), {})
    opcode = re.sub(r"(_e32|_e64)?(_dpp|_sdwa)?$", "", opcode)
    pieces = [piece.strip() for piece in _PIECES.findall(match[2] or "")]
    modifiers = {}
    if pieces:
        pieces[-1], *rest = re.findall(r"(?:\[[^]]*\]|\([^)]*\)|\S)+", pieces[-1])
        modifiers = {key: value for key, _, value in (piece.partition(":") for piece in rest)}
    return Instruction(line, text, source, opcode, tuple(map(_operand, pieces)), modifiers, beside)


def _operand(text: str):
    negated = text.startswith("neg(") or (text[0] == "-" and not text[1].isdigit())
    if negated:
        text = text[4:-1] if text.startswith("neg(") else text[1:]
    absolute = text[0] == "|"
    text = text.strip("|")
    if text in NUMBERED:
        return Register("s", NUMBERED[text], 2 if text in ("vcc", "exec") else 1, "", negated, absolute)
    if match := _REGISTER.match(text):
        kind, one, first, last, half = match.groups()
        number = int(one or first) + (ACCUMULATORS if kind == "a" else 0)
        count = 1 if one else int(last) - int(first) + 1
        return Register("s" if kind == "s" else "v", number, count, half or "", negated, absolute)
    if _NUMBER.match(text):
        return Number(text, negated, absolute)
    if negated or absolute:
        raise Unknown(f"operand {text}")
    return Name(text)
