"""Calls that a kernel refuses, or cannot be prepared for: what runs in its place, and who is told."""

import warnings
from contextlib import nullcontext

import pytest
import torch

import fastattn
from fastattn import FallbackWarning, UnsupportedError, dispatch, plans
from fastattn.backends import reference as reference_backend
from fastattn.dispatch import KERNELS, Row, refuse, select
from fastattn.problem import Problem
from small_calls import qkv, wide_qkv, with_narrow_row

pytestmark = pytest.mark.usefixtures("plans_of_the_test")
PROBLEM = Problem("cpu", "float32", 2, 3, 5, 4, 2, 8, 6)


def test_fallback_warns_once_a_reason_and_counts(fresh_fallbacks, monkeypatch):
    monkeypatch.delenv("FASTATTN_FALLBACK", raising=False)
    with pytest.warns(FallbackWarning, match=r"\[cpu float32 B1 H2 S4 D600\] needs the reference.*head_dim") as log:
        for _ in range(3):
            fastattn.attention(*wide_qkv())
    assert len(log) == 1 and log[0].filename == __file__
    with pytest.warns(FallbackWarning, match="head_dim=513") as log:
        for seqlen in (4, 5):
            fastattn.attention(*(torch.randn(1, 2, seqlen, 513) for _ in range(3)))
    assert len(log) == 1
    assert sorted(fresh_fallbacks.values()) == [2, 3]


