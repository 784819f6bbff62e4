"""Short sequences: what a head reads is fetched beside the one before it, and a bias that the batch shares is laid in
lanes once. Neither may be seen in a bit of a result."""

import pytest
import torch

import backward
from backward import cotangents, gradients
from cases import Case, inputs
from forward import assert_parity, assert_same_bits, run
from isas import needs_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(batch=5, num_heads=3, seqlen_q=49, head_dim=32, bias="per_head"),
    Case(batch=4, num_heads=2, seqlen_q=50, head_dim=32, causal=True, bias="shared", dtype="bfloat16"),
    Case(batch=6, num_heads=2, seqlen_q=33, seqlen_k=128, head_dim=24, head_dim_v=40, mask="tensor", layout="bshd"),
    Case(batch=4, num_heads=2, seqlen_q=128, seqlen_k=7, head_dim=16, mask="tensor", bias="per_head", softcap=9.0),
    Case(batch=4, num_heads=4, num_heads_k=2, seqlen_q=17, seqlen_k=50, head_dim=20, bias="per_head", sinks=True),
    Case(batch=4, num_heads=2, seqlen_q=31, head_dim=8, bias="shared", dtype="float64"),
    Case(batch=4, num_heads=2, seqlen_q=49, head_dim=32, bias="full"),  # not shared
    Case(batch=4, num_heads=2, seqlen_q=40, seqlen_k=129, head_dim=32, bias="per_head"),  # too long to be laid
    Case(batch=12, num_heads=6, seqlen_q=37, head_dim=64, window_size=(9, 3)),  # more than an L2 has room for
    Case(batch=40, num_heads=2, seqlen_q=50, head_dim=64, causal=True, layout="bshd", dropout_p=0.2),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def one_of_batch(b: int, batch: int, x):
    return x[b : b + 1] if isinstance(x, torch.Tensor) and x.dim() == 4 and len(x) == batch else x


@needs_cpu
@cases
def test_a_batch_has_the_bits_of_its_entries(case):
    case = case._replace(dropout_p=0.0)  # whose bits follow from the place in the batch
    (q, k, v), kwargs = inputs(case)
    dout, dlse = cotangents(q, v)
    whole = run(q, k, v, **kwargs)
    of_whole = gradients(q, k, v, kwargs, dout, dlse)
    for b in (0, case.batch - 1):
        mine = [one_of_batch(b, case.batch, x) for x in (q, k, v, dout)]
        own = {name: one_of_batch(b, case.batch, x) for name, x in kwargs.items()}
        assert_same_bits(run(*mine[:3], **own), [x[b : b + 1] for x in whole])
        of_one = gradients(*mine[:3], own, mine[3], dlse[b : b + 1])
        for name in ("q", "k", "v"):
            assert_same_bits(of_one[name], of_whole[name][b : b + 1])


@needs_cpu
@cases
def test_results_and_gradients(case):
    (q, k, v), kwargs = inputs(case)
    if case.dropout_p == 0.0:
        assert_parity(run(q, k, v, **kwargs), q, k, v, **kwargs)
    backward.assert_parity(case)


@needs_cpu
def test_keys_that_are_no_rows_of_memory_in_a_row():
    """The backward pass reads keys and values where they lie: expanded, with gaps, with a stride that would crowd a
    cache."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 40, 128)
    for k in (
        torch.randn(2, 3, 1, 128).expand(2, 3, 33, 128),
        torch.randn(2, 3, 33, 200)[..., 5:133],
        torch.randn(2, 33, 3, 128).transpose(1, 2),
        torch.randn(2, 3, 128, 33).transpose(2, 3),
        torch.randn(1, 1, 33, 128).expand(2, 3, 33, 128),
    ):
        dout, _ = cotangents(q, k)
        assert_same_bits(run(q, k, k), run(q, k.contiguous(), k.contiguous()))
        apart = gradients(q, k, k, {}, dout)
        beside = gradients(q, k.contiguous(), k.contiguous(), {}, dout)
        for name in ("q", "k", "v"):
            assert_same_bits(apart[name], beside[name])


@needs_cpu
def test_nan_behind_a_mask_adds_nothing_to_the_gradient_of_a_shared_bias():
    """A head with NaN in some gradient is computed again; what it has added to dbias by then stands."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 20, 16) for _ in range(3))
    mask = torch.rand(1, 2, 20, 20) > 0.3
    mask[..., 7] = False
    kwargs = {"bias": torch.randn(1, 2, 20, 20), "mask": mask}
    dout, _ = cotangents(q, v)
    expected = gradients(q, k, v, kwargs, dout, of_scores=True)
    k[2, 1, 7] = v[3, 0, 7] = torch.nan
    found = gradients(q, k, v, kwargs, dout, of_scores=True)
    for name in ("q", "bias"):
        assert_same_bits(found[name], expected[name])


@needs_cpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bits_do_not_depend_on_the_address(dtype):
    """Of rows that begin at an odd element, between two words of 16-bit numbers."""

    def results(offset):
        generator = torch.Generator().manual_seed(0)
        shape, memory = (2, 3, 64, 40), torch.empty(4, offset + 2 * 3 * 64 * 40, dtype=getattr(torch, dtype))
        *leaves, dout = (row[offset:].view(shape).copy_(torch.randn(shape, generator=generator)) for row in memory)
        leaves = [x.requires_grad_() for x in leaves]
        out, _ = run(*leaves, causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    assert_same_bits(results(1), results(0))
