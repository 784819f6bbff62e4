"""Dropout of weights: the bits of fastattn/scores/dropout.py."""

import triton
import triton.language as tl


@triton.jit
def dropout_keep(rows, col, heads, batch, terms, TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """bool [M, N] of the keys from `col` on: whether the weight is kept. col is a multiple of 4, and one evaluation
    serves four neighbouring keys. rows [M, 1]; heads: one, or [M, 1]."""
    zeros = tl.zeros([M, N // 4], tl.uint32)
    c0 = (col // 4 + tl.arange(0, N // 4)[None, :]).to(tl.uint32) + zeros
    c1, c2, c3 = rows.to(tl.uint32) + zeros, tl.cast(heads, tl.uint32) + zeros, batch.to(tl.uint32) + zeros
    w0, w1, w2, w3 = tl.philox(terms.seed, c0, c1, c2, c3)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [M, N])
    keep = words >= terms.threshold.to(tl.uint32)
    if TRANSPOSED:
        return tl.trans(keep)
    else:
        return keep
