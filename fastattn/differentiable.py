"""Gradients of the compiled kernels; the reference is differentiable by itself and does not come here."""

import torch

from . import dispatch
from .calls import note
from .plans import Bound
from .torch_internals import is_transformed


class Differentiable(torch.autograd.Function):
    """(out, lse) of a row that has `train`, as apply(choice, problem, terms, q, k, v, *terms): each field of the
    terms is an argument of its own, since autograd sees no tensors inside a tuple.

    Saves its inputs, out (in float32 where it has 16 bits), and two numbers a row; nothing n x n.
    """

    @staticmethod
    def forward(ctx, choice, problem, terms, q, k, v, *_):
        out, lse, saved = choice.train(problem, q, k, v, terms)
        ctx.set_materialize_grads(False)
        ctx.choice, ctx.problem, ctx.num_saved = choice, problem, len(saved)
        # Tensors only as saved tensors: autograd checks their versions, and hooks may move them.
        ctx.terms = tuple.__new__(type(terms), [None if isinstance(x, torch.Tensor) else x for x in terms])
        tensors = [x if isinstance(x, torch.Tensor) else None for x in terms]
        ctx.save_for_backward(q, k, v, *saved, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, *tensors = ctx.saved_tensors
        saved, tensors = tensors[: ctx.num_saved], tensors[ctx.num_saved :]
        if dout is None and dlse is None:
            return (None,) * (6 + len(tensors))
        if dout is None:
            dout = q.new_zeros(()).expand(saved[0].shape)
        kind = type(ctx.terms)
        terms = tuple.__new__(kind, [x if y is None else y for x, y in zip(ctx.terms, tensors, strict=True)])
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        twice, transformed = torch.is_grad_enabled(), is_transformed()
        problem = ctx.problem._replace(
            direction="backward", needs_grad=twice, lse=dlse is not None, transformed=transformed
        )
        # A derivative of this gradient is nothing that the kernels of a named backend have.
        backend = None if twice or transformed else ctx.choice.row.backend
        choices = dispatch.choices_of(problem, backend)
        choice = dispatch.first_that_takes(choices, problem)
        note(Bound(choice, problem, terms, backend))
        want_q, want_k, want_v, *wants = ctx.needs_input_grad[3:]
        wanted = want_q, want_k, want_v, tuple.__new__(kind, wants)
        dq, dk, dv, grads = choice.forward(problem, q, k, v, terms, saved, dout, dlse, wanted)
        return None, None, None, dq, dk, dv, *grads
