"""Which kernel runs: one table, `KERNELS`, best first; the order is the policy.

`select` takes the first row that does not refuse the problem. A refusal is text: the field, its value, what the row
supports. An argument that a kernel cannot honour is a refusal, so nothing is ever ignored.
"""

import importlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import NamedTuple

from . import gpu
from .problem import FLOATS, MASK_KINDS, Problem


class FallbackWarning(UserWarning):
    """A call ran on the reference because every faster kernel refused it."""


class UnsupportedError(NotImplementedError):
    """A backend asked for by name refuses the call, or FASTATTN_FALLBACK=error forbids the reference."""


class Row(NamedTuple):
    """A kernel: its name "backend.algorithm", its entry point, and what it supports.

    entry      "module:function", imported on first use. The function is called as kernel(problem, q, k, v, terms), with
               `Terms`, and returns (out, lse or None), which autograd can go through if problem.needs_grad.
               That of a backward row is called as kernel(problem, q, k, v, terms, saved, dout, dlse, wanted), saved
               being what the forward row keeps, and returns the gradients of q, k, v, bias, alibi_slopes, sinks and
               softmax_scale, None where wanted is False.
    available  "module:function" that returns None, or why the kernel cannot run on this machine; None: always
    supports   Problem field -> plain container of accepted values; a field that is missing accepts anything
    backward   name of the row that computes its gradients and has to accept them too; None: autograd does it
    """

    name: str
    entry: str
    available: str | None
    supports: dict
    backward: str | None = None

    @property
    def backend(self) -> str:
        return self.name.split(".")[0]


_CPU = {
    "device": {"cpu"},
    "dtype": set(FLOATS),
    "head_dim": range(1, 513),
    "head_dim_v": range(1, 513),
    "layout": {"dense"},
    "mask": set(MASK_KINDS),
    "bias": {"none", *FLOATS},
    "transformed": {False},
}

_TRITON = {
    "device": {"cuda", "cpu"} if gpu.INTERPRETED else {"cuda"},
    "dtype": {"float16", "bfloat16", "float32"},
    "seqlen_q": range(0, 2**30),
    "seqlen_k": range(0, 2**30),
    "head_dim": range(1, 257),
    "head_dim_v": range(1, 257),
    "layout": {"dense"},
    "mask": set(MASK_KINDS),
    "bias": {"none", *FLOATS},
    "transformed": {False},
}

KERNELS = (
    Row(
        "cpu.prefill",
        "fastattn.cpu:prefill",
        "fastattn.cpu:unavailable",
        {**_CPU, "direction": {"forward"}},
        backward="cpu.backward",
    ),
    Row(
        "cpu.backward",
        "fastattn.cpu:backward",
        "fastattn.cpu:unavailable",
        {**_CPU, "direction": {"backward"}, "needs_grad": {False}},
    ),
    Row(
        "triton.decode",
        "fastattn.gpu:decode",
        "fastattn.gpu:unavailable",
        {
            **_TRITON,
            "seqlen_q": range(0, 17),
            "mask": set(MASK_KINDS) - {"block"},
            "direction": {"forward"},
            "needs_grad": {False},
        },
    ),
    Row(
        "triton.prefill",
        "fastattn.gpu:prefill",
        "fastattn.gpu:unavailable",
        {**_TRITON, "direction": {"forward"}},
        backward="triton.backward",
    ),
    Row(
        "triton.backward",
        "fastattn.gpu:backward",
        "fastattn.gpu:unavailable",
        {**_TRITON, "direction": {"backward"}, "needs_grad": {False}},
    ),
    Row(
        "reference.backward", "fastattn.reference:run_backward", None, {"layout": {"dense"}, "direction": {"backward"}}
    ),
    Row("reference", "fastattn.reference:run", None, {"layout": {"dense"}, "direction": {"forward"}}),
)

BACKENDS = tuple(dict.fromkeys(row.backend for row in KERNELS))


