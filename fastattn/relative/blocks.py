"""Attention whose bias is made of products with q and k: in blocks of query rows, each with a dense bias of its own.

It is dropped after use, and computed again for gradients: O(rows of a block * seqlen_k) memory.
"""

from typing import NamedTuple

import torch

from ..masks.intervals import UNBOUNDED, Mask
from ..scores.relative import Rewriting
from ..torch_internals import outside_of_graphs
from .arguments import compute_dtype

_SCORES = 1 << 20  # of a block, which then stays in a cache
_ROWS = range(64, 257)  # of a block, whatever the number of scores


class At(NamedTuple):
    """Where a block stands: (start, end) of each."""

    batch: tuple[int, int]
    rows: tuple[int, int]
    keys: tuple[int, int]


class InBlocks(Rewriting):
    """Scores of positions: scale * q_i . R[distance] and P[j, place of the distance], one of them or both."""

    def tables(self, q, k, options: dict, scale) -> dict[str, torch.Tensor]:
        """Tensors by name: "r" [num_heads|1, seqlen_q + seqlen_k - 1, head_dim], entry key - query + seqlen_q - 1; "u"
        and "w" [num_heads|1, head_dim], what is added to q before it meets k, and R; "p" [batch, num_heads, seqlen_k,
        places]. Checked."""
        raise NotImplementedError

    def places(self, q, k) -> torch.Tensor:
        """[seqlen_q + seqlen_k - 1], int64: where in "p" a distance is, in the order of "r"."""
        raise NotImplementedError

    def attend(self, attention, bind, q, k, v, options):
        return _attend(self, attention, bind, q, k, v, options)


def _attend(bias: InBlocks, attention, bind, q, k, v, options: dict):
    bound = bind(q, k, v, **options | {"bias": None})
    problem, terms = bound.problem, bound.terms
    if problem.transformed:
        raise NotImplementedError(f"bias={bias!r} takes no torch.func transform and no forward-mode derivative")
    for name in ("block_mask", "alibi_slopes"):
        if getattr(terms, name) is not None:
            named = "mask, a BlockMask," if name == "block_mask" else name
            raise ValueError(f"{named} does not go with bias={bias!r}; give a Mask or a bool tensor, and no ALiBi")
    if terms.softcap:
        raise ValueError(f"softcap={terms.softcap!r} does not go with bias={bias!r}, whose scores it would cap, too")
    tensors = {"q": q, "k": k, "v": v, **bias.tables(q, k, options, terms.softmax_scale)}
    for name in ("sinks", "softmax_scale"):
        if isinstance(getattr(terms, name), torch.Tensor):
            tensors[name] = getattr(terms, name)
    places = bias.places(q, k) if "p" in tensors else None
    call = BlockCall(bias, attention, problem, terms, tuple(tensors), places, options["backend"])
    out, lse = Rows.apply(call, *tensors.values())
    return (out, lse) if options["return_lse"] else out


_attend = outside_of_graphs(
    _attend, "a bias that follows from q and k runs in blocks, outside of graphs: call it outside of torch.compile"
)


class Rows(torch.autograd.Function):
    """(out, lse) of a `BlockCall`, as apply(call, *tensors)."""

    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return call.run(tensors)

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"bias={ctx.call.bias!r} has no gradients of gradients: call without create_graph"
            )
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *ctx.call.gradients(ctx.saved_tensors, dout, dlse, ctx.needs_input_grad[1:])


