"""The PTX that Triton compiles of the kernels for GPUs with mma.sync, executed instruction by instruction in NumPy.

What no other process sees: layouts and swizzles of shared memory, barriers, asynchronous copies and their waits, how
matrix instructions take their operands. tests/gpu/test_emulator.py checks the executor itself.
"""

import re
from contextlib import nullcontext

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402

import backward  # noqa: E402
import canaries  # noqa: E402
from accuracy import assert_accuracy, plain  # noqa: E402
from cases import Case, inputs  # noqa: E402
from emulator import faults  # noqa: E402
from emulator.device import executing  # noqa: E402
from emulator.machine import decode  # noqa: E402
from emulator.opcodes import STEPS  # noqa: E402
from fastattn import BlockMask, Mask, attention, last_call  # noqa: E402
from ptx_formulas import APPROXIMATE, FORMULAS  # noqa: E402

OTHERS = (86, 89, 120)  # beside sm_80; from sm_90 on, k and v are loaded by tensor maps (TMA)
CHECKED = FORMULAS.keys() | APPROXIMATE.keys()


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def slow(case: Case):
    return pytest.param(case, marks=pytest.mark.slow, id=str(case))


# Several rounds of each loop: tiles of sm_80 are up to 128 x 128.
CAUSAL = Case(num_heads=2, num_heads_k=1, seqlen_q=390, head_dim=64, dtype="bfloat16", causal=True)
WINDOW = Case(num_heads=2, seqlen_q=530, seqlen_k=557, head_dim=40, dtype="float16", window_size=(400, 3))
FLOAT32 = Case(num_heads=2, num_heads_k=1, seqlen_q=70, seqlen_k=130, head_dim=16)
BLOCKS = Case(num_heads=2, seqlen_q=150, seqlen_k=170, head_dim=32, dtype="bfloat16", mask="shared_blocks")
EVERYTHING = Case(
    num_heads=2, num_heads_k=1, seqlen_q=100, seqlen_k=150, head_dim=64, dtype="bfloat16", softcap=5.0, alibi=True,
    sinks=True, bias="per_head", mask="tensor_per_head", causal=True,
)  # fmt: skip
DECODE = Case(num_heads=4, num_heads_k=2, seqlen_q=1, seqlen_k=1500, head_dim=64, dtype="bfloat16")
FORWARD = [
    CAUSAL,
    WINDOW,
    FLOAT32,
    DECODE,
    *map(slow, (
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
    )),
]  # fmt: skip
CAUSAL_BACKWARD = CAUSAL._replace(seqlen_q=270)
BACKWARD = [
    CAUSAL_BACKWARD,
    BLOCKS,
    *map(slow, (
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
    )),
]  # fmt: skip


def forward(case: Case, edit=lambda name, text: text, arch: int = 80, **options) -> list:
    """A call that is executed and compared with the reference in float64: its launches."""
    (q, k, v), kwargs = inputs(case)
    kwargs |= options
    with executing(arch, edit) as launches:
        actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
        assert last_call().kernel.startswith("triton.")
    assert_accuracy(actual, q, k, v, **kwargs)
    return launches


def assert_all_products_ran(launches) -> None:
    """No matrix instruction is left out; the kernels of float32 have none."""
    for launch in launches:
        code = decode(launch.binary.text("ptx"))
        left_out = [
            str(instruction)
            for number, block in enumerate(code.blocks)
            for instruction in block.instructions
            if instruction.opcode.startswith("mma") and number not in code.visited
        ]
        assert left_out == []


def assert_all_opcodes_are_checked(launches) -> None:
    """In test_emulator.py, by formulas or in kernels of its own, as those of `STEPS` and comparisons of halves are."""
    apart = {*STEPS, "bra", "ret"} - {"mov", "setp"}
    for launch in launches:
        opcodes = {i.opcode for i in decode(launch.binary.text("ptx")).program.instructions}
        opcodes = {opcode for opcode in opcodes if not re.match(r"setp.*16x2", opcode)}
        assert {opcode for opcode in opcodes if opcode.split(".")[0] not in apart} - CHECKED == set()


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case):
    launches = forward(case)
    assert len(launches) == (2 if case.seqlen_q <= 3 else 1)  # split keys, then `combine`
    if case in (CAUSAL, WINDOW, DECODE):
        assert_all_products_ran(launches)
    assert_all_opcodes_are_checked(launches)


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in OTHERS)])
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case, arch, monkeypatch):
    gradients = backward.gradients

    def ours(q, k, v, kwargs, dout, dlse=None, backend="triton", of_scores=False):
        with plain(q.dtype) if backend == "reference" else nullcontext():
            return gradients(q, k, v, kwargs, dout, dlse, backend, of_scores)

    monkeypatch.setattr(backward, "gradients", ours)
    with executing(arch) as launches:
        backward.assert_parity(case, of_scores=True)
    assert {"delta_kernel", "key_value_kernel", "query_kernel"} < {launch.binary.name for launch in launches}
    if case == CAUSAL_BACKWARD:
        assert_all_products_ran(launches)
    assert_all_opcodes_are_checked(launches)


