"""The executor of PTX by itself: each opcode against a formula of single numbers, small kernels, and what it refuses.

Needs no Triton. That it runs the kernels is tested in test_executed.py.
"""

import math

import numpy as np
import pytest
import torch

from emulator import faults
from emulator.opcodes import matrix, operation_of
from emulator.registers import TYPES
from ptx_formulas import APPROXIMATE, FORMULAS, single
from small_kernels import LOAD, STORE, edited, integers, launch, result_of

EDGES = {
    "integers": (
        0, 1, 2, 3, 7, 8, 31, 32, 33, 255, -1, -2, -8, 1 << 15, (1 << 15) - 1, 1 << 31, (1 << 31) - 1, 1 << 63,
    ),
    "floats": (
        0.0, -0.0, 1.0, -1.0, 0.5, 3e38, -3e38, 1e-40, -1e-45, 2.0**-126, math.inf, -math.inf, math.nan, 65520.0,
    ),
}  # fmt: skip


def operands_of(opcode: str, count: int = 400) -> list[np.ndarray]:
    """Random numbers of each operand's type, among them what is special."""
    rng = np.random.default_rng(len(opcode))
    return [_numbers(rng, type, count, divisor=opcode[:3] in ("div", "rem") and place == 1)
            for place, type in enumerate(operation_of(opcode).operands)]  # fmt: skip


