"""The self-check of a device: after the first launch of compiled code, some of what it wrote is computed again in plain
torch, in float32, by the formulas of `fastattn.transforms.dense`.

64 query rows (out, lse, dq) and 64 keys (dk, dv), in runs of 16 that are spread over lengths, heads and batch: O(64 n).
Gradients of terms are not compared. A mismatch is a `WrongResultError`: the row refuses such calls from then on, and
others load the code anew and check it. What is right is remembered in a file (`fastattn.backends.proven`), and no
process checks it again.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .. import outputs
from ..dispatch import WrongResultError
from ..kernels import launch
from ..outputs import is_rough
from ..torch_internals import above_autograd, are_products_exact
from ..transforms import dense
from ..transforms.blocks import Block
from ..transforms.slots import Call
from . import proven
from .triton import postponed

DEVICES = ["cuda"]
"""Where code is compiled that can be wrong. Tests add the interpreter's."""

RUNS, RUN = 4, 16

LOOKS = 8
"""How many calls look at code that none of them can prove, before it is left alone."""

_LARGEST_LSE = torch.finfo(torch.float32).max * math.log(2.0)  # beyond it, there is none in units of log2

_looks: Counter = Counter()  # code -> how many have

UNCOMPARED = ["bias_kernel"]
"""Kernels whose results nobody compares, and which are not proven."""


class Found(NamedTuple):
    """A result of a kernel beside what it should be, over one run.

    where      which part of the result it is
    tolerance  twice what rounding explains: a bound for each element; where it is not finite, anything may stand
    """

    where: str
    value: torch.Tensor
    expected: torch.Tensor
    tolerance: torch.Tensor

    @property
    def result(self) -> str:
        """Its name, which stands before the place: dq."""
        return self.where.partition("[")[0]


def forward(name: str, before: int, problem, qkv: tuple, terms, results: tuple, cache: tuple = ()) -> None:
    """Check a forward pass whose launches have loaded code, if that is not proven; WrongResultError if one is wrong.

    name     of the kernel; before: how many pieces of code had been loaded before the call
    results  (out, lse or None), of a call for backward also out in float32 and lse_parts
    cache    block_table, k_scale, v_scale of `kernels.decode.Cache`
    """
    out, lse, exact, parts = (*results, None, None)[:4]

    def compare():
        for run in _runs(problem, problem.num_heads, problem.seqlen_q):
            yield from _compare_rows(problem, qkv, terms, cache, run, (out, exact, lse, parts))

    _check(name, before, problem, out, compare)


def backward(
    before: int, problem, qkv: tuple, terms, saved: tuple, dout, dlse, grads: tuple, wants_terms: bool
) -> None:  # fmt: skip
    """Check a backward pass likewise. saved: out in float32, lse_parts; grads: dq, dk, dv, None where not wanted;
    wants_terms: gradients of terms are, so that delta was not made of out."""
    dq, dk, dv = grads

    def compare():
        for run in _runs(problem, problem.num_heads, problem.seqlen_q) if dq is not None else ():
            yield from _compare_dq(problem, qkv, terms, run, (dout, dlse), dq, wants_terms)
        for run in _runs(problem, problem.num_heads_k, problem.seqlen_k) if (dk, dv) != (None, None) else ():
            yield from _compare_dk_dv(problem, qkv, terms, run, saved, (dout, dlse), (dk, dv), wants_terms)

    _check("backward", before, problem, saved[0], compare)


