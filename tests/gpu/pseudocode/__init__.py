"""AMD's own description of its instructions, run on single numbers: what the emulator of AMD's code is checked with.

The text is that of AMD's ISA documents as the package tinygrad carries it (tinygrad/runtime/autogen/amd).
"""

import importlib
import math
import re
from functools import lru_cache

from .parser import parsed
from .values import EXPONENTS, FUNCTIONS, INTEGER, Value, cast, compared, floating, from_bits, to_bits, typed

DOCUMENTS = {"gfx1100": "rdna3", "gfx942": "cdna"}


@lru_cache
def descriptions(arch: str) -> dict[str, str]:
    """Of each opcode, in lower case."""
    module = importlib.import_module(f"tinygrad.runtime.autogen.amd.{DOCUMENTS[arch]}.str_pcode")
    return {re.sub(r"_e(32|64)$", "", opcode.name.lower()): text for opcode, text in module.PCODE.items()}


class Return(Exception):
    pass


CONSTANTS = {
    "INF": Value("f", 32, math.inf), "NAN": Value("f", 32, math.nan), "UNDERFLOW_F32": Value("f", 32, 0.0),
    "OVERFLOW_F32": Value("f", 32, math.inf), "DENORM": Value("subnormal", 32, 0),
}  # fmt: skip


