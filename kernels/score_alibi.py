"""alibi_slopes: a score loses slope * distance between query and key, the ends of both aligned."""

import triton
import triton.language as tl

from .rows import query_start
from .softmax import LOG2E
from .sums import row_sum


@triton.jit
def load_slope(alibi_slopes, strides, batch, heads):
    """In units of log2; 0 without slopes."""
    if alibi_slopes is None:
        return 0.0
    else:
        return tl.load(alibi_slopes + batch * strides[0] + heads * strides[1]).to(tl.float32) * LOG2E


@triton.jit
def distances(window, lengths):
    """How far each query is from each key."""
    return tl.abs(window.rows + query_start(lengths) - (window.col + window.local_cols)).to(tl.float32)


@triton.jit
def slope_gradient(ds, window, lengths):
    """What each query takes from the gradient of the slope."""
    return row_sum(ds * distances(window, lengths))
