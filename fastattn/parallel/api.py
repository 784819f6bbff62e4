"""`attention()` over a sequence whose shards lie on the ranks of a mesh dimension."""

from functools import lru_cache

import torch

from .. import dispatch
from ..api import misnamed
from ..calls import current_backend
from ..checks import check_flag, one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..torch_internals import outside_of_graphs
from .agreement import Call, agree, compare_everything
from .arguments import ROW_TERMS, Arguments, check, described, everything, has_row_tensors, sizes_of, whole
from .block_masks import joined_rows
from .blocks import LEARNED, Whole
from .choice import Setting, choose
from .costs import Machine, listed, needs_of, work
from .heads import Exchange, of_group
from .peers import Peers, gathered, gathered_objects
from .plan import PLANS, Needs
from .shards import Shards, check_shards
from .steps import Job, Steps

_ERRORS = (TypeError, ValueError, dispatch.UnsupportedError)
ALONE = Peers(None)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *misplaced,
    mesh,
    dim: str | tuple[str, str] = "cp",
    schedule: str | None = None,
    shards: str | Shards = "contiguous",
    shards_k: str | Shards | None = None,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    skip_negligible: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    timeout: float | None = None,
    machine: Machine | None = None,
    debug: bool = False,
    **unknown,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`fastattn.attention` of a sequence of which every rank holds a part: exact, forward and backward.

    q, k, v   this rank's rows [batch, num_heads, local_seqlen, head_dim], as in `fastattn.attention`; ranks may have
              different numbers of rows, and none
    mesh      a torch.distributed DeviceMesh; dim: the dimension along which the sequence is cut, or two, (outer,
              inner), whose ranks count outer * size of inner + inner
    schedule  "ring": keys and values pass around while blocks are computed; "all_gather": each rank gets all keys that
              it needs at once; "all_to_all": each rank gets all rows of some heads; "ring+all_to_all", for two
              dimensions: heads are exchanged along inner, keys pass around along outer. None: what `explain` says
    shards    which rows a rank holds: "contiguous" (in the order of the ranks, any lengths), "zigzag", or `Shards`;
              shards_k: of k and v, if others than of q; None: those of q, "contiguous" ones of their own lengths
    mask      of the local queries against all keys, whose positions count in the whole sequence: a `Mask`, whose
              k_start and k_end are [batch|1, num_heads|1, local_seqlen|1], a `BlockMask` or a bool tensor
              [batch|1, num_heads|1, local_seqlen, seqlen_k]. `shard` cuts one for the whole sequence
    bias      [batch|1, num_heads|1, local_seqlen|1, seqlen_k|1]
    alibi_slopes, sinks, softmax_scale  equal on all ranks
    timeout   seconds to wait for another rank; None: the process group's own timeout
    machine   what the cost model assumes; None: `Machine()`
    debug     compare all arguments that must be equal, with their values, and not only hashes of what they are

    causal, window_size, softcap, return_lse, skip_negligible and backend are those of `fastattn.attention`, with the
    lengths of the whole sequence. dropout_p > 0 is refused: `UnsupportedError`.

    Returns out [batch, num_heads, local_seqlen, head_dim_v], or (out, lse), of the local queries. Equal to one
    process's to rounding; the bits depend on shards and schedule and never on timing. Gradients of q, k, v are those of
    the whole sequence's loss; those of alibi_slopes, bias, sinks and softmax_scale are of the local queries (with heads
    exchanged, of the local heads), to be summed over the ranks as those of weights are. Every rank has to call, and
    to run backward if one does.

    Memory: O(local_seqlen), and of other ranks the keys and values of two shards (of all, for all_gather). What no
    query of a rank sees is neither computed nor sent to it.

    Raises what `fastattn.attention` raises; `ParallelError` if another rank has died, does not answer in time or was
    called otherwise, on every rank. Method: Ring Attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    if misplaced or unknown:
        raise misnamed("fastattn.parallel.attention", misplaced, unknown)
    groups = groups_of(mesh, dim, timeout)
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "dropout_p": dropout_p, "seed": seed,
        "skip_negligible": skip_negligible, "return_lse": return_lse,
        "backend": current_backend() if backend is None else backend,
    }  # fmt: skip
    others = {
        "schedule": schedule, "shards": shards, "shards_k": shards_k, "machine": machine or Machine(),
        "debug": check_flag("debug", debug),
    }  # fmt: skip
    arguments, lengths = agreed(groups, (q, k, v), options, others, "attention")
    shards_q, shards_k = _shards(lengths, shards, shards_k)
    out, lse = _run(groups, arguments, shards_q, shards_k, others)
    return (out, lse) if return_lse else out


