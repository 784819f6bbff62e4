"""vmap: samples become batch entries of one call, or calls of their own where they cannot."""

from collections.abc import Callable

import torch

from .slots import base

_OF_ALL = ("q", "k", "v", "out", "exact", "lse", "parts")
"""Tensors that have an entry for each of the batch, and do not broadcast."""


def fold(apply: Callable, size: int, in_dims, work, tensors) -> tuple[tuple, tuple]:
    """The results of apply(work, *tensors) for `size` samples, which lie along in_dims of the tensors (None: shared by
    all), and the dimensions along which those of the results lie."""
    batched = [dim is not None for dim in in_dims]
    firsts = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)]
    folded = _folded(work, size, batched, firsts)
    if folded is None:
        samples = [[x[i] if has else x for x, has in zip(firsts, batched, strict=True)] for i in range(size)]
        results = zip(*[apply(work, *sample) for sample in samples], strict=True)
        return tuple(torch.stack(parts) for parts in results), (0,) * len(work.outs)
    shapes = [tuple(x.shape[1:] if has else x.shape) for x, has in zip(firsts, batched, strict=True)]
    shapes = dict(zip(work.slots, shapes, strict=True))
    results = zip(work.outs, apply(work, *folded), strict=True)
    unfolded = [_unfolded(x, size, shapes["q"][0], shapes.get(out)) for out, x in results]
    return tuple(unfolded), (0,) * len(unfolded)


def _folded(work, size: int, batched: list[bool], firsts: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The tensors of one call; None if there is none.

    Dropout's bits depend on the batch entry, and each sample by itself has those of the first ones.
    """
    if work.call.problem.dropout:
        return None
    # A term, its tangents and cotangents have one shape; a gradient of each sample's own wants a term of its own.
    of_samples = {base(slot) for slot, has in zip(work.slots, batched, strict=True) if has}
    of_samples |= {base(out) for out in work.outs} | {*_OF_ALL}
    q = work.slots.index("q")
    batch, folded = firsts[q].shape[1 if batched[q] else 0], []
    for slot, x, has in zip(work.slots, firsts, batched, strict=True):
        x = _fold_one(work.call.full_dims(slot), x, has, base(slot) in of_samples, size, batch)
        if x is None:
            return None
        folded.append(x)
    return folded


def _fold_one(dims, x: torch.Tensor, has: bool, is_of_samples: bool, size: int, batch: int) -> torch.Tensor | None:
    """A tensor of the whole call; None if it has no place for samples, or would be copied with n x n numbers each."""
    if dims[:1] != ("batch",):
        return None if is_of_samples else x
    shape = x.shape[1:] if has else x.shape
    shape = *(1,) * (len(dims) - len(shape)), *shape
    if not is_of_samples and shape[0] == 1:
        return x
    x = x.reshape(size, *shape) if has else x.expand(size, *x.shape).reshape(size, *shape)
    x = x.expand(size, batch, *shape[1:])
    copies = size > 1 and batch > 1 and x.stride(0) != batch * x.stride(1)
    if copies and dims[2:] == ("seqlen_q", "seqlen_k") and 1 not in shape[2:]:
        return None
    return x.reshape(size * batch, *shape[1:])


def _unfolded(x: torch.Tensor, size: int, batch: int, shape: tuple[int, ...] | None) -> torch.Tensor:
    """A result by samples; shape: that of a sample's tensor whose gradient it is, None if it is none."""
    x = x.unflatten(0, (size, batch))
    if shape is None:
        return x
    if x.numel() != size * torch.Size(shape).numel():  # the gradient of what the batch shares
        x = x.sum(1)
    return x.reshape(size, *shape)
