"""The rows of the Triton kernels for packed sequences and for caches. Signatures: `fastattn.kernel_table.Row`.

Packed sequences are one dense call in which each query sees an interval of all keys: the kernels visit the tiles of a
query's own sequence and no others. Caches are read where they lie, in pages and int8 too, by `triton.decode`.
"""

import torch

from ..layouts import each
from ..layouts.placing import check_slots, new_rows, place, turns
from ..layouts.quantization import quantized
from ..layouts.rotary import turned
from ..layouts.sequences import PLACES, terms_of
from ..masks.intervals import UNBOUNDED
from ..terms import Terms
from . import triton


def varlen(problem, q, k, v, terms):
    """Forward pass of packed sequences."""
    if terms.block_table is not None:
        return each.triton(problem, q, k, v, terms)
    dense, *call = _dense(problem, q, k, v, terms)
    is_few = dense.seqlen_q <= triton.MOST_QUERIES and triton.declines(dense) is None
    return (triton.decode if is_few else triton.prefill)(dense, *call)


def varlen_for_backward(problem, q, k, v, terms):
    """As `triton.prefill_for_backward`, of packed sequences."""
    return triton.prefill_for_backward(*_dense(problem, q, k, v, terms))


def varlen_backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients of packed sequences."""
    wanted = *wanted[:3], Terms._make(terms_of(wanted[3]))
    *found, grads = triton.backward(*_dense(problem, q, k, v, terms), saved, dout, dlse, wanted)
    return *found, [*[None] * len(PLACES), *grads]


def cache(problem, q, k, v, terms):
    """Forward pass of few queries over caches, to which it appends first."""
    places = place(q, k, terms)
    if terms.k is not None:
        q = _append(q, k, v, terms, places)
    table = _table(k, terms, places)
    capacity = k.shape[2] * (1 if table is None else table.shape[1])
    problem = problem._replace(layout="dense", mask="interval", seqlen_k=capacity)
    firsts, ends = (torch.tensor([getattr(x.k_rows, side) for x in places])[:, None] for side in ("start", "stop"))
    positions = ends - q.shape[2] + torch.arange(q.shape[2])
    dense = _seen(terms_of(terms), firsts, ends, positions, q.device)
    return triton.decode(problem, q, k, v, dense, table, terms.k_scale, terms.v_scale)


def _dense(problem, q, k, v, terms) -> tuple:
    """(problem, q, k, v, terms) of the dense call that packed sequences are."""
    places = place(q, k, terms)
    lengths = torch.tensor([len(x.q_rows) for x in places], dtype=torch.int64)
    firsts, ends = torch.zeros(q.shape[2], dtype=torch.int64), torch.zeros(q.shape[2], dtype=torch.int64)
    positions = torch.zeros(q.shape[2], dtype=torch.int64)
    rows = torch.cat([torch.arange(x.q_rows.start, x.q_rows.stop) for x in places] or [firsts[:0]])

    def of_rows(numbers) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(lengths)

    firsts[rows], ends[rows] = of_rows([x.k_rows.start for x in places]), of_rows([x.k_rows.stop for x in places])
    positions[rows] = rows + of_rows([x.k_rows.stop - x.q_rows.stop for x in places])  # both end together
    seen = _seen(terms_of(terms), firsts[None], ends[None], positions[None], q.device)
    return problem._replace(layout="dense", mask="interval"), q, k, v, seen


def _seen(terms: Terms, firsts, ends, positions, device) -> Terms:
    """`terms` whose diagonals are intervals of keys. Each [batch, seqlen_q]: the keys of a query's sequence are firsts
    ... ends - 1, and `positions` says which of all keys is its own."""
    lo, hi = terms.diagonal_lo, terms.diagonal_hi
    k_start = firsts if lo == -UNBOUNDED else torch.maximum(firsts, positions + lo)
    k_end = ends if hi == UNBOUNDED else torch.minimum(ends, positions + hi + 1)
    k_start, k_end = (x.clamp(min=0).expand(positions.shape).int()[:, None].to(device) for x in (k_start, k_end))
    return terms._replace(diagonal_lo=-UNBOUNDED, diagonal_hi=UNBOUNDED, k_start=k_start, k_end=k_end)


def _table(k, terms, places) -> torch.Tensor | None:
    """The pages of each sequence; an entry of a contiguous cache is a page, None where sequence i has entry i."""
    if terms.block_table is not None:
        return terms.block_table.int()
    entries = [x.k_entry for x in places]
    return (
        None if entries == list(range(len(k))) else torch.tensor(entries, dtype=torch.int32, device=k.device)[:, None]
    )


def _append(q, k, v, terms, places) -> torch.Tensor:
    """Writes the new rows into the caches; the queries, turned."""
    new, size, device = new_rows(terms), k.shape[2], k.device
    check_slots(places, new, size)
    firsts = torch.tensor([x.k_rows.stop - new for x in places], device=device)[:, None]
    at, keys = firsts + torch.arange(new, device=device), terms.k
    if terms.rotary_cos is not None:
        of_queries = torch.arange(q.shape[2], device=device) if turns(terms) else torch.zeros(1, device=device).long()
        keys, q = (
            turned(x, terms.rotary_cos[where][:, None], terms.rotary_sin[where][:, None], terms.rotary_interleaved)
            for x, where in ((keys, at), (q, firsts + of_queries))
        )
    if terms.block_table is None:
        pages, rows = torch.tensor([x.k_entry for x in places], device=device)[:, None].expand_as(at), at
    else:
        pages, rows = terms.block_table.long().gather(1, at // size), at % size
    for cache, factors, x in ((k, terms.k_scale, keys), (v, terms.v_scale, terms.v)):
        x = x.transpose(1, 2)
        if factors is not None:
            x, factors[pages, :, rows] = quantized(x)
        cache[pages, :, rows] = x
    return q
