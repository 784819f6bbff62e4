"""The self-check of a device: after the first launch of compiled code, some of what it wrote is computed again in plain
torch, in float32, by the formulas of `fastattn.transforms.dense`.

64 query rows (out, lse, dq) and 64 keys (dk, dv), in runs of 16 that are spread over lengths, heads and batch: O(64 n).
Gradients of terms are not compared. A mismatch is a `KernelError`: the row refuses such calls from then on. What is
right is remembered in a file (`fastattn.backends.proven`), and no process checks it again.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from ..dispatch import KernelError
from ..kernels import launch
from ..outputs import is_rough
from ..torch_internals import above_autograd
from ..transforms import dense
from ..transforms.blocks import Block
from ..transforms.slots import Call
from . import proven
from .triton import postponed

DEVICES = ["cuda"]
"""Where code is compiled that can be wrong. Tests add the interpreter's."""

RUNS, RUN = 4, 16


class Found(NamedTuple):
    """A result of a kernel beside what it should be, over one run.

    where      which part of the result it is
    tolerance  what rounding explains: a bound for each element
    """

    where: str
    value: torch.Tensor
    expected: torch.Tensor
    tolerance: torch.Tensor


def forward(name: str, before: int, problem, qkv: tuple, terms, results: tuple, cache: tuple = ()) -> None:
    """Check a forward pass whose launches have loaded code, if that is not proven; KernelError if a result is wrong.

    name     of the kernel; before: how many pieces of code had been loaded before the call
    results  (out, lse or None), of a call for backward also out in float32 and lse_parts
    cache    block_table, k_scale, v_scale of `kernels.decode.Cache`
    """
    out, lse, exact, parts = (*results, None, None)[:4]

    def compare():
        for run in _runs(problem, problem.num_heads, problem.seqlen_q):
            yield from _compare_rows(problem, qkv, terms, cache, run, (out, exact, lse, parts))

    _check(name, before, problem, out, compare)


def backward(before: int, problem, qkv: tuple, terms, saved: tuple, dout, dlse, grads: tuple) -> None:
    """Check a backward pass likewise. saved: out in float32, lse_parts; grads: dq, dk, dv, None where not wanted."""
    dq, dk, dv = grads

    def compare():
        for run in _runs(problem, problem.num_heads, problem.seqlen_q) if dq is not None else ():
            yield from _compare_dq(problem, qkv, terms, run, (dout, dlse), dq)
        for run in _runs(problem, problem.num_heads_k, problem.seqlen_k) if (dk, dv) != (None, None) else ():
            yield from _compare_dk_dv(problem, qkv, terms, run, saved, (dout, dlse), (dk, dv))

    _check("backward", before, problem, saved[0], compare)


def _check(name: str, before: int, problem, like: torch.Tensor, compare: Callable[[], Iterator[Found]]) -> None:
    code = list(launch._loaded)[before:] + postponed.pop((name, problem), [])
    if not code or like.device.type not in DEVICES or os.environ.get("FASTATTN_SELFCHECK") == "0" or not like.numel():
        return
    if launch.is_capturing():  # nothing can be looked at
        postponed[name, problem] = code
        return
    device = launch.device_facts(like.get_device())
    signatures = proven.signatures(code)
    if proven.read(device).keys() >= signatures.keys():
        return
    try:
        # an operator of a graph runs below autograd
        with above_autograd(), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            complaint = _complaint(compare())
    except Exception as error:  # of memory, say: no reason to refuse a kernel
        warnings.warn(f"self-check of {name}: {type(error).__name__}: {error}".splitlines()[0], RuntimeWarning, 2)
        return
    if complaint:
        complaint = f"{name}: self-check: {complaint} (FASTATTN_SELFCHECK=0 runs it all the same)"
        warnings.warn(f"[{problem}] {complaint}", RuntimeWarning, 2)  # the next row may be of this backend, and silent
        raise KernelError(complaint)
    # with autotuning, candidates are among the code that did not write the results
    if complaint is not None and os.environ.get("FASTATTN_AUTOTUNE") != "1":
        proven.add(device, signatures)