class BlockCall:
    """A call of `attention` with a bias of positions. (Not a tuple, in which autograd would look for tensors.)"""

    def __init__(self, bias, attention, problem, terms, names: tuple[str, ...], places, backend: str | None):
        self.places = places
        self.bias, self.attention, self.backend = bias, attention, backend
        self.problem, self.terms, self.names = problem, terms, names
        self.seed = terms.seed
        if problem.dropout and self.seed is None:
            self.seed = int(torch.randint(2**63 - 1, ()))

    def run(self, tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse)"""
        q, v = tensors[0], tensors[2]
        (batch, heads, seqlen, _), columns = q.shape, v.shape[3]
        strides = (seqlen * heads * columns, seqlen * columns, columns, 1)
        if q.stride(1) < q.stride(2) and seqlen > 1:
            strides = (seqlen * heads * columns, columns, heads * columns, 1)
        out = q.new_empty_strided((batch, heads, seqlen, columns), strides)
        lse = q.new_empty((batch, heads, seqlen), dtype=compute_dtype(q))
        for at in self.blocks():
            here = (slice(*at.batch), slice(None), slice(*at.rows))
            out[here], lse[here] = self.block(self.cut(tensors, at), at)
        return out, lse

    def gradients(self, tensors, dout, dlse, wanted) -> list[torch.Tensor | None]:
        """Of the tensors that are wanted; each block runs once more."""
        real = compute_dtype(tensors[0])
        sums = {n: x.new_zeros(x.shape, dtype=real) for n, x, w in zip(self.names, tensors, wanted, strict=True) if w}
        for at in self.blocks():
            here = (slice(*at.batch), slice(None), slice(*at.rows))
            with torch.enable_grad():
                x = {name: part.detach() for name, part in self.cut(tensors, at).items()}
                leaves = [x[name].requires_grad_() for name in sums]
                pairs = zip(self.block(x, at), (dout, dlse), strict=True)
                results, given = zip(*[(y, dy[here]) for y, dy in pairs if dy is not None], strict=True)
            found = torch.autograd.grad(results, leaves, given, allow_unused=True)
            into = self.cut([sums.get(name) if name != "p" else None for name in self.names], at)
            for name, grad in zip(sums, found, strict=True):
                if grad is not None and name == "p":
                    _of_keys(sums[name], at).scatter_add_(-1, self.index(at).expand(grad.shape), grad)
                elif grad is not None:
                    into[name] += grad
        return [sums[n].to(x.dtype) if n in sums else None for n, x in zip(self.names, tensors, strict=True)]

    def blocks(self):
        """All of them; rows do not depend on the batch."""
        batch, seqlen_q, seqlen_k = self.problem.batch, self.problem.seqlen_q, self.problem.seqlen_k
        of_row = max(self.problem.num_heads * seqlen_k, 1)
        rows = min(max(_SCORES // of_row, _ROWS.start), _ROWS.stop - 1)
        entries = max(_SCORES // (of_row * rows), 1)
        lo, hi = self.terms.diagonal_lo, self.terms.diagonal_hi
        for start in range(0, seqlen_q, rows):
            end = min(start + rows, seqlen_q)
            keys = max(0, start + lo), min(seqlen_k, end + hi)
            keys = keys if keys[0] < keys[1] else (0, min(1, seqlen_k))  # nothing is seen: one hidden key
            for first in range(0, batch, entries):
                yield At((first, min(first + entries, batch)), (start, end), keys)

    def cut(self, tensors, at: At) -> dict:
        """What of the tensors belongs to a block, by name: views, but of "p" [batch, num_heads, keys, rows]."""
        found = {}
        for name, x in zip(self.names, tensors, strict=True):
            if x is None:
                continue
            if name == "q":
                x = x[slice(*at.batch), :, slice(*at.rows)]
            elif name in ("k", "v"):
                x = _of_keys(x, at)
            elif name == "r":
                x = x.narrow(1, *self.distances(at))
            elif name == "p":
                x = _of_keys(x, at)
                x = x.gather(-1, self.index(at).expand(*x.shape[:3], -1))
            found[name] = x
        return found

    def distances(self, at: At) -> tuple[int, int]:
        """(first, how many) of all distances are those of a block."""
        rows, keys = at.rows[1] - at.rows[0], at.keys[1] - at.keys[0]
        return at.keys[0] - at.rows[1] + self.problem.seqlen_q, max(rows + keys - 1, 0)

    def index(self, at: At) -> torch.Tensor:
        """[keys, rows]: the places of a block."""
        rows = at.rows[1] - at.rows[0]
        if at.keys[0] == at.keys[1]:
            return self.places.new_zeros(0, rows)
        return self.places.narrow(0, *self.distances(at)).unfold(0, rows, 1).flip(-1)

    def block(self, x: dict, at: At) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of a block."""
        scale = x.get("softmax_scale", self.terms.softmax_scale)
        with torch.autocast(x["q"].device.type, enabled=False):
            bias = scores(x, scale)
        q = x["q"] + x["u"][:, None].to(x["q"].dtype) if "u" in x else x["q"]
        seed = None if self.seed is None else (self.seed + 0x9E3779B97F4A7C15 * (at.rows[0] + 1) + at.batch[0]) % 2**63
        return self.attention(
            q, x["k"], x["v"], bias=bias, mask=self.mask(at, q.device), softmax_scale=scale, sinks=x.get("sinks"),
            dropout_p=self.terms.dropout_p, seed=seed, return_lse=True, backend=self.backend,
        )  # fmt: skip

    def mask(self, at: At, device):
        """That of a block, None if it hides nothing."""
        terms, first = self.terms, at.keys[0]
        rows = torch.arange(*at.rows, device=device)[None, None]
        starts = [] if terms.diagonal_lo == -UNBOUNDED else [rows + terms.diagonal_lo]
        ends = [] if terms.diagonal_hi == UNBOUNDED else [rows + terms.diagonal_hi + 1]
        for bounds, own in ((starts, terms.k_start), (ends, terms.k_end)):
            if own is not None:
                bounds.append(_part(own, at.batch, None, at.rows))
        start, end = (None if not bounds else _all_of(pick, bounds) - first for pick, bounds in (
            (torch.maximum, starts), (torch.minimum, ends)
        ))  # fmt: skip
        mask = None if start is None and end is None else Mask.intervals(start, end)
        if terms.mask is None:
            return mask
        seen = _part(terms.mask, at.batch, None, at.rows, at.keys)
        sizes = at.rows[1] - at.rows[0], at.keys[1] - first
        return seen if mask is None else seen & mask.to_dense(*sizes, device)


