"""The self-check of compiled code, in the interpreter: its launches count as code that was loaded, as on a device."""

import json

import process

process.require(interpreted=True)

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from checking import (  # noqa: E402
    BASE,
    add_to,
    attend,
    begin_process,
    compiling_device,
    note_checks,
    without_cpu,
    wrong,
)
from fastattn import api, dispatch, plans  # noqa: E402
from fastattn.backends import proven, selfcheck, triton  # noqa: E402
from fastattn.kernels import backward, decode, launch, prefill, tuning  # noqa: E402
from on_device import on_device  # noqa: E402
from strict_interpreter import harden  # noqa: E402

harden()


@pytest.fixture(autouse=True)
def device(tmp_path):
    with compiling_device(tmp_path):
        yield


@pytest.fixture
def checks(monkeypatch) -> list[str]:
    return note_checks(monkeypatch)


# --- what is right ---------------------------------------------------------------------------------------------------

MANY = BASE._replace(mask="intervals", bias="per_head", alibi=True, softcap=5.0, sinks=True, dropout_p=0.3)
KINDS = {
    "causal": BASE,
    "float32, short": BASE._replace(dtype="float32", seqlen_q=5, seqlen_k=3, causal=False),
    "everything": MANY,
    "everything, float16": MANY._replace(dtype="float16", bias="key", learned_scale="per_head", mask="tensor_per_head"),
    "learned scale": BASE._replace(dtype="float32", learned_scale="one", bias="query", mask="documents"),
    "block mask of each head": BASE._replace(mask="blocks", dtype="float32", causal=False, sinks=True),
    "shared block mask": BASE._replace(mask="shared_blocks", dropout_p=0.2, head_dim_v=32),
    "window, [B, S, H, D]": BASE._replace(causal=False, window_size=(20, 3), layout="bshd", head_dim=24),
    "scale below 0": BASE._replace(softmax_scale=-0.3, dtype="float16"),
}


QUICK = ("causal", "everything, float16", "block mask of each head", "window, [B, S, H, D]")


