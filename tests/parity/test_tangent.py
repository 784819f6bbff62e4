"""The forward-mode kernel: values on every instruction set, its rules, and what its bits depend on."""

import os
from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from cases import CASES, Case, inputs
from fastattn import Mask, UnsupportedError, dispatch
from fastattn.backends import cpu
from forward import DTYPES, INF, NAN, SHAPES, assert_same_bits, dtypes, exactly_these, max_error, shapes
from guarded import reset_peak, status
from isas import needs_cpu, run_tests_on, running_isa, supported_isas
from tangents import (
    NO_TANGENTS,
    assert_parity,
    bind,
    expected_tangent,
    random_tangents,
    tangent,
)

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]

SMALL = Case(
    batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=150, head_dim=24, head_dim_v=40, bias="per_head",
    alibi=True, sinks=True, softcap=3.0, learned_scale="per_head", causal=True, dropout_p=0.2,
)  # fmt: skip


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case):
    (q, k, v), kwargs = inputs(case)
    tangents = random_tangents(q, k, v, kwargs)
    assert_parity(tangent(q, k, v, kwargs, tangents), q, k, v, kwargs, tangents)


@pytest.mark.slow  # with prefill and backward, `make test` knows that the instruction sets agree
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    """Each in a process of its own: the choice is made once."""
    if isa != running_isa():
        run_tests_on(isa, "tests/parity/test_tangent.py", "-k", "parity or poison or sees")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_subset_of_the_tangents(dtype):
    """None is zero: what a tangent leaves out changes nothing else."""
    (q, k, v), kwargs = inputs(SMALL._replace(dtype=dtype))
    *of_qkv, of_terms = random_tangents(q, k, v, kwargs)
    names = ["q", "k", "v", *(name for name, x in of_terms._asdict().items() if x is not None)]
    assert len(names) == 7
    subsets = chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))
    for given_names in subsets:
        tq, tk, tv = (x if name in given_names else None for name, x in zip("qkv", of_qkv, strict=True))
        tterms = of_terms._replace(**{name: None for name in names[3:] if name not in given_names})
        tangents = tq, tk, tv, tterms
        actual = tangent(q, k, v, kwargs, tangents)
        zeros = [x if x is not None else torch.zeros_like(y) for x, y in zip((tq, tk, tv), (q, k, v), strict=True)]
        assert_parity(actual, q, k, v, kwargs, (*zeros, tterms), large_scores=True)
        if not given_names:
            assert all((x == 0).all() for x in actual)


@st.composite
def small_cases(draw):
    num_heads_k = draw(st.integers(1, 2))
    some = st.integers(0, 60) | st.none()
    masks = ("lengths", "left_padding", "documents", "prefix_lm", "intervals", "top_left", "blocks", "shared_blocks")
    masks += ("tensor", "tensor_per_head", "key_tensor")
    edges = st.integers(0, 40) | st.sampled_from((64, 127, 129, 260))
    return Case(
        batch=draw(st.integers(1, 3)),
        num_heads=num_heads_k * draw(st.integers(1, 3)),
        num_heads_k=num_heads_k,
        seqlen_q=draw(edges),
        seqlen_k=draw(edges | st.sampled_from((128, 300, 1100))),
        head_dim=draw(st.integers(1, 40) | st.sampled_from((64, 65, 128))),
        head_dim_v=draw(st.integers(1, 40) | st.sampled_from((64, 65, 128))),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        window_size=draw(st.none() | st.tuples(some, some)),
        mask=draw(st.none() | st.sampled_from(masks)),
        bias=draw(st.none() | st.sampled_from(("shared", "per_head", "full", "key", "query"))),
        alibi=draw(st.booleans()),
        softcap=draw(st.just(0.0) | st.sampled_from((0.5, 3.0, 30.0))),
        sinks=draw(st.booleans()),
        learned_scale=draw(st.none() | st.sampled_from(("one", "per_head"))),
        dropout_p=draw(st.just(0.0) | st.sampled_from((0.1, 0.7))),
        layout=draw(st.sampled_from(("bhsd", "bshd"))),
    )


