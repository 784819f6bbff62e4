"""A kind of call is planned once: lengths are looked up, and change nothing else."""

import sys

import pytest
import torch

import fastattn
from fastattn import dispatch, plans
from fastattn.terms import TERMS

LENGTHS = range(1, 1001)


def step(seqlen_k, batch=1, **kwargs):
    """A decoding step with a cache of seqlen_k keys."""
    q, (k, v) = torch.randn(batch, 2, 1, 8), torch.randn(2, batch, 1, seqlen_k, 8)
    return fastattn.attention(q, k, v, **{name: x(seqlen_k) if callable(x) else x for name, x in kwargs.items()})


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"causal": True},
        {"window_size": (16, 0)},
        {"bias": lambda seqlen_k: torch.zeros(1, 1, 1, seqlen_k)},
        {"mask": lambda seqlen_k: fastattn.Mask.lengths(torch.tensor([seqlen_k]))},
        {"mask": lambda seqlen_k: torch.ones(seqlen_k, dtype=torch.bool), "alibi_slopes": torch.ones(2)},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_1000_lengths_make_a_few_plans(kwargs):
    plans.forget()
    for seqlen_k in LENGTHS:
        step(seqlen_k, **kwargs)
    assert fastattn.last_call().problem.seqlen_k == LENGTHS[-1]
    # More than one only because a size of a mask may happen to equal another size: that is part of the kind.
    assert plans.count() <= 4 and len(dispatch._choices) <= 4


def test_the_backward_pass_is_selected_once_too():
    plans.forget()
    for seqlen in LENGTHS[:100]:
        q, k, v = (torch.randn(1, 2, seqlen, 8, requires_grad=True) for _ in range(3))
        fastattn.attention(q, k, v, causal=True).sum().backward()
    assert plans.count() <= 4 and len(dispatch._choices) <= 8


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (1, 1), (4, 4), (2, 9)], ids=str)
def test_a_plan_for_other_lengths_changes_no_result(lengths):
    """Diagonals, ALiBi and masks follow the lengths of the call, not those with which its plan was made."""
    seqlen_q, seqlen_k = lengths
    arguments = {"window_size": (2, 1), "alibi_slopes": torch.rand(2), "mask": fastattn.Mask.causal("top_left")}
    q, k, v = torch.randn(2, 2, seqlen_q, 8), torch.randn(2, 2, seqlen_k, 8), torch.randn(2, 2, seqlen_k, 8)
    plans.forget()
    fresh = fastattn.attention(q, k, v, **arguments, return_lse=True)
    for other in ((7, 7), (1, 6), (6, 2)):
        x, y = torch.randn(1, 2, other[0], 8), torch.randn(1, 2, other[1], 8)
        fastattn.attention(x, y, y, **arguments, return_lse=True)
    for a, b in zip(fresh, fastattn.attention(q, k, v, **arguments, return_lse=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shapes", [((2, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), ((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8))]
)
def test_lengths_that_do_not_fit_are_refused_though_their_kind_is_known(shapes):
    step(3), step(4)
    with pytest.raises(ValueError, match="has shape"):
        fastattn.attention(*(torch.randn(shape) for shape in shapes))


def test_a_mask_of_a_wrong_length_is_refused_though_its_kind_is_known():
    step(6, bias=torch.zeros(1, 1, 1, 6)), step(7, bias=torch.zeros(1, 1, 1, 7))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 1, 1, 6\)"):
        step(7, bias=torch.zeros(1, 1, 1, 6))
    mask = fastattn.patterns.causal(1, 6, block_size=16)
    step(6, mask=mask)
    with pytest.raises(ValueError, match="mask is a BlockMask of shape"):
        step(7, mask=mask)


def frames_below(call):
    """How many Python frames stand between the caller and C++, at the deepest function of fastattn.backends."""
    deepest = []

    def watch(frame, event, _):
        if event == "c_call" and frame.f_code.co_filename.endswith(("cpu.py",)):
            depth, at = 0, frame
            while at is not None and at.f_code is not call.__code__:
                depth, at = depth + 1, at.f_back
            deepest.append(depth)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return max(deepest)


@pytest.mark.skipif(fastattn.backends.cpu.unavailable() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("needs_grad, at_most", [(False, 2), (True, 4)])
def test_frames_between_the_call_and_c(needs_grad, at_most):
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=needs_grad) for _ in range(3))

    def call():
        fastattn.attention(q, k, v, causal=True)

    call()  # it is planned
    assert frames_below(call) <= at_most


def test_each_term_has_a_neutral_value_and_a_place():
    names = [term.name for term in TERMS]
    assert len(set(names)) == len(names) and tuple(names) == fastattn.terms.Terms._fields
    neutral = fastattn.terms.Terms()
    for term in TERMS:
        assert getattr(neutral, term.name) == term.neutral
        if term.fact:
            field, value_of, default = term.fact
            assert field in fastattn.problem.Problem._fields and value_of(term.neutral) == default
        assert not term.gradient or set(term.dtypes) == set(fastattn.problem.FLOATS)
