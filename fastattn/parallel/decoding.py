"""`decode()`: a few queries, the same on every rank, over a cache whose keys lie on several ranks."""

import torch

from ..api import misnamed
from ..calls import current_backend
from ..checks import check_flag
from ..outputs import compute_dtype
from ..torch_internals import outside_of_graphs
from . import blocks, merge
from .costs import Machine
from .merge import Partial
from .peers import Peers
from .running import agreed, groups_of, place_of, whole_of
from .shards import Shards, check_shards


@torch.no_grad()
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *misplaced,
    mesh,
    dim: str | tuple[str, str] = "cp",
    shards_k: str | Shards = "contiguous",
    mask=None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    timeout: float | None = None,
    debug: bool = False,
    **unknown,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries that every rank has over keys of which each rank holds a part: no gradient.

    q         [batch, num_heads, seqlen_q, head_dim], equal on all ranks: the last rows of the sequence
    k, v      this rank's keys and values [batch, num_heads_k, local_seqlen_k, dim]; a rank may hold none
    shards_k  where they stand, as in `attention`: "contiguous" is in the order of the ranks, of any lengths. Where the
              positions of keys do not matter (no causal, window, mask, bias or ALiBi), neither do shards
    mask, bias  of the queries against all keys, as in `attention`, and equal on all ranks

    All others as in `attention`. causal is bottom-right: the last query stands at the last key of all ranks.

    Returns out, or (out, lse), with the same bits on every rank: each computes with its own keys, and partial results
    go up a tree of ranks and down again. A rank sends at most log2(ranks) + 1 times batch * num_heads * seqlen_q *
    (head_dim_v + 2) numbers, whatever the length of the cache. Raises as `attention`. Method: Tree Attention, arXiv
    2408.04093; the split of Flash-Decoding.
    """
    if misplaced or unknown:
        raise misnamed("fastattn.parallel.decode", misplaced, unknown)
    groups = groups_of(mesh, dim, timeout)
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "dropout_p": 0.0, "seed": None,
        "skip_negligible": None, "return_lse": return_lse, "backend": current_backend() if backend is None else backend,
    }  # fmt: skip
    others = {
        "schedule": None, "shards": None, "shards_k": shards_k, "machine": Machine(),
        "debug": check_flag("debug", debug),
    }  # fmt: skip
    arguments, lengths = agreed(groups, (q, k, v), options, others, "decode")
    rows = [of_rank[0] for of_rank in lengths]
    if len(set(rows)) > 1:
        raise ValueError(f"q has {rows} rows on the ranks; decode takes the same q on all")
    shards_k, rank = check_shards(shards_k, "shards_k", [of_rank[1] for of_rank in lengths]), place_of(groups)
    call, learned = whole_of(groups, arguments, Shards.of_lengths([q.shape[2]]), shards_k, 0)
    terms = call.terms._replace(**{name: x for name, x in learned.items() if name != "sinks"})
    call = call._replace(problem=call.problem._replace(needs_grad=False), terms=terms)
    found = _local(call, shards_k, rank, (q, k, v))
    for peers in reversed(groups):
        found = _over_tree(peers, found)
    if "sinks" in learned:
        found = merge.with_sinks(found, learned["sinks"])
    out, lse = found.out.to(q.dtype), found.lse
    return (out, lse) if return_lse else out


decode = outside_of_graphs(decode, "fastattn.parallel talks with other processes")


def _local(call: blocks.Whole, shards_k: Shards, rank: int, qkv) -> Partial:
    """Over the own keys."""
    q, k, v = qkv
    found, seen = None, call.seen()
    first = sum(len(runs) for runs in shards_k.runs[:rank])
    sizes = [stop - start for start, stop in shards_k.runs[rank]]
    for n, (keys, values) in enumerate(zip(k.split(sizes, 2), v.split(sizes, 2), strict=True) if sizes else ()):
        if seen[first + n]:
            found = merge.added(found, blocks.forward(call, 0, first + n, q, keys, values))
    return merge.empty(q, v.shape[3], compute_dtype(call.problem)) if found is None else found


def _over_tree(peers: Peers, found: Partial) -> Partial:
    """The sum over all ranks, with equal bits on each: the larger power of two of ranks exchanges pairwise, after the
    others have given theirs to one of them each, and before they get the sum."""
    size, rank = peers.size, peers.rank
    most = 1 << (size.bit_length() - 1)
    if rank >= most:
        peers.post([(rank - most, _message(found))], [], "decode").wait()
    elif rank + most < size:
        found = merge.added(found, _received(peers, rank + most, found))
    distance = 1
    while rank < most and distance < most:
        peer = rank ^ distance
        theirs = torch.empty_like(mine := _message(found))
        peers.post([(peer, mine)], [(peer, theirs)], "decode").wait()
        pair = (found, _partial(theirs, found))
        lower, upper = pair if rank < peer else pair[::-1]
        found, distance = merge.added(lower, upper), 2 * distance
    if rank + most < size:
        peers.post([(rank + most, _message(found))], [], "decode").wait()
    return _received(peers, rank - most, found) if rank >= most else found


def _received(peers: Peers, peer: int, like: Partial) -> Partial:
    room = torch.empty_like(_message(like))
    peers.post([], [(peer, room)], "decode").wait()
    return _partial(room, like)


def _message(found: Partial) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in found])


def _partial(flat: torch.Tensor, like: Partial) -> Partial:
    sizes = [x.numel() for x in like]
    return Partial(*(x.view(y.shape) for x, y in zip(flat.split(sizes), like, strict=True)))
