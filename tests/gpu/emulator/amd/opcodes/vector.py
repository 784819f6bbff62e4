"""Instructions that make a value of values, in each lane by itself."""

import numpy as np

from ...opcodes.arithmetic import fused, larger, smaller
from ...opcodes.operation import Operation, same
from ..parsing import VCC, Register
from ..registers import mask_reader, reader
from . import lanes as between_lanes
from . import parts
from .bits import reversed_bits, shift_of

U5, U16, U24 = np.uint32(31), np.uint32(16), np.uint32(0xFFFFFF)


def _subtracted_from(a, b):
    return b - a


def _high(a, b):
    wide = np.uint64 if a.dtype.kind == "u" else np.int64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _left(count, x):
    return x << shift_of(count, x)


def _right(count, x):
    return x >> shift_of(count, x)


def _field(x, position, width):
    """`width` bits from `position` on, with the sign of the highest where x has signs."""
    position, width = position.view(np.uint32) & U5, width.view(np.uint32) & U5
    bits = (x >> position.astype(x.dtype)).view(np.uint32) & ((np.uint32(1) << width) - np.uint32(1))
    if x.dtype.kind == "u":
        return bits
    top = np.where(width > 0, np.uint32(1) << (width - np.uint32(1) & U5), np.uint32(0))
    return ((bits ^ top) - top).view(np.int32)


