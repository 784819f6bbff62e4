"""Biases that are products of q or k with a vector of each distance: Transformer-XL, Shaw's keys, DeBERTa."""

import torch

from ..checks import check_int
from ..scores.relative import Rewriting
from .arguments import check_heads, check_table
from .blocks import InBlocks
from .scores import Tables
from .values import ShawValues


def _distances(q, k) -> torch.Tensor:
    """All distances key - query, ascending, counted as `causal` does; that of i and j is entry j - i + seqlen_q - 1."""
    return torch.arange(max(q.shape[2] + k.shape[2] - 1, 0), device=q.device) - (k.shape[2] - 1)


class TransformerXL(InBlocks):
    name = "transformer_xl"

    def __init__(self, r: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None):
        self.r, self.u, self.v = r, u, v

    def tables(self, q, k, options):
        r, count = self.r, len(_distances(q, k))
        check_heads(self.name, "r", r.shape[0], q)
        _check_columns(self.name, "r", r, q)
        if r.shape[1] == k.shape[2] != count and options["causal"]:
            r = torch.nn.functional.pad(r, (0, 0, 0, count - r.shape[1]))  # no key behind the query is seen
        if r.shape[1] != count:
            raise ValueError(
                f"transformer_xl: r has {r.shape[1]} distances; seqlen_q={q.shape[2]} and seqlen_k={k.shape[2]} have "
                f"{count} (causal=True also takes the {k.shape[2]} up to distance 0)"
            )
        found = {"r": r}
        for name, argument, x in (("u", "u", self.u), ("w", "v", self.v)):
            if x is not None:
                check_heads(self.name, argument, x.shape[0], q)
                _check_columns(self.name, argument, x, q)
                found[name] = x
        return Tables(found, {"r": 0})


def transformer_xl(r: torch.Tensor, u: torch.Tensor | None = None, v: torch.Tensor | None = None) -> InBlocks:
    """Transformer-XL's scores (arXiv 1901.02860), also those of Conformers (arXiv 2005.08100),

        scores[i, j] = softmax_scale * ((q_i + u) . k_j + (q_i + v) . r[j - (i + seqlen_k - seqlen_q) + seqlen_k - 1])

    r      float [num_heads|1, seqlen_q + seqlen_k - 1, head_dim]: the projected encoding of each distance key - query,
           ascending, entry seqlen_k - 1 is distance 0 (what the models call R, before their relative shift: they list
           distances query - key from the largest on); with causal=True also the first seqlen_k of these alone
    u, v   float [num_heads|1, head_dim], content and position biases; None: 0

    The scores of positions run in blocks of query rows, O(seqlen_k) memory for each row of a block; causal and windows
    cut what a block computes. No gradient of a gradient, no torch.func, a graph break under torch.compile; softcap,
    ALiBi and BlockMask are refused. Raises TypeError or ValueError that names the argument.
    """
    check_table("transformer_xl", "r", r, "[num_heads, distances, head_dim]")
    for name, x in (("u", u), ("v", v)):
        if x is not None:
            check_table("transformer_xl", name, x, "[num_heads, head_dim]")
    return TransformerXL(r, u, v)


