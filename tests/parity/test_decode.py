"""The decode kernel: few query rows against a long cache, compared with the reference in float64, and its bits."""

import os

import pytest
import torch

import fastattn
from cases import Case, inputs
from fastattn import Mask, dispatch
from fastattn.backends import cpu
from forward import DTYPES, INF, NAN, assert_parity, assert_same_bits, dtypes, run
from isas import needs_cpu, only, run_tests_on, running_isa, supported_isas

pytestmark = needs_cpu
PREFILL = next(row for row in dispatch.KERNELS if row.name == "cpu.prefill")


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a test that is about more says so
    yield
    torch.set_num_threads(threads)


def decode(q, k, v, **kwargs):
    found = run(q, k, v, **kwargs)
    assert fastattn.last_call().kernel == "cpu.decode"
    return found


# --- values ----------------------------------------------------------------------------------------------------------

STEP = Case(batch=2, num_heads=6, num_heads_k=2, seqlen_q=1, seqlen_k=700, head_dim=40, head_dim_v=24)
EVERYTHING = {
    "causal": True, "window_size": (600, 3), "mask": "tensor_per_head", "bias": "full", "alibi": True, "softcap": 5.0,
    "sinks": True, "dropout_p": 0.2, "learned_scale": "per_head",
}  # fmt: skip
VARIANTS = [{}, {"causal": True}, {"window_size": (90, 20)}, {"alibi": True}, {"softcap": 2.0}, {"sinks": True}]
VARIANTS += [{"mask": kind} for kind in ("lengths", "left_padding", "documents", "prefix_lm", "intervals", "top_left")]
VARIANTS += [{"mask": kind, "causal": True} for kind in ("tensor", "tensor_per_head", "key_tensor")]
VARIANTS += [{"bias": kind} for kind in ("shared", "per_head", "full", "key", "query")]
VARIANTS += [{"learned_scale": kind} for kind in ("one", "per_head")] + [{"softmax_scale": -0.3}, {"layout": "bshd"}]
VARIANTS += [{"dropout_p": 0.3}, {"dropout_p": 0.3, "window_size": (90, 20)}, EVERYTHING]
SIZES = [(1, 1), (7, 9), (8, 16), (15, 33), (64, 64), (65, 31), (80, 112), (128, 128), (256, 3), (512, 257)]
ROWS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 4, 1), (5, 1, 1), (2, 6, 2), (7, 1, 1), (3, 4, 1), (1, 24, 2), (12, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parity_of_masks_and_terms(variant, seqlen_q, dtype):
    (q, k, v), kwargs = inputs(STEP._replace(seqlen_q=seqlen_q, dtype=dtype, **variant))
    assert_parity(decode(q, k, v, **kwargs), q, k, v, large_scores="learned_scale" in variant, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, head_dim_v", SIZES)
def test_parity_of_head_dims(head_dim, head_dim_v, dtype):
    for rows in ((1, 1, 1), (3, 2, 1)):
        seqlen_q, num_heads, num_heads_k = rows
        case = Case(1, num_heads, seqlen_q, 90, head_dim, head_dim_v, num_heads_k, dtype, causal=True)
        (q, k, v), kwargs = inputs(case)
        assert_parity(decode(q, k, v, **kwargs), q, k, v, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_k", [0, 1, 15, 16, 17, 127, 129, 2048, 4097])
def test_parity_of_lengths(seqlen_k, dtype):
    for variant in ({}, {"causal": True, "seqlen_q": 3}, {"mask": "lengths"}):
        (q, k, v), kwargs = inputs(STEP._replace(seqlen_k=seqlen_k, dtype=dtype, **variant))
        assert_parity(decode(q, k, v, **kwargs), q, k, v, **kwargs)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_parity_of_rows(rows):
    seqlen_q, num_heads, num_heads_k = rows
    (q, k, v), kwargs = inputs(Case(2, num_heads, seqlen_q, 1300, 33, 20, num_heads_k, causal=True, alibi=True))
    assert_parity(decode(q, k, v, **kwargs), q, k, v, **kwargs)


def test_empty_calls():
    for case in (Case(batch=0, seqlen_k=9), Case(num_heads=0, seqlen_k=9), Case(seqlen_q=0, seqlen_k=9)):
        (q, k, v), _ = inputs(case)
        out, lse = decode(q, k, v)
        assert out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.slow  # with prefill and backward, `make test` knows that the instruction sets agree
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    if isa != running_isa():
        run_tests_on(isa, __file__)


# --- keys that nobody sees -------------------------------------------------------------------------------------------


@dtypes
def test_a_query_without_keys_is_zero(dtype):
    (q, k, v), _ = inputs(STEP._replace(seqlen_q=2, dtype=dtype))
    k[0], v[0] = NAN, INF
    out, lse = decode(q, k, v, mask=Mask.lengths(torch.tensor([0, 700])))
    assert (out[0] == 0).all() and (lse[0] == -INF).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@dtypes
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_nothing_leaks_from_behind_a_mask(seqlen_q, poison, dtype):
    """The bits are those of any other values behind the mask."""
    length = 333
    (q, k, v), _ = inputs(STEP._replace(seqlen_q=seqlen_q, dtype=dtype))
    position = torch.arange(700)
    seen = (position < length) & (position >= 37)
    for kwargs in (
        {"mask": Mask.intervals(torch.full((2, 6, seqlen_q), 37), torch.full((2, 6, seqlen_q), length))},
        {"mask": seen.expand(1, 1, seqlen_q, 700)},
        {"bias": torch.where(seen, 0.5, -INF).expand(1, 1, 1, 700)},
        {"mask": seen.expand(1, 1, seqlen_q, 700), "dropout_p": 0.4, "seed": 3},
    ):
        expected = decode(q, k, v, **kwargs)
        k2, v2 = k.clone(), v.clone()
        k2[:, :, ~seen] = v2[:, :, ~seen] = poison
        assert_same_bits(decode(q, k2, v2, **kwargs), expected)
        assert_parity(expected, q, k, v, **kwargs)


@dtypes
def test_nan_and_infinity_that_are_seen_show(dtype):
    (q, k, v), _ = inputs(STEP._replace(dtype=dtype))
    v[0, 1, 300, 5] = NAN
    v[1, 0, 200, 3] = -INF
    out, _ = decode(q, k, v)
    assert out[0, 3:, 0, 5].isnan().all() and out[0, :3].isfinite().all()
    assert (out[1, :3, 0, 3] == -INF).all() and out[1, 3:].isfinite().all()
    k[0, 1, 20, 2] = NAN
    assert decode(q, k, v)[0][0, 3:].isnan().all()


# --- bits ------------------------------------------------------------------------------------------------------------

LONG = Case(batch=3, num_heads=8, num_heads_k=2, seqlen_k=5000, head_dim=72)


@dtypes
@pytest.mark.parametrize("variant", [{}, {"mask": "lengths", "seqlen_q": 3}, EVERYTHING], ids=str)
def test_bits_do_not_depend_on_threads_or_the_batch(variant, dtype):
    (q, k, v), kwargs = inputs(LONG._replace(dtype=dtype, **variant))
    expected = decode(q, k, v, **kwargs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(decode(q, k, v, **kwargs), expected)
    torch.set_num_threads(1)
    if kwargs.get("dropout_p") or "mask" in kwargs:
        return
    for b in range(3):
        alone = decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], **kwargs)
        assert_same_bits(alone, [x[b : b + 1] for x in expected])


@dtypes
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_bits_do_not_depend_on_the_size_of_the_call(heads, dtype):
    """Rows of a large call are touched, or copied if they lie apart; those of a small one are read as they lie."""
    (q, k, v), _ = inputs(Case(batch=40, num_heads=heads, num_heads_k=2, seqlen_k=201, head_dim=72, dtype=dtype))
    for keys, values in ((k, v), (next(caches(k)), next(caches(v)))):
        whole = decode(q, keys, values)
        for b in (0, 39):
            assert_same_bits(decode(q[b : b + 1], k[b : b + 1], v[b : b + 1]), [x[b : b + 1] for x in whole])
            alone = decode(q[b : b + 1], keys[b : b + 1], values[b : b + 1])
            assert_same_bits(alone, [x[b : b + 1] for x in whole])


@dtypes
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype):
    """Query heads of one key head, speculative queries: alone, each has the same bits."""
    (q, k, v), _ = inputs(LONG._replace(batch=1, seqlen_q=3, seqlen_k=1500, dtype=dtype))
    out, lse = decode(q, k, v, causal=True)
    for head in (0, 3, 7):
        one_k, one_v = (x[:, head // 4 : head // 4 + 1].repeat(1, 2, 1, 1) for x in (k, v))
        for row in (0, 2):
            last = 1500 - 2 + row
            one_q = q[:, head : head + 1, row : row + 1].repeat(1, 2, 1, 1)
            found = decode(one_q, one_k, one_v, mask=Mask.lengths(torch.tensor([last])))
            expected = [x[:, head : head + 1, row : row + 1] for x in (out, lse)]
            assert_same_bits([x[:, :1] for x in found], expected)


def caches(x):
    """The same values in other memory: [B, S, Hk, D], part of a longer cache, every second column, backwards."""
    longer = torch.full((x.shape[0], x.shape[1], x.shape[2] + 100, x.shape[3]), NAN, dtype=x.dtype)
    longer[:, :, 3:-97] = x
    spread = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), NAN, dtype=x.dtype)
    spread[..., 1::2] = x
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield longer[:, :, 3:-97]
    yield spread[..., 1::2]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    if x.dtype in (torch.float32, torch.float64):
        yield torch._neg_view(-x)


@dtypes
@pytest.mark.parametrize("head_dim", [5, 64, 72])
def test_any_cache_gives_the_same_bits(head_dim, dtype):
    (q, k, v), kwargs = inputs(STEP._replace(seqlen_q=2, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype))
    expected = decode(q, k, v, causal=True)
    for other_k, other_v in zip(caches(k), caches(v), strict=True):
        assert_same_bits(decode(q, other_k, other_v, causal=True), expected)
        assert_same_bits(decode(q, k, other_v, causal=True), expected)
    one_k, one_v = k[:, :1].expand(k.shape), v[:1].expand(v.shape)
    assert_same_bits(decode(q, one_k, one_v), decode(q, one_k.contiguous(), one_v.contiguous()))


def test_a_growing_cache():
    (q, k, v), _ = inputs(Case(num_heads=4, num_heads_k=2, seqlen_k=600, head_dim=32))
    for length in (1, 2, 127, 128, 129, 500, 511, 512, 513):
        found = decode(q, k[:, :, :length], v[:, :, :length], causal=True)
        assert_same_bits(found, decode(q, k, v, mask=Mask.lengths(torch.tensor([length]))))


# --- who runs --------------------------------------------------------------------------------------------------------


def test_which_calls_run_on_it():
    def kernel(seqlen_q, num_heads=4, num_heads_k=2, **kwargs):
        q = torch.randn(1, num_heads, seqlen_q, 16)
        k, v = torch.randn(2, 1, num_heads_k, 40, 16)
        runs = [line.split()[0] for line in fastattn.explain(q, k, v, **kwargs).splitlines() if " runs" in line]
        fastattn.attention(q, k, v, **kwargs)
        assert runs == [fastattn.last_call().kernel]
        return runs[0]

    most = dispatch.KERNELS[0].supports["rows_per_key_head"][-1]
    assert dispatch.KERNELS[0].name == "cpu.decode"
    for group_size in (1, 2, 4):
        heads = (2 * group_size, 2)
        assert kernel(most // group_size, *heads) == "cpu.decode"
        assert kernel(most // group_size + 1, *heads) == "cpu.prefill"
        assert kernel(1, *heads) == "cpu.decode"  # looked up by the lengths, behind the kind
    assert kernel(1, 0, 0) == "cpu.decode"
    blocks = fastattn.BlockMask.from_mask(Mask.causal(), seqlen_q=2, seqlen_k=40)
    assert kernel(2, mask=blocks) == "cpu.prefill"
    q = torch.randn(1, 2, 1, 16, requires_grad=True)
    fastattn.attention(q, q, q)
    assert fastattn.last_call().kernel == "cpu.prefill"
    q, k = torch.randn(1, 8, 5, 16), torch.randn(1, 1, 40, 16)
    assert "rows_per_key_head=40 (supports 0..." in fastattn.explain(q, k, k)


@dtypes
def test_prefill_agrees(dtype):
    """The other kernel that takes these calls."""
    (q, k, v), kwargs = inputs(LONG._replace(batch=1, seqlen_q=2, dtype=dtype, causal=True))
    with only(PREFILL):
        expected = run(q, k, v, **kwargs)
    found = decode(q, k, v, **kwargs)
    tolerance = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_a_block_mask_is_refused_below():
    q = torch.zeros(1, 1, 16, 16)
    mask = fastattn.BlockMask.from_mask(Mask.causal(), seqlen_q=16, seqlen_k=16)
    fastattn.attention(q, q, q, mask=mask)
    bound = fastattn.api.bind(q, q, q, mask=mask)
    with pytest.raises(ValueError, match="block_mask"):
        cpu._C.decode(q, q, q, torch.empty_like(q), None, None, None, bound.terms, 1)
