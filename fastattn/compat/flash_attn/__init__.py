"""flash-attn 2.8's package on fastattn's kernels: the same functions, layouts and rules, on any device.

`fastattn.compat.install_flash_attn()` puts it into sys.modules as `flash_attn`. FlashAttention-3's functions are in
`fa3` (its module is called `flash_attn_interface`), FlashAttention-4's in `fa4` (`flash_attn.cute`). docs/flash_attn.md
says where they differ from the originals.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"
"""Of flash-attn, whose functions these are: what its users compare with."""

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
