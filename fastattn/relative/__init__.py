"""Relative positions, for `attention(bias=...)`: biases that follow from where queries and keys stand.

Each function takes the tables of a model and returns an object for one or many calls; gradients reach the tables, and
no tensor of seqlen x seqlen is made. docs/relative.md has the formulas.
"""

from ..scores.relative import RelativeBias
from .decomposed import decomposed
from .distances import alibi, t5, toeplitz
from .positions import deberta, shaw, transformer_xl
from .windows import beit, swin

__all__ = [
    "RelativeBias", "alibi", "beit", "deberta", "decomposed", "shaw", "swin", "t5", "toeplitz", "transformer_xl"
]  # fmt: skip
