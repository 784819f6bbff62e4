"""Which keys and values move when: the slots of a schedule, as every rank derives them by itself.

Keys travel by run (`Shards`), whose number counts over all ranks. `needs[rank]` are the runs of which the rank's
queries see a key. A run goes once to every other rank that needs it, and its gradient once from each of those: no
schedule can send less.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Moves = tuple[tuple[int, int], ...]
"""Pairs (peer, run), in the order in which both sides post them."""


class Slot(NamedTuple):
    """One step of a rank. What comes for a slot is sent while the slot before it is computed.

    receive    keys and values that must be here when the slot starts; send: the same, for others
    compute    runs to compute with
    grads_in   gradients of runs, with what earlier ranks have added, which must be here when the slot ends
    grads_out  the gradients of runs that the slot before has computed with
    """

    receive: Moves = ()
    send: Moves = ()
    compute: tuple[int, ...] = ()
    grads_in: Moves = ()
    grads_out: Moves = ()


Needs = tuple[frozenset[int], ...]


@lru_cache(maxsize=256)
def ring(needs: Needs, owners: tuple[int, ...], rank: int) -> tuple[Slot, ...]:
    """In slot t the runs of rank - t: from the rank before, if it has computed with them in slot t - 1, else from their
    owner. Gradients go along, and home from the last of each chain of ranks that need a run (Ring Attention, arXiv
    2310.01889, without what no rank needs)."""
    ranks, owned = len(needs), _owned(needs, owners)
    before, after = (rank - 1) % ranks, (rank + 1) % ranks

    def sender(receiver: int, run: int) -> int:
        previous = (receiver - 1) % ranks
        return previous if run in needs[previous] else owners[run]

    def heir(holder: int, run: int) -> int:
        following = (holder + 1) % ranks
        return following if run in needs[following] else owners[run]

    slots = []
    for t in range(ranks + 1):
        visiting = [run for run in owned[(rank - t) % ranks] if run in needs[rank]]
        receive, send, grads_in, grads_out = [], [], [], []
        if 1 <= t < ranks:
            receive = [(sender(rank, run), run) for run in visiting]
            for receiver in dict.fromkeys((after, (rank + t) % ranks)):
                runs = [run for run in owned[(receiver - t) % ranks] if run in needs[receiver]]
                send += [(receiver, run) for run in runs if sender(receiver, run) == rank]
        if t >= 2:
            held = [run for run in owned[(rank - t + 1) % ranks] if run in needs[rank]]
            grads_out = [(heir(rank, run), run) for run in held]
            if t < ranks:
                grads_in = [(before, run) for run in visiting if run in needs[before]]
            last = (rank + t - 1) % ranks  # of a chain that ends here
            grads_in += [(last, run) for run in owned[rank] if run in needs[last] and heir(last, run) == rank]
        compute = tuple(visiting) if t < ranks else ()
        slots.append(Slot(tuple(receive), tuple(send), compute, tuple(grads_in), tuple(grads_out)))
    return tuple(slots)


@lru_cache(maxsize=256)
def all_gather(needs: Needs, owners: tuple[int, ...], rank: int) -> tuple[Slot, ...]:
    """A rank's own runs first, while all others that it needs come from their owners; gradients go home at the end."""
    own = tuple(run for run in sorted(needs[rank]) if owners[run] == rank)
    others = tuple((owners[run], run) for run in sorted(needs[rank]) if owners[run] != rank)
    wanted = [(peer, run) for peer in range(len(needs)) if peer != rank for run in sorted(needs[peer])]
    sent = tuple((peer, run) for peer, run in wanted if owners[run] == rank)
    return Slot(compute=own), Slot(others, sent, tuple(run for _, run in others)), Slot(grads_in=sent, grads_out=others)


PLANS = {"ring": ring, "all_gather": all_gather}


def transfers(needs: Needs, owners: Sequence[int]) -> list[int]:
    """To how many other ranks each run goes: the least that any schedule sends."""
    counts = [-int(run in needs[owner]) for run, owner in enumerate(owners)]
    for needed in needs:
        for run in needed:
            counts[run] += 1
    return counts


def _owned(needs: Needs, owners: tuple[int, ...]) -> list[list[int]]:
    owned: list[list[int]] = [[] for _ in needs]
    for run, owner in enumerate(owners):
        owned[owner].append(run)
    return owned
