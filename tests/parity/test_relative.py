"""Biases of distances: the formulas of their models, gradients of their tables, masks, transforms and graphs."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from backward import INF
from cases import Case, inputs
from compiling import assert_compiles, counters, num_graphs
from fastattn import plans, relative
from fastattn.backends import cpu
from fastattn.scores import Place
from fastattn.scores.relative import spread, sum_diagonals
from fastattn.terms import Terms
from forward import assert_same_bits, run
from guarded import Guarded, in_child, printed_by_child, reset_peak, status
from isas import needs_cpu, run_tests_on, supported_isas
from refusals import assert_refused

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]

LENGTHS = [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (40, 150), (150, 40), (133, 131)]


def distances(seqlen_q, seqlen_k):
    """j - (i + seqlen_k - seqlen_q)"""
    return torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(seqlen_q, seqlen_k, heads=4, heads_k=2, dim=5):
    return double(2, heads, seqlen_q, dim), double(2, heads_k, seqlen_k, dim), double(2, heads_k, seqlen_k, 3)


def assert_as_dense(q, k, v, bias, dense, leaves=(), **options):
    """out, lse and all gradients are those of the bias as a tensor."""
    leaves = [x.requires_grad_() for x in (q, k, v, *leaves)]
    found = []
    for b, backend in ((bias, "cpu"), (dense, "reference")):
        out, lse = fastattn.attention(q, k, v, bias=b, return_lse=True, backend=backend, **options)
        loss = out.square().sum() + lse.masked_fill(lse == -INF, 0.0).square().sum()
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_toeplitz(lengths, options):
    vector = double(4, sum(lengths) - 1).requires_grad_()
    dense = vector[:, distances(*lengths) + lengths[1] - 1]
    assert_as_dense(*qkv(*lengths), relative.toeplitz(vector), dense, [vector], **options)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (4, 20), (1, 1, 20), (1, 4, 20), (2, 1, 20), (2, 4, 20)])
def test_toeplitz_of_any_shape(shape):
    vector = double(*shape).requires_grad_()
    dense = vector[..., distances(5, 9) + 10]
    assert_as_dense(*qkv(5, 9), relative.toeplitz(vector, center=10), dense, [vector])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_t5(lengths, bidirectional):
    pytest.importorskip("transformers")
    from transformers.models.t5 import modeling_t5 as modeling

    table = double(12, 4).requires_grad_()
    buckets = modeling.T5Attention._relative_position_bucket(distances(*lengths), bidirectional, 12, 40)
    dense, bias = table[buckets].permute(2, 0, 1), relative.t5(table, bidirectional, 40)
    assert_as_dense(*qkv(*lengths), bias, dense, [table], softmax_scale=1.0, causal=not bidirectional)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_of_transformers(is_decoder):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5 import modeling_t5 as modeling

    config = transformers.T5Config(
        d_model=24, d_kv=6, num_heads=4, is_decoder=is_decoder, dropout_rate=0.0, attn_implementation="eager",
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    layer = modeling.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    x, seen = double(2, 50, 24), fastattn.Mask.causal().to_dense(50, 50)
    mask = torch.zeros(seen.shape).double().masked_fill(~seen, -INF) if is_decoder else None
    expected = layer(x, mask)[0]
    q, k, v = (f(x).unflatten(2, (4, 6)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    bias = relative.t5(layer.relative_attention_bias.weight, not is_decoder, 20)
    out = fastattn.attention(q, k, v, bias=bias, softmax_scale=1.0, causal=is_decoder, backend="cpu")
    actual = layer.o(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
def test_alibi(shape):
    slopes = torch.rand(shape, dtype=torch.float64).requires_grad_()
    dense = -slopes[..., None, None] * distances(40, 50).abs()
    assert_as_dense(*qkv(40, 50), relative.alibi(slopes), dense, [slopes], causal=True)
    plain = fastattn.attention(*(args := qkv(40, 50)), alibi_slopes=slopes.squeeze(0))
    torch.testing.assert_close(fastattn.attention(*args, bias=relative.alibi(slopes)), plain)


def test_an_entry_of_minus_infinity_masks():
    """Rows that see nothing among them; and nothing leaks from behind."""
    q, k, v = qkv(60, 70)
    vector = double(4, 129)
    vector[:, ::3] = vector[:, 40:100] = -INF
    dense = vector[:, distances(60, 70) + 69]
    assert_as_dense(q, k, v, relative.toeplitz(vector), dense)
    assert_as_dense(q, k, v, relative.toeplitz(torch.full_like(vector, -INF)), torch.full((60, 70), -INF).double())
    k, v = k.detach().clone(), v.detach().clone()
    k[:, :, 5], v[:, :, 5] = float("nan"), INF
    vector[:, :] = 0.0
    vector[:, (distances(60, 70) + 69)[:, 5]] = -INF
    out = fastattn.attention(q, k, v, bias=relative.toeplitz(vector), backend="cpu")
    assert out.isfinite().all()


# --- the term --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (1, 1), (4, 0), (0, 4), (1, 7)])
def test_sum_diagonals_is_the_transpose_of_spread(lengths):
    vector, scores = double(2, max(sum(lengths) - 1, 0)), double(2, *lengths)
    dense = spread(vector, Place(0, *lengths))
    assert dense.shape == scores.shape
    torch.testing.assert_close((dense * scores).sum(), (vector * sum_diagonals(scores)).sum())
    if dense.numel():
        assert torch.equal(
            dense, vector[:, torch.arange(lengths[0])[:, None] - torch.arange(lengths[1]) + lengths[1] - 1]
        )


@pytest.mark.parametrize("kind", ["dense", "causal", "dropout"])
@pytest.mark.parametrize("lengths", [(7, 7), (4, 9), (9, 4)])
def test_gradcheck(lengths, kind):
    q, k, v = qkv(*lengths)
    options = {"dense": {}, "causal": {"causal": True}, "dropout": {"dropout_p": 0.3, "seed": 3}}[kind]
    vector = double(4, sum(lengths) - 1).requires_grad_()

    def call(vector, q=q, **more):
        out, lse = fastattn.attention(q, k, v, bias=relative.toeplitz(vector), return_lse=True, **options, **more)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert gradcheck(lambda vector: call(vector, backend="cpu"), (vector,))
    assert gradgradcheck(call, (vector, q.clone().requires_grad_()), fast_mode=True)


def test_transforms():
    """Samples of their own vector, tangents, and both in each other."""
    q, k, v = qkv(6, 8)
    vectors, tangents = double(3, 4, 13), double(3, 4, 13)

    def call(vector):
        return fastattn.attention(q, k, v, bias=relative.toeplitz(vector), causal=True)

    def dense(vector):
        return fastattn.attention(q, k, v, bias=vector[:, distances(6, 8) + 7], causal=True)

    torch.testing.assert_close(torch.vmap(call)(vectors), torch.stack([call(x) for x in vectors]))
    for f in (
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(vectors),
        lambda f: torch.func.jvp(f, (vectors[0],), (tangents[0],)),
        lambda f: torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (vectors[0],), (tangents[0],)),
    ):
        torch.testing.assert_close(f(call), f(dense))


@pytest.mark.parametrize("case", [
    Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=21, seqlen_k=37, head_dim=12, causal=True),
    Case(batch=1, num_heads=2, seqlen_q=5, seqlen_k=5, head_dim=8, sinks=True, dtype="bfloat16"),
], ids=str)  # fmt: skip
def test_compile(case):
    (q, k, v), kwargs = inputs(case)
    vector, table = torch.randn(case.num_heads, q.shape[2] + k.shape[2] - 1), torch.randn(8, case.num_heads)
    leaves = [x.requires_grad_() for x in (q, k, v, vector, table)]

    def attend(q, k, v, vector, table):
        out, lse = fastattn.attention(q, k, v, bias=relative.toeplitz(vector), return_lse=True, **kwargs)
        return out, lse, fastattn.attention(q, k, v, bias=relative.t5(table, max_distance=20), **kwargs)

    assert_compiles(attend, leaves)


def test_lengths_that_grow_make_no_new_plans_or_graphs():
    table = torch.randn(8, 2).requires_grad_()

    def attend(q, k, table):
        return fastattn.attention(q, k, k, bias=relative.t5(table, max_distance=20), causal=True)

    def tensors(seqlen):
        return torch.randn(1, 2, seqlen, 8), torch.randn(1, 2, seqlen + 3, 8), table

    attend(*tensors(7))
    known = plans.count()
    torch._dynamo.reset(), counters.clear()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (9, 14, 30):
        given = tensors(seqlen)
        found = [f(*given) for f in (attend, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), table)[0] for out in found]
        assert torch.equal(*found) and torch.equal(*grads)
    assert plans.count() == known and num_graphs() == 1


def test_weights_and_statistics():
    q, k, _ = qkv(20, 30)
    vector = double(4, 49)
    bias, dense = relative.toeplitz(vector), vector[:, distances(20, 30) + 29]
    options = {"causal": True, "rows": [3, 17], "heads": [2]}
    weights = [fastattn.attention_weights(q, k, bias=b, **options) for b in (bias, dense)]
    torch.testing.assert_close(*weights)
    stats = [fastattn.attention_stats(q, k, bias=b, causal=True) for b in (bias, dense)]
    torch.testing.assert_close(*stats)


SHAPES = [Case(num_heads=1, seqlen_q=300, seqlen_k=2100, head_dim=16, causal=True), Case(2, 4, 200, head_dim=8)]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads_or_on_the_run(case):
    (q, k, v), kwargs = inputs(case)
    vector = torch.randn(case.num_heads, q.shape[2] + k.shape[2] - 1)

    def gradient(threads):
        torch.set_num_threads(threads)
        leaf = vector.clone().requires_grad_()
        out = fastattn.attention(q, k, v, bias=relative.toeplitz(leaf), backend="cpu", **kwargs)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]

    expected = gradient(1)
    for threads in (1, 2, 3):
        assert_same_bits(gradient(threads), expected)


def test_a_row_has_its_bits_in_any_batch():
    (q, k, v), kwargs = inputs(Case(3, 4, 70, 90, head_dim=16, num_heads_k=2, causal=True, bias="distances"))
    out, lse = run(q, k, v, **kwargs)
    assert_same_bits(run(q[1:2], k[1:2], v[1:2], **kwargs), (out[1:2].contiguous(), lse[1:2].contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("isa", supported_isas())
def test_on_each_isa(isa):
    run_tests_on(isa, __file__, "-k", "test_toeplitz or test_an_entry")


def guarded_calls(say, side):
    for lengths in ((1, 1), (3, 37), (16, 16), (33, 130), (150, 41)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            say((lengths, dtype))
            (q, k, v), _ = inputs(Case(2, 2, *lengths, head_dim=8, dtype=str(dtype).removeprefix("torch.")))
            vector = torch.randn(2, sum(lengths) - 1)
            guarded = Guarded(vector.to(torch.float64 if dtype == torch.float64 else torch.float32), side)
            terms = Terms(softmax_scale=1.0, query_start=lengths[1] - lengths[0])
            outs = [torch.empty_like(q) for _ in range(2)]
            for out, x in zip(outs, (guarded.tensor, guarded.tensor.clone()), strict=True):
                cpu._C.forward(q, k, v, out, None, None, None, terms._replace(relative=x), 1)
            assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_beside_the_vector_is_read(side):
    in_child(guarded_calls, side)


# --- memory ----------------------------------------------------------------------------------------------------------


def extra_bytes(seqlen: int) -> int:
    torch.set_num_threads(1)
    table = torch.randn(32, 2).requires_grad_()
    q, k, v = (torch.randn(1, 2, seqlen, 16).requires_grad_() for _ in range(3))

    def step(q, k, v):
        out = fastattn.attention(q, k, v, bias=relative.t5(table), window_size=(256, 256), backend="cpu")
        torch.autograd.grad(out.sum(), (q, k, v, table))

    step(*(x[:, :, :64] for x in (q, k, v)))
    before = reset_peak()
    step(q, k, v)
    return status("VmHWM") - before


def test_memory_is_linear():
    """n x n would be 2 GiB."""
    assert printed_by_child("test_relative.extra_bytes(16384)") < 96 * 2**20


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals():
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))

    def call(bias, **options):
        return lambda: fastattn.attention(q, k, v, bias=bias(), **options)

    toeplitz, t5, alibi = relative.toeplitz, relative.t5, relative.alibi
    for bias, error, pattern in (
        (lambda: toeplitz([1.0]), TypeError, r"toeplitz: vector must be a torch.Tensor .*got list"),
        (lambda: toeplitz(torch.ones(11).int()), TypeError, "toeplitz: vector has dtype torch.int32"),
        (lambda: toeplitz(torch.ones(())), ValueError, r"toeplitz: vector has shape \(\)"),
        (lambda: toeplitz(torch.ones(4, 12)), ValueError, "12 entries; seqlen_q=5 and seqlen_k=7 have 11 distances"),
        (lambda: toeplitz(torch.ones(1)), ValueError, "1 entries; seqlen_q=5"),
        (lambda: toeplitz(torch.ones(3, 11)), ValueError, "vector is of 3 heads; q has num_heads=4"),
        (lambda: toeplitz(torch.ones(3, 4, 11)), ValueError, "vector has batch 3; q has batch=2"),
        (lambda: toeplitz(torch.ones(4, 30), center=5), ValueError, r"need entries -1 \.\.\. 9"),
        (lambda: toeplitz(torch.ones(4, 12), center=8), ValueError, r"need entries 2 \.\.\. 12"),
        (lambda: toeplitz(torch.ones(4, 30), center=1.0), TypeError, "toeplitz: center=1.0 must be an int"),
        (lambda: t5(torch.ones(32)), ValueError, r"t5: table has shape \(32,\); it must be \[num_buckets, num_heads\]"),
        (lambda: t5(torch.ones(32, 3)), ValueError, "t5: table is of 3 heads"),
        (lambda: t5(torch.ones(3, 4)), ValueError, "t5: table has 3 buckets; it must have at least 4"),
        (lambda: t5(torch.ones(32, 4), max_distance=8), ValueError, "max_distance=8 must be above 8"),
        (lambda: t5(torch.ones(32, 4), "yes"), TypeError, "t5: bidirectional='yes' must be True or False"),
        (lambda: alibi(torch.ones(3)), ValueError, "alibi: slopes is of 3 heads"),
        (lambda: alibi(torch.ones(3, 4)), ValueError, "alibi: slopes has batch 3"),
        (lambda: "alibi", TypeError, "bias must be a torch.Tensor"),
    ):
        assert_refused(call(bias), error, pattern)
    assert_refused(lambda: fastattn.attention(q, k, "v", bias=t5(torch.ones(32, 4))), TypeError, "v must be a torch.T")
    assert_refused(lambda: fastattn.attention(q[0], k, v, bias=t5(torch.ones(32, 4))), ValueError, "q has shape")


def test_triton_refuses():
    q = torch.randn(1, 2, 8, 16)
    text = str(fastattn.explain(q, q, q, bias=relative.t5(torch.ones(8, 2), max_distance=20)))
    (line,) = [line for line in text.splitlines() if "triton.prefill" in line]
    assert "relative=True (supports False)" in line


def test_the_native_entry_refuses_what_does_not_fit():
    q, k = torch.ones(2, 2, 3, 4), torch.ones(2, 2, 5, 4)
    for wrong in (torch.ones(2, 8), torch.ones(6), torch.ones(1), torch.ones(()), torch.ones(3, 7), torch.ones(7).int(),
                  torch.ones(3, 2, 7), torch.ones(1, 1, 1, 7), "text"):  # fmt: skip
        with pytest.raises((ValueError, AttributeError, TypeError)):
            cpu._C.forward(
                q, k, k, torch.ones(2, 2, 3, 4), None, None, None, Terms(relative=wrong, softmax_scale=1.0), 1
            )
    with pytest.raises(ValueError, match="relative does not go with bias"):
        terms = Terms(relative=torch.ones(7), bias=torch.ones(5), softmax_scale=1.0)
        cpu._C.forward(q, k, k, torch.ones(2, 2, 3, 4), None, None, None, terms, 1)
    fine = [torch.ones(7), torch.ones(1, 7), torch.ones(2, 7), torch.ones(2, 1, 7), torch.ones(14)[::2]]
    for vector in fine:
        cpu._C.forward(q, k, k, torch.ones(2, 2, 3, 4), None, None, None, Terms(relative=vector, softmax_scale=1.0), 1)
