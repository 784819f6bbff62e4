"""The assembly that Triton compiles of the kernels for AMD's GPUs, RDNA3 (gfx1100) and CDNA3 (gfx942), executed
instruction by instruction in NumPy.

tests/gpu/test_emulator_amd.py and test_amd_opcodes.py check the executor itself.
"""

import re

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402

import canaries  # noqa: E402
from accuracy import assert_gradients  # noqa: E402
from amd_samples import samples  # noqa: E402
from emulator import faults  # noqa: E402
from emulator.amd.machine import decode  # noqa: E402
from emulator.amd.opcodes import BRANCHES  # noqa: E402
from emulator.amd.opcodes.control import NOTHING  # noqa: E402
from emulator.device import executing  # noqa: E402
from executed import (  # noqa: E402
    BLOCKS,
    CAUSAL,
    DECODE,
    DECODE_BLOCKS,
    EVERYTHING,
    FLOAT32,
    ODD_BACKWARD,
    ODD_FORWARD,
    WINDOW,
    backward,
    caught,
    edited,
    forward,
)
from fastattn import Mask  # noqa: E402

ARCHS = ("gfx1100", "gfx942")
APART = {*BRANCHES, *NOTHING, "s_barrier", "s_waitcnt", "s_waitcnt_vscnt"}
"""Opcodes that are tested in kernels; beside these, products of matrices."""


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def runs(cases, selected: dict[str, tuple]) -> list:
    """(case, architecture) of all, slow but for those that are selected."""
    return [
        pytest.param(case, arch, id=f"{case}-{arch}", marks=() if case in selected.get(arch, ()) else pytest.mark.slow)
        for case in cases
        for arch in ARCHS
    ]


FORWARD = [
    CAUSAL,
    WINDOW,
    FLOAT32,
    DECODE,
    BLOCKS,
    DECODE_BLOCKS,
    EVERYTHING,
    CAUSAL._replace(causal=False, dtype="float16", seqlen_k=450),
    CAUSAL._replace(causal=False, head_dim=128, seqlen_k=300),
    CAUSAL._replace(head_dim=80, head_dim_v=40, layout="bshd"),
    CAUSAL._replace(dtype="float16", causal=False, mask="documents"),
    WINDOW._replace(dtype="bfloat16", head_dim=256, head_dim_v=192, seqlen_q=140, seqlen_k=170),
    WINDOW._replace(dtype="float32", seqlen_q=140, seqlen_k=170),
    FLOAT32._replace(causal=True, head_dim=64),
    BLOCKS._replace(mask="blocks", dtype="float16", head_dim=64, causal=True),
    EVERYTHING._replace(dtype="float32"),
    DECODE._replace(num_heads_k=1, seqlen_q=3, head_dim=24, dtype="float16", mask="lengths", sinks=True),
    DECODE._replace(dtype="float32", head_dim=128),
    DECODE_BLOCKS._replace(mask="blocks", dtype="float16"),
]
CAUSAL_BACKWARD = CAUSAL._replace(seqlen_q=130)
BACKWARD = [
    BLOCKS,
    CAUSAL_BACKWARD,
    FLOAT32,
    EVERYTHING,
    EVERYTHING._replace(dtype="float32"),
    FLOAT32._replace(head_dim=32, causal=True),
    CAUSAL._replace(head_dim=128, seqlen_q=200),
    CAUSAL._replace(causal=False, mask="intervals", seqlen_q=140),
    CAUSAL._replace(dropout_p=0.5, learned_scale="per_head", seqlen_q=130),
    WINDOW._replace(seqlen_q=150, seqlen_k=170, window_size=(100, 3)),
    WINDOW._replace(dtype="bfloat16", head_dim=256, seqlen_q=90, seqlen_k=130),
    BLOCKS._replace(mask="blocks", dtype="float16", head_dim=64, causal=True),
]
FORWARD += ODD_FORWARD
BACKWARD += ODD_BACKWARD


def is_product(opcode: str) -> bool:
    return opcode.startswith(("v_wmma", "v_mfma"))


