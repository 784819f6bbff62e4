"""Gradients of the compiled kernels; the reference is differentiable by itself and does not come here."""

import torch

from .calls import note
from .dispatch import KernelError
from .plans import Bound, after_failure, derivative_of
from .torch_internals import is_in_old_vmap, is_transformed
from .transforms.works import gradients_again

_new, _Tensor = tuple.__new__, torch.Tensor


class Differentiable(torch.autograd.Function):
    """(out, lse) of a call whose row has `train`, as apply(bound, q, k, v, *terms): each field of the terms is an
    argument of its own, since autograd sees no tensors inside a tuple.

    Saves its inputs, out (in float32 where it has 16 bits), and two numbers a row; nothing n x n.
    """

    @staticmethod
    def forward(ctx, bound, q, k, v, *_):
        choice, problem, terms, backend = bound
        out, lse, saved = choice.train(problem, q, k, v, terms)
        ctx.set_materialize_grads(False)
        ctx.num_saved = len(saved)
        # Tensors only as saved tensors: autograd checks their versions, and hooks may move them.
        ctx.places = places = [place for place, x in enumerate(terms) if isinstance(x, _Tensor)]
        ctx.bound = _new(Bound, (choice, problem, _replaced(terms, places, [None] * len(places)), backend))
        ctx.save_for_backward(q, k, v, *saved, *[terms[place] for place in places])
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, *saved = ctx.saved_tensors
        saved, tensors = saved[: ctx.num_saved], saved[ctx.num_saved :]
        want_q, want_k, want_v, *wants = ctx.needs_input_grad[1:]
        if dout is None and dlse is None:
            return (None,) * (4 + len(wants))
        if dout is None:
            dout = q.new_zeros(()).expand(saved[0].shape)
        choice, problem, terms, backend = ctx.bound
        terms = _replaced(terms, ctx.places, tensors)
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        if torch.is_grad_enabled() or is_transformed() or is_in_old_vmap(dout if dlse is None else dlse):
            call = choice.row.backend, problem, (q, k, v), terms
            if problem.layout == "varlen":
                return None, *_of_each(*call, dout, dlse, ctx.needs_input_grad[1:])
            return None, *gradients_again(*call, saved, dout, dlse, ctx.needs_input_grad[1:])
        bound = derivative_of(problem, "backward", choice.row.backend, dlse is not None)
        wanted = want_q, want_k, want_v, _new(type(terms), wants)
        while True:
            note(bound)
            try:
                dq, dk, dv, grads = bound.choice.forward(bound.problem, q, k, v, terms, saved, dout, dlse, wanted)
                return None, dq, dk, dv, *grads
            except KernelError as error:
                bound = after_failure(bound._replace(backend=backend), error)


def run(bound: Bound, q, k, v) -> tuple:
    """(out, lse) of a bound call, on the next kernel where one cannot be prepared. `attention` has this loop in line:
    a frame less."""
    while True:
        note(bound)
        choice, problem, terms, _ = bound
        try:
            if choice.train is None:
                return choice.forward(problem, q, k, v, terms)
            return Differentiable.apply(bound, q, k, v, *terms)
        except KernelError as error:
            bound = after_failure(bound, error)


def _of_each(*call) -> list:
    """Gradients of packed sequences through a call for each, which can be differentiated again."""
    from .layouts.each import gradients_again  # it calls `attention`, which comes here

    return gradients_again(*call)


def _replaced(terms: tuple, places: list[int], values: list) -> tuple:
    """`terms`, of its own type, with `values` in `places`."""
    if not places:
        return terms
    replaced = list(terms)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return _new(type(terms), replaced)
