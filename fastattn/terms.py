"""TERMS: the one table of what a call adds to q, k and v. `Terms` are its values in one call, as kernels get them.

Validation, `Problem`, autograd, the backends and the reference go through this table; the compiled kernels read the
fields by name. One more score modification is a file in fastattn/scores/ and a line here.
"""

from collections import namedtuple

from .checks import check_flag
from .masks.intervals import UNBOUNDED
from .scores import SCORES, Term, alibi, bias, dropout, relative, rotary, scale, sinks, softcap


def _check_skip(value) -> bool | None:
    return value if value is None else check_flag("skip_negligible", value, " (None: where it is known to pay)")


_ROWS = SCORES[:3]

TERMS = (
    Term("diagonal_lo", -UNBOUNDED),
    Term("diagonal_hi", UNBOUNDED),
    Term("query_start", 0),
    Term("mask", shapes=(SCORES,), broadcast=True, dtypes=("bool",)),
    Term("block_mask"),
    Term("k_start", shapes=(_ROWS,), broadcast=True, dtypes=("int32",), argument="k_start of mask"),
    Term("k_end", shapes=(_ROWS,), broadcast=True, dtypes=("int32",), argument="k_end of mask"),
    bias.TERM,
    alibi.TERM,
    softcap.TERM,
    sinks.TERM,
    scale.TERM,
    dropout.P,
    dropout.SEED,
    dropout.START,
    Term("skip_negligible", check=_check_skip),
    relative.TERM,
    rotary.COS,
    rotary.SIN,
    rotary.INTERLEAVED,
)

SCORE_TERMS = (scale.TERM, softcap.TERM, bias.TERM, relative.TERM, alibi.TERM)
"""Those that act on scores, in the order in which they do."""

FACTS = {term.fact[0]: term.fact[2] for term in TERMS if term.fact}
"""Field of the Problem that a term sets -> its value without that term."""


class Terms(namedtuple("Terms", [term.name for term in TERMS], defaults=[term.neutral for term in TERMS])):
    """The value of each term in one call; validity and shapes have been checked.

    diagonal_lo, _hi     query i sees keys j with diagonal_lo <= j - i <= diagonal_hi (masks.UNBOUNDED: no bound)
    query_start          position of query 0 among the keys, from which ALiBi counts: seqlen_k - seqlen_q if the last
                         query stands at the last key
    k_start, k_end       int32, broadcastable to [batch, num_heads, seqlen_q]: query i sees k_start <= j < k_end
    mask, bias           broadcastable to [batch, num_heads, seqlen_q, seqlen_k]
    block_mask           of batch or 1, num_heads or 1, and these lengths; with it, no k_start, k_end, mask
    relative             a bias of each distance, [num_heads|1, seqlen_q + seqlen_k - 1] or with a batch: entry
                         i - j + seqlen_k - 1 for query i and key j; not beside `bias`
    softmax_scale        a float, or a tensor: one number or [num_heads]
    softcap              0.0: off
    alibi_slopes         [num_heads] or [batch, num_heads]
    sinks                [num_heads]
    dropout_p, seed      seed is an int where dropout_p > 0
    dropout_start        a DropoutStart where the call drops weights as a part of another one; None: it is none
    skip_negligible      whether a kernel looks for keys whose weights are all 0, to skip them; None: where it knows
                         that this pays. No result depends on it
    rotary_cos, _sin     [seqlen_k, pairs], or with a batch: angles by which key j turns (row j) and query i (row
                         query_start + i), before the product; rotary_interleaved: which columns are a pair
    """

    __slots__ = ()

    def at(self, diagonal_lo: int, diagonal_hi: int, query_start: int) -> "Terms":
        """These terms where the lengths of the call give these positions."""
        return tuple.__new__(Terms, (diagonal_lo, diagonal_hi, query_start, *self[_POSITIONS:]))


_POSITIONS = 3
assert Terms._fields[:_POSITIONS] == ("diagonal_lo", "diagonal_hi", "query_start")  # `at` relies on it
