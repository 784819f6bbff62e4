"""What turns the scores of a row into weights, beside the softmax: functions of a block of rows in plain torch.

Each is normalize(scores [..., keys], chosen) -> weights. Hidden scores are -inf, and each row has one that is not;
chosen is 1.0 and 0.0 for those that take part and others, None: all do. NaN among the scores of a row makes it NaN.
Derivatives are autograd's, to any order: what is searched for (which keys have a weight at all) is piecewise constant,
and the rest is a formula. Selecting by a mask is the dearest operator on a whole block: there is none here.
"""

import torch

from ..torch_internals import is_traced


def softmax(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """exp(s_j) / sum_j exp(s_j)."""
    if chosen is None:
        return torch.softmax(s, -1)
    p = torch.exp(s - _top(s)) * chosen
    return p / p.sum(-1, keepdim=True)


def softmax1(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """exp(s_j) / (1 + sum_j exp(s_j))."""
    top = _top(s).clamp(min=0.0)
    p = _among(torch.exp(s - top), chosen)
    return p / (torch.exp(-top) + p.sum(-1, keepdim=True))


def sigmoid(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """1 / (1 + exp(-s_j)): each key for itself."""
    return _among(torch.sigmoid(s), chosen)


def sparsemax(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """max(s_j - tau, 0), with tau such that they sum to 1: the point of the simplex that is nearest to s.

    Michelot's search: the keys above the tau of a set that holds the support are such a set again, and smaller.
    """
    s = s - _top(s)
    near = _near(s, chosen)
    with torch.no_grad():
        support = near > -1.0
        while True:
            smaller = support & (near > _mean_threshold(near, support))
            if torch.equal(smaller, support):
                break
            support = smaller
    return _among(torch.relu(s - _mean_threshold(near, support)), chosen)


def entmax15(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """max(s_j / 2 - tau, 0)^2, with tau such that they sum to 1: between softmax and sparsemax.

    Newton's search from the left, where the sum is convex and falls, and the root of the quadratic of the support.
    """
    s = (s - _top(s)) / 2.0
    near = _near(s, chosen)
    with torch.no_grad():
        tau = near.new_full((*near.shape[:-1], 1), -1.0)
        for _ in range(_NEWTON_STEPS):
            above = (near - tau).clamp_(min=0.0)
            total = above.sum(-1, keepdim=True)
            step = (above.square_().sum(-1, keepdim=True) - 1.0) / (2.0 * torch.where(total > 0.0, total, 1.0))
            step = torch.where(total > 0.0, step, 0.0).clamp_(min=0.0)
            tau = tau + step
            if bool((step <= torch.finfo(s.dtype).eps).all()):
                break
        support = near > tau
    y = torch.where(support, near - tau, 0.0)
    total, excess = y.sum(-1, keepdim=True), y.square().sum(-1, keepdim=True) - 1.0
    count = support.sum(-1, keepdim=True)
    # Of sum (y - x)^2 = 1 the smaller root, without a difference of what is nearly equal.
    root = torch.where(count > 0, total.square() - count * excess, 1.0).sqrt()
    return _among(torch.relu(s - (tau + excess / (total + root))).square(), chosen)


_NEWTON_STEPS = 64  # each at least halves what is missing, until they are quadratic: about 8 are taken

NORMALIZERS = {
    "softmax": softmax, "softmax1": softmax1, "sigmoid": sigmoid, "sparsemax": sparsemax, "entmax15": entmax15
}  # fmt: skip


def among_largest(s: torch.Tensor, top_k: int) -> torch.Tensor | None:
    """`chosen` for the top_k largest scores of each row; of equal ones at its end, all."""
    if s.shape[-1] <= top_k:
        return None
    s = s.detach()
    return torch.logical_not(s < s.topk(top_k, -1).values[..., -1:]).to(s.dtype)  # NaN takes part


def _among(p: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    return p if chosen is None else p * chosen


def _top(s: torch.Tensor) -> torch.Tensor:
    """The largest score of each row, [..., 1]. A constant: no result depends on it."""
    return s.detach().amax(-1, keepdim=True)


def _near(s: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """The scores of each row that may have a weight, side by side, and -inf behind them: those above the largest, which
    is 0, minus 1. They are few, and a threshold is searched for among them alone."""
    if is_traced():
        raise NotImplementedError("sparsemax and entmax15 look at values: they cannot be traced (make_fx, linearize)")
    keys, near = s.shape[-1], s.detach() > -1.0
    near = near if chosen is None else near & (chosen > 0.0)
    places = near.flatten().nonzero()[:, 0]
    rows = places // keys
    counts = torch.bincount(rows, minlength=near[..., 0].numel())
    width = int(counts.max()) if len(counts) else 0
    if 2 * width > keys:
        return s.masked_fill(~near, -torch.inf)
    columns = torch.arange(len(places), device=s.device) - (counts.cumsum(0) - counts)[rows]
    index = rows.new_zeros(len(counts), width).index_put_((rows, columns), places - rows * keys)
    behind = torch.arange(width, device=s.device) >= counts[:, None]
    shape = (*s.shape[:-1], width)
    return s.gather(-1, index.view(shape)).masked_fill(behind.view(shape), -torch.inf)


def _mean_threshold(s: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """tau, such that s - tau sums to 1 over the support."""
    count = support.sum(-1, keepdim=True)
    return (torch.where(support, s, 0.0).sum(-1, keepdim=True) - 1.0) / count.clamp(min=1)
