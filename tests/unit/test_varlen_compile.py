"""`attention_varlen` under torch.compile: one operator, no graph break, the bits of an eager call."""

import pytest
import torch

import fastattn
from forward import assert_same_bits
from isas import needs_cpu
from sequences import packed

pytestmark = needs_cpu
LENGTHS = ((5, 9), (0, 4), (33, 33), (7, 0))
EVERYTHING = {
    "alibi_slopes": torch.linspace(0.1, 0.8, 16).view(4, 4), "sinks": torch.arange(4.0), "dropout_p": 0.2, "seed": 5,
    "causal": True, "window_size": (9, None), "softcap": 3.0, "softmax_scale": torch.tensor(0.3),
    "seqused_k": torch.tensor([0, 4, 4, 0]),
}  # fmt: skip


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), EVERYTHING], ids=len)
def test_a_graph_gives_the_bits_of_an_eager_call(options):
    def call(q, k, v, *bounds):
        out, lse = fastattn.attention_varlen(q * 2.0, k, v, *bounds, **options, return_lse=True)
        return out + 1.0, lse

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        q, k, v, *bounds = packed(lengths, dtype=torch.bfloat16 if options else torch.float32)
        found = []
        for function in (compiled, call):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = function(*leaves, *bounds)
            loss = out.float().square().sum() + lse[:, :5].exp().sum()
            found.append((out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)))
        assert_same_bits(*found)


def test_fake_tensors_have_the_shapes():
    q, k, v, *bounds = packed(LENGTHS)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, *bounds)]
        out, lse = fastattn.attention_varlen(*fakes, return_lse=True)
    assert out.shape == (45, 4, 40) and lse.shape == (4, 45) and out.dtype == q.dtype


def test_a_cache_says_that_it_is_no_part_of_a_graph():
    x = torch.zeros(1, 1, 4, 8)

    def call():
        return fastattn.attention_with_kvcache(x, x, x, cache_seqlens=4)

    with pytest.raises(Exception, match="no operator of a graph"):
        torch.compile(call, backend="eager", fullgraph=True)()
