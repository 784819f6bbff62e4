"""Plans: what is found out once about a kind of call, whatever its lengths, and is looked up in later ones."""

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch

from . import dispatch
from .backends.cpu import signature as _cpu_signature
from .checks import broadcasts, check_flag
from .masks.intervals import NO_BOUNDS, Window, diagonal_bounds
from .problem import Problem
from .terms import TERMS, Terms
from .torch_internals import is_transformed
from .validation import check_qkv, check_terms, mask_kind


class Bound(NamedTuple):
    """A call whose arguments have been checked: what `attention` runs and `explain` prints.

    choice   the row that computes it, None where every row refuses
    terms    `Terms` (`Edges` for layout "csr")
    backend  the one that was asked for, or None
    """

    choice: dispatch.Choice | None
    problem: Problem
    terms: tuple
    backend: str | None


class Plan:
    """A kind of call: its Problem, terms and kernels, but for what lengths decide and for tensors."""

    __slots__ = ("problem", "terms", "windows", "choices", "backend", "latest")

    def __init__(self, problem: Problem, terms: Terms, windows: tuple[Window, ...], backend: str | None):
        self.problem, self.terms, self.windows, self.backend = problem, terms, windows, backend
        self.choices = dispatch.choices_of(problem, backend)
        self.latest: tuple[tuple, Bound | None] = ((), None)

    def at(self, lengths: tuple[int, int, int]) -> Bound:
        """The call with these (batch, seqlen_q, seqlen_k); the latest one is kept."""
        of_lengths, bound = self.latest
        if of_lengths == lengths:
            return bound
        problem, (_, seqlen_q, seqlen_k) = self.problem.with_lengths(lengths), lengths
        lo, hi = diagonal_bounds(self.windows, seqlen_q, seqlen_k) if self.windows else NO_BOUNDS
        choice = dispatch.first_that_takes(self.choices, problem)
        bound = _new(Bound, (choice, problem, self.terms.at(lo, hi, seqlen_k - seqlen_q), self.backend))
        self.latest = lengths, bound  # one assignment: other threads see the old pair or the new one
        return bound


_new, _is_grad_enabled = tuple.__new__, torch.is_grad_enabled
known: dict[tuple, Plan] = {}
"""By `signature` and settings of the call."""

bounds: dict[tuple, Bound] = {}
"""Calls over caches, by the dtypes and sizes of their tensors and their settings."""

_NOTHING = None, None, None, None
_latest_gradients = _NOTHING  # (problem, row, has_lse, what gradients_of has found for them)

_MAX_PLANS = 4096
_CAUSAL = (Window(None, 0),)
_PLACES = {term.name: place for place, term in enumerate(TERMS)}


def count() -> int:
    """How many kinds of calls are known."""
    return len(known)


def forget() -> None:
    """Drop all plans and selections, after a change of dispatch.KERNELS."""
    _forget_plans()
    dispatch.forget()


def _forget_plans() -> None:
    global _latest_gradients
    known.clear()
    bounds.clear()
    derivative_of.cache_clear()
    _latest_gradients = _NOTHING


def after_failure(bound: Bound, error: dispatch.KernelError) -> Bound:
    """The call on the next kernel that takes it. The one that could not be prepared is not asked again, and a
    RuntimeWarning tells of it where nothing else will."""
    failed, problem, terms, backend = bound
    dispatch.note_failure(failed.row, problem, str(error))
    _forget_plans()
    choice = dispatch.first_that_takes(dispatch.choices_of(problem, backend), problem)
    is_told = choice is None or choice.is_fallback or isinstance(error, dispatch.WrongResultError)
    if not is_told:
        text = f"{failed.row.name}: {error}; such calls go to {choice.row.name} from now on"
        warnings.warn(text, RuntimeWarning, 3)
    return _new(Bound, (choice, problem, terms, backend))


def remember(key: tuple, bound: Bound) -> None:
    """Keep what a later call with the same `key` will find in `bounds`."""
    if len(bounds) >= _MAX_PLANS:
        bounds.clear()
    bounds[key] = bound


def recall(q, k, v, settings: tuple) -> Bound | None:
    """The call without masks and tensors that has these settings, where its kind is known: the shortest way to it."""
    try:
        found = None if is_transformed() else _cpu_signature(q, k, v)
        if found is None:
            return None
        key, lengths = found
        needs_grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        plan = known.get((key, settings, needs_grad))
    except (AttributeError, TypeError):  # `bind` says what is wrong
        return None
    if plan is None:
        return None
    of_lengths, bound = plan.latest
    return bound if of_lengths == lengths else plan.at(lengths)