@settings(exactly_these, max_examples=150)
@given(case=small_cases(), seed=st.integers(0, 2**16))
def test_parity_of_any_combination(case, seed):
    (q, k, v), kwargs = inputs(case, seed)
    tangents = random_tangents(q, k, v, kwargs, seed)
    assert_parity(tangent(q, k, v, kwargs, tangents), q, k, v, kwargs, tangents, large_scores=True)


@pytest.mark.parametrize("case", [SMALL, SMALL._replace(dropout_p=0.0, mask="intervals")], ids=str)
def test_pairs_with_the_gradients(case):
    """<cotangents, tangents of the results> = <gradients, tangents of the inputs>, both of fused kernels."""
    (q, k, v), kwargs = inputs(case._replace(dtype="float64"))
    kwargs |= {name: x.double() for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    *of_qkv, of_terms = random_tangents(q, k, v, kwargs)
    tout, tlse = tangent(q, k, v, kwargs, (*of_qkv, of_terms))
    of_terms = {name: x for name, x in of_terms._asdict().items() if x is not None}
    leaves = {"q": q, "k": k, "v": v} | {name: kwargs[name] for name in of_terms}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    out, lse = fastattn.attention(**kwargs | leaves, return_lse=True, backend="cpu")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -INF, 0.0)
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse])
    pairs = zip(grads, (*of_qkv, *of_terms.values()), strict=True)
    torch.testing.assert_close((dout * tout).sum() + (dlse * tlse).sum(), sum((x * y).sum() for x, y in pairs))


def test_what_scores_have_in_common_does_not_matter():
    """Keys with a large common part: tS is large and out's tangent is not."""
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=150, seqlen_k=700, head_dim=32))
    tq, tk, tv, tterms = random_tangents(q, k, v, kwargs)
    tk = tk + 100.0
    tangents = tq, tk, tv, tterms
    tout, tlse = tangent(q, k, v, kwargs, tangents)
    expected = expected_tangent(q, k, v, kwargs, tangents, torch.float64)[1]
    assert_parity((tout, expected.float()), q, k, v, kwargs, tangents)
    assert max_error(tlse, expected) <= 3e-5  # a sum of large numbers, which their rounding stays in


@dtypes
def test_a_row_that_sees_one_key(dtype):
    """out is the key's value and lse its score, whatever they are: so are their tangents, without rounding."""
    (q, k, v), kwargs = inputs(Case(num_heads=2, seqlen_q=70, head_dim=24, dtype=dtype, window_size=(0, 0)))
    tangents = tq, tk, tv, _ = random_tangents(q, k, v, kwargs)
    tout, tlse = tangent(q, k, v, kwargs, tangents)
    assert torch.equal(tout, tv)
    q, k, tq, tk = (x.double() for x in (q, k, tq, tk))
    scores = ((tq * k + q * tk).sum(-1) * 24**-0.5).to(tlse.dtype)
    torch.testing.assert_close(tlse, scores, rtol=1e-5, atol=1e-6)


# --- rules -----------------------------------------------------------------------------------------------------------

MASKS = {
    "intervals": lambda visible, start, end: {"mask": Mask.intervals(start, end)},
    "bool": lambda visible, start, end: {"mask": visible},
    "bias": lambda visible, start, end: {"bias": torch.where(visible, 0.5, -INF)},
}


