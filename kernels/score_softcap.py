"""softcap: scores s become softcap * tanh(s / softcap)."""

import triton
import triton.language as tl

from .softmax import LOG2E


@triton.jit
def tanh(x):
    """x + x^3 P(x^2) near 0 (Cephes), else from exp2: the difference would cancel near 0."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def capped(s, scale, softcap):
    """(softcap * tanh(scale * s / softcap) in units of log2, its derivative by the scaled s)"""
    t = tanh(s * (scale / softcap))
    return t * softcap * LOG2E, 1.0 - t * t


@triton.jit
def capped_gradient(ds, derivative):
    """The gradient of the scaled product from that of the score."""
    return tl.where(ds == 0.0, 0.0, ds * derivative)
