"""`Shards`: which rows of a sequence each rank holds, and in which order."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..checks import check_int, check_tensors, one_line

Run = tuple[int, int]
"""Positions start ... stop - 1 of a sequence."""

NAMES = ("contiguous", "zigzag")


class Shards(NamedTuple):
    """The runs of positions that each rank holds, ascending: `runs[rank]` is a tuple of (start, stop).

    Every position lies in exactly one run. A rank's rows are its runs one after the other; a rank may hold none.
    """

    runs: tuple[tuple[Run, ...], ...]

    @classmethod
    def contiguous(cls, seqlen: int, ranks: int, multiple: int = 1) -> "Shards":
        """Equal parts in the order of the ranks, cut at multiples of `multiple` (of a BlockMask's block size)."""
        return cls(tuple(_joined([run]) for run in _parts(seqlen, check_int("ranks", ranks, 1), multiple)))

    @classmethod
    def zigzag(cls, seqlen: int, ranks: int, multiple: int = 1) -> "Shards":
        """2 * ranks equal parts, of which rank r holds r and 2 * ranks - 1 - r: causal attention is as much work for
        every rank then (Llama 3, arXiv 2407.21783; ring-flash-attention)."""
        parts = _parts(seqlen, 2 * check_int("ranks", ranks, 1), multiple)
        return cls(tuple(_joined([parts[r], parts[-1 - r]]) for r in range(ranks)))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> "Shards":
        """One run a rank, in the order of the ranks, of these lengths."""
        ends = [0]
        for rank, length in enumerate(lengths):
            ends.append(ends[-1] + check_int(f"lengths[{rank}]", length))
        return cls(tuple(_joined([run]) for run in zip(ends, ends[1:], strict=False)))

    @classmethod
    def documents(cls, lengths: Sequence[int], ranks: int) -> "Shards":
        """Whole documents, which lie one after the other with these lengths, so that the ranks have about equal work:
        the longest first, each to the rank with the least so far. No document is cut, so nothing has to be sent."""
        ends = [0]
        for document, length in enumerate(lengths):
            ends.append(ends[-1] + check_int(f"lengths[{document}]", length))
        work, held = [0] * check_int("ranks", ranks, 1), [[] for _ in range(ranks)]
        runs = list(zip(ends, ends[1:], strict=False))
        for run in sorted(runs, key=lambda run: (run[0] - run[1], run)):
            rank = work.index(min(work))
            work[rank] += (run[1] - run[0]) ** 2
            held[rank].append(run)
        return cls(tuple(_joined(sorted(runs)) for runs in held))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.runs)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each rank."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def seqlen(self) -> int:
        """Rows of all ranks."""
        return sum(self.lengths)

    def positions(self, rank: int, device=None) -> torch.Tensor:
        """int64 [local_seqlen]: where the rows of a rank stand in the sequence, as rotary embeddings want it."""
        return torch.cat(
            [torch.arange(0, device=device), *[torch.arange(*run, device=device) for run in self.runs[rank]]]
        )

    def take(self, x: torch.Tensor, rank: int, seq_dim: int) -> torch.Tensor:
        """The rows of a rank of a whole tensor x, a copy unless they are one run."""
        check_tensors(x=x)
        if x.shape[seq_dim] != self.seqlen:
            raise ValueError(f"x has shape {tuple(x.shape)}; dimension {seq_dim} must be seqlen={self.seqlen}")
        pieces = [x.narrow(seq_dim, start, stop - start) for start, stop in self.runs[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat([x.narrow(seq_dim, 0, 0), *pieces], seq_dim)

    def joined(self, pieces: Sequence[torch.Tensor], seq_dim: int) -> torch.Tensor:
        """The whole tensor of the rows of all ranks."""
        found = []
        for runs, piece in zip(self.runs, pieces, strict=True):
            parts = piece.split([stop - start for start, stop in runs], seq_dim) if runs else ()
            found += zip(runs, parts, strict=True)
        rows = [part for _, part in sorted(found, key=lambda pair: pair[0])]
        return torch.cat([pieces[0].narrow(seq_dim, 0, 0), *rows], seq_dim)

    def grouped(self, size: int) -> "Shards":
        """The shards of groups of `size` neighbouring ranks, each with the rows of all its ranks, ascending."""
        groups = [self.runs[i : i + size] for i in range(0, self.ranks, size)]
        return Shards(tuple(_joined(sorted(run for runs in group for run in runs)) for group in groups))


def check_shards(shards, name: str, lengths: Sequence[int]) -> Shards:
    """The Shards that `shards`, a name or Shards, is for ranks with these lengths; TypeError or ValueError."""
    if isinstance(shards, str):
        if shards not in NAMES:
            raise ValueError(f"{name}={shards!r} must be one of {', '.join(NAMES)}, or Shards")
        if shards == "contiguous":
            return Shards.of_lengths(lengths)
        found = Shards.zigzag(sum(lengths), len(lengths))
    elif isinstance(shards, Shards):
        found = shards
        check_runs(found, name)
    else:
        raise TypeError(f"{name}={one_line(shards)} must be one of {', '.join(NAMES)}, or Shards")
    if found.lengths != tuple(lengths):
        raise ValueError(
            f"{name}={one_line(shards)}: the ranks would hold {one_line(found.lengths)} rows, but they hold "
            f"{one_line(tuple(lengths))}; cut tensors with fastattn.parallel.shard, or pass Shards"
        )
    return found


def check_runs(shards: Shards, name: str) -> None:
    """ValueError unless every position lies in exactly one run, and those of a rank ascend."""
    for rank, runs in enumerate(shards.runs):
        if any(start >= stop for start, stop in runs) or any(a[1] > b[0] for a, b in zip(runs, runs[1:], strict=False)):
            raise ValueError(f"{name}.runs[{rank}]={one_line(runs)} must be ascending (start, stop), start < stop")
    end = 0
    for start, stop in sorted(run for runs in shards.runs for run in runs):
        if start != end:
            raise ValueError(f"{name}: position {min(start, end)} lies in {'no run' if start > end else 'two runs'}")
        end = stop


def _parts(seqlen: int, count: int, multiple: int) -> list[Run]:
    check_int("seqlen", seqlen)
    check_int("multiple", multiple, 1)
    units = -(-seqlen // multiple)
    ends = [min(i * units // count * multiple, seqlen) for i in range(count + 1)]
    return list(zip(ends, ends[1:], strict=False))


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Ascending runs without empty ones, neighbours as one."""
    found: list[Run] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)