class Shaw(InBlocks):
    name = "shaw"

    def __init__(self, keys: torch.Tensor):
        self.keys = keys

    def tables(self, q, k, options):
        keys = self.keys[None] if self.keys.dim() == 2 else self.keys
        check_heads(self.name, "keys", keys.shape[0], q)
        _check_columns(self.name, "keys", keys, q)
        return Tables({"r": keys}, {"r": k.shape[2] - 1 - keys.shape[1] // 2})


def shaw(keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> Rewriting:
    """Shaw's relative keys and values (arXiv 1803.02155), one of them or both: with
    place = clip(j - (i + seqlen_k - seqlen_q), -c, c) + c,

        scores[i, j] = softmax_scale * q_i . (k_j + keys[place])        out[i] = sum_j p[i, j] * (v_j + values[place])

    keys     float [2 c + 1, head_dim] or [num_heads|1, 2 c + 1, head_dim]; None: 0
    values   float [2 c + 1, head_dim_v] or [num_heads|1, 2 c + 1, head_dim_v]; None: 0

    With keys alone: memory, and what is refused, as of `transformer_xl`. Values want the weights, which never leave a
    kernel, so with them all runs in torch's own operators, in blocks of at most 128 query rows, O(seqlen_k) memory for
    each row of a block; differentiable to any order, with softcap, ALiBi and BlockMask; a graph break under
    torch.compile. Raises TypeError or ValueError that names the argument; `UnsupportedError` for values and a backend
    of another name than "reference".
    """
    if keys is None and values is None:
        raise TypeError("shaw: give keys, values or both")
    for name, x, columns in (("keys", keys, "head_dim"), ("values", values, "head_dim_v")):
        if x is not None:
            check_table("shaw", name, x, f"[2 c + 1, {columns}]", f"[num_heads, 2 c + 1, {columns}]")
            if x.shape[-2] % 2 == 0:
                raise ValueError(f"shaw: {name} has {x.shape[-2]} distances; it must have an odd number, -c ... c")
    return Shaw(keys) if values is None else ShawValues(keys, values)


class DeBERTa(InBlocks):
    name = "deberta"

    def __init__(self, pos_key, pos_query, buckets: int | None, max_distance: int):
        self.pos_key, self.pos_query, self.buckets, self.max_distance = pos_key, pos_query, buckets, max_distance

    def tables(self, q, k, options):
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"deberta: q has num_heads={q.shape[1]} and k {k.shape[1]}; they must be equal")
        for argument, x in (("pos_key", self.pos_key), ("pos_query", self.pos_query)):
            if x is not None:
                check_heads(self.name, argument, x.shape[0], q)
                _check_columns(self.name, argument, x, q)
        distance = _distances(q, k)  # of keys from queries; their negatives in the other order are those of "s"
        tensors, firsts = {}, {}
        for name, table, between in (("r", self.pos_key, -distance), ("s", self.pos_query, -distance.flip(0))):
            if table is not None:
                tensors[name], firsts[name] = self.of_distances(table, between)
        return Tables(tensors, firsts)

    def of_distances(self, table: torch.Tensor, distance: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(rows of the table for the distances query - key, but for those that are as the first or as the last, the
        first of them)"""
        span = table.shape[1] // 2
        places = (self.bucket(distance) + span).clamp(0, 2 * span - 1)
        if not len(places):
            return table, 0
        low, high = int((places == places[0]).sum()) - 1, len(places) - int((places == places[-1]).sum())
        low = min(low, high)  # where all are one
        return table[:, places[low : high + 1]], low

    def attend(self, attention, bind, q, k, v, options):
        if options["softmax_scale"] is None and isinstance(q, torch.Tensor) and q.dim() == 4:
            terms = 1 + (self.pos_key is not None) + (self.pos_query is not None)
            options = options | {"softmax_scale": (q.shape[3] * terms) ** -0.5}
        return super().attend(attention, bind, q, k, v, options)

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """query - key, in float32 as the model does: exact up to half of the buckets, then by the logarithm."""
        if self.buckets is None:
            return distance
        middle = self.buckets // 2
        far = distance.abs().clamp(min=middle)
        ratio = torch.log(far / middle) / torch.log(torch.tensor((self.max_distance - 1) / middle))
        steps = torch.ceil(ratio * (middle - 1)) + middle
        return torch.where(distance.abs() <= middle, distance, (steps * distance.sign()).long())


def deberta(
    pos_key: torch.Tensor | None, pos_query: torch.Tensor | None, buckets: int | None = None, max_distance: int = 512
) -> InBlocks:
    """DeBERTa's disentangled attention (arXiv 2006.03654), "c2p" with pos_key and "p2c" with pos_query,

        scores[i, j] = softmax_scale * (q_i . k_j + q_i . pos_key[place(i - j)] + k_j . pos_query[place(i - j)])

    pos_key, pos_query  float [num_heads|1, 2 * span, head_dim], the projected table of distances; None: that term is
                        left out. place(d) = clip(bucket(d) + span, 0, 2 * span - 1)
    buckets             DeBERTa-v2's `position_buckets`: distances up to half of it are exact, those beyond share
                        buckets that grow with the logarithm up to `max_distance`; None: every distance for itself
    max_distance        DeBERTa-v2's `max_relative_positions`

    softmax_scale=None is (head_dim * (1 + number of terms)) ** -0.5, as in the model. As many heads of k as of q.
    Memory, and what is refused, as of `transformer_xl`; p2c takes [batch, num_heads, seqlen_k, 2 * span] more. Raises
    TypeError or ValueError that names the argument.
    """
    given = [(name, x) for name, x in (("pos_key", pos_key), ("pos_query", pos_query)) if x is not None]
    if not given:
        raise TypeError("deberta: give pos_key, pos_query or both")
    for name, x in given:
        check_table("deberta", name, x, "[num_heads, 2 * span, head_dim]")
        if x.shape[1] % 2 or not x.shape[1]:
            raise ValueError(f"deberta: {name} has {x.shape[1]} places; it must have an even number, 2 * span")
    if buckets is not None:
        check_int("deberta: buckets", buckets, 4)
        if check_int("deberta: max_distance", max_distance) <= buckets // 2 + 1:
            raise ValueError(f"deberta: max_distance={max_distance} must be above {buckets // 2 + 1}, half of buckets")
    return DeBERTa(pos_key, pos_query, buckets, max_distance)


def _check_columns(function: str, argument: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.shape[-1] != q.shape[3]:
        raise ValueError(f"{function}: {argument} has {x.shape[-1]} columns; q has head_dim={q.shape[3]}")
