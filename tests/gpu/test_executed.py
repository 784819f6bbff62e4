"""The PTX that Triton compiles of the kernels for NVIDIA's GPUs up to sm_90, and sm_120, executed instruction by
instruction in NumPy.

What no other process sees: layouts and swizzles of shared memory, barriers, asynchronous copies and their waits, how
matrix instructions take their operands. tests/gpu/test_emulator.py checks the executor itself.
"""

import re

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402

import canaries  # noqa: E402
from accuracy import assert_accuracy, assert_gradients  # noqa: E402
from cases import Case, inputs  # noqa: E402
from emulator import faults  # noqa: E402
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
    RING,
    WINDOW,
    assert_all_opcodes_are_checked,
    assert_all_products_ran,
    assert_products_have_their_registers_alone,
    backward,
    caught,
    edited,
    forward,
)
from fastattn import BlockMask, Mask, attention  # noqa: E402

SM_90_IS_SLOW = (80, pytest.param(90, marks=pytest.mark.slow))
OTHERS = (86, 89, 120)  # beside sm_80 and sm_90; from sm_90 on, k and v are loaded by tensor maps (TMA)


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def runs(cases, selected: dict[int, tuple], architectures: tuple[int, ...] = (80, 90)) -> list:
    """(case, architecture) of all, slow but for those that are selected."""
    return [
        pytest.param(
            case, arch, id=f"{case}-sm_{arch}", marks=() if case in selected.get(arch, ()) else pytest.mark.slow
        )
        for case in cases
        for arch in architectures
    ]


FORWARD = [
    CAUSAL,
    WINDOW,
    FLOAT32,
    DECODE,
    DECODE_BLOCKS,
    RING,
    CAUSAL._replace(causal=False, dtype="float16", seqlen_k=450),
    CAUSAL._replace(causal=False, head_dim=128, seqlen_k=300),
    CAUSAL._replace(head_dim=80, head_dim_v=40, layout="bshd"),
    WINDOW._replace(dtype="bfloat16", head_dim=256, head_dim_v=192),
    WINDOW._replace(dtype="float32"),
    FLOAT32._replace(causal=True, head_dim=64),
    BLOCKS,
    BLOCKS._replace(mask="blocks", dtype="float16", head_dim=64, causal=True),
    EVERYTHING,
    EVERYTHING._replace(dtype="float32"),
    DECODE._replace(num_heads_k=1, seqlen_q=3, head_dim=24, dtype="float16", mask="lengths", sinks=True),
    DECODE._replace(dtype="float32", head_dim=128),
    DECODE._replace(num_heads=2, num_heads_k=1, seqlen_q=40, seqlen_k=700, causal=True),
    DECODE_BLOCKS._replace(mask="blocks", seqlen_q=40, seqlen_k=700, dtype="float16"),
]
FORWARD += ODD_FORWARD
CAUSAL_BACKWARD = CAUSAL._replace(seqlen_q=270)
BACKWARD = [
    CAUSAL_BACKWARD,
    BLOCKS,
    FLOAT32._replace(head_dim=32),
    CAUSAL._replace(causal=False, dtype="float16", seqlen_q=130, seqlen_k=170),
    CAUSAL._replace(head_dim=128, seqlen_q=200),
    WINDOW,
    WINDOW._replace(dtype="bfloat16", head_dim=256, seqlen_q=90, seqlen_k=130),
    BLOCKS._replace(mask="blocks", dtype="float16", head_dim=64, causal=True),
    CAUSAL._replace(dtype="float16", causal=False, mask="documents"),
    CAUSAL._replace(causal=False, mask="intervals", seqlen_q=140),
    CAUSAL._replace(dropout_p=0.5, learned_scale="per_head", seqlen_q=130),
    EVERYTHING,
    EVERYTHING._replace(dtype="float32"),
]


QUICK = {
    80: (*FORWARD[:5], ODD_BACKWARD[-1], ODD_FORWARD[-1]),
    90: (CAUSAL, WINDOW, DECODE, RING, ODD_FORWARD[5], ODD_FORWARD[15]),  # windows: in float32, in decoding
}