def _check(name: str, before: int, problem, like: torch.Tensor, compare: Callable[[], Iterator[Found]]) -> None:
    code = launch.loaded_since(before) + postponed.pop((name, problem), [])
    code = [key for key in code if key[0].__name__ not in UNCOMPARED]
    if not code or like.device.type not in DEVICES or os.environ.get("FASTATTN_SELFCHECK") == "0":
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
        complaint = None
    if complaint is None:
        _looks.update(code)
    if complaint or (complaint is None and max(map(_looks.get, code)) < LOOKS):
        launch.drop(code)  # whatever call comes next with it is checked
    if complaint:
        complaint = f"{name}: self-check: {complaint} (FASTATTN_SELFCHECK=0 runs it all the same)"
        warnings.warn(f"[{problem}] {complaint}", RuntimeWarning, 2)  # the next row may be of this backend, and silent
        raise WrongResultError(complaint)
    # with autotuning, candidates are among the code that did not write the results
    if complaint is not None and os.environ.get("FASTATTN_AUTOTUNE") != "1":
        proven.add(device, signatures)


def _complaint(found: Iterable[Found]) -> str | None:
    """The figure of the worst mismatch, "" if there is none, None if some result has nothing to compare; waits for the
    device once."""
    found = list(found)
    if not found:
        return None
    figures = torch.stack([torch.stack(_mismatch(x)) for x in found]).tolist()
    (off, allowed, _), worst = max(zip(figures, found, strict=True), key=lambda pair: pair[0][0])
    if off:
        return f"{worst.where} is off by {off:.3g} from float32, where {allowed:.3g} is twice what rounding explains"
    compared = {x.result for x, (*_, is_void) in zip(found, figures, strict=True) if not is_void}
    return "" if compared == {x.result for x in found} else None


def _mismatch(found: Found) -> list[torch.Tensor]:
    """[the largest error that rounding does not explain or 0, what it explains there, whether anything may stand
    everywhere: beside a NaN of float32, or where the tolerance is not finite]"""
    dtype, value = found.value.dtype, found.value.float()
    tolerance = found.tolerance.expand_as(found.expected) + (2.0**-24 if dtype == torch.float16 else 2.0**-120)
    may_overflow = found.expected.isfinite() & (found.expected.abs() + tolerance > torch.finfo(dtype).max)
    expected = found.expected.to(dtype).float()  # overflows where the result has to
    is_free = expected.isnan() | ~tolerance.isfinite() | (may_overflow & value.isinf())
    error = (value - expected).abs()
    wrong = (value != expected) & ~(error <= tolerance) & ~is_free
    error = torch.where(wrong, error.nan_to_num(torch.inf, torch.inf), 0.0).flatten()
    return [error.amax(), tolerance.flatten()[error.argmax()], is_free.all().float()]


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
    if 0 in (heads, length, problem.batch, problem.seqlen_k):
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
    """Twice what it takes: unit of a product of float32 numbers; share of a factor of a matrix product and of a result
    together, half of it of one of them; least of a weight, however small."""

    unit: float
    share: float
    least: float


def _rounding(problem) -> _Rounding:
    is_float32 = problem.dtype == "float32"
    unit = 2.0**-10 if is_float32 and not are_products_exact() else 2.0**-20
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
    values = x["v"] if not cache or cache[2] is None else _plain(qkv[2], cache[0], None, block.ranges).float()
    of_least = rounding.least * _most(call) * values.abs().sum(2, keepdim=True)  # scales of keys are in the weights
    out, exact, of_lse, parts = results
    for name, value in (("out", out), ("out", exact)):
        if value is not None:
            yield Found(f"{name}{run}", value[run.index], expected, (rounding.share + of_scores) * sums + of_least)
    for value in (of_lse, None if parts is None else _natural(parts[run.index])):
        if value is not None:
            value = value[run.index] if value is of_lse else value
            of_lse_itself = (2.0**-12 + of_scores[..., 0]).masked_fill(lse.abs() > _LARGEST_LSE, torch.inf)
            yield Found(f"lse{run}", value, lse, of_lse_itself)


