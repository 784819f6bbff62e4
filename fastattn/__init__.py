"""fastattn: fused attention for PyTorch, on CPUs first. See README.md; start with `fastattn.attention`."""

from .api import attention, explain
from .compat.sdpa import scaled_dot_product_attention
from .csr import attention_csr
from .dispatch import FallbackWarning, UnsupportedError, last_call, record, use
from .dropout import dropout_mask
from .masks import Mask

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "Mask",
    "UnsupportedError",
    "attention",
    "attention_csr",
    "dropout_mask",
    "explain",
    "last_call",
    "record",
    "scaled_dot_product_attention",
    "use",
]
