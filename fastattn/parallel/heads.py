"""All-to-all over heads: rows of all heads become all rows of some heads, and back (DeepSpeed-Ulysses, 2309.14509)."""

from collections.abc import Sequence

import torch

from .peers import Peers
from .shards import Shards


class Exchange(torch.autograd.Function):
    """apply(peers, shards, to_heads, *tensors): with to_heads, local rows [batch, heads, rows, ...] of all heads become
    the rows of all ranks, by their positions, of heads rank * heads / size ...; without, the other way round.

    shards: of these ranks alone, for each tensor. The tensors have one dtype and go in one message to each rank. The
    gradient is the way back.
    """

    @staticmethod
    def forward(ctx, peers, shards, to_heads, *tensors):
        ctx.way = peers, shards, not to_heads
        return tuple(_exchange(peers, shards, to_heads, tensors))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *Exchange.apply(*ctx.way, *grads)


def _exchange(peers: Peers, shards: Sequence[Shards], to_heads: bool, tensors) -> list[torch.Tensor]:
    if to_heads:
        parts = [x.chunk(peers.size, 1) for x in tensors]
        shapes = [
            [_with_rows(part[0], of_tensor.lengths[rank]) for part, of_tensor in zip(parts, shards, strict=True)]
            for rank in range(peers.size)
        ]
    else:
        parts = [[y.take(x, rank, 2) for rank in range(peers.size)] for x, y in zip(tensors, shards, strict=True)]
        shapes = [[part[peers.rank].shape for part in parts]] * peers.size
    outgoing = [torch.cat([part[rank].reshape(-1) for part in parts]) for rank in range(peers.size)]
    incoming = [outgoing[0].new_empty(sum(shape.numel() for shape in of_rank)) for of_rank in shapes]
    incoming[peers.rank] = outgoing[peers.rank]
    others = [rank for rank in range(peers.size) if rank != peers.rank]
    sends, receives = ([(rank, x[rank]) for rank in others] for x in (outgoing, incoming))
    peers.post(sends, receives, "heads of all rows" if to_heads else "rows of all heads").wait()
    pieces = [
        [x.view(shape) for x, shape in zip(flat.split([shape.numel() for shape in of_rank]), of_rank, strict=True)]
        for flat, of_rank in zip(incoming, shapes, strict=True)
    ]
    by_tensor = list(zip(*pieces, strict=True))
    return [y.joined(x, 2) if to_heads else torch.cat(x, 1) for x, y in zip(by_tensor, shards, strict=True)]


def _with_rows(x: torch.Tensor, rows: int) -> torch.Size:
    return torch.Size((*x.shape[:2], rows, *x.shape[3:]))


def of_group(shards: Shards, first: int, size: int) -> Shards:
    """The shards of some neighbouring ranks, as if theirs were all rows."""
    held = shards.runs[first : first + size]
    runs = sorted(run for of_rank in held for run in of_rank)
    starts, end = {}, 0
    for start, stop in runs:
        starts[start], end = end, end + stop - start
    return Shards(tuple(tuple((starts[a], starts[a] + b - a) for a, b in of_rank) for of_rank in held))


def refusal(num_heads: int, num_heads_k: int, ranks: int, has_rows: Sequence[str]) -> str | None:
    """Why heads cannot be exchanged among `ranks`, None if they can. has_rows: terms with a number for each pair."""
    if num_heads_k % ranks or num_heads % ranks:
        return f"num_heads={num_heads} and num_heads_k={num_heads_k} must be multiples of {ranks} ranks"
    if has_rows:
        return f"{', '.join(has_rows)}: a rank would get the rows of all others"
    return None
