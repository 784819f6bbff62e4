"""Sinks: one more logit a head in the denominator of the softmax (StreamingLLM, arXiv 2309.17453; gpt-oss)."""

from . import FLOATS, Term, is_given

TERM = Term(
    "sinks", shapes=(("num_heads",),), dtypes=FLOATS, gradient=True, fact=("sinks", is_given, False)
)  # fmt: skip
