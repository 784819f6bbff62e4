"""Which kernel runs, who may choose it, and how a user finds out; test_falling_back.py: if one does not."""

import threading
import warnings
from pathlib import Path

import pytest
import torch

import fastattn
from cases import CASES, inputs
from fastattn import UnsupportedError, dispatch
from fastattn.backends import cpu
from fastattn.dispatch import KERNELS, refuse, select, text_of
from fastattn.problem import BY_LENGTHS, MASK_KINDS, Problem
from small_calls import qkv, wide_qkv, with_narrow_row

ROOT = Path(fastattn.__file__).parents[1]
CPU_HERE = cpu.unavailable() is None
FASTEST = "cpu.decode" if CPU_HERE else "reference"  # of `qkv`
pytestmark = pytest.mark.usefixtures("plans_of_the_test")
PROBLEM = Problem("cpu", "float32", 2, 3, 5, 4, 2, 8, 6)


def problem_of(case):
    (q, k, v), kwargs = inputs(case)
    fastattn.attention(q, k, v, **kwargs, backend="reference")
    return fastattn.last_call().problem


PROBLEMS = [problem_of(case) for case in CASES if case.seqlen_q * (case.seqlen_k or case.seqlen_q) < 10_000]
BACKWARD_PROBLEMS = [dispatch.backward_of(problem) for problem in PROBLEMS]


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_each_row_accepts_some_case(row):
    device = min(row.supports.get("device", {"cpu"}))
    direction = min(row.supports["direction"])
    problems = [problem._replace(device=device, direction=direction, needs_grad=False) for problem in PROBLEMS]
    problems += [problem._replace(layout=layout) for layout in ("csr", "varlen", "cache") for problem in problems]
    assert any(not refuse(row._replace(available=None), problem) for problem in problems)


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_each_row_is_well_formed(row):
    assert row.supports.keys() <= {*Problem._fields, *BY_LENGTHS}
    assert callable(dispatch._load(row.entry))
    assert row.available is None or callable(dispatch._load(row.available))
    for accepted in row.supports.values():
        assert isinstance(accepted, (set, range)) and text_of(accepted)


def test_the_table_ends_with_what_accepts_everything():
    assert KERNELS[-1].name == "reference" and all(not refuse(KERNELS[-1], problem) for problem in PROBLEMS)
    assert len({row.name for row in KERNELS}) == len(KERNELS)
    last = [row for row in KERNELS if row.supports["direction"] == {"backward"}][-1]
    assert last.name == "reference.backward" and all(not refuse(last, problem) for problem in BACKWARD_PROBLEMS)
    assert all(row.backward in (None, *(other.name for other in KERNELS)) for row in KERNELS)


def test_the_cases_cover_every_kind_of_mask():
    assert {problem.mask for problem in PROBLEMS} == set(MASK_KINDS)


def test_problem_says_what_was_called():
    q, k, v = torch.randn(2, 4, 3, 8).double(), torch.randn(2, 2, 5, 8).double(), torch.randn(2, 2, 5, 6).double()
    fastattn.attention(
        q, k, v, causal=True, softcap=1.0, bias=torch.zeros(5), sinks=torch.zeros(4), alibi_slopes=torch.zeros(4),
        dropout_p=0.5, return_lse=True,
    )  # fmt: skip
    assert fastattn.last_call().problem == Problem(
        device="cpu", dtype="float64", batch=2, seqlen_q=3, seqlen_k=5, num_heads=4, num_heads_k=2, head_dim=8,
        head_dim_v=6, mask="causal", bias="float32", alibi=True, softcap=True, sinks=True, dropout=True, lse=True,
    )  # fmt: skip
    text = "cpu float64 B2 H4/2 S3x5 D8/6 causal bias:float32 alibi softcap sinks dropout lse"
    assert str(fastattn.last_call().problem) == text
    assert fastattn.last_call().problem.group_size == 2


@pytest.mark.parametrize(
    "kwargs, kind",
    [
        ({}, "none"),
        ({"causal": True}, "causal"),
        ({"mask": fastattn.Mask.causal("top_left")}, "causal"),
        ({"window_size": (None, None)}, "none"),
        ({"window_size": (None, 3)}, "causal"),
        ({"window_size": (3, 0)}, "window"),
        ({"window_size": (3, None), "causal": True}, "window"),
        ({"mask": fastattn.Mask.lengths(torch.tensor([3]))}, "interval"),
        ({"mask": fastattn.Mask.lengths(torch.tensor([3])), "causal": True}, "interval"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool), "causal": True}, "tensor"),
        ({"mask": fastattn.Mask()}, "none"),
        ({"mask": fastattn.patterns.causal(4, block_size=16)}, "block"),
        ({"mask": fastattn.patterns.causal(4, block_size=16), "causal": True}, "block"),
    ],
)
def test_kind_of_mask(kwargs, kind):
    fastattn.attention(*qkv(), **kwargs)
    assert fastattn.last_call().problem.mask == kind