def masked_inputs(kind, dtype, shape=(2, 2, 150, 400)):
    """(q, k, v), arguments, visible: of a mask of which a third of the rows sees nothing."""
    b, h, sq, sk = shape
    (q, k, v), _ = inputs(Case(b, h, sq, sk, 20, 12, dtype=dtype))
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, sk // 2, (b, h, sq), generator=generator)
    end = start + torch.randint(1, sk // 2, (b, h, sq), generator=generator)
    end[..., torch.arange(sq) % 3 == 1] = 0
    key = torch.arange(sk)
    visible = (key >= start[..., None]) & (key < end[..., None])
    return (q, k, v), MASKS[kind](visible, start, end), visible


kinds = pytest.mark.parametrize("kind", MASKS)


@dtypes
@kinds
def test_rows_that_see_nothing(kind, dtype):
    (q, k, v), kwargs, visible = masked_inputs(kind, dtype)
    empty = ~visible.any(-1)
    q[empty] = NAN
    tangents = random_tangents(q, k, v, kwargs)
    tangents[0][empty] = INF
    tout, tlse = tangent(q, k, v, kwargs, tangents)
    assert (tout[empty] == 0).all() and (tlse[empty] == 0).all() and torch.isfinite(tout).all()
    sinks = torch.tensor([-1.5, 3.0])
    tsinks = torch.tensor([0.25, 2.0])
    tangents = *tangents[:3], tangents[3]._replace(sinks=tsinks)
    tout, tlse = tangent(q, k, v, kwargs | {"sinks": sinks}, tangents)
    assert (tout[empty] == 0).all()
    assert (tlse[empty] == tsinks[:, None].expand(tlse.shape)[empty].to(tlse.dtype)).all()


@dtypes
@kinds
@pytest.mark.parametrize("poisoned", [("k",), ("v",), ("tk",), ("tv",), ("k", "v", "tk", "tv")], ids="+".join)
def test_poison_stays_where_it_is_seen(poisoned, kind, dtype):
    """A row that sees no poisoned key keeps its bits; in one that does, what is not finite shows."""
    (q, k, v), kwargs, visible = masked_inputs(kind, dtype)
    tq, tk, tv, tterms = random_tangents(q, k, v, kwargs)
    if tterms.bias is not None:
        tterms.bias[~visible] = NAN
    clean = tangent(q, k, v, kwargs, (tq, tk, tv, tterms))
    assert all(torch.isfinite(x).all() for x in clean)
    tensors = {"k": k, "v": v, "tk": tk, "tv": tv}
    keys = torch.tensor([60, 200, 310])
    for name in poisoned:
        tensors[name] = tensors[name].clone()
        for key, poison in zip(keys.tolist(), (NAN, INF, -INF), strict=True):
            tensors[name][:, :, key, ::2] = poison
    hidden = ~visible[..., keys].any(-1)
    tangents = tq, tensors["tk"], tensors["tv"], tterms
    tout, tlse = tangent(q, tensors["k"], tensors["v"], kwargs, tangents)
    assert_same_bits((tout[hidden], tlse[hidden]), (clean[0][hidden], clean[1][hidden]))
    assert 0.0 < hidden.double().mean() < 1.0
    assert not torch.isfinite(tout[~hidden][:, ::2]).any()


@kinds
def test_scores_that_are_not_finite(kind):
    (q, k, v), kwargs, visible = masked_inputs(kind, "float32")
    tangents = random_tangents(q, k, v, kwargs)
    q[0, 0, 3] = NAN
    tout, tlse = tangent(q, k, v, kwargs, tangents)
    assert torch.isnan(tout[0, 0, 3]).all() and torch.isnan(tlse[0, 0, 3])
    others = torch.ones(q.shape[:3], dtype=torch.bool)
    others[0, 0, 3] = False
    assert torch.isfinite(tout[others]).all() and torch.isfinite(tlse[others]).all()


def test_what_is_refused():
    (q, k, v), kwargs = inputs(Case(num_heads=2, seqlen_q=5, head_dim=8))
    problem, terms = bind(q, k, v, kwargs)
    (row,) = (row for row in dispatch.KERNELS if row.name == "cpu.tangent")
    assert dispatch.refuse(row, problem) == []
    with pytest.raises(UnsupportedError, match="head_dim=513"):
        dispatch.select(problem._replace(head_dim=513), "cpu")
    wrong = {
        "tq has a size": (q[:, :, 1:], None, None, NO_TANGENTS),
        "tk has another dtype": (None, k.double(), None, NO_TANGENTS),
        "tv has a wrong number": (None, None, v[0], NO_TANGENTS),
        "is given for what has none": (None, None, None, NO_TANGENTS._replace(k_start=torch.zeros(5).int())),
        "softcap|is given for": (None, None, None, NO_TANGENTS._replace(softcap=0.5)),
        "tangent of bias has no tensor": (None, None, None, NO_TANGENTS._replace(bias=torch.zeros(5, 5))),
    }
    for text, tangents in wrong.items():
        with pytest.raises(ValueError, match=text):
            cpu.tangent(problem, q, k, v, terms, tangents)


# --- bits and memory -------------------------------------------------------------------------------------------------


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """x's values with the dimensions in reverse order and gaps between the elements; float32 and float64 negated."""
    reverse = tuple(range(x.dim() - 1, -1, -1))
    if x.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.full_like(x.permute(reverse), NAN), -x.permute(reverse)).conj().imag.permute(reverse)
    return torch.stack([x.permute(reverse), torch.full_like(x.permute(reverse), NAN)], -1)[..., 0].permute(reverse)


