"""The Triton kernels against the reference in float64, on what there is: the strict interpreter, or a GPU.

`make test-triton` interprets, `make test-gpu` runs the same on a device.
"""

import process

process.require_runnable()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import backward  # noqa: E402
import canaries  # noqa: E402
import fastattn  # noqa: E402
import isas  # noqa: E402
from cases import CASES, Case, inputs  # noqa: E402
from fastattn import UnsupportedError, dispatch, outputs  # noqa: E402
from fastattn.kernels import config, launch, prefill, tuning  # noqa: E402
from fastattn.scores.dropout import dropout_mask  # noqa: E402
from on_device import DEVICE, assert_backward, assert_forward, on_device  # noqa: E402

if process.INTERPRETED:
    from strict_interpreter import harden

    harden()

DTYPES = ("float32", "bfloat16", "float16")
ROWS = [row for row in dispatch.KERNELS if row.backend == "triton"]
FORWARD = [row for row in ROWS if row.supports["direction"] == {"forward"}]


def with_fewer_tiles(case: Case) -> Case:
    """The same kind of call with half the heads and still several tiles of keys: the interpreter's time is that of its
    tiles. Short ones in [batch, seqlen, num_heads, head_dim] memory keep several key heads of several queries."""
    seqlen_k = case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    if case.num_heads != 4 or (case.layout == "bshd" and seqlen_k < 150):
        return case
    heads = {"num_heads": 2, "num_heads_k": max((case.num_heads_k or 4) // 2, 1)}
    return case._replace(**heads, seqlen_k={400: 200, 2100: 700}.get(seqlen_k, case.seqlen_k))


def in_every_dtype(cases, first: int = 0, every: int = 1) -> list:
    """A case in float32 stands for all three: `make test-triton` takes one of them in turn, of every so many cases and
    with fewer tiles, `make test-all` all."""
    quick: dict[Case, bool] = {}
    for number, case in enumerate(cases, first):
        dtypes = DTYPES if case.dtype == "float32" else (case.dtype,)
        for dtype in dtypes:
            quick.setdefault(case._replace(dtype=dtype), False)
            if number % every == 0 and (dtype == DTYPES[number // every % 3] or len(dtypes) == 1):
                quick[with_fewer_tiles(case._replace(dtype=dtype))] = True
    return [pytest.param(case, id=str(case), marks=[] if quick[case] else [pytest.mark.slow]) for case in quick]


def problem_of(case: Case) -> fastattn.problem.Problem:
    (q, k, v), kwargs = on_device(case)
    with fastattn.record() as calls:
        fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="reference")
    return calls[0].problem


def assert_refused(row: dispatch.Row, case: Case, reasons: list[str]) -> None:
    (q, k, v), kwargs = on_device(case)
    with isas.only(row), pytest.raises(UnsupportedError) as refusal:
        fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=row.backend)
    assert all(reason in str(refusal.value) for reason in reasons)


@pytest.mark.parametrize("row", FORWARD, ids=lambda row: row.name)
@pytest.mark.parametrize("case", in_every_dtype(CASES, every=2))
def test_forward_parity(case, row):
    reasons = dispatch.refuse(row, problem_of(case))
    if reasons:
        assert_refused(row, case, reasons)
    else:
        assert_forward(row, case)


@pytest.mark.parametrize(
    "case", in_every_dtype(CASES, first=1, every=2)
)  # those that forward leaves out in `make test-triton`
def test_backward_parity(case):
    problem = problem_of(case)._replace(needs_grad=True)
    if all(dispatch.refuse(row, problem) for row in FORWARD):
        (q, k, v), kwargs = on_device(case)
        with pytest.raises(UnsupportedError, match="backend='triton' refuses"):
            fastattn.attention(q.requires_grad_(), k, v, **kwargs, backend="triton")
        return
    assert_backward(case)


@pytest.fixture
def reloading(monkeypatch):
    """Tiles of architectures with few registers, on any: what stays is loaded in each step, few columns at a time."""
    look_up = config._look_up

    def forget():
        launch.forget(), tuning.tiles.cache_clear()

    monkeypatch.setattr(config, "_look_up", lambda *args: look_up(*args)._replace(BLOCK_M=16, BLOCK_N=32, reload=True))
    forget()
    yield
    forget()


RELOADED = [
    Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=24, causal=True),
    Case(seqlen_q=70, seqlen_k=33, head_dim=80, head_dim_v=40, bias="full"),
    Case(seqlen_q=3, seqlen_k=90, head_dim=250, mask="tensor", dropout_p=0.2, softcap=5.0),
    Case(num_heads=4, seqlen_q=1, seqlen_k=130, head_dim=192, head_dim_v=128),
    Case(num_heads=2, seqlen_q=40, seqlen_k=70, head_dim=64, mask="blocks", softmax_scale=-0.3),
    Case(num_heads=2, seqlen_q=40, seqlen_k=40, head_dim=48, learned_scale="one", alibi=True, sinks=True),
]


@pytest.mark.parametrize("case", in_every_dtype(RELOADED))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_reloaded_tiles(case, direction, reloading):
    if direction == "backward":
        assert_backward(case)
        return
    for row in FORWARD:
        if not dispatch.refuse(row, problem_of(case)):
            assert_forward(row, case)


# --- dropout ---------------------------------------------------------------------------------------------------------


SEEDS = [0, 1, 2**31, 2**32 + 5, 2**63 - 1]
IN_TURN = {(seed, DTYPES[number % 3]) for number, seed in enumerate(SEEDS)}


@pytest.mark.parametrize(
    "seed, dtype",
    [
        pytest.param(seed, dtype, marks=[] if (seed, dtype) in IN_TURN else [pytest.mark.slow])
        for seed in SEEDS
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("seqlen_q, dropout_p", [(1, 0.5), (70, 0.1), (45, 0.9)])
def test_the_dropout_mask_is_everybodys(seqlen_q, dropout_p, seed, dtype):
    """Equal scores and v = 1: what is not zero is what dropout_mask keeps."""
    b, h, s = 2, 3, 64
    q = torch.zeros(b, h, seqlen_q, 16, dtype=getattr(torch, dtype), device=DEVICE)
    k, v = q.new_zeros(b, 1, s, 16), torch.eye(s, dtype=q.dtype, device=DEVICE).expand(b, 1, s, s)
    out = fastattn.attention(q, k, v, dropout_p=dropout_p, seed=seed, backend="triton").cpu()
    keep = dropout_mask(b, h, seqlen_q, s, dropout_p, seed)
    assert torch.equal(out != 0, keep)
    expected = (keep / (1.0 - dropout_p) / s).to(q.dtype)
    torch.testing.assert_close(out, expected)


# --- memory ----------------------------------------------------------------------------------------------------------


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with more than 2^31 elements from the first to the last along `dim`; the memory between them is
    not there until somebody touches it."""
    strides = list(x.stride())
    strides[dim] = 2**31 // (x.shape[dim] - 1) + 64
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
    far = torch.from_numpy(np.zeros(extent, np.int16)).view(x.dtype).as_strided(x.shape, strides)
    return far.copy_(x)


@pytest.mark.skipif(not process.INTERPRETED, reason="on a GPU, memory that is not touched is there all the same")
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(dim):
    case = Case(batch=2, num_heads=2, seqlen_q=5, seqlen_k=40, head_dim=16, dtype="float16", causal=True)
    (q, k, v), kwargs = inputs(case)
    dout, _ = backward.cotangents(q, v)
    near = backward.gradients(q, k, v, kwargs, dout, backend="triton")
    far = backward.gradients(*(far_apart(x, dim) for x in (q, k, v)), kwargs, dout, backend="triton")
    for name, expected in near.items():
        assert torch.equal(far[name], expected), name


@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_a_result_may_be_changed_in_place(seqlen_q):
    """Also one in [batch, seqlen, num_heads, head_dim] memory: autograd forbids it where a function returns a view."""
    q, k, v = (torch.randn(2, s, 4, 16, device=DEVICE).half().transpose(1, 2) for s in (seqlen_q, 7, 7))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = fastattn.attention(q, k, v, backend="triton")
    assert seqlen_q == 1 or out.stride(1) < out.stride(2)
    out.add_(1.0)
    torch.autograd.grad(out.sum(), (q, k, v))


# --- mistakes that must not pass -------------------------------------------------------------------------------------


CANARY = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=24, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", canaries.MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_mistake_is_caught(direction, mistake, dtype):
    case = CANARY._replace(dtype=dtype)
    with canaries.planted(mistake) as row, pytest.raises(AssertionError, match="error .*, allowed"):
        assert_forward(row, case) if direction == "forward" else assert_backward(case)


@pytest.mark.skipif(not process.INTERPRETED, reason="a GPU does not notice")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault, violation", list(zip(canaries.FAULTS, ("OutOfBounds", "Race"), strict=True)))
def test_fault_is_caught(fault, violation, dtype):
    import strict_interpreter

    (q, k, v), kwargs = inputs(CANARY._replace(dtype=dtype, causal=False))
    with canaries.planted(fault), pytest.raises(getattr(strict_interpreter, violation)):
        fastattn.attention(q, k, v, **kwargs, backend="triton")


def test_delta_of_the_rounded_out(monkeypatch):
    """FASTATTN_ROUNDED_DELTA=1: no out in float32, and gradients by the rule all the same where values have no mean."""
    monkeypatch.setattr(outputs, "ROUNDED_DELTA", True)
    case = Case(num_heads=2, seqlen_q=70, seqlen_k=130, head_dim=32, dtype="bfloat16")
    assert_backward(case)
    (q, k, v), _ = on_device(case)
    bound = fastattn.api.bind(q, k, v)
    _, _, saved = prefill.forward_for_backward(bound.problem, q, k, v, bound.terms)
    assert [x.dtype for x in saved] == [torch.bfloat16, torch.float32]

    def loss(q):
        return fastattn.attention(q, k, v, backend="triton").float().square().sum()

    (expected,) = torch.autograd.grad(loss(q.requires_grad_()), q)
    assert torch.equal(torch.func.grad(loss)(q.detach()), expected)