def codes_of(launches) -> list:
    return [decode(launch.binary.text("amdgcn")) for launch in launches]


def assert_all_products_ran(launches) -> None:
    for code in codes_of(launches):
        left_out = [
            str(instruction)
            for number, block in enumerate(code.blocks)
            for instruction in block.instructions
            if is_product(instruction.opcode) and number not in code.visited
        ]
        assert left_out == []


def assert_all_opcodes_are_checked(launches, arch: str) -> None:
    """In test_amd_opcodes.py, or in kernels of test_emulator_amd.py."""
    checked = APART | samples(arch).keys()
    for code in codes_of(launches):
        instructions = [x for i in code.program.instructions for x in (i, i.second) if x is not None]
        assert {i.opcode for i in instructions if not is_product(i.opcode)} - checked == set()


@pytest.mark.parametrize(
    "case, arch",
    runs(FORWARD, {"gfx1100": (CAUSAL, WINDOW, FLOAT32, DECODE, DECODE_BLOCKS), "gfx942": (CAUSAL, DECODE)}),
)
def test_forward(case, arch):
    launches = forward(case, arch=arch)
    assert len(launches) == (2 if case.seqlen_q <= 3 else 1)  # split keys, then `combine`
    if case in (CAUSAL, WINDOW, DECODE):
        assert_all_products_ran(launches)
        assert any(is_product(i.opcode) for i in codes_of(launches)[0].program.instructions)
    assert_all_opcodes_are_checked(launches, arch)


@pytest.mark.parametrize("case, arch", runs(BACKWARD, {"gfx1100": (BLOCKS,), "gfx942": (BLOCKS,)}))
def test_backward(case, arch, monkeypatch):
    with executing(arch) as launches:
        assert_gradients(case, monkeypatch)
    assert {"delta_kernel", "key_value_kernel", "query_kernel"} < {launch.binary.name for launch in launches}
    assert_all_opcodes_are_checked(launches, arch)


# --- mistakes that must be caught ------------------------------------------------------------------------------------

