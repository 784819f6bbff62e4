"""`Peers`: the ranks of a process group, what is sent to them, and what is said when one of them is gone."""

import pickle
import re
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ..checks import check_real
from ..torch_internals import store_of


class ParallelError(RuntimeError):
    """Another rank has died, is too slow, or was called with other arguments; which one, and what is known of it."""


class Traffic:
    """What this process has sent to others: bytes of keys, values, queries and gradients; messages of any kind."""

    def __init__(self):
        self.bytes = self.messages = 0


traffic = Traffic()
_STORE_SECONDS = 2.0


def sent_bytes() -> int:
    """Bytes of tensors that the calls of this process have sent to other ranks (not what they compare beforehand)."""
    return traffic.bytes


class Peers:
    """The ranks of `group` (None: this process alone); `rank` is the own one among `size`.

    names  of the ranks, for errors: their numbers in the whole job
    """

    def __init__(self, group, timeout: float | None = None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.names = [0] if group is None else dist.get_process_group_ranks(group)
        self.timeout = None if timeout is None else timedelta(seconds=check_real("timeout", timeout))

    def post(self, sends: Sequence, receives: Sequence, doing: str, counted: bool = True) -> "Pending":
        """Start to send and receive pairs (peer, contiguous tensor). Both sides list a pair's tensors in one order."""
        # Receives first: gloo tells the sender that there is room, and this must not queue behind what is sent.
        moves = [(dist.irecv, peer, x) for peer, x in receives if x.numel()]
        moves += [(dist.isend, peer, x) for peer, x in sends if x.numel()]
        if counted:
            traffic.bytes += sum(x.nbytes for _, x in sends)
            traffic.messages += sum(x.numel() > 0 for _, x in sends)
        if not moves:
            return Pending(self, [], [], doing)
        peers = [peer for _, peer, _ in moves]
        try:
            operations = [dist.P2POp(op, x, self.names[peer], self.group) for op, peer, x in moves]
            works = dist.batch_isend_irecv(operations)
        except Exception as error:
            raise self.failure(peers, doing, error) from error
        return Pending(self, works, peers, doing)

    def failure(self, peers: Sequence[int], doing: str, error: Exception) -> ParallelError:
        """The error of an operation with `peers` that failed, with what the first rank that failed has said."""
        them = ", ".join(str(self.names[peer]) for peer in sorted(set(peers)))
        own = f"rank {self.names[self.rank]} waited for rank {them} ({doing}): {_first_line(error)}"
        first = _first_fault(self.group, own)
        said = "" if first in (None, own) else f"; the first rank of this group that failed said: {first}"
        return ParallelError(f"{own}{said} (the process group cannot be used any more: make another one)")

    def note(self, error: BaseException) -> None:
        """Leave word for the others why this rank stops in the middle of a call. They find it when they have waited."""
        if self.size > 1 and not isinstance(error, ParallelError):
            _first_fault(
                self.group, f"rank {self.names[self.rank]} raised {type(error).__name__}: {_first_line(error)}"
            )


class Pending:
    """Transfers that were started. Tensors must stay as they are until `wait` returns."""

    def __init__(self, peers: Peers, works: list, ranks: list[int], doing: str):
        self.peers, self.works, self.ranks, self.doing = peers, works, ranks, doing

    def wait(self) -> None:
        """Until all are done; ParallelError if a peer is gone, or after the timeout."""
        each = len(self.works) == len(self.ranks)  # NCCL has one work for all
        for i, work in enumerate(self.works):
            try:
                done = work.wait() if self.peers.timeout is None else work.wait(self.peers.timeout)
            except Exception as error:
                ranks = self.ranks[i : i + 1] if each else self.ranks
                raise self.peers.failure(ranks, self.doing, error) from error
            if done is False:
                raise self.peers.failure(self.ranks[i : i + 1], self.doing, TimeoutError("the transfer was aborted"))


def gathered(peers: Peers, mine: torch.Tensor, doing: str) -> list[torch.Tensor]:
    """`mine` of every rank, of equal shapes and dtypes. Each to each, so that an error can name who is missing."""
    found = [mine if rank == peers.rank else torch.empty_like(mine) for rank in range(peers.size)]
    others = [rank for rank in range(peers.size) if rank != peers.rank]
    peers.post([(rank, mine) for rank in others], [(rank, found[rank]) for rank in others], doing, False).wait()
    return found


def gathered_objects(peers: Peers, mine, doing: str) -> list:
    """`mine` of every rank, pickled: what is no tensor, or tensors of other sizes on each."""
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    sizes = [int(x) for x in gathered(peers, torch.tensor([len(data)]), doing)]
    found = [data if rank == peers.rank else data.new_empty(size) for rank, size in enumerate(sizes)]
    others = [rank for rank in range(peers.size) if rank != peers.rank]
    peers.post([(rank, data) for rank in others], [(rank, found[rank]) for rank in others], doing).wait()
    return [mine if rank == peers.rank else pickle.loads(x.numpy().tobytes()) for rank, x in enumerate(found)]


def _first_line(error: BaseException) -> str:
    """What an error says, without gloo's places in its sources and its advice."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S*\.cc:\d+\] ", "", text).split(" This is typically caused")[0].rstrip(".")[:300]


def _first_fault(group, text: str) -> str | None:
    """What the first rank of the group said whose call failed, `text` if that is this one; kept in the group's store.

    In a thread, for a while: the store may have died with its process.
    """
    found: list[str] = []

    def ask():
        try:
            found.append(store_of(group).compare_set("fastattn/first_fault", "", text).decode())
        except Exception:
            return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_STORE_SECONDS)
    return found[0] if found else None