def _numbers(rng, type: str, count: int, divisor: bool) -> np.ndarray:
    dtype = TYPES[type]
    if dtype.kind == "b":
        return rng.random(count) < 0.5
    if dtype.kind == "f":
        x = rng.standard_normal(count) * 2.0 ** rng.integers(-20, 20, count)
        x[: count // 4] = rng.choice(EDGES["floats"], count // 4)
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    bits = rng.integers(0, 1 << 63, count, dtype=np.uint64) >> rng.integers(0, 63, count).astype(np.uint64)
    special = np.array([n & (1 << 64) - 1 for n in EDGES["integers"]], np.uint64)
    bits[: count // 2] = rng.choice(special, count // 2)
    x = bits.astype(f"u{dtype.itemsize}").view(dtype)
    return np.where(x == 0, dtype.type(1), x) if divisor else x


def numbers(values: np.ndarray, type: str) -> list:
    """As Python's; a bfloat16 stays its bits."""
    return values.view(TYPES[type]).tolist()


def in_bits(x, type: str) -> int:
    """What a register of that type would hold."""
    dtype = TYPES[type]
    if type == "f32x2":
        low, high = (in_bits(y, "f32") for y in np.array(x, np.uint64).reshape(1).view(np.float32).tolist())
        return high << 32 | low
    if dtype.kind == "f":
        return 0 if math.isnan(x) else int(np.array(x, dtype).view(f"u{dtype.itemsize}"))
    return int(x) & (1 << 8 * dtype.itemsize) - 1


@pytest.mark.parametrize("opcode", FORMULAS)
def test_opcode(opcode):
    function, result, types = operation_of(opcode)
    operands = operands_of(opcode)
    with np.errstate(all="ignore"):
        found = numbers(np.asarray(function(*operands)), result)
    rows = zip(*(numbers(x, type) for x, type in zip(operands, types, strict=True)), strict=True)
    for row, actual in zip(rows, found, strict=True):
        expected = FORMULAS[opcode](*row)
        assert in_bits(actual, result) == in_bits(expected, result), (row, actual, expected)


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_opcode(opcode):
    function, _, _ = operation_of(opcode)
    (x,) = operands_of(opcode)
    x = np.abs(x) if "lg2" in opcode else x
    with np.errstate(all="ignore"):
        found = function(x)
    for a, actual in zip(x.tolist(), found.tolist(), strict=True):
        expected = APPROXIMATE[opcode](a)
        if math.isfinite(expected) and abs(expected) >= 2.0**-126:
            assert abs(actual - expected) <= 2.0**-21 * max(abs(expected), 2.0**-4 if "lg2" in opcode else 0.0), a
        elif expected == 0.0:
            assert actual == 0.0, a


def test_a_fused_product_is_rounded_once():
    a, b = np.float32(1 + 2**-13), np.float32(1 - 2**-13)
    fused, rounded = (operation_of(opcode).function for opcode in ("fma.rn.f32", "mul.f32"))
    assert rounded(a, b) == 1.0 and fused(np.array([a]), b, np.float32(-1.0)) == -(2.0**-26)
    assert single(1 + 2**-24) == 1.0


# --- products ---------------------------------------------------------------------------------------------------------


def place_of_left(type: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of the i-th number that a lane holds: the formulas of the manual, as they stand there."""
    group, place = lane >> 2, lane % 4
    if type == "tf32":
        return group if i in (0, 2) else group + 8, place if i < 2 else place + 4
    return group if i in (0, 1, 4, 5) else group + 8, place * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_of_right(type: str, lane: int, i: int) -> tuple[int, int]:
    group, place = lane >> 2, lane % 4
    if type == "tf32":
        return place + 4 * i, group
    return place * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_of_sum(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def spread(matrices: np.ndarray, place, per_lane: int) -> np.ndarray:
    """[warps, rows, columns] -> [warps * 32, per_lane]"""
    rows = [[x[place(lane, i)] for i in range(per_lane)] for x in matrices for lane in range(32)]
    return np.array(rows, matrices.dtype)


@pytest.mark.parametrize("type", ["bf16", "f16", "tf32"])
def test_a_product_is_laid_out_as_documented(type):
    rng = np.random.default_rng(3)
    depth, per_register = (8, 1) if type == "tf32" else (16, 2)
    a, b, c = (rng.integers(-8, 8, (3, *shape)) / 4 for shape in ((16, depth), (depth, 8), (16, 8)))

    def registers(matrices, place, count):
        numbers = spread(matrices.astype(np.float32), lambda lane, i: place(type, lane, i), count * per_register)
        if type == "tf32":
            bits = numbers.view(np.uint32) | np.uint32(0x1FFF)  # what is below tf32 is not read
        elif type == "f16":
            bits = numbers.astype(np.float16).view(np.uint32)
        else:
            bits = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
        return np.ascontiguousarray(bits.T)

    sums = np.ascontiguousarray(spread(c.astype(np.float32), place_of_sum, 4).T)
    found = matrix.multiply(registers(a, place_of_left, 4), registers(b, place_of_right, 2), sums, type)
    np.testing.assert_array_equal(found.T, spread(a @ b + c, place_of_sum, 4).astype(np.float32))


# --- small kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shuffle, source",
    [
        ("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;", lambda lane: lane ^ 5),
        ("shfl.sync.idx.b32 %r4, %r3, 7, 31, -1;", lambda lane: 7),
        ("shfl.sync.up.b32 %r4, %r3, 2, 0, -1;", lambda lane: lane - 2 if lane >= 2 else lane),
        ("shfl.sync.down.b32 %r4, %r3, 9, 31, -1;", lambda lane: lane + 9 if lane < 23 else lane),
    ],
)
def test_shuffle(shuffle, source):
    found = result_of(LOAD + shuffle + "\n" + STORE, warps=2).tolist()
    assert found == [integers(64)[warp * 32 + source(lane)] for warp in range(2) for lane in range(32)]


@pytest.mark.parametrize("kind, reduce", [("add", sum), ("min", min), ("max", max)])
def test_reduction(kind, reduce):
    x = torch.randint(-1000, 1000, (64,), dtype=torch.int32)
    found = result_of(LOAD + f"redux.sync.{kind}.s32 %r4, %r3, -1;\n" + STORE, warps=2, x=x)
    assert found.tolist() == [reduce(x[:32].tolist())] * 32 + [reduce(x[32:].tolist())] * 32


def test_lanes_that_part_meet_again():
    """A loop of as many rounds as the lane says, and a branch in it."""
    body = """
	mov.b32 %r4, 0;
	mov.b32 %r5, 0;
$L_again:
	setp.ge.s32 %p1, %r5, %r0;
	@%p1 bra $L_done;
	and.b32 %r6, %r5, 1;
	setp.eq.s32 %p2, %r6, 0;
	@!%p2 bra $L_odd;
	add.s32 %r4, %r4, 100;
$L_odd:
	add.s32 %r4, %r4, 1;
	add.s32 %r5, %r5, 1;
	bra.uni $L_again;
$L_done:
	shfl.sync.idx.b32 %r7, %r4, 3, 31, -1;
	add.s32 %r4, %r4, %r7;
"""
    expected = [lane + 100 * ((lane + 1) // 2) for lane in range(32)]
    assert result_of(body + STORE).tolist() == [n + expected[3] for n in expected]


def test_several_registers_as_one():
    body = LOAD + "mov.b32 {%rs1, %rs2}, %r3;\nmov.b32 %r4, {%rs2, %rs1};\n" + STORE
    x = torch.randint(-(2**31), 2**31, (32,)).int()
    assert (
        result_of(body, x=x).tolist() == x.view(torch.int16).view(32, 2).flip(1).reshape(-1).view(torch.int32).tolist()
    )


MATRICES = """
	ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd13];
	shl.b32 %r7, %r0, 4;
	st.shared.v4.b32 [%r7], {%r3, %r4, %r5, %r6};
	bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x4SHAPE.shared.b16 {%r3, %r4, %r5, %r6}, [%r7];
	st.global.v4.b32 [%rd14], {%r3, %r4, %r5, %r6};
"""
ROWS_OF_16_BYTES = "mul.wide.u32 %rd13, %r0, 16;\nadd.s64 %rd14, %rd1, %rd13;\nadd.s64 %rd13, %rd0, %rd13;\n"


@pytest.mark.parametrize("transposed", [False, True])
def test_loads_of_matrices(transposed):
    """Register i of lane 4 r + c has numbers 2 c and 2 c + 1 of row (transposed: column) r of matrix i."""
    x = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)
    body = ROWS_OF_16_BYTES + MATRICES.replace("SHAPE", ".trans" if transposed else "")
    y = result_of(body, x=x, size=128).view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            numbers = x[i].T[lane // 4] if transposed else x[i][lane // 4]
            assert y[lane, i].tolist() == numbers[lane % 4 * 2 :][:2].tolist()


@pytest.mark.parametrize("shape", ["", ".trans"])
def test_stores_of_matrices(shape):
    """Are what loads undo."""
    body = (
        ROWS_OF_16_BYTES
        + """
	ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd13];
	shl.b32 %r7, %r0, 4;
	stmatrix.sync.aligned.m8n8.x4SHAPE.shared.b16 [%r7], {%r3, %r4, %r5, %r6};
	bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x4SHAPE.shared.b16 {%r3, %r4, %r5, %r6}, [%r7];
	st.global.v4.b32 [%rd14], {%r3, %r4, %r5, %r6};
""".replace("SHAPE", shape)
    )
    x = integers(128)
    assert torch.equal(result_of(body, x=x, size=128), x)


def test_comparison_of_halves():
    body = (
        LOAD
        + """
	setp.lt.bf16x2 %p1|%p2, %r3, 1065353216;
	selp.b32 %r4, 1, 0, %p1;
	selp.b32 %r5, 2, 0, %p2;
	add.s32 %r4, %r4, %r5;
"""
    )
    x = torch.randn(32, 2).bfloat16()  # compared with 1.0 in the upper half and 0.0 in the lower one
    below = x < torch.tensor([0.0, 1.0])
    found = result_of(body + STORE, x=x.view(torch.int32).view(32))
    assert torch.equal(found, below[:, 0].int() + 2 * below[:, 1].int())


def test_bytes_that_are_not_selected_need_no_value():
    assert result_of(LOAD + "prmt.b32 %r4, %r3, %r9, 0x3210U;\n" + STORE).tolist() == integers(32).tolist()


COPY = """
	and.b32 %r5, %r0, 7;
	setp.lt.u32 %p1, %r5, 4;
	selp.b32 %r6, 4, 0, %p1;
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd11 + 0 ], 0x4, %r6;
	cp.async.commit_group;
	cp.async.ca.shared.global [ %r2 + 256 ], [ %rd11 + 0 ], 0x4;
	cp.async.commit_group;
	cp.async.wait_group 1;
	bar.sync 0;
	xor.b32 %r7, %r2, 252;
	ld.shared.b32 %r4, [%r7];
	cp.async.wait_group 0;
