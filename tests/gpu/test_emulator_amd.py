"""The executor of AMD's code by itself: what lanes tell each other, products of matrices, small kernels, and what it
refuses. Needs no Triton.

Each opcode by itself is tested in test_amd_opcodes.py; that the executor runs the kernels, in test_executed_amd.py.
"""

import numpy as np
import pytest
import torch

from amd_bench import Bench
from emulator import faults
from emulator.amd.opcodes.matrix import Shape, mfma, wmma
from emulator.amd.parsing import VCC
from emulator.amd.programs import run

ARCHS = ("gfx1100", "gfx942")


# --- other lanes, parts of registers ---------------------------------------------------------------------------------

# Of each pattern the lane that a lane reads, as the manuals say it, or None.
PATTERNS = {
    "quad_perm:[1,0,3,2]": lambda i: i ^ 1,
    "quad_perm:[2,3,0,1]": lambda i: i ^ 2,
    "row_shr:1": lambda i: i - 1 if i % 16 >= 1 else None,
    "row_shr:8": lambda i: i - 8 if i % 16 >= 8 else None,
    "row_shl:4": lambda i: i + 4 if i % 16 < 12 else None,
    "row_ror:8": lambda i: i // 16 * 16 + (i - 8) % 16,
    "row_xmask:2": lambda i: i ^ 2,
    "row_mirror": lambda i: i // 16 * 16 + 15 - i % 16,
    "row_half_mirror": lambda i: i // 8 * 8 + 7 - i % 8,
    "row_bcast:15": lambda i: i // 16 * 16 - 1 if i >= 16 else None,
    "row_bcast:31": lambda i: 31 if i >= 32 else None,
}


