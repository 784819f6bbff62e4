"""The two functions that fastattn registers with transformers: masks that are as plain as can be, and attention."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import Mask, record, reference

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers.generation.continuous_batching import PagedAttentionCache  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402

integration.register()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")

BATCH = 2


# The mask function

PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "full": masking_utils.bidirectional_mask_function,
    **{f"window{w}": masking_utils.sliding_window_causal_mask_function(w) for w in (1, 3, 8)},
    **{f"two_sided{w}": masking_utils.sliding_window_bidirectional_mask_function(w) for w in (1, 3, 8)},
}
PADDINGS = ("none", "all", "right", "left", "both", "short", "gaps")


def tokens(padding, length, generator):
    """Bool [BATCH, length] or None; "short" leaves out the last keys, "gaps" has holes."""
    if padding == "none":
        return None
    keep = torch.ones(BATCH, max(length - 2, 1) if padding == "short" else length, dtype=torch.bool)
    if padding == "gaps":
        return torch.rand(keep.shape, generator=generator) < 0.6
    position = torch.arange(keep.shape[1])
    start, end = torch.randint(0, length + 1, (2, BATCH, 1), generator=generator)
    if padding in ("left", "both"):
        keep &= position >= start
    if padding in ("right", "both"):
        keep &= position < end
    return keep


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_equal_sdpa_mask(pattern):
    generator = torch.Generator().manual_seed(0)
    sizes = itertools.product((1, 4, 7), (1, 4, 7, 9), (0, 2, 6), (0, 1, 5), PADDINGS)
    for q_length, kv_length, q_offset, kv_offset, padding in sizes:
        arguments = {
            "batch_size": BATCH,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": PATTERNS[pattern],
            "attention_mask": tokens(padding, kv_length + kv_offset, generator),
        }
        expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        mask = integration.make_mask(**arguments, allow_is_causal_skip=False)
        assert isinstance(mask, integration.IntervalMask) or padding == "gaps"
        assert torch.equal(mask & True, expected), arguments

        mask = integration.make_mask(**arguments, allow_is_bidirectional_skip=True)
        if mask is None:  # then attention_forward must do the same by itself
            is_causal = q_length > 1 and pattern != "full" and not pattern.startswith("two_sided")
            alone = (Mask.causal() if is_causal else Mask()).to_dense(q_length, kv_length)
            assert torch.equal(alone.expand(expected.shape), expected), arguments


def test_masks_are_as_plain_as_can_be():
    def make(q_length=8, kv_length=8, padding=None, window=None, **kwargs):
        function = masking_utils.causal_mask_function
        function = masking_utils.sliding_window_causal_mask_function(window) if window else function
        return integration.make_mask(
            BATCH, q_length, kv_length, mask_function=function, attention_mask=padding, **kwargs
        )

    everyone, right = torch.ones(BATCH, 8, dtype=torch.bool), torch.arange(8) < torch.tensor([[8], [5]])
    assert make() is make(padding=everyone) is make(window=8) is make(1, 8, q_offset=7) is None
    assert make(4, 12).value.windows == Mask.causal("top_left").windows  # prefill of a static cache
    padded = torch.nn.functional.pad(everyone[:, :4], (0, 8))
    assert make(4, 12, padded).value.k_end is None  # causal already hides the keys to come
    assert make(4, 12, q_offset=8).value.windows == Mask.causal().windows  # the next chunk with a growing cache
    assert make(window=3).value.windows == Mask.window(2, 0).windows
    assert make(padding=right).value.k_start is None and make(padding=right).value.k_end.shape == (BATCH, 1, 1)
    assert make(padding=right.flip(1)).value.k_end is None
    assert make(1, 3, q_offset=9, kv_offset=7, window=3) is None  # a full sliding cache
    assert make(allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is not None
    full = masking_utils.bidirectional_mask_function
    assert integration.make_mask(BATCH, 8, 8, mask_function=full) is not None
    assert integration.make_mask(BATCH, 8, 8, mask_function=full, allow_is_bidirectional_skip=True) is None
    assert make(1, 12, q_offset=torch.tensor(5)).value.to_dense(1, 12).sum() == 6  # decoding with a static cache


def test_other_patterns_become_bool_tensors():
    causal = masking_utils.causal_mask_function
    for function in (
        masking_utils.and_masks(causal, lambda b, h, q, k: k != 2),
        masking_utils.add_offsets_to_mask_function(causal, 1, 0),
        lambda b, h, q, k: k <= q + 1,
        masking_utils.sliding_window_causal_mask_function(torch.tensor(3)),
        masking_utils.sliding_window_causal_mask_function(0),
    ):
        arguments = {"batch_size": BATCH, "q_length": 8, "kv_length": 8, "mask_function": function}
        mask = integration.make_mask(**arguments, allow_is_causal_skip=False)
        assert type(mask) is torch.Tensor
        assert torch.equal(mask, masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))
    more_rows = torch.ones(BATCH + 1, 8, dtype=torch.bool)
    more_rows[1:, 5:] = False
    mask = integration.make_mask(BATCH, 8, 8, attention_mask=more_rows)
    assert torch.equal(mask, masking_utils.sdpa_mask(BATCH, 8, 8, attention_mask=more_rows))


def test_interval_mask_is_a_tensor_to_models():
    def make():
        return integration.make_mask(BATCH, 4, 6, q_offset=2)

    expected = make() & True
    assert type(expected) is torch.Tensor and expected.shape == (BATCH, 1, 4, 6) and not expected.all()
    mask = make()
    assert isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == expected.shape
    assert mask.contiguous() is mask and mask.to("cpu") is mask and "IntervalMask" in repr(mask)
    assert isinstance(mask.value, Mask)  # nothing so far has formed the tensor
    assert torch.equal(mask[:, :, -2:, :], expected[:, :, -2:, :])
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([expected, expected], dim=-1))
    mask[:, :, :, 0] = False
    mask.logical_and_(torch.arange(6) != 1)
    assert torch.equal(mask.value, expected & (torch.arange(6) > 1))
    out, _ = forward(attention_mask=mask, seqlen_q=4, seqlen_k=6)
    torch.testing.assert_close(out, oracle(mask.value, seqlen_q=4, seqlen_k=6))


# The attention function


def states(seqlen_q=6, seqlen_k=6, batch=BATCH, batch_k=None, num_heads=4, num_heads_k=2, head_dim=8, head_dim_v=12):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys = batch_k or batch, num_heads_k, seqlen_k
    return normal(batch, num_heads, seqlen_q, head_dim), normal(*keys, head_dim), normal(*keys, head_dim_v)


def forward(attention_mask=None, module=None, qkv=None, seqlen_q=6, seqlen_k=6, **kwargs):
    module = module or torch.nn.Module()
    q, k, v = qkv or states(seqlen_q, seqlen_k)
    out, weights = integration.attention_forward(module, q, k, v, attention_mask, **kwargs)
    assert weights is None and out.is_contiguous()
    assert out.shape == (max(len(q), len(k)), q.shape[2], q.shape[1], v.shape[3])
    return out, weights


def oracle(visible, qkv=None, seqlen_q=6, seqlen_k=6, **kwargs):
    out, _ = reference.attention(*(qkv or states(seqlen_q, seqlen_k)), visible=visible, **kwargs)
    return out.transpose(1, 2)


CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
POSITIONS = torch.arange(6)[None, :] - torch.arange(6)[:, None]


def test_causal_comes_from_the_keyword_then_the_module_then_the_mask():
    module = torch.nn.Module()
    torch.testing.assert_close(forward(module=module)[0], oracle(CAUSAL))  # a module that says nothing is causal
    torch.testing.assert_close(forward(module=module, is_causal=False)[0], oracle(None))
    module.is_causal = False
    torch.testing.assert_close(forward(module=module)[0], oracle(None))
    torch.testing.assert_close(forward(module=module, is_causal=True)[0], oracle(CAUSAL))
    visible = torch.rand(BATCH, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    torch.testing.assert_close(forward(visible, is_causal=True, sliding_window=2)[0], oracle(visible))
    torch.testing.assert_close(
        forward(Mask.window(2, 1), is_causal=True)[0], oracle((POSITIONS >= -2) & (POSITIONS <= 1))
    )
    torch.testing.assert_close(forward(seqlen_q=1)[0], oracle(None, seqlen_q=1))
    assert fastattn.last_call().problem.mask == "none"
    last = CAUSAL[-2:]  # a model that keeps its last two queries: they see all earlier keys
    torch.testing.assert_close(forward(seqlen_q=2)[0], oracle(last, seqlen_q=2))


def test_sliding_window_without_a_mask():
    for window in (3, 5):
        torch.testing.assert_close(forward(sliding_window=window)[0], oracle(CAUSAL & (POSITIONS > -window)))
        torch.testing.assert_close(forward(sliding_window=window, is_causal=False)[0], oracle(POSITIONS.abs() < window))
    with record() as calls:
        forward(sliding_window=6)
    assert calls[0].problem.mask == "causal"  # a window that binds nothing costs nothing


def test_score_modifications():
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 4, 6, 6, generator=generator)
    sinks = torch.randn(4, generator=generator)
    additive = torch.randn(BATCH, 1, 6, 6, generator=generator)
    visible = torch.rand(BATCH, 1, 6, 6, generator=generator) < 0.7
    torch.testing.assert_close(forward(scaling=0.7)[0], oracle(CAUSAL, softmax_scale=0.7))
    torch.testing.assert_close(forward(softcap=1.5, s_aux=sinks)[0], oracle(CAUSAL, softcap=1.5, sinks=sinks))
    torch.testing.assert_close(forward(position_bias=bias)[0], oracle(CAUSAL, bias=bias))
    torch.testing.assert_close(forward(visible, position_bias=bias)[0], oracle(visible, bias=bias))
    torch.testing.assert_close(forward(additive)[0], oracle(None, bias=additive))
    torch.testing.assert_close(forward(additive, position_bias=bias)[0], oracle(None, bias=additive + bias))
    minimum = torch.zeros(1, 1, 6, 6).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)  # eager's way to mask
    torch.testing.assert_close(forward(minimum)[0], oracle(CAUSAL))
    assert not torch.equal(forward(dropout=0.5)[0], forward()[0])


def test_weights_and_head_masks():
    module, (q, k, v) = torch.nn.Module(), states()
    factors = torch.tensor([1.0, 0.0, 0.5, 2.0])
    expected = torch.softmax((q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~CAUSAL, -torch.inf), -1)
    for head_mask in (factors, factors.view(1, 4, 1, 1), torch.stack([factors, 1 - factors]).view(2, 4, 1, 1)):
        of_heads = factors.view(1, 4, 1, 1) if head_mask.dim() == 1 else head_mask
        out, weights = integration.attention_forward(module, q, k, v, None, output_attentions=True, head_mask=head_mask)
        torch.testing.assert_close(weights, expected * of_heads)
        torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2))
        torch.testing.assert_close(forward(head_mask=head_mask)[0], out)


def test_batches_and_dtypes():
    learned = states(batch=1, batch_k=BATCH)
    expected = oracle(None, (learned[0].expand(BATCH, -1, -1, -1), *learned[1:]))
    torch.testing.assert_close(forward(qkv=learned, is_causal=False)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = states()
        out, _ = forward(qkv=(q, k.bfloat16(), v.bfloat16()))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), oracle(CAUSAL), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"sliding_window": 2}])
def test_packed_keywords_keep_sequences_apart(options):
    q, k, v = states(9, 11, batch=1)
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 4, 11])
    out, _ = forward(qkv=(q, k, v), cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, max_length_q=5, max_length_k=7, **options)
    parts = [
        forward(qkv=(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]), **options)[0]
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 9"):
        forward(qkv=states(9, 9), cu_seq_lens_q=cu_q)


def test_a_paged_cache_is_updated_first(monkeypatch):
    def update(self, key_states, value_states, layer_idx, kwargs):
        kwargs["cu_seq_lens_k"] = torch.tensor([0, 6])
        return key_states * 2, value_states * layer_idx

    monkeypatch.setattr(PagedAttentionCache, "update", update)
    module = torch.nn.Module()
    module.layer_idx = 3
    q, k, v = states(batch=1)
    paged = {"cache": object.__new__(PagedAttentionCache), "cu_seq_lens_q": torch.tensor([0, 6]), "read_index": [0]}
    out, _ = forward(module=module, qkv=(q, k, v), **paged)
    torch.testing.assert_close(out, oracle(CAUSAL, (q, 2 * k, 3 * v)))
    with pytest.raises(NotImplementedError, match="block_table"):
        forward(module=module, qkv=(q, k, v), block_table=torch.zeros(1), **paged)
    with pytest.raises(NotImplementedError, match="cache is a SimpleNamespace"):
        forward(cache=SimpleNamespace())


def test_what_would_be_lost_is_refused():
    assert torch.equal(forward(indices=None, output_attentions=False, position_ids=POSITIONS)[0], forward()[0])
    for name, value, hint in (
        ("indices", torch.zeros(1), "sparse"),
        ("sinks", torch.zeros(1), "eager"),
        ("head_mask", torch.zeros(4, 6), "eager"),
        ("something_new", 1, "IGNORED_KWARGS"),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}.*{hint}"):
            forward(**{name: value})
    for mask, error, text_ in (
        (torch.ones(BATCH, 6, dtype=torch.bool), ValueError, "four dimensions"),
        (torch.ones(1, 1, 6, 6, dtype=torch.int64), TypeError, "dtype torch.int64"),
        (SimpleNamespace(), TypeError, "SimpleNamespace"),
    ):
        with pytest.raises(error, match=text_):
            forward(mask)
