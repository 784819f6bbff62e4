"""What turns the scores of a row into weights, beside the softmax: functions of a block of rows in plain torch.

Each is normalize(scores [..., keys]) -> weights. Hidden scores are -inf, and each row has one that is not. NaN among
the scores of a row makes it NaN. Derivatives are autograd's, to any order: what is searched for (which keys have a
weight at all) is piecewise constant, and the rest is a formula. The search is C++ where scores lie on a CPU
(`thresholds`). Selecting by a mask is the dearest operator on a whole block: there is none here. Scores belong to the
block: where nobody will differentiate, weights take their memory.
"""

import torch

from ..backends import cpu
from ..torch_internals import is_traced


def softmax1(s: torch.Tensor) -> torch.Tensor:
    """exp(s_j) / (1 + sum_j exp(s_j))."""
    top = _top(s).clamp(min=0.0)
    p = torch.exp(s - top)
    return p / (torch.exp(-top) + p.sum(-1, keepdim=True))


def softmax(s: torch.Tensor) -> torch.Tensor:
    """exp(s_j) / sum_j exp(s_j)."""
    return torch.softmax(s, -1)


def sigmoid(s: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-s_j)): each key for itself."""
    return s.sigmoid_() if _is_ours(s) else torch.sigmoid(s)


def sparsemax(s: torch.Tensor) -> torch.Tensor:
    """max(s_j - tau, 0), with tau such that they sum to 1: the point of the simplex that is nearest to s."""
    s = _minus(s, _top(s))
    tau = thresholds(s, "sparsemax")
    s = _minus(s, tau)
    if _is_ours(s):
        return s.relu_()
    above = torch.relu(s)
    return torch.relu(s - (above.sum(-1, keepdim=True) - 1.0) / _count(above).clamp(min=1.0))


def entmax15(s: torch.Tensor) -> torch.Tensor:
    """max(s_j / 2 - tau, 0)^2, with tau such that they sum to 1: between softmax and sparsemax. With gradients, tau is
    the root of the quadratic of its support."""
    s = _minus(s, _top(s))
    tau = thresholds(s, "entmax15")
    if _is_ours(s):
        return s.mul_(0.5).sub_(tau).relu_().square_()
    s = s / 2.0 - tau
    above = torch.relu(s)
    total, excess = above.sum(-1, keepdim=True), above.square().sum(-1, keepdim=True) - 1.0
    # Of sum (above - x)^2 = 1 the smaller root, without a difference of what is nearly equal.
    root = (total.square() - _count(above) * excess).sqrt()
    return torch.relu(s - excess / (total + root)).square()


NORMALIZERS = {
    "softmax": softmax, "softmax1": softmax1, "sigmoid": sigmoid, "sparsemax": sparsemax, "entmax15": entmax15
}  # fmt: skip
SHIFTED = {"softmax", "sparsemax", "entmax15"}
"""Those to which a number added to all scores of a row makes no difference."""


def among_largest(s: torch.Tensor, top_k: int, shifts: bool) -> torch.Tensor:
    """Scores, of which all but the top_k largest of each row are -inf; of equal ones at its end, all stay. shifts: a
    number may be added to those of a row."""
    if s.shape[-1] <= top_k:
        return s
    least = thresholds(s, "largest", top_k)
    above = _minus(s, least)
    below = -torch.finfo(s.dtype).smallest_normal  # so near to 0 that it equals the last one
    if _is_ours(above):
        torch.nn.functional.threshold_(above, below, -torch.inf)
        return above if shifts else above.add_(least)
    above = torch.nn.functional.threshold(above, below, -torch.inf)
    return above if shifts else above + least


_RULES = ("largest", "sparsemax", "entmax15")  # in the order of csrc/drive/driver.h


def thresholds(s: torch.Tensor, rule: str, top_k: int = 1) -> torch.Tensor:
    """[..., 1], a constant: "largest", the top_k-th largest score of each row that is seen, or the smallest;
    "sparsemax" and "entmax15", their tau, where the largest score is 0."""
    s = s.detach()
    if is_traced() and rule != "largest":
        raise NotImplementedError("sparsemax and entmax15 look at values: they cannot be traced (make_fx, linearize)")
    if s.device.type == "cpu" and cpu.unavailable() is None and not is_traced():
        return cpu.thresholds(s.flatten(0, -2).contiguous(), _RULES.index(rule), top_k).view(*s.shape[:-1], 1)
    if rule == "largest":
        found = s.topk(top_k, -1).values
        return found.masked_fill(found == -torch.inf, torch.inf).amin(-1, keepdim=True)
    x = s.sort(-1, descending=True).values.clamp(min=-2.0)  # below -1, or -2, there is no weight
    count = torch.arange(1, x.shape[-1] + 1, device=s.device, dtype=s.dtype)
    if rule == "sparsemax":
        tau = (x.cumsum(-1) - 1.0) / count
    else:
        x = x / 2.0
        mean, squares = x.cumsum(-1) / count, x.square().cumsum(-1) / count
        tau = mean - (1.0 / count - (squares - mean.square())).clamp(min=0.0).sqrt()
    return tau.gather(-1, (x > tau).sum(-1, keepdim=True).clamp(min=1) - 1)


def _top(s: torch.Tensor) -> torch.Tensor:
    """The largest score of each row, [..., 1]. A constant: no result depends on it."""
    return s.detach().amax(-1, keepdim=True)


def _count(above: torch.Tensor) -> torch.Tensor:
    """How many of a row are above 0, [..., 1]; a constant."""
    return above.detach().sign().sum(-1, keepdim=True)


def _minus(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return s.sub_(x) if _is_ours(s) else s - x


def _is_ours(s: torch.Tensor) -> bool:
    """Whether scores may be changed in place."""
    return not (s.requires_grad or torch.is_grad_enabled() or is_traced())
