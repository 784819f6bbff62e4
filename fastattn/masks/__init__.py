"""Masks: intervals as loop bounds (`Mask`), and lists of blocks (`BlockMask`)."""

from functools import partial

from ..torch_internals import outside_of_graphs
from .block_mask import BlockMask
from .intervals import ALIGNMENTS, UNBOUNDED, Mask, Window, check_window, dense, diagonal_bounds

__all__ = ["ALIGNMENTS", "UNBOUNDED", "BlockMask", "Mask", "Window", "check_window", "dense", "diagonal_bounds"]

_outside = partial(
    outside_of_graphs,
    why="the lists of a BlockMask depend on the values of tensors: build it outside of torch.compile and pass it in",
)
# All that makes a BlockMask: how long its lists are depends on values, and Dynamo would break its graph many times.
for _name, _function in list(vars(BlockMask).items()):
    if isinstance(_function, classmethod):
        setattr(BlockMask, _name, classmethod(_outside(_function.__func__)))
    elif _name in ("__and__", "__rand__", "__or__", "__invert__", "where", "reblock", "transpose"):
        setattr(BlockMask, _name, _outside(_function))
