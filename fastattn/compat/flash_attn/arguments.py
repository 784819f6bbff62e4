"""flash-attn's arguments as fastattn's: layouts, windows, chunks, and what is refused."""

import torch

from ...api import attention
from ...checks import check_int, check_tensors, one_line
from ...dispatch import UnsupportedError
from ...layouts.kvcache import attention_with_kvcache
from ...layouts.varlen import attention_varlen
from ...masks.intervals import Mask

DENSE = "[batch, seqlen, num_heads, head_dim]"


def heads_first(x: torch.Tensor | None) -> torch.Tensor | None:
    """flash-attn's [batch, seqlen, num_heads, head_dim] as attention's [batch, num_heads, seqlen, head_dim], a view;
    and the other way round."""
    return None if x is None else x.transpose(1, 2)


def dense(q, k, v, *, window_size, attention_chunk: int = 0, return_lse: bool, **options):
    """`attention` on DENSE tensors: (out, lse [batch, num_heads, seqlen_q] or None)."""
    check_dense(q, k, v)
    mask = chunks(attention_chunk, q.shape[1], k.shape[1], q.device) if attention_chunk else None
    found = attention(
        heads_first(q), heads_first(k), heads_first(v), mask=mask, window_size=open_sides(window_size),
        return_lse=return_lse, **options,
    )  # fmt: skip
    out, lse = found if return_lse else (found, None)
    return heads_first(out), lse


def packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, window_size, attention_chunk=0,
    return_lse: bool, **options,
):  # fmt: skip
    """`attention_varlen`: (out, lse [num_heads, total_q] or None)."""
    if attention_chunk:
        lists = "block_table", "seqused_q", "seqused_k"
        refuse(**{f"attention_chunk with {name}": options.get(name) for name in lists})
        cu_seqlens_q, cu_seqlens_k = cut_into_chunks(attention_chunk, cu_seqlens_q, cu_seqlens_k)
        max_seqlen_q = max_seqlen_k = None
    found = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=open_sides(window_size),
        return_lse=return_lse, **options,
    )  # fmt: skip
    return found if return_lse else (found, None)


def with_cache(q, k_cache, v_cache, k, v, *, cache_seqlens, block_table, window_size, return_lse: bool, **options):
    """`attention_with_kvcache` on DENSE tensors and caches, or pages [num_pages, page_size, num_heads_k, head_dim]."""
    new = {name: x for name, x in (("k", k), ("v", v)) if x is not None}
    _check_rank(q=q, k_cache=k_cache, v_cache=v_cache, **new)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens=None: k cannot be appended without the lengths of what is in the cache")
        cache_seqlens = k_cache.shape[1]
        if block_table is not None:
            check_tensors(block_table=block_table)
            cache_seqlens *= block_table.shape[-1]
    found = attention_with_kvcache(
        heads_first(q), heads_first(k_cache), heads_first(v_cache), heads_first(k), heads_first(v),
        cache_seqlens=cache_seqlens, block_table=block_table, window_size=open_sides(window_size),
        return_lse=return_lse, **options,
    )  # fmt: skip
    return (heads_first(found[0]), found[1]) if return_lse else heads_first(found)


def unpacked(name: str, x: torch.Tensor, parts: int, rank: int) -> tuple[torch.Tensor, ...]:
    """The `parts` tensors in dimension -3 of a packed one, as views."""
    check_tensors(**{name: x})
    if x.dim() != rank or x.shape[-3] != parts:
        lead = "batch, seqlen" if rank == 5 else "total"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{lead}, {parts}, num_heads, head_dim]")
    return x.unbind(-3)


def check_dense(q, k, v) -> None:
    """TypeError or ValueError in the caller's layout, before dimensions are moved."""
    _check_rank(q=q, k=k, v=v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]} (shape {tuple(k.shape)}), q {q.shape[0]}; they must agree")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]} (shape {tuple(k.shape)}), q {q.shape[3]}; they must agree")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}; all but head_dim must agree")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k {k.shape[2]} (the layout is {DENSE}); the first must be a multiple of the "
            "second"
        )


def _check_rank(**tensors) -> None:
    check_tensors(**tensors)
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {DENSE}")


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


def cut_into_chunks(attention_chunk: int, cu_seqlens_q, cu_seqlens_k) -> tuple[torch.Tensor, torch.Tensor]:
    """(cu_seqlens_q, cu_seqlens_k) where each chunk of a sequence is a sequence: the chunks of `chunks`."""
    check_int("attention_chunk", attention_chunk, least=1)
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    cuts_q, cuts_k = starts_q[:1], starts_k[:1]
    for begin_q, end_q, begin_k, end_k in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        seqlen_q, seqlen_k = end_q - begin_q, end_k - begin_k
        first = (seqlen_k - seqlen_q) // attention_chunk * attention_chunk  # where the chunk of query 0 begins
        for edge in (*range(first, seqlen_k, attention_chunk), seqlen_k):
            cuts_q.append(begin_q + min(max(edge - seqlen_k + seqlen_q, 0), seqlen_q))
            cuts_k.append(begin_k + max(edge, 0))
    return tuple(
        torch.tensor(cuts, dtype=x.dtype, device=x.device)
        for cuts, x in ((cuts_q, cu_seqlens_q), (cuts_k, cu_seqlens_k))
    )


def with_qv(q, k, v, qv, softmax_scale):
    """(q, k, softmax_scale) whose products are q k^T + qv v^T; q and k are copied.

    qv as q, but with v's head_dim; the default scale counts the columns of both, as FlashAttention-3 does.
    """
    if qv is None:
        return q, k, softmax_scale
    check_tensors(q=q, k=k, v=v, qv=qv)
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
