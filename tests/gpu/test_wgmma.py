"""Products of warpgroups (wgmma) in the executor of PTX: layouts by CuTe's algebra, waits and fences in small kernels.

Needs no Triton, like test_emulator.py.
"""

from math import prod
from typing import NamedTuple

import numpy as np
import pytest
import torch

from emulator import faults
from emulator.programs import run
from small_kernels import edited, kernel

RIGHT, SIZE = 16384, 32768
"""Where the right factor begins in shared memory, and the bytes of both."""
MODES = {1: 0, 2: 3, 4: 2, 8: 1}
"""A descriptor's mode by the pieces of 16 bytes in a row of its pattern."""
TYPES = {"bf16": (2, 16), "f16": (2, 16), "tf32": (4, 8)}
"""Bytes of a number, and K."""


# --- layouts, as CuTe defines them ------------------------------------------------------------------------------------


def size(shape) -> int:
    return shape if isinstance(shape, int) else prod(map(size, shape))


def offset(index: int, shape, stride) -> int:
    """An index walks through the modes of a shape, the first one fastest."""
    if isinstance(shape, int):
        return index * stride
    total = 0
    for part, step in zip(shape, stride, strict=True):
        total += offset(index % size(part), part, step)
        index //= size(part)
    return total


def swizzle(bits: int, base: int, shift: int, x: int) -> int:
    """Swizzle<bits, base, shift>"""
    mask = (1 << bits) - 1 << base + shift
    return x ^ (x & mask) >> shift


