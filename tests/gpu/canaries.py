"""Kernels with a mistake that a comparison has to notice."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastattn import dispatch, plans
from fastattn.masks import UNBOUNDED

(_PREFILL,) = [dispatch._load(row.entry) for row in dispatch.KERNELS if row.name == "triton.prefill"]


def ignores_the_mask(problem, q, k, v, terms):
    terms = terms._replace(diagonal_lo=-UNBOUNDED, diagonal_hi=UNBOUNDED, k_start=None, k_end=None, mask=None)
    return _PREFILL(problem._replace(mask="none"), q, k, v, terms)


def scales_wrongly(problem, q, k, v, terms):
    """By one per cent."""
    return _PREFILL(problem, q, k, v, terms._replace(softmax_scale=1.01 * terms.softmax_scale))


def reads_past_the_end(problem, q, k, v, terms):
    """One key more than there are."""
    return _PREFILL(problem._replace(seqlen_k=problem.seqlen_k + 1), q, k, v, terms)


def writes_to_one_head(problem, q, k, v, terms):
    """All heads of a batch have one place for their results."""
    from fastattn import outputs

    empty_out = outputs.empty_out
    try:
        outputs.empty_out = lambda problem, q: empty_out(problem, q)[:, :1].expand(-1, problem.num_heads, -1, -1)
        return _PREFILL(problem, q, k, v, terms)
    finally:
        outputs.empty_out = empty_out


MISTAKES = (ignores_the_mask, scales_wrongly)  # wrong results
FAULTS = (reads_past_the_end, writes_to_one_head)  # on a GPU as often as not right ones


@contextmanager
def planted(mistake) -> Iterator[dispatch.Row]:
    """Inside, triton.prefill makes this mistake."""
    before = dispatch.KERNELS
    entry = f"{__name__}:{mistake.__name__}"
    rows = tuple(row._replace(entry=entry) if row.name == "triton.prefill" else row for row in before)
    try:
        dispatch.KERNELS = rows
        plans.forget()
        yield next(row for row in rows if row.entry == entry)
    finally:
        dispatch.KERNELS = before
        plans.forget()
