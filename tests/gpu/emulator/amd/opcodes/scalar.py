"""Scalar arithmetic: one number for a wave, and its condition (SCC)."""

import numpy as np

from ..parsing import EXEC, Number, Register
from ..registers import reader, writer
from .bits import reversed_bits, shift_of

WORD = np.uint64(0xFFFFFFFF)


def _kept(function):
    return lambda *operands: (function(*operands), None)


def _conditional(function):
    """SCC: whether the result is not zero."""

    def with_condition(*operands):
        result = function(*operands)
        return result, result != 0

    return with_condition


def _carried(a, b):
    wide = a.astype(np.uint64) + b.astype(np.uint64)
    return (wide & WORD).astype(np.uint32), wide > WORD


def _overflowing(function):
    def with_overflow(a, b):
        exact = function(a.astype(np.int64), b.astype(np.int64))
        result = exact.astype(np.int32)
        return result, result != exact

    return with_overflow


def _shifted_and_added(shift):
    def add(a, b):
        wide = (a.astype(np.uint64) << np.uint64(shift)) + b.astype(np.uint64)
        return (wide & WORD).astype(np.uint32), wide > WORD

    return add


def _field(source, place):
    """The bits of `source` from place[4:0] on, place[22:16] of them."""
    position, width = place & 31, (place >> 16) & 127
    width = np.minimum(width, 32 - position).astype(np.int64)
    bits = (source.astype(np.uint32).astype(np.int64) >> position.astype(np.int64)) & ((np.int64(1) << width) - 1)
    return bits, width


def _unsigned_field(source, place):
    bits, _ = _field(source, place)
    result = bits.astype(np.uint32)
    return result, result != 0


def _signed_field(source, place):
    bits, width = _field(source.view(np.uint32), place.view(np.uint32))
    top = np.where(width > 0, np.int64(1) << np.maximum(width - 1, 0), 0)
    result = ((bits ^ top) - top).astype(np.int32)
    return result, result != 0


def _extreme(function, first_wins):
    return lambda a, b: (function(a, b), first_wins(a, b))


AND_NOT = _conditional(lambda a, b: a & ~b)


def _both(bits):
    return f"u{bits}", f"u{bits}", f"u{bits}"


def _logic(bits):
    kind, type = f"b{bits}", _both(bits)
    return {
        f"s_and_{kind}": (_conditional(np.bitwise_and), *type),
        f"s_or_{kind}": (_conditional(np.bitwise_or), *type),
        f"s_xor_{kind}": (_conditional(np.bitwise_xor), *type),
        f"s_and_not1_{kind}": (AND_NOT, *type),
        f"s_andn2_{kind}": (AND_NOT, *type),
        f"s_not_{kind}": (_conditional(np.bitwise_not), *type[:2]),
        f"s_mov_{kind}": (_kept(np.copy), *type[:2]),
        f"s_lshl_{kind}": (_conditional(lambda a, b: a << shift_of(b, a)), *type[:2], "u32"),
        f"s_lshr_{kind}": (_conditional(lambda a, b: a >> shift_of(b, a)), *type[:2], "u32"),
        f"s_ashr_i{bits}": (
            _conditional(lambda a, b: a >> shift_of(b, a)), f"i{bits}", f"i{bits}", "u32",
        ),
    }  # fmt: skip


OPERATIONS = {
    **_logic(32),
    **_logic(64),
    "s_brev_b32": (_kept(reversed_bits), "u32", "u32"),
    "s_movk_i32": (_kept(np.copy), "i32", "i32"),
    "s_abs_i32": (_conditional(np.abs), "i32", "i32"),
    "s_add_u32": (_carried, *_both(32)),
    "s_sub_u32": (lambda a, b: (a - b, a < b), *_both(32)),
    "s_add_i32": (_overflowing(np.add), "i32", "i32", "i32"),
    "s_sub_i32": (_overflowing(np.subtract), "i32", "i32", "i32"),
    "s_mul_i32": (_kept(np.multiply), "i32", "i32", "i32"),
    "s_mul_hi_u32": (
        _kept(lambda a, b: (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)), *_both(32),
    ),
    "s_max_i32": (_extreme(np.maximum, np.greater_equal), "i32", "i32", "i32"),
    "s_min_i32": (_extreme(np.minimum, np.less), "i32", "i32", "i32"),
    "s_bfe_u32": (_unsigned_field, *_both(32)),
    "s_bfe_i32": (_signed_field, "i32", "i32", "i32"),
    **{f"s_lshl{n}_add_u32": (_shifted_and_added(n), *_both(32)) for n in (1, 2, 3, 4)},
}  # fmt: skip
"""name -> (function(operands) -> (result, condition or None), type of the result, types of the operands)"""

