"""Rotary position embedding of q and k (RoFormer, arXiv 2104.09864): the tables of a call, and the same in plain torch.

Key j turns by row j of the tables, query i by row i + seqlen_k - seqlen_q: the queries stand at the end of the keys.
"""

import torch

from ..checks import check_flag, one_line
from ..layouts.rotary import turned
from . import FLOATS, Term, is_given

_SHAPES = tuple((*batch, "seqlen_k", "rotary_pairs") for batch in ((), ("1",), ("batch",)))


def tables(rotary, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
    """The terms of rotary = (cos, sin), of the keys' positions alone; TypeError or ValueError if they do not fit."""
    cos, sin = checked(rotary)
    seqlen_q, seqlen_k, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"rotary: cos has {cos.shape[-1]} columns, one a pair; with head_dim={head_dim} they must be at most "
            f"{head_dim // 2} (of tables that repeat themselves pass the first half, cos[..., :rotary_dim // 2])"
        )
    if cos.shape[-2] < seqlen_k:
        raise ValueError(
            f"rotary: cos has {cos.shape[-2]} positions; they must be at least seqlen_k={seqlen_k}, one for each key "
            "(make longer tables)"
        )
    if seqlen_q > seqlen_k:
        raise ValueError(
            f"rotary: seqlen_q={seqlen_q} must be at most seqlen_k={seqlen_k}, the queries being the last of the "
            "positions (turn q and k before the call with fastattn.nn.apply_rotary)"
        )
    return {"rotary_cos": cos[..., :seqlen_k, :], "rotary_sin": sin[..., :seqlen_k, :]}


def checked(rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of `rotary`; TypeError or ValueError unless they are two tables of one shape."""
    is_pair = isinstance(rotary, (tuple, list)) and len(rotary) == 2
    if not is_pair or not all(isinstance(x, torch.Tensor) for x in rotary):
        raise TypeError(f"rotary={one_line(rotary)} must be (cos, sin), two tensors [positions, rotary_dim / 2]")
    cos, sin = rotary
    if cos.shape != sin.shape or cos.dim() not in (2, 3):
        raise ValueError(
            f"rotary={one_line(rotary)}: cos and sin must both be [positions, rotary_dim / 2], or both [batch, "
            "positions, rotary_dim / 2]"
        )
    return cos, sin


def wants_grad(rotary) -> bool:
    """Whether the tables may have gradients, which no kernel computes."""
    given = rotary if isinstance(rotary, (tuple, list)) else ()  # what else it may be, `checked` refuses
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)


def before(q: torch.Tensor, k: torch.Tensor, rotary, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned, a copy of each: for what kernels do not turn themselves. Errors as `tables`."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            raise TypeError(f"{name}={one_line(x)} must be a tensor [batch, num_heads, seqlen, head_dim]")
    angles = *tables(rotary, q, k).values(), check_flag("rotary_interleaved", interleaved)
    return turn_rows(q, k.shape[2] - q.shape[2], *angles), turn_rows(k, 0, *angles)


def turn_rows(x: torch.Tensor, first: int, cos, sin, interleaved: bool, back: bool = False) -> torch.Tensor:
    """x [batch, heads, rows, head_dim], whose rows stand at the positions from `first` on, turned. back: by the
    transpose, as gradients of turned rows are."""
    cos, sin = (table[..., first : first + x.shape[2], :] for table in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    return turned(x, cos, -sin if back else sin, interleaved)


def turned_call(problem, q: torch.Tensor, k: torch.Tensor, terms) -> tuple:
    """(problem, q, k, terms, angles) of the same call whose q and k have turned; angles None: it was without."""
    if not problem.rotary:
        return problem, q, k, terms, None
    angles, rest = taken_from(terms._asdict())
    q, k = turn_rows(q, terms.query_start, *angles), turn_rows(k, 0, *angles)
    return problem._replace(rotary=False), q, k, type(terms)(**rest), angles


def turn_back(found: dict, first: int, angles: tuple) -> dict:
    """Gradients by name, those of turned q, whose row 0 stands at `first`, and k as those of q and k."""
    firsts = {"q": first, "k": 0}
    return {name: turn_rows(x, firsts[name], *angles, back=True) if name in firsts else x for name, x in found.items()}


def taken_from(options: dict) -> tuple[tuple | None, dict]:
    """(angles of options of `attention` or terms, None: there are none; the options without them)"""
    rest = {name: x for name, x in options.items() if name not in NAMES}
    if options.get("rotary_cos") is None:
        return None, rest
    return (options["rotary_cos"], options["rotary_sin"], bool(options.get("rotary_interleaved"))), rest


COS = Term("rotary_cos", shapes=_SHAPES, dtypes=FLOATS, fact=("rotary", is_given, False), argument="cos of rotary")
SIN = Term("rotary_sin", shapes=_SHAPES, dtypes=FLOATS, argument="sin of rotary")
INTERLEAVED = Term("rotary_interleaved", False, check=lambda value: check_flag("rotary_interleaved", value))
NAMES = COS.name, SIN.name, INTERLEAVED.name