FAULTS = {
    "gfx1100": {
        "no wait for global memory": (edited(r"s_waitcnt vmcnt\(\d+\)", "s_nop 0"), faults.NotWaited),
        "a wait for one load less": (edited(r"s_waitcnt vmcnt\(0\)", "s_waitcnt vmcnt(1)", 1), faults.NotWaited),
        "no wait for LDS": (edited(r"s_waitcnt lgkmcnt\([1-9]\d*\)", "s_nop 0"), faults.NotWaited),
        "no barrier": (edited(r"s_barrier\n", "s_nop 0\n"), faults.Race),
        "no barrier before a tile is read": (edited(r"s_barrier\n", "s_nop 0\n", 3), faults.Race),
        "a swizzle with another bit": (edited(r"(v_xor_b32_e32 v\d+, )64(, v\d+)", r"\g<1>32\2", 0), AssertionError),
        "another place in LDS": (
            edited(r"(?m)(ds_load_b128 v\S+ v\d+)$", r"\1 offset:128", 6), faults.OutOfBounds,
        ),
        "a row further": (edited(r"(?m)(buffer_load_b128 .* 0 offen)$", r"\1 offset:128", 4), faults.OutOfBounds),
        "rows that are not there": (edited(r"v_cndmask_b32_e32 (v\d+), 0x80000000, (v\d+), vcc_lo",
                                           r"v_mov_b32_e32 \1, \2"), faults.OutOfBounds),
        "factors in another order": (
            edited(r"(v_wmma\S+ \S+), (v\S+), (v\S+), (v\S+)", r"\1, \3, \2, \4", 3), AssertionError,
        ),
        "lanes in another order": (edited(r"0xfedcba98", "0xfedcba89", 0), faults.Race),
        "a bound that is one off": (edited(r"v_cmp_(g|l)t_i32", r"v_cmp_\1e_i32"), faults.OutOfBounds),
        "a mask that is one off": (edited("v_cmp_lt_i32_e64", "v_cmp_le_i32_e64", 20), AssertionError),
        "EXEC as it was before a loop": (
            edited(r"s_and_saveexec_b32 (s\d+), \S+", r"s_mov_b32 \1, exec_lo", 1), AssertionError,
        ),
    },
    "gfx942": {
        "no wait for global memory": (edited(r"s_waitcnt vmcnt\(\d+\)", "s_nop 0"), faults.NotWaited),
        "a wait for one load less": (edited(r"s_waitcnt vmcnt\(0\)", "s_waitcnt vmcnt(1)", 1), faults.NotWaited),
        "no wait for LDS": (edited(r"s_waitcnt lgkmcnt\([1-9]\d*\)", "s_nop 0"), faults.NotWaited),
        "no barrier": (edited(r"s_barrier\n", "s_nop 0\n"), faults.Race),
        "no barrier between reductions": (edited(r"s_barrier\n", "s_nop 0\n", 3), faults.Race),
        "a swizzle with another bit": (edited(r"(v_xor_b32_e32 v\d+, )32(, v\d+)", r"\g<1>16\2", 0), AssertionError),
        "another place in LDS": (edited(r"(?m)(ds_read_b(?:128|64) v\S+ v\d+)$", r"\1 offset:128", 8), AssertionError),
        "a row further": (edited(r"(?m)(buffer_load_dwordx4 .* 0 offen)$", r"\1 offset:128", 4), faults.OutOfBounds),
        "rows that are not there": (
            edited(r"v_cndmask_b32_e32 (v\d+), (v\d+), (v\d+), vcc", r"v_mov_b32_e32 \1, \3"), faults.OutOfBounds,
        ),
        "rows that are not there, written": (
            edited(r"v_cndmask_b32_e32 (v\d+), \S+, (v\d+), vcc(?=\n.*buffer_store)", r"v_mov_b32_e32 \1, \2"),
            faults.OutOfBounds,
        ),
        "a bound that is one off": (edited(r"v_cmp_(g|l)t_i32", r"v_cmp_\1e_i32"), faults.OutOfBounds),
        "a mask that is one off": (edited("v_cmp_lt_i32_e64", "v_cmp_le_i32_e64", 20), AssertionError),
        "EXEC as it was before a loop": (
            edited(r"s_and_saveexec_b64 (s\S+), \S+", r"s_mov_b64 \1, exec", 1), AssertionError,
        ),
        "factors in another order": (edited(r"(v_mfma\S+ \S+), (v\S+), (v\S+), (v\S+|0)", r"\1, \3, \2, \4", 3),
                                     AssertionError),
        "lanes in another order": (edited(r"(?m)(ds_bpermute_b32 .*)$", r"\1 offset:4"), faults.Race),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "arch, name",
    [
        pytest.param(arch, name, marks=pytest.mark.slow if arch == "gfx942" else ())
        for arch in ARCHS
        for name in FAULTS[arch]
    ],
)
def test_fault_is_caught(arch, name):
    edit, error = FAULTS[arch][name]
    with caught(error):
        forward(CAUSAL, edit, arch)


CALLS_OF = {
    "decode_kernel": DECODE, "key_value_kernel": CAUSAL_BACKWARD, "query_kernel": CAUSAL_BACKWARD,
    "forward_kernel": BLOCKS, "combine_kernel": DECODE, "delta_kernel": CAUSAL_BACKWARD,
}  # fmt: skip
"""Kernels that no call above edits; the forward kernel over a block mask."""

OTHER_FAULTS = {
    "no wait": (r"s_waitcnt vmcnt\(\d+\)", "s_nop 0", faults.NotWaited),
    "no barrier": (r"s_barrier\n", "s_nop 0\n", faults.Race),
    "rows that are not there": (
        r"v_cndmask_b32_e32 (v\d+), (?:0x80000000|v\d+), (v\d+), vcc(?:_lo)?", r"v_mov_b32_e32 \1, \2",
        faults.OutOfBounds,
    ),
}  # fmt: skip
WITHOUT_TILES = ("combine_kernel", "delta_kernel")


def edit_of_row(which: int, size: int, kernel: str):
    """One load of 16 bytes, a row of `size` bytes further."""
    return edited(r"(?m)(buffer_load_(?:b128|dwordx4) .* 0 offen)$", rf"\1 offset:{size}", which, kernel)


# (number of the load, bytes of a row, error). A wrong place inside the tensor shows in results alone; over the block
# mask gfx942 has no load that runs and stays inside.
ROWS = {
    "gfx1100": {kernel: (3, 128, AssertionError) for kernel in CALLS_OF} | {"forward_kernel": (1, 64, AssertionError)},
    "gfx942": {kernel: (2, 128, AssertionError) for kernel in CALLS_OF}
    | {"forward_kernel": (-1, 64, faults.OutOfBounds)},
}


def run_with(edit, kernel: str, arch: str, monkeypatch) -> None:
    """The call of this kernel."""
    if kernel in ("key_value_kernel", "query_kernel", "delta_kernel"):
        backward(CALLS_OF[kernel], edit, arch, monkeypatch)
    else:
        forward(CALLS_OF[kernel], edit, arch)


gfx942_is_slow = pytest.mark.parametrize("arch", ["gfx1100", pytest.param("gfx942", marks=pytest.mark.slow)])


@gfx942_is_slow
@pytest.mark.parametrize("kernel", CALLS_OF)
@pytest.mark.parametrize("name", OTHER_FAULTS)
def test_fault_of_another_kernel_is_caught(kernel, name, arch, monkeypatch):
    pattern, replacement, error = OTHER_FAULTS[name]
    with caught(error):
        run_with(edited(pattern, replacement, kernel=kernel), kernel, arch, monkeypatch)


@gfx942_is_slow
@pytest.mark.parametrize("kernel", [kernel for kernel in CALLS_OF if kernel not in WITHOUT_TILES])
def test_row_of_another_kernel_is_caught(kernel, arch, monkeypatch):
    which, size, error = ROWS[arch][kernel]
    with caught(error):
        run_with(edit_of_row(which, size, kernel), kernel, arch, monkeypatch)


def test_one_row_of_a_tile_sees_more_than_the_others():
    """The tile's bound is in its lane alone: each step of the reduction has to hand it on."""
    case, end = CAUSAL._replace(num_heads=1, seqlen_q=256, causal=False), torch.ones(1, 1, 256, dtype=torch.int64)
    end[..., ::64] = 256
    forward(case, arch="gfx1100", mask=Mask.intervals(None, end))
    with caught(AssertionError):
        forward(case, edited(r"row_shr:(\d)", r"row_shl:\1", 0), "gfx1100", mask=Mask.intervals(None, end))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pattern", [r"s_barrier\n", r"s_waitcnt [^;\n]*\n"], ids=["barriers", "waits"])
def test_barriers_and_waits_are_needed(pattern, arch):
    """Of those of the forward kernel each fourth, removed alone: without most there is a race, or a use too early. The
    others protect what does not happen here, or have another one close by."""
    (launch,) = forward(CAUSAL, arch=arch)
    chosen = range(0, len(re.findall(pattern, launch.binary.text("amdgcn"))), 4)
    caught = 0
    for which in chosen:
        try:
            forward(CAUSAL, edited(pattern, "s_nop 0\n", which), arch)
        except (faults.Race, faults.NotWaited):
            caught += 1
    assert caught >= 0.5 * len(chosen)


@pytest.mark.parametrize("mistake", canaries.MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_caught(mistake):
    with canaries.planted(mistake), caught(AssertionError):
        forward(CAUSAL, arch="gfx1100")


@pytest.mark.parametrize("planted, fault", list(zip(canaries.FAULTS, (faults.OutOfBounds, faults.Race), strict=True)))
def test_fault_of_the_launch_is_caught(planted, fault):
    with canaries.planted(planted), caught(fault):
        forward(FLOAT32, arch="gfx1100")
