"""Shapes, dtypes and devices, checked once for each kind of call; errors name the argument, its value and the rule."""

import torch

from .checks import broadcasts, check_one_device, check_tensors, dtype_name, refuse_subclasses
from .masks.intervals import UNBOUNDED
from .problem import FLOATS, Problem
from .scores import SCORES
from .terms import TERMS


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Problem:
    """The Problem of q, k and v alone; TypeError or ValueError if they do not fit each other."""
    check_tensors(q=q, k=k, v=v)
    refuse_subclasses(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [batch, num_heads, seqlen, head_dim] (unsqueeze what "
                "is missing; scaled_dot_product_attention takes other ranks)"
            )
    (batch, num_heads, seqlen_q, head_dim), (num_heads_k, seqlen_k), head_dim_v = q.shape, k.shape[1:3], v.shape[3]
    expected_k, expected_v = (batch, num_heads_k, seqlen_k, head_dim), (batch, num_heads_k, seqlen_k, head_dim_v)
    if tuple(k.shape) != expected_k:
        raise ValueError(f"k has shape {tuple(k.shape)}; with q of shape {tuple(q.shape)} it must be {expected_k}")
    if tuple(v.shape) != expected_v:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"v has shape {tuple(v.shape)}; with q and k of shape {shapes} it must be {expected_v}")
    if head_dim == 0 or head_dim_v == 0:
        raise ValueError(f"head_dim={head_dim}, head_dim_v={head_dim_v}: both must be at least 1")
    if num_heads != num_heads_k and (num_heads_k == 0 or num_heads % num_heads_k):
        hint = ""
        if seqlen_q == seqlen_k:  # as it is where seqlen and num_heads have changed places
            hint = " (if these are [batch, seqlen, num_heads, head_dim], pass q.transpose(1, 2) and so on)"
        raise ValueError(
            f"q has num_heads={num_heads} and k has num_heads_k={num_heads_k}; num_heads must be a multiple of "
            f"num_heads_k{hint}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must agree (cast with .to)")
    if dtype_name(q.dtype) not in FLOATS:
        raise TypeError(f"q has dtype {q.dtype}; supported are {', '.join(FLOATS)}")
    check_one_device(q, k, v)
    return Problem(
        q.device.type, dtype_name(q.dtype), batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, head_dim_v,
        device_index=q.device.index or 0,
    )  # fmt: skip


def check_terms(problem: Problem, device: torch.device, tensors: dict, numbers: dict) -> dict:
    """`numbers` as kernels take them; TypeError or ValueError. tensors, numbers: values by the names of TERMS."""
    checked = {
        term.name: term.check(numbers[term.name]) for term in TERMS if term.check is not None and term.name in numbers
    }
    check_tensors(**{name: x for name, x in tensors.items() if name != "block_mask"})
    present = [(term, tensors[term.name]) for term in TERMS if term.name in tensors and term.shapes]
    for term, x in present:
        _check_dtype(term, x)
    for term, x in present:
        _check_shape(term, tuple(x.shape), problem)
    if (block_mask := tensors.get("block_mask")) is not None:
        scores = tuple(getattr(problem, size) for size in SCORES)
        if block_mask.shape[2:] != scores[2:] or not broadcasts(block_mask.shape, scores):
            raise ValueError(
                f"mask is a BlockMask of shape {block_mask.shape}; it must be [batch|1, num_heads|1, seqlen_q, "
                f"seqlen_k], here {scores}"
            )
    for name, x in tensors.items():
        if x.device != device:
            known_as = {term.name: term.argument for term in TERMS}[name] or name
            known_as = "mask" if name == "block_mask" else known_as
            raise ValueError(f"{known_as} is on {x.device}, q on {device}; they must be on one device")
    return checked


def mask_kind(tensors: dict, lo: int, hi: int) -> str:
    """The most general of problem.MASK_KINDS that these terms contain; lo, hi: diagonal bounds."""
    if "block_mask" in tensors:
        return "block"
    if "mask" in tensors:
        return "tensor"
    if "k_start" in tensors or "k_end" in tensors:
        return "interval"
    if lo == -UNBOUNDED and hi == UNBOUNDED:
        return "none"
    return "causal" if lo == -UNBOUNDED else "window"


def _is_of(shape: tuple[int, ...], target: tuple[int | None, ...]) -> bool:
    return len(shape) == len(target) and all(size in (x, None) for x, size in zip(shape, target, strict=True))


def _check_dtype(term, x: torch.Tensor) -> None:
    if dtype_name(x.dtype) in term.dtypes:
        return
    if term.dtypes == ("bool",):
        raise TypeError(
            f"{term.name} has dtype {x.dtype}; it must be bool, True = attend (an additive mask goes to bias=)"
        )
    hint = " (a bool mask goes to mask=)" if x.dtype == torch.bool else ""
    raise TypeError(f"{term.argument or term.name} has dtype {x.dtype}; supported are {', '.join(term.dtypes)}{hint}")


def _check_shape(term, shape: tuple[int, ...], problem: Problem) -> None:
    # A size that no Problem has, None, may be any: who reads the argument has checked it.
    targets = [tuple(1 if size == "1" else getattr(problem, size, None) for size in sizes) for sizes in term.shapes]
    if any(_is_of(shape, target) for target in targets) or (term.broadcast and broadcasts(shape, targets[0])):
        return
    name = term.argument or term.name
    texts = [f"[{', '.join(sizes)}]" if sizes not in ((), ("1",)) else "one number" for sizes in term.shapes]
    here = " or ".join(str(target) for target, text in zip(targets, texts, strict=True) if text != "one number")
    hint = ""
    if term.shapes == (SCORES,) and shape == (problem.batch, problem.seqlen_k):
        hint = f" (padding [batch, seqlen_k] goes in as {name}[:, None, None])"
    allowed = " or ".join(dict.fromkeys(texts))
    rule = "be broadcastable to" if term.broadcast else "be"
    raise ValueError(f"{name} has shape {shape}; it must {rule} {allowed}, here {here}{hint}")