@pytest.mark.parametrize(
    "case", [pytest.param(x, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, x in KINDS.items()]
)
def test_right_results_are_proven(case, checks, tmp_path, recwarn):
    """Rows forward, dq, and dk and dv, of several heads; gradients included, one file says what was proven."""
    attend(case, needs_grad=True)
    names = {where.partition("[")[0] for where in checks}
    assert names == {"out", "lse", "dq", "dk", "dv"} and not [x for x in recwarn if "self-check" in str(x.message)]
    assert len({where for where in checks if where.startswith("dq")}) == (4 if case.seqlen_q > selfcheck.RUN else 2)
    (file,) = tmp_path.iterdir()
    assert "-driver-" in file.name and file.name.endswith("-proven.json")
    kernels = {text.split()[0] for text in json.loads(file.read_text()).values()}
    assert {"forward_kernel", "key_value_kernel", "query_kernel", "delta_kernel"} <= kernels
    assert all("num_warps" in text for text in json.loads(file.read_text()).values())


@pytest.mark.parametrize(
    "case",
    [
        BASE._replace(seqlen_q=1, seqlen_k=300),
        BASE._replace(seqlen_q=3, seqlen_k=300, mask="shared_blocks"),
        BASE._replace(seqlen_q=3, mask="lengths", bias="full", dtype="float16", causal=False, sinks=True),
    ],
    ids=str,
)
def test_decoding(case, checks):
    attend(case)
    assert fastattn.last_call().kernel == "triton.decode"
    assert {where.partition("[")[0] for where in checks} == {"out", "lse"}


def test_caches_in_pages_of_int8(checks, monkeypatch):
    """With entries of the table that name no page, behind the end of a sequence."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 2, 8, generator=generator)
    pages = torch.randint(-127, 128, (2, 9, 1, 16, 8), generator=generator, dtype=torch.int8)
    factors = torch.rand(2, 9, 1, 16, generator=generator) / 50.0
    factors[:, 4] = float("nan")
    table = torch.tensor([[3, 1, 7, 4], [2, 8, -5, 99]], dtype=torch.int32)
    lengths = torch.tensor([40, 20], dtype=torch.int32)

    def call(backend):
        return fastattn.attention_with_kvcache(
            q, *(x.clone() for x in pages), block_table=table, cache_seqlens=lengths, causal=True, backend=backend,
            k_scale=factors[0].clone(), v_scale=factors[1].clone(),
        )  # fmt: skip

    out = call("triton")
    assert fastattn.last_call().kernel == "triton.cache" and any(where.startswith("out[1, 1") for where in checks)
    torch.testing.assert_close(out, call("reference"), atol=1e-4, rtol=1e-4)
    begin_process()
    (file,) = tuning.directory().iterdir()
    file.unlink()
    # one sequence after the other is the next row, and runs this kernel first
    monkeypatch.setattr(decode, "forward", wrong(decode, "forward", add_to(0, (-1, 1, 0))))
    monkeypatch.setattr(dispatch, "KERNELS", without_cpu())
    with pytest.warns(RuntimeWarning, match="decode: self-check: out.1, 1, 0:2. is off by 0.5"):
        found = call(None)
    assert fastattn.last_call().kernel == "triton.prefill"
    torch.testing.assert_close(found, call("reference"), atol=1e-4, rtol=1e-4)


def test_packed_sequences(checks):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(60, heads, 32, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, 25, 25, 60], dtype=torch.int32)
    fastattn.attention_varlen(q, k, v, starts, starts, causal=True, backend="triton")
    assert fastattn.last_call().kernel == "triton.varlen" and checks


# --- what is wrong ---------------------------------------------------------------------------------------------------

FAULTS = {
    # module, function, what it changes in the results, what the check says; whether gradients are needed
    "out": (prefill, "forward", add_to(0, (1, 1, 39)), r"prefill: self-check: out\[1, 1, 24:40\] is off by 0.5", False),
    "lse": (prefill, "forward", add_to(1, (0, 0, 3), 0.01), r"lse\[0, 0, 0:16\] is off by 0.01", False),
    "NaN": (prefill, "forward", add_to(0, (0, 0, 0), float("nan")), r"is off by inf", False),
    "out of a training call": (prefill, "forward_for_backward", add_to(0, (0, 0, 10)), "out", True),
    "dq": (backward, "backward", add_to(0, (1, 1, 30)), r"backward: self-check: dq\[1, 1", True),
    "dk": (backward, "backward", add_to(1, (1, 0, 49)), r"backward: self-check: dk\[1, 0, 34:50\]", True),
    "dv": (backward, "backward", add_to(2, (0, 0, 0)), r"backward: self-check: dv\[0, 0, 0:16\]", True),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_its_figure(fault, monkeypatch, tmp_path):
    """The call gets the next row's result, later ones too; with backend="triton" it is an error. Nothing is proven."""
    module, name, change, message, needs_grad = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong(module, name, change))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "KERNELS", without_cpu())
        with pytest.warns(RuntimeWarning, match=message), pytest.warns(fastattn.FallbackWarning, match=message):
            found = attend(needs_grad=needs_grad, backend=None)
        again = attend(needs_grad=needs_grad, backend=None)
        assert fastattn.last_call().kernel.startswith("reference")
    expected = attend(needs_grad=needs_grad, backend="reference")
    for x, y, z in zip(found, again, expected, strict=True):
        torch.testing.assert_close(x, z, atol=0.05, rtol=0.02)
        torch.testing.assert_close(y, z, atol=0.05, rtol=0.02)
    begin_process()
    with pytest.raises(fastattn.UnsupportedError, match=message), pytest.warns(RuntimeWarning):
        attend(needs_grad=needs_grad)
    assert not any(json.loads(file.read_text()) for file in tmp_path.iterdir() if not needs_grad)


@pytest.mark.parametrize("fault", ["out", "dk"])
def test_code_that_was_refused_is_checked_in_other_kinds_of_calls(fault, monkeypatch):
    """All heads run the same code."""
    module, name, _, _, needs_grad = FAULTS[fault]
    place = {"out": 0, "dk": 1}[fault]
    monkeypatch.setattr(module, name, wrong(module, name, lambda found: found[place].mul_(1.5)))
    for groups in (1, 2, 3):
        case = BASE._replace(num_heads=2 * groups, num_heads_k=groups)
        with pytest.raises(fastattn.UnsupportedError, match="self-check"), pytest.warns(RuntimeWarning):
            attend(case, needs_grad)


def test_code_that_cannot_be_launched_is_refused_in_other_kinds_of_calls(monkeypatch):
    run = launch.run

    def fail(launches, name, *rest):
        run(launches, name, *rest)
        raise RuntimeError("no such launch")

    monkeypatch.setattr(launch, "run", fail)
    for groups in (1, 2):
        with pytest.raises(fastattn.UnsupportedError, match="no such launch"):
            attend(BASE._replace(num_heads=2 * groups, num_heads_k=groups))