def _complaint(found: Iterable[Found]) -> str | None:
    """The figure of the worst mismatch, "" if there is none, None if there is nothing to compare; waits for the device
    once."""
    found = list(found)
    figures = torch.stack([torch.stack(_mismatch(x)) for x in found]).tolist() if found else []
    if all(is_nan for *_, is_nan in figures):
        return None
    (off, allowed, _), worst = max(zip(figures, found, strict=True), key=lambda pair: pair[0][0])
    return f"{worst.where} is off by {off:.3g} from float32, where rounding explains {allowed:.3g}" if off else ""


def _mismatch(found: Found) -> list[torch.Tensor]:
    """[the largest error that rounding does not explain or 0, what it explains there, whether float32 gives nothing but
    NaN, beside which anything may stand]"""
    value, tolerance = found.value.float(), found.tolerance.expand_as(found.expected)
    expected = found.expected.to(found.value.dtype).float()  # overflows where the result has to
    error = (value - expected).abs()
    wrong = (value != expected) & ~(error <= tolerance) & ~expected.isnan() & ~tolerance.isnan()
    error = torch.where(wrong, error.nan_to_num(torch.inf, torch.inf), 0.0).flatten()
    return [error.amax(), tolerance.flatten()[error.argmax()], expected.isnan().all().float()]


# --- a part of a call ------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    batch: int
    head: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"[{self.batch}, {self.head}, {self.start}:{self.end}]"

    @property
    def index(self) -> tuple:
        return slice(self.batch, self.batch + 1), slice(self.head, self.head + 1), slice(self.start, self.end)


