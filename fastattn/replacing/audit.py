"""`audit`: what attention of a model costs as it is, and what it would cost on fastattn."""

import copy
import json
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..calls import current_backend, latest, run_on
from ..dispatch import UnsupportedError
from ..torch_internals import sdpa_choice
from . import scopes
from .measuring import peak_of, run_model, seconds_of
from .multihead import computed
from .report import as_table
from .routes import NativeCall, here

_BACKENDS = {0: "math, n x n", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
_FAST_PATH = "fast path, n x n"
_BY_HAND = "softmax by hand, n x n"


class AuditRow(NamedTuple):
    """Attention calls of one module that are alike.

    module        its name in the model
    calls         how many in one run
    shape         B, H (query heads / key heads), S (queries x keys), D (head_dim / head_dim_v), dtype
    mask          "none", "causal", "bool [..]" or "float [..]" with the mask's own shape
    runs          what torch computes with: "flash"; "math, n x n": all scores in memory; "fast path, n x n" of
                  nn.MultiheadAttention; "softmax by hand, n x n": the module writes attention out
    seconds       of one call as it is (of its softmax alone, where it is written out: None)
    peak          bytes of tensors that one call takes at once
    kernel        the kernel of fastattn that would run, or None
    why           why none would, "" where one does
    own_seconds   of one call on fastattn, None without a kernel
    own_peak      bytes of one call on fastattn, None without a kernel
    """

    module: str
    calls: int
    shape: str
    mask: str
    runs: str
    seconds: float | None
    peak: int
    kernel: str | None
    why: str
    own_seconds: float | None
    own_peak: int | None

    @property
    def saved(self) -> float:
        """Seconds that all these calls would save."""
        return 0.0 if self.own_seconds is None else self.calls * (self.seconds - self.own_seconds)


class Audit:
    """What `audit` found: `rows`, `seconds` of one forward as it is, and the `lines` of Python that replace attention.

    `text`, `json`, `picture(path)`; `str` is the text.
    """

    def __init__(self, rows: tuple[AuditRow, ...], seconds: float, lines: str):
        self.rows, self.seconds, self.lines = rows, seconds, lines

    @property
    def attention_seconds(self) -> float:
        """Of all attention calls of one forward, as it is."""
        return sum(row.calls * row.seconds for row in self.rows if row.seconds is not None)

    @property
    def saved_seconds(self) -> float:
        """That fastattn would save in one forward."""
        return sum(row.saved for row in self.rows)

    @property
    def data(self) -> dict:
        """All of it, as JSON takes it."""
        numbers = {"seconds": self.seconds, "attention_seconds": self.attention_seconds}
        rows = [row._asdict() for row in self.rows]
        return {**numbers, "saved_seconds": self.saved_seconds, "rows": rows, "lines": self.lines}

    @property
    def json(self) -> str:
        """`data` as text."""
        return json.dumps(self.data, indent=1)

    @property
    def text(self) -> str:
        """A table, a sum, and the lines to write."""
        if not self.rows:
            return "no attention was seen: the model calls none of torch's functions and no softmax of scores"
        head = ("module", "calls", "shape", "mask", "torch runs", "ms", "MiB", "fastattn ms", "MiB", "kernel or why")
        lines = [
            (
                row.module or "(the model)", str(row.calls), row.shape, row.mask, row.runs, _ms(row.seconds),
                _mib(row.peak), _ms(row.own_seconds), _mib(row.own_peak), row.kernel or row.why,
            )
            for row in self.rows
        ]  # fmt: skip
        share = self.attention_seconds / self.seconds if self.seconds else 0.0
        own = self.attention_seconds - self.saved_seconds
        parts = [
            as_table([head, *lines]),
            f"attention: {_ms(self.attention_seconds)} of {_ms(self.seconds)} ms ({share:.0%}); on fastattn "
            f"{_ms(own)} ms, the whole forward {self._speed_up():.2f} times as fast",
            f"most memory of one call: {_mib(max(row.peak for row in self.rows))} MiB of tensors; on fastattn "
            f"{_mib(max(row.peak if row.own_peak is None else row.own_peak for row in self.rows))} MiB",
            "times are of this run of this machine; to replace attention:",
            "",
            self.lines,
        ]
        return "\n".join(parts)

    def _speed_up(self) -> float:
        rest = self.seconds - self.saved_seconds
        return self.seconds / rest if rest > 0 else 1.0

    def picture(self, path) -> None:
        """Write bars of time and memory for each row, torch beside fastattn, to a file whose end names its format.
        Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 1.5 + 0.4 * len(self.rows)), layout="constrained")
        labels = [f"{row.module or '(the model)'} x{row.calls}" for row in self.rows]
        places = range(len(self.rows))
        values = (
            ("ms a call", [(1e3 * (row.seconds or 0), 1e3 * (row.own_seconds or 0)) for row in self.rows]),
            ("MiB a call", [(row.peak / 2**20, (row.own_peak or 0) / 2**20) for row in self.rows]),
        )
        for axes, (title, pairs) in zip(figure.subplots(1, 2, sharey=True), values, strict=True):
            for shift, name, column in ((-0.2, "torch", 0), (0.2, "fastattn", 1)):
                axes.barh([place + shift for place in places], [pair[column] for pair in pairs], 0.4, label=name)
            axes.set_title(title)
        axes.set_yticks(list(places), labels)
        axes.invert_yaxis()
        axes.legend()
        figure.savefig(path)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def audit(model: nn.Module, inputs, *, call=None) -> Audit:
    """Run `model` as it is, and find what its attention costs, on this machine and with its threads.

    model   any nn.Module on the CPU
    inputs  a dict (named arguments), a tuple or list (positional ones), or one argument; a copy is used for each run
    call    what runs the model: `call(model, inputs)`, such as `lambda model, inputs: model.generate(**inputs)`

    Each kind of call is measured where it happens, with its own tensors: torch's time and the peak memory of its
    tensors, then the same on fastattn. Modes of training and gradients stay as they are; forward passes alone are
    measured. Returns an `Audit`. The model runs twice, and stays as it was.

    Raises TypeError where `model` is no nn.Module, and whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs_again = copy.deepcopy(inputs)
    begin = time.perf_counter()
    run_model(model, inputs_again, call)
    seconds = time.perf_counter() - begin
    watch = _Watch(model)
    with scopes.observed(model, watch), _Softmaxes(watch):
        run_model(model, copy.deepcopy(inputs), call)
    rows = tuple(AuditRow(name, count, *facts) for (name, _), (count, facts) in watch.rows.items())
    return Audit(rows, seconds, _lines_for(model))


class _Watch:
    """The route of an audit: torch answers, each kind of call is measured once."""

    replaces = False

    def __init__(self, model: nn.Module):
        self.modules, self.is_busy = dict(model.named_modules()), False
        self.by_hand = "written out in the module: not reached"
        if _is_transformers(model):
            self.by_hand = "written out: the lines below replace it, or say why not"
        self.rows: dict[tuple, tuple[int, tuple]] = {}
        self._facts: dict[tuple, tuple] = {}

    def answer(self, name: str, call):
        self.is_busy = True  # what torch computes inside is no softmax of the model's own
        try:
            kind = _kind_of(call)
            if kind not in self._facts:
                with torch.random.fork_rng(devices=[]), _disable_current_modes():
                    self._facts[kind] = _measured(call)
            self.count(name, kind, self._facts[kind])
            return call.torchs()
        finally:
            self.is_busy = False

    def count(self, name: str, kind: tuple, facts: tuple) -> None:
        self.rows[name, kind] = self.rows.get((name, kind), (0,))[0] + 1, facts

    def left(self, nanoseconds: int) -> None:
        pass


class _Softmaxes(TorchDispatchMode):
    """Sees softmaxes of scores that a module computes itself."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._softmax.default and not self.watch.is_busy and here.scope is not None:
            self._see(here.scope.name, args[0])
        return function(*args, **(kwargs or {}))

    def _see(self, name: str, x: torch.Tensor) -> None:
        is_multihead = isinstance(self.watch.modules.get(name), nn.MultiheadAttention)
        is_square = x.dim() == 3 and x.shape[1] == x.shape[2]
        if x.dim() < 4 and not is_square and not is_multihead:  # of classes, tokens of a vocabulary, experts
            return
        why = "apply() replaces it, weights included" if is_multihead else self.watch.by_hand
        shape = f"{list(x.shape)} {str(x.dtype)[6:]}"
        peak = 2 * x.numel() * x.element_size()
        self.watch.count(name, tuple(x.shape), (shape, "?", _BY_HAND, None, peak, None, why, None, None))


def _kind_of(call) -> tuple:
    return type(call), *(
        (tuple(x.shape), x.stride(), x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) and not x.is_nested
        else "nested" if isinstance(x, torch.Tensor) else x
        for x in call
    )  # fmt: skip


def _measured(call) -> tuple:
    """The fields of an AuditRow from `shape` on."""
    facts = _shape_of(call), _mask_of(call), _torch_runs(call), seconds_of(call.torchs), peak_of(call.torchs)

    def ours():
        return run_on(current_backend() or "cpu", computed, call)

    try:
        ours()
    except (UnsupportedError, TypeError, ValueError) as error:
        return *facts, None, str(error), None, None
    return *facts, latest()[0], "", seconds_of(ours), peak_of(ours)


def _torch_runs(call) -> str:
    if isinstance(call, NativeCall):
        return _FAST_PATH
    choice = sdpa_choice(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)
    return _BACKENDS.get(choice, f"backend {choice}")


def _shape_of(call) -> str:
    q, k, v = call.query, call.key, call.value
    dtype = str(q.dtype)[6:]
    if isinstance(call, NativeCall):
        sizes = call.query._nested_tensor_size() if q.is_nested else None
        length = int(sizes[:, 0].max()) if q.is_nested else q.shape[1]
        nested = " nested" if q.is_nested else ""
        return f"B{q.size(0)} H{call.num_heads} S{length} D{call.embed_dim // call.num_heads} {dtype}{nested}"
    if q.dim() != 4:
        return " ".join(str(list(x.shape)) for x in (q, k, v)) + f" {dtype}"
    heads, lengths, dims = (
        f"{x}" if x == y else f"{x}{mark}{y}"
        for x, mark, y in ((q.shape[1], "/", k.shape[1]), (q.shape[2], "x", k.shape[2]), (q.shape[3], "/", v.shape[3]))
    )
    return f"B{q.shape[0]} H{heads} S{lengths} D{dims} {dtype}"


def _mask_of(call) -> str:
    mask = call.mask if isinstance(call, NativeCall) else call.attn_mask
    if mask is not None:
        return f"{'bool' if mask.dtype == torch.bool else 'float'} {list(mask.shape)}"
    return "causal" if not isinstance(call, NativeCall) and call.is_causal else "none"


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "set_attn_implementation")


def _lines_for(model: nn.Module) -> str:
    if _is_transformers(model):
        return (
            "from fastattn.integrations import transformers as fastattn_transformers\n"
            "fastattn_transformers.register()\n"
            'model.set_attn_implementation("fastattn")'
        )
    return "import fastattn\nhandle = fastattn.apply(model)\nprint(handle.report())  # handle.remove() undoes it"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.3g}"
