"""Learned attention, natten's functions and FlexAttention's take O(n) memory."""

import pytest
import torch

import fastattn
from fastattn import learned
from fastattn.compat import flex, natten
from guarded import printed_by_child, reset_peak, status
from isas import needs_cpu

pytestmark = needs_cpu

MATRIX = 4  # bytes of a score


def tensors(seqlen, heads=1, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, seqlen, dim, generator=generator).requires_grad_() for _ in range(3)]


def sparsemax(seqlen):
    learned.attention(*tensors(seqlen), normalizer="sparsemax", causal=True).sum().backward()


def entmax15(seqlen):
    learned.attention(*tensors(seqlen), normalizer="entmax15").sum().backward()


def top_k(seqlen):
    learned.attention(*tensors(seqlen), normalizer="sigmoid", top_k=64, causal=True).sum().backward()


def talking_heads(seqlen):
    mix = torch.eye(2).requires_grad_()
    learned.talking_heads_attention(*tensors(seqlen, 2), mix, mix, causal=True).sum().backward()


def any_score_mod(seqlen):
    table = torch.zeros(2 * seqlen).requires_grad_()
    flex.flex_attention(
        *tensors(seqlen), lambda s, b, h, i, j: s + torch.sin(s + table[i - j + seqlen])
    ).sum().backward()
    assert table.grad.isfinite().all()


def known_score_mod(seqlen):
    flex.flex_attention(*tensors(seqlen), lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf)).sum().backward()
    assert fastattn.last_call().problem.mask == "causal"


def neighborhoods(seqlen):
    q, k, v = (x.detach().view(1, seqlen // 16, 16, 1, 16).requires_grad_() for x in tensors(seqlen))
    natten.na2d(q, k, v, 7, rpb=torch.zeros(1, 13, 13).requires_grad_()).sum().backward()
    natten.na2d(q, k, v, 7, stride=2).sum().backward()


NAMES = "sparsemax", "entmax15", "top_k", "talking_heads", "any_score_mod", "known_score_mod", "neighborhoods"
QUICK = "entmax15", "any_score_mod"


def peak_bytes(name, seqlen):
    """What a function takes in this process, at its peak."""
    torch.set_num_threads(1)
    function = globals()[name]
    function(256)  # what is imported on first use
    before = reset_peak()
    function(seqlen)
    return status("VmHWM") - before


@pytest.mark.parametrize("name", [*QUICK, *[pytest.param(x, marks=pytest.mark.slow) for x in NAMES if x not in QUICK]])
@pytest.mark.parametrize("seqlen", [4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_memory_is_not_quadratic(name, seqlen):
    """Below 32 blocks of 128 rows of scores and 8 MiB; where seqlen is 16384, that is a quarter of one matrix."""
    limit = 32 * 128 * seqlen * MATRIX + 2**23
    assert printed_by_child(f"test_memory_learned.peak_bytes({name!r}, {seqlen})") < limit
