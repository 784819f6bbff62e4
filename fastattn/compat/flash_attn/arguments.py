"""flash-attn's arguments as fastattn's: layouts, windows, chunks, and what is refused."""

import torch

from ...api import attention
from ...checks import check_int, check_tensors, one_line
from ...dispatch import UnsupportedError
from ...masks.intervals import Mask

DENSE = "[batch, seqlen, num_heads, head_dim]"
PACKED = "[total, num_heads, head_dim]"


def heads_first(x: torch.Tensor | None) -> torch.Tensor | None:
    """flash-attn's [batch, seqlen, num_heads, head_dim] as attention's [batch, num_heads, seqlen, head_dim], a view;
    and the other way round."""
    return None if x is None else x.transpose(1, 2)


def dense(q, k, v, *, window_size, attention_chunk: int = 0, return_lse: bool, **options):
    """`attention` on DENSE tensors: (out, lse [batch, num_heads, seqlen_q] or None)."""
    check_shapes(DENSE, q, k, v)
    mask = chunks(attention_chunk, q.shape[1], k.shape[1], q.device) if attention_chunk else None
    found = attention(
        heads_first(q), heads_first(k), heads_first(v), mask=mask, window_size=open_sides(window_size),
        return_lse=return_lse, **options,
    )  # fmt: skip
    out, lse = found if return_lse else (found, None)
    return heads_first(out), lse


def unpacked(name: str, x: torch.Tensor, parts: int, rank: int) -> tuple[torch.Tensor, ...]:
    """The `parts` tensors in dimension -3 of a packed one, as views."""
    check_tensors(**{name: x})
    if x.dim() != rank or x.shape[-3] != parts:
        lead = "batch, seqlen" if rank == 5 else "total"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{lead}, {parts}, num_heads, head_dim]")
    return x.unbind(-3)


def check_shapes(layout: str, q, k, v) -> None:
    """TypeError or ValueError in the caller's layout, before dimensions are moved."""
    check_tensors(q=q, k=k, v=v)
    rank = layout.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {layout}")
    if rank == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]} (shape {tuple(k.shape)}), q {q.shape[0]}; they must agree")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head_dim {k.shape[-1]} (shape {tuple(k.shape)}), q {q.shape[-1]}; they must agree")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}; all but head_dim must agree")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[-2]} heads and k {k.shape[-2]} (the layout is {layout}); the first must be a multiple of "
            "the second"
        )


def open_sides(window_size):
    """A window as `attention` takes it: negative sides are open, and one that is open on both is none."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        return window_size  # attention says what is wrong with it
    sides = tuple(None if isinstance(side, int) and side < 0 else side for side in window_size)
    return None if sides == (None, None) else sides


def chunks(attention_chunk: int, seqlen_q: int, seqlen_k: int, device) -> Mask:
    """Query i at position p = i + seqlen_k - seqlen_q sees the keys of its chunk: p // attention_chunk."""
    check_int("attention_chunk", attention_chunk, least=1)
    positions = torch.arange(seqlen_q, device=device)[None, None] + seqlen_k - seqlen_q
    starts = positions - positions % attention_chunk
    return Mask.intervals(starts, starts + attention_chunk)


def with_qv(q, k, v, qv, softmax_scale):
    """(q, k, softmax_scale) whose products are q k^T + qv v^T; q and k are copied.

    qv as q, but with v's head_dim; the default scale counts the columns of both, as FlashAttention-3 does.
    """
    if qv is None:
        return q, k, softmax_scale
    check_tensors(qv=qv)
    expected = (*q.shape[:-1], v.shape[-1])
    if qv.shape != expected:
        raise ValueError(f"qv has shape {tuple(qv.shape)}; it must be {expected}: q's with v's columns")
    if softmax_scale is None:
        softmax_scale = (q.shape[-1] + qv.shape[-1]) ** -0.5
    return torch.cat([q, qv], -1), torch.cat([k, v], -1), softmax_scale


_INSTEAD = {
    "q_descale": "fp8 inputs are not supported; pass bfloat16",
    "k_descale": "fp8 inputs are not supported; pass bfloat16",
    "v_descale": "fp8 inputs are not supported; pass bfloat16",
    "score_mod": "its callables are CuTe code; fastattn.attention has bias=, softcap=, alibi_slopes=",
    "score_mod_bwd": "its callables are CuTe code; fastattn.attention has bias=, softcap=, alibi_slopes=",
    "mask_mod": "its callables are CuTe code; fastattn.attention takes mask=, FlexAttention's block masks among them",
    "block_sparse_tensors": "fastattn.attention takes mask=fastattn.BlockMask(...)",
    "block_sparse_tensors_bwd": "fastattn.attention takes mask=fastattn.BlockMask(...)",
    "gather_kv_indices": "fastattn.attention_csr takes lists of keys per query",
}


def refuse(**arguments) -> None:
    """UnsupportedError that names the first argument which is given: its value is neither None, False nor 0."""
    for name, value in arguments.items():
        if value is None or (not isinstance(value, torch.Tensor) and not value):
            continue
        instead = _INSTEAD.get(name, "leave it out")
        raise UnsupportedError(f"{name}={one_line(value)} is not supported: {instead}")