def test_gradients_of_a_bias_are_not_proven(tmp_path):
    (q, k, v), kwargs = on_device(BASE)
    bias = torch.zeros(40, 50, requires_grad=True)
    out = fastattn.attention(q.requires_grad_(), k, v, bias=bias, **kwargs, backend="triton")
    torch.autograd.grad(out.sum(), (q, bias))
    (file,) = tmp_path.iterdir()
    kernels = {text.split()[0] for text in json.loads(file.read_text()).values()}
    assert kernels == {"forward_kernel", "query_kernel", "delta_kernel"}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("out", "out of a training call")]


@pytest.mark.parametrize("fault", [*SLOW, "dk"])
def test_a_fault_inside_a_graph(fault, monkeypatch):
    """The operators of compiled graphs go on with the next row too."""
    module, name, change, message, needs_grad = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong(module, name, change))
    monkeypatch.setattr(dispatch, "KERNELS", without_cpu())
    qkv, _ = on_device(BASE)
    qkv = [x.requires_grad_(needs_grad) for x in qkv]

    def attend(*qkv):
        return fastattn.attention(*qkv, causal=True)

    with pytest.warns(RuntimeWarning, match=message):
        out = torch.compile(attend, backend="aot_eager", fullgraph=True)(*qkv)
        found = [out, *(torch.autograd.grad(out, qkv, torch.ones_like(out)) if needs_grad else ())]
    out = fastattn.attention(*qkv, causal=True, backend="reference")
    expected = [out, *(torch.autograd.grad(out, qkv, torch.ones_like(out)) if needs_grad else ())]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=0.05, rtol=0.02)


def test_below_autograd(monkeypatch):
    """As an operator of a graph runs, the check of gradients differentiates all the same."""
    (q, k, v), _ = on_device(BASE)
    bound = api.bind(q.requires_grad_(), k, v, causal=True, backend="triton")
    monkeypatch.setattr(backward, "backward", wrong(backward, "backward", add_to(0, (1, 1, 30))))
    with torch.no_grad():
        out, _, saved = bound.choice.train(*bound[1:2], q, k, v, bound.terms)
    wanted = True, False, False, bound.terms._make([False] * len(bound.terms))
    problem = dispatch.backward_of(bound.problem)
    with torch._C._AutoDispatchBelowAutograd(), pytest.warns(RuntimeWarning, match=r"dq\[1, 1"):
        with pytest.raises(dispatch.KernelError, match=r"dq\[1, 1"):
            triton.backward(problem, q, k, v, bound.terms, saved, torch.ones_like(out), None, wanted)


