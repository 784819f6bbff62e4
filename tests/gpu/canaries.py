"""Kernels with a mistake that a comparison has to notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from fastattn import dispatch, plans
from fastattn.backends import triton
from fastattn.masks import UNBOUNDED


def ignores_the_mask(kernel, problem, q, k, v, terms):
    terms = terms._replace(diagonal_lo=-UNBOUNDED, diagonal_hi=UNBOUNDED, k_start=None, k_end=None, mask=None)
    return kernel(problem._replace(mask="none"), q, k, v, terms)


def scales_wrongly(kernel, problem, q, k, v, terms):
    """By one per cent."""
    return kernel(problem, q, k, v, terms._replace(softmax_scale=1.01 * terms.softmax_scale))


def reads_past_the_end(kernel, problem, q, k, v, terms):
    """One key more than there are."""
    return kernel(problem._replace(seqlen_k=problem.seqlen_k + 1), q, k, v, terms)


def writes_to_one_head(kernel, problem, q, k, v, terms):
    """All heads of a batch have one place for their results."""
    from fastattn import outputs

    empty_out = outputs.empty_out
    try:
        outputs.empty_out = lambda problem, q: empty_out(problem, q)[:, :1].expand(-1, problem.num_heads, -1, -1)
        return kernel(problem, q, k, v, terms)
    finally:
        outputs.empty_out = empty_out


MISTAKES = (ignores_the_mask, scales_wrongly)  # wrong results
FAULTS = (reads_past_the_end, writes_to_one_head)  # on a GPU as often as not right ones


@contextmanager
def planted(mistake) -> Iterator[dispatch.Row]:
    """Inside, triton.prefill makes this mistake, also where gradients will be asked for."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("prefill", "prefill_for_backward"):
                patch.setattr(triton, name, partial(mistake, getattr(triton, name)))
            plans.forget()  # or calls that have been planned already would not meet it
            yield next(row for row in dispatch.KERNELS if row.name == "triton.prefill")
    finally:
        plans.forget()
