"""Sums along the rows of a tile."""

import triton
import triton.language as tl


@triton.jit
def row_sum(x):
    """The sum of each row, the same bits in every lane that holds it. The compiler would fuse a product in x with the
    addition of another lane's, which that lane has rounded; the 0 takes the product in its place."""
    return tl.sum(x + 0.0, 1)
