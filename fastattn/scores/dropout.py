"""Dropout bits from a counter-based generator, so that every kernel sees the same mask without storing it.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the 64-bit seed, with
the counter (key // 4, query, head, batch): one evaluation serves four neighbouring keys.
"""

from typing import NamedTuple

import torch

from ..checks import check_real, one_line
from . import Term, is_given

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
ROUNDS = 10


def philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words (as int64 tensors) for each 4-word counter; the words of `counter` broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_mask(
    batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, seed: int, device="cpu"
) -> torch.Tensor:
    """The keep mask (bool, True = kept) [batch, num_heads, seqlen_q, seqlen_k] of a call with this seed. O(n^2) memory.

    A weight is kept when its 32-bit word is at least dropout_p * 2^32.
    """

    sizes = batch, num_heads, seqlen_q, seqlen_k
    return dropout_mask_at([(0, size) for size in sizes], dropout_p, seed, device)


def dropout_mask_at(ranges, dropout_p: float, seed: int, device="cpu", start=None) -> torch.Tensor:
    """The part of `dropout_mask` in these (start, end) of batch, num_heads, seqlen_q and seqlen_k, which count from
    `start`, a DropoutStart."""
    if start is not None:
        ranges = [(first + place, end + place) for (first, end), place in zip(ranges, (0, *start), strict=True)]

    def index(start, end, dim):
        positions = torch.arange(start, end, dtype=torch.int64, device=device)
        return positions.view([-1 if d == dim else 1 for d in range(4)])

    batch, heads, queries, (first, end) = ranges
    quads = first // 4, (end + 3) // 4
    counter = torch.broadcast_tensors(index(*quads, 3), index(*queries, 2), index(*heads, 1), index(*batch, 0))
    words = torch.stack(philox(counter, seed), dim=-1).flatten(-2)[..., first - 4 * quads[0] : end - 4 * quads[0]]
    return words >= int(dropout_p * 2**32)


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = a * b  # wraps as an unsigned 64-bit product would: the bits are the same
    return (product >> 32) & _MASK32, product & _MASK32


class DropoutStart(NamedTuple):
    """Where query 0 of head 0, and key 0, of a call stand in the whole by whose places the bits are drawn."""

    head: int
    query: int
    key: int


def _check_p(value) -> float:
    number = check_real("dropout_p", value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"dropout_p={value!r} must be in [0, 1)")
    return number


def check_seed(value) -> int | None:
    """`value` itself; ValueError unless it is None or an int in 0 ... 2^63 - 1."""
    if value is not None and not (isinstance(value, int) and 0 <= value < 2**63):
        raise ValueError(f"seed={one_line(value)} must be an int in 0 ... 2^63 - 1, or None")
    return value


P = Term("dropout_p", 0.0, check=_check_p, fact=("dropout", lambda value: value > 0.0, False))
SEED = Term("seed", check=check_seed)
START = Term("dropout_start", fact=("dropout_start", is_given, False))
