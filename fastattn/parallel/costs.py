"""What a schedule costs, rank by rank, from shapes alone: what `explain` prints and what a schedule is chosen by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .pairs import count_pairs
from .plan import Needs
from .shards import Shards

SCHEDULES = ("ring", "all_gather", "all_to_all", "ring+all_to_all")


class Machine(NamedTuple):
    """Assumptions of the cost model, not measurements: pass your own.

    flops    floating-point operations a second of a rank
    bytes    a second that a rank sends, while it receives as many
    latency  seconds from a message to its arrival
    call     seconds of a block, a run of queries over a run of keys, beside its pairs
    """

    flops: float = 1e11
    bytes: float = 1e10
    latency: float = 2e-5
    call: float = 2e-5


class Sizes(NamedTuple):
    """A call over all ranks. element: bytes of q, k, v; sum_element: bytes of the sums that gradients travel as."""

    batch: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    element: int
    sum_element: int

    @property
    def key_row(self) -> int:
        """Bytes of k and v of one position."""
        return self.batch * self.num_heads_k * (self.head_dim + self.head_dim_v) * self.element

    @property
    def grad_row(self) -> int:
        """Bytes of their gradients on the way."""
        return self.key_row // self.element * self.sum_element

    @property
    def query_row(self) -> int:
        """Bytes of q and out of one position."""
        return self.batch * self.num_heads * (self.head_dim + self.head_dim_v) * self.element

    @property
    def pair_flops(self) -> int:
        """Of the forward pass, for one (query, key) pair of all heads."""
        return 2 * self.batch * self.num_heads * (self.head_dim + self.head_dim_v)


class Cost(NamedTuple):
    """Of one schedule. Lists are by rank; bytes are sent.

    steps           rounds in which anything is sent, forward
    forward_bytes   by rank; backward_bytes likewise
    pairs           (query, key) pairs of blocks that are visited, by rank
    memory          bytes a rank holds beside its own q, k, v and out, forward, the most of all ranks
    forward_seconds, backward_seconds  by the model
    """

    steps: int
    forward_bytes: list[float]
    backward_bytes: list[float]
    pairs: list[float]
    memory: float
    forward_seconds: float
    backward_seconds: float

    @property
    def imbalance(self) -> float:
        """The most pairs of a rank over their mean: 1.0 is perfect balance."""
        mean = sum(self.pairs) / max(len(self.pairs), 1)
        return max(self.pairs) / mean if mean else 1.0


_BACKWARD = 2.5  # multiply-adds of the backward pass over those of the forward pass


def work(shards_q: Shards, shards_k: Shards, lo: int, hi: int) -> torch.Tensor:
    """Visible pairs of the queries of each rank and the keys of each run, float64 [ranks, runs]."""
    return _of_ranks(shards_q, shards_k, lo, hi)[0]


def _of_ranks(shards_q: Shards, shards_k: Shards, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`work`, and in how many blocks it is."""
    (q_runs, q_owners), (k_runs, _) = listed(shards_q), listed(shards_k)
    pairs, blocks = torch.zeros(2, shards_q.ranks, len(k_runs), dtype=torch.float64)
    if len(q_runs) and len(k_runs):
        of_runs, owners = count_pairs(torch.tensor(q_runs), torch.tensor(k_runs), lo, hi), torch.tensor(q_owners)
        pairs.index_add_(0, owners, of_runs)
        blocks.index_add_(0, owners, (of_runs > 0).double())
    return pairs, blocks


def listed(shards: Shards) -> tuple[list, list[int]]:
    """(all runs, the rank of each): the order that gives runs their numbers."""
    pairs = [(run, rank) for rank, runs in enumerate(shards.runs) for run in runs]
    return [run for run, _ in pairs], [rank for _, rank in pairs]


def needs_of(pairs: torch.Tensor) -> Needs:
    """The runs that each rank sees a key of."""
    return tuple(frozenset(row.nonzero()[:, 0].tolist()) for row in pairs)


def cost(
    schedule: str, sizes: Sizes, shards_q: Shards, shards_k: Shards, bounds: tuple[int, int], inner: int,
    machine: Machine,
) -> Cost:  # fmt: skip
    """The Cost of a schedule on shards_q.ranks ranks, of which groups of `inner` exchange heads."""
    heads = _exchange(sizes, shards_q, shards_k, inner, machine) if "all_to_all" in schedule else None
    if heads:
        shards_q, shards_k = shards_q.grouped(inner), shards_k.grouped(inner)
        sizes = sizes._replace(num_heads=sizes.num_heads / inner, num_heads_k=sizes.num_heads_k / inner)
    plan = "all_gather" if schedule == "all_gather" else "ring"
    found = _steps(plan, sizes, shards_q, shards_k, bounds, machine)
    return found if heads is None else _sum(heads, found, inner)


