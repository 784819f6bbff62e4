"""`verify`: whether a model with attention on fastattn is as right as it was."""

import copy
import os
from typing import NamedTuple

import torch
from torch import nn

from . import scopes
from .apply import apply
from .measuring import run_model, tensors_in
from .report import as_table

FACTOR = 2.0
"""How much larger than torch's our error may be."""


class VerifyRow(NamedTuple):
    """One result, in the order in which the model computes them: of a module, of the model, or a gradient.

    what       "layer", "output" or "gradient"
    name       of the module, of the output, or of the parameter
    ours       root of the mean squared error of the replaced model, as a part of the exact result's size
    theirs     the same of the model as it was; None where there is no exact result, and `ours` is then the difference
               of the two
    most       the largest single difference between the two
    holds      whether ours is at most FACTOR times theirs, but for one rounding
    """

    what: str
    name: str
    ours: float
    theirs: float | None
    most: float
    holds: bool


class Verification:
    """What `verify` found: true if every row holds. `rows`, `first` (the first row that does not hold, or None),
    `handle` with the report of the replaced run, `text`, `data`."""

    def __init__(self, rows: tuple[VerifyRow, ...], handle, exact: str):
        self.rows, self.handle, self.exact = rows, handle, exact

    @property
    def first(self) -> VerifyRow | None:
        return next((row for row in self.rows if not row.holds), None)

    @property
    def calls(self) -> int | None:
        """How many attention calls ran on fastattn; None where the handle does not count."""
        if not hasattr(self.handle, "report"):
            return None
        return sum(row.calls for row in self.handle.report().rows if not row.why)

    def __bool__(self) -> bool:
        return self.first is None and self.calls != 0

    @property
    def data(self) -> dict:
        """All of it, as JSON takes it."""
        rows = [row._asdict() for row in self.rows]
        return {"holds": bool(self), "calls": self.calls, "exact": self.exact, "rows": rows}

    @property
    def text(self) -> str:
        """A table and a verdict."""
        head = ("", "result of", "our error", "theirs", "largest difference", "")
        lines = [
            (row.what, row.name or "(the model)", f"{row.ours:.1e}", "-" if row.theirs is None else f"{row.theirs:.1e}",
             f"{row.most:.1e}", "" if row.holds else "<- differs")
            for row in self.rows
        ]  # fmt: skip
        return "\n".join([as_table([head, *lines]), self.exact, self._verdict()])

    def _verdict(self) -> str:
        if self.first is not None:
            return f"does not hold: the first to differ is the {self.first.what} {self.first.name or '(the model)'!r}"
        if self.calls == 0:
            return "nothing was replaced: no attention call ran on fastattn"
        counted = "" if self.calls is None else f", {self.calls} attention calls on fastattn"
        return f"holds: all {len(self.rows)} results are as right as they were{counted}"

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def verify(
    model: nn.Module, inputs, *, call=None, replace=apply, gradients: bool = False, exact: bool | None = None
) -> Verification:
    """Run `model` as it is and with attention on fastattn, and compare both with the same model in float64.

    model      any nn.Module on the CPU; it runs in eval mode, and is as before afterwards
    inputs     a dict (named arguments), a tuple or list (positional ones), or one argument; each run gets a copy
    call       what runs the model: `call(model, inputs)`, such as `lambda model, inputs: model.generate(**inputs)`
    replace    what replaces attention: `replace(model)` returns a context manager (`apply` or the like)
    gradients  also compare the gradients of all parameters, of a fixed random sum of the floating outputs
    exact      whether to run in float64 too, on a copy of the model; None: where that fits into half of free memory.
               Without, a difference of up to 32 roundings of the dtype passes

    Compared are the results of every module that may hold attention, in the order of their ends, the outputs, which
    must be equal where they are not floating (tokens of `generate`), and the gradients. A result holds if the root of
    its mean squared error is at most twice that of the model as it was. Modules run several times count by their worst.

    Returns a `Verification`: true if everything holds and fastattn computed attention.

    Raises TypeError where `model` is no nn.Module, and whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with_exact = _fits(model) if exact is None else exact
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        theirs = _results(model, inputs, call, gradients, True)
        with replace(model) as handle:
            ours = _results(model, inputs, call, gradients, False)
        exact_results = {}
        if with_exact:
            exact_results = _results(copy.deepcopy(model).double(), _doubled(inputs), call, gradients, True)
    finally:
        for module, training in modes.items():
            module.training = training
    rows = tuple(_rows(ours, theirs, exact_results))
    text = "compared with the model in float64" if with_exact else "without float64: compared with the model as it was"
    return Verification(rows, handle, text)


class _Recorder:
    """Keeps what a run computes. As a route it lets torch answer, whatever else is claimed of the model."""

    replaces = False

    def __init__(self):
        self.results: dict[tuple[str, str], list[torch.Tensor]] = {}

    def answer(self, name: str, call):
        return call.torchs()

    def left(self, nanoseconds: int) -> None:
        pass

    def returned(self, name: str, result) -> None:
        for path, x in tensors_in(result).items():
            if x.is_floating_point():
                self.keep("layer", f"{name} {path}".strip(), x)

    def keep(self, what: str, name: str, x: torch.Tensor) -> None:
        x = x.to_padded_tensor(0.0) if x.is_nested else x
        self.results.setdefault((what, name), []).append(x.detach().clone())


def _results(model: nn.Module, inputs, call, gradients: bool, as_it_was: bool) -> dict[tuple[str, str], list]:
    """(what, name) -> the tensors of one run, in the order in which the model made them."""
    recorder, inputs = _Recorder(), copy.deepcopy(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients), scopes.observed(model, recorder if as_it_was else None, recorder):
            outputs = tensors_in(run_model(model, inputs, call))
            for path, x in outputs.items():
                recorder.keep("output", path, x)
            if gradients:
                _keep_gradients(recorder, model, outputs.values())
    return recorder.results


def _keep_gradients(recorder: _Recorder, model: nn.Module, outputs) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [x for x in outputs if x.is_floating_point() and x.requires_grad]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    grads = torch.autograd.grad(outputs, list(named.values()), weights, allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        if grad is not None:
            recorder.keep("gradient", name, grad)


def _rows(ours: dict, theirs: dict, exact: dict) -> list[VerifyRow]:
    rows = []
    for (what, name), mine in ours.items():
        if (what, name) not in theirs:
            rows.append(VerifyRow(what, name, *_APART))
            continue
        others = theirs[what, name]
        exacts = exact.get((what, name), [])
        if [x.shape for x in exacts] != [x.shape for x in others]:  # in float64 other tokens were generated
            exacts = [None] * len(others)
        found = [_compared(*tensors) for tensors in zip(mine, others, exacts, strict=False)]
        if len(mine) != len(others):
            found.append(_APART)
        rows.append(VerifyRow(what, name, *min(found, key=lambda one: (one[3], -one[0]))))
    return rows


_APART = float("inf"), None, float("inf"), False
"""What is said of results that cannot be compared, one run having gone another way."""


def _compared(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor | None):
    """(our error, theirs or None, the largest difference, whether it holds)."""
    if ours.shape != theirs.shape:
        return _APART
    if not ours.is_floating_point():
        differs = int((ours != theirs).sum())
        return float(differs), None, float(differs), differs == 0
    rounding = torch.finfo(ours.dtype).eps
    most = _difference(ours, theirs).abs().max().item() if ours.numel() else 0.0
    if exact is None:
        error = _error(ours, theirs)
        return error, None, most, error <= 32 * rounding
    error, their_error = _error(ours, exact), _error(theirs, exact)
    return error, their_error, most, error <= FACTOR * their_error + rounding


def _difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x - y in float64, 0 where both are the same infinity or NaN."""
    x, y = x.double(), y.double()
    return torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y)


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean squared difference, as a part of the root of the mean square of `exact`; NaN counts as inf."""
    if x.numel() == 0:
        return 0.0
    difference, size = _difference(x, exact).square().mean().sqrt().item(), exact.double().square().mean().sqrt().item()
    error = difference / size if size > 0.0 else difference
    return error if error == error else float("inf")


def _doubled(tree):
    """A copy of inputs with floating tensors in float64."""
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return type(tree)((key, _doubled(value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_doubled, tree))
    return copy.deepcopy(tree)


def _fits(model: nn.Module) -> bool:
    """Whether a copy of the model in float64 takes at most half of the memory that is free."""
    size = sum(8 * x.numel() for x in [*model.parameters(), *model.buffers()])
    return 2 * size <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
