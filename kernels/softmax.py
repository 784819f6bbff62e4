"""The softmax in units of log2: log2(e) is folded into the scale, so that exp2 does."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_sink(sinks, stride, heads):
    """One more logit of each head, in units of log2."""
    return tl.load(sinks + heads * stride).to(tl.float32) * LOG2E


@triton.jit
def normalizer(m, total, sink):
    """(factor of the accumulated output, top, log2 of the sum of 2^(score - top)) for the running maximum m and sum.

    lse = (top + log2_total) / log2(e). A row without a key has an infinite sum, so that every weight of it is 0 in the
    backward pass. sink: one more logit in log2 units; -inf for none.
    """
    reference = tl.where(m == float("-inf"), 0.0, m)
    no_sink = sink == float("-inf")
    top = tl.where((total == 0.0) | (reference < sink), sink, reference)
    top = tl.where(no_sink, reference, top)
    shrink = tl.where(total == 0.0, 0.0, tl.exp2(reference - top))
    total = total * shrink + tl.where(no_sink, 0.0, tl.exp2(sink - top))
    factor = tl.where(total == 0.0, 0.0, shrink / total)
    return factor, top, tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def natural_lse(top, log2_total):
    return tl.where(log2_total == float("inf"), float("-inf"), (top + log2_total) * LN2)
