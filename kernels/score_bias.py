"""bias: a tensor added to the scores; -inf hides a key. Its gradient is that of the scores (backward_bias.py)."""

import triton
import triton.language as tl

from .softmax import LOG2E

FINITE = tl.constexpr(1.5e38)  # largest bias in units of log2: sums of it with a score stay finite


@triton.jit
def load_scores(rows, window):
    """A tile of bias or mask whose first row and column `rows` points to; 0 outside the tensor."""
    inside = (window.local_rows < window.rows_left) & (window.local_cols < window.cols_left)
    pointers = rows.ptr + window.local_rows * rows.row_stride + window.local_cols * rows.col_stride
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def is_seen(bias):
    return bias.to(tl.float32) != float("-inf")


@triton.jit
def bias_log2(bias):
    """A finite bias stays finite in units of log2: finfo.min pushes a key away, only -inf masks it; +inf, NaN stay."""
    b = bias.to(tl.float32)
    scaled = b * LOG2E
    scaled = tl.where((scaled > FINITE) & (b < float("inf")), FINITE, scaled)
    return tl.where(scaled < -FINITE, -FINITE, scaled)
