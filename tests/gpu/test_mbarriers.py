"""Barriers in shared memory (mbarrier) and the boxes of tensors (TMA) that they wait for, in the executor of PTX: small
kernels, and what it refuses.

Needs no Triton, like test_emulator.py.
"""

import numpy as np
import pytest
import torch

from emulator import faults
from emulator.programs import Map, run
from emulator.shared import Shared
from small_kernels import edited, kernel

INIT = "\t@%p1 mbarrier.init.shared::cta.b64 [%r6], 1;\n"
BARRIER = "\tbar.sync 0;\n"
END = "\t@%p1 mbarrier.inval.shared::cta.b64 [%r6];\n"
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], 0;"
BOX = f"""
	mov.b32 %r5, k_param_0;
	cvt.u64.u32 %rd5, %r5;
	cvta.param.u64 %rd5, %rd5;
	mov.b32 %r6, 4096;
	setp.eq.s32 %p1, %r0, 0;
	setp.lt.u32 %p3, %r0, 32;
{INIT}{BARRIER}
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 1024;
	fence.proxy.async.shared::cta;
{BARRIER}
	elect.sync %r7|%p4, -1;
	and.pred %p2, %p3, %p4;
	mov.b32 %r8, 0;
	mov.b32 %r9, 3;
	@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%rd5, {{%r8, %r9}}], [%r6];
{{
	.reg .pred complete;
	waitLoop:
	{WAIT}
	@!complete bra.uni waitLoop;
}}
	and.b32 %r18, %r0, 31;
	shl.b32 %r7, %r18, 5;
	ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r7];
	ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r7+16];
	mul.wide.u32 %rd13, %r18, 32;
	add.s64 %rd14, %rd1, %rd13;
	st.global.v4.b32 [%rd14], {{%r10, %r11, %r12, %r13}};
	st.global.v4.b32 [%rd14+16], {{%r14, %r15, %r16, %r17}};
{BARRIER}{END}"""
"""The first of some warps asks for a box, all wait for it, and each reads all of it."""


