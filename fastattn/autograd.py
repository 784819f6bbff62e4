"""Gradients of the compiled CPU kernels; the reference is differentiable by itself and does not come here."""

import torch

from . import cpu, dispatch


def attention(problem, q, k, v, terms):
    """(out, lse) that autograd can go through; kernel signature of dispatch.Row."""
    scale = terms.softmax_scale if problem.learned_scale else None
    inputs = (terms.bias, terms.alibi_slopes, terms.sinks, scale)
    return differentiable(cpu.forward_for_backward, problem, q, k, v, terms, inputs)


def differentiable(forward, problem, q, k, v, terms, inputs):
    """(out, lse) of `forward`, a function as cpu.forward_for_backward, with gradients of q, k, v and `inputs`.

    The gradients, of this order, are those of the backward row that accepts the problem. `terms` is a NamedTuple.
    """
    return _Attention.apply(forward, problem, terms, q, k, v, *inputs)


class _Attention(torch.autograd.Function):
    """Saves its inputs, out (in float32 where it has 16 bits), and two numbers a row; nothing n x n."""

    @staticmethod
    def forward(ctx, forward, problem, terms, q, k, v, *inputs):
        out, lse, saved = forward(problem, q, k, v, terms)
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        # Tensors only as saved tensors: autograd checks their versions, and hooks may move them.
        ctx.terms = type(terms)(*(None if isinstance(x, torch.Tensor) else x for x in terms))
        tensors = [x if isinstance(x, torch.Tensor) else None for x in terms]
        ctx.save_for_backward(q, k, v, *saved, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse_parts, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if dout is None and dlse is None:
            return (None,) * (3 + len(wanted))
        if dout is None:
            dout = q.new_zeros(()).expand(out.shape)
        terms = type(ctx.terms)(*(x if y is None else y for x, y in zip(ctx.terms, tensors, strict=True)))
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        problem = ctx.problem._replace(direction="backward", needs_grad=torch.is_grad_enabled(), lse=dlse is not None)
        choice = dispatch.select(problem, None)
        dispatch.note(choice)
        grads = choice.kernel(problem, q, k, v, terms, (out, lse_parts), dout, dlse, wanted)
        return None, None, None, *grads
