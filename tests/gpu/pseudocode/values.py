"""Numbers of a kind and a width, as AMD's descriptions compute with them."""

import math
import struct
from fractions import Fraction
from typing import NamedTuple

from ptx_formulas import exactly, single


class SignalingNaN(float):
    pass


class Value(NamedTuple):
    """kind: "u", "i", "f" or "b" (bits)."""

    kind: str
    width: int
    data: float


_FORMATS = {16: "<e", 32: "<f", 64: "<d"}
QUIET = {16: 9, 32: 22, 64: 51}
"""The bit of a NaN that tells whether it is a quiet one, by width."""


def to_bits(value: Value) -> int:
    if value.kind != "f":
        return int(value.data) & (1 << value.width) - 1
    try:
        bits = int.from_bytes(struct.pack(_FORMATS[value.width], value.data), "little")
    except OverflowError:
        return to_bits(value._replace(data=math.copysign(math.inf, value.data)))
    return bits ^ (3 << QUIET[value.width] - 1) if isinstance(value.data, SignalingNaN) else bits


def from_bits(bits: int, kind: str, width: int) -> Value:
    bits &= (1 << width) - 1
    if kind == "i":
        return Value("i", width, bits - (bits >> width - 1 << width))
    if kind != "f":
        return Value(kind, width, bits)
    number = struct.unpack(_FORMATS[width], bits.to_bytes(width // 8, "little"))[0]
    return Value("f", width, SignalingNaN("nan") if math.isnan(number) and not bits >> QUIET[width] & 1 else number)


def typed(value: Value, name: str) -> Value:
    """value.f32 and the like."""
    return from_bits(to_bits(value), name[0], int(name[1:]))


def cast(value: Value, kind: str, width: int) -> Value:
    """32'U(value) and the like: the number, not its bits, but for the hexadecimal NaN of v_div_fixup."""
    if kind == "f":
        number = value.data if value.kind == "f" else float(value.data)
        return from_bits(value.data, "f", 32) if value.data == 0xFFC00000 else Value("f", width, number)
    return from_bits(int(value.data), kind, width)


EXPONENTS = {16: (10, 31, -14), 32: (23, 255, -126), 64: (52, 2047, -1022)}
INTEGER = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "&": lambda a, b: a & b,
    "|": lambda a, b: a | b, "^": lambda a, b: a ^ b, "/": lambda a, b: a // b, "%": lambda a, b: a % b,
}  # fmt: skip


def compared(operator: str, a, b) -> bool:
    if operator == "<>":  # less or greater: not of a NaN
        return a < b or a > b
    return {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[operator]


def floating(operator: str, a: Value, b: Value) -> Value:
    if operator == "**":  # of two
        return Value("f", 64, _power_of_two(b.data))
    width, (x, y) = max(v.width for v in (a, b) if v.kind == "f"), (float(a.data), float(b.data))
    if operator == "/":
        exact = x / y if y else math.copysign(math.inf, x) * math.copysign(1.0, y)
        return Value("f", width, _rounded(exact, width))
    function = {"+": lambda p, q: p + q, "-": lambda p, q: p - q, "*": lambda p, q: p * q}[operator]
    if width == 64:  # a product with a power of two, rounded once
        return Value("f", 32, _rounded(function(x, y), 32))
    return Value("f", width, exactly(function)(x, y))


def _power_of_two(exponent) -> float:
    """As large or small as matters to a float32, so that zero times it stays zero."""
    return exponent if math.isnan(exponent) else 2.0 ** min(max(exponent, -1000), 1000)


def _rounded(x: float, width: int) -> float:
    if width == 64 or not math.isfinite(x):
        return x
    return single(Fraction(x)) if x else x


def _exponent(value: Value) -> Value:
    mantissa, largest, _ = EXPONENTS[value.width]
    return Value("i", 32, to_bits(value) >> mantissa & largest)


def _fma(a: Value, b: Value, c: Value) -> Value:
    return Value("f", 32, exactly(lambda x, y, z: x * y + z)(*(float(v.data) for v in (a, b, c))))


def _truncated(value: Value, kind: str) -> Value:
    low, high = (0, 2**32 - 1) if kind == "u" else (-(2**31), 2**31 - 1)
    if math.isnan(value.data):
        return Value(kind, 32, 0)
    return Value(kind, 32, int(min(max(value.data, low), high)))


def _sign_from(value: Value, width: Value) -> Value:
    count = int(width.data)
    bits = int(value.data) & (1 << count) - 1
    return from_bits(bits - (bits >> count - 1 << count) if count else 0, "i", value.width)


def _power(base: Value, exponent: Value) -> Value:
    return Value("f", 32, _rounded(_power_of_two(exponent.data), 32))


def _logarithm(value: Value) -> Value:
    x = value.data
    return Value("f", 32, math.log2(x) if x > 0 else (-math.inf if x == 0 else math.nan))


def _converted(kind: str, width: int):
    return lambda value: Value(kind, width, float(value.data))


FUNCTIONS = {
    "s_ff1_i32_b32": lambda v: Value("i", 32, (to_bits(v) & -to_bits(v)).bit_length() - 1),
    "s_ff1_i32_b64": lambda v: Value("i", 32, (to_bits(v) & -to_bits(v)).bit_length() - 1),
    "abs": lambda v: v._replace(data=abs(v.data)),
    "sign": lambda v: Value("u", 1, to_bits(v) >> v.width - 1),
    "exponent": _exponent,
    "isNAN": lambda v: Value("u", 1, int(math.isnan(v.data))),
    "isSignalNAN": lambda v: Value("u", 1, int(isinstance(v.data, SignalingNaN))),
    "isQuietNAN": lambda v: Value("u", 1, int(math.isnan(v.data) and not isinstance(v.data, SignalingNaN))),
    "cvtToQuietNAN": lambda v: v._replace(data=math.nan),
    "fma": _fma,
    "ldexp": lambda v, n: v._replace(data=_rounded(math.ldexp(v.data, int(n.data)), 32)),
    "pow": _power,
    "log2": _logarithm,
    "trunc": lambda v: v._replace(data=math.copysign(math.trunc(v.data), v.data) if math.isfinite(v.data) else v.data),
    "signext": lambda v: from_bits(int(v.data), "i", 64),
    "signext_from_bit": _sign_from,
    "f16_to_f32": _converted("f", 32),
    "f32_to_f16": _converted("f", 16),
    "i32_to_f32": lambda v: Value("f", 32, _rounded(float(v.data), 32)),
    "u32_to_f32": lambda v: Value("f", 32, _rounded(float(v.data), 32)),
    "f32_to_u32": lambda v: _truncated(v, "u"),
    "f32_to_i32": lambda v: _truncated(v, "i"),
}