def scores(x: dict, scale) -> torch.Tensor:
    """[batch, num_heads, rows, keys]: scale * (q_i + w) . R[distance] + P[j, place]"""
    real = compute_dtype(x["q"])
    scale = scale.to(real).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    found = []
    if "r" in x:
        q = x["q"].to(real)
        q = q + x["w"][:, None].to(real) if "w" in x else q
        found.append(ByDistance.apply(q * scale, x["r"].to(real)))
    if "p" in x:
        found.append(x["p"].transpose(-1, -2))
    return found[0] if len(found) == 1 else found[0] + found[1]


class ByDistance(torch.autograd.Function):
    """`skew` of q_i . R[distance]; its gradient is written once, which that of views is not."""

    @staticmethod
    def forward(ctx, q, r):
        ctx.save_for_backward(q, r)
        return skew(q @ r.transpose(-1, -2))

    @staticmethod
    def backward(ctx, dscores):
        q, r = ctx.saved_tensors
        dproducts = q.new_zeros(*q.shape[:3], r.shape[-2])
        skew(dproducts).copy_(dscores)
        if not ctx.needs_input_grad[1]:
            return dproducts @ r, None
        dr = dproducts.transpose(-1, -2) @ q
        return dproducts @ r, dr[0] if dr.shape[1:] == r.shape and len(dr) == 1 else dr.sum_to_size(r.shape)


def skew(products: torch.Tensor) -> torch.Tensor:
    """[..., rows, rows + keys - 1] by distance -> [..., rows, keys] by key, of which entry (r, j) was j - r + rows - 1;
    a view: in rows that are one shorter, each lies one place further right."""
    rows, width = products.shape[-2:]
    if rows <= 1 or width < rows:
        return products[..., : max(width - rows + 1, 0)]
    flat = products.flatten(-2)[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return flat.unflatten(-1, (rows, width - 1))[..., : width - rows + 1]


def _of_keys(x: torch.Tensor, at: At) -> torch.Tensor:
    """The keys of a block; a view."""
    return x[slice(*at.batch), :, slice(*at.keys)]


def _part(x: torch.Tensor, *ranges) -> torch.Tensor:
    """x cut along its last dimensions, but for those that broadcast; None: not cut."""
    for dim, part in enumerate(reversed(ranges), 1):
        if part is not None and dim <= x.dim() and x.shape[-dim] != 1:
            x = x.narrow(-dim, part[0], part[1] - part[0])
    return x


def _all_of(pick, bounds: list[torch.Tensor]) -> torch.Tensor:
    return bounds[0] if len(bounds) == 1 else pick(*bounds)
