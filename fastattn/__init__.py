"""fastattn: fused attention for PyTorch, on CPUs first. See README.md; start with `fastattn.attention`."""

from . import patterns
from .api import attention, explain
from .block_mask import BlockMask
from .compat.sdpa import scaled_dot_product_attention
from .csr import attention_csr
from .dispatch import FallbackWarning, UnsupportedError, last_call, record, use
from .dropout import dropout_mask
from .masks import Mask
from .selection import coverage, select_blocks

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "FallbackWarning",
    "Mask",
    "UnsupportedError",
    "attention",
    "attention_csr",
    "coverage",
    "dropout_mask",
    "explain",
    "last_call",
    "patterns",
    "record",
    "scaled_dot_product_attention",
    "select_blocks",
    "use",
]
