"""The functions of other packages, under their own names and with their own rules, on fastattn's kernels."""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .flash_attn.installing import install_flash_attn

__all__ = ["install_flash_attn"]
__getattr__, __dir__ = later(__name__, {"install_flash_attn": "flash_attn.installing"})
