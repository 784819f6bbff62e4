"""`attention_with_kvcache()`: appends keys and values to a cache in place, and attends over it."""

import torch

from ..backends import cpu
from ..calls import current_backend
from ..checks import check_flag, check_int
from ..differentiable import run
from ..plans import Bound, bounds, remember
from ..scores.rotary import NAMES as ROTARY
from ..torch_internals import is_transformed
from .sequence_arguments import bind_cache
from .sequences import PLACES, Sequences

_shapes, _new, _is_grad_enabled = cpu.shapes, tuple.__new__, torch.is_grad_enabled


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: int | torch.Tensor,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries over a cache of keys and values, to which k and v are appended first, in place.

    q                 [batch, num_heads, seqlen_q, head_dim], any strides; float32, bfloat16, float16 or float64
    k_cache, v_cache  [entries, num_heads_k, capacity, head_dim or head_dim_v], any strides, in q's dtype or int8; with
                      block_table pages [num_pages, num_heads_k, page_size, dim]. flash-attn's caches
                      [entries, capacity, num_heads_k, dim] go in as x.transpose(1, 2)
    k, v              [batch, num_heads_k, new keys, head_dim or head_dim_v] in q's dtype, or None: nothing is appended
    cache_seqlens     an int, or int32 or int64 [batch]: how many keys a sequence has before k is appended
    rotary_cos, _sin  [positions, rotary_dim / 2], float: new key j is turned by those of position cache_seqlens + j
                      before it is stored, query i by those of cache_seqlens + i (of cache_seqlens for all queries, if
                      neither causal nor window_size is given); only together with k
    rotary_interleaved  columns 2 i and 2 i + 1 are a pair (GPT-J); else i and i + rotary_dim / 2 (GPT-NeoX, Llama)
    cache_batch_idx   [batch], int32 or int64: the cache entry of each sequence; None: entry i is that of sequence i
    cache_leftpad     [batch], int32 or int64: where its keys begin in the cache; None: at 0
    block_table       [batch, entries], int32 or int64: key j of sequence i is in page block_table[i, j // page_size].
                      Any page size; entries past a sequence's last page are not looked at
    causal            query i sees keys up to i + seqlen_k - seqlen_q, where seqlen_k counts what is appended
    k_scale, v_scale  float32 [entries or pages, num_heads_k, capacity or page_size], for int8 caches: an element times
                      the factor of its row is the value. Appending rounds a row to 127 steps and writes its factor
    num_splits        flash-attn's; the CPU kernels split by the shape alone, whatever it is

    window_size, softmax_scale, softcap, alibi_slopes ([num_heads] or [batch, num_heads]), sinks, return_lse and backend
    are those of `fastattn.attention`.

    Returns out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype and memory order, or (out, lse) with lse
    [batch, num_heads, seqlen_q], natural log, float32 (float64 for float64 inputs): bit for bit what `attention` gives
    for the keys of each sequence, gathered. Nothing in the cache changes but the appended rows. No gradients.

    Raises TypeError or ValueError that names the argument, its value and the rule, also for each entry of a list and
    for a cache that is full, before anything is written; `UnsupportedError` if the named backend refuses. Methods:
    Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023), pages as in arXiv 2309.06180, rotary embedding arXiv 2104.09864.
    """
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            "attention_with_kvcache writes into its caches and is no operator of a graph: call it outside of "
            "torch.compile, from a function that torch.compiler.disable marks"
        )
    if backend is None:
        backend = current_backend()
    places = block_table, cache_seqlens, cache_batch_idx, cache_leftpad, k, v, k_scale, v_scale
    settings = causal, window_size, softmax_scale, softcap, return_lse, backend, rotary_interleaved, num_splits
    key = (
        None if is_transformed() else _shapes(q, k_cache, v_cache, *places, rotary_cos, rotary_sin, alibi_slopes, sinks)
    )
    try:
        bound = None if key is None else bounds.get((key, settings))
    except TypeError:  # an argument is not hashable: the checks say which
        bound = None
    if bound is None or (_is_grad_enabled() and _wants_grad(q, k_cache, v_cache, k, v, alibi_slopes, sinks)):
        tables = rotary_cos, rotary_sin
        bound = _without_tensors(_bind(q, k_cache, v_cache, places + tables, alibi_slopes, sinks, settings))
        if key is not None:
            remember((key, settings), bound)
    choice, problem, rest, _ = bound
    terms = _new(Sequences, _PACKED + places + rest + (rotary_cos, rotary_sin, bool(rotary_interleaved)))
    if alibi_slopes is not None or sinks is not None:
        terms = terms._replace(alibi_slopes=alibi_slopes, sinks=sinks)
    out, lse = run(_new(Bound, (choice, problem, terms, backend)), q, k_cache, v_cache)
    return (out, lse) if return_lse else out


_PACKED, _REST, _LAST = (None,) * PLACES.index("block_table"), len(PLACES), -len(ROTARY)
_NAMES = (*PLACES[len(_PACKED) :], *ROTARY[:2])
assert Sequences._fields[_LAST:] == ROTARY


def _wants_grad(*tensors) -> bool:
    return any([x is not None and x.requires_grad for x in tensors])


def _bind(q, k_cache, v_cache, places, alibi_slopes, sinks, settings) -> Bound:
    causal, window_size, softmax_scale, softcap, return_lse, backend, interleaved, num_splits = settings
    if isinstance(softmax_scale, torch.Tensor):
        raise TypeError("softmax_scale must be a float: attention over a cache learns nothing (use .item())")
    check_int("num_splits", num_splits)
    places = dict(zip(_NAMES, places, strict=True))
    places["rotary_interleaved"] = check_flag("rotary_interleaved", interleaved)
    return bind_cache(
        q, k_cache, v_cache, places, causal=causal, window_size=window_size, softmax_scale=softmax_scale,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, backend=backend,
    )  # fmt: skip


def _without_tensors(bound: Bound) -> Bound:
    """`bound` with the fields of its terms between `PLACES` and rotary: nobody may keep the tensors of a call."""
    return bound._replace(terms=tuple(bound.terms._replace(alibi_slopes=None, sinks=None)[_REST:_LAST]))
