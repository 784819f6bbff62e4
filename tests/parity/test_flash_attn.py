"""flash-attn's functions, against their formulas in float64 (tests/support/flash.py)."""

import inspect
import math

import pytest
import torch

import fastattn
from fastattn.compat import flash_attn
from fastattn.compat.flash_attn import fa3, fa4
from flash import attend, check, randn

SIZES = {"square": (7, 7), "decode": (1, 9), "more keys": (4, 9), "more queries": (9, 4)}
OPTIONS = {  # flash-attn's argument, and the same in words of `attend`
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "left window": ({"window_size": (2, -1)}, {"window": (2, None)}),
    "right window": ({"window_size": (-1, 1)}, {"window": (None, 1)}),
    "causal window": ({"causal": True, "window_size": (2, 5)}, {"causal": True, "window": (2, 0)}),
    "scale": ({"softmax_scale": 0.7}, {"scale": 0.7}),
    "softcap": ({"softcap": 0.8}, {"softcap": 0.8}),
}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0])


def inputs(sizes, dtype=torch.float64, head_dim_v=8):
    """q, k, v of 2 x 4 heads on 2."""
    torch.manual_seed(0)
    seqlen_q, seqlen_k = sizes
    shapes = (2, seqlen_q, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, head_dim_v)
    return [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("option", OPTIONS)
def test_dense(option, sizes):
    ours, theirs = OPTIONS[option]
    q, k, v = leaves = inputs(sizes)
    expected, lse = attend(q, k, v, **theirs)
    check(flash_attn.flash_attn_func(q, k, v, **ours), expected, leaves)
    out, found_lse, probs = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **ours)
    torch.testing.assert_close((out, found_lse), (expected, lse), rtol=0, atol=1e-12)
    assert probs.shape == (0,)
    check(fa3.flash_attn_func(q, k, v, **ours), expected, leaves)
    if "left" not in option and "right" not in option:
        found, none = fa4.flash_attn_func(*(x.detach() for x in leaves), **ours)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert none is None


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_packed_together(sizes):
    seqlen_q, seqlen_k = sizes
    options = {"causal": True, "softcap": 2.0, "alibi_slopes": SLOPES}
    formula = {"causal": True, "softcap": 2.0, "slopes": SLOPES}
    q, kv = randn(2, seqlen_q, 4, 8).requires_grad_(), randn(2, seqlen_k, 2, 2, 8).requires_grad_()
    expected, _ = attend(q, *kv.unbind(2), **formula)
    check(flash_attn.flash_attn_kvpacked_func(q, kv, **options), expected, (q, kv))
    qkv = randn(2, seqlen_k, 3, 4, 8).requires_grad_()
    expected, _ = attend(*qkv.unbind(2), **formula)
    check(flash_attn.flash_attn_qkvpacked_func(qkv, **options), expected, (qkv,))
    del options["alibi_slopes"], formula["slopes"]
    expected, lse = attend(*qkv.unbind(2), **formula)
    check(fa3.flash_attn_qkvpacked_func(qkv, **options), expected, (qkv,))
    qkv = randn(2, seqlen_k, 8, 8).requires_grad_()
    expected, lse = attend(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], **formula)
    found, found_lse = fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=4, return_attn_probs=True, **options)
    check(found, expected, (qkv,))
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)


# --- the rules, one by one -------------------------------------------------------------------------------------------


def test_causal_is_bottom_right():
    q, k, _ = inputs((2, 5))
    v = torch.eye(5, dtype=torch.float64)[None, :, None].expand(2, 5, 2, 5)
    seen = flash_attn.flash_attn_func(q, k, v, causal=True) > 0
    assert seen[0, :, 0].tolist() == [[True, True, True, True, False], [True, True, True, True, True]]


def test_rows_without_keys():
    """0, and an lse of -inf; a sink alone has its own logit as lse."""
    q, k, v = leaves = inputs((5, 2))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all() and lse[:, :, 3:].isfinite().all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (grads[0][:, :3] == 0).all() and all(grad.isfinite().all() for grad in grads)
    sink = randn(4)
    out, lse = fa4.flash_attn_func(q, k, v, causal=True, learnable_sink=sink)
    assert (out[:, :3] == 0).all() and torch.equal(lse[:, :, :3], sink[None, :, None].expand(2, 4, 3))


def test_softcap_comes_before_alibi():
    q, k, v = leaves = inputs((4, 9))
    q, k = 3 * q, 3 * k
    options = {"softcap": 0.5, "alibi_slopes": SLOPES}
    expected, lse = attend(q, k, v, softcap=0.5, slopes=SLOPES)
    out, found_lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check(out, expected, leaves)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    per_sequence = SLOPES * torch.tensor([[1.0], [2.0]])
    expected, _ = attend(q, k, v, slopes=per_sequence)
    check(flash_attn.flash_attn_func(q, k, v, alibi_slopes=per_sequence), expected, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_results(dtype):
    q, k, v = inputs((4, 6), dtype)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.dtype == probs.dtype == dtype and out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == (2, 4, 4)
    expected, _ = attend(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=10 * torch.finfo(dtype).eps)


def test_lse_has_a_gradient():
    """Where flash-attn's own is silently 0."""
    q, k, v = inputs((4, 6))
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    expected = torch.autograd.grad(attend(q, k, v)[1].sum(), (q, k))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), (q, k)), expected, rtol=0, atol=1e-12)