def test_another_fast_kernel_is_no_fallback(fresh_fallbacks, monkeypatch):
    with_narrow_row(monkeypatch)
    wide = Row("wide.prefill", "fastattn.backends.reference:forward", None, {})
    monkeypatch.setattr(dispatch, "KERNELS", (dispatch.KERNELS[0], wide, *KERNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*(torch.randn(1, 1, 4, 12) for _ in range(3)))
    assert fastattn.last_call().kernel == "wide.prefill" and "head_dim=12" in fastattn.last_call().reason
    assert not fresh_fallbacks


def test_fallback_silent(fresh_fallbacks, monkeypatch):
    monkeypatch.setenv("FASTATTN_FALLBACK", "silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*wide_qkv())
    assert sum(fresh_fallbacks.values()) == 1


def test_fallback_error_comes_before_the_work(fresh_fallbacks, monkeypatch):
    monkeypatch.setenv("FASTATTN_FALLBACK", "error")
    with fastattn.use("reference"):
        fastattn.attention(*qkv())
    before, computed = fastattn.last_call(), []
    plans.forget()
    monkeypatch.setattr(reference_backend, "forward", lambda *arguments: computed.append(arguments))
    with fastattn.record() as calls, pytest.raises(UnsupportedError, match="head_dim.*FASTATTN_FALLBACK=error"):
        fastattn.attention(*wide_qkv())
    assert not computed and not calls and fastattn.last_call() is before


def test_fallback_policy_is_checked(fresh_fallbacks, monkeypatch):
    monkeypatch.setenv("FASTATTN_FALLBACK", "loud")
    with pytest.raises(ValueError, match="FASTATTN_FALLBACK='loud' must be one of warn, silent, error"):
        fastattn.attention(*wide_qkv())


# --- kernels that cannot be prepared ---------------------------------------------------------------------------------


def broken(*args):
    raise dispatch.KernelError("broken: no such instruction")


@pytest.fixture
def broken_rows(monkeypatch, fresh_fallbacks):
    """Before all others, two rows: one cannot be compiled forward, the other one backward."""
    here, works = f"{__name__}:broken", "fastattn.backends.reference"
    forward, backward = {"direction": {"forward"}}, {"direction": {"backward"}}
    rows = (
        Row("fast.prefill", here, None, {**forward, "softcap": {False}}, here, "fast.backward"),
        Row("fast.backward", f"{works}:backward", None, backward),
        Row(
            "half.prefill", f"{works}:forward", None, {**forward, "needs_grad": {True}}, f"{__name__}:train",
            "half.backward",
        ),
        Row("half.backward", here, None, backward),
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "KERNELS", (*rows, *(row for row in KERNELS if row.backend == "reference")))
    monkeypatch.setattr(dispatch, "BACKENDS", ("fast", "half", "reference"))
    plans.forget()
    yield
    monkeypatch.undo()
    plans.forget()


def train(problem, q, k, v, terms):
    out, lse = reference_backend.forward(problem, q, k, v, terms)
    return out, lse, (out, q.new_zeros(*q.shape[:3], 2))


def test_a_kernel_that_cannot_be_prepared_is_passed_over_and_named(broken_rows):
    q, k, v = qkv()
    with pytest.warns(FallbackWarning, match=r"fast\.prefill: broken: no such instruction"):
        out = fastattn.attention(q, k, v)
    assert torch.equal(out, fastattn.attention(q, k, v, backend="reference"))
    assert "fast.prefill            refused: broken" in fastattn.explain(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(q, k, v)  # said once
    with pytest.raises(UnsupportedError, match="no such instruction"):
        fastattn.attention(q, k, v, backend="fast")
    with pytest.raises(UnsupportedError, match="no such instruction"):  # found out by the call itself
        fastattn.attention(q, k, v, causal=True, backend="fast")


GRADIENTS_FAIL = r"half\.backward: broken: no such instruction; such calls go to fast\.backward from now on"


def test_gradients_that_cannot_be_prepared_come_from_the_next_row(broken_rows):
    q, k, v = (x.requires_grad_() for x in qkv())
    kwargs = {"softcap": 3.0}  # which "fast" does not take
    expected = torch.autograd.grad(fastattn.attention(q, k, v, **kwargs, backend="reference").sum(), (q, k, v))
    for told in (pytest.warns(RuntimeWarning, match=GRADIENTS_FAIL), nullcontext()):
        with told:  # in the second call, the forward pass knows
            found = torch.autograd.grad(fastattn.attention(q, k, v, **kwargs).sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "half.prefill            refused: broken" in fastattn.explain(q, k, v, **kwargs)


@pytest.mark.filterwarnings("ignore:.* such calls go to:RuntimeWarning")
def test_transformed_gradients_that_cannot_be_prepared_come_from_the_next_row(broken_rows):
    q, k, v = qkv()

    def gradient(backend=None, **kwargs):
        return torch.func.grad(lambda q: fastattn.attention(q, k, v, **kwargs, backend=backend).sum())(q)

    expected = gradient("reference", softcap=3.0)
    assert torch.equal(gradient(softcap=3.0), expected)
    leaf = q.clone().requires_grad_()
    out = fastattn.attention(leaf, k, v, softcap=2.0).sum()
    (again,) = torch.autograd.grad(out, leaf, create_graph=True)  # somebody will differentiate it
    assert torch.equal(again, gradient("reference", softcap=2.0))
    with pytest.raises(UnsupportedError, match="no such instruction"):
        gradient("half", softcap=4.0)


@pytest.mark.filterwarnings("ignore:.* such calls go to:RuntimeWarning")
def test_blocks_of_rows_go_on_with_the_next_kernel(broken_rows):
    q, k, v = (x.requires_grad_() for x in qkv())
    r = torch.randn(q.shape[1], 2 * q.shape[2] - 1, q.shape[3]).requires_grad_()
    found = []
    for backend in ("reference", None):
        out = fastattn.attention(q, k, v, bias=fastattn.relative.transformer_xl(r), backend=backend)
        found.append([out, *torch.autograd.grad(out.sum(), (q, k, v, r))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UnsupportedError, match="no such instruction"):
        fastattn.attention(q, k, v, bias=fastattn.relative.transformer_xl(r), backend="fast")


def test_gradients_of_a_backend_by_name_come_from_no_other(broken_rows):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = fastattn.attention(q, k, v, softcap=3.0, backend="half")
    with pytest.raises(UnsupportedError, match="no such instruction"):
        out.sum().backward()


def test_a_kernel_that_one_device_cannot_prepare_is_asked_on_another(broken_rows):
    """A compiler's refusal and an old device's are of that device."""
    first = PROBLEM._replace(direction="forward")
    second, row = first._replace(device_index=1), dispatch.rows_of("fast", "dense")[0]
    dispatch.note_failure(row, first, "sm_75 is too old")
    assert refuse(row, first) == ["sm_75 is too old"] == refuse(row, first._replace(lse=True))
    assert refuse(row, second) == [] and select(second, "fast").row is row
    with pytest.raises(UnsupportedError, match="sm_75 is too old"):
        select(first, "fast")