@dtypes
@pytest.mark.parametrize("seqlens", [(21, 37), (1, 300), (140, 150)])
def test_bits_do_not_depend_on_strides(seqlens, dtype):
    case = SMALL._replace(dtype=dtype, seqlen_q=seqlens[0], seqlen_k=seqlens[1], bias="full")
    (q, k, v), kwargs = inputs(case)
    tangents = random_tangents(q, k, v, kwargs)
    expected = tangent(q, k, v, kwargs, tangents)
    tterms = [x if x is None else elsewhere(x) for x in tangents[3]]
    moved = [elsewhere(x) for x in (q, k, v, *tangents[:3])]
    assert dtype not in ("float32", "float64") or all(x.is_neg() for x in moved)
    actual = tangent(*moved[:3], kwargs, (*moved[3:], type(tangents[3])._make(tterms)))
    assert_same_bits(actual, expected)
    wide = [x[:, :1].expand_as(x) for x in tangents[:3]]
    narrow = [x.contiguous() for x in wide]
    assert_same_bits(*(tangent(q, k, v, kwargs, (*x, tangents[3])) for x in (wide, narrow)))


@shapes
def test_bits_do_not_depend_on_threads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    tangents = random_tangents(q, k, v, kwargs)
    expected = tangent(q, k, v, kwargs, tangents)
    threads = torch.get_num_threads()
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        try:
            assert_same_bits(tangent(q, k, v, kwargs, tangents), expected)
        finally:
            torch.set_num_threads(threads)


@shapes
def test_bits_do_not_depend_on_other_rows_and_heads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    tangents = tq, tk, tv, tterms = random_tangents(q, k, v, kwargs)
    out, lse = tangent(q, k, v, kwargs, tangents)
    for row, head in ((0, 0), (q.shape[2] - 1, q.shape[1] - 1), (q.shape[2] // 2, 0)):
        q2, tq2 = torch.full_like(q, NAN), torch.full_like(tq, NAN)
        q2[:, head, row], tq2[:, head, row] = q[:, head, row], tq[:, head, row]
        out2, lse2 = tangent(q2, k, v, kwargs, (tq2, tk, tv, tterms))
        assert_same_bits((out2[:, head, row], lse2[:, head, row]), (out[:, head, row], lse[:, head, row]))


def test_out_has_the_memory_order_of_q():
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=3, seqlen_q=40, head_dim=24, head_dim_v=9, layout="bshd"))
    problem, terms = bind(q, k, v, kwargs)
    tangents = random_tangents(q, k, v, kwargs)
    tout, tlse = cpu.tangent(problem, q, k, v, terms, tangents)
    assert tout.transpose(1, 2).is_contiguous() and tlse.is_contiguous()
    alone, nothing = cpu.tangent(problem._replace(lse=False), q, k, v, terms, tangents)
    assert nothing is None
    assert_same_bits(alone, tout)


def test_memory_is_of_the_order_of_the_inputs():
    (q, k, v), kwargs = inputs(Case(seqlen_q=6000, head_dim=16, causal=True))
    tangents = random_tangents(q, k, v, kwargs)
    tangent(q, k, v, kwargs, tangents)
    before = reset_peak()
    tangent(q, k, v, kwargs, tangents)
    assert status("VmHWM") - before < 8 << 20  # 6000 x 6000 floats are 137 MiB