def test_dropout_and_its_pattern():
    """S_dmask holds the weights, negative where dropped: with it the output can be computed again."""
    q, k, v = inputs((5, 7))
    torch.manual_seed(1)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert probs.shape == (2, 4, 128, 128) and (probs[:, :, 5:] == 0).all() and (probs[..., 7:] == 0).all()
    weights = probs[:, :, :5, :7]
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert 0.2 < (weights < 0).double().sum() / (weights != 0).double().sum() < 0.6
    kept = weights.clamp(min=0.0) / 0.6
    expected = torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, 0.4, causal=True, deterministic=True))


def test_any_strides():
    """Halves of one projection, and heads before positions."""
    qkv = randn(2, 7, 3, 4, 8)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2))
    expected = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, causal=True), expected)
    torch.testing.assert_close(expected, attend(q, k, v, causal=True)[0], rtol=0, atol=1e-12)


# --- FlashAttention-3 and -4 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_chunks(sizes, causal):
    q, k, v = leaves = inputs(sizes)
    for chunk in (1, 3, 4, 100):
        expected, _ = attend(q, k, v, causal=causal, chunk=chunk)
        check(fa3.flash_attn_func(q, k, v, causal=causal, attention_chunk=chunk), expected, leaves)
    expected, _ = attend(q, k, v, window=(1, 1), chunk=3)
    check(fa3.flash_attn_func(q, k, v, window_size=(1, 1), attention_chunk=3), expected, leaves)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_qv(scale):
    q, k, v = inputs((5, 7), head_dim_v=6)
    qv = randn(2, 5, 4, 6).requires_grad_()
    leaves = (q, k, v, qv)
    expected, lse = attend(torch.cat([q, qv], -1), torch.cat([k, v], -1), v, causal=True, scale=scale)
    assert scale or expected.shape[-1] + q.shape[-1] == 14  # the default counts both
    check(fa3.flash_attn_func(q, k, v, qv=qv, causal=True, softmax_scale=scale), expected, leaves)
    out, found_lse = fa4.flash_attn_func(q, k, v, qv, causal=True, softmax_scale=scale)
    check(out, expected, leaves)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)


def test_sinks_and_the_pair_that_fa4_returns():
    q, k, v = inputs((5, 7))
    sink = randn(4).requires_grad_()
    expected, lse = attend(q, k, v, window=(3, 0), sink=sink)
    out, found_lse = fa4.flash_attn_func(q, k, v, window_size=(3, None), causal=True, learnable_sink=sink)
    check(out, expected, (q, k, v, sink))
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert fa4.flash_attn_func(q, k, v)[1] is None
        assert fa4.flash_attn_func(q, k, v, return_lse=True)[1].shape == (2, 4, 5)
        assert fa4.flash_attn_func(q, k, v, window_size=(-1, -1), return_lse=True)[1].shape == (2, 4, 5)


def test_combine():
    q, k, v = leaves = inputs((5, 9))
    parts = [fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in ((0, 4), (4, 7), (7, 9))]
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse.transpose(1, 2) for _, lse in parts])
    expected, lse = attend(q, k, v)
    out, found_lse = fa3.flash_attn_combine(outs, lses)
    check(out, expected, leaves)
    torch.testing.assert_close(found_lse, lse.transpose(1, 2), rtol=0, atol=1e-12)
    into = torch.empty_like(out, dtype=torch.float32)
    out, _ = fa3.flash_attn_combine(outs[:, 0], lses[:, 0], into[0], torch.float32)
    assert out.data_ptr() == into.data_ptr()
    torch.testing.assert_close(into[0].double(), expected[0], rtol=0, atol=1e-6)


# --- signatures and refusals -----------------------------------------------------------------------------------------

SIGNATURES = {
    flash_attn.flash_attn_func: "(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    flash_attn.flash_attn_qkvpacked_func: "(qkv, dropout_p=0.0, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    flash_attn.flash_attn_kvpacked_func: "(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    flash_attn.flash_attn_varlen_func: "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None)",
    flash_attn.flash_attn_varlen_qkvpacked_func: "(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False)",
    flash_attn.flash_attn_varlen_kvpacked_func: "(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False)",
    flash_attn.flash_attn_with_kvcache: "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False)",
    fa3.flash_attn_varlen_func: "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
    "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False)",
    fa3.flash_attn_with_kvcache: "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
    "return_softmax_lse=False)",
    fa4.flash_attn_varlen_func: "(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
    "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
    "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
    "gather_bwd_token_chunk=None)",
    fa3.flash_attn_func: "(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False)",
    fa3.flash_attn_qkvpacked_func: "(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, "
    "sm_margin=0, return_attn_probs=False)",
    fa3.flash_attn_combine: "(out_partial, lse_partial, out=None, out_dtype=None)",
    fa4.flash_attn_func: "(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
    "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, "
    "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, "
    "gather_bwd_token_chunk=None)",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}")