SAVED = {
    f"s_{name}_saveexec_b{bits}": function
    for name, function in (
        ("and", np.bitwise_and), ("or", np.bitwise_or),
        *((name, lambda value, executed: value & ~executed) for name in ("andn2", "and_not1")),  # gfx942, gfx1100
    )
    for bits in (32, 64)
}  # fmt: skip
"""What is combined with EXEC."""

COMPARISONS = {
    "eq": np.equal, "lg": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
}  # fmt: skip


def step(instruction, lanes):
    name, operands = instruction.opcode, instruction.operands
    if name in OPERATIONS:
        function, result, *types = OPERATIONS[name]
        if name == "s_movk_i32":
            operands = operands[0], _extended(operands[1])
        return _operation(function, result, types, operands[0], operands[1:])
    if name in ("s_addk_i32", "s_mulk_i32"):
        function, result, *types = OPERATIONS[name.replace("k", "", 1)]
        return _operation(function, result, types, operands[0], (operands[0], _extended(operands[1])))
    if name.startswith("s_cmp"):
        _, form, comparison, type = name.split("_")
        if form == "cmpk" and type == "i32":
            operands = operands[0], _extended(operands[1])
        return _comparison(COMPARISONS[comparison], type, operands)
    if name.startswith("s_bitcmp"):
        return _bit(operands, name.startswith("s_bitcmp1"))
    if name in ("s_cselect_b32", "s_cselect_b64"):
        return _select(operands, "u" + name[-2:])
    if name in ("s_addc_u32", "s_subb_u32"):
        return _with_carry(operands, is_sum=name == "s_addc_u32")
    if name in SAVED:
        return _save(operands, SAVED[name], "u" + name[-2:])
    return None


def _extended(number: Number) -> Number:
    """16 bits with a sign."""
    value = int(number.text, 0) & 0xFFFF
    return Number(str(value - (value >> 15 << 16)))


def _set_condition(registers, condition) -> None:
    condition = np.broadcast_to(condition, registers.scc.shape)
    waves = registers.waves
    registers.scc = condition if waves is None else np.where(waves[:, None], condition, registers.scc)


def _operation(function, result, types, destination, sources):
    readers = [reader(source, type) for source, type in zip(sources, types, strict=True)]
    write = writer(destination)
    # LLVM joins the bits of a mask that these lanes keep, which nobody may have made yet, with those of others
    may_be_undefined = len(sources) == 2 and getattr(sources[1], "number", None) == EXEC and function is AND_NOT

    def operate(machine):
        registers = machine.registers
        if may_be_undefined:
            registers.define(sources[0])
        value, condition = function(*[np.asarray(read(registers)) for read in readers])
        write(registers, value)
        if condition is not None:
            _set_condition(registers, condition)

    return operate


def _comparison(function, type, operands):
    first, second = (reader(operand, type) for operand in operands)
    return lambda machine: _set_condition(
        machine.registers, function(first(machine.registers), second(machine.registers))
    )


def _bit(operands, expected):
    value, place = (reader(operand, "u32") for operand in operands)

    def compare(machine):
        bit = (value(machine.registers) >> (place(machine.registers) & np.uint32(31))) & np.uint32(1)
        _set_condition(machine.registers, (bit != 0) == expected)

    return compare


def _select(operands, type):
    write = writer(operands[0])
    first, second = (reader(operand, type) for operand in operands[1:])

    def select(machine):
        registers = machine.registers
        write(registers, np.where(registers.scc, first(registers), second(registers)))

    return select


def _with_carry(operands, is_sum):
    write = writer(operands[0])
    first, second = (reader(operand, "u32") for operand in operands[1:])

    def add(machine):
        registers = machine.registers
        a, b = (read(registers).astype(np.int64) for read in (first, second))
        exact = a + b + registers.scc if is_sum else a - b - registers.scc
        write(registers, (exact & 0xFFFFFFFF).astype(np.uint32))
        _set_condition(registers, (exact < 0) | (exact > 0xFFFFFFFF))

    return add


def _save(operands, function, type):
    """The old EXEC is kept, the new one is combined with the operand."""
    count = 2 if type == "u64" else 1
    executed = Register("s", EXEC, count)
    write, write_exec = writer(operands[0]), writer(executed)
    read, read_exec = reader(operands[1], type), reader(executed, type)

    def save(machine):
        registers = machine.registers
        before, value = read_exec(registers), read(registers)
        after = function(value, before)
        write(registers, before)
        write_exec(registers, after)
        _set_condition(registers, after != 0)

    return save
