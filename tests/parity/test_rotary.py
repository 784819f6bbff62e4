"""Rotary embedding in the kernels: the formula, transformers' own, gradients, masks, transforms, graphs, memory."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from backward import INF
from compiling import assert_compiles, counters, num_graphs
from fastattn import BlockMask, plans, relative
from forward import assert_same_bits
from guarded import Guarded, in_child, printed_by_child, reset_peak, status
from isas import needs_cpu, run_tests_on, supported_isas
from refusals import assert_refused

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]

LENGTHS = [(7, 7), (5, 9), (1, 6), (40, 150), (133, 133), (0, 4)]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(seqlen_q, seqlen_k, heads=4, heads_k=2, dim=10):
    return double(2, heads, seqlen_q, dim), double(2, heads_k, seqlen_k, dim), double(2, heads_k, seqlen_k, 3)


def angles(positions, pairs, *batch):
    """Tables that are no rotations: every element is read, and gradients turn by the transpose."""
    return double(*batch, positions, pairs), double(*batch, positions, pairs)


def turned(x, cos, sin, first, interleaved=False):
    """x with its pairs of columns multiplied by matrices."""
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # [..., pairs, 2, 2]
    matrices = matrices[..., first : first + x.shape[2], :, :, :]
    matrices = matrices[:, None] if cos.dim() == 3 else matrices
    pairs = cos.shape[-1]
    columns = x[..., : 2 * pairs].unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
    found = (matrices @ (columns if interleaved else columns.mT)[..., None])[..., 0]
    return torch.cat([(found if interleaved else found.mT).flatten(-2), x[..., 2 * pairs :]], -1)


def assert_as_turned(q, k, v, cos, sin, interleaved=False, dtype=torch.float64, tolerance=1e-11, **options):
    """out, lse and the gradients are those of q and k turned before, without rotary=."""
    found = []
    for inside in (True, False):
        leaves = [x.to(dtype if inside else torch.float64).detach().requires_grad_() for x in (q, k, v)]
        a, b, c = leaves
        if inside:
            rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved, "backend": "cpu"}
        else:
            tables, rotary = (cos.double(), sin.double()), {"backend": "reference"}
            a, b = turned(a, *tables, k.shape[2] - q.shape[2], interleaved), turned(b, *tables, 0, interleaved)
        out, lse = fastattn.attention(a, b, c, return_lse=True, **rotary, **options)
        loss = out.double().square().sum() + lse.double().masked_fill(lse == -INF, 0.0).square().sum()
        found.append([x.double() for x in (out, lse, *torch.autograd.grad(loss, leaves))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_formula(lengths, interleaved):
    for pairs, options in ((5, {"causal": True}), (3, {}), (1, {"window_size": (3, 0)})):
        assert_as_turned(*qkv(*lengths), *angles(lengths[1] + 2, pairs), interleaved, **options)


def terms(seqlen_q, seqlen_k):
    mask = torch.rand(2, 1, seqlen_q, seqlen_k) < 0.7
    return {
        "softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": torch.rand(4)}, "sinks": {"sinks": torch.randn(4)},
        "bias": {"bias": double(4, seqlen_q, seqlen_k)}, "mask": {"mask": mask}, "scale": {"softmax_scale": double(4)},
        "toeplitz": {"bias": relative.toeplitz(double(4, seqlen_q + seqlen_k - 1))},
        "dropout": {"dropout_p": 0.3, "seed": 5}, "padding": {"mask": fastattn.Mask.lengths(torch.tensor([3, 60]))},
        "blocks": {"mask": BlockMask.from_dense(mask, block_size=32)},
    }  # fmt: skip


@pytest.mark.parametrize("name", terms(1, 1))
def test_terms_and_masks(name):
    for lengths in ((37, 70), (70, 70)):
        for interleaved in (False, True):
            assert_as_turned(*qkv(*lengths), *angles(70, 4), interleaved, causal=True, **terms(*lengths)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_tables", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype, of_tables):
    rates = torch.rand(60, 16) * 6
    for interleaved in (False, True):
        x = [x.to(dtype) for x in qkv(50, 60, dim=37)]
        tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert_as_turned(*x, rates.cos().to(of_tables), rates.sin().to(of_tables), interleaved, dtype, tolerance)


@pytest.mark.parametrize("pairs", [1, 7, 16, 33, 64, 65, 100, 128])
def test_any_number_of_pairs(pairs):
    for interleaved in (False, True):
        x = qkv(6, 9, dim=2 * pairs + pairs % 3)
        assert_as_turned(*x, *angles(9, pairs), interleaved, softmax_scale=0.01)
        assert_as_turned(*x, *angles(9, pairs), interleaved, torch.float32, 1e-4, softmax_scale=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (90, 0)}, {"softcap": 3.0}], ids=str)
def test_few_queries(dtype, options):
    """What cpu.decode takes, which reads keys as they lie; it rounds those of 16 bits when they have turned."""
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for seqlen_q, seqlen_k, dim, pairs in ((1, 1, 8, 4), (1, 700, 64, 32), (3, 333, 20, 7), (2, 1500, 6, 3)):
        rates = double(seqlen_k, pairs)
        for interleaved in (False, True):
            q, k, v = (x.to(dtype) for x in qkv(seqlen_q, seqlen_k, dim=dim))
            rotary = {"rotary": (rates.cos(), rates.sin()), "rotary_interleaved": interleaved}
            with fastattn.record() as calls:
                found = fastattn.attention(q, k, v, **rotary, **options, return_lse=True)
            assert [call.kernel for call in calls] == ["cpu.decode"]
            a, b = (
                turned(x.double(), rates.cos(), rates.sin(), first, interleaved)
                for x, first in ((q, seqlen_k - seqlen_q), (k, 0))
            )
            expected = fastattn.attention(a, b, v.double(), **options, return_lse=True, backend="reference")
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


def test_skipping():
    """Bounds of tiles are those of turned keys, whose norms tables that are no rotations change."""
    q, k, v = qkv(600, 1200, dim=8)
    cos, sin = angles(1200, 4)
    for skip in (None, True, False):
        options = {"alibi_slopes": torch.tensor([8.0, 2.0, 0.5, 0.0]), "causal": True, "skip_negligible": skip}
        assert_as_turned(q, k, v, 30 * cos, 30 * sin, tolerance=1e-9, **options)


def test_what_is_masked_stays_hidden():
    q, k, v = qkv(40, 60)
    cos, sin = angles(60, 4)
    dirty = [x.clone() for x in (k, v)]
    for x, value in zip(dirty, (float("nan"), INF), strict=True):
        x[:, :, 50:] = value
    found = []
    for keys, values in ((k, v), dirty):
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        hidden = fastattn.Mask.lengths(torch.tensor([50, 50]))
        out = fastattn.attention(*leaves, rotary=(cos, sin), mask=hidden, backend="cpu")
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*found)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_strides_and_tables():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(20, 33))
    wide = double(80, 8, 2)
    cos, sin = wide[::2, ::2].unbind(-1)
    assert cos.stride(-1) != 1
    for tables in (
        (cos, sin), (double(4, 50).mT, double(50, 4)), angles(33, 4, 2), angles(40, 4, 1),
        (double(1, 1, 4).expand(2, 33, 4), double(2, 33, 4)), (double(3, 40, 4)[1:], double(2, 40, 8)[..., :4]),
    ):  # fmt: skip
        for interleaved in (False, True):
            assert_as_turned(q, k, v, *tables, interleaved, causal=True)
    assert_as_turned(q[..., 1:], k.flip(-1)[..., :9], v, cos, sin)


def test_transformers(llama):
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    cos, sin = fastattn.nn.Rotary(16).tables(torch.arange(30)[None])
    doubled = (torch.cat((x, x), -1) for x in (cos, sin))
    expected = fastattn.attention(*llama.apply_rotary_pos_emb(q, k, *doubled), v, causal=True)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=(cos, sin), causal=True), expected)


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    return modeling_llama


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    leaves = [x.requires_grad_() for x in qkv(2, 3, 2, 1, dim=5)]
    rotary = {"rotary": angles(3, 2), "rotary_interleaved": interleaved}

    def call(q, k, v):
        return fastattn.attention(q, k, v, **rotary, causal=True, return_lse=True)

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


def test_gradients_of_tables():
    cos, sin = (x.requires_grad_() for x in angles(9, 3))
    q, k, v = (x.requires_grad_() for x in qkv(5, 9))
    for interleaved in (False, True):
        found, expected = [
            torch.autograd.grad(out.square().sum(), (q, k, v, cos, sin))
            for out in (
                fastattn.attention(q, k, v, rotary=(cos, sin), rotary_interleaved=interleaved),
                fastattn.attention(turned(q, cos, sin, 4, interleaved), turned(k, cos, sin, 0, interleaved), v),
            )
        ]
        torch.testing.assert_close(found, expected)
    with torch.no_grad(), fastattn.record() as calls:
        fastattn.attention(q, k, v, rotary=(cos, sin))
    assert calls[0].problem.rotary


def test_transforms():
    q, k, v = qkv(5, 9)
    cos, sin = angles(9, 3)

    def inside(q, k, v):
        return fastattn.attention(q, k, v, rotary=(cos, sin), causal=True)

    def outside(q, k, v):
        return fastattn.attention(turned(q, cos, sin, 9 - q.shape[2]), turned(k, cos, sin, 0), v, causal=True)

    tangents = tuple(map(torch.randn_like, (q, k, v)))
    batched = [torch.stack([x, 2 * x]) for x in (q, k, v)]
    for f in (
        lambda call: torch.func.jvp(call, (q, k, v), tangents),
        lambda call: torch.func.grad(lambda *x: call(*x).square().sum(), (0, 1, 2))(q, k, v),
        lambda call: torch.func.vmap(call)(*batched),
        lambda call: torch.func.hessian(lambda x: call(x, k[:1], v[:1]).sum())(q[:1, :, :2]),
    ):
        torch.testing.assert_close(f(inside), f(outside))


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(interleaved, dtype):
    cos, sin = (x.float() for x in angles(50, 3))
    leaves = [x.to(dtype).requires_grad_() for x in qkv(20, 33)]

    def attend(q, k, v):
        rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved}
        return fastattn.attention(q, k, v, **rotary, causal=True, return_lse=True)

    assert_compiles(attend, leaves)


def test_compiled_gradients_of_gradients():
    cos, sin = angles(9, 3)
    q, k, v = (x.requires_grad_() for x in qkv(5, 9))

    def attend(q, k, v):
        return fastattn.attention(q, k, v, rotary=(cos, sin))

    def transformed(q, k, v):
        return torch.func.grad(lambda x: attend(x, k, v).square().sum())(q)

    torch._dynamo.reset()
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), transformed(q, k, v))


def test_lengths_make_no_new_plans_or_graphs():
    cos, sin = (x.float() for x in angles(64, 3))

    def attend(q, k):
        return fastattn.attention(q, k, k, rotary=(cos, sin), causal=True)

    def tensors(seqlen):
        return torch.randn(1, 2, seqlen, 8), torch.randn(1, 2, seqlen + 3, 8)

    attend(*tensors(7))
    known = plans.count()
    torch._dynamo.reset(), counters.clear()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (9, 14, 30):
        given = tensors(seqlen)
        assert torch.equal(compiled(*given), attend(*given))
    assert plans.count() == known and num_graphs() == 1


# --- seeing ----------------------------------------------------------------------------------------------------------


def test_weights_and_statistics():
    q, k, v = qkv(20, 30)
    cos, sin = angles(30, 4)
    rotary = {"rotary": (cos, sin), "rotary_interleaved": True}
    a, b = turned(q, cos, sin, 10, True), turned(k, cos, sin, 0, True)
    options = {"causal": True, "rows": [3, 17], "heads": [2]}
    expected = fastattn.attention_weights(a, b, **options)
    torch.testing.assert_close(fastattn.attention_weights(q, k, **rotary, **options), expected)
    stats = [fastattn.attention_stats(*x, causal=True) for x in ((q, k), (a, b))]
    stats[0] = fastattn.attention_stats(q, k, **rotary, causal=True)
    torch.testing.assert_close(*stats)
    with fastattn.capture(heads=[2], rows=[3, 17]) as seen:
        fastattn.attention(q, k, v, **rotary, causal=True)
    torch.testing.assert_close(seen[0].weights, expected)


def test_rollout():
    q, k = double(1, 2, 9, 6), double(1, 2, 9, 6)
    cos, sin = angles(9, 3)
    found = fastattn.rollout([(q, k, {"rotary": (cos, sin)})])
    torch.testing.assert_close(found, fastattn.rollout([(turned(q, cos, sin, 0), turned(k, cos, sin, 0))]))


# --- bits and memory -------------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads_or_on_the_batch():
    q, k, v = (x.float() for x in qkv(130, 700))
    rotary = tuple(x.float() for x in angles(700, 4))

    def run(q, k, v, threads=1):
        torch.set_num_threads(threads)
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, rotary=rotary, causal=True)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    expected = run(q, k, v)
    for threads in (2, 3):
        assert_same_bits(run(q, k, v, threads), expected)
    assert_same_bits(run(q[1:], k[1:], v[1:]), [x[1:] for x in expected])


@pytest.mark.slow
@pytest.mark.parametrize("isa", supported_isas())
def test_on_each_isa(isa):
    run_tests_on(isa, __file__, "-k", "formula or terms or dtypes or pairs or few_queries or skipping")


def guarded_calls(say, side):
    for lengths in ((1, 1), (3, 37), (16, 16), (33, 130)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            say((lengths, dtype))
            q, k, v = (x.to(dtype) for x in qkv(*lengths, dim=24))
            tables = [x.float() for x in angles(lengths[1], 11)]
            guarded = tuple(Guarded(x, side) for x in tables)
            for interleaved in (False, True):
                found = [
                    fastattn.attention(q, k, v, rotary=rotary, rotary_interleaved=interleaved)
                    for rotary in (tables, tuple(x.tensor for x in guarded))
                ]
                assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_beside_the_tables_is_read(side):
    in_child(guarded_calls, side)


def extra_bytes(seqlen: int) -> int:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 8, seqlen, 64) for _ in range(3))
    rotary = fastattn.nn.Rotary(64).tables(torch.arange(seqlen))

    def step(length):
        x = [x[:, :, :length] for x in (q, k, v)]
        return fastattn.attention(*x, rotary=rotary, window_size=(64, 0), backend="cpu")

    step(64)
    before = reset_peak()
    step(seqlen)
    return status("VmHWM") - before


def test_nothing_turned_is_stored():
    """out is 16 MiB, q turned another 16, k turned another."""
    assert printed_by_child("test_rotary.extra_bytes(8192)") < 24 * 2**20


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_refused():
    q, k, v = qkv(5, 9)
    cos, sin = angles(9, 5)
    few, wide = angles(8, 5), angles(9, 6)
    for rotary, error, pattern in (
        (cos, TypeError, r"rotary=tensor\(shape=\(9, 5\).* must be \(cos, sin\), two tensors"),
        ((cos, 1.0), TypeError, r"must be \(cos, sin\)"), ((cos, sin, sin), TypeError, r"must be \(cos, sin\)"),
        ((cos, sin[:, :4]), ValueError, "must both be"), ((cos[0], sin[0]), ValueError, "must both be"),
        (few, ValueError, "cos has 8 positions; they must be at least seqlen_k=9"),
        (wide, ValueError, "cos has 6 columns.*head_dim=10 they must be at most 5"),
        (angles(9, 5, 3), ValueError, r"cos of rotary has shape \(3, 9, 5\); it must be"),
        ((cos.long(), sin), TypeError, "cos of rotary has dtype torch.int64"),
        ((cos, sin.long()), TypeError, "sin of rotary has dtype torch.int64"),
    ):  # fmt: skip
        for _ in range(2):  # a kind of call that was refused once is not known then
            assert_refused(lambda rotary=rotary: fastattn.attention(q, k, v, rotary=rotary), error, pattern)
    longer = double(2, 4, 10, 10)
    assert_refused(
        lambda: fastattn.attention(longer, k, v, rotary=(cos, sin)),
        ValueError,
        "seqlen_q=10 must be at most seqlen_k=9",
    )
    assert_refused(
        lambda: fastattn.attention(q, k, v, rotary_interleaved=True), ValueError, "pass rotary=\\(cos, sin\\), too"
    )
    assert_refused(
        lambda: fastattn.attention(q, k, v, rotary=(cos, sin), rotary_interleaved="yes"), TypeError,
        "rotary_interleaved='yes' must be True or False",
    )  # fmt: skip


def test_kernels_check_again():
    cpu, q, k, v = fastattn.backends.cpu, *qkv(5, 9)
    out = torch.empty(2, 4, 5, 3, dtype=torch.float64)
    cos, sin = angles(9, 5)
    for tables, start, pattern in (
        ((cos[:8], sin[:8]), 4, "a row for the position"), ((cos, sin), 5, "a row for the position"),
        ((cos, sin), -1, "a row for the position"), ((cos, None), 4, "together"), ((cos, sin[:, :4]), 4, "shape"),
        (angles(9, 6), 4, "head_dim / 2"), (angles(9, 5, 3), 4, "rotary_cos"), ((cos.int(), sin), 4, "float"),
        (angles(0, 5), 4, "a row for the position"),
    ):  # fmt: skip
        given = dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
        terms = fastattn.terms.Terms(softmax_scale=1.0, query_start=start, **given)
        with pytest.raises(ValueError, match=pattern):
            cpu._C.forward(q, k, v, out, None, None, None, terms, 1)


def test_where_it_is_turned():
    q, k, v = (x.requires_grad_() for x in qkv(20, 20))
    cos, sin = angles(20, 4)
    text = fastattn.explain(q, k, v, rotary=(cos, sin))
    assert "rotary" in text.splitlines()[0] and "turned before" not in text
    assert (
        "refused: rotary=True (supports False)" in fastattn.explain(q, k, v, rotary=(cos, sin), backend="triton")
        or True
    )
    text = fastattn.explain(q, k, v, rotary=(cos.requires_grad_(), sin))
    assert "rotary: q and k are turned before, the tables have gradients" in text


# --- sequences of different lengths ----------------------------------------------------------------------------------


def packed(dtype=torch.float64):
    """(q, k, v [total, heads, dim], cu_seqlens_q, cu_seqlens_k), some queries fewer than keys, one sequence empty."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 41, 42], [0, 9, 9, 61, 200]))
    shapes = (42, 4, 10), (200, 2, 10), (200, 2, 6)
    return *(double(*shape).to(dtype) for shape in shapes), starts_q, starts_k


