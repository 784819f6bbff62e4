"""Biases of the distance between query and key alone: one number a head for each of seqlen_q + seqlen_k - 1 distances.

All count positions as `causal` does: query i stands at i + seqlen_k - seqlen_q, so the last query at the last key.
"""

import math

import torch

from ..checks import check_flag, check_int
from ..scores.relative import RelativeBias
from .arguments import check_heads, check_table, compute_dtype


class Distances(RelativeBias):
    """A vector over all distances, for each head."""

    def terms(self, q, k):
        # The kernels want entry i - j + seqlen_k - 1: distances from seqlen_q - 1 down to 1 - seqlen_k.
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        distance = seqlen_q - 1 - torch.arange(max(seqlen_q + seqlen_k - 1, 0), device=q.device)
        vector = self.of_distances(distance, q, seqlen_k).to(compute_dtype(q))
        vector = vector[0] if vector.dim() == 3 and vector.shape[0] == 1 else vector
        return {"relative": vector if vector.stride(-1) == 1 else vector.contiguous()}

    def of_distances(self, distance: torch.Tensor, q: torch.Tensor, seqlen_k: int) -> torch.Tensor:
        """[num_heads|1, distances] or [batch, num_heads|1, distances]; distance: int64, key - query, falling."""
        raise NotImplementedError


class Toeplitz(Distances):
    name = "toeplitz"

    def __init__(self, vector: torch.Tensor, center: int | None):
        self.vector, self.center = vector, center

    def of_distances(self, distance, q, seqlen_k):
        vector, size = self.vector, self.vector.shape[-1]
        vector = vector[None] if vector.dim() == 1 else vector
        check_heads("toeplitz", "vector", vector.shape[-2], q)
        if vector.dim() == 3 and vector.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"toeplitz: vector has batch {vector.shape[0]}; q has batch={q.shape[0]} (1 is shared)")
        if self.center is None:
            if size != len(distance):
                raise ValueError(
                    f"toeplitz: vector has {size} entries; seqlen_q={q.shape[2]} and seqlen_k={seqlen_k} have "
                    f"{len(distance)} distances (center= takes a longer vector)"
                )
            return vector.flip(-1)
        first, end = self.center + 1 - seqlen_k, self.center + q.shape[2]
        if len(distance) and not (first >= 0 and end <= size):
            raise ValueError(
                f"toeplitz: vector has {size} entries, center={self.center}; seqlen_q={q.shape[2]} and "
                f"seqlen_k={seqlen_k} need entries {first} ... {end - 1}"
            )
        return vector[..., max(first, 0) : max(first, 0) + len(distance)].flip(-1)


def toeplitz(vector: torch.Tensor, center: int | None = None) -> RelativeBias:
    """A bias for each distance of key and query, scores[i, j] += vector[..., j - (i + seqlen_k - seqlen_q) + center].

    vector   float [num_heads|1, distances], [distances], or [batch|1, num_heads|1, distances]; may be learned. An
             entry of -inf masks
    center   the entry of distance 0, where key and query stand at one position: a vector of more distances than
             a call has is cut. None: vector has exactly seqlen_q + seqlen_k - 1 entries, and seqlen_k - 1 is the center

    O(seqlen) memory. Raises TypeError or ValueError that names the argument; lengths are checked in the call.
    """
    check_table("toeplitz", "vector", vector, "[distances]", "[num_heads, distances]", "[batch, num_heads, distances]")
    return Toeplitz(vector, center if center is None else check_int("toeplitz: center", center))


class T5(Distances):
    name = "t5"

    def __init__(self, table: torch.Tensor, bidirectional: bool, max_distance: int):
        self.table, self.bidirectional, self.max_distance = table, bidirectional, max_distance

    def of_distances(self, distance, q, seqlen_k):
        check_heads("t5", "table", self.table.shape[1], q)
        return self.table.t()[:, self.buckets(distance)]

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """The row of the table for each distance; in float32, as the models do."""
        size = len(self.table)
        if self.bidirectional:
            size //= 2
            first, distance = (distance > 0) * size, distance.abs()
        else:
            first, distance = 0, (-distance).clamp(min=0)
        exact = size // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (size - exact)).long()).clamp(max=size - 1)
        return first + torch.where(distance < exact, distance, far)


def t5(table: torch.Tensor, bidirectional: bool = True, max_distance: int = 128) -> RelativeBias:
    """T5's bias: the distance falls into a bucket, and each bucket has a learned number a head (arXiv 1910.10683).

    table          float [num_buckets, num_heads], T5's `relative_attention_bias.weight`
    bidirectional  half of the buckets are for keys behind the query (encoders); False: these have bucket 0 (decoders)
    max_distance   from here on, all distances share the last bucket; buckets below half are exact, the others grow
                   with the logarithm

    T5 has no factor of its scores: pass softmax_scale=1.0. O(seqlen) memory. Raises TypeError or ValueError that names
    the argument.
    """
    check_table("t5", "table", table, "[num_buckets, num_heads]")
    bidirectional = check_flag("t5: bidirectional", bidirectional)
    exact = len(table) // (4 if bidirectional else 2)
    if exact == 0:
        raise ValueError(f"t5: table has {len(table)} buckets; it must have at least {4 if bidirectional else 2}")
    if check_int("t5: max_distance", max_distance, 1) <= exact:
        raise ValueError(f"t5: max_distance={max_distance} must be above {exact}, the number of exact buckets")
    return T5(table, bidirectional, max_distance)


class Alibi(Distances):
    name = "alibi"

    def __init__(self, slopes: torch.Tensor):
        self.slopes = slopes

    def of_distances(self, distance, q, seqlen_k):
        check_heads("alibi", "slopes", self.slopes.shape[-1], q)
        if self.slopes.dim() == 2 and self.slopes.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"alibi: slopes has batch {self.slopes.shape[0]}; q has batch={q.shape[0]} (1 is shared)")
        slopes = self.slopes.to(compute_dtype(q))
        return -slopes[..., None] * distance.abs().to(slopes.dtype)


def alibi(slopes: torch.Tensor) -> RelativeBias:
    """ALiBi, scores[i, j] -= slope * |j - (i + seqlen_k - seqlen_q)| (arXiv 2108.12409), slopes that may be learned.

    slopes   float [num_heads] or [batch, num_heads]

    The same as `attention(alibi_slopes=...)`, which is faster: it knows how the scores fall, and skips keys. O(seqlen)
    memory. Raises TypeError or ValueError that names the argument.
    """
    check_table("alibi", "slopes", slopes, "[num_heads]", "[batch, num_heads]")
    return Alibi(slopes)
