"""Gradients of the compiled CPU kernels; the reference is differentiable by itself and does not come here."""

import torch

from . import cpu, dispatch


def attention(
    problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias, alibi_slopes,
    sinks, dropout_p, seed,
):  # fmt: skip
    """(out, lse) that autograd can go through; kernel signature of dispatch.Row."""
    settings = (softmax_scale, softcap, diagonal_lo, diagonal_hi, dropout_p, seed)
    return _Attention.apply(problem, settings, q, k, v, bias, alibi_slopes, sinks, k_start, k_end, mask)


class _Attention(torch.autograd.Function):
    """Saves its inputs, out, and two numbers a row; nothing n x n."""

    @staticmethod
    def forward(ctx, problem, settings, q, k, v, bias, alibi_slopes, sinks, k_start, k_end, mask):
        softmax_scale, softcap, lo, hi, _, _ = settings
        out, lse, lse_parts = cpu.forward(
            problem, q, k, v, softmax_scale, softcap, lo, hi, k_start, k_end, mask, bias, alibi_slopes, sinks,
            for_backward=True,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.settings = problem, settings
        ctx.save_for_backward(q, k, v, bias, alibi_slopes, sinks, k_start, k_end, mask, out, lse_parts)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, bias, alibi_slopes, sinks, k_start, k_end, mask, out, lse_parts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:8]
        if dout is None and dlse is None:
            return (None,) * 11
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        problem = ctx.problem._replace(direction="backward", needs_grad=torch.is_grad_enabled(), lse=dlse is not None)
        choice = dispatch.select(problem, None)
        dispatch.note(choice)
        softmax_scale, softcap, lo, hi, dropout_p, seed = ctx.settings
        grads = choice.kernel(
            problem, q, k, v, softmax_scale, softcap, lo, hi, k_start, k_end, mask, bias, alibi_slopes, sinks,
            dropout_p, seed, out, lse_parts, dout, dlse, wanted,
        )  # fmt: skip
        return None, None, *grads, None, None, None
