"""Before a call: do all ranks make the same one? A few numbers from each to each, always; everything, for `debug`."""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..checks import one_line
from .peers import ParallelError, Peers, gathered

_VALUES, _TEXT = 32, 24
"""Numbers of a message, and words of 8 bytes for an error that a rank tells the others."""
_KINDS, _ERROR = 3, 4
"""Places in a message, behind what is a rank's own."""


class Call(NamedTuple):
    """What a rank says of its call.

    equal    name -> value that must be the same on every rank: an int, or anything with a repr that says it all
    own      what may differ: rows of q, rows of k, and the seed that it would drop by, of which the first rank's counts
    error    what its arguments have raised already, or None
    """

    equal: dict
    own: tuple[int, int, int] = (0, 0, 0)
    error: Exception | None = None


def agree(groups: tuple[Peers, ...], call: Call, device: torch.device) -> list[tuple[int, int, int]]:
    """What is each rank's own, if all make the same call. groups: from outer to inner, as ranks are counted.

    Otherwise every rank raises: the one whose arguments are wrong its own error, the others ParallelError.
    """
    rows = _message(call)[None].to(device)
    for peers in reversed(groups):
        if peers.size > 1:
            rows = torch.cat(gathered(peers, rows, "comparing arguments"))
    messages = rows.tolist()
    if call.error is not None:
        raise call.error
    names = [_name(groups, place) for place in range(len(messages))]
    own, (kinds, values) = _name(groups, _place(groups)), _numbers(call.equal)
    for name, message in zip(names, messages, strict=True):
        if message[_ERROR]:
            raise ParallelError(f"rank {name} was called with wrong arguments: {_text(message[-_TEXT:])}")
        if message[_KINDS] != kinds:
            raise ParallelError(f"rank {name} runs another function, or another version of fastattn, than rank {own}")
        for (key, value), ours, theirs in zip(call.equal.items(), values, message[_ERROR + 1 :], strict=False):
            if ours != theirs:
                other = f"{key}={theirs}" if isinstance(value, int) else f"another {key}"
                raise ParallelError(
                    f"rank {name} passes {other}, rank {own} {key}={one_line(value)}; all ranks must agree"
                )
    return [tuple(message[:_KINDS]) for message in messages]


def compare_everything(groups: tuple[Peers, ...], described: dict) -> None:
    """ParallelError if a rank describes its call otherwise: name -> text. For `debug`: it pickles and waits."""
    for peers in groups:
        if peers.size > 1:
            found: list = [None] * peers.size
            dist.all_gather_object(found, described, peers.group)
            for rank, theirs in enumerate(found):
                for key in described.keys() | theirs.keys():
                    if described.get(key) != theirs.get(key):
                        raise ParallelError(
                            f"rank {peers.names[rank]} passes {key}={theirs.get(key)}, rank {peers.names[peers.rank]} "
                            f"{key}={described.get(key)}; all ranks must agree"
                        )


def hash_of(value) -> int:
    """63 bits that differ if the reprs do, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 1


def _numbers(equal: dict) -> tuple[int, list[int]]:
    return hash_of(tuple(equal)), [int(x) if isinstance(x, int) else hash_of(x) for x in equal.values()]


def _message(call: Call) -> torch.Tensor:
    kinds, values = _numbers(call.equal)
    error = "" if call.error is None else f"{type(call.error).__name__}: {call.error}"
    text = error.encode()[: 8 * _TEXT].ljust(8 * _TEXT, b" ")
    words = [int.from_bytes(text[i : i + 8], "little", signed=True) for i in range(0, 8 * _TEXT, 8)]
    padding = [0] * (_VALUES - len(values))
    return torch.tensor([*call.own, kinds, len(error), *values, *padding, *words])


def _text(words: list[int]) -> str:
    return b"".join(word.to_bytes(8, "little", signed=True) for word in words).decode(errors="replace").rstrip()


def _place(groups: tuple[Peers, ...]) -> int:
    place = 0
    for peers in groups:
        place = place * peers.size + peers.rank
    return place


def _name(groups: tuple[Peers, ...], place: int) -> str:
    """A rank for an error: of one group by its number in the job, of two by both coordinates."""
    if len(groups) == 1:
        return str(groups[0].names[place])
    return str(divmod(place, groups[-1].size))
