"""Calls of many sequences as a call for each, through `attention`: on devices without kernels of their own for them, in
transforms, and to differentiate gradients again."""

import torch

from ..api import attention
from ..dispatch import KernelError, UnsupportedError
from ..masks.intervals import UNBOUNDED, Mask, Window
from .placing import check_slots, new_rows, place, rows_of, slot, turns
from .quantization import quantized
from .rotary import rotated


def cpu(problem, q, k, v, terms):
    """The rows of the CPU kernels, where the call is transformed."""
    return _each("cpu", problem, q, k, v, terms)


def triton(problem, q, k, v, terms):
    """The rows of the Triton kernels. KernelError where these refuse one of the calls, as after a failure."""
    try:
        return _each("triton", problem, q, k, v, terms)
    except UnsupportedError as error:
        raise KernelError(str(error)) from error


def reference(problem, q, k, v, terms):
    """The specification."""
    return _each("reference", problem, q, k, v, terms)


def gradients_again(backend: str, problem, qkv, terms, dout, dlse, wanted) -> list:
    """Gradients of q, k, v and each term (None where not wanted), for somebody who will differentiate them."""
    inputs = [*qkv, *terms]
    sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
    with torch.enable_grad():
        results = _each(backend, problem._replace(lse=True), *qkv, terms)
        pairs = [(y, dy) for y, dy in zip(results, (dout, dlse), strict=True) if dy is not None]
        ys, dys = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, sources, dys, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


def _each(backend: str, problem, q, k, v, terms):
    places, outs, lses = place(q, k, terms), [], []
    if terms.k is not None:
        q = _append(q, k, v, terms, places)
    window = Window(
        None if terms.diagonal_lo == -UNBOUNDED else -terms.diagonal_lo,
        None if terms.diagonal_hi == UNBOUNDED else terms.diagonal_hi,
    )
    # What a cache holds has turned already, and so have the queries by now.
    rotary = (terms.rotary_cos, terms.rotary_sin) if problem.rotary else None
    for i, one in enumerate(places):
        slopes = terms.alibi_slopes
        out, lse = attention(
            q[one.q_entry, :, one.q_rows.start : one.q_rows.stop][None],
            _rows(k, terms.k_scale, one, q.dtype),
            _rows(v, terms.v_scale, one, q.dtype),
            mask=None if window == (None, None, "bottom_right") else Mask((window,)),
            softmax_scale=terms.softmax_scale,
            softcap=terms.softcap,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[i : i + 1],
            sinks=terms.sinks,
            rotary=rotary,
            rotary_interleaved=rotary is not None and terms.rotary_interleaved,
            dropout_p=terms.dropout_p,
            seed=None if terms.seed is None else (terms.seed + i) % 2**63,
            return_lse=True,
            backend=backend,
        )
        outs.append(out)
        lses.append(lse)
    shape = (*q.shape[:3], v.shape[3])
    if terms.cu_seqlens_q is None:
        out, lse = (torch.cat(outs), torch.cat(lses)) if outs else (q.new_empty(shape), _empty_lse(problem, q))
    else:
        out, lse = _packed(outs, places, q.new_zeros(shape)), _packed(lses, places, _empty_lse(problem, q))
    return out, lse if problem.lse else None


def _packed(parts: list[torch.Tensor], places, rest: torch.Tensor) -> torch.Tensor:
    """Results in the order of the packed rows; what no sequence uses is taken from `rest`."""
    pieces, done = [rest[:, :, :0]], 0
    for part, one in zip(parts, places, strict=True):
        pieces += [rest[:, :, done : one.q_rows.start], part]
        done = one.q_rows.stop
    return torch.cat([*pieces, rest[:, :, done:]], 2)


def _empty_lse(problem, q) -> torch.Tensor:
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return q.new_full(q.shape[:3], -torch.inf, dtype=dtype)


def _rows(x, factors, one, dtype) -> torch.Tensor:
    rows = rows_of(x, one)
    return rows if factors is None else (rows * rows_of(factors, one)[..., None]).to(dtype)


def _append(q, k, v, terms, places) -> torch.Tensor:
    """Writes the new rows into the caches; the queries, turned."""
    new, turned = new_rows(terms), []
    check_slots(places, new, k.shape[2])
    for i, one in enumerate(places):
        first = one.k_rows.stop - new
        keys, values = terms.k[i], terms.v[i]
        if terms.rotary_cos is not None:
            positions = torch.arange(first, first + max(new, q.shape[2]), device=q.device)
            angles = terms.rotary_cos, terms.rotary_sin, terms.rotary_interleaved
            keys = rotated(keys, positions[:new], *angles)
            turned.append(rotated(q[i], positions[: q.shape[2]] if turns(terms) else positions[:1], *angles))
        for j in range(new):
            entry, row = slot(one, first + j, k.shape[2])
            for cache, factors, rows in ((k, terms.k_scale, keys), (v, terms.v_scale, values)):
                if factors is None:
                    cache[entry, :, row] = rows[:, j]
                else:
                    cache[entry, :, row], factors[entry, :, row] = quantized(rows[:, j])
    return torch.stack(turned) if turned else q
