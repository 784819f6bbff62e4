"""The last queries of a head that would leave a panel of lanes nearly empty (the 49th of a window, the class token of
an image) are computed as few queries are: with the bits that they have alone, and none of the others change."""

import pytest
import torch

import backward
import fastattn
from cases import Case, inputs
from fastattn import Mask
from fastattn.backends import cpu
from forward import DTYPES, NAN, assert_parity, assert_same_bits, max_error, run
from isas import needs_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(batch=2, num_heads=3, seqlen_q=49, head_dim=32, bias="per_head"),
    Case(batch=5, num_heads=2, seqlen_q=50, head_dim=32, causal=True, alibi=True),
    Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=51, seqlen_k=70, head_dim=20, mask="tensor_per_head"),
    Case(batch=2, num_heads=2, seqlen_q=52, head_dim=24, head_dim_v=40, window_size=(9, 3), softcap=9.0, layout="bshd"),
    Case(batch=1, num_heads=4, seqlen_q=17, head_dim=7, mask="intervals", learned_scale="per_head"),
    Case(batch=2, num_heads=2, seqlen_q=33, seqlen_k=9, head_dim=16, causal=True, bias="distances"),
    Case(batch=1, num_heads=4, num_heads_k=2, seqlen_q=257, head_dim=64, mask="lengths", sinks=True),
    Case(batch=1, num_heads=8, seqlen_q=577, seqlen_k=600, head_dim=16, bias="full", causal=True),
    Case(batch=1, num_heads=40, seqlen_q=65, seqlen_k=1100, head_dim=16, mask="key_tensor"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def last_of(kwargs: dict, seqlen_q: int, count: int) -> dict:
    """The arguments of the call of the last queries alone."""
    last = {}
    for name, x in kwargs.items():
        if isinstance(x, Mask) and x.k_end is not None:
            rows = (y if y is None or y.shape[2] == 1 else y[:, :, -count:] for y in (x.k_start, x.k_end))
            x = Mask(x.windows, *rows)
        elif name in ("mask", "bias") and isinstance(x, torch.Tensor) and x.shape[2] == seqlen_q:
            x = x[:, :, -count:]
        elif name == "bias" and not isinstance(x, torch.Tensor):
            x = fastattn.relative.toeplitz(x.vector[..., : count - seqlen_q])
        last[name] = x
    return last


@needs_cpu
@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_and_the_bits_of_few_queries(case, dtype):
    case = case._replace(dtype=dtype)
    (q, k, v), kwargs = inputs(case)
    out, lse = run(q, k, v, **kwargs)
    assert_parity((out, lse), q, k, v, **kwargs)
    count = case.seqlen_q % 16
    with fastattn.record() as calls:
        alone = run(q[:, :, -count:], k, v, **last_of(kwargs, case.seqlen_q, count))
    assert calls[0].kernel == "cpu.decode"
    if cpu.isa() == "avx2" and dtype == "float32" and case.head_dim >= 16:  # whose panels have 16 lanes
        assert_same_bits(alone, (out[:, :, -count:], lse[:, :, -count:]))


@needs_cpu
@pytest.mark.parametrize("seqlen", [17, 49, 50, 52, 131, 257])
def test_the_others_do_not_notice(seqlen):
    """The bits of the other queries are those of a call without the last ones, and with more."""
    q, k, v = (torch.randn(2, 2, n, 24, generator=torch.Generator().manual_seed(n)) for n in (272, 60, 60))
    others = seqlen // 16 * 16
    expected = run(q[:, :, :272], k, v)
    for found in (run(q[:, :, :seqlen], k, v), run(q[:, :, :others], k, v)):
        assert_same_bits([x[:, :, :others] for x in found], [x[:, :, :others] for x in expected])


@needs_cpu
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_dropout_draws_by_the_places_of_the_whole_call(case):
    (q, k, v), kwargs = inputs(case)
    kwargs |= {"dropout_p": 0.4, "seed": 7}
    found, expected = run(q, k, v, **kwargs), run(q.double(), k.double(), v.double(), "reference", **kwargs)
    for x, y in zip(found, expected, strict=True):
        assert max_error(x, y) < 1e-5


@needs_cpu
def test_nan_behind_a_mask_stays_there():
    q, k, v = (torch.randn(2, 2, 49, 24, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    expected = run(q, k, v, causal=True)
    k[:, :, 48] = v[:, :, 48] = NAN
    found = run(q, k, v, causal=True)
    assert_same_bits([x[:, :, :48] for x in found], [x[:, :, :48] for x in expected])
    assert all(x[:, :, 48].isnan().all() for x in found)
    hidden = run(q, k, v, mask=torch.arange(49) < 48)
    assert all(x.isfinite().all() for x in hidden)


@needs_cpu
def test_sequences_have_the_bits_of_calls_of_their_own():
    lengths = [49, 16, 50, 1, 17, 130]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), 2, 24, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    out = fastattn.attention_varlen(q, k, v, starts, starts, max(lengths), max(lengths), causal=True)
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one = [x[None, first:end].transpose(1, 2) for x in (q, k, v)]
        assert_same_bits(out[None, first:end].transpose(1, 2), fastattn.attention(*one, causal=True))


@needs_cpu
@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_gradients(case, dtype):
    backward.assert_parity(case._replace(dtype=dtype))


@needs_cpu
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_gradients_with_dropout(case):
    backward.assert_parity(case._replace(dropout_p=0.3))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_backward_pass_has_the_scores_that_lse_is_of(dtype):
    """It computes them again: far from zero, sums in another order would be other numbers, and weights no longer add up
    to 1."""
    q, k, v = (torch.randn(1, 2, 49, 32, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(3))
    q[..., 0] = k[..., 0] = 100.0  # scores of 1768 and little more or less
    v.requires_grad_()
    dout = torch.zeros(1, 2, 49, 32, dtype=dtype)
    dout[:, :, 48] = 1.0
    (dv,) = torch.autograd.grad(fastattn.attention(q, k, v), v, dout)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-6
    assert (dv.double().sum(2) - 1.0).abs().max() < rounding


@needs_cpu
def test_a_query_with_one_key_has_no_gradient_of_scores():
    q, k, v = (torch.randn(2, 2, 50, 40, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    mask = torch.ones(50, 50, dtype=torch.bool)
    mask[48:] = False
    mask[48, 7] = mask[49, 30] = True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, _, dv = torch.autograd.grad(fastattn.attention(*leaves, mask=mask), leaves, torch.randn(2, 2, 50, 40))
    assert not dq[:, :, 48:].any() and dq[:, :, :48].all() and dv.isfinite().all()


@needs_cpu
def test_nan_behind_a_mask_stays_out_of_gradients():
    q, k, v = (torch.randn(2, 2, 49, 24, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    mask = (torch.arange(49) < 40).expand(49, 49)
    dout = torch.randn(2, 2, 49, 24, generator=torch.Generator().manual_seed(1))
    expected = backward.gradients(q, k, v, {"mask": mask}, dout)
    k[:, :, 45] = v[:, :, 47] = NAN
    found = backward.gradients(q, k, v, {"mask": mask}, dout)
    assert_same_bits(found["q"], expected["q"])
    for name in ("k", "v"):
        assert_same_bits(found[name][:, :, :40], expected[name][:, :, :40])
