"""What a call of `attention` does on a rank: arguments compared, a schedule chosen and run."""

from functools import lru_cache

import torch

from .. import dispatch
from ..calls import current_backend
from ..checks import one_line
from ..masks.block_mask import BlockMask
from .agreement import Call, agree, compare_everything
from .arguments import ROW_TERMS, Arguments, check, described, everything, has_row_tensors, sizes_of, whole
from .block_masks import joined_rows
from .blocks import LEARNED, Whole
from .choice import Setting, choose
from .costs import listed, needs_of, work
from .heads import Exchange, of_group
from .merge import Partial
from .peers import Peers, gathered, gathered_objects
from .plan import PLANS, Needs
from .shards import Shards, check_shards
from .steps import Job, Steps

_ERRORS = (TypeError, ValueError, dispatch.UnsupportedError)
ALONE = Peers(None)


def attend(groups, qkv, options: dict, others: dict, drawn: int | None = None, known: list[Partial] | None = None):
    """(out, lse) of a call with these options of `fastattn.attention`; others: those of `attention` alone.

    drawn  the seed of this rank where a call has none; None: of torch's generator
    known  for whoever keeps the results of the forward pass, and not its graph: an empty list, into which the Partial
           of the local rows goes; or the list with it, and then nothing is computed before the backward pass
    """
    arguments, lengths = agreed(groups, qkv, options, others, "attention", drawn)
    return _run(groups, arguments, *_shards(lengths, others["shards"], others["shards_k"]), others, known)


def groups_of(mesh, dim, timeout: float | None) -> tuple[Peers, ...]:
    """The ranks along one or two dimensions of a mesh, from outer to inner; TypeError or ValueError."""
    return tuple([Peers(mesh.get_group(x), timeout) for x in check_dims(mesh, dim)])


def check_dims(mesh, dim) -> tuple[str, ...]:
    """The names of the mesh dimensions that `dim` names; TypeError or ValueError."""
    names = getattr(mesh, "mesh_dim_names", None)
    if not hasattr(mesh, "get_group"):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    dims = dim if isinstance(dim, tuple) else (dim,)
    if len(dims) not in (1, 2) or len(set(dims)) < len(dims) or not all([x in (names or ()) for x in dims]):
        raise ValueError(f"dim={one_line(dim)} must be one or two different names of mesh dimensions, here {names}")
    return dims


def place_of(groups: tuple[Peers, ...]) -> int:
    """This rank's number among the shards."""
    place = 0
    for peers in groups:
        place = place * peers.size + peers.rank
    return place


def agreed(
    groups, qkv, options: dict, others: dict, function: str, drawn: int | None = None
) -> tuple[Arguments, list[tuple[int, int, int]]]:
    """The arguments, with the seed of the first rank, and (rows of q, rows of k, seed) of all ranks; raises on every
    rank if they are wrong on one."""
    options = options | {"backend": options["backend"] or current_backend()}
    arguments, equal, error = None, {}, None
    try:
        arguments = check(*qkv, options, others)
        equal = described(arguments, others, function)
    except _ERRORS as found:
        error = found
    own, draws = (0, 0, 0), False
    if error is None:
        draws = options["dropout_p"] > 0.0 and options["seed"] is None
        drawn = int(torch.randint(2**63 - 1, ())) if draws and drawn is None else drawn
        own = qkv[0].shape[2], qkv[1].shape[2], drawn if draws else 0
    device = qkv[0].device if isinstance(qkv[0], torch.Tensor) else torch.device("cpu")
    found = agree(groups, Call(equal, own, error), device)
    if others["debug"]:
        compare_everything(groups, everything(arguments, others, function))
    if draws:
        arguments = arguments._replace(options=options | {"seed": found[0][2]})
    return arguments, found


def _shards(lengths, shards, shards_k) -> tuple[Shards, Shards]:
    rows, keys = ([of_rank[n] for of_rank in lengths] for n in (0, 1))
    if shards_k is None:
        shards_k = shards if isinstance(shards, str) or rows == keys else "contiguous"
    return check_shards(shards, "shards", rows), check_shards(shards_k, "shards_k", keys)


def whole_of(groups, arguments: Arguments, shards_q: Shards, shards_k: Shards, rank: int) -> tuple[Whole, dict]:
    """`whole` of `arguments`, for whose tensors every rank raises if they are wrong on one."""
    if not has_row_tensors(arguments.options):
        return whole(arguments, shards_q, shards_k, rank)
    found, error = None, None
    try:
        found = whole(arguments, shards_q, shards_k, rank)
        if found[0].terms.block_mask is not None:
            found[0].seen()  # which cuts it
    except _ERRORS as raised:
        error = raised
    agree(groups, Call({}, error=error), arguments.q.device)
    return found


