"""Who may choose the kernel (`use`, FASTATTN_BACKEND), and how a user finds out what ran (`last_call`, `record`)."""

import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch.compiler import is_dynamo_compiling

from . import dispatch
from .dispatch import Choice, UnsupportedError, check_backend
from .masks.intervals import UNBOUNDED
from .plans import Bound
from .problem import Problem
from .terms import Terms

TRACE_SCHEMA = "fastattn-trace/1"
"""Of the files that `record` writes; docs/cli.md describes them."""


class FallbackWarning(UserWarning):
    """A call ran on the reference because every faster kernel refused it."""


class Call(NamedTuple):
    """What ran for one attention call: the problem, the kernel's name, its ISA (None off the CPU kernels), and why
    the rows of other backends before it refused ("" where there are none)."""

    problem: Problem
    kernel: str
    isa: str | None
    reason: str

    def __str__(self) -> str:
        isa = f" on {self.isa}" if self.isa else ""
        reason = f"; passed over {self.reason}" if self.reason else ""
        return f"{self.kernel}{isa} ran [{self.problem}]{reason}"


fallbacks: Counter = Counter()
"""Reason -> how many calls fell back to the reference for it, in this process."""

_POLICIES = ("warn", "silent", "error")


def _fallback_policy() -> str:
    policy = os.environ.get("FASTATTN_FALLBACK", "warn")
    if policy not in _POLICIES:
        raise ValueError(f"FASTATTN_FALLBACK={policy!r} must be one of {', '.join(_POLICIES)}")
    return policy


_fallback_policy()  # a misspelt one shows when fastattn is imported, and not at the first fallback
_environment_backend = check_backend(os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND")
_state = threading.local()
_recorders: ContextVar[tuple[Callable, ...]] = ContextVar("fastattn_recorders", default=())
# The default, and not a value that is set here: a new thread starts with an empty context.
_backend: ContextVar[str | None] = ContextVar("fastattn_backend", default=_environment_backend)

current_backend = _backend.get
"""The backend set by `use`, else by FASTATTN_BACKEND (read at import), else None: any."""

in_graph: list[str | None] = []
"""The backends of the `use` blocks around the call that Dynamo traces, which has no context variables."""


def note(call: Bound, q=None, k=None) -> None:
    """Before a kernel runs: count and report a fallback, remember the call for `last_call`, tell `recording`s.

    q, k: of a dense forward call. UnsupportedError if every kernel refuses the call.
    """
    choice, problem, _, backend = call
    if choice is None:
        raise dispatch.unsupported(problem, backend)
    if choice.is_fallback:
        _report_fallback(_record_of(choice, problem, backend))
    _state.last = last = choice, problem, backend  # not the call itself: nobody may keep its tensors
    if recorders := _recorders.get():
        last = _record_of(*last)
        for recorder in recorders:
            recorder(last, call, q, k)
        _state.last = last  # again: a recorder may have called attention


def _record_of(choice: Choice, problem: Problem, backend: str | None) -> Call:
    return Call(problem, choice.row.name, choice.isa, dispatch.reason_for(choice.row, problem, backend))


def last_call() -> Call | None:
    """What ran for the latest attention call of this thread: problem, kernel, ISA, reason. None before the first."""
    last = getattr(_state, "last", None)
    if last is not None and not isinstance(last, Call):
        last = _state.last = _record_of(*last)  # made when somebody asks
    return last


def latest() -> tuple[str, Problem] | None:
    """(kernel, problem) of the latest attention call of this thread: what costs nothing of `last_call`."""
    last = getattr(_state, "last", None)
    if last is None:
        return None
    return (last.kernel, last.problem) if isinstance(last, Call) else (last[0].row.name, last[1])


@contextmanager
def record(file: str | os.PathLike | None = None) -> Iterator[list[Call]]:
    """`with record() as calls:` collects a `Call` for each attention call made inside the block (in this context).

    file   where they go as JSON lines when the block ends, sizes and flags and no tensors: a trace of a model, which
           `python -m fastattn bench --trace FILE` replays on any machine. OSError, before the block, if it cannot be
           written
    """
    calls: list[Call] = []
    diagonals: list[tuple[int, int] | None] = []

    def recorder(call, bound, *_):
        calls.append(call)
        diagonals.append(_diagonal(bound.terms))

    if file is not None:
        _write_trace(file, [], [])
    try:
        with recording(recorder):
            yield calls
    finally:
        if file is not None:
            _write_trace(file, calls, diagonals)


@contextmanager
def recording(recorder: Callable | None) -> Iterator[None]:
    """Inside the block (in this context), recorder(call, bound, q, k) is told of each call before it runs, q and k of
    dense forward calls, else None; nobody is told anything where it is None."""
    token = _recorders.set((*_recorders.get(), recorder) if recorder else ())
    try:
        yield
    finally:
        _recorders.reset(token)


def _write_trace(file, calls: list[Call], diagonals: list[tuple[int, int] | None]) -> None:
    lines = [{"schema": TRACE_SCHEMA}]
    for call, diagonal in zip(calls, diagonals, strict=True):
        bounds = diagonal and [None if abs(x) >= UNBOUNDED else x for x in diagonal]
        lines.append({"problem": call.problem._asdict(), "diagonal": bounds, "kernel": call.kernel, "isa": call.isa})
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def _diagonal(terms) -> tuple[int, int] | None:
    return (terms.diagonal_lo, terms.diagonal_hi) if isinstance(terms, Terms) else None


class use(ContextDecorator):
    """`with use("cpu"):` allows only the kernels of that backend inside the block; None lifts the restriction.

    Also a decorator. A call without `with` changes nothing, and says so by a RuntimeWarning.
    """

    def __init__(self, backend: str | None):
        self._backend = check_backend(backend, "backend")
        self._tokens: list = []
        self._is_used = False

    def __call__(self, function):
        self._is_used = True
        return super().__call__(function)

    def _recreate_cm(self):  # each call of a decorated function gets a block of its own
        return use(self._backend)

    def __enter__(self) -> None:
        self._is_used = True
        if is_dynamo_compiling():
            in_graph.append(self._backend)
            return
        self._tokens.append(_backend.set(self._backend))

    def __exit__(self, *error) -> None:
        if is_dynamo_compiling():
            in_graph.pop()
            return
        _backend.reset(self._tokens.pop())

    def __del__(self):
        if not getattr(self, "_is_used", True):
            text = f"fastattn.use({self._backend!r}) has no effect outside a with statement"
            warnings.warn(text + "; FASTATTN_BACKEND sets the backend of a whole process", RuntimeWarning, 2)


def run_on(backend: str | None, function, *args):
    """`function(*args)` as inside of `use(backend)`, for less time."""
    token = _backend.set(backend)
    try:
        return function(*args)
    finally:
        _backend.reset(token)


def _report_fallback(call: Call) -> None:
    policy, reason = _fallback_policy(), call.reason
    memory = "O(edges * head_dim)" if call.problem.layout == "csr" else "O(n^2)"
    message = f"[{call.problem}] needs the reference, {memory} memory: {reason}"
    if policy == "error":
        raise UnsupportedError(f"{message} (FASTATTN_FALLBACK=error)")
    fallbacks[reason] += 1
    if policy == "warn" and fallbacks[reason] == 1:
        warnings.warn(message + " (said once per reason; FASTATTN_FALLBACK=silent hides it)", FallbackWarning, 4)
