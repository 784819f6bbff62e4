"""What turns the scores of a row into weights, beside the softmax: functions of a block of rows in plain torch.

Each is normalize(scores [..., keys], visible) -> weights: bool `visible` broadcasts to the scores, None: all; weights
of hidden keys are 0, and so is a row that sees nothing; NaN among the visible scores of a row makes it NaN. Derivatives are autograd's, to any order: what is searched for
(which keys have a weight at all) is piecewise constant, and the rest is a formula.
"""

import torch

from ..torch_internals import is_traced


def softmax(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """exp(s_j) / sum_j exp(s_j)."""
    p = _exponentials(s, visible, _top(s, visible))
    total = p.sum(-1, keepdim=True)
    return p / torch.where(total > 0.0, total, 1.0)


def softmax1(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """exp(s_j) / (1 + sum_j exp(s_j))."""
    top = _top(s, visible).clamp(min=0.0)
    p = _exponentials(s, visible, top)
    return p / (torch.exp(-top) + p.sum(-1, keepdim=True))


def sigmoid(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """1 / (1 + exp(-s_j)): each key for itself."""
    p = torch.sigmoid(s)
    return p if visible is None else torch.where(visible, p, 0.0)


def sparsemax(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """max(s_j - tau, 0), with tau such that they sum to 1: the point of the simplex that is nearest to s.

    Michelot's search: the keys above the tau of a set that holds the support are such a set again, and smaller.
    """
    top = _top(s, visible)
    s = s - top
    with torch.no_grad():
        support = _candidates(s, visible)
        while True:
            smaller = support & (s > _mean_threshold(s, support))
            if _is_settled(smaller, support):
                break
            support = smaller
    return torch.where(support, s - _mean_threshold(s, support), top - top)


def entmax15(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """max(s_j / 2 - tau, 0)^2, with tau such that they sum to 1: between softmax and sparsemax.

    Newton's search from the left, where the sum is convex and falls, and the root of the quadratic of the support.
    """
    top = _top(s, visible)
    s = (s - top) / 2.0
    with torch.no_grad():
        near = torch.where(_candidates(s, visible), s, -1.0)
        tau = near.new_full((*near.shape[:-1], 1), -1.0)
        for _ in range(_NEWTON_STEPS):
            above = (near - tau).clamp_(min=0.0)
            total = above.sum(-1, keepdim=True)
            step = (above.square_().sum(-1, keepdim=True) - 1.0) / (2.0 * torch.where(total > 0.0, total, 1.0))
            step = torch.where(total > 0.0, step, 0.0).clamp_(min=0.0)
            tau = tau + step
            if _is_settled(step <= torch.finfo(s.dtype).eps):
                break
        support = near > tau
    y = torch.where(support, s - tau, 0.0)
    total, excess = y.sum(-1, keepdim=True), y.square().sum(-1, keepdim=True) - 1.0
    count = support.sum(-1, keepdim=True)
    # Of sum (y - x)^2 = 1 the smaller root, without a difference of what is nearly equal.
    root = torch.where(count > 0, total.square() - count * excess, 1.0).sqrt()
    return torch.where(support, (y - excess / (total + root)).square(), top - top)


_NEWTON_STEPS = 64  # each at least halves what is missing, until they are quadratic: about 8 are taken

NORMALIZERS = {
    "softmax": softmax, "softmax1": softmax1, "sigmoid": sigmoid, "sparsemax": sparsemax, "entmax15": entmax15
}  # fmt: skip


def among_largest(s: torch.Tensor, visible: torch.Tensor | None, top_k: int) -> torch.Tensor | None:
    """`visible` of the top_k largest scores of each row alone; of equal ones at its end, all."""
    if s.shape[-1] <= top_k:
        return visible
    s = s.detach() if visible is None else s.detach().masked_fill(~visible, -torch.inf)
    largest = ~(s < s.topk(top_k, -1).values[..., -1:])  # NaN takes part
    return largest if visible is None else largest & visible


def _top(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """The largest visible score of each row, [..., 1]; 0 where there is none. A constant: no result depends on it."""
    if s.shape[-1] == 0:
        return s.new_zeros(*s.shape[:-1], 1)
    s = s.detach()
    top = (s if visible is None else s.masked_fill(~visible, -torch.inf)).amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def _exponentials(s: torch.Tensor, visible: torch.Tensor | None, top: torch.Tensor) -> torch.Tensor:
    """exp(s - top), 0 where hidden, whatever stands there."""
    s = s - top
    return torch.exp(s if visible is None else s.masked_fill(~visible, -torch.inf))


def _candidates(s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Keys that may have a weight: tau is at least the largest score, which is 0, minus 1."""
    if is_traced():
        raise NotImplementedError("sparsemax and entmax15 look at values: they cannot be traced (make_fx, linearize)")
    near = s > -1.0
    return near if visible is None else near & visible


def _mean_threshold(s: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """tau, such that s - tau sums to 1 over the support."""
    count = support.sum(-1, keepdim=True)
    return (torch.where(support, s, 0.0).sum(-1, keepdim=True) - 1.0) / count.clamp(min=1)


def _is_settled(now: torch.Tensor, before: torch.Tensor | None = None) -> bool:
    return bool(now.all()) if before is None else torch.equal(now, before)