@pytest.mark.parametrize("arch", [120, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (86, 89))])
@pytest.mark.parametrize("case", [CAUSAL, *map(slow, (WINDOW, FLOAT32, DECODE, BLOCKS, EVERYTHING))], ids=str)
def test_forward_on_other_architectures(case, arch):
    launches = forward(case, arch=arch)
    if case == CAUSAL:
        assert ("cp.async.bulk.tensor" in launches[0].binary.text("ptx")) == (arch == 120)
    assert_all_opcodes_are_checked(launches)


def test_full_blocks():
    """Which the random masks of blocks do not have: a loop without masks."""
    mask = BlockMask.from_mask(Mask.causal(), seqlen_q=300, block_size=64)
    assert_all_products_ran(forward(BLOCKS._replace(seqlen_q=300, seqlen_k=300, mask=None), mask=mask))


def test_numbers_that_a_mask_hides():
    """Inf and NaN of a key reach the queries that see it and no other: a loop of its own."""
    (q, k, v), kwargs = inputs(CAUSAL)
    v[0, 0, 137, 5], v[0, 0, 300, 9] = float("inf"), float("nan")
    with executing(80):
        actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
    assert_accuracy(actual, q, k, v, **kwargs)


# --- mistakes that must be caught ------------------------------------------------------------------------------------


def edited(pattern: str, replacement: str, which: int | None = None):
    """An edit of the forward kernel: all places of the pattern, or one of them."""

    def edit(name: str, text: str) -> str:
        found = list(re.finditer(pattern, text))
        if name != "forward_kernel":
            return text
        assert found
        for match in reversed(found if which is None else [found[which]]):
            text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        return text

    return edit


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
        edited(r"(cp\.async\.cg.*\[ %rd\d+ \+ )0", r"\g<1>128", 0), (faults.OutOfBounds, AssertionError),
    ),
    "rows that are not there": (edited(r"@%p\d+ ld\.global\.v4", "ld.global.v4"), faults.OutOfBounds),
    "rows that are not there, written": (edited(r"@%p\d+ st\.global\.v4", "st.global.v4"), faults.OutOfBounds),
    "factors in another order": (edited(r"(mma.*\{ )(%r\d+), (%r\d+)( \}, \{ %r\d+, %r\d+, %r\d+, %r\d+ \};)",
                                        r"\1\3, \2\4", 3), AssertionError),
    "the maximum of half a row": (edited(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )2,", r"\g<1>1,"), AssertionError),
    "a bound that is one off": (edited(r"setp\.lt\.s32", "setp.le.s32"), (faults.Fault, AssertionError)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    edit, caught = FAULTS[name]
    with pytest.raises(caught):
        forward(CAUSAL, edit)


FAULTS_OF_TENSOR_MAPS = {
    "no wait": (edited(r"mbarrier\.try_wait.*;", "mov.pred complete, -1;"), faults.NotWaited),
    "a wait for the phase before": (
        edited(r"(try_wait\.parity\S+ complete, \[%r\d+\], )%r\d+", r"\g<1>1"), faults.NotWaited,
    ),
    "fewer bytes than come": (edited(r"(expect_tx\S+ _, \[%r\d+\], )\d+", r"\g<1>4096"), faults.Deadlock),
    "a tile that is overwritten while it is read": (edited(r"bar\.sync\s+0;", ""), faults.Race),
    "other rows": (edited(r"(bulk\.tensor.*\{%r\d+, )%r\d+,", r"\g<1>%r0,"), (AssertionError, faults.Fault)),
    "a swizzle with another bit": (edited(r"(xor\.b32\s+%r\d+, %r\d+, )64;", r"\g<1>32;", 0), AssertionError),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS_OF_TENSOR_MAPS)
def test_fault_of_tensor_maps_is_caught(name):
    edit, caught = FAULTS_OF_TENSOR_MAPS[name]
    with pytest.raises(caught):
        forward(CAUSAL, edit, 120)


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
    with canaries.planted(mistake), pytest.raises(AssertionError, match="error .*, allowed"):
        forward(CAUSAL)


@pytest.mark.parametrize("planted, fault", list(zip(canaries.FAULTS, (faults.OutOfBounds, faults.Race), strict=True)))
def test_fault_of_the_launch_is_caught(planted, fault):
    with canaries.planted(planted), pytest.raises(fault):
        forward(FLOAT32)
