"""Gradients of the compiled kernels; the reference is differentiable by itself and does not come here."""

from functools import cache

import torch

from .calls import note
from .dispatch import KernelError
from .plans import Bound, after_failure, gradients_of
from .torch_internals import direct_apply, is_in_old_vmap, is_transformed, shorten_backward
from .transforms.works import gradients_again

_new, _Tensor = tuple.__new__, torch.Tensor


class Differentiable(torch.autograd.Function):
    """(out, lse or None) of a call whose row has `train`, as apply(bound, q, k, v, *tensors): those among the terms
    once more, since autograd sees no tensors inside a tuple. All else that a call has is in `bound`.

    Saves its inputs, out (in float32 where it has 16 bits), and two numbers a row; nothing n x n.
    """

    @staticmethod
    def forward(ctx, bound, q, k, v, *tensors):
        choice, problem, terms, backend = bound
        out, lse, saved = choice.train(problem, q, k, v, terms)
        ctx.materialize_grads = False  # as set_materialize_grads and save_for_backward do it, without their frames
        ctx.places = places = _places_of(terms) if tensors else ()
        # Tensors only as saved tensors: autograd checks their versions, and hooks may move them.
        if tensors:
            bound = _new(Bound, (choice, problem, _replaced(terms, places, [None] * len(places)), backend))
        ctx.bound = bound
        ctx.to_save = q, k, v, *saved, *tensors
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        places = ctx.places
        if dout is None and dlse is None:
            return (None,) * (4 + len(places))
        q, k, v, *saved = ctx.saved_tensors
        choice, problem, terms, backend = ctx.bound
        _, want_q, want_k, want_v, *wanted = ctx.needs_input_grad
        wants = _none_wanted(type(terms))
        if places:
            saved, tensors = saved[: -len(places)], saved[-len(places) :]
            terms, wants = _replaced(terms, places, tensors), _replaced(wants, places, wanted)
        if dout is None:
            dout = q.new_zeros(()).expand(saved[0].shape)
        # Grad mode is on in here for create_graph=True alone: somebody will differentiate this gradient.
        if torch.is_grad_enabled() or is_transformed() or is_in_old_vmap(dout if dlse is None else dlse):
            call, wanted = (choice.row.backend, problem, (q, k, v), terms), (want_q, want_k, want_v, *wants)
            if problem.layout == "varlen":
                dq, dk, dv, *grads = _of_each(*call, dout, dlse, wanted)
            else:
                dq, dk, dv, *grads = gradients_again(*call, saved, dout, dlse, wanted, backend)
            return None, dq, dk, dv, *[grads[place] for place in places]
        bound = gradients_of(problem, choice.row, dlse is not None)
        wanted = want_q, want_k, want_v, wants
        while True:
            note(bound)
            try:
                dq, dk, dv, grads = bound.choice.forward(bound.problem, q, k, v, terms, saved, dout, dlse, wanted)
                if not places:
                    return None, dq, dk, dv
                return None, dq, dk, dv, *[grads[place] for place in places]
            except KernelError as error:
                bound = after_failure(bound._replace(backend=backend), error)


shorten_backward(Differentiable)
train_plain = direct_apply(Differentiable)
"""`train` of plain tensors, outside of torch.func and without tensors among the terms: what `recall` finds."""


def train(bound: Bound, q, k, v) -> tuple:
    """(out, lse or None) of a bound call whose row has `train`, as autograd sees it."""
    terms = bound.terms
    return Differentiable.apply(bound, q, k, v, *[terms[place] for place in _places_of(terms)])


def run(bound: Bound, q, k, v) -> tuple:
    """(out, lse) of a bound call, on the next kernel where one cannot be prepared. `attention` has this loop in line:
    a frame less."""
    while True:
        note(bound)
        choice, problem, terms, _ = bound
        try:
            if choice.train is None:
                return choice.forward(problem, q, k, v, terms)
            return train(bound, q, k, v)
        except KernelError as error:
            bound = after_failure(bound, error)


@cache
def _none_wanted(kind: type) -> tuple:
    """Terms of this kind, none of which wants a gradient."""
    return kind._make([False] * len(kind._fields))


def _places_of(terms: tuple) -> list[int]:
    """Where tensors stand."""
    return [place for place, x in enumerate(terms) if isinstance(x, _Tensor)]


def _of_each(*call) -> list:
    """Gradients of packed sequences through a call for each, which can be differentiated again."""
    from .layouts.each import gradients_again  # it calls `attention`, which comes here

    return gradients_again(*call)


def _replaced(terms: tuple, places: list[int], values: list) -> tuple:
    """`terms`, of its own type, with `values` in `places`."""
    replaced = list(terms)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return _new(type(terms), replaced)
