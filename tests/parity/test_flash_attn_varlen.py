"""flash-attn's functions for packed sequences, against their formulas for each sequence (tests/support/flash.py)."""

import pytest
import torch

from fastattn.compat import flash_attn
from fastattn.compat.flash_attn import fa3, fa4
from flash import attend, check, randn

LENGTHS = ((3, 7), (0, 0), (5, 2), (8, 8), (0, 4), (4, 0), (1, 9))  # of queries and keys
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])
OPTIONS = {  # flash-attn's argument, and the same in words of `attend`
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "all": (
        {"causal": True, "window_size": (4, -1), "softcap": 0.9, "softmax_scale": 0.6},
        {"causal": True, "window": (4, None), "softcap": 0.9, "scale": 0.6},
    ),
}


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


CU_Q, CU_K = (starts([pair[side] for pair in LENGTHS]) for side in (0, 1))
PLACES = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 8, "max_seqlen_k": 9}


def inputs(head_dim_v=8):
    torch.manual_seed(0)
    shapes = (int(CU_Q[-1]), 4, 8), (int(CU_K[-1]), 2, 8), (int(CU_K[-1]), 2, head_dim_v)
    return [randn(*shape).requires_grad_() for shape in shapes]


def each(q, k, v, cu_q=CU_Q, cu_k=CU_K, **options):
    """(out, lse [num_heads, total]) of `attend` for each sequence, put together."""
    outs, lses = [], []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        out, lse = attend(q[None, a:b], k[None, c:d], v[None, c:d], **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def pages_of(x, cu_seqlens, page_size):
    """(pages, block_table) of packed rows, in an order that is not theirs; what no row fills is NaN."""
    counts = [-(-int(n) // page_size) for n in cu_seqlens.diff()]
    order = torch.randperm(sum(counts)).tolist()
    pages = x.new_full((sum(counts), page_size, *x.shape[1:]), torch.nan)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for i, count in enumerate(counts):
        for j in range(count):
            page = table[i, j] = order.pop()
            rows = x[cu_seqlens[i] + j * page_size : min(cu_seqlens[i] + (j + 1) * page_size, cu_seqlens[i + 1])]
            pages[page, : len(rows)] = rows
    return pages, table


@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(option):
    ours, theirs = OPTIONS[option]
    q, k, v = leaves = inputs()
    expected, lse = each(q, k, v, **theirs)
    check(flash_attn.flash_attn_varlen_func(q, k, v, **PLACES, **ours), expected, leaves)
    out, found_lse, probs = flash_attn.flash_attn_varlen_func(q, k, v, **PLACES, return_attn_probs=True, **ours)
    torch.testing.assert_close((out, found_lse), (expected, lse), rtol=0, atol=1e-12)
    assert probs.shape == (0,)
    check(fa3.flash_attn_varlen_func(q, k, v, **PLACES, **ours), expected, leaves)


def test_slopes_of_each_sequence():
    q, k, v = leaves = inputs()
    slopes = SLOPES * torch.arange(1, len(LENGTHS) + 1)[:, None]
    expected = [
        attend(q[None, a:b], k[None, c:d], v[None, c:d], slopes=slopes[i])[0][0]
        for i, (a, b, c, d) in enumerate(zip(CU_Q, CU_Q[1:], CU_K, CU_K[1:], strict=False))
    ]
    check(flash_attn.flash_attn_varlen_func(q, k, v, **PLACES, alibi_slopes=slopes), torch.cat(expected), leaves)


def test_lengths_may_be_tensors():
    """transformers passes them so."""
    q, k, v = inputs()
    places = PLACES | {"max_seqlen_q": torch.tensor(8), "max_seqlen_k": torch.tensor(9)}
    assert torch.equal(
        flash_attn.flash_attn_varlen_func(q, k, v, **places), flash_attn.flash_attn_varlen_func(q, k, v, **PLACES)
    )


def test_packed_together():
    q, kv = randn(int(CU_Q[-1]), 4, 8).requires_grad_(), randn(int(CU_K[-1]), 2, 2, 8).requires_grad_()
    expected, _ = each(q, *kv.unbind(1), causal=True)
    check(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, **PLACES, causal=True), expected, (q, kv))
    qkv = randn(int(CU_K[-1]), 3, 4, 8).requires_grad_()
    expected, _ = each(*qkv.unbind(1), CU_K, CU_K, causal=True)
    check(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU_K, 9, causal=True), expected, (qkv,))
    for packed in (qkv[:, :2], qkv[None]):
        with pytest.raises(ValueError, match=r"qkv has shape .*must be \[total, 3, num_heads, head_dim\]"):
            flash_attn.flash_attn_varlen_qkvpacked_func(packed, CU_K, 9)


@pytest.mark.parametrize("slopes", [None, SLOPES, SLOPES * torch.arange(1, len(LENGTHS) + 1)[:, None]])
def test_dropout_and_its_pattern(slopes):
    q, k, v = inputs()
    options = {"causal": True, "alibi_slopes": slopes}
    torch.manual_seed(1)
    out, lse, probs = flash_attn.flash_attn_varlen_func(
        q, k, v, **PLACES, dropout_p=0.4, return_attn_probs=True, **options
    )
    assert probs.shape == (len(LENGTHS), 4, 128, 128)
    for i, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        weights = probs[i, :, :seqlen_q, :seqlen_k].clamp(min=0.0) / 0.6
        assert not probs[i, :, seqlen_q:].any() and not probs[i, :, :, seqlen_k:].any()
        values = v[CU_K[i] : CU_K[i + 1]].repeat_interleave(2, dim=1)
        torch.testing.assert_close(
            out[CU_Q[i] : CU_Q[i + 1]], torch.einsum("hij,jhd->ihd", weights, values), rtol=0, atol=1e-12
        )
    assert (probs < 0).any()
    torch.manual_seed(1)
    assert torch.equal(out, flash_attn.flash_attn_varlen_func(q, k, v, **PLACES, dropout_p=0.4, **options))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages(page_size):
    q, k, v = (x.detach() for x in inputs())
    both, table = pages_of(torch.cat([k, v], -1), CU_K, page_size)
    pages_k, pages_v = both.split(8, dim=-1)
    expected, lse = each(q, k, v, causal=True)
    contiguous = flash_attn.flash_attn_varlen_func(q, k, v, **PLACES, causal=True)
    found = flash_attn.flash_attn_varlen_func(q, pages_k, pages_v, **PLACES, causal=True, block_table=table)
    assert torch.equal(found, contiguous)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    used = CU_K.diff()
    found, found_lse = fa4.flash_attn_varlen_func(
        q, pages_k, pages_v, cu_seqlens_q=CU_Q, seqused_k=used, page_table=table, causal=True, return_lse=True
    )
    assert torch.equal(found, contiguous)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    found, found_lse = fa3.flash_attn_with_kvcache(
        q, pages_k, pages_v, cache_seqlens=used, page_table=table, cu_seqlens_q=CU_Q, max_seqlen_q=8, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(found, contiguous)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)


def test_used_parts():
    """Of each sequence the first rows count; other queries give 0 and lse -inf."""
    q, k, v = leaves = inputs()
    used_q = torch.tensor([2, 0, 5, 3, 0, 1, 1], dtype=torch.int32)
    used_k = torch.tensor([4, 0, 1, 8, 2, 0, 9], dtype=torch.int32)
    rows_q = torch.cat([torch.arange(a, a + n) for a, n in zip(CU_Q, used_q, strict=False)])
    rows_k = torch.cat([torch.arange(a, a + n) for a, n in zip(CU_K, used_k, strict=False)])
    part, part_lse = each(
        q[rows_q], k[rows_k], v[rows_k], starts(used_q.tolist()), starts(used_k.tolist()), causal=True
    )
    expected = torch.zeros_like(q).index_copy(0, rows_q, part)
    lse = torch.full((4, len(q)), -torch.inf, dtype=torch.float64).index_copy(1, rows_q, part_lse)
    options = {**PLACES, "seqused_q": used_q, "seqused_k": used_k, "causal": True}
    out, found_lse = fa3.flash_attn_varlen_func(q, k, v, return_attn_probs=True, **options)
    check(out, expected, leaves)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    out, _ = fa4.flash_attn_varlen_func(q, k, v, **options)
    check(out, expected, leaves)
    with pytest.raises(NotImplementedError, match="attention_chunk with seqused_q=tensor"):
        fa3.flash_attn_varlen_func(q, k, v, attention_chunk=2, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks(chunk, options):
    q, k, v = leaves = inputs()
    expected, lse = each(q, k, v, chunk=chunk, **options)
    out, found_lse = fa3.flash_attn_varlen_func(
        q, k, v, **PLACES, attention_chunk=chunk, return_attn_probs=True, **options
    )
    check(out, expected, leaves)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)


def test_qv_and_sinks():
    q, k, v = inputs(head_dim_v=6)
    qv, sink = randn(len(q), 4, 6).requires_grad_(), randn(4).requires_grad_()
    both = torch.cat([q, qv], -1), torch.cat([k, v], -1), v
    expected, _ = each(*both, causal=True)
    check(fa3.flash_attn_varlen_func(q, k, v, qv=qv, **PLACES, causal=True), expected, (q, k, v, qv))
    expected, lse = each(*both, window=(2, 2), sink=sink)
    out, found_lse = fa4.flash_attn_varlen_func(q, k, v, qv, **PLACES, window_size=(2, 2), learnable_sink=sink)
    check(out, expected, (q, k, v, qv, sink))
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)


def test_fa4_without_lists_of_starts():
    q, k, v = randn(2, 5, 4, 8).requires_grad_(), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    used = torch.tensor([7, 3], dtype=torch.int32)
    parts = [attend(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], causal=True) for i, n in enumerate((7, 3))]
    expected, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    out, found_lse = fa4.flash_attn_varlen_func(q, k, v, seqused_k=used, causal=True)
    check(out, expected, (q,))
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert fa4.flash_attn_varlen_func(q, k, v, seqused_k=used, causal=True)[1] is None
    with pytest.raises(ValueError, match=r"k has shape \(7, 2, 8\); without cu_seqlens_k it must be"):
        fa4.flash_attn_varlen_func(q, k[0], v[0])


def test_starts_are_checked():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        flash_attn.flash_attn_varlen_func(q, k, v, **PLACES | {"cu_seqlens_q": CU_Q - 1})
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        flash_attn.flash_attn_varlen_func(q, k[:-1], v[:-1], **PLACES)