def _compare_dq(problem, qkv, terms, run: _Run, cotangents: tuple, dq, wants_terms: bool) -> Iterator[Found]:
    call, block, x = _part(problem, qkv, terms, _ranges_of_rows(problem, run))
    dout, dlse = (None if y is None else y[run.index].float() for y in cotangents)
    x, s = _scores(call, block, x)
    lse, rounding = _lse(x, s), _rounding(problem)
    p = _weights(s, lse)
    out, sums = (dense.weighted(call, block, {**x, "v": v}, p) for v in (x["v"], x["v"].abs()))
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse)
    ds, _ = _dscores_and_dv(call, block, x, s, lse, delta, dout)
    of_scores = _error_of_scores(call, x, rounding, lse).amax(-1, keepdim=True)
    of_delta = 4.0 * rounding.unit * ((dout.abs() * sums).sum(-1) + delta.abs())
    dp = dense.kept(call, block, x, (dout @ x["v"].transpose(2, 3)).abs())
    of_delta += (of_scores * p * dp).sum(-1)
    if not wants_terms:
        of_delta += ((0.5 * rounding.share * p + rounding.least * (p > 0.0)) * dp).sum(-1)
        of_delta += _error_of_rounded_out(problem, rounding, dout, out)
    error = _error_of_dscores(call, x, rounding, p, ds, of_scores, of_delta, dout)
    expected = _pulled(call, block, x, "q", ds)
    yield Found(f"dq{run}", dq[run.index], expected, error @ x["k"].abs() * _scale(call, x))


def _compare_dk_dv(
    problem, qkv, terms, run: _Run, saved: tuple, cotangents: tuple, grads: tuple, wants_terms: bool
) -> Iterator[Found]:
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
    of_scores = _error_of_scores(call, x, rounding, lse)
    if grads[0] is not None:
        of_delta = 4.0 * rounding.unit * ((dout * out).abs().sum(-1) + delta.abs())
        if (
            wants_terms
        ):  # delta is not made of out; what its error is only all keys would tell: as if each had the largest
            sizes = qkv[2][run.batch, run.head].float().norm(dim=-1)
            largest = dout.norm(dim=-1) * sizes.where(sizes.isfinite(), 0.0).amax() * _most(call)
            of_all = 0.5 * rounding.share + 4.0 * rounding.unit + rounding.least * problem.seqlen_k
            of_delta += (of_all + of_scores.amax(-1)) * largest + _error_of_rounded_out(problem, rounding, dout, out)
        error = _error_of_dscores(call, x, rounding, p, ds, of_scores, of_delta, dout).transpose(2, 3) @ x["q"].abs()
        error = (error * _scale(call, x)).sum(1, keepdim=True) * allowed
        yield Found(f"dk{run}", grads[0][run.index], _pulled(call, block, x, "k", ds), error)
    if grads[1] is not None:
        error = (p * (rounding.share + of_scores) + rounding.least).transpose(2, 3) @ dout.abs() * _most(call)
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


def _error_of_dscores(call: Call, x: dict, rounding: _Rounding, p, ds, of_scores, of_delta, dout) -> torch.Tensor:
    """What rounding may change in dS, given what it may in the scores and in delta; inf where dS may overflow."""
    dp = dout.abs() @ x["v"].abs().transpose(2, 3) * _most(call)
    error = (rounding.share + of_scores) * ds.abs() + p * (4.0 * rounding.unit * dp + of_delta[..., None])
    # one of heads is a factor of dS, before it is rounded or after
    scale = _scale(call, x) if "softmax_scale" in x else p.new_ones(())
    error = error + rounding.least / scale.clamp(2.0**-20, 1.0)
    largest = torch.finfo(getattr(torch, call.problem.dtype)).max
    return error.masked_fill((ds.abs() + error) * scale.clamp(1.0) > largest, torch.inf)


def _error_of_rounded_out(problem, rounding: _Rounding, dout, out) -> torch.Tensor | float:
    """What rounding may change in delta where it is made of an out in 16 bits."""
    if not outputs.ROUNDED_DELTA or problem.dtype == "float32":
        return 0.0
    return (dout.abs() * (0.5 * rounding.share * out.abs() + rounding.least)).sum(-1)


def _most(call: Call) -> float:
    """What dropout multiplies a weight by that it keeps."""
    return 1.0 / (1.0 - call.fixed.dropout_p)
