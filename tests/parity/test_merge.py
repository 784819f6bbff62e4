"""`fastattn.merge`: parts of the keys give what all keys give at once."""

import pytest
import torch

import fastattn

INF = float("inf")


def states(
    batch=2, num_heads=4, num_heads_k=2, seqlen_q=7, seqlen_k=23, head_dim=16, head_dim_v=12, dtype=torch.float64
):
    shapes = ((num_heads, seqlen_q, head_dim), (num_heads_k, seqlen_k, head_dim), (num_heads_k, seqlen_k, head_dim_v))
    return [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


def in_parts(q, k, v, cuts, visible):
    """`merge` of attention over the keys between `cuts`; visible: bool [seqlen_q, seqlen_k]."""
    parts = [
        fastattn.attention(q, k[:, :, a:b], v[:, :, a:b], mask=visible[:, a:b], return_lse=True)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    return fastattn.merge([out for out, _ in parts], [lse for _, lse in parts])


@pytest.mark.parametrize("cuts", [(0, 23), (0, 11, 23), (0, 0, 23), (0, 1, 2, 22, 23)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_give_the_whole_and_its_gradients(cuts, dtype):
    q, k, v = (x.requires_grad_() for x in states(dtype=dtype))
    visible = torch.rand(7, 23) < 0.5
    visible[3] = False  # sees no key in any part
    visible[5, 11:] = False  # sees none in the later parts
    whole = fastattn.attention(q, k, v, mask=visible, return_lse=True)
    merged = in_parts(q, k, v, cuts, visible)
    torch.testing.assert_close(merged, whole)
    assert (merged[0][:, :, 3] == 0).all() and (merged[1][:, :, 3] == -INF).all()
    weights = torch.randn_like(whole[0]), torch.randn_like(whole[1])

    def gradients(out, lse):
        return torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1])[lse != -INF].sum(), (q, k, v))

    torch.testing.assert_close(gradients(*merged), gradients(*whole), rtol=1e-4, atol=1e-5)


def test_what_a_row_does_not_see_may_hold_anything():
    outs = [torch.tensor([[1.0, 2.0], [float("nan"), INF]]), torch.tensor([[5.0, -INF], [3.0, 4.0]])]
    lses = [torch.tensor([0.5, -INF]), torch.tensor([-INF, 0.25])]
    out, lse = fastattn.merge(outs, lses)
    assert out.tolist() == [[1.0, 2.0], [3.0, 4.0]] and lse.tolist() == [0.5, 0.25]


def test_far_apart_logs_neither_overflow_nor_vanish():
    outs = [torch.ones(1, 1), torch.zeros(1, 1)]
    for high in (1e30, -1e30):
        out, lse = fastattn.merge(outs, [torch.tensor([high]), torch.tensor([high])])
        assert out.item() == 0.5 and lse.item() == pytest.approx(high)


def test_gradcheck_and_second_derivative():
    outs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return fastattn.merge(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(call, (*outs, *lses)) and torch.autograd.gradgradcheck(call, (*outs, *lses))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parts_are_summed_in_float32(dtype):
    outs = [torch.randn(5, 8).to(dtype) for _ in range(4)]
    lses = [torch.randn(5) for _ in range(4)]
    out, lse = fastattn.merge(outs, lses)
    exact, exact_lse = fastattn.merge([x.double() for x in outs], [x.double() for x in lses])
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, exact.to(dtype))
    torch.testing.assert_close(lse, exact_lse.float())


@pytest.mark.parametrize(
    "outs, lses, error, text",
    [
        ([], [], ValueError, "outs has 0 parts and lses 0"),
        ([torch.zeros(2, 3)], [], ValueError, "outs has 1 parts and lses 0"),
        (torch.zeros(1, 2, 3), [torch.zeros(2)], TypeError, "outs must be a list of tensors"),
        ([torch.zeros(2, 3), None], [torch.zeros(2)] * 2, TypeError, r"outs\[1\] must be a torch.Tensor, got NoneType"),
        ([torch.zeros(2, 3)], [torch.zeros(2).int()], TypeError, r"lses\[0\] has dtype torch.int32"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2)] * 2, ValueError, r"outs\[1\] is .*\(2, 4\)"),
        ([torch.zeros(2, 3)], [torch.zeros(3)], ValueError, r"lses\[0\] has shape \(3,\); .* it must be \(2,\)"),
        ([torch.zeros(())], [torch.zeros(())], ValueError, "lses"),
    ],
)
def test_refusals(outs, lses, error, text):
    with pytest.raises(error, match=text):
        fastattn.merge(outs, lses)