attention = outside_of_graphs(attention, "fastattn.parallel talks with other processes")


def groups_of(mesh, dim, timeout: float | None) -> tuple[Peers, ...]:
    """The ranks along one or two dimensions of a mesh, from outer to inner; TypeError or ValueError."""
    names = getattr(mesh, "mesh_dim_names", None)
    if not hasattr(mesh, "get_group"):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    dims = dim if isinstance(dim, tuple) else (dim,)
    if len(dims) not in (1, 2) or len(set(dims)) < len(dims) or any(x not in (names or ()) for x in dims):
        raise ValueError(f"dim={one_line(dim)} must be one or two different names of mesh dimensions, here {names}")
    return tuple(Peers(mesh.get_group(x), timeout) for x in dims)


def place_of(groups: tuple[Peers, ...]) -> int:
    """This rank's number among the shards."""
    place = 0
    for peers in groups:
        place = place * peers.size + peers.rank
    return place


def agreed(groups, qkv, options: dict, others: dict, function: str) -> tuple[Arguments, list[tuple[int, int]]]:
    """The arguments, and the (query, key) rows of all ranks; raises on every rank if they are wrong on one."""
    arguments, equal, error = None, {}, None
    try:
        arguments = check(*qkv, options, others)
        equal = described(arguments, others, function)
    except _ERRORS as found:
        error = found
    lengths = (0, 0) if error else (qkv[0].shape[2], qkv[1].shape[2])
    device = qkv[0].device if isinstance(qkv[0], torch.Tensor) else torch.device("cpu")
    found = agree(groups, Call(equal, lengths, error), device)
    if others["debug"]:
        compare_everything(groups, everything(arguments, others, function))
    return arguments, found


def _shards(lengths, shards, shards_k) -> tuple[Shards, Shards]:
    rows, keys = ([pair[n] for pair in lengths] for n in (0, 1))
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
    agree(groups, Call({}, (0, 0), error), arguments.q.device)
    return found


def _run(groups, arguments: Arguments, shards_q: Shards, shards_k: Shards, others: dict) -> tuple:
    q, k, v, options, _ = arguments
    call, learned = whole_of(groups, arguments, shards_q, shards_k, place_of(groups))
    terms = call.terms
    has_rows = tuple(name for name in ROW_TERMS if (name in learned or getattr(terms, name) is not None))
    dims = tuple(peers.size for peers in groups)
    setting = Setting(sizes_of(q, k, v), shards_q, shards_k, dims, call.bounds, has_rows, others["machine"])
    schedule = choose(setting, others["schedule"])
    outer, inner = (groups[0], ALONE) if len(groups) == 1 else groups
    if schedule == "all_to_all":
        outer, inner = ALONE, groups[0]
    if inner.size > 1:
        first = outer.rank * inner.size
        local_q, local_k = (of_group(shards, first, inner.size) for shards in (shards_q, shards_k))
        q, k, v = Exchange.apply(inner, (local_q, local_k, local_k), True, q, k, v)
        shards_q, shards_k = shards_q.grouped(inner.size), shards_k.grouped(inner.size)
        call, learned = _of_heads(call, learned, inner, local_q, (shards_q, shards_k), outer.rank)
    seen = call.seen()
    needs = _needs(call, seen, outer, shards_q, shards_k)
    _, owners = listed(shards_k)
    slots = PLANS["all_gather" if schedule == "all_gather" else "ring"](needs, tuple(owners), outer.rank)
    own = tuple(run for run, owner in enumerate(owners) if owner == outer.rank)
    out, lse = Steps.apply(Job(call, seen, slots, outer, own), q, k, v, *[learned.get(name) for name in LEARNED])
    if inner.size > 1:
        (out,) = Exchange.apply(inner, (local_q,), False, out)
        if options["return_lse"]:
            (lse,) = Exchange.apply(inner, (local_q,), False, lse)
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
