"""`apply`: attention of one model on fastattn, counted, with exact undo."""

import fnmatch
import json
import weakref
from time import perf_counter_ns

from torch import nn

from ..calls import current_backend, latest, run_on
from ..checks import one_line
from ..dispatch import UnsupportedError, check_backend
from ..torch_internals import is_in_functorch, num_dispatch_modes
from . import scopes
from .multihead import computed
from .report import Counts, Report
from .routes import Scope, close_routes, open_routes

_CHOICES = "fallback", "error"


class Replacement:
    """The route to fastattn: what it cannot compute goes to torch, and every call is counted."""

    replaces = True

    def __init__(self, backend: str | None, on_unsupported: str):
        check_backend(backend, "backend")
        if on_unsupported not in _CHOICES:
            raise ValueError(f"on_unsupported={one_line(on_unsupported)} must be one of {', '.join(_CHOICES)}")
        self.backend, self.on_unsupported, self.counts = backend, on_unsupported, Counts()

    def answer(self, name: str, call):
        """What `call` of the module `name` returns. UnsupportedError where fastattn refuses and must not."""
        begin = perf_counter_ns()
        try:
            if is_in_functorch():
                raise UnsupportedError("inside a torch.func transform; call fastattn.attention itself there")
            # A kernel that refuses is an error then, and no reference of O(n^2) memory.
            result = run_on(self.backend or current_backend() or "cpu", computed, call)
            kernel, example = latest() if not num_dispatch_modes() else ("(traced)", "while a graph is made")
            why = ""
        except (UnsupportedError, TypeError, ValueError) as error:
            why = str(error)
            if self.on_unsupported == "error":
                where = name or "the model"
                raise UnsupportedError(f"attention of {where}: {why} (on_unsupported='error')") from error
            result, kernel, example = call.torchs(), "torch", type(call).__name__
        self.counts.add(name, kernel, why, perf_counter_ns() - begin, example)
        return result

    def left(self, nanoseconds: int) -> None:
        """Count the time of a whole forward."""
        self.counts.left(nanoseconds)


class Handle:
    """What `apply` returns: `report` tells what happened, `remove` undoes it; `with` removes at its end."""

    def __init__(self, route: Replacement, names: dict[nn.Module, str], skipped: dict[str, str]):
        self._route, self._names, self._skipped = route, names, skipped
        # The modules hold the route, not the handle, which nobody needs to keep. They may go without a `remove`.
        self._close = weakref.finalize(route, close_routes)
        self._close.atexit = False

    @property
    def is_active(self) -> bool:
        """Whether it has not been removed."""
        return self._close.alive

    def remove(self) -> None:
        """Give every module its own forward back. Once is enough; a second time does nothing."""
        if self.is_active:
            for module in self._names:
                scopes.release(module, self._route)
            self._close()

    def report(self) -> Report:
        """Calls so far: for each module how many, on which kernel, which fell back and why, and their share of time."""
        rows = self._route.counts.rows()
        heard = {row.module for row in rows}
        silent = tuple(name for name in self._names.values() if name not in heard)
        return Report(rows, silent, self._skipped, 1e-9 * self._route.counts.inside)

    def assert_all_replaced(self) -> None:
        """AssertionError with the report if a call so far fell back, or if there was none."""
        report = self.report()
        if not report.rows or any(row.why for row in report.rows):
            raise AssertionError(f"not all attention calls ran on fastattn:\n{report}")

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.is_active else "removed"
        return f"<fastattn.apply: {len(self._names)} modules, {state}>"


def apply(
    model: nn.Module,
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    backend: str | None = None,
    on_unsupported: str = "fallback",
) -> Handle:
    """Compute attention of `model`, and of no other, by fastattn from now on, until the handle's `remove`.

    Reached are calls of torch.nn.functional.scaled_dot_product_attention, however it was imported, and
    nn.MultiheadAttention with all that contains it, fast paths and need_weights=True included. Attention that a module
    writes out itself (matmul, softmax, matmul) is not: `fastattn.audit` finds it.

    model           any nn.Module; its class, weights and hooks stay as they are
    include         names of submodules, as in `model.named_modules()`, with wildcards of fnmatch: these alone, with all
                    inside of them; None: all
    exclude         the same, left out even where `include` takes them
    backend         "cpu", "triton" or "reference": only its kernels; None: that of `fastattn.use`, else "cpu"
    on_unsupported  what happens to a call that fastattn refuses: "fallback" lets torch compute it, and the report says
                    why; "error" raises `UnsupportedError` with the module's name and the reason

    Returns a `Handle`, also a context manager. Several handles may hold one model, or parts of it: the latest counts,
    and they may be removed in any order. Threads do not disturb each other. CPU tensors alone are taken; on other
    devices torch computes as before.

    A deep copy of the model is served by the same handle; a pickled model is the model without it. Modules may be
    checkpointed, and the handle must live until the backward pass is done. A checkpointed function that calls attention
    itself is recomputed outside of every module, by torch, and torch then refuses the recompute: use `patch_sdpa`.

    Raises TypeError or ValueError for wrong arguments, among them a pattern that names no module; `UnsupportedError`
    with on_unsupported="error" where a module cannot be reached.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    route = Replacement(backend, on_unsupported)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper makes its graph anew when a forward changes
    taken = _taken([name for name, _ in model.named_modules()], include, exclude)
    own = scopes.attending(model)
    reasons = {name: scopes.unreachable(module) for name, module in own.items()}
    skipped = {name: why for name, why in reasons.items() if why and taken[name]}
    if skipped and on_unsupported == "error":
        raise UnsupportedError("; ".join(f"{name or 'the model'}: {why}" for name, why in skipped.items()))
    claimed = {module: name for name, module in own.items() if not reasons[name]}
    open_routes()
    for module, name in claimed.items():
        scopes.claim(module, route, Scope(route, name) if taken[name] else None)
    return Handle(route, claimed, skipped)


def _taken(names: list[str], include, exclude) -> dict[str, bool]:
    """For each of all names whether its module is to be replaced. A module inside of a match matches."""
    matches = {}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        found = matches[argument] = set()
        for pattern in _patterns(argument, patterns):
            hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                some = ", ".join(json.dumps(name) for name in names[1:6])
                raise ValueError(f"{argument}={pattern!r} matches no module of the model, as {some}, ...")
            found.update(hits)

    def inside(name: str, found: set[str]) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:n]) in found for n in range(len(parts) + 1))

    return {
        name: (include is None or inside(name, matches["include"])) and not inside(name, matches["exclude"])
        for name in names
    }


def _patterns(argument: str, patterns) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else [] if patterns is None else patterns
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(x, str) for x in patterns):
        raise TypeError(f"{argument}={one_line(patterns)} must be a module's name, a list of names, or None")
    return list(patterns)