@pytest.mark.parametrize(
    "case", [BASE, pytest.param(BASE._replace(dtype="float32", causal=False), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fault", ["a mask", "a scale", "a tile of keys"])
def test_faults_of_whole_kernels(case, fault, monkeypatch):
    """One key too many for each query; a scale wrong by five per cent; the last 16 keys left out."""
    forward = prefill.forward

    def faulty(problem, q, k, v, terms):
        if fault == "a mask":
            terms = terms._replace(diagonal_hi=terms.diagonal_hi + 1 if case.causal else 30)
            problem = problem._replace(mask="causal")
        elif fault == "a scale":
            terms = terms._replace(softmax_scale=1.05 * terms.softmax_scale)
        else:
            k, v, problem = k[:, :, :-16], v[:, :, :-16], problem._replace(seqlen_k=problem.seqlen_k - 16)
        return forward(problem, q, k, v, terms)

    monkeypatch.setattr(prefill, "forward", faulty)
    with pytest.raises(fastattn.UnsupportedError, match="self-check"), pytest.warns(RuntimeWarning):
        attend(case)


# --- when it looks ---------------------------------------------------------------------------------------------------


def test_each_kind_of_code_is_checked_once(checks):
    attend()
    first = len(checks)
    assert first
    attend(), attend(BASE._replace(seqlen_q=33, batch=1))  # the same code
    assert len(checks) == first
    attend(BASE._replace(head_dim=8))
    assert len(checks) > first


def test_a_later_process_does_not_check(checks):
    attend(needs_grad=True)
    checks.clear(), begin_process()
    attend(needs_grad=True)
    assert checks == []


@pytest.mark.parametrize("change", ["driver", "kernels", "tiles"])
def test_something_else_is_checked_anew(change, checks, monkeypatch):
    attend()
    checks.clear(), begin_process()
    if change == "driver":
        monkeypatch.setattr(proven, "driver_version", lambda: "999.1")
    elif change == "kernels":
        monkeypatch.setattr(proven, "_sources", lambda: "edited")
    else:
        tiles = tuning.tiles
        monkeypatch.setattr(tuning, "tiles", lambda *args: tiles(*args)._replace(BLOCK_N=32))
    attend()
    assert checks


@pytest.mark.parametrize("text", ["{", '{"a": 3}', "\0\xff"])
def test_a_damaged_file_is_ignored_and_written_anew(text, checks, tmp_path):
    attend()
    (file,) = tmp_path.iterdir()
    right = file.read_text()
    file.write_bytes(text.encode("latin-1"))
    checks.clear(), begin_process()
    attend()
    assert checks and file.read_text() == right


def test_a_folder_that_cannot_be_written(checks, tmp_path, monkeypatch):
    """It is a file: the process alone remembers."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "file"))
    attend()
    first = len(checks)
    launch.forget(), plans.forget()
    attend()
    assert len(checks) == first > 0


def test_the_environment_turns_it_off(checks, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_SELFCHECK", "0")
    monkeypatch.setattr(prefill, "forward", wrong(prefill, "forward", add_to(0, (1, 1, 39))))
    attend()
    assert checks == [] and list(tmp_path.iterdir()) == []


def test_nothing_is_looked_at_while_a_graph_is_captured(checks, monkeypatch, tmp_path):
    """The next call of the kind is checked."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "is_capturing", lambda: True)
        attend()
        assert checks == [] and list(tmp_path.iterdir()) == [] and len(triton.postponed) == 1
    attend(BASE._replace(head_dim=8))
    assert len(triton.postponed) == 1
    attend()
    assert triton.postponed == {} and len(checks) == 16
    checks.clear(), begin_process()
    attend()
    assert checks == []


def test_a_check_that_cannot_run_refuses_nothing(monkeypatch, tmp_path):
    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_complaint", fail)
        with pytest.warns(RuntimeWarning, match="self-check of prefill: MemoryError: no room"):
            attend()
    assert fastattn.last_call().kernel == "triton.prefill" and list(tmp_path.iterdir()) == []
    attend()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_nobody_sees_may_be_nan(recwarn, tmp_path):
    """Padding that holds NaN and infinities; a number too large for float16 is infinite in both."""
    (q, k, v), _ = on_device(BASE._replace(causal=False, dtype="float16"))
    k[:, :, 40:], v[:, :, 40:] = float("nan"), float("inf")
    mask = fastattn.Mask.lengths(torch.tensor([40, 35]))
    v[1, 0] = 65504.0
    fastattn.attention(q, k, v, mask=mask, backend="triton")
    assert len(list(tmp_path.iterdir())) == 1 and not [x for x in recwarn if "self-check" in str(x.message)]


def test_nan_proves_nothing(checks, tmp_path, monkeypatch):
    """So the next call with the same code is checked; after some that have looked in vain, none is."""
    monkeypatch.setattr(selfcheck, "LOOKS", 2)
    (q, k, v), kwargs = on_device(BASE._replace(head_dim=8))
    found = []
    for _ in range(3):
        fastattn.attention(q, k * float("nan"), v, **kwargs, backend="triton")
        found.append(len(checks))
    assert list(tmp_path.iterdir()) == [] and fastattn.last_call().kernel == "triton.prefill"
    assert 0 < found[0] < found[1] == found[2]
    checks.clear(), begin_process()
    fastattn.attention(q, k * float("nan"), v, **kwargs, backend="triton")
    fastattn.attention(q[:1], k[:1], v[:1], **kwargs, backend="triton")
    assert len(checks) == 2 * found[0] and len(list(tmp_path.iterdir())) == 1


def test_candidates_that_are_measured_are_not_proven(monkeypatch, tmp_path, checks):
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "1")
    attend()
    assert checks and list(tmp_path.iterdir()) == []


def test_nothing_is_checked_where_nothing_is_compiled(checks, monkeypatch, tmp_path):
    monkeypatch.setattr(selfcheck, "DEVICES", ["cuda"])
    attend()
    assert checks == [] and list(tmp_path.iterdir()) == []
