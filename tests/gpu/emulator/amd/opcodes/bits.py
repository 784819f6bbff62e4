"""What scalar and vector instructions do with bits."""

import numpy as np


def shift_of(count: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How far to shift x: the lowest bits of the count, in the type of x."""
    return count.astype(x.dtype) & x.dtype.type(8 * x.dtype.itemsize - 1)


def reversed_bits(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(x)[..., None].view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(np.uint32)[..., 0]
