"""The dense matrix of weights, by the specification, for all that looks at weights."""

import torch

import fastattn
from cases import Case, inputs


def call(case: Case, seed: int = 0):
    """(q, k, v, keyword arguments without dropout) of a case."""
    (q, k, v), kwargs = inputs(case._replace(dropout_p=0.0), seed)
    return q, k, v, kwargs


def dense_weights(q, k, **kwargs) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, seqlen_k] in float64, differentiable: attention to unit vectors."""
    unit = torch.eye(max(k.shape[2], 1), dtype=torch.float64)[: k.shape[2]].expand(*k.shape[:2], -1, -1)
    out = fastattn.attention(q.double(), k.double(), unit, backend="reference", **kwargs)
    return out[..., : k.shape[2]]


def dense_statistics(q, k, **kwargs) -> dict[str, torch.Tensor]:
    """The statistics of the dense matrix, differentiable."""
    p = dense_weights(q, k, **kwargs)
    seqlen_q, seqlen_k = p.shape[2:]
    query = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    distance = (query - torch.arange(seqlen_k)).abs().double()
    logs = p.clamp(min=1e-300).log()
    largest = p.amax(-1) if seqlen_k else p.sum(-1)
    return {"key_mass": p.sum(2), "entropy": -(p * logs).sum(-1), "distance": (p * distance).sum(-1), "max": largest}