def test_select_takes_the_first_row_that_accepts(monkeypatch):
    with_narrow_row(monkeypatch)
    assert select(PROBLEM, None).row.name == "narrow.prefill"
    assert select(PROBLEM._replace(head_dim=9), None).row.name != "narrow.prefill"


def test_select_is_cached():
    assert select(PROBLEM, "reference") is select(PROBLEM, "reference")


# --- a backend asked for by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, kwargs, refused, nearest",
    [
        ((1, 1, 4, 12), {}, r"head_dim=12 \(supports 8...64 in steps of 8\)", "head_dim=(8|16)"),
        ((1, 1, 4, 80), {}, r"head_dim=80 \(supports 8...64", "head_dim=64"),
        ((1, 1, 4, 8), {"return_lse": True}, r"lse=True \(supports False\)", "lse=False"),
        ((1, 1, 4, 80), {"return_lse": True}, r"head_dim=80 .*, lse=True", "head_dim=64, lse=False"),
    ],
)
def test_named_backend_never_falls_back(shape, kwargs, refused, nearest, monkeypatch, fresh_fallbacks):
    with_narrow_row(monkeypatch)
    q = torch.randn(shape)
    pattern = f"backend='narrow' refuses .*narrow.prefill: {refused}.*would accept it with {nearest} .*explain"
    with pytest.raises(UnsupportedError, match=pattern) as caught:
        fastattn.attention(q, q, q, backend="narrow", **kwargs)
    assert "\n" not in str(caught.value) and isinstance(caught.value, NotImplementedError)
    with fastattn.use("narrow"), pytest.raises(UnsupportedError, match=refused):
        fastattn.attention(q, q, q, **kwargs)
    assert not fresh_fallbacks
    fastattn.attention(q, q, q, **kwargs)  # nobody asked: the next row takes it


def test_cpu_by_name():
    q, k, v = qkv()
    if not CPU_HERE:
        with pytest.raises(UnsupportedError, match="compiled CPU kernels are missing .*reinstall with a C.. compiler"):
            fastattn.attention(q, k, v, backend="cpu")
        return
    fastattn.attention(q, k, v, backend="cpu")
    assert fastattn.last_call().kernel == FASTEST and fastattn.last_call().isa == cpu.isa()
    fastattn.attention(q.requires_grad_(), k, v, backend="cpu").sum().backward()
    assert fastattn.last_call().kernel == "cpu.backward" and fastattn.last_call().isa == cpu.isa()
    with pytest.raises(UnsupportedError, match=r"head_dim=513 \(supports 1...512\).*with head_dim=512, head_dim_v=512"):
        fastattn.attention(*(torch.randn(1, 1, 2, 513) for _ in range(3)), backend="cpu")


@pytest.mark.skipif(not CPU_HERE, reason="the CPU kernels are missing")
def test_which_of_its_kernels_a_backend_runs_is_no_refusal():
    fastattn.attention(*(torch.randn(1, 1, 64, 8) for _ in range(3)))
    assert fastattn.last_call().kernel == "cpu.prefill" and fastattn.last_call().reason == ""


def test_cpu_backend_refuses_other_devices():
    q, k, v = qkv(device="meta")
    with pytest.raises(UnsupportedError, match=r"device='meta' \(supports cpu\)" if CPU_HERE else "missing"):
        fastattn.attention(q, k, v, backend="cpu")


def test_reference_by_name_is_no_fallback(fresh_fallbacks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*qkv(), backend="reference")
        fastattn.attention(*qkv(requires_grad=True), backend="reference")
    assert fastattn.last_call().kernel == "reference" and fastattn.last_call().isa is None
    assert fastattn.last_call().reason == "" and not fresh_fallbacks


def test_use_nests_and_argument_wins():
    with fastattn.use("reference"):
        fastattn.attention(*qkv())
        assert fastattn.last_call().kernel == "reference"
        with fastattn.use(None):
            fastattn.attention(*qkv())
            assert fastattn.last_call().kernel == FASTEST
        fastattn.attention(*qkv())
        assert fastattn.last_call().kernel == "reference"
        if CPU_HERE:
            fastattn.attention(*qkv(), backend="cpu")
            assert fastattn.last_call().kernel == FASTEST
    with pytest.raises(RuntimeError, match="inside"), fastattn.use("reference"):
        raise RuntimeError("inside")
    fastattn.attention(*qkv())
    assert fastattn.last_call().kernel == FASTEST