class Call(NamedTuple):
    """What ran for one attention call: the problem, the kernel's name, its ISA (None off the CPU kernels), and why
    the rows before it refused ("" for the first choice)."""

    problem: Problem
    kernel: str
    isa: str | None
    reason: str


class Choice(NamedTuple):
    """A selected row: its function, the record of the call, and whether it is a fallback nobody asked for."""

    kernel: Callable
    call: Call
    is_fallback: bool


@lru_cache(maxsize=4096)
def select(problem: Problem, backend: str | None) -> Choice:
    """The first row of KERNELS that accepts `problem`, among those of `backend` if one is named."""
    refusals, passed_over = [], []
    for row in _rows(backend):
        reasons = refuse(row, problem)
        if not reasons:
            function = _load(row.entry)
            is_fallback = bool(passed_over) and row.backend == "reference"
            return Choice(function, Call(problem, row.name, _isa(row), "; ".join(passed_over)), is_fallback)
        refusals.append(f"{row.name}: {', '.join(reasons)}")
        if _is_of_direction(row, problem):
            passed_over.append(refusals[-1])
    raise UnsupportedError(
        f"backend={backend!r} refuses [{problem}]: {'; '.join(refusals)}. "
        f"{_nearest(problem, backend)} (explain() lists every kernel)"
    )


def refuse(row: Row, problem: Problem) -> list[str]:
    """Why `row` does not accept `problem`; empty if it does."""
    missing = _unavailable(row.available) if row.available else None
    return ([missing] if missing else []) + [
        f"{field}={value!r} (supports {describe(accepted)})" for field, value, accepted in _mismatches(row, problem)
    ]


def _is_of_direction(row: Row, problem: Problem) -> bool:
    return problem.direction in row.supports.get("direction", (problem.direction,))


def backward_of(problem: Problem) -> Problem:
    """The backward call that a forward call with needs_grad leads to."""
    return problem._replace(direction="backward", needs_grad=False)


def _mismatches(row: Row, problem: Problem) -> list[tuple[str, object, object]]:
    """(field, value, accepted values) of each refusal, those of the row's backward included where it will be needed."""
    found = {
        field: (field, getattr(problem, field), accepted)
        for field, accepted in row.supports.items()
        if getattr(problem, field) not in accepted
    }
    if problem.needs_grad and row.backward is not None:
        (backward,) = [other for other in KERNELS if other.name == row.backward] or [None]
        for mismatch in _mismatches(backward, backward_of(problem)) if backward else ():
            found.setdefault(mismatch[0], mismatch)
    return list(found.values())


def describe(accepted) -> str:
    """A container of accepted values as text."""
    if isinstance(accepted, range):
        step = f" in steps of {accepted.step}" if accepted.step != 1 else ""
        return f"{accepted.start}...{accepted[-1]}{step}"
    return " | ".join(sorted(map(str, accepted)))


def explain(problem: Problem, backend: str | None) -> str:
    """Every row of KERNELS with its verdict on `problem`, one a line; computes nothing."""
    lines = [str(problem)]
    problems = [problem, backward_of(problem)] if problem.needs_grad else [problem]
    for of_direction in problems:
        chosen = False
        for row in KERNELS:
            if not _is_of_direction(row, of_direction):
                continue
            reasons = refuse(row, of_direction)
            if backend is not None and row.backend != backend:
                reasons.append(f"backend={backend!r} was asked for")
            runs = f"runs on {_isa(row)}" if _isa(row) else "runs"
            verdict = "refused: " + ", ".join(reasons) if reasons else "accepted" if chosen else runs
            chosen = chosen or not reasons
            lines.append(f"  {row.name:<20}{verdict}")
    return "\n".join(lines)


def note(choice: Choice) -> None:
    """Before a kernel runs: count and report a fallback, remember the call for `last_call` and `record`."""
    if choice.is_fallback:
        _report_fallback(choice.call)
    _state.last = choice.call
    if recorders := _recorders.get():
        for calls in recorders:
            calls.append(choice.call)