@pytest.mark.parametrize("rows", ["0xf", "0xa"])
@pytest.mark.parametrize("reads_zero", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lanes_read_others(pattern, reads_zero, rows):
    bench = Bench("gfx942", 1)
    values, added, before = bench.vector(1), bench.vector(3), bench.vector(20)
    end = f"{pattern} row_mask:{rows} bank_mask:0xf" + " bound_ctrl:1" * reads_zero
    bench.run(f"v_add_u32_dpp v20, v1, v3 {end}")
    for lane, found in enumerate(bench.vector(20)):
        source = PATTERNS[pattern](lane)
        is_there = source is not None and bench.active[source]
        expected = int(values[source] if is_there else 0) + int(added[lane]) & 0xFFFFFFFF
        is_written = bench.active[lane] and int(rows, 0) >> lane // 16 & 1 and (is_there or reads_zero)
        assert found == (expected if is_written else before[lane]), lane


def test_parts_of_registers():
    bench = Bench("gfx942", 1, all_active=True)
    x, y = bench.vector(1), bench.vector(3)
    bench.run("v_and_b32_sdwa v20, v1, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:BYTE_2")
    assert np.array_equal(bench.vector(20), (x >> 16) & (y >> 16 & 0xFF))
    bench.run("v_or_b32_sdwa v20, v1, v3 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:DWORD")
    assert np.array_equal(bench.vector(20), ((x & 0xFF | y) & 0xFFFF) << 16)
    bench.run("v_cndmask_b32_sdwa v20, v1, v3, vcc dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1")
    assert np.array_equal(bench.vector(20), np.where(bench.registers.mask(VCC)[0], y >> 16, x))
    bench.run("v_cmp_gt_u16_sdwa s[30:31], v1, v3 src0_sel:WORD_1 src1_sel:DWORD")
    lanes = np.flatnonzero(x >> 16 > (y & 0xFFFF)).tolist()
    assert bench.scalar(30, 2) == sum(1 << lane for lane in lanes)


def test_both_of_a_pair_read_before_either_writes():
    bench = Bench("gfx1100", 1, all_active=True)
    x, y = bench.vector(1), bench.vector(2)
    bench.run("v_dual_mov_b32 v1, v2 :: v_dual_mov_b32 v2, v1")
    assert np.array_equal(bench.vector(1), y) and np.array_equal(bench.vector(2), x)


# --- products --------------------------------------------------------------------------------------------------------


def held(matrices: np.ndarray, lanes: int, count: int, place) -> np.ndarray:
    """[waves, lanes, count]: numbers of matrices where place(lane, i) says."""
    return np.array(
        [[[x[place(lane, i)] for i in range(count)] for lane in range(lanes)] for x in matrices], np.float32
    )


def factors_and_sum(rows: int, depth: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(-8, 8, (3, *shape)) / 4 for shape in ((rows, depth), (depth, rows), (rows, rows))]


def test_wmma_is_laid_out_as_documented():
    """Lane i and i + 16 hold row i of the left factor and column i of the right; the sum's rows alternate."""
    a, b, c = factors_and_sum(16, 16)
    of_sum = lambda lane, i: (2 * i + lane // 16, lane % 16)  # noqa: E731
    left = held(a, 32, 16, lambda lane, i: (lane % 16, i))
    right = held(b, 32, 16, lambda lane, i: (i, lane % 16))
    np.testing.assert_array_equal(wmma(left, right, held(c, 32, 8, of_sum)), held(a @ b + c, 32, 8, of_sum))


@pytest.mark.parametrize("rows, depth", [(32, 8), (16, 16), (32, 2), (16, 4)])
def test_mfma_is_laid_out_as_documented(rows, depth):
    """Lane i holds row i % rows of the left factor, and the i // rows-th part of the depth."""
    a, b, c = factors_and_sum(rows, depth)
    groups, count = 64 // rows, rows * depth // 64
    of_sum = lambda lane, i: (4 * groups * (i // 4) + 4 * (lane // rows) + i % 4, lane % rows)  # noqa: E731
    left = held(a, 64, count, lambda lane, i: (lane % rows, count * (lane // rows) + i))
    right = held(b, 64, count, lambda lane, i: (count * (lane // rows) + i, lane % rows))
    sums = rows * rows // 64
    found = mfma(left, right, held(c, 64, sums, of_sum), Shape(rows, depth, count, sums))
    np.testing.assert_array_equal(found, held(a @ b + c, 64, sums, of_sum))


def test_factors_have_to_be_there_twice():
    bench = Bench("gfx1100", 1, all_active=True)
    for number in range(50, 82):
        bench.write_vector(number, np.zeros(32))
    bench.run("v_wmma_f32_16x16x16_f16 v[66:73], v[50:57], v[58:65], v[74:81]")
    bench.write_vector(52, np.arange(32) * 0x3C00)
    with pytest.raises(faults.Fault, match="both halves"):
        bench.run("v_wmma_f32_16x16x16_f16 v[66:73], v[50:57], v[58:65], v[74:81]")


# --- small kernels ---------------------------------------------------------------------------------------------------

KERNEL = """\t.amdgcn_target "amd-unknown-{arch}"
\t.globl\tsmall
small:
{body}
\ts_endpgm
\t.section\t.rodata
\t\t.amdhsa_private_segment_fixed_size 16
\t\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t\t.amdhsa_user_sgpr_count 15
\t\t.amdhsa_system_sgpr_workgroup_id_y 0
\t\t.amdhsa_kernarg_size 16
\t\t.amdhsa_wavefront_size32 1
\t.amdgpu_metadata
    .args:
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           4
        .value_kind:     by_value
    .group_segment_fixed_size: 0
"""
# Each thread puts 3 times its number into LDS, and adds what the thread `s4` further put there.
REVERSED = """
s_load_b64 s[2:3], s[0:1], 0x0
s_load_b32 s4, s[0:1], 0x8
v_lshlrev_b32_e32 v1, 2, v0
v_mul_u32_u24_e32 v2, 3, v0
ds_store_b32 v1, v2
s_waitcnt lgkmcnt(0)
s_barrier
v_add_nc_u32_e32 v3, s4, v0
v_and_b32_e32 v3, 63, v3
v_lshlrev_b32_e32 v3, 2, v3
ds_load_b32 v4, v3
s_lshl_b32 s5, s15, 8
s_waitcnt lgkmcnt(0)
v_add_nc_u32_e32 v4, v4, v2
v_add_nc_u32_e32 v1, s5, v1
global_store_b32 v1, v4, s[2:3]
"""


def launched(body: str, shift: int = 5, programs: int = 2, size: int = 128, shared: int = 256) -> torch.Tensor:
    """Programs of two waves of 32 lanes; what they made of a tensor of int32."""
    x = torch.full((size,), -1, dtype=torch.int32)
    text = "\n".join(line if line.endswith(":") else "\t" + line for line in body.strip().splitlines())
    run(KERNEL.format(arch="gfx1100", body=text), [x, shift], (programs, 1, 1), 2, shared)
    return x


def changed(old: str, new: str = "") -> str:
    assert old in REVERSED
    return "\n".join(line for line in REVERSED.replace(old, new, 1).splitlines() if line)


def test_a_kernel_runs():
    thread = torch.arange(64, dtype=torch.int32)
    expected = 3 * thread + 3 * ((thread + 5) % 64)
    assert torch.equal(launched(REVERSED), torch.cat([expected, expected]))


def test_lanes_and_waves_part_and_meet():
    """Lanes by EXEC, waves by a branch, in a loop of as many rounds as the program's number and the wave's."""
    body = """
s_load_b64 s[2:3], s[0:1], 0x0
v_readfirstlane_b32 s6, v0
s_lshr_b32 s6, s6, 5
s_add_i32 s6, s6, s15
v_mov_b32_e32 v2, 0
s_cmp_eq_u32 s6, 0
s_cbranch_scc1 .LBB0_2
.LBB0_1:
v_cmp_gt_u32_e32 vcc_lo, 48, v0
s_and_saveexec_b32 s7, vcc_lo
v_add_nc_u32_e32 v2, 10, v2
s_mov_b32 exec_lo, s7
s_sub_u32 s6, s6, 1
s_cmp_lg_u32 s6, 0
s_cbranch_scc1 .LBB0_1
.LBB0_2:
v_lshlrev_b32_e32 v1, 2, v0
s_lshl_b32 s5, s15, 8
v_add_nc_u32_e32 v1, s5, v1
s_waitcnt lgkmcnt(0)
global_store_b32 v1, v2, s[2:3]
"""
    thread = torch.arange(64)
    expected = [torch.where(thread < 48, 10 * (program + thread // 32), 0) for program in range(2)]
    assert torch.equal(launched(body), torch.cat(expected).int())


MISTAKES = {
    "no wait for LDS": (changed("s15, 8\ns_waitcnt lgkmcnt(0)", "s15, 8"), faults.NotWaited),
    "no barrier": (changed("s_barrier\n"), faults.Race),
    "no wait before the barrier": (changed("s_waitcnt lgkmcnt(0)\ns_barrier", "s_barrier"), faults.NotWaited),
    "LDS that nobody wrote": (changed("ds_store_b32 v1, v2\n"), faults.Uninitialized),
    "a register that nobody wrote": (changed("v_mul_u32_u24_e32 v2, 3, v0\n"), faults.Uninitialized),
    "an odd address": (changed("v_lshlrev_b32_e32 v3, 2, v3", "v_lshlrev_b32_e32 v3, 1, v3"), faults.Misaligned),
    "beyond LDS": (changed("v_and_b32_e32 v3, 63, v3", "v_and_b32_e32 v3, 0x7f, v3"), faults.OutOfBounds),
    "one place from all programs": (changed("s_lshl_b32 s5, s15, 8", "s_mov_b32 s5, 0"), faults.Race),
    "beyond the tensor": (changed("s_lshl_b32 s5, s15, 8", "s_lshl_b32 s5, s15, 9"), faults.OutOfBounds),
    "scratch that nobody wrote": (
        changed("s_barrier\n", "s_barrier\nscratch_load_b32 v9, off, off offset:4\n"), faults.Uninitialized,
    ),
    "a barrier that a wave misses": (
        changed("s_barrier\n", """v_readfirstlane_b32 s6, v0
s_cmp_eq_u32 s6, 0
s_cbranch_scc1 .LBB0_1
s_barrier
.LBB0_1:
"""), faults.Race,
    ),
    "a barrier that a wave ends before": (
        changed("s_barrier\n", """v_readfirstlane_b32 s6, v0
s_cmp_eq_u32 s6, 0
s_cbranch_scc0 .LBB0_1
s_endpgm
.LBB0_1:
s_barrier
"""), faults.Diverged,
    ),
    "an instruction that is not known": (changed("s_barrier\n", "s_barrier\nv_sin_f32_e32 v9, v2\n"), faults.Unknown),
    "a modifier that is not known": (changed("v_add_nc_u32_e32 v3, s4, v0", "v_add_nc_u32_e64 v3, s4, v0 clamp"),
                                     faults.Unknown),
}  # fmt: skip


def test_waves_come_to_a_barrier_from_behind():
    detour = """v_readfirstlane_b32 s6, v0
s_cmp_eq_u32 s6, 0
s_cbranch_scc0 .LBB0_2
.LBB0_1:
s_barrier
s_branch .LBB0_3
.LBB0_2:
s_branch .LBB0_1
.LBB0_3:
"""
    assert torch.equal(launched(changed("s_barrier\n", detour)), launched(REVERSED))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name):
    body, fault = MISTAKES[name]
    with pytest.raises(fault):
        launched(body)


def test_arguments_have_to_be_waited_for():
    body = REVERSED.replace(
        "ds_store_b32 v1, v2\ns_waitcnt lgkmcnt(0)\n", "v_mov_b32_e32 v5, s4\nds_store_b32 v1, v2\n"
    )
    with pytest.raises(faults.NotWaited, match="s4"):
        launched(body)


@pytest.mark.parametrize("left, is_caught", [(2, True), (1, False), (0, False)])
def test_a_wait_may_leave_later_loads(left, is_caught):
    body = f"""
s_load_b64 s[2:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_lshl_b32 s5, s15, 8
v_add_nc_u32_e32 v1, s5, v1
s_waitcnt lgkmcnt(0)
v_add_co_u32 v2, s6, s2, v1
v_add_co_ci_u32_e64 v3, null, s3, 0, s6
global_load_b32 v4, v[2:3], off
global_load_b32 v5, v[2:3], off
s_waitcnt vmcnt({left})
v_add_nc_u32_e32 v4, 2, v4
s_waitcnt vmcnt(0)
v_add_nc_u32_e32 v4, v4, v5
global_store_b32 v1, v4, s[2:3]
"""
    if is_caught:
        with pytest.raises(faults.NotWaited):
            launched(body)
    else:
        assert torch.all(launched(body) == 0)


@pytest.mark.parametrize("offset, is_caught", [(4, False), (2, True)])
def test_a_load_of_several_words_is_aligned_to_one(offset, is_caught):
    body = f"""
s_load_b64 s[2:3], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_mov_b32_e32 v2, s2
v_mov_b32_e32 v3, s3
global_load_b128 v[4:7], v[2:3], off offset:{offset}
s_waitcnt vmcnt(0)
"""
    if is_caught:
        with pytest.raises(faults.Misaligned):
            launched(body)
    else:
        launched(body)
