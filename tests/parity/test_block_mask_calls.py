"""BlockMask where it is used: lists of FlexAttention and back, and calls of attention."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from blocky_masks import SIZE, assert_same_tensors, blocky_dense, check, of, random_dense
from fastattn import BlockMask, Mask, attention, explain, plans, record
from fastattn.masks import blocks as block_sets

# --- FlexAttention ---------------------------------------------------------------------------------------------------


def flex_masks():
    table = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    return {
        "causal": lambda b, h, i, j: i >= j,
        "window": flex.and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: i - j <= 37),
        "per head": lambda b, h, i, j: (i - j).abs() <= 20 * (h + 1) + 30 * b,
        "table": lambda b, h, i, j: table[b, h, i // 128, j // 128] | (i == j),
        "noop": flex.noop_mask,
    }


@pytest.mark.parametrize("kind", flex_masks())
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(256, 256), (300, 333)])
def test_flex_attention_lists_agree(kind, seqlen_q, seqlen_k):
    mask_mod = flex_masks()[kind]
    theirs = flex.create_block_mask(mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu")
    ours = BlockMask.from_mask_mod(mask_mod, batch=2, num_heads=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    dense = flex.create_mask(mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu")
    check(ours, dense)
    assert_same_tensors(BlockMask.from_flex(theirs), ours)
    back = ours.to_flex()
    assert_same_tensors(BlockMask.from_flex(back), ours)
    assert_same_tensors(BlockMask.from_flex(ours.to_flex(mask_mod)), ours)
    assert torch.equal(flex.create_mask(back.mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu"), dense)
    assert back.shape == theirs.shape
    if (seqlen_q, seqlen_k) == (256, 256):  # at an edge, torch calls a block partial that we call full
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(back, name), getattr(theirs, name)), name
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(theirs, f"{name}_num_blocks")
            listed = block_sets.listed(counts, getattr(theirs, f"{name}_indices"))
            mine = block_sets.listed(counts, getattr(ours, f"{name}_indices"))
            assert torch.equal(getattr(ours, f"{name}_indices")[mine], getattr(theirs, f"{name}_indices")[listed])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(one_thread):
    q, k, v = torch.randn(3, 2, 3, 200, 16).unbind(0)
    ours = BlockMask.from_dense(blocky_dense(5, shape=(2, 3, 200, 200)) | torch.eye(200, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ours.to_dense())
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=ours.to_flex()), expected)


def test_flex_attention_without_full_blocks_and_with_one_batch():
    theirs = flex.BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32),
        BLOCK_SIZE=64,
        mask_mod=lambda b, h, i, j: j <= i,
    )
    check(BlockMask.from_flex(theirs), Mask.causal().to_dense(128, 128))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_flex_attention_computes_the_same(one_thread):
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    q, k, v = torch.randn(3, 2, 3, 200, 16).unbind(0)
    ours = BlockMask.from_dense(blocky_dense(5, shape=(2, 3, 200, 200)) | torch.eye(200, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ours.to_dense())
    torch.testing.assert_close(compiled(q, k, v, block_mask=ours.to_flex()), expected)


# --- attention -------------------------------------------------------------------------------------------------------


def states(batch=2, num_heads=6, num_heads_k=3, seqlen_q=50, seqlen_k=70, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, num_heads, seqlen_q, 16), (batch, num_heads_k, seqlen_k, 16), (batch, num_heads_k, seqlen_k, 24)
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


def results_and_gradients(qkv, **kwargs):
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, lse = attention(*qkv, return_lse=True, **kwargs)
    seen = lse != -torch.inf
    (out.sin().sum() + lse[seen].cos().sum()).backward()
    return out, lse, *(x.grad for x in qkv)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 6), (2, 6)])
@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window_size": (9, 3)}], ids=str)
def test_attention_takes_it_as_the_same_bool_tensor(shape, limits):
    """Every kernel that takes block masks, against the reference on the dense mask, in float64."""
    dense = blocky_dense(11, shape=(*shape, 50, 70))
    dense[:, :, 7] = False  # a row that sees nothing
    mask, qkv = BlockMask.from_dense(dense, block_size=SIZE), states(dtype=torch.float64)
    expected = results_and_gradients(qkv, mask=dense, backend="reference", **limits)
    for actual in (
        results_and_gradients(qkv, mask=mask, **limits),
        results_and_gradients(qkv, mask=mask.to_flex(), **limits),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_plans_depend_on_shapes_and_not_on_contents():
    plans.forget()
    qkv = states()
    for seed in range(3):
        attention(*qkv, mask=BlockMask.from_dense(blocky_dense(seed, shape=(2, 1, 50, 70)), block_size=16))
    assert plans.count() == 1
    attention(*qkv, mask=BlockMask.from_dense(blocky_dense(0, shape=(2, 1, 50, 70)), block_size=32))
    attention(*qkv, mask=BlockMask.from_dense(blocky_dense(0, shape=(1, 1, 50, 70)), block_size=16))
    assert plans.count() == 3


def test_flex_masks_are_converted_once(monkeypatch):
    theirs, calls = of(blocky_dense(0, shape=(1, 1, 50, 70))).to_flex(), []
    convert = BlockMask.from_flex
    monkeypatch.setattr(BlockMask, "from_flex", lambda mask: calls.append(mask) or convert(mask))
    for _ in range(3):
        attention(*states(), mask=theirs)
    assert len(calls) == 1


def test_explain_and_record():
    mask = of(blocky_dense(0, shape=(1, 6, 50, 70)))
    text = explain(*states(), mask=mask)
    assert text.splitlines()[0].endswith(" block") and text.count("runs") == 1
    with record() as calls:
        attention(*states(), mask=mask, causal=True)
    assert calls[0].problem.mask == "block"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 50, 71), r"BlockMask of shape \(1, 1, 50, 71\); it must be .* here \(2, 6, 50, 70\)"),
        ((1, 1, 1, 70), r"BlockMask of shape \(1, 1, 1, 70\)"),
        ((1, 3, 50, 70), r"BlockMask of shape \(1, 3, 50, 70\)"),
        ((3, 1, 50, 70), r"BlockMask of shape \(3, 1, 50, 70\)"),
    ],
)
def test_attention_refuses_a_mask_of_other_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        attention(*states(), mask=of(random_dense(*shape)))