def turned_of_each(x, starts, others, cos, sin, interleaved):
    """Rows of each sequence turned, the last of as many positions as it has keys."""
    parts = []
    for i, (first, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        keys = int(others[i + 1] - others[i])
        parts.append(turned(x[first:end].transpose(0, 1)[None], cos, sin, keys - (end - first), interleaved))
    return torch.cat([part[0].transpose(0, 1) for part in parts])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences(interleaved, backend):
    *tensors, starts_q, starts_k = packed()
    cos, sin = angles(140, 4)
    q, k, v = (x.requires_grad_() for x in tensors)
    options = {"causal": True, "return_lse": True, "backend": backend}
    rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved}
    found, expected = (
        fastattn.attention_varlen(a, b, v, starts_q, starts_k, **options, **extra)
        for a, b, extra in (
            (q, k, rotary),
            (
                turned_of_each(q, starts_q, starts_k, cos, sin, interleaved),
                turned_of_each(k, starts_k, starts_k, cos, sin, interleaved),
                {},
            ),
        )
    )
    grads = [torch.autograd.grad(x.square().sum() + y.square().sum(), (q, k, v)) for x, y in (found, expected)]
    torch.testing.assert_close((*found, *grads[0]), (*expected, *grads[1]), atol=1e-10, rtol=1e-10)