@pytest.mark.parametrize("case, arch", runs(FORWARD, QUICK))
def test_forward(case, arch):
    launches = forward(case, arch=arch)
    assert len(launches) == (2 if case.seqlen_q <= 40 else 1)  # split keys, then `combine`
    if arch == 90:
        assert_products_have_their_registers_alone(launches)
        assert case not in (CAUSAL, WINDOW) or "wgmma.mma_async" in launches[0].binary.text("ptx")
    if case in (CAUSAL, WINDOW, DECODE):
        assert_all_products_ran(launches)
    assert_all_opcodes_are_checked(launches)


@pytest.mark.parametrize(
    "case, arch",
    runs(BACKWARD, {80: BACKWARD[:2], 90: BACKWARD[:1]}, (80, 90, *OTHERS))
    + runs(ODD_BACKWARD, {80: ODD_BACKWARD[-1:]}),
)
def test_backward(case, arch, monkeypatch):
    with executing(arch) as launches:
        assert_gradients(case, monkeypatch)
    assert {"delta_kernel", "key_value_kernel", "query_kernel"} < {launch.binary.name for launch in launches}
    if arch == 90:
        assert_products_have_their_registers_alone(launches)
    if case == CAUSAL_BACKWARD:
        assert_all_products_ran(launches)
    assert_all_opcodes_are_checked(launches)


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, *OTHERS))])
def test_lanes_of_a_sum_agree(arch, monkeypatch):
    """To the last bit: each of them stores delta, and which one comes last is open."""
    with executing(arch):
        assert_gradients(Case(seqlen_q=64, head_dim=40, dtype="float16"), monkeypatch)


@pytest.mark.parametrize(
    "case, arch", runs((CAUSAL, WINDOW, FLOAT32, DECODE, BLOCKS, EVERYTHING), {120: (CAUSAL,)}, OTHERS)
)
def test_forward_on_other_architectures(case, arch):
    launches = forward(case, arch=arch)
    if case == CAUSAL:
        assert ("cp.async.bulk.tensor" in launches[0].binary.text("ptx")) == (arch == 120)
    assert_all_opcodes_are_checked(launches)


@pytest.mark.parametrize("arch", SM_90_IS_SLOW)
def test_full_blocks(arch):
    """Which the random masks of blocks do not have: a loop without masks."""
    mask = BlockMask.from_mask(Mask.causal(), seqlen_q=300, block_size=64)
    assert_all_products_ran(forward(BLOCKS._replace(seqlen_q=300, seqlen_k=300, mask=None), arch=arch, mask=mask))