def test_use_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="backend='gpu' is not a backend; choose one of cpu, triton, reference"):
        with fastattn.use("gpu"):
            pass


def test_use_reaches_scaled_dot_product_attention():
    with fastattn.use("reference"):
        fastattn.scaled_dot_product_attention(*qkv())
    assert fastattn.last_call().kernel == "reference"


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_lists_every_row_of_the_layout():
    text = fastattn.explain(*qkv())
    lines = text.splitlines()
    of_direction = {
        direction: [
            row.name
            for row in KERNELS
            if row.supports["direction"] == {direction} and "dense" in row.supports["layout"]
        ]
        for direction in ("forward", "backward")
    }
    assert lines[0] == "cpu float32 B1 H2 S4 D8"
    assert [line.split()[0] for line in lines[1:]] == of_direction["forward"]
    assert sum(" runs" in line for line in lines) == 1
    lines = fastattn.explain(*qkv(requires_grad=True)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == of_direction["forward"] + of_direction["backward"]
    assert sum(" runs" in line for line in lines) == 2
    assert repr(text) == str(text)  # readable at the prompt


def test_explain_says_what_attention_does():
    for kwargs in ({}, {"dropout_p": 0.1}, {"backend": "reference"}, {"causal": True, "return_lse": True}):
        runs = next(line.split()[0] for line in fastattn.explain(*qkv(), **kwargs).splitlines() if " runs" in line)
        fastattn.attention(*qkv(), **kwargs)
        assert fastattn.last_call().kernel == runs


def test_explain_gives_the_reasons():
    text = fastattn.explain(*wide_qkv(requires_grad=True))
    assert "needs_grad" in text.splitlines()[0] and "head_dim=600 (supports 1...512)" in text
    text = fastattn.explain(*qkv(), backend="reference")
    assert "cpu.prefill             refused:" in text and "backend='reference' was asked for" in text


def test_explain_computes_and_counts_nothing(fresh_fallbacks):
    fastattn.attention(*qkv(), backend="reference")
    before = fastattn.last_call()
    state = torch.get_rng_state()
    with fastattn.record() as calls:
        fastattn.explain(*qkv(device="meta"), dropout_p=0.5)
    assert not calls and not fresh_fallbacks and fastattn.last_call() is before
    assert torch.equal(state, torch.get_rng_state())


# --- what ran --------------------------------------------------------------------------------------------------------


def test_record_collects_calls_in_order():
    with fastattn.record() as outer:
        fastattn.attention(*qkv(), backend="reference")
        with fastattn.record() as inner:
            fastattn.attention(*qkv(), causal=True)
        fastattn.scaled_dot_product_attention(*qkv())
    fastattn.attention(*qkv())
    assert [call.problem.mask for call in outer] == ["none", "causal", "none"]
    assert [call.kernel for call in outer] == ["reference", FASTEST, FASTEST]
    assert inner == outer[1:2] and fastattn.last_call() == outer[2]


def test_record_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), fastattn.record() as calls:
        raise ZeroDivisionError
    fastattn.attention(*qkv())
    assert calls == []


def test_call_gives_the_reason_of_a_fallback():
    fastattn.attention(*wide_qkv())
    call = fastattn.last_call()
    assert call.kernel == "reference" and call.reason.startswith("cpu.decode: ")
    assert "cpu.prefill: " in call.reason and "head_dim=600" in call.reason


def test_a_failed_call_is_not_the_last_call():
    fastattn.attention(*qkv())
    before = fastattn.last_call()
    with pytest.raises(ValueError):
        fastattn.attention(*qkv(), softcap=-1.0)
    assert fastattn.last_call() is before


def test_threads_have_their_own_last_call_and_use():
    fastattn.attention(*qkv())
    mine, seen = fastattn.last_call(), {}

    def run(name, batch):
        seen[name, "before"] = fastattn.last_call()
        fastattn.attention(*(torch.randn(batch, 2, 4, 8) for _ in range(3)))
        barrier.wait()
        seen[name] = fastattn.last_call()

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=run, args=(batch, batch)) for batch in (2, 3, 4)]
    with fastattn.use("reference"), fastattn.record() as calls:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(seen[batch, "before"] is None and seen[batch].problem.batch == batch for batch in (2, 3, 4))
    assert all(seen[batch].kernel == FASTEST for batch in (2, 3, 4))  # use() and record() are of this thread
    assert calls == [] and fastattn.last_call() is mine
