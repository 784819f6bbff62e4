"""softmax_scale: a number, or one of each head, which has a gradient."""

import triton
import triton.language as tl

from .softmax import LOG2E


@triton.jit
def load_scale(softmax_scale, stride, heads, LEARNED_SCALE: tl.constexpr):
    if LEARNED_SCALE:
        return tl.load(softmax_scale + heads * stride).to(tl.float32)
    else:
        return softmax_scale


@triton.jit
def scaled(s, scale, APART: tl.constexpr):
    """In units of log2. APART: as `Flags.SCALE_APART`."""
    if APART:
        return s * scale * LOG2E
    else:
        return s * (scale * LOG2E)


@triton.jit
def scale_gradient(dproduct, product):
    """The part of each query in the gradient of the scale."""
    return tl.sum(tl.where(dproduct == 0.0, 0.0, dproduct * product), 1)
