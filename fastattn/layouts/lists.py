"""The entries of lists in compressed rows (CSR), asked in words. C++ asks the same of them again before it reads, and
only says that one is wrong; `attention_csr` then finds here which."""

import torch


def check_entries(indptr: torch.Tensor, indices: torch.Tensor, seqlen_k: int) -> None:
    """ValueError for the first entry that is out of range."""
    if indptr[0] != 0:
        raise ValueError(f"indptr[0]={indptr[0].item()} must be 0")
    if (decreasing := indptr.diff() < 0).any():
        i = int(decreasing.int().argmax()) + 1
        raise ValueError(
            f"indptr[{i}]={indptr[i].item()} is below indptr[{i - 1}]={indptr[i - 1].item()}; the starts of the rows "
            "must not decrease"
        )
    if indptr[-1] != len(indices):
        raise ValueError(f"indptr[{len(indptr) - 1}]={indptr[-1].item()} must be the number of indices, {len(indices)}")
    if (outside := (indices < 0) | (indices >= seqlen_k)).any():
        e = int(outside.int().argmax())
        raise ValueError(f"indices[{e}]={indices[e].item()} must be a key, 0 <= index < seqlen_k={seqlen_k}")