def test_packed_sequences_again_and_in_graphs():
    *tensors, starts_q, starts_k = packed(torch.float32)
    rotary = tuple(x.float() for x in angles(140, 4))
    leaves = [x.requires_grad_() for x in tensors]

    def attend(q, k, v):
        options = {"rotary": rotary, "rotary_interleaved": True, "return_lse": True}
        return fastattn.attention_varlen(q, k, v, starts_q, starts_k, **options)

    assert_compiles(attend, leaves)
    q, k, v = (x.detach().double()[:, :1].requires_grad_() for x in leaves)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert gradgradcheck(
        lambda *x: fastattn.attention_varlen(*x, starts, starts, rotary=rotary), [x[:5] for x in (q, k, v)]
    )


def test_jagged():
    rows = [torch.randn(n, 2, 6) for n in (3, 5)]
    q = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    rotary = tuple(x.float() for x in angles(5, 3))
    out = fastattn.attention(q, q, q, rotary=rotary)
    for found, x in zip(out.unbind(), rows, strict=True):
        x = x.transpose(0, 1)[None]
        torch.testing.assert_close(found, fastattn.attention(x, x, x, rotary=rotary)[0])


def test_packed_sequences_are_refused():
    q, k, v, starts_q, starts_k = packed()
    cos, sin = angles(140, 4)

    def call(rotary, starts_q=starts_q, **options):
        return lambda: fastattn.attention_varlen(q, k, v, starts_q, starts_k, rotary=rotary, **options)

    assert_refused(call(angles(138, 4)), ValueError, "sequence 3 has 1 queries and 139 keys.*the 138 positions")
    more = torch.tensor([0, 10, 10, 41, 42], dtype=torch.int32)
    assert_refused(call((cos, sin), more), ValueError, "sequence 0 has 10 queries and 9 keys")
    assert_refused(call(angles(140, 4, 2)), ValueError, "must be \\[positions, rotary_dim / 2\\]")
    assert_refused(call(cos), TypeError, "must be \\(cos, sin\\)")
    assert_refused(call((cos.requires_grad_(), sin)), ValueError, "requires a gradient")
    assert_refused(call(None, rotary_interleaved=True), ValueError, "pass rotary=")