class Layout(NamedTuple):
    """Of a factor [rows, K] in shared memory; pieces: those in a row of the pattern; start: bytes."""

    type: str
    rows: int
    pieces: int
    is_transposed: bool
    start: int

    def shape_and_stride(self):
        """In numbers: the canonical layouts of make_gmma_desc in CUTLASS."""
        t, w = 16 // TYPES[self.type][0], self.pieces
        leading, stride = (self.leading * t // 16, self.stride * t // 16)
        if not self.is_transposed:
            return ((8, self.rows // 8), (t, 2)), ((w * t, stride), (1, t if w > 1 else leading))
        far, near = (leading, stride) if w > 1 else (stride, leading)
        return ((t, w, self.rows // t // w), (8, 2)), ((1, t, far), (w * t, near))

    @property
    def leading(self) -> int:
        """Bytes: larger than what has to lie between."""
        return 16 * self.rows + 128 if self.pieces == 1 else 2 * self.stride

    @property
    def stride(self) -> int:
        return 128 * self.pieces

    def descriptor(self) -> int:
        return self.start >> 4 | self.leading << 12 | self.stride << 28 | MODES[self.pieces] << 62

    def address(self, row: int, k: int) -> int:
        shape, stride = self.shape_and_stride()
        numbers = offset(row, shape[0], stride[0]) + offset(k, shape[1], stride[1])
        return swizzle(self.pieces.bit_length() - 1, 4, 3, self.start + numbers * TYPES[self.type][0])

    def store(self, memory: np.ndarray, factor: np.ndarray) -> None:
        bits = bits_of(factor, self.type)
        view = memory.view(bits.dtype)
        for (row, k), number in np.ndenumerate(bits):
            place = self.address(row, k) // bits.itemsize
            assert view[place] == 0
            view[place] = number


def bits_of(x: np.ndarray, type: str) -> np.ndarray:
    if type == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return bits | np.uint32(0x1FFF) if type == "tf32" else (bits >> 16).astype(np.uint16)  # below tf32 nothing is read


def place_of_sum(lane: int, i: int) -> tuple[int, int]:
    """Row and column of a lane's register."""
    return 16 * (lane // 32) + lane % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


def places_of_left(type: str, lane: int, i: int) -> list[tuple[int, int]]:
    """Row and K of the numbers in a lane's register."""
    row = 16 * (lane // 32) + lane % 32 // 4 + 8 * (i % 2)
    if type == "tf32":
        return [(row, lane % 4 + 4 * (i // 2))]
    return [(row, lane % 4 * 2 + half + 8 * (i // 2)) for half in (0, 1)]


# --- a kernel ---------------------------------------------------------------------------------------------------------


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


LOAD_SHARED = "".join(
    f"""
	ld.global.v4.b32 {names(10, 4)}, [%rd13+{start}];
	st.shared.v4.b32 [%r9+{start}], {names(10, 4)};"""
    for start in range(0, SIZE, 2048)
)
FENCE, BARRIER = "\n\tfence.proxy.async.shared::cta;", "\n\tbar.sync 0;"
BEGIN = "\n\tshl.b32 %r9, %r0, 4;\n\tcvt.u64.u32 %rd14, %r9;\n\tadd.s64 %rd13, %rd0, %rd14;" + LOAD_SHARED
LOAD_LEFT = f"\n\tadd.s64 %rd13, %rd13, {SIZE};\n\tld.global.v4.b32 {names(20, 4)}, [%rd13];"
ORDER, COMMIT = (f"\n\twgmma.{name}.sync.aligned;" for name in ("fence", "commit_group"))
WAIT = "\n\twgmma.wait_group.sync.aligned 0;"
FIRST = 30
"""The first register of the sums."""


def product(type: str, columns: int, left: str, right: str, adds: str = "0", transposed: str = "") -> str:
    shape = f"m64n{columns}k{TYPES[type][1]}.f32.{type}.{type}"
    sums = names(FIRST, columns // 2)
    return f"\n\twgmma.mma_async.sync.aligned.{shape} {sums}, {left}, {right}, {adds}, 1, 1{transposed};"


def store_sums(columns: int) -> str:
    count = columns // 2
    stores = "".join(f"\n\tst.global.b32 [%rd16+{4 * i}], %r{FIRST + i};" for i in range(count))
    return f"\n\tmul.wide.u32 %rd15, %r0, {4 * count};\n\tadd.s64 %rd16, %rd1, %rd15;" + stores


def sums_of(body: str, columns: int, memory: np.ndarray, warps: int = 4) -> np.ndarray:
    """[64, columns] that the first four warps store, by `place_of_sum`."""
    y = torch.zeros(32 * warps, columns // 2)
    x = torch.from_numpy(memory.view(np.int32))
    run(kernel(body, registers=FIRST + 130), [x, y], (1, 1, 1), warps, SIZE)
    found = np.zeros((64, columns), np.float32)
    for lane in range(128):
        for i in range(columns // 2):
            found[place_of_sum(lane, i)] = y[lane, i]
    return found


def random_factors(type: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(columns)
    return tuple(rng.integers(-8, 8, (rows, TYPES[type][1])) / 4 for rows in (64, columns))


@pytest.mark.parametrize("pieces, columns", [(1, 8), (1, 24), (2, 48), (4, 96), (8, 128)])
@pytest.mark.parametrize("type", TYPES)
def test_factors_are_laid_out_as_documented(type, pieces, columns):
    """The left one in registers, then in shared memory; each of them as rows or, in 16 bits, transposed."""
    a, b = random_factors(type, columns)
    for is_transposed in (False, True) if type != "tf32" and columns > 8 else (False,):
        # rows may begin within a row of the pattern, where the next part of K lies
        start = 32 if pieces > 2 and not is_transposed else 0
        layouts = [
            Layout(type, rows, pieces, is_transposed, first + start) for rows, first in ((64, 0), (columns, RIGHT))
        ]
        signs = "" if type == "tf32" else f", {int(is_transposed)}"
        memory = np.zeros(SIZE + 2048, np.uint8)
        for layout, factor in zip(layouts, (a, b), strict=True):
            layout.store(memory, factor)
        registers = memory[SIZE:].view(bits_of(a, type).dtype).reshape(128, 4, -1)
        for lane, i in np.ndindex(128, 4):
            registers[lane, i] = bits_of(np.array([a[place] for place in places_of_left(type, lane, i)]), type)
        left, right = (str(layout.descriptor()) for layout in layouts)
        begin, end = BEGIN + FENCE + BARRIER + LOAD_LEFT + ORDER, COMMIT + WAIT + store_sums(columns)
        for body in (
            product(type, columns, left, right, transposed=signs * 2),
            product(type, columns, names(20, 4), right, transposed=signs),
        ):
            np.testing.assert_array_equal(sums_of(begin + body + end, columns, memory), a @ b.T)


def test_one_factor_is_transposed():
    """Each has a sign of its own."""
    a, b = random_factors("bf16", 64)
    left, right = Layout("bf16", 64, 8, True, 0), Layout("bf16", 64, 4, False, RIGHT)
    memory = np.zeros(SIZE, np.uint8)
    left.store(memory, a), right.store(memory, b)
    body = product("bf16", 64, str(left.descriptor()), str(right.descriptor()), transposed=", 1, 0")
    found = sums_of(BEGIN + FENCE + BARRIER + ORDER + body + COMMIT + WAIT + store_sums(64), 64, memory)
    np.testing.assert_array_equal(found, a @ b.T)


# --- waits and fences -------------------------------------------------------------------------------------------------

LEFT, OTHER = Layout("f16", 64, 2, False, 0), Layout("f16", 64, 2, False, 8192)
FACTOR = Layout("f16", 16, 2, False, RIGHT)
LOADED = BEGIN + FENCE + BARRIER
MULTIPLY = product("f16", 16, str(LEFT.descriptor()), str(FACTOR.descriptor()), transposed=", 0, 0")
ADD = product("f16", 16, str(OTHER.descriptor()), str(FACTOR.descriptor()), "1", ", 0, 0")
IN_REGISTERS = product("f16", 16, names(20, 4), str(FACTOR.descriptor()), transposed=", 0")
DONE = COMMIT + WAIT + store_sums(16)


def two_products(body: str, warps: int = 4) -> np.ndarray:
    """What the body makes of the factors a, a' and b; and a b + a' b."""
    rng = np.random.default_rng(1)
    a, other, b = (rng.integers(-8, 8, (rows, 16)) / 4 for rows in (64, 64, 16))
    memory = np.ones(SIZE + 4096, np.float16).view(np.uint8)
    for layout, factor in ((LEFT, a), (OTHER, other), (FACTOR, b)):
        view = memory.view(np.float16)
        for place, number in np.ndenumerate(factor):
            view[layout.address(*place) // 2] = number
    return sums_of(body, 16, memory, warps), a @ b.T, other @ b.T


@pytest.mark.parametrize("between", ["", COMMIT, COMMIT + WAIT, COMMIT + WAIT + ORDER])
def test_products_add_up(between):
    """Those of one shape need no fence between."""
    found, first, second = two_products(LOADED + ORDER + MULTIPLY + between + ADD + DONE)
    np.testing.assert_array_equal(found, first + second)


def test_an_older_group_is_waited_for():
    """A later one, into other registers, may go on."""
    later = edited(IN_REGISTERS, names(FIRST, 8), names(60, 8))
    body = (
        LOADED + LOAD_LEFT + ORDER + MULTIPLY + COMMIT + later + COMMIT + edited(WAIT, "0", "1") + store_sums(16) + WAIT
    )
    found, first, _ = two_products(body)
    np.testing.assert_array_equal(found, first)


@pytest.mark.parametrize("swapped", [0, 1])
def test_two_warpgroups(swapped):
    """Each has its own left factor; the first one's sums are stored."""
    choose = f"""
	shr.u32 %r15, %r0, 7;
	xor.b32 %r15, %r15, {swapped};
	mul.lo.u32 %r15, %r15, {OTHER.descriptor() - LEFT.descriptor()};
	cvt.u64.u32 %rd17, %r15;
	add.s64 %rd17, %rd17, {LEFT.descriptor()};"""
    begin = edited(LOADED, "shl.b32 %r9, %r0, 4;", "and.b32 %r9, %r0, 127;\n\tshl.b32 %r9, %r9, 4;")
    body = begin + choose + ORDER + edited(MULTIPLY, str(LEFT.descriptor()), "%rd17") + DONE
    found, *expected = two_products(body, warps=8)
    np.testing.assert_array_equal(found, expected[swapped])


USE = f"\n\tadd.f32 %r5, %r{FIRST}, 0f00000000;"
WRITE = f"\n\tmov.b32 %r{FIRST + 3}, 0;"
STORE_SHARED = f"\n\tst.shared.b32 [%r2+{RIGHT}], %r0;"
USE_AS_FACTOR = product("f16", 16, names(FIRST, 4), str(FACTOR.descriptor()), transposed=", 0")
USE_AS_FACTOR = edited(USE_AS_FACTOR, names(FIRST, 8), names(60, 8))
REGISTERS = LOADED + LOAD_LEFT + ORDER + IN_REGISTERS
MEMORY = LOADED + ORDER + MULTIPLY
MISTAKES = {
    "no wait": (faults.NotWaited, MEMORY + COMMIT + store_sums(16)),
    "no commit": (faults.NotWaited, MEMORY + WAIT + store_sums(16)),
    "a wait for one group less": (faults.NotWaited, MEMORY + COMMIT + edited(WAIT, "0", "1") + store_sums(16)),
    "nobody waits": (faults.NotWaited, MEMORY + COMMIT),
    "sums that are read before the wait": (faults.NotWaited, MEMORY + COMMIT + USE + WAIT),
    "sums that are written before the wait": (faults.NotWaited, MEMORY + WRITE + DONE),
    "a factor that is written before the wait": (faults.NotWaited, REGISTERS + "\n\tmov.b32 %r21, 0;" + DONE),
    "a factor that is read before the wait": (faults.NotWaited, REGISTERS + "\n\tmov.b32 %r5, %r21;" + DONE),
    "shared memory that is written before the wait": (faults.NotWaited, MEMORY + COMMIT + STORE_SHARED + WAIT),
    "written before the wait, behind a barrier": (faults.NotWaited, MEMORY + COMMIT + BARRIER + STORE_SHARED + WAIT),
    "written after the wait, with no barrier": (faults.Race, MEMORY + DONE + STORE_SHARED),
    "a product of a factor that another one makes": (
        faults.NotWaited, MEMORY + COMMIT + WAIT + ORDER + MULTIPLY + USE_AS_FACTOR,
    ),
    "registers without a fence": (faults.Unfenced, LOADED + MULTIPLY + DONE),
    "a factor that is written after the fence": (
        faults.Unfenced, LOADED + LOAD_LEFT + ORDER + "\n\tmov.b32 %r21, 0;" + IN_REGISTERS + DONE,
    ),
    "sums that are used after the fence": (faults.Unfenced, MEMORY + COMMIT + WAIT + USE + ADD + DONE),
    "a copy, after the fence, of what came after it": (
        faults.Unfenced,
        LOADED + LOAD_LEFT + ORDER + "\n\tadd.s32 %r5, %r21, 1;\n\tmov.b32 %r21, %r5;" + IN_REGISTERS + DONE,
    ),
    "shared memory without a fence": (faults.Unfenced, BEGIN + BARRIER + ORDER + MULTIPLY + DONE),
    "shared memory that is fenced too early": (faults.Unfenced, FENCE + BEGIN + BARRIER + ORDER + MULTIPLY + DONE),
    "shared memory that is written again": (
        faults.Unfenced, LOADED + "\n\tst.shared.b32 [%r2], %r0;" + BARRIER + ORDER + MULTIPLY + DONE,
    ),
    "no barrier": (faults.Race, BEGIN + FENCE + ORDER + MULTIPLY + DONE),
    "memory that nobody wrote": (faults.Uninitialized, ORDER + MULTIPLY + DONE),
    "sums that nobody wrote": (faults.Uninitialized, LOADED + ORDER + ADD + DONE),
    "three warps": (
        faults.Diverged, LOADED + "\n\tsetp.lt.u32 %p1, %r0, 96;\n\t@!%p1 bra $L_1;" + ORDER + MULTIPLY + "\n$L_1:",
    ),
    "warps that do not agree": (
        faults.Diverged,
        LOADED + "\n\tcvt.u64.u32 %rd17, %r0;" + ORDER + edited(MULTIPLY, str(LEFT.descriptor()), "%rd17"),
    ),
    "beyond the end": (
        faults.OutOfBounds,
        LOADED + ORDER + edited(MULTIPLY, str(LEFT.descriptor()), str(LEFT._replace(start=SIZE - 1024).descriptor())),
    ),
    "a descriptor with an offset": (
        faults.Unknown, LOADED + ORDER + edited(MULTIPLY, str(LEFT.descriptor()), str(LEFT.descriptor() | 1 << 49)),
    ),
    "a factor with another sign": (faults.Unknown, LOADED + ORDER + edited(MULTIPLY, ", 0, 1, 1", ", 0, -1, 1")),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name):
    fault, body = MISTAKES[name]
    with pytest.raises(faults.Fault) as caught:
        two_products(body)
    assert type(caught.value) is fault


COPIED = LOADED + LOAD_LEFT + "\n\tmov.b32 %r5, %r21;" + ORDER + "\n\tmov.b32 %r21, %r5;" + IN_REGISTERS + DONE


@pytest.mark.parametrize("body", [MEMORY + DONE + BARRIER + STORE_SHARED, REGISTERS + DONE + USE, COPIED])
def test_without_the_mistake_nothing_is_raised(body):
    two_products(body)


# --- whose writes a fence is for --------------------------------------------------------------------------------------

ONE_WARP = """
	setp.lt.u32 %p1, %r0, 32;
	@!%p1 bra $L_NAME;FENCE
$L_NAME:"""


def by_one_warp(name: str) -> str:
    return edited(edited(ONE_WARP, "FENCE", FENCE), "NAME", name)


FENCES = {
    "of the writers": (FENCE + BARRIER, None),
    "of the readers": (BARRIER + FENCE, None),
    "of one of them, which all wait for": (BARRIER + by_one_warp("1") + BARRIER, None),
    "of one writer": (by_one_warp("1") + BARRIER, faults.Unfenced),
    "of one reader": (BARRIER + by_one_warp("1"), faults.Unfenced),
}


@pytest.mark.parametrize("name", FENCES)
def test_fence(name):
    between, fault = FENCES[name]
    body = BEGIN + between + ORDER + MULTIPLY + DONE
    if fault is None:
        found, first, _ = two_products(body)
        np.testing.assert_array_equal(found, first)
    else:
        with pytest.raises(fault):
            two_products(body)