def _run(groups, arguments: Arguments, shards_q: Shards, shards_k: Shards, others: dict, known: list | None) -> tuple:
    q, k, v, options, _ = arguments
    call, learned = whole_of(groups, arguments, shards_q, shards_k, place_of(groups))
    terms = call.terms
    has_rows = tuple(name for name in ROW_TERMS if (name in learned or getattr(terms, name) is not None))
    dims = tuple(peers.size for peers in groups)
    setting = Setting(sizes_of(q, k, v), shards_q, shards_k, dims, call.bounds, has_rows, others["machine"])
    schedule = choose(setting, others["schedule"])
    outer, inner = (groups[0], ALONE) if len(groups) == 1 else groups
    is_known = bool(known)
    if schedule == "all_to_all":
        outer, inner = ALONE, groups[0]
    if inner.size > 1:
        first = outer.rank * inner.size
        local_q, local_k = (of_group(shards, first, inner.size) for shards in (shards_q, shards_k))
        q, k, v = Exchange.apply(inner, (local_q, local_k, local_k), True, q, k, v)
        if is_known:
            known = [Partial(*Exchange.apply(inner, (local_q,) * 3, True, *known[0]))]
        shards_q, shards_k = shards_q.grouped(inner.size), shards_k.grouped(inner.size)
        call, learned = _of_heads(call, learned, inner, local_q, (shards_q, shards_k), outer.rank)
    seen = call.seen()
    needs = _needs(call, seen, outer, shards_q, shards_k)
    _, owners = listed(shards_k)
    slots = PLANS["all_gather" if schedule == "all_gather" else "ring"](needs, tuple(owners), outer.rank)
    own = tuple(run for run, owner in enumerate(owners) if owner == outer.rank)
    job = Job(call, seen, slots, outer, own, known)
    out, lse = Steps.apply(job, q, k, v, *[learned.get(name) for name in LEARNED])
    if inner.size > 1:
        (out,) = Exchange.apply(inner, (local_q,), False, out)
        if options["return_lse"]:
            (lse,) = Exchange.apply(inner, (local_q,), False, lse)
        if known is not None and not is_known:
            known[:] = [Partial(*Exchange.apply(inner, (local_q,) * 3, False, *known[0]))]
    return out, lse


def _needs(call: Whole, seen: tuple, outer: Peers, shards_q: Shards, shards_k: Shards) -> Needs:
    """The runs of keys that each rank sees: from positions alone, or asked of each where masks hold rows."""
    terms = call.terms
    if terms.mask is terms.block_mask is terms.k_start is terms.k_end is None:
        return _needs_of_positions(shards_q, shards_k, call.bounds)
    flags = torch.tensor([len(runs) > 0 for runs in seen], dtype=torch.uint8, device=_device_of(call))
    found = gathered(outer, flags, "what each rank needs")
    return tuple(frozenset(x.nonzero()[:, 0].tolist()) for x in found)


@lru_cache(maxsize=256)
def _needs_of_positions(shards_q: Shards, shards_k: Shards, bounds: tuple[int, int]) -> Needs:
    return needs_of(work(shards_q, shards_k, *bounds))


def _device_of(call: Whole) -> torch.device:
    """Where the tensors of its masks are."""
    terms = call.terms
    return next(x.device for x in (terms.mask, terms.block_mask, terms.k_start, terms.k_end) if x is not None)


def _of_heads(call: Whole, learned: dict, inner: Peers, local_q: Shards, grouped, rank: int) -> tuple[Whole, dict]:
    """A call with this rank's heads alone, and the rows of all ranks of `inner`."""
    shards_q, shards_k = grouped
    problem, size = call.problem, inner.size
    heads, heads_k = problem.num_heads // size, problem.num_heads_k // size
    learned = {
        name: x.chunk(size, -1)[inner.rank] if x.dim() and x.shape[-1] == problem.num_heads else x
        for name, x in learned.items()
    }
    changed = {}
    if (start := call.terms.dropout_start) is not None:
        changed["dropout_start"] = start._replace(head=inner.rank * heads)
    for name in ("k_start", "k_end"):
        if (x := getattr(call.terms, name)) is not None:
            shared = x.shape[1] == 1
            x = x.expand(-1, size if shared else -1, local_q.lengths[inner.rank])
            changed[name] = Exchange.apply(inner, (local_q,), True, x)[0]
    if (mask := call.terms.block_mask) is not None:
        rows = gathered_objects(inner, (mask.to("cpu").tensors(), mask.seq_lengths), "a mask of all rows")
        masks = [BlockMask(**x, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=lengths) for x, lengths in rows]
        changed["block_mask"] = joined_rows(masks, local_q, inner.rank, size).to(mask.device)
    problem = problem._replace(num_heads=heads, num_heads_k=heads_k)
    runs = tuple(run for of_rank in shards_k.runs for run in of_rank)
    return Whole(problem, call.terms._replace(**changed), call.backend, shards_q.runs[rank], runs), learned
