"""Gradients through torch's machinery: checkpoints, anomaly mode, autocast, changes in place, hooks, transforms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from cases import Case, inputs
from fastattn.backends import cpu

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


def leaves_of(case):
    (q, k, v), kwargs = inputs(case)
    return [x.requires_grad_() for x in (q, k, v)], kwargs


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    leaves, kwargs = leaves_of(Case(batch=2, num_heads=2, seqlen_q=40, head_dim=16, causal=True))

    def call(q, k, v):
        return fastattn.attention(q, k, v, **kwargs, backend="cpu")

    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for x, grad in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, grad)


def test_anomaly_mode():
    leaves, kwargs = leaves_of(Case(batch=2, num_heads=2, seqlen_q=40, head_dim=16))
    with torch.autograd.detect_anomaly(check_nan=True):
        fastattn.attention(*leaves, **kwargs, backend="cpu").sum().backward()


def test_autocast_as_sdpa_does():
    leaves, _ = leaves_of(Case(batch=2, num_heads=2, seqlen_q=40, head_dim=16))
    grads = []
    for function in (fastattn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves)
        assert out.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
        assert all(grad.dtype == torch.float32 for grad in grads[-1])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


def test_changed_input_is_an_error():
    leaves, kwargs = leaves_of(Case(seqlen_q=4))
    q = leaves[0] * 1.0
    out = fastattn.attention(q, *leaves[1:], **kwargs)
    q.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_result_changed_in_place():
    """As with torch's function: fine where the backward pass saves another tensor, which 16 bits do, else an error."""
    for dtype in (torch.bfloat16, torch.float32):
        memory = torch.randn(3, 1, 5, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        leaves = [x.transpose(1, 2).requires_grad_() for x in memory]
        expected = torch.autograd.grad(2.0 * fastattn.attention(*leaves).sum(), leaves)
        out = fastattn.attention(*leaves)
        out.mul_(2.0)
        if dtype == torch.float32:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        else:
            for x, y in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
                assert torch.equal(x, y)


def test_backward_twice():
    leaves, kwargs = leaves_of(Case(seqlen_q=4))
    out = fastattn.attention(*leaves, **kwargs)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_hooks_see_what_is_saved():
    """Nothing n x n: no saved tensor has more elements than the inputs and out."""
    leaves, kwargs = leaves_of(Case(batch=1, num_heads=1, seqlen_q=300, head_dim=8, causal=True))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        fastattn.attention(*leaves, **kwargs)
    assert sizes and max(sizes) <= leaves[0].numel()


def test_record_shows_both_directions():
    leaves, kwargs = leaves_of(Case(seqlen_q=4))
    with fastattn.record() as calls:
        fastattn.attention(*leaves, **kwargs).sum().backward()
    assert [(call.kernel, call.problem.direction) for call in calls] == [
        ("cpu.prefill", "forward"),
        ("cpu.backward", "backward"),
    ]


def test_transforms_run_on_the_kernels(fresh_fallbacks):
    q, k, v = (torch.randn(3, 1, 2, 5, 8) for _ in range(3))
    actual = torch.vmap(fastattn.attention)(q, k, v)
    assert fastattn.last_call().kernel == "cpu.decode" and fastattn.last_call().problem.transformed
    torch.testing.assert_close(actual, torch.stack([fastattn.attention(*x) for x in zip(q, k, v, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: fastattn.attention(q, k, v).square().sum()))(q, k, v)
    x = q.clone().requires_grad_()
    sum(fastattn.attention(*y).square().sum() for y in zip(x, k, v, strict=True)).backward()
    torch.testing.assert_close(per_sample, x.grad)
    assert not fresh_fallbacks


def test_a_tangent_of_the_output_gradient_is_kept():
    """Forward-mode derivatives that begin behind the forward pass."""
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    z = q.clone().requires_grad_()
    out = fastattn.attention(z, k, v)
    cotangent, tangent = torch.randn_like(out), torch.randn_like(out)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cotangent, tangent)
        (grad,) = torch.autograd.grad(out, z, dual, retain_graph=True)
        found = torch.autograd.forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(found, torch.autograd.grad(out, z, tangent)[0])