def last_call() -> Call | None:
    """What ran for the latest attention call of this thread: problem, kernel, ISA, reason. None before the first."""
    return getattr(_state, "last", None)


@contextmanager
def record() -> Iterator[list[Call]]:
    """`with record() as calls:` collects a `Call` for each attention call made inside the block (in this context)."""
    calls: list[Call] = []
    token = _recorders.set((*_recorders.get(), calls))
    try:
        yield calls
    finally:
        _recorders.reset(token)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """`with use("cpu"):` allows only the kernels of that backend inside the block; None lifts the restriction."""
    token = _backend.set(check_backend(backend, "backend"))
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> str | None:
    """The backend set by `use`, else by FASTATTN_BACKEND (read at import), else None: any."""
    return _backend.get()


def check_backend(backend: str | None, argument: str) -> str | None:
    """`backend` itself if it is known or None; ValueError otherwise."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{argument}={backend!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    return backend


fallbacks: Counter = Counter()
"""Reason -> how many calls fell back to the reference for it, in this process."""

_state = threading.local()
_recorders: ContextVar[tuple[list[Call], ...]] = ContextVar("fastattn_recorders", default=())
_environment_backend = check_backend(os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND")
# The default, and not a value that is set here: a new thread starts with an empty context.
_backend: ContextVar[str | None] = ContextVar("fastattn_backend", default=_environment_backend)
_FALLBACK_POLICIES = ("warn", "silent", "error")


def _rows(backend: str | None) -> tuple[Row, ...]:
    return KERNELS if backend is None else tuple(row for row in KERNELS if row.backend == backend)


@cache
def _load(entry: str) -> Callable:
    module, function = entry.split(":")
    return getattr(importlib.import_module(module), function)


@cache
def _unavailable(check: str) -> str | None:
    return _load(check)()


def _isa(row: Row) -> str | None:
    """The instruction set that a row's kernel runs on; RuntimeError if FASTATTN_CPU_ISA names one it cannot run on."""
    missing = row.backend != "cpu" or _unavailable(row.available)
    return None if missing else importlib.import_module("fastattn.cpu").isa()


def _nearest(problem: Problem, backend: str | None) -> str:
    row = min(_rows(backend), key=lambda row: len(refuse(row, problem)))
    if row.available and _unavailable(row.available):
        return "Nothing but another backend would do"
    changes = [
        f"{field}={min(accepted, key=lambda a: abs(a - value)) if isinstance(accepted, range) else describe(accepted)}"
        for field, value, accepted in _mismatches(row, problem)
    ]
    return f"{row.name} would accept it with {', '.join(changes)}"


def _report_fallback(call: Call) -> None:
    policy = os.environ.get("FASTATTN_FALLBACK", "warn")
    if policy not in _FALLBACK_POLICIES:
        raise ValueError(f"FASTATTN_FALLBACK={policy!r} must be one of {', '.join(_FALLBACK_POLICIES)}")
    message = f"[{call.problem}] needs the reference, O(n^2) memory: {call.reason}"
    if policy == "error":
        raise UnsupportedError(f"{message} (FASTATTN_FALLBACK=error)")
    fallbacks[call.reason] += 1
    if policy == "warn" and fallbacks[call.reason] == 1:
        warnings.warn(message + " (said once per reason; FASTATTN_FALLBACK=silent hides it)", FallbackWarning, 4)


def support_matrix() -> str:
    """What each row of KERNELS supports, as a Markdown table: Problem fields down, kernels across."""
    fields = list(dict.fromkeys(field for row in KERNELS for field in row.supports))
    lines = [
        "| | " + " | ".join(row.name for row in KERNELS) + " |",
        "|---|" + "---|" * len(KERNELS),
    ]
    for field in fields:
        cells = [describe(row.supports[field]) if field in row.supports else "any" for row in KERNELS]
        lines.append(f"| {field} | " + " | ".join(cell.replace(" | ", ", ") for cell in cells) + " |")
    return "\n".join(lines)
