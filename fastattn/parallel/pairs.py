"""How many (query, key) pairs diagonal bounds let two runs of positions see: in closed form, for numbers or tensors."""

import torch

from .shards import Run


def sees(queries: Run, keys: Run, lo: int, hi: int) -> bool:
    """Whether lo <= key - query <= hi for some pair of two runs that are not empty."""
    return keys[1] - 1 - queries[0] >= lo and keys[0] - (queries[1] - 1) <= hi


def count_pairs(queries: torch.Tensor, keys: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    """Pairs with lo <= key - query <= hi, float64 [n, m], of runs int64 [n, 2] and [m, 2]."""
    (q_start, q_stop), (k_start, k_stop) = queries.T[:, :, None], keys.T[:, None, :]
    rows, columns = (q_stop - q_start).double(), (k_stop - k_start).double()
    shift = (q_start - k_start).double()  # a pair's distance within the runs is less by so much
    found = _below(rows, columns, shift + float(hi)) - _below(rows, columns, shift + float(lo) - 1.0)
    return found.clamp(min=0.0)  # lo > hi: nothing is seen


def _below(rows, columns, most):
    """Pairs (i, j) of `rows` times `columns` with j - i <= most."""
    most = torch.maximum(torch.minimum(most, columns), -rows - 1.0)
    return _sum_to(most + rows, columns) - _sum_to(most, columns)


def _sum_to(last, columns):
    """The sum of min(max(u, 0), columns) over all u <= last."""
    last = last.clamp(min=0.0)
    within = torch.minimum(last, columns)
    return within * (within + 1.0) / 2.0 + (last - within) * columns
