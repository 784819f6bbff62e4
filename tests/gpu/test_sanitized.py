"""The compiled kernels in ttsem: it executes the IR that Triton's compiler makes of them, and checks every access.

Other than the interpreter it sees what the frontend of the compiler does (types, masks, bfloat16, philox) and races of
the whole launch at once. The tensors are on the CPU; tiles are those of sm_90.
"""

import process

process.require(interpreted=False)

import pytest  # noqa: E402

sanitize = pytest.importorskip("ttsem.sanitize", reason="ttsem is not installed: make test-triton")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from ttsem import ops  # noqa: E402

import canaries  # noqa: E402
from accuracy import assert_accuracy, assert_gradients  # noqa: E402
from cases import Case, inputs  # noqa: E402
from fastattn import (  # noqa: E402
    Mask,
    attention,
    dispatch,
    last_call,
    plans,  # noqa: E402
)
from fastattn.kernels import config, launch  # noqa: E402

DEVICE = config.Device("sm_90", config.SMEM["sm_90"], 8, "ttsem")


def load_as_typed(interp, op, args, load=ops.OPS["tt.descriptor_load"]):
    """Triton folds the reshape of what a descriptor loads into the load, which ttsem 0.1.0 does not expect."""
    (block,) = load(interp, op, args)
    return [block.reshape(op.result_types[0].shape)]


@pytest.fixture(autouse=True)
def session(monkeypatch):
    """Launches run in ttsem, on CPU tensors, with the tiles of sm_90."""
    monkeypatch.setitem(ops.OPS, "tt.descriptor_load", load_as_typed)
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    monkeypatch.setattr(launch, "device_facts", lambda index: DEVICE)
    rows = tuple(
        row._replace(available=None, supports={**row.supports, "device": {"cpu"}}) if row.backend == "triton" else row
        for row in dispatch.KERNELS
    )
    monkeypatch.setattr(dispatch, "KERNELS", rows)
    clear_caches()
    with sanitize.session(cuda_is_cpu=False) as state:
        yield state
    clear_caches()


def clear_caches():
    launch.forget(), plans.forget()


SMALL = Case(batch=1, num_heads=2, num_heads_k=1, seqlen_q=100, seqlen_k=150, head_dim=64)
EVERYTHING = SMALL._replace(softcap=5.0, alibi=True, sinks=True, bias="per_head", mask="tensor_per_head", causal=True)
BLOCKS = SMALL._replace(mask="blocks", dtype="bfloat16")
CASES = [
    *(SMALL._replace(dtype=dtype) for dtype in ("bfloat16", "float16", "float32")),
    SMALL._replace(dtype="bfloat16", causal=True),
    SMALL._replace(dtype="bfloat16", seqlen_q=150, head_dim=80, head_dim_v=40, layout="bshd", window_size=(20, 3)),
    SMALL._replace(dtype="float16", mask="documents", seqlen_q=150),
    SMALL._replace(dtype="bfloat16", mask="intervals", seqlen_q=40),
    SMALL._replace(dtype="float16", dropout_p=0.5, learned_scale="per_head"),
    *(EVERYTHING._replace(dtype=dtype) for dtype in ("bfloat16", "float32")),
    BLOCKS,
    BLOCKS._replace(dtype="float16", mask="shared_blocks", causal=True),
]
DECODE = Case(num_heads=4, num_heads_k=2, seqlen_q=1, seqlen_k=700, head_dim=64, dtype="bfloat16")
DECODES = [DECODE, DECODE._replace(num_heads_k=1, seqlen_q=3, head_dim=24, dtype="float16", mask="lengths", sinks=True)]


@pytest.mark.parametrize("case", CASES + DECODES, ids=str)
def test_forward(case, session):
    (q, k, v), kwargs = inputs(case)
    actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
    assert session.launches == 1 + (case in DECODES) and session.races_unchecked == 0  # split keys, then `combine`
    assert_accuracy(actual, q, k, v, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_pass(case, session, monkeypatch):
    assert_gradients(case, monkeypatch)
    assert session.launches >= 3 and session.races_unchecked == 0


def test_a_seed_of_63_bits(session):
    (q, k, v), kwargs = inputs(SMALL._replace(dropout_p=0.5))
    kwargs["seed"] = 2**62 + 1
    actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
    assert last_call().kernel.startswith("triton.") and session.launches > 0
    assert_accuracy(actual, q, k, v, **kwargs)


def test_intervals_beyond_the_keys(session):
    (q, k, v), _ = inputs(SMALL)
    mask = Mask.intervals(torch.full((1, 1, 100), -7), torch.full((1, 1, 100), 10_000))
    actual = attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    assert_accuracy(actual, q, k, v, mask=mask)


# --- mistakes that must be caught ------------------------------------------------------------------------------------


@triton.jit
def copy(x, y, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def overlap(y, STEP: tl.constexpr):
    i = tl.program_id(0)
    tl.store(y + i * STEP + tl.arange(0, 32), i.to(tl.float32))


@pytest.mark.parametrize("mistake", canaries.MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_caught(mistake):
    (q, k, v), kwargs = inputs(SMALL._replace(dtype="bfloat16", causal=True))
    with canaries.planted(mistake), pytest.raises(AssertionError, match="error .*, allowed"):
        actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
        assert_accuracy(actual, q, k, v, **kwargs)


@pytest.mark.parametrize(
    "fault, message",
    list(zip(canaries.FAULTS, ("past the end of the tensor passed as `k`", "both touch"), strict=True)),
)
def test_fault_is_caught(fault, message):
    """With head_dim 80, whose keys come by pointers: a tensor descriptor (TMA) knows where they end."""
    (q, k, v), kwargs = inputs(SMALL._replace(dtype="bfloat16", head_dim=80, num_heads_k=2))
    with canaries.planted(fault), pytest.raises(sanitize.KernelFault, match=message):
        attention(q, k, v, **kwargs, backend="triton")


def test_out_of_bounds_is_caught():
    copy[(4,)](torch.randn(128), torch.empty(128), 128, 32)
    with pytest.raises(sanitize.KernelFault, match="reads 28 element.* past the end of the tensor passed as `x`"):
        copy[(4,)](torch.randn(100), torch.empty(100), 100, 32)


def test_a_race_is_caught():
    overlap[(3,)](torch.empty(96), 32)
    with pytest.raises(sanitize.KernelFault, match=r"both touch element 31 of `y`"):
        overlap[(3,)](torch.empty(96), 31)
