"""The functions of other packages, under their own names and with their own rules, on fastattn's kernels."""

from .flash_attn.installing import install_flash_attn

__all__ = ["install_flash_attn"]
