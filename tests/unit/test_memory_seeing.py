"""What looks at weights takes O(n) memory."""

import pytest
import torch

import fastattn
from guarded import printed_by_child, reset_peak, status
from isas import needs_cpu

pytestmark = needs_cpu

LIMIT = 16 * 2**20


def tensors(seqlen, heads=8, dim=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, seqlen, dim, generator=generator) for _ in range(3)]


def weights_of_rows(seqlen):
    """64 scattered rows: beyond their weights, less than two blocks of scores."""
    q, k, _ = tensors(seqlen)
    weights = fastattn.attention_weights(q, k, rows=range(0, seqlen, seqlen // 64), causal=True)
    return weights.nbytes


def gradients_of_rows(seqlen):
    q, k, _ = (x.requires_grad_() for x in tensors(seqlen, heads=2, dim=32))
    weights = fastattn.attention_weights(q, k, rows=[0, seqlen - 1, 17], causal=True)
    grads = torch.autograd.grad(weights.square().sum(), (q, k))
    return 2 * weights.nbytes + 2 * sum(x.nbytes for x in grads)  # the gradient of the weights; sums, then results


def fused_statistics(seqlen):
    q, k, _ = tensors(seqlen)
    return sum(x.nbytes for x in fastattn.attention_stats(q, k, stats=("key_mass", "entropy", "distance")).values())


def statistics_in_blocks(seqlen):
    """In torch's operators: half of the rows, and their largest weights; 256 MiB as a matrix of 8192."""
    q, k, _ = tensors(seqlen, 2, 32)
    stats = fastattn.attention_stats(q, k, rows=range(0, seqlen // 2), causal=True, stats=("key_mass", "top_k"))
    return stats["key_mass"].nbytes + stats["top_k"].weights.nbytes + 3 * stats["top_k"].keys.nbytes


def extra_bytes(name, seqlen):
    """What a function takes beyond its inputs and results in this process, at its peak."""
    torch.set_num_threads(1)
    function = globals()[name]
    function(256)  # what is imported on first use
    is_small = name in ("gradients_of_rows", "statistics_in_blocks")
    inputs = sum(x.nbytes for x in (tensors(seqlen, 2, 32) if is_small else tensors(seqlen)))
    before = reset_peak()
    results = function(seqlen)
    return max(status("VmHWM") - before - inputs - results, 0)


@pytest.mark.parametrize("name", ["weights_of_rows", "gradients_of_rows", "fused_statistics", "statistics_in_blocks"])
@pytest.mark.parametrize("seqlen", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_extra_memory_is_not_quadratic(name, seqlen):
    tensors_of_blocks = 16 * 128 * seqlen * 4
    assert printed_by_child(f"test_memory_seeing.extra_bytes({name!r}, {seqlen})") < (
        tensors_of_blocks if "blocks" in name else LIMIT
    )
