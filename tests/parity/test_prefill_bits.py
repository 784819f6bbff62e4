"""What the bits of a row of the forward pass depend on: not on its neighbours, on the batch or on earlier calls."""

import pytest
import torch

import fastattn
from cases import Case, inputs
from fastattn import Mask
from forward import (
    DTYPES,
    INF,
    NAN,
    SHAPES,
    assert_same_bits,
    run,
    shapes,
)
from isas import needs_cpu

pytestmark = pytest.mark.usefixtures("one_thread")


def at_batch(b: int, q, k, v, kwargs):
    """The call of one element of the batch."""
    one = slice(b, b + 1)

    def pick(x, dims):
        return x[one] if isinstance(x, torch.Tensor) and x.dim() == dims and x.shape[0] > 1 else x

    kwargs = {name: pick(value, 4) for name, value in kwargs.items()}
    if isinstance(kwargs.get("mask"), Mask):
        mask = kwargs["mask"]
        kwargs["mask"] = Mask(mask.windows, pick(mask.k_start, 3), pick(mask.k_end, 3))
    return (q[one], k[one], v[one]), kwargs


@needs_cpu
@shapes
def test_a_row_does_not_depend_on_the_batch(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    out, lse = run(q, k, v, **kwargs)
    for b in range(len(q)):
        alone, its_kwargs = at_batch(b, q, k, v, kwargs)
        assert_same_bits(run(*alone, **its_kwargs), (out[b : b + 1], lse[b : b + 1]))
        others = torch.arange(len(q)) != b
        for poison in (NAN, 1e4):
            q2, k2, v2 = (x.clone() for x in (q, k, v))
            q2[others] = k2[others] = v2[others] = poison
            out2, lse2 = run(q2, k2, v2, **kwargs)
            assert_same_bits((out2[b], lse2[b]), (out[b], lse[b]))


@needs_cpu
@shapes
def test_a_row_does_not_depend_on_other_rows_and_heads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    out, lse = run(q, k, v, **kwargs)
    for row, head in ((0, 0), (q.shape[2] - 1, q.shape[1] - 1), (q.shape[2] // 2, 0)):
        q2 = torch.full_like(q, NAN)
        q2[:, head, row] = q[:, head, row]
        out2, lse2 = run(q2, k, v, **kwargs)
        assert_same_bits((out2[:, head, row], lse2[:, head, row]), (out[:, head, row], lse[:, head, row]))
        group_size = q.shape[1] // k.shape[1]
        others = torch.arange(k.shape[1]) != head // group_size
        k2, v2 = k.clone(), v.clone()
        k2[:, others] = v2[:, others] = NAN
        out2, lse2 = run(q, k2, v2, **kwargs)
        assert_same_bits((out2[:, head], lse2[:, head]), (out[:, head], lse[:, head]))


@needs_cpu
@shapes
def test_a_run_does_not_depend_on_the_ones_before(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    expected = run(q, k, v, **kwargs)
    other = torch.full((1, 2, 200, 128), NAN)
    for _ in range(20):
        run(other, other, other)  # leaves NaN in the scratch memory
        assert_same_bits(run(q, k, v, **kwargs), expected)
    assert_same_bits(fastattn.attention(q, k, v, **kwargs, backend="cpu"), expected[0])


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads, seqlen", [(2, 200), (1, 1100)])
def test_causal_prefix(num_heads, seqlen, dtype):
    """Keys after a row do not change it, whatever they hold."""
    case = Case(num_heads=num_heads, seqlen_q=seqlen, head_dim=20, dtype=dtype, causal=True)
    (q, k, v), kwargs = inputs(case)
    out, lse = run(q, k, v, **kwargs)
    for last in (0, 30, 64, 127, 128, seqlen - 2):
        for poison in (0.5, NAN, INF):
            k2, v2 = k.clone(), v.clone()
            k2[:, :, last + 1 :] = v2[:, :, last + 1 :] = poison
            for kwargs2 in (kwargs, {"mask": Mask.causal("top_left")}, {"window_size": (seqlen - 1, 0)}):
                out2, lse2 = run(q, k2, v2, **kwargs2)
                rows = slice(0, last + 1)
                assert_same_bits((out2[:, :, rows], lse2[:, :, rows]), (out[:, :, rows], lse[:, :, rows]))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_the_same_keys_give_the_same_bits(dtype):
    seqlen = 300
    (q, k, v), _ = inputs(Case(batch=2, num_heads=2, seqlen_q=seqlen, head_dim=20, dtype=dtype))
    position = torch.arange(seqlen)
    causal = position[:, None] >= position
    expected = run(q, k, v, causal=True)
    for same in (
        {"window_size": (seqlen - 1, 0)},
        {"window_size": (None, 0)},
        {"window_size": (10**9, 0), "causal": True},
        {"mask": Mask.causal("top_left")},
        {"mask": Mask.intervals(k_end=position[None, None] + 1)},
        {"mask": causal},
        {"bias": torch.where(causal, 0.0, -INF)},
        {"mask": causal, "bias": torch.zeros(1)},
    ):
        assert_same_bits(run(q, k, v, **same), expected)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("laid", ["side by side", "by columns", "for all heads", "for the batch"])
@pytest.mark.parametrize("seqlen_k", [1, 31, 32, 33, 64, 131, 133, 165, 200])
def test_a_bool_mask_gives_the_bits_of_a_bias_of_minus_infinity(seqlen_k, laid, dtype):
    case = Case(batch=4, num_heads=4, num_heads_k=2, seqlen_q=35, seqlen_k=seqlen_k, head_dim=24, dtype=dtype)
    (q, k, v), kwargs = inputs(case._replace(bias="per_head"))
    bias, seen = kwargs["bias"].expand(1, 4, 35, seqlen_k), torch.rand(4, 4, 35, seqlen_k) > 0.4
    seen[0, :, 5], seen[1, :, 16:32] = False, True  # a row that sees no key, a panel that sees all
    if laid == "by columns":
        seen = seen.mT.contiguous().mT
    elif laid == "for all heads":
        seen = seen[:, :1]
    elif laid == "for the batch":
        seen = seen[:1]
    for terms, added in (({}, torch.zeros_like(bias)), ({"bias": bias}, bias)):
        results = []
        for kwargs in ({"mask": seen, **terms}, {"bias": added.masked_fill(~seen, -INF)}):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = run(*leaves, **kwargs)
            results.append([out, lse, *torch.autograd.grad(out, leaves, q.new_ones(()).expand(out.shape))])
        assert_same_bits(*results)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 2, 40, 130])
@pytest.mark.parametrize("group_size", [2, 4, 5])
def test_shared_keys_equal_repeated_keys(group_size, seqlen_q, dtype):
    """Of a kernel: both calls have few rows a key head, or many."""
    plain = Case(num_heads=2 * group_size, num_heads_k=2, seqlen_q=seqlen_q, seqlen_k=700, head_dim=20, dtype=dtype)
    for case in (plain, plain._replace(causal=True, bias="per_head", mask="tensor_per_head", alibi=True, sinks=True)):
        (q, k, v), kwargs = inputs(case)
        k2, v2 = (x.repeat_interleave(group_size, 1) for x in (k, v))
        assert_same_bits(run(q, k, v, **kwargs), run(q, k2, v2, **kwargs))
