"""Masks: intervals as loop bounds (`Mask`), and lists of blocks (`BlockMask`)."""

from . import builders
from .block_mask import BlockMask
from .intervals import ALIGNMENTS, UNBOUNDED, Mask, Window, check_window, dense, diagonal_bounds

__all__ = ["ALIGNMENTS", "UNBOUNDED", "BlockMask", "Mask", "Window", "check_window", "dense", "diagonal_bounds"]

builders.trace_as_operators()
