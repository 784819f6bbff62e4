"""Gradients of the compiled kernels; the reference is differentiable by itself and does not come here."""

import torch

from . import dispatch
from .problem import Terms


def attention(problem, q, k, v, terms, forward, backend: str):
    """(out, lse) that autograd can go through; otherwise the kernel signature of dispatch.Row.

    forward(problem, q, k, v, terms) returns (out, lse, saved): saved goes to the backward row of the same backend.
    """
    scale = terms.softmax_scale if problem.learned_scale else None
    return _Attention.apply(
        problem, terms, forward, backend, q, k, v, terms.bias, terms.alibi_slopes, terms.sinks, scale
    )


class _Attention(torch.autograd.Function):
    """Saves its inputs, out (in float32 where it has 16 bits), and two numbers a row; nothing n x n."""

    @staticmethod
    def forward(ctx, problem, terms, forward, backend, q, k, v, bias, alibi_slopes, sinks, scale):
        out, lse, saved = forward(problem, q, k, v, terms)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.backend = problem, backend
        # Tensors only as saved tensors: autograd checks their versions, and hooks may move them.
        ctx.terms = [None if isinstance(x, torch.Tensor) else x for x in terms]
        tensors = [x if isinstance(x, torch.Tensor) else None for x in terms]
        ctx.save_for_backward(q, k, v, *saved, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse_parts, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 11
        if dout is None:
            dout = q.new_zeros(()).expand(out.shape)
        terms = Terms(*(x if y is None else y for x, y in zip(ctx.terms, tensors, strict=True)))
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        problem = ctx.problem._replace(direction="backward", needs_grad=torch.is_grad_enabled(), lse=dlse is not None)
        choice = dispatch.select(problem, None if problem.needs_grad else ctx.backend)
        dispatch.note(choice)
        wanted = ctx.needs_input_grad[4:]
        grads = choice.kernel(problem, q, k, v, terms, (out, lse_parts), dout, dlse, wanted)
        return None, None, None, None, *grads