class Run:
    """names: what an instruction reads, and finds written afterwards. MEM: bytes by address."""

    def __init__(self, arch: str, names: dict, memory: dict[int, int] | None = None):
        self.arch, self.names, self.memory = arch, names, memory
        self.functions: dict = {}

    def text(self, text: str) -> dict:
        self.block(parsed(text))
        return self.names

    def block(self, statements) -> None:
        for statement in statements:
            getattr(self, "do_" + statement[0])(*statement[1:])

    def do_if(self, branches, otherwise) -> None:
        for condition, body in branches:
            if self.value(condition).data:
                return self.block(body)
        return self.block(otherwise)

    def do_for(self, name, first, last, body) -> None:
        for i in range(int(self.value(first).data), int(self.value(last).data) + 1):
            self.names[name] = Value("i", 32, i)
            self.block(body)

    def do_declare(self, name, is_list) -> None:
        self.names.setdefault(name, {} if is_list else Value("b", 64, 0))

    def do_define(self, name, function) -> None:
        self.functions[name] = function

    def do_return(self, expression) -> None:
        raise Return(self.value(expression))

    def do_assign(self, target, expression) -> None:
        self.assign(target, self.value(expression))

    def assign(self, target, value: Value) -> None:
        kind, *parts = target
        if kind == "name":
            self.names[parts[0]] = value
        elif kind == "joined":  # the first one is the highest
            bits = to_bits(value)
            for part in reversed(parts[0]):
                width = int(part[2][1:])
                self.assign(part, Value("u", width, bits & (1 << width) - 1))
                bits >>= width
        elif kind == "typed" and parts[0][:2] == ("item", ("name", "MEM")):
            address, size = int(self.value(parts[0][2]).data), int(parts[1][1:]) // 8
            self.memory.update(enumerate(to_bits(value).to_bytes(16, "little")[:size], address))
        elif kind == "typed" and parts[0][0] in ("range", "item"):
            self.assign(parts[0], cast(value, *_kind_and_width(parts[1])))
        elif kind == "typed":
            kind, width = _kind_and_width(parts[1])
            self.assign(parts[0], value if value.kind == kind == "f" else cast(value, kind, width))
            if parts[0][0] == "name" and value.kind == "f":
                self.names[parts[0][1]] = Value("f", width, value.data)
        elif kind == "range":
            self._assign_range(parts[0], *(int(self.value(part).data) for part in parts[1:]), to_bits(value))
        elif parts[0][0] == "item":  # VGPR[lane][register]
            self.value(parts[0])[int(self.value(parts[1]).data)] = value
        elif isinstance(self.names.get(parts[0][1]), (list, dict)):
            self.names[parts[0][1]][int(self.value(parts[1]).data)] = value
        else:
            place = int(self.value(parts[1]).data)
            self._assign_range(parts[0], place, place, int(bool(value.data)))

    def _assign_range(self, target, high: int, low: int, bits: int) -> None:
        while target[0] == "typed":
            target = target[1]
        if high < low:  # the other way round
            high, low, width = low, high, low - high + 1
            bits = int(format(bits, f"0{width}b")[::-1], 2)
        name, mask = target[1], (1 << high - low + 1) - 1
        before = self.names.get(name, Value("b", 128, 0))
        data = to_bits(before) & ~(mask << low) | (bits & mask) << low
        self.names[name] = Value("b", max(before.width, high + 1), data)

    # --- expressions -------------------------------------------------------------------------------------------------

    def value(self, expression) -> Value:
        return getattr(self, "of_" + expression[0])(*expression[1:])

    def of_number(self, value) -> Value:
        return value

    def of_name(self, name) -> Value:
        if name in ("WAVE32", "WAVE64"):
            return Value("u", 1, int((name == "WAVE32") == (self.arch == "gfx1100")))
        return self.names[name] if name in self.names else CONSTANTS[name]

    def of_typed(self, expression, name) -> Value:
        if name == "IEEE":  # the mode of all kernels
            return Value("u", 1, 1)
        if expression[0] == "item" and expression[1] == ("name", "MEM"):
            address, width = int(self.value(expression[2]).data), int(name[1:])
            found = bytes(self.memory[address + i] for i in range(width // 8))
            return from_bits(int.from_bytes(found, "little"), name[0], width)
        value = self.value(expression)
        return value if value.kind == "subnormal" else typed(value, name)

    def of_cast(self, kind, width, expression) -> Value:
        return cast(self.value(expression), kind, width)

    def of_range(self, expression, high, low) -> Value:
        high, low = (int(self.value(x).data) for x in (high, low))
        bits = to_bits(self.value(expression))
        if high < low:
            return Value("b", low - high + 1, int(format(bits >> high, f"0{low - high + 1}b")[::-1], 2))
        return Value("b", high - low + 1, bits >> low & (1 << high - low + 1) - 1)

    def of_item(self, expression, place) -> Value:
        place = int(self.value(place).data)
        container = self.names.get(expression[1]) if expression[0] == "name" else self.value(expression)
        if isinstance(container, (list, dict)):
            return container[place]
        return Value("u", 1, to_bits(container) >> place & 1)

    def of_joined(self, parts) -> Value:
        bits, width = 0, 0
        for part in map(self.value, parts):
            bits, width = bits << part.width | to_bits(part), width + part.width
        return Value("u", width, bits)

    def of_choose(self, condition, yes, no) -> Value:
        return self.value(yes if self.value(condition).data else no)

    def of_unary(self, operator, expression) -> Value:
        value = self.value(expression)
        if operator == "!":
            return Value("u", 1, int(not value.data))
        if operator == "+":
            return value
        if value.kind == "f":
            return value._replace(data=-value.data)
        return from_bits(-int(value.data) if operator == "-" else ~int(value.data), value.kind, value.width)

    def of_binary(self, operator, left, right) -> Value:
        a, b = self.value(left), self.value(right)
        if operator in ("&&", "||"):
            return Value("u", 1, int(bool(a.data and b.data if operator == "&&" else a.data or b.data)))
        if b.kind == "subnormal":
            limit = 2.0 ** EXPONENTS[a.width][2]
            limit = 2.0**-126 if a.width == 64 else limit  # "1.0 / 64'F(S1.f32) == DENORM.f64"
            return Value("u", 1, int(0 < abs(a.data) < limit))
        if operator in ("==", "!=", "<>", "<", "<=", ">", ">="):
            return Value("u", 1, int(compared(operator, a.data, b.data)))
        if operator in ("<<", ">>"):
            count = int(b.data)
            return from_bits(int(a.data) << count if operator == "<<" else int(a.data) >> count, a.kind, a.width)
        if "f" in (a.kind, b.kind):
            return floating(operator, a, b)
        kind = "u" if "u" in (a.kind, b.kind) else a.kind
        exact = INTEGER[operator](int(a.data), int(b.data))
        return from_bits(exact, kind, max(a.width, b.width))

    def of_call(self, name, arguments) -> Value:
        if name.startswith("Calc"):  # an address
            return self.names["ADDR"]
        values = [self.value(argument) for argument in arguments]
        if name in self.functions:
            names, body = self.functions[name]
            inner = Run(self.arch, dict(zip(names, values, strict=True)))
            inner.functions = self.functions
            try:
                inner.block(body)
            except Return as found:
                return found.args[0]
        if name.startswith("v_"):  # another instruction
            operands = {f"S{i}": value for i, value in enumerate(values)}
            result = Run(self.arch, operands).text(descriptions(self.arch)[name])["D0"]
            return typed(result, name.split("_")[-1])
        return FUNCTIONS[name](*values)


def _kind_and_width(name: str) -> tuple[str, int]:
    return name[0], int(name[1:])