@pytest.mark.parametrize("arch", SM_90_IS_SLOW)
def test_numbers_that_a_mask_hides(arch):
    """Inf and NaN of a key reach the queries that see it and no other: a loop of its own."""
    (q, k, v), kwargs = inputs(CAUSAL)
    v[0, 0, 137, 5], v[0, 0, 300, 9] = float("inf"), float("nan")
    with executing(arch):
        actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
    assert_accuracy(actual, q, k, v, **kwargs)


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, *OTHERS))])
def test_products_in_tf32(arch, monkeypatch):
    """Of float32 where torch may round its own, too: 11 bits of each factor, which errors show from both sides."""
    case = FLOAT32._replace(head_dim=64, causal=True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with executing(arch) as launches:
            found = results_of(case, torch.float32, "triton")
    finally:
        torch.set_float32_matmul_precision(precision)
    assert sum("tf32" in launch.binary.text("ptx") for launch in launches) == 3  # all but delta_kernel
    right = results_of(case, torch.float64, "reference")
    hidden = torch.arange(130).expand(1, 1, 70, -1) != 129  # the last key, which one row sees
    without = results_of(case, torch.float64, "reference", mask=hidden)
    for x, y, less in zip(found, right, without, strict=True):
        error, of_a_key = (((z - y).abs().max() / y.abs().max()).item() for z in (x, less))
        assert 1e-5 < error < 2.0**-8 < of_a_key


def results_of(case: Case, dtype: torch.dtype, backend: str, **options) -> list[torch.Tensor]:
    """out, and gradients of q, k and v."""
    qkv, kwargs = inputs(case)
    kwargs |= options
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out = attention(*leaves, **kwargs, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


# --- mistakes that must be caught ------------------------------------------------------------------------------------


PREDICATES = {
    "rows that are not there": (edited(r"@%p\d+ ld\.global\.v4", "ld.global.v4"), faults.OutOfBounds),
    "rows that are not there, written": (edited(r"@%p\d+ st\.global\.v4", "st.global.v4"), faults.OutOfBounds),
    "a bound that is one off": (edited(r"setp\.lt\.s32", "setp.le.s32"), faults.OutOfBounds),
}  # fmt: skip


def mask_off_by_one(which: int):
    """One comparison of those that hide keys; loads do not notice."""
    return edited(r"setp\.lt\.s32", "setp.le.s32", which), AssertionError


FACTORS = (
    edited(r"(mma.*\{ )(%r\d+), (%r\d+)( \}, \{ %r\d+, %r\d+, %r\d+, %r\d+ \};)", r"\1\3, \2\4", 3), AssertionError
)  # fmt: skip
FAULTS = {
    "no wait": (edited(r"cp\.async\.wait_group\s+\d+;", ""), faults.NotWaited),
    "a wait for one group less": (edited(r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;", 0), faults.NotWaited),
    "no barrier before the products": (edited(r"bar\.sync\s+0;", "", 6), faults.Race),
    "no barrier before the tile is overwritten": (edited(r"bar\.sync\s+0;", "", 5), faults.Race),
    "no barrier in the epilogue": (edited(r"bar\.sync\s+0;", "", -1), faults.Race),
    "a swizzle with another bit": (edited(r"(xor\.b32\s+%r\d+, %r\d+, )64;", r"\g<1>32;", 0), AssertionError),
    "shared memory by bytes": (edited(r"(xor\.b32\s+%r\d+, %r\d+, )96;", r"\g<1>8;", 0), faults.Misaligned),
    "a row further in shared memory": (edited(r"(ldmatrix.*\[%r\d+)(\+\d+)?\];", r"\g<1>+128];", 20), AssertionError),
    "a row further in k": (
        edited(r"(cp\.async\.cg.*\[ %rd\d+ \+ )0", r"\g<1>128", 0), faults.OutOfBounds,
    ),
    "factors in another order": FACTORS,
    "a mask that is one off": mask_off_by_one(20),
    "the maximum of half a row": (edited(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )2,", r"\g<1>1,"), faults.Race),
    **PREDICATES,
}  # fmt: skip


FAULTS_OF_TENSOR_MAPS = {
    "no wait": (edited(r"mbarrier\.try_wait.*;", "mov.pred complete, -1;"), faults.NotWaited),
    "a wait for the phase before": (
        edited(r"(try_wait\.parity\S+ complete, \[%r\d+\], )%r\d+", r"\g<1>1"), faults.NotWaited,
    ),
    "fewer bytes than come": (edited(r"(expect_tx\S+ _, \[%r\d+\], )\d+", r"\g<1>4096"), faults.Deadlock),
    "a tile that is overwritten while it is read": (edited(r"bar\.sync\s+0;", ""), faults.Race),
    "other rows": (edited(r"(bulk\.tensor.*\{%r\d+, )%r\d+,", r"\g<1>0,"), AssertionError),
    "a swizzle with another bit": (edited(r"(xor\.b32\s+%r\d+, %r\d+, )64;", r"\g<1>32;", 0), AssertionError),
    "a row further in shared memory": (edited(r"(ldmatrix.*\[%r\d+)(\+\d+)?\];", r"\g<1>+128];", 20), AssertionError),
    "factors in another order": FACTORS,
    "a mask that is one off": mask_off_by_one(20),
    **PREDICATES,
}  # fmt: skip


DESCRIPTOR = 0x4000004000000000
"""Of a factor in rows of 128 bytes with their swizzle; the next 8 rows lie 1024 bytes further."""


def described(descriptor: int, which: int):
    """Another descriptor of a factor; adding to it moves where the factor begins."""
    return edited(rf"or\.b64(\s+%rd\d+, %rd\d+, ){DESCRIPTOR};", rf"add.s64\g<1>{descriptor};", which)


FAULTS_OF_WARPGROUPS = {
    "no wait": (edited(r"wgmma\.wait_group.*;", ""), faults.NotWaited),
    "no wait at the end": (edited(r"wgmma\.wait_group.*;", "", 0), faults.NotWaited),
    "no wait for the scores": (edited(r"(wgmma\.wait_group.*) 0;", r"\1 1;", 3), faults.NotWaited),
    "no commit": (edited(r"wgmma\.commit_group.*;", "", 0), faults.NotWaited),
    "no fence of the registers": (edited(r"wgmma\.fence.*;", "", -1), faults.Unfenced),
    "no fence of shared memory": (edited(r"fence\.proxy.*;", ""), faults.Unfenced),
    "no fence of what is written in a loop": (edited(r"fence\.proxy.*;", "", -1), faults.Unfenced),
    "no barrier before the products": (edited(r"(fence\.proxy.*;\s+)bar\.sync\s+0;", r"\1", -1), faults.Race),
    "no wait for a box": (edited(r"mbarrier\.try_wait.*;", "mov.pred complete, -1;"), faults.NotWaited),
    "a tile that is overwritten while it is read": (edited(r"bar\.sync\s+0;", ""), faults.Race),
    "a swizzle of other bits": (described(DESCRIPTOR ^ 3 << 62, 0), AssertionError),
    "rows in other places": (described(DESCRIPTOR - (32 << 32), 0), AssertionError),
    "a row further in q": (described(DESCRIPTOR + 8, 1), AssertionError),
    "a row further in k": (described(DESCRIPTOR + 8, 0), AssertionError),
    "a row further in v": (
        edited(r"(wgmma\.mma_async.*\}, )(%rd\d+)(, .*)", r"add.s64 \2, \2, 8;\n\1\2\3", 0), faults.OutOfBounds,
    ),
    "a part of the head's columns": (described(DESCRIPTOR + 2, 0), AssertionError),
    "a factor that is not transposed": (edited(r"(mma_async.* 1, 1, )1;", r"\g<1>0;"), faults.Race),  # with an mbarrier
    "factors in another order": (
        edited(r"(wgmma\.mma_async.*\}, )(%rd\d+), (%rd\d+)(, .*)", r"\1\3, \2\4"), faults.OutOfBounds,
    ),
    "numbers of a factor in another order": (
        edited(r"(wgmma\.mma_async.*\}, \{)(%r\d+),\s*(%r\d+)", r"\1\3, \2", 0), AssertionError,
    ),
    "a mask that is one off": mask_off_by_one(70),
    **PREDICATES,
    "sums that are not kept": (edited(r"(mma_async.*), %p\d+, 1, 1, 1;", r"\1, 0, 1, 1, 1;", -1), AssertionError),
}  # fmt: skip


FAULTS_OF_RINGS = {
    "the parity of the first round": (
        edited(r"(try_wait\.parity\S+ complete, \[%r\d+\], )%r\d+", r"\g<1>0"), faults.NotWaited,
    ),
    "one box more than there is": (edited(r"(setp\.gt\.s32\s+%p\d+, %r\d+, )2;", r"\g<1>3;", -1), faults.Uninitialized),
    "each lane arrives": (edited(r"@%p\d+ (mbarrier\.arrive\.expect_tx)", r"\1"), faults.Misused),
    "each lane makes the barriers": (edited(r"@%p\d+ (mbarrier\.init)", r"\1"), faults.Misused),
    "a barrier in a tile": (edited(r"(mbarrier\.init\S+ \[%r\d+)\]", r"\1+-98304]"), faults.Race),
    "a lane of each warp waits": (
        edited(r"(\.reg \.pred) complete;((?:\n.*)*?\n\s*)(mbarrier\.try_wait)",
               r"\1 complete;\n\1 one;\2mov.pred complete, -1;\nelect.sync %r0|one, -1;\n@one \3"), faults.NotWaited,
    ),
}  # fmt: skip


FAULTS_OF_BLOCKS = {
    "a block mask, no wait": (edited(r"cp\.async\.wait_group\s+\d+;", ""), faults.NotWaited),
    "a block mask, no barrier": (edited(r"bar\.sync\s+0;", "", -1), faults.Race),
    "a block mask, a row further in k": (
        edited(r"(cp\.async\.cg.*\[ %rd\d+ \+ )0", r"\g<1>64", 4), AssertionError,
    ),
}  # fmt: skip


PLANTED = (
    (80, CAUSAL, FAULTS), (80, BLOCKS, FAULTS_OF_BLOCKS), (120, CAUSAL, FAULTS_OF_TENSOR_MAPS),
    (90, CAUSAL, FAULTS_OF_WARPGROUPS), (90, RING, FAULTS_OF_RINGS),
)  # fmt: skip


@pytest.mark.parametrize(
    "arch, case, edit, error",
    [
        pytest.param(arch, case, *fault, id=f"sm_{arch} {name}")
        for arch, case, faults_of in PLANTED
        for name, fault in faults_of.items()
    ],
)
def test_fault_is_caught(arch, case, edit, error):
    with caught(error):
        forward(case, edit, arch)


OTHER_FAULTS = {
    "no wait": (r"cp\.async\.wait_group\s+\d+;", "", None, faults.NotWaited),
    "no barrier": (r"bar\.sync\s+0;", "", None, faults.Race),
    "a row further in k": (r"(cp\.async\.cg.*\[ %rd\d+ \+ )0", r"\g<1>128", 0, AssertionError),
    "rows that are not there": (r"@%p\d+ ld\.global\.v4", "ld.global.v4", None, faults.OutOfBounds),
}
WITHOUT_COPIES = ("no barrier", "rows that are not there")
"""Of kernels whose loads are synchronous."""


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, 120))])
@pytest.mark.parametrize(
    "kernel, name",
    [(kernel, name) for kernel in ("decode_kernel", "key_value_kernel", "query_kernel") for name in OTHER_FAULTS]
    + [(kernel, name) for kernel in ("combine_kernel", "delta_kernel") for name in WITHOUT_COPIES],
)
def test_fault_of_another_kernel_is_caught(kernel, name, arch, monkeypatch):
    *edit, error = OTHER_FAULTS[name]
    with caught(error):
        if kernel in ("decode_kernel", "combine_kernel"):
            forward(DECODE, edited(*edit, kernel), arch)
        else:
            backward(CAUSAL._replace(seqlen_q=130), edited(*edit, kernel), arch, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CAUSAL, CAUSAL._replace(causal=False)], ids=str)
def test_barriers_are_needed(case):
    """Of all barriers of the forward kernel, each removed alone: without most of them there is a race. The others
    protect memory from what does not happen here, or have another one close by."""
    (launch,) = forward(case)
    barriers = len(re.findall(r"bar\.sync\s+0;", launch.binary.text("ptx")))
    races = 0
    for which in range(barriers):
        try:
            forward(case, edited(r"bar\.sync\s+0;", "", which))
        except faults.Race:
            races += 1
    assert races >= 0.6 * barriers


@pytest.mark.parametrize("mistake", canaries.MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_caught(mistake):
    with canaries.planted(mistake), caught(AssertionError):
        forward(CAUSAL)


@pytest.mark.parametrize("planted, fault", list(zip(canaries.FAULTS, (faults.OutOfBounds, faults.Race), strict=True)))
def test_fault_of_the_launch_is_caught(planted, fault):
    with canaries.planted(planted), caught(fault):
        forward(FLOAT32)
