"""Learned attention: other normalizers than the softmax, and what models make of scores, weights and outputs.

`from fastattn import learned`; nothing of it is loaded by `import fastattn`. docs/learned.md has each kind with its
formula, its call and what it costs.
"""

from .cosine import cosine_attention
from .differential import differential_attention, differential_lambda
from .gated import gated_attention
from .normalized import attention
from .synthesizer import factorized_synthesizer_attention, synthesizer_attention
from .talking_heads import talking_heads_attention

__all__ = [
    "attention",
    "cosine_attention",
    "differential_attention",
    "differential_lambda",
    "factorized_synthesizer_attention",
    "gated_attention",
    "synthesizer_attention",
    "talking_heads_attention",
]
