"""Numbers: integers wrap, floats are rounded once to nearest even."""

import numpy as np

from .operation import FLOATS, INTEGERS, SIGNED, UNSIGNED, WIDER, Operation, one_of, only, same

TINY = np.finfo(np.float32).tiny


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0.0), x), x)


def _flushing(function):
    return lambda *operands: flushed(function(*map(flushed, operands)))


def _both(function):
    """Of two float32 in 64 bits each."""

    def of_pairs(*operands):
        pairs = [np.ascontiguousarray(x)[..., None].view(np.float32) for x in operands]
        return np.ascontiguousarray(function(*pairs)).view(np.uint64)[..., 0]

    return of_pairs


def _float(function, operands: int):
    """With .rn, which is the default, and .ftz."""

    def family(modifiers: tuple[str, ...]) -> Operation:
        *rest, type = modifiers
        found = only(rest, "rn", "ftz")
        function_of = _flushing(function) if "ftz" in found else function
        if type == "f32x2":
            return same(_both(function_of), type, operands)
        return same(function_of, one_of(type, FLOATS), operands)

    return family


def _integer(function, operands: int):
    def family(modifiers: tuple[str, ...]) -> Operation:
        (type,) = modifiers
        return same(function, one_of(type, INTEGERS), operands)

    return family


def _either(floats, integers, operands: int):
    of_floats, of_integers = _float(floats, operands), _integer(integers, operands)
    return lambda modifiers: (of_floats if modifiers[-1] in (*FLOATS, "f32x2") else of_integers)(modifiers)


def fused(a, b, c):
    """a * b + c: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def smaller(a, b):
    """A NaN gives way to a number, and +0 to -0."""
    return np.where(a == b, (a.view("u4") | b.view("u4")).view("f4"), np.fmin(a, b))


def larger(a, b):
    return np.where(a == b, (a.view("u4") & b.view("u4")).view("f4"), np.fmax(a, b))


def _absolute(modifiers):
    if modifiers in (("bf16x2",), ("f16x2",)):
        return same(lambda x: x & np.uint32(0x7FFF7FFF), modifiers[0], 1)
    return _either(np.abs, np.abs, 1)(modifiers)


def _extreme(floats, integers):
    def family(modifiers):
        if modifiers == ("f32",):
            return same(floats, "f32", 2)
        if modifiers == ("relu", "s32"):  # not below 0
            return same(lambda a, b: np.maximum(integers(a, b), np.int32(0)), "s32", 2)
        return _integer(integers, 2)(modifiers)

    return family


def _fma(modifiers):
    one_of(modifiers[-1], ("f32", "f32x2"))
    return _float(fused, 3)(modifiers)


def _quotient(a, b):
    """Towards zero, as in C."""
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0)))


def _divide(modifiers):
    if modifiers == ("full", "f32"):  # within two units of the last place; here the nearest
        return same(np.divide, "f32", 2)
    (type,) = modifiers
    return same(np.floor_divide if type in UNSIGNED else _quotient, one_of(type, INTEGERS), 2)


def _remainder(modifiers):
    (type,) = modifiers
    return same(lambda a, b: a - b * _quotient(a, b), one_of(type, INTEGERS), 2)


def _high(a, b):
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _widened(a, b):
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def _multiply(modifiers):
    part, type = modifiers[0], modifiers[-1]
    if part == "wide":
        return Operation(_widened, WIDER[type], (type, type))
    if part == "hi":
        return same(_high, one_of(type, ("s32", "u32")), 2)
    if part == "lo":
        return same(np.multiply, one_of(type, INTEGERS), 2)
    return _float(np.multiply, 2)(modifiers)


def _multiply_add(modifiers):
    part, type = modifiers
    if part == "wide":
        return Operation(lambda a, b, c: _widened(a, b) + c, WIDER[type], (type, type, WIDER[type]))
    only((part,), "lo")
    return same(lambda a, b, c: a * b + c, one_of(type, INTEGERS), 3)


def _negated(modifiers):
    return _either(np.negative, np.negative, 1)(modifiers) if modifiers[-1] in FLOATS + SIGNED else one_of("neg", ())


def _approximate(function):
    """.approx of float32: within a few units of the last place; here the nearest."""

    def family(modifiers):
        found = only(modifiers, "approx", "ftz", "f32")
        return same(_flushing(function) if "ftz" in found else function, "f32", 1)

    return family


FAMILIES = {
    "add": _either(np.add, np.add, 2),
    "sub": _either(np.subtract, np.subtract, 2),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "div": _divide,
    "rem": _remainder,
    "min": _extreme(smaller, np.minimum),
    "max": _extreme(larger, np.maximum),
    "min3": lambda modifiers: same(lambda a, b, c: smaller(smaller(a, b), c), one_of(*modifiers, ("f32",)), 3),
    "max3": lambda modifiers: same(lambda a, b, c: larger(larger(a, b), c), one_of(*modifiers, ("f32",)), 3),
    "neg": _negated,
    "abs": _absolute,
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "rcp": _approximate(np.reciprocal),
    "sqrt": _approximate(np.sqrt),
    "rsqrt": _approximate(lambda x: 1 / np.sqrt(x)),
    "tanh": _approximate(np.tanh),
}
