"""Arguments of a call, checked: what a rank tells the others of them, and what its blocks have in common."""

from typing import NamedTuple

import torch

from .. import api, dispatch
from ..checks import check_flag, check_tensors, dtype_name
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask, Window, check_window, diagonal_bounds
from ..scores.dropout import DropoutStart, P, check_seed
from ..torch_internals import is_transformed
from ..validation import check_qkv, mask_kind
from .blocks import LEARNED, Whole
from .choice import check_schedule
from .costs import Machine, Sizes
from .shards import Shards

ROW_TERMS = ("mask", "bias")
"""Terms that hold a row of numbers for each query, one for each key."""


class Arguments(NamedTuple):
    """Of one call on this rank. options: those of `fastattn.attention`; windows: with causal."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict
    windows: tuple[Window, ...]


def check(q, k, v, options: dict, others: dict) -> Arguments:
    """What can be checked without other ranks; TypeError, ValueError or UnsupportedError."""
    check_qkv(q, k, v)
    if is_transformed():
        raise dispatch.UnsupportedError(
            "fastattn.parallel has no torch.func transforms: other ranks would have to take part"
        )
    P.check(options["dropout_p"])
    check_seed(options["seed"])
    check_schedule(others["schedule"])
    for name in ("shards", "shards_k"):
        if not isinstance(others[name], (str, Shards, type(None))):
            raise TypeError(f"{name} must be a name or Shards, got {type(others[name]).__name__}")
    if not isinstance(others["machine"], Machine):
        raise TypeError(f"machine must be a fastattn.parallel.Machine, got {type(others['machine']).__name__}")
    check_tensors(**{name: options[name] for name in ("alibi_slopes", "bias", "sinks") if options[name] is not None})
    mask, windows = options["mask"], ()
    if isinstance(mask, Mask):
        windows = mask.windows
    if options["window_size"] is not None:
        windows = *windows, Window(*check_window(options["window_size"]))
    if check_flag("causal", options["causal"]):
        windows = *windows, Window(None, 0)
    return Arguments(q, k, v, options, windows)


def described(arguments: Arguments, others: dict, function: str) -> dict:
    """What must be equal on all ranks, by name."""
    q, k, v, options, windows = arguments
    learned = {name: _of_tensor(options[name]) for name in ("alibi_slopes", "sinks", "softmax_scale")}
    bias = options["bias"]
    return {
        "function": function, "batch": q.shape[0], "num_heads": q.shape[1], "num_heads_k": k.shape[1],
        "head_dim": q.shape[3], "head_dim_v": v.shape[3], "dtype": dtype_name(q.dtype), "device": q.device.type,
        "windows": windows, "mask": _of_mask(options["mask"]), **learned,
        "bias": None if bias is None else (dtype_name(bias.dtype), bias.requires_grad), "softcap": options["softcap"],
        "gradients": tuple(torch.is_grad_enabled() and x.requires_grad for x in (q, k, v)),
        "backend": options["backend"], "skip_negligible": options["skip_negligible"],
        "return_lse": bool(options["return_lse"]), "dropout_p": P.check(options["dropout_p"]), "seed": options["seed"],
        **others,
    }  # fmt: skip


def _of_tensor(x):
    return (tuple(x.shape), dtype_name(x.dtype), x.requires_grad) if isinstance(x, torch.Tensor) else x


def _of_mask(mask):
    if isinstance(mask, Mask):
        return "Mask", mask.k_start is not None, mask.k_end is not None
    if isinstance(mask, BlockMask):
        return "BlockMask", mask.BLOCK_SIZE, mask.shape[:2]
    return None if mask is None else type(mask).__name__


def everything(arguments: Arguments, others: dict, function: str) -> dict[str, str]:
    """`described` with the values of tensors that every rank has, as text."""
    found = {name: repr(value) for name, value in described(arguments, others, function).items()}
    for name in ("alibi_slopes", "sinks", "softmax_scale"):
        if isinstance(x := arguments.options[name], torch.Tensor):
            found[f"values of {name}"] = repr(x.detach().double().tolist())
    return found | {"torch": torch.__version__}


def has_row_tensors(options: dict) -> bool:
    """Whether a rank has tensors of its own rows, of which others know nothing."""
    mask = options["mask"]
    of_mask = mask is not None and (not isinstance(mask, Mask) or mask.k_start is not None or mask.k_end is not None)
    return of_mask or options["bias"] is not None


def whole(arguments: Arguments, shards_q: Shards, shards_k: Shards, rank: int) -> tuple[Whole, dict]:
    """(what all blocks of this rank have in common, the tensors with gradients by name)."""
    q, k, v, options, windows = arguments
    seqlen_q, seqlen_k = shards_q.seqlen, shards_k.seqlen
    wide = [x.new_zeros(()).expand(*x.shape[:2], seqlen_k, x.shape[3]) for x in (k, v)]
    asked = {name: x for name, x in options.items() if name not in ("return_lse", "seed")}
    bound = api.bind(q.detach(), *wide, **asked)
    lo, hi = diagonal_bounds(windows, seqlen_q, seqlen_k)
    terms = bound.terms
    kind = mask_kind(
        {name for name in ("block_mask", "mask", "k_start", "k_end") if getattr(terms, name) is not None}, lo, hi
    )
    learned = {name: x for name in LEARNED if isinstance(x := getattr(terms, name), torch.Tensor)}
    terms = terms.at(lo, hi, seqlen_k - seqlen_q)._replace(**dict.fromkeys(learned))
    if bound.problem.dropout:
        terms = terms._replace(seed=options["seed"], dropout_start=DropoutStart(0, 0, 0))
    problem = bound.problem._replace(
        mask=kind, sinks=False, lse=False, needs_grad=True, direction="forward", transformed=False,
        dropout_start=bound.problem.dropout,
    )  # fmt: skip
    if problem.alibi and dispatch.select(problem, options["backend"]).row.backend == "triton":
        raise dispatch.UnsupportedError(
            "alibi_slopes are not supported across ranks by Triton's kernels, which count distances from aligned ends "
            "of queries and keys: a block stands elsewhere; use backend='reference'"
        )
    runs = tuple(run for of_rank in shards_k.runs for run in of_rank)
    return Whole(problem, terms, options["backend"], shards_q.runs[rank], runs), learned


def sizes_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sizes:
    """The Sizes of a call, whose shards have these shapes."""
    element = q.element_size()
    (batch, num_heads, _, head_dim), num_heads_k, head_dim_v = q.shape, k.shape[1], v.shape[3]
    return Sizes(batch, num_heads, num_heads_k, head_dim, head_dim_v, element, max(element, 4))
