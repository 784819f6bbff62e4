"""Block masks and intervals as the Triton kernels read them: with every other term, and whatever the lists hold."""

import process

process.require_runnable()

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from cases import BLOCK_SIZES, Case, inputs  # noqa: E402
from fastattn import BlockMask, Mask  # noqa: E402
from fastattn.backends import triton as gpu  # noqa: E402
from on_device import DEVICE, assert_backward, on_device, to  # noqa: E402

BLOCKS = Case(batch=2, num_heads=2, num_heads_k=1, seqlen_q=80, seqlen_k=150, head_dim=24, head_dim_v=40)
EVERYTHING = {
    "softcap": 5.0, "alibi": True, "sinks": True, "causal": True, "dropout_p": 0.2, "learned_scale": "per_head"
}  # fmt: skip


CASES = [BLOCKS._replace(mask="shared_blocks", bias=bias) for bias in ("shared", "per_head", "full", "key", "query")]
CASES += [BLOCKS._replace(mask="shared_blocks", bias="full", dtype="bfloat16")]
CASES += [BLOCKS._replace(mask="blocks", bias="per_head", seqlen_q=70)]
CASES += [
    BLOCKS._replace(mask="shared_blocks", bias="per_head", dtype=dtype, **EVERYTHING)
    for dtype in ("float32", "bfloat16", "float16")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_mask_with_a_bias(case):
    assert_backward(case)


# --- whatever the lists hold -----------------------------------------------------------------------------------------


def run(q, k, v, **kwargs) -> list[torch.Tensor]:
    """out and the gradients of everything, by the Triton kernels."""
    leaves = [x.requires_grad_() for x in (q, k, v, *kwargs.values()) if isinstance(x, torch.Tensor)]
    out = fastattn.attention(q, k, v, **kwargs, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def scramble(mask: BlockMask, generator) -> None:
    """Integers of any size in every list of `mask`, each more often than not in range."""
    for tensor in mask.tensors().values():
        if tensor.dtype == torch.int32:
            small = torch.randint(-2, 12, tensor.shape, generator=generator)
            large = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator)
            tensor.copy_(torch.where(torch.rand(tensor.shape, generator=generator) < 0.7, small, large))


@pytest.mark.skipif(not process.INTERPRETED, reason="the strict interpreter sees where a kernel reads")
@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 3))])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(150, 170), (128, 128), (20, 12)])
@pytest.mark.parametrize("mask", BLOCK_SIZES)
def test_no_list_leads_out_of_bounds(mask, seqlen_q, seqlen_k, seed):
    """The interpreter raises OutOfBounds otherwise."""
    generator = torch.Generator().manual_seed(seed)
    case = Case(batch=1, num_heads=2, num_heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16, mask=mask)
    (q, k, v), kwargs = inputs(case._replace(bias="shared" if seed % 3 == 2 else None, causal=seed % 2 == 1), seed)
    for blocks in (kwargs["mask"], kwargs["mask"].transpose()):
        scramble(blocks, generator)
    results = run(q, k, v, **kwargs)
    assert all(x.shape == y.shape for x, y in zip(results[1:], (q, k, v), strict=False))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3))])
@pytest.mark.parametrize("mask", BLOCK_SIZES)
def test_no_list_leads_decoding_out_of_bounds(mask, seed, monkeypatch):
    """Nor on a device, which may notice only what leads far out."""
    monkeypatch.setenv("FASTATTN_SELFCHECK", "0")  # such lists mean nothing that could be compared
    case = Case(num_heads=2, num_heads_k=1, seqlen_q=5, seqlen_k=600, head_dim=16, mask=mask, causal=seed % 2 == 1)
    (q, k, v), kwargs = on_device(case)
    scramble(kwargs["mask"], torch.Generator().manual_seed(seed))
    fastattn.attention(q, k, v, **kwargs, backend="triton")
    assert fastattn.last_call().kernel == "triton.decode"


@pytest.mark.parametrize("seqlen_q", [5, 70])
def test_intervals_of_any_integers(seqlen_q):
    """They mean what they say: k_start <= key < k_end, and there are no other keys than those that there are."""
    generator = torch.Generator().manual_seed(0)
    (q, k, v), _ = on_device(Case(batch=2, num_heads=2, seqlen_q=seqlen_q, seqlen_k=90, head_dim=16))
    ends = torch.tensor([-(2**31), -1, 0, 1, 45, 89, 90, 91, 2**31 - 1])
    k_start, k_end = (ends[torch.randint(len(ends), (2, 2, seqlen_q), generator=generator)].int() for _ in range(2))
    mask = to(DEVICE, Mask.intervals(k_start, k_end))
    results = run(q, k, v, mask=mask)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    expected = fastattn.attention(q, k, v, mask=mask, backend="reference")
    grads = torch.autograd.grad(expected, (q, k, v), torch.ones_like(expected))
    for x, y in zip(results, (expected, *grads), strict=True):
        torch.testing.assert_close(x, y)


# --- FASTATTN_CHECK=1 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, text", [
    ("kv_indices", 99, r"kv_indices\[.*\] is 99; it must be in 0 ... "),
    ("full_kv_indices", -1, r"full_kv_indices\[.*\] is -1; it must be in 0 ... "),
    ("kv_num_blocks", 1000, r"kv_num_blocks\[.*\] is 1000; it must be in 0 ... "),
    ("kv_bitmaps", -7, r"kv_bitmaps\[.*\] is -7; it must be in 0 ... "),
])  # fmt: skip
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_check_finds_what_was_changed(direction, name, value, text, monkeypatch):
    (q, k, v), kwargs = on_device(BLOCKS._replace(mask="blocks"))
    changed = kwargs["mask"] if direction == "forward" else kwargs["mask"].transpose()
    out = fastattn.attention(q.requires_grad_(), k, v, **kwargs, backend="triton")
    getattr(changed, name).fill_(value)
    monkeypatch.setattr(gpu, "CHECK", True)
    with pytest.raises(ValueError, match=text):
        if direction == "forward":
            fastattn.attention(q, k, v, **kwargs, backend="triton")
        else:
            torch.autograd.grad(out.sum(), q)
