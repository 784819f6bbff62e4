"""fastattn: fused attention for PyTorch, on CPUs first. See README.md; start with `fastattn.attention`."""

from pathlib import Path
from typing import TYPE_CHECKING

from . import patterns
from .api import attention, explain
from .backends.cpu import release_scratch
from .calls import FallbackWarning, last_call, record, use
from .compat.sdpa import scaled_dot_product_attention
from .dispatch import UnsupportedError
from .later import later
from .layouts.csr import attention_csr
from .layouts.varlen import attention_varlen
from .masks import BlockMask, Mask
from .merging import merge
from .operators.library import fingerprint
from .scores.dropout import dropout_mask
from .torch_internals import add_to_keys_of_compiled_graphs

if TYPE_CHECKING:
    from . import learned, nn, relative, viz
    from .kv_cache import KVCache, quantization_error
    from .layouts.kvcache import attention_with_kvcache
    from .replacing.apply import apply
    from .replacing.audit import audit
    from .replacing.sdpa_patch import patch_sdpa
    from .replacing.verify import verify
    from .seeing.capture import capture
    from .seeing.rollout import rollout
    from .seeing.stats import attention_stats
    from .seeing.weights import attention_weights
    from .selection import coverage, select_blocks
    from .typed import attention, attention_csr  # noqa: F811  (with overloads for return_lse)

if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))  # a checkout, where kernels/ lies beside this folder

add_to_keys_of_compiled_graphs(fingerprint())

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "FallbackWarning",
    "KVCache",
    "Mask",
    "UnsupportedError",
    "apply",
    "attention",
    "attention_csr",
    "attention_stats",
    "attention_varlen",
    "attention_weights",
    "attention_with_kvcache",
    "audit",
    "capture",
    "coverage",
    "dropout_mask",
    "explain",
    "last_call",
    "learned",
    "merge",
    "nn",
    "patch_sdpa",
    "patterns",
    "quantization_error",
    "record",
    "relative",
    "release_scratch",
    "rollout",
    "scaled_dot_product_attention",
    "select_blocks",
    "use",
    "verify",
    "viz",
]

# What most programs never ask for costs their start nothing.
__getattr__, __dir__ = later(
    __name__,
    {
        "KVCache": "kv_cache",
        "apply": "replacing.apply",
        "attention_stats": "seeing.stats",
        "attention_weights": "seeing.weights",
        "attention_with_kvcache": "layouts.kvcache",
        "audit": "replacing.audit",
        "capture": "seeing.capture",
        "coverage": "selection",
        "learned": "learned:",
        "nn": "nn:",
        "patch_sdpa": "replacing.sdpa_patch",
        "quantization_error": "kv_cache",
        "relative": "relative:",
        "rollout": "seeing.rollout",
        "select_blocks": "selection",
        "verify": "replacing.verify",
        "viz": "viz:",
    },
)