def _exchange(sizes: Sizes, shards_q: Shards, shards_k: Shards, inner: int, machine: Machine) -> Cost:
    """q, k, v to heads and out back; backward, dout to heads and dq, dk, dv back."""
    forward, backward = [], []
    of_q, of_out = (sizes.batch * sizes.num_heads * dim * sizes.element for dim in (sizes.head_dim, sizes.head_dim_v))
    for first in range(0, shards_q.ranks, inner):
        lengths_q, lengths_k = (shards.lengths[first : first + inner] for shards in (shards_q, shards_k))
        for rows, keys in zip(lengths_q, lengths_k, strict=True):
            other_rows, other_keys = (sum(lengths_q) - rows) / inner, (sum(lengths_k) - keys) / inner
            rows, keys = rows * (inner - 1) / inner, keys * (inner - 1) / inner
            forward.append(rows * of_q + keys * sizes.key_row + other_rows * of_out)
            backward.append(rows * of_out + other_rows * of_q + other_keys * sizes.key_row)
    seconds = [
        max(sent, default=0.0) / machine.bytes + 2 * machine.latency * (inner > 1) for sent in (forward, backward)
    ]
    return Cost(2 * (inner > 1), forward, backward, [], 2 * max(forward, default=0.0), *seconds)


def _steps(
    plan: str, sizes: Sizes, shards_q: Shards, shards_k: Shards, bounds: tuple[int, int], machine: Machine
) -> Cost:
    (pairs, blocks), ranks = _of_ranks(shards_q, shards_k, *bounds), shards_q.ranks
    runs, owners = listed(shards_k)
    lengths, owners = torch.tensor([b - a for a, b in runs]).double(), torch.tensor(owners, dtype=torch.int64)
    needed = pairs > 0
    rank = torch.arange(ranks)
    distance = (rank[:, None] - owners[None, :]) % ranks  # [rank, run]: the slot in which a run is here
    travels = needed & (distance > 0)
    if plan == "ring":
        before = needed[(rank - 1) % ranks]
        sender = torch.where(before, ((rank - 1) % ranks)[:, None], owners[None, :])
    else:
        sender = owners[None, :].expand(ranks, -1)
    rows = travels.double() * lengths
    keys_out = torch.zeros(ranks, dtype=torch.float64).index_add_(0, sender.reshape(-1), rows.reshape(-1))
    grads_out = rows.sum(1)
    slot = distance if plan == "ring" else travels.long()
    slots = ranks if plan == "ring" else 2
    by_slot = torch.zeros(ranks, slots + 1, dtype=torch.float64)
    arriving = by_slot.scatter_add(1, slot, rows)[:, 1:]
    computing = by_slot.scatter_add(1, slot, pairs)[:, :-1] * (sizes.pair_flops / machine.flops)
    calling = by_slot.scatter_add(1, slot, blocks)[:, :-1] * machine.call
    forward = _seconds(computing + calling, arriving * sizes.key_row, machine)
    both = arriving * (sizes.key_row + sizes.grad_row)
    backward = _seconds(computing * _BACKWARD + calling, both, machine)
    sent = (travels.any(0).double() * lengths)[None] * (owners[None, :] == rank[:, None])  # packed, for others
    held = arriving[:, :-1] + arriving[:, 1:] if plan == "ring" and ranks > 1 else arriving
    held = held.amax(1) + sent.sum(1)
    return Cost(
        int((arriving > 0).any(0).sum()), (keys_out * sizes.key_row).tolist(),
        (keys_out * sizes.key_row + grads_out * sizes.grad_row).tolist(), pairs.sum(1).tolist(),
        float(held.amax()) * sizes.key_row, forward, backward,
    )  # fmt: skip


def _seconds(computing: torch.Tensor, arriving: torch.Tensor, machine: Machine) -> float:
    """Of all slots, each as long as the slowest rank's computing or what it receives meanwhile, [ranks, slots]; and of
    the message before a call in which arguments are compared."""
    transfer = arriving / machine.bytes + machine.latency * (arriving > 0)
    return float(torch.maximum(computing, transfer).amax(0).sum()) + machine.latency * (len(computing) > 1)


def _sum(heads: Cost, rest: Cost, inner: int) -> Cost:
    def spread(values: Sequence[float]) -> list[float]:
        return [value for value in values for _ in range(inner)]

    forward, backward = (
        [a + b for a, b in zip(x, spread(y), strict=True)]
        for x, y in ((heads.forward_bytes, rest.forward_bytes), (heads.backward_bytes, rest.backward_bytes))
    )
    return Cost(
        heads.steps + rest.steps, forward, backward, spread(rest.pairs), heads.memory + rest.memory,
        heads.forward_seconds + rest.forward_seconds, heads.backward_seconds + rest.backward_seconds,
    )  # fmt: skip
