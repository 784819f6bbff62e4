"""`shard` and `unshard`: whole tensors, positions, labels and masks to a rank's rows and back."""

import torch

from ..checks import one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from .block_masks import local_rows
from .peers import Peers, gathered
from .running import groups_of, place_of
from .shards import Shards, check_shards


def shard(x, *, mesh, dim="cp", seq_dim: int = 2, shards: str | Shards = "contiguous"):
    """The rows of this rank of x, which every rank holds whole.

    x        a tensor whose dimension `seq_dim` is the sequence (2 for q, k, v and bool masks, 1 for tokens, labels and
             positions [batch, seqlen]), or a `Mask` or `BlockMask` of the whole sequence, for `mask` of `attention`
    shards   "contiguous", "zigzag", or `Shards`; those that `attention` is told

    Next-token labels are shifted before they are cut: the label of a shard's last row stands in another shard. No
    communication. Raises TypeError or ValueError.
    """
    groups = groups_of(mesh, dim, None)
    ranks, rank = _count(groups), place_of(groups)
    if isinstance(x, BlockMask):
        return local_rows(x, _made(shards, x.seq_lengths[0], ranks), rank)
    if isinstance(x, Mask):
        return _of_mask(x, shards, ranks, rank)
    return _made(shards, x.shape[seq_dim], ranks).take(x, rank, seq_dim)


def unshard(x: torch.Tensor, *, mesh, dim="cp", seq_dim: int = 2, shards: str | Shards = "contiguous") -> torch.Tensor:
    """The whole tensor of the rows of all ranks, on every rank; no gradient. Raises ValueError, `ParallelError`."""
    groups, x = groups_of(mesh, dim, None), x.detach().movedim(seq_dim, 0).contiguous()
    lengths = [torch.tensor([len(x)], device=x.device)]
    for peers in reversed(groups):
        lengths = [y for rows in gathered(peers, torch.cat(lengths), "lengths") for y in rows.split(1)]
    lengths = [int(y) for y in lengths]
    found = check_shards(shards, "shards", lengths)
    pieces, first = [x], place_of(groups)
    for peers in reversed(groups):
        pieces, first = _all_of(peers, pieces, lengths, first), first - peers.rank * len(pieces)
    return found.joined([y.movedim(0, seq_dim) for y in pieces], seq_dim)


def _all_of(peers: Peers, pieces: list[torch.Tensor], lengths: list[int], first: int) -> list[torch.Tensor]:
    """The pieces of all ranks of a group; `pieces` are the own ones, of shards first, first + 1, ..."""
    count, start = len(pieces), first - peers.rank * len(pieces)
    found = [
        pieces if rank == peers.rank
        else [pieces[0].new_empty(lengths[start + rank * count + i], *pieces[0].shape[1:]) for i in range(count)]
        for rank in range(peers.size)
    ]  # fmt: skip
    others = [rank for rank in range(peers.size) if rank != peers.rank]
    sends = [(rank, x) for rank in others for x in pieces]
    peers.post(sends, [(rank, x) for rank in others for x in found[rank]], "rows of all ranks").wait()
    return [x for of_rank in found for x in of_rank]


def _made(shards, seqlen: int, ranks: int) -> Shards:
    if isinstance(shards, str):
        make = Shards.zigzag if shards == "zigzag" else Shards.contiguous
        return check_shards(shards, "shards", make(seqlen, ranks).lengths)
    found = check_shards(shards, "shards", shards.lengths)
    if found.ranks != ranks:
        raise ValueError(f"shards={one_line(found)} are of {found.ranks} ranks; there are {ranks}")
    return found


def _of_mask(mask: Mask, shards, ranks: int, rank: int) -> Mask:
    def rows(x):
        return x if x is None or x.shape[2] == 1 else _made(shards, x.shape[2], ranks).take(x, rank, 2)

    return Mask(mask.windows, rows(mask.k_start), rows(mask.k_end))


def _count(groups: tuple[Peers, ...]) -> int:
    count = 1
    for peers in groups:
        count *= peers.size
    return count
