"""PTX instructions on single numbers, in Python, as the ISA's manual describes them: what the emulator is checked with.

Integers are Python's: operands of .s types signed, all others not; results are cut to their width by the test. Floats
are exact fractions where a result has to be rounded.
"""

import math
import struct
from fractions import Fraction

INF, NAN = math.inf, math.nan


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def bits_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def half_bits(x: float) -> int:
    return struct.unpack("<H", struct.pack("<e", x))[0]


def bits_half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def nearest(x: Fraction, mantissa: int, smallest: int, largest: int) -> float:
    """The nearest float, ties to even: bits of mantissa (without the first), exponents of the normal numbers."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    step = Fraction(2) ** (max(exponent, smallest) - mantissa)
    rounded = round(x / step) * step  # Python rounds half to even
    return math.copysign(INF if abs(rounded) >= Fraction(2) ** (largest + 1) else float(rounded), x)


def single(x: Fraction) -> float:
    return nearest(x, 23, -126, 127)


def exactly(function):
    """On finite numbers the exact result, rounded once; on others what Python's floats give, which is IEEE's."""

    def rounded(*operands: float) -> float:
        if all(map(math.isfinite, operands)):
            exact = function(*map(Fraction, operands))
            return single(exact) if exact else function(*operands)  # the sign of zero
        return function(*operands)

    return rounded


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def ordered(*floats: float) -> list[float]:
    """Ascending, -0 before +0; a NaN gives way to a number."""
    numbers = [x for x in floats if not math.isnan(x)] or [NAN]
    return sorted(numbers, key=lambda x: (x, math.copysign(1.0, x)))


def quotient(a: int, b: int) -> int:
    return -(abs(a) // abs(b)) if (a < 0) != (b < 0) else abs(a) // abs(b)


def shifted_left(width: int):
    return lambda x, count: 0 if count >= width else x << count


def shifted_right(width: int):
    return lambda x, count: x >> min(count, width)  # of a signed number, the sign fills


def field(signed: bool):
    def extract(x: int, position: int, width: int) -> int:
        """Bit by bit, as in the manual."""
        x, position, width = x & 0xFFFFFFFF, position & 255, width & 255
        sign = 0
        if signed and width:
            sign = (x >> min(position + width - 1, 31)) & 1
        bits = [(x >> (position + i)) & 1 if i < width and position + i < 32 else sign for i in range(32)]
        return sum(bit << i for i, bit in enumerate(bits))

    return extract


def permuted(a: int, b: int, selector: int) -> int:
    source = [*struct.pack("<I", a), *struct.pack("<I", b)]
    result = []
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = source[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return struct.unpack("<I", bytes(result))[0]


def to_bfloat16(x: float) -> int:
    """The nearest of the two neighbours, ties to the even one."""
    if math.isnan(x):
        return 0x7FFF
    if math.isinf(x):
        return float_bits(x) >> 16
    rounded = nearest(Fraction(x), 7, -126, 127)
    return float_bits(math.copysign(rounded, x)) >> 16


def to_half(x: float) -> float:
    if not math.isfinite(x):
        return x
    return math.copysign(nearest(Fraction(x), 10, -14, 15), x)


COMPARED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def compared(name: str):
    """Of floats: False where one is NaN, or True with a u behind the name."""

    def compare(a, b):
        if math.isnan(a) or math.isnan(b):
            return name.endswith("u") or name == "nan"
        return name not in ("nan", "num") and COMPARED[name.removesuffix("u")](a, b) or name == "num"

    return compare


def of_both(function):
    """Of two singles in 64 bits each."""

    def of_pairs(*pairs: int) -> int:
        low, high = (function(*[bits_float(x >> shift) for x in pairs]) for shift in (0, 32))
        return float_bits(high) << 32 | float_bits(low)

    return of_pairs


def of_bfloat16(function):
    return lambda a, b: function(bits_float(a << 16), bits_float(b << 16))


INTEGER = ("s16", "u16", "s32", "u32", "s64", "u64")
FORMULAS = {
    **{f"add.{t}": lambda a, b: a + b for t in INTEGER},
    **{f"sub.{t}": lambda a, b: a - b for t in INTEGER},
    **{f"mul.lo.{t}": lambda a, b: a * b for t in INTEGER},
    **{f"mul.wide.{t}": lambda a, b: a * b for t in ("s16", "u16", "s32", "u32")},
    **{f"mul.hi.{t}": lambda a, b: (a * b) >> 32 for t in ("s32", "u32")},
    **{f"mad.lo.{t}": lambda a, b, c: a * b + c for t in INTEGER},
    **{f"mad.wide.{t}": lambda a, b, c: a * b + c for t in ("s32", "u32")},
    **{f"div.{t}": quotient for t in INTEGER},
    **{f"rem.{t}": lambda a, b: a - b * quotient(a, b) for t in INTEGER},
    **{f"min.{t}": min for t in INTEGER},
    **{f"max.{t}": max for t in INTEGER},
    "min.relu.s32": lambda a, b: max(min(a, b), 0),
    "max.relu.s32": lambda a, b: max(a, b, 0),
    **{f"neg.{t}": lambda a: -a for t in ("s16", "s32", "s64")},
    **{f"abs.{t}": abs for t in ("s16", "s32", "s64")},
    **{f"and.{t}": lambda a, b: a & b for t in ("b16", "b32", "b64", "pred")},
    **{f"or.{t}": lambda a, b: a | b for t in ("b16", "b32", "b64", "pred")},
    **{f"xor.{t}": lambda a, b: a ^ b for t in ("b16", "b32", "b64", "pred")},
    **{f"not.{t}": lambda a: ~a for t in ("b16", "b32", "b64")},
    "not.pred": lambda a: not a,
    **{f"shl.b{n}": shifted_left(n) for n in (16, 32, 64)},
    **{f"shr.{kind}{n}": shifted_right(n) for n in (16, 32, 64) for kind in "su"},
    "bfe.u32": field(False),
    "bfe.s32": field(True),
    "prmt.b32": permuted,
    **{f"setp.{c}.{t}": COMPARED[c] for c in COMPARED for t in INTEGER},
    **{f"setp.{c}.{t}": COMPARED[c] for c in ("eq", "ne") for t in ("b16", "b32", "b64")},
    **{f"setp.{c}{u}.{t}": compared(c + u) for c in COMPARED for u in ("", "u") for t in ("f16", "f32")},
    **{f"setp.{c}{u}.bf16": of_bfloat16(compared(c + u)) for c in COMPARED for u in ("", "u")},
    **{f"setp.{c}.f32": compared(c) for c in ("nan", "num")},
    **{f"selp.{t}": lambda a, b, c: a if c else b for t in ("b16", "b32", "b64", "f32")},
    **{f"mov.{t}": lambda a: a for t in ("b16", "u16", "b32", "u32", "b64", "pred")},
    "cvta.param.u64": lambda a: a,
    # floats
    **{f"add{rn}.f32": exactly(lambda a, b: a + b) for rn in ("", ".rn")},
    **{f"sub{rn}.f32": exactly(lambda a, b: a - b) for rn in ("", ".rn")},
    **{f"mul{rn}.f32": exactly(lambda a, b: a * b) for rn in ("", ".rn")},
    "fma.rn.f32": exactly(lambda a, b, c: a * b + c),
    "fma.rn.ftz.f32": lambda a, b, c: flush(exactly(lambda a, b, c: a * b + c)(flush(a), flush(b), flush(c))),
    "div.full.f32": lambda a, b: exactly(lambda a, b: a / b)(a, b) if b else NAN if a != a or a == 0 else
    math.copysign(INF, a) * math.copysign(1, b),
    "min.f32": lambda a, b: ordered(a, b)[0],
    "max.f32": lambda a, b: ordered(a, b)[-1],
    **{f"add{rn}.f32x2": of_both(exactly(lambda a, b: a + b)) for rn in ("", ".rn")},
    **{f"sub{rn}.f32x2": of_both(exactly(lambda a, b: a - b)) for rn in ("", ".rn")},
    **{f"mul{rn}.f32x2": of_both(exactly(lambda a, b: a * b)) for rn in ("", ".rn")},
    "fma.rn.f32x2": of_both(exactly(lambda a, b, c: a * b + c)),
    "min3.f32": lambda *abc: ordered(*abc)[0],
    "max3.f32": lambda *abc: ordered(*abc)[-1],
    "neg.f32": lambda a: -a,
    "abs.f32": abs,
    "abs.f16": abs,
    **{f"abs.{t}x2": lambda a: a & 0x7FFF7FFF for t in ("f16", "bf16")},
    # conversions
    **{f"cvt.{to}.{t}": lambda a: a for t in INTEGER for to in ("u16", "s32", "u32")},
    **{f"cvt.{to}.{t}": lambda a: a for t in ("s16", "u16", "s32", "u32") for to in ("s64", "u64")},
    **{f"cvt.rn.f32.{t}": lambda a: single(Fraction(a)) for t in ("s32", "u32", "s64")},
    "cvt.f32.f16": lambda a: a,
    "cvt.f32.bf16": lambda bits: bits_float(bits << 16),
    "cvt.rn.f16.f32": to_half,
    "cvt.rn.bf16.f32": to_bfloat16,
    "cvt.rn.f16x2.f32": lambda high, low: half_bits(to_half(high)) << 16 | half_bits(to_half(low)),
    "cvt.rn.bf16x2.f32": lambda high, low: to_bfloat16(high) << 16 | to_bfloat16(low),
    "cvt.rzi.s32.f32": lambda a: 0 if math.isnan(a) else int(max(-(2.0**31), min(2.0**31 - 1, a))),
}  # fmt: skip
"""opcode -> function of numbers"""

APPROXIMATE = {
    "ex2.approx.f32": lambda a: 2.0**a if a < 128 else INF,
    "ex2.approx.ftz.f32": lambda a: flush(2.0 ** flush(a)) if a < 128 else INF,
    "lg2.approx.f32": lambda a: math.log2(a) if a > 0 else NAN,
    "lg2.approx.ftz.f32": lambda a: math.log2(a) if flush(a) > 0 else NAN,
}
"""Of those whose last places the manual leaves open."""
