"""Which rows and heads of a call are looked at, and the call that is left of it."""

import operator

import torch

from .. import api
from ..checks import check_tensors, dtype_name, one_line
from ..masks.block_mask import BlockMask
from ..problem import FLOATS
from ..scores.rotary import turned_call
from ..transforms.slots import Call


def chosen_call(q, k, lse, options: dict, rows, heads, top_k: int = 0) -> tuple[Call, dict]:
    """(the call of the chosen query rows and heads, its tensors by slot), all checked; options: of `attention`.

    The values of the call are its keys: whoever looks at weights has none.
    """
    bound = api.bind(q, k, k, backend="reference", **options)
    return part_of(bound.problem, bound.terms, q, k, lse, rows, heads, top_k)


def part_of(problem, terms, q, k, lse, rows, heads, top_k: int = 0) -> tuple[Call, dict]:
    """`chosen_call` of a call that is bound, without its dropout."""
    problem, q, k, terms, _ = turned_call(problem, q, k, terms)
    problem, terms = problem._replace(dropout=False), terms._replace(dropout_p=0.0, seed=None)
    rows = check_places("rows", rows, problem.seqlen_q)
    call = Call(problem, "reference", terms, False, None if rows is None else runs_of(rows), top_k)
    tensors = {"q": q, "k": k, **{name: getattr(terms, name) for name in call.term_slots}}
    if lse is not None:
        tensors["lse"] = checked_lse(lse, problem, q)
    heads = check_places("heads", heads, problem.num_heads)
    return (call, tensors) if heads is None else _of_heads(call, tensors, heads)


def check_places(name: str, places, size: int) -> list[int] | None:
    """Chosen places of a dimension as ints >= 0; None is all of them. TypeError or ValueError."""
    if places is None:
        return None
    if isinstance(places, torch.Tensor):
        if places.dim() != 1 or places.dtype == torch.bool or places.is_floating_point():
            raise TypeError(f"{name}={one_line(places)} must be a sequence of ints, or an integer tensor [{name}]")
        places = places.tolist()
    try:
        found = [operator.index(place) for place in places]
    except TypeError:
        hint = f"; for one, pass {name}=[{places}]" if isinstance(places, int) else ""
        raise TypeError(f"{name}={one_line(places)} must be a sequence of ints{hint}") from None
    for place in found:
        if not -size <= place < size:
            raise ValueError(f"{name}={one_line(places)}: {place} must be in 0 ... {size - 1} (or count from the end)")
    return [place % size for place in found]


def runs_of(rows: list[int]) -> tuple[tuple[int, int], ...]:
    """(start, end) of rows that stand side by side, in their order."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return tuple(runs)


def checked_lse(lse, problem, q: torch.Tensor) -> torch.Tensor:
    """`lse` without its gradient; TypeError or ValueError unless it is the lse of the call."""
    check_tensors(lse=lse)
    expected = (problem.batch, problem.num_heads, problem.seqlen_q)
    if dtype_name(lse.dtype) not in FLOATS:
        raise TypeError(f"lse has dtype {lse.dtype}; supported are {', '.join(FLOATS)}")
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse has shape {tuple(lse.shape)}; it must be [batch, num_heads, seqlen_q], here {expected}")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device}, q on {q.device}; they must be on one device")
    return lse.detach()


def _of_heads(call: Call, tensors: dict, heads: list[int]) -> tuple[Call, dict]:
    """The call of some query heads, each with a copy of its key head."""
    index = torch.tensor(heads, dtype=torch.int64, device=tensors["q"].device)
    places = {"num_heads": index, "num_heads_k": index // max(call.problem.group_size, 1)}
    chosen = {}
    for slot, x in tensors.items():
        for dim, name in enumerate(call.dims(slot, x)):
            if name in places and x.shape[dim] != 1:
                x = x.index_select(dim, places[name])
        chosen[slot] = x
    if chosen["k"].shape[1] != len(heads):  # one key head, which all share
        chosen["k"] = chosen["k"].expand(-1, len(heads), -1, -1)
    if chosen["q"].shape[1] != len(heads):
        chosen["q"] = chosen["q"].expand(-1, len(heads), -1, -1)
    terms = call.terms(chosen)
    if terms.block_mask is not None:
        terms = terms._replace(block_mask=_mask_of_heads(terms.block_mask, index))
    problem = call.problem._replace(num_heads=len(heads), num_heads_k=len(heads))
    return Call(problem, "reference", terms, False, call.runs, call.top_k), chosen


def _mask_of_heads(mask: BlockMask, index: torch.Tensor) -> BlockMask:
    if mask.shape[1] == 1:
        return mask
    tensors = {name: x if name == "bitmaps" else x[:, index] for name, x in mask.tensors().items()}
    return BlockMask(**tensors, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=mask.seq_lengths)
