"""Vector arithmetic that also reads or makes a mask: carries, 64-bit products, the steps of a division."""

import numpy as np

from ...opcodes.arithmetic import fused
from ..parsing import VCC, Register
from ..registers import mask_reader, reader, writer

WORD = np.int64(0xFFFFFFFF)


def step(instruction, lanes):
    name, operands = instruction.opcode, instruction.operands
    if name not in STEPS:
        return None
    if instruction.modifiers:
        raise KeyError(f"modifiers {instruction.modifiers}")
    return STEPS[name](*operands)


def _sum(function):
    """Modulo 2^32; the mask tells in which lanes it overflows. With one more operand: a mask that is carried in."""

    def family(destination, mask, first, second, carried=None):
        write, first, second = writer(destination), reader(first, "u32"), reader(second, "u32")
        carry = mask_reader(carried) if carried is not None else lambda registers: np.False_

        def add(machine):
            registers = machine.registers
            a, b = (read(registers).astype(np.int64) for read in (first, second))
            exact = function(a, b, carry(registers))
            write(registers, (exact & WORD).astype(np.uint32))
            _write_mask(registers, mask, (exact < 0) | (exact > WORD))

        return add

    return family


def _write_mask(registers, mask, lanes) -> None:
    """Of inactive lanes the bits are 0."""
    lanes = np.broadcast_to(lanes, registers.shape)
    registers.write_mask(mask.number, lanes if registers.active is None else lanes & registers.active)


def _multiply_add(destination, mask, first, second, third):
    write, first, second, add = writer(destination), reader(first, "u32"), reader(second, "u32"), reader(third, "u64")
    upper = third._replace(number=third.number + 1, count=1) if isinstance(third, Register) else None

    def multiply_add(machine):
        registers = machine.registers
        if upper is not None:  # undefined, where only the lower half of the result is used
            registers.define(upper)
        product = first(registers).astype(np.uint64) * second(registers).astype(np.uint64)
        total = product + add(registers)
        write(registers, total)
        _write_mask(registers, mask, total < product)

    return multiply_add


def scaled(value, denominator, numerator):
    """v_div_scale_f32: (the denominator or numerator as the division needs it, whether the quotient is scaled back).

    value is one of the other two.
    """
    exponent = lambda x: x.view(np.uint32).astype(np.int32) >> 23 & 255  # noqa: E731
    subnormal = lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny)  # noqa: E731
    of_denominator = value == denominator
    up, down = np.ldexp(value, 64), np.ldexp(value, -64)
    inverse = 1.0 / denominator.astype(np.float64)
    tiny_inverse = np.abs(inverse) < np.finfo(np.float32).tiny  # as a float32
    tiny_quotient = subnormal((numerator / denominator).astype(np.float32))
    cases = [
        ((numerator == 0) | (denominator == 0), np.float32(np.nan), False),
        (exponent(numerator) - exponent(denominator) >= 96, np.where(of_denominator, up, value), True),
        (subnormal(denominator), up, False),
        (tiny_inverse & tiny_quotient, np.where(of_denominator, up, value), True),
        (tiny_inverse, down, False),
        (tiny_quotient, np.where(value == numerator, up, value), True),
        (exponent(numerator) <= 23, up, False),
    ]
    conditions = [condition for condition, _, _ in cases]
    return (
        np.select(conditions, [np.broadcast_to(x, conditions[0].shape) for _, x, _ in cases], value),
        np.select(conditions, [np.broadcast_to(flag, conditions[0].shape) for _, _, flag in cases], False),
    )


def _scale(destination, mask, *sources):
    write, readers = writer(destination), [reader(source, "f32") for source in sources]

    def scale(machine):
        registers = machine.registers
        result, flags = scaled(*[np.broadcast_to(read(registers), registers.shape) for read in readers])
        write(registers, result.astype(np.float32))
        _write_mask(registers, mask, flags)

    return scale


def _scale_back(destination, *sources):
    """v_div_fmas_f32: a fused product, times 2^32 where the mask of the scaling says so."""
    write, readers = writer(destination), [reader(source, "f32") for source in sources]

    def scale_back(machine):
        registers = machine.registers
        result = fused(*[read(registers) for read in readers])
        write(registers, np.where(registers.mask(VCC), result * np.float32(2.0**32), result))

    return scale_back


_plus, _minus = _sum(lambda a, b, carry: a + b + carry), _sum(lambda a, b, carry: a - b - carry)
STEPS = {
    "v_add_co_u32": _plus, "v_add_co_ci_u32": _plus, "v_addc_co_u32": _plus, "v_sub_co_u32": _minus,
    "v_mad_u64_u32": _multiply_add, "v_div_scale_f32": _scale, "v_div_fmas_f32": _scale_back,
}  # fmt: skip
