"""Which kernel runs: the order of the rows of `KERNELS` (`fastattn.kernel_table`) is the policy.

`select` takes the first row that does not refuse the problem. A refusal is text: the field, its value, what the row
supports. An argument that a kernel cannot honour is a refusal, so nothing is ever ignored.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from .backends import cpu
from .checks import one_line
from .kernel_table import BACKENDS, IN_BLOCKS, KERNELS, SEQUENCES, Row
from .problem import BY_LENGTHS, Problem

_TRANSFORMED = "fastattn.transforms.works:attention"


class UnsupportedError(NotImplementedError):
    """A backend asked for by name refuses the call, or FASTATTN_FALLBACK=error forbids the reference."""


class KernelError(RuntimeError):
    """A kernel could not be compiled or loaded for the device of its tensors: the next row is asked then."""


class WrongResultError(KernelError):
    """What a kernel computed is wrong, of which a warning has told already."""


def check_backend(backend: str | None, argument: str) -> str | None:
    """`backend` itself if it is known or None; ValueError otherwise."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"{argument}={one_line(backend)} is not a backend; choose one of {', '.join(BACKENDS)}")
    return backend


class Choice(NamedTuple):
    """A row that accepts a kind of call: its functions, and what is known of it without the lengths.

    lengths      what is left to ask: (field, accepted values) for those of BY_LENGTHS that the row restricts
    declines     what is asked after that, or None (`Row.declines`)
    is_fallback  it is the reference, after a faster kernel has refused
    isa          the instruction set of a CPU kernel, else None
    """

    row: Row
    forward: Callable
    train: Callable | None
    lengths: tuple
    declines: Callable | None
    is_fallback: bool
    isa: str | None

    @property
    def takes_meta(self) -> bool:
        """Whether the row itself says that it takes tensors without memory (to compile kernels without a device)."""
        return "meta" in self.row.supports.get("device", ())

    def takes(self, problem: Problem) -> bool:
        """Whether the lengths of `problem` are accepted."""
        for field, accepted in self.lengths:  # all() of a generator takes twice as long
            if getattr(problem, field) not in accepted:
                return False
        return self.declines is None or self.declines(problem) is None


def select(problem: Problem, backend: str | None) -> Choice:
    """The first row of KERNELS that accepts `problem`, among those of `backend` if one is named; UnsupportedError."""
    choice = first_that_takes(choices_of(problem, backend), problem)
    if choice is None:
        raise unsupported(problem, backend)
    return choice


def first_that_takes(choices: tuple[Choice, ...], problem: Problem) -> Choice | None:
    """The first of `choices_of` that accepts the lengths of `problem`, None if there is none."""
    for choice in choices:
        if not choice.lengths or choice.takes(problem):
            return choice
    return None


def choices_of(problem: Problem, backend: str | None) -> tuple[Choice, ...]:
    """The rows that accept this kind of problem, up to the first that takes all lengths; remembered by the kind."""
    key = (problem.kind, backend)
    choices = _choices.get(key)
    if choices is None:
        if len(_choices) >= _MAX_KINDS:
            _choices.clear()
        choices = _choices[key] = _find_choices(problem, backend)
    return choices


_choices: dict[tuple, tuple[Choice, ...]] = {}
_MAX_KINDS = 4096


def note_failure(row: Row, problem: Problem, reason: str) -> None:
    """`row` refuses calls of this kind from now on."""
    _failures[row.name, _kind_of(problem)] = reason
    _choices.clear()


_failures: dict[tuple, str] = {}


def _kind_of(problem: Problem) -> tuple:
    return problem._replace(lse=False).kind  # no reason to compile again; another device is


def _failure(row: Row, problem: Problem) -> str | None:
    """Why the row's kernel, or the one of its gradients where they will be wanted, could not be prepared before."""
    found = _failures.get((row.name, _kind_of(problem)))
    if found is None and problem.needs_grad and row.backward is not None:
        found = _failures.get((row.backward, _kind_of(backward_of(problem))))
    return found


def _find_choices(problem: Problem, backend: str | None) -> tuple[Choice, ...]:
    choices, is_passed_over = [], False
    for row in rows_of(backend, problem.layout):
        if not _is_of_direction(row, problem):
            continue
        mismatches = _mismatches(row, problem)
        if _missing(row) or _failure(row, problem) or any(field not in BY_LENGTHS for field, _, _ in mismatches):
            is_passed_over = True
            continue
        lengths = tuple((field, accepted) for field, accepted in _supports(row, problem) if field in BY_LENGTHS)
        is_fallback = row.backend == "reference" and is_passed_over and problem.direction not in IN_BLOCKS
        train = _load(row.train) if row.train and problem.needs_grad else None
        forward = _load(row.entry)
        if problem.transformed and problem.direction == "forward" and problem.layout not in SEQUENCES:
            forward, train = partial(_load(_TRANSFORMED), row.backend, backend), None
        declines = _load(row.declines) if row.declines else None
        choices.append(Choice(row, forward, train, lengths, declines, is_fallback, isa_of(row, problem)))
        if not lengths:
            break
        is_passed_over = True
    return tuple(choices)


def refuse(row: Row, problem: Problem) -> list[str]:
    """Why `row` does not accept `problem`; empty if it does."""
    missing = [x for x in (_missing(row), _failure(row, problem)) if x]
    reasons = missing + [
        f"{field}={value!r} (supports {text_of(accepted)})" for field, value, accepted in _mismatches(row, problem)
    ]
    declined = _load(row.declines)(problem) if row.declines and not reasons else None
    return [declined] if declined else reasons


