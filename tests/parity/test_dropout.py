"""Dropout in the compiled kernels: the same bits as `dropout_mask`, forward and backward, and torch's generator."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from cases import Case, inputs
from fastattn import Mask, api, dispatch
from fastattn.backends import cpu
from fastattn.scores.dropout import DropoutStart, dropout_mask_at
from fastattn.terms import Terms
from forward import DTYPES
from isas import run_tests_on, running_isa, supported_isas

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")
SEED = (7 << 40) + (1 << 31) + 3  # more than 32 bits, and a low word that is negative as an int32


def kept(problem: Case, dropout_p, seed=SEED, **kwargs) -> torch.Tensor:
    """Which weights the kernel keeps: with equal scores and v the identity, out is the weights."""
    (q, k, _), extra = inputs(problem)
    v = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    out = fastattn.attention(q * 0, k, v, **extra, **kwargs, dropout_p=dropout_p, seed=seed, backend="cpu")
    assert fastattn.last_call().kernel in ("cpu.prefill", "cpu.decode")
    return out != 0


SHAPES = [(1, 1), (3, 4), (5, 7), (16, 33), (45, 77), (130, 260), (2, 500)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_the_kernel_keeps_what_the_mask_says(seqlen_q, seqlen_k, dtype):
    case = Case(2, 4, seqlen_q, seqlen_k, 8, num_heads_k=2, dtype=dtype)
    expected = fastattn.dropout_mask(2, 4, seqlen_q, seqlen_k, 0.4, SEED)
    assert torch.equal(kept(case, 0.4), expected)


def test_keys_are_counted_from_the_first_whatever_is_masked():
    case = Case(2, 2, 70, 300, 8)
    starts = torch.randint(0, 250, (2, 2, 70), generator=torch.Generator().manual_seed(0))
    mask = Mask.intervals(starts, starts + 41)
    expected = fastattn.dropout_mask(2, 2, 70, 300, 0.4, SEED) & mask.to_dense(70, 300)
    assert torch.equal(kept(case, 0.4, mask=mask), expected)


STARTS = [(0, 0, 0), (3, 70, 128), (1, 5, 33), (2, 2**31, 2**32 - 400)]


def of_a_part(backend, direction, start, seqlen_q, dtype):
    """(row, problem, q, k, v, terms) of a call that is a part of another one."""
    (q, k, v), _ = inputs(Case(2, 4, seqlen_q, 77, 8, num_heads_k=2, dtype=dtype))
    _, problem, terms, _ = api.bind(q, k, v, dropout_p=0.4, seed=SEED, return_lse=True)
    problem = problem._replace(dropout_start=True, direction=direction)
    return dispatch.select(problem, backend), problem, q, k, v, terms._replace(dropout_start=DropoutStart(*start))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seqlen_q", [2, 45])
@pytest.mark.parametrize("start", STARTS)
def test_a_part_drops_what_the_mask_of_the_whole_says(start, seqlen_q, dtype):
    choice, problem, q, k, v, terms = of_a_part("cpu", "forward", start, seqlen_q, dtype)
    assert choice.row.name == ("cpu.decode" if seqlen_q == 2 else "cpu.prefill")
    places = [(0, 2), *[(x, x + size) for x, size in zip(start, (4, seqlen_q, 77), strict=True)]]
    v = torch.eye(77, dtype=q.dtype).expand(2, 2, -1, -1)
    out, _ = choice.forward(problem._replace(head_dim_v=77), q * 0, k, v, terms)
    assert torch.equal(out != 0, dropout_mask_at(places, 0.4, SEED))


@pytest.mark.parametrize("start", STARTS[1:])
def test_derivatives_of_a_part_drop_by_the_mask_of_the_whole(start):
    results = []
    for backend in ("cpu", "reference"):
        choice, problem, q, k, v, terms = of_a_part(backend, "tangent", start, 45, "float64")
        tangents = q, k, v, Terms._make([None] * len(terms))
        tout, _ = choice.forward(problem, q, k, v, terms, tangents)
        choice, problem, q, k, v, terms = of_a_part("cpu", "forward", start, 45, "float64")
        _, _, saved = cpu.prefill_for_backward(problem, q, k, v, terms)
        wanted = True, True, True, Terms._make([False] * len(terms))
        choice = of_a_part(backend, "backward", start, 45, "float64")[0]
        dq, dk, dv, _ = choice.forward(problem, q, k, v, terms, saved, q, None, wanted)
        results.append([tout, dq, dk, dv])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_where_a_part_stands_is_checked():
    _, problem, q, k, v, terms = of_a_part("cpu", "forward", (0, 0, 0), 45, "float32")
    for wrong in ((0, 0), (0, -1, 0), (0, 2**32, 0), 3):
        with pytest.raises(ValueError, match="dropout_start must be"):
            cpu.prefill(problem, q, k, v, terms._replace(dropout_start=wrong))
    triton = next(row for row in dispatch.KERNELS if row.name == "triton.prefill")
    assert "dropout_start=True (supports False)" in dispatch.refuse(triton, problem)


@pytest.mark.slow  # a handful is in test_isas.py
@pytest.mark.parametrize("isa", supported_isas())
def test_on_each_isa(isa):
    if isa != running_isa():
        run_tests_on(isa, __file__, "-k", "mask")


@pytest.mark.parametrize("dropout_p", [1e-17, 1e-12, 2.0**-32, 0.5, 1 - 2.0**-24, 0.999999999])
def test_probabilities_from_end_to_end(dropout_p):
    (q, k, v), _ = inputs(Case(1, 2, 30, 50, 8, dtype="float64"))
    results = [
        fastattn.attention(q, k, v, dropout_p=dropout_p, seed=SEED, return_lse=True, backend=backend)
        for backend in ("cpu", "reference")
    ]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_lse_and_no_dropout_are_untouched():
    (q, k, v), _ = inputs(Case(2, 2, 40, 90, 16))
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="cpu")
    assert torch.equal(lse, fastattn.attention(q, k, v, dropout_p=0.5, seed=1, return_lse=True, backend="cpu")[1])
    assert torch.equal(out, fastattn.attention(q, k, v, dropout_p=0.0, seed=1, backend="cpu"))


def test_torchs_generator_gives_the_seed():
    (q, k, v), _ = inputs(Case(1, 2, 40, 40, 16))

    def call(**kwargs):
        return fastattn.attention(q, k, v, dropout_p=0.5, **kwargs, backend="cpu")

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and torch.equal(call(), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    call(seed=5), fastattn.attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state), "a call that needs no seed draws none"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_drops_the_same_twice(use_reentrant):
    (q, k, v), _ = inputs(Case(2, 2, 40, 40, 16))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return fastattn.attention(q, k, v, dropout_p=0.3, backend="cpu")

    torch.manual_seed(0)
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    torch.manual_seed(0)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    (q, k, v), _ = inputs(Case(2, 4, 150, 1100, 24, num_heads_k=2, dtype=dtype))
    threads = torch.get_num_threads()

    def results(batch):
        leaves = [x[:batch].clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, dropout_p=0.3, seed=SEED, causal=True, backend="cpu")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    try:
        torch.set_num_threads(1)
        expected = results(2)
        for threads_now in (2, 3):
            torch.set_num_threads(threads_now)
            assert all(torch.equal(x, y) for x, y in zip(results(2), expected, strict=True))
        assert all(torch.equal(x, y[:1]) for x, y in zip(results(1), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_drop_in_is_fused_too():
    q, k, v = (torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3))
    with fastattn.record() as calls:
        fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True).sum().backward()
    assert [call.kernel for call in calls] == ["cpu.prefill", "cpu.backward"]
    assert all(call.problem.dropout for call in calls)