"""


def test_asynchronous_copies():
    """Of two warps, each reads what the other one copied; where the source has no bytes there are zeros."""
    x = integers(64)
    found = result_of(COPY + STORE, warps=2)
    assert found.tolist() == [x[lane] if lane % 8 < 4 else 0 for lane in reversed(range(64))]


# --- mistakes that must be caught -------------------------------------------------------------------------------------


TWO_WARPS = LOAD + "st.shared.b32 [%r2], %r3;\nbar.sync 0;\nxor.b32 %r7, %r2, 252;\nld.shared.b32 %r4, [%r7];\n"
MISTAKES = {
    "a register that nobody wrote": (faults.Uninitialized, "add.s32 %r4, %r0, %r9;\n"),
    "a register that some lanes did not write": (
        faults.Uninitialized, "setp.lt.u32 %p1, %r0, 5;\n@%p1 mov.b32 %r4, 7;\nadd.s32 %r4, %r4, 1;\n",
    ),
    "shared memory that nobody wrote": (faults.Uninitialized, "ld.shared.b32 %r4, [%r2];\n"),
    "beyond the end": (faults.OutOfBounds, "ld.global.b32 %r4, [%rd11+4];\n"),
    "before the beginning": (faults.OutOfBounds, "ld.global.b32 %r4, [%rd11+-4];\n"),
    "no pointer": (faults.OutOfBounds, "ld.global.b32 %r4, [%rd10];\n"),
    "beyond shared memory": (faults.OutOfBounds, "st.shared.b32 [%r2+1000], %r0;\nmov.b32 %r4, 0;\n"),
    "between multiples": (faults.Misaligned, "ld.global.b32 %r4, [%rd0+2];\n"),
    "between multiples of shared memory": (faults.Misaligned, "st.shared.v2.b32 [%r2], {%r0, %r0};\nmov.b32 %r4, 0;\n"),
    "no barrier before a read": (faults.Race, edited(TWO_WARPS, "bar.sync 0;\n")),
    "no barrier before a write": (faults.Race, TWO_WARPS + "st.shared.b32 [%r2], %r4;\n"),
    "two warps write": (faults.Race, "and.b32 %r5, %r2, 124;\nst.shared.b32 [%r5], %r0;\nmov.b32 %r4, 0;\n"),
    "lanes of one warp write": (faults.Race, "and.b32 %r5, %r2, 248;\nst.shared.b32 [%r5], %r0;\nmov.b32 %r4, 0;\n"),
    "a copy that is read before it is waited for": (faults.NotWaited, edited(COPY, "wait_group 1", "wait_group 2")),
    "a copy that nobody waits for": (faults.NotWaited, edited(COPY, "\tcp.async.wait_group 0;\n")),
    "a copy that is written over": (
        faults.NotWaited, edited(COPY, "wait_group 1;", "wait_group 1;\nst.shared.b32 [%r2+256], %r0;"),
    ),
    "a copy that others read without a barrier": (faults.Race, edited(COPY, "\tbar.sync 0;\n")),
    "a copy without a commit": (faults.NotWaited, edited(COPY, "\tcp.async.commit_group;\n")),
    "a barrier for some": (
        faults.Diverged, "mov.b32 %r4, 0;\nsetp.lt.u32 %p1, %r0, 40;\n@%p1 bra $L_1;\nbar.sync 0;\n$L_1:\n",
    ),
    "a shuffle of some": (
        faults.Diverged,
        "setp.lt.u32 %p1, %r0, 5;\nmov.b32 %r4, 0;\n@%p1 bra $L_1;\nshfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;\n$L_1:\n",
    ),
    "a loop that never ends": (faults.Deadlock, "$L_1:\nbra.uni $L_1;\n"),
    "an instruction that is not known": (faults.Unknown, "sin.approx.f32 %r4, %r0;\n"),
    "a variant that is not known": (faults.Unknown, "add.sat.s32 %r4, %r0, 1;\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name):
    fault, body = MISTAKES[name]
    with pytest.raises(faults.Fault) as caught:
        result_of(body + STORE, warps=2)
    assert type(caught.value) is fault
    if name != "a copy that nobody waits for":
        assert "line " in str(caught.value)


@pytest.mark.parametrize("body", [TWO_WARPS, COPY])
def test_without_the_mistake_nothing_is_raised(body):
    result_of(body + STORE, warps=2)


def test_lanes_may_write_one_value_to_one_place():
    assert result_of("mov.b32 %r3, 7;\nst.shared.b32 [0], %r3;\nld.shared.b32 %r4, [0];\n" + STORE).unique() == 7


def test_programs_that_write_to_one_place():
    y = torch.zeros(64, dtype=torch.int32)
    apart = "mad.wide.u32 %rd12, %r1, 128, %rd12;\nmov.b32 %r4, %r0;\n" + STORE
    launch(apart, y, y, programs=2)
    assert y.tolist() == [*range(32)] * 2
    with pytest.raises(faults.Race, match="two programs|another one"):
        launch(edited(apart, "128", "124"), y, y, programs=2)


def test_a_gap_between_strides():
    x, y = integers(64), torch.zeros(32, dtype=torch.int32)
    columns = x.view(32, 2)[:, 0]
    launch("add.s64 %rd11, %rd11, %rd10;\nld.global.b32 %r4, [%rd11];\n" + STORE, columns, y)
    assert torch.equal(y, columns)
    with pytest.raises(faults.OutOfBounds, match="gap"):
        launch("ld.global.b32 %r4, [%rd11];\n" + STORE, columns, y)
