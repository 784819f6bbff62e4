"""`Sequences`: what a call of many sequences adds to q, k and v."""

from collections import namedtuple

from ..terms import Terms

_NEUTRAL = Terms()

PLACES = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "block_table", "cache_seqlens", "cache_batch_idx",
    "cache_leftpad", "k", "v", "k_scale", "v_scale",
)  # fmt: skip


class Sequences(namedtuple("Sequences", (*PLACES, *Terms._fields), defaults=(*[None] * len(PLACES), *_NEUTRAL))):
    """In the place of `fastattn.terms.Terms` for the layouts "varlen" and "cache": where the rows of each sequence lie,
    and its terms, of which diagonal_lo, diagonal_hi and query_start count from length of keys - length of queries.

    cu_seqlens_q, _k  int32 or int64 [sequences + 1]: q (k, v) are [1, heads, total, dim], sequence i its rows
                      cu_seqlens[i] ... cu_seqlens[i + 1] - 1; None: a batch entry each
    seqused_q, _k     [sequences]: how many of its rows a sequence uses, from its first; None: all
    block_table       [sequences, entries]: k and v are [pages, num_heads_k, page_size, dim], key j of sequence i lies
                      in page block_table[i, j // page_size]; None: k and v have no pages
    cache_seqlens     an int, or [sequences]: k and v are caches that hold so many keys before k and v are appended
    cache_batch_idx   [sequences]: the batch entry of the cache; None: its own. cache_leftpad: its first key; None: 0
    k, v              [sequences, num_heads_k, new keys, dim], to be appended; None: nothing is
    k_scale, v_scale  float32, the factors of the rows of int8 caches
    rotary_cos, _sin  [positions, rotary_dim / 2]; of a cache, what is appended turns and the queries do
    """

    __slots__ = ()


_FIRST = len(PLACES)


def terms_of(sequences: Sequences) -> Terms:
    """The terms alone."""
    return Terms._make(sequences[_FIRST:])
