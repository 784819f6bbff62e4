"""Where the rows of each sequence lie, in plain torch: what C++ finds for itself, for other devices and autograd."""

from typing import NamedTuple

import torch

from ..masks.intervals import UNBOUNDED
from ..torch_internals import numbers_of


class Place(NamedTuple):
    """Sequence i of a call: queries q_rows of batch entry q_entry; keys k_rows of entry k_entry, or, with pages, the
    rows of these pages one after the other. The last `new_rows` keys of a cache are still to be appended."""

    q_entry: int
    q_rows: range
    k_entry: int | None
    k_rows: range
    pages: list[int]


def place(q: torch.Tensor, k: torch.Tensor, terms) -> list[Place]:
    """The place of each sequence; ValueError that names the entry of a list which is out of range."""
    starts_q = _starts("cu_seqlens_q", terms.cu_seqlens_q, q.shape[2], exact=True)
    count = q.shape[0] if starts_q is None else len(starts_q) - 1
    used_q = _list(terms.seqused_q)
    places = []
    lengths = _lengths_in_cache(terms, k, count, q.shape[2]) if _is_cache(terms) else None
    starts_k = None if lengths else _starts("cu_seqlens_k", terms.cu_seqlens_k, k.shape[2], exact=True)
    used_k = None if lengths else _list(terms.seqused_k)
    for i in range(count):
        entry, lo, hi = (i, 0, q.shape[2]) if starts_q is None else (0, starts_q[i], starts_q[i + 1])
        if used_q is not None:
            hi = lo + _in_range("seqused_q", i, used_q[i], hi - lo)
        if lengths:
            places.append(Place(entry, range(lo, hi), *lengths[i]))
            continue
        first, end = starts_k[i], starts_k[i + 1]
        if used_k is not None:
            end = first + _in_range("seqused_k", i, used_k[i], end - first)
        places.append(Place(entry, range(lo, hi), 0, range(first, end), []))
    return places


def rows_of(x: torch.Tensor, one: Place) -> torch.Tensor:
    """[1, heads, keys, ...] of a tensor of keys, values or factors of rows."""
    if one.k_entry is not None:
        return x[one.k_entry, :, one.k_rows.start : one.k_rows.stop][None]
    pages = x[torch.tensor(one.pages, dtype=torch.int64, device=x.device)].transpose(0, 1).flatten(1, 2)
    return pages[None, :, one.k_rows.start : one.k_rows.stop]


def slot(one: Place, row: int, page_size: int) -> tuple[int, int]:
    """(batch entry or page, row in it) of a row of `one.k_rows`."""
    return (one.k_entry, row) if one.k_entry is not None else (one.pages[row // page_size], row % page_size)


def check_slots(places: list[Place], new: int, page_size: int) -> None:
    """ValueError if two sequences would append `new` rows each to one entry or page."""
    taken: dict[int, int] = {}
    for i, one in enumerate(places):
        for row in range(one.k_rows.stop - new, one.k_rows.stop):
            entry, _ = slot(one, row, page_size)
            if taken.setdefault(entry, i) != i:
                raise ValueError(f"sequences {taken[entry]} and {i} would write the same entry or page {entry}")


def new_rows(terms) -> int:
    """How many rows each sequence appends."""
    return 0 if terms.k is None else terms.k.shape[2]


def turns(terms) -> bool:
    """Whether rotary embedding turns each query by a position of its own."""
    return terms.diagonal_lo != -UNBOUNDED or terms.diagonal_hi != UNBOUNDED


def _is_cache(terms) -> bool:
    return terms.cache_seqlens is not None or terms.block_table is not None


def _lengths_in_cache(terms, k: torch.Tensor, count: int, seqlen_q: int) -> list[tuple]:
    table, new = _list(terms.block_table), new_rows(terms)
    capacity = k.shape[2] if table is None else k.shape[2] * terms.block_table.shape[1]
    if terms.cache_seqlens is not None:
        name, seqlens = "cache_seqlens", terms.cache_seqlens
        seqlens = [seqlens] * count if isinstance(seqlens, int) else numbers_of(seqlens)
    elif terms.seqused_k is not None:
        name, seqlens = "seqused_k", numbers_of(terms.seqused_k)
    else:
        name, starts = "cu_seqlens_k", _starts("cu_seqlens_k", terms.cu_seqlens_k, 2**62, exact=False)
        seqlens = [end - first for first, end in zip(starts, starts[1:], strict=False)]
    pads = [0] * count if terms.cache_leftpad is None else numbers_of(terms.cache_leftpad)
    entries = range(count) if terms.cache_batch_idx is None else numbers_of(terms.cache_batch_idx)
    found = []
    for i, (seqlen, pad, entry) in enumerate(zip(seqlens, pads, entries, strict=False)):
        _in_range(name, i, seqlen, capacity - new)
        _in_range("cache_leftpad", i, pad, seqlen)
        if terms.k is not None and terms.rotary_cos is not None:
            _in_range(name, i, seqlen, len(terms.rotary_cos) - max(new, seqlen_q if turns(terms) else 1))
        rows, pages = range(pad, seqlen + new), []
        if table is None:
            _in_range("cache_batch_idx", i, entry, k.shape[0] - 1)
        else:
            pages, entry = table[i][: -(-rows.stop // k.shape[2])], None
            for j, page in enumerate(pages):
                if not 0 <= page < k.shape[0]:
                    raise ValueError(f"block_table[{i}, {j}]={page} must be a page, 0 <= page < {k.shape[0]}")
        found.append((entry, rows, pages))
    return found


def _list(x: torch.Tensor | None) -> list | None:
    return None if x is None else numbers_of(x)


def _in_range(name: str, i: int, value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise ValueError(f"{name}[{i}]={value} must be in 0 ... {most}")
    return value


def _starts(name: str, starts: torch.Tensor | None, total: int, exact: bool) -> list[int] | None:
    if starts is None:
        return None
    starts = numbers_of(starts)
    if starts[0] != 0:
        raise ValueError(f"{name}[0]={starts[0]} must be 0")
    for i in range(1, len(starts)):
        if not starts[i - 1] <= starts[i] <= total:
            raise ValueError(f"{name}[{i}]={starts[i]} must be in {starts[i - 1]} ... {total}")
    if exact and starts[-1] != total:
        raise ValueError(f"{name}[{len(starts) - 1}]={starts[-1]} must be the number of rows, {total}")
    return starts
