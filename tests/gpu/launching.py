"""Calls whose launches are prepared without a device."""

import torch

import fastattn
from fastattn import BlockMask, Mask
from kernel_report import without_device

BLOCKS, SMALL_BLOCKS = (
    without_device(BlockMask.from_mask(Mask.causal(), seqlen_q=256, block_size=size)) for size in (128, 64)
)


def empty(*shape, dtype=torch.bfloat16, offset=0, layout="bhsd", backward=False) -> torch.Tensor:
    """A tensor [batch, heads, seqlen, head_dim] on no device, `offset` elements after an aligned address."""
    b, h, s, d = shape
    size = b * h * s * d
    x = torch.empty(size + offset, dtype=dtype, device="meta")[offset:]
    x = x.view(b, s, h, d).transpose(1, 2) if layout == "bshd" else x.view(shape)
    return x.requires_grad_(backward)


def call(seqlen_q=256, seqlen_k=256, head_dim=64, group=2, backward=False, kv=None, kwargs=None, **options) -> None:
    """One call of attention: kv are options of `empty` for k and v, kwargs those of attention."""
    mask = options.pop("mask", None)
    q = empty(2, 4, seqlen_q, head_dim, backward=backward, **options)
    k, v = (empty(2, 4 // group, seqlen_k, head_dim, backward=backward, **options | (kv or {})) for _ in range(2))
    kwargs = {name: x.detach().requires_grad_(backward) if is_float(x) else x for name, x in (kwargs or {}).items()}
    out = fastattn.attention(q, k, v, mask=mask, backend="triton", **kwargs)
    if backward:
        torch.autograd.grad(out, (q, k, v, *filter(is_float, kwargs.values())), torch.empty_like(out))


def is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def variants(seqlen_q: int, seqlen_k: int) -> dict[str, dict]:
    """Arguments of `call`, each different from all others in what the kernels have to know."""
    bias = torch.empty(1, 4, seqlen_q, seqlen_k, dtype=torch.bfloat16, device="meta")
    bias_elsewhere = torch.empty(bias.numel() + 1, dtype=torch.bfloat16, device="meta")[1:].view_as(bias)
    numbers = torch.empty(4, device="meta")
    starts = torch.empty(1, 1, seqlen_q, dtype=torch.int32, device="meta")
    visible = torch.empty(2, 1, seqlen_q, seqlen_k, dtype=torch.bool, device="meta")
    found = {
        "nothing": {},
        "queries": {"seqlen_q": seqlen_q + 1},
        "keys": {"seqlen_k": seqlen_k + 1},
        "head_dim": {"head_dim": 80},
        "dtype": {"dtype": torch.float16},
        "layout": {"layout": "bshd"},
        "alignment": {"offset": 1},
        "place of k and v": {"kv": {"offset": 8}},
        "layout of k and v": {"kv": {"layout": "bshd"}},
        "heads": {"group": 1},
        "causal": {"kwargs": {"causal": True}},
        "window": {"kwargs": {"window_size": (9, 3)}},
        "another window": {"kwargs": {"window_size": (9, 4)}},
        "scale": {"kwargs": {"softmax_scale": 0.3}},
        "scale below 0": {"kwargs": {"softmax_scale": -0.3}},
        "learned scale": {"kwargs": {"softmax_scale": numbers[0]}},
        "learned scale elsewhere": {"kwargs": {"softmax_scale": numbers[1]}},
        "learned scales": {"kwargs": {"softmax_scale": numbers}},
        "softcap": {"kwargs": {"softcap": 3.0}},
        "another softcap": {"kwargs": {"softcap": 5.0}},
        "bias": {"kwargs": {"bias": bias}},
        "bias of all heads": {"kwargs": {"bias": bias[:, :1]}},
        "bias in float32": {"kwargs": {"bias": bias.float()}},
        "bias in another order": {"kwargs": {"bias": bias.transpose(2, 3).contiguous().transpose(2, 3)}},
        "bias elsewhere": {"kwargs": {"bias": bias_elsewhere}},
        "slopes": {"kwargs": {"alibi_slopes": numbers}},
        "sinks": {"kwargs": {"sinks": numbers}},
        "sinks far apart": {"kwargs": {"sinks": numbers.repeat(2)[::2]}},
        "intervals": {"mask": Mask.intervals(starts, starts)},
        "intervals of each head": {"mask": Mask.intervals(starts.repeat(1, 4, 1), starts)},
        "starts alone": {"mask": Mask.intervals(starts, None)},
        "bool mask": {"mask": visible},
        "bool mask of keys": {"mask": visible[:, :, :1]},
        "dropout": {"kwargs": {"dropout_p": 0.1, "seed": 1}},
        "another seed": {"kwargs": {"dropout_p": 0.1, "seed": 2}},
        "more dropout": {"kwargs": {"dropout_p": 0.2, "seed": 2}},
    }
    if seqlen_q == 1:  # where these are the same
        del found["bias in another order"], found["bool mask of keys"]
        return found
    return found | {"blocks": {"mask": BLOCKS}, "smaller blocks": {"mask": SMALL_BLOCKS}}