def box_of(x: torch.Tensor, body: str = BOX, swizzle: int = 0, warps: int = 1) -> torch.Tensor:
    """256 numbers from row 3 of x on, as they lie in shared memory."""
    width, y = x.shape[1], torch.zeros(256, dtype=torch.int32)
    text = kernel(body)
    for line in ("\tld.param.b64 %rd0, [k_param_0];\n", "\tadd.s64 %rd11, %rd0, %rd10;\n"):
        text = edited(text, line)
    run(text, [Map(x, (width, 1), (256 // width, width), swizzle), y], (1, 1, 1), warps, 8192)
    return y


@pytest.mark.parametrize("swizzle, pieces", [(0, 8), (1, 2), (2, 4), (3, 8)])
def test_a_box_of_a_tensor(swizzle, pieces):
    """Beyond the last row are zeros. The manual's patterns of rows of 2, 4 or 8 pieces of 16 bytes: they change places
    from 128 bytes to the next."""
    rows = 64 // pieces
    x = torch.arange((rows + 1) * pieces * 4, dtype=torch.int32).view(rows + 1, pieces * 4)
    expected = torch.zeros(rows, pieces, 4, dtype=torch.int32)
    expected[: rows - 2] = x[3:].view(rows - 2, pieces, 4)
    found = box_of(x, swizzle=swizzle).view(rows, pieces, 4)
    for row in range(rows):
        for piece in range(pieces):
            place = piece ^ (row * pieces // 8 % pieces if swizzle else 0)
            assert torch.equal(found[row, place], expected[row, piece])


WAIT_OF_SOME = "mov.pred complete, -1;\n\t@%p{} " + WAIT
READ = "\tand.b32 %r18, %r0, 31;\n"
MISTAKES = {
    "no wait": (WAIT, "mov.pred complete, -1;", faults.NotWaited, "under way"),
    "a wait for the phase before": (WAIT, edited(WAIT, "], 0", "], 1"), faults.NotWaited, "under way"),
    "one warp waits": (WAIT, WAIT_OF_SOME.format(3), faults.NotWaited, "did not wait"),
    "a lane of each warp waits": (WAIT, WAIT_OF_SOME.format(4), faults.NotWaited, "did not wait"),
    "fewer bytes than come": ("_, [%r6], 1024;", "_, [%r6], 512;", faults.Deadlock, "-512 bytes"),
    "all lanes arrive": ("@%p1 mbarrier.arrive", "mbarrier.arrive", faults.Misused, "more arrivals"),
    "nobody makes it": (INIT, "", faults.Uninitialized, "no barrier at 4096"),
    "all lanes make it": (INIT, edited(INIT, "@%p1 "), faults.Misused, "already"),
    "it is made again": (INIT, INIT + INIT, faults.Misused, "already"),
    "all lanes end it": (END, edited(END, "@%p1 "), faults.Uninitialized, "no barrier at 4096"),
    "no bar.sync before others use it": (BARRIER, "", faults.Race, "another warp made"),
    "no bar.sync before it ends": (BARRIER + END, END, faults.Race, "another warp read"),
    "between multiples": ("%r6, 4096;", "%r6, 4100;", faults.Misaligned, "8 bytes"),
    "beyond shared memory": ("%r6, 4096;", "%r6, 8192;", faults.OutOfBounds, "8 bytes at 8192"),
    "where the box lies": ("%r6, 4096;", "%r6, 512;", faults.Race, "a write .* mbarrier"),
    "it is written over": (INIT, INIT + "\t@%p1 st.shared.b32 [%r6+4], %r0;\n", faults.Race, "a write .* mbarrier"),
    "it is read": (INIT, INIT + "\t@%p1 ld.shared.b32 %r19, [%r6];\n", faults.Race, "a read .* mbarrier"),
    "it was read": (END, END + "\t@%p1 ld.shared.b32 %r19, [%r6];\n", faults.Uninitialized, "nobody wrote"),
    "others write over it with no barrier": (
        END, END + "\t@!%p3 st.shared.b32 [%r6], %r0;\n", faults.Race, "another warp read",
    ),
    "a warp that did not wait writes": (
        WAIT, WAIT_OF_SOME.format(3) + "\n\t@!%p3 st.shared.b32 [8], %r9;", faults.Race, "another warp wrote",
    ),
    "between multiples of a swizzle": ("mov.b32 %r8, 0;", "mov.b32 %r8, 128;", faults.OutOfBounds, "its pattern"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name):
    old, new, fault, message = MISTAKES[name]
    with pytest.raises(fault, match=message):
        box_of(torch.zeros(9, 32, dtype=torch.int32), edited(BOX, old, new), swizzle=3, warps=2)


RIGHT = {
    "two warps": ("", ""),
    "one warp waits, and all meet": (READ, READ + BARRIER),
    "it is made anew": (END, END + INIT + END),
    "another use of its place": (END, END + BARRIER + "\t@!%p3 st.shared.b32 [%r6], %r8;\n"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_without_the_mistake_nothing_is_raised(name):
    x = torch.arange(11 * 32, dtype=torch.int32).view(11, 32)
    body = edited(BOX, *RIGHT[name])
    if name == "one warp waits, and all meet":
        body = edited(body, WAIT, WAIT_OF_SOME.format(3))
    assert torch.equal(box_of(x, body, warps=2), x[3:].flatten())


def test_a_product_needs_a_box_that_all_warps_of_its_group_waited_for():
    shared, lane = Shared(1024, 1, 256, 4), np.array([0])
    units, data = np.arange(4)[None], np.arange(4, dtype=np.uint32)[None]
    shared.reserve(lane, units)
    shared.settle(0, units, data)
    shared.note_wait(np.arange(96), units)
    shared.note_wait(np.arange(128, 256), units)
    with pytest.raises(faults.NotWaited, match="did not wait"):
        shared.load_for_product(lane, units)
    np.testing.assert_array_equal(shared.load_for_product(np.array([128]), units), data)
    shared.barrier(np.array([True]))
    np.testing.assert_array_equal(shared.load_for_product(lane, units), data)
