"""The sparse patterns that are timed, by name, and the `BlockMask` of each for a length and a number of heads."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from fastattn import BlockMask, patterns

WINDOW = 512
"""Keys that a query of "window" sees, its own among them."""
REACH, GLOBAL_TOKENS = 256, 16
"""Of "longformer": keys to either side, and tokens that see and are seen by all."""
SINKS, RECENT = 4, 1024
"""Of "streaming": first keys, and last keys up to the query's own."""
DILATION = 4
"""Of "dilated"."""


class Pattern(NamedTuple):
    """How a mask is built, and the same as FlexAttention's mask_mod where a user would write it as arithmetic.

    build     (seqlen, num_heads) -> BlockMask
    mask_mod  None: FlexAttention looks the bits of partial blocks up
    """

    build: Callable[[int, int], BlockMask]
    mask_mod: Callable | None = None


def _random(block_size: int, share: float) -> Pattern:
    def build(seqlen, num_heads):
        num_blocks = max(round(share * seqlen / block_size), 1)
        return patterns.random_blocks(seqlen, num_blocks=num_blocks, num_heads=num_heads, block_size=block_size)

    return Pattern(build)


def _window(seqlen, num_heads):
    return patterns.sliding_window(seqlen, left=WINDOW - 1, right=0)


def _longformer(seqlen, num_heads):
    return patterns.longformer(seqlen, window=REACH, tokens=GLOBAL_TOKENS)


def _streaming(seqlen, num_heads):
    return patterns.streaming(seqlen, num_sinks=SINKS, window=RECENT)


def _dilated(seqlen, num_heads):
    return patterns.dilated_window(seqlen, left=REACH, right=REACH, dilation=DILATION)


def _bigbird(seqlen, num_heads):
    return patterns.bigbird(seqlen, num_heads=num_heads)


def _fixed(seqlen, num_heads):
    return patterns.deepspeed_fixed(seqlen, num_local_blocks=16, num_global_blocks=2, causal=True)


def _neighborhood(seqlen, num_heads):
    """A picture twice as wide as high, or as near to it as powers of two are."""
    height = 1 << ((seqlen.bit_length() - 1) // 2)
    width = seqlen // height
    return patterns.neighborhood((height, width), kernel_size=min(13, height, width))


SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
"""Densities of the random blocks."""

PATTERNS = {
    f"random{block_size}:{100 * share:g}%": _random(block_size, share) for block_size in (128, 64) for share in SHARES
} | {
    "window": Pattern(_window, lambda b, h, i, j: (j <= i) & (j > i - WINDOW)),
    "longformer": Pattern(
        _longformer,
        lambda b, h, i, j: ((i - j).abs() <= REACH) | (i < GLOBAL_TOKENS) | (j < GLOBAL_TOKENS),
    ),
    "bigbird": Pattern(_bigbird),
    "streaming": Pattern(_streaming, lambda b, h, i, j: (j <= i) & ((j < SINKS) | (j > i - RECENT))),
    "fixed": Pattern(_fixed),
    "neighborhood": Pattern(_neighborhood),
    "dilated": Pattern(_dilated),
}
"""By name: "randomB:P%" has full blocks of B x B at P % density, drawn for each head."""


@lru_cache(maxsize=4)
def block_mask(pattern: str, seqlen: int, num_heads: int) -> BlockMask:
    """The mask of a pattern; the same object for the same arguments, so that its transpose is made once."""
    return PATTERNS[pattern].build(seqlen, num_heads)