def test_signature(function):
    assert str(inspect.signature(function)) == SIGNATURES[function]


Q, K, V = (torch.zeros(2, 5, 4, 8) for _ in range(3))
FA2, FA3, FA4 = flash_attn.flash_attn_func, fa3.flash_attn_func, fa4.flash_attn_func
REFUSALS = {
    "list": (FA2, (Q, [1.0], V), {}, "k must be a torch.Tensor, got list"),
    "rank": (FA2, (Q[0], K, V), {}, r"q has shape \(5, 4, 8\); it must be \[batch, seqlen, num_heads, head_dim\]"),
    "batch": (FA2, (Q, K[:1], V[:1]), {}, "k has batch 1 .*, q 2; they must agree"),
    "columns": (FA2, (Q, K[..., :7], V), {}, "k has head_dim 7 .*, q 8"),
    "lengths": (FA2, (Q, K, V[:, :4]), {}, r"v has shape \(2, 4, 4, 8\), k \(2, 5, 4, 8\)"),
    "heads": (FA2, (Q, K[:, :, :3], V[:, :, :3]), {}, "q has 4 heads and k 3 .*must be a multiple"),
    "no heads": (FA2, (Q, K[:, :, :0], V[:, :, :0]), {}, "q has 4 heads and k 0"),
    "window": (FA2, (Q, K, V), {"window_size": 3}, "window_size=3 must be a pair"),
    "window of floats": (FA2, (Q, K, V), {"window_size": (1.5, 0)}, "left must be an int"),
    "dropout": (FA2, (Q, K, V), {"dropout_p": 1.5}, "dropout_p=1.5 must be in"),
    "causal": (FA2, (Q, K, V), {"causal": "yes"}, "causal='yes' must be True or False"),
    "slopes": (FA2, (Q, K, V), {"alibi_slopes": torch.zeros(3)}, r"alibi_slopes has shape \(3,\)"),
    "dtypes": (FA2, (Q, K.double(), V), {}, "they must agree"),
    "unknown": (FA2, (Q, K, V), {"attn_mask": None}, "attn_mask"),
    "qkv": (flash_attn.flash_attn_qkvpacked_func, (Q,), {}, r"qkv has shape .*\[batch, seqlen, 3, num_heads, head_dim"),
    "kv": (flash_attn.flash_attn_kvpacked_func, (Q, K), {}, r"kv has shape .*\[batch, seqlen, 2, num_heads, head_dim"),
    "3-D num_heads_q": (fa3.flash_attn_qkvpacked_func, (Q[0, 0],), {"num_heads_q": 1}, "with num_heads_q=1 it must"),
    "num_heads_q": (fa3.flash_attn_qkvpacked_func, (Q,), {"num_heads_q": 1}, "with num_heads_q=1 it must be"),
    "chunk": (FA3, (Q, K, V), {"attention_chunk": -1}, "attention_chunk=-1 must be >= 1"),
    "qkv of FA3": (fa3.flash_attn_qkvpacked_func, ([1.0],), {"num_heads_q": 1}, "qkv must be a torch.Tensor, got list"),
    "q beside qv": (FA3, ([1.0], K, V), {"qv": Q}, "q must be a torch.Tensor, got list"),
    "q of FA4": (FA4, ([1.0], K, V), {}, "q must be a torch.Tensor, got list"),
    "qv": (FA3, (Q, K, V), {"qv": Q[..., :7]}, r"qv has shape \(2, 5, 4, 7\); it must be \(2, 5, 4, 8\)"),
    "ambiguous window": (FA4, (Q, K, V), {"window_size": (3, -1)}, r"window_size=\(3, -1\): a side must be >= 0"),
    **{name: (FA3, (Q, K, V), {name: torch.ones(1)}, f"{name}=tensor.*is not supported: fp8")
       for name in ("q_descale", "k_descale", "v_descale")},
    **{name: (FA4, (Q, K, V), {name: torch.ones(1)}, f"{name}=tensor.*is not supported: .*")
       for name in ("gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars",
                    "block_sparse_tensors", "block_sparse_tensors_bwd")},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    function, args, kwargs, pattern = REFUSALS[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=pattern) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_runs_on_the_kernels_of_attention():
    q, k, v = (torch.randn(1, 64, 4, 16) for _ in range(3))
    flash_attn.flash_attn_func(q, k, v, causal=True)
    ran = fastattn.last_call()
    fastattn.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    assert fastattn.last_call() == ran