def reason_for(row: Row, problem: Problem, backend: str | None) -> str:
    """Why the rows of other backends before `row` refused, "" if there are none: which of its own kernels a backend
    runs is no news to anybody, unless one of them has failed."""
    passed_over = []
    for other in rows_of(backend, problem.layout):
        if other.name == row.name:
            break
        if _is_of_direction(other, problem) and (other.backend != row.backend or _failure(other, problem)):
            passed_over.append(f"{other.name}: {', '.join(refuse(other, problem))}")
    return "; ".join(passed_over)


def unsupported(problem: Problem, backend: str | None) -> UnsupportedError:
    """The error of a call that every row refuses."""
    refusals = "; ".join(f"{row.name}: {', '.join(refuse(row, problem))}" for row in rows_of(backend, problem.layout))
    return UnsupportedError(
        f"backend={backend!r} refuses [{problem}]: {refusals}. {_nearest(problem, backend)} "
        "(explain() lists every kernel)"
    )


def backward_of(problem: Problem) -> Problem:
    """The backward call that a forward call with needs_grad leads to."""
    return problem._replace(direction="backward", needs_grad=False)


def text_of(accepted) -> str:
    """A container of accepted values as text."""
    if isinstance(accepted, range):
        step = f" in steps of {accepted.step}" if accepted.step != 1 else ""
        return f"{accepted.start}...{accepted[-1]}{step}"
    return " | ".join(sorted(map(str, accepted)))


def explain(problem: Problem, backend: str | None) -> str:
    """Every row of KERNELS for the problem's layout with its verdict on `problem`, one a line; computes nothing."""
    lines = [str(problem)]
    problems = [problem, backward_of(problem)] if problem.needs_grad else [problem]
    for of_direction in problems:
        chosen = False
        for row in rows_of(None, problem.layout):
            if not _is_of_direction(row, of_direction):
                continue
            reasons = refuse(row, of_direction)
            if backend is not None and row.backend != backend:
                reasons.append(f"backend={backend!r} was asked for")
            isa = isa_of(row, of_direction)
            runs = f"runs on {isa}" if isa else "runs"
            runs += ", products in float32" if isa and cpu.forgoes_pairs(row.name, of_direction) else ""
            runs += ", on one thread: torch has loaded no OpenMP runtime" if isa and not cpu.openmp() else ""
            verdict = "refused: " + ", ".join(reasons) if reasons else "accepted (not reached)" if chosen else runs
            chosen = chosen or not reasons
            lines.append(f"  {row.name:<24}{verdict}")
    return "\n".join(lines)


def support_matrix(layout: str = "dense") -> str:
    """What each row of KERNELS for a layout supports, as a Markdown table: Problem fields down, kernels across."""
    rows = rows_of(None, layout)
    fields = list(dict.fromkeys(field for row in rows for field in row.supports))
    lines = ["| | " + " | ".join(row.name for row in rows) + " |", "|---|" + "---|" * len(rows)]
    for field in fields:
        cells = [text_of(row.supports[field]) if field in row.supports else "any" for row in rows]
        lines.append(f"| {field} | " + " | ".join(cell.replace(" | ", ", ") for cell in cells) + " |")
    return "\n".join(lines)


def rows_of(backend: str | None, layout: str) -> list[Row]:
    """Those of `backend` if one is named; those for other layouts, which other functions call, only if none is left."""
    rows = [row for row in KERNELS if backend in (None, row.backend)]
    return [row for row in rows if layout in row.supports.get("layout", (layout,))] or rows


def isa_of(row: Row, problem: Problem) -> str | None:
    """The instruction set that a row's kernel computes `problem` on, None if it is not compiled for the CPU;
    ValueError if FASTATTN_CPU_ISA names one that cannot run here."""
    return None if row.backend != "cpu" or _missing(row) else cpu.isa_of(row.name, problem)


def forget() -> None:
    """Drop what is remembered of selections, after a change of KERNELS."""
    _choices.clear(), _failures.clear()
    _load.cache_clear()
    _answer.cache_clear()


def _supports(row: Row, problem: Problem) -> list[tuple[str, object]]:
    """What the row accepts, and what the row of its gradients accepts where it will be needed."""
    supports = list(row.supports.items())
    if problem.needs_grad and row.backward is not None:
        for backward in (other for other in KERNELS if other.name == row.backward):
            supports += [(field, x) for field, x in backward.supports.items() if field != "direction"]
    return supports


def _mismatches(row: Row, problem: Problem) -> list[tuple[str, object, object]]:
    """(field, value, accepted values) of each refusal."""
    found = {}
    for field, accepted in _supports(row, problem):
        value = getattr(problem, field)
        if value not in accepted:
            found.setdefault(field, (field, value, accepted))
    return list(found.values())


def _is_of_direction(row: Row, problem: Problem) -> bool:
    return problem.direction in row.supports.get("direction", (problem.direction,))


@cache
def _load(entry: str) -> Callable:
    module, function = entry.split(":")
    return getattr(importlib.import_module(module), function)


@cache
def _answer(check: str) -> str | None:
    return _load(check)()


def _missing(row: Row) -> str | None:
    """Why the row's kernel cannot run on this machine."""
    return _answer(row.available) if row.available else None


def _nearest(problem: Problem, backend: str | None) -> str:
    row = min(rows_of(backend, problem.layout), key=lambda row: len(refuse(row, problem)))
    if _missing(row):
        return "Nothing but another backend would do"
    changes = [
        f"{field}={min(accepted, key=lambda a: abs(a - value)) if isinstance(accepted, range) else text_of(accepted)}"
        for field, value, accepted in _mismatches(row, problem)
    ]
    return f"{row.name} would accept it with {', '.join(changes) or 'other lengths'}"