def find(q, k, v, windows: tuple[Window, ...], tensors: dict, settings: tuple, needs_grad: bool) -> Bound:
    """The call with these arguments, checked once for each kind of call.

    windows   diagonal bounds beside `causal`; tensors: terms by name, and the seed
    settings  causal, softmax_scale, softcap, dropout_p, skip_negligible, rotary_interleaved, return_lse, backend
    """
    seed = tensors.pop("seed", None)
    key, lengths = signature(q, k, v, tensors)
    key = (key, settings, needs_grad, windows, *tensors) if tensors or windows else (key, settings, needs_grad)
    try:
        plan = known.get(key)
    except TypeError:  # an argument is not hashable: the checks say which
        plan = None
    if plan is None:
        windows = (*windows, *_CAUSAL) if settings[0] else windows
        names = ("softmax_scale", "softcap", "dropout_p", "skip_negligible", "rotary_interleaved")
        facts = {"lse": check_flag("return_lse", settings[6]), "needs_grad": needs_grad}
        numbers = dict(zip(names, settings[1:6], strict=True))
        plan = make(key, q, k, v, windows, tensors, numbers, facts, settings[7])
    if seed is not None:
        tensors["seed"] = seed
    bound = plan.at(lengths)
    return with_values(bound, tensors) if tensors else bound


def signature(q, k, v, tensors: dict) -> tuple[tuple, tuple[int, int, int]]:
    """(what decides about a plan of these tensors, (batch, seqlen_q, seqlen_k)); raises if q, k, v do not fit.

    tensors: terms by name, a BlockMask among them.
    """
    transformed = is_transformed()
    if not tensors:
        if not transformed and (found := _cpu_signature(q, k, v)) is not None:
            return found
    elif "block_mask" in tensors:
        return _signature_with_blocks(q, k, v, tensors)
    elif not transformed and (found := _cpu_signature(q, k, v, *tensors.values())) is not None:
        return found
    problem = check_qkv(q, k, v)
    sizes = (1, problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k, problem.num_diagonals)
    rest = [(x.dtype, x.device, _relative(x.shape, sizes)) for x in tensors.values()]
    return (problem.kind, q.device, transformed, *rest), (problem.batch, problem.seqlen_q, problem.seqlen_k)


def _signature_with_blocks(q, k, v, tensors: dict) -> tuple[tuple, tuple[int, int, int]]:
    block_mask = tensors["block_mask"]
    key, lengths = signature(q, k, v, {name: x for name, x in tensors.items() if name != "block_mask"})
    shape, block_size, device = block_mask.described
    fits = broadcasts(shape, (lengths[0], q.shape[1], *lengths[1:])) and shape[2:] == lengths[1:]
    return (key, fits, shape[0] == 1, shape[1] == 1, block_size, device), lengths


def _relative(shape, sizes: tuple[int, ...]) -> tuple:
    """A shape without its lengths: of each size, which of `sizes` it equals, or the size itself if none."""
    return tuple([tuple([size == x for x in sizes]) if size in sizes else size for size in shape])


def make(key: tuple, q, k, v, windows: tuple[Window, ...], tensors: dict, numbers: dict, facts: dict, backend) -> Plan:
    """Check a kind of call that is new, and keep its plan.

    tensors, numbers   values of terms by name; facts: fields of the Problem that are no terms
    """
    problem = check_qkv(q, k, v)
    numbers = check_terms(problem, q.device, tensors, numbers)
    if "softmax_scale" not in tensors and numbers["softmax_scale"] is None:
        numbers["softmax_scale"] = problem.head_dim**-0.5
    if numbers["rotary_interleaved"] and "rotary_cos" not in tensors:
        raise ValueError("rotary_interleaved=True says how rotary= turns; pass rotary=(cos, sin), too")
    dispatch.check_backend(backend, "backend")
    values = numbers | tensors
    facts |= {term.fact[0]: term.fact[1](values[term.name]) for term in TERMS if term.fact and term.name in values}
    kind = mask_kind(tensors, *diagonal_bounds(windows, problem.seqlen_q, problem.seqlen_k))
    problem = problem._replace(mask=kind, transformed=is_transformed(), **facts)
    if len(known) >= _MAX_PLANS:
        known.clear()
    plan = known[key] = Plan(problem, Terms(**numbers), windows, backend)
    return plan


def with_values(bound: Bound, given: dict) -> Bound:
    """`bound` with the tensors (and the seed) of one call in the places of its terms."""
    choice, problem, terms, backend = bound
    values = list(terms)
    for name, value in given.items():
        values[_PLACES[name]] = value
    return _new(Bound, (choice, problem, _new(Terms, values), backend))


def gradients_of(problem: Problem, row: dispatch.Row, has_lse: bool) -> Bound:
    """`derivative_of` what `row` ran, in direction "backward". The latest one is kept: a tiny call notices the hash of
    a Problem."""
    global _latest_gradients
    of_problem, of_row, of_lse, bound = _latest_gradients
    if of_problem is problem and of_row is row and of_lse == has_lse:
        return bound
    bound = derivative_of(problem, "backward", row.backend, has_lse)
    _latest_gradients = problem, row, has_lse, bound  # one assignment, for other threads
    return bound


@lru_cache(maxsize=1024)
def derivative_of(problem: Problem, direction: str, backend: str, has_lse: bool) -> Bound:
    """The call, without terms, that computes a derivative of `problem`, which ran on `backend`: gradients (direction
    "backward"; has_lse: given one of lse), or what other backends may compute where this one does not ("tangent",
    "second")."""
    problem = problem._replace(direction=direction, needs_grad=False, lse=has_lse)
    for asked in (backend, None):
        choice = dispatch.first_that_takes(dispatch.choices_of(problem, asked), problem)
        if choice is not None:
            break
    return Bound(choice, problem, (), asked)