def _runs(problem, heads: int, length: int) -> list[_Run]:
    """From the first rows of the first head to the last ones of the last."""
    if 0 in (heads, length, problem.batch):
        return []
    last = problem.batch - 1, heads - 1, max(length - RUN, 0)
    places = [tuple(x * i // (RUNS - 1) for x in last) for i in range(RUNS)]
    return [_Run(b, h, start, min(start + RUN, length)) for b, h, start in dict.fromkeys(places)]


def _part(problem, qkv: tuple, terms, ranges: dict, cache: tuple = ()) -> tuple[Call, Block, dict]:
    """What the formulas of `dense` take: the tensors of these (start, end) of dimensions, in float32."""
    call = Call(problem, "triton", terms, False)
    q, k, v = qkv
    if cache:
        k, v = (_plain(x, cache[0], scale, ranges) for x, scale in zip((k, v), cache[1:], strict=True))
    tensors = {"q": q, "k": k, "v": v, **{name: getattr(terms, name) for name in call.term_slots}}
    block = Block(ranges, problem.batch, False, {})
    cut = {slot: block.cut(x, call.dims(slot, x)) for slot, x in tensors.items()}
    return call, block, {slot: x.float() if x.is_floating_point() else x for slot, x in cut.items()}


def _plain(x: torch.Tensor, table, scale, ranges: dict) -> torch.Tensor:
    """[1, 1, seqlen_k, head_dim] of a cache. An entry that no visible key has may name a page that is not there."""
    (b, _), (head, _) = ranges["batch"], ranges["num_heads_k"]
    pages = [b] if table is None else table[b].long().clamp(0, len(x) - 1)
    rows = x[pages, head].flatten(0, 1)
    return (rows if scale is None else rows * scale[pages, head].flatten()[:, None])[None, None]


def _ranges_of_rows(problem, run: _Run) -> dict:
    head = run.head // problem.group_size
    return {
        "batch": (run.batch, run.batch + 1), "num_heads": (run.head, run.head + 1), "num_heads_k": (head, head + 1),
        "seqlen_q": (run.start, run.end), "seqlen_k": (0, problem.seqlen_k),
    }  # fmt: skip


def _ranges_of_keys(problem, run: _Run) -> dict:
    head = run.head * problem.group_size
    return {
        "batch": (run.batch, run.batch + 1), "num_heads": (head, head + problem.group_size),
        "num_heads_k": (run.head, run.head + 1), "seqlen_q": (0, problem.seqlen_q), "seqlen_k": (run.start, run.end),
    }  # fmt: skip


# --- what it should be -----------------------------------------------------------------------------------------------


class _Rounding(NamedTuple):
    """unit: of a product of float32 numbers; share: of a factor of a matrix product and of a result; least: what a
    weight may lose at least."""

    unit: float
    share: float
    least: float


def _rounding(problem) -> _Rounding:
    is_float32 = problem.dtype == "float32"
    unit = 2.0**-10 if is_float32 and torch.get_float32_matmul_precision() != "highest" else 2.0**-20
    eps = torch.finfo(getattr(torch, problem.dtype)).eps
    return _Rounding(unit, 2.0 * max(eps, unit) + 2.0**-16, 2.0**-24 if problem.dtype == "float16" else 0.0)


def _scores(call: Call, block: Block, x: dict) -> tuple[dict, torch.Tensor]:
    """(the tensors, 0 where no query sees a key, scores after all modifications, -inf where a key is hidden)"""
    x, s, visible = dense.scores(call, block, x)
    return x, s if visible is None else s.masked_fill(~visible, -torch.inf)


def _weights(s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None])


def _error_of_scores(call: Call, x: dict, rounding: _Rounding, lse: torch.Tensor) -> torch.Tensor:
    """What rounding may change in the scores, and so the share of the weights: by the sizes of q, of k and of sums."""
    products = (x["q"].abs() @ x["k"].abs().transpose(2, 3)) * _scale(call, x)
    sums = lse.abs().masked_fill(lse == -torch.inf, 0.0)[..., None] + call.fixed.softcap
    return 2.0 * rounding.unit * products + 2.0**-20 * sums


def _scale(call: Call, x: dict):
    scale = x.get("softmax_scale", call.fixed.softmax_scale)
    return scale.abs().reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else abs(scale)


def _lse(x: dict, s: torch.Tensor) -> torch.Tensor:
    """Of rows that have all their keys."""
    if "sinks" in x:
        s = torch.cat([s, x["sinks"].view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s.logsumexp(-1)


def _natural(parts: torch.Tensor) -> torch.Tensor:
    """lse of lse_parts."""
    high, low = parts.unbind(-1)
    return ((high + low) * math.log(2.0)).masked_fill(low == torch.inf, -torch.inf)


def _compare_rows(problem, qkv, terms, cache, run: _Run, results: tuple) -> Iterator[Found]:
    call, block, x = _part(problem, qkv, terms, _ranges_of_rows(problem, run), cache)
    x, s = _scores(call, block, x)
    lse, rounding = _lse(x, s), _rounding(problem)
    p = _weights(s, lse)
    of_scores = _error_of_scores(call, x, rounding, lse).amax(-1, keepdim=True)
    expected, sums = (dense.weighted(call, block, {**x, "v": v}, p) for v in (x["v"], x["v"].abs()))
    of_least = rounding.least * x["v"].abs().sum(2, keepdim=True)
    out, exact, of_lse, parts = results
    for name, value in (("out", out), ("out", exact)):
        if value is not None:
            yield Found(f"{name}{run}", value[run.index], expected, (rounding.share + of_scores) * sums + of_least)
    for value in (of_lse, None if parts is None else _natural(parts[run.index])):
        if value is not None:
            value = value[run.index] if value is of_lse else value
            yield Found(f"lse{run}", value, lse, 2.0**-12 + of_scores[..., 0])


def _compare_dq(problem, qkv, terms, run: _Run, cotangents: tuple, dq) -> Iterator[Found]:
    call, block, x = _part(problem, qkv, terms, _ranges_of_rows(problem, run))
    dout, dlse = (None if y is None else y[run.index].float() for y in cotangents)
    x, s = _scores(call, block, x)
    lse = _lse(x, s)
    p = _weights(s, lse)
    delta = (dout * dense.weighted(call, block, x, p)).sum(-1) - (0.0 if dlse is None else dlse)
    ds, _ = _dscores_and_dv(call, block, x, s, lse, delta, dout)
    error = _error_of_dscores(call, x, _rounding(problem), p, ds, lse, delta, dout)
    expected = _pulled(call, block, x, "q", ds)
    yield Found(f"dq{run}", dq[run.index], expected, error @ x["k"].abs() * _scale(call, x))


def _compare_dk_dv(problem, qkv, terms, run: _Run, saved: tuple, cotangents: tuple, grads: tuple) -> Iterator[Found]:
    """From out and lse of the forward pass, whose rows see other keys too."""
    ranges = _ranges_of_keys(problem, run)
    of_blocks = terms.block_mask
    call, block, x = _part(problem, qkv, terms._replace(block_mask=None), ranges)
    if of_blocks is not None:  # by the lists of its keys: those of all queries would be n x n
        swapped = {**ranges, "seqlen_q": ranges["seqlen_k"], "seqlen_k": ranges["seqlen_q"]}
        x["mask"] = dense.seen_blocks(of_blocks.transpose(), block._replace(ranges=swapped)).transpose(2, 3)
    x, s = _scores(call, block, x)
    (first, last), rows = ranges["num_heads"], slice(run.batch, run.batch + 1)
    out, parts, dout, dlse = (None if y is None else y[rows, first:last].float() for y in (*saved, *cotangents))
    lse = _natural(parts)
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse)
    ds, dv = _dscores_and_dv(call, block, x, s, lse, delta, dout)
    rounding, p = _rounding(problem), _weights(s, lse)
    allowed = torch.where(is_rough(lse).any(), torch.inf, 1.0)  # such an lse gives no weights
    if grads[0] is not None:
        error = _error_of_dscores(call, x, rounding, p, ds, lse, delta, dout).transpose(2, 3) @ x["q"].abs()
        error = (error * _scale(call, x)).sum(1, keepdim=True) * allowed
        yield Found(f"dk{run}", grads[0][run.index], _pulled(call, block, x, "k", ds), error)
    if grads[1] is not None:
        share = rounding.share + _error_of_scores(call, x, rounding, lse)
        error = (p * _most(call) * share + rounding.least).transpose(2, 3) @ dout.abs()
        yield Found(f"dv{run}", grads[1][run.index], dv, error.sum(1, keepdim=True) * allowed)


def _dscores_and_dv(call: Call, block: Block, x: dict, s, lse, delta, dout) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = P * (dropout(dout V^T) - delta) and dropout(P)^T dout, P = exp(S - lse)."""
    with torch.enable_grad():
        s, v = s.detach().requires_grad_(), x["v"].detach().requires_grad_()
        p = _weights(s, lse)
        value = (dense.weighted(call, block, {**x, "v": v}, p) * dout).sum() - (p * delta[..., None]).sum()
    ds, dv = torch.autograd.grad(value, (s, v))
    return ds, dv


def _pulled(call: Call, block: Block, x: dict, slot: str, ds: torch.Tensor) -> torch.Tensor:
    """The gradient of q or k, given that of the modified scores."""
    with torch.enable_grad():
        source = x[slot].detach().requires_grad_()
        s = dense.scores(call, block, {**x, slot: source})[1]
    return torch.autograd.grad(s, source, ds)[0]


def _error_of_dscores(call: Call, x: dict, rounding: _Rounding, p, ds, lse, delta, dout) -> torch.Tensor:
    """What rounding may change in dS."""
    dp = dout.abs() @ x["v"].abs().transpose(2, 3) * _most(call)
    share = rounding.share + _error_of_scores(call, x, rounding, lse)
    return share * ds.abs() + 4.0 * rounding.unit * p * (dp + delta.abs()[..., None]) + rounding.least


def _most(call: Call) -> float:
    """What dropout multiplies a weight by that it keeps."""
    return 1.0 / (1.0 - call.fixed.dropout_p)