def _permuted(first, second, places):
    """Each byte of `places` names a byte of second (0 to 3), of first (4 to 7), a sign, 0 or 255."""
    pair = first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)
    result = np.uint32(0)
    for i in range(4):
        place = (places >> np.uint32(8 * i)) & np.uint32(255)
        byte = (pair >> (np.uint64(8) * (place & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = (pair >> (np.uint64(16) * (place & np.uint32(3)).astype(np.uint64) + np.uint64(15))) & np.uint64(1)
        byte = np.where(place < 8, byte, np.where(place < 12, sign * np.uint64(255), np.where(place == 12, 0, 255)))
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _to_unsigned(x):
    """Towards zero, within the range; NaN is 0."""
    return np.where(x > 0, np.minimum(np.trunc(x.astype(np.float64)), 2.0**32 - 1), 0.0).astype(np.uint32)


def _to_signed(x):
    x = np.where(np.isnan(x), 0.0, x.astype(np.float64))
    return np.clip(np.trunc(x), -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _quieting(function):
    """Of a signaling NaN comes a quiet one; a quiet one gives way to a number."""

    def extreme(a, b):
        return np.where(_is_signaling(a) | _is_signaling(b), np.float32(np.nan), function(a, b))

    return extreme


def _is_signaling(x):
    return np.isnan(x) & (x.view(np.uint32) & np.uint32(1 << 22) == 0)


def _between(a, b, c):
    """The one in the middle."""
    return np.maximum(np.minimum(np.maximum(a, b), c), np.minimum(a, b))


def _scaled(x, exponent):
    return np.ldexp(x, np.clip(exponent, -10000, 10000))


def _divided(quotient, denominator, numerator):
    """What a division ends with: special cases, and the sign."""
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    exponent = lambda x: x.view(np.uint32).astype(np.int32) >> 23 & 255  # noqa: E731
    result = np.abs(quotient)
    result = np.where(exponent(numerator) - exponent(denominator) < -150, np.float32(0), result)
    result = np.where(np.isinf(denominator) | (numerator == 0), np.float32(0), result)
    result = np.where((denominator == 0) | np.isinf(numerator), np.float32(np.inf), result)
    result = np.where(negative, -result, result)
    invalid = ((denominator == 0) & (numerator == 0)) | (np.isinf(denominator) & np.isinf(numerator))
    return np.where(invalid | np.isnan(denominator) | np.isnan(numerator), np.float32(np.nan), result)


def _of(function, *types: str) -> Operation:
    result, *operands = types
    return Operation(function, result, tuple(operands))


def _extremes(type, low, high):
    """Of 32-bit numbers."""
    return {
        f"v_min_{type}": same(low, type, 2),
        f"v_max_{type}": same(high, type, 2),
        f"v_min3_{type}": same(lambda a, b, c: low(low(a, b), c), type, 3),
        f"v_max3_{type}": same(lambda a, b, c: high(high(a, b), c), type, 3),
        f"v_minmax_{type}": same(lambda a, b, c: high(low(a, b), c), type, 3),
        f"v_maxmin_{type}": same(lambda a, b, c: low(high(a, b), c), type, 3),
    }


def _pair(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << U16


OPERATIONS = {
    "v_add_f32": same(np.add, "f32", 2),
    "v_sub_f32": same(np.subtract, "f32", 2),
    "v_subrev_f32": same(_subtracted_from, "f32", 2),
    "v_mul_f32": same(np.multiply, "f32", 2),
    "v_fma_f32": same(fused, "f32", 3),
    "v_fmac_f32": same(fused, "f32", 3),  # the last one is what the destination held
    "v_fmaak_f32": same(fused, "f32", 3),
    "v_fmamk_f32": same(fused, "f32", 3),
    "v_div_fixup_f32": same(_divided, "f32", 3),
    "v_ldexp_f32": _of(_scaled, "f32", "f32", "i32"),
    "v_trunc_f32": same(np.trunc, "f32", 1),
    "v_exp_f32": same(np.exp2, "f32", 1),  # these are within a unit of the last place; here the nearest
    "v_log_f32": same(np.log2, "f32", 1),
    "v_rcp_f32": same(np.reciprocal, "f32", 1),
    "v_rcp_iflag_f32": same(np.reciprocal, "f32", 1),
    "v_cvt_f32_u32": _of(lambda x: x.astype(np.float32), "f32", "u32"),
    "v_cvt_f32_i32": _of(lambda x: x.astype(np.float32), "f32", "i32"),
    "v_cvt_u32_u16": _of(lambda x: x.astype(np.uint32), "u32", "u16"),
    "v_cvt_u32_f32": _of(_to_unsigned, "u32", "f32"),
    "v_cvt_i32_f32": _of(_to_signed, "i32", "f32"),
    "v_cvt_f16_f32": _of(lambda x: x.astype(np.float16), "f16", "f32"),
    "v_cvt_f32_f16": _of(lambda x: x.astype(np.float32), "f32", "f16"),
    "v_pack_b32_f16": _of(_pair, "u32", "u16", "u16"),
    "v_mul_lo_u32": same(np.multiply, "u32", 2),
    "v_mul_hi_u32": same(_high, "u32", 2),
    "v_mul_hi_i32": same(_high, "i32", 2),
    "v_mul_u32_u24": same(lambda a, b: (a & U24) * (b & U24), "u32", 2),
    "v_mad_u32_u24": same(lambda a, b, c: (a & U24) * (b & U24) + c, "u32", 3),
    "v_and_b32": same(np.bitwise_and, "u32", 2),
    "v_or_b32": same(np.bitwise_or, "u32", 2),
    "v_xor_b32": same(np.bitwise_xor, "u32", 2),
    "v_not_b32": same(np.bitwise_not, "u32", 1),
    "v_mov_b32": same(np.copy, "u32", 1),
    "v_mov_b64": same(np.copy, "u64", 1),
    "v_accvgpr_read_b32": same(np.copy, "u32", 1),
    "v_accvgpr_mov_b32": same(np.copy, "u32", 1),
    "v_accvgpr_write_b32": same(np.copy, "u32", 1),
    "v_bfrev_b32": same(reversed_bits, "u32", 1),
    "v_lshlrev_b32": same(_left, "u32", 2),
    "v_lshrrev_b32": same(_right, "u32", 2),
    "v_ashrrev_i32": same(_right, "i32", 2),
    "v_lshlrev_b64": _of(_left, "u64", "u32", "u64"),
    "v_lshrrev_b64": _of(_right, "u64", "u32", "u64"),
    "v_ashrrev_i64": _of(_right, "i64", "u32", "i64"),
    "v_add3_u32": same(lambda a, b, c: a + b + c, "u32", 3),
    "v_lshl_add_u32": same(lambda a, b, c: (a << (b & U5)) + c, "u32", 3),
    "v_lshl_add_u64": _of(lambda a, b, c: (a << (b & np.uint32(7)).astype(np.uint64)) + c, "u64", "u64", "u32", "u64"),
    "v_add_lshl_u32": same(lambda a, b, c: (a + b) << (c & U5), "u32", 3),
    "v_lshl_or_b32": same(lambda a, b, c: (a << (b & U5)) | c, "u32", 3),
    "v_and_or_b32": same(lambda a, b, c: (a & b) | c, "u32", 3),
    "v_or3_b32": same(lambda a, b, c: a | b | c, "u32", 3),
    "v_xor3_b32": same(lambda a, b, c: a ^ b ^ c, "u32", 3),
    "v_xad_u32": same(lambda a, b, c: (a ^ b) + c, "u32", 3),
    "v_bfi_b32": same(lambda a, b, c: (a & b) | (~a & c), "u32", 3),
    "v_bfe_u32": same(_field, "u32", 3),
    "v_bfe_i32": same(_field, "i32", 3),
    "v_perm_b32": same(_permuted, "u32", 3),
    "v_med3_i32": same(_between, "i32", 3),
    "v_add_u16": same(np.add, "u16", 2),
    "v_and_b16": same(np.bitwise_and, "u16", 2),
    "v_or_b16": same(np.bitwise_or, "u16", 2),
    "v_mov_b16": same(np.copy, "u16", 1),
    "v_lshlrev_b16": same(_left, "u16", 2),
    "v_lshrrev_b16": same(_right, "u16", 2),
    **_extremes("i32", np.minimum, np.maximum),
    **_extremes("u32", np.minimum, np.maximum),
    **_extremes("f32", _quieting(smaller), _quieting(larger)),
}  # fmt: skip
for _name, _function in (("add", np.add), ("sub", np.subtract), ("subrev", _subtracted_from)):
    OPERATIONS[f"v_{_name}_u32"] = OPERATIONS[f"v_{_name}_nc_u32"] = same(_function, "u32", 2)


def operation_of(opcode: str) -> Operation:
    return OPERATIONS[opcode]


def step(instruction, lanes):
    """Both halves of a v_dual_ instruction read before either writes."""
    first = _assignment(instruction, lanes)
    if first is None:
        return None
    if instruction.second is None:
        value, write = first

        def assign(machine):
            registers = machine.registers
            write(registers, value(registers))

        return assign
    second = _assignment(instruction.second, lanes)

    def assign_both(machine):
        registers = machine.registers
        found = [value(registers) for value, _ in (first, second)]
        for (_, write), values in zip((first, second), found, strict=True):
            write(registers, values)

    return assign_both


def _assignment(instruction, lanes):
    """(function(registers) -> values, function(registers, values) that writes them)"""
    name, (destination, *sources) = instruction.opcode, instruction.operands or (None,)
    modifiers = dict(instruction.modifiers)
    if name in ("v_cndmask_b32", "v_cndmask_b16"):
        return _choice(name, destination, sources, modifiers)
    if name not in OPERATIONS:
        return None
    function, result, types = OPERATIONS[name]
    if name == "v_fmac_f32":
        sources = [*sources, destination]
    readers = [reader(source, type) for source, type in zip(sources, types, strict=True)]
    readers, write = parts.of_registers(readers, sources, types, destination, result, modifiers)
    readers, write = between_lanes.moved(readers, write, modifiers, lanes)
    if modifiers:
        raise KeyError(f"modifiers {modifiers}")
    return lambda registers: function(*[read(registers) for read in readers]), write


def _choice(name, destination, sources, modifiers):
    type = "f" + name[-2:]  # so that signs can be changed
    *sources, mask = sources if len(sources) == 3 else (*sources, Register("s", VCC))
    readers = [reader(source, type) for source in sources]
    (no, yes), write = parts.of_registers(readers, sources, (type, type), destination, type, modifiers)
    if modifiers:
        raise KeyError(f"modifiers {modifiers}")
    mask = mask_reader(mask)

    def choose(registers):
        return np.where(mask(registers), yes(registers), no(registers))

    return choose, write
